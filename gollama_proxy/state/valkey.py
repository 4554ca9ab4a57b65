"""What hubs share of workers and callers: each has a copy, the store brings changes.

A hub answers from its copy (`LocalState`), which nothing waits for.  A change made here
is written to the copy, and sent to the store in a *round*: one round trip that writes
what is new here, and reads what is new elsewhere, of all journals (`journal.py`).  A
round takes place every `PERIOD`, so that nothing is older than a second; at once after
a change here; and at once when the store announces one.

While the store is gone, changes stay in the copy as not sent, also over a restart.
When it is back, they are merged by their age (`facts.py`).  A store that has lost its
data is filled from the copies of all hubs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from gollama_proxy.config.settings import Revoked
from gollama_proxy.state.database import StateError
from gollama_proxy.state.facts import (
    MAX_REVOCATIONS,
    MAX_TOMBSTONES,
    MAX_WORKERS,
    Fact,
    Gap,
    Key,
    Stamp,
    StoredWorker,
    compare,
    is_sound,
    left_over,
)
from gollama_proxy.state.journal import MOST_WRITTEN, Answer, Entry, Journal
from gollama_proxy.state.ledger import Ledger
from gollama_proxy.state.local import LocalState, State
from gollama_proxy.state.store import Mode, Store, StoreDownError, StoreError
from gollama_proxy.state.usage import Usage
from gollama_proxy.tasks import Periodic

logger = logging.getLogger(__name__)

PERIOD = 0.5  # seconds between two rounds
CATCHING_UP = 1.0  # seconds for a round trip that may bring thousands of rows
CHANNEL = "facts"
MOST_FACTS = 2 * MAX_WORKERS + MAX_REVOCATIONS + MAX_TOMBSTONES


class Part(Protocol):
    """What takes part in the rounds: a journal, and what to do with its rows."""

    journal: Journal

    async def entries(self) -> Sequence[Entry]:
        """Return the rows to write now, at most `MOST_WRITTEN`; it may be repeated."""

    async def take(self, entries: Sequence[Entry], answer: Answer) -> bool:
        """Take the answer; return whether another round has to follow at once."""


class SharedState:
    """The state of a hub among others.  `clock` returns monotonic seconds."""

    def __init__(
        self,
        local: State,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Share what a hub has, its `LocalState`; nothing is sent before `start`."""
        assert isinstance(local, LocalState), local
        self.local = local
        self.on_change: Callable[[set[Key]], None] | None = None  # at other hubs
        self.on_round: Callable[[], None] | None = None  # after each attempt
        # When the store was read to its end last; before that, when this began.
        self.read_at = clock()
        self.caught_up = False  # by the last attempt
        self.others: Callable[[], list[str]] = list  # the names of the other hubs
        self._store, self._clock, self._wall = store, clock, wall
        self._facts = _Facts(local, store.prefix, wall)
        self._parts: list[Callable[[], Sequence[Part]]] = []
        self.add(lambda: [self._facts])
        self.add(Usage(local.ledger, store.prefix).parts)
        self._turn = asyncio.Lock()
        self._complaint = ""
        self._rounds = Periodic("rounds of shared state", self._step, PERIOD, delay=0)

    def __repr__(self) -> str:
        return f"<SharedState {self.local!r} unsent={len(self.local.unsent)}>"

    # --- The state --------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        return self.local.folder

    @property
    def ledger(self) -> Ledger:
        return self.local.ledger

    @property
    def workers(self) -> list[StoredWorker]:
        return self.local.workers

    @property
    def revoked(self) -> Revoked:
        return self.local.revoked

    def find(self, name: str) -> StoredWorker | None:
        return self.local.find(name)

    async def put(self, worker: StoredWorker) -> None:
        before = self.local.find(worker.name)
        known = before is not None and before.settings
        key = "worker", worker.name
        await self.local.put(worker)
        if worker.source != "admin" or not worker.settings or known:
            await self.round()
            return
        self._facts.added.add(key)
        try:
            await self.round()
        finally:
            self._facts.added.discard(key)
        if key in self._facts.lost:
            self._facts.lost.discard(key)
            text = f"another hub has just added a worker with the name {worker.name!r}"
            raise StateError(text)

    async def forget(self, name: str) -> None:
        await self.local.forget(name)
        await self.round()

    async def revoke(self, kind: str, value: str) -> None:
        await self.local.revoke(kind, value)
        await self.round()

    def gap(self) -> Gap | None:
        if self.caught_up:
            return None
        return Gap(self.others(), self._wall() - (self._clock() - self.read_at))

    # --- Rounds -----------------------------------------------------------------------

    def add(self, parts: Callable[[], Sequence[Part]]) -> None:
        """Have parts take part in the rounds; they are asked for in each."""
        self._parts.append(parts)

    async def start(self) -> None:
        """Begin with the rounds; the first one follows at once if the store is UP."""
        self._store.subscribe_mode(self._note_mode)
        self._rounds.start()
        await self._store.listen(self._store.key(CHANNEL), self._wake)

    async def stop(self) -> None:
        """Send what is left, and end the rounds; the copy stays as it is."""
        await self._rounds.stop()
        await self.round()

    def _wake(self, data: bytes) -> None:
        self._rounds.wake()

    def _note_mode(self, mode: Mode) -> None:
        self.caught_up = False
        if mode is Mode.UP:
            self._rounds.wake()

    async def _step(self) -> None:
        await self.round()

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
        parts = [part for parts in self._parts for part in parts()]
        batches = [(part, await part.entries()) for part in parts]
        commands = [part.journal.command(batch) for part, batch in batches]
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

    # --- What is sent -----------------------------------------------------------------

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

    # --- What has come ----------------------------------------------------------------

    async def take(self, entries: Sequence[Entry], answer: Answer) -> bool:
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

    async def _take_results(self, answer: Answer) -> None:
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

    async def _take_rows(self, answer: Answer) -> None:
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
