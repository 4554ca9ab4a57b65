"""Hubs with a common store learn from each other: each request may go to any of them.

The hubs are in this process, with real sockets and a real store between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.fleet import health
from gollama_proxy.fleet.breaker import Breaker, BreakerState
from gollama_proxy.fleet.worker import Worker
from tests.behaviour.test_affinity import SYSTEM, settings, teach, turn
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import MODEL
from tests.fakes.script import close
from tests.fakes.valkey import ENGINES, StoreServer, running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

NAMES = [f"client {number}" for number in range(6)]


@pytest.fixture(autouse=True)
def _no_sweep_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PERIOD", RARELY)


@contextlib.asynccontextmanager
async def hubs(
    store: StoreServer, workers: Sequence[Any], count: int = 2, **more: Any
) -> AsyncIterator[list[RunningHub]]:
    """Run hubs that have the same key for conversations."""
    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(
                running_hub(*workers, **settings(state__url=store.url, **more))
            )
            for _ in range(count)
        ]
        await until(lambda: len({key_of(hub) for hub in made}) == 1 and key_of(made[0]))
        yield made


def key_of(hub: RunningHub) -> bytes:
    return hub.hub.balancer.key


def memory(hub: RunningHub) -> str:
    """Return what the routing policy knows of conversations."""
    return repr(hub.hub.balancer.policy)


def breaker_of(hub: RunningHub, worker: ScriptedWorker) -> Breaker:
    return worker_of(hub, worker).breaker


def worker_of(hub: RunningHub, worker: ScriptedWorker) -> Worker:
    return hub.hub.registry.find(worker.name)


def served(worker: ScriptedWorker) -> set[str]:
    """Return the names of the clients whose turns a worker has answered."""
    return {
        each.json()["messages"][-1]["content"].split(" asks")[0]
        for each in worker.requests
    }


# --- Conversations ----------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_turn_that_lands_on_another_hub_goes_to_the_worker_of_the_last_one(
    tmp_path: Path, engine: str
) -> None:
    async with (
        running_store(tmp_path, engine) as store,
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker() as three,
        hubs(store, (one, two, three), 3) as made,
    ):
        for number in (1, 2, 3, 4):
            at = made[number % 3]
            for name in NAMES:
                assert (await at.post(CHAT, turn(name, number))).status == 200
            known = f"Memory of {number * len(NAMES)} "
            await until(lambda: all(known in memory(hub) for hub in made))  # noqa: B023
        each = [served(worker) for worker in (one, two, three)]
        assert all(each)
        assert sorted(name for names in each for name in names) == NAMES


async def test_a_hub_that_is_restarted_knows_the_conversations_of_before(
    tmp_path: Path,
) -> None:
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as one,
        ScriptedWorker() as two,
    ):
        for number in (1, 2, 3):
            async with hubs(store, (one, two), 1) as (hub,):
                known = f"Memory of {(number - 1) * len(NAMES)} "
                await until(lambda: known in memory(hub))  # noqa: B023
                for name in NAMES:
                    assert (await hub.post(CHAT, turn(name, number))).status == 200
        assert sorted([*served(one), *served(two)]) == NAMES


async def test_other_subjects_do_not_meet_on_another_hub_either(
    tmp_path: Path,
) -> None:
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        hubs(store, (one, two)) as (here, there),
    ):
        await here.post(CHAT, turn("x", 1), here.token("alice"))
        await until(lambda: "Memory of 1 " in memory(there))
        await there.post(CHAT, turn("x", 2), there.token("bob"))
        assert "Memory of 3 " in memory(there)


# --- Breakers ---------------------------------------------------------------------


async def test_a_worker_that_fails_on_one_hub_proves_itself_on_the_others(
    tmp_path: Path,
) -> None:
    clock = Clock()
    more = {"breaker__consecutive": 2, "clock": clock, "routing__policy": "round_robin"}
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as good,
        ScriptedWorker() as bad,
        hubs(store, (good, bad), **more) as (here, there),
    ):
        bad.default(close())
        for _ in range(4):
            assert (await here.post(CHAT, STREAM)).status == 200
        assert breaker_of(here, bad).state is BreakerState.OPEN
        seen = breaker_of(there, bad)
        await until(lambda: seen.state is BreakerState.HALF_OPEN)
        assert breaker_of(there, good).closed
        bad.repair()
        before = len(bad.requests)
        for _ in range(4):  # no request of a client is the proof
            assert (await there.post(CHAT, STREAM)).status == 200
        assert len(bad.requests) == before
        for _ in range(2):
            there.hub.watchdog.round()
            await until(lambda: "canaries=0" in repr(there.hub.watchdog))
        assert seen.closed
        assert breaker_of(here, bad).state is BreakerState.OPEN  # by its own verdict


async def test_a_hub_to_which_all_workers_fail_takes_none_from_the_others(
    tmp_path: Path,
) -> None:
    more = {"breaker__consecutive": 2, "routing__policy": "round_robin"}
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        hubs(store, (one, two), **more) as (here, there),
    ):
        one.default(close())
        two.default(close())
        for _ in range(3):
            await here.post(CHAT, STREAM)
        workers = (one, two)
        assert not any(breaker_of(here, each).closed for each in workers)
        teach(worker_of(here, one), reads=7)  # it is reported after the breakers
        speed = worker_of(there, one).pace_of(MODEL).speed
        await until(lambda: speed.reads == 7)
        one.repair()
        two.repair()
        for _ in range(4):
            assert (await there.post(CHAT, STREAM)).status == 200
        assert all(breaker_of(there, each).generation == 0 for each in workers)


# --- Speeds -----------------------------------------------------------------------


async def test_a_hub_that_starts_later_knows_how_fast_the_workers_are(
    tmp_path: Path,
) -> None:
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as worker,
        ScriptedWorker() as other,
    ):
        async with hubs(store, (worker, other), 1) as (here,):
            teach(worker_of(here, worker), reads=700)
        async with hubs(store, (worker, other), 1) as (late,):
            speed = worker_of(late, worker).pace_of(MODEL).speed
            await until(lambda: speed.reads == 700)
            assert (await late.post(CHAT, turn("late", 1))).status == 200


# --- Real servers -----------------------------------------------------------------


@pytest.mark.real
async def test_real_servers_find_each_turn_in_their_cache_whichever_hub_has_it(
    tiny_model: Path, llama_server: Callable[..., LlamaServer], tmp_path: Path
) -> None:
    """What the servers themselves count; each has a slot for each conversation."""
    servers = [llama_server(tiny_model, slots=4) for _ in range(2)]
    async with running_store(tmp_path) as store, hubs(store, servers) as made:
        shares: list[float] = []
        turns = 0
        for name in ("a", "b", "c", "d"):
            messages: list[dict[str, Any]] = [SYSTEM]
            for number in (1, 2, 3):
                asks = f"{name} asks {number} " + f"{name}{number} " * 40
                messages.append({"role": "user", "content": asks})
                body = {"messages": messages, "max_tokens": 8, "temperature": 0}
                reply = (await made[number % 2].post(CHAT, body)).json()
                messages.append(reply["choices"][0]["message"])
                turns += 1
                known = f"Memory of {turns} "
                await until(lambda: all(known in memory(h) for h in made))  # noqa: B023
                if number > 1:
                    timings = reply["timings"]
                    total = timings["cache_n"] + timings["prompt_n"]
                    new = len(asks) / sum(len(m["content"]) for m in messages[:-1])
                    shares.append(timings["cache_n"] / total / (1 - new))
        assert sum(shares) / len(shares) > 0.9
        # And not because all went to one.
        assert all(each.paces for each in made[0].hub.registry.workers)
