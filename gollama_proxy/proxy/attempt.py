"""One attempt: sends a request to a worker, limits its time, and reads why it failed.

`exchange.py` releases what an attempt holds (connection, lease, upload of a long body)
on every path.  All attempts are checked once a second.  A short limit has a timer, so
that it is exact.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from gollama_proxy import __version__
from gollama_proxy.config.settings import Origin, WorkerConfig
from gollama_proxy.edge.response import JSON, Response, frame
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.fleet.pool import RETRY_AFTER
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause, DrainedError, Rule, rule_of
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly, Stream
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.tasks import held_up, spawn
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire.answer import (
    AnswerReport,
    first_model,
    model_of,
    names_in,
    read_answer,
)
from gollama_proxy.wire.errors import (
    Code,
    NoWorkerError,
    Overflow,
    ProxyError,
    WorkerError,
    error_body,
)
from gollama_proxy.wire.folding import AssemblyError, LostTextError
from gollama_proxy.wire.partial import DivergedError
from gollama_proxy.wire.schema import Ending, EventError

# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_CONNECTING, _WAITING = State.CONNECTING, State.WAITING
_SECONDS = re.compile(r"\d+(?:\.\d*)?")


# --- The request ------------------------------------------------------------------


def request_of(
    worker: WorkerConfig,
    path: str,
    forwarded: bytes,
    content_type: bytes,
    length: int | None,
    body: bytes,
) -> bytes:
    """Return the head of a request to a worker, and the body as far as it is there.

    `forwarded` are header lines from the client.  Without a length, the body is sent in
    chunks.
    """
    head = _common_head(worker.origin, worker.api_key, path, content_type) + forwarded
    if length is None:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        return b"%b%x\r\n%b\r\n" % (head, len(body), body) if body else head
    return b"%bContent-Length: %d\r\n\r\n%b" % (head, length, body)


@functools.lru_cache(maxsize=1024)
def _common_head(origin: Origin, key: str, path: str, content_type: bytes) -> bytes:
    """Write the part of a head that is the same for all requests of a kind."""
    head = (
        f"POST {origin.prefix}{path} HTTP/1.1\r\nHost: {origin.authority}\r\n"
        f"User-Agent: gollama-proxy/{__version__}\r\n"
    ).encode()
    head += b"Content-Type: %b\r\n" % content_type
    if key:
        head += b"Authorization: Bearer %b\r\n" % key.encode()
    return head


async def send(
    x: Exchange,
    connections: ConnectionPool,
    data: bytes,
    clock: Callable[[], float],
    *,
    chunked: bool = False,
) -> Relay:
    """Send a request, and wait for the first bytes of its answer.

    A reused connection that dies before the first byte of the answer is not a failure:
    llama-server closes its connections without notice, so the request is sent again on
    a new one (RFC 9112, 9.3.1).

    `data` is the head, and the body as far as it is kept; the rest of a longer one
    follows, in chunks if its length is not known.  Call `release` when the attempt is
    over.

    Raises:
        WorkerError: the worker was not reached, was lost, sent no HTTP, or exceeded a
            limit (see `Proxy.check`).
        ProxyError: the client did not send the rest of its body.
    """
    lease, replayable = x.lease, x.body.replayable
    assert lease is not None, x
    # A body that streams through cannot be sent twice.
    connection = connections.reuse() if replayable else None
    while True:
        if connection is None:
            x.enter(_CONNECTING)
            connection = await connections.dial()
        stale = connection.used > 0
        relay = Relay(connection, lease, x.endpoint)
        x.relay, x.waiting_since = relay, clock()
        x.enter(_WAITING)
        connection.start(relay, data)
        if not replayable:
            x.upload = Upload(x, relay, clock, chunked=chunked)
        try:
            await relay.opened()
        except WorkerError as exc:
            lost = exc.code is Code.WORKER_LOST and stale and connection.untouched
            if isinstance(exc, DrainedError) or not lost:
                raise
            connections.in_use -= 1
            connections.discard(connection)
            x.relay = connection = None
        else:
            return relay


def release(x: Exchange, connections: ConnectionPool) -> Upload | None:
    """Return the connection to the pool if its answer is complete, else close it.

    Closing a connection also cancels the generation.  Returns an upload that has to be
    cancelled.
    """
    relay, upload = x.relay, x.upload
    if relay is not None:
        if relay.spares_connection and (upload is None or upload.complete):
            streamed = relay.is_event_stream
            connections.give_back(relay.connection, streamed=streamed)
        else:
            connections.in_use -= 1
            relay.connection.close()
        x.relay = None
    if upload is not None:
        x.upload = None
    return upload


class Upload:
    """Sends the rest of a body that is longer than the replay window.

    The worker may answer meanwhile.  It must take some of the body every
    `timeouts.first_token` seconds.
    """

    __slots__ = ("_chunked", "_clock", "_relay", "_task", "_x", "complete")

    def __init__(
        self, x: Exchange, relay: Relay, clock: Callable[[], float], *, chunked: bool
    ) -> None:
        self.complete = False
        self._x = x
        self._relay = relay
        self._clock = clock
        self._chunked = chunked
        x.waiting_since = math.inf  # the body has its own limits
        self._task = spawn(self._run(), "upload to a worker")

    def __repr__(self) -> str:
        return f"<Upload {'complete' if self.complete else 'running'}>"

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._send_rest(self._relay.connection)
        except ProxyError as exc:
            self._relay.fail(exc)
        except ConnectionError:
            pass  # the client left, and the handler is being cancelled
        else:
            self.complete = True
            self._x.waiting_since = self._clock()

    async def _send_rest(self, connection: Connection) -> None:
        limit = self._x.config.timeouts.first_token
        async for piece in self._x.body.rest():
            connection.write(frame(piece) if self._chunked else piece)
            try:
                async with asyncio.timeout(limit):
                    await connection.drain()
            except TimeoutError:
                text = f"Worker {self._x.worker} read nothing within {limit:g} s."
                raise WorkerError(Code.WORKER_TIMEOUT, text) from None
        if self._chunked:
            connection.write(b"0\r\n\r\n")


# --- Its time limits --------------------------------------------------------------

# Limits up to this many seconds have a timer.
SOON = 5.0
# By how many seconds the time of the event loop, at which it began a round, may be
# behind the clock: a timer that ends before its limit leaves it to the next check.
BEHIND = 0.01
# Seconds without a byte of an answer, after which its worker's health is checked.
SUSPICIOUS = 5.0
# Seconds of silence before a client is notified that its prompt is being processed, and
# seconds between two such comments.
PROCESSING_AFTER, NOTICE_EVERY = 15.0, 5.0

_ON_WORKER = frozenset({State.WAITING, State.STREAMING})


class TimeLimits:
    """Checks how long attempts take.  `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def begin(self, x: Exchange, lease: Lease) -> asyncio.TimerHandle | None:
        """Set how long the first event may take; return the timer of a short limit."""
        limit = x.config.timeouts.first_token
        if x.noticed_at or lease.loads:
            x.noticed_at, x.loading = 0.0, lease.loads
        if (x.body.stream or x.delivery is not None) and streams(x):
            worker, model = lease.worker, lease.model
            pace = worker.paces.get(model) or worker.pace_of(model)
            # Loading a model takes time, and would on another worker, too.
            hard = pace.expectations.hard
            allowed = hard if lease.loads else pace.allowance(x.body.size)
            lease.allowance = allowed
            limit = min(limit, allowed)
        if limit > SOON:
            return None

        def check() -> None:
            if not held_up(timer):  # else the next round checks it
                self.check(x, self._clock())

        timer = asyncio.get_running_loop().call_later(limit + BEHIND, check)
        return timer

    def check(self, x: Exchange, now: float) -> None:
        """End an attempt that has exceeded a limit."""
        lease, relay = x.lease, x.relay
        if lease is None or relay is None:
            return  # it has none, or has just ended
        if now >= lease.worker.deadline and lease.result is None:
            if x.state in _ON_WORKER:
                relay.fail(DrainedError(lease.worker.name))
        elif x.state is State.WAITING:
            self._check_waiting(x, lease, relay, now)
        elif x.state is State.STREAMING:
            self._check_streaming(x, lease, relay, now)

    def _check_waiting(
        self, x: Exchange, lease: Lease, relay: Relay, now: float
    ) -> None:
        """Check an attempt whose worker has not begun to answer."""
        waited, worker = now - x.waiting_since, lease.worker
        limit = x.config.timeouts.first_token
        if waited >= limit:
            text = f"Worker {worker.name} sent nothing within {limit:g} s."
            relay.fail(WorkerError(Code.WORKER_TIMEOUT, text))
        elif streams(x):
            overdue = waited >= lease.allowance or worker.is_down
            if overdue and x.plan.has_other():
                text = f"Worker {worker.name} was too slow to begin."
                relay.fail(WorkerError(Code.WORKER_SLOW, text))
            else:
                self._notify_progress(x, waited)

    def _check_streaming(
        self, x: Exchange, lease: Lease, relay: Relay, now: float
    ) -> None:
        """Check an answer that is being sent."""
        # Not the answer: the timer that would close an idle connection takes 600 bytes,
        # and is of no use meanwhile.  aiohttp sets it again behind the answer.
        x.request.protocol.keep_alive(False)
        timeouts = x.config.timeouts
        silent = relay.check(now, timeouts.gap, timeouts.silence)
        if silent > SUSPICIOUS:
            lease.worker.suspect()
        if lease.worker.is_down:
            relay.abandon()

    def _notify_progress(self, x: Exchange, waited: float) -> None:
        """Notify a client if its worker takes long to begin.

        It processes the prompt, or loads the model first, which may take longer.
        """
        notice = x.config.queue.notice
        if x.fed or not notice or not takes_comments(x):
            return
        interval = NOTICE_EVERY if x.begun else PROCESSING_AFTER
        if x.loading and not x.noticed_at:
            interval = notice
        if waited >= x.noticed_at + interval:
            x.noticed_at = waited
            try:
                notify_client(x, _progress(x))
            except ConnectionError:
                pass  # the client left, and the handler is being cancelled


def _progress(x: Exchange) -> str:
    """Describe what the worker does before it begins to answer."""
    if not x.loading or x.lease is None:
        return "processing"
    share = x.lease.worker.progress.get(x.lease.model)
    return "loading model" if share is None else f"loading model {share:.0%}"


def streams(x: Exchange) -> bool:
    """Return whether a stream is requested from the worker."""
    if x.resume is not None or isinstance(x.delivery, Assembly):
        return True
    return x.body.stream and x.body.replayable


def takes_comments(x: Exchange) -> bool:
    """Return whether the client reads events, so that it ignores comments."""
    events = x.endpoint.ending is not Ending.BODY
    return events and x.body.replayable and x.body.stream


def notify_client(x: Exchange, comment: str) -> None:
    """Send a comment to a waiting client.

    Raises:
        ConnectionResetError: the client has left.
    """
    if not isinstance(x.delivery, Stream):
        x.delivery = Stream(x)
    x.delivery.notify(comment)


# --- Why it failed ----------------------------------------------------------------

# The errors of connections and relays, by their code.
_CAUSES = {
    Code.WORKER_UNREACHABLE: Cause.UNREACHABLE,
    Code.WORKER_LOST: Cause.LOST,
    Code.WORKER_INCOMPLETE: Cause.LOST,
    Code.WORKER_PROTOCOL: Cause.MALFORMED,
    Code.WORKER_TIMEOUT: Cause.SILENT,
    Code.WORKER_SLOW: Cause.SLOW,
}


# Seconds without requests for a worker that accepts no connections in time.
CROWDED_FOR = 1.0


class Failure(NamedTuple):
    """An attempt that failed, and the answer if no other attempt follows."""

    cause: Cause
    answer: Response | ProxyError  # for the client, if there is no other attempt
    busy: float | None = None  # seconds for which the worker wants no requests
    overflow: Overflow | None = None  # the prompt was too long
    lasting: bool = True  # the same request would fail in the same way again

    def __repr__(self) -> str:
        return f"<Failure {self.cause.name} {self.answer!r}>"

    @property
    def rule(self) -> Rule:
        return rule_of(self.cause)


def failure_of(error: WorkerError) -> Failure:
    """Describe an attempt that ended with an error of its connection."""
    if isinstance(error, DivergedError):
        return Failure(Cause.DIVERGED, error)
    if isinstance(error, DrainedError):
        return Failure(Cause.DRAINED, error)
    return Failure(_CAUSES[error.code], error)


def failure_to_connect(error: WorkerError, lease: Lease) -> Failure:
    """Describe an attempt for which no connection was made.

    A worker that sends other answers meanwhile is overloaded, but it works.
    """
    late = error.code is Code.WORKER_TIMEOUT
    if late and lease.worker.heard_since(lease.taken_at):
        return Failure(Cause.CROWDED, error, busy=CROWDED_FOR)
    return Failure(Cause.UNREACHABLE, error)


def failure_of_assembly(error: AssemblyError) -> Failure:
    """Describe a stream that cannot be assembled into an answer."""
    if error.error is not None:
        return promote(error.error)
    text = "The worker's stream cannot be assembled into an answer."
    answer = WorkerError(Code.WORKER_PROTOCOL, text, detail=str(error))
    lasting = not isinstance(error, LostTextError)
    return Failure(Cause.UNFOLDABLE, answer, lasting=lasting)


def failure_of_model(worker: str, model: str) -> Failure:
    """Describe an answer from a model other than the requested one."""
    text = f"Worker {worker} no longer serves the model {model!r}."
    answer = NoWorkerError(Code.NO_WORKER, text, retry_after=RETRY_AFTER)
    return Failure(Cause.MODEL, answer)


def report_of(x: Exchange, relay: Relay) -> AnswerReport | None:
    """Read what an answer reports unless it streams or has not come completely."""
    body = None if relay.is_event_stream else relay.held_body()
    return None if body is None else read_answer(body, x.endpoint.api, x.body.answers)


def looks_right(
    x: Exchange, worker: Worker, relay: Relay, report: AnswerReport | None
) -> bool:
    """Return whether an answer begins as it should, as nearly all do."""
    held = relay.held
    if relay.status >= 400:
        return False
    if relay.is_event_stream:
        if held.find(b'"error"') >= 0 or held.find(b'"message"') >= 0:
            return False  # cheaper than `in`
    elif held[:8] == b'{"error"' or x.resume is not None or x.delivery is not None:
        return False
    if report is not None:
        name, build = report.model, report.build
    else:
        name, build = names_in(held)
    if build:
        worker.see_build(build)
    return name is None or worker.answer_names.knows(x.model, name)


def look_late(x: Exchange, worker: Worker, relay: Relay) -> None:
    """Check a worker whose long answer in one piece has a new model name.

    The name comes at the end of such an answer, when it has been passed on.
    """
    name = first_model(relay.tail)
    if name is not None and not worker.answer_names.knows(x.model, name):
        worker.suspect()


async def find_failure(
    x: Exchange, relay: Relay, check_health: Callable[[Worker], Awaitable[bool]]
) -> Failure | None:
    """Return why an answer that does not look right cannot be passed on, or None."""
    assert x.lease is not None, x
    worker = x.lease.worker
    held = relay.held
    unknown = held.startswith(b'{"error"') and b'"Unexpected endpoint' in held
    if relay.status >= 400 or relay.early_error() is not None or unknown:
        return await read_failure(relay, worker.name)
    name = first_model(held)
    if not (
        name is None
        or worker.answer_names.knows(x.model, name)
        or await _is_asked_for(x, worker, relay, check_health)
    ):
        return failure_of_model(worker.name, x.lease.model)
    if not relay.is_event_stream and (x.resume is not None or x.begun):
        return failure_of(DivergedError("it does not stream"))
    return None


async def _is_asked_for(
    x: Exchange,
    worker: Worker,
    relay: Relay,
    check_health: Callable[[Worker], Awaitable[bool]],
) -> bool:
    """Whether an answer with a new name comes from the requested model.

    A worker may have been restarted with another model since its last health check, so
    it is checked before the answer is passed on.
    """
    if not relay.is_event_stream:
        try:
            await relay.whole()
        except WorkerError:
            return True  # handled when it is passed on
    name = model_of(relay.held, events=relay.is_event_stream)
    if name is None or worker.answer_names.knows(x.model, name):
        return True
    return await check_health(worker) and worker.accepts_name(x.model, name)


async def read_failure(relay: Relay, worker: str) -> Failure:
    """Read why a worker refuses a request, from its status or first event."""
    early = relay.early_error()
    if early is not None:
        failure = promote(early)
        if early.code == 429:
            return Failure(Cause.BUSY, failure.answer, _retry_after(relay))
        return failure
    try:
        await relay.whole()
    except WorkerError as exc:
        return failure_of(exc)
    status, body = relay.status, relay.held_body() or b""
    if status == 200:
        status = 404  # LM Studio answers so to a path that it does not have
    if status in (401, 403):
        text = f"Worker {worker} rejects the hub's API key."
        return Failure(Cause.KEY, WorkerError(Code.WORKER_REFUSED_KEY, text))
    if status == 503:
        text = f"Worker {worker} is loading its model or too busy."
        answer = NoWorkerError(Code.NO_WORKER, text, retry_after=RETRY_AFTER)
        return Failure(Cause.LOADING, answer, _retry_after(relay))
    refusal = _pass_on(relay, worker, status, body)
    if status == 429:
        return Failure(Cause.BUSY, refusal, _retry_after(relay))
    if (overflow := Overflow.read(body)) is not None:
        return Failure(Cause.CONTEXT, refusal, overflow=overflow)
    erred = status >= 500 and status != 501
    return Failure(Cause.STATUS if erred else Cause.REFUSED, refusal)


def promote(early: EventError) -> Failure:
    """Turn a stream that began with an error into a refusal with a status."""
    code = early.code
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    refusal = Response(error_body(early.message, early.type, None), status)
    overflow = Overflow.of(early.message, (early.type, code))
    if overflow is not None:
        return Failure(Cause.CONTEXT, refusal, overflow=overflow)
    return Failure(Cause.STATUS if status >= 500 else Cause.REFUSED, refusal)


def _pass_on(relay: Relay, worker: str, status: int, body: bytes) -> Response:
    """Pass a refusal on unchanged; one without a reason gets a text.

    llama-server's 413 and 415 are empty, and a proxy in front of a worker sends HTML:
    SDKs read JSON, and users need the reason.
    """
    if body.lstrip().startswith(b"{"):
        return Response(body, status, relay.client_fields)
    text = f"Worker {worker} answered {status} without a reason."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Response(error_body(text, kind, None), status, JSON)


def _retry_after(relay: Relay) -> float:
    """Read for how long a busy worker wants no requests; 1 s if it sends no time.

    It is in seconds, or a date (RFC 9110, 10.2.3), which is compared with the worker's
    own clock if it sends one; a date in the past counts as 0 s.
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
