"""Waits for what nobody announces: another process, the kernel, mere time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil

# Of every wait, so that a test that hangs says on what.  It measures nothing: what is
# there in a moment takes many times as long on a busy machine.  Less than a drain.
DEADLINE = 25.0


async def until(reached: Callable[[], bool], timeout: float = DEADLINE) -> None:
    """Look again and again, until it is so or the time is up."""
    async with asyncio.timeout(timeout):
        while not reached():
            await asyncio.sleep(0.005)


async def settled(progress: Callable[[], int]) -> int:
    """Wait until something does not move any more; return how far it came."""
    before, still = -1, 0
    async with asyncio.timeout(DEADLINE):
        while still < 10:
            await asyncio.sleep(0.02)
            now = progress()
            still = still + 1 if now == before else 0
            before = now
    return before


async def gone(*pids: int) -> None:
    """Wait until the processes have ended; one that nobody waits for is a zombie."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    try:
        await until(lambda: not any(map(runs, pids)))
    except TimeoutError:
        raise AssertionError(f"some of {pids} run") from None
