"""Whether a request is tried again, where, and after how long.

Until a byte of an answer is out, a failed attempt can be made up for by another worker.
A retry is paid from a budget that all requests share, so that an outage does not
multiply the load.  Another worker comes before the same one again:

    failure                     another worker      the only one, once more
    ────────────────────────    ────────────────    ──────────────────────────────
    UNREACHABLE                 at once, for free   no
    LOADING                     at once, for free   after its Retry-After, if short
    RESET, STATUS (5xx)         at once             after a short pause
    BUSY (429)                  at once             after its Retry-After, if short
    SLOW, SILENT                at once             no: it would be as slow again
    MALFORMED, KEY              at once             no
    CONTEXT (prompt too long)   with a larger one   no
    STREAM (cannot be folded)   at once, and without asking for a stream

What was refused unread has cost the worker nothing, so it is free.  A 500 may be the
request's own fault (llama-server answers so to bad UTF-8, and to an image for a text
model): nobody is blamed for it until another worker did better, and when two of them
say the same, it is believed.

When the attempts are used up, or nobody of a pool is there, the model's *fallbacks*
come, each with attempts of its own, which are not paid for.  They come earlier for an
answer that broke off in its middle (`resume`): another worker, then a fallback, and the
same worker last.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence

from gollama_proxy.routing.budget import RetryBudget
from gollama_proxy.routing.context import Overflow, too_long
from gollama_proxy.routing.policies import Ask
from gollama_proxy.routing.pool import Pool
from gollama_proxy.routing.worker import Worker
from gollama_proxy.settings import Retry
from gollama_proxy.wire.errors import RequestError


class Failure(enum.Enum):
    """Why an attempt came to nothing."""

    UNREACHABLE = "unreachable"
    LOADING = "loading"
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
# The same, when it says that it is worth while.
LATER = frozenset({Failure.BUSY, Failure.LOADING})
# The worker has fallen silent.
HANGS = frozenset({Failure.SLOW, Failure.SILENT})
# What has cost the worker nothing.
FREE = frozenset({Failure.UNREACHABLE, Failure.LOADING, Failure.CONTEXT})
# What a worker may have begun to do by then.
BEGUN = frozenset(
    {
        Failure.RESET,
        Failure.STATUS,
        Failure.SLOW,
        Failure.SILENT,
        Failure.MALFORMED,
    }
)
PAUSE = (0.05, 0.15)  # seconds, between two attempts on the same worker
_BELIEVED = 2  # so many workers that say the same


class Attempts:
    """The attempts of one request: on its model's pool, then on its fallbacks'."""

    __slots__ = (
        "_again",
        "_budget",
        "_continuations",
        "_fallbacks",
        "_free",
        "_least_context",
        "_limits",
        "_pools",
        "_repeat",
        "_resuming",
        "_rng",
        "_stalled",
        "_suspects",
        "as_sent",
        "ask",
        "begun",
        "needs",
        "once",
        "pool",
        "tried",
    )

    def __init__(
        self,
        pools: Sequence[Pool],
        limits: Retry,
        budget: RetryBudget,
        rng: random.Random,
        *,
        continuations: int = 0,
        once: bool = False,
    ) -> None:
        """Begin; there may be so many `continuations` of an answer that broke off.

        With `once`, what a worker may have begun is not tried again.
        """
        self.pool = pools[0]
        self.tried: list[Worker] = []  # of the pool
        self.ask = Ask(self.pool.model)  # what is known of the request
        self.begun = False  # somebody has been asked, of this pool or of another
        self.needs: dict[str, int] = {}  # tokens of the prompt, by model; 0: not known
        self.as_sent = False  # a stream in place of an answer has been of no use
        self._pools = tuple(pools)
        self._fallbacks = list(pools[1:])
        self._limits = limits
        self._budget = budget
        self._rng = rng
        self._continuations = continuations
        self.once = once
        self._resuming = False
        self._free = False  # nothing is paid for any more
        self._stalled: list[Worker] = []  # workers that fell silent
        self._suspects: list[Worker] = []  # of a 5xx that may be the request's fault
        self._least_context = 0  # a worker must have more than this
        self._again = False  # the last worker may have another attempt,
        self._repeat = False  # or even has to be the one
        budget.deposit()

    def __repr__(self) -> str:
        pool, tried, limit = self.pool.model, len(self.tried), self._limits.attempts
        return f"<Attempts {tried} of {limit} on {pool!r}>"

    # --- Who ----------------------------------------------------------------------

    def candidates(self) -> list[Worker]:
        """Choose who may take the next attempt: those that have not had one.

        Where all have, it is the last one's, once more, if `retry_after` has said so.
        Where nobody is there, it is the next fallback's.
        """
        if self._resuming and not self.some_left:
            return []
        available = self.fitting(self.pool)
        last = [w for w in available if w in self.tried[-1:]] if self._again else []
        others = self.pool.preferred(self._others())
        if self._repeat and last:
            return last
        if others or last:
            return others or last
        return self.candidates() if self._fall_back() else []

    def has_other(self) -> bool:
        """Tell whether somebody is left to take over, and may."""
        if self.once or (self._resuming and not self.some_left):
            return False
        paid = self._free or self._budget.suffices
        others = self._others() if paid and self.some_left else []
        for fallback in self._fallbacks:
            others += self.fitting(fallback)
        return any(worker.free > 0 for worker in others)

    def begin(self, worker: Worker) -> None:
        """Note who has got the attempt."""
        self.tried.append(worker)
        self.begun = True
        self._again = self._repeat = False
        if self._resuming:
            self._continuations -= 1

    def _has_another(self) -> bool:
        """Tell whether the pool has another worker to try."""
        return self.some_left and bool(self._others())

    def _others(self) -> list[Worker]:
        """List who may have the next attempt beside the one who had the last.

        For an answer that broke off these are also those that have failed it before,
        when nobody else is left.  They may have been started anew; but whoever has
        stalled would stall again.
        """
        available = self.fitting(self.pool)
        untried = [worker for worker in available if worker not in self.tried]
        if untried or not self._resuming:
            return untried
        barred = [*self._stalled, *self.tried[-1:]]
        return [worker for worker in available if worker not in barred]

    @property
    def some_left(self) -> bool:
        """Whether there may be another attempt on this pool, if there is somebody."""
        if self._resuming:
            return self._continuations > 0
        return len(self.tried) < self._limits.attempts

    @property
    def pools(self) -> list[Pool]:
        """The pools that are left: this one, and those of the fallbacks behind it."""
        return [self.pool, *self._fallbacks]

    def fitting(self, pool: Pool) -> list[Worker]:
        """List who can be asked and has enough context, as far as is known."""
        if not (self._least_context or self.needs):
            return pool.able
        return [worker for worker in pool.able if self._fits(worker, pool.model)]

    @property
    def fits_somewhere(self) -> bool:
        """Whether anybody has enough context, be it somebody who is out."""
        return any(
            self._fits(worker, pool.model)
            for pool in self.pools
            for worker in pool.workers
        )

    def _fits(self, worker: Worker, model: str) -> bool:
        context = worker.context_of(model)
        if context is None:  # let it try, but not after somebody has refused
            return not self._least_context
        return context > max(self._least_context, self.needs.get(model, 0))

    def too_long(
        self, refusal: Overflow | None = None, *, native: bool = False
    ) -> RequestError | None:
        """Make the error of a prompt for which no worker has enough context.

        None if nothing is known of any context, and no worker has refused.
        """
        counted = next(iter(self.needs.values()), 0)
        return too_long(self._pools, counted, refusal, native=native)

    def _fall_back(self) -> bool:
        """Move on to the next fallback that has somebody; False if none has."""
        while self._fallbacks:
            self.pool = self._fallbacks.pop(0)
            self.ask = self.ask._replace(model=self.pool.model)
            if self.fitting(self.pool):
                self.tried.clear()
                self._suspects.clear()
                self._free = True
                return True
        return False

    # --- Whether ------------------------------------------------------------------

    def retry_after(
        self, failure: Failure | None, asked: float | None = None
    ) -> float | None:
        """Decide on another attempt: the pause before it, in seconds; None for none.

        A `failure` of None would be the same everywhere.  `asked` is the Retry-After of
        a busy worker.
        """
        if failure is None or (self.once and failure in BEGUN):
            return None
        if self._resuming and not self.some_left:
            return None
        worker = self.tried[-1]
        if failure is Failure.STREAM:
            self.as_sent = True
            self.tried.clear()
            return 0.0
        if failure is Failure.STATUS:
            self._suspects.append(worker)
            if len(set(map(id, self._suspects))) >= _BELIEVED:
                return None
        if failure in HANGS:
            self._stalled.append(worker)
        if failure is Failure.CONTEXT:
            self._least_context = worker.context_of(self.pool.model) or 1 << 60
        if self._resuming and not self._has_another() and self._fall_back():
            return 0.0
        pause = 0.0 if self._has_another() else self._pause_for_the_same(failure, asked)
        if pause is not None and self._may_spend(failure):
            return pause
        return 0.0 if self._fall_back() else None

    def _may_spend(self, failure: Failure) -> bool:
        return self._free or failure in FREE or self._budget.withdraw()

    def _pause_for_the_same(
        self, failure: Failure, asked: float | None
    ) -> float | None:
        if not self.some_left or self.tried.count(self.tried[-1]) > 1:
            return None
        pause = None
        if failure in AGAIN:
            pause = self._rng.uniform(*PAUSE)
        elif failure in LATER and asked is not None and asked <= self._limits.patience:
            # A little longer: nobody is early, and not all are back at once.
            pause = asked + self._rng.uniform(*PAUSE)
        self._again = pause is not None
        return pause

    # --- Answers that broke off ---------------------------------------------------

    def resume(self) -> None:
        """Go on: the last worker's answer has broken off in its middle.

        What follows is not paid for.  Each of these attempts saves what was generated
        so far, and there is one for each answer that was lost, not for each request.
        """
        last = self.tried[-1]
        self.tried = [worker for worker in self.tried if worker is not last] + [last]
        self._suspects.clear()
        self._free = self._resuming = True

    def repeat(self) -> None:
        """Have the last worker asked for something else, in the same attempt.

        It has refused to go on with an answer, or not proved that it does.
        """
        self._continuations += 1
        self._again = self._repeat = True

    def succeeded(self) -> list[Worker]:
        """Name those whose 5xx another worker has shown to be their own fault."""
        return [worker for worker in self._suspects if worker is not self.tried[-1]]
