"""Reports reach the hubs that listen, those that start later, and no other program."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gollama_proxy.fleet.breaker import BreakerState
from gollama_proxy.scheduling import reports
from gollama_proxy.scheduling.reports import Reports
from gollama_proxy.state.members import Members
from gollama_proxy.state.store import Store
from tests.fakes.clock import Clock
from tests.fakes.valkey import (
    ENGINES,
    StoreServer,
    connected,
    is_down,
    is_up,
    running_store,
)
from tests.fakes.waiting import until
from tests.scheduling.test_hints import MODEL, FakeHub, teach


class Hub(FakeHub):
    """A hub with a store, but without clients; its key comes from the store."""

    def __init__(self, name: str, store: Store) -> None:
        super().__init__(name, Clock())
        self.balancer.share(b"")
        self.store = store
        members = cast(Members, SimpleNamespace(me=SimpleNamespace(name=name)))
        self.reports = Reports(store, members, self.balancer, self.hints, self.clock)

    def reads(self, number: int = 0) -> float | None:
        return self.workers[number].pace_of(MODEL).speed.reads

    @property
    def memory(self) -> str:
        return repr(self.balancer.policy)


@contextlib.asynccontextmanager
async def hub(name: str, url: str, prefix: str = "gollama") -> AsyncIterator[Hub]:
    async with connected(url, prefix) as store:
        made = Hub(name, store)
        await made.reports.start()
        try:
            yield made
        finally:
            await made.reports.stop()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have news sent so soon that nothing waits for them."""
    monkeypatch.setattr(reports, "PERIOD", 0.005)


@pytest.fixture(params=ENGINES)
async def server(tmp_path: Path, request: Any) -> AsyncIterator[StoreServer]:
    async with running_store(tmp_path, request.param) as running:
        yield running


async def shares_key(*hubs: Hub) -> None:
    def agreed() -> bool:
        keys = {hub.balancer.key for hub in hubs}
        return len(keys) == 1 and keys != {b""}

    await until(agreed, "the hubs have the same key")


async def test_what_one_hub_finds_out_is_known_to_the_other(
    server: StoreServer,
) -> None:
    async with hub("a", server.url) as one, hub("b", server.url) as other:
        await shares_key(one, other)
        first = one.pick(1)
        teach(one.workers[1])
        one.serve(1)
        one.breaks(0)
        await until(lambda: "Memory of 1 " in other.memory)
        await until(lambda: other.reads(1) == 1000)
        await until(lambda: other.state(0) is BreakerState.HALF_OPEN)
        second = other.pick(1, 2)
        assert first is not None
        assert second is not None
        assert second.name == first.name
        await until(lambda: "Memory of 2 " in one.memory)


async def test_a_hub_that_starts_later_knows_it_too(server: StoreServer) -> None:
    async with hub("a", server.url) as one:
        await shares_key(one)
        for number in range(3):  # each copy has the turns since the last one
            one.pick(number)
            one.clock.advance(reports.COPY)
            await until(lambda: not one.balancer.turns)
        teach(one.workers[1])
    async with hub("b", server.url) as late:
        await until(lambda: "Memory of 3 " in late.memory)
        await until(lambda: late.reads(1) == 1000)


async def test_what_is_in_the_store_is_bounded_and_expires(
    server: StoreServer,
) -> None:
    async with hub("a", server.url) as one:
        await shares_key(one)
        one.pick(1)
        teach(one.workers[1])
        names = ("hints:recent", "hints:rates")
        await until(lambda: not one.balancer.turns)

        async def lifetimes() -> list[int]:
            return [await server.ask("PTTL", f"gollama:{name}") for name in names]

        while min(await lifetimes()) < 0:
            one.clock.advance(reports.COPY)
        limits = [reports.RECENT_FOR, reports.RATES_FOR]
        for left, limit in zip(await lifetimes(), limits, strict=True):
            assert limit / 2 < left <= limit


async def test_too_many_speeds_are_made_anew(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MOST_RATES", 2)
    for name in ("old", "older"):
        await server.ask("HSET", "gollama:hints:rates", name, "{}")
    async with hub("a", server.url) as one:
        teach(one.workers[0])

        async def names() -> list[bytes]:
            return cast(list[bytes], await server.ask("HKEYS", "gollama:hints:rates"))

        while len(await names()) != 1:
            pass
        assert await names() == [f"{one.workers[0].url}\0{MODEL}".encode()]


async def test_a_store_that_comes_back_empty_has_the_key_and_the_speeds_again(
    server: StoreServer,
) -> None:
    async with hub("a", server.url) as one, hub("b", server.url) as other:
        await shares_key(one, other)
        key = one.balancer.key
        teach(one.workers[1])
        await until(lambda: other.reads(1) == 1000)
        await server.kill()
        await is_down(one.store)
        one.pick(1)
        await server.start()
        await is_up(one.store)
        await is_up(other.store)

        def has_caught_up() -> bool:
            """It may have listened too late for the report, but not for the copy."""
            one.clock.advance(reports.COPY)
            other.clock.advance(reports.COPY)
            return "Memory of 1 " in other.memory

        await until(has_caught_up)
        assert one.balancer.key == other.balancer.key == key
        while not await server.ask("HLEN", "gollama:hints:rates"):
            pass
        assert await server.ask("GET", "gollama:hints:key") == key.hex().encode()


async def test_two_clusters_in_one_store_share_nothing(server: StoreServer) -> None:
    async with (
        hub("a", server.url, "red") as red,
        hub("b", server.url, "blue") as blue,
        hub("c", server.url, "blue") as sky,
    ):
        await shares_key(blue, sky)
        await shares_key(red)
        assert red.balancer.key != blue.balancer.key
        teach(red.workers[0], 7)
        teach(blue.workers[0], 9)
        await until(lambda: sky.reads() == 9)
        assert red.reads() == 7
        keys = {bytes(key).partition(b":")[0] for key in await server.ask("KEYS", "*")}
        assert keys == {b"red", b"blue"}


async def test_the_key_is_in_no_log_and_no_text_is_in_the_store(
    server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with hub("a", server.url) as one:
        await shares_key(one)
        one.pick(1)
        await until(lambda: not one.balancer.turns)
        assert one.balancer.key.hex() not in caplog.text + repr(one.reports)


@pytest.mark.parametrize("found", ["secret", "", "g" * 64])
async def test_a_key_of_another_program_is_left_alone(
    server: StoreServer, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    await server.ask("SET", "gollama:hints:key", found)
    async with hub("a", server.url) as one, hub("b", server.url) as other:
        teach(one.workers[0])
        await until(lambda: other.reads() == 1000)
        assert one.balancer.key == b""
    assert await server.ask("GET", "gollama:hints:key") == found.encode()
    assert "the key gollama:hints:key is of another program" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("name", ["hints:key", "hints:recent", "hints:rates"])
async def test_a_foreign_type_is_logged_once(
    server: StoreServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await server.ask("LPUSH", f"gollama:{name}", "x")
    async with hub("a", server.url):
        await until(lambda: "a key has another type" in caplog.text)
    (record,) = [r for r in caplog.records if "hints are not shared" in r.message]
    assert record.levelname == "WARNING"


async def test_other_formats_and_garbage_are_ignored(server: StoreServer) -> None:
    await server.ask("XADD", "gollama:hints:recent", "*", "report", "garbage")
    await server.ask("XADD", "gollama:hints:recent", "*", "other", b"\xff")
    await server.ask("HSET", "gollama:hints:rates", "a", '{"v": 99}')
    async with hub("a", server.url) as one, hub("b", server.url) as other:
        await shares_key(one, other)
        for message in (b"\xff\x00", b"{}", b'{"v": 99, "hub": "x", "opened": 7}'):
            await server.ask("PUBLISH", "gollama:hints", message)
        one.pick(1)
        await until(lambda: "Memory of 1 " in other.memory)
