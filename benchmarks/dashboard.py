"""What open dashboards cost the hub, and how soon the page shows the workers.

A hub with 40 workers that stream at a fixed pace, and everything on this machine.  A
dashboard is a listener of `/admin/events` here, since the hub does the same for it as
for a page.  The numbers of dashboards take turns within each round, so that whatever
else the machine does affects all of them, and each ratio is of figures of one round.

The first view is measured in the system's Chromium, from the address of a one-time link
to the first worker on the page; without Chromium it is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from rich.console import Console

from benchmarks import command
from benchmarks.children import BenchmarkError
from benchmarks.load import Job, Kind
from benchmarks.measure import ENDLESS, Load, paced_workers
from benchmarks.proxies import Hub
from benchmarks.report import spread, table

WORKERS = 40
STREAMS = 200
RATE = 50.0  # tokens per second of a stream
DASHBOARDS = (0, 1, 10)
SETTLE = 0.5  # seconds between the arrival of dashboards and measuring
# In percent of a core, with so many dashboards.
SHARE_GOALS = {1: 1.0, 10: 3.0}
TOKEN_GOAL = 1.02
BYTES_GOAL = 100_000
VIEW_GOAL = 300.0  # milliseconds


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float  # with each number of dashboards


FULL = Plan(rounds=5, seconds=4.0)
QUICK = Plan(rounds=2, seconds=1.0)


@dataclass
class Costs:
    """What the hub used, by the number of dashboards; a value for each round."""

    share: dict[int, list[float]] = field(default_factory=dict)  # of a core
    token: dict[int, list[float]] = field(default_factory=dict)  # CPU seconds

    def beyond_none(self, count: int) -> list[float]:
        """Return the percents of a core that so many dashboards add."""
        pairs = zip(self.share[count], self.share[0], strict=True)
        return [100 * (some - none) for some, none in pairs]

    def ratios(self, count: int) -> list[float]:
        """Return what a token costs with so many dashboards, compared with none."""
        pairs = zip(self.token[count], self.token[0], strict=True)
        return [some / none for some, none in pairs]


@dataclass(frozen=True)
class View:
    """The first view of one visitor."""

    transferred: int  # bytes, with the heads of answers
    milliseconds: float


# --- Measuring --------------------------------------------------------------------


async def measure(options: argparse.Namespace, console: Console) -> None:
    """Measure everything and print the results."""
    plan: Plan = options.plan
    with tempfile.TemporaryDirectory(prefix="dashboard-") as name:
        folder = Path(name)
        async with paced_workers(WORKERS, RATE, folder) as ports:
            hub = Hub(ports, folder)
            async with hub.running():
                with console.status("an idle hub"):
                    idle = await costs(hub, plan)
                with console.status(f"{STREAMS} streams"):
                    async with _streaming(hub, STREAMS) as load:
                        busy = await costs(hub, plan, load)
                with console.status("the first view"):
                    views = await first_views(hub, plan.rounds)
    _print_costs(idle, busy, plan, console)
    _print_views(views, console)


async def costs(hub: Hub, plan: Plan, load: Load | None = None) -> Costs:
    """Measure the hub without dashboards and with some, in turns."""
    found = Costs()
    for turn in range(plan.rounds):
        order = DASHBOARDS if turn % 2 == 0 else DASHBOARDS[::-1]
        for count in order:
            async with listening(hub, count):
                await asyncio.sleep(SETTLE)
                began, cpu = time.monotonic(), hub.cpu_seconds()
                tokens = await load.count() if load else 0
                await asyncio.sleep(plan.seconds)
                cpu, seconds = hub.cpu_seconds() - cpu, time.monotonic() - began
                tokens = await load.count() - tokens if load else 0
            found.share.setdefault(count, []).append(cpu / seconds)
            if load is not None:
                if not tokens:
                    raise BenchmarkError("no token arrived")
                found.token.setdefault(count, []).append(cpu / tokens)
    return found


@contextlib.asynccontextmanager
async def _streaming(hub: Hub, streams: int) -> AsyncIterator[Load]:
    """Keep streams open, whose clients leave at the end of the context."""
    job = Job(hub.port, streams, Kind.STREAM, ENDLESS, bearers=hub.bearers)
    async with Load.running(job, hub.folder) as load:
        await load.expect("open")
        yield load


@contextlib.asynccontextmanager
async def listening(hub: Hub, count: int) -> AsyncIterator[None]:
    """Keep so many dashboards open.

    Raises:
        BenchmarkError: the hub refused one.
    """
    tasks = []
    writers = []
    try:
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
            writers.append(writer)
            writer.write(_request("GET", "/admin/events", operator(hub)))
            status = await reader.readline()
            if b" 200 " not in status:
                raise BenchmarkError(f"a dashboard was refused: {status.decode()}")
            tasks.append(asyncio.create_task(_drink(reader)))
        yield
        if any(task.done() for task in tasks):
            raise BenchmarkError("a dashboard lost its events")
    finally:
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()


async def _drink(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


def operator(hub: Hub) -> str:
    """Return a token that may see everything."""
    claims = {"sub": "operator", "exp": int(time.time()) + 86_400, "scope": "admin"}
    return jwt.encode(claims, hub.secret, algorithm="HS256")


def _request(method: str, path: str, bearer: str) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {bearer}\r\nContent-Length: 0\r\n\r\n"
    ).encode()


# --- The first view ---------------------------------------------------------------

# Resolves in the page once it shows a worker; the result is in milliseconds since the
# start of the navigation.
_SHOWN = """
new Promise(resolve => {
  const look = () => {
    if (document.querySelector("[data-worker]")) resolve(performance.now());
    else requestAnimationFrame(look);
  };
  look();
})
"""


async def first_views(hub: Hub, count: int) -> list[View]:
    """Open the page so often, each time without anything in the browser's cache."""
    path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if path is None:
        return []
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path)
        # The first context of a browser is slower than all others.
        return [await _first_view(hub, browser) for _ in range(count + 1)][1:]


async def _first_view(hub: Hub, browser: Any) -> View:
    context = await browser.new_context()
    api = f"http://127.0.0.1:{hub.port}"
    headers = {"Authorization": f"Bearer {operator(hub)}"}
    answer = await context.request.post(f"{api}/admin/links", headers=headers)
    if answer.status != 201:
        raise BenchmarkError(f"no link: {answer.status} {await answer.text()}")
    link = (await answer.json())["path"]
    page = await context.new_page()
    network = await context.new_cdp_session(page)
    await network.send("Network.enable")
    transferred = 0

    def loaded(event: dict[str, Any]) -> None:
        nonlocal transferred
        transferred += event["encodedDataLength"]

    network.on("Network.loadingFinished", loaded)
    await page.goto(api + link)
    shown: float = await page.evaluate(_SHOWN)
    await context.close()
    return View(transferred, shown)


# --- Printing ---------------------------------------------------------------------


def _print_costs(idle: Costs, busy: Costs, plan: Plan, console: Console) -> None:
    console.print(
        f"{WORKERS} workers; {STREAMS} streams of {RATE:g} tokens/s where it is not"
        f" idle\nPython {platform.python_version()}, {os.cpu_count()} cores; median of"
        f" {plan.rounds} rounds (lowest - highest)\n",
        highlight=False,
    )
    headings = [f"{count} open" for count in DASHBOARDS if count]
    shown = table("What dashboards add", *headings, "goals")
    goals = " and ".join(f"{goal:g}" for goal in SHARE_GOALS.values())
    for name, found in (("idle hub", idle), ("busy hub", busy)):
        added = [spread(found.beyond_none(n), 2) for n in DASHBOARDS if n]
        shown.add_row(f"{name}, % of a core", *added, f"under {goals}")
    ratios = [spread(busy.ratios(n), 3) for n in DASHBOARDS if n]
    shown.add_row("relayed token, ratio", *ratios, f"under {TOKEN_GOAL:g} for one")
    console.print(shown, highlight=False)
    microseconds = [1e6 * each for each in busy.token[0]]
    console.print(
        f"a token without dashboards: {spread(microseconds, 1)} µs; the idle hub:"
        f" {spread([100 * each for each in idle.share[0]], 2)} % of a core\n",
        highlight=False,
    )


def _print_views(views: Sequence[View], console: Console) -> None:
    if not views:
        console.print("no chromium: the first view was not measured", highlight=False)
        return
    shown = table("First view", "found", "goal")
    transferred = [view.transferred / 1000 for view in views]
    times = [view.milliseconds for view in views]
    goal = f"under {BYTES_GOAL / 1000:g}"
    shown.add_row("transferred, kB", spread(transferred, 1), goal)
    shown.add_row("to the first worker, ms", spread(times, 0), f"under {VIEW_GOAL:g}")
    console.print(shown, highlight=False)


# --- Command line -----------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = command.parser("dashboard", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="half a minute, and less exact"
    )
    options = parser.parse_args()
    options.plan = QUICK if options.quick else FULL
    return options


def main() -> int:
    options, console = _parse(), Console()
    return command.run(lambda: measure(options, console))


if __name__ == "__main__":
    sys.exit(main())
