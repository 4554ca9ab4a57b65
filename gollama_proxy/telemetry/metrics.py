"""The record of ended requests, and what the page of metrics shows.

Requests are counted in plain integers, which are read at a scrape.  The values of
labels are bounded: routes are those of the table, outcomes those of the error codes.
Clients can make up models where a worker serves `qwen*`, agents come with new names,
and a hub for a large company has many subjects: the first ones each get a label, and
later ones share the label "other".
"""

from __future__ import annotations

import asyncio
import platform
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, product
from types import MappingProxyType
from typing import Protocol, TypeVar

from gollama_proxy import __version__
from gollama_proxy.config.settings import Metrics
from gollama_proxy.fleet.breaker import Breaker, BreakerState, Cause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry import accesslog, exposition
from gollama_proxy.telemetry.accesslog import Record, Step
from gollama_proxy.telemetry.exposition import (
    CPU,
    MOST_FILES,
    OPEN_FILES,
    RESIDENT,
    STARTED,
    VIRTUAL,
    Collected,
    Family,
    Histogram,
    of_process,
)
from gollama_proxy.upstream.pool import ConnectionPool

MOST_MODELS = 200
MOST_WORKERS = 2000
MOST_PAIRS = 5000  # of a subject and a model
OTHER = "other"

# --- What there is ------------------------------------------------------------------

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
    "gollama_build_info", "gauge", "Version of the hub.", ("version", "python")
)
UP = Family(
    "gollama_worker_up",
    "gauge",
    "1 while a worker accepts requests, else 0.",
    ("worker",),
)
STATE = Family(
    "gollama_worker_state",
    "gauge",
    "1 for the present state, else 0.",
    ("worker", "state"),
)
IN_FLIGHT = Family(
    "gollama_in_flight", "gauge", "Requests that a worker is serving.", ("worker",)
)
SLOTS = Family(
    "gollama_worker_slots",
    "gauge",
    "Generations that a worker runs at once.",
    ("worker",),
)
READS = Family(
    "gollama_worker_prefill_tokens_per_second",
    "gauge",
    "How fast a worker reads prompts, learnt from its last answers.",
    ("worker", "model"),
)
WRITES = Family(
    "gollama_worker_decode_tokens_per_second",
    "gauge",
    "How fast a worker writes each of its present answers, learnt from its last ones.",
    ("worker", "model"),
)
BREAKER = Family(
    "gollama_breaker_state",
    "gauge",
    "1 for the present state, else 0; of a worker, or of one of its models.",
    ("worker", "model", "state"),
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
)
RELOADED = Family(
    "gollama_config_last_reload_successful",
    "gauge",
    "1 if the settings were valid when they were last read, else 0.",
)
RELOADED_AT = Family(
    "gollama_config_last_reload_success_timestamp_seconds",
    "gauge",
    "When the settings in force were read, Unix time.",
)

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
}
METRICS = tuple(chain.from_iterable(GROUPS.values()))


class Telemetry:
    """Records how requests end, in the metrics and in the access log."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        clients: Clients | None = None,
        clock: Callable[[], float] = time.monotonic,
        connections: Mapping[Worker, ConnectionPool] = MappingProxyType({}),
        tokens_of: Callable[[str, int], int] = lambda model, size: size // 4,
        expires: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Make one.

        `clock` returns monotonic seconds, as in `Record.started`; `tokens_of` estimates
        the tokens of so many bytes of a prompt for a model.  `expires` returns when the
        certificate of the hub expires, in Unix time; it may block.
        """
        self._expires = expires
        self._reloaded, self._reloaded_at = True, time.time()
        self._clock = clock
        self._requests = RequestMetrics()
        self._lag = Histogram(LAG)
        fleet = FleetMetrics(
            registry, admission, connections, tokens_of, self._requests.models
        )
        self._sources: list[exposition.Collect] = [fleet.collect]
        if clients is not None:
            self._sources.append(ClientMetrics(clients).collect)
        self._sources += [self._collect_own, self._requests.collect]

    def __repr__(self) -> str:
        return f"<Telemetry of {self._requests!r}>"

    def reconfigure(self, settings: Metrics) -> None:
        """Take other settings; names that have a label keep it."""
        self._requests.subjects.most = settings.subjects

    def ended(self, record: Record) -> None:
        """Record the end of a request; this must be called once for each."""
        assert record.duration is None, record
        clock = self._clock  # on an object, it takes three times as long to call
        record.duration = clock() - record.started
        self._requests.observe(record)
        accesslog.write(record)

    def note_reload(self, *, valid: bool) -> None:
        """Record that the settings were read again."""
        self._reloaded = valid
        if valid:
            self._reloaded_at = time.time()

    def note_lag(self, seconds: float) -> None:
        """Record by how much the event loop was late; to be called once a second."""
        self._lag.buckets[bisect_left(LAGS, seconds)] += 1
        self._lag.sum += seconds

    async def page(self, *, open_metrics: bool = False) -> bytes:
        """Write the page of all metrics; other tasks run between its parts."""
        # In a thread: the list of open files is long when there are many clients.
        process = await asyncio.to_thread(self._collect_outside)
        parts = []
        for part in self.pieces(process, open_metrics=open_metrics):
            parts.append(part.encode())
            await asyncio.sleep(0)
        return b"".join(parts)

    def pieces(
        self, process: Iterable[Collected] = (), *, open_metrics: bool = False
    ) -> Iterator[str]:
        """Write the page in pieces that take less than a millisecond each."""
        sources = [*self._sources, lambda: iter(process)]
        return exposition.pieces(sources, open_metrics=open_metrics)

    def _collect_outside(self) -> list[Collected]:
        """Read what the system knows of this process and its files."""
        found = [*of_process()]
        if (expiry := self._expires()) is not None:
            found.append((EXPIRY, [("", expiry)]))
        return found

    def _collect_own(self) -> Iterator[Collected]:
        yield LAG, [self._lag]
        yield RELOADED, [("", int(self._reloaded))]
        yield RELOADED_AT, [("", self._reloaded_at)]


# --- Requests that have ended -------------------------------------------------------


class RequestMetrics:
    """Counts requests that have ended, in memory until the next scrape."""

    def __init__(self, subjects: int = Metrics().subjects) -> None:
        self.models = Names(MOST_MODELS)
        self.subjects = Names(subjects)
        self._workers = Names(MOST_WORKERS)
        self._series: dict[tuple[object, ...], _Series] = {}
        # By label values, in the order of their first use.
        self._requests = _Table(REQUESTS, _Count)
        self._outcomes = _Table(OUTCOMES, _Count)
        self._duration = _Table(DURATION, Histogram)
        self._first_byte = _Table(FIRST_BYTE, Histogram)
        self._first_token = _Table(FIRST_TOKEN, Histogram)
        self._per_token = _Table(PER_TOKEN, Histogram)
        self._queued = _Table(QUEUED, Histogram)
        self._retries = _Table(RETRIES, _Count)
        self._rescues = _Table(RESCUES, _Count)
        self._fallbacks = _Table(FALLBACKS, _Count)
        self._tokens = _Table(RELAYED, _Tokens)
        self._sizes = _Table(SIZES, Histogram)
        self._usage = _Table(USED_REQUESTS, _Usage)
        self._limited = _Table(LIMITED, _Count)

    def __repr__(self) -> str:
        return f"<RequestMetrics series={len(self._series)}>"

    def observe(self, record: Record) -> None:
        """Count a request that has ended.

        Every request pays for this, so it calls nothing that is written in Python
        unless something unusual has happened.
        """
        route, model, worker = record.route, record.model, record.worker
        outcome = record.error or record.outcome
        series = self._series.get((route, record.status, outcome, model, worker))
        if series is None:
            series = self._find(record)
        series.requests.value += 1
        series.outcome.value += 1
        trace = record.trace
        if trace is not None and not trace.sampled:
            trace = None
        duration = record.duration or 0.0
        bucket = bisect_left(DURATIONS, duration)
        series.duration.buckets[bucket] += 1
        series.duration.sum += duration
        if trace is not None:
            series.duration.exemplify(bucket, trace.trace_id, duration)
        histogram: Histogram | None
        first = record.first_byte
        if first is not None:
            histogram = series.first_byte
            if histogram is None:
                histogram = self._first_byte[route, series.model, series.worker]
                series.first_byte = histogram
            histogram.buckets[bisect_left(SECONDS, first)] += 1
            histogram.sum += first
        if record.status == 429:
            subject = self.subjects.label(record.subject)
            self._limited[subject, str(outcome or "")].value += 1
        if not model:
            return
        # What it has used
        tokens, prompt = record.tokens, record.prompt_tokens
        usage = self._usage.get((record.subject, model))
        if usage is None:
            usage = self._find_usage(record.subject, series.model)
        usage.requests += 1
        usage.slots += record.slot_seconds
        if tokens or prompt:
            cached = record.cached_tokens
            usage.prompts += prompt
            usage.cached += cached
            usage.generated += tokens
            of_worker = series.tokens
            if of_worker is None:
                of_worker = series.begin_tokens(self._tokens, self._sizes)
            of_worker.prompts += prompt
            of_worker.cached += cached
            of_worker.generated += tokens
            histogram = series.prompts
            histogram.buckets[bisect_left(TOKENS, prompt)] += 1
            histogram.sum += prompt
            histogram = series.answers
            histogram.buckets[bisect_left(TOKENS, tokens)] += 1
            histogram.sum += tokens
        # How long it took
        attempts = record.attempts
        if attempts or record.steps:
            histogram = series.queued
            if histogram is None:
                histogram = self._queued[series.model, series.worker]
                series.queued = histogram
            bucket, waited = 0, 0.0
            if record.steps:
                waited = _waited(record.steps, duration)
                bucket = bisect_left(WAITS, waited)
                histogram.sum += waited
            histogram.buckets[bucket] += 1
            if trace is not None:
                histogram.exemplify(bucket, trace.trace_id, waited)
        lease = record.lease
        if lease is not None and (number := lease.tokens) and first is not None:
            histogram = series.first_token
            if histogram is None:
                histogram = self._first_token[series.model, series.worker]
                series.first_token = histogram
                series.per_token = self._per_token[series.model, series.worker]
            bucket = bisect_left(FIRST_TOKENS, first)
            histogram.buckets[bucket] += 1
            histogram.sum += first
            if trace is not None:
                histogram.exemplify(bucket, trace.trace_id, first)
            if number > 1:
                each = lease.seconds / (number - 1)
                bucket = bisect_left(EACH_TOKEN, each)
                histogram = series.per_token
                histogram.buckets[bucket] += 1
                histogram.sum += each
                if trace is not None:
                    histogram.exemplify(bucket, trace.trace_id, each)
        # What went wrong
        if attempts > 1:
            self._retries[series.model,].value += attempts - 1
        if record.rescued:
            self._rescues[series.model, str(outcome or "")].value += record.rescued
        if record.fell_back:
            fell_back = self.models.label(record.fell_back)
            self._fallbacks[fell_back, series.model].value += 1

    def _find(self, record: Record) -> _Series:
        """Return the series of a request that may share its labels with others."""
        route, status = record.route, record.status
        outcome = record.error or record.outcome
        model = self.models.label(record.model)
        worker = self._workers.label(record.worker)
        key = (route, status, outcome, model, worker)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(
                model,
                worker,
                self._requests[route, str(status), model, worker],
                self._outcomes[str(outcome or ""), model, worker],
                self._duration[route, model, worker],
            )
        return series

    def _find_usage(self, subject: str, model: str) -> _Usage:
        subject = self.subjects.label(subject)
        if (subject, model) not in self._usage and len(self._usage) >= MOST_PAIRS:
            subject, model = OTHER, OTHER
        return self._usage[subject, model]

    def collect(self) -> Iterator[Collected]:
        """Return the counts, for a scrape."""
        for counts in (
            *(self._requests, self._outcomes, self._retries, self._rescues),
            *(self._fallbacks, self._limited),
        ):
            yield counts.family, [(each.labels, each.value) for each in counts.values()]
        for histograms in (
            *(self._duration, self._first_byte, self._first_token, self._per_token),
            *(self._queued, self._sizes),
        ):
            yield histograms.family, [*histograms.values()]
        tokens = [*self._tokens.values()]
        yield RELAYED, [(each.labels, each.generated) for each in tokens]
        yield PROMPTS, [(each.labels, each.prompts) for each in tokens]
        yield CACHED, [(each.labels, each.cached) for each in tokens]
        usage = [*self._usage.values()]
        yield USED_REQUESTS, [(each.labels, each.requests) for each in usage]
        yield USED_PROMPTS, [(each.labels, each.prompts) for each in usage]
        yield USED_CACHED, [(each.labels, each.cached) for each in usage]
        yield USED_GENERATED, [(each.labels, each.generated) for each in usage]
        yield USED_SLOTS, [(each.labels, each.slots) for each in usage]


class Names:
    """The values of a label: the first `most` as they are, and one for all others."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._known = {""}

    def __repr__(self) -> str:
        return f"<Names {len(self._known) - 1} of {self.most}>"

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def label(self, name: str) -> str:
        """Return the label of a name, which gets one if there is room."""
        if name not in self._known:
            if len(self._known) > self.most:
                return OTHER
            self._known.add(name)
        return name


class _Count:
    __slots__ = ("labels", "value")

    def __init__(self, family: Family, *values: str) -> None:
        self.labels = family.at(*values)
        self.value = 0

    def __repr__(self) -> str:
        return f"<Count {self.value}>"


class _Tokens:
    """The tokens that went through one worker for one model."""

    __slots__ = ("cached", "generated", "labels", "prompts")

    def __init__(self, family: Family, *values: str) -> None:
        self.labels = family.at(*values)
        self.prompts = self.cached = self.generated = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.prompts} + {self.generated}>"


class _Usage(_Tokens):
    """What one subject has used of one model."""

    __slots__ = ("requests", "slots")

    def __init__(self, family: Family, *values: str) -> None:
        super().__init__(family, *values)
        self.requests = 0
        self.slots = 0.0  # seconds


S = TypeVar("S")


class _Table(dict[tuple[str, ...], S]):
    """The series of a family by their values of labels, made when first used."""

    def __init__(self, family: Family, make: Callable[..., S]) -> None:
        self.family = family
        self._make = make

    def __repr__(self) -> str:
        return f"<Table {self.family.name} of {len(self)}>"

    def __missing__(self, values: tuple[str, ...]) -> S:
        made = self[values] = self._make(self.family, *values)
        return made


class _Series:
    """Where requests of one kind are counted.

    Kinds share a part of their counts: the tokens of a worker are those of all routes.
    """

    __slots__ = (
        "answers",
        "duration",
        "first_byte",
        "first_token",
        "model",
        "outcome",
        "per_token",
        "prompts",
        "queued",
        "requests",
        "tokens",
        "worker",
    )

    # The last ones have no value before the first token.
    per_token: Histogram
    prompts: Histogram
    answers: Histogram

    def __init__(
        self,
        model: str,
        worker: str,
        requests: _Count,
        outcome: _Count,
        duration: Histogram,
    ) -> None:
        self.model, self.worker = model, worker  # their labels
        self.requests = requests
        self.outcome = outcome
        self.duration = duration
        # These have no series before there is something to count.
        self.first_byte: Histogram | None = None
        self.queued: Histogram | None = None
        self.first_token: Histogram | None = None
        self.tokens: _Tokens | None = None

    def __repr__(self) -> str:
        return f"<Series {self.requests.value}>"

    def begin_tokens(
        self, tokens: _Table[_Tokens], sizes: _Table[Histogram]
    ) -> _Tokens:
        """Find the counts of tokens."""
        self.prompts = sizes[self.model, "input"]
        self.answers = sizes[self.model, "output"]
        self.tokens = found = tokens[self.model, self.worker]
        return found


def _waited(steps: tuple[Step, ...], duration: float) -> float:
    """Return the seconds for which a request that ended was in the queue."""
    waited, since = 0.0, None
    for step in steps:
        if since is not None:
            waited += step.at - since
        since = step.at if step.step == "queued" else None
    return waited if since is None else waited + duration - since


# --- The present: read at each scrape -----------------------------------------------


class FleetMetrics:
    """Reads the state of the workers and of the queue in front of them."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        connections: Mapping[Worker, ConnectionPool],
        tokens_of: Callable[[str, int], int],
        models: Names,
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
