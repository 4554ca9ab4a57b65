"""Once a second: do the answers go on, and are broken workers good again?

One task looks after all running answers, so that no timer is armed for a token.  The
same round sends the canaries: one-token generations of the hub's own, which are the
only thing that a worker gets while its breaker is half-open.  A good `/health` proves
nothing there; the process can be well and its GPU gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

from gollama_proxy.config.settings import Timeouts
from gollama_proxy.fleet.breaker import Breaker, Permit
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

PERIOD = 1.0
# Seconds without a byte of an answer, after which the worker is checked at once.
SUSPICIOUS = 5.0
Prove = Callable[[Worker, str], Awaitable[bool | None]]


class Answer(Protocol):
    """An answer on its way from a worker to a client."""

    def check(self, now: float, gap: float, silence: float) -> float: ...

    def abandon(self) -> None: ...


class Watchdog:
    """Watches answers and half-open breakers."""

    def __init__(
        self,
        workers: Sequence[Worker],
        timeouts: Timeouts,
        prove: Prove,
        clock: Callable[[], float],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Make one; it does not begin by itself.  `then` is called in each round."""
        self._workers = workers
        self._timeouts = timeouts
        self._prove = prove
        self._clock = clock
        self._then = then
        self._answers: dict[Answer, Worker] = {}
        self._canaries: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Watchdog answers={len(self._answers)} canaries={len(self._canaries)}>"

    @contextlib.contextmanager
    def watching(self, answer: Answer, worker: Worker) -> Iterator[None]:
        """Look after a worker's answer for as long as it is relayed."""
        self._answers[answer] = worker
        try:
            yield
        finally:
            self._answers.pop(answer, None)

    def start(self) -> None:
        self._task = spawn(self._run(), "watchdog")

    async def stop(self) -> None:
        tasks = [*self._canaries, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            try:
                self.round()
            except Exception:
                logger.exception("a round of the watchdog failed; the next one follows")

    def round(self) -> None:
        """Look at everything once."""
        now = self._clock()
        for answer, worker in tuple(self._answers.items()):
            silent = answer.check(now, self._timeouts.gap, self._timeouts.silence)
            if silent > SUSPICIOUS:
                worker.suspect()
            if worker.is_down:
                answer.abandon()
        for worker in self._workers:
            if worker.state is WorkerState.READY and worker.policy.canary:
                self._send_canaries(worker)
        if self._then is not None:
            self._then()

    # --- Canaries -----------------------------------------------------------------

    def _send_canaries(self, worker: Worker) -> None:
        # While the machine itself is out or busy, nothing is asked about its models.
        suspects = [*worker.model_breakers.items()] if worker.breaker.available else []
        if (model := worker.some_model) is not None:  # any of them proves the machine
            suspects.append((model, worker.breaker))
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
        """Send one canary after another, for as long as they are good and wanted."""
        permit: Permit | None = first
        while permit is not None:
            with permit:
                good = await self._prove(worker, model)
                permit.settle(good)
            permit = breaker.permit() if good else None
