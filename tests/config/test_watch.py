"""Files that are renewed are looked at again."""

from __future__ import annotations

import asyncio

import pytest

from gollama_proxy.config import watch as reload
from gollama_proxy.config.watch import Reloader
from tests.fakes.waiting import DEADLINE


class Item:
    def __init__(self, error: Exception | None = None) -> None:
        self.looks: list[bool] = []
        self.error = error

    def __repr__(self) -> str:
        return "<Item>"

    def refresh(self, *, always: bool = False) -> None:
        self.looks.append(always)
        if self.error is not None:
            raise self.error


async def looked(item: Item, times: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while len(item.looks) < times:
            await asyncio.sleep(0.005)


async def test_it_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "PERIOD", 0.01)
    reloader = Reloader([item := Item()])
    reloader.start()
    await looked(item, 3)
    await reloader.stop()
    assert not any(item.looks)


async def test_it_looks_when_it_is_asked_to() -> None:
    reloader = Reloader([item := Item()])
    assert repr(reloader) == "<Reloader of 1>"
    reloader.start()
    reloader.ask()
    await looked(item, 1)
    await reloader.stop()
    assert item.looks == [True]


async def test_one_that_fails_keeps_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reloader = Reloader([Item(RuntimeError("canary")), item := Item()])
    reloader.start()
    for times in (1, 2):
        reloader.ask()
        await looked(item, times)
    await reloader.stop()
    assert "<Item> could not be refreshed" in caplog.text


async def test_without_files_nothing_runs() -> None:
    before = asyncio.all_tasks()
    reloader = Reloader([])
    reloader.start()
    reloader.ask()
    assert asyncio.all_tasks() == before
    await reloader.stop()
