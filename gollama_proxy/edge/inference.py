"""The path of one request, from its first byte to its one outcome.

    receive ─▶ authenticate ─▶ read ─▶ choose ─▶ forward ─▶ relay ─▶ end

The dispatcher has received it; from there on it can be followed downward in this file.
Every `await` is a place where the client may vanish: the task is cancelled there, and
the lease and the attempt give back what they hold on the way out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from aiohttp import web

from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.dispatch import draining
from gollama_proxy.edge.request import Incoming, answer_expectation
from gollama_proxy.edge.server import json_response
from gollama_proxy.ops.accesslog import Record
from gollama_proxy.routing.lease import Lease, Outcome
from gollama_proxy.routing.registry import RETRY_AFTER, Pool, Registry
from gollama_proxy.settings import Config
from gollama_proxy.upstream.attempt import Attempt, Outgoing
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.upstream.relay import Client, ClientStalledError, Relay, ToldError
from gollama_proxy.wire import headers, sse
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    ProxyError,
    RequestError,
    WorkerError,
    error_body,
)
from gollama_proxy.wire.openai import ENDPOINTS, Ending, Endpoint


class Inference:
    """Handles every route that a worker answers."""

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        registry: Registry,
        connections: Mapping[str, ConnectionPool],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._authenticator = authenticator
        self._registry = registry
        self._connections = connections
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Inference on {self._registry!r}>"

    async def handle(
        self, request: web.BaseRequest, record: Record
    ) -> web.StreamResponse:
        """Serve one request.

        Raises:
            ProxyError: what the client is to be told, if it has been told nothing yet.
        """
        limit = self._config.timeouts.request
        try:
            async with asyncio.timeout(limit or None) as deadline:
                return await self._serve(request, record, deadline)
        except TimeoutError:
            raise _took_too_long(limit) from None

    async def _serve(
        self, request: web.BaseRequest, record: Record, deadline: asyncio.Timeout
    ) -> web.StreamResponse:
        principal = self._authenticate(request, record)
        incoming, pool = await self._read(request, ENDPOINTS[record.route], principal)
        record.model = pool.model
        worker = self._registry.choose(pool)
        connections = self._connections[worker.name]
        with worker.lease() as lease:
            self._note_attempt(lease, record)
            async with Attempt(
                connections, lease, self._config.timeouts, self._clock
            ) as attempt:
                relay = await self._forward(request, incoming, pool, attempt, lease)
                del incoming  # an answer may last for minutes, and needs none of it
                record.first_byte = self._clock() - record.started
                early = relay.early_error()
                if early is not None:
                    record.outcome = "refused"
                    lease.release(Outcome.REFUSED)
                    return _promote_error(early)
                if relay.status >= 400:
                    record.outcome = "refused"
                    return await self._pass_error(relay, lease)
                return await self._relay(request, relay, lease, record, deadline)

    def _note_attempt(self, lease: Lease, record: Record) -> None:
        record.worker = lease.worker
        record.attempts += 1
        record.queued = lease.taken_at - record.started
        record.headers |= {
            "X-Gollama-Worker": lease.worker,
            "X-Gollama-Attempts": str(record.attempts),
            "X-Gollama-Queue-Ms": str(round(record.queued * 1000)),
        }

    # --- Authenticate -------------------------------------------------------------

    def _authenticate(self, request: web.BaseRequest, record: Record) -> Principal:
        """Before a byte of the body is read, and before a client is told to send it."""
        given = request.headers.getall("Authorization", ())
        principal = self._authenticator.authenticate(given)
        record.subject = principal.subject
        return principal

    # --- Read ---------------------------------------------------------------------

    async def _read(
        self, request: web.BaseRequest, endpoint: Endpoint, principal: Principal
    ) -> tuple[Incoming, Pool]:
        """Read as much of the body as it takes to know who may answer it."""
        limits = self._config.limits
        incoming = Incoming(request, endpoint, self._config)
        answer_expectation(request)
        await incoming.read(limits.replay_window)
        indifferent = self._registry.only_model() and principal.models is None
        if incoming.model is None and not indifferent:
            await incoming.read(limits.model_window)
        if incoming.model is None and not (incoming.complete or indifferent):
            text = (
                f"`model` was not among the first {limits.model_window} bytes of the "
                "body; put it in front of what is long."
            )
            raise RequestError(Code.MODEL_MISSING, text, param="model")
        pool = self._registry.resolve(incoming.model, principal.models)
        return incoming, pool

    # --- Forward ------------------------------------------------------------------

    async def _forward(
        self,
        request: web.BaseRequest,
        incoming: Incoming,
        pool: Pool,
        attempt: Attempt,
        lease: Lease,
    ) -> Relay:
        """Send the request to the worker; wait for the first bytes of its answer."""
        body = incoming.body(pool.model)
        outgoing = Outgoing(
            incoming.endpoint,
            headers.to_worker(request.raw_headers),
            body,
            None if incoming.complete else incoming.rest(),
            len(body) if incoming.complete else incoming.length,
        )
        try:
            return await attempt.send(outgoing)
        except WorkerError:
            lease.release(Outcome.WORKER_FAILED)
            raise

    # --- Relay --------------------------------------------------------------------

    async def _relay(
        self,
        request: web.BaseRequest,
        relay: Relay,
        lease: Lease,
        record: Record,
        deadline: asyncio.Timeout,
    ) -> web.StreamResponse:
        """Pass an answer on; its status goes out now and cannot be taken back."""
        body = relay.held_body()
        if (
            body is not None and not relay.is_event_stream
        ):  # a short one is here already
            lease.release(Outcome.COMPLETE)
            record.bytes, record.tokens = len(body), sse.generated_tokens(body) or 0
            kept = headers.to_client(relay.headers)
            return web.Response(status=relay.status, body=body, headers=kept)
        response = _begin_response(request, relay, record)
        writer = await response.prepare(request)
        record.status = relay.status
        for sent in (record.headers, response.headers):
            sent.clear()  # with 4,000 streams they would be 6 MB that nobody reads
        transport = request.transport
        if transport is None or writer is None:
            raise ConnectionResetError("the client left")
        client = Client(transport, writer.drain, response.chunked)
        error: ProxyError | None = None
        try:
            await relay.run(client, self._config.timeouts.write)
            await response.write_eof()
            lease.release(Outcome.COMPLETE)
        except ClientStalledError:
            lease.release(Outcome.CLIENT_GONE)
            record.outcome, record.error = "client_gone", "client_stalled"
            transport.abort()
        except WorkerError as exc:
            lease.release(Outcome.WORKER_FAILED)
            error = exc
        except ProxyError as exc:  # the client's own body was at fault
            lease.release(Outcome.REFUSED)
            error = exc
        except asyncio.CancelledError:
            if transport.is_closing():
                raise  # the client left: lease and attempt see to the rest
            lease.release(Outcome.HUB_STOPPED)
            expired = deadline.expired()
            limit = self._config.timeouts.request
            error = _took_too_long(limit) if expired else draining()
            if not expired:
                raise
        finally:
            record.bytes = relay.bytes
            record.tokens = sse.generated_tokens(relay.tail) or relay.events
            if error is not None:
                _break_off(client, relay, error, record)
        return response

    # --- End ----------------------------------------------------------------------

    async def _pass_error(self, relay: Relay, lease: Lease) -> web.Response:
        """Pass a worker's refusal on as it was, but for what only the hub can mend.

        A 500 of llama-server often means a bad request, so nobody is blamed for it.
        """
        worker, status = lease.worker, relay.status
        failed = status in (401, 403, 502, 503, 504)
        try:
            await relay.whole()
        except WorkerError:
            failed = True
            raise
        finally:
            lease.release(Outcome.WORKER_FAILED if failed else Outcome.REFUSED)
        if status in (401, 403):
            text = f"Worker {worker} refuses the key that the hub has for it."
            raise WorkerError(Code.WORKER_REFUSED_KEY, text)
        if status == 503:
            text = f"Worker {worker} is loading its model or too busy."
            raise NoWorkerError(Code.NO_WORKER, text, retry_after=RETRY_AFTER)
        body = relay.held_body()
        if not body:  # llama-server's 413 and 415 say nothing; people want to read why
            text = f"Worker {worker} answered {status} without a reason."
            kind = "invalid_request_error" if status < 500 else "server_error"
            return json_response(error_body(text, kind, None), status)
        return web.Response(
            status=status, body=body, headers=headers.to_client(relay.headers)
        )


def _promote_error(early: sse.EventError) -> web.Response:
    """Give a stream that began with an error the status that it should have had."""
    code = early.code
    status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return json_response(error_body(early.message, early.type, None), status)


def _begin_response(
    request: web.BaseRequest, relay: Relay, record: Record
) -> web.StreamResponse:
    response = web.StreamResponse(
        status=relay.status, headers=headers.to_client(relay.headers)
    )
    response.headers.update(record.headers)
    length = relay.header(b"content-length")
    if relay.is_event_stream:
        response.headers.update(sse.STREAM_HEADERS)
    if length and not relay.is_event_stream:
        response.content_length = int(length)
    elif request.version >= (1, 1):
        response.enable_chunked_encoding()
    else:  # HTTP/1.0: the body ends with the connection
        response.force_close()
    return response


def _break_off(client: Client, relay: Relay, error: ProxyError, record: Record) -> None:
    """End an answer that is not complete so that nobody can think it is.

    A stream gets an error event; nothing gets its last chunk.  `close` still sends what
    is buffered, the error event among it, which `abort` would throw away.
    """
    record.outcome, record.error, record.detail = "error", error.code, error.detail
    if relay.is_event_stream:
        if not isinstance(error, ToldError):
            named = ENDPOINTS[record.route].ending is Ending.NAMED
            client.write(sse.error_event(error.body(), named=named))
        client.transport.close()
    elif client.chunked or relay.header(b"content-length"):
        client.transport.close()
    else:  # only a reset tells an HTTP/1.0 client that something is missing
        client.transport.abort()


def _took_too_long(limit: float) -> HubError:
    text = f"The request took more than {limit:g} s."
    return HubError(Code.REQUEST_TIMEOUT, text)
