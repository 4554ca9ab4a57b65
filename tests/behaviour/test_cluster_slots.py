"""Hubs that share a store never fill a worker beyond its slots, and lose no request.

Real hub processes and real stores; the worker counts what it gets at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from gollama_proxy.state.slots import LIFETIME
from tests.fakes.crowd import (
    CountingWorker,
    Crowd,
    HasPort,
    acts_with,
    end_caution,
    running_hubs,
    waiting_at,
)
from tests.fakes.hub import running_hub
from tests.fakes.process import HubProcess
from tests.fakes.valkey import Partition, StoreServer, running_store
from tests.fakes.waiting import until

# One store and two hubs for most of the stories.
pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS, CLIENTS = 4, 120
PACE = 0.005  # seconds of an answer


class Site(NamedTuple):
    """Two hubs, the second of which reaches the store through a network."""

    worker: CountingWorker
    hubs: list[HubProcess]
    store: StoreServer
    network: Partition


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole_site(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    async with (
        running_store(folder) as store,
        Partition(store.socket, folder / "net.sock") as network,
        CountingWorker(SLOTS) as worker,
    ):
        urls = [{"GOLLAMA_STATE_URL": url} for url in (store.url, network.url)]
        async with running_hubs(2, worker.url, environs=urls) as hubs:
            yield Site(worker, hubs, store, network)


@pytest_asyncio.fixture(loop_scope="module")
async def site(whole_site: Site) -> Site:
    """Return the site as in the beginning, with both hubs at the store."""
    worker = whole_site.worker
    worker.began, worker.most, worker.pace = [], 0, PACE
    for hub in whole_site.hubs:
        await acts_with(hub, 2)
    return whole_site


def allowed(began: float) -> int:
    """Return how many requests a worker may have had at once since this time.

    Once the leases of a hub that is cut off from the store have ended, others may use
    those slots, and it has its part.  On a slow machine, any hub may be cut off.
    """
    lasting = time.monotonic() - began > LIFETIME
    return SLOTS + SLOTS // 2 if lasting else SLOTS


def questions(count: int, subjects: int = 10) -> list[str]:
    return [f"user-{n % subjects} {n}" for n in range(count)]


# --- Slots ------------------------------------------------------------------------


async def test_four_hubs_never_give_a_worker_more_than_it_has_slots(
    tmp_path: Path,
) -> None:
    async with (
        running_store(tmp_path, "redis") as store,
        CountingWorker(SLOTS, PACE) as worker,
        running_hubs(4, worker.url, times="patient", state__url=store.url) as hubs,
    ):
        crowd, asked = Crowd(), questions(CLIENTS)
        await crowd.ask_all(hubs, asked)
        assert crowd.outcomes == {"complete": CLIENTS}
        assert sorted(worker.began) == sorted(asked)  # each was asked once
        assert worker.most <= SLOTS


async def test_two_hubs_use_all_slots_and_no_more(site: Site) -> None:
    worker, crowd, asked = site.worker, Crowd(), questions(CLIENTS)
    began = time.monotonic()
    worker.pace = gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.ask_all(site.hubs, asked), name="fake crowd")
        await until(lambda: worker.running == SLOTS, "all slots in use")
        await all_waiting(site.hubs, CLIENTS - SLOTS)
        leases = await leases_in(site.store)
        assert 1 <= len(leases) <= SLOTS
        # With a heartbeat of another hub, a dead hub's slots are free within 10 s.
        assert max(leases.values()) <= LIFETIME <= 8
        worker.pace = PACE
        gate.set()
    assert crowd.outcomes == {"complete": CLIENTS}
    assert sorted(worker.began) == sorted(asked)
    assert SLOTS <= worker.most <= allowed(began)


async def leases_in(store: StoreServer) -> dict[str, float]:
    """Return the leases of all hubs, with the seconds that each has left."""
    [key] = await store.ask("KEYS", "gollama:slots:leases:*")
    flat = await store.ask("ZRANGE", key, 0, -1, "WITHSCORES")
    seconds, micros = await store.ask("TIME")
    now = int(seconds) + int(micros) / 1e6
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {lease.decode(): float(end) / 1000 - now for lease, end in pairs}


async def all_waiting(hubs: Sequence[HasPort], count: int) -> None:
    """Wait until so many requests wait at all hubs together."""
    while sum([await waiting_at(hub) for hub in hubs]) != count:
        await asyncio.sleep(0.01)


async def test_turns_are_fair_over_both_hubs(tmp_path: Path) -> None:
    """One subject has many requests at both hubs; two others come later, at one each.

    The hubs run in this process, where the store may take as long as it likes.
    """
    many = [f"greedy {n}" for n in range(80)]
    few = [f"{name} {n}" for n in range(15) for name in ("left", "right")]
    crowd, gate = Crowd(), asyncio.Semaphore(0)
    async with (
        running_store(tmp_path) as store,
        CountingWorker(SLOTS, gate) as worker,
        running_hub(worker, state__url=store.url) as one,
        running_hub(worker, state__url=store.url) as other,
        asyncio.TaskGroup() as group,
    ):
        hubs = [one, other]
        await end_caution(store)
        group.create_task(crowd.ask_all(hubs, many), name="fake crowd")
        await until(lambda: worker.running == SLOTS, "all slots in use")
        await all_waiting(hubs, len(many) - SLOTS)
        group.create_task(crowd.ask_all(hubs, few), name="fake crowd")
        await all_waiting(hubs, len(many) + len(few) - SLOTS)
        for turn in range(SLOTS, len(many) + len(few)):
            gate.release()
            await until(lambda n=turn: len(worker.began) > n)  # type: ignore[misc]
        for _ in range(SLOTS):
            gate.release()
    assert crowd.outcomes == {"complete": len(many) + len(few)}
    turns = [question.partition(" ")[0] for question in worker.began[SLOTS:]]
    # A third each, but for turns that were promised before the others came.
    for name in ("left", "right"):
        assert turns[:45].count(name) >= 13, turns


# --- The store fails --------------------------------------------------------------


@contextlib.asynccontextmanager
async def crowded(site: Site) -> AsyncIterator[CountingWorker]:
    """Ask from all clients; what is done inside happens after a part was served.

    No request may be lost, or be on the worker beyond its slots.
    """
    worker, crowd = site.worker, Crowd()
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        asking = crowd.ask_all(site.hubs, questions(CLIENTS))
        group.create_task(asking, name="fake crowd")
        await until(lambda: len(worker.began) >= 40)
        yield worker
    assert crowd.outcomes == {"complete": CLIENTS}
    assert worker.most <= allowed(began)


async def test_a_store_that_is_killed_and_comes_back_empty(site: Site) -> None:
    async with crowded(site) as worker:
        await site.store.kill()
        await until(lambda: len(worker.began) >= 80)
        await site.store.start()
    assert sorted(worker.began) == sorted(questions(CLIENTS))


async def test_a_store_that_restarts_empty_at_once(site: Site) -> None:
    async with crowded(site):
        await site.store.restart()


async def test_a_store_that_is_paused(site: Site) -> None:
    async with crowded(site) as worker:
        site.store.pause()
        try:
            await until(lambda: len(worker.began) >= 80)
        finally:
            site.store.go_on()


async def test_a_hub_that_is_cut_off_from_the_store(site: Site) -> None:
    async with crowded(site) as worker:
        site.network.drop()
        try:
            await until(lambda: len(worker.began) >= 80)
        finally:
            site.network.heal()
            site.network.cut()
