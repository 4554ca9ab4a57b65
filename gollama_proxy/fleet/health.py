"""The health loop: one supervised task for each worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence

from gollama_proxy.config.settings import Health
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.tasks import spawn
from gollama_proxy.upstream import probe
from gollama_proxy.wire.description import Check

logger = logging.getLogger(__name__)

Ping = Callable[[Worker], Awaitable[probe.Finding]]
# ± this share, so that hubs and workers started together do not stay in step.
JITTER = 0.1


class HealthChecker:
    """Asks every worker how it is, and tells its record.

    A worker in good health is asked every `interval`; one that is loading or in doubt
    every `recheck`; one that is down ever less often, up to `interval`.  A request that
    failed on a worker has it asked at once.
    """

    def __init__(self, workers: Sequence[Worker], health: Health, ping: Ping) -> None:
        self._workers = workers
        self._health = health
        self._ping = ping
        self._tasks: list[asyncio.Task[None]] = []
        self._first_round = {worker.name: asyncio.Event() for worker in workers}
        self._described = {worker.name: asyncio.Event() for worker in workers}
        self._suspected = {worker.name: asyncio.Event() for worker in workers}
        self._looking: dict[str, list[asyncio.Future[bool]]] = {
            worker.name: [] for worker in workers
        }
        self._noted: set[str] = set()  # workers of which an oddity was logged

    def __repr__(self) -> str:
        running = sum(not task.done() for task in self._tasks)
        return f"<HealthChecker running={running} of {len(self._workers)}>"

    def start(self) -> None:
        """Start one task for each worker; `stop` ends them."""
        for worker in self._workers:
            worker.on_suspicion = self._suspected[worker.name].set
            self._tasks.append(spawn(self._supervise(worker), f"health {worker.name}"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks.clear()

    async def first_round(self) -> None:
        """Wait until every worker has been asked once."""
        for event in self._first_round.values():
            await event.wait()

    async def described(self) -> None:
        """Wait until every worker has said what it serves, or was down."""
        for event in self._described.values():
            await event.wait()

    async def look(self, worker: Worker) -> bool:
        """Ask a worker now, and wait; return whether it is well."""
        seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._looking[worker.name].append(seen)
        self._suspected[worker.name].set()
        return await seen

    async def _supervise(self, worker: Worker) -> None:
        """Keep the loop alive: a health check that died silently is worse than none."""
        while True:
            try:
                await self._watch(worker)
            except Exception:
                logger.exception(
                    "health check of worker %s failed; it will be repeated", worker.name
                )
                await asyncio.sleep(self._health.recheck)

    async def _watch(self, worker: Worker) -> None:
        suspected = self._suspected[worker.name]
        wait = 0.0
        while True:
            suspected.clear()
            was_down = worker.state is WorkerState.DOWN
            with self._telling(worker) as told:
                finding = await self._ping(worker)
                worker.observe(finding.check, finding.reason, finding.description)
                told.append(finding.check is Check.OK)
            if finding.note and worker.name not in self._noted:
                self._noted.add(worker.name)
                logger.warning("worker %s: %s", worker.name, finding.note)
            self._first_round[worker.name].set()
            if worker.description is not None or worker.is_down:
                self._described[worker.name].set()
            wait = next_wait(worker, self._health, wait if was_down else 0.0)
            jitter = random.uniform(1 - JITTER, 1 + JITTER)
            try:
                async with asyncio.timeout(wait * jitter):
                    await suspected.wait()
            except TimeoutError:
                pass

    @contextlib.contextmanager
    def _telling(self, worker: Worker) -> Iterator[list[bool]]:
        """Answer those who have asked for a look that begins now, however it ends."""
        looking, self._looking[worker.name] = self._looking[worker.name], []
        found: list[bool] = []
        try:
            yield found
        finally:
            for each in looking:
                if not each.done():
                    each.set_result(any(found))


def next_wait(worker: Worker, health: Health, last: float) -> float:
    """Decide how long to wait for the next ping of a worker, in seconds."""
    if worker.state is WorkerState.READY and not worker.in_doubt:
        return health.interval
    if worker.state is WorkerState.DOWN:
        return min(max(health.recheck, last * 1.5), health.interval)
    return min(health.recheck, health.interval)
