"""What a client gets of a worker's answer: a refusal, or a beginning."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from aiohttp import web

from gollama_proxy.edge.server import json_response
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.registry import RETRY_AFTER
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.scheduling.retry import Failure
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire import headers, shapes, sse
from gollama_proxy.wire.assemble import AssemblyError, LostTextError
from gollama_proxy.wire.errors import (
    Code,
    NoWorkerError,
    ProxyError,
    WorkerError,
    error_body,
)
from gollama_proxy.wire.filters import renamed
from gollama_proxy.wire.openai import Api
from gollama_proxy.wire.overflow import Overflow
from gollama_proxy.wire.partial import DivergedError
from gollama_proxy.wire.schema import EventError

# What an attempt has failed of, by the error that it ended with.
FAILURES = {
    Code.WORKER_UNREACHABLE: Failure.UNREACHABLE,
    Code.WORKER_LOST: Failure.RESET,
    Code.WORKER_PROTOCOL: Failure.MALFORMED,
    Code.WORKER_TIMEOUT: Failure.SILENT,
    Code.WORKER_SLOW: Failure.SLOW,
    Code.WORKER_INCOMPLETE: Failure.RESET,
}

_SECONDS = re.compile(r"\d+(?:\.\d*)?")


class Refusal(NamedTuple):
    """An attempt that came to nothing before a byte of an answer was passed on."""

    told: web.Response | ProxyError  # to the client, if nobody else is asked
    outcome: Result  # for the worker
    failure: Failure | None = None  # None: it would be the same everywhere
    busy: float | None = None  # seconds that the worker asks to be left alone
    overflow: Overflow | None = None  # the prompt was too long
    lasting: bool = True  # another request would have come to the same


def refusal_of(error: WorkerError) -> Refusal:
    """Describe an attempt that ended with an error of the connection."""
    if isinstance(error, DivergedError):  # well meant; it was asked for too much
        return Refusal(error, Result.REFUSED)
    failure = FAILURES[error.code]
    slow = failure is Failure.SLOW
    outcome = Result.SLOW if slow else Result.WORKER_FAILED
    return Refusal(error, outcome, failure)


def refusal_of_assembly(error: AssemblyError) -> Refusal:
    """Describe a stream that makes up no answer."""
    if error.error is not None:
        return promote(error.error)
    text = "The worker's stream cannot be made into an answer."
    told = WorkerError(Code.WORKER_PROTOCOL, text, detail=str(error))
    lasting = not isinstance(error, LostTextError)
    return Refusal(told, Result.REFUSED, Failure.STREAM, lasting=lasting)


def refusal_of_another(worker: str, model: str) -> Refusal:
    """Describe an answer of a model that was not asked for."""
    text = f"Worker {worker} does not serve the model {model!r} any more."
    away = NoWorkerError(Code.NO_WORKER, text, retry_after=RETRY_AFTER)
    return Refusal(away, Result.REFUSED, Failure.MODEL)


async def read_refusal(relay: Relay, worker: str) -> Refusal | None:
    """Read whether a worker refuses; None if this is an answer to be passed on."""
    early = relay.early_error()
    if early is not None:
        return promote(early)
    if relay.status < 400:
        return None
    try:
        await relay.whole()
    except WorkerError as exc:
        return refusal_of(exc)
    status, body = relay.status, relay.held_body() or b""
    if status in (401, 403):
        text = f"Worker {worker} refuses the key that the hub has for it."
        error = WorkerError(Code.WORKER_REFUSED_KEY, text)
        return Refusal(error, Result.WORKER_FAILED, Failure.KEY)
    if status == 503:
        text = f"Worker {worker} is loading its model or too busy."
        away = NoWorkerError(Code.NO_WORKER, text, retry_after=RETRY_AFTER)
        return Refusal(away, Result.BUSY, Failure.LOADING, _retry_after(relay))
    told = _pass_on(relay, worker, body)
    if status == 429:
        return Refusal(told, Result.BUSY, Failure.BUSY, _retry_after(relay))
    if (overflow := Overflow.read(body)) is not None:
        return Refusal(told, Result.REFUSED, Failure.CONTEXT, overflow=overflow)
    # A 500 of llama-server often means a bad request, so nobody is blamed for it yet.
    return _status_refusal(told, failed=status >= 500 and status != 501)


def promote(early: EventError) -> Refusal:
    """Give a stream that began with an error the status that it should have had."""
    code = early.code
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    told = json_response(error_body(early.message, early.type, None), status)
    overflow = Overflow.of(early.message, (early.type, code))
    if overflow is not None:
        return Refusal(told, Result.REFUSED, Failure.CONTEXT, overflow=overflow)
    return _status_refusal(told, failed=status >= 500)


def _status_refusal(told: web.Response, *, failed: bool) -> Refusal:
    if failed:
        return Refusal(told, Result.ERRED, Failure.STATUS)
    return Refusal(told, Result.REFUSED)


def _pass_on(relay: Relay, worker: str, body: bytes) -> web.Response:
    """Pass a refusal on as it was; where it says nothing, say who it was.

    llama-server's 413 and 415 are empty, and a proxy before a worker has pages in HTML:
    SDKs read JSON, and people want to read why.
    """
    if not body.lstrip().startswith(b"{"):
        text = f"Worker {worker} answered {relay.status} without a reason."
        kind = "invalid_request_error" if relay.status < 500 else "server_error"
        return json_response(error_body(text, kind, None), relay.status)
    return _as_it_is(relay, body)


def _as_it_is(relay: Relay, body: bytes) -> web.Response:
    kept = headers.to_client(relay.headers)
    return web.Response(status=relay.status, body=body, headers=kept)


def _retry_after(relay: Relay) -> float:
    """Read how long a busy worker wants to be left alone; 1 s if it does not say.

    In seconds, or until a date (RFC 9110, 10.2.3), which is read by the worker's clock
    if it tells the time; a date in the past counts as 0 s.
    """
    given = relay.header(b"retry-after").decode("latin-1")
    if _SECONDS.fullmatch(given):
        return float(given)
    until = _moment(given)
    if until is None:
        return 1.0
    now = _moment(relay.header(b"date").decode("latin-1")) or datetime.now(UTC)
    return max((until - now).total_seconds(), 0.0)


def _moment(date: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def in_shape_of(api: Api, told: web.Response) -> web.Response:
    """Give a worker's refusal the shape that errors of this API have."""
    assert isinstance(told.body, bytes), told
    told.body = shapes.status_body(api, told.status, told.body)
    return told


def whole_response(
    relay: Relay, names: tuple[str, str] | None = None
) -> web.Response | None:
    """Make a response of a short answer that is here already; None of any other.

    `names` are those of its model, as the worker and as the client calls it.
    """
    body = relay.held_body()
    if body is None or relay.is_event_stream:
        return None
    return _as_it_is(relay, body if names is None else renamed(body, *names))


def begin_response(
    request: web.BaseRequest, relay: Relay, record: Record, *, sized: bool = True
) -> web.StreamResponse:
    """Make the head of an answer whose body will be relayed, and `sized` as it is."""
    kept = headers.to_client(relay.headers)
    response = web.StreamResponse(status=relay.status, headers=kept)
    response.headers.update(record.headers)
    if relay.is_event_stream:
        response.headers.update(sse.STREAM_HEADERS)
        if not relay.header(b"content-type"):
            response.content_type = "text/event-stream"
    events = relay.is_event_stream
    length = relay.header(b"content-length") if sized and not events else b""
    return _framed(request, response, length)


def begin_early(request: web.BaseRequest, record: Record) -> web.StreamResponse:
    """Make the head of an event stream of which nothing is known yet."""
    response = web.StreamResponse()
    response.content_type = "text/event-stream"
    response.headers.update(record.headers)
    response.headers.update(sse.STREAM_HEADERS)
    return _framed(request, response, b"")


def _framed(
    request: web.BaseRequest, response: web.StreamResponse, length: bytes
) -> web.StreamResponse:
    """Say how the client will know where the body ends."""
    if length:
        response.content_length = int(length)
    elif request.version >= (1, 1):
        response.enable_chunked_encoding()
    else:  # HTTP/1.0: the body ends with the connection
        response.force_close()
    return response
