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

from gollama_proxy.edge.answer import (
    Refusal,
    begin_response,
    break_off,
    read_refusal,
    refusal_of,
    whole_response,
)
from gollama_proxy.edge.assembly import assemble, can_assemble
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.dispatch import draining
from gollama_proxy.edge.job import Job
from gollama_proxy.edge.request import Incoming, answer_expectation
from gollama_proxy.edge.server import json_response
from gollama_proxy.ops.accesslog import Record
from gollama_proxy.routing.lease import Lease, Outcome
from gollama_proxy.routing.registry import Pool, Registry
from gollama_proxy.routing.worker import Worker
from gollama_proxy.settings import Config
from gollama_proxy.upstream.attempt import Attempt, Outgoing
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.upstream.relay import Client, ClientStalledError, Relay
from gollama_proxy.upstream.sweep import Sweep
from gollama_proxy.wire import headers, sse
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    ProxyError,
    RequestError,
    WorkerError,
)
from gollama_proxy.wire.openai import ENDPOINTS, Endpoint


class Inference:
    """Handles every route that a worker answers."""

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        registry: Registry,
        connections: Mapping[str, ConnectionPool],
        sweep: Sweep,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._authenticator = authenticator
        self._registry = registry
        self._connections = connections
        self._sweep = sweep
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
        # Before a byte of the body is read, and before a client is told to send it.
        principal = self._authenticator.identify(request, record)
        incoming, pool = await self._read(request, ENDPOINTS[record.route], principal)
        record.model = pool.model
        attempts = self._registry.attempts(pool)
        job = Job(request, record, deadline, incoming, pool, attempts)
        last: Refusal | None = None
        while True:
            try:
                worker = self._registry.choose(pool, attempts)
            except NoWorkerError:
                if last is None:
                    raise
                return _tell(last, record)
            answer = await self._attempt(job, worker)
            if not isinstance(answer, Refusal):
                return answer
            last = answer
            pause = job.pause_before_retry(last)
            if pause is None:
                return _tell(last, record)
            await asyncio.sleep(pause)

    async def _attempt(self, job: Job, worker: Worker) -> web.StreamResponse | Refusal:
        """Have one worker try; a refusal leaves the client untouched."""
        job.attempts.begin(worker)
        connections, timeouts = self._connections[worker.name], self._config.timeouts
        with worker.lease() as lease:
            self._note_attempt(lease, job.record)
            lease.prompt_bytes = job.incoming.size
            async with Attempt(connections, lease, timeouts, self._clock) as attempt:
                relay = await self._forward(job, worker, attempt)
                if isinstance(relay, Refusal):
                    if relay.busy is not None:
                        worker.breaker.busy(relay.busy)
                    lease.release(relay.outcome)
                    return relay
                job.record.first_byte = self._clock() - job.record.started
                lease.first_token = self._clock() - lease.taken_at
                answer: web.StreamResponse | Refusal
                if job.assembling and relay.is_event_stream:
                    answer = await self._assemble(job, relay, lease)
                else:
                    answer = await self._relay(job, relay, lease)
                if lease.outcome is Outcome.COMPLETE:
                    job.settle_blame(worker)
                return answer

    def _note_attempt(self, lease: Lease, record: Record) -> None:
        record.worker = lease.worker
        record.attempts += 1
        record.queued = lease.taken_at - record.started
        record.headers |= {
            "X-Gollama-Worker": lease.worker,
            "X-Gollama-Attempts": str(record.attempts),
            "X-Gollama-Queue-Ms": str(round(record.queued * 1000)),
        }

    # --- Read ---------------------------------------------------------------------

    async def _read(
        self, request: web.BaseRequest, endpoint: Endpoint, principal: Principal
    ) -> tuple[Incoming, Pool]:
        """Read as much of the body as it takes to know who may answer it."""
        incoming = Incoming(request, endpoint, self._config)
        answer_expectation(request)
        await incoming.read(self._config.limits.replay_window)
        if incoming.model is None and not incoming.complete:
            await self._look_further(incoming, principal)
        pool = self._registry.resolve(incoming.model, principal.models)
        return incoming, pool

    async def _look_further(self, incoming: Incoming, principal: Principal) -> None:
        """Read on until `model` comes, unless it makes no difference."""
        if self._registry.only_model() and principal.models is None:
            return
        window = self._config.limits.model_window
        await incoming.read(window)
        if incoming.model is None and not incoming.complete:
            text = (
                f"`model` was not among the first {window} bytes of the body; "
                "put it in front of what is long."
            )
            raise RequestError(Code.MODEL_MISSING, text, param="model")

    # --- Forward ------------------------------------------------------------------

    async def _forward(
        self, job: Job, worker: Worker, attempt: Attempt
    ) -> Relay | Refusal:
        """Send the request to a worker; wait until it is known whether it answers."""
        incoming = job.incoming
        body = incoming.body(job.pool.model)
        job.assembling = False
        if self._config.upstream.assemble and job.may_assemble:
            streaming = can_assemble(incoming.endpoint, body)
            job.assembling = streaming is not None
            body = streaming or body
        outgoing = Outgoing(
            incoming.endpoint,
            headers.to_worker(job.request.raw_headers),
            body,
            None if incoming.replayable else incoming.rest(),
            len(body) if incoming.replayable else incoming.length,
        )
        streams = job.assembling or (incoming.replayable and incoming.stream)
        try:
            relay = await attempt.send(
                outgoing, job.patience_with(worker) if streams else None
            )
        except WorkerError as exc:
            return refusal_of(exc)
        with self._sweep.watching(relay):
            refusal = await read_refusal(relay, worker.name)
        return refusal or relay

    # --- Relay --------------------------------------------------------------------

    async def _assemble(
        self, job: Job, relay: Relay, lease: Lease
    ) -> web.Response | Refusal:
        """Fold a stream into the answer; until it is whole, others can take over."""
        limit = self._config.limits.answer
        with self._sweep.watching(relay):
            answer = await assemble(relay, job.incoming.endpoint, limit)
        if isinstance(answer, Refusal):
            lease.release(answer.outcome)
            return answer
        _measure(relay, lease)
        lease.release(Outcome.COMPLETE)
        job.record.bytes = len(answer)
        job.record.tokens = sse.generated_tokens(answer) or 0
        return json_response(answer)

    async def _relay(self, job: Job, relay: Relay, lease: Lease) -> web.StreamResponse:
        """Pass an answer on; its status goes out now and cannot be taken back."""
        request, record = job.request, job.record
        whole = whole_response(relay)
        if whole is not None:
            lease.release(Outcome.COMPLETE)
            body = relay.held_body() or b""
            record.bytes, record.tokens = len(body), sse.generated_tokens(body) or 0
            return whole
        response = begin_response(request, relay, record)
        writer = await response.prepare(request)
        record.status = relay.status
        framed = response.chunked or response.content_length is not None
        # With 4,000 streams, what nobody reads any more would be 15 MB.
        for sent in (record.headers, response.headers):
            sent.clear()
        job.incoming.forget()
        transport = request.transport
        if transport is None or writer is None:
            raise ConnectionResetError("the client left")
        client = Client(transport, writer.drain, response.chunked)
        error: ProxyError | None = None
        try:
            with self._sweep.watching(relay):
                await relay.run(client, self._config.timeouts.write)
            await response.write_eof()
            _measure(relay, lease)
            lease.release(Outcome.COMPLETE)
        except ClientStalledError:
            lease.release(Outcome.CLIENT_GONE)
            record.outcome, record.error = "client_gone", "client_stalled"
            if framed:
                transport.abort()
            else:
                client.reset()
        except WorkerError as exc:
            lease.release(refusal_of(exc).outcome)
            error = exc
        except ProxyError as exc:  # the client's own body was at fault
            lease.release(Outcome.REFUSED)
            error = exc
        except asyncio.CancelledError:
            if transport.is_closing():
                if relay.told_all:  # SDKs hang up as soon as they have read [DONE]
                    record.outcome = "complete"
                    _measure(relay, lease)
                    lease.release(Outcome.COMPLETE)
                raise  # the client left: lease and attempt see to the rest
            lease.release(Outcome.HUB_STOPPED)
            expired = job.deadline.expired()
            limit = self._config.timeouts.request
            error = _took_too_long(limit) if expired else draining()
            if not expired:
                raise
        finally:
            record.bytes = relay.bytes
            record.tokens = relay.tokens
            if error is not None:
                break_off(client, relay, error, record, framed=framed)
        return response


def _measure(relay: Relay, lease: Lease) -> None:
    """Note what a complete stream tells about the speed of its worker."""
    if relay.is_event_stream and relay.opened_at is not None:
        lease.seconds = lease.heard_at - relay.opened_at
        lease.tokens = relay.tokens


def _tell(refusal: Refusal, record: Record) -> web.Response:
    """Give a client the refusal that nobody could make up for.

    Raises:
        ProxyError: where it is one.
    """
    if isinstance(refusal.told, ProxyError):
        raise refusal.told
    record.outcome = "refused"
    return refusal.told


def _took_too_long(limit: float) -> HubError:
    text = f"The request took more than {limit:g} s."
    return HubError(Code.REQUEST_TIMEOUT, text)
