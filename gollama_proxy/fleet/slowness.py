"""What is slow, judged against the worker's own past.

A laptop that writes four tokens a second is not slow, it is a laptop; a card that wrote
sixty and now writes four is.  So there is no absolute speed here.  Each worker is
measured against what it did before, in the two stages of an answer:

    request ──────── prefill ────────▶ first token ──── generation ────▶ last token
             as long as its prompt                   as long as its answer

*Prefill* gets an `allowance()`, after which the hub looks elsewhere.  The two ways to
get it wrong are not alike: too long an allowance costs a client some seconds of waiting
for a worker that is stuck; too short a one kills good answers, and those to long
prompts first.  Hence the learnt rate **falls fast and rises slowly**:

* A prompt that is still in the worker's cache is read in no time.  Ten of them in a row
  lift the rate by less than the factor (`multiple`) that the allowance has in hand, and
  the next prompt that is read in earnest brings it down again.
* The time of a short prompt is latency rather than reading.  So it can show that the
  worker is faster than was thought, and never that it is slower.
* The answers that complete are the survivors.  Were the rate too high, long prompts
  would be cut off, never complete and never correct it.  So `missed()` lowers it.

*Generation* has a baseline, and an answer far below it `is_slow()`.  It is not cut off;
the breaker counts it, and acts when nearly all are.  Were the baseline an average of
the last answers, a card that throttles would be its own new normal after a dozen of
them, just in time to pass.  Hence the baseline is **limited by
time**: it moves towards each answer, but by no more than a factor of two in
`half_life` seconds, up or down, however many answers there are.  Such a follower ends
near the median, and bursts that were buffered somewhere and came at once do not move
it.  A minute of throttling lowers it by 7 %.  What lasts for longer than that, such as
another model, is the new normal some minutes later, as it should be.

Parallel answers share the machine, so each number of them (by powers of two) has a
baseline of its own: a busy worker is compared with its busy past.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from gollama_proxy.fleet.speed import Prefill, Speed


@dataclass(frozen=True, slots=True)
class Expectations:
    """How much patience a worker gets, and how quickly its past fades."""

    # --- Prefill ---
    base: float = 10.0  # seconds that every prompt gets
    multiple: float = 3.0  # times the expected prefill on top
    hard: float = 300.0  # seconds; no allowance is longer
    rate: float = 200.0  # bytes/s until something is learnt: a large model on a CPU
    rate_rise: float = 1.1  # a faster prompt lifts the rate by at most this factor
    rate_fall: float = 0.5  # a slower one lowers it by at most this factor
    least_bytes: int = 1024  # of a prompt that is worth measuring

    # --- Generation ---
    fraction: float = 0.25  # of the baseline, below which an answer is slow
    answers: int = 5  # to learn before any is called slow
    half_life: float = 600.0  # seconds in which the baseline halves or doubles at most
    least_tokens: int = 8  # of an answer that is worth measuring


class Pace:
    """How fast one worker reads and writes, learnt from its answers.

    `beside` arguments are the number of answers that the worker gave at the time, the
    one in question included.
    """

    __slots__ = ("_baselines", "_clock", "expectations", "rate", "speed")

    def __init__(
        self,
        clock: Callable[[], float],
        expectations: Expectations = Expectations(),
    ) -> None:
        self.expectations = expectations
        self.rate = expectations.rate  # prefill, in bytes of the prompt per second
        self.speed = Speed()  # for who has to choose between workers
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
        told: Prefill | None = None,
    ) -> None:
        """Take in a completed answer.

        `first_token` is the time from the request to the first token, `seconds` that
        from the first token to the last.  What measures nothing is ignored.
        """
        known = self.expectations
        self.speed.read(prompt_bytes, first_token, told)
        if prompt_bytes > 0 and 0 < first_token < math.inf:
            rate = prompt_bytes / first_token
            if prompt_bytes >= known.least_bytes or rate > self.rate:
                slowest = self.rate * known.rate_fall
                self.rate = _clamp(rate, slowest, self.rate * known.rate_rise)
        if self._measures(tokens, seconds):
            self.speed.wrote(tokens, seconds, beside)
            baseline = self._baselines.get(_level(beside))
            if baseline is None:
                baseline = _Baseline(known.answers, known.half_life, self._clock())
                self._baselines[_level(beside)] = baseline
            baseline.learn(tokens / seconds, seconds, self._clock())

    def missed(self) -> None:
        """Take in a prompt whose first token did not come within its allowance.

        Either the rate is `multiple` times too high, or the worker is stuck.  The
        breaker will find out; until then the rate goes no lower than where it began.
        """
        lowest = min(self.rate, self.expectations.rate)
        self.rate = max(self.rate / self.expectations.multiple, lowest)

    def allowance(self, prompt_bytes: int) -> float:
        """Tell how many seconds the first token of an answer may take."""
        known = self.expectations
        expected = prompt_bytes / self.rate
        return min(known.base + expected * known.multiple, known.hard)

    def is_slow(self, tokens: int, seconds: float, beside: int = 1) -> bool:
        """Tell whether the worker wrote this far below its own baseline."""
        baseline = self._baselines.get(_level(beside))
        if baseline is None or baseline.speed is None:
            return False
        if not self._measures(tokens, seconds):
            return False
        return tokens / seconds < self.expectations.fraction * baseline.speed

    def _measures(self, tokens: int, seconds: float) -> bool:
        return tokens >= self.expectations.least_tokens and 0 < seconds < math.inf


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
        # Parallel answers tell of the same time, and a night without any tells nothing.
        told = min(now - self._learnt_at, seconds)
        self._learnt_at = now
        if self.speed is not None:
            factor = 2 ** (told / self._half_life)
            self.speed = _clamp(speed, self.speed / factor, self.speed * factor)
            return
        self._first.append(speed)
        if len(self._first) >= self._answers:
            self.speed = statistics.median(self._first)


def _level(beside: int) -> int:
    """Put 1, 2-3, 4-7, 8-15… parallel answers on a level each."""
    return max(beside, 1).bit_length() - 1


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))
