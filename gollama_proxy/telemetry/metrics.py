"""The record of ended requests, and the page of metrics that Prometheus scrapes.

Requests are counted in plain integers; `prometheus_client` sees them at a scrape.
Label values are bounded: routes are those of the table, workers and models those of the
registry.  Where a worker serves `qwen*`, clients can make up models: the first
`MOST_MODELS` each get a label, and later ones share the label "other".
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gollama_proxy import __version__
from gollama_proxy.fleet.breaker import BreakerState, Cause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry import accesslog
from gollama_proxy.telemetry.accesslog import Record

MOST_MODELS = 200
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Prompt processing takes from milliseconds on a GPU to minutes on a laptop.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BOUNDS = (*(str(float(seconds)) for seconds in SECONDS), "+Inf")


class Telemetry:
    """Records how requests end, in the metrics and in the access log.

    Each has a separate registry, so that two hubs in one process do not share counts.
    """

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        clients: Clients | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` returns monotonic seconds, as in `Record.started`."""
        self._clock = clock
        self._requests = RequestMetrics()
        self._collectors = CollectorRegistry()
        ProcessCollector(registry=self._collectors)
        self._collectors.register(FleetCollector(registry, admission))
        if clients is not None:
            self._collectors.register(ClientCollector(clients))
        self._collectors.register(self._requests)

    def __repr__(self) -> str:
        return f"<Telemetry of {self._requests!r}>"

    def ended(self, record: Record) -> None:
        """Record the end of a request; this must be called once for each."""
        assert record.duration is None, record
        record.duration = self._clock() - record.started
        self._requests.observe(record)
        accesslog.write(record)

    def exposition(self) -> bytes:
        """Return the page of all metrics, in the text format of Prometheus."""
        return generate_latest(self._collectors)


class RequestMetrics(Collector):
    """Counts requests that have ended, in memory until the next scrape."""

    def __init__(self) -> None:
        self._models = {""}  # with a label each
        self._series: dict[tuple[object, ...], _Series] = {}
        # By label values, in the order of their first use.
        self._requests: _Counts = defaultdict(_Count)
        self._outcomes: _Counts = defaultdict(_Count)
        self._first_byte: _Histograms = defaultdict(_Histogram)
        self._duration: _Histograms = defaultdict(_Histogram)
        self._retries: _Counts = defaultdict(_Count)
        self._rescues: _Counts = defaultdict(_Count)
        self._fallbacks: _Counts = defaultdict(_Count)
        self._tokens: _Counts = defaultdict(_Count)

    def __repr__(self) -> str:
        return f"<RequestMetrics series={len(self._series)}>"

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        route, model, worker = record.route, record.model, record.worker
        outcome = record.error or record.outcome
        series = self._series.get((route, record.status, outcome, model, worker))
        if series is None:
            series = self._find(record)
        series.requests.value += 1
        series.outcome.value += 1
        duration = record.duration or 0.0
        series.duration.buckets[bisect_left(SECONDS, duration)] += 1
        series.duration.sum += duration
        if record.first_byte is not None:
            if series.first_byte is None:
                series.first_byte = self._first_byte[route, series.model, worker]
            series.first_byte.buckets[bisect_left(SECONDS, record.first_byte)] += 1
            series.first_byte.sum += record.first_byte
        if record.tokens:
            if series.tokens is None:
                series.tokens = self._tokens[series.model, worker]
            series.tokens.value += record.tokens
        if record.attempts > 1:
            self._retries[series.model,].value += record.attempts - 1
        if record.rescued:
            self._rescues[series.model, str(outcome or "")].value += record.rescued
        if record.fell_back:
            fell_back = self._label(record.fell_back)
            self._fallbacks[fell_back, series.model].value += 1

    def _find(self, record: Record) -> _Series:
        """Return the series of a request whose model may share a label with others."""
        route, status, worker = record.route, record.status, record.worker
        outcome, model = record.error or record.outcome, self._label(record.model)
        key = (route, status, outcome, model, worker)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(
                model,
                self._requests[route, str(status), model, worker],
                self._outcomes[str(outcome or ""),],
                self._duration[route,],
            )
        return series

    def _label(self, model: str) -> str:
        if model not in self._models:
            if len(self._models) > MOST_MODELS:
                return "other"
            self._models.add(model)
        return model

    def collect(self) -> Iterator[Metric]:
        """Hand the counts to the library, for a scrape."""
        yield _counter(
            "gollama_requests",
            "Requests that have ended.",
            ["route", "status", "model", "worker"],
            self._requests,
        )
        yield _counter(
            "gollama_outcomes",
            "How requests ended: complete, an error code, or client_gone.",
            ["outcome"],
            self._outcomes,
        )
        yield _histogram(
            "gollama_time_to_first_byte_seconds",
            "From the request's head to the first byte or event of the answer.",
            ["route", "model", "worker"],
            self._first_byte,
        )
        yield _histogram(
            "gollama_request_duration_seconds",
            "From the request's head to the end of the answer.",
            ["route"],
            self._duration,
        )
        yield _counter(
            "gollama_retries",
            "Attempts beyond the first, of requests that had several.",
            ["model"],
            self._retries,
        )
        yield _counter(
            "gollama_rescues",
            "Continuations of an answer that had broken off, by how it ended.",
            ["model", "outcome"],
            self._rescues,
        )
        yield _counter(
            "gollama_fallbacks",
            "Requests for a model that went to another one.",
            ["model", "fallback"],
            self._fallbacks,
        )
        yield _counter(
            "gollama_tokens_relayed",
            "Generated tokens, as the worker counted them, else events.",
            ["model", "worker"],
            self._tokens,
        )


class _Series:
    """Where requests of one kind are counted.

    Kinds share a part of their counts: that of an outcome is the same for all routes.
    """

    __slots__ = ("duration", "first_byte", "model", "outcome", "requests", "tokens")

    def __init__(
        self, model: str, requests: _Count, outcome: _Count, duration: _Histogram
    ) -> None:
        self.model = model  # its label
        self.requests = requests
        self.outcome = outcome
        self.duration = duration
        # These have no series before there is something to count.
        self.first_byte: _Histogram | None = None
        self.tokens: _Count | None = None

    def __repr__(self) -> str:
        return f"<Series {self.requests.value}>"


class _Count:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def __repr__(self) -> str:
        return f"<Count {self.value}>"


class _Histogram:
    __slots__ = ("buckets", "sum")

    def __init__(self) -> None:
        self.buckets = [0] * len(_BOUNDS)
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.buckets)}>"


_Counts = defaultdict[tuple[str, ...], _Count]
_Histograms = defaultdict[tuple[str, ...], _Histogram]


def _counter(name: str, help: str, labels: list[str], counts: _Counts) -> Metric:
    metric = CounterMetricFamily(name, help, labels=labels)
    for values, count in counts.items():
        metric.add_metric(values, count.value)
    return metric


def _histogram(
    name: str, help: str, labels: list[str], histograms: _Histograms
) -> Metric:
    metric = HistogramMetricFamily(name, help, labels=labels)
    for values, histogram in histograms.items():
        buckets = list(zip(_BOUNDS, accumulate(histogram.buckets), strict=True))
        metric.add_metric(values, buckets, histogram.sum)
    return metric


# --- The present: read at each scrape ---------------------------------------------


class FleetCollector(Collector):
    """Reads the state of the workers and of the queue in front of them."""

    def __init__(self, registry: Registry, admission: Admission) -> None:
        self._registry, self._admission = registry, admission

    def __repr__(self) -> str:
        return f"<FleetCollector workers={len(self._registry.workers)}>"

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "gollama_build_info", "Version of the hub.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        up = GaugeMetricFamily(
            "gollama_worker_up",
            "1 while a worker accepts requests, else 0.",
            labels=["worker"],
        )
        state = GaugeMetricFamily(
            "gollama_worker_state",
            "1 for the present state, else 0.",
            labels=["worker", "state"],
        )
        in_flight = GaugeMetricFamily(
            "gollama_in_flight", "Requests that a worker is serving.", labels=["worker"]
        )
        slots = GaugeMetricFamily(
            "gollama_worker_slots",
            "Generations that a worker runs at once.",
            labels=["worker"],
        )
        for worker in self._registry.workers:
            up.add_metric([worker.name], worker.available)
            in_flight.add_metric([worker.name], worker.in_flight)
            for each in WorkerState:
                state.add_metric([worker.name, each.value], worker.state is each)
            if worker.description is not None and worker.description.slots:
                slots.add_metric([worker.name], worker.description.slots)
        yield from (up, state, in_flight, slots, self._collect_queue())
        yield from self._collect_breakers()

    def _collect_queue(self) -> Metric:
        waiting = GaugeMetricFamily(
            "gollama_queue_waiting", "Requests waiting for a slot.", labels=["class"]
        )
        for priority in Priority:
            waiting.add_metric([str(priority)], self._admission.waiting_in(priority))
        return waiting

    def _collect_breakers(self) -> Iterator[Metric]:
        """Read the breaker of each worker, and those of its models by `model`."""
        labels = ["worker", "model"]
        state = GaugeMetricFamily(
            "gollama_breaker_state",
            "1 for the present state, else 0.",
            labels=[*labels, "state"],
        )
        transitions = CounterMetricFamily(
            "gollama_breaker_transitions",
            "Times that a breaker changed into a state.",
            labels=[*labels, "state"],
        )
        openings = CounterMetricFamily(
            "gollama_breaker_openings",
            "Times that a breaker opened, by cause.",
            labels=[*labels, "cause"],
        )
        for worker in self._registry.workers:
            for model, breaker in {"": worker.breaker, **worker.model_breakers}.items():
                where = [worker.name, model]
                for each in BreakerState:
                    state.add_metric([*where, each.value], breaker.state is each)
                    count = breaker.transitions[each]
                    transitions.add_metric([*where, each.value], count)
                for cause in Cause:
                    count = breaker.causes[cause]
                    openings.add_metric([*where, cause.name.lower()], count)
        yield from (state, transitions, openings)


class Clients(Protocol):
    """Counts of clients' connections."""

    open: int
    refused: Counter[str]  # by reason


class ClientCollector(Collector):
    """Reads the number of connections of clients."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def __repr__(self) -> str:
        return f"<ClientCollector of {self._clients!r}>"

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "gollama_connections",
            "Open connections of clients.",
            value=self._clients.open,
        )
        refused = CounterMetricFamily(
            "gollama_connections_refused",
            "Connections closed at once: over a limit, or without TLS.",
            labels=["reason"],
        )
        for kind, count in self._clients.refused.items():
            refused.add_metric([kind], count)
        yield refused
