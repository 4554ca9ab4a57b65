"""Traces: a span for each request, and below it its waits, attempts and answers.

    chat tiny                                server: the whole request
    ├── queue                                while every slot was taken
    ├── attempt  worker gpu1, failed         client: what one worker was asked
    │   └── relay                            from its first token to its last
    ├── queue
    └── attempt  worker gpu2, complete       linked to the attempt that it follows
        └── relay

A request that is traced costs two random numbers while it runs.  Its spans are made
when it has ended, from the times that it has anyway, and sent by a thread of the SDK.

Spans are made as an exporter reads them: one of the SDK's own `Span` objects takes five
times as long, for locks and limits that a span which has ended does not need.

The names of attributes are those of OpenTelemetry (GenAI and HTTP), or begin with
`gollama.`.  No prompt, answer, token or header of a client gets into a span.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from gollama_proxy import __version__
from gollama_proxy.config.values import ConfigError
from gollama_proxy.telemetry.accesslog import MOST_DETAIL, Outcome, Record, Step
from gollama_proxy.telemetry.logs import Throttle
from gollama_proxy.wire.headers import TraceContext, trace_lines
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from gollama_proxy.config.settings import Tracing
    from gollama_proxy.fleet.lease import Lease

logger = logging.getLogger(__name__)

FLUSH = 5.0  # seconds that the last spans may take when the hub ends
LOG_EVERY = 60.0  # seconds between two lines about spans that are lost
MOST_REASON = 300  # characters of what the exporter reports

Attributes = dict[str, str | int | float | bool]

_SCOPE = InstrumentationScope("gollama_proxy", __version__)
_SAMPLED, _NOT_SAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
_OK = Status()


class Tracer:
    """Begins the trace of a request, or continues that of its client."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        """Use the sampler, ids and resource of a provider; `processor` gets spans."""
        self.resource = provider.resource
        self._sampler = provider.sampler
        self._ids = provider.id_generator
        self._processor = processor

    def __repr__(self) -> str:
        return f"<Tracer {self._sampler.get_description()}>"

    @classmethod
    def configured(cls, tracing: Tracing) -> Self | None:
        """Make the one of the settings and `OTEL_*` variables, which may turn it off.

        This blocks.  A thread is started, which sends the spans.

        Raises:
            ConfigError: the SDK rejects one of the variables.
        """
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        endpoint = tracing.endpoint.rstrip("/")
        # It quotes headers that it cannot read, and with them the key of a collector.
        logging.getLogger("opentelemetry.util.re").addFilter(_without_values)
        exporter: Exporter | None = None
        try:
            sender = OTLPSpanExporter(f"{endpoint}/v1/traces" if endpoint else None)
            provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            exporter = Exporter(sender, time.monotonic)
            spans = BatchSpanProcessor(exporter)
        except (ValueError, RuntimeError) as exc:
            if exporter is not None:
                exporter.shutdown()
            raise ConfigError(
                "tracing.enabled = true: OpenTelemetry rejects the OTEL_* variables of "
                f"the environment: {str(exc)[:MOST_REASON]}"
            ) from exc
        logger.info("requests are traced, by %s", provider.sampler.get_description())
        return cls(provider, spans)

    def begin(self, x: Record) -> Spans:
        """Begin the span of a request, below that of its client if it has one."""
        parent = x.trace
        context = Context()
        if parent is None:
            number, state = self._ids.generate_trace_id(), ""
        else:
            number, state = int(parent.trace_id, 16), parent.state
            remote = NonRecordingSpan(_remote(parent))
            context = set_span_in_context(remote, context)
        decision = self._sampler.should_sample(context, number, x.method).decision
        sampled = decision is Decision.RECORD_AND_SAMPLE
        x.trace = TraceContext(f"{number:032x}", self.new_id(), sampled, state)
        return Spans(self, x.trace, parent)

    def new_id(self) -> str:
        """Return the id of a new span."""
        return f"{self._ids.generate_span_id():016x}"

    def record(self, span: ReadableSpan) -> None:
        """Have a span sent."""
        self._processor.on_end(span)

    async def close(self) -> None:
        """Send what has been recorded, for at most `FLUSH` seconds."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop did not wait for it
                loop.call_soon_threadsafe(sent.set)

        # The SDK may take half a minute, and a thread of the loop's own pool would have
        # to be waited for.
        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH):
                await sent.wait()
        except TimeoutError:
            logger.warning("traces: the last spans were not sent within %g s", FLUSH)


class Spans:
    """The spans of one request, which are recorded together at its end."""

    __slots__ = ("_attempts", "_parent", "_tracer", "trace")

    def __init__(
        self, tracer: Tracer, trace: TraceContext, parent: TraceContext | None
    ) -> None:
        self.trace = trace
        self._tracer = tracer
        self._parent = parent
        self._attempts: list[_Attempt] = []

    def __repr__(self) -> str:
        return f"<Spans of {self.trace!r} attempts={len(self._attempts)}>"

    def attempt(self, lease: Lease, *, resumes: bool) -> bytes:
        """Begin an attempt; return the header lines for its worker.

        It `resumes` an answer that has broken off.
        """
        if not self.trace.sampled:
            return trace_lines(self.trace)
        span_id = self._tracer.new_id()
        self._attempts.append(_Attempt(lease, span_id, resumes))
        return trace_lines(self.trace._replace(span_id=span_id))

    def failed(self, cause: str, reason: str) -> None:
        """Note why the last attempt failed: a name of the cause, and a text."""
        if self._attempts:
            self._attempts[-1].cause, self._attempts[-1].reason = cause, reason

    def end(self, x: Record, asked: Attributes) -> None:
        """Record the spans of a request that has ended; `asked` is more about it."""
        if self.trace.sampled:
            for span in _Request(self._tracer, self.trace, x).spans(
                self._parent, self._attempts, asked
            ):
                self._tracer.record(span)


class _Attempt:
    __slots__ = ("cause", "lease", "reason", "resumes", "span_id")

    def __init__(self, lease: Lease, span_id: str, resumes: bool) -> None:
        self.lease = lease
        self.span_id = span_id
        self.resumes = resumes
        self.cause = self.reason = ""  # empty unless it has failed

    def __repr__(self) -> str:
        return f"<_Attempt {self.span_id} {self.lease!r}>"


def _without_values(record: logging.LogRecord) -> bool:
    record.args = tuple("…" for _ in record.args or ())
    return True


def _resource() -> Resource:
    """Describe this program; `OTEL_SERVICE_NAME` has another name for it."""
    found = Resource.create()
    ours = {"service.version": __version__}
    if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
        ours["service.name"] = "gollama-proxy"
    return found.merge(Resource(ours))


def _remote(place: TraceContext) -> SpanContext:
    return SpanContext(
        int(place.trace_id, 16),
        int(place.span_id, 16),
        is_remote=True,
        trace_flags=_SAMPLED if place.sampled else _NOT_SAMPLED,
        trace_state=TraceState.from_header([place.state]) if place.state else None,
    )


# --- The spans of a request that has ended ----------------------------------------


class _Request:
    """Makes the spans of one request."""

    def __init__(self, tracer: Tracer, trace: TraceContext, x: Record) -> None:
        self._tracer = tracer
        self._trace_id = int(trace.trace_id, 16)
        self._state = _remote(trace).trace_state
        self._x = x
        # Of monotonic seconds, in Unix time.
        self._ended = x.started + (x.duration or 0.0)
        self._epoch = time.time_ns() - round(self._ended * 1e9)
        self._context = self._own(trace.span_id)

    def __repr__(self) -> str:
        return f"<_Request {self._x!r}>"

    def spans(
        self,
        parent: TraceContext | None,
        attempts: Sequence[_Attempt],
        asked: Attributes,
    ) -> Iterator[ReadableSpan]:
        """Yield those of the attempts and waits, and last that of the request."""
        before: SpanContext | None = None
        for number, attempt in enumerate(attempts, 1):
            context = self._own(attempt.span_id)
            yield self._attempt(number, attempt, context, before)
            if attempt.lease.first_token:
                yield self._relay(attempt.lease, context)
            before = context
        for step, following in pairwise((*self._x.steps, None)):
            if step is not None and step.step == "queued":
                yield self._wait(step, following)
        yield self._server(parent, asked)

    def _server(self, parent: TraceContext | None, asked: Attributes) -> ReadableSpan:
        x = self._x
        operation = ENDPOINTS[x.route].operation if x.route in ENDPOINTS else ""
        attributes: Attributes = {
            "http.request.method": x.method,
            "http.route": x.route,
            "gollama.request_id": x.id,
            "gollama.attempts": x.attempts,
        }
        complete = x.outcome is Outcome.COMPLETE
        attributes |= _known(
            {
                "http.response.status_code": x.status,
                "client.address": x.remote,
                "enduser.id": x.subject,
                "gollama.outcome": x.outcome.value if x.outcome is not None else "",
                "gollama.rescued": x.rescued,
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "gollama" if operation else "",
                "gen_ai.request.model": x.model and (x.fell_back or x.model),
                "gen_ai.response.model": x.model if complete else "",
                "gen_ai.usage.input_tokens": x.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": x.cached_tokens,
                "gen_ai.usage.output_tokens": x.tokens,
            }
        )
        if x.first_byte is not None and asked.get("gen_ai.request.stream"):
            attributes["gen_ai.response.time_to_first_chunk"] = x.first_byte
        attributes |= asked
        error = x.error
        if x.outcome is Outcome.REFUSED:
            error = str(x.status)
        status = _OK
        if error:
            attributes["error.type"] = error
            # Mistakes of a client are none of the hub; a broken answer has a 200.
            broken = x.outcome is Outcome.ERROR and x.status < 400
            if broken or x.status >= 500:
                status = Status(StatusCode.ERROR, x.detail[:MOST_DETAIL] or error)
        return self._span(
            f"{operation} {x.fell_back or x.model}"
            if operation and x.model
            else f"{x.method} {x.route}",
            self._context,
            _remote(parent) if parent is not None else None,
            (x.started, self._ended),
            attributes,
            kind=SpanKind.SERVER,
            status=status,
            events=[
                self._event(x.started + step.at, step)
                for step in x.steps
                if step.step not in ("queued", "attempt")
            ],
        )

    def _attempt(
        self,
        number: int,
        attempt: _Attempt,
        context: SpanContext,
        before: SpanContext | None,
    ) -> ReadableSpan:
        """Make the span of an attempt, linked to the one that failed before it."""
        lease = attempt.lease
        origin = lease.worker.config.origin
        attributes: Attributes = {
            "http.request.method": self._x.method,
            "server.address": origin.host,
            "gollama.worker": lease.worker.name,
            "gollama.attempt": number,
            "server.port": origin.port,
            "gollama.model": lease.model,
            "gollama.outcome": lease.result.name.lower() if lease.result else "",
            "error.type": attempt.cause,
        }
        status = Status(StatusCode.ERROR, attempt.reason) if attempt.cause else _OK
        links = []
        if before is not None:
            kind = "resumes" if attempt.resumes else "retries"
            links = [Link(before, {"gollama.link": kind})]
        return self._span(
            "attempt",
            context,
            self._context,
            (lease.taken_at, lease.released_at or self._ended),
            _known(attributes),
            kind=SpanKind.CLIENT,
            status=status,
            links=links,
        )

    def _relay(self, lease: Lease, context: SpanContext) -> ReadableSpan:
        """Make the span of an answer, from the first token that a worker sent."""
        begun = lease.taken_at + lease.first_token
        endpoint = ENDPOINTS.get(self._x.route)
        first = Event("first token", timestamp=self._nanoseconds(begun))
        return self._span(
            "relay",
            self._own(self._tracer.new_id()),
            context,
            (begun, lease.released_at or self._ended),
            _known({"gollama.tokens": lease.tokens}),
            events=[first] if endpoint is not None and endpoint.generates else [],
        )

    def _wait(self, step: Step, following: Step | None) -> ReadableSpan:
        """Make the span of a wait in the queue, until the next step."""
        begun = self._x.started + step.at
        until = self._ended if following is None else self._x.started + following.at
        return self._span(
            "queue",
            self._own(self._tracer.new_id()),
            self._context,
            (begun, until),
            {"gollama.reason": step.reason},
        )

    def _event(self, at: float, step: Step) -> Event:
        known = _known({"gollama.worker": step.worker, "gollama.reason": step.reason})
        return Event(step.step.replace("_", " "), known, self._nanoseconds(at))

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times: tuple[float, float],
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status = _OK,
        **more: Any,
    ) -> ReadableSpan:
        return ReadableSpan(
            name,
            context,
            parent,
            self._tracer.resource,
            attributes,
            kind=kind,
            status=status,
            start_time=self._nanoseconds(times[0]),
            end_time=self._nanoseconds(max(times)),
            instrumentation_scope=_SCOPE,
            **more,
        )

    def _own(self, span_id: str) -> SpanContext:
        return SpanContext(
            self._trace_id,
            int(span_id, 16),
            is_remote=False,
            trace_flags=_SAMPLED,
            trace_state=self._state,
        )

    def _nanoseconds(self, at: float) -> int:
        return self._epoch + round(at * 1e9)


def _known(attributes: Attributes) -> Attributes:
    """Leave out what is empty or zero, which means that it is not known."""
    return {name: value for name, value in attributes.items() if value}


# --- The collector ----------------------------------------------------------------


class Exporter(SpanExporter):
    """Sends spans, and logs once in a while how many were lost.

    It runs in the SDK's thread.  The SDK logs each batch that was not sent, and each
    attempt to send it.
    """

    def __init__(self, exporter: SpanExporter, clock: Callable[[], float]) -> None:
        self._exporter = exporter
        self._lost = Throttle(clock, LOG_EVERY)
        self._reason = _Reason()

    def __repr__(self) -> str:
        return f"<Exporter {self._lost!r}>"

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        accepted = result is SpanExportResult.SUCCESS
        if not accepted and (lost := self._lost.count("spans", len(spans))):
            text = "traces: %d spans were not accepted: %s"
            logger.warning(text, lost, self._reason.text)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._reason.close()


class _Reason(logging.Handler):
    """Keeps the last things that the exporter logs, instead of logging them.

    Its error at the end of its attempts does not state why they failed; its warning
    about each of them does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text = "no reason is known"
        self._attempt = ""
        self._logger = logging.getLogger("opentelemetry.exporter")
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        # A URL may have a password.
        text = re.sub(r"//[^/\s@]*@", "//", record.getMessage())[:MOST_REASON]
        if record.levelno < logging.ERROR:
            self._attempt = self.text = text
        else:
            self.text = f"{text} {self._attempt}".rstrip()
            self._attempt = ""

    def close(self) -> None:
        self._logger.removeHandler(self)
        # Another exporter may be at work, as this one ends in a thread.
        others = any(isinstance(each, _Reason) for each in self._logger.handlers)
        self._logger.propagate = not others
        super().close()
