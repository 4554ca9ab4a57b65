"""The parts that a hub shares with others, from its start to its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.values import ConfigError
from gollama_proxy.state.store import Mode
from tests.fakes.agent import HandAgent
from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.hub import running_hub
from tests.fakes.page import parse
from tests.fakes.process import hub_process
from tests.fakes.valkey import ENGINES, StoreServer, is_down, is_up, running_store
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker


@pytest.mark.parametrize("engine", ENGINES)
async def test_two_hub_processes_see_each_other(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server, ScriptedWorker() as worker:
        settings = {"state__url": server.url}
        async with (
            hub_process(worker.url, **settings) as one,
            hub_process(worker.url, **settings) as other,
        ):
            expected = {hub.pid: f"http://127.0.0.1:{hub.port}" for hub in (one, other)}
            # A busy machine may answer late, and the next heartbeat repeats it.
            await eventually(lambda: registered(server), expected)
        await eventually(lambda: server.ask("KEYS", "gollama:hub:*"), [])


async def registered(server: StoreServer) -> dict[int, str]:
    """Return the hubs in a store, as the URLs of their processes."""
    runs = await server.ask("ZRANGE", "gollama:hubs", 0, -1)
    keys = [f"gollama:hub:{run.decode()}" for run in runs]
    about = [
        json.loads(text) for text in await server.ask("MGET", "none", *keys) if text
    ]
    return {row["pid"]: row["url"] for row in about}


async def eventually(ask: Callable[[], Awaitable[Any]], expected: Any) -> None:
    """Ask until the answer is as expected."""
    async with asyncio.timeout(DEADLINE):
        while await ask() != expected:
            await asyncio.sleep(0.02)


async def test_two_hubs_in_one_process(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        settings = {"state__url": server.url}
        async with running_hub(worker, **settings) as a:
            async with running_hub(worker, **settings) as b:
                one, other = a.hub.cluster, b.hub.cluster
                assert one is not None
                assert other is not None
                mine = one.members.me
                await until(lambda: other.members.others == {mine.run: mine})
                await until(lambda: one.members.count == 2)


async def test_hubs_have_one_identity_for_agents(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        settings = {"state__url": server.url}
        async with running_hub(**settings) as one, running_hub(**settings) as other:
            answers = []
            for hub in (one, other):
                async with HandAgent(hub, worker.url).answering() as agent:
                    answers.append((await agent.put()).json()["cluster"])
                    cluster = hub.hub.cluster
                    assert cluster is not None
            assert answers[0] == answers[1] != ""
            await server.kill()
            await is_down(cluster.store)
            async with HandAgent(other, worker.url).answering() as agent:
                assert "cluster" not in (await agent.put()).json()


async def test_the_metrics_show_the_store(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server:
        settings = {"state__url": server.url, "metrics__open": True}
        async with running_hub(**settings) as hub:
            store = hub.hub.cluster.store if hub.hub.cluster else None
            assert store is not None

            async def metric(name: str, **labels: str) -> float:
                page = parse((await hub.get("/metrics")).body)
                return page[name, frozenset(labels.items())]

            assert await metric("gollama_hubs") == 1
            assert await metric("gollama_store_mode", mode="up") == 1
            assert await metric("gollama_store_mode", mode="down") == 0
            before = await metric("gollama_store_operations_total")
            for _ in range(100):
                await store.call("PING")
            assert await metric("gollama_store_operations_total") >= before + 100
            assert await metric("gollama_store_seconds_count") >= 100
            assert await metric("gollama_store_failures_total") == 0
            await server.kill()
            await until(lambda: store.mode is Mode.DOWN)
            assert await metric("gollama_store_outages_total") == 1
            assert await metric("gollama_store_mode", mode="up") == 0


async def test_a_hub_starts_without_its_store_and_uses_it_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedWorker() as worker:
        settings = {"state__url": f"unix://{tmp_path}/store.sock"}
        async with running_hub(worker, **settings) as hub:
            assert "the store cannot be reached: No such file" in caplog.text
            cluster = hub.hub.cluster
            assert cluster is not None
            async with running_store(tmp_path):
                await is_up(cluster.store)
                async with running_hub(worker, **settings) as other:
                    await until(lambda: cluster.members.count == 2)
                    for each in (hub, other):
                        assert (await each.post(CHAT, WHOLE)).status == 200
            await is_down(cluster.store)
            assert (await hub.post(CHAT, WHOLE)).status == 200


async def test_a_store_that_can_never_be_used_ends_the_start(tmp_path: Path) -> None:
    async with running_store(tmp_path, "valkey", "--requirepass", "x") as server:
        expected = "^state.url = '.*': it requires a password, and state.url has none$"
        with pytest.raises(ConfigError, match=expected):
            async with running_hub(state__url=server.plain_url):
                pass


async def test_a_hub_without_a_store_has_no_cluster() -> None:
    async with running_hub() as hub:
        assert hub.hub.cluster is None
