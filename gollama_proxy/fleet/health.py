"""Health checks, by one supervised task for each worker, and what broken ones get.

llama-server's router mode loads a model when a request names it, which can take
minutes.  Current versions report the progress as events, which `LoadingFeeds` follows.
Such a stream occupies one of the worker's threads, so it is open only while a model is
loading there.

Once a second, the watchdog looks at whether answers make progress, and whether broken
workers recover.  One task serves all running answers (`Proxy.check`), so that no timer
is armed for a token.  The same round sends the canaries: one-token generations, which
are all that a worker gets while its breaker is half-open.  A good `/health` proves
nothing there: the process can be well and its GPU lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from gollama_proxy.config.settings import Health
from gollama_proxy.fleet.breaker import Breaker, Permit
from gollama_proxy.fleet.pool import Pools
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.tasks import Periodic, spawn
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.probe import FetchError
from gollama_proxy.wire.description import Check

logger = logging.getLogger(__name__)

Ping = Callable[[Worker], Awaitable[probe.Finding]]
Prove = Callable[[Worker, str], Awaitable[bool | None]]
# Share by which waits vary, so that hubs and workers started together drift apart.
JITTER = 0.1
PERIOD = 1.0  # seconds between two rounds of the watchdog


class HealthChecker(Listener):
    """Checks every worker, and records what it finds in the worker.

    A worker in good health is checked every `interval`; one that is loading or in doubt
    every `recheck`; one that is down less and less often, up to `interval`.  A request
    that failed on a worker causes a check at once.
    """

    def __init__(self, health: Health, ping: Ping) -> None:
        self._health = health
        self._ping = ping
        self._checks: dict[Worker, _Checks] = {}
        self._running = False

    def __repr__(self) -> str:
        running = len(self._checks) if self._running else 0
        return f"<HealthChecker running={running} of {len(self._checks)}>"

    # --- The fleet ----------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        if worker in self._checks:
            return  # it was removed, and is back before it was gone
        checks = self._checks[worker] = _Checks(worker, self._health, self._ping)
        worker.on_suspicion = checks.loop.wake
        if self._running:
            checks.loop.start()

    def replaced(self, worker: Worker, before: object) -> None:
        worker.suspect()  # another key may make the difference

    def gone(self, worker: Worker) -> None:
        checks = self._checks.pop(worker)
        worker.on_suspicion = None
        checks.abandon()

    def reconfigure(self, health: Health) -> None:
        """Take other settings; each worker is checked at once."""
        self._health = health
        for checks in self._checks.values():
            checks.reconfigure(health)

    # --- Life ---------------------------------------------------------------------

    def start(self) -> None:
        """Start the checks of every worker, now and to come; `stop` ends them."""
        self._running = True
        for checks in self._checks.values():
            checks.loop.start()

    async def stop(self) -> None:
        self._running = False
        await asyncio.gather(*(each.loop.stop() for each in self._checks.values()))

    async def first_round(self) -> None:
        """Wait until every worker has been checked once."""
        for checks in list(self._checks.values()):
            await checks.first.wait()

    async def described(self) -> None:
        """Wait until every worker has listed what it serves, or was down."""
        for checks in list(self._checks.values()):
            await checks.described.wait()

    async def look(self, worker: Worker) -> bool:
        """Check a worker now, and wait; return whether it is well."""
        checks = self._checks.get(worker)
        return checks is not None and await checks.look()


class _Checks:
    """The checks of one worker."""

    def __init__(self, worker: Worker, health: Health, ping: Ping) -> None:
        name = f"health check of worker {worker.name}"
        self.loop = Periodic(name, self._check, health.recheck, delay=0.0)
        self.first = asyncio.Event()
        self.described = asyncio.Event()
        self._worker = worker
        self._health = health
        self._ping = ping
        self._wait = 0.0
        self._looking: list[asyncio.Future[bool]] = []
        self._noted = False  # an oddity was logged

    def __repr__(self) -> str:
        return f"<_Checks of {self._worker.name}>"

    def reconfigure(self, health: Health) -> None:
        self._health = health
        self.loop.wake()

    async def look(self) -> bool:
        """Wait for a check that begins now: one under way may have begun too early."""
        seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._looking.append(seen)
        self.loop.wake()
        return await seen

    def abandon(self) -> None:
        """Stop, and let nothing wait any more: the worker is gone."""
        self.loop.cancel()
        self.first.set()
        self.described.set()
        self._answer(self._looking, well=False)

    async def _check(self) -> float:
        worker = self._worker
        was_down = worker.is_down
        looking, self._looking = self._looking, []
        well = False
        try:
            finding = await self._ping(worker)
            worker.found_at(finding.port)
            worker.observe(finding.check, finding.reason, finding.description)
            well = finding.check is Check.OK
        finally:
            self._answer(looking, well=well)
        if finding.note and not self._noted:
            self._noted = True
            logger.warning("worker %s: %s", worker.name, finding.note)
        self.first.set()
        if worker.description is not None or worker.is_down:
            self.described.set()
        last = self._wait if was_down else 0.0
        self._wait = next_wait(worker, self._health, last)
        return self._wait * random.uniform(1 - JITTER, 1 + JITTER)

    def _answer(self, looking: list[asyncio.Future[bool]], *, well: bool) -> None:
        for each in looking:
            if not each.done():
                each.set_result(well)


def next_wait(worker: Worker, health: Health, last: float) -> float:
    """Return the seconds to wait before the next check of a worker."""
    if worker.state is WorkerState.READY and not worker.in_doubt:
        return health.interval
    if worker.state in (WorkerState.DOWN, WorkerState.ASLEEP):
        return min(max(health.recheck, last * 1.5), health.interval)
    return min(health.recheck, health.interval)


# --- The progress of loading ------------------------------------------------------


Note = Callable[[str, float | None], None]
Follow = Callable[[Worker, Note], Awaitable[bool]]


class LoadingFeeds(Listener):
    """Opens and closes the streams of all workers; `check` is called every second."""

    def __init__(self, follow: Follow) -> None:
        self._follow = follow
        self._workers: list[Worker] = []
        self._feeds: dict[Worker, asyncio.Task[None]] = {}
        # The builds without such a stream.
        self._without: dict[Worker, str] = {}

    def __repr__(self) -> str:
        return f"<LoadingFeeds open={len(self._feeds)}>"

    def added(self, worker: Worker) -> None:
        if worker not in self._workers:
            self._workers.append(worker)

    def gone(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._without.pop(worker, None)
        if worker in self._feeds:
            self._feeds[worker].cancel()

    def check(self) -> None:
        """Follow each worker that is loading a model, and no other one."""
        for worker in self._workers:
            wanted = worker.state is WorkerState.READY and bool(worker.loading)
            feed = self._feeds.get(worker)
            if feed is not None and not wanted:
                feed.cancel()
            elif feed is None and wanted and self._has_feed(worker):
                task = spawn(self._run(worker), f"loading progress of {worker.name}")
                self._feeds[worker] = task

    async def stop(self) -> None:
        feeds = [*self._feeds.values()]
        for task in feeds:
            task.cancel()
        await asyncio.gather(*feeds, return_exceptions=True)

    def _has_feed(self, worker: Worker) -> bool:
        if not worker.is_llama_server:
            return False
        return self._without.get(worker) != _build(worker)

    async def _run(self, worker: Worker) -> None:
        try:
            if not await self._follow(worker, worker.note_progress):
                self._without[worker] = _build(worker)
        except FetchError:
            pass  # a health check finds out; the progress is merely not known
        finally:
            del self._feeds[worker]
            worker.progress.clear()


def _build(worker: Worker) -> str:
    return worker.description.build if worker.description else ""


# --- Canaries, and what else is checked once a second -----------------------------


class Watchdog:
    """Watches half-open breakers, and has the running requests checked."""

    def __init__(
        self,
        registry: Pools,
        prove: Prove,
        then: Callable[[float], None] | None = None,
    ) -> None:
        """Make one; it begins with `start`.

        `then` is called in each round, with the seconds by which the round is late.
        """
        self._registry = registry
        self._prove = prove
        self._then = then
        self._canaries: set[asyncio.Task[None]] = set()
        self._loop = Periodic("watchdog", self._step, PERIOD)

    def __repr__(self) -> str:
        return f"<Watchdog canaries={len(self._canaries)}>"

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        canaries = [*self._canaries]
        for task in canaries:
            task.cancel()
        await asyncio.gather(*canaries, return_exceptions=True)

    async def _step(self) -> None:
        self.round(self._loop.late)

    def round(self, late: float = 0.0) -> None:
        """Look at every worker once, and call `then`."""
        for worker in self._registry.workers:
            ready = worker.state is WorkerState.READY and worker.takes_requests
            if ready and worker.policy.canary:
                self._send_canaries(worker)
        if self._then is not None:
            self._then(late)

    # --- Canaries -----------------------------------------------------------------

    def _send_canaries(self, worker: Worker) -> None:
        # While the machine itself is out or busy, its models are not tried.
        suspects = [*worker.model_breakers.items()] if worker.breaker.available else []
        any_model = None if worker.breaker.closed else worker.some_model
        if any_model is not None:  # any of them proves the machine
            suspects.append((any_model, worker.breaker))
        for model, breaker in suspects:
            permit = breaker.permit()
            if permit is not None:
                task = spawn(
                    self._send_canary(worker, model, breaker, permit),
                    f"canary {worker.name}",
                )
                self._canaries.add(task)
                task.add_done_callback(self._canaries.discard)

    async def _send_canary(
        self, worker: Worker, model: str, breaker: Breaker, first: Permit
    ) -> None:
        """Send one canary after another, while they are good and more are needed."""
        permit: Permit | None = first
        while permit is not None:
            with permit:
                wanted = worker.takes_requests
                good = await self._prove(worker, model) if wanted else None
                permit.settle(good)
            worker.freed()
            permit = breaker.permit() if good else None
