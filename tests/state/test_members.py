"""The hubs that share a store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gollama_proxy.config.settings import Process
from gollama_proxy.state.members import LIFETIME, Member, Members, describe_me
from gollama_proxy.state.store import Store
from tests.fakes.clock import Clock
from tests.fakes.valkey import ENGINES, StoreServer, connected, is_up, running_store
from tests.fakes.waiting import until


@contextlib.asynccontextmanager
async def joined(store: Store, clock: Clock | None = None) -> AsyncIterator[Members]:
    """Run the membership of a hub."""
    members = Members(store, describe_me(), clock or Clock())
    await members.start()
    try:
        yield members
    finally:
        await members.stop()


async def expire(server: StoreServer, member: Member) -> None:
    """Let the time pass in the store after which a silent hub counts as gone."""
    await server.ask("ZADD", "gollama:hubs", 1, member.run)


@pytest.mark.parametrize("engine", ENGINES)
async def test_hubs_come_and_go(
    tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.state.members")
    async with (
        running_store(tmp_path, engine) as server,
        connected(server.url) as store,
        connected(server.url) as other,
        joined(store) as a,
    ):
        assert (a.others, a.all, a.count) == ({}, [a.me], 1)
        left: list[str] = []
        a.on_leave(lambda member: left.append(member.run))
        async with joined(other) as b:
            assert b.others == {a.me.run: a.me}
            await until(lambda: a.others == {b.me.run: b.me})
            assert a.count == 2
            await b.listens_at("http://10.0.0.2:8000", "b:8000")
            await until(lambda: a.others[b.me.run].url == "http://10.0.0.2:8000")
            assert a.all == [a.me, b.me]
        await until(lambda: a.count == 1)
        assert left == [b.me.run]
    for text in ("another hub has joined: b:8000", "a hub has left: b:8000"):
        assert caplog.messages.count(text) == 1


async def test_a_hub_that_is_silent_counts_as_gone(tmp_path: Path) -> None:
    clock = Clock()
    async with (
        running_store(tmp_path) as server,
        connected(server.url) as store,
        connected(server.url) as other,
        joined(store, clock) as a,
    ):
        clock.advance(LIFETIME)
        gone: list[Member] = []
        a.on_leave(gone.append)
        b = Members(other, describe_me(), clock)
        await b.start()
        await until(lambda: a.count == 2)
        await other.close()  # and so its heartbeats
        await b.stop()
        await expire(server, b.me)
        await a.listens_at("http://a", "a")  # a heartbeat
        assert gone == [b.me]
        assert a.count == 1
        assert await server.ask("ZRANGE", "gollama:hubs", 0, -1) == [a.me.run.encode()]


async def test_a_store_that_is_gone_leaves_the_hubs_that_were_seen_last(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with (
        running_store(tmp_path) as server,
        connected(server.url) as store,
        joined(store, clock) as a,
    ):
        async with connected(server.url) as other, joined(other):
            await until(lambda: a.count == 2)
            clock.advance(LIFETIME)
            await server.kill()
        assert a.count == 2
        # It comes back empty: the other one may be late to register again.
        await server.start()
        await is_up(store)
        await a.listens_at("http://a", "a")  # a heartbeat
        assert a.count == 2
        clock.advance(LIFETIME)
        await a.listens_at("http://a", "a")
        assert a.count == 1


async def test_a_hub_of_another_version_counts_though_it_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = "0123456789abcdef"
    async with (
        running_store(tmp_path) as server,
        connected(server.url, "mixed") as store,
    ):
        [seconds, _] = await server.ask("TIME")
        soon = (int(seconds) + LIFETIME) * 1000
        await server.ask("ZADD", "mixed:hubs", soon, run)
        await server.ask("SET", f"mixed:hub:{run}", "[]")
        async with joined(store) as a:
            await a.listens_at("http://a", "a")  # another heartbeat
            assert a.count == 2
            assert a.others[run].name == run
            assert a.others[run].url  # so it is asked, and named if it does not answer
    assert caplog.messages == ["a message in mixed:hub is ignored: it is malformed"]


@pytest.mark.parametrize("score", ["-inf", 0, 1 << 45, "inf"])
@pytest.mark.parametrize("run", [b"0123456789abcdef", b"x", b"\xff" * 16, b""])
async def test_garbage_among_the_hubs_is_no_hub(
    tmp_path: Path, run: bytes, score: str | int
) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        await server.ask("ZADD", "gollama:hubs", score, run)
        await server.ask("SET", b"gollama:hub:" + run, "[]")
        async with joined(store) as a:
            assert a.count == 1


def test_every_start_is_another_run() -> None:
    first, second = describe_me(), describe_me()
    assert first.run != second.run
    assert first.group == first.run
    assert not first.url
    process = describe_me(Process(2, 4, "g"))
    assert (process.group, process.name) == ("g", f"{process.host}/2")
