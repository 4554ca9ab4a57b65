"""The command lines of the benchmarks: how they are read, and how a run ends."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.children import BenchmarkError
from gollama_proxy.children import ChildError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser for the options of a benchmark; `about` is its docstring."""
    summary, _, rest = (about or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def require_positive(parser: argparse.ArgumentParser, **values: float | None) -> None:
    """End the program with status 2 if an option's value is not above 0."""
    for name, value in values.items():
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be above 0")


def run(work: Callable[[], Awaitable[None]]) -> int:
    """Run a benchmark and return the exit status; SIGTERM ends its children, too."""
    try:
        uvloop.run(_until_terminated(work))
    except (BenchmarkError, ChildError) as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return 0


async def _until_terminated(work: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work()
