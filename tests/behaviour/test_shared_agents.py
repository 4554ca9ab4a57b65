"""An agent may call any hub of a store: its worker is that of all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from gollama_proxy.fleet.agents import GRACE
from gollama_proxy.state.shared import SharedState
from gollama_proxy.state.store import Store
from tests.behaviour.test_shared_fleet import everywhere, hubs, worker_of
from tests.fakes.agent import HandAgent
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub
from tests.fakes.valkey import ENGINES, is_down, running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

LEASE = 30.0


def expires(hub: RunningHub) -> float:
    lease = hub.hub.agents.find("desk")
    assert lease is not None
    return lease.expires


def state_of(hub: RunningHub) -> SharedState:
    assert hub.hub.cluster is not None
    return hub.hub.cluster.shared


def store_of(hub: RunningHub) -> Store:
    assert hub.hub.cluster is not None
    return hub.hub.cluster.store


def passes(hub: RunningHub, seconds: float) -> None:
    """Let time pass at all hubs, which share a clock, and expire leases at this one."""
    hub.advance(seconds)
    hub.hub.watchdog.round()


async def heard(hub: RunningHub, until_at_least: float) -> None:
    await until(lambda: expires(hub) >= until_at_least, "the other hub knows of it")


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_agent_registers_at_any_hub(tmp_path: Path, engine: str) -> None:
    async with running_store(tmp_path, engine) as server, ScriptedWorker() as worker:
        async with hubs(server, count=3) as running:
            a, b, _ = running
            async with HandAgent(a, worker.url).answering() as agent:
                assert (await agent.put()).status == 201
                await everywhere(running, "desk", lambda w: w is not None and w.admits)
                for hub in running:
                    answer = await hub.post(CHAT, {"messages": []})
                    assert answer.header("X-Gollama-Worker") == "desk"
                agent.hub = b
                assert (await agent.put()).status == 200  # without another proof
                assert agent.proofs == 1
                assert (await agent.delete()).status == 200
            await everywhere(running, "desk", lambda w: w is None)
            assert a.hub.agents.find("desk") is None


async def test_a_lease_that_is_renewed_elsewhere_lasts(tmp_path: Path) -> None:
    clock = Clock()
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, clock=clock) as [a, b]:
            async with HandAgent(a, worker.url).answering() as agent:
                await agent.put(report={"hub_version": "1"})
                await until(lambda: b.hub.agents.find("desk") is not None)
                for hub in b, a, b, b:  # it switches now and then
                    agent.hub = hub
                    clock.advance(LEASE - 1)
                    begun = clock()
                    await agent.put()
                    for each in a, b:
                        # Its age is that of the store's clock, which goes on.  The
                        # renewal before it lasts for 6 s more at most.
                        await heard(each, begun + 7)
                        each.hub.watchdog.round()
                        assert worker_of(each, "desk") is not None
            passes(b, LEASE + 0.5)  # the hub that it has called last ends it
            await everywhere([a, b], "desk", lambda w: w is None)


async def test_the_lease_of_a_hub_that_is_gone_ends_at_another_one(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, count=1, clock=clock) as [a]:
            async with hubs(server, count=1, clock=clock) as [b]:
                async with HandAgent(b, worker.url).answering() as agent:
                    await agent.put()
                await until(lambda: a.hub.agents.find("desk") is not None)
                await heard(a, clock() + LEASE)
            passes(a, LEASE + GRACE + 1)
            await everywhere([a], "desk", lambda w: w is None)
            await until(lambda: a.hub.state.find("desk") is None)


async def test_without_the_store_no_lease_ends(tmp_path: Path) -> None:
    clock = Clock()
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, clock=clock) as [a, b]:
            async with HandAgent(a, worker.url).answering() as agent:
                await agent.put()
                await everywhere([b], "desk", lambda w: w is not None)
                await server.kill()
                for hub in a, b:
                    await is_down(store_of(hub))
                    assert not await state_of(hub).round()
                clock.advance(LEASE)  # the agent calls another hub, or none
                for hub in a, b:
                    hub.hub.watchdog.round()
                    assert worker_of(hub, "desk") is not None
                await server.start()
                for hub in a, b:
                    await until(partial(getattr, state_of(hub), "caught_up"))
                assert (await agent.put()).status == 200
            passes(a, LEASE + GRACE + 1)
            await everywhere([a, b], "desk", lambda w: w is None)
