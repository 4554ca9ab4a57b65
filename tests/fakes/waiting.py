"""Waits for what nobody announces: another process, the kernel, mere time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

DEADLINE = 20.0


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
