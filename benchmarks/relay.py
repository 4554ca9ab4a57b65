"""What a relayed token costs, beside nginx and the proxy one writes first.

    python -m benchmarks.relay            CPU time per token and per short request
    python -m benchmarks.relay --many     4,000 streams at once through one hub
    python -m benchmarks.relay --before DIR
                                          the hub beside that of another checkout

Everything runs on this machine, and only on its loopback interface: a worker that
streams at a fixed pace, the proxies, and the clients, each in its own process.  The
proxies take turns within each round, so whatever else the machine does meets all of
them; a ratio is always of two figures of the same round.

Tokens arrive as from workers that decode a batch: some ten of them within a moment, a
thousand times a second.  Were each to come alone, a wake-up of the proxy would be added
to it; every figure would be higher and the ratios smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.children import BenchmarkError, free_port, spawn, until_answered
from benchmarks.command import run
from benchmarks.measure import (
    REQUEST_CLIENTS,
    REQUEST_SECONDS,
    REQUEST_WARM_UP,
    WARM_UP,
    Sample,
    measure,
    request_job,
    stream_job,
)
from benchmarks.paced_worker import SLOTS
from benchmarks.proxies import Nginx, PassingHub, PlainProxy, Proxy, before
from benchmarks.report import mebibytes, signed_spread, spread, table

PROXIES: dict[str, type[Proxy]] = {
    "hub": PassingHub,
    "nginx": Nginx,
    "plain": PlainProxy,
}
MEMORY_GOAL = 150 << 20


@dataclass
class Result:
    """What the rounds showed of one proxy."""

    name: str
    tokens: list[Sample] = field(default_factory=list)
    requests: list[Sample] = field(default_factory=list)


# --- The two runs -----------------------------------------------------------------


async def compare(options: argparse.Namespace, console: Console) -> None:
    """Measure the proxies in turns and print what they cost."""
    streams, rate, seconds = options.streams, options.rate, options.seconds
    kinds = options.kinds
    results = {kind: Result(kind.name) for kind in kinds}
    async with _running(kinds, rate) as proxies:
        for turn in range(options.rounds):
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
            proxies = [*proxies[1:], proxies[0]]
    _print_comparison(results, options, console)


async def many(options: argparse.Namespace, console: Console) -> None:
    """Hold many slow streams open through one hub and print what it takes."""
    streams, rate, seconds = options.streams, options.rate, options.seconds
    async with _running([PassingHub], rate) as (hub,):
        idle = hub.memory()
        with console.status(f"{streams:,} streams"):
            job = stream_job(hub, streams, rate, seconds)
            sample = await measure(hub, job, WARM_UP, seconds)
    if sample.peak < streams:
        raise BenchmarkError(f"only {sample.peak:,} streams were open at once")
    held = "under" if sample.memory < MEMORY_GOAL else "OVER"
    goal = mebibytes(MEMORY_GOAL)
    per_stream = (sample.memory - idle) / streams / 1024
    lines = [
        f"{sample.peak:,} streams of {rate:g} tokens/s, all open at once",
        f"{streams * job.max_tokens:,} tokens, all arrived",
        f"{mebibytes(sample.memory)} of memory, {held} the goal of {goal}",
        f"  {mebibytes(idle)} when idle, {per_stream:.1f} KiB per stream",
        f"{sample.microseconds:.1f} µs of CPU time per token",
        f"{sample.rate:,.0f} tokens per second",
    ]
    console.print("\n".join(lines), highlight=False)
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
        proxies = [kind([port], folder) for kind in kinds]
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
    tokens = _cost_table(f"{streams} streams of {rate:g} tokens/s", "µs per token")
    requests = _cost_table(
        f"{REQUEST_CLIENTS} clients with short requests", "µs per request"
    )
    for result in results.values():
        for costs, samples, base, digits in (
            (tokens, result.tokens, nginx.tokens if nginx else [], 1),
            (requests, result.requests, nginx.requests if nginx else [], 0),
        ):
            costs.add_row(
                result.name,
                spread([sample.microseconds for sample in samples], digits),
                _ratios(samples, base),
                f"{median(sample.rate for sample in samples):,.0f}",
                mebibytes(max(sample.memory for sample in samples)),
            )
    console.print("", tokens, "", requests, sep="\n")
    for kind, result in results.items():
        if issubclass(kind, PassingHub) and kind is not PassingHub:
            _print_difference(results[PassingHub], result, kind.checkout, console)
        _warn_of_pace(result.name, result.tokens, streams * rate, console)


def _print_difference(
    hub: Result, before: Result, checkout: Path, console: Console
) -> None:
    console.print(
        f"\n{hub.name} - {before.name} ({checkout}), round by round:\n"
        f"  {_differences(hub.tokens, before.tokens, 1)} µs per token\n"
        f"  {_differences(hub.requests, before.requests, 0)} µs per request",
        highlight=False,
        soft_wrap=True,
    )


def _differences(samples: list[Sample], base: list[Sample], digits: int) -> str:
    pairs = zip(samples, base, strict=True)
    differences = [one.microseconds - other.microseconds for one, other in pairs]
    return signed_spread(differences, digits)


def _cost_table(title: str, cost: str) -> Table:
    made = table(title, cost, "nginx = 1", "per second", "memory")
    for column, width in zip(made.columns, (13, 18, 18), strict=False):
        column.min_width = width
    return made


def _ratios(samples: list[Sample], base: list[Sample]) -> str:
    pairs = zip(samples, base, strict=False)
    ratios = [one.microseconds / other.microseconds for one, other in pairs]
    return spread(ratios, 2) if ratios else "-"


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
    parser.add_argument(
        "--before",
        type=Path,
        metavar="DIR",
        help="beside the hub of that checkout (and what --proxy names)",
    )
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
    if options.streams > SLOTS:
        parser.error(f"--streams {options.streams}: the worker has {SLOTS} slots")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be above 0")
    if options.before and options.many:
        parser.error("--before: with --many there is one hub alone")
    if options.before and not (options.before / "gollama_proxy").is_dir():
        parser.error(f"--before {options.before}: has no gollama_proxy in it")
    options.kinds = _kinds(options)
    return options


def _kinds(options: argparse.Namespace) -> list[type[Proxy]]:
    """Choose what is measured; a difference needs both of its hubs."""
    if options.before is None:
        return [PROXIES[name] for name in options.proxy or PROXIES]
    others = [PROXIES[name] for name in options.proxy or [] if name != "hub"]
    return [before(options.before.resolve()), PassingHub, *others]


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


def main() -> int:
    options, console = _parse(), Console()

    async def work() -> None:
        _raise_file_limit(options.streams)
        if not options.many and Nginx in options.kinds:
            Nginx.path()
        await (many if options.many else compare)(options, console)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
