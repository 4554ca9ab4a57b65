"""Clients that send requests in a loop, and the record of each request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from benchmarks.load import Client, Job, StreamClient, Tally

END_WITHIN = 60.0


class Call(Protocol):
    """One request of a client, as far as many clients at once need it."""

    ended: asyncio.Future[None]

    def give_up(self) -> None: ...


C = TypeVar("C", bound=Call)
# The loop of a client, given its number, the list for its calls, and the event that
# asks it to stop.
Come = Callable[[int, list[C], asyncio.Event], Coroutine[None, None, None]]


@contextlib.asynccontextmanager
async def connected(clients: int, come: Come[C]) -> AsyncIterator[list[C]]:
    """Run clients while the context lasts, and let their last requests end.

    The calls are in the order in which they began; each has ended after the context.
    """
    calls: list[C] = []
    leaving = asyncio.Event()
    here = [
        asyncio.create_task(come(number, calls, leaving), name=f"client {number}")
        for number in range(clients)
    ]
    try:
        yield calls
        leaving.set()
        left, _ = await asyncio.wait(here, timeout=END_WITHIN)
        for each in left:
            each.result()  # raises an unexpected error
    finally:
        for each in here:
            each.cancel()
        await asyncio.gather(*here, return_exceptions=True)
    for call in calls:
        if not call.ended.done():
            call.give_up()


async def connect(client: Client, port: int) -> None:
    """Connect a client, and wait until its answer has ended or failed."""
    loop = asyncio.get_running_loop()
    try:
        await loop.create_connection(lambda: client, "127.0.0.1", port)
    except OSError as exc:
        client.refuse(str(exc))
    await client.ended


# --- Visits -----------------------------------------------------------------------


@dataclass(frozen=True)
class Habit:
    """The pauses of clients: one after every answer, this long on average."""

    pause: float  # seconds
    seed: str  # the same pauses for the same seed

    def rng(self, client: int) -> random.Random:
        return random.Random(f"{self.seed} {client}")

    async def rest(self, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0, 2 * self.pause))


class Visit(StreamClient):
    """One streamed answer; times are monotonic seconds."""

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job, number, tally)
        self.worker = ""  # from the hub's response header
        self.longest = 0.0  # the longest wait for any byte
        self._heard = self.began

    def __repr__(self) -> str:
        return f"<Visit {self.first} {self.worker} {self.flaw!r}>"

    def give_up(self) -> None:
        self._note()
        super().give_up()

    def data_received(self, data: bytes) -> None:
        self._note()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._note()
        super().connection_lost(exc)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-gollama-worker":
            self.worker = value.decode()

    def _note(self) -> None:
        now = time.monotonic()
        if not self.ended.done():
            self.longest = max(self.longest, now - self._heard)
            self._heard = now


def visiting(job: Job, habit: Habit) -> Come[Visit]:
    """Return a loop in which a client repeats the job's request.

    Each is a separate conversation: the hub would send the same one again to the
    worker that had it before, and to no other one.
    """

    async def come(number: int, visits: list[Visit], leaving: asyncio.Event) -> None:
        rng, tally = habit.rng(number), Tally()
        for turn in itertools.count():
            await habit.rest(rng)
            if leaving.is_set():
                return
            question = f"{job.question} ({number}, {turn})"
            visit = Visit(replace(job, question=question), number, tally)
            visits.append(visit)
            await connect(visit, job.port)

    return come
