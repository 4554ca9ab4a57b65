"""Messages for systemd, its watchdog, and what it passes to a service."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gollama_proxy.config.values import ConfigError
from gollama_proxy.service import Feed, Service
from gollama_proxy.tasks import spawn
from tests.fakes.systemd import Systemd


@pytest.fixture(autouse=True)
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the status looked at 50 times a second, which no test needs to wait for."""
    monkeypatch.setattr("gollama_proxy.service.STATUS_EVERY", 0.02)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as it:
        yield it


# --- Messages -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_messages_arrive_in_their_order(kind: str, tmp_path: Path) -> None:
    name = f"@gollama-{os.getpid()}" if kind == "abstract" else tmp_path / "notify"
    with Systemd(name) as systemd:
        service = Service.take(systemd.environ)
        service.describe(lambda: "2 of 2 workers ready")
        service.ready()  # waits until the program is far enough
        assert systemd.arrived() == []
        service.start()
        await systemd.until("STATUS=")
        service.stopping(lambda: "stopping")
        assert await systemd.until("STOPPING") == "STOPPING=1"
        assert await systemd.until("EXTEND") == "EXTEND_TIMEOUT_USEC=10000000"
        assert await systemd.until("STATUS") == "STATUS=stopping"
        assert systemd.messages[:2] == ["READY=1", "STATUS=2 of 2 workers ready"]
        await service.stop()


async def test_a_status_is_sent_when_it_differs(systemd: Systemd) -> None:
    service = Service(systemd.address)
    status = "one"
    service.start()
    service.describe(lambda: status)
    await systemd.until("STATUS=one")
    service.describe(lambda: status)
    assert systemd.arrived() == []
    status = "two"
    await systemd.until("STATUS=two")  # without another call
    await service.stop()


async def test_a_reload_is_between_two_messages(systemd: Systemd) -> None:
    service, over = Service(systemd.address), asyncio.Event()
    service.start()
    before = time.monotonic_ns() // 1000
    for _ in range(2):  # the second begins before the first has ended
        service.reload(lambda: spawn(over.wait(), "fake reload"))
        first, second = (await systemd.until("RELOADING=1")).splitlines()
        assert first == "RELOADING=1"
        name, _, moment = second.partition("=")
        assert name == "MONOTONIC_USEC"
        assert before <= int(moment) <= time.monotonic_ns() // 1000
    assert systemd.arrived() == []
    over.set()
    assert await systemd.next() == "READY=1"
    assert systemd.arrived() == []
    await service.stop()


async def test_a_reload_that_ends_during_the_stop_is_not_reported(
    systemd: Systemd,
) -> None:
    """READY=1 would be out of place there."""
    service, over = Service(systemd.address), asyncio.Event()
    service.start()
    task = spawn(over.wait(), "fake reload")
    service.reload(lambda: task)
    service.stopping(lambda: "stopping")
    over.set()
    await task
    await service.stop()
    assert not any(each.startswith("READY") for each in systemd.arrived())


async def test_messages_wait_for_a_systemd_that_is_busy(systemd: Systemd) -> None:
    service = Service(systemd.address)
    service.start()
    for number in range(2000):  # more than a socket holds
        service.describe(lambda text=f"status {number} " + 100 * "x": text)
    service.ready()
    assert not any(each == "READY=1" for each in systemd.arrived())
    await systemd.until("READY=1")
    await service.stop()


async def test_a_systemd_that_is_gone_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(str(tmp_path / "nowhere"))
    service.start()
    service.ready()
    service.describe(lambda: "fine")
    await service.stop()
    assert caplog.text.count("systemd cannot be notified: No such file") == 1


async def test_without_systemd_nothing_is_sent() -> None:
    service = Service.take({})
    service.start()
    service.ready()
    service.describe(lambda: "fine")
    service.stopping(lambda: "stopping")
    await service.stop()
    await service.stop()


# --- The watchdog -------------------------------------------------------------------


def test_a_loop_in_time_feeds_it_twice_as_often_as_needed() -> None:
    assert Feed(30.0).after(0.0) == (True, 15.0)
    assert Feed(30.0).after(7.5) == (True, 15.0)


def test_a_slow_loop_does_not_feed_it() -> None:
    assert Feed(30.0).after(7.6) == (False, 1.875)


def test_a_loop_that_was_slow_once_feeds_it_in_time() -> None:
    """Half the limit, then late by a third of it, then looked at again."""
    feed, limit = Feed(30.0), 30.0
    healthy, wait = feed.after(10.0)
    assert not healthy
    assert limit / 2 + 10.0 + wait < limit
    assert feed.after(0.0)[0]


async def test_a_blocked_loop_does_not_feed_it(systemd: Systemd) -> None:
    """While it is blocked nothing is sent; once it turns again, it is fed again."""
    service = Service(systemd.address, watchdog=0.2)
    service.start()
    await systemd.until("WATCHDOG=1")
    await systemd.until("WATCHDOG=1")
    fed: list[bool] = []
    over = threading.Event()

    def watch() -> None:  # several times the limit
        fed.append(systemd.arrives_within(1.0))
        over.set()

    systemd.arrived()
    watching = threading.Thread(target=watch)
    watching.start()
    over.wait()  # blocks the loop until the other thread has seen enough
    watching.join()
    assert fed == [False]
    await systemd.until("WATCHDOG=1")
    await service.stop()


def test_a_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path), "WATCHDOG_USEC": "1000000"}
    mine = Service.take(environ | {"WATCHDOG_PID": str(os.getpid())})
    assert mine.watched
    assert not Service.take(environ | {"WATCHDOG_PID": "1"}).watched


# --- What is passed -----------------------------------------------------------------


def test_its_variables_are_not_inherited_by_children(tmp_path: Path) -> None:
    environ = {
        "NOTIFY_SOCKET": str(tmp_path),
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "http",
        "PATH": "/bin",
    }
    assert Service.take(environ).listeners.clients == ()
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"NOTIFY_SOCKET": "notify"},
            "NOTIFY_SOCKET = 'notify': must be a path, or a name that begins with @",
        ),
        (
            {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1s"},
            "WATCHDOG_USEC = '1s': must be a number of microseconds above 0",
        ),
        (
            {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
            "LISTEN_FDS = '-1': must be a number of descriptors",
        ),
    ],
)
def test_what_systemd_never_passes(environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as info:
        Service.take(environ)
    assert info.value.args == (line,)


def test_an_object_shows_no_more_than_its_state(systemd: Systemd) -> None:
    assert repr(Service(systemd.address)) == f"<Service {systemd.address!r} ''>"
    assert repr(Service("@x")) == "<Service '@x' ''>"
    assert repr(Feed(30.0)) == "<Feed limit=30>"
