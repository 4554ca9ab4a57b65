"""Child processes: their output is kept, and they end when they should."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from gollama_proxy import children
from gollama_proxy.children import (
    WATCHDOG,
    Child,
    ChildError,
    HubProcess,
    Restarts,
    Supervised,
    environment,
)
from gollama_proxy.service import Load
from tests.fakes.waiting import until

Start = Callable[[str], Awaitable[Child]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a shell script as a child."""
    started: list[Child] = []

    async def start(script: str) -> Child:
        log = tmp_path / f"{len(started)}.log"
        command = ["/bin/sh", "-c", script]
        child = await Child.start("a script", command, log, {"WORD": "hello"})
        started.append(child)
        return child

    yield start
    for child in started:
        child.signal(signal.SIGKILL)
        await child.process.wait()


async def test_output_and_environment(start: Start) -> None:
    child = await start('env; echo "$WORD" >&2')
    assert await child.process.wait() == 0
    lines = child.log.read_text().splitlines()
    assert "WORD=hello" in lines
    assert lines[-1] == "hello"


@pytest.mark.parametrize(
    ("script", "how"), [("exit 3", "status 3"), ("kill -ILL $$", "SIGILL")]
)
async def test_a_child_that_ended_is_reported_with_its_last_lines(
    script: str, how: str, start: Start
) -> None:
    child = await start(f"read line; seq 12; {script}")
    await child.process.wait()
    words = "\n  ".join(str(number) for number in range(3, 13))
    text = f"a script ended with {how}; from {child.log}:\n  {words}"
    with pytest.raises(ChildError, match=f"^{re.escape(text)}$") as caught:
        child.check()
    assert caught.value.status == 1


async def test_a_child_that_runs_reports_nothing(start: Start) -> None:
    child = await start("sleep 60")
    child.check()
    assert repr(child) == f"<Child a script pid={child.process.pid} log='{child.log}'>"


async def test_signals_reach_it_and_come_late_without_harm(start: Start) -> None:
    child = await start("trap 'echo heard; exit 0' HUP; echo set; while :; do :; done")
    await until(lambda: "set" in child.log.read_text())
    child.signal(signal.SIGHUP)
    assert await child.process.wait() == 0
    assert child.log.read_text() == "set\nheard\n"
    child.signal(signal.SIGHUP)


async def test_the_end_is_asked_for_first(start: Start) -> None:
    child = await start("trap 'exit 7' TERM; echo set; while :; do :; done")
    await until(lambda: "set" in child.log.read_text())
    await child.end()
    assert child.process.returncode == 7
    await child.end()  # once more, for readers who do not know


def ended(reader: int) -> bool:
    """Return whether no process has a pipe open for writing any more."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize("first", [":", "trap '' TERM", "exit"])
async def test_the_children_of_a_child_end_with_it(
    first: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be started by a script, and must not keep its port."""
    monkeypatch.setattr(children, "GRACE", 0.2)
    reader, writer = os.pipe()
    try:
        # A process that runs has the pipe open for writing.
        script = f"(trap '' TERM; exec sleep 3600) & echo set; {first}; wait; wait"
        child = await start(f"exec 9>/proc/{os.getpid()}/fd/{writer}; {script}")
        await until(lambda: "set" in child.log.read_text())
        if first == "exit":
            await child.process.wait()
        os.close(writer)
        await child.end()
        await until(lambda: ended(reader))
    finally:
        os.close(reader)


@pytest.mark.parametrize("stopped", [False, True])
async def test_the_end_is_made_where_asking_does_not_help(
    stopped: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "GRACE", 0.2)
    child = await start("trap '' TERM; echo set; while :; do :; done")
    await until(lambda: "set" in child.log.read_text())
    if stopped:
        child.signal(signal.SIGSTOP)
    await child.end()
    assert child.process.returncode == -signal.SIGKILL


async def test_ctrl_c_on_the_terminal_does_not_reach_it(start: Start) -> None:
    child = await start("sleep 60")
    await asyncio.sleep(0)
    assert os.getpgid(child.process.pid) != os.getpgid(0)


def test_the_tether_starts_nothing_for_a_parent_that_has_ended() -> None:
    command = [sys.executable, "-I", "-S", "-c", children._TETHER]
    for parent, output in ((os.getpid(), "hello\n"), (1, "")):
        reported = [*command, str(parent), "", "/bin/echo", "hello"]
        done = subprocess.run(reported, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (output, "")


def test_a_child_gets_no_settings_and_no_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOLLAMA_JWT_SECRET", "s" * 32)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    monkeypatch.setenv("LLAMA_ARG_PORT", "8080")
    found = environment()
    assert found["LLAMA_ARG_PORT"] == "8080"
    assert not found.keys() & {"GOLLAMA_JWT_SECRET", "CREDENTIALS_DIRECTORY"}


async def test_a_child_gets_sockets_as_from_systemd(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import os, sys; print(os.environ['LISTEN_PID'] == str(os.getpid()), "
    script += "*(os.readlink(f'/proc/self/fd/{n}') for n in (3, 4)))"
    readers = [os.pipe() for _ in range(2)]
    inherited = [reader for reader, _ in reversed(readers)]
    names = [f"pipe:[{os.fstat(each).st_ino}]" for each in inherited]
    child = await Child.start(
        *("it", [sys.executable, "-c", script], log, {"LISTEN_FDS": "2"}),
        descriptors=inherited,
    )
    assert await child.process.wait() == 0
    assert log.read_text() == " ".join(["True", *names]) + "\n"
    for each in (*readers[0], *readers[1]):
        os.close(each)


async def test_a_command_that_retires_is_not_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends: list[int] = []

    def again(status: int) -> bool:
        ends.append(status)
        return True

    make = partial(asyncio.to_thread, Supervised)  # it looks for the program
    idle = await make(["/bin/sleep", "60"], again=again)
    await idle.retire()  # it was never started
    sleeping = await make(["/bin/sleep", "60"], again=again, name="a nap")
    sleeping.start()
    await until(lambda: sleeping.pid is not None)
    await sleeping.retire()
    assert (ends, sleeping.pid) == ([-signal.SIGTERM], None)
    failing = await make(["/bin/false"], again=again)
    failing.start()
    await until(lambda: "false ended with status 1; again in 1 s" in caplog.text)
    await failing.retire()  # while it waits to be started
    assert ends == [-signal.SIGTERM, 1]
    assert "a nap ended" not in caplog.text


def test_a_server_that_ends_at_once_is_started_less_and_less_often() -> None:
    restarts = Restarts()
    assert [restarts.after(0.1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert restarts.after(60) == 1
    assert restarts.after(0.1) == 2


# --- A hub ------------------------------------------------------------------------


@pytest.fixture
async def hub() -> AsyncIterator[HubProcess]:
    """Start a program in place of a hub, which reports what the test receives."""
    mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made = await asyncio.to_thread(
        HubProcess,
        1,
        mailbox,
        ["/bin/sleep", "60"],
        dict(os.environ),
        [],
        lambda hub, status: False,
    )
    made.start(lambda: 0.0)
    await until(lambda: made.server.pid is not None)
    yield made
    await made.server.stop()
    made.close()
    mailbox.close()


def messages(hub: HubProcess, *lines: str, now: float = 0.0) -> None:
    hub.receive("\n".join(lines), now)


async def test_what_a_hub_reports(hub: HubProcess) -> None:
    assert not hub.started.is_set()
    messages(hub, "STATUS=1 2 3 4")
    assert hub.started.is_set()
    assert hub.load == Load(1, 2, 3, 4)
    messages(hub, "STATUS=of another version")
    assert hub.load == Load(1, 2, 3, 4)
    assert not hub.ready.is_set()
    messages(hub, "READY=1")
    assert hub.ready.is_set()
    assert repr(hub) == "<HubProcess 1 ready>"
    messages(hub, "STOPPING=1", "EXTEND_TIMEOUT_USEC=1")
    assert not hub.ready.is_set()


async def test_a_hub_that_hangs_is_ended(hub: HubProcess) -> None:
    hub.look(1e9)  # it starts, and is not expected to report
    assert hub.server.pid is not None
    messages(hub, "WATCHDOG=1", now=100.0)
    hub.look(100.0 + WATCHDOG)
    assert hub.server.pid is not None
    hub.look(101.0 + WATCHDOG)
    await until(lambda: hub.status is not None)
    assert hub.status == -signal.SIGABRT


async def test_a_hub_that_does_not_even_abort_is_killed(hub: HubProcess) -> None:
    messages(hub, "WATCHDOG=1")
    hub.server.signal(signal.SIGSTOP)  # it takes no other signal but SIGKILL
    hub.look(WATCHDOG + 1)
    hub.look(WATCHDOG + 6)
    await until(lambda: hub.status is not None)
    assert hub.status == -signal.SIGKILL


async def test_reloads_of_a_hub(
    hub: HubProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[signal.Signals] = []
    monkeypatch.setattr(hub.server, "signal", sent.append)
    assert await hub.reload() is None  # it is starting: its answer is not waited for
    assert sent == []
    messages(hub, "READY=1")  # it may have read the old settings
    assert sent == [signal.SIGHUP]
    reloading = asyncio.ensure_future(hub.reload())
    await asyncio.sleep(0)
    messages(hub, "RELOADING=1", "MONOTONIC_USEC=1")
    messages(hub, "READY=1", "X_GOLLAMA_RELOADED=nothing has changed")
    assert await reloading == "nothing has changed"
    assert len(sent) == 2
    monkeypatch.setattr(children, "RELOADS_WITHIN", 0.0)
    assert await hub.reload() == "refused: no answer within 0 s"


async def test_a_hub_that_ends_during_a_reload(hub: HubProcess) -> None:
    messages(hub, "READY=1")
    reloading = asyncio.ensure_future(hub.reload())  # `sleep` ends upon SIGHUP
    assert await reloading == "ended with SIGHUP"
    assert not hub.ready.is_set()
