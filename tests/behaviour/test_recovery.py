"""Workers that were out return soon, and their share of requests rises gradually."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from gollama_proxy.fleet.breaker import BreakerState
from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker


async def test_requests_fail_at_once_while_all_workers_are_down() -> None:
    """Within one recheck."""
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        running_hub(
            one, two, health__interval=0.05, health__recheck=0.05, health__fall=1
        ) as hub,
    ):
        await one.down()
        await two.down()
        async with asyncio.timeout(DEADLINE):
            while hub.hub.registry.ready:
                await asyncio.sleep(0.01)
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 503
        assert int(response.header("retry-after") or "") >= 1
        await two.up()
        async with asyncio.timeout(DEADLINE):
            await two.pinged()
            while (response := await hub.post(CHAT, WHOLE)).status != 200:
                await asyncio.sleep(0.01)
        assert response.header("x-gollama-worker") == two.name


@pytest.mark.parametrize(("seconds", "least", "most"), [(0, 5, 12), (5, 25, 45)])
async def test_the_share_of_a_worker_that_returns_rises_with_time(
    seconds: float, least: int, most: int
) -> None:
    """A tenth of its turns at first, all of them at the end: 50 of 100."""
    clock = Clock()
    async with (
        ScriptedWorker() as returned,
        ScriptedWorker() as other,
        running_hub(
            returned,
            other,
            health__interval=3600,
            breaker__ramp=10,
            routing__policy="round_robin",  # shares are counted
        ) as hub,
    ):
        breaker = hub.hub.registry.workers[0].breaker
        breaker._clock = clock
        breaker._state = BreakerState.HALF_OPEN
        for _ in range(2):
            permit = breaker.permit()
            assert permit is not None
            permit.settle(True)
        assert breaker.closed
        served: Counter[str | None] = Counter()
        clock.advance(seconds)
        for _ in range(100):
            response = await hub.post(CHAT, WHOLE)
            served[response.header("x-gollama-worker")] += 1
        assert least <= served[returned.name] <= most
        clock.advance(10)
        served.clear()
        for _ in range(20):
            response = await hub.post(CHAT, WHOLE)
            served[response.header("x-gollama-worker")] += 1
        assert served == {returned.name: 10, other.name: 10}
