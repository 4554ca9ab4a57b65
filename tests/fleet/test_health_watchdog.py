"""A round looks at every running answer once, and sends the canaries that are due."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from gollama_proxy.config.settings import Breaker as Policy
from gollama_proxy.config.settings import Health, Models, Origin, WorkerConfig
from gollama_proxy.fleet import health
from gollama_proxy.fleet.breaker import Breaker, BreakerState, Verdict
from gollama_proxy.fleet.health import Watchdog
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.pool import Pools
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE

LIMITS = Policy(jitter=0.0)


class Canaries:
    """Generations that end as the test wants, when it wants."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.results: list[asyncio.Future[bool]] = []

    async def __call__(self, worker: Worker, model: str) -> bool:
        self.asked.append((worker.name, model))
        self.results.append(asyncio.get_running_loop().create_future())
        return await self.results[-1]


class Stage:
    def __init__(self, *names: str, models: tuple[str, ...] = ("m", "n")) -> None:
        self.clock = Clock()
        self.prove = Canaries()
        self.workers = [self.worker(name, models) for name in names or ("a",)]
        pools = Pools(Models())
        pools.workers = self.workers
        self.watchdog = Watchdog(pools, self.prove)

    def worker(self, name: str, models: tuple[str, ...]) -> Worker:
        origin = Origin("http", "127.0.0.1", 8080, "")
        config = WorkerConfig("http://127.0.0.1:8080", origin, name)
        made = Worker(config, Health(fall=1), self.clock, policy=LIMITS)
        known = Description(tuple(map(Model, models)))
        made.observe(Check.OK, "ok", known)
        return made

    def half_open(self, breaker: Breaker) -> Breaker:
        """Make the breaker of a worker, or of a model, half-open."""
        for _ in range(LIMITS.consecutive):
            breaker.record(Verdict.FAILURE)
        self.clock.advance(breaker.opens_in())
        assert breaker.state is BreakerState.HALF_OPEN
        return breaker

    async def settle(self, good: bool) -> None:
        """Let the running canaries come to an end."""
        for result in self.prove.results:
            if not result.done():
                result.set_result(good)
        for _ in range(3):
            await asyncio.sleep(0)

    async def round(self) -> int:
        """Count the canaries that a round sends."""
        before = len(self.prove.asked)
        self.watchdog.round()
        for _ in range(3):
            await asyncio.sleep(0)
        return len(self.prove.asked) - before


# --- Canaries ---------------------------------------------------------------------


async def test_a_worker_that_works_gets_no_canary() -> None:
    stage = Stage()
    stage.workers[0].breaker_of("m")
    assert await stage.round() == 0


async def test_a_worker_that_has_to_prove_itself_gets_one_canary_at_a_time() -> None:
    """For its first model: any of them proves the machine."""
    stage = Stage("a", "b")
    breaker = stage.half_open(stage.workers[1].breaker)
    assert [await stage.round() for _ in range(3)] == [1, 0, 0]
    assert stage.prove.asked == [("b", "m")]
    await stage.settle(True)
    assert breaker.state is BreakerState.HALF_OPEN
    assert stage.prove.asked == [("b", "m")] * 2  # the next one goes at once
    assert await stage.round() == 0
    await stage.settle(True)
    assert breaker.closed
    assert await stage.round() == 0


async def test_a_bad_canary_opens_the_breaker_again() -> None:
    stage = Stage()
    breaker = stage.half_open(stage.workers[0].breaker)
    await stage.round()
    await stage.settle(False)
    assert breaker.state is BreakerState.OPEN
    assert await stage.round() == 0


async def test_a_model_that_has_to_prove_itself_is_asked_for_by_its_name() -> None:
    stage = Stage()
    breaker = stage.half_open(stage.workers[0].breaker_of("n"))
    assert await stage.round() == 1
    for _ in range(2):
        await stage.settle(True)
    assert stage.prove.asked == [("a", "n")] * 2
    assert breaker.closed


async def test_while_a_worker_is_out_its_models_prove_nothing() -> None:
    """Or it would get work while its breaker is open, of two kinds when half-open."""
    stage = Stage()
    [worker] = stage.workers
    model = stage.half_open(worker.breaker_of("n"))
    for _ in range(LIMITS.consecutive):
        worker.lease().release(Result.WORKER_FAILED)
    assert worker.breaker.state is BreakerState.OPEN
    assert await stage.round() == 0
    stage.clock.advance(worker.breaker.opens_in())
    assert await stage.round() == 1
    for _ in range(2):
        await stage.settle(True)
    assert worker.breaker.closed
    assert model.state is BreakerState.HALF_OPEN
    assert await stage.round() == 1
    assert stage.prove.asked == [("a", "m"), ("a", "m"), ("a", "n")]
    await stage.settle(True)


async def test_a_worker_that_is_busy_is_not_asked_about_its_models() -> None:
    stage = Stage()
    [worker] = stage.workers
    stage.half_open(worker.breaker_of("n"))
    worker.breaker.busy(3)
    assert await stage.round() == 0
    stage.clock.advance(3)
    assert await stage.round() == 1
    await stage.settle(True)


@pytest.mark.parametrize("check", [Check.FAILED, Check.LOADING])
async def test_a_worker_in_bad_health_gets_no_canary(check: Check) -> None:
    stage = Stage()
    [worker] = stage.workers
    stage.half_open(worker.breaker)
    worker.observe(check, check.value)
    assert await stage.round() == 0
    worker.observe(Check.OK, "ok")
    assert await stage.round() == 1
    await stage.settle(True)


async def test_a_worker_that_listed_no_model_gets_no_canary() -> None:
    stage = Stage(models=())
    stage.half_open(stage.workers[0].breaker)
    assert await stage.round() == 0
    stage.workers[0].description = None
    assert await stage.round() == 0


async def test_where_patterns_are_stated_a_model_that_is_listed_proves_it() -> None:
    """Of those it answers to no name is known; any answer proves the machine."""
    stage = Stage()
    [worker] = stage.workers
    worker.config = replace(worker.config, models=("qwen*",))
    stage.half_open(worker.breaker)
    assert await stage.round() == 1
    assert stage.prove.asked == [("a", "m")]
    await stage.settle(True)


async def test_a_canary_that_is_cancelled_proves_nothing() -> None:
    stage = Stage()
    breaker = stage.half_open(stage.workers[0].breaker)
    await stage.round()
    await stage.watchdog.stop()
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.permit() is not None
    assert repr(stage.watchdog) == "<Watchdog canaries=0>"


# --- The task ---------------------------------------------------------------------


async def test_the_rounds_go_on_after_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.001)
    stage = Stage()
    enough = asyncio.Event()
    rounds: list[None] = []

    def fail_at_first(late: float) -> None:
        rounds.append(None)
        if len(rounds) == 3:
            enough.set()
        if len(rounds) == 1:
            raise RuntimeError("a bug")

    stage.watchdog._then = fail_at_first
    with caplog.at_level(logging.ERROR):
        stage.watchdog.start()
        async with asyncio.timeout(DEADLINE):
            await enough.wait()
        await stage.watchdog.stop()
    assert [record.getMessage() for record in caplog.records] == [
        "watchdog failed; it runs again in 0.001 s"
    ]


async def test_a_watchdog_that_was_not_started_can_be_stopped() -> None:
    await Stage().watchdog.stop()
