"""One hub of several processes: what it inherits from the parent, and what it reports.

To its hubs the parent is what systemd is to a service (`service.py`): they inherit its
listening sockets (sd_listen_fds), report that they are ready, what they do and that
they live (sd_notify), and read their settings again upon SIGHUP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from msgspec import structs

from gollama_proxy.children import Supervised, how
from gollama_proxy.config import addresses
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import COUNTS, Config, Process
from gollama_proxy.config.values import ConfigError, host_and_port
from gollama_proxy.embedded import SOCKET
from gollama_proxy.service import METRICS, OUTCOME, REFUSED, Listeners, Load
from gollama_proxy.state.database import StateError
from gollama_proxy.state.local import folder_of, lock

logger = logging.getLogger(__name__)

# Seconds.
WATCHDOG = 30.0  # without a sign of life, after which a hub is started again
RELOADS_WITHIN = 60.0
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
            host = each.getsockname()[0]
            check_exposure(replace(config, server=structs.replace(server, host=host)))
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
    try:
        if folder is not None:
            found = _open(folder.absolute() / "processes", stack)
            return folder.absolute(), found or _temporary(stack)
    except StateError as exc:
        if config.state.dir != "auto":
            raise ConfigError(f"state.dir = {config.state.dir!r}: {exc}") from exc
        logger.warning(
            "%s; workers added at run time and revocations will not survive a restart",
            exc,
        )
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


# --- One hub ----------------------------------------------------------------------


class HubProcess:
    """A hub that the parent starts, and what it reports."""

    def __init__(
        self,
        process: Process,
        common: Inheritance,
        command: Sequence[str],
        environ: Mapping[str, str],
        again: Callable[[HubProcess, int], bool],
    ) -> None:
        """Prepare it; `again` is called when it has ended, as for `Supervised`."""
        self.number = process.number
        self.status: int | None = None  # of its last end
        self.load = Load()
        self.started, self.ready = asyncio.Event(), asyncio.Event()
        self.heard = math.inf  # when it last gave a sign of life
        self._again = again
        self._hangs = False
        self._outdated = False  # it may have read the settings before they changed
        self._outcome: asyncio.Future[str] | None = None  # of a reload
        self._mailbox = common.mailboxes[self.number - 1]
        self.server = Supervised(
            command,
            environ={**environ, **_variables(process, common)},
            name=f"process {self.number}",
            descriptors=common.descriptors,
            again=self._ended,
        )

    def __repr__(self) -> str:
        state = "ready" if self.ready.is_set() else "not ready"
        return f"<HubProcess {self.number} {state}>"

    def start(self, clock: Callable[[], float]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._mailbox, self._read, clock)
        self.server.start()

    def close(self) -> None:
        """Read no more of what it reports."""
        asyncio.get_running_loop().remove_reader(self._mailbox)

    def _read(self, clock: Callable[[], float]) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self._mailbox.recv(1 << 16)
                self.receive(message.decode(errors="replace"), clock())

    def receive(self, message: str, now: float) -> None:
        """Take what it reports; see sd_notify(3)."""
        self.started.set()
        self.heard = now
        for line in message.splitlines():
            name, _, value = line.partition("=")
            if name == "READY":
                self.ready.set()
            elif name == "STOPPING":
                self.ready.clear()
            elif name == "STATUS":
                with contextlib.suppress(ValueError, TypeError):
                    self.load = Load.parse(value)
            elif name == OUTCOME:
                self._resolve(value)
        if self._outdated:
            self._outdated = False
            self.server.signal(signal.SIGHUP)

    def _ended(self, status: int) -> bool:
        """Forget what it has reported."""
        self.status, self.load = status, Load()
        self.heard, self._hangs = math.inf, False
        self.started.clear()
        self.ready.clear()
        self._resolve(f"ended with {how(status)}")
        return self._again(self, status)

    async def reload(self) -> str | None:
        """Have it read its settings again; return what it reports.

        None: it reads them anyway, as it starts.
        """
        if not self.started.is_set():
            self._outdated = self.server.pid is not None
            return None
        self._outcome = asyncio.get_running_loop().create_future()
        self.server.signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOADS_WITHIN):
                return await self._outcome
        except TimeoutError:
            return f"{REFUSED}no answer within {RELOADS_WITHIN:g} s"
        finally:
            self._outcome = None

    def _resolve(self, outcome: str) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    def look(self, now: float) -> None:
        """End it if it has given no sign of life for too long."""
        if now - self.heard <= WATCHDOG:
            return
        logger.error("process %d hangs: ending it", self.number)
        # The first signal has Python write where it hangs (PYTHONFAULTHANDLER).
        self.server.signal(signal.SIGKILL if self._hangs else signal.SIGABRT)
        self._hangs = True


def _variables(process: Process, common: Inheritance) -> dict[str, str]:
    """Return what systemd would set, and the place of a hub among the others.

    The first one uses the state folder as a hub without others does, so that nothing is
    lost when their number changes.
    """
    folder = common.folder
    if folder is not None and not process.first:
        folder = folder / f"process-{process.number}"
    names = ["clients"] * len(common.listeners.clients)
    names += [METRICS] * len(common.listeners.metrics)
    return {
        "GOLLAMA_PROCESS": str(process),
        "GOLLAMA_STATE_DIR": str(folder or ""),
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(names),
        "NOTIFY_SOCKET": common.mailboxes[process.number - 1].getsockname(),
        "WATCHDOG_USEC": f"{WATCHDOG * 1e6:.0f}",
        "PYTHONFAULTHANDLER": "1",
    }
