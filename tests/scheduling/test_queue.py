"""Requests wait for a slot or for a worker, on one future, and lose nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.config.settings import Config, Origin, Retry, WorkerConfig
from gollama_proxy.config.settings import Queue as Settings
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.state import Hold
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling.admission import MOST_PATIENCE, Place
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask, Fits
from gollama_proxy.scheduling.queue import EVERY, Queue, Waking
from gollama_proxy.scheduling.turns import Priority, Subject, Ticket
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code, NoWorkerError
from tests.fakes.clock import Clock
from tests.fakes.pool import InOrder
from tests.fakes.registry import balancer, plan, take_out, trip
from tests.fakes.timers import Timers
from tests.fleet.test_wake import Fleet

SCHEDULING = {"admission", "balancer", "queue", "turns"}


@dataclass(eq=False)
class Request:
    """A request as the queue sees it."""

    plan: Plan
    subject: str = "ann"
    priority: Priority = Priority.INTERACTIVE
    max_concurrency: int = 0
    needs_slot: bool = True
    ticket: Ticket | None = None
    holder: Subject | None = None
    waited: float = 0.0


class Hub:
    """A queue in front of workers without servers, with a clock and timers."""

    def __init__(
        self,
        *workers: str | None,
        slots: int | None = 1,
        size: int = 256,
        timeout: float = 60.0,
        notice: float = 2.0,
        **more: Any,
    ) -> None:
        self.clock = Clock()
        self.timers = Timers(self.clock)
        workers = workers or ("m",)
        self.balancer = balancer(*workers, clock=self.clock, slots=slots, **more)
        self.workers = self.balancer.registry.workers
        settings = Settings(size=size, timeout=timeout, notice=notice)
        self.queue = Queue(self.balancer, settings, self.clock, self.timers)

    def request(self, subject: str = "ann", model: str = "m", **fields: Any) -> Request:
        pool = self.balancer.registry.pool(model)
        return Request(plan(self.balancer, pool), subject, **fields)

    def lease(self, subject: str = "ann", **fields: Any) -> Lease:
        """Have a request admitted at once."""
        lease = self.queue.try_acquire(self.request(subject, **fields))
        assert lease is not None
        return lease

    def acquire(self, request: Request, *arguments: Any) -> asyncio.Task[Lease]:
        coroutine = self.queue.acquire(request, *arguments)
        return asyncio.create_task(coroutine, name=f"request of {request.subject}")

    @asynccontextmanager
    async def waiting(
        self, request: Request, *arguments: Any
    ) -> AsyncIterator[asyncio.Task[Lease]]:
        """Have a request wait; it is done or cancelled at the end of the block."""
        task = self.acquire(request, *arguments)
        await turn()
        assert not task.done()
        yield task
        task.cancel()
        await asyncio.wait([task])


async def turn() -> None:
    """Let every task run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def refused(task: asyncio.Task[Lease], code: Code) -> NoWorkerError:
    with pytest.raises(NoWorkerError) as caught:
        await task
    assert caught.value.code is code
    return caught.value


# --- At once ----------------------------------------------------------------------


def test_where_a_slot_is_free_a_request_has_it_at_once() -> None:
    hub = Hub("m", "m")
    first, second, third = (hub.request(subject) for subject in "abc")
    leases = [hub.queue.try_acquire(each) for each in (first, second, third)]
    assert [lease and lease.worker.name for lease in leases] == ["w0", "w1", None]
    assert leases[0] is not None
    assert (leases[0].model, leases[0].slot) == ("m", True)
    assert (first.holder is not None, third.holder) == (True, None)
    assert first.ticket is None  # it does not wait
    assert not hub.timers.made
    batch = hub.request("d", priority=Priority.BATCH)
    leases[0].release(Result.COMPLETE)
    assert hub.queue.try_acquire(batch) is not None
    assert batch.holder is not None
    assert (batch.holder.name, batch.holder.running) == ("d", 1)


def test_what_does_not_generate_needs_no_slot() -> None:
    hub = Hub()
    hub.lease()
    request = hub.request(needs_slot=False)
    lease = hub.queue.try_acquire(request)
    assert lease is not None
    assert (lease.model, lease.slot, request.holder) == ("m", False, None)
    take_out(*hub.workers)
    assert hub.queue.try_acquire(hub.request(needs_slot=False)) is None


def test_a_subject_at_its_limit_is_not_admitted() -> None:
    hub = Hub(slots=4)
    first = hub.request(max_concurrency=1)
    assert hub.queue.try_acquire(first) is not None
    assert hub.queue.try_acquire(hub.request(max_concurrency=1)) is None
    assert hub.queue.try_acquire(hub.request("bob", max_concurrency=1)) is not None
    hub.queue.leave(first)
    assert hub.queue.try_acquire(hub.request(max_concurrency=1)) is not None


def test_a_request_keeps_its_place_from_attempt_to_attempt() -> None:
    hub = Hub("m", "m")
    request = hub.request(max_concurrency=1)
    for worker in hub.workers:
        lease = hub.queue.try_acquire(request)
        assert lease is not None
        assert lease.worker is worker
        request.plan.begin(worker)
        lease.release(Result.WORKER_FAILED)
    assert hub.queue.admission.running("ann") == 1
    for _ in range(2):
        hub.queue.leave(request)
        assert hub.queue.admission.running("ann") == 0


def test_the_common_case_takes_few_calls() -> None:
    """Python frames are counted, but for those of the plan, the pool and the lease."""
    hub = Hub(slots=None)
    request = hub.request()
    files: list[str] = []

    def count(frame: Any, event: str, _: object) -> None:
        if event == "call":
            files.append(Path(frame.f_code.co_filename).stem)

    sys.setprofile(count)
    lease = hub.queue.try_acquire(request)
    sys.setprofile(None)
    assert lease is not None
    calls = [file for file in files if file in SCHEDULING]
    assert len(calls) <= 8, calls


# --- Waiting for a slot -----------------------------------------------------------


async def test_a_slot_that_comes_free_goes_to_the_request_that_waits() -> None:
    hub = Hub()
    running = hub.lease()
    request = hub.request("bob")
    async with hub.waiting(request) as task:
        assert hub.queue.admission.waiting == 1
        assert repr(hub.queue) == (
            "<Queue <Admission interactive=1 batch=0 subjects=2> "
            "passed_over=0 stranded=0>"
        )
        running.release(Result.COMPLETE)
        assert hub.workers[0].in_flight == 1  # before its task has run
        lease = await task
    assert lease.worker is hub.workers[0]
    assert (request.ticket, request.holder is not None) == (None, True)
    assert not hub.timers.pending


async def test_a_wait_that_is_too_long_ends() -> None:
    hub = Hub(timeout=5.0)
    running = hub.lease()
    request = hub.request("bob")
    async with hub.waiting(request) as task:
        hub.timers.advance(4.9)
        await turn()
        assert not task.done()
        hub.timers.advance(0.1)
        error = await refused(task, Code.QUEUE_TIMEOUT)
    assert "within 5 s" in error.message
    assert (request.ticket, request.holder) == (None, None)
    assert hub.queue.admission.waiting == 0
    running.release(Result.COMPLETE)
    assert hub.workers[0].in_flight == 0


async def test_a_slot_in_the_last_moment_is_used() -> None:
    hub = Hub(timeout=5.0)
    running = hub.lease()
    async with hub.waiting(hub.request("bob")) as task:
        running.release(Result.COMPLETE)
        hub.timers.advance(5.0)
        assert (await task).worker is hub.workers[0]


async def test_a_request_makes_room_for_another_subject() -> None:
    hub = Hub(size=2)
    hub.lease()
    async with (
        hub.waiting(hub.request("bob")) as first,
        hub.waiting(hub.request("bob")) as second,
        hub.waiting(hub.request("eve")),
    ):
        error = await refused(second, Code.QUEUE_FULL)
        assert "2 (queue.size)" in error.message
        assert not first.done()


async def test_other_settings_hold_for_requests_that_come() -> None:
    hub = Hub(timeout=60.0, notice=2.0)
    hub.lease()
    notices: list[object] = []

    async def notify(place: object) -> None:
        notices.append(place)

    async with hub.waiting(hub.request("bob"), 0.0, notify) as before:
        hub.queue.reconfigure(Settings(size=256, timeout=5.0, notice=0.0))
        async with hub.waiting(hub.request("eve"), 0.0, notify) as after:
            hub.timers.advance(5.0)
            await refused(after, Code.QUEUE_TIMEOUT)
            assert len(notices) == 1, "only the first is to be notified"
        hub.queue.reconfigure(Settings(size=256, timeout=60.0, notice=3.0))
        async with hub.waiting(hub.request("dan"), 0.0, notify):
            hub.timers.advance(3.0)
            await turn()
            assert len(notices) == 2
        assert not before.done()


async def test_a_request_is_not_displaced_when_its_wait_is_over() -> None:
    hub = Hub(size=2, timeout=5.0)
    hub.lease()
    async with (
        hub.waiting(hub.request("bob")) as first,
        hub.waiting(hub.request("bob")) as second,
    ):
        hub.timers.advance(5.0)
        hub.queue.admission.leave(hub.queue.admission.join("eve", "m"))
        await refused(first, Code.QUEUE_TIMEOUT)
        await refused(second, Code.QUEUE_TIMEOUT)


async def test_where_there_is_no_room_a_request_is_refused() -> None:
    hub = Hub(size=0)
    hub.lease()
    request = hub.request("bob")
    await refused(hub.acquire(request), Code.QUEUE_FULL)
    assert (request.ticket, request.holder) == (None, None)


async def test_a_ticket_that_finds_no_room_may_let_in_another_one() -> None:
    """It was that of a first attempt, and its subject is at its limit."""
    hub = Hub("m", "x", size=1)
    request = hub.request(max_concurrency=1)
    assert hub.queue.try_acquire(request) is not None
    async with hub.waiting(hub.request(model="x", max_concurrency=1)) as other:
        await refused(hub.acquire(request), Code.QUEUE_FULL)
        assert (await other).worker is hub.workers[1]


async def test_a_client_that_leaves_leaves_the_queue() -> None:
    hub = Hub()
    running = hub.lease()
    request = hub.request("bob")
    async with hub.waiting(request) as task:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert (request.ticket, request.holder) == (None, None)
    assert hub.queue.admission.waiting == 0
    running.release(Result.COMPLETE)
    assert hub.workers[0].in_flight == 0


async def test_a_slot_that_comes_just_when_its_client_leaves_goes_to_the_next() -> None:
    hub = Hub()
    running = hub.lease()
    async with (
        hub.waiting(hub.request("bob")) as leaving,
        hub.waiting(hub.request("eve")) as next_one,
    ):
        running.release(Result.COMPLETE)
        leaving.cancel()
        assert (await next_one).worker is hub.workers[0]
    assert hub.workers[0].in_flight == 1


async def test_a_client_that_has_left_has_no_turn() -> None:
    """It was cancelled and has not run since."""
    hub = Hub()
    running = hub.lease()
    async with (
        hub.waiting(hub.request("bob")) as leaving,
        hub.waiting(hub.request("eve")) as next_one,
    ):
        leaving.cancel()
        running.release(Result.COMPLETE)
        assert (await next_one).worker is hub.workers[0]


async def test_the_end_of_a_request_lets_in_another_one_of_its_subject() -> None:
    hub = Hub(slots=2)
    first = hub.request(max_concurrency=1)
    assert hub.queue.try_acquire(first) is not None
    async with hub.waiting(hub.request(max_concurrency=1)) as task:
        hub.queue.leave(first)
        assert (await task).worker is hub.workers[0]


async def test_a_request_that_a_worker_has_failed_goes_first() -> None:
    hub = Hub("m", "m")
    first = hub.request()
    lease = hub.queue.try_acquire(first)
    assert lease is not None
    other = hub.lease("bob")
    async with hub.waiting(hub.request("eve")) as waits:
        first.plan.begin(lease.worker)
        lease.release(Result.WORKER_FAILED)
        assert (await waits).worker is lease.worker
        async with hub.waiting(hub.request("dan")), hub.waiting(first) as again:
            other.release(Result.COMPLETE)
            assert (await again).worker is other.worker


async def test_where_all_workers_were_removed_the_fallback_is_asked() -> None:
    hub = Hub("big", "small", fallbacks={"big": ("small",)})
    hub.lease(model="big")
    async with hub.waiting(hub.request("bob", "big")) as task:
        take_out(hub.workers[0])
        hub.queue.look_again()
        assert (await task).worker is hub.workers[1]


async def test_a_worker_that_is_paused_is_not_waited_for() -> None:
    hub = Hub("big", "small", fallbacks={"big": ("small",)})
    hub.lease(model="big")
    async with hub.waiting(hub.request("bob", "big")) as task:
        hub.workers[0].hold(Hold.PAUSED)
        await turn()
        assert task.done()
        assert (await task).worker is hub.workers[1]


async def test_a_request_that_is_sent_to_its_fallback_goes_first_there() -> None:
    hub = Hub("big", "small", fallbacks={"big": ("small",)})
    hub.lease(model="big")
    busy = hub.lease(model="small")
    async with (
        hub.waiting(hub.request("bob", "small")) as other,
        hub.waiting(hub.request("eve", "big")) as task,
    ):
        hub.workers[0].hold(Hold.PAUSED)
        await turn()
        assert not task.done()
        busy.release(Result.COMPLETE)
        await turn()
        assert not other.done()
        assert task.done()
        assert ((await task).worker, (await task).model) == (hub.workers[1], "small")


async def test_where_all_workers_were_removed_without_a_fallback_it_fails() -> None:
    hub = Hub("m", "x")
    hub.lease()
    async with (
        hub.waiting(hub.request("bob")) as task,
        hub.waiting(hub.request("eve")) as other,
    ):
        take_out(hub.workers[0])
        hub.queue.look_again()
        hub.queue.look_again()
        error = await refused(task, Code.NO_WORKER)
        assert "1 down" in error.message
        await refused(other, Code.NO_WORKER)
    assert hub.queue.admission.waiting == 0


async def test_a_client_may_leave_just_when_all_workers_were_removed() -> None:
    hub = Hub()
    hub.lease()
    request = hub.request("bob")
    async with hub.waiting(request):
        take_out(*hub.workers)
        hub.queue.look_again()
    assert (request.ticket, request.holder) == (None, None)
    assert hub.queue.admission.waiting == 0


async def test_a_worker_that_is_removed_is_not_waited_for() -> None:
    hub = Hub()
    hub.lease()
    async with hub.waiting(hub.request("bob")) as task:
        hub.balancer.registry.remove("w0")
        await refused(task, Code.NO_WORKER)


async def test_a_worker_that_is_added_serves_those_that_wait() -> None:
    hub = Hub()
    hub.lease()
    async with hub.waiting(hub.request("bob")) as task:
        origin = Origin("http", "10.0.0.9", 8080, "")
        config = WorkerConfig("http://10.0.0.9:8080", origin, "new")
        worker = hub.balancer.registry.add(config)
        worker.observe(Check.OK, "ok", Description((Model("m"),), slots=1))
        assert (await task).worker is worker


async def test_a_slot_is_for_a_request_that_can_have_it() -> None:
    """The turn is that of one which has failed there; it keeps its turn."""
    hub = Hub("m", "m", retry=Retry(attempts=3))
    leases = [hub.lease(subject) for subject in "ab"]
    failed = hub.request("eve")
    failed.plan.begin(hub.workers[0])
    async with (
        hub.waiting(failed) as task,
        hub.waiting(hub.request("dan")) as other,
    ):
        leases[0].release(Result.COMPLETE)
        assert (await other).worker is hub.workers[0]
        assert not task.done()
        leases[1].release(Result.COMPLETE)
        assert (await task).worker is hub.workers[1]


async def test_one_that_keeps_its_turn_may_leave() -> None:
    hub = Hub("m", "m", retry=Retry(attempts=3))
    leases = [hub.lease(subject) for subject in "ab"]
    failed = hub.request("eve")
    failed.plan.begin(hub.workers[0])
    async with hub.waiting(failed):
        leases[0].release(Result.COMPLETE)
        assert "passed_over=1" in repr(hub.queue)
    assert "passed_over=0" in repr(hub.queue)


# --- Waiting for a better worker --------------------------------------------------


class Choosy(InOrder):
    """Wants a request that has the patience to wait for the last worker."""

    def __init__(self) -> None:
        self.patience: list[float] = []

    def pick(self, ask: Ask, workers: Any, fits: Fits) -> Worker | None:
        self.patience.append(ask.patience)
        if ask.patience and not fits(workers[-1]):
            return None
        return super().pick(ask, workers, fits)


def choosy(hub: Hub, subject: str = "bob") -> Request:
    request = hub.request(subject)
    request.plan.ask = Ask("m", prefixes=(1,))
    return request


async def test_a_request_waits_for_the_worker_that_its_policy_wants() -> None:
    hub = Hub("m", "m")
    hub.balancer.policy = Choosy()
    wanted = hub.workers[1].lease("m")
    request = choosy(hub)
    assert hub.queue.try_acquire(request) is None
    async with hub.waiting(request) as task:
        assert hub.lease("eve").worker is hub.workers[0]
        wanted.release(Result.COMPLETE)
        assert (await task).worker is hub.workers[1]


@pytest.mark.parametrize(
    ("timeout", "patience"), [(600.0, MOST_PATIENCE), (20.0, 10.0)]
)
async def test_its_patience_ends(timeout: float, patience: float) -> None:
    hub = Hub("m", "m", timeout=timeout)
    hub.balancer.policy = policy = Choosy()
    hub.workers[1].lease("m")
    async with hub.waiting(choosy(hub)) as task:
        hub.timers.advance(patience - 1)
        hub.queue.look_again()
        await turn()
        assert not task.done()
        hub.timers.advance(1)
        hub.queue.look_again()
        assert (await task).worker is hub.workers[0]
    assert policy.patience[0] == patience
    assert policy.patience[-2:] == [1, 0]


def test_where_there_is_no_room_to_wait_it_has_no_patience() -> None:
    hub = Hub("m", "m", size=0)
    hub.balancer.policy = Choosy()
    hub.workers[1].lease("m")
    lease = hub.queue.try_acquire(choosy(hub))
    assert lease is not None
    assert lease.worker is hub.workers[0]


# --- Waiting for a worker ---------------------------------------------------------


async def test_without_patience_a_request_without_workers_fails() -> None:
    hub = Hub()
    take_out(*hub.workers)
    error = await refused(hub.acquire(hub.request()), Code.NO_WORKER)
    assert "1 down" in error.message


async def test_a_busy_worker_is_waited_for_until_it_reopens() -> None:
    """With one timer, for the moment when it does."""
    hub = Hub("m", "m")
    hub.workers[0].breaker.busy(3.0)
    hub.workers[1].breaker_of("m").busy(4.0)
    request = hub.request()
    async with hub.waiting(request, 5.0) as task:
        assert [timer.at - hub.clock() for timer in hub.timers.pending] == [3.0]
        assert "stranded=1" in repr(hub.queue)
        hub.timers.advance(3.0)
        assert (await task).worker is hub.workers[0]
    assert request.waited == 3.0
    assert hub.timers.made == 1
    assert "stranded=0" in repr(hub.queue)


async def test_a_worker_that_is_busy_for_longer_is_not_waited_for() -> None:
    hub = Hub()
    hub.workers[0].breaker.busy(6.0)
    error = await refused(hub.acquire(hub.request(), 5.0), Code.NO_WORKER)
    assert (error.retry_after, hub.timers.made) == (6, 0)


async def test_patience_counts_over_all_waits_of_a_request() -> None:
    hub = Hub()
    request = hub.request()
    for seconds in (3.0, 1.5):
        hub.workers[0].breaker.busy(seconds)
        async with hub.waiting(request, 5.0) as task:
            hub.timers.advance(seconds)
            (await task).release(Result.COMPLETE)
    assert request.waited == 4.5
    hub.workers[0].breaker.busy(1.0)
    await refused(hub.acquire(request, 5.0), Code.NO_WORKER)


def broken_off(hub: Hub) -> Request:
    """Make a request whose answer broke off on the first worker, and can go on."""
    request = hub.request()
    request.plan.begin(hub.workers[0])
    request.plan.resume()
    request.plan.retry_after(Cause.LOST)
    return request


async def test_an_answer_that_broke_off_waits_for_a_worker_to_come_back() -> None:
    hub = Hub("m", "m")
    take_out(*hub.workers)
    async with hub.waiting(broken_off(hub), 5.0) as task:
        hub.timers.advance(2.0)
        hub.workers[1].observe(Check.FAILED, "still down")
        await turn()
        assert not task.done()
        hub.workers[1].observe(Check.OK, "by the test")
        assert (await task).worker is hub.workers[1]


async def test_it_is_not_waited_for_without_end() -> None:
    hub = Hub("m", "m")
    take_out(*hub.workers)
    request = broken_off(hub)
    async with hub.waiting(request, 5.0) as task:
        assert [timer.at - hub.clock() for timer in hub.timers.pending] == [5.0]
        hub.timers.advance(5.0)
        await refused(task, Code.NO_WORKER)
    assert request.waited == 5.0


async def test_a_breaker_that_reopens_without_letting_requests_in() -> None:
    """Its canary has to prove it; what follows is no timer but a transition."""
    hub = Hub("m", "m")
    take_out(hub.workers[0])
    trip(hub.workers[1])
    opens = hub.workers[1].breaker.opens_in()
    async with hub.waiting(broken_off(hub), 60.0) as task:
        hub.timers.advance(opens)
        await turn()
        assert not task.done()
        assert [timer.at - hub.clock() for timer in hub.timers.pending] == [
            60.0 - opens
        ]
        for _ in range(hub.workers[1].policy.proofs):
            permit = hub.workers[1].breaker.permit()
            assert permit is not None
            permit.settle(True)
        hub.queue.look_again()
        assert (await task).worker is hub.workers[1]


async def test_a_client_that_leaves_does_not_wait_for_a_worker() -> None:
    hub = Hub("m", "m")
    take_out(*hub.workers)
    request = broken_off(hub)
    async with hub.waiting(request, 5.0):
        hub.timers.advance(1.0)
    assert request.waited == 1.0
    assert not hub.timers.pending
    hub.workers[1].observe(Check.OK, "by the test")


async def test_after_the_wait_for_a_worker_it_may_have_to_wait_for_a_slot() -> None:
    hub = Hub()
    hub.lease("bob")
    hub.workers[0].breaker.busy(1.0)
    running = [*hub.workers[0].leases]
    async with hub.waiting(hub.request(), 5.0) as task:
        hub.timers.advance(1.0)
        await turn()
        assert hub.queue.admission.waiting == 1
        running[0].release(Result.COMPLETE)
        assert (await task).worker is hub.workers[0]


# --- Notices ----------------------------------------------------------------------


async def test_a_client_is_notified_of_its_place_while_it_waits() -> None:
    hub = Hub(notice=2.0)
    places: list[Place] = []

    async def notify(place: Place) -> None:
        places.append(place)

    running = hub.lease()
    async with (
        hub.waiting(hub.request("bob")),
        hub.waiting(hub.request("eve"), 0.0, notify) as task,
    ):
        hub.timers.advance(1.9)
        await turn()
        assert not places
        hub.timers.advance(0.1)
        await turn()
        assert places == [Place(2, 2, None)]
        hub.timers.advance(EVERY)
        await turn()
        assert len(places) == 2
        hub.timers.advance(60.0)
        await refused(task, Code.QUEUE_TIMEOUT)
    assert len(places) == 2
    running.release(Result.COMPLETE)
    assert not hub.timers.pending


async def test_a_notice_that_fails_ends_the_wait() -> None:
    hub = Hub(notice=2.0)

    async def notify(place: Place) -> None:
        raise ConnectionResetError("the client left")

    hub.lease()
    request = hub.request("bob")
    async with hub.waiting(request, 0.0, notify) as task:
        hub.timers.advance(2.0)
        with pytest.raises(ConnectionResetError):
            await task
    assert (request.ticket, request.holder) == (None, None)
    assert hub.queue.admission.waiting == 0


async def test_without_a_time_there_are_no_notices() -> None:
    hub = Hub(notice=0.0)
    running = hub.lease()
    async with hub.waiting(hub.request("bob"), 0.0, None) as task:
        assert len(hub.timers.pending) == 1  # the end of the wait
        running.release(Result.COMPLETE)
        await task


async def test_a_request_that_keeps_its_turn_is_notified_too() -> None:
    """It waits for no turn any more, and has a place all the same."""
    hub = Hub("m", "m", notice=2.0, timeout=600.0)
    hub.balancer.policy = Choosy()
    places: list[Place] = []

    async def notify(place: Place) -> None:
        places.append(place)

    hub.workers[1].lease("m")
    async with hub.waiting(choosy(hub), 0.0, notify):
        hub.timers.advance(2.0)
        await turn()
    assert places == [Place(1, 1, None)]


class Sleeping:
    """A queue in front of machines that sleep, and what a waiting client is sent."""

    def __init__(self, machines: int = 1) -> None:
        self.fleet = Fleet(machines)
        self.timers = Timers(self.fleet.clock)
        made = Balancer(self.fleet.registry, Config(), self.fleet.clock)
        self.queue = Queue(
            made, Settings(notice=2.0), self.fleet.clock, self.timers, self.fleet.waker
        )
        self.request = Request(plan(made, self.fleet.pool))
        self.notices: list[Place | Waking] = []

    def acquire(self) -> asyncio.Task[Lease]:
        acquiring = self.queue.acquire(self.request, 0.0, self._notify)
        return asyncio.create_task(acquiring, name="request")

    async def _notify(self, place: Place | Waking) -> None:
        self.notices.append(place)


async def test_a_client_is_notified_of_the_machine_that_wakes_for_it() -> None:
    sleeping = Sleeping()
    fleet, task = sleeping.fleet, sleeping.acquire()
    await turn()
    assert fleet.packets == ["w0"]
    sleeping.timers.advance(2.0)
    await turn()
    assert sleeping.notices == [Waking("w0")]
    fleet.rise(fleet.workers[0])
    lease = await task
    assert lease.worker is fleet.workers[0]
    lease.release(Result.COMPLETE)


async def test_a_machine_that_has_failed_the_request_is_not_woken_for_it() -> None:
    sleeping = Sleeping(2)
    fleet = sleeping.fleet
    sleeping.request.plan.begin(fleet.workers[0])
    task = sleeping.acquire()
    await turn()
    assert fleet.packets == ["w1"]
    sleeping.timers.advance(2.0)
    await turn()
    assert sleeping.notices == [Waking("w1")]
    sleeping.queue.look_again()
    await turn()
    assert not task.done()
    fleet.rise(fleet.workers[1])
    lease = await task
    assert lease.worker is fleet.workers[1]
    lease.release(Result.COMPLETE)


# --- With the event loop's timers -------------------------------------------------


async def test_the_timers_are_the_event_loops() -> None:
    hub = Hub()
    hub.queue = Queue(hub.balancer, Settings(timeout=0.01), hub.clock)
    hub.lease()
    await refused(hub.acquire(hub.request("bob")), Code.QUEUE_TIMEOUT)


# --- Whatever happens -------------------------------------------------------------

EVENTS = [
    "comes",
    "comes",
    "ends",
    "fails",
    "leaves",
    "falls",
    "rises",
    "rests",
    "time",
]


@given(
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 5)), max_size=40)
)
def test_whatever_happens_no_slot_is_lost_and_no_request_is_forgotten(
    events: list[tuple[str, int]],
) -> None:
    asyncio.run(Play(events).run())


class Play:
    """Lets requests come and go, and workers too."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        self.events = events
        self.hub = Hub("m", "m", slots=1, size=3, timeout=20.0)
        self.waiting: dict[asyncio.Task[Lease], Request] = {}
        self.running: dict[Lease, Request] = {}

    async def run(self) -> None:
        for event, number in self.events:
            getattr(self, event)(number)
            await turn()
            self.collect()
            self.check()
        for task in self.waiting:
            task.cancel()
        await turn()
        self.collect()
        for lease, request in self.running.items():
            lease.release(Result.COMPLETE)
            self.hub.queue.leave(request)
        assert not any(worker.in_flight for worker in self.hub.workers)
        assert not self.hub.timers.pending
        assert repr(self.hub.queue) == repr(Hub().queue)

    def collect(self) -> None:
        for task in [each for each in self.waiting if each.done()]:
            request = self.waiting.pop(task)
            if task.cancelled() or isinstance(task.exception(), NoWorkerError):
                self.hub.queue.leave(request)
            else:
                self.running[task.result()] = request

    def check(self) -> None:
        leases = [lease for worker in self.hub.workers for lease in worker.leases]
        assert set(leases) == set(self.running)
        assert all(worker.in_flight <= 1 for worker in self.hub.workers)
        assert self.hub.queue.admission.waiting <= 3
        for request in self.waiting.values():
            at_limit = request.max_concurrency and self.hub.queue.admission.running(
                request.subject
            )
            free = [each for each in request.plan.candidates() if each.free > 0]
            assert at_limit or not free, "a slot is idle while a request waits"

    # --- Events ---

    def comes(self, number: int) -> None:
        fields = {"max_concurrency": 1} if number == 0 else {}
        request = self.hub.request("abc"[number % 3], **fields)
        self.waiting[self.hub.acquire(request, 5.0)] = request

    def ends(self, number: int) -> None:
        for lease in [*self.running][number : number + 1]:
            request = self.running.pop(lease)
            request.plan.begin(lease.worker)
            lease.release(Result.COMPLETE)
            self.hub.queue.leave(request)

    def fails(self, number: int) -> None:
        for lease in [*self.running][number : number + 1]:
            request = self.running.pop(lease)
            request.plan.begin(lease.worker)
            lease.release(Result.WORKER_FAILED)
            if request.plan.retry_after(Cause.LOST) is None:
                self.hub.queue.leave(request)
            else:
                self.waiting[self.hub.acquire(request, 5.0)] = request

    def leaves(self, number: int) -> None:
        for task in [*self.waiting][number : number + 1]:
            task.cancel()

    def falls(self, number: int) -> None:
        self.hub.workers[number % 2].observe(Check.FAILED, "by the test")
        self.hub.queue.look_again()

    def rises(self, number: int) -> None:
        self.hub.workers[number % 2].observe(Check.OK, "by the test")

    def rests(self, number: int) -> None:
        """Have a worker ask for a break."""
        self.hub.workers[number % 2].breaker.busy(number / 2)
        self.hub.queue.look_again()

    def time(self, number: int) -> None:
        self.hub.timers.advance(float(number))
        for worker in self.hub.workers:  # as the watchdog's canaries do
            while (permit := worker.breaker.permit()) is not None:
                permit.settle(True)
        self.hub.queue.look_again()


# --- Slots that hubs share --------------------------------------------------------


async def test_while_requests_wait_the_queue_reports_it() -> None:
    hub = Hub()
    calls: list[bool] = []
    hub.queue.on_wait = lambda: calls.append(hub.queue.waits)
    hub.workers[0].allot(0)
    assert hub.queue.try_acquire(hub.request()) is None
    assert not hub.queue.waits
    async with hub.waiting(hub.request()):
        assert calls == [True]
    assert not hub.queue.waits


def test_a_request_that_waits_for_a_lease_counts_for_no_limit() -> None:
    hub = Hub("m", "m")
    hub.balancer.policy = InOrder()
    hub.workers[0].allot(0, scarce=False)
    request = hub.request(max_concurrency=1)
    assert hub.queue.try_acquire(request) is None
    assert (request.ticket, request.holder) == (None, None)
    hub.workers[0].allot(1)
    assert hub.queue.try_acquire(hub.request(max_concurrency=1)) is not None


async def test_a_slot_that_is_granted_to_a_subject_goes_to_its_oldest_request() -> None:
    hub = Hub()
    worker = hub.workers[0]
    worker.allot(0)
    async with hub.waiting(hub.request("bob")) as bob, hub.waiting(hub.request()):
        worker.allot(1)
        assert hub.queue.grant(worker, "bob")
        lease = await bob
        assert lease.worker is worker
        worker.allot(2)
        assert not hub.queue.grant(worker, "bob"), "it has no other request"
        assert not hub.queue.grant(worker, "cid")


async def test_a_slot_is_not_granted_to_a_request_that_its_worker_has_failed() -> None:
    hub = Hub("m", "m")
    one, two = hub.workers
    for worker in hub.workers:
        worker.allot(0)
    request = hub.request("bob")
    request.plan.begin(one)
    async with hub.waiting(request) as bob:
        one.allot(1)
        assert not hub.queue.grant(one, "bob")
        two.allot(1)
        assert hub.queue.grant(two, "bob")
        assert (await bob).worker is two


async def test_a_request_wants_the_worker_that_its_policy_prefers_or_any() -> None:
    hub = Hub("m", "m")
    hub.balancer.policy = InOrder()
    for worker in hub.workers:
        worker.allot(0, scarce=False)
    one, two = hub.workers
    async with hub.waiting(hub.request()):
        [(ticket, workers)] = hub.queue.wants(9)
        assert (ticket.subject, workers) == ("ann", [one])
        one.allot(0, scarce=True)
        [(_, workers)] = hub.queue.wants(9)
        assert workers == [two]
        two.allot(0, scarce=True)
        [(_, workers)] = hub.queue.wants(9)
        assert workers == [one, two]


async def test_a_request_with_patience_leaves_a_slot_to_others() -> None:
    hub = Hub("m", "m")
    hub.balancer.policy = Choosy()
    one, two = hub.workers
    for worker in hub.workers:
        worker.allot(0)
    async with hub.waiting(choosy(hub)) as bob:
        [(_, workers)] = hub.queue.wants(9)
        assert workers == [one, two]
        one.allot(1)
        assert not hub.queue.grant(one, "bob"), "it waits for the other one"
        one.allot(0)
        async with hub.waiting(hub.request("bob")) as other:
            wants = [workers for _, workers in hub.queue.wants(9)]
            assert wants == [[two], [one, two]]
            one.allot(1)
            assert hub.queue.grant(one, "bob")
            assert (await other).worker is one
        two.allot(1)
        assert not hub.queue.grant(two, "cid"), "it is for requests of another subject"
        assert hub.queue.grant(two, "bob")
        lease = await bob
        assert lease.worker is two
    async with hub.waiting(hub.request("eve")) as eve:
        lease.release(Result.COMPLETE)
        await turn()
        assert eve.done()
        assert (await eve).worker is two


async def test_a_request_that_prefers_a_worker_without_a_lease_waits_for_one() -> None:
    hub = Hub("m", "m")
    hub.balancer.policy = InOrder()
    calls: list[None] = []
    hub.queue.on_wait = lambda: calls.append(None)
    one, two = hub.workers
    one.allot(0, scarce=False)
    two.allot(1)
    async with hub.waiting(hub.request()) as task:
        assert calls
        [(ticket, workers)] = hub.queue.wants(9)
        assert workers == [one]
        assert not ticket.first, "it goes before no request of another hub"
        one.allot(0, scarce=True)
        hub.queue.look_for_slots()
        assert (await task).worker is two, "it was of no use to wait"
    assert not hub.queue.admission.waiting
