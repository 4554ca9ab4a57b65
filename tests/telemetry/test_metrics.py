"""Metrics show how the hub is doing, and no client can make them grow."""

from __future__ import annotations

import asyncio
import logging
import platform
import random
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as modern_page
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from gollama_proxy import __version__
from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Config, Limits, Queue
from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge.connections import ConnectionLimiter
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Outcome, Record, Step
from gollama_proxy.telemetry.exposition import (
    OPEN_METRICS,
    PIECE,
    TEXT,
    Family,
    pieces,
    prefers_open_metrics,
)
from gollama_proxy.telemetry.families import (
    CACHED,
    DURATION,
    FALLBACKS,
    FIRST_BYTE,
    FIRST_TOKEN,
    LAG,
    LIMITED,
    METRICS,
    OUTCOMES,
    PER_TOKEN,
    PROMPTS,
    QUEUED,
    READS,
    RELAYED,
    RELOADED,
    RELOADED_AT,
    REQUESTS,
    RESCUES,
    RETRIES,
    ROOM,
    SIZES,
    USED_CACHED,
    USED_GENERATED,
    USED_PROMPTS,
    USED_REQUESTS,
    USED_SLOTS,
    WRITES,
    ClientMetrics,
    FleetMetrics,
    of_process,
)
from gollama_proxy.telemetry.metrics import Names, RequestMetrics, Telemetry
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code
from gollama_proxy.wire.headers import TraceContext
from tests.fakes.asks import CHAT, EMBED
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.page import names_of, parse, scrape, scraped_until, value, values_of
from tests.fakes.replies import chunk, done, finish, last_chunk, sse_head, token
from tests.fakes.script import close, send, stream_of
from tests.fakes.worker import ScriptedWorker


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(clock: Clock) -> Telemetry:
    return Telemetry(Registry(Config()), Admission(Queue(), Clock()), clock=clock)


def shown(telemetry: Telemetry) -> bytes:
    return "".join(telemetry.pieces()).encode()


# --- Counting ---------------------------------------------------------------------


def test_a_request_is_counted_under_its_labels(
    telemetry: Telemetry, clock: Clock
) -> None:
    clock.advance(12.5)
    for _ in range(2):
        record = Record(
            id="1",
            method="POST",
            route=CHAT,
            subject="alice",
            model="qwen",
            worker="gpu1",
            status=200,
            outcome=Outcome.COMPLETE,
            started=clock() - 12.5,
            first_byte=0.3,
            tokens=7,
        )
        telemetry.ended(record)
        assert record.duration == 12.5
    samples = parse(shown(telemetry))
    where = {"model": "qwen", "worker": "gpu1"}
    assert (
        value(samples, "gollama_requests_total", route=CHAT, status="200", **where) == 2
    )
    assert value(samples, "gollama_outcomes_total", outcome="complete", **where) == 2
    assert value(samples, "gollama_tokens_relayed_total", **where) == 14
    first = "gollama_time_to_first_byte_seconds"
    assert value(samples, f"{first}_count", route=CHAT, **where) == 2
    assert value(samples, f"{first}_sum", route=CHAT, **where) == 0.6
    assert value(samples, f"{first}_bucket", route=CHAT, le="0.25", **where) == 0
    assert value(samples, f"{first}_bucket", route=CHAT, le="0.5", **where) == 2
    duration = "gollama_request_duration_seconds"
    assert value(samples, f"{duration}_sum", route=CHAT, **where) == 25
    assert value(samples, f"{duration}_bucket", route=CHAT, le="10.24", **where) == 0
    assert value(samples, f"{duration}_bucket", route=CHAT, le="20.48", **where) == 2
    used = {"subject": "alice", "model": "qwen"}
    assert value(samples, "gollama_usage_requests_total", **used) == 2
    assert value(samples, "gollama_usage_generated_tokens_total", **used) == 14


def test_the_end_of_a_request_is_recorded_once(telemetry: Telemetry) -> None:
    telemetry.ended(record := Record("1", "GET"))
    with pytest.raises(AssertionError, match="<Record 1 GET other>"):
        telemetry.ended(record)


def test_the_end_of_a_request_is_logged(
    telemetry: Telemetry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.access")
    telemetry.ended(Record("1", "GET", status=200, started=clock() - 0.25))
    [line] = caplog.records
    assert line.__dict__["fields"]["duration_ms"] == 250.0


def test_a_request_without_an_answer_has_no_series_of_answers(
    telemetry: Telemetry,
) -> None:
    telemetry.ended(Record("1", "GET", status=404, error=Code.UNKNOWN_URL))
    samples = parse(shown(telemetry))
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


def test_a_request_with_an_error_is_counted_by_its_code(telemetry: Telemetry) -> None:
    telemetry.ended(Record("1", "GET", outcome=Outcome.ERROR, error=Code.NO_WORKER))
    telemetry.ended(Record("2", "GET", outcome=Outcome.CLIENT_GONE))
    samples = parse(shown(telemetry))
    assert values_of(samples, "outcome") == {"no_worker_available", "client_gone"}


def test_two_hubs_in_a_process_count_apart() -> None:
    one, two = (
        Telemetry(Registry(Config()), Admission(Queue(), Clock())) for _ in range(2)
    )
    one.ended(Record("1", "GET", outcome=Outcome.COMPLETE))
    assert "gollama_outcomes_total" in names_of(parse(shown(one)))
    assert "gollama_outcomes_total" not in names_of(parse(shown(two)))


FULL = {"outcome": Outcome.COMPLETE, "first_byte": 1.0, "tokens": 1}


async def test_the_page_has_the_metrics_of_the_hub_and_of_its_process_once(
    telemetry: Telemetry,
) -> None:
    telemetry.ended(Record("1", "GET", **FULL))
    names = names_of(parse(await telemetry.page()))
    assert all(name.startswith(("gollama_", "process_")) for name in names)
    assert not any(name.endswith("_created") for name in names)
    assert {"process_open_fds", "process_resident_memory_bytes"} <= names
    assert repr(telemetry) == "<Telemetry of <RequestMetrics series=1>>"


def test_each_metric_has_a_description(telemetry: Telemetry) -> None:
    telemetry.ended(Record("1", "GET", **FULL))
    for family in text_string_to_metric_families(shown(telemetry).decode()):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram")


SOME = 6  # models and subjects with a label each
OF_THE_PRESENT = {
    family.name
    for family in METRICS
    if family.name.startswith(
        ("process_", "gollama_breaker_", "gollama_worker_", "gollama_store_")
    )
    or family.name in (LAG.name, "gollama_connections_refused_total")
}


class ByLibrary:
    """The metrics of requests as `prometheus_client` itself would count them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.models, self.subjects = Names(SOME), Names(SOME)
        self.made = {
            family.name: self.counter(family)
            if family.type == "counter"
            else self.histogram(family)
            for family in METRICS
            if family.type != "gauge" and family.name not in OF_THE_PRESENT
        }

    def counter(self, family: Family) -> Counter:
        name = family.name.removesuffix("_total")
        return Counter(name, family.help, family.labels, registry=self.registry)

    def histogram(self, family: Family) -> Histogram:
        return Histogram(
            family.name,
            family.help,
            family.labels,
            buckets=family.bounds,
            registry=self.registry,
        )

    def series(self, family: Family, *values: object) -> Any:
        return self.made[family.name].labels(*values)

    def observe(self, record: Record) -> None:
        model, worker = self.models.label(record.model), record.worker
        outcome = record.error or record.outcome or ""
        route, status = record.route, record.status
        self.series(REQUESTS, route, status, model, worker).inc()
        self.series(OUTCOMES, outcome, model, worker).inc()
        self.series(DURATION, route, model, worker).observe(record.duration)
        if record.first_byte is not None:
            self.series(FIRST_BYTE, route, model, worker).observe(record.first_byte)
        if status == 429:
            subject = self.subjects.label(record.subject)
            self.series(LIMITED, subject, outcome).inc()
        if not model:
            return
        used = self.subjects.label(record.subject), model
        self.series(USED_REQUESTS, *used).inc()
        self.series(USED_SLOTS, *used).inc(record.slot_seconds)
        self.series(USED_PROMPTS, *used).inc(record.prompt_tokens)
        self.series(USED_CACHED, *used).inc(record.cached_tokens)
        self.series(USED_GENERATED, *used).inc(record.tokens)
        if record.tokens or record.prompt_tokens:
            self.series(RELAYED, model, worker).inc(record.tokens)
            self.series(PROMPTS, model, worker).inc(record.prompt_tokens)
            self.series(CACHED, model, worker).inc(record.cached_tokens)
            self.series(SIZES, model, "input").observe(record.prompt_tokens)
            self.series(SIZES, model, "output").observe(record.tokens)
        if record.attempts:
            self.series(QUEUED, model, worker).observe(0)
        if record.attempts > 1:
            self.series(RETRIES, model).inc(record.attempts - 1)
        if record.rescued:
            self.series(RESCUES, model, outcome).inc(record.rescued)
        if record.fell_back:
            self.series(FALLBACKS, self.models.label(record.fell_back), model).inc()


def some_record(rng: random.Random) -> Record:
    seconds = (0.0, 0.01, 0.05, rng.random(), rng.expovariate(0.05), 300.0, 301.0)
    prompt = rng.choice([0, 1, 64, 100_000])
    subjects = rng.choice([5, SOME + 5])
    names = rng.choice([5, SOME + 5])
    model = f'm"{rng.randrange(names)}\\' if rng.random() < 0.9 else ""
    return Record(
        id="1",
        method="POST",
        route=rng.choice([CHAT, "/v1/embeddings", "other"]),
        subject=f"s\n{rng.randrange(subjects)}",
        model=model,
        worker=rng.choice(["", "gpu1", "gpu2"]),
        attempts=rng.choice([0, 1, 1, 2, 3]),
        rescued=rng.choice([0, 0, 1, 2]),
        fell_back=rng.choice(["", "", f"f{rng.randrange(SOME)}"]),
        status=rng.choice([200, 200, 400, 429, 499, 502]),
        outcome=rng.choice([None, *Outcome]),
        error=rng.choice(["", "", "client_stalled", Code.WORKER_LOST]),
        tokens=rng.choice([0, 1, 20, 1_000_000]),
        prompt_tokens=prompt,
        cached_tokens=rng.choice([0, prompt // 2]),
        slot_seconds=rng.choice([0.0, 0.5, rng.random()]),
        first_byte=rng.choice([None, *seconds]),
        duration=rng.choice(seconds),
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_page_is_the_one_that_the_library_would_have_made(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample by sample, the order of the series included, and in both formats."""
    monkeypatch.setattr("prometheus_client.metrics._use_created", False)
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_VALUES", seed + 2)
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_PAIRS", 50)
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_GROUPS", 50)
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_UNCOUNTED", 20)
    rng, expected, metrics = random.Random(seed), ByLibrary(), RequestMetrics()
    metrics.models.most = metrics.subjects.most = SOME
    for _ in range(seed * 120):
        record = some_record(rng)
        metrics.observe(record)
        expected.observe(record)
    text, theirs = page([metrics.collect]), generate_latest(expected.registry)
    assert families(text) == families(theirs)
    modern = page([metrics.collect], open_metrics=True)
    assert modern_families(modern) == modern_families(modern_page(expected.registry))


def page(sources: list[Any], *, open_metrics: bool = False) -> bytes:
    return "".join(pieces(sources, open_metrics=open_metrics)).encode()


def families(text: bytes) -> list[Any]:
    return _samples(text_string_to_metric_families(text.decode()))


def modern_families(text: bytes) -> list[Any]:
    return _samples(openmetrics_families(text.decode()))


def _samples(parsed: Iterable[Metric]) -> list[Any]:
    """Return the families that have samples, with bounds of buckets as numbers."""
    found = sorted((each for each in parsed if each.samples), key=attrgetter("name"))
    for family in found:
        for sample in family.samples:
            if "le" in sample.labels:
                sample.labels["le"] = float(sample.labels["le"])
    return found


TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True, "")


def test_a_bucket_has_its_last_traced_request_as_an_example() -> None:
    metrics = RequestMetrics()
    quiet = TRACE._replace(trace_id="0" * 31 + "1", sampled=False)
    for duration, trace in ((0.3, TRACE), (0.31, quiet), (7.0, None)):
        record = Record("1", "POST", status=200, trace=trace, duration=duration)
        metrics.observe(record)
    [family] = [
        family
        for family in modern_families(page([metrics.collect], open_metrics=True))
        if family.name == DURATION.name
    ]
    found = {
        sample.labels["le"]: sample.exemplar
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert list(found) == [0.32]
    assert found[0.32].labels == {"trace_id": TRACE.trace_id}
    assert found[0.32].value == 0.3
    assert b"trace_id" not in page([metrics.collect])  # the other format has none


def test_the_time_in_the_queue_is_that_between_its_steps() -> None:
    metrics, steps = RequestMetrics(), [(0.5, "queued"), (2.5, "attempt")]
    steps += [(3.0, "failed"), (3.5, "queued")]
    record = Record("1", "POST", model="qwen", duration=4.0)
    record.steps = tuple(Step(at, step) for at, step in steps)
    metrics.observe(record)
    metrics.observe(Record("2", "POST", model="qwen", attempts=1, duration=4.0))
    metrics.observe(Record("3", "POST", model="qwen", duration=4.0))  # was refused
    samples = parse(page([metrics.collect]))
    where = {"model": "qwen", "worker": ""}
    assert value(samples, f"{QUEUED.name}_count", **where) == 2
    assert value(samples, f"{QUEUED.name}_sum", **where) == 2.0 + 0.5


def test_the_time_of_a_token_is_that_between_two_of_them() -> None:
    registry = Registry(config.load(None, {}, {}, ["http://a:1"]), Clock())
    lease = registry.workers[0].lease("qwen")
    lease.tokens, lease.seconds = 21, 3.0
    metrics = RequestMetrics()
    record = Record("1", "POST", model="qwen", worker="a", first_byte=0.3, duration=5.0)
    record.lease, record.trace, record.attempts = lease, TRACE, 1
    metrics.observe(record)
    lease.tokens = 1  # there is nothing between one
    metrics.observe(record)
    lease.tokens = 0  # it was no stream, or did not come to its end
    metrics.observe(record)
    samples = parse(page([metrics.collect]))
    where = {"model": "qwen", "worker": "a"}
    assert value(samples, f"{FIRST_TOKEN.name}_count", **where) == 2
    assert value(samples, f"{FIRST_TOKEN.name}_sum", **where) == 0.6
    assert value(samples, f"{FIRST_TOKEN.name}_bucket", le="0.25", **where) == 0
    assert value(samples, f"{FIRST_TOKEN.name}_bucket", le="0.5", **where) == 2
    assert value(samples, f"{PER_TOKEN.name}_count", **where) == 1
    assert value(samples, f"{PER_TOKEN.name}_sum", **where) == 3.0 / 20
    for family in modern_families(page([metrics.collect], open_metrics=True)):
        examples = [each.exemplar for each in family.samples if each.exemplar]
        timed = family.name in {
            each.name for each in (FIRST_TOKEN, PER_TOKEN, QUEUED, DURATION)
        }
        assert bool(examples) is timed, family.name
    lease.release(Result.COMPLETE)


def test_pairs_of_subject_and_model_beyond_a_limit_share_their_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_PAIRS", 2)
    metrics = RequestMetrics()
    for subject in ("alice", "bob", "carol", "dave", "alice"):
        record = Record("1", "POST", subject=subject, model="qwen", duration=1.0)
        metrics.observe(record)
    samples = parse(page([metrics.collect]))
    used = {
        subject: value(samples, USED_REQUESTS.name, subject=subject, model=model)
        for subject, model in (("alice", "qwen"), ("bob", "qwen"), ("other", "other"))
    }
    assert used == {"alice": 2, "bob": 1, "other": 2}
    assert values_of(samples, "subject") == used.keys()


def test_workers_beyond_a_limit_share_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gollama_proxy.telemetry.metrics.MOST_WORKERS", 1)
    metrics = RequestMetrics()
    for name in ("gpu1", "gpu2", "gpu3"):
        metrics.observe(Record("1", "POST", worker=name, duration=1.0))
    samples = parse(page([metrics.collect]))
    assert values_of(samples, "worker") == {"gpu1", "other"}


def test_names_that_are_too_long_share_a_label() -> None:
    metrics = RequestMetrics()
    for model in ("m" * 256, "m" * 257, "n" * 4096):
        metrics.observe(Record("1", "POST", model=model, duration=1.0))
    samples = parse(page([metrics.collect]))
    assert values_of(samples, "model") == {"m" * 256, "other"}


# --- In a running hub -------------------------------------------------------------


async def test_a_stream_is_counted_at_its_end() -> None:
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
        assert value(samples, name, route=CHAT, **where) == 1


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


async def test_a_client_that_leaves_has_an_outcome_for_it() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(2, "never"))
        wire = await hub.open(CHAT, {"messages": [], "stream": True})
        assert await wire.read_event()
        wire.close()
        samples = await scraped_until(
            hub, lambda s: "client_gone" in values_of(s, "outcome")
        )
        assert value(samples, "gollama_in_flight", worker=worker.name) == 0


async def test_a_refusal_is_counted_by_its_code() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        none = {"model": "", "worker": ""}
        await hub.post(CHAT, b"no JSON")
        await hub.post(CHAT, {}, "no token")
        await hub.get("/nowhere")
        samples = await scrape(hub)
        for code in ("invalid_json", "invalid_api_key", "unknown_url"):
            labels = {"outcome": code, **none}
            assert value(samples, "gollama_outcomes_total", **labels) == 1
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


async def test_no_text_of_a_client_becomes_a_label() -> None:
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


async def test_a_model_name_that_the_only_worker_ignores_is_not_a_label() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        assert (await hub.post(CHAT, {"model": "canary", "messages": []})).status == 200
        response = await hub.get("/metrics")
        assert b"canary" not in response.body
        assert values_of(parse(response.body), "model") == {"", "qwen"}


async def test_a_large_page_leaves_time_for_everything_else() -> None:
    """A piece takes about a quarter of a millisecond; between two, tokens are relayed.

    Of 300 workers and subjects, whose page has a third of a thousand's.
    """
    urls = [f"http://worker{number}:1" for number in range(300)]
    registry = Registry(config.load(None, {}, {}, urls), Clock())
    telemetry = Telemetry(registry, Admission(Queue(), Clock()), clock=Clock())
    for number, worker in enumerate(registry.workers):
        lease = worker.lease("qwen")
        lease.tokens, lease.seconds = 20, 1.0
        record = Record("1", "POST", CHAT, model="qwen", worker=worker.name)
        record.subject, record.attempts, record.status = f"s{number}", 1, 200
        record.first_byte, record.tokens, record.prompt_tokens = 0.1, 20, 100
        record.lease = lease
        telemetry.ended(record)
        lease.release(Result.COMPLETE)
    parts = [*telemetry.pieces()]
    assert sum(part.count("\n") for part in parts) > 30_000
    assert len(parts) > 80
    assert max(map(len, parts)) < 2 * PIECE
    turns = 0

    async def relay() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    relaying = asyncio.create_task(relay())
    page = await telemetry.page()
    relaying.cancel()
    assert turns >= len(parts)
    assert len(page) > 3_000_000


def test_a_system_without_proc_has_no_metrics_of_the_process(tmp_path: Path) -> None:
    assert [*of_process(tmp_path)] == []


async def test_a_reload_shows_whether_the_settings_were_valid(tmp_path: Path) -> None:
    file = tmp_path / "gollama.toml"
    file.write_text("")
    async with running_hub(file=file, metrics__open=True) as hub:
        before = await scrape(hub)
        assert value(before, RELOADED.name) == 1
        file.write_text("[queue]\nsize = -1")
        with pytest.raises(ConfigError):
            await hub.hub.reload()
        refused = await scrape(hub)
        assert value(refused, RELOADED.name) == 0
        assert value(refused, RELOADED_AT.name) == value(before, RELOADED_AT.name)
        file.write_text("[queue]\nsize = 7")
        await hub.hub.reload()
        after = await scrape(hub)
        assert value(after, RELOADED.name) == 1
        assert value(after, ROOM.name) == 7
        earlier, later = (value(each, RELOADED_AT.name) for each in (before, after))
        assert earlier is not None
        assert later is not None
        assert later >= earlier


# --- The present ------------------------------------------------------------------


def test_workers_are_shown_in_their_present_state() -> None:
    clock = Clock()
    loaded = config.load(None, {}, {}, ["http://a:1", "http://b:2"])
    registry = Registry(loaded, clock)
    telemetry = Telemetry(registry, Admission(Queue(), Clock()))
    a, b = registry.workers

    samples = parse(shown(telemetry))
    python = platform.python_version()
    build = {"version": __version__, "python": python}
    assert value(samples, "gollama_build_info", **build) == 1
    for name in ("a:1", "b:2"):
        assert value(samples, "gollama_worker_up", worker=name) == 0
        assert value(samples, "gollama_in_flight", worker=name) == 0
        state = value(samples, "gollama_worker_state", worker=name, state="starting")
        assert state == 1
        assert value(samples, "gollama_worker_slots", worker=name) is None

    a.observe(Check.OK, "ok", Description((Model("qwen"),), slots=3))
    b.observe(Check.OK, "ok", Description())  # does not report its slots
    lease = a.lease()
    samples = parse(shown(telemetry))
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
    samples = parse(shown(telemetry))
    assert value(samples, "gollama_in_flight", worker="a:1") == 0


def test_requests_in_the_queue_are_shown_by_class() -> None:
    admission = Admission(Queue(), Clock())
    registry = Registry(config.load(None, {}, {}, ["http://a:1"]), Clock())
    telemetry = Telemetry(registry, admission)
    admission.join("alice", "qwen", Priority.BATCH)
    samples = parse(shown(telemetry))
    assert value(samples, "gollama_queue_waiting", **{"class": "batch"}) == 1
    assert value(samples, "gollama_queue_waiting", **{"class": "interactive"}) == 0
    fleet = FleetMetrics(registry, admission, {}, len, Names(1))
    assert repr(fleet) == "<FleetMetrics workers=1>"


def test_connections_are_shown_with_the_refused_ones_by_reason() -> None:
    clients = ConnectionLimiter(Limits(connections=1), Clock())
    registry = Registry(config.load(None, {}, {}, ["http://a:1"]), Clock())
    telemetry = Telemetry(registry, Admission(Queue(), Clock()), clients)
    assert clients.enter()
    assert not clients.enter()
    samples = parse(shown(telemetry))
    assert value(samples, "gollama_connections") == 1
    refused = "gollama_connections_refused_total"
    assert value(samples, refused, reason="limit") == 1
    assert value(samples, refused, reason="address") == 0
    text = "<ClientMetrics of <ConnectionLimiter open=1 of 1>>"
    assert repr(ClientMetrics(clients)) == text


async def test_the_speed_of_a_worker_and_its_connections_are_shown() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        worker.default(*stream_of(20))
        for _ in range(2):
            wire = await hub.open(CHAT, {"messages": [], "stream": True})
            await wire.read_events()
        await hub.post(EMBED, {"input": "hello"})
        await hub.post(EMBED, {"input": "hello"})
        samples = await scrape(hub)
        where = {"model": "qwen", "worker": worker.name}
        for metric in (READS, WRITES):
            speed = value(samples, metric.name, **where)
            assert speed is not None
            assert speed > 0
        at = {"worker": worker.name}
        opened = value(samples, "gollama_worker_connections_opened_total", **at)
        reused = value(samples, "gollama_worker_connections_reused_total", **at)
        assert opened is not None
        assert reused is not None
        assert opened + reused == 4
        pool = "gollama_worker_connections"
        assert value(samples, pool, state="in_use", **at) == 0


async def test_connections_in_use_are_counted_until_they_are_given_back() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        worker.script(*stream_of(2, "never"))
        worker.script(close())
        at = {"worker": worker.name, "state": "in_use"}
        wire = await hub.open(CHAT, {"messages": [], "stream": True})
        assert await wire.read_event()
        samples = await scrape(hub)
        assert value(samples, "gollama_worker_connections", **at) == 1
        wire.close()
        await hub.post(CHAT, {"messages": []})  # an attempt that fails
        await scraped_until(
            hub, lambda s: value(s, "gollama_worker_connections", **at) == 0
        )


async def test_what_generates_nothing_has_no_first_token() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        count = "/v1/messages/count_tokens"
        for path, body in (
            (EMBED, {"input": "hello"}),
            (count, {"messages": []}),
            ("/tokenize", {"content": "hello"}),
        ):
            assert (await hub.post(path, body)).status == 200
        samples = await scrape(hub)
        assert FIRST_TOKEN.name + "_count" not in names_of(samples)
        assert PER_TOKEN.name + "_count" not in names_of(samples)
        assert values_of(samples, "route") >= {EMBED, count, "/tokenize"}


async def test_an_answer_in_one_piece_is_timed_by_the_tokens_of_its_worker() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        worker.script(*stream_of(3))
        assert (await hub.post(CHAT, {"messages": []})).status == 200
        samples = await scrape(hub)
        where = {"model": "qwen", "worker": worker.name}
        assert value(samples, f"{FIRST_TOKEN.name}_count", **where) == 1
        assert value(samples, f"{PER_TOKEN.name}_count", **where) == 1


async def test_a_limit_is_counted_for_its_subject() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        bearer = hub.token(sub="alice", rpm=1)
        statuses = [
            (await hub.post(EMBED, {"input": "hello"}, bearer)).status for _ in range(3)
        ]
        assert statuses == [200, 429, 429]
        samples = await scrape(hub)
        limited = {"subject": "alice", "reason": "rate_limit_exceeded"}
        assert value(samples, LIMITED.name, **limited) == 2
        used = {"subject": "alice", "model": "qwen"}
        assert value(samples, USED_REQUESTS.name, **used) == 1


async def test_a_scraper_gets_the_format_that_it_prefers() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        modern = "application/openmetrics-text;version=1.0.0;q=0.6"
        accept = f"{modern},text/plain;q=0.4,*/*;q=0.2"
        response = await hub.get("/metrics", headers=[("Accept", accept)])
        assert response.body.endswith(b"# EOF\n")
        assert response.header("Content-Type") == OPEN_METRICS
        assert modern_families(response.body)
        response = await hub.get("/metrics")
        assert response.header("Content-Type") == TEXT
        assert b"# EOF" not in response.body


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text;q=0.5,text/plain;q=0.4", True),
        ("application/openmetrics-text;q=0.4,text/plain;q=0.5", False),
        ("text/plain;version=0.0.4,application/openmetrics-text;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("Application/OpenMetrics-Text ; Q=0.2", True),
        ("application/openmetrics-text;q=nonsense", True),
    ],
)
def test_open_metrics_is_sent_where_it_is_preferred(
    accept: str, expected: bool
) -> None:
    assert prefers_open_metrics(accept) is expected


async def test_running_requests_are_in_flight() -> None:
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
