"""Every task is started in one place, and logs the error that ends it."""

from __future__ import annotations

import ast
import asyncio
import gc
import re
import time
from pathlib import Path

import pytest

import gollama_proxy
from gollama_proxy.tasks import PUNCTUAL, Periodic, ended, held_up, spawn
from tests.fakes.waiting import DEADLINE

PACKAGE = Path(gollama_proxy.__file__).parent


async def test_a_task_has_a_name_and_gives_its_result() -> None:
    async def answer() -> int:
        return 42

    task = spawn(answer(), "deep thought")
    assert task.get_name() == "deep thought"
    assert await task == 42


async def test_a_task_without_another_reference_is_kept() -> None:
    """The event loop holds only a weak reference."""
    done = asyncio.Event()

    async def wait(future: asyncio.Future[None]) -> None:
        await future
        done.set()

    loop = asyncio.get_running_loop()
    spawn(wait(loop.create_future()), "forgotten")
    await asyncio.sleep(0)
    gc.collect()
    [task] = [t for t in asyncio.all_tasks() if t.get_name() == "forgotten"]
    task.cancel()
    await asyncio.wait([task])


async def test_the_failure_of_a_task_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise RuntimeError("canary")

    task = spawn(fail(), "unlucky")
    await asyncio.wait([task])
    [record] = caplog.records
    assert record.getMessage() == "task unlucky failed"
    assert "canary" in caplog.text


async def test_a_cancelled_task_is_not_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = spawn(asyncio.sleep(60), "patient")
    task.cancel()
    await asyncio.wait([task])
    assert not caplog.records


async def test_a_wait_for_a_task_ends_with_it_an_event_or_the_time() -> None:
    go, end, other = asyncio.Event(), asyncio.Event(), asyncio.Event()
    task = spawn(go.wait(), "work")
    assert not await ended(task, end, within=0)
    end.set()
    assert not await ended(task, other, end)
    assert not task.done()
    go.set()
    assert await ended(task, other)


async def test_a_timer_shows_whether_the_event_loop_was_held_up() -> None:
    timer = asyncio.get_running_loop().call_later(0.001, lambda: None)
    assert held_up(timer) == 0
    time.sleep(PUNCTUAL * 1.5)  # noqa: ASYNC251
    assert held_up(timer) > PUNCTUAL


# --- Periodic steps ---------------------------------------------------------------


class Steps:
    """Counts its runs; a run can be held, fail, or ask for a wait."""

    def __init__(self) -> None:
        self.runs = 0
        self.wait: float | None = None
        self.error: Exception | None = None
        self.ran = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    def __repr__(self) -> str:
        return f"<Steps runs={self.runs}>"

    async def __call__(self) -> float | None:
        self.runs += 1
        self.ran.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return self.wait

    async def run(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.ran.wait()
        self.ran.clear()


async def test_a_step_runs_once_every_period() -> None:
    periodic = Periodic("clock", steps := Steps(), 0.001)
    assert repr(periodic) == "<Periodic clock stopped>"
    periodic.start()
    assert repr(periodic) == "<Periodic clock running>"
    assert steps.runs == 0, "the first wait comes first"
    for _ in range(3):
        await steps.run()
    await periodic.stop()
    await periodic.stop()
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "clock"]


async def test_a_step_decides_how_long_to_wait() -> None:
    periodic = Periodic("clock", steps := Steps(), 3_600, delay=0)
    steps.wait = 0.0
    periodic.start()
    await steps.run()
    steps.wait = None
    await steps.run()
    runs = steps.runs
    await asyncio.sleep(0)
    assert steps.runs <= runs + 1
    await periodic.stop()


async def test_a_step_can_be_woken() -> None:
    periodic = Periodic("clock", steps := Steps(), 3_600)
    periodic.start()
    periodic.wake()
    await steps.run()
    periodic.wake()
    await steps.run()
    assert steps.runs == 2
    await periodic.stop()


async def test_a_step_that_is_woken_while_it_runs_runs_once_more() -> None:
    periodic = Periodic("clock", steps := Steps(), 3_600, delay=0)
    steps.go.clear()
    periodic.start()
    await steps.run()
    periodic.wake()
    periodic.wake()
    steps.go.set()
    await steps.run()
    assert steps.runs == 2
    await periodic.stop()


async def test_a_step_that_failed_runs_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    periodic = Periodic("clock", steps := Steps(), 0.001)
    steps.error = RuntimeError("canary")
    periodic.start()
    for _ in range(2):
        await steps.run()
    await periodic.stop()
    assert caplog.messages[0] == "clock failed; it runs again in 0.001 s"
    assert "canary" in caplog.text


async def test_a_running_step_is_cancelled_by_stop() -> None:
    periodic = Periodic("clock", steps := Steps(), 3_600, delay=0)
    steps.go.clear()
    periodic.start()
    await steps.run()
    await periodic.stop()
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "clock"]


# --- In all of the package --------------------------------------------------------


def test_tasks_are_started_by_spawn_only() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "tasks.py":
            assert not other_starts(path.read_text()), path


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("asyncio.create_task(work(), name='work')", [1]),
        ("asyncio.ensure_future(work())", [1]),
        ("self.loop.create_task(work())", [1]),
        ("asyncio.Task(work())", [1]),
        ("import asyncio\nfrom asyncio import create_task as start", [2]),
        ("call(\nasyncio.create_task)", [2]),
        ("spawn(work())", [1]),
        ("group.create_task(work())", [1]),
        ("group.create_task(work(), name='work')", []),
        ("spawn(work(), 'work')", []),
        ("task: asyncio.Task[None]", []),
    ],
)
def test_other_ways_to_start_a_task_are_found(source: str, lines: list[int]) -> None:
    message = "start tasks by gollama_proxy.tasks.spawn, with a name"
    assert other_starts(source) == [f"line {line}: {message}" for line in lines]


def other_starts(source: str) -> list[str]:
    """Find tasks without a name, and those that are started by other means.

    Such a task may vanish while it runs, and its error is not logged.  A task group
    supervises its tasks: there, a name is enough.
    """
    if not re.search(r"create_task|ensure_future|\bTask\b|\bspawn\b", source):
        return []  # which costs a hundredth of parsing it
    nodes = list(ast.walk(ast.parse(source)))
    named = {
        call.func
        for call in nodes
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "group.create_task"
        and any(each.arg == "name" for each in call.keywords)
    }
    found = []
    for node in nodes:
        match node:
            case ast.Attribute(attr="create_task" | "ensure_future"):
                good = node in named
            case ast.ImportFrom(module="asyncio", names=names):
                starts = {"create_task", "ensure_future", "Task"}
                good = not any(alias.name in starts for alias in names)
            case ast.Call(func=ast.Attribute(attr="Task")):
                good = False
            case ast.Call(func=ast.Name(id="spawn"), args=arguments):
                good = len(arguments) == 2
            case _:
                continue
        if not good:
            text = "start tasks by gollama_proxy.tasks.spawn, with a name"
            found.append(f"line {node.lineno}: {text}")
    return found
