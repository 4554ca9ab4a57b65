"""Whoever is expected to have answered first.

    seconds  =  (prompts it has yet to read + this one) / reading speed
              + tokens of the answer / writing speed beside its other answers

with the speeds that were learnt from the worker's own answers (`fleet/speed.py`).

A worker of which nothing is known comes before all others as long as it is idle, so
that something becomes known: one request pays for what all later ones need.  While it
is at it, nobody knows how long that takes, and it comes behind all others.  Among such
workers the declared weight decides, which is all there is.

Times that are nearly the same are taken for the same, and those workers have their
turns.  An estimate is not as exact as that; and of equal machines one would have all
requests as long as it is idle, and only its prompt cache would be of use.

What is known grows old where nobody asks.  A worker that was slow one morning would
never be asked again while others are free, and its speed would stay that of the
morning.  So the expected time of an idle worker halves with every `FORGOTTEN` picks for
each worker of the pool that went to others: of three workers, one of a tenth of the
others' speed gets one request in some six hundred.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from gollama_proxy.bounded import Remembered
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy
from gollama_proxy.scheduling.policies.candidates import SMALL, Candidates
from gollama_proxy.scheduling.policies.least_busy import ASSUMED_SLOTS

FORGOTTEN = 64  # picks, for each worker of the pool
NEAR = 1.15  # times the shortest time, which is as good

UNKNOWN_IDLE, KNOWN, UNKNOWN_BUSY = range(3)


class Fastest(Policy):
    """Choose by expected time, of all in a small pool and of two in a large one."""

    def __init__(self, rng: random.Random) -> None:
        self._candidates = Candidates(_capacity, rng)
        self._picks = Remembered[str, _Picks]()

    def __repr__(self) -> str:
        return f"<Fastest {self._candidates!r}>"

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the worker with the shortest expected time; of equals, in turn."""
        found = self._candidates.of(ask, workers, fits)
        if not found:
            return None
        chosen, small = found[0], len(workers) <= SMALL
        picks = self._picks_of(ask.model) if small else _NONE
        if len(found) > 1:
            tokens = expected_tokens(chosen, ask)
            kind, least = _rank(chosen, ask, tokens, picks, len(workers))
            for worker in found[1:]:
                rank, time = _rank(worker, ask, tokens, picks, len(workers))
                if rank < kind or (rank == kind and time * NEAR < least):
                    chosen, kind, least = worker, rank, time
        if small:  # else the lot is fair enough
            picks.note(chosen)
            self._candidates.chose(ask, chosen)
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
        self._last: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<{self._count} picks>"

    def note(self, worker: Worker) -> None:
        self._count += 1
        self._last[worker.index] = self._count

    def since(self, worker: Worker) -> int:
        """Tell how many picks have gone to others."""
        return self._count - self._last.get(worker.index, 0)


_NONE = _Picks()


def _rank(
    worker: Worker, ask: Ask, tokens: float, picks: _Picks, pool: int
) -> tuple[float, float]:
    """Rank a worker; the lowest one is chosen, by what is known and then by time."""
    seconds = expected_seconds(worker, ask, tokens)
    if worker.leases:
        if seconds is None:
            return UNKNOWN_BUSY, len(worker.leases) / worker.weight
        return KNOWN, seconds
    if seconds is None:
        return UNKNOWN_IDLE, 1 / worker.weight
    return KNOWN, seconds * 0.5 ** (picks.since(worker) / (FORGOTTEN * pool))


def expected_tokens(worker: Worker, ask: Ask) -> float:
    """Estimate the length of an answer: as usual, but no longer than it may be."""
    usual = worker.pace_of(ask.model).speed.tokens
    return min(ask.max_tokens, usual) if ask.max_tokens else usual


def expected_seconds(
    worker: Worker, ask: Ask, tokens: float, cached: float = 0.0
) -> float | None:
    """Estimate how long a worker would take for a request; None if nothing is known.

    So many bytes of its prompt are `cached` there.  What is known only in part counts
    for the part: who never wrote an answer is taken to write at once, and found out.
    """
    pace, taken = worker.paces.get(ask.model), len(worker.leases)
    if pace is None:
        return None
    reads, writes = pace.speed.reads, pace.speed.writes(taken + 1)
    if reads is None and writes is None:
        return None
    seconds = 0.0
    if reads is not None:
        seconds = (worker.unread + ask.prompt_bytes - cached) / reads
    if writes is not None:
        seconds += tokens / writes
    if worker.slots is not None and taken >= worker.slots:  # it will wait there
        seconds *= 1 + taken // worker.slots
    return seconds


def _capacity(worker: Worker, model: str) -> float | None:
    """Tell the tokens/s of a worker that has all its slots at work."""
    slots = worker.slots or ASSUMED_SLOTS
    writes = worker.pace_of(model).speed.writes(slots)
    return None if writes is None else slots * writes
