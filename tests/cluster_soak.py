"""A minute of 200 clients on 4 slots through several hubs, while store and hubs fail.

    make soak-cluster      python -m tests.cluster_soak --hubs 4 --seconds 120

The worker counts what it gets at once.  Each line is a part of the time:

    most      requests on the worker at once: never more than its slots, except that a
              hub which is cut off for longer than its leases last keeps its part
    answers   that were complete
    broken    that broke off or failed; only those of a hub that was killed may
    waited    the longest time from a question to its answer, in seconds
    fewest    answers of the subject with the fewest, as a share of that with the most

The status is 1 if a request was lost, or the worker had too many.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import uvloop

from gollama_proxy.state.slots import LIFETIME
from tests.fakes.crowd import PATIENT, CountingWorker, Crowd, acts_with
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.valkey import ENGINES, Partition, StoreServer, running_store
from tests.fakes.waiting import until

SLOTS = 4
SUBJECTS = 20
PACE = 0.02  # seconds of an answer


class Site:
    """A store, hubs and a worker, and the clients of the hubs."""

    def __init__(
        self, worker: CountingWorker, store: StoreServer, network: Partition
    ) -> None:
        self.worker, self.store, self.network = worker, store, network
        self.hubs: list[HubProcess] = []
        self.crowd = Crowd()
        self.by_subject: Counter[str] = Counter()
        self.killed = False  # a hub, in this part
        self.flaws: list[str] = []
        self._longest = 0.0
        self._numbers = itertools.count()

    def __repr__(self) -> str:
        return f"<Site hubs={len(self.hubs)} {self.crowd!r}>"

    async def visit(self, subject: str, rng: random.Random) -> None:
        """Ask one question after the other, at any hub."""
        while True:
            hub, began = rng.choice(self.hubs), time.monotonic()
            question = f"{subject} {next(self._numbers)}"
            outcome = await self.crowd.ask(hub, question)
            self._longest = max(self._longest, time.monotonic() - began)
            if outcome == "complete":
                self.by_subject[subject] += 1
            elif hub in self.hubs and not self.killed:
                self.flaws.append(outcome)
            else:
                await asyncio.sleep(0.05)

    async def begin(self) -> None:
        """Begin to count a part of the time, when all hubs use the store."""
        for hub in self.hubs:
            await acts_with(hub, len(self.hubs))
        await until(lambda: self.worker.running <= SLOTS)
        self.worker.most = self.worker.running
        self.crowd.outcomes.clear()
        self.by_subject.clear()
        self._longest, self.killed = 0.0, False

    def line(self, name: str) -> str:
        """Describe the part of the time that ends."""
        outcomes = self.crowd.outcomes
        complete = outcomes["complete"]
        counts = [self.by_subject[f"user-{n}"] for n in range(SUBJECTS)]
        share = min(counts) / max(counts) if max(counts) else 0.0
        return (
            f"{name:<34}{self.worker.most:>6}{complete:>9}"
            f"{outcomes.total() - complete:>8}{self._longest:>8.1f}{share:>8.2f}"
        )


@contextlib.asynccontextmanager
async def running_site(hubs: int, engine: str, folder: Path) -> AsyncIterator[Site]:
    """Run all of it; the last hub reaches the store through a network."""
    async with (
        running_store(folder, engine) as store,
        Partition(store.socket, folder / "net") as network,
        CountingWorker(SLOTS, PACE) as worker,
        contextlib.AsyncExitStack() as stack,
    ):
        site = Site(worker, store, network)
        for number in range(hubs):
            url = network.url if number == hubs - 1 else store.url
            hub = hub_process(worker.url, state__url=url, **PATIENT)
            site.hubs.append(await stack.enter_async_context(hub))
        for each in site.hubs:
            await acts_with(each, hubs)
        yield site


async def soak(hubs: int, clients: int, seconds: float, engine: str) -> int:
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        async with running_site(hubs, engine, Path(folder)) as site:
            visitors = [
                asyncio.create_task(
                    site.visit(f"user-{n % SUBJECTS}", random.Random(n)),
                    name=f"fake client {n}",
                )
                for n in range(clients)
            ]
            print(f"{'most':>40}{'answers':>9}{'broken':>8}{'waited':>8}{'fewest':>8}")
            for name, fail, mend in parts(site):
                await site.begin()
                await fail()
                await asyncio.sleep(seconds / 6)
                await mend()
                allowed = SLOTS
                if "cut off" in name and seconds / 6 > LIFETIME:
                    allowed += SLOTS // hubs
                print(site.line(name), flush=True)
                if site.worker.most > allowed:
                    site.flaws.append(f"{name}: {site.worker.most} on the worker")
            for each in visitors:
                each.cancel()
            await asyncio.wait(visitors)
            for text, count in Counter(site.flaws).items():
                print(f"{count} x {text}")
            return 1 if site.flaws else 0


Action = Callable[[], Awaitable[None]]


def parts(site: Site) -> list[tuple[str, Action, Action]]:
    """Return the parts of the time: what fails, and how it is mended."""
    store, network = site.store, site.network

    async def nothing() -> None:
        pass

    async def pause() -> None:
        store.pause()

    async def go_on() -> None:
        store.go_on()

    async def start() -> None:
        await store.start()

    async def drop() -> None:
        network.drop()

    async def heal() -> None:
        network.heal()
        network.cut()

    async def kill_hub() -> None:
        site.killed = True
        os.kill(site.hubs.pop(0).pid, signal.SIGKILL)

    return [
        ("nothing fails", nothing, nothing),
        ("the store is killed", store.kill, start),
        ("it restarts empty", store.restart, nothing),
        ("it is paused (SIGSTOP)", pause, go_on),
        ("a hub is cut off from the store", drop, heal),
        ("a hub is killed", kill_hub, nothing),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster_soak")
    parser.add_argument("--hubs", type=int, default=2)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=72.0)
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    args = parser.parse_args()
    return uvloop.run(soak(args.hubs, args.clients, args.seconds, args.engine))


if __name__ == "__main__":
    sys.exit(main())
