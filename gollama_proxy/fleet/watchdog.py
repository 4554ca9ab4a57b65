"""Once a second: whether answers make progress, and whether broken workers recover.

One task serves all running answers (`Proxy.check`), so that no timer is armed for a
token.  The same round sends the canaries: one-token generations, which are all that a
worker gets while its breaker is half-open.  A good `/health` proves nothing there: the
process can be well and its GPU gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gollama_proxy.fleet.breaker import Breaker, Permit
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.tasks import Periodic, spawn

PERIOD = 1.0
Prove = Callable[[Worker, str], Awaitable[bool | None]]


class Watchdog(Listener):
    """Watches half-open breakers, and has the running requests checked."""

    def __init__(
        self,
        prove: Prove,
        then: Callable[[float], None] | None = None,
    ) -> None:
        """Make one; it begins with `start`.

        `then` is called in each round, with the seconds by which the round is late.
        """
        self._workers: list[Worker] = []
        self._prove = prove
        self._then = then
        self._canaries: set[asyncio.Task[None]] = set()
        self._loop = Periodic("watchdog", self._step, PERIOD)

    def __repr__(self) -> str:
        return f"<Watchdog canaries={len(self._canaries)}>"

    def added(self, worker: Worker) -> None:
        self._workers.append(worker)

    def removed(self, worker: Worker) -> None:
        self._workers.remove(worker)

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
        for worker in self._workers:
            ready = worker.state is WorkerState.READY and worker.takes_requests
            if ready and worker.policy.canary:
                self._send_canaries(worker)
        if self._then is not None:
            self._then(late)

    # --- Canaries -----------------------------------------------------------------

    def _send_canaries(self, worker: Worker) -> None:
        # While the machine itself is out or busy, its models are not tried.
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
        """Send one canary after another, while they are good and more are needed."""
        permit: Permit | None = first
        while permit is not None:
            with permit:
                wanted = worker.takes_requests
                good = await self._prove(worker, model) if wanted else None
                permit.settle(good)
            worker.freed()
            permit = breaker.permit() if good else None
