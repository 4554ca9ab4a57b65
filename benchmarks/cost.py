"""What a request, a stream and a token cost the hub, beside other proxies.

Everything runs on this machine and on its loopback interface, each in its own process:
a worker that streams at a fixed pace, the proxies, and the clients.  The proxies take
turns within each round, so that whatever else the machine does affects all of them; a
ratio is always of two figures of the same round, and a figure is the median of all
rounds.  CPU time is that of all processes and threads of the proxy.

A proxy that is not installed is left out.  The hub runs with its defaults: tokens are
checked, requests are logged and counted.  None of the others does that.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from rich.console import Console

from benchmarks import command
from benchmarks.children import BenchmarkError
from benchmarks.load import Kind
from benchmarks.measure import (
    measure_answers,
    measure_burst,
    measure_memory,
    measure_start,
    measure_tokens,
    paced_worker,
)
from benchmarks.paced_worker import SLOTS
from benchmarks.plot import Panel, plot
from benchmarks.proxies import HAProxy, Hub, Nginx, Prototype, Proxy, Smg, VllmRouter
from benchmarks.proxies import before as hub_of
from benchmarks.report import markdown, spread
from gollama_proxy.children import ChildError

# What is between these in RESULTS.md is written by --output.
BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"
STREAMS = 200
RATE = 50.0  # tokens per second of a stream
BURST_TOKENS = 100  # more than come while they are opened
SLOW_RATE = 5.0  # where many streams are only held open
# What the hub is compared with.
BASES = ("before", "prototype", "nginx")

T = TypeVar("T")
Make = Callable[[Sequence[int], Path], Proxy]


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str  # in the JSON file
    title: str
    unit: str
    digits: int
    goal: float  # for the hub, on a quiet machine with two cores


REQUEST = Figure("request", "short request, keep-alive", "µs", 0, 75)
STREAM = Figure("stream", "stream of 1 token", "µs", 0, 220)
CHAT_1 = Figure("chat_1", "chat of 1 token in one piece", "µs", 0, 260)
CHAT_20 = Figure("chat_20", "chat of 20 tokens in one piece", "µs", 0, 340)
TOKEN = Figure("token", "relayed token, without its request", "µs", 1, 14.2)
BURST = Figure("burst", "first token, 200 streams opened at once", "ms", 1, 6)
MEMORY = Figure("memory", "memory of a stream", "KiB", 1, 17)
IDLE = Figure("idle", "memory when idle", "MiB", 0, 50)
START = Figure("start", "start to the first answer", "ms", 0, 230)
FIGURES = (REQUEST, STREAM, CHAT_1, CHAT_20, TOKEN, BURST, MEMORY, IDLE, START)

# By figure and by proxy: a value for each round, None where measuring failed.
Results = dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float  # of each measurement with repeated requests
    streams: int  # whose memory is measured


FULL = Plan(rounds=5, seconds=1.5, streams=4000)
QUICK = Plan(rounds=2, seconds=0.4, streams=800)


# --- Measuring --------------------------------------------------------------------


class Session:
    """All measurements of one run."""

    def __init__(self, kinds: Mapping[str, Make], plan: Plan, folder: Path) -> None:
        self._kinds = kinds
        self._plan = plan
        self._folder = folder
        self.results: Results = {
            figure.name: {name: [] for name in kinds} for figure in FIGURES
        }
        self.failures: list[str] = []

    def __repr__(self) -> str:
        return f"<Session {list(self._kinds)} {self._plan}>"

    async def measure(self, console: Console) -> None:
        async with paced_worker(RATE, self._folder) as port:
            await self._measure_starts(port, console)
            await self._measure_costs(port, console)
        async with paced_worker(SLOW_RATE, self._folder) as port:
            await self._measure_memory(port, console)

    async def _measure_starts(self, port: int, console: Console) -> None:
        for turn in range(self._plan.rounds):
            for name, make in _turned(self._kinds, turn):
                with console.status(f"start {turn + 1}: {name}"):
                    proxy = make([port], self._folder)
                    await self._record(START, name, _in_milliseconds(proxy))

    async def _measure_costs(self, port: int, console: Console) -> None:
        async with contextlib.AsyncExitStack() as stack:
            proxies = {}
            for name, make in self._kinds.items():
                proxies[name] = make([port], self._folder)
                await stack.enter_async_context(proxies[name].running())
            for turn in range(self._plan.rounds):
                where = f"round {turn + 1} of {self._plan.rounds}"
                for figure, of_hubs, measure in self._costs():
                    for name, proxy in _turned(proxies, turn):
                        if of_hubs and not isinstance(proxy, Hub):
                            continue
                        with console.status(f"{where}: {figure.title}, {name}"):
                            await self._record(figure, name, measure(proxy))

    def _costs(
        self,
    ) -> list[tuple[Figure, bool, Callable[[Proxy], Awaitable[float]]]]:
        """Return what is measured: the figure, whether only of hubs, and how."""

        def answers(kind: Kind, tokens: int) -> Callable[[Proxy], Awaitable[float]]:
            async def measure(proxy: Proxy) -> float:
                seconds = self._plan.seconds
                sample = await measure_answers(proxy, kind, tokens, seconds)
                return sample.microseconds

            return measure

        async def token(proxy: Proxy) -> float:
            sample = await measure_tokens(proxy, STREAMS, RATE, self._plan.seconds)
            return sample.microseconds

        async def burst(proxy: Proxy) -> float:
            return await measure_burst(proxy, STREAMS, BURST_TOKENS) * 1e3

        return [
            (REQUEST, False, answers(Kind.EMBEDDING, 0)),
            (STREAM, False, answers(Kind.STREAM, 1)),
            # The others pass on what the worker itself answers in one piece.
            (CHAT_1, True, answers(Kind.CHAT, 1)),
            (CHAT_20, True, answers(Kind.CHAT, 20)),
            (TOKEN, False, token),
            (BURST, False, burst),
        ]

    async def _measure_memory(self, port: int, console: Console) -> None:
        streams = self._plan.streams
        for name, make in self._kinds.items():
            proxy = make([port], self._folder)
            with console.status(f"memory of {streams:,} streams: {name}"):
                async with proxy.running():
                    self.results[IDLE.name][name].append(proxy.memory() / (1 << 20))
                    await self._record(MEMORY, name, _in_kibibytes(proxy, streams))

    async def _record(
        self, figure: Figure, name: str, measuring: Awaitable[float]
    ) -> None:
        """Measure and record; a failure is reported at the end."""
        value = None
        try:
            value = await measuring
        except (BenchmarkError, ChildError) as exc:
            self.failures.append(f"{figure.title}: {exc}")
        self.results[figure.name][name].append(value)


async def _in_milliseconds(proxy: Proxy) -> float:
    return await measure_start(proxy) * 1e3


async def _in_kibibytes(proxy: Proxy, streams: int) -> float:
    return await measure_memory(proxy, streams) / 1024


def _turned(items: Mapping[str, T], turn: int) -> list[tuple[str, T]]:
    """Return the items in the order of a round: each comes first in turn."""
    pairs = list(items.items())
    first = turn % len(pairs)
    return pairs[first:] + pairs[:first]


# --- Reporting --------------------------------------------------------------------


def cost_table(results: Results, names: Sequence[str]) -> str:
    """Return a Markdown table of the medians."""
    rows = []
    for figure in FIGURES:
        values = results[figure.name]
        cells = [_cell(values[name], figure) for name in names]
        rows.append([f"{figure.title}, {figure.unit}", *cells, f"≤ {figure.goal:g}"])
    return markdown(["", *names, "goal"], rows)


def _cell(values: list[float | None], figure: Figure) -> str:
    measured = _measured(values)
    return f"{median(measured):,.{figure.digits}f}" if measured else "–"


def _measured(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def ratio_table(results: Results, names: Sequence[str]) -> str:
    """Return a Markdown table of the hub's figures as multiples of others'."""
    bases = [name for name in BASES if name in names]
    rows = []
    for figure in FIGURES:
        values = results[figure.name]
        pairs = [_ratios(values["hub"], values[base]) for base in bases]
        cells = [spread(ratios, 2) if ratios else "–" for ratios in pairs]
        rows.append([figure.title, *cells])
    return markdown(["", *(f"hub / {base}" for base in bases)], rows)


def _ratios(values: list[float | None], base: list[float | None]) -> list[float]:
    pairs = zip(values, base, strict=False)
    return [one / other for one, other in pairs if one is not None and other]


def spell_report(
    results: Results, names: Sequence[str], conditions: Mapping[str, str], plan: Plan
) -> str:
    """Return the conditions and the tables as Markdown."""
    made = ", ".join(f"{key} {value}" for key, value in conditions.items())
    how = f"medians of {plan.rounds} rounds, memory with {plan.streams:,} streams"
    goals = "Goals are for the hub, on two cores with nothing else to do."
    parts = [f"{made}; {how}. {goals}", cost_table(results, names)]
    if "hub" in names and any(base in names for base in BASES):
        parts.append("In the same rounds: median ratio (lowest - highest).")
        parts.append(ratio_table(results, names))
    return "\n\n".join(parts)


def panels(results: Results) -> list[Panel]:
    """Return what is plotted: the medians of the figures that were measured."""
    medians = {
        figure: {
            name: median(measured)
            for name, values in results[figure.name].items()
            if (measured := _measured(values))
        }
        for figure in FIGURES
    }
    return [
        Panel(figure.title, figure.unit, figure.digits, figure.goal, values)
        for figure, values in medians.items()
        if values
    ]


def document(
    results: Results, conditions: Mapping[str, str], plan: Plan
) -> dict[str, Any]:
    """Return what the JSON file contains."""
    return {
        "conditions": dict(conditions),
        "rounds": plan.rounds,
        "memory_streams": plan.streams,
        "figures": {
            figure.name: {
                "title": figure.title,
                "unit": figure.unit,
                "goal": figure.goal,
                "rounds": {name: v for name, v in results[figure.name].items() if v},
            }
            for figure in FIGURES
        },
    }


def _write(folder: Path, report: str, made: dict[str, Any], picture: str) -> None:
    """Write results.json, cost.svg and a section of RESULTS.md."""
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text)
    (folder / "cost.svg").write_text(picture)
    results = folder / "RESULTS.md"
    old = results.read_text() if results.exists() else f"{BEGIN}\n{END}\n"
    results.write_text(insert(old, report))


def insert(text: str, report: str) -> str:
    """Put a report between the two marks in a text.

    Raises:
        BenchmarkError: a mark is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"RESULTS.md has no {BEGIN} with {END} below it")
    return (
        f"{head}{begin}\n\n{report}\n\n![the same as a plot](cost.svg)\n\n{end}{tail}"
    )


# --- Command line -----------------------------------------------------------------


async def compare(options: argparse.Namespace, console: Console) -> None:
    """Measure, print the tables and write the files.

    Raises:
        BenchmarkError: nothing could be measured, or something could not.
    """
    plan: Plan = options.plan
    kinds, versions = _find_contestants(options, console)
    conditions = _conditions(versions)
    _raise_file_limit(plan.streams)
    with tempfile.TemporaryDirectory(prefix="cost-") as name:
        session = Session(kinds, plan, Path(name))
        await session.measure(console)
    report = spell_report(session.results, list(kinds), conditions, plan)
    print(report)
    if options.output:
        made = document(session.results, conditions, plan)
        _write(options.output, report, made, plot(panels(session.results)))
        console.print(f"written to {options.output}", highlight=False)
    if session.failures:
        raise BenchmarkError("\n  ".join(["not measured:", *session.failures]))


def _find_contestants(
    options: argparse.Namespace, console: Console
) -> tuple[dict[str, Make], dict[str, str]]:
    """Return the proxies to measure, and the versions of those that have one."""
    kinds: dict[str, Make] = {"hub": Hub}
    versions: dict[str, str] = {}
    if options.before:
        kinds["before"] = hub_of(options.before)
    kinds["prototype"] = Prototype
    absent = {}
    for kind, package in ((Nginx, "nginx-light"), (HAProxy, "haproxy")):
        if kind.find():
            kinds[kind.name] = kind
            versions[kind.name] = kind.version()
        else:
            absent[kind.name] = f"on Debian or Ubuntu: apt-get install {package}"
    for router, given in ((VllmRouter, options.vllm_router), (Smg, options.smg)):
        if path := router.find(given):
            kinds[router.name] = functools.partial(router, path)
            versions[router.name] = router.version(path)
        else:
            absent[router.name] = f"pip install {router.name}, in an environment apart"
    for name, hint in absent.items():
        if not options.only or name in options.only:
            console.print(f"{name}: not installed, left out ({hint})", highlight=False)
    if options.only:
        kinds = {name: make for name, make in kinds.items() if name in options.only}
        versions = {name: versions[name] for name in kinds if name in versions}
    if not kinds:
        raise BenchmarkError("nothing to measure")
    return kinds, versions


def _conditions(versions: Mapping[str, str]) -> dict[str, str]:
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.system()}",
        "load average": f"{os.getloadavg()[0]:.1f} before the run",
        "Python": platform.python_version(),
        **versions,
    }


def _raise_file_limit(streams: int) -> None:
    """Let every child hold two connections per stream.

    Raises:
        BenchmarkError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * streams + 1000
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise BenchmarkError(
            f"{streams:,} streams need {needed:,} open files in one process;"
            f" the hard limit here is {hard:,} (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


NAMES = ("hub", "before", "prototype", "nginx", "HAProxy", "vllm-router", "smg")


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("cost", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="about a minute, and less exact"
    )
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="measure this checkout's hub as well"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"measure only this proxy (repeatable): {', '.join(NAMES)}",
    )
    parser.add_argument("--rounds", type=int, help="default: 5; 2 with --quick")
    parser.add_argument(
        "--streams",
        type=int,
        help="streams open at once where memory is measured; default: 4000; 800"
        " with --quick",
    )
    parser.add_argument(
        "--vllm-router", metavar="PATH", help="the program; default: that on the PATH"
    )
    parser.add_argument(
        "--smg", metavar="PATH", help="the program; default: that on the PATH"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write results.json, cost.svg and the tables, into RESULTS.md, there",
    )
    options = parser.parse_args(arguments)
    default = QUICK if options.quick else FULL
    options.plan = Plan(
        default.rounds if options.rounds is None else options.rounds,
        default.seconds,
        default.streams if options.streams is None else options.streams,
    )
    command.require_positive(parser, rounds=options.rounds)
    if not 40 <= options.plan.streams <= SLOTS:
        parser.error(f"--streams {options.streams}: must be from 40 to {SLOTS}")
    if options.output and not os.access(options.output, os.W_OK | os.X_OK):
        parser.error(f"--output {options.output}: must be a folder to write to")
    if options.before:
        options.before = options.before.resolve()
    return options


def main() -> int:
    options, console = _parse(), Console(stderr=True)
    return command.run(lambda: compare(options, console))


if __name__ == "__main__":
    sys.exit(main())
