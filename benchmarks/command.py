"""How a benchmark runs from the command line, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.children import BenchmarkError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(work: Callable[[], Awaitable[None]]) -> int:
    """Do it and give the exit status; a SIGTERM ends the children, too."""
    try:
        uvloop.run(_until_told(work))
    except BenchmarkError as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return 0


async def _until_told(work: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work()
