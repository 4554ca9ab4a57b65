"""What a hub keeps over a restart: workers added while it ran, holds, and revocations.

One SQLite database in a folder that one hub at a time may use.  Everything is in memory
as well, so that nothing waits for the disk to read it; changes are written in their
order by one thread.  A disk that takes no more changes is logged, and the hub goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gollama_proxy.config.settings import Revoked
from gollama_proxy.state.database import Database, StateError
from gollama_proxy.state.ledger import open_ledger

logger = logging.getLogger(__name__)

MAX_WORKERS = 10_000
MAX_REVOCATIONS = 100_000
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
_PUT_WORKER = "INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?)"
_PUT_REVOCATION = "INSERT OR REPLACE INTO revocations VALUES (?, ?, ?)"


def folder_of(setting: str, environ: Mapping[str, str]) -> Path | None:
    """Return the folder that `state.dir` stands for; None for none."""
    if setting != "auto":
        return Path(setting) if setting else None
    if named := environ.get("STATE_DIRECTORY"):  # of systemd, which lists them all
        return Path(named.partition(":")[0])
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(base).expanduser() / "gollama-proxy"
    except RuntimeError:  # this user has no home
        return None


@dataclass(frozen=True, slots=True)
class StoredWorker:
    """One worker; `settings` is its `[[workers]]` table, and has no secrets.

    A worker of the settings file is stored only for its hold, without its settings.
    """

    name: str
    source: str  # "file", "admin" or "agent"
    settings: Mapping[str, Any] = field(default_factory=dict)
    hold: str = ""  # "paused", "draining", or "" for none
    agent: Mapping[str, Any] = field(default_factory=dict)  # of its agent, or empty


class LocalState:
    """The stored workers and revocations; without a folder, they end with the hub."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the database of a folder, which is made if it does not exist; blocks.

        A damaged database is moved aside, and a new one begins.

        Raises:
            StateError: the folder cannot be used, another hub uses it, or its database
                was written by a newer version.
        """
        self.folder = folder
        self._workers: dict[str, StoredWorker] = {}
        self._revocations: dict[tuple[str, str], float] = {}
        self._lock: TextIO | None = None
        self._failing = False
        self._database = None if folder is None else self._open(folder)
        self.ledger = open_ledger(folder)

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
        return self._workers.get(name)

    async def put(self, worker: StoredWorker) -> None:
        """Keep a worker, in place of another one of its name; return when written.

        Raises:
            StateError: there are too many.
        """
        if worker.name not in self._workers and len(self._workers) >= MAX_WORKERS:
            raise StateError(f"{MAX_WORKERS} workers are stored; no more fit")
        if self._workers.get(worker.name) == worker:
            return
        self._workers[worker.name] = worker
        row = (
            *(worker.name, worker.source, json.dumps(dict(worker.settings))),
            *(worker.hold, json.dumps(dict(worker.agent))),
        )
        await self._write(_PUT_WORKER, row)

    async def forget(self, name: str) -> None:
        """Remove a worker; return when written.  Harmless if there is none."""
        if self._workers.pop(name, None) is not None:
            await self._write("DELETE FROM workers WHERE name = ?", (name,))

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
        self._revocations[key] = now = time.time()
        await self._write(_PUT_REVOCATION, (*key, now))

    # --- The folder ---------------------------------------------------------------

    def _open(self, folder: Path) -> Database:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
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

    async def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        if self._database is None:
            return
        try:
            await self._database.run(lambda each: each.execute(statement, values))
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


_SOURCES = frozenset({"file", "admin", "agent"})
_HOLDS = frozenset({"", "paused", "draining"})


def _stored_workers(database: sqlite3.Connection) -> Iterator[StoredWorker]:
    rows = database.execute(
        "SELECT name, source, settings, hold, agent FROM workers ORDER BY rowid"
    )
    for name, source, settings, hold, agent in rows:
        if source not in _SOURCES or hold not in _HOLDS:
            raise ValueError(f"a worker of the source {source!r}, held {hold!r}")
        yield StoredWorker(name, source, _table(settings), hold, _table(agent))


def _table(text: str) -> dict[str, Any]:
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError("a table is not an object")
    return table


def _lock(file: Path) -> TextIO:
    """Take the lock of a folder; it ends with the process, however that ends."""
    stream = file.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        pid = stream.read(20).strip()
        stream.close()
        text = f"{file.parent}: used by another hub" + (f" (process {pid})" * bool(pid))
        raise StateError(f"{text}; each needs its own folder (state.dir)") from None
    except OSError:
        stream.close()
        raise
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream
