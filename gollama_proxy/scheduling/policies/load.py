"""Policies that take the workers in turn, or compare their load.

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
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from copy import copy, deepcopy

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import (
    SMALL,
    Ask,
    Fits,
    Policy,
    Shortlist,
    place_behind,
)

# When a worker is due, and its place in the configuration, which decides a tie.
_Due = tuple[float, int, Worker]


# --- In turn ----------------------------------------------------------------------


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
