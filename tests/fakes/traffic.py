"""Clients with random tasks, which know and check the right answers.

    visitor = Visitor(port, token, faults, rng)
    verdict = await visitor.visit(task, leave)

A task ends in one verdict, or in a `DishonestError`; see `verdict.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

from tests.fakes.client import Ending, Response, TruncatedError, Wire
from tests.fakes.faults import Faults
from tests.fakes.generation import Task
from tests.fakes.verdict import Verdict, judge, judge_beginning

Leave = str | int | None


# --- Tasks ------------------------------------------------------------------------


def random_task(rng: random.Random, key: int) -> Task:
    """Invent a task: mostly short ones, some that fill buffers and replay windows."""
    words = rng.choice([1, 2, rng.randint(3, 30), rng.randint(3, 30), 80])
    limits = [None, None, rng.randint(1, words + 3)]
    stream = rng.random() < 0.7
    return Task(
        key=key,
        words=words,
        limit=rng.choice(limits),
        chat=rng.random() < 0.6,
        stream=stream,
        usage=stream and rng.random() < 0.5,
        padding=rng.choice([0, 0, 100, 3_000, 60_000]),
    )


def random_leave(rng: random.Random, task: Task) -> Leave:
    """Decide when a client leaves: see `Visitor.visit`; most do not."""
    if rng.random() < 0.8:
        return None
    moments: list[Leave] = ["at once", "taken"]
    if task.stream:
        moments.append(rng.randint(1, 20))
    return rng.choice(moments)


class Visitor:
    """A client that has one task after the other, on kept connections or new ones."""

    def __init__(
        self, port: int, token: str, faults: Faults, rng: random.Random
    ) -> None:
        self._port = port
        self._token = token
        self._faults = faults
        self._rng = rng
        self._wire: Wire | None = None

    def __repr__(self) -> str:
        return f"<Visitor of port {self._port} {self._wire!r}>"

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    async def visit(self, task: Task, leave: Leave = None) -> Verdict:
        """Have one task done.

        `leave` is when to close without waiting for the end: "at once", when a worker
        has "taken" it, or after so many events.

        Raises:
            DishonestError: the answer is not what it claims to be.
        """
        ending = await self._ask(task, leave)
        return Verdict.LEFT if ending is None else judge(task, ending)

    async def request(
        self, path: str, payload: Any = None, token: str | None = None
    ) -> Response:
        """Make a request that is no task: a POST where there is a payload."""
        wire = await self._connected()
        if payload is None:
            await wire.get(path, token or self._token)
        else:
            await wire.post(path, payload, token or self._token)
        response = await wire.read_response()
        self._keep_or_close(response, clean=True)
        return response

    async def _ask(self, task: Task, leave: Leave) -> Ending | None:
        wire, taken = await self._connected(), self._faults.taken(task.key)
        ids = [("X-Request-Id", f"task-{task.key}")]
        # A hub that refuses a body may close before the rest of it.
        with contextlib.suppress(ConnectionError):
            await wire.post(task.path, task.payload, self._token, headers=ids)
        if leave == "at once":
            self._go()
            return None
        if isinstance(leave, int):
            return await self._read_events(wire, task, leave)
        if leave == "taken" and not await _answered_before(taken, wire):
            self._go()
            return None
        ending = await wire.read_to_end()
        self._keep_or_close(ending.response, clean=ending.clean)
        return ending

    async def _read_events(self, wire: Wire, task: Task, number: int) -> Ending | None:
        """Read so many events and go; None if that was before the end."""
        events: list[bytes] = []
        with contextlib.suppress(TruncatedError):
            head = await wire.read_head()
            while head.status == 200 and len(events) < number:
                event = await wire.read_event()
                if event is None:
                    break
                events.append(event)
            else:
                if head.status == 200:
                    judge_beginning(task, b"".join(events))
                    self._go()
                    return None
        ending = await wire.read_to_end()
        self._keep_or_close(ending.response, clean=ending.clean)
        body = b"".join(events) + ending.response.body
        return ending._replace(response=ending.response._replace(body=body))

    async def _connected(self) -> Wire:
        if self._wire is None:
            self._wire = await Wire.connect("127.0.0.1", self._port)
        return self._wire

    def _go(self) -> None:
        if self._wire is not None and self._rng.random() < 0.5:
            self._wire.abort()
        self.close()

    def _keep_or_close(self, response: Response, *, clean: bool) -> None:
        announced = "close" in (response.header("connection") or "").lower()
        if not clean or announced or self._rng.random() < 0.5:
            self.close()


async def _answered_before(event: asyncio.Event, wire: Wire) -> bool:
    """Wait for the head of an answer or the event; return if only the head came."""
    head = asyncio.create_task(wire.read_head(), name="visitor reads")
    waiting = asyncio.create_task(event.wait(), name="visitor waits")
    done, _ = await asyncio.wait({head, waiting}, return_when="FIRST_COMPLETED")
    head.cancel()
    waiting.cancel()
    # An answer without a head is judged by `read_to_end`.
    await asyncio.gather(head, waiting, return_exceptions=True)
    return waiting not in done
