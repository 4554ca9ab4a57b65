"""Each in turn."""

from __future__ import annotations

from collections.abc import Sequence

from gollama_proxy.bounded import Remembered
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy, place_behind


class RoundRobin(Policy):
    """Go round the workers of each model.

    What is remembered is the last worker and not a counter: when one drops out or
    comes back, the others keep their turn.
    """

    def __init__(self) -> None:
        self._last = Remembered[str, int]()

    def __repr__(self) -> str:
        return f"<RoundRobin last={self._last}>"

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the next worker behind the one that had the last turn."""
        first = place_behind(workers, self._last.get(ask.model, -1))
        for place in range(first, first + len(workers)):
            worker = workers[place % len(workers)]
            if fits(worker):
                self._last[ask.model] = worker.index
                return worker
        return None
