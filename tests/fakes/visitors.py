"""Many clients at once: their tasks and errands, and how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.fakes.asks import CHAT
from tests.fakes.client import TruncatedError
from tests.fakes.faults import Faults
from tests.fakes.hub import mint
from tests.fakes.traffic import Visitor, random_leave, random_task
from tests.fakes.verdict import DishonestError, Verdict


class Errand(NamedTuple):
    """A request that is no task."""

    path: str
    payload: Any = None  # None is a GET
    token: str | None = None  # None is a good one
    status: int | None = None  # that it should get; None is any


ERRANDS = (
    Errand("/v1/models", status=200),
    Errand("/livez", status=200),
    Errand("/metrics", status=200),
    Errand("/v1/nothing", status=404),
    Errand(CHAT, status=405),
    Errand(CHAT, {"messages": []}, "no.good.token", 401),
    Errand(CHAT, b'{"messages": [', status=400),
    Errand("/v1/embeddings", {"input": "hello"}),
)
_SHARE = 0.1  # of the requests are errands
_PATIENCE = 0.05  # seconds before a client that was refused comes again


class Visitors:
    """Sends requests to a hub; what they are is a function of the seed."""

    def __init__(self, port: int, faults: Faults, *, seed: int, visitors: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.flaws: list[str] = []
        self.ended = 0
        self._port = port
        self._faults = faults
        self._seed = seed
        self._visitors = visitors
        self._token = mint(sub="alice", exp=int(time.time()) + 86_400, scope="metrics")

    def __repr__(self) -> str:
        return f"<Visitors {self.ended} requests ended, {len(self.flaws)} flaws>"

    async def send(self, number: int, after_each: Callable[[], object] = bool) -> None:
        """Make so many requests, and wait for their ends."""
        keys = iter(range(self.ended, self.ended + number))
        async with asyncio.TaskGroup() as group:
            for name in range(self._visitors):
                group.create_task(self._go(keys, f"visitor {name}", after_each))

    async def _go(
        self, keys: Iterator[int], name: str, after_each: Callable[[], object]
    ) -> None:
        rng = random.Random(f"{self._seed} {name}")
        visitor = Visitor(self._port, self._token, self._faults, rng)
        with contextlib.closing(visitor):
            for key in keys:
                try:
                    self.outcomes[await self._one(visitor, key)] += 1
                except (DishonestError, TruncatedError, AssertionError) as exc:
                    self.outcomes["flawed"] += 1
                    self.flaws.append(f"request {key}: {exc}")
                    visitor.close()
                self.ended += 1
                after_each()

    async def _one(self, visitor: Visitor, key: int) -> str:
        rng = random.Random(f"{self._seed} {key}")
        if rng.random() < _SHARE:
            errand = rng.choice(ERRANDS)
            response = await visitor.request(*errand[:3])
            assert errand.status in (None, response.status), (errand, response)
            return f"errand, {response.status}"
        task = random_task(rng, key)
        verdict = await visitor.visit(task, random_leave(rng, task))
        if verdict is Verdict.REFUSED:
            await asyncio.sleep(_PATIENCE)
        return verdict.value
