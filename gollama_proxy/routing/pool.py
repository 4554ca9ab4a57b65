"""The workers that serve one model name."""

from __future__ import annotations

from typing import NamedTuple

from gollama_proxy.routing.worker import State, Worker


class Pool(NamedTuple):
    """The workers that serve one model name, in the configured order."""

    model: str
    workers: tuple[Worker, ...]

    @property
    def available(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.can_serve(self.model)]

    def reopens_in(self) -> float:
        """Tell the seconds until some worker that is out may be proved good again."""
        waits = [
            max(worker.breaker.opens_in(), of_model.opens_in() if of_model else 0.0)
            for worker in self.workers
            for of_model in [worker.model_breakers.get(self.model)]
            if worker.state is State.READY
        ]
        return min(waits, default=0.0)
