"""How fast a worker reads and writes, as far as it helps to choose between workers.

`slowness` judges a worker against its own past, and errs on the safe side.  Here
workers are compared with each other, so what is wanted is the plain middle, and soon: a
machine that throttles should lose its next requests, not those of ten minutes later.

A rate is that of the last ten answers or so, all their tokens over all their seconds.
A long answer thereby counts for more than a short one, whose time is mostly latency,
and no length has to be named below which nothing is learnt.

*Reading* is told in bytes of a prompt, for that is what is known of a request before it
is sent.  What comes from the prompt cache is not read; a worker that tells how much
that was (llama-server does, in `timings`) is measured without it.

*Writing* depends on the number of answers that share the machine.  What is learnt is
kept for each number (by powers of two).  For one that was not seen yet the nearest one
stands in: on a CPU twice the answers are half as fast, on a large card nearly as fast
as before, and `SHARED` is in the middle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

KEPT = 0.9  # of the past, with each answer
USUAL_TOKENS = 256.0  # of an answer, until one was seen
SHARED = 0.7  # speed of each answer when there are twice as many
LEAST_READS = 200.0  # bytes/s: a large model on a CPU
LEAST_WRITES = 1.0  # tokens/s
LEVELS = 8  # numbers of parallel answers that are told apart: 1, 2-3, 4-7 … 128+


class Prefill(NamedTuple):
    """What a worker tells about how it has read a prompt."""

    tokens: int  # that it has read
    cached: int  # that it had in its cache
    seconds: float = 0.0  # 0 is not known

    @property
    def possible(self) -> bool:
        """Tell whether it can be true at all."""
        return self.tokens >= 0 and self.cached >= 0 and 0 <= self.seconds < math.inf

    def plausible_in(self, seconds: float) -> bool:
        """Tell whether it can be true of an answer that began after so many seconds."""
        return (
            self.tokens > 0 and self.cached >= 0 and 0 < self.seconds <= seconds * 1.1
        )


class Speed:
    """How fast one worker reads and writes one model."""

    __slots__ = ("_reading", "_table", "_writing", "reads", "tokens")

    def __init__(self) -> None:
        self.tokens = USUAL_TOKENS  # of an answer, on average
        self.reads: float | None = None  # bytes of a prompt per second, if known
        self._reading = _Rate()
        self._writing: dict[int, _Rate] = {}
        self._table: tuple[
            float, ...
        ] = ()  # of each level, or empty; read for every choice

    def __repr__(self) -> str:
        reads = "?" if self.reads is None else f"{self.reads:.0f}"
        writes = ", ".join(
            f"{1 << level}+: {rate!r}" for level, rate in sorted(self._writing.items())
        )
        return f"<Speed reads {reads} bytes/s, writes {{{writes}}} tokens/s>"

    # --- What it says -------------------------------------------------------------

    def writes(self, beside: int = 1) -> float | None:
        """Tell the tokens/s of each of `beside` answers; None if it is not known."""
        if not self._table:
            return None
        return self._table[min(beside.bit_length(), LEVELS) - 1]

    def generated(self, prompt_bytes: int, seconds: float, beside: int = 1) -> int:
        """Estimate the tokens of an answer that has taken so many seconds by now.

        A worker of which nothing is known is taken for a slow one.
        """
        reads, writes = self.reads or LEAST_READS, self.writes(beside) or LEAST_WRITES
        return int(max(seconds - prompt_bytes / reads, 0.0) * writes)

    # --- What it hears ------------------------------------------------------------

    def read(
        self, prompt_bytes: int, first_token: float, told: Prefill | None = None
    ) -> None:
        """Take in a prompt, and the seconds until the first token of its answer.

        What the worker tells is ignored if it cannot be true.
        """
        amount, seconds = float(prompt_bytes), first_token
        if told is not None and told.plausible_in(first_token):
            amount *= told.tokens / (told.tokens + told.cached)
            seconds = told.seconds
        if amount > 0 and 0 < seconds < math.inf:
            self._reading.learn(amount, seconds)
            self.reads = self._reading.value

    def wrote(self, tokens: int, seconds: float, beside: int = 1) -> None:
        """Take in an answer: its tokens, and the seconds from the first to the last."""
        if tokens > 0 and 0 < seconds < math.inf:
            level = min(max(beside, 1).bit_length(), LEVELS) - 1
            self._writing.setdefault(level, _Rate()).learn(tokens, seconds)
            if not self._table:
                self.tokens = float(tokens)
            self.tokens += (1 - KEPT) * (tokens - self.tokens)
            self._table = tuple(map(self._at, range(LEVELS)))

    def _at(self, level: int) -> float:
        nearest = min(self._writing, key=lambda known: abs(known - level))
        return self._writing[nearest].value * SHARED ** (level - nearest)


class _Rate:
    """An amount per second; the past fades with each new one."""

    __slots__ = ("_amount", "_seconds", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._amount = self._seconds = 0.0

    def __repr__(self) -> str:
        return f"{self.value:.1f}"

    def learn(self, amount: float, seconds: float) -> None:
        self._amount = self._amount * KEPT + amount
        self._seconds = self._seconds * KEPT + seconds
        self.value = self._amount / self._seconds
