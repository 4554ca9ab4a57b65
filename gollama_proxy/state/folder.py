"""The folder of a hub's state: its lock, and the SQLite databases in it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO, TypeVar

from gollama_proxy.config.values import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StateError(Exception):
    """Why a folder cannot be used, or why nothing more can be kept; one line."""


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


@contextlib.contextmanager
def optional(setting: str) -> Iterator[None]:
    """Warn if the folder cannot be used; a hub without one serves all the same.

    Raises:
        ConfigError: it cannot, and it was set (`state.dir`).
    """
    try:
        yield
    except StateError as exc:
        if setting != "auto":
            raise ConfigError(f"state.dir = {setting!r}: {exc}") from exc
        logger.warning(
            "%s; workers added at run time and revocations will not survive a restart",
            exc,
        )


def lock(file: Path) -> TextIO:
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


# --- A database -------------------------------------------------------------------


class Database:
    """An open database; jobs run in their order, in one thread beside the loop."""

    def __init__(
        self,
        file: Path | None,
        schema: str,
        version: int,
        load: Callable[[sqlite3.Connection], None],
    ) -> None:
        """Open a file, which is made if it does not exist; this blocks.

        None is for memory, which the first job opens.

        `load` reads the content.  A damaged database, and one that `load` rejects with
        ValueError or TypeError, is moved aside, and a new one begins; `load` is then
        called again.

        Raises:
            StateError: the file cannot be used, or was written by a newer version.
        """
        self.file = file
        self._schema, self._version, self._load = schema, version, load
        # Its thread starts with the first job.
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "state")
        self._connection: sqlite3.Connection | None = None
        if file is not None:
            self._connection = self._open_file(file)

    def __repr__(self) -> str:
        return f"<Database {self.file or 'in memory'}>"

    def _open_file(self, file: Path) -> sqlite3.Connection:
        try:
            file.touch(0o600)
            return self._open()
        except (sqlite3.Error, OSError, ValueError, TypeError) as exc:
            if not _is_damage(exc):
                raise StateError(f"{file}: cannot be used: {exc}") from exc
            aside = _move_aside(file)
            logger.error(
                "%s: damaged (%s); moved to %s, and a new one begins", file, exc, aside
            )
            file.touch(0o600)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        # The thread of the jobs is another one; only one thread at a time has it.
        connection = sqlite3.connect(
            self.file or ":memory:", isolation_level=None, check_same_thread=False
        )
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            (flaw,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if flaw != "ok":
                raise sqlite3.DatabaseError("a check found an inconsistency")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > self._version:
                text = f"{self.file}: written by a newer version of gollama-proxy"
                raise StateError(f"{text}; use that, or another folder (state.dir)")
            connection.execute("PRAGMA journal_mode = WAL")
            if not version:
                # Its pages and the version are written together, or not at all.
                script = f"BEGIN; {self._schema} PRAGMA user_version = {self._version};"
                connection.executescript(f"{script} COMMIT;")
            self._load(connection)
            stack.pop_all()
        return connection

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run a job in the thread and return its result; None after `close`.

        A caller that is cancelled does not stop its job.

        Raises:
            sqlite3.Error: what the job raises.
        """
        if self._thread is None:
            return None
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, self._run, job))

    def _run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._open()
        return job(self._connection)

    async def close(self) -> None:
        """Run the jobs that wait, and close the file; harmless when closed."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        loop = asyncio.get_running_loop()
        if self._connection is not None:
            await loop.run_in_executor(thread, self._connection.close)
        thread.shutdown(wait=False)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Carry out all statements of the block, or none of them.

    Raises:
        sqlite3.Error: they cannot be carried out.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


# What SQLite reports of a file that is not a database, or only a part of one.
_DAMAGE = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})


def _is_damage(error: Exception) -> bool:
    """Whether the content is at fault, rather than the disk or its permissions."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        missing_table = code == sqlite3.SQLITE_ERROR
        return missing_table or code & 0xFF in _DAMAGE
    return not isinstance(error, (sqlite3.OperationalError, OSError))


def _move_aside(file: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = file.with_name(f"{file.name}.damaged-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.name}.damaged-{stamp}-{number}")
    file.rename(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + suffix).rename(
                aside.with_name(aside.name + suffix)
            )
    return aside
