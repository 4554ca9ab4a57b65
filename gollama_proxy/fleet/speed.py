"""How fast a worker reads and writes one model, learnt from its complete answers.

    request ──────── prefill ────────▶ first token ──── generation ────▶ last token
             as long as its prompt                   as long as its answer

Two questions are answered, and they need different memories.

Which worker is faster?  `Speed` compares workers with each other, so it has to be the
plain middle, and soon: a machine that throttles should lose its next requests, not
those of ten minutes later.  A rate is that of the last ten answers or so, all their
tokens over all their seconds, so that a long answer counts for more than a short one,
whose time is mostly latency.  Reading is counted in bytes of the prompt, which is what
is known of a request before it is sent; what came from the prompt cache does not count,
if the worker reports how much that was (llama-server does, in `timings`).  Writing
depends on the number of answers that share the machine: there is a rate for each number
(by powers of two), and for one that has not been seen the nearest one stands in.  What
another hub has learnt is assumed as long as nothing was learnt here, and forgotten with
the first answer.

Is this worker slower than usual?  `Pace` compares a worker with its own past, and errs
on the safe side.  A laptop that writes four tokens a second is not slow; a graphics
card that wrote sixty and now writes four is.

*Prefill* gets an `allowance()`, after which the hub tries another worker.  An allowance
that is too long costs a client some seconds of waiting for a worker that hangs; one
that is too short destroys good answers, and those to long prompts first.  Therefore the
learnt rate **falls fast and rises slowly**:

* A prompt that is still in the worker's cache is read in no time.  Ten of them in a row
  lift the rate by less than the factor (`multiple`) that the allowance has in reserve,
  and the next prompt that is really read brings it down again.
* The time of a short prompt is latency rather than reading.  So it can show that the
  worker is faster than expected, and never that it is slower.
* Only complete answers are measured.  If the rate were too high, long prompts would be
  cut off, would never complete and never correct it.  So `missed()` lowers it.

*Generation* has a baseline, and an answer far below it `is_slow()`.  It is not cut off;
the breaker counts it, and opens when nearly all are slow.  If the baseline were an
average of the last answers, the speed of a card that throttles would be normal after a
dozen of them.  So the baseline is **limited by time**: it moves towards each answer,
but by no more than a factor of two in `half_life` seconds, however many answers there
are.  It ends near the median, and bursts that were buffered somewhere and came at once
do not move it.  A minute of throttling lowers it by 7 %; what lasts longer, such as
another model, is normal some minutes later.  Each number of parallel answers has its
own baseline: a busy worker is compared with its busy past.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gollama_proxy.wire.answer import Prefill

KEPT = 0.9  # of the past, with each answer
USUAL_TOKENS = 256.0  # of an answer, until one has been seen
SHARED = 0.7  # speed of each answer when there are twice as many
LEAST_READS = 200.0  # bytes/s: a large model on a CPU
LEAST_WRITES = 1.0  # tokens/s
# A float is compared faster with another one than with an int.
INFINITE = math.inf
LEVELS = 8  # numbers of parallel answers that are distinguished: 1, 2-3, 4-7 … 128+


# --- Compared with other workers --------------------------------------------------


class Learnt(NamedTuple):
    """What one hub has learnt about a speed, and another one may assume."""

    reads: float  # bytes of a prompt per second; 0 is not known
    writes: dict[int, float]  # tokens/s of each answer, by level (`LEVELS`)
    tokens: float  # of an answer, on average


class Speed:
    """How fast one worker reads and writes one model."""

    __slots__ = ("_reading", "_table", "_writing", "reads", "tokens")

    def __init__(self) -> None:
        self.tokens = USUAL_TOKENS  # of an answer, on average
        self.reads: float | None = None  # bytes of a prompt per second, if known
        self._reading = _Rate()
        self._writing: dict[int, _Rate] = {}
        self._table: list[float] = []  # by level; empty: to be computed, when needed

    def __repr__(self) -> str:
        reads = "?" if self.reads is None else f"{self.reads:.0f}"
        writes = ", ".join(
            f"{1 << level}+: {rate!r}" for level, rate in sorted(self._writing.items())
        )
        return f"<Speed reads {reads} bytes/s, writes {{{writes}}} tokens/s>"

    def writes(self, beside: int = 1) -> float | None:
        """Return the tokens/s of each of `beside` answers; None if it is not known."""
        if not self._table:
            if not self._writing:
                return None
            rates = {level: rate.value for level, rate in self._writing.items()}
            self._table = _spread(rates)
        return self._table[min(beside.bit_length(), LEVELS) - 1]

    def generated(self, prompt_bytes: int, seconds: float, beside: int = 1) -> int:
        """Estimate the tokens of an answer that has taken so many seconds by now.

        A worker of which nothing is known counts as slow.
        """
        reads, writes = self.reads or LEAST_READS, self.writes(beside) or LEAST_WRITES
        return int(max(seconds - prompt_bytes / reads, 0.0) * writes)

    def learnt(self) -> Learnt | None:
        """Return what was learnt here; None if nothing was."""
        writes = {level: rate.value for level, rate in self._writing.items()}
        if not (writes or self._reading.value):
            return None
        return Learnt(self._reading.value, writes, self.tokens)

    def assume(self, learnt: Learnt) -> None:
        """Take what another hub has learnt, as far as nothing was learnt here."""
        if learnt.reads and not self._reading.value:
            self.reads = learnt.reads
        if learnt.writes and not self._writing:
            self.tokens = learnt.tokens
            self._table = _spread(learnt.writes)

    def read(
        self, prompt_bytes: int, first_token: float, reported: Prefill | None = None
    ) -> None:
        """Learn from a prompt, and the seconds until the first token of its answer.

        What the worker reports is ignored if it cannot be true.
        """
        amount: float = prompt_bytes
        seconds = first_token
        if reported is not None and reported.plausible_in(first_token):
            amount *= reported.tokens / (reported.tokens + reported.cached)
            seconds = reported.seconds
        if amount > 0 and 0.0 < seconds < INFINITE:
            self.reads = self._reading.learn(amount, seconds)

    def wrote(self, tokens: int, seconds: float, beside: int = 1) -> None:
        """Learn from the tokens, and the seconds from the first token to the last."""
        if tokens > 0 and 0.0 < seconds < INFINITE:
            level = _level(beside)
            if level >= LEVELS:
                level = LEVELS - 1
            rate = self._writing.get(level)
            if rate is None:
                if not self._writing:
                    self.tokens = float(tokens)
                rate = self._writing[level] = _Rate()
            rate.learn(tokens, seconds)
            self.tokens += (1 - KEPT) * (tokens - self.tokens)
            self._table = []


def _spread(rates: Mapping[int, float]) -> list[float]:
    """Return the rate at each level; where it is not known, by that of the nearest."""

    def rate(level: int) -> float:
        nearest = min(rates, key=lambda known: abs(known - level))
        return float(rates[nearest] * SHARED ** (level - nearest))

    return [rate(level) for level in range(LEVELS)]


class _Rate:
    """An amount per second; the past fades with each new one."""

    __slots__ = ("_amount", "_seconds", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._amount = self._seconds = 0.0

    def __repr__(self) -> str:
        return f"{self.value:.1f}"

    def learn(self, amount: float, seconds: float) -> float:
        """Take in an amount, and the seconds that it has taken; return the rate."""
        self._amount = self._amount * KEPT + amount
        self._seconds = self._seconds * KEPT + seconds
        self.value = self._amount / self._seconds
        return self.value


# --- Compared with its own past ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expectations:
    """How much time a worker gets, and how quickly its past fades."""

    # --- Prefill ---
    base: float = 10.0  # seconds that every prompt gets
    multiple: float = 3.0  # times the expected prefill, in addition
    hard: float = 300.0  # seconds; no allowance is longer
    rate: float = 200.0  # bytes/s until something is learnt: a large model on a CPU
    rate_rise: float = 1.1  # a faster prompt lifts the rate by at most this factor
    rate_fall: float = 0.5  # a slower one lowers it by at most this factor
    least_bytes: int = 1024  # of a prompt that is worth measuring

    # --- Generation ---
    fraction: float = 0.25  # of the baseline, below which an answer is slow
    answers: int = 5  # to learn from before any is called slow
    half_life: float = 600.0  # seconds in which the baseline halves or doubles at most
    least_tokens: int = 8  # of an answer that is worth measuring


class Pace:
    """How fast one worker reads and writes, compared with its own past.

    `beside` arguments are the number of answers that the worker gave at the time, the
    one in question included.  `clock` returns monotonic seconds.
    """

    __slots__ = ("_baselines", "_clock", "expectations", "first_token", "rate", "speed")

    def __init__(
        self,
        clock: Callable[[], float],
        expectations: Expectations = Expectations(),
    ) -> None:
        self.expectations = expectations
        self.rate = expectations.rate  # prefill, in bytes of the prompt per second
        self.speed = Speed()  # to choose between workers
        self.first_token = 0.0  # seconds, of the last answer; 0 is not known
        self._clock = clock
        self._baselines: dict[int, _Baseline] = {}

    def __repr__(self) -> str:
        baselines = sorted(self._baselines.items())
        speeds = ", ".join(f"{1 << level}+: {line!r}" for level, line in baselines)
        return f"<Pace reads {self.rate:.0f} bytes/s, writes {{{speeds}}} tokens/s>"

    def learn(
        self,
        prompt_bytes: int,
        first_token: float,
        tokens: int,
        seconds: float,
        beside: int = 1,
        reported: Prefill | None = None,
    ) -> None:
        """Learn from a complete answer.

        `first_token` is the time from the request to the first token, `seconds` that
        from the first token to the last.  What measures nothing is ignored.
        """
        known = self.expectations
        if prompt_bytes > 0:
            self.speed.read(prompt_bytes, first_token, reported)
            if 0.0 < first_token < INFINITE:
                self.first_token = first_token
                rate = prompt_bytes / first_token
                if rate > self.rate:
                    self.rate = min(rate, self.rate * known.rate_rise)
                elif prompt_bytes >= known.least_bytes:
                    self.rate = max(rate, self.rate * known.rate_fall)
        if tokens >= known.least_tokens and 0.0 < seconds < INFINITE:
            self.speed.wrote(tokens, seconds, beside)
            now, level = self._clock(), _level(beside)
            baseline = self._baselines.get(level)
            if baseline is None:
                baseline = _Baseline(known.answers, known.half_life, now)
                self._baselines[level] = baseline
            baseline.learn(tokens / seconds, seconds, now)

    def missed(self) -> None:
        """Learn from a prompt whose first token did not come within its allowance.

        Either the rate is `multiple` times too high, or the worker hangs, which the
        breaker will find out; until then the rate falls no lower than where it began.
        """
        lowest = min(self.rate, self.expectations.rate)
        self.rate = max(self.rate / self.expectations.multiple, lowest)

    def allowance(self, prompt_bytes: int) -> float:
        """Return how many seconds the first token of an answer may take."""
        known = self.expectations
        expected = prompt_bytes / self.rate
        return min(known.base + expected * known.multiple, known.hard)

    def is_slow(self, tokens: int, seconds: float, beside: int = 1) -> bool:
        """Return whether the worker wrote this far below its own baseline."""
        known = self.expectations
        if tokens < known.least_tokens or not 0.0 < seconds < INFINITE:
            return False
        baseline = self._baselines.get(_level(beside))
        if baseline is None or baseline.speed is None:
            return False
        return tokens / seconds < known.fraction * baseline.speed


class _Baseline:
    """The usual speed of a worker: the median of the first answers, then a follower."""

    __slots__ = ("_answers", "_first", "_half_life", "_learnt_at", "speed")

    def __init__(self, answers: int, half_life: float, now: float) -> None:
        self.speed: float | None = None  # tokens/s; None until there were enough
        self._answers = answers
        self._first: list[float] = []
        self._half_life = half_life
        self._learnt_at = now

    def __repr__(self) -> str:
        return "?" if self.speed is None else f"{self.speed:.1f}"

    def learn(self, speed: float, seconds: float, now: float) -> None:
        # Parallel answers cover the same time, and a night without any covers none.
        covered = now - self._learnt_at
        if seconds < covered:
            covered = seconds
        self._learnt_at = now
        if (usual := self.speed) is not None:
            factor = 2 ** (covered / self._half_life)
            if speed > usual * factor:
                self.speed = usual * factor
            elif speed < usual / factor:
                self.speed = usual / factor
            else:
                self.speed = speed
            return
        self._first.append(speed)
        if len(self._first) >= self._answers:
            # The median; `statistics` would cost every hub 0.4 MiB.
            ordered, half = sorted(self._first), len(self._first) // 2
            self.speed = (ordered[half] + ordered[~half]) / 2


def _level(beside: int) -> int:
    """Put 1, 2-3, 4-7, 8-15… parallel answers on a level each."""
    return (beside or 1).bit_length() - 1
