"""The spans of a request: what happened to it, and when, without any of its content."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from gollama_proxy.config.load import load
from gollama_proxy.config.values import ConfigError
from gollama_proxy.telemetry import tracing
from gollama_proxy.telemetry.tracing import Exporter, Tracer
from tests.behaviour.test_fallbacks import family
from tests.behaviour.test_rescue import BREAKS, asked, continued, pool
from tests.behaviour.test_retries import two
from tests.control.test_admin import CALM, begun, complete, endless
from tests.fakes.asks import CHAT, EMBED, STREAM
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import error_reply
from tests.fakes.script import reset, send
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = [("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=1,,b=2")]
MODEL = {**STREAM, "model": "tiny"}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send spans at the end of a hub only, and let that take its time."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setattr(tracing, "FLUSH", 60.0)


class Recorder:
    """Has a hub record its spans in memory."""

    def __init__(self, hub: RunningHub, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        processor = SimpleSpanProcessor(self._exporter)
        hub.hub.proxy.tracer = Tracer(provider, processor)
        self._hub = hub

    def __repr__(self) -> str:
        return f"<Recorder of {self._hub!r}>"

    async def ended(self, requests: int = 1) -> list[ReadableSpan]:
        """Return all spans once so many requests have ended, in the order of times."""
        await until(lambda: self._hub.hub.recent.count == requests)
        spans = self._exporter.get_finished_spans()
        return sorted(
            spans, key=lambda span: (span.start_time or 0, -(span.end_time or 0))
        )


def named(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def server(spans: list[ReadableSpan]) -> ReadableSpan:
    [span] = [span for span in spans if span.kind is SpanKind.SERVER]
    return span


def ids(span: ReadableSpan | None) -> tuple[str, str]:
    """Return the ids of a trace and a span, as a `traceparent` has them."""
    assert span is not None
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parent(span: ReadableSpan) -> str:
    return f"{span.parent.span_id:016x}" if span.parent is not None else ""


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def received(worker: ScriptedWorker) -> list[tuple[str, str, str]]:
    """Return the trace, span and flags that each request of a worker had."""
    found = []
    for request in worker.requests:
        [value] = [value for name, value in request.headers if name == "traceparent"]
        version, trace_id, span_id, flags = value.split("-")
        assert version == "00"
        found.append((trace_id, span_id, flags))
    return found


async def test_a_plain_request_has_an_attempt_and_a_relay() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        worker.default(*complete())
        body = {**MODEL, "max_tokens": 9}
        response = await hub.post(CHAT, body, hub.token(sub="alice"))
        spans = await recorder.ended()
        assert [span.name for span in spans] == ["chat tiny", "attempt", "relay"]
        whole, attempt, relay = spans
        assert parent(whole) == ""
        assert parent(attempt) == ids(whole)[1]
        assert parent(relay) == ids(attempt)[1]
        assert len({ids(span)[0] for span in spans}) == 1
        # The worker continues the trace below the attempt.
        assert received(worker) == [(*ids(attempt), "01")]
        shown = attributes(whole)
        assert shown.pop("gen_ai.response.time_to_first_chunk") > 0
        assert shown.pop("gen_ai.usage.output_tokens") > 0
        shown.pop("gen_ai.usage.input_tokens", None)
        assert shown == {
            "http.request.method": "POST",
            "http.route": CHAT,
            "http.response.status_code": 200,
            "client.address": "127.0.0.1",
            "enduser.id": "alice",
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "gollama",
            "gen_ai.request.model": "tiny",
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.stream": True,
            "gen_ai.response.model": "tiny",
            "gollama.attempts": 1,
            "gollama.class": "interactive",
            "gollama.outcome": "complete",
            "gollama.request_id": response.header("x-request-id"),
        }
        host, port = worker.name.split(":")
        assert attributes(attempt) == {
            "http.request.method": "POST",
            "server.address": host,
            "server.port": int(port),
            "gollama.worker": worker.name,
            "gollama.attempt": 1,
            "gollama.model": "tiny",
            "gollama.outcome": "complete",
        }
        assert attempt.kind is SpanKind.CLIENT
        assert [event.name for event in relay.events] == ["first token"]
        assert relay.events[0].timestamp == relay.start_time
        assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
        for span in spans:
            assert (
                whole.start_time <= span.start_time <= span.end_time <= whole.end_time
            )


async def test_a_request_continues_the_trace_of_its_client() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        worker.default(*complete())
        await hub.post(CHAT, MODEL, headers=TRACED)
        spans = await recorder.ended()
        whole = server(spans)
        assert (ids(whole)[0], parent(whole)) == (TRACE, SPAN)
        assert whole.parent is not None
        assert whole.parent.is_remote
        [attempt] = named(spans, "attempt")
        assert received(worker) == [(*ids(attempt), "01")]
        [request] = worker.requests
        assert request.header("tracestate") == "a=1,b=2"
        [shown] = hub.hub.recent.find()
        assert shown["trace"] == TRACE


async def test_a_trace_that_is_not_valid_is_replaced() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        worker.default(*complete())
        headers = [("Traceparent", "00-1-2-03"), ("Tracestate", "a=1")]
        await hub.post(CHAT, MODEL, headers=headers)
        [attempt] = named(await recorder.ended(), "attempt")
        assert received(worker) == [(*ids(attempt), "01")]
        assert "tracestate" not in dict(worker.requests[0].headers)


@pytest.mark.parametrize("begun_by", ["client", "hub"])
async def test_what_is_not_sampled_makes_no_spans(begun_by: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub, ALWAYS_OFF if begun_by == "hub" else None)
        worker.default(*complete())
        unsampled = [("traceparent", f"00-{TRACE}-{SPAN}-00")]
        await hub.post(CHAT, MODEL, headers=unsampled if begun_by == "client" else [])
        assert await recorder.ended() == []
        [(trace_id, span_id, flags)] = received(worker)
        assert flags == "00"  # so that the worker records nothing, either
        assert span_id != SPAN
        [shown] = hub.hub.recent.find()
        assert shown["trace"] == trace_id
        assert (trace_id == TRACE) is (begun_by == "client")


async def test_a_client_that_is_sampled_is_so_with_any_sampler_of_new_traces() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub, ParentBased(ALWAYS_OFF))
        worker.default(*complete())
        await hub.post(CHAT, MODEL)
        await hub.post(CHAT, MODEL, headers=TRACED)
        assert ids(server(await recorder.ended(2)))[0] == TRACE


async def test_a_wait_in_the_queue_has_a_span() -> None:
    clock = Clock()
    async with (
        ScriptedWorker(slots=1) as worker,
        running_hub(worker, clock=clock, **CALM) as hub,
    ):
        endless(worker)
        async with await hub.open(CHAT, MODEL) as first:
            await begun(first)
            recorder = Recorder(hub)
            worker.default(*complete())
            waiting = asyncio.create_task(hub.post(CHAT, MODEL), name="waiting")
            await until(lambda: hub.hub.queue.admission.waiting == 1)
            hub.pass_time(2.0)
        await waiting
        spans = await recorder.ended(2)
        [wait] = named(spans, "queue")
        [whole] = [span for span in spans if ids(span)[1] == parent(wait)]
        [attempt] = [
            span for span in named(spans, "attempt") if parent(span) == ids(whole)[1]
        ]
        assert whole.name == "chat tiny"
        assert wait.end_time - wait.start_time == 2_000_000_000
        assert attempt.start_time == wait.end_time
        assert attributes(wait) == {"gollama.reason": "every slot is taken"}


async def test_a_retry_is_linked_to_the_attempt_that_failed() -> None:
    async with two() as (bad, good, hub):
        recorder = Recorder(hub)
        bad.default(reset())
        good.default(*complete())
        await hub.post(CHAT, MODEL)
        spans = await recorder.ended()
        first, second = named(spans, "attempt")
        assert [attributes(each)["gollama.worker"] for each in (first, second)] == [
            *(bad.name, good.name)
        ]
        assert received(bad) == [(*ids(first), "01")]
        assert received(good) == [(*ids(second), "01")]
        assert first.status.status_code is StatusCode.ERROR
        assert attributes(first)["error.type"] == "lost"
        assert attributes(first)["gollama.outcome"] == "worker_failed"
        assert (second.status.status_code, first.links) == (StatusCode.UNSET, ())
        [link] = second.links
        assert link.context == first.context
        assert dict(link.attributes or {}) == {"gollama.link": "retries"}
        whole = server(spans)
        assert whole.status.status_code is StatusCode.UNSET
        assert attributes(whole)["gollama.attempts"] == 2
        assert [event.name for event in whole.events] == ["failed"]


async def test_a_rescue_is_linked_to_the_answer_that_broke_off() -> None:
    async with pool() as ([bad, good], hub):
        recorder = Recorder(hub)
        bad.script(*BREAKS["reset"])
        good.script(*continued())
        await asked(hub)
        spans = await recorder.ended()
        first, second = named(spans, "attempt")
        [link] = second.links
        assert link.context == first.context
        assert dict(link.attributes or {}) == {"gollama.link": "resumes"}
        # Both have sent a part of the answer.
        assert [parent(each) for each in named(spans, "relay")] == [
            *(ids(first)[1], ids(second)[1])
        ]
        whole = server(spans)
        assert attributes(whole)["gollama.rescued"] == 1
        assert [event.name for event in whole.events] == ["failed", "resumed"]


async def test_a_fallback_is_an_event_with_both_models() -> None:
    async with family(retry__patience=0) as (big, medium, _small, hub):
        recorder = Recorder(hub)
        big.default(send(error_reply(401, "no", "authentication_error")))
        medium.default(*complete())
        await hub.post(CHAT, {**STREAM, "model": "big"})
        whole = server(await recorder.ended())
        assert whole.name == "chat big"
        shown = attributes(whole)
        assert shown["gen_ai.request.model"] == "big"
        assert shown["gen_ai.response.model"] == "medium"
        [event] = [each for each in whole.events if each.name == "fell back"]
        assert dict(event.attributes or {}) == {
            "gollama.worker": medium.name,
            "gollama.reason": "medium instead of big",
        }


async def test_an_error_of_a_worker_is_the_error_of_the_request() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1, retry__patience=0, **CALM) as hub,
    ):
        recorder = Recorder(hub)
        worker.default(send(error_reply(500, "canary")))
        assert (await hub.post(CHAT, MODEL)).status == 500
        worker.default(send(error_reply(400, "canary")))
        assert (await hub.post(CHAT, MODEL)).status == 400
        spans = await recorder.ended(2)
        failed, refused = [span for span in spans if span.kind is SpanKind.SERVER]
        assert attributes(failed)["error.type"] == "500"
        assert failed.status.status_code is StatusCode.ERROR
        # A mistake of the client is no error of a server.
        assert attributes(refused)["error.type"] == "400"
        assert refused.status.status_code is StatusCode.UNSET
        assert "gen_ai.response.model" not in attributes(refused)
        assert "canary" not in "".join(span.to_json() for span in spans)


async def test_an_error_of_the_hub_has_its_code() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        assert (await hub.post(CHAT, MODEL, token="canary")).status == 401
        [whole] = await recorder.ended()
        assert whole.name == f"POST {CHAT}"  # its model was not read
        assert attributes(whole)["error.type"] == "invalid_api_key"
        assert "gen_ai.request.model" not in attributes(whole)
        assert "canary" not in whole.to_json()


async def test_a_client_that_leaves_ends_its_spans() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        endless(worker)
        async with await hub.open(CHAT, MODEL) as client:
            await begun(client)
        spans = await recorder.ended()
        assert [span.name for span in spans] == ["chat tiny", "attempt", "relay"]
        for span in spans[:2]:
            assert attributes(span)["gollama.outcome"] == "client_gone"
            assert span.status.status_code is StatusCode.UNSET


async def test_what_generates_nothing_has_no_first_token() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        await hub.post(EMBED, {"model": "tiny", "input": "a"})
        whole, _attempt, relay = await recorder.ended()
        assert whole.name == "embeddings tiny"
        assert relay.events == ()
        assert not {name for name in attributes(whole) if "stream" in name}


async def test_no_text_of_a_conversation_gets_into_a_span() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        worker.default(*complete())
        body = {**MODEL, "messages": [{"role": "user", "content": "canary"}]}
        await hub.post(CHAT, body, headers=[("X-Anything", "canary")])
        spans = await recorder.ended()
        text = "".join(span.to_json() + repr(span) for span in spans)
        assert "canary" not in text
        assert hub.token() not in text


async def test_other_routes_have_no_spans() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        recorder = Recorder(hub)
        for path in "/livez", "/v1/models", "/nowhere":
            await hub.get(path)
        worker.default(*complete())
        await hub.post(CHAT, MODEL)
        assert server(await recorder.ended()).name == "chat tiny"


# --- The collector ----------------------------------------------------------------


class Collector:
    """Receives spans as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []  # the names of the service and the span
        self.headers: list[str] = []

    def __repr__(self) -> str:
        return f"<Collector spans={len(self.spans)}>"

    async def take(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("X-Key", ""))
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            names = {
                each.key: each.value.string_value
                for each in resource.resource.attributes
            }
            for scope in resource.scope_spans:
                assert scope.scope.name == "gollama_proxy"
                self.spans += [(names["service.name"], s.name) for s in scope.spans]
        return web.Response()


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    async with TestServer(app) as running:
        yield collector, str(running.make_url("")).rstrip("/")


@pytest.mark.parametrize("service", ["gollama-proxy", "attic"])
@pytest.mark.parametrize("by_variable", [False, True])
async def test_spans_are_sent_to_a_collector_at_the_latest_at_the_end(
    service: str, by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collecting() as (collector, url), ScriptedWorker() as worker:
        if service == "attic":
            monkeypatch.setenv("OTEL_SERVICE_NAME", service)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Key=canary")
        settings = {"tracing__enabled": True, "tracing__endpoint": url + "/"}
        if by_variable:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            settings = {"tracing__enabled": True}
        worker.default(*complete())
        async with running_hub(worker, **settings, **CALM) as hub:
            await hub.post(CHAT, MODEL)
        assert set(collector.spans) == {
            (service, name) for name in ("chat tiny", "attempt", "relay")
        }
        assert collector.headers == ["canary"]


async def test_the_sampler_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    async with collecting() as (collector, url), ScriptedWorker() as worker:
        worker.default(*complete())
        settings = {"tracing__enabled": True, "tracing__endpoint": url, **CALM}
        async with running_hub(worker, **settings) as hub:
            await hub.post(CHAT, MODEL)
            [(_, _, flags)] = received(worker)
            assert flags == "00"
        assert collector.spans == []


async def test_the_environment_can_turn_traces_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    async with ScriptedWorker() as worker:
        async with running_hub(worker, tracing__enabled=True, **CALM) as hub:
            assert hub.hub.proxy.tracer is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-5"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "many"),
    ],
)
async def test_a_variable_that_the_sdk_rejects_is_a_clear_error(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"tracing\.enabled = true: .* OTEL_\* var"):
        async with running_hub(tracing__enabled=True):
            pass


async def test_a_key_for_the_collector_that_cannot_be_read_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Bearer canary")
    async with running_hub(tracing__enabled=True, **CALM):
        pass
    assert "Header format invalid" in caplog.text
    assert "canary" not in caplog.text


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"GOLLAMA_TRACING_ENABLED": "true", "GOLLAMA_AUTH_MODE": "off"}
    load(None, environ)
    how = r"needs OpenTelemetry; pip install 'gollama-proxy\[otel\]'"

    def nothing(name: str) -> None:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(ConfigError, match=rf"tracing\.enabled = true: {how}"):
        load(None, environ)
    load(None, {"GOLLAMA_AUTH_MODE": "off"})


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    environ = {"GOLLAMA_TRACING_ENDPOINT": endpoint, "GOLLAMA_AUTH_MODE": "off"}
    with pytest.raises(ConfigError, match=r"tracing\.endpoint = '.*': must be a URL"):
        load(None, environ)


class Refusing(SpanExporter):
    """Sends nothing, and complains as the SDK's exporter does."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        logger = logging.getLogger("opentelemetry.exporter.any")
        logger.warning("no route to http://user:canary@host:4318/v1/traces")
        logger.error("Failed.")
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        pass


def test_spans_that_are_lost_are_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    earlier = Exporter(Refusing(), clock)
    exporter = Exporter(Refusing(), clock)
    earlier.shutdown()  # it may end late
    for _ in range(5):
        exporter.export([ReadableSpan("a"), ReadableSpan("b")])
    reason = "Failed. no route to http://host:4318/v1/traces"
    assert caplog.messages == [f"traces: 2 spans were not accepted: {reason}"]
    clock.advance(60)
    exporter.export([ReadableSpan("a")])
    assert caplog.messages[1:] == [f"traces: 9 spans were not accepted: {reason}"]
    exporter.shutdown()
    Refusing().export([])  # the next one logs for itself
    assert len(caplog.messages) == 4


async def test_a_collector_that_does_not_answer_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "FLUSH", 0.02)
    answered = threading.Event()

    class Stuck(SimpleSpanProcessor):
        def shutdown(self) -> None:
            answered.wait()

    provider = TracerProvider(shutdown_on_exit=False)
    tracer = Tracer(provider, Stuck(InMemorySpanExporter()))
    await tracer.close()
    answered.set()
    assert caplog.messages == ["traces: the last spans were not sent within 0.02 s"]


async def test_no_request_waits_for_a_collector_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    with socket.socket() as reserved:  # so that no other program answers there
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        await _lose_spans(url, caplog)


async def _lose_spans(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedWorker() as worker:
        worker.default(*complete())
        settings = {"tracing__enabled": True, "tracing__endpoint": url, **CALM}
        async with running_hub(worker, **settings) as hub:
            for _ in range(3):
                assert (await hub.post(CHAT, MODEL)).status == 200
        [lost] = [text for text in caplog.messages if "spans were" in text]
        assert lost.startswith("traces: 9 spans were not accepted: ")
