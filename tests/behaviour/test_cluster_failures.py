"""Hubs of a cluster that are killed, or whose clocks are wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from tests.fakes.agent import AgentProcess
from tests.fakes.crowd import CountingWorker, Crowd, acts_with, call, running_hubs
from tests.fakes.hub import mint
from tests.fakes.process import HubProcess
from tests.fakes.tools import require
from tests.fakes.valkey import running_store
from tests.fakes.waiting import DEADLINE, until

SLOTS = 4


def kill(hub: HubProcess) -> None:
    os.kill(hub.pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def crowded(
    crowd: Crowd, hub: HubProcess, questions: list[str]
) -> AsyncIterator[None]:
    """Have questions asked at a hub while the block runs, and until all have ended."""
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.ask_all([hub], questions), name="fake crowd")
        yield


# --- Dead hubs --------------------------------------------------------------------


async def test_the_slots_of_a_killed_hub_become_free(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker(SLOTS, gate := asyncio.Event()) as worker,
        running_hubs(2, worker.url, times="hasty", state__url=store.url) as hubs,
    ):
        one, other = hubs
        lost, kept = Crowd(), Crowd()
        async with crowded(lost, one, [f"lost {n}" for n in range(SLOTS)]):
            await until(lambda: worker.running == SLOTS, "all slots in use")
            async with crowded(kept, other, [f"kept {n}" for n in range(20)]):
                kill(one)
                await until(
                    lambda: len(worker.began) == 2 * SLOTS, "slots in use again"
                )
                gate.set()
        # Their clients see that the answers are not complete.
        assert all(each.startswith(("broken", "no answer")) for each in lost.outcomes)
        assert kept.outcomes == {"complete": 20}


async def test_an_agent_goes_on_with_the_other_hub(tmp_path: Path) -> None:
    settings = {"agents__lease": 2, "agents__networks": "10.0.0.0/8"}
    async with (
        running_store(tmp_path) as store,
        CountingWorker(SLOTS) as worker,
        running_hubs(2, ready=False, state__url=store.url, **settings) as hubs,
    ):
        urls = [f"http://127.0.0.1:{hub.port}" for hub in hubs]
        arguments = ["--worker", worker.url, "--name", "desk"]
        for url in urls:
            arguments += ["--hub", url]
        granted = mint(sub="desk", scope="worker")
        async with AgentProcess.serving(*arguments, token=granted) as agent:
            await agent.until(f"hub {urls[1]} stands by")
            crowd = Crowd()
            for hub in hubs:  # each has learnt of it
                await answered(crowd, hub)
            kill(hubs[0])
            await agent.until(f"hub {urls[1]}: registered .* as desk")
            await answered(crowd, hubs[1])
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0


async def answered(crowd: Crowd, hub: HubProcess) -> None:
    async with asyncio.timeout(DEADLINE):
        while await crowd.ask(hub, "alice 0") != "complete":
            await asyncio.sleep(0.05)


# --- Clocks -----------------------------------------------------------------------


def clock_off_by(seconds: int) -> dict[str, str]:
    """Return the environment of a program whose wall clock is wrong."""
    require("faketime", package="faketime")
    [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{seconds:+}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


async def test_hubs_whose_clocks_are_hours_apart_agree(tmp_path: Path) -> None:
    environs = [clock_off_by(3600), clock_off_by(-3600)]
    async with (
        running_store(tmp_path) as store,
        CountingWorker(SLOTS, 0.005) as worker,
        running_hubs(
            2, worker.url, environs=environs, times="patient", state__url=store.url
        ) as hubs,
    ):
        for hub in hubs:
            await acts_with(hub, 2)
        crowd = Crowd()
        await crowd.ask_all(hubs, [f"user-{n % 10} {n}" for n in range(100)])
        assert crowd.outcomes == {"complete": 100}
        assert worker.most <= SLOTS
        # What is done at one is in force at the other, whichever clock is ahead.
        name = worker.name
        for here, there in (hubs, hubs[::-1]):
            for action, hold in (("pause", "paused"), ("unpause", "none")):
                path = f"/admin/workers/{name}"
                assert (await call(here, "POST", f"{path}/{action}")).status == 200
                async with asyncio.timeout(DEADLINE):
                    while (await call(there, "GET", path)).json()["hold"] != hold:
                        await asyncio.sleep(0.02)
