"""The path of one request, from its first byte to its one outcome.

    receive ─▶ authenticate ─▶ read ─▶ plan ─▶ take a slot ─▶ attempt ─▶ relay ─▶ end
                                                  ▲                 │
                                                  ╰── recovery.py ◀─╯

This file follows it from top to bottom.  `Exchange` (state.py) has the whole state of a
request.  Rare cases are in functions at the end or in other files, which an ordinary
request does not enter.  At every `await` the client may disconnect: the task is
cancelled there, and what the request holds is released on the way out.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from gollama_proxy.config.settings import Config
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.edge.response import (
    CLOSE,
    KEEP,
    ClientStalledError,
    Response,
    Sent,
    write_whole,
)
from gollama_proxy.edge.router import Router, Routes
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy import recovery
from gollama_proxy.proxy.attempt import (
    Failure,
    TimeLimits,
    failure_of_assembly,
    failure_to_connect,
    find_failure,
    look_late,
    looks_right,
    notify_client,
    release,
    report_of,
    request_of,
    send,
    takes_comments,
)
from gollama_proxy.proxy.body import Body, Rewriter, answer_expectation, tally_of
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Stream, in_one_piece, open_answer
from gollama_proxy.proxy.state import Exchange, Running, State, draining, took_too_long
from gollama_proxy.proxy.tokens import Charges, Fitting
from gollama_proxy.scheduling.admission import Place
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.queue import Queue, Waking
from gollama_proxy.scheduling.turns import Priority, choose_priority
from gollama_proxy.telemetry.accesslog import Outcome
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire import headers
from gollama_proxy.wire.answer import Usage
from gollama_proxy.wire.errors import (
    Code,
    NoWorkerError,
    ProxyError,
    RequestError,
    WorkerError,
)
from gollama_proxy.wire.folding import AssemblyError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web

    from gollama_proxy.edge.server import Request
    from gollama_proxy.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)

# nginx's status for a client that left before the answer; only logs show it.
CLIENT_CLOSED = 499
# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_INTERACTIVE = Priority.INTERACTIVE
_CONNECTING, _STREAMING = State.CONNECTING, State.STREAMING
_DONE, _COMPLETE = Outcome.COMPLETE, Result.COMPLETE


class Proxy(Running):
    """Serves every request."""

    def __init__(
        self,
        config: Config,
        routes: Routes,
        authenticator: Authenticator,
        quotas: Quotas,
        registry: Registry,
        balancer: Balancer,
        queue: Queue,
        connections: Mapping[Worker, ConnectionPool],
        fitting: Fitting,
        check_health: Callable[[Worker], Awaitable[bool]],
        ended: Callable[[Exchange], None],
        clock: Callable[[], float],
    ) -> None:
        """Make one.

        `routes` are those that no worker answers.  `check_health` checks a worker at
        once and returns whether it is healthy; `ended` is called once for each request,
        when it has its outcome.
        """
        super().__init__()
        self._routes = routes
        self._authenticator = authenticator
        self._quotas = quotas
        self._registry = registry
        self._balancer = balancer
        self._queue = queue
        self._connections = connections
        self._fitting = fitting
        self._check_health = check_health
        self._ended = ended
        self._clock = clock
        self._charges = Charges(quotas, fitting, clock)
        self._rewriter = Rewriter(clock)
        self._rng = random.Random()
        self._limits = TimeLimits(clock)
        # Called when a request has its plan, waits, or gets to a worker.
        self.observer: Callable[[str, Exchange], None] | None = None
        self.tracer: Tracer | None = None  # of the requests for workers
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Take other settings for the requests that begin from now on."""
        self._config = config
        serve = self._serve_in_time if config.timeouts.request else self._serve
        inference: Routes = {path: {"POST": serve} for path in ENDPOINTS}
        origins = config.server.cors_origins
        self._router = Router({**self._routes, **inference}, origins)

    def __repr__(self) -> str:
        return f"<Proxy running={len(self._running)}>"

    # --- Receiving a request, and ending it ---------------------------------------

    async def __call__(self, request: Request) -> Sent:
        """Serve one request; every one ends here, with exactly one outcome."""
        x = Exchange(request, self._clock())
        task = request.task
        self._running[task] = x
        try:
            try:
                self._receive(x, request)
                handler = self._router.find(request, x)
                if self._draining and x.method == "POST":
                    raise draining()
                response = await handler(request, x)
            except ProxyError as error:
                response = recovery.refuse(x, error)
            except ConnectionError:  # the client left between two steps
                x.end(Outcome.CLIENT_GONE)
                x.status = CLIENT_CLOSED
                return CLOSE
            except Exception as exc:
                logger.exception("request %s failed", x.id, extra=x.extra)
                response = recovery.fail_inside(x, exc)
            sent = self._finish(x, response)
            return sent if sent is not None else await _drained(x)
        except asyncio.CancelledError:
            if x.cut is not None and not x.begun and x.state is not State.ENDED:
                task.uncancel()  # the client is still there, and has got nothing yet
                x.keep_alive = False
                sent = self._finish(x, recovery.refuse(x, x.cut))
                return sent if sent is not None else await _drained(x)
            x.end(Outcome.CLIENT_GONE)
            x.status = x.status or CLIENT_CLOSED
            raise
        finally:
            del self._running[task]
            if self._idle is not None and not self._running:
                self._idle.set_result(None)
                self._idle = None
            self._ended(x)
            # It refers to `x`: only the garbage collector could free the two.
            x.delivery = None

    def _receive(self, x: Exchange, request: Request) -> None:
        """Check the head of a request.

        Raises:
            RequestError: it can be read in two ways, or is too large.
        """
        x.id = f"{self._rng.getrandbits(64):016x}"
        if self._router.has_origins:
            x.lines = self._router.origin_lines(request)
        # A connection ends with a request whose head can be read in two ways, as what
        # follows could be read in two ways, too.
        connection = request.protocol
        x.head = head = headers.read_head(
            x.method,
            request.version,
            request.raw_headers,
            self._config.limits.head,
            connection.head,
        )
        connection.head = head if head.size <= headers.MOST_KEPT else None
        if head.id:
            x.id = head.id
        x.forwarded = head.forwarded
        if head.trace is not None:
            x.trace = head.trace
        x.keep_alive = request.keep_alive and not (head.last or self._draining)

    def _finish(self, x: Exchange, response: Response | Sent) -> Sent | None:
        """Write the answer unless it has been written; None if some of it waits."""
        x.end(_DONE)
        if not isinstance(response, Response):
            return response
        x.status = response.status
        keep_alive = x.keep_alive and not self._draining
        request = x.request
        try:
            fields = x.header_lines()
            if write_whole(request, response, fields, keep_alive=keep_alive):
                x.keep_alive = keep_alive
                return None
        except ConnectionError:
            return CLOSE
        return KEEP if keep_alive else CLOSE

    def refused(self, request: web.BaseRequest, error: ProxyError) -> None:
        """Record a request that is not valid HTTP, and so has no exchange."""
        x = Exchange(request, self._clock())
        x.id = x.method = "-"
        x.fail(error)
        x.status = error.code.status
        self._ended(x)

    # --- A request for a worker ---------------------------------------------------

    async def _serve_in_time(
        self, request: web.BaseRequest, x: Exchange
    ) -> Response | Sent:
        """Serve a request within `timeouts.request`."""
        limit = self._config.timeouts.request
        try:
            async with asyncio.timeout(limit) as deadline:
                return await self._serve(request, x, deadline)
        except TimeoutError:
            raise took_too_long(limit) from None

    async def _serve(
        self,
        request: web.BaseRequest,
        x: Exchange,
        deadline: asyncio.Timeout | None = None,
    ) -> Response | Sent:
        """Serve a request that a worker answers.

        Raises:
            ProxyError: the answer for the client, if nothing has been sent yet.
        """
        if self.tracer is not None:
            x.spans = self.tracer.begin(x)
            x.forwarded = headers.without_trace(x.forwarded)
        # Before a byte of the body is read, and before `100 Continue`.
        x.config = config = self._config
        x.caller = caller = self._authenticator.identify(request, x)
        x.endpoint = endpoint = ENDPOINTS[x.route]
        if limit := caller.max_concurrency or config.queue.max_concurrency:
            x.max_concurrency = limit
        if not endpoint.slot:
            x.needs_slot = False
        if caller.priority is not _INTERACTIVE:
            x.priority = caller.priority
        assert x.head is not None, x
        if x.head.prioritised:
            priority = request.headers["X-Gollama-Priority"]
            x.priority = choose_priority(priority, caller.priority)
        if config.upstream.usage == "always":
            x.counted = True
        if caller.metered:
            self._charges.take_quota(x, caller)
        x.body = body = Body(request, endpoint, config)
        if x.head.expects:
            answer_expectation(request)
        if not body.take():
            await body.read(config.limits.replay_window)
        if body.model is None and not body.complete:
            await self._look_further(x)
        pool = self._registry.resolve(body.model, caller.models)
        x.model = x.asked = pool.model
        if body.model != pool.model:
            x.alias = self._registry.alias_of(body.model)
        pools = self._registry.pools_for(pool, body.fallbacks, caller.models)
        prefixes: tuple[int, ...] = ()
        if body.converses and endpoint.slot and self._balancer.follows(pool):
            prefixes = body.prefixes(self._balancer.key)
        ask = Ask(pool.model, body.size, body.max_tokens, x.subject, prefixes)
        budget = self._balancer.budget
        x.plan = Plan(pools, endpoint.path, config, budget, self._rng, ask)
        if self.observer is not None:
            self.observer("started", x)
        result: Response | Sent | Relay | Failure
        try:
            while True:
                if not self._fitting.is_certain(x):
                    await self._fitting.check(x)
                lease = self._queue.try_acquire(x)
                if lease is None:
                    try:
                        lease = await self._wait(x)
                    except NoWorkerError:
                        if x.failure is None:
                            raise
                        return recovery.give_up(x)
                try:
                    connections = self._connections[lease.worker]
                    result = await self._attempt(x, lease, connections)
                    if isinstance(result, Relay):
                        result = await self._relay(x, lease, result)
                finally:  # `with lease:` takes two calls more
                    if lease.result is None:
                        lease.release(Result.CLIENT_GONE)
                    if lease.slot:
                        x.slot_seconds += lease.released_at - lease.taken_at
                    upload = release(x, connections)
                    if upload is not None:
                        await upload.cancel()
                if not isinstance(result, Failure):
                    return result
                final = await recovery.recover(
                    x, lease.worker, result, self._rewriter, self._clock
                )
                if final is not None:
                    return final
        except ProxyError as error:
            if not x.begun:
                raise
            return recovery.break_off(x, error)
        except asyncio.CancelledError:
            # A client with a part of an answer is notified that it is incomplete.
            if not x.begun or x.client_left:
                raise
            if deadline is not None and deadline.expired():
                return recovery.break_off(x, took_too_long(config.timeouts.request))
            recovery.break_off(x, x.cut or draining())
            raise
        finally:
            self._queue.leave(x)
            self._charges.settle(x)

    # --- One attempt --------------------------------------------------------------

    async def _attempt(
        self, x: Exchange, lease: Lease, connections: ConnectionPool
    ) -> Response | Relay | Failure:
        """Make one attempt; return its answer as soon as its beginning is known.

        A `Failure` may be followed by another attempt.
        """
        worker, body, model = lease.worker, x.body, x.plan.pool.model
        x.plan.begin(worker)
        x.lease = lease
        x.model, x.worker = model, worker.name
        if x.asked != model:
            if not x.fell_back:
                reason = f"{model} instead of {x.asked}"
                x.note(lease.taken_at, "fell_back", worker.name, reason)
            x.fell_back = x.asked
        elif x.fell_back:
            x.fell_back = ""
        if x.steps:
            step = "attempt" if x.resume is None else "resumed"
            x.note(lease.taken_at, step, worker.name)
        x.attempts += 1
        x.queued = lease.taken_at - x.started
        if self.observer is not None:
            self.observer("attempt", x)
        lease.prompt_bytes = body.size
        # What is sent
        if x.resume is None:
            sent = self._rewriter.prepare(x, worker)
            if x.repeated:
                x.repeated = 0
        else:
            sent = x.resume.request(model)
            x.repeated = x.resume.repeated
        length = len(sent) if body.replayable else body.length_behind(sent)
        forwarded = x.forwarded
        if x.spans is not None:
            forwarded += x.spans.attempt(lease, resumes=x.resume is not None)
        data = request_of(
            worker.config, x.endpoint.path, forwarded, body.content_type, length, sent
        )
        # Sending it
        timer = self._limits.begin(x, lease)
        try:
            relay = await send(
                x, connections, data, self._clock, chunked=length is None
            )
            x.enter(_STREAMING)
            sent = data = b""  # a prompt may be long, and so may an answer take
            report = report_of(x, relay)
            if not looks_right(x, worker, relay, report):
                failure = await find_failure(x, relay, self._check_health)
                if failure is not None:
                    self._charges.add_refused(x, relay, failure.cause)
                    return recovery.failed(x, lease, failure)
                report = report_of(x, relay)  # the rest may have come
            # Passing it on
            now = self._clock()
            lease.first_token = now - lease.taken_at
            if lease.loads:
                worker.has_answered(lease)
            if x.first_byte is None:
                x.first_byte = now - x.started
            if report is None:
                return relay
            response = in_one_piece(x, relay)
            self._charges.add(x, relay, report.usage)
            self._complete(x, lease, relay, report.usage)
            return response
        except WorkerError as exc:
            if x.state is _CONNECTING:  # the worker has received nothing
                failure = failure_to_connect(exc, lease)
            else:
                failure = recovery.failure_on(x, worker, exc)
            return recovery.failed(x, lease, failure)
        except asyncio.CancelledError:
            if x.state in _UNSEEN:
                self._charges.add_unseen(x, lease)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    # --- The answer ---------------------------------------------------------------

    async def _relay(
        self, x: Exchange, lease: Lease, relay: Relay
    ) -> Response | Sent | Failure:
        """Pass an answer on, from its beginning or where another one broke off."""
        worker, body = lease.worker, x.body
        complete = False
        try:
            client = open_answer(x, relay)
            kept = x.config.rescue.kept if x.sent and x.resume is None else 0
            relay.begin(
                client,
                kept,
                tally_of(x) if x.choices > 1 else None,
                body.answers * body.prompts,
                reports=not (kept and isinstance(x.delivery, Stream)),
            )
            limit = x.config.timeouts.write
            try:
                while (step := relay.next_step(client, limit)) is not None:
                    await step
            finally:
                relay.stop()
            relay.finish(client)
            if x.resume is not None:
                x.resume.finish()
                x.rescued = x.resume.count
            assert x.delivery is not None, x
            response = x.delivery.finish()
            complete = True
            if not relay.is_event_stream:
                look_late(x, worker, relay)
            return response
        except ClientStalledError:
            lease.release(Result.CLIENT_GONE)
            assert isinstance(x.delivery, Stream), x
            x.end(Outcome.CLIENT_GONE, "client_stalled")
            return x.delivery.drop()
        except AssemblyError as exc:
            return recovery.failed(x, lease, failure_of_assembly(exc))
        except WorkerError as exc:
            return recovery.failed(x, lease, recovery.broke_off(x, worker, relay, exc))
        except ProxyError:  # an error in the client's body
            lease.release(Result.REFUSED)
            raise
        except asyncio.CancelledError:
            if not x.client_left:
                lease.release(Result.HUB_STOPPED)
            elif relay.complete:  # SDKs disconnect as soon as they have read [DONE]
                x.end(Outcome.COMPLETE)
                complete = True
            raise
        finally:
            if x.fed:  # else the whole answer is counted at once
                x.bytes += relay.bytes
            self._charges.add(x, relay, relay.end.usage)
            if complete:
                self._complete(x, lease, relay, relay.end.usage)

    def _complete(self, x: Exchange, lease: Lease, relay: Relay, used: Usage) -> None:
        """Release the lease of a complete answer, and learn from it."""
        if relay.is_event_stream and relay.opened_at is not None:
            lease.seconds = lease.heard_at - relay.opened_at
            tokens = used.generated or relay.events
            lease.tokens = tokens // (x.body.answers * x.body.prompts)
        if used.reading is not None:
            lease.prefill = used.reading
            if x.plan.ask.prefixes:  # else no policy has expected anything
                self._balancer.learn(x.plan, lease.worker, lease.prefill)
        lease.release(_COMPLETE)
        if x.failure is not None or lease.worker.model_breakers:
            recovery.settle_blame(x, lease.worker)
            self._rewriter.confirm(x, lease.worker)

    # --- What few requests need ---------------------------------------------------

    async def _look_further(self, x: Exchange) -> None:
        """Read on until `model` arrives, unless it makes no difference."""
        if self._registry.only_model() and x.caller.models is None:
            return
        window = x.config.limits.model_window
        await x.body.read(window)
        if x.body.model is None and not x.body.complete:
            text = (
                f"`model` was not among the first {window} bytes of the body; "
                "put it before long fields."
            )
            raise RequestError(Code.MODEL_MISSING, text, param="model")

    async def _wait(self, x: Exchange) -> Lease:
        """Wait for a slot; a client that streams is notified of its place.

        Raises:
            NoWorkerError: no worker is expected, or the wait was too long.
        """

        async def notify(place: Place | Waking) -> None:
            notify_client(x, str(place))

        patience = x.config.retry.patience
        streams = takes_comments(x)
        some = x.plan.pool.available
        reason = "every slot is taken" if some else "no worker is available"
        x.note(self._clock(), "queued", reason=reason)
        x.enter(State.QUEUED)
        if self.observer is not None:
            self.observer("queued", x)
        return await self._queue.acquire(x, patience, notify if streams else None)

    def check(self, now: float) -> None:
        """Check the time limits of all requests; the watchdog calls it every second."""
        for x in tuple(self._running.values()):
            self._limits.check(x, now)


async def _drained(x: Exchange) -> Sent:
    """Wait until a client has read most of its answer."""
    try:
        await x.request.writer.drain()
    except ConnectionError:
        return CLOSE
    return KEEP if x.keep_alive else CLOSE


_UNSEEN = frozenset({_CONNECTING, State.WAITING})
