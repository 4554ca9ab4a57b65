"""When a hub calls the store about slots, and what it does without an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from gollama_proxy.fleet.lease import Result
from gollama_proxy.scheduling import sharing
from gollama_proxy.scheduling.sharing import MOST_PLACES, WAITING, Sharing
from gollama_proxy.state.link import StoreDownError, StoreError
from gollama_proxy.state.slots import CAUTION, LIFETIME, Grant, SlotAsk, SlotReply
from gollama_proxy.state.store import Mode
from tests.fakes.waiting import until
from tests.scheduling.test_queue import Hub


class Store:
    """Grants all that is asked for, up to `slots` of each worker, or fails."""

    prefix = "test"

    def __init__(self, slots: int = 2) -> None:
        self.mode = Mode.UP
        self.slots = slots
        self.error: Exception | None = None
        self.calls: list[list[SlotAsk]] = []
        self._granted = 0
        self.epoch = "first"
        self.sent: list[Sequence[Any]] = []  # how many hubs are awaited, and the like
        self._mode_listener: Callable[[Mode], None] = lambda mode: None
        self._empty_listener: Callable[[], None] = lambda: None

    async def listen(self, channel: str, take: object) -> None:
        pass

    def subscribe_mode(self, callback: Callable[[Mode], None]) -> None:
        self._mode_listener = callback

    def on_empty(self, callback: Callable[[], None]) -> None:
        self._empty_listener = callback

    def lose_data(self) -> None:
        self.epoch = "second"
        self._empty_listener()

    def turn(self, mode: Mode) -> None:
        self.mode = mode
        self._mode_listener(mode)

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> bytes:
        asks = msgspec.msgpack.decode(args[-1], type=list[SlotAsk])
        self.calls.append(asks)
        self.sent.append(args[-4:-1])
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return msgspec.msgpack.encode([self._answer(ask) for ask in asks])

    def _answer(self, ask: SlotAsk) -> SlotReply:
        free = self.slots - len(ask.held)
        subjects = [want.subject for want in ask.wants for _ in range(want.requests)]
        granted = []
        for subject in [*subjects, *[""] * ask.spare][:free]:
            self._granted += 1
            granted.append(Grant(f"l{self._granted}", subject))
        return SlotReply(ask.worker, granted, 0, free - len(granted))


@asynccontextmanager
async def shared(
    *workers: str, slots: int = 2, hubs: Sequence[str] = ("a",), mode: Mode = Mode.UP
) -> AsyncIterator[tuple[Hub, Store, Sharing]]:
    """Run the sharing of a hub without servers; its clock stands still."""
    hub, store = Hub(*workers, slots=slots), Store(slots)
    store.mode = mode
    made = Sharing(
        store,  # type: ignore[arg-type]
        hub.balancer.registry,
        hub.queue,
        hub.clock,
        hub="a",
        machine="here",
        hubs=lambda: hubs,
    )
    await made.start()
    try:
        yield hub, store, made
    finally:
        await made.stop()


async def test_a_request_without_a_lease_costs_one_call_and_the_next_ones_none() -> (
    None
):
    async with shared() as (hub, store, made):
        await until(lambda: not made.alone)
        assert hub.queue.try_acquire(hub.request()) is None
        lease = await hub.acquire(hub.request())
        calls = len(store.calls)
        lease.release(Result.COMPLETE)
        for _ in range(3):
            hub.lease().release(Result.COMPLETE)
        assert len(store.calls) == calls


async def test_a_store_that_rejects_calls_is_reported_and_gone_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with shared(hubs=("a", "b")) as (hub, store, made):
        await until(lambda: not made.alone)
        (await hub.acquire(hub.request())).release(Result.COMPLETE)
        store.error = StoreError("WRONGTYPE")
        hub.clock.advance(sharing.HEARTBEAT)
        with caplog.at_level(logging.WARNING):
            await until(lambda: made.alone)
        assert "cannot be shared: WRONGTYPE" in caplog.text
        assert hub.workers[0].share == 1, "its part of what it holds"
        store.error = None
        await until(lambda: not made.alone)


async def test_a_call_that_was_not_answered_is_made_again_at_once() -> None:
    async with shared() as (hub, store, made):
        await until(lambda: not made.alone)
        store.error = StoreDownError("late")
        task = hub.acquire(hub.request())
        await until(lambda: any(store.calls))
        store.error = None
        await task
        assert not made.alone


@pytest.mark.parametrize(
    ("hubs", "waits", "after"), [(("a",), 2, 2), (("a", "b"), 0, 1)]
)
async def test_without_the_store_a_hub_waits_for_the_leases_of_others_to_end(
    hubs: tuple[str, ...], waits: int, after: int
) -> None:
    async with shared(hubs=hubs) as (hub, store, made):
        await until(lambda: not made.alone)
        [worker] = hub.workers
        store.turn(Mode.DOWN)
        await until(lambda: made.alone)
        assert worker.share == waits
        hub.clock.advance(LIFETIME)
        worker.changed()
        store.turn(Mode.DOWN)
        await until(lambda: worker.share == after)


async def test_a_hub_that_has_never_met_the_store_may_not_be_the_only_one() -> None:
    async with shared(mode=Mode.DOWN) as (hub, store, _):
        [worker] = hub.workers
        await asyncio.sleep(0)
        assert worker.share == 0
        hub.clock.advance(LIFETIME)
        store.turn(Mode.DOWN)
        await until(lambda: worker.share == 2)


async def test_the_leases_of_a_worker_that_is_gone_go_back() -> None:
    async with shared() as (hub, store, made):
        await until(lambda: not made.alone)
        (await hub.acquire(hub.request())).release(Result.COMPLETE)
        hub.balancer.registry.remove("w0")
        await until(lambda: bool(store.calls[-1]) and bool(store.calls[-1][0].back))
        assert not store.calls[-1][0].held


async def test_in_a_large_pool_other_workers_are_asked_after_a_while() -> None:
    async with shared(*["m"] * 100, slots=1) as (hub, store, made):
        await until(lambda: not made.alone)
        store.slots = 0
        async with hub.waiting(hub.request()):
            asked: set[str] = set()
            for _ in range(8):
                await until(lambda: any(ask.wants for ask in store.calls[-1]))
                asked |= {ask.worker for ask in store.calls[-1] if ask.wants}
                assert len([1 for ask in store.calls[-1] if ask.wants]) <= MOST_PLACES
                count = len(store.calls)
                hub.clock.advance(WAITING)
                hub.queue.look_for_slots()
                await until(lambda n=count: len(store.calls) > n)  # type: ignore[misc]
        assert len(asked) > 2 * MOST_PLACES


async def test_a_hub_that_sees_the_loss_of_data_registers_and_awaits_the_others() -> (
    None
):
    async with shared(hubs=("a", "b")) as (hub, store, made):
        await until(lambda: not made.alone)
        assert store.sent[0] == ["first", "0", "1"]
        lease = await hub.acquire(hub.request())
        assert store.sent[-1] == ["first", "0", "0"]
        store.lose_data()
        await until(lambda: store.sent[-1] == ["second", "2", "1"])
        assert store.calls[-1][0].held
        lease.release(Result.COMPLETE)
        hub.clock.advance(CAUTION)
        store.turn(Mode.UP)
        await until(lambda: store.sent[-1] == ["second", "0", "0"])


async def test_a_hub_that_was_stopped_uses_no_lease_that_others_may_have() -> None:
    async with shared(hubs=("a", "b")) as (hub, _, made):
        await until(lambda: not made.alone)
        lease = await hub.acquire(hub.request())
        [worker] = hub.workers
        made.lapse()  # in time
        assert worker.share
        hub.clock.advance(LIFETIME)
        made.lapse()
        assert worker.share == 0
        lease.release(Result.COMPLETE)
        assert hub.queue.try_acquire(hub.request()) is None
        await until(lambda: bool(worker.share))  # the store has granted it again
        hub.lease().release(Result.COMPLETE)
