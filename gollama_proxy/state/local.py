"""What a hub keeps over a restart: workers added while it ran, holds, and revocations.

One SQLite database in a folder that one hub at a time may use.  Everything is in memory
as well, so that nothing waits for the disk to read it; changes are written in their
order by one thread.  A disk that takes no more changes is logged, and the hub goes on.

Each change is stamped, so that a hub that shares them with others knows which ones the
others do not have (`facts.py`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from gollama_proxy.config.settings import Revoked
from gollama_proxy.state.facts import (
    HOLDS,
    MAX_REVOCATIONS,
    MAX_TOMBSTONES,
    MAX_WORKERS,
    REVOKED,
    SOURCES,
    TOMBSTONES,
    Fact,
    Gap,
    Key,
    Stamp,
    StoredWorker,
    texts_of,
    with_fact,
)
from gollama_proxy.state.folder import Database, StateError, lock, transaction
from gollama_proxy.state.ledger import open_ledger

logger = logging.getLogger(__name__)

VERSION = 1  # of the tables

_SCHEMA = """
CREATE TABLE workers (
    name TEXT PRIMARY KEY, source TEXT NOT NULL, settings TEXT NOT NULL,
    hold TEXT NOT NULL, agent TEXT NOT NULL
);
CREATE TABLE revocations (
    kind TEXT NOT NULL, value TEXT NOT NULL, added REAL NOT NULL,
    PRIMARY KEY (kind, value)
);
"""
# Of all versions: an older hub leaves it alone, and its changes are not stamped.  The
# row of the kind "store" has the id of the store's life as its name.
_STAMPS = """
CREATE TABLE IF NOT EXISTS stamps (
    kind TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    changed REAL NOT NULL, sent INTEGER NOT NULL, PRIMARY KEY (kind, name)
) WITHOUT ROWID
"""
_PUT_STAMP = "INSERT OR REPLACE INTO stamps VALUES (?, ?, ?, ?, ?)"
_DROP_STAMP = "DELETE FROM stamps WHERE kind = ? AND name = ?"
_PUT_WORKER = "INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?)"
_PUT_REVOCATION = "INSERT OR REPLACE INTO revocations VALUES (?, ?, ?)"


class LocalState:
    """The stored workers and revocations; without a folder, they end with the hub.

    A hub that shares them with others (`shared.py`) sets what is called after a change.
    """

    def __init__(
        self, folder: Path | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        """Open the database of a folder, which is made if it does not exist; blocks.

        A damaged database is moved aside, and a new one begins.

        Raises:
            StateError: the folder cannot be used, another hub uses it, or its database
                was written by a newer version.
        """
        self.folder = folder
        # Shares a change before it is reported as made.  The name is that of a worker
        # that has to be new at all hubs, else None.
        self.share: Callable[[str | None], Awaitable[None]] | None = None
        # Returns what is not known of other hubs; None if everything is.
        self.gap: Callable[[], Gap | None] = lambda: None
        # Facts that the store does not have yet, if this hub shares them.
        self.unsent: dict[Key, None] = {}
        self.store_id = ""  # of the life of the store that was read last
        self._wall = wall
        self._workers: dict[str, StoredWorker] = {}
        self._revocations: dict[Key, float] = {}
        self._stamps: dict[Key, Stamp] = {}  # of workers and holds, also removed ones
        self._lock: TextIO | None = None
        self._failing = False
        self._database = None if folder is None else self._open(folder)
        self.ledger = open_ledger(folder, wall)

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else str(self.folder)
        return (
            f"<LocalState {where} workers={len(self._workers)} "
            f"revocations={len(self._revocations)}>"
        )

    # --- Workers and revocations --------------------------------------------------

    @property
    def workers(self) -> list[StoredWorker]:
        return list(self._workers.values())

    def find(self, name: str) -> StoredWorker | None:
        """Return what is kept of a worker."""
        return self._workers.get(name)

    async def put(self, worker: StoredWorker) -> None:
        """Keep a worker, in place of another one of its name; return when written.

        Raises:
            StateError: there are too many, or another hub has just added one.
        """
        before = self._workers.get(worker.name)
        if before is None and len(self._workers) >= MAX_WORKERS:
            raise StateError(f"{MAX_WORKERS} workers are stored; no more fit")
        if before == worker:
            return
        self._workers[worker.name] = worker
        await self._write(_row_of(worker), *self._stamp(worker.name, before, worker))
        if self.share is not None:
            known = before is not None and before.settings
            new = worker.source == "admin" and worker.settings and not known
            await self.share(worker.name if new else None)

    async def forget(self, name: str) -> None:
        """Remove a worker; return when written.  Harmless if there is none."""
        before = self._workers.pop(name, None)
        if before is not None:
            await self._write(_removal_of(name), *self._stamp(name, before, None))
            if self.share is not None:
                await self.share(None)

    def _stamp(
        self, name: str, before: StoredWorker | None, after: StoredWorker | None
    ) -> Iterator[_Statement]:
        """Mark the facts that differ as changed here, and now."""
        old, new = texts_of(before), texts_of(after)
        for kind, text in new.items():
            if text != old[kind]:
                key = kind, name
                known = self._stamps.get(key)
                version = known.version if known is not None else 0
                yield self._put_stamp(key, Stamp(version, self._wall(), sent=False))
                self.unsent[key] = None
        yield from self._drop_tombstones()

    def _put_stamp(self, key: Key, stamp: Stamp) -> _Statement:
        self._stamps.pop(key, None)  # so that this is the newest one
        self._stamps[key] = stamp
        return _PUT_STAMP, (*key, *stamp)

    def _drop_tombstones(self) -> Iterator[_Statement]:
        """Forget the oldest removals, if there are too many."""
        if len(self._stamps) <= 2 * len(self._workers) + MAX_TOMBSTONES:
            return
        for key in [each for each in self._stamps if not self.text(each)][:100]:
            yield self._drop(key)

    def _drop(self, key: Key) -> _Statement:
        self._stamps.pop(key, None)
        self.unsent.pop(key, None)
        return _DROP_STAMP, key

    @property
    def revoked(self) -> Revoked:
        found: dict[str, set[str]] = {"jti": set(), "sub": set()}
        for kind, value in self._revocations:
            found[kind].add(value)
        return Revoked(frozenset(found["jti"]), frozenset(found["sub"]))

    async def revoke(self, kind: str, value: str) -> None:
        """Keep that a token ("jti") or a subject ("sub") is revoked.

        Raises:
            StateError: there are too many.
        """
        assert kind in ("jti", "sub"), kind
        key = kind, value
        if key in self._revocations:
            return
        if len(self._revocations) >= MAX_REVOCATIONS:
            raise StateError(f"{MAX_REVOCATIONS} revocations are stored; no more fit")
        self._revocations[key] = now = self._wall()
        self.unsent[key] = None
        await self._write((_PUT_REVOCATION, (*key, now)))
        if self.share is not None:
            await self.share(None)

    # --- For a hub that shares them -----------------------------------------------

    def text(self, key: Key) -> str:
        """Return the text of a fact; "" if there is none, or it was removed."""
        kind, name = key
        if kind in ("jti", "sub"):
            return REVOKED if key in self._revocations else ""
        return texts_of(self._workers.get(name))[kind]

    def stamp(self, key: Key) -> Stamp | None:
        """Return how new a fact is; None if there never was one."""
        if key in self._revocations:
            return Stamp(0, self._revocations[key], sent=key not in self.unsent)
        return self._stamps.get(key)

    @property
    def keys(self) -> list[Key]:
        """All facts, also those that were removed not long ago."""
        return [*self._stamps, *self._revocations]

    async def take(self, facts: Iterable[Fact], now: int) -> None:
        """Follow facts of the store; `now` is its time in microseconds.

        One that exceeds the bounds of this hub is left out, and logged.
        """
        statements: list[_Statement] = []
        for fact in facts:
            statements.extend(
                self._take(fact, self._wall() - (now - fact.version) / 1e6)
            )
        await self._write(*statements)

    def _take(self, fact: Fact, changed: float) -> Iterator[_Statement]:
        self.unsent.pop(fact.key, None)
        if fact.kind in ("jti", "sub"):
            if fact.key in self._revocations:
                return
            if len(self._revocations) >= MAX_REVOCATIONS:
                logger.error("%d revocations are stored; no more fit", MAX_REVOCATIONS)
                return
            self._revocations[fact.key] = changed
            yield _PUT_REVOCATION, (*fact.key, changed)
            return
        before = self._workers.get(fact.name)
        worker = with_fact(before, fact)
        if worker is None:
            if self._workers.pop(fact.name, None) is not None:
                yield _removal_of(fact.name)
        elif before is None and len(self._workers) >= MAX_WORKERS:
            logger.error("%d workers are stored; no more fit", MAX_WORKERS)
            return
        elif worker != before:
            self._workers[fact.name] = worker
            yield _row_of(worker)
        yield self._put_stamp(fact.key, Stamp(fact.version, changed, sent=True))
        yield from self._drop_tombstones()

    async def note_sent(self, versions: Mapping[Key, tuple[Stamp | None, int]]) -> None:
        """Record the versions that the store has given to facts of this hub.

        Each comes with the stamp that was sent; what has changed since is not sent yet.
        """
        statements = []
        for key, (stamp, version) in versions.items():
            now = self.stamp(key)
            if now == stamp:
                self.unsent.pop(key, None)
            if key in self._stamps and now is not None:
                new = Stamp(version, now.changed, sent=now == stamp)
                statements.append(self._put_stamp(key, new))
        await self._write(*statements)

    async def drop(self, keys: Iterable[Key]) -> None:
        """Remove facts that were removed elsewhere, and leave nothing of them."""
        statements: list[_Statement] = []
        for kind, name in keys:
            before = self._workers.get(name)
            if before is not None:
                statements.extend(self._take(Fact(kind, name, "", 0), 0))
            statements.append(self._drop((kind, name)))
        await self._write(*statements)

    async def note_store(self, store_id: str) -> None:
        """Record which life of the store this hub has read to its end."""
        if store_id != self.store_id:
            self.store_id = store_id
            await self._write(
                ("DELETE FROM stamps WHERE kind = 'store'", ()),
                (_PUT_STAMP, ("store", store_id, 0, self._wall(), True)),
            )

    # --- The folder ---------------------------------------------------------------

    def _open(self, folder: Path) -> Database:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock(folder / "lock")
        except OSError as exc:
            raise StateError(f"{folder}: cannot be used: {exc.strerror}") from exc
        try:
            return Database(folder / "state.db", _SCHEMA, VERSION, self._load)
        except StateError:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _load(self, database: sqlite3.Connection) -> None:
        self._workers = {each.name: each for each in _stored_workers(database)}
        self._revocations = {}
        rows = database.execute("SELECT kind, value, added FROM revocations")
        for kind, value, added in rows:
            if kind not in ("jti", "sub"):
                raise ValueError(f"a revocation of the kind {kind!r}")
            self._revocations[kind, value] = added
        self._load_stamps(database)

    def _load_stamps(self, database: sqlite3.Connection) -> None:
        database.execute(_STAMPS)
        database.execute(
            "DELETE FROM stamps WHERE kind IN ('worker', 'hold') AND changed < ? "
            "AND name NOT IN (SELECT name FROM workers)",
            (self._wall() - TOMBSTONES,),
        )
        # What an older hub has left has no stamp, and is older than all that has one.
        self._stamps = {
            (kind, worker.name): Stamp(0, 0.0, sent=False)
            for worker in self._workers.values()
            for kind, text in texts_of(worker).items()
            if text
        }
        rows = database.execute(
            "SELECT kind, name, version, changed, sent FROM stamps ORDER BY changed"
        )
        for kind, name, version, changed, sent in rows:
            if kind == "store":
                self.store_id = name
            else:
                self._stamps[kind, name] = Stamp(version, changed, bool(sent))
        unsent = [key for key, each in self._stamps.items() if not each.sent]
        self.unsent = dict.fromkeys([*unsent, *self._revocations])

    async def _write(self, *statements: _Statement) -> None:
        if self._database is None or not statements:
            return
        try:
            await self._database.run(partial(_execute, statements))
        except sqlite3.Error as exc:
            if not self._failing:
                logger.error(
                    "%s: cannot be written: %s; changes are lost at the next start",
                    self.folder,
                    exc,
                )
            self._failing = True
        else:
            self._failing = False

    async def close(self) -> None:
        """Write what is left and let the folder go; harmless when closed."""
        await self.ledger.close()
        if self._database is not None:
            await self._database.close()
        self._unlock()


_Statement = tuple[str, tuple[Any, ...]]


def _execute(statements: Iterable[_Statement], database: sqlite3.Connection) -> None:
    """Carry out statements together, or none of them."""
    with transaction(database):
        for statement, values in statements:
            database.execute(statement, values)


def _row_of(worker: StoredWorker) -> _Statement:
    row = (
        *(worker.name, worker.source, json.dumps(dict(worker.settings))),
        *(worker.hold, json.dumps(dict(worker.agent))),
    )
    return _PUT_WORKER, row


def _removal_of(name: str) -> _Statement:
    return "DELETE FROM workers WHERE name = ?", (name,)


def _stored_workers(database: sqlite3.Connection) -> Iterator[StoredWorker]:
    rows = database.execute(
        "SELECT name, source, settings, hold, agent FROM workers ORDER BY rowid"
    )
    for name, source, settings, hold, agent in rows:
        if source not in SOURCES or hold not in HOLDS:
            raise ValueError(f"a worker of the source {source!r}, held {hold!r}")
        yield StoredWorker(name, source, _table(settings), hold, _table(agent))


def _table(text: str) -> dict[str, Any]:
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError("a table is not an object")
    return table
