"""Where the hub spends a request: its Python frames and its CPU time, by function.

    python -m benchmarks.profile short            /v1/embeddings
    python -m benchmarks.profile stream           a stream of 1 token (--tokens)
    python -m benchmarks.profile chat             2 tokens, assembled from a stream

The frames are those of one warm request on a kept connection, counted as by the test of
the request's budget (tests/behaviour/test_cost.py).  The times come from cProfile,
under the load of `python -m benchmarks.cost`.  cProfile adds to each call, so compare
functions with each other and not with the figures of that benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import command
from benchmarks.load import Job, Kind
from benchmarks.measure import CLIENTS, Load, paced_worker
from benchmarks.proxies import Hub
from tests.fakes.client import Wire
from tests.fakes.frames import Cost, count_frames, listening_at

WARM_UP = 20  # requests
SECONDS = 3.0  # under load
_VARIABLE = "PROFILE_FILE"

KINDS = {
    "short": (Kind.EMBEDDING, 0),
    "stream": (Kind.STREAM, 1),
    "chat": (Kind.CHAT, 2),
}


class CountedHub(Hub):
    """The hub with its Python frames counted."""

    def command(self) -> list[str]:
        return [*_as_module("tests.fakes.frames"), *super().command()[3:]]

    def environment(self) -> dict[str, str]:
        return super().environment() | listening_at(self.folder / "frames")


class ProfiledHub(Hub):
    """The hub under cProfile, from SIGUSR1 to SIGUSR2."""

    def command(self) -> list[str]:
        return [*_as_module("benchmarks.profile"), *super().command()[3:]]

    def environment(self) -> dict[str, str]:
        return super().environment() | {_VARIABLE: str(self.stats)}

    @property
    def stats(self) -> Path:
        return self.folder / "profile"


def _as_module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


# --- Measuring --------------------------------------------------------------------


async def count(port: int, kind: Kind, tokens: int, folder: Path) -> Cost:
    """Count the frames of one warm request."""
    hub = CountedHub([port], folder)
    job = Job(hub.port, 1, kind, tokens, bearers=hub.bearers)
    async with hub.running(), await Wire.connect("127.0.0.1", hub.port) as wire:

        async def request() -> None:
            await wire.post(job.path, job.document(), hub.bearers[0])
            await wire.read_response()

        for _ in range(WARM_UP):
            await request()
        return await count_frames(folder / "frames", request)


async def profile(
    port: int, kind: Kind, tokens: int, folder: Path
) -> tuple[pstats.Stats, int]:
    """Profile the hub under load; return the profile and the number of requests."""
    hub = ProfiledHub([port], folder)
    job = Job(hub.port, CLIENTS, kind, tokens, repeats=True, bearers=hub.bearers)
    async with hub.running(), Load.running(job, folder) as load:
        await load.expect("open")
        await asyncio.sleep(0.5)
        requests = await load.count()
        hub.signal(signal.SIGUSR1)
        await asyncio.sleep(SECONDS)
        hub.signal(signal.SIGUSR2)
        requests = await load.count() - requests
        await load.stop()
        await load.expect("end")
    return pstats.Stats(str(hub.stats)), requests


def table(stats: pstats.Stats, requests: int, lines: int) -> str:
    """List the functions that take the most time themselves, per request."""
    # Of each function: primitive calls, calls, own time, cumulative time, callers.
    rows = [
        (own / requests * 1e6, calls / requests, _name(*place))
        for place, (_, calls, own, _, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    rows.sort(reverse=True)
    total = sum(own for own, _, _ in rows)
    head = f"{total:.0f} µs per request under cProfile, {requests:,} requests"
    shown = [f"{own:7.1f} µs {calls:7.1f}  {name}" for own, calls, name in rows[:lines]]
    return "\n".join([head, "own time     calls  function", *shown])


def _name(file: str, line: int, function: str) -> str:
    if file == "~":  # built in
        return function
    return f"{'/'.join(Path(file).parts[-2:])}:{line} {function}"


# --- Command line -----------------------------------------------------------------


async def show(options: argparse.Namespace, console: Console) -> None:
    kind, tokens = KINDS[options.kind]
    tokens = tokens if options.tokens is None else options.tokens
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        folder = Path(name)
        async with paced_worker(50.0, folder) as port:
            with console.status("counting frames"):
                cost = await count(port, kind, tokens, folder)
            with console.status("profiling"):
                stats, requests = await profile(port, kind, tokens, folder)
    print(_first_lines(cost.table(), options.lines))
    print(f"\n{table(stats, requests, options.lines)}")


def _first_lines(text: str, count: int) -> str:
    return "\n".join(text.splitlines()[: count + 1])


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("profile", __doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--tokens", type=int, help="of the answer; at most 20")
    parser.add_argument("--lines", type=int, default=40, help="of each table (40)")
    options = parser.parse_args(arguments)
    if options.tokens is not None and not 1 <= options.tokens <= 20:
        parser.error(f"--tokens {options.tokens}: must be from 1 to 20")
    return options


def main() -> int:
    options, console = _parse(), Console(stderr=True)
    return command.run(lambda: show(options, console))


def _serve(file: str) -> int:
    """Run the hub, with a profile of what its thread does between two signals."""
    profiler = cProfile.Profile(time.thread_time)

    def stop(*_: object) -> None:
        profiler.disable()
        profiler.dump_stats(file)

    signal.signal(signal.SIGUSR1, lambda *_: profiler.enable())
    signal.signal(signal.SIGUSR2, stop)
    from gollama_proxy.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_serve(os.environ[_VARIABLE]) if _VARIABLE in os.environ else main())
