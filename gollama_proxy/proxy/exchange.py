"""The path of one request, from its first byte to its one outcome.

    receive ─▶ authenticate ─▶ read ─▶ choose ─▶ forward ─▶ relay ─▶ end

The dispatcher has received it; from there on it can be followed downward in this file.
Every `await` is a place where the client may vanish: the task is cancelled there, and
the lease and the attempt give back what they hold on the way out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from gollama_proxy.config.settings import Config
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.edge.router import draining
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.speed import Prefill
from gollama_proxy.fleet.watchdog import Watchdog
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.attempt import Attempt, Outgoing
from gollama_proxy.proxy.body import Incoming, answer_expectation
from gollama_proxy.proxy.charges import Charges
from gollama_proxy.proxy.client import ClientStalledError
from gollama_proxy.proxy.fitting import Fitting
from gollama_proxy.proxy.job import Entry, Job
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import (
    Refusal,
    read_refusal,
    refusal_of,
    refusal_of_another,
    refusal_of_assembly,
    whole_response,
)
from gollama_proxy.proxy.unstreamed import Unstreamed
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.retry import Attempts, Failure
from gollama_proxy.scheduling.turns import choose_priority
from gollama_proxy.telemetry import accesslog
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.telemetry.logs import Throttle
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire import headers
from gollama_proxy.wire.answer import (
    Usage,
    build_of,
    first_model,
    model_of,
    read_usage,
)
from gollama_proxy.wire.assemble import AssemblyError
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    ProxyError,
    RequestError,
    WorkerError,
)
from gollama_proxy.wire.openai import ENDPOINTS, Endpoint
from gollama_proxy.wire.partial import DivergedError

logger = logging.getLogger(__name__)

# Ends of an answer after which nothing is left of the connection.
_LOSSES = frozenset({Code.WORKER_LOST, Code.WORKER_INCOMPLETE})
# Seconds between two lines about losses of one worker.
LOG_EVERY = 1.0


class Inference:
    """Handles every route that a worker answers."""

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        registry: Registry,
        balancer: Balancer,
        connections: Mapping[Worker, ConnectionPool],
        watchdog: Watchdog,
        queue: Queue,
        fitting: Fitting,
        look: Callable[[Worker], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        """Make one; `look` pings a worker at once and returns whether it is well."""
        self._config = config
        self._authenticator = authenticator
        self._registry = registry
        self._balancer = balancer
        self._connections = connections
        self._watchdog = watchdog
        self._queue = queue
        self._fitting = fitting
        self._look = look
        self._losses = Throttle(clock, LOG_EVERY)
        self._quotas = Quotas(clock)
        self._charges = Charges(self._quotas, fitting, clock)
        self._unstreamed = Unstreamed(clock)
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
        if not limit:
            return await self._serve(request, record)
        try:
            async with asyncio.timeout(limit) as deadline:
                return await self._serve(request, record, deadline)
        except TimeoutError:
            raise _took_too_long(limit) from None

    async def _serve(
        self,
        request: web.BaseRequest,
        record: Record,
        deadline: asyncio.Timeout | None = None,
    ) -> web.StreamResponse:
        # Before a byte of the body is read, and before a client is told to send it.
        principal = self._authenticator.identify(request, record)
        endpoint = ENDPOINTS[record.route]
        priority = choose_priority(
            request.headers.get("X-Gollama-Priority"), principal.priority
        )
        standing = self._quotas.take(principal.subject, principal.rpm, principal.tpm)
        record.headers |= standing.headers()
        if not standing.allowed:
            raise standing.error()
        incoming, attempts = await self._read(request, endpoint, principal)
        record.model = model = attempts.pool.model
        most = principal.max_concurrency or self._config.queue.max_concurrency
        entry = Entry(attempts, principal.subject, priority, most, endpoint.slot)
        config, unstreamed = self._config, self._unstreamed
        job = Job(request, record, incoming, attempts, entry, config, model, unstreamed)
        job.alias = self._registry.alias_of(incoming.model)
        job.counted = self._counts(principal)
        try:
            return await self._have_answered(job)
        except ProxyError as exc:
            if not job.begun:
                raise
            return job.break_off(exc)
        except asyncio.CancelledError:
            # Whoever has a part of an answer is told that there will be no more.
            if not job.begun or job.client_left:
                raise
            expired = deadline is not None and deadline.expired()
            limit = self._config.timeouts.request
            response = job.break_off(_took_too_long(limit) if expired else draining())
            if not expired:
                raise
            return response
        finally:
            self._queue.leave(entry)
            self._charges.settle(job, principal.subject)

    def _counts(self, principal: Principal) -> bool:
        """Say whether a worker has to be asked what its answer took."""
        whose = self._config.upstream.usage
        limited = whose == "limited" and principal.tpm is not None
        return limited or whose == "always"

    async def _have_answered(self, job: Job) -> web.StreamResponse:
        """Have one worker after another try, until the client has a whole answer."""
        while True:
            await self._fitting.check(job.incoming, job.attempts)
            try:
                lease = self._queue.try_acquire(job.entry)
                lease = lease or await self._queue.acquire(
                    job.entry,
                    self._config.retry.patience,
                    job.tell_place if job.may_tell else None,
                )
            except NoWorkerError:
                if job.last is None:
                    raise
                return job.give_up()
            worker = lease.worker
            answer = await self._attempt(job, worker, lease)
            if not isinstance(answer, Refusal):
                return answer
            self._note_loss(worker, answer)
            if job.rescue is not None and job.rescue.exhausted:
                try:
                    return await job.close()
                except AssemblyError as exc:
                    answer = refusal_of_assembly(exc)
            pause = job.pause_before_next(answer)
            if pause is None and not (answer.failure and job.may_wait()):
                return job.give_up()
            await asyncio.sleep(pause or 0.0)

    def _note_loss(self, worker: Worker, refusal: Refusal) -> None:
        """Log that a worker was lost while it had a request; retries hide it."""
        error = refusal.told
        if not isinstance(error, WorkerError) or error.code not in _LOSSES:
            return
        if count := self._losses.count(worker.name):
            text = "worker %s: lost while it had a request: %d times (%s)"
            logger.warning(text, worker.name, count, error.detail or error.code)

    async def _attempt(
        self, job: Job, worker: Worker, lease: Lease
    ) -> web.StreamResponse | Refusal:
        """Have one worker try; after a refusal it is another one's turn."""
        with lease:
            job.attempts.begin(worker)
            connections = self._connections[worker]
            timeouts = self._config.timeouts
            self._note_attempt(lease, job)
            async with Attempt(connections, lease, timeouts, self._clock) as attempt:
                relay = await self._forward(job, worker, attempt, lease)
                if isinstance(relay, Refusal):
                    if relay.overflow is not None:
                        worker.learn_context(lease.model, relay.overflow.context)
                    if relay.busy is not None:
                        relay = _left_alone(worker, lease.model, relay)
                    lease.release(relay.outcome)
                    return relay
                now = self._clock()
                lease.first_token = now - lease.taken_at
                worker.has_answered(lease)
                if job.record.first_byte is None:
                    job.record.first_byte = now - job.record.started
                answer = await self._relay(job, worker, relay, lease)
                if lease.result is Result.COMPLETE:
                    job.settle_blame(worker)
                    job.prove(worker)
                return answer

    def _note_attempt(self, lease: Lease, job: Job) -> None:
        record = job.record
        record.model, record.worker = job.attempts.pool.model, lease.worker.name
        record.fell_back = job.model if job.model != record.model else ""
        record.attempts += 1
        record.queued = lease.taken_at - record.started
        record.headers |= {
            "X-Gollama-Worker": lease.worker.name,
            "X-Gollama-Attempts": str(record.attempts),
            "X-Gollama-Queue-Ms": str(round(record.queued * 1000)),
        }

    # --- Read ---------------------------------------------------------------------

    async def _read(
        self, request: web.BaseRequest, endpoint: Endpoint, principal: Principal
    ) -> tuple[Incoming, Attempts]:
        """Read as much of the body as it takes to know who may answer it."""
        incoming = Incoming(request, endpoint, self._config)
        answer_expectation(request)
        await incoming.read(self._config.limits.replay_window)
        if incoming.model is None and not incoming.complete:
            await self._look_further(incoming, principal)
        pool = self._registry.resolve(incoming.model, principal.models)
        attempts = self._balancer.attempts(
            pool, endpoint.path, incoming.fallbacks, principal.models
        )
        follows = endpoint.slot and self._balancer.follows(pool)
        attempts.ask = Ask(
            pool.model,
            incoming.size,
            incoming.max_tokens,
            principal.subject,
            incoming.prefixes() if follows else (),
        )
        return incoming, attempts

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
        self, job: Job, worker: Worker, attempt: Attempt, lease: Lease
    ) -> Relay | Refusal:
        """Send the request to a worker; wait until it is known whether it answers."""
        incoming, body = job.incoming, job.prepare(worker)
        outgoing = Outgoing(
            incoming.endpoint,
            headers.to_worker(job.request.raw_headers),
            body,
            None if incoming.replayable else incoming.rest(),
            len(body) if incoming.replayable else incoming.length_behind(body),
            incoming.content_type,
        )
        patience = job.patience_with(worker, loads=lease.loads)
        lease.prompt_bytes = incoming.size
        if patience is not None:
            lease.allowance = patience.allowance
        try:
            relay = await attempt.send(outgoing, patience)
        except WorkerError as exc:
            refusal = job.refusal_of(worker, exc)
            if not attempt.connected:  # whatever it was, the worker knows nothing of it
                refusal = refusal._replace(failure=Failure.UNREACHABLE)
            return refusal
        except asyncio.CancelledError:
            self._charges.add_unseen(job, worker, lease)
            raise
        with self._watchdog.watching(relay, worker):
            refused = await read_refusal(relay, worker.name)
            if refused is None and not await self._is_asked_for(job, worker, relay):
                model = job.attempts.pool.model
                refused = refusal_of_another(worker.name, model)
        if refused is not None:
            self._charges.add_refused(job, relay)
            return refused
        promised = job.rescue is not None or job.begun
        if promised and not relay.is_event_stream:
            told = read_usage(relay.held, incoming.endpoint.api)
            self._charges.add(job, relay, told)
            return refusal_of(DivergedError("it does not stream"))
        return relay

    async def _is_asked_for(self, job: Job, worker: Worker, relay: Relay) -> bool:
        """Return whether an answer comes from the model that was asked for.

        A worker may have been started with another one since the last ping, so it is
        looked at before an answer is passed on that has a name which is new.
        """
        held, model = relay.held, job.attempts.pool.model
        worker.see_build(build_of(held))
        name = first_model(held)
        if name is None or worker.answer_names.knows(model, name):
            return True
        if not relay.is_event_stream:
            try:
                await relay.whole()
            except WorkerError:
                return True  # what that means is judged when it is passed on
        name = model_of(relay.held, events=relay.is_event_stream)
        if name is None or worker.answer_names.knows(model, name):
            return True
        return await self._look(worker) and worker.accepts_name(model, name)

    # --- Relay --------------------------------------------------------------------

    async def _relay(
        self, job: Job, worker: Worker, relay: Relay, lease: Lease
    ) -> web.StreamResponse | Refusal:
        """Pass an answer on, from its beginning or from where another one broke off."""
        record, write_timeout = job.record, self._config.timeouts.write
        incoming = job.incoming
        api, answers = incoming.endpoint.api, incoming.answers
        whole = whole_response(relay, job.names)
        if whole is not None:
            told = read_usage(relay.held, api, answers)
            self._charges.add(job, relay, told)
            self._complete(job, worker, relay, lease, told)
            record.bytes = len(relay.held)
            return whole
        complete = False
        try:
            client = await job.open(relay)
            with self._watchdog.watching(relay, worker):
                await relay.run(
                    client,
                    write_timeout,
                    job.kept,
                    job.tally,
                    answers * incoming.prompts,
                )
            response = await job.finish()
            complete = True
            self._look_late(job, worker, relay)
        except ClientStalledError:
            lease.release(Result.CLIENT_GONE)
            return job.drop_client()
        except AssemblyError as exc:
            return _released(lease, refusal_of_assembly(exc))
        except WorkerError as exc:
            return _released(lease, job.broke_off(worker, relay, exc))
        except ProxyError:  # the client's own body was at fault
            lease.release(Result.REFUSED)
            raise
        except asyncio.CancelledError:
            if job.client_left and relay.complete:
                # SDKs hang up as soon as they have read [DONE].
                record.outcome = accesslog.Outcome.COMPLETE
                complete = True
            elif not job.client_left:
                lease.release(Result.HUB_STOPPED)
            raise
        finally:
            if job.fed:  # else it is counted as a whole
                record.bytes += relay.bytes
            told = relay.end.usage
            self._charges.add(job, relay, told)
            if complete:
                self._complete(job, worker, relay, lease, told)
        return response

    def _look_late(self, job: Job, worker: Worker, relay: Relay) -> None:
        """Have a worker looked at whose long answer in one piece has a new name.

        Such an answer names its model at its end, when it has been passed on.
        """
        if relay.is_event_stream:
            return
        name = first_model(relay.tail)
        model = job.attempts.pool.model
        if name is not None and not worker.answer_names.knows(model, name):
            worker.suspect()

    def _complete(
        self, job: Job, worker: Worker, relay: Relay, lease: Lease, told: Usage
    ) -> None:
        """Give back the place of an answer that is complete, with what it tells."""
        if relay.is_event_stream and relay.opened_at is not None:
            lease.seconds = lease.heard_at - relay.opened_at
            tokens = told.generated or relay.events
            lease.tokens = tokens // (job.incoming.answers * job.incoming.prompts)
        if told.reading is not None:
            lease.prefill = Prefill(*told.reading)
            self._balancer.learn(job.attempts, worker, lease.prefill)
        lease.release(Result.COMPLETE)


def _released(lease: Lease, refusal: Refusal) -> Refusal:
    lease.release(refusal.outcome)
    return refusal


def _left_alone(worker: Worker, model: str, refusal: Refusal) -> Refusal:
    """Leave a busy worker alone with a model, for as long as it may ask for that."""
    assert refusal.busy is not None, refusal
    unavailable = refusal.failure is Failure.LOADING
    breaker = worker.breaker_of(model)
    return refusal._replace(busy=breaker.busy(refusal.busy, unavailable=unavailable))


def _took_too_long(limit: float) -> HubError:
    text = f"The request took more than {limit:g} s."
    return HubError(Code.REQUEST_TIMEOUT, text)
