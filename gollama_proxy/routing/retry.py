"""Whether a request is tried again, where, and after how long.

Until a byte of an answer is out, a failed attempt can be made up for by another worker.
A retry is paid from a budget that all requests share, so that an outage does not
multiply the load.  Another worker comes before the same one again:

    failure                     another worker      the only one, once more
    ────────────────────────    ────────────────    ──────────────────────────────
    UNREACHABLE                 at once             no
    RESET, STATUS (5xx)         at once             after a short pause
    BUSY (429, loading)         at once             after its Retry-After, if short
    SLOW, SILENT                at once             no: it would be as slow again
    MALFORMED, KEY              at once             no
    CONTEXT (prompt too long)   with a larger one   no
    STREAM (cannot be folded)   at once, and without asking for a stream

A 500 may be the request's own fault (llama-server answers so to bad UTF-8, and to an
image for a text model), so nobody is blamed for it until another worker did better.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence

from gollama_proxy.routing.budget import RetryBudget
from gollama_proxy.routing.worker import Worker
from gollama_proxy.settings import Retry


class Failure(enum.Enum):
    """Why an attempt came to nothing."""

    UNREACHABLE = "unreachable"
    RESET = "reset"
    STATUS = "status"
    BUSY = "busy"
    SLOW = "slow"
    SILENT = "silent"
    MALFORMED = "malformed"
    KEY = "key"
    CONTEXT = "context"
    STREAM = "stream"


# What the only worker there is gets a second chance for.
AGAIN = frozenset({Failure.RESET, Failure.STATUS})
PAUSE = (0.05, 0.15)  # seconds, between two attempts on the same worker


class Attempts:
    """The attempts of one request."""

    def __init__(
        self, model: str, limits: Retry, budget: RetryBudget, rng: random.Random
    ) -> None:
        self.tried: list[Worker] = []
        self.as_sent = False  # a stream in place of an answer has been of no use
        self._model = model
        self._limits = limits
        self._budget = budget
        self._rng = rng
        self._suspects: list[Worker] = []  # of a 5xx that may be the request's fault
        self._least_context = 0  # a worker must have more than this
        budget.deposit()

    def __repr__(self) -> str:
        return f"<Attempts {len(self.tried)} of {self._limits.attempts}>"

    def candidates(self, available: Sequence[Worker]) -> list[Worker]:
        """Choose who may take the next attempt: those that have not had one.

        Where all have, it is the last one's, once more.
        """
        fitting = [
            worker
            for worker in available
            if not self._least_context
            or (worker.context_of(self._model) or 0) > self._least_context
        ]
        others = [worker for worker in fitting if worker not in self.tried]
        return others or [worker for worker in fitting if worker is self.tried[-1]]

    def has_other(self, available: Sequence[Worker]) -> bool:
        """Tell whether somebody is left to take over."""
        left = len(self.tried) < self._limits.attempts
        return left and any(
            worker not in self.tried for worker in self.candidates(available)
        )

    def begin(self, worker: Worker) -> None:
        self.tried.append(worker)

    def retry_after(
        self, failure: Failure, available: Sequence[Worker], asked: float | None = None
    ) -> float | None:
        """Decide on another attempt: the pause before it, in seconds; None for none.

        `asked` is the Retry-After of a busy worker.
        """
        worker = self.tried[-1]
        if failure is Failure.STREAM:
            self.as_sent = True
            self.tried.clear()
            return 0.0
        if failure is Failure.STATUS:
            self._suspects.append(worker)
        if failure is Failure.CONTEXT:
            self._least_context = worker.context_of(self._model) or 1 << 60
        pause = 0.0
        if not self.has_other(available):
            again = self._pause_for_the_same(failure, asked)
            if again is None:
                return None
            pause = again
        if failure is Failure.CONTEXT:
            return pause  # a prompt that was refused unread has cost nothing
        return pause if self._budget.withdraw() else None

    def _pause_for_the_same(
        self, failure: Failure, asked: float | None
    ) -> float | None:
        if len(self.tried) >= self._limits.attempts:
            return None
        if self.tried.count(self.tried[-1]) > 1:
            return None
        if failure in AGAIN:
            return self._rng.uniform(*PAUSE)
        if failure is Failure.BUSY and asked is not None:
            # A little longer: nobody is early, and not all are back at once.
            later = asked + self._rng.uniform(*PAUSE)
            return later if asked <= self._limits.patience else None
        return None

    def succeeded(self) -> list[Worker]:
        """Name those whose 5xx another worker has shown to be their own fault."""
        return [worker for worker in self._suspects if worker is not self.tried[-1]]
