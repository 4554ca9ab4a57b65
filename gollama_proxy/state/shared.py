"""What hubs share of workers and callers: each has a copy, the store brings changes.

A hub answers from its copy (`LocalState`), which nothing waits for.  A change made here
is written to the copy, and sent to the store in a *round*: one round trip that writes
what is new here, and reads what is new elsewhere, of all journals (`facts.py`).  It
takes place at once after a change of a fact here, or when the store announces one.  Of
other rows it takes place within `PERIOD`, so that none is older than a second.  Without
any news there is a round each `QUIET`, as an announcement may be lost.

While the store is gone, changes stay in the copy as not sent, also over a restart.
When it is back, they are merged by their age (`facts.py`).  A store that has lost its
data is filled from the copies of all hubs.

**Usage.**  Each hub writes the totals of its ledger, and reads the others'.  There is a
journal for each month.  A row is the total of one ledger on one day, for a subject and
a model: it is set and never incremented, so that it can be written twice.  A hub keeps
what it has read in its own database, so it needs the store only for what is new; one
that was away for longer than the journals are kept lacks that time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from gollama_proxy.state.facts import (
    MAX_REVOCATIONS,
    MAX_TOMBSTONES,
    MAX_WORKERS,
    MOST_WRITTEN,
    NEWS,
    Entry,
    Fact,
    Gap,
    Journal,
    Key,
    Message,
    Stamp,
    StepResult,
    compare,
    decode,
    encode,
    is_sound,
    left_over,
)
from gollama_proxy.state.folder import StateError
from gollama_proxy.state.ledger import FIRST, Ledger, OtherRow, Sums
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.local import LocalState
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

PERIOD = 0.5  # seconds after which there is a round, if anything is new
QUIET = 2.0  # seconds after which there is one in any case
CATCHING_UP = 1.0  # seconds for a round trip that may bring thousands of rows
CHANNEL = "facts"  # has them announced, and read at once
MOST_FACTS = 2 * MAX_WORKERS + MAX_REVOCATIONS + MAX_TOMBSTONES
# Rows of a month, about 300 bytes each: of 16 hubs with 400 pairs of a subject and a
# model on each day.
MOST_TOTALS = 200_000
# Seconds for which a month is kept after the last hub has looked at it: a hub looks at
# the current month and the one before.
EXPIRY = 40 * 86_400.0
# Seconds after which the month before is looked at again, as a hub that was away may
# come back with what it has used there.
SELDOM = 60.0


class Part(Protocol):
    """What takes part in the rounds: a journal, and what to do with its rows."""

    journal: Journal

    @property
    def due(self) -> bool:
        """Whether there is something to write, as far as it is known."""

    async def entries(self) -> Sequence[Entry]:
        """Return the rows to write now, at most `MOST_WRITTEN`; it may be repeated."""

    async def take(self, entries: Sequence[Entry], answer: StepResult) -> bool:
        """Take the answer; return whether another round has to follow at once."""


class SharedState:
    """Shares the state of a hub with others.  `clock` returns monotonic seconds."""

    def __init__(
        self,
        local: LocalState,
        store: Store,
        run: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Share what a hub has; nothing is sent before `start`.

        `run` is the run id of the hub.
        """
        self.local = local
        local.share, local.gap = self._share, self._gap
        self.on_change: Callable[[set[Key]], None] | None = None  # at other hubs
        self.on_round: Callable[[], None] | None = None  # after each attempt
        # When the store was read to its end last; before that, when this began.
        self.read_at = clock()
        self.caught_up = False  # by the last attempt
        self.others: Callable[[], list[str]] = list  # the names of the other hubs
        self._store, self._run = store, run
        self._clock, self._wall = clock, wall
        self._news = False  # announced by another hub, and not read yet
        self._facts = _Facts(local, store.prefix, wall)
        self._parts: list[Callable[[], Sequence[Part]]] = []
        self.add(lambda: [self._facts])
        self.add(UsageJournals(local.ledger, store.prefix).parts)
        self._turn = asyncio.Lock()
        self._complaint = ""
        self._tried_at = 0.0  # when the last round began, whatever the clock shows
        self._rounds = Periodic("rounds of shared state", self._step, PERIOD, delay=0)

    def __repr__(self) -> str:
        return f"<SharedState {self.local!r} unsent={len(self.local.unsent)}>"

    async def _share(self, name: str | None) -> None:
        """Send a change that was made here.

        Raises:
            StateError: another hub has just added a worker with this name.
        """
        if name is None:
            await self.round()
            return
        key = "worker", name
        self._facts.added.add(key)
        try:
            await self.round()
        finally:
            self._facts.added.discard(key)
        if key in self._facts.lost:
            self._facts.lost.discard(key)
            text = f"another hub has just added a worker with the name {name!r}"
            raise StateError(text)

    def _gap(self) -> Gap | None:
        if self.caught_up:
            return None
        return Gap(self.others(), self._wall() - (self._clock() - self.read_at))

    # --- Rounds -------------------------------------------------------------------

    def add(self, parts: Callable[[], Sequence[Part]]) -> None:
        """Have parts take part in the rounds; they are asked for in each."""
        self._parts.append(parts)

    async def start(self) -> None:
        """Begin with the rounds; the first one follows at once if the store is UP."""
        self._store.subscribe_mode(self._note_mode)
        self._rounds.start()
        await self._store.listen(self._store.key(CHANNEL), self._wake)
        await self._store.listen(self._store.key(NEWS), self._note_news)

    async def stop(self) -> None:
        """Send what is left, and end the rounds; the copy stays as it is."""
        await self._rounds.stop()
        await self.round()

    def _wake(self, data: bytes) -> None:
        self._note_news(data)
        if self._news:
            self._rounds.wake()

    def _note_news(self, data: bytes) -> None:
        if data != self._run.encode():
            self._news = True

    def _note_mode(self, mode: Mode) -> None:
        self.caught_up = False
        if mode is Mode.UP:
            self._rounds.wake()

    async def _step(self) -> None:
        quiet = self.caught_up and time.monotonic() - self._tried_at < QUIET
        if quiet and not self._news and not any(part.due for part in self._all()):
            return
        await self.round()

    def _all(self) -> list[Part]:
        return [part for parts in self._parts for part in parts()]

    async def round(self) -> bool:
        """Send what is new here, read what is new elsewhere, until nothing is left.

        Returns whether the store has answered.
        """
        try:
            async with self._turn:
                began = self._clock()
                while await self._exchange():
                    began = self._clock()
                self.read_at, self.caught_up = began, True
        except (StoreError, ValueError) as exc:
            self.caught_up = False
            if not isinstance(exc, StoreDownError) and self._complaint != str(exc):
                self._complaint = str(exc)
                logger.error("nothing is shared with other hubs: %s", exc)
            return False
        finally:
            if self.on_round is not None:
                self.on_round()
            self._report()
        return True

    async def _exchange(self) -> bool:
        """Make one round trip; return whether another one has to follow."""
        if self._store.mode is not Mode.UP:
            raise StoreDownError(self._store.reason)  # and nothing is prepared
        self._news, self._tried_at = False, time.monotonic()
        batches = [(part, await part.entries()) for part in self._all()]
        commands = [part.journal.command(batch, self._run) for part, batch in batches]
        within = None if self.caught_up else CATCHING_UP
        replies = await self._store.pipe(commands, within=within)
        more = False
        for (part, batch), reply in zip(batches, replies, strict=True):
            more = await part.take(batch, part.journal.read(reply)) or more
        return more

    def _report(self) -> None:
        """Report what other hubs have changed."""
        changed, self._facts.changed = self._facts.changed, set()
        if self.on_change is not None and changed:
            self.on_change(changed)


class _Facts:
    """The workers, holds and revocations of a hub, in step with the store."""

    def __init__(
        self, local: LocalState, prefix: str, wall: Callable[[], float]
    ) -> None:
        channel = f"{prefix}:{CHANNEL}"
        self.journal = Journal(prefix, "facts", MOST_FACTS, channel=channel)
        self.added: set[Key] = set()  # workers that must be new for all hubs
        self.lost: set[Key] = set()  # those that were not
        self._local, self._wall = local, wall
        self._sent: list[tuple[Key, Stamp | None, str]] = []  # by the current round
        # What was read since the start of this life of the store, until all of it is.
        self._seen: set[Key] | None = None
        self._same_life = False
        self.changed: set[Key] = set()  # by other hubs, and not reported yet
        self._full = False

    def __repr__(self) -> str:
        return f"<_Facts {self.journal!r} unsent={len(self._local.unsent)}>"

    # --- What is sent -------------------------------------------------------------

    @property
    def due(self) -> bool:
        return bool(self._local.unsent)

    async def entries(self) -> list[Entry]:
        local = self._local
        self._sent = []
        if self._seen is not None or not self.journal.id:
            return []  # first everything is read, and then what the store lacks is sent
        for key in [*local.unsent][:MOST_WRITTEN]:
            self._sent.append((key, local.stamp(key), local.text(key)))
        return [
            Entry(" ".join(key), self._when(key, stamp), text)
            for key, stamp, text in self._sent
        ]

    def _when(self, key: Key, stamp: Stamp | None) -> str:
        if key in self.added:
            return "n"
        if stamp is None:
            return "a0"
        if stamp.sent:
            return f"v{stamp.version}"
        age = max(0.0, self._wall() - stamp.changed)
        return f"a{int(age * 1e6) + 1}:{stamp.version}"

    # --- What has come ------------------------------------------------------------

    async def take(self, entries: Sequence[Entry], answer: StepResult) -> bool:
        if answer.renewed:
            self._seen = set()
            self._same_life = self.journal.id == self._local.store_id
        await self._take_results(answer)
        await self._take_rows(answer)
        if answer.more:
            return True
        if self._seen is not None:
            await self._end_reading()
        if not self._local.unsent:
            # Not before: a hub that is killed in the middle has to send the rest later.
            await self._local.note_store(self.journal.id)
        return bool(self._local.unsent)

    async def _take_results(self, answer: StepResult) -> None:
        local, versions, theirs = self._local, {}, []
        for (key, stamp, text), result in zip(self._sent, answer.results, strict=True):
            if result.written or result.value == text:
                versions[key] = stamp, result.version
            elif not result.version:
                local.unsent.pop(key, None)
                if not self._full:
                    logger.error("the store has %d facts; no more fit", MOST_FACTS)
                self._full = True
            elif local.stamp(key) == stamp:
                theirs.append(Fact(*key, result.value, result.version))
                if key in self.added:
                    self.lost.add(key)
        await local.note_sent(versions)
        await self._follow(theirs, answer.now)

    async def _take_rows(self, answer: StepResult) -> None:
        local, news = self._local, []
        for row in answer.rows:
            kind, _, name = row.key.partition(" ")
            fact = Fact(kind, name, row.value, row.version)
            if not is_sound(fact):
                continue
            if self._seen is not None:
                self._seen.add(fact.key)
            mine = local.stamp(fact.key)
            if mine is not None and kind in ("jti", "sub"):
                local.unsent.pop(fact.key, None)
                continue
            verdict = compare(mine, fact.version)
            if verdict.take:
                news.append(fact)
            elif verdict.send:
                local.unsent[fact.key] = None
        await self._follow(news, answer.now)

    async def _follow(self, facts: Iterable[Fact], now: int) -> None:
        sound = [fact for fact in facts if is_sound(fact)]
        before = {fact.key: self._local.text(fact.key) for fact in sound}
        await self._local.take(sound, now)
        for key, text in before.items():
            if self._local.text(key) != text:
                self.changed.add(key)

    async def _end_reading(self) -> None:
        """Decide on what the store does not have, as all that it has was read."""
        seen, self._seen = self._seen or set(), None
        gone: list[Key] = []
        for key in self._local.keys:
            mine = self._local.stamp(key)
            if key in seen or key in self._local.unsent or mine is None:
                continue
            if left_over(mine, same_life=self._same_life).send:
                self._local.unsent[key] = None
            else:
                gone.append(key)
        self.changed.update(key for key in gone if self._local.text(key))
        await self._local.drop(gone)


# --- Usage ------------------------------------------------------------------------


class Total(Message):
    """The value of a row."""

    sums: Sums


class _Place(msgspec.Struct, array_like=True):
    """The key of a row, behind the id of its ledger and a space."""

    day: Annotated[int, Meta(ge=0, le=1_000_000)]
    subject: Annotated[str, Meta(max_length=10_000)]
    model: Annotated[str, Meta(max_length=10_000)]


class UsageJournals:
    """The journals of two months, for the ledger of this hub."""

    def __init__(self, ledger: Ledger, prefix: str) -> None:
        self.full = False  # the store has no room for what this hub has used
        self._ledger, self._prefix = ledger, prefix
        self._months: dict[date, Month] = {}

    def __repr__(self) -> str:
        return f"<UsageJournals {[*self._months.values()]!r}>"

    def parts(self) -> list[Month]:
        """Return what takes part in the next round."""
        today = FIRST + timedelta(self._ledger.day)
        this = today.replace(day=1)
        before = (this - timedelta(1)).replace(day=1)
        if self._months.keys() != {before, this}:
            self._months = {
                month: self._months.get(month)
                or Month(self._ledger, self._prefix, month, self)
                for month in (before, this)
            }
        old, new = self._months[before], self._months[this]
        late = time.monotonic() - old.read_at >= SELDOM
        return [old, new] if late or today.day <= 2 or old.open else [new]


class Month:
    """The journal of one month; a part of the rounds."""

    def __init__(
        self, ledger: Ledger, prefix: str, month: date, usage: UsageJournals
    ) -> None:
        self.journal = Journal(
            prefix,
            f"usage:{month:%Y-%m}",
            MOST_TOTALS,
            expiry=EXPIRY,
            channel=f"{prefix}:{NEWS}",
            skip=f"{ledger.id} ",
        )
        self._ledger, self._usage = ledger, usage
        self._first = (month - FIRST).days
        self._end = ((month + timedelta(31)).replace(day=1) - FIRST).days
        self._sent: dict[tuple[int, str, str], int] = {}
        self.read_at = 0.0  # monotonic seconds

    def __repr__(self) -> str:
        return f"<Month {self.journal!r}>"

    @property
    def open(self) -> bool:
        """Whether this month was not read, or this hub has rows of it to write."""
        return not self.journal.id or bool(self._to_send(1))

    @property
    def due(self) -> bool:
        return self.open or self._ledger.busy

    def _to_send(self, most: int) -> list[tuple[int, str, str]]:
        mine = (
            key
            for key in self._ledger.unshared or ()
            if self._first <= key[0] < self._end
        )
        return [*itertools.islice(mine, most)]

    async def entries(self) -> list[Entry]:
        """Return totals that have changed.  A disk that cannot be read delays them."""
        self._sent = {}
        unshared = self._ledger.unshared
        if not self.journal.id or unshared is None:
            return []  # all of them follow, once this life of the store is known
        try:
            await self._ledger.save()
            keys = self._to_send(MOST_WRITTEN)
            totals = await self._ledger.totals(keys)
        except sqlite3.Error as exc:
            logger.debug("usage cannot be read: %s", exc)
            return []
        self._sent = {key: unshared[key] for key in keys}
        return [
            Entry(
                f"{self._ledger.id} {encode(_Place(*key)).decode()}",
                "a0",
                encode(Total(sums=sums)).decode(),
            )
            for key, sums in zip(keys, totals, strict=True)
        ]

    async def take(self, entries: Sequence[Entry], answer: StepResult) -> bool:
        try:
            if answer.renewed:
                await self._ledger.share(self._first)
            await self._ledger.take_others([*self._others(answer)])
        except sqlite3.Error as exc:
            # The rows are read again from the start, when the disk takes them.
            logger.debug("usage of other hubs cannot be kept: %s", exc)
            self.journal.id, self.journal.cursor = "", 0
            return False
        self.read_at = time.monotonic()
        unshared = self._ledger.unshared or {}
        for (key, number), result in zip(
            self._sent.items(), answer.results, strict=True
        ):
            if not result.version and not self._usage.full:
                logger.error("the store has %d rows of usage in a month", MOST_TOTALS)
            self._usage.full = not result.version
            if unshared.get(key) == number:
                del unshared[key]
        # A disk that cannot be read leaves rows to send, and sends none.
        progress = answer.renewed or bool(self._sent)
        return answer.more or (progress and bool(self._to_send(1)))

    def _others(self, answer: StepResult) -> list[OtherRow]:
        """Read the rows of other ledgers; what is malformed is left out."""
        found = []
        for row in answer.rows:
            ledger, _, place = row.key.partition(" ")
            total = decode(Total, row.value, "usage")
            try:
                where = msgspec.json.decode(place, type=_Place)
            except (msgspec.DecodeError, UnicodeError):
                continue
            if total is not None and self._first <= where.day < self._end:
                key = where.day, where.subject, where.model
                found.append(OtherRow(ledger, *key, total.sums))
        return found
