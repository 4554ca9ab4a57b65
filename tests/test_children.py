"""Child processes: their output is kept, and they end when they should."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from gollama_proxy import children
from gollama_proxy.children import Child, ChildError, environment
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
