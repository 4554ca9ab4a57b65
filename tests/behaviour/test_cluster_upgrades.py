"""Hubs of two releases share a store while they are upgraded one after the other.

A later release may send every message in another format.  What the hubs have to agree
on is exact all the same: the slots, and which hubs there are.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gollama_proxy.control import peers
from tests.behaviour.test_affinity import settings, turn
from tests.fakes.asks import CHAT
from tests.fakes.crowd import PATIENT, CountingWorker, Crowd, call
from tests.fakes.hub import running_hub
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.valkey import running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

TURNS = range(1, 7)


async def test_a_hub_of_a_later_release_in_the_same_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PATIENCE", 0.5)
    caplog.set_level(logging.INFO)
    async with running_store(tmp_path) as store, ScriptedWorker() as worker:
        common = settings(state__url=store.url, state__prefix="later")
        async with (
            running_hub(worker, **common) as hub,
            hub_process(worker.url, module="tests.fakes.newer", **common) as newer,
        ):
            cluster = hub.hub.cluster
            assert cluster is not None
            await until(lambda: cluster.members.count == 2)
            for number in TURNS:
                assert (await hub.post(CHAT, turn("x", number))).status == 200
                assert await served(newer, number) == 200
            await until(lambda: "in later:hints is ignored" in caplog.text)
            reply = await hub.get("/admin/workers", hub.token(scope="admin"))
            assert reply.status == 200
            (other,) = cluster.members.others.values()
            assert reply.json()["missing"] == [other.name]
    found = [text for text in caplog.messages if "later:hints is ignored" in text]
    assert len(found) == 1
    assert "its format has version 2, and this hub knows 1" in found[0]
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


async def known(hub: HubProcess) -> int:
    """Return how many hubs a hub knows, though they may not understand each other."""
    shown = (await call(hub, "GET", "/admin/hubs")).json()
    return len(shown["hubs"]) + len(shown.get("missing", ()))


async def served(hub: HubProcess, number: int) -> int:
    async with await hub.open(CHAT, turn("y", number)) as wire:
        return (await wire.read_response()).status


async def test_the_slots_of_a_worker_are_exact_over_releases(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, CountingWorker(2, 0.005) as worker:
        common = {**PATIENT, "state__url": store.url}
        async with (
            hub_process(worker.url, **common) as hub,
            hub_process(worker.url, module="tests.fakes.newer", **common) as newer,
        ):
            crowd = Crowd()
            for each in (hub, newer):
                while await known(each) < 2:
                    pass
            questions = [f"user-{number % 3} {number}" for number in range(40)]
            await crowd.ask_all([hub, newer], questions)
            assert crowd.outcomes == {"complete": 40}
            assert worker.most == 2
            for each in (hub, newer):
                assert not each.complaints
