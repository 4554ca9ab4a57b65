"""Files are read again when they change, and on request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from gollama_proxy.config import watch
from gollama_proxy.config.watch import Watcher
from tests.fakes.waiting import until


class Item:
    kind = "canaries"

    def __init__(self, error: Exception | None = None) -> None:
        self.looks: list[bool] = []
        self.threads: set[int] = set()
        self.applied_in: set[int] = set()
        self.error = error

    def __repr__(self) -> str:
        return "<Item>"

    def refresh(self, *, always: bool = False) -> Callable[[], None] | None:
        self.looks.append(always)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        return self._apply if always else None

    def _apply(self) -> None:
        self.applied_in.add(threading.get_ident())


async def looked(item: Item, times: int) -> None:
    await until(lambda: len(item.looks) >= times)


async def test_files_are_looked_at_periodically(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    watcher = Watcher([item := Item()])
    watcher.start()
    await looked(item, 3)
    await watcher.stop()
    assert not any(item.looks)


async def test_files_are_read_again_on_request() -> None:
    watcher = Watcher([item := Item()])
    assert repr(watcher) == "<Watcher items=1>"
    watcher.start()
    watcher.reload()
    await looked(item, 1)
    await watcher.stop()
    assert item.looks == [True]


async def test_files_are_read_in_a_thread_and_changes_made_on_the_loop() -> None:
    watcher = Watcher([item := Item()])
    watcher.start()
    watcher.reload()
    await until(lambda: bool(item.applied_in))
    await watcher.stop()
    assert item.applied_in == {threading.get_ident()}
    assert threading.get_ident() not in item.threads


async def test_an_item_that_fails_delays_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watcher = Watcher([Item(RuntimeError("canary")), item := Item()])
    watcher.start()
    for times in (1, 2):
        watcher.reload()
        await looked(item, times)
    await watcher.stop()
    assert "watch <Item> failed; it runs again in 1 s" in caplog.messages


async def test_without_files_nothing_runs() -> None:
    before = asyncio.all_tasks()
    watcher = Watcher([])
    watcher.start()
    watcher.reload()
    assert asyncio.all_tasks() == before
    await watcher.stop()


async def test_items_can_come_and_go_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    watcher = Watcher([])
    watcher.start()
    item = Item()
    for _ in range(2):
        watcher.add(item)  # twice is once
    await looked(item, 2)
    assert repr(watcher) == "<Watcher items=1>"
    for _ in range(2):
        await watcher.remove(item)
    assert repr(watcher) == "<Watcher items=0>"
    await watcher.stop()
