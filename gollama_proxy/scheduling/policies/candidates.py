"""Whom to compare: all workers of a small pool, and two of a large one.

To choose the better one of two that were drawn by lot is nearly as good as to choose
the best of all, and far better than to take the first that was drawn: the fullest of n
bins holds O(log log n) balls then, and not O(log n / log log n) (M. Mitzenmacher, "The
Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).  It also
keeps many requests that come at once from all going to the one best worker.

That is for bins of one size.  Among machines of unequal ones each has to be drawn in
proportion to its capacity: drawn evenly, the small ones are full before the large ones
are half full (U. Wieder, "Balanced Allocations with Heterogenous Bins", SPAA 2007).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean

from gollama_proxy.bounded import Remembered
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, place_behind

SMALL = 8  # workers that are all compared
DRAWS = 8  # of each kind, until those that fit are looked for one by one
TICKETS = 8  # of a worker of mean capacity; the slowest one has 1
PICKS = 2


class Candidates:
    """Name the workers to compare.

    `capacity` tells what a worker can carry beside the others, in any unit; None where
    that is not known.
    """

    def __init__(
        self, capacity: Callable[[Worker, str], float | None], rng: random.Random
    ) -> None:
        self._capacity = capacity
        self._rng = rng
        self._lots = Remembered[str, _Lots]()
        self._last = Remembered[str, int]()

    def __repr__(self) -> str:
        return f"<Candidates last={self._last}>"

    def of(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> list[Worker]:
        """List some that fit; empty if none does.

        They are in turn: the first one of several equals was not chosen for longest.
        """
        if len(workers) > SMALL:
            drawn = self._draw(ask, workers, fits)
            if drawn:
                return drawn
        first = place_behind(workers, self._last.get(ask.model, -1))
        return [worker for worker in _from(workers, first) if fits(worker)]

    def chose(self, ask: Ask, worker: Worker) -> None:
        """Note who was chosen, for the order of the next time."""
        self._last[ask.model] = worker.index

    def _draw(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> list[Worker]:
        lots = self._lots.get(ask.model)
        if lots is None or lots.workers is not workers or not lots.left:
            weights = [self._capacity(worker, ask.model) for worker in workers]
            lots = self._lots[ask.model] = _Lots(workers, weights)
        lots.left -= 1
        lot = self._rng.random
        # Evenly at last: where the strong ones are full, the others have few tickets.
        for tickets in (lots.tickets, workers):
            count, first = len(tickets), None
            for _ in range(DRAWS):
                worker = tickets[int(lot() * count)]
                if worker is first or not fits(worker):
                    continue
                if first is not None:
                    return [first, worker]
                first = worker
            if first is not None:
                return [first]
        return []


class _Lots:
    """The capacities of a pool, as they were when it was made.

    Each worker has as many tickets as it can carry, so that to draw one takes no longer
    in a large pool.  It is made anew after `PICKS` picks for each worker, which thereby
    pay for the making.
    """

    __slots__ = ("left", "tickets", "workers")

    def __init__(
        self, workers: Sequence[Worker], capacities: Sequence[float | None]
    ) -> None:
        self.workers = workers
        self.left = len(workers) * PICKS
        known = [capacity for capacity in capacities if capacity is not None]
        mean = fmean(known) if known else 1.0
        self.tickets: list[Worker] = []
        for worker, capacity in zip(workers, capacities, strict=True):
            count = TICKETS if capacity is None else round(TICKETS * capacity / mean)
            self.tickets += [worker] * max(1, count)

    def __repr__(self) -> str:
        return f"<Lots of {len(self.workers)} workers for {self.left} picks>"


def _from(workers: Sequence[Worker], first: int) -> Sequence[Worker]:
    return [*workers[first:], *workers[:first]]
