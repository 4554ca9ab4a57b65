"""Every worker is asked how it is, as often as its state wants, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Health
from gollama_proxy.fleet.health import HealthChecker, LoadingFeeds, next_wait
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import SUSPICIOUS, Worker
from gollama_proxy.upstream.probe import FetchError, Finding
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE, until

GOOD = Finding(Check.OK, "ok", Description((Model("tiny"),)))
LOADING = Finding(Check.LOADING, "loading model")
BAD = Finding(Check.FAILED, "refused")
NEVER = 3600.0


def workers(number: int = 1, health: Health | None = None) -> list[Worker]:
    urls = [f"http://127.0.0.1:{port}" for port in range(1, number + 1)]
    found = Registry(config.load(None, {}, {}, urls), Clock()).workers
    for worker in found:
        worker.health = health or Health()
    return found


class Pings:
    """Answers pings with the findings of the test, which can wait for them."""

    def __init__(self, *findings: Finding | Exception) -> None:
        self.findings = list(findings)
        self.asked: list[str] = []
        self._changed = asyncio.Event()

    async def __call__(self, worker: Worker) -> Finding:
        self.asked.append(worker.name)
        self._changed.set()
        finding = self.findings.pop(0) if len(self.findings) > 1 else self.findings[0]
        if isinstance(finding, Exception):
            raise finding
        return finding

    async def reached(self, number: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while len(self.asked) < number:
                self._changed.clear()
                await self._changed.wait()
            await asyncio.sleep(0)  # the answer has been noted, too


@asynccontextmanager
async def pinging(
    watched: list[Worker], health: Health, ping: Callable[[Worker], object]
) -> AsyncIterator[HealthChecker]:
    checker = HealthChecker(health, ping)  # type: ignore[arg-type]
    for worker in watched:
        checker.added(worker)
    checker.start()
    try:
        yield checker
    finally:
        await checker.stop()


# --- How long to wait -------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "last", "expected"),
    [
        ([GOOD], 0.0, 30.0),
        ([GOOD, GOOD], 30.0, 30.0),
        ([GOOD, BAD], 30.0, 1.0),  # in doubt
        ([LOADING], 1.0, 1.0),
        ([GOOD, LOADING], 30.0, 1.0),
        ([], 0.0, 1.0),  # not reached yet
        ([BAD], 0.0, 1.0),
        ([BAD], 1.0, 1.5),
        ([BAD], 1.5, 2.25),
        ([BAD], 24.0, 30.0),
        ([BAD], 30.0, 30.0),
    ],
)
def test_the_next_ping(findings: list[Finding], last: float, expected: float) -> None:
    """Seldom where all is well or hope is thin, often where things may change."""
    health = Health(interval=30, recheck=1)
    [worker] = workers(health=health)
    for finding in findings:
        worker.observe(finding.check, finding.reason)
    assert next_wait(worker, health, last) == expected


@pytest.mark.parametrize("findings", [[], [BAD], [LOADING], [GOOD, BAD]])
def test_no_wait_is_longer_than_the_interval(findings: list[Finding]) -> None:
    health = Health(interval=0.1, recheck=1)
    [worker] = workers(health=health)
    for finding in findings:
        worker.observe(finding.check, finding.reason)
    assert next_wait(worker, health, 5.0) == 0.1


async def test_a_worker_that_is_down_is_asked_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And begins anew when it falls again."""
    waits: list[float] = []
    timeout = asyncio.timeout

    def note(delay: float) -> asyncio.Timeout:
        waits.append(delay)
        return timeout(0)

    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    [worker] = workers()
    pings = Pings(BAD, BAD, BAD, GOOD, LOADING, BAD, BAD, BAD, GOOD)
    with monkeypatch.context() as patched:
        patched.setattr("gollama_proxy.tasks.asyncio.timeout", note)
        checker = HealthChecker(Health(interval=30, recheck=1), pings)
        checker.added(worker)
        checker.start()
        async with timeout(DEADLINE):
            while len(waits) < 10:
                await asyncio.sleep(0)
    await checker.stop()
    assert waits[:10] == [0, 1, 1.5, 2.25, 30, 1, 1, 1.5, 2.25, 30]


async def test_pings_of_several_hubs_do_not_stay_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wait varies by a tenth, up or down."""
    asked: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        asked.append((low, high))
        return 1e-9  # by that lot the interval is next to nothing

    monkeypatch.setattr(random, "uniform", draw)
    pings = Pings(GOOD)
    async with pinging(workers(), Health(interval=NEVER), pings):
        await pings.reached(3)
    assert set(asked) == {(0.9, 1.1)}


# --- The loop ---------------------------------------------------------------------


async def test_every_worker_is_asked_at_once_and_on_its_own() -> None:
    """One that hangs does not keep the others waiting."""
    found = workers(3)
    hang = asyncio.Event()
    reported = Pings(GOOD)

    async def ping(worker: Worker) -> Finding:
        if worker is found[0]:
            await hang.wait()
        return await reported(worker)

    async with pinging(found, Health(interval=NEVER), ping) as checker:
        assert repr(checker) == "<HealthChecker running=3 of 3>"
        first = asyncio.create_task(checker.first_round())
        await reported.reached(2)
        assert [worker.state for worker in found] == [
            WorkerState.STARTING,
            WorkerState.READY,
            WorkerState.READY,
        ]
        assert not first.done()
        hang.set()
        await reported.reached(3)
        async with asyncio.timeout(DEADLINE):
            await first
        assert found[0].state is WorkerState.READY
    assert repr(checker) == "<HealthChecker running=0 of 3>"


async def test_what_was_learnt_goes_to_the_workers_record() -> None:
    [worker] = workers()
    async with pinging([worker], Health(interval=NEVER), Pings(GOOD)) as checker:
        await checker.first_round()
    assert worker.serves("tiny")
    assert worker.reason == "ok"


async def test_a_worker_is_asked_again_after_the_interval() -> None:
    [worker] = workers()
    pings = Pings(GOOD, GOOD, BAD, BAD, BAD, GOOD)
    health = Health(interval=0.01, recheck=0.005, fall=3)
    worker.health = health
    async with pinging([worker], health, pings):
        await pings.reached(4)
        assert worker.state is WorkerState.READY
        await pings.reached(5)
        assert worker.state is WorkerState.DOWN
        await pings.reached(6)
        assert worker.state is WorkerState.READY


@pytest.mark.parametrize("outcome", sorted(SUSPICIOUS, key=str))
async def test_a_suspicion_has_its_worker_asked_at_once(outcome: Result) -> None:
    """It is found without waiting for the interval."""
    found = workers(2)
    pings = Pings(GOOD)
    async with pinging(found, Health(interval=NEVER), pings):
        await pings.reached(2)
        found[1].lease().release(outcome)
        await pings.reached(3)
    assert pings.asked[2:] == [found[1].name]


@pytest.mark.parametrize("outcome", [o for o in Result if o not in SUSPICIOUS])
async def test_no_other_outcome_has_a_worker_asked(outcome: Result) -> None:
    [worker] = workers()
    pings = Pings(GOOD)
    async with pinging([worker], Health(interval=NEVER), pings):
        await pings.reached(1)
        worker.lease().release(outcome)
        for _ in range(20):
            await asyncio.sleep(0)
    assert len(pings.asked) == 1


async def test_a_failure_during_a_ping_has_the_worker_asked_once_more() -> None:
    """What was asked before cannot know of it; two failures are one question."""
    [worker] = workers()
    gate = asyncio.Event()
    reported = Pings(GOOD)

    async def ping(worker: Worker) -> Finding:
        finding = await reported(worker)
        await gate.wait()
        return finding

    async with pinging([worker], Health(interval=NEVER), ping):
        await reported.reached(1)
        for _ in range(2):
            worker.lease().release(Result.WORKER_FAILED)
        gate.set()
        await reported.reached(2)
        for _ in range(20):
            await asyncio.sleep(0)
    assert len(reported.asked) == 2


async def test_a_ping_that_raises_is_logged_and_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A health check that died silently is worse than none."""
    [worker] = workers()
    pings = Pings(GOOD, RuntimeError("a bug"), RuntimeError("a bug"), BAD, GOOD)
    health = Health(interval=0.005, recheck=0.005, fall=1)
    worker.health = health
    async with pinging([worker], health, pings) as checker:
        await pings.reached(3)
        assert worker.state is WorkerState.READY
        assert repr(checker) == "<HealthChecker running=1 of 1>"
        await pings.reached(5)
        assert worker.state is WorkerState.READY
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [r.getMessage() for r in errors] == [
        f"health check of worker {worker.name} failed; it runs again in 0.005 s"
    ] * 2
    assert errors[0].exc_info is not None
    assert str(errors[0].exc_info[1]) == "a bug"


async def test_stopping_ends_pings_that_are_under_way() -> None:
    ended = []
    begun = asyncio.Semaphore(0)

    async def hang(worker: Worker) -> Finding:
        begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(worker.name)
        raise AssertionError

    found = workers(2)
    checker = HealthChecker(Health(), hang)
    for worker in found:
        checker.added(worker)
    checker.start()
    async with asyncio.timeout(DEADLINE):
        await begun.acquire()
        await begun.acquire()
    await checker.stop()
    assert sorted(ended) == [worker.name for worker in found]
    await checker.stop()  # twice is once


async def test_a_hub_without_workers_checks_nothing() -> None:
    checker = HealthChecker(Health(), Pings(GOOD))
    checker.start()
    await checker.first_round()
    await checker.stop()


async def test_an_oddity_of_a_worker_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = GOOD._replace(note="/v1/models is odd")
    again = odd._replace(note="/v1/models is odd in another way")
    pings = Pings(odd, again, GOOD, odd, GOOD)
    watched = workers(2)
    health = Health(interval=0.01, recheck=0.01)
    async with pinging(watched, health, pings):
        await pings.reached(12)
    warnings = [record for record in caplog.records if "odd" in record.message]
    assert {record.levelname for record in warnings} == {"WARNING"}
    names = [record.message.partition(": ")[0] for record in warnings]
    assert len(names) == len(set(names)), names
    assert f"worker {watched[0].name}: /v1/models is odd" in caplog.text


@pytest.mark.parametrize("last", [GOOD, BAD])
async def test_workers_are_known_when_each_has_loaded_or_is_down(last: Finding) -> None:
    pings = Pings(LOADING, LOADING, last)
    [worker] = workers()
    health = Health(interval=0.01, recheck=0.01)
    async with pinging([worker], health, pings) as checker:
        known = asyncio.ensure_future(checker.described())
        await pings.reached(2)
        assert not known.done()
        async with asyncio.timeout(DEADLINE):
            await known
    assert (worker.description is not None) is (last is GOOD)


async def test_a_look_waits_for_a_ping_that_begins_now() -> None:
    """One that is under way may have begun too early to see what is the matter."""
    [worker] = workers()
    begun, go = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def ping(asked: Worker) -> Finding:
        begun.release()
        await go.acquire()
        return GOOD

    async with asyncio.timeout(DEADLINE), pinging([worker], Health(), ping) as checker:
        await begun.acquire()
        look = asyncio.create_task(checker.look(worker))
        go.release()
        await begun.acquire()
        assert not look.done()
        go.release()
        assert await look


@pytest.mark.parametrize(
    ("found", "well"),
    [(GOOD, True), (BAD, False), (LOADING, False), (RuntimeError("no"), False)],
)
async def test_a_ping_shows_whether_the_worker_is_well(
    found: Finding | Exception, well: bool
) -> None:
    [worker] = workers()
    pings = Pings(GOOD, found, GOOD)
    health = Health(recheck=0.01)
    async with asyncio.timeout(DEADLINE), pinging([worker], health, pings) as checker:
        await pings.reached(1)
        leaves = asyncio.create_task(checker.look(worker))
        looks = [checker.look(worker) for _ in range(2)]
        waiting = asyncio.gather(*looks)
        await asyncio.sleep(0)
        leaves.cancel()
        assert await waiting == [well, well]


# --- Workers that come and go -----------------------------------------------------


async def test_an_added_worker_is_checked_and_a_removed_one_is_not() -> None:
    first, second = workers(2)
    pings = Pings(GOOD)
    async with pinging([first], Health(interval=NEVER), pings) as checker:
        await pings.reached(1)
        checker.added(second)
        checker.added(second)  # it was removed, and is back before it was gone
        await pings.reached(2)
        assert repr(checker) == "<HealthChecker running=2 of 2>"
        checker.gone(first)
        first.suspect()
        assert not await checker.look(first)
        second.suspect()
        await pings.reached(3)
        assert repr(checker) == "<HealthChecker running=1 of 1>"
    assert pings.asked == [first.name, second.name, second.name]


async def test_a_worker_that_was_removed_keeps_nothing_waiting() -> None:
    [worker] = workers()
    begun = asyncio.Event()

    async def hang(worker: Worker) -> Finding:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with asyncio.timeout(DEADLINE), pinging([worker], Health(), hang) as checker:
        await begun.wait()
        waits = [
            asyncio.ensure_future(each)
            for each in (checker.first_round(), checker.described())
        ]
        look = asyncio.ensure_future(checker.look(worker))
        await asyncio.sleep(0)
        checker.gone(worker)
        await asyncio.gather(*waits)
        assert not await look


async def test_other_settings_have_a_worker_checked() -> None:
    [worker] = workers()
    pings = Pings(GOOD)
    async with pinging([worker], Health(interval=NEVER), pings) as checker:
        await pings.reached(1)
        checker.replaced(worker, worker.config)
        await pings.reached(2)


# --- The progress of loading ------------------------------------------------------

ROUTER = Description((Model("a", loaded=False, loading=True),), build="b1-ab")


def loading_worker(description: Description = ROUTER) -> Worker:
    [worker] = workers()
    worker.observe(Check.OK, "ok", description)
    assert worker.loading == {"a"}
    return worker


async def test_a_feed_that_breaks_off_is_opened_again() -> None:
    opened = []

    async def follow(worker: Worker, note: object) -> bool:
        opened.append(worker)
        raise FetchError("its answer broke off")

    worker, feeds = loading_worker(), LoadingFeeds(follow)
    feeds.added(worker)
    feeds.added(worker)
    for count in 1, 2:
        feeds.check()
        await until(lambda: "open=0" in repr(feeds), "no feed")
        assert len(opened) == count
    feeds.gone(worker)


async def test_only_a_llama_server_has_a_feed() -> None:
    async def follow(worker: Worker, note: object) -> bool:
        raise AssertionError

    worker = loading_worker(replace(ROUTER, build=""))
    feeds = LoadingFeeds(follow)
    feeds.added(worker)
    feeds.check()
    assert repr(feeds) == "<LoadingFeeds open=0>"


@pytest.mark.parametrize("how", ["gone", "loaded", "stop"])
async def test_a_feed_ends_with_its_reason(how: str) -> None:
    async def follow(worker: Worker, note: Callable[[str, float | None], None]) -> bool:
        note("a", 0.5)
        await asyncio.Event().wait()
        return True

    worker, feeds = loading_worker(), LoadingFeeds(follow)
    feeds.added(worker)
    feeds.check()
    await until(lambda: worker.progress == {"a": 0.5}, "some progress")
    if how == "gone":
        feeds.gone(worker)
    elif how == "loaded":
        worker.observe(Check.OK, "ok", Description((Model("a", loaded=True),)))
        feeds.check()
    else:
        await feeds.stop()
    await until(lambda: "open=0" in repr(feeds), "no feed")
    assert not worker.progress
