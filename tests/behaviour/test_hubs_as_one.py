"""Any hub answers operators for all hubs that share a store with it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.cluster import Cluster
from gollama_proxy.control import events
from tests.control.test_admin import (
    CALM,
    begun,
    call,
    complete,
    endless,
    error_of,
    get,
)
from tests.control.test_events import Listener, listening
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Wire
from tests.fakes.hub import HasUrl, RunningHub, running_hub
from tests.fakes.valkey import StoreServer, is_down, running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


@contextlib.asynccontextmanager
async def two_hubs(
    server: StoreServer, *workers: HasUrl, **settings: Any
) -> AsyncIterator[tuple[RunningHub, RunningHub]]:
    """Run two hubs that know each other."""
    settings = {"state__url": server.url, **CALM, **settings}
    async with (
        running_hub(*workers, **settings) as one,
        running_hub(*workers, **settings) as two,
    ):
        for hub in (one, two):
            assert hub.hub.cluster is not None
            await until(partial(_knows_another, hub.hub.cluster))
        yield one, two


def _knows_another(cluster: Cluster) -> bool:
    return any(each.url for each in cluster.members.others.values())


def name_of(hub: RunningHub) -> str:
    """Return the name of a hub."""
    assert hub.hub.peers is not None
    return hub.hub.peers.name


@contextlib.asynccontextmanager
async def running(hub: RunningHub, identity: str) -> AsyncIterator[Wire]:
    """Have an answer that runs on a hub."""
    headers = [("X-Request-Id", identity)]
    async with await hub.open(CHAT, STREAM, hub.token("bob"), headers=headers) as wire:
        await begun(wire)
        yield wire


async def test_any_hub_shows_the_requests_of_all(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker(slots=4) as worker,
        two_hubs(server, worker) as (one, two),
    ):
        endless(worker)
        async with running(one, "first"), running(two, "second"):
            for hub in (one, two):
                answer = (await get(hub, "/admin/exchanges")).json()
                found = {each["id"]: each["hub"] for each in answer["exchanges"]}
                assert found == {"first": name_of(one), "second": name_of(two)}
                [shown] = (await get(hub, "/admin/workers")).json()["workers"]
                assert shown["running"] == 2
                used = {each["hub"]: each["running"] for each in shown["hubs"]}
                assert used == {name_of(one): 1, name_of(two): 1}
            hubs = (await get(two, "/admin/hubs")).json()
            assert hubs["store"] == {"mode": "up", "reason": ""}
            assert {each["hub"] for each in hubs["hubs"]} == {
                name_of(one),
                name_of(two),
            }


async def test_any_hub_cancels_a_request_of_another(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker(slots=4) as worker,
        two_hubs(server, worker) as (one, two),
    ):
        endless(worker)
        async with running(two, "mine") as wire:
            answer = await call(one, "DELETE", "/admin/exchanges/mine")
            assert answer.json() == {"id": "mine", "state": "cancelled"}
            assert b"request_cancelled" in (await wire.read_to_end()).raw
        await until(lambda: two.hub.recent.count)
        [ended] = (await get(one, "/admin/requests?id=mine")).json()["requests"]
        assert (ended["hub"], ended["error"]) == (name_of(two), "request_cancelled")
        answer = await call(one, "DELETE", "/admin/exchanges/mine")
        assert error_of(answer, 404)[0] == "not_found"


async def test_without_the_store_the_others_are_named(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker() as worker,
        two_hubs(server, worker) as (one, two),
    ):
        await server.kill()
        assert one.hub.cluster is not None
        await is_down(one.hub.cluster.store)
        answer = (await get(one, "/admin/workers")).json()
        assert answer["missing"] == [name_of(two)]
        assert len(answer["workers"]) == 1
        hubs = (await get(one, "/admin/hubs")).json()
        assert hubs["store"]["mode"] != "up"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have samples taken more often."""
    monkeypatch.setattr(events, "EVERY", 0.05)


@pytest.mark.usefixtures("quick")
async def test_events_of_all_hubs_are_followed_at_one(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker(slots=4) as worker,
        two_hubs(server, worker) as (one, two),
        listening(one) as listener,
    ):
        endless(worker)
        await until(lambda: two.hub.events.active)
        async with running(two, "mine"):
            _, data = await listener.next("exchange")
            assert (data["id"], data["hub"]) == ("mine", name_of(two))
            sample = await sample_of(listener, 1)
            assert sample["store"]["mode"] == "up"
            used = {each["hub"]: each["running"] for each in sample["hubs"]}
            assert used == {name_of(one): 0, name_of(two): 1}
        sample = await sample_of(listener, 0)
        assert sample["running"] == 0


async def sample_of(listener: Listener, running: int) -> Any:
    """Wait for a sample in which so many requests run on the worker."""
    while True:
        _, data = await listener.next("sample")
        for each in data["workers"]:
            if each["running"] == running == data["running"]:
                return data


@pytest.mark.usefixtures("quick")
async def test_other_hubs_send_nothing_when_no_one_listens(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker() as worker,
        two_hubs(server, worker) as (one, two),
    ):
        assert not two.hub.events.active
        async with listening(one):
            await until(lambda: two.hub.proxy.observer is not None)
        await until(lambda: not one.hub.events.active)


async def test_the_keys_in_the_store_are_documented(tmp_path: Path) -> None:
    """After a request, a link, a change of a worker and a scrape."""
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    _, _, section = page.partition("## Keys and channels")
    columns = re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE)
    names = re.findall(r"`(.+?)`", " ".join(columns))
    # The key of a worker begins with a machine and a space where it is a loopback one.
    patterns = "|".join(re.sub("[A-Z]+(-[A-Z]+)?", "([^ ]+ )?[^ ]+", n) for n in names)
    known = re.compile(f"gollama:({patterns})(:order|:mortal|:life)?")
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker() as worker,
        two_hubs(server, worker) as (one, two),
    ):
        worker.default(*complete())
        for hub in (one, two):
            assert (await hub.post(CHAT, STREAM)).status == 200
        await call(one, "POST", "/admin/links")
        [shown] = (await get(two, "/admin/workers")).json()["workers"]
        await call(two, "POST", f"/admin/workers/{shown['name']}/pause")
        keys = {key.decode() for key in await server.ask("KEYS", "*")}
        assert {"gollama:hubs", "gollama:epoch"} <= keys
        assert [key for key in keys if not known.fullmatch(key)] == []
