"""Clients that come again and again, and what each of their visits was like."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.load import Job, StreamClient, Tally

END_WITHIN = 60.0


@dataclass(frozen=True)
class Habit:
    """How clients come: each pauses after every answer, this long on average."""

    pause: float
    seed: str  # the same pauses for the same seed


class Visit(StreamClient):
    """One streamed answer; times are monotonic seconds."""

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job, number, tally)
        self.worker = ""  # that answered, as the hub tells
        self.first: float | None = None  # the wait for the first event of an answer
        self.longest = 0.0  # the longest wait for anything, in its middle too
        self.began = self._heard = time.monotonic()

    def __repr__(self) -> str:
        return f"<Visit {self.first} {self.worker} {self.flaw!r}>"

    def refuse(self, why: str) -> None:
        """End what never came to be connected."""
        self.flaw = why
        self.ended.set_result(None)

    def give_up(self) -> None:
        self._hear()
        self._end("no end in sight")

    def data_received(self, data: bytes) -> None:
        self._hear()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hear()
        super().connection_lost(exc)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-gollama-worker":
            self.worker = value.decode()

    def on_body(self, body: bytes) -> None:
        if self.first is None and self._parser.get_status_code() == 200:
            self.first = self._heard - self.began
        super().on_body(body)

    def _hear(self) -> None:
        now = time.monotonic()
        if not self.ended.done():
            self.longest = max(self.longest, now - self._heard)
            self._heard = now


@contextlib.asynccontextmanager
async def crowd(job: Job, habit: Habit) -> AsyncIterator[list[Visit]]:
    """Have the job's clients come while the context lasts, and see the last ones off.

    The visits are in the order in which they began; each has ended after the context.
    """
    visits: list[Visit] = []
    leaving = asyncio.Event()
    come = [
        asyncio.create_task(
            _come(job, habit, number, visits, leaving), name=f"client {number}"
        )
        for number in range(job.clients)
    ]
    try:
        yield visits
        leaving.set()
        left, _ = await asyncio.wait(come, timeout=END_WITHIN)
        for each in left:
            each.result()  # raises what should never happen
    finally:
        for each in come:
            each.cancel()
        await asyncio.gather(*come, return_exceptions=True)
    for visit in visits:
        if not visit.ended.done():
            visit.give_up()


async def _come(
    job: Job, habit: Habit, number: int, visits: list[Visit], leaving: asyncio.Event
) -> None:
    loop, tally = asyncio.get_running_loop(), Tally()
    rng = random.Random(f"{habit.seed} {number}")
    while True:
        await asyncio.sleep(rng.uniform(0, 2 * habit.pause))
        if leaving.is_set():
            return
        visit = Visit(job, number, tally)
        visits.append(visit)
        try:
            await loop.create_connection(lambda v=visit: v, "127.0.0.1", job.port)
        except OSError as exc:
            visit.refuse(str(exc))
        await visit.ended
