"""The hub's policies in front of unequal workers, compared with other proxies.

    python -m benchmarks.routing                    both parts, as Markdown
    python -m benchmarks.routing --part real        real llama-servers alone
    python -m benchmarks.routing --vllm-router PATH where it is not on the PATH

Clients hold conversations (`dialogue.py`): half of their requests are single questions,
the others are turns, whose prompts contain the answers so far.  All begin with the same
system prompt.  There are nearly twice as many clients as slots.

(1) Real llama-servers, with models of random weights: three depths of the same model
give three speeds.  Two cores carry no more than that, and only in turns
(`throttle.py`), so that none gets faster when another one is idle, and the proxy never
waits.

(2) Stand-ins (`slotted_worker.py`) for a larger pool that is more unequal.  They do
the work of llama-server's main loop and prompt cache in the time that a real one takes,
which is measured first, times a factor for each machine.  This costs so little that
nothing waits for a core.

The contestants take turns within each round, and get the same requests.  For each, the
workers and the proxy are started afresh, so that their caches are empty.  A ratio is
always of two figures of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console

from benchmarks import command
from benchmarks.calibrate import Measured, calibrate
from benchmarks.chat import talking
from benchmarks.children import BenchmarkError, last_words, spawn
from benchmarks.clients import Habit, connected
from benchmarks.contestants import (
    Contestant,
    Pool,
    contestants,
)
from benchmarks.llama import Build, llama_servers, taking_turns
from benchmarks.proxies import Nginx, VllmRouter
from benchmarks.slotted_worker import Spec, spell
from benchmarks.standings import BASE, Bout, judge, remarks, table

PAUSE = 0.1  # seconds before a client goes on, on average
WIDTH = 256


class Kind(NamedTuple):
    """Some machines of a pool of stand-ins."""

    name: str
    machines: int
    slower: float  # than the real server that was measured
    slots: int
    kept: int  # states of conversations, beside those in the slots


REAL = [
    Build(layers=2, width=WIDTH, slots=4, context=2048),
    Build(layers=6, width=WIDTH, slots=2, context=2048),
    Build(layers=18, width=WIDTH, slots=2, context=2048),
]
REAL_CLIENTS = 16
STAND_INS = [
    Kind("card", 2, slower=3, slots=8, kept=64),
    Kind("mac", 3, slower=9, slots=4, kept=48),
    Kind("laptop", 5, slower=30, slots=2, kept=16),
]
STAND_IN_CLIENTS = 64


@dataclass(frozen=True)
class Arena:
    """The workers and clients of a comparison."""

    title: str
    about: list[str]
    pool: Callable[[Path], AbstractAsyncContextManager[Pool]]
    clients: int
    seconds: float


# --- The two pools ----------------------------------------------------------------


def real(options: argparse.Namespace) -> Arena:
    """Prepare the comparison before real llama-servers."""

    @contextlib.asynccontextmanager
    async def pool(folder: Path) -> AsyncIterator[Pool]:
        async with llama_servers(REAL, folder) as servers:
            ports = [server.port for server in servers]
            async with taking_turns(servers, folder):
                yield Pool(ports, [REAL[-1].layers / build.layers for build in REAL])

    layers = "; ".join(
        f"{build.slots} slots and {build.layers} layers" for build in REAL
    )
    about = [f"workers: llama-server -t 1 in turns, models of width {WIDTH}, {layers}"]
    seconds = options.seconds or 5.0
    return Arena("Real llama-servers", about, pool, REAL_CLIENTS, seconds)


async def stand_ins(options: argparse.Namespace, folder: Path) -> Arena:
    """Measure a real llama-server, and prepare the comparison before stand-ins."""
    async with llama_servers(REAL[:1], folder) as (server,):
        measured = await calibrate(server.port)
    kinds = [kind for kind in STAND_INS for _ in range(kind.machines)]

    @contextlib.asynccontextmanager
    async def pool(folder: Path) -> AsyncIterator[Pool]:
        specs = [_spec(kind, measured) for kind in kinds]
        async with _scripted(specs, folder) as ports:
            yield Pool(ports, [kinds[-1].slower / kind.slower for kind in kinds])

    same = _spec(Kind("same", 1, 1, REAL[0].slots, 64), measured)
    async with _scripted([same], folder) as (port,):
        checked = await calibrate(port)
    workers = ", ".join(
        f"{kind.machines} {kind.name}s (1/{kind.slower:g} of that, {kind.slots} slots)"
        for kind in STAND_INS
    )
    about = [
        f"measured, the first of the real ones: {measured}",
        f"measured, a stand-in of the same speed: {checked}",
        f"workers: {workers}",
    ]
    seconds = options.seconds or 6.0
    return Arena("Calibrated stand-ins", about, pool, STAND_IN_CLIENTS, seconds)


def _spec(kind: Kind, measured: Measured) -> Spec:
    pace = measured.pace.slowed(kind.slower)
    return Spec(pace, kind.slots, kind.kept, measured.token)


@contextlib.asynccontextmanager
async def _scripted(specs: list[Spec], folder: Path) -> AsyncIterator[list[int]]:
    """Run stand-ins while the context lasts; yields their ports."""
    log = folder / "stand-ins.log"
    async with spawn([sys.executable, "-m", "benchmarks.slotted_worker"], log) as child:
        assert child.process.stdin
        assert child.process.stdout
        child.process.stdin.write(spell(specs))
        line = await child.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"no stand-ins: {last_words(log)}")
        yield json.loads(line)


# --- Comparing --------------------------------------------------------------------


async def compare(options: argparse.Namespace, console: Console) -> None:
    """Measure all rounds and print the results."""
    Nginx.path()
    router = VllmRouter.find(options.vllm_router)
    chosen = [
        each
        for each in contestants(router)
        if options.only is None or each.name in {BASE, *options.only}
    ]
    print(_conditions(options, router))
    with tempfile.TemporaryDirectory(prefix="routing-") as name:
        folder = Path(name)
        for part in options.part or PARTS:
            with console.status("preparing"):
                if part == "real":
                    arena = real(options)
                else:
                    arena = await stand_ins(options, folder)
            bouts = await _rounds(arena, chosen, options, folder, console)
            print(f"\n### {arena.title}\n\n{table(bouts)}\n")
            clients = f"{arena.clients} clients, {arena.seconds:g} s measured in each"
            for line in (*arena.about, f"{clients} of {options.rounds} rounds"):
                print(f"* {line}")
            for line in remarks(bouts):
                print(f"* {line}", flush=True)


async def _rounds(
    arena: Arena,
    chosen: list[Contestant],
    options: argparse.Namespace,
    folder: Path,
    console: Console,
) -> dict[str, list[Bout]]:
    bouts: dict[str, list[Bout]] = {contestant.name: [] for contestant in chosen}
    for turn in range(options.rounds):
        for contestant in chosen:
            where = f"{arena.title}, round {turn + 1} of {options.rounds}"
            with console.status(f"{where}: {contestant.name}"):
                seed = f"{options.seed} {turn}"
                bout = await meet(arena, contestant, seed, options.warm_up, folder)
                bouts[contestant.name].append(bout)
        chosen = [*chosen[1:], chosen[0]]
    return bouts


async def meet(
    arena: Arena, contestant: Contestant, seed: str, warm_up: float, folder: Path
) -> Bout:
    """Let a contestant serve the clients, before workers with empty caches."""
    async with arena.pool(folder) as pool:
        proxy = contestant.make(pool, folder)
        come = talking(proxy.port, proxy.bearers, Habit(PAUSE, seed))
        async with proxy.running(), connected(arena.clients, come) as exchanges:
            await asyncio.sleep(warm_up)
            began, before = time.monotonic(), psutil.cpu_times()
            await asyncio.sleep(arena.seconds)
            ended, after = time.monotonic(), psutil.cpu_times()
        idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    busy = 1 - idle / (ended - began) / (os.cpu_count() or 1)
    return judge(exchanges, began, ended, busy)


def _conditions(options: argparse.Namespace, router: str | None) -> str:
    programs = [
        f"Python {platform.python_version()}",
        f"nginx {Nginx.version()}",
        f"vllm-router {VllmRouter.version(router)}"
        if router
        else "no vllm-router found",
    ]
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores, {', '.join(programs)};"
        f" medians of {options.rounds} rounds, ratios with the lowest and the highest."
        " TTFT: from the request to the first token. Cached: of the prompt tokens of"
        " second and later turns."
    )


# --- Command line -----------------------------------------------------------------

PARTS = ("real", "stand-ins")


def _parse() -> argparse.Namespace:
    parser = command.parser("routing", __doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help=f"only this, and {BASE}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="measured (real: 5, else 6)")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before")
    parser.add_argument("--seed", type=int, default=1, help="of the conversations")
    parser.add_argument("--vllm-router", metavar="PATH", help="the program")
    options = parser.parse_args()
    limited = {
        name: getattr(options, name) for name in ("rounds", "seconds", "warm_up")
    }
    command.require_positive(parser, **limited)
    return options


def main() -> int:
    options = _parse()
    return command.run(lambda: compare(options, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
