"""The speed at which a llama-server reads and writes, for a stand-in of that speed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from statistics import median

from benchmarks.chat import Exchange, Timings
from benchmarks.children import BenchmarkError
from benchmarks.clients import connect
from benchmarks.dialogue import words
from benchmarks.engine import Pace
from benchmarks.slotted_worker import render

ROUNDS = 5
LONG_PROMPT = 250  # words
SHORT_PROMPT = 4
ANSWER = 64
BESIDE = 4  # answers at once


@dataclass(frozen=True)
class Measured:
    """The measured speeds, in tokens/s."""

    reads: float
    writes: float  # a single answer
    writes_beside: float  # each of `BESIDE`
    token: float  # characters of a prompt

    def __str__(self) -> str:
        return (
            f"reads {self.reads:,.0f} tokens/s, writes {self.writes:,.0f},"
            f" {BESIDE} answers at once {self.writes_beside:,.0f} each"
        )

    @property
    def pace(self) -> Pace:
        alone, beside = 1 / self.writes, 1 / self.writes_beside
        written = max(0.0, (beside - alone) / (BESIDE - 1))
        return Pace(max(0.0, alone - written), written, 1 / self.reads)


async def calibrate(port: int) -> Measured:
    """Ask an idle server, and return the speeds that its `timings` report.

    Raises:
        BenchmarkError: it did not answer.
    """
    reads, writes, beside, token = [], [], [], []
    for turn in range(ROUNDS):
        timings, characters = await _ask(port, f"read {turn}", LONG_PROMPT, 1)
        reads.append(timings.prompt_n / timings.prompt_ms * 1e3)
        token.append(characters / (timings.prompt_n + timings.cache_n))
        timings, _ = await _ask(port, f"write {turn}", SHORT_PROMPT, ANSWER)
        writes.append(_writing(timings))
        several = (
            _ask(port, f"write {turn} {each}", SHORT_PROMPT, ANSWER)
            for each in range(BESIDE)
        )
        # The last one to end is alone then, hence the median.
        answers = [timings for timings, _ in await asyncio.gather(*several)]
        beside.append(median(map(_writing, answers)))
    # Other load on the machine makes it slower, never faster.
    return Measured(max(reads), max(writes), max(beside), median(token))


async def _ask(port: int, seed: str, count: int, tokens: int) -> tuple[Timings, int]:
    question = words(count, random.Random(seed))
    messages = [{"role": "user", "content": question}]
    exchange = Exchange(port, "none", messages, tokens)
    await connect(exchange, port)
    if exchange.timings is None:
        raise BenchmarkError(f"nothing to calibrate by: {exchange.flaw}")
    return exchange.timings, len(render(messages))


def _writing(timings: Timings) -> float:
    # From the first token to the last.
    return (timings.predicted_n - 1) / timings.predicted_ms * 1e3
