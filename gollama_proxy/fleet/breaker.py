"""The circuit breaker: no requests for a worker that fails, then gradually more.

Theory of operation
===================

                  TRIPPED  too many failures or slow answers
          ╭──────────────────────────────────────────────────────────╮
          │                                                          ▼
    ┌──────────┐    PROVED    ┌─────────────┐    RESTED     ┌────────────────┐
    │  CLOSED  │◀─────────────│  HALF_OPEN  │◀──────────────│      OPEN      │
    └──────────┘              └─────────────┘               └────────────────┘
                                     │          DISPROVED            ▲
                                     ╰───────────────────────────────╯

    RESET, by an operator, leads from OPEN and HALF_OPEN to CLOSED.
    DOUBTED, as the breaker of another hub is open, leads from CLOSED to HALF_OPEN.

CLOSED     Each request ends with a `record()` of its verdict.  Three things trip the
           breaker: consecutive failures (the worker is dead), and the failure rate or
           the slow rate in the last `window` seconds (it is broken, or overloaded).
           Rates need `minimum_calls`, and a good answer never trips.  A hang counts
           towards the slow rate and the consecutive failures: the answers of half a
           minute ago must not outweigh a worker that has stopped answering.

OPEN       No requests for `open` seconds, doubled each time up to `open_max`, and
           varied by `jitter`, so that breakers that tripped together do not return
           together.  A worker that works and fails in turn therefore opens every
           `open_max` seconds at worst.  After a `window` of being CLOSED, the doubling
           starts anew.

HALF_OPEN  `permit()` returns one permit at a time, for a request that generates a real
           token: a process can report good health although its GPU is lost.  The
           request is a canary, or with `canary` off one of a client.  `proofs` good
           ones in a row close the breaker, and a bad one opens it.  A permit is always
           given back; if its request was cancelled, it proves nothing.

           What another hub found out leads here at most, never to OPEN: its network
           may be what is broken.  A worker that has answered this hub in the last
           `TRUSTED` seconds is not in doubt, and one that has just been proved is not
           doubted again for `open_max` seconds.

CLOSED     again: the worker's share of the requests rises from a tenth to all of them
           in `ramp` seconds.

There is no timer: reading the state takes the step RESTED when it is due.  Each step
begins a new *generation*, and verdicts of an earlier one are ignored.

A worker that is `busy()` (429, or 503 "Loading model") has not failed; it gets no
requests for a while, in any state.  That concerns one model, so it is recorded in the
breaker of the model.  A worker that is *unavailable* (503) each time when the wait is
over is broken: that counts as consecutive failures.
"""

from __future__ import annotations

import enum
import logging
import math
import random
from collections import Counter
from collections.abc import Callable

from gollama_proxy.bounded import SlidingWindow
from gollama_proxy.config.settings import Breaker as Policy

logger = logging.getLogger(__name__)

FIRST_SHARE = 0.1  # of the turns, for a worker whose breaker has just closed
TRUSTED = 5.0  # seconds after a good answer in which other hubs raise no doubt


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class BreakerEvent(enum.Enum):
    TRIPPED = "too much went wrong"
    RESTED = "the open time is over"
    PROVED = "enough good proofs"
    DISPROVED = "a bad proof"
    RESET = "an operator reset it"
    DOUBTED = "the breaker of another hub is open"


# All the steps there are; any other raises.
TRANSITIONS: dict[tuple[BreakerState, BreakerEvent], BreakerState] = {
    (BreakerState.CLOSED, BreakerEvent.TRIPPED): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerEvent.RESTED): BreakerState.HALF_OPEN,
    (BreakerState.HALF_OPEN, BreakerEvent.PROVED): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerEvent.DISPROVED): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerEvent.RESET): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerEvent.RESET): BreakerState.CLOSED,
    (BreakerState.CLOSED, BreakerEvent.DOUBTED): BreakerState.HALF_OPEN,
}


class OpenCause(enum.Enum):
    """What has opened a breaker; a label of metrics."""

    CONSECUTIVE = "failures in a row"
    FAILURE_RATE = "failure rate"
    SLOW_RATE = "slow rate"
    PROOF = "failed proof"


class IllegalStepError(Exception):
    """An event that cannot happen in this state: a bug in the hub."""


class Verdict(enum.Enum):
    """What a request shows about the worker."""

    SUCCESS = "succeeded"
    SLOW = "slow"  # it completed, but slowly
    HUNG = "hung"  # nothing came for too long: slow, and a failure
    FAILURE = "failed"
    NEUTRAL = "neutral"  # nothing: the client left, or sent a request that is wrong


# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_NEUTRAL, _SUCCESS = Verdict.NEUTRAL, Verdict.SUCCESS


class Breaker:
    """The breaker of a worker or of a model on it; `clock` gives monotonic seconds."""

    _credit: float

    def __init__(
        self,
        name: str,
        policy: Policy,
        clock: Callable[[], float],
        rng: random.Random,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Make a closed one; `on_change` is called when it may admit other requests."""
        self.name, self.policy = name, policy
        self.reason = "never tripped"
        self.generation = 0  # how many steps were taken
        self.since = clock()  # when the last one was
        self.transitions: Counter[BreakerState] = (
            Counter()
        )  # how often each was entered
        self.causes: Counter[OpenCause] = Counter()  # how often each has opened it
        self._clock, self._rng, self._on_change = clock, rng, on_change
        self._state = BreakerState.CLOSED
        self.closed = True
        self._busy_until = -math.inf
        self._closed_at = -math.inf  # the last time; before everything at the start
        self._open_time = 0.0  # the last one, without the jitter; 0 when forgotten
        self._rested_at = -math.inf  # when the open time is, or was, over
        self._proved_at = -math.inf  # when proofs last closed it
        self._permit_out, self._proofs = False, 0
        self._in_a_row = 0  # failures
        self._forget_the_past()

    def __repr__(self) -> str:
        # Of the state as it was left: a repr must not take a step.
        slow, failed = self._slow.count, self._failures.count
        return (
            f"<Breaker {self.name} {self._state.name} ({self.reason}) "
            f"calls={self._calls} failed={failed} slow={slow} "
            f"in_a_row={self._in_a_row} opens_in={self.opens_in():.1f}>"
        )

    def follow(self, policy: Policy) -> None:
        """Take another policy; an open breaker stays open for as long as it was to."""
        before, self.policy = self.policy, policy
        if policy.window != before.window:
            self._forget_the_past()

    # --- What it admits -----------------------------------------------------------

    @property
    def state(self) -> BreakerState:
        if self._state is BreakerState.OPEN and self._clock() >= self._rested_at:
            self._step(BreakerEvent.RESTED, f"{self._open_time:g} s have passed")
        return self._state

    @property
    def available(self) -> bool:
        return self.closed and self._clock() >= self._busy_until

    @property
    def admits(self) -> bool:
        """Whether a request is admitted: as one of many, or alone, as a proof."""
        return self.available or (not self.policy.canary and self._offers_permit)

    @property
    def _offers_permit(self) -> bool:
        resting = self.state is not BreakerState.HALF_OPEN or self.opens_in()
        return not (resting or self._permit_out)

    def opens_in(self) -> float:
        """Return the seconds for which it certainly admits nothing, not even proofs."""
        until = self._busy_until
        if self._state is BreakerState.OPEN:
            until = max(until, self._rested_at)
        return max(0.0, until - self._clock())

    def next_change(self) -> float:
        """Return when time alone changes what it admits; inf if it does not."""
        opens = self._state is BreakerState.OPEN
        moment = self._rested_at if opens else self._busy_until
        return moment if moment > self._clock() else math.inf

    @property
    def works(self) -> bool:
        """Whether the last answers were good, and not long ago."""
        good = self.closed and not self._in_a_row
        return good and self._successes.recent(TRUSTED) > 0

    def turn(self, *, dry: bool = False) -> bool:
        """Return whether an available worker should take this request, or leave it.

        Nothing is random: the worker's shares add up, and each whole one is a True.  If
        every worker returns False, one of them has to take the request all the same.
        In a `dry` run the shares stay as they are.
        """
        since, ramp = self._clock() - self._closed_at, self.policy.ramp
        missing = 0.0 if since >= ramp else (1 - FIRST_SHARE) * (1 - since / ramp)
        credit = self._credit + 1.0 - missing
        takes = credit >= 1.0
        if not dry:
            self._credit = credit - takes
        return takes

    # --- What it learns -----------------------------------------------------------

    def record(self, verdict: Verdict, generation: int | None = None) -> None:
        """Record how a request on this worker ended.

        `generation` is that of the breaker when the request began.  With it, the last
        requests of an earlier breakdown cannot trip a breaker that has closed since.
        """
        late = generation is not None and generation != self.generation
        if late or not self.closed or verdict is _NEUTRAL:
            return
        if verdict is _SUCCESS:
            self._successes.add()
            self._in_a_row = 0
            return
        failed = verdict in (Verdict.FAILURE, Verdict.HUNG)
        self._in_a_row = self._in_a_row + 1 if failed else 0
        (self._failures if verdict is Verdict.FAILURE else self._slow).add()
        objection = self._objection(verdict)
        if objection is not None:
            self._trip(*objection)

    def busy(self, seconds: float, *, unavailable: bool = False) -> float:
        """Admit nothing for some seconds, as the worker asked; this is not a failure.

        Being `unavailable` again and again is one; requests that ran at the same time
        count once.  Returns the seconds, which are at most `busy_max`.
        """
        now = self._clock()
        seconds = min(seconds, self.policy.busy_max)
        if (
            unavailable
            and now >= self._busy_until
            and self.state is BreakerState.CLOSED
        ):
            self._in_a_row += 1
            if self._in_a_row >= self.policy.consecutive:
                self._trip(OpenCause.CONSECUTIVE, f"unavailable {self._in_a_row} times")
        self._busy_until = max(self._busy_until, now + seconds)
        self._changed()
        return seconds

    def permit(self) -> Permit | None:
        """Return the right to prove that the worker works, or None if it is not due."""
        if not self._offers_permit:
            return None
        self._permit_out = True
        self._changed()
        return Permit(self)

    def renew(self) -> None:
        """Record that the worker is back, and may be another server by now.

        That proves nothing, so an open breaker stays open until the proofs, which can
        begin at once.  A closed one counts from zero, and its share rises gradually.
        """
        now = self._clock()
        if self.closed:
            self._closed_at = now
            self._forget_the_past()
        else:
            self._rested_at, self._open_time = min(self._rested_at, now), 0.0
            self._changed()

    def doubt(self, reason: str) -> bool:
        """Ask for proofs, as the breaker of another hub is open for this worker.

        Returns whether it does: only a closed one, of a worker that has not shown in
        the last seconds that it works.
        """
        now = self._clock()
        if (
            not self.closed
            or now - self._proved_at < self.policy.open_max
            or self._successes.recent(TRUSTED) > 0
        ):
            return False
        self._forget_old_openings(now)
        self._step(BreakerEvent.DOUBTED, reason)
        return True

    def reset(self) -> None:
        """Close it at once, and forget failures and pauses: an operator knows better.

        Its share of the requests rises gradually, as after any closing.
        """
        self._busy_until, self._open_time = -math.inf, 0.0
        if self.closed:
            self._forget_the_past()
            self._changed()
        else:
            self._step(BreakerEvent.RESET, "reset by an operator")

    def _trip(self, cause: OpenCause, reason: str) -> None:
        self._forget_old_openings(self._clock())
        self.causes[cause] += 1
        self._step(BreakerEvent.TRIPPED, reason)

    def _forget_old_openings(self, now: float) -> None:
        if now - self._closed_at >= self.policy.window:
            self._open_time = 0.0

    def _objection(self, verdict: Verdict) -> tuple[OpenCause, str] | None:
        policy = self.policy
        if self._in_a_row >= policy.consecutive:
            return OpenCause.CONSECUTIVE, f"{self._in_a_row} failures in a row"
        slow = verdict is not Verdict.FAILURE
        cause = OpenCause.SLOW_RATE if slow else OpenCause.FAILURE_RATE
        rate = policy.slow_rate if slow else policy.failure_rate
        kind = Verdict.SLOW if slow else Verdict.FAILURE
        calls, bad = self._calls, (self._slow if slow else self._failures).count
        if calls < policy.minimum_calls or bad / calls < rate:
            return None
        return cause, f"{bad} of {calls} {kind.value} in {policy.window:g} s"

    @property
    def _calls(self) -> int:
        return self._successes.count + self._slow.count + self._failures.count

    def _forget_the_past(self) -> None:
        window, clock = self.policy.window, self._clock
        self._successes = SlidingWindow(window, clock)
        self._slow = SlidingWindow(window, clock)  # and those that hung
        self._failures = SlidingWindow(window, clock)
        self._in_a_row = 0
        self._credit = 0.0  # parts of turns

    def _settle(self, good: bool | None, generation: int) -> None:
        if generation != self.generation:
            return  # it was reset in the meantime
        self._permit_out = False
        self._changed()
        if good is False:
            self.causes[OpenCause.PROOF] += 1
            self._step(BreakerEvent.DISPROVED, "the proof failed")
        elif good:
            self._proofs += 1
            if self._proofs >= self.policy.proofs:
                self._proved_at = self._clock()
                self._step(BreakerEvent.PROVED, f"{self._proofs} good proofs")

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    # --- The one place that changes the state -------------------------------------

    def _step(self, event: BreakerEvent, reason: str) -> None:
        before = self._state
        if (before, event) not in TRANSITIONS:
            raise IllegalStepError(f"{event.name} cannot happen while {before.name}")
        after = self._state = TRANSITIONS[before, event]
        self.closed = after is BreakerState.CLOSED
        self.reason = reason
        self.generation += 1
        self.since = self._clock()
        self.transitions[after] += 1
        self._permit_out, self._proofs = False, 0
        if after is BreakerState.CLOSED:
            self._closed_at = self._clock()
            self._forget_the_past()
        elif after is BreakerState.OPEN:
            longer = self._open_time * 2 or self.policy.open
            self._open_time = min(longer, self.policy.open_max)
            jitter = self._rng.uniform(-self.policy.jitter, self.policy.jitter)
            self._rested_at = self._clock() + self._open_time * (1 + jitter)
        self._changed()
        level = logging.WARNING if after is BreakerState.OPEN else logging.INFO
        text = "worker %s: breaker %s -> %s (%s)"
        logger.log(level, text, self.name, before.value, after.value, reason)


class Permit:
    """The right to put one request on a worker whose breaker is half-open.

    Used as a context manager, it cannot leak; if it was not settled, it proves nothing.
    """

    __slots__ = ("_breaker", "_generation", "_settled")

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._generation = breaker.generation
        self._settled = False

    def __repr__(self) -> str:
        held = "settled" if self._settled else "held"
        return f"<Permit {held} on {self._breaker.name}>"

    def settle(self, good: bool | None) -> None:
        """Give the permit back with its result; only the first call counts."""
        if not self._settled:
            self._settled = True
            self._breaker._settle(good, self._generation)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.settle(None)
