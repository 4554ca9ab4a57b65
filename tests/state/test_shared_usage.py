"""What all hubs have used is known at each of them, and no token is counted twice."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.state import shared
from gollama_proxy.state.ledger import DAY, UsageQuestion, day_of
from gollama_proxy.state.local import LocalState
from gollama_proxy.state.shared import SharedState
from tests.fakes.clock import Clock
from tests.fakes.valkey import (
    ENGINES,
    StoreServer,
    connected,
    is_down,
    is_up,
    running_store,
)
from tests.state.test_ledger import Ended

pytestmark = pytest.mark.usefixtures("patient_hubs")

TODAY = day_of("2026-11-29")
NOON = TODAY * DAY + DAY / 2


class Hub(SharedState):
    """The state of one hub, with what it uses."""

    def use(
        self, subject: str = "alice", tokens: int = 25, model: str = "tiny"
    ) -> None:
        self.local.ledger.add(Ended(subject, model, prompt_tokens=0, tokens=tokens))

    async def total(self, **question: Any) -> int:
        """Return the tokens that all hubs have used, as far as this one knows."""
        asked = {"by": ("day",), "first": TODAY - 100, "end": TODAY + 100} | question
        answer = await self.local.ledger.read(UsageQuestion(**asked))
        return int(answer.total["completion_tokens"])

    def spent(self, subject: str = "alice") -> tuple[int, int]:
        spent = self.local.ledger.spent(subject)
        return spent.today, spent.month


@contextlib.asynccontextmanager
async def hub(
    server: StoreServer, clock: Callable[[], float], folder: Path | None = None
) -> AsyncIterator[Hub]:
    local = await asyncio.to_thread(LocalState, folder, clock)
    try:
        async with connected(server.url) as store:
            yield Hub(local, store, secrets.token_hex(8), wall=clock)
    finally:
        await local.close()


async def rounds(*hubs: Hub) -> None:
    for each in (*hubs, *hubs):
        assert await each.round()


@pytest.mark.parametrize("engine", ENGINES)
async def test_each_hub_knows_what_all_have_used(tmp_path: Path, engine: str) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path, engine) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            a.use(tokens=1)
            b.use(tokens=2)
            b.use("bob \udc80 \n", tokens=4)  # a token may have any subject
            await rounds(a, b)
            for each in a, b:
                assert await each.total() == 7
                assert await each.total(subject="alice") == 3
                assert each.spent() == (3, 3)
            a.use(tokens=8)
            await rounds(a, b, a, b)
            assert await b.total() == 15
            assert b.spent() == (11, 11)
            async with hub(server, clock) as c:  # it starts later
                await c.round()
                assert await c.total() == 15
                assert c.spent() == (11, 11)
                c.use(tokens=16)
                await rounds(c, a)
                assert a.spent() == (27, 27)


async def test_days_and_months_are_those_of_all_hubs(tmp_path: Path) -> None:
    clock = Clock(NOON)  # two days before the end of November
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            for tokens in 1, 2, 4:
                a.use(tokens=tokens)
                b.use(tokens=10 * tokens)
                await rounds(a, b)
                clock.advance(DAY)
            for each in a, b:
                assert await each.total() == 77
                assert each.spent() == (0, 44)  # on the 2nd of December
            a.use(tokens=100)
            await rounds(a, b)
            assert a.spent() == b.spent() == (100, 144)


async def test_an_empty_store_is_filled_again(tmp_path: Path) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            a.use(tokens=1)
            clock.advance(3 * DAY)  # another month
            b.use(tokens=2)
            await rounds(a, b)
            await server.kill()
            for each in a, b:
                await is_down(each._store)
                assert not await each.round()
                each.use(tokens=4)
                assert await each.total() == 7
                gap = each.local.gap()
                assert gap is not None
                assert gap.hubs == []  # nothing is known of the members here
                assert gap.since == pytest.approx(clock(), abs=600)
            await server.start()
            for each in a, b:
                await is_up(each._store)
            await rounds(a, b)
            async with hub(server, clock) as c:
                assert c.local.gap() is not None
                await c.round()
                for each in a, b, c:
                    assert each.local.gap() is None
                    assert await each.total() == 11


async def test_what_others_have_used_is_kept(tmp_path: Path) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a:
            async with hub(server, clock, tmp_path / "b") as b:
                a.use(tokens=1)
                b.use(tokens=2)
                await rounds(a, b)
            await server.restart()
            async with hub(server, clock, tmp_path / "b") as b:
                assert b.spent() == (3, 3)
                assert await b.total() == 3
                b.use(tokens=4)
                await is_up(a._store)
                await rounds(a, b)
                assert await b.total() == 7  # counted once, after both restarts
                assert await a.total() == 7
                assert a.spent() == (7, 7)


async def test_a_ledger_that_was_deleted_is_another_one(tmp_path: Path) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a:
            async with hub(server, clock, tmp_path / "b") as b:
                b.use(tokens=1)
                await rounds(b, a)
            (tmp_path / "b" / "usage.db").unlink()
            async with hub(server, clock, tmp_path / "b") as b:
                await b.round()
                assert await b.total() == 1  # from the store
                b.use(tokens=2)
                await rounds(b, a)
            assert await a.total() == 3


async def test_many_rows_take_several_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "MOST_WRITTEN", 50)
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            for number in range(520):
                a.use(f"s{number}", tokens=1)
            await rounds(a, b)
            assert await b.total() == 520
            assert b.spent("s519") == (1, 1)


async def test_there_is_a_bound_for_a_month(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "MOST_TOTALS", 2)
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            for name in "abc":
                a.use(name, tokens=1)
            await rounds(a, b)
            assert await a.total() == 3
            assert await b.total() == 2
            assert "the store has 2 rows of usage in a month" in caplog.text


async def test_rows_that_are_malformed_are_left_out(tmp_path: Path) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            a.use(tokens=1)
            await rounds(a, b)
            key = "gollama:usage:2026-11"
            place = f'[{TODAY},"x","y"]'
            for number, (field, row) in enumerate(
                [
                    ("x {", "5 1"),
                    (f"x {place}", "5 1"),
                    (f"x {place} ", '5 {"v": 1, "sums": [1]}'),
                    ('x [1,"x","y"]', '5 {"v": 1, "sums": [1, 1, 1, 1, 1, 1]}'),
                    ("x " + place[:-1], '5 {"v": 1, "sums": [1, 1, 1, 1, 1, 1]}'),
                ]
            ):
                await server.ask("HSET", key, field, row)
                await server.ask("ZADD", f"{key}:order", 8e15 + number, field)
            await rounds(a, b)
            assert await a.total() == await b.total() == 1


async def test_a_disk_that_cannot_be_read_delays_usage(tmp_path: Path) -> None:
    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock, tmp_path / "b") as b:
            a.use(tokens=1)
            b.use(tokens=2)
            await rounds(a, b)
            database = b.local.ledger._database
            await database.run(lambda each: each.execute("DROP TABLE others"))
            a.use(tokens=4)
            b.use(tokens=8)
            await rounds(a, b)
            assert await a.total() == 15
            await database.run(b.local.ledger._load)
            await rounds(b)
            assert await b.total() == 15


async def test_a_ledger_that_cannot_be_read_sends_its_totals_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    clock = Clock(NOON)
    async with running_store(tmp_path) as server:
        async with hub(server, clock) as a, hub(server, clock) as b:
            await rounds(a, b)
            b.use(tokens=2)
            with monkeypatch.context() as broken:
                broken.setattr(b.local.ledger, "totals", fail)
                await rounds(b, a)
                assert await a.total() == 0
            await rounds(b, a)
            assert await a.total() == 2
