"""Polling, for events that cannot be awaited: other processes, the kernel, time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil

# Limits each wait, so that a hanging test shows where it hangs.  It measures nothing: a
# busy machine may need many times the usual time.  Shorter than a drain in a test.
DEADLINE = 60.0


async def until(
    reached: Callable[[], bool], expected: str = "", *, timeout: float = DEADLINE
) -> None:
    """Poll a condition until it holds; `expected` describes it if it never does."""
    try:
        async with asyncio.timeout(timeout):
            while not reached():
                await asyncio.sleep(0.005)
    except TimeoutError:
        text = f"not reached within {timeout} s: {expected or reached}"
        raise AssertionError(text) from None


async def settled(progress: Callable[[], int]) -> int:
    """Wait until a number stops changing; return it."""
    before, still = -1, 0
    async with asyncio.timeout(DEADLINE):
        while still < 10:
            await asyncio.sleep(0.02)
            now = progress()
            still = still + 1 if now == before else 0
            before = now
    return before


async def gone(*pids: int) -> None:
    """Wait until the processes have ended; a zombie counts as ended."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    await until(lambda: not any(map(runs, pids)), f"the end of {pids}")
