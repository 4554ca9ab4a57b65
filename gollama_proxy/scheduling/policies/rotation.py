"""Policies that take the workers in turn: round robin, and by weight.

The weighted one is stride scheduling (C. Waldspurger and W. Weihl, "Stride Scheduling:
Deterministic Proportional-Share Resource Management", MIT 1995).  A worker of weight w
is *due* every 1/w, and the one that is due first has the turn.  So the turns of a
strong worker lie between those of the others and not in a row, and over any stretch of
time each worker has its share to within one turn.

A worker that does not fit when it is due loses that turn for good: one that was away
for an hour comes back to its share, and not to an hour of catching up.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from copy import copy

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy, place_behind

# When a worker is due, and its place in the configuration, which decides a tie.
_Due = tuple[float, int, Worker]


class RoundRobin(Policy):
    """Goes round the workers of each model.

    It keeps the last worker and not a counter: when one drops out or comes back, the
    others keep their turn.
    """

    def __init__(self) -> None:
        self._last = BoundedDict[str, int]()

    def __repr__(self) -> str:
        return f"<RoundRobin last={self._last}>"

    def twin(self, ask: Ask) -> RoundRobin:
        """Return a copy for one request."""
        twin = RoundRobin()
        if ask.model in self._last:
            twin._last[ask.model] = self._last[ask.model]
        return twin

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the next worker behind the one that had the last turn."""
        first = place_behind(workers, self._last.get(ask.model, -1))
        for place in range(first, first + len(workers)):
            worker = workers[place % len(workers)]
            if fits(worker):
                self._last[ask.model] = worker.index
                return worker
        return None


class Weighted(Policy):
    """Goes round the workers of each model by their weights; O(log n)."""

    def __init__(self) -> None:
        self._rounds = BoundedDict[str, _Round]()

    def __repr__(self) -> str:
        return f"<Weighted {self._rounds}>"

    def twin(self, ask: Ask) -> Weighted:
        """Return a copy for one request."""
        twin = Weighted()
        round_ = self._rounds.get(ask.model)
        if round_ is not None:
            twin._rounds[ask.model] = round_.twin()
        return twin

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the worker that is due first."""
        if len(workers) == 1:
            return workers[0] if fits(workers[0]) else None
        round_ = self._rounds.get(ask.model)
        if round_ is None or round_.workers is not workers:
            past = {} if round_ is None else round_.due()
            round_ = self._rounds[ask.model] = _Round(workers, past)
        return round_.next(fits)


class _Round:
    """The turns of one pool.  A worker that joins it is first due in half a stride."""

    __slots__ = ("_heap", "workers")

    def __init__(self, workers: Sequence[Worker], past: dict[Worker, float]) -> None:
        self.workers = workers
        now = min(past.values(), default=0.0)
        self._heap: list[_Due] = [
            (past.get(worker, now + 0.5 / worker.weight), worker.index, worker)
            for worker in workers
        ]
        heapq.heapify(self._heap)

    def __repr__(self) -> str:
        waiting = ", ".join(f"{w.name} {at:.2f}" for at, _, w in sorted(self._heap))
        return f"<due: {waiting}>"

    def twin(self) -> _Round:
        twin = copy(self)
        twin._heap = self._heap.copy()
        return twin

    def due(self) -> dict[Worker, float]:
        return {worker: at for at, _, worker in self._heap}

    def next(self, fits: Fits) -> Worker | None:
        heap = self._heap
        passed: list[_Due] = []
        while heap and not fits(heap[0][2]):
            passed.append(heapq.heappop(heap))
        if not heap:
            self._heap = passed  # in order, so it is a heap
            return None
        now, index, chosen = heap[0]
        heapq.heapreplace(heap, (now + 1 / chosen.weight, index, chosen))
        for at, index, worker in passed:
            due = max(at + 1 / worker.weight, now)
            heapq.heappush(heap, (due, index, worker))
        return chosen
