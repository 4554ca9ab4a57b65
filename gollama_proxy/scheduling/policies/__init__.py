"""Routing policies: their interface, and the workers that they compare.

All workers of a small pool are compared, and two of a large one.  Choosing the better
one of two that were drawn at random is nearly as good as choosing the best of all, and
far better than taking the first that was drawn: the fullest of n bins holds O(log log
n) balls then, and not O(log n / log log n) (M. Mitzenmacher, "The Power of Two Choices
in Randomized Load Balancing", IEEE TPDS 12(10), 2001).  It also keeps many requests
that arrive at once from all going to the one best worker.

That is for bins of one size.  Among unequal machines each has to be drawn in proportion
to its capacity: drawn evenly, the small ones are full before the large ones are half
full (U. Wieder, "Balanced Allocations with Heterogenous Bins", SPAA 2007).
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from operator import attrgetter
from typing import ClassVar, NamedTuple

import msgspec

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker

SMALL = 8  # workers that are all compared
DRAWS = 8  # of each kind, until those that fit are looked for one by one
TICKETS = 8  # of a worker of mean capacity; the slowest one has 1
PICKS = 2

Fits = Callable[[Worker], bool]


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a policy knows of a request."""

    model: str
    prompt_bytes: int = 0
    max_tokens: int = 0  # 0 is not known
    subject: str = ""
    prefixes: tuple[int, ...] = ()  # of the conversation, the shortest first
    patience: float = 0.0  # seconds for which it may still wait for a better worker


class Turn(NamedTuple):
    """A turn that a worker got, as hubs report it to each other."""

    model: str
    worker: Worker
    keys: tuple[int, ...]  # prefixes that were new, with the salt; the longest is last
    before: int  # the longest one of the turn before; 0 if there was none
    size: int  # bytes of the request


class Policy:
    """Picks a worker; keeps what state it needs, and knows no sockets."""

    # Whether it uses the `prefixes` of a request, and learns from its answer.
    follows: ClassVar[bool] = False

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose one of a pool's workers that `fits`; None if none does.

        The workers are in the configured order.  It is the same object for as long as
        the pool is the same, and its contents never change: what takes long to compute
        for a pool is kept.  Whether a worker fits may change at any moment, and is
        checked for as few workers as possible.

        When one worker of a full pool comes free, it may be offered alone to the
        requests that wait: `workers` has just that one then.  Only a request with some
        `patience` may get None though a worker fits; it is offered one again when a
        slot comes free, or a second later.
        """
        raise NotImplementedError

    def twin(self, ask: Ask) -> Policy:
        """Return a copy that picks for this request as this policy would now.

        It is for one request, to see what would happen: nothing that it does changes
        this policy.
        """
        raise NotImplementedError

    def learn(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Record how much of a prompt the worker found in its cache.

        `prompt_tokens` are all of them, as in `usage`; in llama-server's `timings` they
        are `cache_n + prompt_n`, and `cached_tokens` is `cache_n`.
        """

    def share(self, key: bytes, outbox: dict[int, Turn]) -> None:
        """Follow conversations together with other hubs, which have the same key.

        `outbox` gets the turns that they should know of, by the longest prefix of each.
        """

    def note(self, turn: Turn) -> None:
        """Record a turn that another hub has sent to a worker."""


def place_behind(workers: Sequence[Worker], index: int) -> int:
    """Find the first worker behind a place in the configuration; 0 behind the last."""
    place = bisect_right(workers, index, key=_index)
    return place if place < len(workers) else 0


_index = attrgetter("index")


class Shortlist:
    """The workers to compare.

    `capacity` returns what a worker can carry beside the others, in any unit; None if
    that is not known.
    """

    def __init__(
        self, capacity: Callable[[Worker, str], float | None], rng: random.Random
    ) -> None:
        self._capacity = capacity
        self._rng = rng
        self._lots = BoundedDict[str, _Lots]()
        self._last = BoundedDict[str, int]()

    def __repr__(self) -> str:
        return f"<Shortlist last={self._last}>"

    def of(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> list[Worker]:
        """Return some that fit; empty if none does.

        They are in turn: of several equals, the first is the one that was not chosen
        for longest.
        """
        if len(workers) > SMALL:
            drawn = self._draw(ask, workers, fits)
            if drawn:
                return drawn
        first = place_behind(workers, self._last.get(ask.model, -1))
        return [w for w in (*workers[first:], *workers[:first]) if fits(w)]

    def twin(self, ask: Ask) -> Shortlist:
        """Return a copy for one request."""
        twin = Shortlist(self._capacity, copy(self._rng))
        if ask.model in self._last:
            twin._last[ask.model] = self._last[ask.model]
        if ask.model in self._lots:
            twin._lots[ask.model] = copy(self._lots[ask.model])
        return twin

    def chose(self, ask: Ask, worker: Worker) -> None:
        """Record which one was chosen, for the order of the next time."""
        self._last[ask.model] = worker.index

    def last(self, ask: Ask) -> int:
        """Return the index of the one that was chosen last; -1 if none was."""
        return self._last.get(ask.model, -1)

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
    """The capacities of a pool, as they were when this was made.

    Each worker has as many tickets as it can carry, so that drawing one takes no longer
    in a large pool.  It is made again after `PICKS` picks for each worker, so its cost
    is spread over them.
    """

    __slots__ = ("left", "tickets", "workers")

    def __init__(
        self, workers: Sequence[Worker], capacities: Sequence[float | None]
    ) -> None:
        self.workers = workers
        self.left = len(workers) * PICKS
        known = [capacity for capacity in capacities if capacity is not None]
        mean = sum(known) / len(known) if known else 1.0
        self.tickets: list[Worker] = []
        for worker, capacity in zip(workers, capacities, strict=True):
            count = TICKETS if capacity is None else round(TICKETS * capacity / mean)
            self.tickets += [worker] * max(1, count)

    def __repr__(self) -> str:
        return f"<Lots of {len(self.workers)} workers for {self.left} picks>"
