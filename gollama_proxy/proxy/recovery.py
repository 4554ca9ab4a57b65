"""What follows a failed attempt: a retry, another worker, a continuation, or the end.

A request whose first attempt succeeds never gets here.
"""

from __future__ import annotations

from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.attempt import Failure, failure_of, failure_of_assembly
from gollama_proxy.proxy.client import ReportedError
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly, Stream, in_shape_of
from gollama_proxy.proxy.resume import Resume
from gollama_proxy.proxy.rewrite import Rewriter
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.telemetry.accesslog import Outcome
from gollama_proxy.wire.assemble import UnfoldableError
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.openai import Api

# --- The answer broke off -----------------------------------------------------------


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


# --- The next attempt ---------------------------------------------------------------


def pause_before_next(
    x: Exchange, failure: Failure, rewriter: Rewriter
) -> float | None:
    """Decide on another attempt: the pause before it in seconds; None if it is over."""
    x.failure = failure
    if not x.body.untouched or (x.fed and x.resume is None):
        return None
    if failure.overflow is not None and failure.overflow.tokens:
        x.plan.needs[x.plan.pool.model] = failure.overflow.tokens
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


# --- The end ------------------------------------------------------------------------


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
    x.outcome = Outcome.REFUSED
    if x.begun and x.delivery is not None:
        return x.delivery.refuse(failure.answer)
    return in_shape_of(x, failure.answer)


def settle_blame(x: Exchange, worker: Worker) -> None:
    """Blame workers for their 5xx, now that another one has succeeded."""
    model = x.plan.pool.model
    for culprit in x.plan.succeeded():
        culprit.breaker_of(model).record(Verdict.FAILURE)
    if model in worker.model_breakers:
        worker.breaker_of(model).record(Verdict.SUCCESS)
