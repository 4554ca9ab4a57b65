"""Every task of the hub is started in one way, and none dies unheard."""

from __future__ import annotations

import ast
import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import gollama_proxy
from gollama_proxy.tasks import spawn

PACKAGE = Path(gollama_proxy.__file__).parent


async def test_a_task_has_a_name_and_gives_its_result() -> None:
    async def answer() -> int:
        return 42

    task = spawn(answer(), "deep thought")
    assert task.get_name() == "deep thought"
    assert await task == 42


async def test_a_task_that_nobody_holds_is_kept() -> None:
    """The event loop itself holds it only weakly."""
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


async def test_a_task_that_fails_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("canary")

    task = spawn(fail(), "unlucky")
    await asyncio.wait([task])
    [record] = caplog.records
    assert record.getMessage() == "task unlucky failed"
    assert "canary" in caplog.text


async def test_a_task_that_is_cancelled_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = spawn(asyncio.sleep(60), "patient")
    task.cancel()
    await asyncio.wait([task])
    assert not caplog.records


# --- In all of the package --------------------------------------------------------


def starts_of_tasks(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("create_task", "ensure_future", "Task", "spawn"):
                yield name, node


def test_there_is_no_other_way() -> None:
    """A task group supervises what it starts; there a name is all that is asked."""
    found = 0
    for file in PACKAGE.rglob("*.py"):
        if file.name == "tasks.py":
            continue
        for name, call in starts_of_tasks(ast.parse(file.read_text())):
            where = f"{file}:{call.lineno}"
            found += 1
            if name == "spawn":
                assert len(call.args) == 2, where
            else:
                assert isinstance(call.func, ast.Attribute), where
                assert ast.unparse(call.func) == "group.create_task", where
                assert any(each.arg == "name" for each in call.keywords), where
    assert found > 5
