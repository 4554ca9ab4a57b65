"""The parent of `serve --processes N`: hubs that share an address and a store.

The parent binds, starts the store and the hubs, and starts again what ends.  It serves
nothing itself, and imports nothing that does.

To its hubs the parent is what systemd is to a service (`service.py`): they inherit its
listening sockets (sd_listen_fds), report that they are ready, what they do and that
they live (sd_notify), and read their settings again upon SIGHUP.

All hubs accept connections from the same sockets.  With a socket for each
(SO_REUSEPORT), the kernel would choose the hub of a connection by chance, also one that
hangs, and what waits to be accepted would be lost when a hub ends.  Shared ones can
also be Unix sockets, and those of systemd.  benchmarks/RESULTS.md has the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import secrets
import shutil
import signal
import site
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import gollama_proxy
from gollama_proxy.children import SOCKET, WATCHDOG, EmbeddedStore, HubProcess, how
from gollama_proxy.config import addresses
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import COUNTS, Config, Process
from gollama_proxy.config.values import MAX_PROCESSES, ConfigError, host_and_port
from gollama_proxy.config.watch import SettingsFile, Watcher
from gollama_proxy.service import (
    FIRST_DESCRIPTOR,
    METRICS,
    REFUSED,
    Listeners,
    Load,
    Service,
    count,
    raise_file_limit,
)
from gollama_proxy.state.folder import StateError, folder_of, lock, optional
from gollama_proxy.tasks import CUT, Periodic, Signals, ended, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

# Seconds.
LOOK = 5.0  # between two looks for hubs that hang
STARTS_WITHIN = 30.0  # a hub, until it has read its settings and listens
READY_WITHIN = 15.0  # all of them, before the parent reports that it is ready
BEYOND_DRAIN = 15.0  # for a hub to end after `server.drain`, before it is killed

_LONGEST_PATH = 100  # bytes of a Unix socket's path; the kernels allow 103 or 107


def number_of(setting: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of processes that `server.processes` stands for.

    0 (auto) is one for each core that this process may use: a container may have a
    quota of CPU time, of which the kernel has a file (cgroups, version 2).
    """
    if setting:
        return setting
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())  # or "max"
        cores = min(cores, math.ceil(quota / period))
    return min(cores, MAX_PROCESSES)


async def front(
    signals: Signals,
    config: Config,
    arguments: Sequence[str],
    load: Callable[[], Config],
    service: Service,
) -> int:
    """Run the processes until a signal; return the exit status.

    `arguments` are those of the command line, `load` reads the settings again.

    Raises:
        ConfigError: they cannot be started.
    """
    logs.configure(config.log)
    raise_file_limit()  # for all: they inherit it
    gc.enable()
    number = number_of(config.server.processes)
    async with contextlib.AsyncExitStack() as stack:
        common = await prepare(config, service.listeners, number, stack)
        environ = dict(os.environ)
        if not config.state.url:
            store = await asyncio.to_thread(EmbeddedStore, common.sockets)
            stack.push_async_callback(store.stop)
            await store.start()
            environ["GOLLAMA_STATE_URL"] = store.url
        parent = await asyncio.to_thread(
            Parent, config, load, common, number, arguments, environ
        )
        stack.callback(parent.close)
        service.start()
        stack.push_async_callback(service.stop)
        signals.reload = lambda: service.reload(parent.reload_soon)
        try:
            service.describe(parent.describe)
            await parent.start(signals)
            service.ready()
            await parent.run(signals)
        finally:
            signals.reload = lambda: None
            service.stopping(parent.describe_stop)
            await parent.drain(signals)
    return parent.status


# --- All of them ------------------------------------------------------------------


class Parent:
    """Starts, watches and ends the hubs."""

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        common: Inheritance,
        number: int,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare `number` hubs, with these arguments and variables."""
        self.config = config
        self.status = 0  # of the whole
        self._load = load
        self._common = common
        self._clock = clock
        self._starting = True
        self._failed = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._refused = False
        self._looking = Periodic("look at the processes", self._look, LOOK)
        self._file = SettingsFile(config.file, self.reload_soon)
        self._watcher = Watcher([self._file] if config.file else [])
        group = secrets.token_hex(8)
        command = [sys.executable, "-P", "-m", "gollama_proxy", *arguments]
        environ = {**environ, **_import_path(environ)}
        memory = FIRST_DESCRIPTOR + len(common.descriptors) - 1
        self.hubs = [
            HubProcess(
                each,
                mailbox,
                command,
                environ | _variables(Process(each, number, group, memory), common),
                common.descriptors,
                self._ended,
            )
            for each, mailbox in enumerate(common.mailboxes, 1)
        ]

    def __repr__(self) -> str:
        return f"<Parent of {len(self.hubs)} processes>"

    def close(self) -> None:
        for hub in self.hubs:
            hub.close()

    # --- Start and end ------------------------------------------------------------

    async def start(self, signals: Signals) -> None:
        """Start the hubs, and wait until they are ready; a signal ends that.

        The first one alone: what is wrong for all of them is reported once, and is the
        end of all.
        """
        over = signals.asked, self._failed
        for hubs in (self.hubs[:1], self.hubs[1:]):
            for hub in hubs:
                hub.start(self._clock)
            await _all_or_one([x.started for x in hubs], over, STARTS_WITHIN)
            if any(each.is_set() for each in over):
                return
        self._starting = False
        await _all_or_one([x.ready for x in self.hubs], over, READY_WITHIN)

    async def run(self, signals: Signals) -> None:
        """Watch the hubs until a signal, unless their start has failed."""
        if self._failed.is_set():
            return
        self._looking.start()
        if self.config.server.watch_config:
            self._watcher.start()
        await signals.asked.wait()
        grace = self.config.server.drain
        logger.info("draining for %g s at most; a second signal cuts answers", grace)

    async def drain(self, signals: Signals) -> None:
        """Close the sockets, and let the hubs end; kill those that do not."""
        await self._looking.stop()
        await self._watcher.stop()
        self._common.close()
        self._starting = False
        for hub in self.hubs:
            hub.status = None
        retiring = [hub.server.retire() for hub in self.hubs]
        ending = spawn(_all(retiring), "end of the processes")
        patience = self.config.server.drain + BEYOND_DRAIN
        await ended(ending, signals.insisted, within=patience)
        if not ending.done() and signals.insisted.is_set():
            logger.warning("second signal: cutting running answers")
            self._signal(CUT)
            await asyncio.wait((ending,), timeout=BEYOND_DRAIN)
        if not ending.done():
            logger.error("killing the processes that have not ended")
            self._signal(signal.SIGKILL)
        await ending
        # One that a signal ended had not begun to serve.
        ends = {hub.status or 0 for hub in self.hubs} - {0, -signal.SIGTERM}
        self.status = self.status or int(bool(ends))

    def _signal(self, number: signal.Signals) -> None:
        for hub in self.hubs:
            hub.server.signal(number)

    def _ended(self, hub: HubProcess, status: int) -> bool:
        """Take note of the end of a hub; return whether to start it again."""
        self._common.forget(hub.number)
        if self._starting:
            if status < 0:  # else it has reported why
                logger.error("process %d ended with %s", hub.number, how(status))
            self.status = status if status > 0 else 1
            self._failed.set()
        return not self._starting

    # --- What it reports ----------------------------------------------------------

    async def _look(self) -> None:
        if self._looking.late > LOOK:  # this machine was asleep, or is too busy
            return
        for hub in self.hubs:
            hub.look(self._clock())

    def describe(self) -> str:
        """Return the line that `systemctl status` shows."""
        ready = sum(each.ready.is_set() for each in self.hubs)
        refused = "; the last reload was refused" if self._refused else ""
        load = total([each.load for each in self.hubs])
        return f"{ready} of {len(self.hubs)} processes; {load}{refused}"

    def describe_stop(self) -> str:
        running = total([each.load for each in self.hubs]).running
        within = f"may end within {self.config.server.drain:g} s"
        return f"stopping; {count(running, 'running request')} {within}"

    # --- Settings that change -----------------------------------------------------

    def reload_soon(self) -> asyncio.Task[None]:
        """Begin to have the settings read again; the result is logged."""
        return spawn(self._reload_all(), "reload")

    async def _reload_all(self) -> None:
        async with self._reloading:
            try:
                config = await asyncio.to_thread(self._read)
                first, *rest = self.hubs
                outcomes = {first.number: await first.reload()}
                # What only a hub can find, the first one finds, and nothing changes.
                if (found := outcomes[first.number] or "").startswith(REFUSED):
                    raise ConfigError(found.removeprefix(REFUSED))
            except ConfigError as exc:
                self._refused = True
                text = "the settings are not valid, so the old ones stay in force: %s"
                logger.error(text, "; ".join(exc.args))
                return
            others = await asyncio.gather(*(each.reload() for each in rest))
            outcomes |= {x.number: y for x, y in zip(rest, others, strict=True)}
            known = {number: text for number, text in outcomes.items() if text}
            self._refused = any(each.startswith(REFUSED) for each in known.values())
            for line in combine(known):
                logger.log(logging.ERROR if REFUSED in line else logging.INFO, line)
            await self._follow(config)

    def _read(self) -> Config:
        self._file.note()
        return self._load()

    async def _follow(self, config: Config) -> None:
        before, self.config = self.config, config
        if config.metrics.listen != before.metrics.listen:
            logger.warning("needs a restart: metrics.listen, of several processes")
        if config.log != before.log:
            logs.reconfigure(config.log)
        if config.server.watch_config != before.server.watch_config:
            await self._watcher.stop()
            if config.server.watch_config:
                self._watcher.start()


def total(loads: Sequence[Load]) -> Load:
    """Return what all hubs do: they have the same workers, and requests each."""
    return Load(
        max((each.usable for each in loads), default=0),
        max((each.workers for each in loads), default=0),
        sum(each.running for each in loads),
        sum(each.waiting for each in loads),
    )


def combine(outcomes: Mapping[int, str]) -> list[str]:
    """Return the lines for the outcomes of a reload: one if all are the same."""
    lines = []
    for text in dict.fromkeys(outcomes.values()):
        same = [str(each) for each in outcomes if outcomes[each] == text]
        where = "" if len(same) == len(outcomes) else f" by process {', '.join(same)}"
        lines.append(f"settings were read again{where}: {text}")
    return lines


async def _all(steps: Iterable[Awaitable[object]]) -> None:
    await asyncio.gather(*steps)


async def _all_or_one(
    needed: Iterable[asyncio.Event], over: Iterable[asyncio.Event], seconds: float
) -> None:
    """Wait for all events, for one that ends the wait, or for some time at most."""
    steps = spawn(_all(each.wait() for each in needed), "start of the processes")
    await ended(steps, *over, within=seconds)
    steps.cancel()


def _import_path(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variable with which hubs find this package where it is not installed.

    The working directory is not searched, as it may be any.
    """
    root = str(Path(gollama_proxy.__file__).parent.parent)
    if root in (*site.getsitepackages(), site.getusersitepackages()):
        return {}
    before = environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([root, *([before] if before else [])])}


# --- What they inherit ------------------------------------------------------------


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
