"""Hubs that share workers, in simulated time: how long slots are idle meanwhile.

Queue, admission, leases, demand and calls are the hub's own code, on an event loop
whose time jumps from one event to the next.  The store is `benchmarks/leases.py`,
behind a network that takes some time each way; the workers are numbers of requests.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import fmean, quantiles
from typing import Any, cast

import msgspec

from benchmarks.leases import Leases
from gollama_proxy.config.settings import (
    Config,
    Origin,
    WorkerConfig,
)
from gollama_proxy.config.settings import (
    Queue as Settings,
)
from gollama_proxy.fleet.lease import Result as End
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.sharing import Sharing
from gollama_proxy.scheduling.turns import Priority, Subject, Ticket
from gollama_proxy.state import slots
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.tasks import spawn
from gollama_proxy.wire.description import Check, Description, Model

MODEL = "simulated"
WARM_UP = 10.0  # seconds, not counted: every hub has joined by then


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for nothing: its time jumps to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is going to happen any more"
        self._loop.now += max(timeout, 0.0)
        return []


# --- The store ----------------------------------------------------------------------


class SimulatedStore:
    """The store as a hub sees it, behind a network with a latency in seconds."""

    prefix = "gollama"
    mode = Mode.UP
    epoch = "0" * 16

    def __init__(self, network: Network) -> None:
        self._network = network

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> bytes:
        network, (hub, packed) = self._network, (args[1], args[-1])
        network.calls += 1
        await asyncio.sleep(network.latency)
        now = round(asyncio.get_running_loop().time(), 3)
        asks = msgspec.msgpack.decode(packed, type=list[slots.SlotAsk])
        outcome = network.leases.sync(hub, asks, now)
        for other, grants in outcome.messages.items():
            message = [(worker, *grant) for worker, grant in grants]
            network.publish(f"{self.prefix}:grants:{other}", message)
        if outcome.wanted:
            network.publish(f"{self.prefix}:wanted", outcome.wanted)
        await asyncio.sleep(network.latency)
        return msgspec.msgpack.encode(outcome.replies)

    async def listen(self, channel: str, take: Callable[[bytes], None]) -> None:
        self._network.listeners.setdefault(channel, []).append(take)

    def subscribe_mode(self, callback: Callable[[Mode], None]) -> None:
        """The mode never changes."""

    def on_empty(self, callback: Callable[[], None]) -> None:
        """No data is ever lost."""


class Network:
    """All that hubs and the store exchange."""

    def __init__(self, latency: float) -> None:
        self.latency = latency  # seconds, one way
        self.leases = Leases()
        self.listeners: dict[str, list[Callable[[bytes], None]]] = {}
        self.calls = self.messages = 0

    def publish(self, channel: str, message: object) -> None:
        data = msgspec.msgpack.encode(message)
        for take in self.listeners.get(channel, ()):
            self.messages += 1
            asyncio.get_running_loop().call_later(self.latency, take, data)


# --- Hubs ---------------------------------------------------------------------------


@dataclass(eq=False)
class Plan:
    """A request that may use every worker, for as long as it takes."""

    pool: Pool
    ask: Ask

    @property
    def pools(self) -> Sequence[Pool]:
        return (self.pool,)

    def candidates(self) -> list[Worker]:
        return self.pool.available

    def can_wait(self, seconds: float) -> bool:
        return True

    def awaits(self, worker: Worker) -> bool:
        return False

    def reopens_in(self) -> float:
        return inf


@dataclass(eq=False)
class Request:
    """One request, as the queue sees it."""

    subject: str
    plan: Plan
    priority: Priority = Priority.INTERACTIVE
    max_concurrency: int = 0
    needs_slot: bool = True
    ticket: Ticket | None = None
    holder: Subject | None = None
    waited: float = 0.0


class Hub:
    """One hub without sockets: its queue, its workers, its share."""

    def __init__(self, run: Run, name: str) -> None:
        loop = asyncio.get_running_loop()
        configs = tuple(
            WorkerConfig(
                f"http://10.0.0.{n}:8080",
                Origin("http", f"10.0.0.{n}", 8080, ""),
                f"w{n}",
            )
            for n in range(run.case.workers)
        )
        config = Config(workers=configs)
        self.registry = Registry(config, loop.time)
        description = Description((Model(MODEL),), slots=run.case.slots)
        for worker in self.registry.workers:
            worker.observe(Check.OK, "ok", description)
        balancer = Balancer(self.registry, config, loop.time, random.Random(name))
        settings = Settings(size=1_000_000, timeout=1e9, notice=0.0)
        self.queue = Queue(balancer, settings, loop.time)
        self.sharing: Sharing | None = None
        if run.network is not None:
            store = cast("Store", SimulatedStore(run.network))
            self.sharing = Sharing(
                store,
                self.registry,
                self.queue,
                loop.time,
                hub=name,
                machine=name,
                hubs=lambda: run.names,
            )
        self._run = run

    async def serve(self, subject: str, seconds: float) -> None:
        run, loop = self._run, asyncio.get_running_loop()
        pool = self.registry.pool(MODEL)
        request = Request(subject, Plan(pool, Ask(MODEL)))
        arrived = loop.time()
        run.change(waiting=1)
        lease = self.queue.try_acquire(request) or await self.queue.acquire(request)
        run.change(waiting=-1, running=1)
        run.waits.append(loop.time() - arrived)
        await asyncio.sleep(seconds)
        run.change(running=-1)
        lease.release(End.COMPLETE)
        self.queue.leave(request)


# --- A run --------------------------------------------------------------------------


class Case(msgspec.Struct, frozen=True):
    """What is simulated.  `hubs` 0 is one hub that shares nothing."""

    hubs: int
    latency: float  # seconds from a hub to the store
    load: float  # of all slots
    workers: int = 16
    slots: int = 8
    seconds: float = 5.0  # of a request, on average
    duration: float = 60.0
    subjects: int = 40
    # The part of the requests that comes to one hub, another one every ten seconds.
    uneven: float = 0.0


class Result(msgspec.Struct, frozen=True):
    """What came of it, without the warm-up."""

    idle: float  # part of the slots' time that was idle while a request waited
    gaps: tuple[float, float]  # seconds of such an idle time: median and longest
    wait: tuple[float, float]  # seconds that requests waited: mean and 95th percentile
    calls: float  # of the store, for each request
    most: int  # requests that ran at once


@dataclass
class Run:
    """The hubs of one case, and what is counted of them."""

    case: Case
    seed: int
    names: list[str] = field(default_factory=list)
    network: Network | None = None
    waits: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        case = self.case
        self.slots = case.workers * case.slots
        self.running = self.waiting = self.most = 0
        self.idle = 0.0  # seconds of slots
        self._since: deque[float] = deque()  # when each idle slot became wanted
        self._changed_at = 0.0
        self.names = [f"{n:016x}" for n in range(max(case.hubs, 1))]
        if case.hubs:
            self.network = Network(case.latency)

    def change(self, waiting: int = 0, running: int = 0) -> None:
        """Count requests, and the slots that are idle while one waits."""
        now = asyncio.get_running_loop().time()
        self.idle += len(self._since) * (now - self._changed_at)
        self._changed_at = now
        self.waiting += waiting
        self.running += running
        self.most = max(self.most, self.running)
        wanted = max(0, min(self.waiting, self.slots - self.running))
        while len(self._since) < wanted:
            self._since.append(now)
        while len(self._since) > wanted:
            self.gaps.append(now - self._since.popleft())

    async def go(self) -> Result:
        case, rng = self.case, random.Random(self.seed)
        loop = asyncio.get_running_loop()
        hubs = [Hub(self, name) for name in self.names]
        for hub in hubs:
            if hub.sharing is not None:
                await hub.sharing.start()
        tasks = set()
        rate = case.load * self.slots / case.seconds
        counted, end = False, WARM_UP + case.duration
        for number in itertools.count():
            await asyncio.sleep(rng.expovariate(rate))
            now = loop.time()
            if not counted and now >= WARM_UP:
                counted = True
                self.idle = 0.0
                calls = self.network.calls if self.network else 0
                first, self.gaps, self.waits = number, [], []
            if now >= end:
                break
            hub = rng.choice(hubs)
            if rng.random() < case.uneven:
                hub = hubs[int(now / 10) % len(hubs)]
            subject = f"subject-{rng.randrange(case.subjects)}"
            seconds = rng.expovariate(1 / case.seconds)
            tasks.add(spawn(hub.serve(subject, seconds), "request"))
        self.change()
        calls = (self.network.calls if self.network else 0) - calls
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for hub in hubs:
            if hub.sharing is not None:
                await hub.sharing.stop()
        waits, gaps = self.waits, self.gaps or [0.0]
        return Result(
            self.idle / (self.slots * case.duration),
            (quantiles([*gaps, 0.0], n=2)[0], max(gaps)),
            (fmean(waits), quantiles(waits, n=20)[18]),
            calls / (number - first),
            self.most,
        )


def simulate(case: Case, seed: int = 1) -> Result:
    """Run one case, which takes some seconds of real time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(Run(case, seed).go())
