"""What the page of metrics shows of the present, read at each scrape."""

from __future__ import annotations

import enum
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Protocol

from gollama_proxy import __version__
from gollama_proxy.fleet.breaker import Breaker, BreakerState, Cause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.exposition import Collected, Histogram
from gollama_proxy.telemetry.families import (
    BREAKER,
    BUILD,
    CONNECTIONS,
    CPU,
    HUBS,
    IN_FLIGHT,
    MOST_FILES,
    OPEN_FILES,
    OPENED,
    OPENINGS,
    POOL,
    READS,
    REFUSED,
    RESIDENT,
    RETRIES,
    REUSED,
    ROOM,
    SLOTS,
    STARTED,
    STATE,
    STORE_FAILURES,
    STORE_MODE,
    STORE_OPERATIONS,
    STORE_OUTAGES,
    STORE_SECONDS,
    TRANSITIONS,
    UP,
    VIRTUAL,
    WAITING,
    WRITES,
)
from gollama_proxy.upstream.pool import ConnectionPool

MOST_VALUES = 64  # of a series, until they are counted: a large fleet has many of them


class FleetMetrics:
    """Reads the state of the workers and of the queue in front of them."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        connections: Mapping[Worker, ConnectionPool],
        tokens_of: Callable[[str, int], int],
        models: Container[str],
    ) -> None:
        """Make one; `models` are those with a label."""
        self._registry, self._admission = registry, admission
        self._connections = connections
        self._tokens_of = tokens_of
        self._models = models

    def __repr__(self) -> str:
        return f"<FleetMetrics workers={len(self._registry.workers)}>"

    def collect(self) -> Iterator[Collected]:
        """Return what there is at a scrape."""
        yield BUILD, [(BUILD.at(__version__, platform.python_version()), 1)]
        workers = tuple(self._registry.workers)
        at = {worker: UP.at(worker.name) for worker in workers}
        yield UP, [(at[worker], int(worker.available)) for worker in workers]
        yield (
            STATE,
            (
                (f'state="{state.value}",{at[worker]}', int(worker.state is state))
                for worker in workers
                for state in WorkerState
            ),
        )
        yield IN_FLIGHT, [(at[worker], worker.in_flight) for worker in workers]
        yield (
            SLOTS,
            [
                (at[worker], worker.description.slots)
                for worker in workers
                if worker.description is not None and worker.description.slots
            ],
        )
        admission = self._admission
        waiting = [(WAITING.at(str(p)), admission.waiting_in(p)) for p in Priority]
        yield WAITING, waiting
        yield ROOM, [("", admission.settings.size)]
        yield from self._collect_breakers(workers)
        yield from self._collect_speed(workers)
        yield from self._collect_connections(at)

    def _collect_breakers(self, workers: tuple[Worker, ...]) -> Iterator[Collected]:
        """Read the breaker of each worker, and those of its models by `model`."""
        found: list[tuple[str, str, Breaker]] = []
        for worker in workers:
            at = UP.at(worker.name)
            for model, breaker in {"": worker.breaker, **worker.model_breakers}.items():
                if model in self._models:
                    found.append((RETRIES.at(model), at, breaker))
        states, causes = [*BreakerState], [*Cause]
        yield (
            BREAKER,
            (
                (f'{model},state="{state.value}",{at}', int(breaker.state is state))
                for (model, at, breaker), state in product(found, states)
            ),
        )
        yield (
            TRANSITIONS,
            (
                (f'{model},state="{state.value}",{at}', breaker.transitions[state])
                for (model, at, breaker), state in product(found, states)
            ),
        )
        yield (
            OPENINGS,
            (
                (f'cause="{cause.name.lower()}",{model},{at}', breaker.causes[cause])
                for (model, at, breaker), cause in product(found, causes)
            ),
        )

    def _collect_speed(self, workers: tuple[Worker, ...]) -> Iterator[Collected]:
        """Read what has been learnt about each worker and model."""
        reads, writes = [], []
        for worker in workers:
            beside = max(worker.in_flight, 1)
            for model, pace in worker.paces.items():
                if model not in self._models:
                    continue
                at, speed = READS.at(worker.name, model), pace.speed
                if speed.reads is not None:
                    reads.append((at, self._tokens_of(model, int(speed.reads))))
                if (rate := speed.writes(beside)) is not None:
                    writes.append((at, rate))
        yield READS, reads
        yield WRITES, writes

    def _collect_connections(self, at: Mapping[Worker, str]) -> Iterator[Collected]:
        pools = [(at[w], pool) for w, pool in self._connections.items() if w in at]
        kept = []
        for where, pool in pools:
            kept.append((f'state="idle",{where}', pool.idle))
            kept.append((f'state="in_use",{where}', pool.in_use))
        yield POOL, kept
        yield OPENED, [(where, pool.opened) for where, pool in pools]
        yield REUSED, [(where, pool.reused) for where, pool in pools]


class Clients(Protocol):
    """Counts of clients' connections."""

    open: int
    refused: Counter[str]  # by reason


class ClientMetrics:
    """Reads the number of connections of clients."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def __repr__(self) -> str:
        return f"<ClientMetrics of {self._clients!r}>"

    def collect(self) -> Iterator[Collected]:
        """Return what there is at a scrape."""
        yield CONNECTIONS, [("", self._clients.open)]
        refused = self._clients.refused.items()
        yield REFUSED, [(REFUSED.at(reason), count) for reason, count in refused]


class SharedStore(Protocol):
    """The connection to the store."""

    @property
    def mode(self) -> enum.Enum: ...

    operations: int
    failures: int
    outages: int
    observe: Callable[[float], None]


class StoreMetrics:
    """Reads the connection to the store, and times its answers."""

    def __init__(self, store: SharedStore, hubs: Callable[[], int]) -> None:
        """Follow a connection; `hubs` returns how many there are."""
        self._store, self._hubs = store, hubs
        self._seconds = Histogram(STORE_SECONDS)
        store.observe = self._observe

    def __repr__(self) -> str:
        return f"<StoreMetrics of {self._store!r}>"

    def _observe(self, seconds: float) -> None:
        values = self._seconds.values
        values.append(seconds)
        if len(values) >= MOST_VALUES:
            self._seconds.count()

    def collect(self) -> Iterator[Collected]:
        """Return what there is at a scrape."""
        store = self._store
        modes = type(store.mode)
        yield (
            STORE_MODE,
            [(STORE_MODE.at(m.value), int(m is store.mode)) for m in modes],
        )
        yield STORE_OPERATIONS, [("", store.operations)]
        yield STORE_FAILURES, [("", store.failures)]
        yield STORE_OUTAGES, [("", store.outages)]
        yield STORE_SECONDS, [self._seconds]
        yield HUBS, [("", self._hubs())]


# --- The process ------------------------------------------------------------------


def of_process(proc: Path = Path("/proc")) -> Iterator[Collected]:
    """Read what the kernel knows of this process; nothing where there is no /proc."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
        boot = re.search(r"^btime (\d+)$", (proc / "stat").read_text(), re.MULTILINE)
        limit = re.search(
            r"^Max open files +(\d+)", (proc / "self/limits").read_text(), re.MULTILINE
        )
        files = sum(1 for _ in (proc / "self/fd").iterdir())
    except OSError:
        return
    ticks = os.sysconf("SC_CLK_TCK")
    yield CPU, [("", (int(fields[11]) + int(fields[12])) / ticks)]
    yield VIRTUAL, [("", int(fields[20]))]
    yield RESIDENT, [("", int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))]
    if boot is not None:
        yield STARTED, [("", int(boot[1]) + int(fields[19]) / ticks)]
    yield OPEN_FILES, [("", files)]
    if limit is not None:  # else "unlimited"
        yield MOST_FILES, [("", int(limit[1]))]
