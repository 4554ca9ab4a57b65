"""Metrics of the present: workers, queue and connections, read at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gollama_proxy import __version__
from gollama_proxy.fleet.breaker import BreakerState, Cause
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import WorkerState
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority


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
