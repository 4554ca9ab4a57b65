"""Limits of a minute and of running requests count what a subject uses at all hubs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Queue as Settings
from gollama_proxy.edge import quotas as module
from gollama_proxy.edge.quotas import LIFE, REFRESH, SECONDS, Quotas, SharedLimits
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority, Subject
from gollama_proxy.state.ledger import Ledger
from gollama_proxy.state.store import Store
from tests.fakes.clock import Clock
from tests.fakes.valkey import StoreServer, connected, running_store

MODEL = "tiny"


class Hub:
    """The parts of a hub that limit its subjects."""

    def __init__(self, store: Store, run: str, clock: Clock) -> None:
        self.store, self.freed = store, 0
        self.quotas = Quotas(clock, Ledger())
        self.admission = Admission(Settings(), clock)
        self.limits = SharedLimits(
            self.quotas,
            self.admission,
            self.free,
            prefix=store.prefix,
            run=run,
            clock=clock,
        )

    def free(self) -> None:
        self.freed += 1

    def take(self, subject: str = "alice", *, rpm: int = 5, times: int = 1) -> bool:
        """Make requests; return whether all of them are allowed."""
        found = [self.quotas.take(subject, rpm, None) for _ in range(times)]
        return all(each.allowed for each in found)

    def left(self, subject: str = "alice", rpm: int = 5) -> int:
        gauge = self.quotas.look(subject, rpm, None).requests
        assert gauge is not None
        return gauge.remaining

    def run(self, subject: str = "alice", limit: int = 2) -> Subject | None:
        return self.admission.admit(subject, MODEL, limit=limit)

    async def round(self, *, answered: bool = True) -> None:
        """Exchange rows; without an answer, the store has taken them all the same."""
        more = True
        while more:
            entries = await self.limits.entries()
            [reply] = await self.store.pipe([self.limits.journal.command(entries)])
            if not answered:
                return
            more = await self.limits.take(entries, self.limits.journal.read(reply))


async def rounds(*hubs: Hub) -> None:
    for hub in (*hubs, *hubs):
        await hub.round()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def server(tmp_path: Path, patient_hubs: None) -> AsyncIterator[StoreServer]:
    async with running_store(tmp_path) as server:
        yield server


@pytest.fixture
async def store(server: StoreServer) -> AsyncIterator[Store]:
    async with connected(server.url) as store:
        yield store


@pytest.fixture
def a(store: Store, clock: Clock) -> Hub:
    return Hub(store, "a", clock)


@pytest.fixture
def b(store: Store, clock: Clock) -> Hub:
    return Hub(store, "b", clock)


# --- Minutes ----------------------------------------------------------------------


async def test_requests_at_all_hubs_count(a: Hub, b: Hub, clock: Clock) -> None:
    assert a.take(times=3)
    await rounds(a, b)
    assert b.left() == 2
    assert b.take(times=2)
    assert not b.take()  # uses nothing
    await rounds(a, b)
    assert a.left() == 0
    assert not a.take()
    await rounds(a, b)
    clock.advance(SECONDS)
    assert a.left() == b.left() == 5


async def test_tokens_at_all_hubs_count(a: Hub, b: Hub) -> None:
    for hub in a, b:
        assert hub.quotas.take("alice", None, 100).allowed
    a.quotas.spend("alice", 60)
    await rounds(a, b)
    b.quotas.spend("alice", 40)
    await rounds(b, a)
    for hub in a, b:
        assert not hub.quotas.take("alice", None, 100).allowed


async def test_nothing_counts_twice(a: Hub, b: Hub) -> None:
    a.take()
    await a.round(answered=False)  # the answer is lost, and it is sent again
    await rounds(a, b, a, b)
    assert (a.left(), b.left()) == (4, 4)
    b.limits.journal.cursor = 0  # it reads everything again
    await rounds(a, b)
    assert (a.left(), b.left()) == (4, 4)


async def test_subjects_without_limits_are_not_shared(
    a: Hub, b: Hub, server: StoreServer
) -> None:
    a.quotas.take("alice", None, None)
    a.quotas.spend("alice", 7)
    a.run(limit=0)
    await rounds(a, b)
    assert await server.ask("HLEN", "gollama:limits") == 0


async def test_a_hub_that_starts_knows_the_last_minute(
    a: Hub, store: Store, clock: Clock
) -> None:
    for _ in range(4):
        a.take(rpm=1000, times=10)
        await a.round()
        clock.advance(40)
    late = Hub(store, "late", clock)
    await late.round()
    # The last row was written 40 s ago, and is of the minute before that.
    assert late.left(rpm=1000) == 1000 - 20


async def test_what_was_used_while_the_store_was_gone_is_of_the_last_minute(
    a: Hub, b: Hub, clock: Clock
) -> None:
    a.take(rpm=1000)
    await rounds(a, b)
    for hub in a, b:
        hub.limits.lose()
    for _ in range(20):
        a.take(rpm=1000, times=10)
        clock.advance(60)
        await a.limits.entries()  # which is not sent
    a.take(rpm=1000, times=10)
    await rounds(a, b)
    assert 1000 - 31 <= b.left(rpm=1000) <= 1000 - 10


async def test_a_subject_that_was_forgotten_begins_again(
    store: Store, b: Hub, clock: Clock
) -> None:
    a = Hub(store, "a", clock)
    a.take(times=3)
    await rounds(a, b)
    again = Hub(store, "a", clock)  # as after 10,000 others
    again.take(times=1)
    await rounds(again, b)
    assert b.left() == 1


# --- Requests that run --------------------------------------------------------------


async def test_running_requests_at_all_hubs_count(a: Hub, b: Hub) -> None:
    holders = [a.run(), a.run()]
    assert all(holders)
    await rounds(a, b)
    assert b.run() is None
    assert not b.admission.would_admit("alice", MODEL, Priority.INTERACTIVE, 2)
    assert b.run("bob") is not None
    assert b.run("alice", limit=0) is not None  # by a token without a limit
    waiting = b.admission.join("alice", MODEL, limit=2)
    assert b.admission.next([MODEL]) is None
    before = b.freed
    for holder in holders:
        assert holder is not None
        a.admission.release(holder)
    await rounds(a, b)
    assert b.freed > before
    assert b.admission.next([MODEL]) is waiting


async def test_a_hub_that_is_gone_runs_nothing(a: Hub, b: Hub) -> None:
    assert a.run()
    assert a.run()
    await rounds(a, b)
    assert b.run() is None
    b.limits.forget("a")
    assert b.run() is not None


async def test_without_the_store_each_hub_limits_by_itself(a: Hub, b: Hub) -> None:
    for _ in range(2):
        assert a.run()
    await rounds(a, b)
    assert b.run() is None
    b.limits.lose()
    assert b.run() is not None
    await rounds(a, b)
    assert a.admission.elsewhere == {"alice": 1}
    assert b.admission.elsewhere == {"alice": 2}


async def test_long_requests_are_written_again(a: Hub, b: Hub, clock: Clock) -> None:
    assert a.run()
    await rounds(a, b)
    for _ in range(5):
        clock.advance(REFRESH)
        await rounds(a, b)
        assert b.admission.elsewhere == {"alice": 1}
    clock.advance(LIFE)  # a hub whose end was missed
    await b.round()
    assert b.admission.elsewhere == {}


async def test_what_is_remembered_is_bounded(
    a: Hub, b: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WRITTEN", 50)
    for number in range(120):
        a.take(f"s{number}")
    await rounds(a, b)
    assert b.left("s119") == 4
    for part in (a.limits._mine, b.limits._others):
        assert isinstance(part, BoundedDict)
