"""Routing policies: those that take the workers in turn, or compare their load.

`Affinity`, which knows where conversations are, has a module to itself.

**In turn**: round robin, and by weight.  The weighted one is stride scheduling (C.
Waldspurger and W. Weihl, "Stride Scheduling: Deterministic Proportional-Share Resource
Management", MIT 1995).  A worker of weight w is *due* every 1/w, and the one that is
due first has the turn.  So the turns of a strong worker lie between those of the others
and not in a row, and over any stretch of time each worker has its share to within one
turn.  A worker that does not fit when it is due loses that turn for good: one that was
away for an hour comes back to its share, and not to an hour of catching up.

**By load**: the emptiest worker, or the one that is fastest.

    seconds  =  (prompts it has yet to read + this one) / reading speed
              + tokens of the answer / writing speed beside its other answers

is when `Fastest` expects a worker to have answered, with the speeds that were learnt
from the worker's own answers (`fleet/speed.py`).

A worker of which nothing is known comes before all others as long as it is idle, so
that something becomes known: one request pays for what all later ones need.  While it
has that request its time is not known, and it comes behind all others.  Among such
workers the declared weight decides, which is all there is.

Times that are nearly the same count as the same, and those workers have their turns.
An estimate is not more exact than that; and otherwise one of several equal machines
would have all requests as long as it is idle, and only its prompt cache would be used.

What is known grows old while a worker has no requests.  One that was slow one morning
would never get another while others are free, and its speed would stay that of the
morning.  So the expected time of an idle worker halves with every `FORGOTTEN` picks for
each worker of the pool that went to others: of three workers, one of a tenth of the
others' speed gets one request in some six hundred.

**How many are compared**: all workers of a small pool, and two of a large one.
Choosing the better one of two that were drawn at random is nearly as good as choosing
the best of all, and far better than taking the first that was drawn: the fullest of n
bins holds O(log log n) balls then, and not O(log n / log log n) (M. Mitzenmacher, "The
Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001).  It also
keeps many requests that arrive at once from all going to the one best worker.

That is for bins of one size.  Among unequal machines each has to be drawn in proportion
to its capacity: drawn evenly, the small ones are full before the large ones are half
full (U. Wieder, "Balanced Allocations with Heterogenous Bins", SPAA 2007).
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from operator import attrgetter
from typing import ClassVar, NamedTuple

import msgspec

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker

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


# --- In turn ----------------------------------------------------------------------

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


def place_behind(workers: Sequence[Worker], index: int) -> int:
    """Find the first worker behind a place in the configuration; 0 behind the last."""
    place = bisect_right(workers, index, key=_index)
    return place if place < len(workers) else 0


_index = attrgetter("index")


# --- By load ----------------------------------------------------------------------

ASSUMED_SLOTS = 4  # of a worker that does not report them: llama-server's own default
FORGOTTEN = 64  # picks, for each worker of the pool
NEAR = 1.15  # times the shortest time, that counts as equally short

UNKNOWN_IDLE, KNOWN, UNKNOWN_BUSY = range(3)


class LeastBusy(Policy):
    """Chooses the emptiest worker, of all in a small pool and of two in a large one."""

    def __init__(self, rng: random.Random) -> None:
        self._shortlist = Shortlist(_slots, rng)

    def __repr__(self) -> str:
        return f"<LeastBusy {self._shortlist!r}>"

    def twin(self, ask: Ask) -> LeastBusy:
        """Return a copy for one request."""
        twin = copy(self)
        twin._shortlist = self._shortlist.twin(ask)
        return twin

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose by the part of the slots that is taken; then by the requests; in turn.

        Of two workers that are half full, the smaller one has fewer answers to share
        its memory bandwidth with.
        """
        if len(workers) > SMALL:
            found = self._shortlist.of(ask, workers, fits)
            chosen = min(found, key=_busy, default=None)
        else:  # the same in one loop, without a call for each worker
            chosen, least = None, (0.0, 0, False)
            last = self._shortlist.last(ask)
            for worker in workers:
                if fits(worker):
                    taken = len(worker.leases)
                    part = taken / (worker.slots or ASSUMED_SLOTS)
                    busy = part, taken, worker.index <= last
                    if chosen is None or busy < least:
                        chosen, least = worker, busy
        if chosen is not None:
            self._shortlist.chose(ask, chosen)
        return chosen


def _slots(worker: Worker, model: str) -> float:
    return worker.slots or ASSUMED_SLOTS


def _busy(worker: Worker) -> tuple[float, int]:
    taken = len(worker.leases)
    return taken / (worker.slots or ASSUMED_SLOTS), taken


class Fastest(Policy):
    """Chooses by expected time, of all in a small pool and of two in a large one."""

    def __init__(self, rng: random.Random) -> None:
        self._shortlist = Shortlist(_capacity, rng)
        self._picks = BoundedDict[str, _Picks]()

    def __repr__(self) -> str:
        return f"<Fastest {self._shortlist!r}>"

    def twin(self, ask: Ask) -> Fastest:
        """Return a copy for one request."""
        twin = Fastest(random.Random())
        twin._shortlist = self._shortlist.twin(ask)
        if ask.model in self._picks:
            twin._picks[ask.model] = deepcopy(self._picks[ask.model])
        return twin

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the worker with the shortest expected time; of equals, in turn."""
        found = self._shortlist.of(ask, workers, fits)
        if not found:
            return None
        chosen, small = found[0], len(workers) <= SMALL
        picks = self._picks_of(ask.model) if small else _NONE
        if len(found) > 1:
            tokens, faded = expected_tokens(chosen, ask), FORGOTTEN * len(workers)
            best, least = UNKNOWN_BUSY + 1, math.inf
            for worker in found:
                # By what is known, then by time; the lowest rank is chosen.
                time = expected_seconds(worker, ask, tokens)
                rank = KNOWN
                if time is None:
                    taken = len(worker.leases)
                    rank = UNKNOWN_BUSY if taken else UNKNOWN_IDLE
                    time = (taken or 1) / worker.weight
                elif not worker.leases:
                    time *= 0.5 ** (picks.since(worker) / faded)
                if rank < best or (rank == best and time * NEAR < least):
                    chosen, best, least = worker, rank, time
        if small:  # in a large pool the draw is fair enough
            picks.note(chosen)
            self._shortlist.chose(ask, chosen)
        return chosen

    def _picks_of(self, model: str) -> _Picks:
        picks = self._picks.get(model)
        if picks is None:
            picks = self._picks[model] = _Picks()
        return picks


class _Picks:
    """When each worker of a pool was last picked, counted in picks."""

    __slots__ = ("_count", "_last")

    def __init__(self) -> None:
        self._count = 0
        self._last = BoundedDict[int, int]()

    def __repr__(self) -> str:
        return f"<{self._count} picks>"

    def note(self, worker: Worker) -> None:
        self._count += 1
        self._last[worker.index] = self._count

    def since(self, worker: Worker) -> int:
        """Return how many picks went to others."""
        return self._count - self._last.get(worker.index, 0)


_NONE = _Picks()


def expected_tokens(worker: Worker, ask: Ask) -> float:
    """Estimate the length of an answer: as usual, but no longer than it may be."""
    usual = (worker.paces.get(ask.model) or worker.pace_of(ask.model)).speed.tokens
    return min(ask.max_tokens, usual) if ask.max_tokens else usual


def expected_seconds(
    worker: Worker, ask: Ask, tokens: float, cached: float = 0.0
) -> float | None:
    """Estimate how long a worker would take for a request; None if nothing is known.

    `cached` bytes of its prompt are in the worker's cache.  What is known in part
    counts for that part: a worker without a writing speed is expected to need no time.
    """
    pace, taken = worker.paces.get(ask.model), len(worker.leases)
    if pace is None:
        return None
    reads, writes = pace.speed.reads, pace.speed.writes(taken + 1)
    if reads is None and writes is None:
        return None
    seconds = 0.0
    if reads is not None:
        unread = worker.unread if taken else 0
        seconds = (unread + ask.prompt_bytes - cached) / reads
    if writes is not None:
        seconds += tokens / writes
    slots = worker.slots
    if slots is not None and taken >= slots:  # the request will wait there
        seconds *= 1 + taken // slots
    return seconds


def _capacity(worker: Worker, model: str) -> float | None:
    """Return the tokens/s of a worker with all its slots at work."""
    slots = worker.slots or ASSUMED_SLOTS
    writes = worker.pace_of(model).speed.writes(slots)
    return None if writes is None else slots * writes


# --- The workers that are compared ------------------------------------------------

SMALL = 8  # workers that are all compared
DRAWS = 8  # of each kind, until those that fit are looked for one by one
TICKETS = 8  # of a worker of mean capacity; the slowest one has 1
PICKS = 2


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
