"""What each subject has used of each model on each day (UTC), for months.

A request costs one update of a row in memory.  Once a second a thread adds these rows
to `usage.db`, which is beside the other database of the state folder: its damage costs
no worker and no revocation, and an operator can delete it.  A killed hub loses what
ended in its last second.  What a disk does not take stays in memory, within a limit,
and is written later.

Quotas per day and month rest on the same numbers.  They are in memory from the start,
for every subject that has used something this month.

With a store, hubs exchange totals (`shared.py`): each row is that of one ledger, which
has an id in its file, for a day, a subject and a model.  The rows of others are kept in
a table beside the own ones, so that an answer needs no other hub.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.state.facts import storable
from gollama_proxy.state.folder import Database, StateError, transaction
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

VERSION = 1  # of the tables
DAY = 86_400  # seconds
# Pairs of subject and model that a day has rows for.  Operators choose the subjects,
# but where a worker serves `qwen*`, clients can invent models: what exceeds this is
# added up in one row for each subject, and above twice as many in one for all.
MOST_PAIRS = 5000
MOST_NAME = 256  # characters of a model; usage of longer ones is added up as well
OTHER = "(other)"
MOST_SUBJECTS = 100_000  # whose tokens of the month are known to quotas
MOST_UNSAVED = 20_000  # rows that wait for a disk that takes none
MOST_ROWS = 10_000  # in one answer

GROUPS = ("subject", "model", "day")
SUMS = (
    *("requests", "errors", "prompt_tokens", "completion_tokens", "cached_tokens"),
    "slot_seconds",
)
_SCHEMA = """
CREATE TABLE usage (
    day INTEGER NOT NULL, subject TEXT NOT NULL, model TEXT NOT NULL,
    requests INTEGER NOT NULL, errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, slot_seconds REAL NOT NULL,
    PRIMARY KEY (day, subject, model)
) WITHOUT ROWID;
"""
# Of all versions: an older hub leaves them alone.
_SHARED = """
CREATE TABLE IF NOT EXISTS identity (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS others (
    ledger TEXT NOT NULL, day INTEGER NOT NULL, subject TEXT NOT NULL,
    model TEXT NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, slot_seconds REAL NOT NULL,
    PRIMARY KEY (day, subject, model, ledger)
) WITHOUT ROWID;
CREATE TEMP VIEW IF NOT EXISTS everything AS
    SELECT * FROM usage UNION ALL
    SELECT day, subject, model, requests, errors, prompt_tokens, completion_tokens,
        cached_tokens, slot_seconds
    FROM others;
"""
_PUT_OTHER = "INSERT OR REPLACE INTO others VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_KNOWN_OTHER = """
SELECT prompt_tokens + completion_tokens FROM others
WHERE day = ? AND subject = ? AND model = ? AND ledger = ?
"""
_OWN = """
SELECT requests, errors, prompt_tokens, completion_tokens, cached_tokens, slot_seconds
FROM usage WHERE day = ? AND subject = ? AND model = ?
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, subject, model) DO UPDATE SET
    requests = requests + excluded.requests,
    errors = errors + excluded.errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    slot_seconds = slot_seconds + excluded.slot_seconds
"""
_SPENT = """
SELECT subject, sum((prompt_tokens + completion_tokens) * (day = ?)),
    sum(prompt_tokens + completion_tokens)
FROM everything WHERE day BETWEEN ? AND ? GROUP BY subject LIMIT ?
"""
# Not on the day of a clock that leapt ahead, which has no usage shortly before it.
_DELETE = """
DELETE FROM usage WHERE day < :oldest AND EXISTS (
    SELECT 1 FROM usage WHERE day BETWEEN :today - 31 AND :today - 1
)
"""
_DELETE_OTHERS = _DELETE.replace("usage", "others")
_TEMPORARY = """
CREATE TEMP TABLE IF NOT EXISTS unsaved (
    day, subject, model, requests, errors, prompt_tokens, completion_tokens,
    cached_tokens, slot_seconds
)
"""
_PUT_TEMPORARY = "INSERT INTO unsaved VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_QUESTION = """
SELECT CASE WHEN :by_subject THEN subject END AS of_subject,
    CASE WHEN :by_model THEN model END AS of_model,
    CASE WHEN :by_day THEN day END AS of_day,
    sum(requests), sum(errors), sum(prompt_tokens), sum(completion_tokens),
    sum(cached_tokens), sum(slot_seconds)
FROM (SELECT * FROM everything UNION ALL SELECT * FROM unsaved)
WHERE day >= :first AND day < :end AND subject = coalesce(:subject, subject)
GROUP BY of_subject, of_model, of_day
ORDER BY of_day, sum(prompt_tokens + completion_tokens) DESC, of_subject, of_model
LIMIT :most
"""


class Ended(Protocol):
    """A request that has ended, and what it has used."""

    subject: str
    model: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int
    slot_seconds: float


@dataclass(slots=True)
class Spent:
    """The tokens of a subject, of prompts and answers."""

    today: int = 0
    month: int = 0


@dataclass(slots=True)
class _Row:
    """What was used since the last time that rows were written."""

    spent: Spent
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    slot_seconds: float = 0.0

    def add(self, other: _Row) -> None:
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_Key = tuple[int, str, str]  # day (since 1970), subject, model
Sums = tuple[int, int, int, int, int, float]  # in the order of `SUMS`


class OtherRow(NamedTuple):
    """What a subject has used of a model on a day, by another ledger."""

    ledger: str
    day: int
    subject: str
    model: str
    sums: Sums


class Ledger:
    """Adds up what was used.  `clock` gives Unix time in seconds."""

    def __init__(
        self, file: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Open a database, which is made if it does not exist; None is for memory.

        Raises:
            StateError: the file cannot be used.
        """
        self.clock = clock
        self.id = secrets.token_hex(8)  # of the file; of this object without one
        # Rows that other hubs do not have, each with the number of its last change;
        # None: there are no others.
        self.unshared: dict[_Key, int] | None = None
        self._changes = itertools.count()
        self._days = 400
        self._pending: dict[tuple[str, str], _Row] = {}  # of today
        self._unsaved: dict[_Key, _Row] = {}
        self._dropped = 0  # rows of `_unsaved`, as there were too many
        self._known: set[tuple[str, str]] = set()  # pairs with a row of today
        self._spent: dict[str, Spent] = BoundedDict(MOST_SUBJECTS)
        self._saving = asyncio.Lock()
        self._failing = False
        self._set_day()
        self._database = Database(file, _SCHEMA, VERSION, self._load)

    def __repr__(self) -> str:
        file = self._database.file
        waiting = len(self._pending) + len(self._unsaved)
        return f"<Ledger {file or 'in memory'} rows={waiting} to save>"

    def reconfigure(self, days: int) -> None:
        """Keep this many days, and the current month, from the next save on."""
        if days != self._days:
            self._days, self._turned = days, True

    # --- What is used -------------------------------------------------------------

    def add(self, ended: Ended, *, failed: bool = False) -> None:
        """Add a request that has ended; the request path calls this."""
        clock = self.clock  # a local is cheaper to call
        now = clock()
        if now >= self._ends or now < self._begins:
            self._turn()
        row = self._pending.get((ended.subject, ended.model))
        if row is None:
            row = self._begin_row(ended.subject, ended.model)
        row.requests += 1
        if failed:
            row.errors += 1
        prompt, answer = ended.prompt_tokens, ended.tokens
        if tokens := prompt + answer:
            row.prompt_tokens += prompt
            if answer:
                row.completion_tokens += answer
            if cached := ended.cached_tokens:
                row.cached_tokens += cached
            spent = row.spent
            spent.today += tokens
            spent.month += tokens
        row.slot_seconds += ended.slot_seconds

    def _begin_row(self, subject: str, model: str) -> _Row:
        """Return the row for a pair that is not among the rows to save."""
        key = subject, model
        if key not in self._known:
            key = self._admit(*key)
        row = self._pending.get(key)
        if row is None:
            spent = self._spent.get(key[0])
            if spent is None:
                spent = self._spent[key[0]] = Spent()
            row = self._pending[key] = _Row(spent)
        return row

    def _admit(self, subject: str, model: str) -> tuple[str, str]:
        """Return the row for a pair that has none today."""
        count = len(self._known)
        if count >= MOST_PAIRS or len(model) > MOST_NAME:
            model = OTHER
        if count >= 2 * MOST_PAIRS and (subject, model) not in self._known:
            subject = OTHER
        self._known.add((subject, model))
        return subject, model

    def spent(self, subject: str) -> Spent:
        """Return the tokens that a subject has used today and this month."""
        if not self._begins <= self.clock() < self._ends:
            self._turn()
        return self._spent.get(subject) or Spent()

    @property
    def day(self) -> int:
        """The current day, since 1970."""
        return int(self.clock() // DAY)

    @property
    def day_ends(self) -> float:
        """Unix time of the next midnight (UTC)."""
        return float((self.day + 1) * DAY)

    @property
    def month_ends(self) -> float:
        """Unix time of the next midnight (UTC) that begins a month."""
        first = _first_of_month(self.day)
        return float(_first_of_month(first + 31) * DAY)

    def _set_day(self) -> None:
        self._day = self.day
        self._begins = float(self._day * DAY)
        self._ends = self._begins + DAY
        self._month = _first_of_month(self._day)
        self._turned = True  # numbers of this day may be in the database

    def _turn(self) -> None:
        """Begin another day: at midnight, or when the clock is set."""
        self._put_aside()
        month = self._month
        self._set_day()
        self._known.clear()
        for spent in self._spent.values():
            spent.today = 0
            if month != self._month:
                spent.month = 0

    def _put_aside(self) -> None:
        """Have the rows of this day wait to be saved."""
        for (subject, model), row in self._pending.items():
            self._wait((self._day, subject, model), row)
        self._pending = {}

    def _wait(self, key: _Key, row: _Row) -> None:
        waiting = self._unsaved.get(key)
        if waiting is not None:
            waiting.add(row)
        else:
            self._unsaved[key] = row
            if len(self._unsaved) > MOST_UNSAVED:
                del self._unsaved[next(iter(self._unsaved))]
                self._dropped += 1

    # --- The database -------------------------------------------------------------

    def save_soon(self) -> None:
        """Begin to save what was used since the last time, unless that still runs."""
        due = self._pending or self._unsaved or self._turned
        if due and not self._saving.locked():
            _ = spawn(self.save(), "saving of usage")

    async def save(self) -> None:
        """Save what was used; what cannot be written is tried again the next time."""
        async with self._saving:
            if self.clock() >= self._ends or self.clock() < self._begins:
                self._turn()
            self._put_aside()
            rows, self._unsaved = self._unsaved, {}
            turned, self._turned = self._turned, False
            if not rows and not turned:
                return
            oldest = min(self._month, self._day - self._days)
            limits = {"oldest": oldest, "today": self._day} if turned else None
            try:
                await self._database.run(partial(_write, rows, limits))
            except sqlite3.Error as exc:
                self._turned = self._turned or turned
                later, self._unsaved = self._unsaved, rows
                for key, row in later.items():
                    self._wait(key, row)
                self._note_failure(exc)
                return
            if turned:
                try:
                    await self._look_back()
                except sqlite3.Error as exc:
                    self._turned = True
                    self._note_failure(exc)
                    return
            self._note_success()
            if self.unshared is not None:
                for day, subject, model in rows:
                    key = day, storable(subject), storable(model)
                    self.unshared[key] = next(self._changes)

    async def _look_back(self) -> None:
        """Take the numbers of this day from the database, after its first save.

        They are those of an earlier hub, or of a time before the clock was set.
        """
        day, month = self._day, self._month
        found = await self._database.run(partial(_read_spent, day, month))
        if found is None or (day, month) != (self._day, self._month):
            return  # it is closed, or the next save does this
        sums, known = found
        self._take(sums, known)
        stored = {subject for subject, *_ in sums}
        for (subject, _), row in self._pending.items():  # used in the meantime
            if subject in stored:
                row.spent.today += row.prompt_tokens + row.completion_tokens
                row.spent.month += row.prompt_tokens + row.completion_tokens

    def _load(self, database: sqlite3.Connection) -> None:
        database.execute("PRAGMA temp_store = MEMORY")  # which drops temporary views
        database.executescript(_SHARED)
        for (self.id,) in database.execute("SELECT id FROM identity"):
            break
        else:
            database.execute("INSERT INTO identity VALUES (?)", (self.id,))
        self._take(*_read_spent(self._day, self._month, database))

    def _take(
        self, sums: Iterable[tuple[str, int, int]], known: Iterable[tuple[str, str]]
    ) -> None:
        for subject, today, month in sums:
            spent = self._spent.get(subject)
            if spent is None:
                spent = self._spent[subject] = Spent()
            spent.today, spent.month = today, month
        self._known.update(known)

    def _note_failure(self, exc: sqlite3.Error) -> None:
        if not self._failing:
            text = (
                "%s: cannot be written: %s; usage is kept in memory until it can, and "
                "lost if the hub ends before"
            )
            logger.warning(text, self._database.file, exc)
        self._failing = True

    def _note_success(self) -> None:
        if self._failing:
            text = "%s: is written again; %d rows were lost"
            logger.warning(text, self._database.file, self._dropped)
        self._failing, self._dropped = False, 0

    async def close(self) -> None:
        """Save what is left, and close the database; harmless when closed."""
        if self._database.file:  # else it would be lost at once
            await self.save()
        await self._database.close()

    # --- Other hubs ---------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether something was used that is not saved yet."""
        return bool(self._pending or self._unsaved)

    async def share(self, first: int) -> None:
        """Have all rows since a day be unshared, and those that change later.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        if self.unshared is None:
            self.unshared = {}
        await self.save()
        for key in await self._database.run(partial(_own_keys, first)) or ():
            self.unshared.setdefault(key, next(self._changes))

    async def totals(self, keys: Sequence[_Key]) -> list[Sums]:
        """Return the totals of rows of this ledger that were saved.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        found = await self._database.run(partial(_read_own, keys))
        return found or [(0, 0, 0, 0, 0, 0.0)] * len(keys)

    async def take_others(self, rows: Sequence[OtherRow]) -> None:
        """Keep totals of other ledgers, in place of earlier ones, and count them.

        Raises:
            sqlite3.Error: the database cannot be written; nothing was kept then.
        """
        async with self._saving:
            more = await self._database.run(partial(_write_others, rows))
            for (day, subject), tokens in (more or {}).items():
                spent = self._spent.get(subject)
                if spent is None:
                    spent = self._spent[subject] = Spent()
                if day == self._day:
                    spent.today += tokens
                if self._month <= day <= self._day:
                    spent.month += tokens

    # --- Questions ----------------------------------------------------------------

    async def read(self, question: UsageQuestion) -> UsageSums:
        """Add up what was used, including what is not saved yet.

        Raises:
            StateError: the database cannot be read.
        """
        # A client that leaves does not interrupt it.
        await asyncio.shield(spawn(self.save(), "saving of usage"))
        unsaved = [*self._rows_left()]
        try:
            answer = await self._database.run(partial(_read, question, unsaved))
        except sqlite3.Error as exc:
            raise StateError(f"usage cannot be read: {exc}") from exc
        return answer or UsageSums([], dict.fromkeys(SUMS, 0), complete=True)

    def _rows_left(self) -> Iterable[tuple[Any, ...]]:
        """Yield the rows that a disk has not taken, or that are new."""
        yield from map(_values, self._unsaved.items())
        for (subject, model), row in self._pending.items():
            yield _values(((self._day, subject, model), row))


class UsageQuestion(NamedTuple):
    """What to add up: the days from `first`, before `end` (since 1970)."""

    by: Sequence[str]  # of `GROUPS`, at least one
    first: int
    end: int
    subject: str | None = None  # None: of all


class UsageSums(NamedTuple):
    """The sums of each group, in the order of days, the largest first."""

    rows: list[dict[str, Any]]
    total: dict[str, Any]
    complete: bool  # whether no row was left out


def open_ledger(folder: Path | None, clock: Callable[[], float] = time.time) -> Ledger:
    """Open the ledger of a folder; one that cannot be used is only a warning."""
    if folder is not None:
        try:
            return Ledger(folder / "usage.db", clock)
        except StateError as exc:
            logger.warning("%s; usage will not survive a restart", exc)
    return Ledger(clock=clock)


def day_of(text: str) -> int:
    """Return the day of a date such as 2026-11-30, since 1970.

    Raises:
        ValueError: it is not a date.
    """
    return (date.fromisoformat(text) - FIRST).days


FIRST = date(1970, 1, 1)


def _first_of_month(day: int) -> int:
    return day - (FIRST + timedelta(day)).day + 1


# --- Jobs of the thread -----------------------------------------------------------


def _write(
    rows: dict[_Key, _Row], limits: dict[str, int] | None, database: sqlite3.Connection
) -> None:
    """Add rows, and delete days before the oldest one, together or not at all."""
    database.execute("PRAGMA synchronous = NORMAL")
    with transaction(database):
        database.executemany(_ADD, map(_values, rows.items()))
        if limits is not None:
            database.execute(_DELETE, limits)
            database.execute(_DELETE_OTHERS, limits)


def _own_keys(first: int, database: sqlite3.Connection) -> list[_Key]:
    found = database.execute(
        "SELECT day, subject, model FROM usage WHERE day >= ?", (first,)
    )
    return found.fetchall()


def _read_own(keys: Sequence[_Key], database: sqlite3.Connection) -> list[Sums]:
    nothing: Sums = (0, 0, 0, 0, 0, 0.0)
    return [database.execute(_OWN, key).fetchone() or nothing for key in keys]


def _write_others(
    rows: Sequence[OtherRow], database: sqlite3.Connection
) -> dict[tuple[int, str], int]:
    """Keep totals, together or not at all; return by how many tokens they are more."""
    more: dict[tuple[int, str], int] = {}
    with transaction(database):
        for ledger, day, subject, model, sums in rows:
            place = day, subject, model, ledger
            (known,) = database.execute(_KNOWN_OTHER, place).fetchone() or (0,)
            change = sums[2] + sums[3] - known
            more[day, subject] = more.get((day, subject), 0) + change
            database.execute(_PUT_OTHER, (ledger, day, subject, model, *sums))
    return more


def _values(item: tuple[_Key, _Row]) -> tuple[Any, ...]:
    (day, subject, model), row = item
    return (
        *(day, storable(subject), storable(model), row.requests, row.errors),
        *(row.prompt_tokens, row.completion_tokens, row.cached_tokens),
        row.slot_seconds,
    )


def _read_spent(
    day: int, month: int, database: sqlite3.Connection
) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """Read the tokens of each subject this month, and the pairs of this day."""
    spent = database.execute(_SPENT, (day, month, day, MOST_SUBJECTS)).fetchall()
    pairs = database.execute("SELECT subject, model FROM usage WHERE day = ?", (day,))
    return spent, pairs.fetchall()


def _read(
    question: UsageQuestion,
    unsaved: list[tuple[Any, ...]],
    database: sqlite3.Connection,
) -> UsageSums:
    database.execute(_TEMPORARY)
    database.execute("DELETE FROM unsaved")
    database.executemany(_PUT_TEMPORARY, unsaved)
    found = _sums(database, question, question.by)
    total = _sums(database, question, ()) or [dict.fromkeys(SUMS, 0)]
    return UsageSums(found[:MOST_ROWS], total[0], complete=len(found) <= MOST_ROWS)


def _sums(
    database: sqlite3.Connection, question: UsageQuestion, by: Sequence[str]
) -> list[dict[str, Any]]:
    subject = question.subject
    values = {
        **{f"by_{name}": name in by for name in GROUPS},
        "first": question.first,
        "end": question.end,
        "subject": None if subject is None else storable(subject),
        "most": MOST_ROWS + 1,
    }
    rows = []
    for row in database.execute(_QUESTION, values):
        shown = dict(zip((*GROUPS, *SUMS), row, strict=True))
        if shown["day"] is not None:
            shown["day"] = (FIRST + timedelta(shown["day"])).isoformat()
        shown["slot_seconds"] = round(shown["slot_seconds"], 3)
        rows.append({name: shown[name] for name in (*by, *SUMS)})
    return rows
