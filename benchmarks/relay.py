"""What a relayed token costs, beside nginx and the proxy one writes first.

    python -m benchmarks.relay            CPU time per token and per short request
    python -m benchmarks.relay --many     4,000 streams at once through one hub

Everything runs on this machine, and only on its loopback interface: a worker that
streams at a fixed pace, the proxies, and the clients, each in its own process.  The
proxies take turns within each round, so whatever else the machine does meets all of
them; a ratio is always of two figures of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import Job
from benchmarks.proxies import (
    BenchmarkError,
    Hub,
    Nginx,
    PlainProxy,
    Proxy,
    free_port,
    last_words,
    spawn,
    until_answered,
)

PROXIES: dict[str, type[Proxy]] = {"hub": Hub, "nginx": Nginx, "plain": PlainProxy}
WARM_UP = 2.0
REQUEST_CLIENTS = 32
REQUEST_SECONDS = 3.0
REQUEST_WARM_UP = 0.5
# Streams that any proxy here can open in a second; they last that much longer.
OPENED_PER_SECOND = 400
MEMORY_GOAL = 150 << 20


# --- Measuring --------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One proxy's cost in one round."""

    microseconds: float  # of CPU time, per token or per short request
    rate: float  # of those, per second
    memory: int
    peak: int  # clients at once


@dataclass
class Result:
    """What the rounds showed of one proxy."""

    name: str
    tokens: list[Sample] = field(default_factory=list)
    requests: list[Sample] = field(default_factory=list)


class Load:
    """The client process: what is asked of it and what it says."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path) -> None:
        self._child = child
        self._log = log

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, job: Job, folder: Path) -> AsyncIterator[Load]:
        log = folder / "load.log"
        async with spawn([sys.executable, "-m", "benchmarks.load"], log) as child:
            load = cls(child, log)
            await load._tell(json.dumps(dataclasses.asdict(job)))
            yield load

    async def hear(self, event: str) -> dict[str, Any]:
        """Wait for the next thing the clients say.

        Raises:
            BenchmarkError: when it is not this event.
        """
        assert self._child.stdout
        line = await self._child.stdout.readline()
        said = json.loads(line) if line else {"event": last_words(self._log)}
        if said["event"] != event:
            raise BenchmarkError(f"no {event!r} from the clients, but {said}")
        return said

    async def count(self) -> int:
        await self._tell("count")
        return (await self.hear("count"))["count"]

    async def _tell(self, line: str) -> None:
        assert self._child.stdin
        self._child.stdin.write(line.encode() + b"\n")
        # Should the clients be gone: `hear` finds out, and knows their last words.
        with contextlib.suppress(ConnectionError):
            await self._child.stdin.drain()


async def measure(proxy: Proxy, job: Job, warm_up: float, seconds: float) -> Sample:
    """Put the job's load on a proxy and take what it costs while all clients are open.

    Raises:
        BenchmarkError: when an answer was broken or a token did not arrive.
    """
    try:
        async with (
            asyncio.timeout(warm_up + seconds + 90),
            Load.running(job, proxy.folder) as load,
        ):
            await load.hear("open")
            await asyncio.sleep(warm_up)
            clock = asyncio.get_running_loop().time
            started, cpu, count = clock(), proxy.cpu_seconds(), await load.count()
            await asyncio.sleep(seconds)
            cpu, count = proxy.cpu_seconds() - cpu, await load.count() - count
            seconds, memory = clock() - started, proxy.memory()
            end = await load.hear("end")
    except TimeoutError:
        raise BenchmarkError(f"{proxy.name}: no end of the load in sight") from None
    except psutil.NoSuchProcess:
        raise BenchmarkError(f"{proxy.name} ended: {last_words(proxy.log)}") from None
    expected = job.clients * job.max_tokens
    if end["broken"] or (expected and end["count"] != expected):
        tokens = f", {end['count']:,} of {expected:,} tokens" if expected else ""
        raise BenchmarkError(
            f"{proxy.name} lost answers: {end['complete']:,} of {job.clients:,}"
            f" complete{tokens}; {end['broken']}"
        )
    if not count:
        raise BenchmarkError(f"{proxy.name}: nothing arrived in {seconds:.0f} s")
    return Sample(cpu / count * 1e6, count / seconds, memory, end["peak"])


def stream_job(proxy: Proxy, streams: int, rate: float, seconds: float) -> Job:
    """Ask for streams that all last until the measuring is over."""
    lasting = streams / OPENED_PER_SECOND + WARM_UP + seconds + 0.5
    tokens = ceil(rate * lasting)
    return Job(proxy.port, streams, max_tokens=tokens, bearers=proxy.bearers)


def request_job(proxy: Proxy) -> Job:
    seconds = REQUEST_WARM_UP + REQUEST_SECONDS + 0.2
    return Job(proxy.port, REQUEST_CLIENTS, seconds=seconds, bearers=proxy.bearers)


# --- The two runs -----------------------------------------------------------------


async def compare(options: argparse.Namespace, console: Console) -> None:
    """Measure the proxies in turns and print what they cost."""
    streams, rate, seconds = options.streams, options.rate, options.seconds
    kinds = [PROXIES[name] for name in options.proxy or PROXIES]
    results = {kind: Result(kind.name) for kind in kinds}
    async with _running(kinds, rate) as proxies:
        for turn in range(options.rounds):
            first = turn % len(proxies)
            proxies = proxies[first:] + proxies[:first]
            with console.status(f"round {turn + 1} of {options.rounds}"):
                for proxy in proxies:
                    job = stream_job(proxy, streams, rate, seconds)
                    sample = await measure(proxy, job, WARM_UP, seconds)
                    results[type(proxy)].tokens.append(sample)
                for proxy in proxies:
                    sample = await measure(
                        proxy, request_job(proxy), REQUEST_WARM_UP, REQUEST_SECONDS
                    )
                    results[type(proxy)].requests.append(sample)
    _print_comparison(results, options, console)


async def many(options: argparse.Namespace, console: Console) -> None:
    """Hold many slow streams open through one hub and print what it takes."""
    streams, rate, seconds = options.streams, options.rate, options.seconds
    async with _running([Hub], rate) as (hub,):
        idle = hub.memory()
        with console.status(f"{streams:,} streams"):
            job = stream_job(hub, streams, rate, seconds)
            sample = await measure(hub, job, WARM_UP, seconds)
    if sample.peak < streams:
        raise BenchmarkError(f"only {sample.peak:,} streams were open at once")
    held = "under" if sample.memory < MEMORY_GOAL else "OVER"
    per_stream = (sample.memory - idle) / streams / 1024
    console.print(
        f"{sample.peak:,} streams open at once through one hub process,"
        f" {rate:g} tokens/s each\n"
        f"every token of every stream arrived: {streams * job.max_tokens:,}\n"
        f"resident memory {_mebibytes(sample.memory)}, {held} the goal of"
        f" {_mebibytes(MEMORY_GOAL)}; idle {_mebibytes(idle)},"
        f" {per_stream:.1f} KiB per stream\n"
        f"{sample.microseconds:.1f} µs of CPU time per token,"
        f" {sample.rate:,.0f} tokens/s in all",
        highlight=False,
    )
    _warn_of_pace(hub.name, [sample], streams * rate, console)


@contextlib.asynccontextmanager
async def _running(
    kinds: Sequence[type[Proxy]], rate: float
) -> AsyncIterator[list[Proxy]]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-")))
        port, log = free_port(), folder / "worker.log"
        command = [sys.executable, "-m", "benchmarks.paced_worker"]
        command += ["--port", str(port), "--rate", str(rate)]
        worker = await stack.enter_async_context(spawn(command, log))
        await until_answered(port, "none", worker, log)
        proxies = [kind(port, folder) for kind in kinds]
        for proxy in proxies:
            await stack.enter_async_context(proxy.running())
        yield proxies


# --- Printing ---------------------------------------------------------------------


def _print_comparison(
    results: dict[type[Proxy], Result], options: argparse.Namespace, console: Console
) -> None:
    streams, rate = options.streams, options.rate
    versions = [f"Python {platform.python_version()}", f"{os.cpu_count()} cores"]
    if Nginx in results:
        versions.insert(0, f"nginx {Nginx.version()}")
    console.print(
        f"CPU time of the proxy process: median of {options.rounds} rounds (lowest -"
        f" highest)\n{', '.join(versions)}",
        highlight=False,
    )
    nginx = results.get(Nginx)
    tokens = _table(f"{streams} streams of {rate:g} tokens/s", "µs per token")
    requests = _table(
        f"{REQUEST_CLIENTS} clients with short requests", "µs per request"
    )
    for result in results.values():
        for table, samples, base, digits in (
            (tokens, result.tokens, nginx.tokens if nginx else [], 1),
            (requests, result.requests, nginx.requests if nginx else [], 0),
        ):
            table.add_row(
                result.name,
                _spread([sample.microseconds for sample in samples], digits),
                _ratios(samples, base),
                f"{median(sample.rate for sample in samples):,.0f}",
                _mebibytes(max(sample.memory for sample in samples)),
            )
    console.print("", tokens, "", requests, sep="\n")
    for result in results.values():
        _warn_of_pace(result.name, result.tokens, streams * rate, console)


def _table(title: str, cost: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", min_width=13)
    for heading in (cost, "nginx = 1", "per second", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.columns[1].min_width = table.columns[2].min_width = 18
    return table


def _ratios(samples: list[Sample], base: list[Sample]) -> str:
    pairs = zip(samples, base, strict=False)
    ratios = [one.microseconds / other.microseconds for one, other in pairs]
    return _spread(ratios, 2) if ratios else "-"


def _spread(values: list[float], digits: int) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({low} - {high})"


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _warn_of_pace(
    name: str, samples: list[Sample], wanted: float, console: Console
) -> None:
    """Say so when the machine was too busy: late tokens come together and cost less."""
    rate = min(sample.rate for sample in samples)
    if rate < 0.95 * wanted:
        console.print(f"{name}: only {rate:,.0f} of {wanted:,.0f} tokens/s kept up")


# --- Command line -----------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--many", action="store_true", help="4,000 streams of a hub")
    parser.add_argument("--proxy", action="append", choices=PROXIES, help="only this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, help="at once (200; many: 4000)")
    parser.add_argument("--rate", type=float, help="tokens/s of a stream (50; 5)")
    parser.add_argument("--seconds", type=float, help="measured per round (6; 20)")
    options = parser.parse_args()
    defaults = (4000, 5.0, 20.0) if options.many else (200, 50.0, 6.0)
    for name, default in zip(("streams", "rate", "seconds"), defaults, strict=True):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value:g}: must be above 0")
        setattr(options, name, default if value is None else value)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be above 0")
    return options


def _raise_file_limit(streams: int) -> None:
    """Let every child hold two connections per stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * streams + 256
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise BenchmarkError(
            f"{streams:,} streams need {needed:,} open files in one process;"
            f" the hard limit here is {hard:,} (ulimit -Hn)"
        )
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _run(options: argparse.Namespace, console: Console) -> None:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await (many if options.many else compare)(options, console)


def main() -> int:
    options, console = _parse(), Console()
    try:
        _raise_file_limit(options.streams)
        if not options.many and "nginx" in (options.proxy or PROXIES):
            Nginx.path()
        asyncio.run(_run(options, console))
    except BenchmarkError as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
