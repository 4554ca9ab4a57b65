"""Links sign in at any hub, and the counters of a group of processes never fall."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy import cluster
from gollama_proxy.cluster import GroupMetrics, LinksInStore
from gollama_proxy.control.page import LINK_LIFETIME, Links
from gollama_proxy.state.store import Store
from gollama_proxy.telemetry import exposition
from gollama_proxy.telemetry.exposition import Family, Sums
from tests.behaviour.test_hubs_as_one import two_hubs
from tests.control.test_admin import call
from tests.control.test_peers import Group, member
from tests.fakes.valkey import (
    ENGINES,
    StoreServer,
    connected,
    is_down,
    running_store,
)

# --- Links that sign in at any hub ------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_link_works_once_at_any_hub(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server:
        async with connected(server.url) as one, connected(server.url) as two:
            here, there = Links(), Links()
            here.shared, there.shared = LinksInStore(one), LinksInStore(two)
            code = await here.issue("a.secret.token")
            [key] = await server.ask("KEYS", "gollama:link:*")
            kept = await server.ask("GET", key)
            assert b"secret" not in kept
            assert code.encode() not in key + kept
            assert 0 < await server.ask("TTL", key) <= LINK_LIFETIME
            assert await there.redeem(code) == "a.secret.token"
            assert await there.redeem(code) is None
            assert await here.redeem(code) is None
            assert repr(here.shared) == f"<LinksInStore {one!r}>"


async def test_a_link_that_was_changed_in_the_store_is_not_accepted(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        links = Links()
        links.shared = LinksInStore(store)
        for forged in (b"", b"x", b"x" * 100):
            code = await links.issue("token")
            [key] = await server.ask("KEYS", "gollama:link:*")
            await server.ask("SET", key, forged)
            assert await links.redeem(code) is None


async def test_without_the_store_a_link_works_where_it_was_made(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, connected(server.url) as store:
        links = Links()
        links.shared = LinksInStore(store)
        await server.kill()
        await is_down(store)
        assert await links.redeem(await links.issue("token")) == "token"
        assert await links.redeem("unknown") is None


async def test_the_dashboard_of_another_hub_is_opened(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, two_hubs(server) as (one, two):
        link = (await call(one, "POST", "/admin/links")).json()
        answer = await two.post("/dashboard/sign-in", {"code": link["code"]}, None)
        assert answer.status == 200
        answer = await one.post("/dashboard/sign-in", {"code": link["code"]}, None)
        assert answer.status == 401


# --- The metrics of a group of processes ------------------------------------------

COUNTED = Family("c_total", "counter", "Counted.")
RUNS = Family("runs", "gauge", "Run.")
KNOWN = (COUNTED, RUNS)


def counts(number: int) -> list[Any]:
    return [["c_total", [""], [number]], ["runs", [""], [1]]]


class Box:
    """Processes of one group on one machine."""

    def __init__(self, group: Group, store: Store) -> None:
        self.group, self.store = group, store
        self.counted: dict[str, int] = {}

    async def process(self, run: str, store: Store | None = None) -> GroupMetrics:
        """Make a process that answers the others."""
        store = store or self.store
        self.counted.setdefault(run, 0)

        def reply(_: object) -> Mapping[str, Any]:
            return {"run": run, "families": counts(self.counted[run])}

        peers = await self.group.peer(store, run, {"metrics": reply})
        return GroupMetrics(store, peers, "g", run, KNOWN)

    async def page(self, metrics: GroupMetrics, run: str) -> dict[str, float]:
        """Return what the process with this run shows."""
        own = counts(self.counted[run])
        sums = Sums(KNOWN)
        for families, ended in [(own, False), *await metrics.collect(own)]:
            sums.add(families, ended=ended)
        text = "".join(exposition.pieces([sums.collect], open_metrics=False))
        rows = [line.split() for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in rows}


@contextlib.asynccontextmanager
async def box(
    folder: Path, *runs: str
) -> AsyncIterator[tuple[Box, list[Store], StoreServer]]:
    group = Group(*(member(run, "box", "g", 10 + n) for n, run in enumerate(runs)))
    async with running_store(folder) as server, contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(connected(server.url)) for _ in runs]
        yield Box(group, stores[0]), stores, server


async def test_each_process_shows_the_whole(tmp_path: Path) -> None:
    async with box(tmp_path, "1", "2") as (group, stores, _):
        one = await group.process("1", stores[0])
        two = await group.process("2", stores[1])
        group.counted = {"1": 3, "2": 4}
        assert await group.page(one, "1") == {"c_total": 7, "runs": 2}
        assert await group.page(two, "2") == {"c_total": 7, "runs": 2}
        assert repr(one) == "<GroupMetrics gollama:metrics:g>"


async def test_counters_of_ended_processes_stay(tmp_path: Path) -> None:
    async with box(tmp_path, "1", "2", "3") as (group, stores, _):
        one = await group.process("1", stores[0])
        await group.process("2", stores[1])
        three = await group.process("3", stores[2])
        group.counted = {"1": 3, "2": 4, "3": 5}
        assert (await group.page(one, "1"))["c_total"] == 12
        # The second one ends, and the third one has never asked for its counters.
        del group.group.hubs["2"]
        assert await group.page(three, "3") == {"c_total": 12, "runs": 2}
        assert await group.page(one, "1") == {"c_total": 12, "runs": 2}


@pytest.mark.parametrize("ends", [1, 5])
async def test_many_ended_processes_become_one_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    monkeypatch.setattr(cluster, "MOST_ENDED", 2)
    async with box(tmp_path, "1") as (group, [store], server):
        one = await group.process("1")
        group.counted["1"] = 1
        for number in range(ends):
            text = zlib.compress(b'[["c_total",[""],[10]],["runs",[""],[1]]]')
            await store.call("HSET", "gollama:metrics:g", f"gone-{number}", text)
            expected = {"c_total": 11 + 10 * number, "runs": 1}
            assert await group.page(one, "1") == expected
        kept = await server.ask("HKEYS", "gollama:metrics:g")
        assert len(kept) <= 4
        assert (b"ended" in kept) == (ends > 2)


async def test_without_the_store_a_process_shows_itself(tmp_path: Path) -> None:
    async with box(tmp_path, "1", "2") as (group, stores, server):
        one = await group.process("1", stores[0])
        group.counted = {"1": 3, "2": 4}
        await server.kill()
        await is_down(stores[0])
        assert await group.page(one, "1") == {"c_total": 3, "runs": 1}


async def test_garbage_in_the_store_is_left_out(tmp_path: Path) -> None:
    async with box(tmp_path, "1") as (group, [store], _):
        one = await group.process("1")
        for name, text in {"a": b"x", "b": zlib.compress(b"{}"), "c": b""}.items():
            await store.call("HSET", "gollama:metrics:g", name, text)
        assert await group.page(one, "1") == {"c_total": 0, "runs": 1}
