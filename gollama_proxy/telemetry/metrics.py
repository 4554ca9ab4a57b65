"""What Prometheus sees.

Label values are bounded: routes are those of the table, workers and models those of the
registry.  Where a worker serves `qwen*`, clients can make up models; so the first
`MOST_MODELS` have labels of their own, and what comes then is "other".
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gollama_proxy import __version__
from gollama_proxy.fleet.breaker import BreakerState, Cause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import WorkerState
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Record

MOST_MODELS = 200
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Prompt processing takes from milliseconds on a GPU to minutes on a laptop.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


_Metric = TypeVar("_Metric", Counter, Histogram)

# A `_created` series beside every counter doubles the page and tells nobody anything.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Clients(Protocol):
    """What is counted of the connections of clients."""

    open: int
    refused: Counted[str]


class Metrics:
    """The hub's own registry, so that two hubs in one process stay apart."""

    def __init__(
        self, registry: Registry, admission: Admission, clients: Clients | None = None
    ) -> None:
        self._known: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._models = {""}  # that have labels of their own
        self._collectors = CollectorRegistry()
        ProcessCollector(registry=self._collectors)
        self._collectors.register(_WorkerCollector(registry, admission))
        if clients is not None:
            self._collectors.register(_ClientCollector(clients))
        self._requests = Counter(
            "gollama_requests",
            "Requests that have ended.",
            ["route", "status", "model", "worker"],
            registry=self._collectors,
        )
        self._outcomes = Counter(
            "gollama_outcomes",
            "How requests ended: complete, an error code, or client_gone.",
            ["outcome"],
            registry=self._collectors,
        )
        self._first_byte = Histogram(
            "gollama_time_to_first_byte_seconds",
            "From the request's head to the first byte or event of the answer.",
            ["route", "model", "worker"],
            buckets=_SECONDS,
            registry=self._collectors,
        )
        self._duration = Histogram(
            "gollama_request_duration_seconds",
            "From the request's head to the end of the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._collectors,
        )
        self._retries = Counter(
            "gollama_retries",
            "Attempts beyond the first, of requests that had several.",
            ["model"],
            registry=self._collectors,
        )
        self._rescues = Counter(
            "gollama_rescues",
            "Continuations of an answer that had broken off, by how it ended.",
            ["model", "outcome"],
            registry=self._collectors,
        )
        self._fallbacks = Counter(
            "gollama_fallbacks",
            "Requests for a model that went to another one.",
            ["model", "fallback"],
            registry=self._collectors,
        )
        self._tokens = Counter(
            "gollama_tokens_relayed",
            "Generated tokens, as the worker counted them, else events.",
            ["model", "worker"],
            registry=self._collectors,
        )

    def __repr__(self) -> str:
        return "<Metrics>"

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        model, worker = self._label(record.model), record.worker
        self._series(
            self._requests, record.route, str(record.status), model, worker
        ).inc()
        outcome = record.error or record.outcome or ""
        self._series(self._outcomes, outcome).inc()
        self._series(self._duration, record.route).observe(record.duration)
        if record.first_byte is not None:
            series = self._series(self._first_byte, record.route, model, worker)
            series.observe(record.first_byte)
        if record.attempts > 1:
            self._series(self._retries, model).inc(record.attempts - 1)
        if record.rescued:
            self._series(self._rescues, model, outcome).inc(record.rescued)
        if record.fell_back:
            fell_back = self._label(record.fell_back)
            self._series(self._fallbacks, fell_back, model).inc()
        if record.tokens:
            self._series(self._tokens, model, worker).inc(record.tokens)

    def _label(self, model: str) -> str:
        """Name a model, or call it one of the others when there are many."""
        if model not in self._models:
            if len(self._models) > MOST_MODELS:
                return "other"
            self._models.add(model)
        return model

    def _series(self, metric: _Metric, *labels: str) -> _Metric:
        """Look one series up; the library takes a lock and more for it each time."""
        key = (metric, labels)
        series = self._known.get(key)
        if series is None:
            series = self._known[key] = metric.labels(*labels)
        return series

    def exposition(self) -> bytes:
        """Render all metrics in the text format."""
        return generate_latest(self._collectors)


class _WorkerCollector(Collector):
    """Reads the live records of the workers at the moment of a scrape."""

    def __init__(self, registry: Registry, admission: Admission) -> None:
        self._registry, self._admission = registry, admission

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "gollama_build_info", "Version of the hub.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        up = GaugeMetricFamily(
            "gollama_worker_up", "1 while requests are sent to it.", labels=["worker"]
        )
        state = GaugeMetricFamily(
            "gollama_worker_state", "1 for its state.", labels=["worker", "state"]
        )
        in_flight = GaugeMetricFamily(
            "gollama_in_flight", "Requests on it right now.", labels=["worker"]
        )
        slots = GaugeMetricFamily(
            "gollama_worker_slots", "Generations it runs at once.", labels=["worker"]
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
            "gollama_queue_waiting", "Requests that wait for a slot.", labels=["class"]
        )
        for priority in Priority:
            waiting.add_metric([str(priority)], self._admission.waiting_in(priority))
        return waiting

    def _collect_breakers(self) -> Iterator[Metric]:
        """Tell of each worker's breaker, and under a `model` of those of its models."""
        labels = ["worker", "model"]
        state = GaugeMetricFamily(
            "gollama_breaker_state", "1 for its state.", labels=[*labels, "state"]
        )
        transitions = CounterMetricFamily(
            "gollama_breaker_transitions",
            "How often a breaker came into a state.",
            labels=[*labels, "state"],
        )
        openings = CounterMetricFamily(
            "gollama_breaker_openings",
            "How often a breaker was opened, and by what.",
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


class _ClientCollector(Collector):
    """Reads how many clients there are at the moment of a scrape."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "gollama_connections",
            "Connections of clients right now.",
            value=self._clients.open,
        )
        refused = CounterMetricFamily(
            "gollama_connections_refused",
            "Connections that were turned away: too many, or no TLS with them.",
            labels=["reason"],
        )
        for kind, count in self._clients.refused.items():
            refused.add_metric([kind], count)
        yield refused
