"""The workers that serve one model name, and those of them that have it loaded.

A worker in router mode loads a model when it is asked for it, which takes up to minutes
and may cost another model its place.  To wait for a slot elsewhere is usually quicker,
so a worker that has the model loaded goes before one that has not, even if it is busy.
But not forever: once every worker that has it loaded has been full for `LOAD_AFTER`
seconds without a break, there is more work than they can do, and another one is to
help.  Nobody asks a second worker to load what a first one is loading already.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gollama_proxy.fleet.worker import Worker, WorkerState

LOAD_AFTER = 10.0  # seconds


class Pool(NamedTuple):
    """The workers that serve one model name, in the configured order."""

    model: str
    workers: tuple[Worker, ...]

    @property
    def able(self) -> list[Worker]:
        """The workers that a request may be sent to."""
        return [worker for worker in self.workers if worker.can_serve(self.model)]

    @property
    def available(self) -> list[Worker]:
        """The workers that the next request should be sent to, if it may be any."""
        return self.preferred(self.able)

    def preferred(self, workers: list[Worker]) -> list[Worker]:
        """Leave those out that would have to load the model, while others have it."""
        if not any(worker.loads(self.model) for worker in workers):
            return workers
        loaded = [worker for worker in workers if not worker.loads(self.model)]
        loaded = loaded or [w for w in workers if not w.is_cold(self.model)]
        if not loaded or all(worker.full_for >= LOAD_AFTER for worker in loaded):
            return workers
        return loaded

    def busy_for(self) -> float:
        """Return the seconds until some worker is no longer busy; inf if none is."""
        waits = [
            worker.opens_in(self.model)
            for worker in self.workers
            if worker.is_busy_with(self.model)
        ]
        return min(waits, default=math.inf)

    def reopens_in(self) -> float:
        """Tell the seconds until some worker that is out may be proved good again."""
        waits = [
            worker.opens_in(self.model)
            for worker in self.workers
            if worker.state is WorkerState.READY
        ]
        return min(waits, default=0.0)
