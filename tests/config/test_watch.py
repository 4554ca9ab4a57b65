"""Files are read again when they change, and on request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config import watch
from gollama_proxy.config.settings import (
    Config,
    Origin,
    Queue,
    Server,
    State,
    WorkerConfig,
)
from gollama_proxy.config.watch import SettingsFile, Watcher, compare_configs
from tests.fakes.waiting import until


class Item:
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
    await watcher.reload()
    await watcher.stop()
    assert item.looks == [True]


async def test_files_are_read_in_a_thread_and_changes_made_on_the_loop() -> None:
    watcher = Watcher([item := Item()])
    watcher.start()
    await watcher.reload()
    await watcher.stop()
    assert item.applied_in == {threading.get_ident()}
    assert threading.get_ident() not in item.threads


async def test_an_item_that_fails_delays_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watcher = Watcher([Item(RuntimeError("canary")), item := Item()])
    watcher.start()
    for times in (1, 2):
        await watcher.reload()
        assert len(item.looks) == times
    await watcher.stop()
    assert "watch <Item> failed; it runs again in 1 s" in caplog.messages


async def test_without_files_nothing_runs() -> None:
    before = asyncio.all_tasks()
    watcher = Watcher([])
    watcher.start()
    await watcher.reload()
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


async def test_a_reload_does_not_wait_for_an_item_that_is_removed() -> None:
    watcher = Watcher([item := Item()])
    watcher.start()
    reading = asyncio.create_task(watcher.reload())
    await asyncio.sleep(0)
    await watcher.remove(item)
    await reading
    await watcher.stop()


async def test_a_watcher_that_has_not_started_reads_nothing() -> None:
    watcher = Watcher([item := Item()])
    await watcher.reload()
    assert item.looks == []


# --- The settings file ------------------------------------------------------------


def test_a_file_counts_as_changed_when_it_looks_the_same_twice(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("")
    changes: list[str] = []
    now = file.stat().st_ctime_ns + 1
    watched = SettingsFile(str(file), lambda: changes.append("changed"), now)

    def check() -> bool:
        return watched.refresh() is not None

    assert repr(watched) == f"<SettingsFile {file}>"
    assert not check()
    file.write_text("a")
    assert not check()
    file.write_text("ab")
    assert not check()
    assert check()
    assert not check()
    file.write_text("abc")
    watched.note()  # it is being read
    assert not check()
    file.unlink()
    assert [check(), check()] == [False, False]  # what is lost changes nothing
    file.write_text("abcd")
    assert [check(), check(), check()] == [False, True, False]


def test_a_file_that_changes_right_after_it_was_read_is_read_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("a")
    watched = SettingsFile(str(file), print, file.stat().st_ctime_ns - 1)
    assert [watched.refresh(), watched.refresh()] == [None, print]


# --- Two configurations -----------------------------------------------------------


def test_the_difference_of_two_configurations_is_in_one_line() -> None:
    old = Config(workers=(worker(1), worker(2), worker(3)), secrets=(b"old",))
    new = replace(
        old,
        queue=Queue(size=7, timeout=1.0),
        server=Server(port=9, host="::1", drain=1.0),
        state=State(dir="/tmp/x"),  # noqa: S108
        secrets=(b"canary",),
        workers=(worker(1), worker(2, weight=2.0), worker(4)),
    )
    changes, merged = compare_configs(old, new)
    assert str(changes) == (
        "server.drain 30.0 -> 1.0, queue.size 256 -> 7, queue.timeout 300.0 -> 1.0, "
        "auth.secrets has changed; workers added: w4; workers replaced: w2; "
        "workers removed: w3; needs a restart: server.host '127.0.0.1' -> '::1', "
        "server.port 8000 -> 9, state.dir 'auto' -> '/tmp/x'"
    )
    assert merged == replace(new, server=Server(drain=1.0), state=State())
    assert "canary" not in repr(changes)
    assert str(compare_configs(merged, merged)[0]) == "nothing has changed"


def test_tls_for_clients_is_renewed_at_once_and_turned_on_by_a_restart() -> None:
    old, new = Server(), Server(tls_certificate="a.pem", tls_key="b.pem")
    changes, merged = compare_configs(Config(server=old), Config(server=new))
    assert [change.key for change in changes.restart] == [
        "server.tls_certificate",
        "server.tls_key",
    ]
    assert (changes.settings, merged.server) == ((), old)
    other = Server(tls_certificate="c.pem")
    changes, merged = compare_configs(Config(server=new), Config(server=other))
    assert (changes.restart, merged.server) == ((), other)


def test_a_worker_with_another_name_or_address_is_replaced() -> None:
    old = Config(workers=(worker(1), worker(2)))
    new = Config(workers=(worker(1, "new"), worker(9, "w2"), worker(3)))
    changes, _ = compare_configs(old, new)
    assert (changes.added, changes.replaced) == (("w3",), ("new", "w2"))
    assert changes.removed == ()


def worker(number: int, name: str = "", **more: Any) -> WorkerConfig:
    host = f"10.0.0.{number}"
    origin = Origin("http", host, 8080, "")
    return WorkerConfig(f"http://{host}:8080", origin, name or f"w{number}", **more)
