"""The parent of `serve --processes N`: hubs that share an address and a store.

The parent binds, starts the store and the hubs, and starts again what ends.  It serves
nothing itself, and imports nothing of the hub.

To its hubs it is what systemd is to a service (`service.py`): they inherit its
listening sockets (sd_listen_fds), report that they are ready, what they do and that
they live (sd_notify), and read their settings again upon SIGHUP.  SIGTERM drains them,
and `CUT` cuts their answers.

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
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from msgspec import structs

from gollama_proxy.children import Supervised, how
from gollama_proxy.config.settings import Config, Process
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import SettingsFile, Watcher
from gollama_proxy.service import (
    METRICS,
    OUTCOME,
    Listeners,
    Load,
    Service,
    count,
    raise_file_limit,
)
from gollama_proxy.shared import EmbeddedStore, claim, listen, mailbox
from gollama_proxy.tasks import CUT, Periodic, Signals, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

# Seconds.
WATCHDOG = 30.0  # without a sign of life, after which a hub is started again
LOOK = 5.0  # between two looks for that
STARTS_WITHIN = 30.0  # a hub, until it has read its settings and listens
READY_WITHIN = 15.0  # all of them, before the parent reports that it is ready
RELOADS_WITHIN = 60.0
BEYOND_DRAIN = 15.0  # for a hub to end after `server.drain`, before it is killed


def number_of(setting: int) -> int:
    """Return the number of processes that `server.processes` stands for."""
    return setting or _cores()


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
    async with contextlib.AsyncExitStack() as stack:
        listeners = await listen(config, service.listeners, stack)
        folder, run_folder = claim(config, stack)
        store = None
        if not config.state.url:
            store = EmbeddedStore(run_folder)
            stack.push_async_callback(store.stop)
            await store.start()
        parent = Parent(config, load, listeners, run_folder)
        stack.callback(parent.close)
        environ = dict(os.environ)
        if store is not None:
            environ["GOLLAMA_STATE_URL"] = store.url
        parent.make_hubs(_command(arguments), environ, folder)
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


# --- One hub ----------------------------------------------------------------------


class HubProcess:
    """A hub that the parent started, as far as it reports."""

    def __init__(self, number: int, mailbox: socket.socket) -> None:
        """Make one that has not reported anything; messages arrive at `mailbox`."""
        self.number = number
        self.mailbox = mailbox
        self.server: Supervised | None = None
        self.status: int | None = None  # of its last end
        self.load = Load()
        self.started = asyncio.Event()
        self.ready = asyncio.Event()
        self.heard = math.inf  # when it last gave a sign of life
        # It may have read the settings before they changed.
        self.outdated = False
        self.outcome: asyncio.Future[str] | None = None  # of a reload

    def __repr__(self) -> str:
        state = (
            "ready"
            if self.ready.is_set()
            else "up"
            if self.started.is_set()
            else "down"
        )
        return f"<HubProcess {self.number} {state}>"

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
        if self.outdated:
            self.outdated = False
            self.signal(signal.SIGHUP)

    def ended(self, status: int) -> None:
        """Forget what it has reported."""
        self.status, self.load = status, Load()
        self.heard = math.inf
        self.started.clear()
        self.ready.clear()
        self._resolve(f"ended with {how(status)}")

    def _resolve(self, outcome: str) -> None:
        if self.outcome is not None and not self.outcome.done():
            self.outcome.set_result(outcome)

    def signal(self, number: signal.Signals) -> None:
        if self.server is not None:
            self.server.signal(number)

    async def reload(self) -> str:
        """Have it read its settings again; return what it reports."""
        self.outcome = asyncio.get_running_loop().create_future()
        self.signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOADS_WITHIN):
                return await self.outcome
        except TimeoutError:
            return f"refused: no answer within {RELOADS_WITHIN:g} s"
        finally:
            self.outcome = None


# --- All of them ------------------------------------------------------------------


class Parent:
    """Starts, watches and ends the hubs."""

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        listeners: Listeners,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one without hubs; `folder` is for the sockets at which they report."""
        self.config = config
        self.hubs: list[HubProcess] = []
        self.status = 0  # of the whole
        self._load = load
        self._listeners = listeners
        self._folder = folder
        self._clock = clock
        self._starting = True
        self._failed = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._refused = False
        self._looking = Periodic("look at the processes", self._look, LOOK)
        self._file = SettingsFile(config.file, self.reload_soon)
        self._watcher = Watcher([self._file] if config.file else [])
        self._reload: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Parent of {len(self.hubs)} processes>"

    def make_hubs(
        self, command: Sequence[str], environ: Mapping[str, str], folder: Path | None
    ) -> None:
        """Prepare the hubs; they inherit the sockets, and report to this process.

        `folder` is for what survives a restart.  The first hub uses it as a hub without
        others does, so that nothing is lost when their number changes.
        """
        group = secrets.token_hex(8)
        sockets = [*self._listeners.clients, *self._listeners.metrics]
        names = ["clients"] * len(self._listeners.clients)
        names += [METRICS] * len(self._listeners.metrics)
        of = number_of(self.config.server.processes)
        for number in range(1, of + 1):
            path = self._folder / f"{number}.notify"
            hub = HubProcess(number, mailbox(path))
            own = folder if number == 1 else folder and folder / f"process-{number}"
            variables = {
                **environ,
                "GOLLAMA_PROCESS": str(Process(number, of, group)),
                "GOLLAMA_STATE_DIR": str(own or ""),
                "LISTEN_FDS": str(len(sockets)),
                "LISTEN_FDNAMES": ":".join(names),
                "NOTIFY_SOCKET": str(path),
                "WATCHDOG_USEC": f"{WATCHDOG * 1e6:.0f}",
            }
            hub.server = Supervised(
                command,
                environ=variables,
                name=f"process {number}",
                descriptors=[each.fileno() for each in sockets],
                again=partial(self._ended, hub),
            )
            loop = asyncio.get_running_loop()
            loop.add_reader(hub.mailbox, self._receive, hub)
            self.hubs.append(hub)

    def close(self) -> None:
        """Give back the sockets at which hubs report."""
        for hub in self.hubs:
            asyncio.get_running_loop().remove_reader(hub.mailbox)
            path = hub.mailbox.getsockname()
            hub.mailbox.close()
            Path(path).unlink(missing_ok=True)

    # --- Start and end ----------------------------------------------------------------

    async def start(self, signals: Signals) -> None:
        """Start the hubs, and wait until they are ready; a signal ends that.

        The first one alone: what is wrong for all of them is reported once, and is the
        end of all.
        """
        for hubs in (self.hubs[:1], self.hubs[1:]):
            for hub in hubs:
                assert hub.server is not None, hub
                hub.server.start()
            await self._until(signals, STARTS_WITHIN, [x.started for x in hubs])
            if self._over(signals):
                return
        self._starting = False
        await self._until(signals, READY_WITHIN, [x.ready for x in self.hubs])

    async def run(self, signals: Signals) -> None:
        """Watch the hubs until a signal."""
        self._looking.start()
        if self.config.server.watch_config:
            self._watcher.start()
        if not self._failed.is_set():
            await signals.asked.wait()
            grace = self.config.server.drain
            text = "draining for %g s at most; a second signal cuts answers"
            logger.info(text, grace)

    def _over(self, signals: Signals) -> bool:
        return signals.asked.is_set() or self._failed.is_set()

    async def _until(
        self, signals: Signals, seconds: float, events: Iterable[asyncio.Event]
    ) -> None:
        """Wait for all events, some time at most, or for the end."""
        ends = signals.asked, self._failed
        over = [spawn(each.wait(), "end of the start") for each in ends]
        steps = spawn(_all(each.wait() for each in events), "start")
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait((steps, *over), timeout=seconds, return_when=first)
        for task in (steps, *over):
            task.cancel()

    async def drain(self, signals: Signals) -> None:
        """Close the sockets, and let the hubs end; kill those that do not."""
        await self._looking.stop()
        await self._watcher.stop()
        for each in (*self._listeners.clients, *self._listeners.metrics):
            each.close()
        self._starting = False
        for hub in self.hubs:
            hub.status = None
        retiring = [hub.server.retire() for hub in self.hubs if hub.server is not None]
        ending = spawn(_all(retiring), "end of the processes")
        insisting = spawn(signals.insisted.wait(), "second signal")
        patience = self.config.server.drain + BEYOND_DRAIN
        await asyncio.wait(
            (ending, insisting),
            timeout=patience,
            return_when=asyncio.FIRST_COMPLETED,
        )
        insisting.cancel()
        if not ending.done() and signals.insisted.is_set():
            logger.warning("second signal: cutting running answers")
            self._signal(CUT)
            await asyncio.wait((ending,), timeout=BEYOND_DRAIN)
        if not ending.done():
            left = [str(hub.number) for hub in self.hubs if hub.status is None]
            logger.error("killing what has not ended: process %s", ", ".join(left))
            self._signal(signal.SIGKILL)
        await ending
        cut = any(hub.status not in (None, 0, -signal.SIGTERM) for hub in self.hubs)
        self.status = self.status or int(cut)

    def _signal(self, number: signal.Signals) -> None:
        for hub in self.hubs:
            hub.signal(number)

    def _ended(self, hub: HubProcess, status: int) -> bool:
        """Take note of the end of a hub; return whether to start it again."""
        hub.ended(status)
        if self._starting:  # it has reported why
            self.status = status if status > 0 else 1
            self._failed.set()
            return False
        return True

    # --- Messages ---------------------------------------------------------------------

    def _receive(self, hub: HubProcess) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                message = hub.mailbox.recv(1 << 16).decode(errors="replace")
                hub.receive(message, self._clock())

    async def _look(self) -> None:
        """Start hubs again that give no sign of life; none is expected at the start."""
        if self._looking.late > LOOK:  # this machine was asleep, or is too busy
            return
        now = self._clock()
        for hub in self.hubs:
            if now - hub.heard > WATCHDOG:
                hub.heard = now  # SIGKILL the next time
                logger.error("process %d hangs: ending it", hub.number)
                hub.signal(signal.SIGKILL if hub.load is _HANGS else signal.SIGABRT)
                hub.load = _HANGS

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

    # --- Settings that change ---------------------------------------------------------

    def reload_soon(self) -> asyncio.Task[None]:
        """Begin to have the settings read again; the result is logged."""
        self._reload = spawn(self._reload_all(), "reload")
        return self._reload

    async def _reload_all(self) -> None:
        async with self._reloading:
            try:
                config = await asyncio.to_thread(self._read)
            except ConfigError as exc:
                self._refuse("; ".join(exc.args))
                return
            first, *rest = self.hubs
            outcomes: dict[int, str] = {}
            # What only a hub can find is found by the first one, and changes nothing.
            outcomes |= await self._reload_hubs([first])
            if outcomes.get(1, "").startswith("refused: "):
                self._refuse(outcomes[1].removeprefix("refused: "))
                return
            outcomes |= await self._reload_hubs(rest)
            self._refused = any(x.startswith("refused: ") for x in outcomes.values())
            for line in combine(outcomes):
                level = logging.ERROR if "refused: " in line else logging.INFO
                logger.log(level, "%s", line)
            if config.metrics.listen != self.config.metrics.listen:
                logger.warning("metrics.listen: has changed, and needs a restart")
                metrics = structs.replace(
                    config.metrics, listen=self.config.metrics.listen
                )
                config = replace(config, metrics=metrics)
            await self._follow(config)

    async def _follow(self, config: Config) -> None:
        before, self.config = self.config, config
        if config.log != before.log:
            logs.reconfigure(config.log)
        if config.server.watch_config != before.server.watch_config:
            await self._watcher.stop()
            if config.server.watch_config:
                self._watcher.start()

    def _read(self) -> Config:
        self._file.note()
        return self._load()

    async def _reload_hubs(self, hubs: Iterable[HubProcess]) -> dict[int, str]:
        """Have these read their settings; return what each reports."""
        up = []
        for hub in hubs:
            if hub.started.is_set():
                up.append(hub)
            elif hub.server is not None and hub.server.pid is not None:
                hub.outdated = True
        outcomes = await asyncio.gather(*(each.reload() for each in up))
        return {hub.number: text for hub, text in zip(up, outcomes, strict=True)}

    def _refuse(self, why: str) -> None:
        self._refused = True
        text = "the settings are not valid, so the old ones stay in force: %s"
        logger.error(text, why)


_HANGS = Load()


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
    for text, number in Counter(outcomes.values()).items():
        shown = text.removeprefix("changed: ")
        if number == len(outcomes):
            where = ""
        else:
            same = [str(each) for each in outcomes if outcomes[each] == text]
            where = f" in process {', '.join(same)}"
        lines.append(f"settings were read again{where}: {shown}")
    return lines


async def _all(steps: Iterable[Awaitable[object]]) -> None:
    await asyncio.gather(*steps)


def _command(arguments: Sequence[str]) -> list[str]:
    """Return the command of a hub, which finds its modules where this one has."""
    return [sys.executable, "-P", "-m", "gollama_proxy", *arguments]


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
