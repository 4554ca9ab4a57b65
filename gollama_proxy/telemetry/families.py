"""The metrics that there are, declared once, and those of the present.

The page of metrics, the documentation and the checks of dashboard and alerts follow the
declarations: names, types, labels and buckets.  What has been counted is in
`metrics.py`; what is true at the moment is read here, at each scrape.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gollama_proxy import __version__
from gollama_proxy.fleet.breaker import Breaker, BreakerState, OpenCause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.exposition import Collected, Family, Histogram
from gollama_proxy.upstream.pool import ConnectionPool

if TYPE_CHECKING:
    from gollama_proxy.state.store import Store

# Prompt processing takes from milliseconds on a GPU to minutes on a laptop.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# The buckets that OpenTelemetry recommends for the metrics of GenAI servers, and longer
# ones behind them.
DURATIONS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48),
    *(40.96, 81.92, 163.84, 327.68, 655.36),
)
FIRST_TOKENS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 30.0, 60.0, 120.0, 300.0),
)
EACH_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(4**exponent for exponent in range(14))
WAITS = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROUND_TRIPS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05)
LAGS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Requests that have ended
REQUESTS = Family(
    "gollama_requests_total",
    "counter",
    "Requests that have ended.",
    ("route", "status", "model", "worker"),
)
OUTCOMES = Family(
    "gollama_outcomes_total",
    "counter",
    "How requests ended: complete, an error code, or client_gone.",
    ("outcome", "model", "worker"),
)
DURATION = Family(
    "gollama_request_duration_seconds",
    "histogram",
    "From the request's head to the end of the answer.",
    ("route", "model", "worker"),
    DURATIONS,
)
FIRST_BYTE = Family(
    "gollama_time_to_first_byte_seconds",
    "histogram",
    "From the request's head to the first byte or event of the answer.",
    ("route", "model", "worker"),
    SECONDS,
)
FIRST_TOKEN = Family(
    "gollama_time_to_first_token_seconds",
    "histogram",
    "From the request's head to the first token of an answer that a worker streamed to "
    "its end.",
    ("model", "worker"),
    FIRST_TOKENS,
)
PER_TOKEN = Family(
    "gollama_time_per_output_token_seconds",
    "histogram",
    "Mean time between the tokens of an answer that a worker streamed to its end.",
    ("model", "worker"),
    EACH_TOKEN,
)
QUEUED = Family(
    "gollama_queue_time_seconds",
    "histogram",
    "How long requests waited for a slot; 0 if one was free.",
    ("model", "worker"),
    WAITS,
)
RETRIES = Family(
    "gollama_retries_total",
    "counter",
    "Attempts beyond the first, of requests that had several.",
    ("model",),
)
RESCUES = Family(
    "gollama_rescues_total",
    "counter",
    "Continuations of an answer that had broken off, by how it ended.",
    ("model", "outcome"),
)
FALLBACKS = Family(
    "gollama_fallbacks_total",
    "counter",
    "Requests for a model that went to another one.",
    ("model", "fallback"),
)
# Tokens
RELAYED = Family(
    "gollama_tokens_relayed_total",
    "counter",
    "Generated tokens, as the worker counted them, else events.",
    ("model", "worker"),
)
PROMPTS = Family(
    "gollama_prompt_tokens_total",
    "counter",
    "Tokens of prompts.",
    ("model", "worker"),
)
CACHED = Family(
    "gollama_prompt_tokens_cached_total",
    "counter",
    "Tokens of prompts that the worker had in its cache.",
    ("model", "worker"),
)
SIZES = Family(
    "gollama_request_tokens",
    "histogram",
    "Tokens of each request: type input for its prompt, output for its answer.",
    ("model", "type"),
    TOKENS,
)
# Subjects
USED_REQUESTS = Family(
    "gollama_usage_requests_total",
    "counter",
    "Requests for a model, by the subject of the token.",
    ("subject", "model"),
)
USED_PROMPTS = Family(
    "gollama_usage_prompt_tokens_total",
    "counter",
    "Tokens of prompts, by the subject of the token.",
    ("subject", "model"),
)
USED_CACHED = Family(
    "gollama_usage_cached_tokens_total",
    "counter",
    "Tokens of prompts that a worker had in its cache, by the subject of the token.",
    ("subject", "model"),
)
USED_GENERATED = Family(
    "gollama_usage_generated_tokens_total",
    "counter",
    "Generated tokens, by the subject of the token.",
    ("subject", "model"),
)
USED_SLOTS = Family(
    "gollama_usage_slot_seconds_total",
    "counter",
    "How long requests held slots, by the subject of the token.",
    ("subject", "model"),
)
LIMITED = Family(
    "gollama_limited_requests_total",
    "counter",
    "Requests that got a 429, by the code of the error: a limit of the subject, or a "
    "full queue.",
    ("subject", "reason"),
)
# The present
BUILD = Family(
    "gollama_build_info",
    "gauge",
    "Version of the hub.",
    ("version", "python"),
    whole="highest",
)
UP = Family(
    "gollama_worker_up",
    "gauge",
    "1 while a worker accepts requests, else 0.",
    ("worker",),
    whole="highest",
)
STATE = Family(
    "gollama_worker_state",
    "gauge",
    "1 for the present state, else 0.",
    ("worker", "state"),
    whole="highest",
)
IN_FLIGHT = Family(
    "gollama_in_flight", "gauge", "Requests that a worker is serving.", ("worker",)
)
SLOTS = Family(
    "gollama_worker_slots",
    "gauge",
    "Generations that a worker runs at once.",
    ("worker",),
    whole="highest",
)
READS = Family(
    "gollama_worker_prefill_tokens_per_second",
    "gauge",
    "How fast a worker reads prompts, learnt from its last answers.",
    ("worker", "model"),
    whole="highest",
)
WRITES = Family(
    "gollama_worker_decode_tokens_per_second",
    "gauge",
    "How fast a worker writes each of its present answers, learnt from its last ones.",
    ("worker", "model"),
    whole="highest",
)
BREAKER = Family(
    "gollama_breaker_state",
    "gauge",
    "1 for the present state, else 0; of a worker, or of one of its models.",
    ("worker", "model", "state"),
    whole="highest",
)
TRANSITIONS = Family(
    "gollama_breaker_transitions_total",
    "counter",
    "Times that a breaker changed into a state.",
    ("worker", "model", "state"),
)
OPENINGS = Family(
    "gollama_breaker_openings_total",
    "counter",
    "Times that a breaker opened, by cause.",
    ("worker", "model", "cause"),
)
POOL = Family(
    "gollama_worker_connections",
    "gauge",
    "Connections to a worker: idle, or in use by a request.",
    ("worker", "state"),
)
OPENED = Family(
    "gollama_worker_connections_opened_total",
    "counter",
    "Connections to a worker that were opened for requests.",
    ("worker",),
)
REUSED = Family(
    "gollama_worker_connections_reused_total",
    "counter",
    "Requests that were sent on an idle connection.",
    ("worker",),
)
WAITING = Family(
    "gollama_queue_waiting", "gauge", "Requests waiting for a slot.", ("class",)
)
ROOM = Family(
    "gollama_queue_limit", "gauge", "Requests that may wait for a slot: queue.size."
)
CONNECTIONS = Family("gollama_connections", "gauge", "Open connections of clients.")
REFUSED = Family(
    "gollama_connections_refused_total",
    "counter",
    "Connections closed at once: over a limit, or without TLS.",
    ("reason",),
)
LAG = Family(
    "gollama_event_loop_lag_seconds",
    "histogram",
    "By how much a step of the event loop that is due once a second was late.",
    (),
    LAGS,
)

EXPIRY = Family(
    "gollama_certificate_expiry_timestamp_seconds",
    "gauge",
    "When the first certificate of the hub expires, Unix time.",
    whole="lowest",
)
RELOADED = Family(
    "gollama_config_last_reload_successful",
    "gauge",
    "1 if the settings were valid when they were last read, else 0.",
    whole="lowest",
)
RELOADED_AT = Family(
    "gollama_config_last_reload_success_timestamp_seconds",
    "gauge",
    "When the settings in force were read, Unix time.",
    whole="lowest",
)

# Several hubs; only with `state.url`.
STORE_MODE = Family(
    "gollama_store_mode",
    "gauge",
    "1 for the mode of the connection to the store: up, down or probing.",
    ("mode",),
    whole="highest",
)
STORE_OPERATIONS = Family(
    "gollama_store_operations_total", "counter", "Commands that the store has answered."
)
STORE_FAILURES = Family(
    "gollama_store_failures_total",
    "counter",
    "Calls that the store rejected, or did not answer within 50 ms.",
)
STORE_OUTAGES = Family(
    "gollama_store_outages_total",
    "counter",
    "How often the connection to the store was lost.",
)
STORE_SECONDS = Family(
    "gollama_store_seconds",
    "histogram",
    "How long the store took to answer.",
    (),
    ROUND_TRIPS,
)
HUBS = Family(
    "gollama_hubs",
    "gauge",
    "Hubs that share the store, this one included, as it has seen last.",
    whole="highest",
)

# The process, as Prometheus' own client libraries name it.
CPU = Family(
    "process_cpu_seconds_total", "counter", "CPU time of the hub, user and system."
)
RESIDENT = Family("process_resident_memory_bytes", "gauge", "Resident memory.")
VIRTUAL = Family("process_virtual_memory_bytes", "gauge", "Virtual memory.")
STARTED = Family(
    "process_start_time_seconds", "gauge", "When it started, Unix time.", whole="lowest"
)
OPEN_FILES = Family("process_open_fds", "gauge", "Open file descriptors.")
MOST_FILES = Family("process_max_fds", "gauge", "Most open file descriptors allowed.")

# All of them, in the order of the documentation.
GROUPS = {
    "Requests": (REQUESTS, OUTCOMES, RETRIES, RESCUES, FALLBACKS),
    "Latency": (FIRST_TOKEN, PER_TOKEN, QUEUED, DURATION, FIRST_BYTE),
    "Tokens": (RELAYED, PROMPTS, CACHED, SIZES),
    "Subjects": (
        *(USED_REQUESTS, USED_PROMPTS, USED_CACHED, USED_GENERATED, USED_SLOTS),
        LIMITED,
    ),
    "Workers": (UP, STATE, IN_FLIGHT, SLOTS, READS, WRITES, POOL, OPENED, REUSED),
    "Breakers": (BREAKER, TRANSITIONS, OPENINGS),
    "Queue and clients": (WAITING, ROOM, CONNECTIONS, REFUSED),
    "The hub": (
        *(BUILD, LAG, RELOADED, RELOADED_AT, EXPIRY),
        *(CPU, RESIDENT, VIRTUAL, STARTED, OPEN_FILES, MOST_FILES),
    ),
    "Several hubs": (
        *(STORE_MODE, STORE_OPERATIONS, STORE_FAILURES, STORE_OUTAGES, STORE_SECONDS),
        HUBS,
    ),
}
METRICS = tuple(chain.from_iterable(GROUPS.values()))


# --- What is true at a scrape -----------------------------------------------------


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
        states, causes = [*BreakerState], [*OpenCause]
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


class StoreMetrics:
    """Reads the connection to the store, and times its answers."""

    def __init__(self, store: Store, hubs: Callable[[], int]) -> None:
        """Follow a connection; `hubs` returns how many there are."""
        self._store, self._hubs = store, hubs
        self._seconds = Histogram(STORE_SECONDS)
        store.observe = self._observe

    def __repr__(self) -> str:
        return f"<StoreMetrics of {self._store!r}>"

    def _observe(self, seconds: float) -> None:
        self._seconds.add((seconds,))

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
