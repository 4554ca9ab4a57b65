"""What several hubs keep together: real stores, which are lost, and come back empty."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gollama_proxy.state import shared
from gollama_proxy.state.facts import Key, StoredWorker
from gollama_proxy.state.folder import StateError
from gollama_proxy.state.local import LocalState
from gollama_proxy.state.shared import SharedState
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
from tests.state.test_ledger import Ended

pytestmark = pytest.mark.usefixtures("patient_hubs")

ONE = StoredWorker("one", "admin", {"url": "http://10.0.0.1:1", "slots": 4}, "paused")
TWO = StoredWorker(
    "two", "agent", {"url": "http://10.0.0.2:1"}, agent={"digest": "f00d"}
)


class Copy(SharedState):
    """The state of one hub, whose rounds take place when a test wants them."""

    def __init__(
        self, local: LocalState, store: Store, wall: Callable[[], float] = time.time
    ) -> None:
        super().__init__(local, store, secrets.token_hex(8), wall=wall)
        self.store = store
        self.changes: set[Key] = set()
        self.on_change = self.changes.update


@contextlib.asynccontextmanager
async def hub(
    server: StoreServer,
    folder: Path | None = None,
    wall: Callable[[], float] = time.time,
) -> AsyncIterator[Copy]:
    local = await asyncio.to_thread(LocalState, folder, wall)
    try:
        async with connected(server.url) as store:
            yield Copy(local, store, wall=wall)
    finally:
        await local.close()


async def rounds(*copies: Copy) -> None:
    """Let each send what it has, and then read what the others have sent."""
    for copy in (*copies, *copies):
        assert await copy.round()


async def lose(server: StoreServer, *copies: Copy) -> None:
    await server.kill()
    for copy in copies:
        await is_down(copy.store)


async def find_again(server: StoreServer, *copies: Copy) -> None:
    await server.start()
    for copy in copies:
        await is_up(copy.store)


@pytest.mark.parametrize("engine", ENGINES)
async def test_changes_at_one_hub_come_to_the_others(
    tmp_path: Path, engine: str
) -> None:
    async with running_store(tmp_path, engine) as server:
        async with hub(server) as a, hub(server) as b, hub(server) as c:
            await a.local.put(ONE)
            await b.local.put(TWO)
            await b.local.revoke("jti", "f00d")
            await a.local.revoke("sub", "älice")
            await rounds(a, b, c)
            for each in a, b, c:
                assert sorted(each.local.workers, key=lambda one: one.name) == [
                    ONE,
                    TWO,
                ]
                assert each.local.revoked.tokens == {"f00d"}
                assert each.local.revoked.subjects == {"älice"}
                assert not each.local.unsent
            assert c.changes == {
                *(("worker", "one"), ("hold", "one"), ("worker", "two")),
                *(("jti", "f00d"), ("sub", "älice")),
            }
            assert ("worker", "one") not in a.changes  # it has made this one itself
            await c.local.forget("one")
            await rounds(a, b)
            assert a.local.workers == b.local.workers == [TWO]


async def test_a_hold_and_other_settings_at_two_hubs_are_both_in_force(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            await a.local.put(replace(ONE, hold=""))
            await b.round()
            await asyncio.gather(
                a.local.put(replace(ONE, hold="draining")),
                b.local.put(
                    replace(ONE, hold="", settings={"url": "http://10.0.0.9:1"})
                ),
            )
            await rounds(a, b)
            expected = replace(
                ONE, hold="draining", settings={"url": "http://10.0.0.9:1"}
            )
            assert a.local.workers == b.local.workers == [expected]


async def test_of_two_changes_of_one_fact_all_hubs_have_the_same(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b, hub(server) as c:
            await a.local.put(ONE)
            await rounds(b, c)
            holds = "draining", "", "paused"
            for turn in range(9):
                changes = (
                    each.local.put(replace(ONE, hold=holds[(turn + at) % 3]))
                    for at, each in enumerate((a, b, c))
                )
                await asyncio.gather(*changes)
            await rounds(a, b, c)
            assert a.local.workers == b.local.workers == c.local.workers


async def test_a_later_change_of_one_hub_replaces_its_earlier_one(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            for slots in range(1, 30):
                await a.local.put(replace(ONE, settings={"slots": slots}))
            await asyncio.gather(
                *(
                    a.local.put(replace(ONE, settings={"slots": n}))
                    for n in range(30, 60)
                )
            )
            await b.round()
            assert b.local.workers == [replace(ONE, settings={"slots": 59})]


async def test_of_two_hubs_that_add_one_name_the_second_one_is_refused(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            await a.local.put(ONE)
            other = StoredWorker("one", "admin", {"url": "http://10.0.0.9:1"})
            with pytest.raises(StateError, match=r"just added a worker .* 'one'"):
                await b.local.put(other)
            assert b.local.workers == [ONE]
            assert ("worker", "one") in b.changes
            await a.local.forget("one")
            await b.round()
            await b.local.put(other)  # the name is free again
            await a.round()
            assert a.local.workers == [other]


# --- Without the store ------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_changes_while_the_store_is_gone_are_merged_by_their_age(
    tmp_path: Path, engine: str
) -> None:
    # The clocks of the hubs are an hour apart, which must not matter.
    early, late = Clock(1_000_000.0), Clock(1_003_600.0)
    async with running_store(tmp_path, engine) as server:
        async with hub(server, wall=early) as a, hub(server, wall=late) as b:
            await a.local.put(ONE)
            await a.local.put(TWO)
            await rounds(a, b)
            await lose(server, a, b)
            await b.local.put(replace(ONE, hold="draining"))
            await b.local.forget("two")
            for clock in early, late:
                clock.advance(10)
            await a.local.put(
                replace(ONE, hold="")
            )  # the last one, at the earlier clock
            await a.local.put(replace(TWO, hold="paused"))  # its hold alone
            for clock in early, late:
                clock.advance(10)
            assert not await a.round()
            await find_again(server, a, b)
            await rounds(a, b)
            assert a.local.workers == b.local.workers
            assert a.local.find("one") == replace(ONE, hold="")
            # The worker was removed; what holds it will hold it when it is back.
            assert a.local.find("two") == StoredWorker("two", "file", hold="paused")


async def test_a_partition_heals_with_the_newest_of_both_sides(tmp_path: Path) -> None:
    wall = Clock(1_000_000.0)
    async with running_store(tmp_path) as server:
        async with hub(server, wall=wall) as a:
            await a.local.put(replace(ONE, hold=""))
            async with hub(server, wall=wall) as b:
                await b.round()
            # The other one is away.
            await b.local.put(replace(ONE, hold="draining"))
            wall.advance(10)
            await a.local.put(replace(ONE, hold="paused"))
            async with connected(server.url) as store:
                back = Copy(b.local, store, wall=wall)
                await back.round()
                assert back.local.workers == [replace(ONE, hold="paused")]
                await back.local.put(replace(ONE, hold="draining"))
                await rounds(back, a)
                assert a.local.workers == [replace(ONE, hold="draining")]


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_empty_store_is_filled_from_all_copies(
    tmp_path: Path, engine: str
) -> None:
    async with running_store(tmp_path, engine) as server:
        async with hub(server) as a, hub(server) as b:
            await a.local.put(ONE)
            await a.local.put(TWO)
            await a.local.revoke("jti", "f00d")
            await rounds(a, b)
            await b.local.forget("two")
            await a.round()
            before = [await server.ask("HGETALL", "gollama:facts")]
            await lose(server, a, b)
            await find_again(server, a, b)
            await rounds(a, b)
            after = [await server.ask("HGETALL", "gollama:facts")]
            # The versions of workers are those of before, as is the removal.
            for facts in (*before, *after):
                facts.pop(b"jti f00d")
            assert before == after
            async with hub(server) as c:
                await c.round()
                assert c.local.workers == [ONE]
                assert c.local.revoked.tokens == {"f00d"}


@pytest.mark.parametrize("key", ["facts", "facts:order", "facts:life"])
async def test_a_key_that_was_deleted_is_written_again(
    tmp_path: Path, key: str
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            await a.local.put(ONE)
            await a.local.revoke("sub", "alice")
            await rounds(a, b)
            await server.ask("DEL", f"gollama:{key}")
            await rounds(a, b)
            for each in a, b:
                assert each.local.workers == [ONE]
            async with hub(server) as c:
                await c.round()
                assert c.local.workers == [ONE]
                assert c.local.revoked.subjects == {"alice"}


async def test_a_hub_that_was_away_does_not_bring_back_what_was_removed(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a:
            async with hub(server, tmp_path / "b") as b:
                await a.local.put(ONE)
                await a.local.put(TWO)
                await rounds(a, b)
            await a.local.forget("one")
            # Also of a store that has lost its data in the meantime.
            await lose(server, a)
            await find_again(server, a)
            async with hub(server, tmp_path / "b") as b:
                assert len(b.local.workers) == 2
                await rounds(b, a)
                assert a.local.workers == b.local.workers == [TWO]
            # And of one that has forgotten the removal.
            await a.local.forget("two")
            for key in "facts", "facts:order", "facts:mortal":
                await server.ask(
                    "HDEL" if key == "facts" else "ZREM", f"gollama:{key}", "worker two"
                )
            async with hub(server, tmp_path / "b") as b:
                await b.round()
                assert b.local.workers == []


async def test_changes_that_were_not_sent_outlive_a_restart(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a:
            async with hub(server, tmp_path / "b") as b:
                await a.local.put(ONE)
                await b.round()
                await lose(server, a, b)
                await b.local.put(replace(ONE, hold="draining"))
                await b.local.put(TWO)
                await b.local.revoke("sub", "alice")
            await find_again(server, a)
            await a.round()
            async with hub(server, tmp_path / "b") as b:
                await rounds(b, a)
            assert a.local.workers == [replace(ONE, hold="draining"), TWO]
            assert a.local.revoked.subjects == {"alice"}


async def test_many_facts_come_in_several_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "MOST_WRITTEN", 7)
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            for number in range(600):
                await a.local.revoke("jti", f"t{number}")
            await a.round()
            await b.round()
            assert len(b.local.revoked.tokens) == 600


async def test_rows_of_other_programs_do_no_harm(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            await a.local.put(ONE)
            for number, (key, row) in enumerate(
                [
                    ("worker bad", "5 {"),
                    (b"\xff\xfe", b"5 \xff"),
                    ("hold two", "99999999999999999 stuck"),
                    ("nonsense", "5"),
                    ("hold three", "paused"),
                ]
            ):
                await server.ask("HSET", "gollama:facts", key, row)
                order = 9e15 + number
                await server.ask("ZADD", "gollama:facts:order", order, key)
            assert await b.round()
            assert b.local.workers == [ONE]
            three = StoredWorker("three", "file", hold="paused")
            await b.local.put(three)
            await a.round()
            assert a.local.workers == [ONE, three]


async def test_a_store_that_is_full_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "MOST_FACTS", 2)
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            for name in "abcd":
                await a.local.revoke("sub", name)
            await b.round()
            assert b.local.revoked.subjects == {"a", "b"}
            assert a.local.revoked.subjects == set("abcd")  # here they are in force
            assert caplog.text.count("the store has 2 facts; no more fit") == 1


# --- By itself --------------------------------------------------------------------


async def test_what_is_new_is_announced_and_else_there_is_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "QUIET", 3600.0)
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            for each in a, b:
                await each.start()
            await a.local.put(ONE)
            await until(lambda: b.local.workers == [ONE], "the other hub has it")
            await b.local.forget("one")
            await until(lambda: not a.local.workers, "it is removed")
            a.local.ledger.add(Ended())
            await until(
                lambda: b.local.ledger.spent("alice").today == 25, "it is counted"
            )
            await until(lambda: not a.local.ledger.unshared, "it was sent")
            for each in a, b:
                await each.stop()


async def test_a_lost_announcement_delays_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "QUIET", 0.0)
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            monkeypatch.setattr(b, "_wake", lambda _: None)
            await b.start()
            await a.local.put(ONE)
            await until(lambda: b.local.workers == [ONE], "the other hub has it")
            await b.stop()


async def test_the_rounds_go_on_after_the_store_was_gone(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        async with hub(server) as a, hub(server) as b:
            for each in a, b:
                await each.start()
            await lose(server, a, b)
            await a.local.put(ONE)
            await b.local.revoke("jti", "f00d")
            assert not a.caught_up
            await server.start()
            await until(lambda: b.local.workers == [ONE], "the other hub has it")
            await until(lambda: a.local.revoked.tokens == {"f00d"}, "it is revoked")
            await until(lambda: a.caught_up and b.caught_up, "their rounds have ended")
            for each in a, b:
                await each.stop()
