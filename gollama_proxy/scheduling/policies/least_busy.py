"""Whoever has the most free slots, in proportion to those that it has."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy
from gollama_proxy.scheduling.policies.candidates import Candidates

ASSUMED_SLOTS = 4  # of a worker that does not tell: llama-server's own default


class LeastBusy(Policy):
    """Choose the emptiest worker, of all in a small pool and of two in a large one."""

    def __init__(self, rng: random.Random) -> None:
        self._candidates = Candidates(_capacity, rng)

    def __repr__(self) -> str:
        return f"<LeastBusy {self._candidates!r}>"

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose by the part of the slots that is taken; then by the requests; in turn.

        Of two workers that are half full, the smaller one has fewer answers to share
        its memory bandwidth with.
        """
        found = self._candidates.of(ask, workers, fits)
        if not found:
            return None
        chosen = min(found, key=_busy)
        self._candidates.chose(ask, chosen)
        return chosen


def _capacity(worker: Worker, model: str) -> float:
    return worker.slots or ASSUMED_SLOTS


def _busy(worker: Worker) -> tuple[float, int]:
    taken = len(worker.leases)
    return taken / (worker.slots or ASSUMED_SLOTS), taken
