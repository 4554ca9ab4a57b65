"""The page of metrics, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.hub import RunningHub
from tests.fakes.waiting import DEADLINE

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(exposition: bytes) -> Samples:
    """Return the samples of a page; a repeated series is an error."""
    samples: Samples = {}
    for family in text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def names_of(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


def values_of(samples: Samples, label: str) -> set[str]:
    return {text for _, labels in samples for name, text in labels if name == label}


async def scrape(hub: RunningHub) -> Samples:
    response = await hub.get("/metrics")
    assert response.status == 200
    return parse(response.body)


async def scraped_until(hub: RunningHub, reached: Callable[[Samples], bool]) -> Samples:
    """Scrape until this is reached: a client sees the end of an answer earlier."""
    async with asyncio.timeout(DEADLINE):
        while not reached(samples := await scrape(hub)):
            pass
    return samples
