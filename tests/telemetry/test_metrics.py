"""Metrics tell how the hub does, and no client can make them grow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gollama_proxy import __version__
from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Config, Queue
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.telemetry.metrics import Metrics
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, done, finish, last_chunk, sse_head, token
from tests.fakes.script import close, send, stream_of
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(exposition: bytes) -> Samples:
    """Read a page as Prometheus does; a series that comes twice is an error."""
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
    """Scrape until it is so: a client sees an answer's end before it is counted."""
    async with asyncio.timeout(DEADLINE):
        while not reached(samples := await scrape(hub)):
            pass
    return samples


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Registry(Config()), Admission(Queue(), Clock()))


# --- Counting ---------------------------------------------------------------------


def test_a_request_is_counted_with_what_it_was(metrics: Metrics) -> None:
    record = Record(
        id="1",
        method="POST",
        route=CHAT,
        subject="canary",
        model="qwen",
        worker="gpu1",
        status=200,
        outcome=Outcome.COMPLETE,
        first_byte=0.3,
        duration=12.5,
        tokens=7,
    )
    metrics.observe(record)
    metrics.observe(record)
    samples = parse(metrics.exposition())
    where = {"model": "qwen", "worker": "gpu1"}
    assert (
        value(samples, "gollama_requests_total", route=CHAT, status="200", **where) == 2
    )
    assert value(samples, "gollama_outcomes_total", outcome="complete") == 2
    assert value(samples, "gollama_tokens_relayed_total", **where) == 14
    first = "gollama_time_to_first_byte_seconds"
    assert value(samples, f"{first}_count", route=CHAT, **where) == 2
    assert value(samples, f"{first}_sum", route=CHAT, **where) == 0.6
    assert value(samples, f"{first}_bucket", route=CHAT, le="0.25", **where) == 0
    assert value(samples, f"{first}_bucket", route=CHAT, le="0.5", **where) == 2
    duration = "gollama_request_duration_seconds"
    assert value(samples, f"{duration}_sum", route=CHAT) == 25
    assert value(samples, f"{duration}_bucket", route=CHAT, le="10.0") == 0
    assert value(samples, f"{duration}_bucket", route=CHAT, le="30.0") == 2
    assert "canary" not in str(samples)


def test_what_did_not_happen_is_not_counted(metrics: Metrics) -> None:
    metrics.observe(Record("1", "GET", status=404, error=Code.UNKNOWN_URL))
    samples = parse(metrics.exposition())
    assert value(
        samples,
        "gollama_requests_total",
        route="other",
        status="404",
        model="",
        worker="",
    )
    names = names_of(samples)
    assert not any("first_byte" in name or "tokens" in name for name in names)


def test_an_error_says_more_than_an_outcome(metrics: Metrics) -> None:
    metrics.observe(Record("1", "GET", outcome=Outcome.ERROR, error=Code.NO_WORKER))
    metrics.observe(Record("2", "GET", outcome=Outcome.CLIENT_GONE))
    samples = parse(metrics.exposition())
    assert values_of(samples, "outcome") == {"no_worker_available", "client_gone"}


def test_two_hubs_in_a_process_count_for_themselves() -> None:
    one, two = (
        Metrics(Registry(Config()), Admission(Queue(), Clock())) for _ in range(2)
    )
    one.observe(Record("1", "GET", outcome=Outcome.COMPLETE))
    assert "gollama_outcomes_total" in names_of(parse(one.exposition()))
    assert "gollama_outcomes_total" not in names_of(parse(two.exposition()))


def test_the_page_holds_what_is_the_hubs_and_nothing_twice(metrics: Metrics) -> None:
    metrics.observe(
        Record("1", "GET", outcome=Outcome.COMPLETE, first_byte=1.0, tokens=1)
    )
    names = names_of(parse(metrics.exposition()))
    assert all(name.startswith(("gollama_", "process_")) for name in names)
    assert not any(name.endswith("_created") for name in names)
    assert {"process_open_fds", "process_resident_memory_bytes"} <= names
    assert repr(metrics) == "<Metrics>"


def test_each_metric_says_what_it_is(metrics: Metrics) -> None:
    metrics.observe(
        Record("1", "GET", outcome=Outcome.COMPLETE, first_byte=1.0, tokens=1)
    )
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram")


# --- Workers ----------------------------------------------------------------------


def test_workers_are_shown_as_they_are_at_the_moment() -> None:
    clock = Clock()
    loaded = config.load(None, {}, {}, ["http://a:1", "http://b:2"])
    registry = Registry(loaded, clock)
    metrics = Metrics(registry, Admission(Queue(), Clock()))
    a, b = registry.workers

    samples = parse(metrics.exposition())
    assert value(samples, "gollama_build_info", version=__version__) == 1
    for name in ("a:1", "b:2"):
        assert value(samples, "gollama_worker_up", worker=name) == 0
        assert value(samples, "gollama_in_flight", worker=name) == 0
        state = value(samples, "gollama_worker_state", worker=name, state="starting")
        assert state == 1
        assert value(samples, "gollama_worker_slots", worker=name) is None

    a.observe(Check.OK, "ok", Description((Model("qwen"),), slots=3))
    b.observe(Check.OK, "ok", Description())  # does not say how many slots
    lease = a.lease()
    samples = parse(metrics.exposition())
    assert value(samples, "gollama_worker_up", worker="a:1") == 1
    assert value(samples, "gollama_in_flight", worker="a:1") == 1
    assert value(samples, "gollama_in_flight", worker="b:2") == 0
    assert value(samples, "gollama_worker_slots", worker="a:1") == 3
    assert value(samples, "gollama_worker_slots", worker="b:2") is None
    states = {
        state: value(samples, "gollama_worker_state", worker="a:1", state=state)
        for state in ("starting", "loading", "ready", "down")
    }
    assert states == {"starting": 0, "loading": 0, "ready": 1, "down": 0}

    with lease:
        pass
    samples = parse(metrics.exposition())
    assert value(samples, "gollama_in_flight", worker="a:1") == 0


# --- In a hub that runs -----------------------------------------------------------


async def test_a_stream_is_counted_when_it_has_ended() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        worker.script(*stream_of(7))
        wire = await hub.open(CHAT, {"messages": [], "stream": True})
        await wire.read_events()
        where = {"model": "qwen", "worker": worker.name}
        labels = {"route": CHAT, "status": "200", **where}
        samples = await scraped_until(
            hub, lambda s: value(s, "gollama_requests_total", **labels) is not None
        )
        assert value(samples, "gollama_requests_total", **labels) == 1
        assert value(samples, "gollama_tokens_relayed_total", **where) == 7
        name = "gollama_time_to_first_byte_seconds_count"
        assert value(samples, name, route=CHAT, **where) == 1
        name = "gollama_request_duration_seconds_count"
        assert value(samples, name, route=CHAT) == 1


async def test_events_are_counted_where_a_worker_counts_no_tokens() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        last = finish("stop", {})
        worker.script(
            send(sse_head()),
            *(send(chunk(token(" a"))) for _ in range(3)),
            send(chunk(last + done()) + last_chunk()),
            close(),
        )
        wire = await hub.open(CHAT, {"messages": [], "stream": True})
        await wire.read_events()
        where = {"model": "qwen", "worker": worker.name}
        samples = await scraped_until(
            hub, lambda s: "gollama_tokens_relayed_total" in names_of(s)
        )
        assert value(samples, "gollama_tokens_relayed_total", **where) == 4


async def test_in_flight_is_what_runs_right_now() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        steps = asyncio.Semaphore(0)
        worker.default(*stream_of(2, steps))
        payload = {"messages": [], "stream": True}
        wires = [await hub.open(CHAT, payload) for _ in range(3)]
        for wire in wires:
            assert await wire.read_event()  # the first token: the answer has begun
        samples = await scrape(hub)
        assert value(samples, "gollama_in_flight", worker=worker.name) == 3
        for _ in wires:
            steps.release()
        for wire in wires:
            await wire.read_events()
        await scraped_until(
            hub, lambda s: value(s, "gollama_in_flight", worker=worker.name) == 0
        )


async def test_a_client_that_leaves_is_counted_as_that() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(2, "never"))
        wire = await hub.open(CHAT, {"messages": [], "stream": True})
        assert await wire.read_event()
        wire.close()
        samples = await scraped_until(
            hub,
            lambda s: value(s, "gollama_outcomes_total", outcome="client_gone") == 1,
        )
        assert value(samples, "gollama_in_flight", worker=worker.name) == 0


async def test_a_refusal_is_counted_by_its_code() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await hub.post(CHAT, b"no JSON")
        await hub.post(CHAT, {}, "no token")
        await hub.get("/nowhere")
        samples = await scrape(hub)
        for code in ("invalid_json", "invalid_api_key", "unknown_url"):
            assert value(samples, "gollama_outcomes_total", outcome=code) == 1
        none = {"model": "", "worker": ""}
        name = "gollama_requests_total"
        assert value(samples, name, route=CHAT, status="401", **none) == 1
        assert value(samples, name, route="other", status="404", **none) == 1


async def make_up(hub: RunningHub, word: str) -> None:
    """Send requests with a word in each place where a client can put one."""
    messages: dict[str, Any] = {"messages": []}
    await hub.get(f"/{word}")
    await hub.get(f"/v1/{word}?{word}")
    await hub.get(f"/v1/models/{word}")
    await hub.get(f"/livez?{word}")
    await hub.post(f"{CHAT}/{word}", messages)
    await hub.post(CHAT, {"model": word, **messages})
    await hub.post(CHAT, {"model": "qwen", word: word, **messages})
    await hub.post(CHAT, {"model": word, **messages}, word)
    await hub.post(CHAT, messages, hub.token(sub=word, models=[word], scope=word))
    headers = [("X-Request-Id", word), ("Origin", word), ("User-Agent", word)]
    await hub.post(CHAT, {"model": "alias", **messages}, headers=headers)


async def test_nothing_that_a_client_makes_up_becomes_a_label() -> None:
    async with (
        ScriptedWorker("qwen", "phi") as worker,
        running_hub(worker, models__aliases={"alias": "phi"}) as hub,
    ):
        await make_up(hub, "canary-0")
        before = (await scrape(hub)).keys() | (await scrape(hub)).keys()
        for number in range(1, 6):
            await make_up(hub, f"canary-{number}")
        response = await hub.get("/metrics")
        assert b"canary" not in response.body
        samples = parse(response.body)
        assert samples.keys() == before
        assert values_of(samples, "route") == {
            "other",
            "/v1/models/",
            "/livez",
            "/metrics",
            CHAT,
        }
        assert values_of(samples, "model") == {"", "qwen", "phi"}
        assert values_of(samples, "worker") == {"", worker.name}


async def test_a_name_that_the_only_worker_ignores_is_no_label_either() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        assert (await hub.post(CHAT, {"model": "canary", "messages": []})).status == 200
        response = await hub.get("/metrics")
        assert b"canary" not in response.body
        assert values_of(parse(response.body), "model") == {"", "qwen"}
