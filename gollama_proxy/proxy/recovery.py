"""What follows a failed attempt: a retry, another worker, a continuation, or the end.

A request whose first attempt succeeds never gets here.  `Resume` continues a broken
answer on another worker:

 partial ──▶ request() ──▶ another worker ──▶ client_of() ──▶ the same client
     ▲                                             │
     ╰───────────────── broke() ◀──────────────────╯  it breaks off as well: once more

If a worker cannot continue it, or does not prove that it did, the whole answer is
requested again (`ask_for_all`) and must be the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Self

from gollama_proxy.edge.response import (
    CLOSE,
    Client,
    ReportedError,
    Response,
    Sent,
    error_response,
)
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.fleet.worker import LastError, Worker
from gollama_proxy.proxy.attempt import Failure, failure_of, failure_of_assembly
from gollama_proxy.proxy.body import Rewriter
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly, Stream, in_shape_of
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.telemetry.accesslog import MOST_DETAIL, Outcome
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    ProxyError,
    RequestError,
    WorkerError,
)
from gollama_proxy.wire.folding import AssemblyError, UnfoldableError
from gollama_proxy.wire.partial import (
    Partial,
    ask_for_rest,
    can_continue,
    can_rescue,
    closing,
    exhausted,
    for_model,
)
from gollama_proxy.wire.resume import Resumer
from gollama_proxy.wire.schema import Api, api_of

logger = logging.getLogger(__name__)

_LOSSES = frozenset({Code.WORKER_LOST, Code.WORKER_INCOMPLETE})

# --- An attempt failed ------------------------------------------------------------


def failed(x: Exchange, lease: Lease, failure: Failure) -> Failure:
    """Release the lease of a failed attempt."""
    worker, model = lease.worker, lease.model
    if failure.overflow is not None:
        worker.learn_context(model, failure.overflow.context)
    if failure.busy is not None:
        unavailable = failure.cause is Cause.LOADING
        breaker = worker.breaker_of(model)
        left_alone = breaker.busy(failure.busy, unavailable=unavailable)
        failure = failure._replace(busy=left_alone)
    lease.release(failure.rule.result)
    return failure


async def recover(
    x: Exchange,
    worker: Worker,
    failure: Failure,
    rewriter: Rewriter,
    clock: Callable[[], float],
) -> Response | Sent | None:
    """Decide what follows a failed attempt; None: another one.

    Raises:
        ProxyError: no other attempt follows, and nothing has been sent yet.
    """
    x.enter(State.BROKEN)
    _note_failure(x, worker, failure, clock())
    if x.resume is not None and x.resume.exhausted:
        assert x.delivery is not None, x
        try:
            x.delivery.send(x.resume.closing())
            return x.delivery.finish()
        except AssemblyError as exc:
            failure = failure_of_assembly(exc)
    pause = _pause_before_next(x, failure, rewriter)
    if pause is not None:
        if pause:
            await asyncio.sleep(pause)
    elif not (failure.rule.elsewhere and x.resume and x.plan.some_left):
        return give_up(x)
    # Otherwise it waits for a worker, as for a slot.
    if x.resume is not None:
        x.enter(State.RESUMING)
    return None


def break_off(x: Exchange, error: ProxyError) -> Sent:
    """End an answer that has begun and cannot be completed."""
    assert isinstance(x.delivery, Stream), x
    x.fail(error)
    return x.delivery.break_off(error)


# --- The answer broke off ---------------------------------------------------------


def failure_on(x: Exchange, worker: Worker, error: WorkerError) -> Failure:
    """Describe an attempt that ended with an error of the worker."""
    incomplete = error.code is Code.WORKER_INCOMPLETE
    assembling = isinstance(x.delivery, Assembly) and x.resume is None
    if assembling and incomplete and not worker.is_llama_server:
        # This server may not mark the end of a stream at all.
        return failure_of_assembly(UnfoldableError("the stream has no end"))
    return failure_of(error)


def broke_off(x: Exchange, worker: Worker, relay: Relay, error: WorkerError) -> Failure:
    """Record that an answer broke off; prepare to continue it if possible."""
    failure = failure_on(x, worker, error)
    if failure.cause is not Cause.UNFOLDABLE:
        _prepare_to_resume(x, relay, error)
    return failure


def _prepare_to_resume(x: Exchange, relay: Relay, error: WorkerError) -> None:
    assert x.delivery is not None, x
    x.lost = x.lost or error
    if x.resume is not None:
        if x.resume.broke():
            x.rescued = x.resume.count
            x.plan.resume()
            if not _is_worthwhile(x, x.resume):
                x.resume = None
        return
    if not x.sent or isinstance(error, ReportedError):
        return
    model, relayed = x.plan.pool.model, relay.relayed()
    if relayed is not None and isinstance(x.delivery, Stream):
        relayed = relayed.removesuffix(x.delivery.withdraw())
    resume = Resume.begin(x.sent, model, x.endpoint.chat, relayed)
    if resume is not None and _is_worthwhile(x, resume):
        x.resume = resume
        x.delivery.send(resume.partial.mend)
        x.plan.resume()


def _is_worthwhile(x: Exchange, resume: Resume) -> bool:
    """Whether the existing part of an answer is of use.

    A client that has received nothing may as well get another answer, so the same one
    need not be generated again.
    """
    return x.fed or resume.exhausted or resume.can_continue


# --- The next attempt -------------------------------------------------------------


def _note_failure(x: Exchange, worker: Worker, failure: Failure, now: float) -> None:
    """Record how a worker failed; log that it was lost, which retries hide."""
    error = failure.answer
    detail = error.detail if isinstance(error, WorkerError) else ""
    if not x.steps and x.lease is not None:  # that of an attempt without trouble
        x.note(x.lease.taken_at, "attempt", worker.name)
    reason = failure.cause.value + (f": {detail[:MOST_DETAIL]}" if detail else "")
    x.note(now, "failed", worker.name, reason)
    text = "request %s: worker %s failed: %s"
    logger.debug(text, x.id, worker.name, reason, extra=x.extra)
    if x.spans is not None:
        x.spans.failed(failure.cause.name.lower(), reason)
    if failure.cause is Cause.DRAINED or not isinstance(error, WorkerError):
        return  # it is well, or has refused the request
    worker.last_error = LastError(now, error.code, error.detail)
    if error.code not in _LOSSES:
        return
    text = "worker %s: lost while it had a request (%s)"
    logger.warning(text, worker.name, error.detail or error.code, extra=x.extra)


def _pause_before_next(
    x: Exchange, failure: Failure, rewriter: Rewriter
) -> float | None:
    """Decide on another attempt: the pause before it in seconds; None if it is over."""
    x.failure = failure
    if not x.body.untouched or (x.fed and x.resume is None):
        return None
    if failure.overflow is not None and failure.overflow.tokens:
        x.plan.need(x.plan.pool.model, failure.overflow.tokens)
    cause = failure.cause
    if cause is Cause.UNFOLDABLE:
        x.resume = None
    if x.resume is None and x.rewritten:
        cause = rewriter.doubt(x, cause, lasting=failure.lasting)
    elif x.resume is not None and cause in _MAY_BE_OF_RESUMING:
        if _ask_for_all(x):
            # Not every server can continue a given answer.
            x.plan.repeat()
            return 0.0
        # Another worker has taken this request, so it is not the request's fault.
        cause = Cause.STATUS if cause is Cause.STATUS else Cause.MALFORMED
    return x.plan.retry_after(cause, failure.busy)


_MAY_BE_OF_RESUMING = frozenset({Cause.REFUSED, Cause.DIVERGED, Cause.STATUS})


def _ask_for_all(x: Exchange) -> bool:
    """Let the last worker start over; False if it has done so already."""
    assert x.resume is not None, x
    if x.fed:
        return x.resume.ask_for_all()
    x.resume = None  # it may even be another answer
    return True


# --- The end ----------------------------------------------------------------------


def give_up(x: Exchange) -> Response | Sent:
    """Return the last failure to the client, as no worker can help.

    Raises:
        ProxyError: it is an error of the hub, or a part of an answer has been sent.
    """
    if x.lost is not None and (x.fed or x.resume is not None):
        raise x.lost  # the client did not request the continuation that was refused
    failure = x.failure
    assert failure is not None, x
    if failure.overflow is not None:
        native = x.endpoint.api is Api.NATIVE
        too_long = x.plan.too_long(failure.overflow, native=native)
        assert too_long is not None, x
        raise too_long
    if isinstance(failure.answer, ProxyError):
        raise failure.answer
    x.end(Outcome.REFUSED)
    if x.begun and x.delivery is not None:
        return x.delivery.refuse(failure.answer)
    return in_shape_of(x, failure.answer)


def refuse(x: Exchange, error: ProxyError) -> Response:
    """End a request that fails before an answer has begun."""
    x.fail(error)
    content = x.request.content
    if isinstance(error, RequestError) and (
        not content.is_eof() or content.exception() is not None
    ):
        x.keep_alive = False  # the rest of its body is in the way
    return error_response(error, api_of(x.request.raw_path))


def fail_inside(x: Exchange, exc: Exception) -> Response | Sent:
    """End a request that met a bug in the hub."""
    detail = type(exc).__name__
    response = refuse(x, HubError(Code.INTERNAL, "The hub failed.", detail=detail))
    if not x.begun:
        return response
    if x.request.transport is not None:  # it must not look complete
        x.request.transport.abort()
    return CLOSE


def settle_blame(x: Exchange, worker: Worker) -> None:
    """Blame workers for their 5xx, now that another one has succeeded."""
    model = x.plan.pool.model
    for culprit in x.plan.succeeded():
        culprit.breaker_of(model).record(Verdict.FAILURE)
    if model in worker.model_breakers:
        worker.breaker_of(model).record(Verdict.SUCCESS)


# --- Continuing an answer ---------------------------------------------------------


class Resume:
    """One answer that is to be completed after all.

    `body` is the request that its first worker got, for `model`.
    """

    def __init__(self, body: bytes, model: str, chat: bool, partial: Partial) -> None:
        self.partial = partial
        self.count = 0  # continuations that sent something to the client
        self._body = body
        self._model = model
        self._chat = chat
        self._for_all = False  # the next request is for the whole answer
        self._asked_for_all = False
        self._splicer: _Splicer | None = None

    def __repr__(self) -> str:
        return f"<Resume {self.count} behind {self.partial!r}>"

    @classmethod
    def begin(
        cls, body: bytes, model: str, chat: bool, relayed: bytes | None
    ) -> Self | None:
        """Parse what was relayed; None if the answer cannot be continued."""
        if relayed is None or not can_rescue(body, chat):
            return None
        partial = Partial.parse(relayed)
        return None if partial is None else cls(body, model, chat, partial)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to generate, so that no worker is needed."""
        return self.partial.finished or exhausted(self._body, self.partial)

    def closing(self) -> bytes:
        """Return the end of an answer that is `exhausted`."""
        return closing(self.partial, self._chat)

    # --- The next request ---------------------------------------------------------

    @property
    def can_continue(self) -> bool:
        """Whether a worker can continue where the answer broke off."""
        return can_continue(self._body, self.partial, self._chat)

    def request(self, model: str) -> bytes:
        """Return the body for the next worker."""
        body = self._body if model == self._model else for_model(self._body, model)
        self._asked_for_all = self._for_all or not self.can_continue
        self._for_all = False
        if self._asked_for_all:
            return body
        return ask_for_rest(body, self.partial, self._chat)

    @property
    def repeated(self) -> int:
        """The tokens of the answer that are a part of the last request's prompt."""
        return 0 if self._asked_for_all else self.partial.tokens

    def ask_for_all(self) -> bool:
        """Send the first request again next time; False if the last one was that."""
        self._for_all = not self._asked_for_all
        return self._for_all

    # --- Its answer ---------------------------------------------------------------

    def client_of(
        self,
        client: Client,
        model: str,
        worker: str,
        fail: Callable[[ProxyError], None],
    ) -> Client:
        """Wrap a client: it gets only what it does not have yet.

        A comment names the `worker` first.  `fail` is called if this turns out not to
        be the rest of the answer.
        """
        splice = Resumer(
            self.partial,
            self._chat,
            regenerate=self._asked_for_all,
            model=None if model == self._model else model,
        )
        comment = f": gollama rescued {self.count + 1} by {worker}\n\n".encode()
        self._splicer = splicer = _Splicer(splice, client, comment, fail)
        return Client(splicer, client.protocol, client.writer, chunked=False)

    def finish(self) -> None:
        """Handle the regular end of the worker's body, and send what is missing.

        Raises:
            WorkerError: this was not the rest of the answer, or not all of it.
        """
        assert self._splicer is not None, self
        self._splicer.finish()
        self.count += 1

    def broke(self) -> bool:
        """Handle a continuation that broke off as well; True if it sent anything."""
        splicer, self._splicer = self._splicer, None
        if splicer is None or not splicer.used:
            return False
        self.count += 1
        self.partial = splicer.splice.partial
        return True


class _Splicer:
    """Feeds a splice, and writes its output."""

    def __init__(
        self,
        splice: Resumer,
        client: Client,
        comment: bytes,
        fail: Callable[[ProxyError], None],
    ) -> None:
        self.splice = splice
        self.used = False  # the client got something from it
        self._client = client
        self._comment = comment  # sent in front of the first event
        self._fail = fail
        self._error: WorkerError | None = None

    def __repr__(self) -> str:
        return f"<_Splicer {self.splice!r}>"

    def write(self, data: bytes) -> None:
        """Take bytes from the relay, as a client's transport would."""
        try:
            for event in self.splice.feed(data) if self._error is None else ():
                self._send(event)
        except WorkerError as exc:  # must not reach the connection that is reading
            self._error = exc
            self._fail(exc)

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        self._send(self.splice.finish())

    def _send(self, event: bytes) -> None:
        if not self.used:
            self.used = True
            self._client.send(self._comment)
        self._client.send(event)
