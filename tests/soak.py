"""Twenty thousand requests with faults; afterwards nothing may be left of them.

    make soak          python -m tests.soak --requests 20000 --seed 1

The hub runs in a separate process.  Its files, its requests in flight and its memory
are looked at while it works and when all is over.  The status is 1 where something is
left, or where an answer was not what it claimed to be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import re
import statistics
import sys
import time
from typing import Any

import uvloop

from gollama_proxy.config.settings import Rescue
from tests.fakes.asks import MIB
from tests.fakes.faults import Faults
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.visitors import Visitors
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker

VISITORS = 24
RATE = 0.15  # of the executions fail
# Executions of one request: attempts, and so many more to go on with a broken answer.
EXECUTIONS = 3 + Rescue().attempts
# Requests before anything is measured, while pools, caches and the heap fill up.
WARM_UP = 2_000
QUARTERS = 4
SAMPLE_EVERY = 50  # requests, of the memory
# What the median of the last quarter may be above that of the third.  A sound hub grows
# by up to 2.7 MiB between these two: by 0.9 as it remembers conversations (of which
# `affinity` keeps a limited number), and otherwise by garbage that waits for a
# collection of the oldest generation, which a request without trouble no longer brings
# nearer.  One that kept the `Record` of each request would grow by 3.9 MiB more.
TOLERANCE = 4 * MIB

SETTINGS: dict[str, Any] = {
    "timeouts__gap": 0.5,
    "timeouts__allowance": 0.5,
    "timeouts__first_token": 2,
    "timeouts__silence": 2,
    "health__interval": 1,
    "health__recheck": 0.05,
    "retry__attempts": 3,
    "retry__ratio": 0.5,
    "breaker__consecutive": 20,
    "breaker__minimum_calls": 40,
    "breaker__proofs": 1,
    "breaker__open": 0.2,
    "breaker__open_max": 0.5,
    "breaker__ramp": 0.5,
    "breaker__busy_max": 0.1,
}


class Soak:
    """A hub under load, and what is seen of it."""

    def __init__(
        self, hub: HubProcess, workers: list[ScriptedWorker], faults: Faults, seed: int
    ) -> None:
        self.visitors = Visitors(hub.port, faults, seed=seed, visitors=VISITORS)
        self.quarters: list[float] = []  # median of the memory
        self.files = (0, 0)  # before and after
        self.in_flight = math.nan
        self.up = 0  # workers, after all
        self.uncounted = math.nan  # requests that are in no series of the outcomes
        self._hub = hub
        self._workers = workers
        self._faults = faults
        self._scrapes = 0

    def __repr__(self) -> str:
        return f"<Soak of {self._hub!r} by {self.visitors!r}>"

    async def run(self, number: int) -> None:
        await self.visitors.send(WARM_UP)
        await self._calm_down()
        before = await settled(self._hub.descriptors)
        counted = await self._metric("gollama_outcomes_total")
        scraped = self._scrapes
        for quarter in range(1, QUARTERS + 1):
            await self._quarter(number // QUARTERS, f"quarter {quarter} of {QUARTERS}")
        self._faults.heal()
        await self._calm_down()
        with contextlib.suppress(TimeoutError):
            await until(lambda: self._hub.descriptors() <= before)
        self.files = before, self._hub.descriptors()
        self.in_flight = await self._metric("gollama_in_flight")
        self.up = await self._recovered()
        counted = await self._metric("gollama_outcomes_total") - counted
        made = self.visitors.ended - WARM_UP + self._scrapes - scraped
        self.uncounted = made - counted

    async def _quarter(self, number: int, name: str) -> None:
        sizes: list[int] = []
        began = time.monotonic()

        def look() -> None:
            if self.visitors.ended % SAMPLE_EVERY == 0:
                sizes.append(self._hub.resident())
                for worker in self._workers:
                    worker.requests.clear()
                    worker.control.clear()

        await self.visitors.send(number, look)
        sizes.append(self._hub.resident())
        self.quarters.append(statistics.median(sizes) / MIB)
        speed = number / (time.monotonic() - began)
        print(
            f"{name}: {speed:.0f} requests/s, {self._hub.descriptors()} files, "
            f"{self.quarters[-1]:.2f} MiB, {len(self.visitors.flaws)} flaws",
            flush=True,
        )

    async def _calm_down(self) -> None:
        """Wait for the end of all that goes on, and for idle connections to close."""
        await until(lambda: not self._faults.running)
        for worker in self._workers:
            await worker.down()
            await worker.up()
            worker.requests.clear()

    async def _recovered(self) -> int:
        """Wait until every breaker is closed; return how many workers are in use."""
        up = 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE):
                while (up := await self._metric("gollama_worker_up")) < len(
                    self._workers
                ):
                    await asyncio.sleep(0.1)
        return int(up)

    async def _metric(self, name: str) -> float:
        """Add up all series of a metric."""
        self._scrapes += 1
        series = re.findall(rf"^{name}{{.*}} (\S+)$", await self._hub.metrics(), re.M)
        return sum(map(float, series))

    # --- The end ------------------------------------------------------------------

    def summary(self) -> str:
        outcomes = sorted(self.visitors.outcomes.items())
        executed = sum(self._faults.drawn.values())
        failed = executed - self._faults.drawn[None]
        before, after = self.files
        return "\n".join(
            [
                f"requests    {self.visitors.ended}, the first {WARM_UP} to warm up",
                *(f"  {count:6d}    {outcome}" for outcome, count in outcomes),
                f"executions  {executed} by workers, {failed} of them failed",
                f"files       {before} before, {after} after",
                f"in flight   {self.in_flight:g}",
                f"workers     {self.up} of {len(self._workers)} in use again",
                f"uncounted   {self.uncounted:g}",
                "memory      "
                + ", ".join(f"{size:.2f}" for size in self.quarters)
                + " MiB: the medians of the quarters",
            ]
        )

    def violations(self) -> list[str]:
        """List what is not as it should be."""
        found = [*self.visitors.flaws, *self._hub.complaints]
        before, after = self.files
        if after > before:
            found.append(f"{after - before} files or sockets are left")
        if self.in_flight:
            found.append(f"{self.in_flight:g} requests are still in flight")
        if self.up < len(self._workers):
            found.append(f"only {self.up} workers are in use again")
        # A client that sent a request and closed at once may not have been seen.
        if not 0 <= self.uncounted <= self.visitors.outcomes["left"]:
            found.append(f"{self.uncounted:g} requests are in no outcome")
        grown = self.quarters[-1] - self.quarters[-2]
        if grown > TOLERANCE / MIB:
            found.append(f"the memory grew by {grown:.2f} MiB in the last quarter")
        return found + [
            f"request {key} was executed {number} times"
            for key, number in self._faults.executions.items()
            if number > EXECUTIONS
        ]


async def main(number: int, seed: int) -> int:
    faults = Faults(seed, RATE)
    async with faults.workers() as workers:
        urls = [worker.url for worker in workers]
        environ = {"PYTHONWARNINGS": "error"}
        async with hub_process(*urls, environ=environ, **SETTINGS) as hub:
            soak = Soak(hub, workers, faults, seed)
            await soak.run(number)
    print(soak.summary())
    violations = soak.violations()
    for violation in violations[:20]:
        print(f"VIOLATION: {violation}")
    print(f"seed {seed}: {len(violations)} violations")
    return min(len(violations), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(uvloop.run(main(given.requests, given.seed)))
