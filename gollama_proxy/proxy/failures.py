"""Why an attempt on a worker failed, and everything that follows from it.

`rule_of` is the one table: for each cause, the error for the client if all attempts
fail, where the request may be retried and at what cost, and the result for the worker.

    cause          another worker     the same one, once more     blamed on the worker
    ───────────    ───────────────    ────────────────────────    ────────────────────
    UNREACHABLE    at once, free      no                          yes
    CROWDED        at once, free      after a second              no: busy
    LOADING        at once, free      after its Retry-After       no: busy
    BUSY           at once            after its Retry-After       no: busy
    LOST           at once            after a short pause         yes
    STATUS (5xx)   at once            after a short pause         if another succeeds
    SLOW, SILENT   at once            no: it would be as slow     as hung, as failed
    MALFORMED      at once            no                          yes
    KEY            at once            no                          yes
    MODEL          at once, free      no                          no
    CONTEXT        a larger one,      no                          no
                   free
    UNFOLDABLE     at once            at once, as the client      no
                                      wrote the request
    DRAINED        at once, free      no                          no
    DIVERGED       no                 no                          no
    REFUSED        no: the same everywhere                        no

A free retry takes nothing from the budget that all requests share: it adds no load to
an outage.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, assert_never

from gollama_proxy.fleet.lease import Result
from gollama_proxy.wire.errors import Code, WorkerError


class Cause(enum.Enum):
    """Why an attempt failed."""

    UNREACHABLE = "no connection"
    CROWDED = "no connection in time, while the worker sends other answers"
    LOADING = "the worker is loading a model (503)"
    BUSY = "the worker is busy (429)"
    LOST = "the connection was lost, or the answer is incomplete"
    STATUS = "the worker answered 5xx"
    SLOW = "another worker is likely to be faster"
    SILENT = "no answer within the time limit"
    MALFORMED = "the answer is not valid HTTP"
    KEY = "the worker rejects the hub's key"
    MODEL = "the worker serves another model now"
    CONTEXT = "the prompt is too long for the worker"
    UNFOLDABLE = "the stream cannot be assembled into an answer"
    DRAINED = "the worker was drained or removed, and its time was over"
    DIVERGED = "another worker does not continue the same answer"
    REFUSED = "the worker refuses the request itself (4xx)"


class DrainedError(WorkerError):
    """A worker was drained or removed, and this request took longer than it had."""

    def __init__(self, worker: str) -> None:
        text = f"Worker {worker} was taken out of service before its answer ended."
        super().__init__(Code.WORKER_LOST, text, detail="drained")


class Again(enum.Enum):
    """Whether the only worker of a pool gets the request again."""

    NO = "no"
    PAUSE = "after a short pause"
    ASKED = "after the time in its Retry-After, if that is short"
    AS_SENT = "at once, with the request as the client wrote it"


class Rule(NamedTuple):
    """The consequences of one cause."""

    code: Code  # for the client, if no answer of a worker is passed on
    result: Result  # for the worker's breaker
    elsewhere: bool = True  # another worker may succeed
    again: Again = Again.NO
    free: bool = False  # takes nothing from the retry budget
    declined: bool = False  # the worker did not take the request
    begun: bool = False  # the worker may have begun to work on it
    hung: bool = False  # the worker stopped in the middle of its work


def rule_of(cause: Cause) -> Rule:
    """Return the rule of a cause; a cause without one fails the type check."""
    match cause:
        case Cause.UNREACHABLE:
            return _UNREACHABLE
        case Cause.CROWDED:
            return _CROWDED
        case Cause.LOADING:
            return _LOADING
        case Cause.BUSY:
            return _BUSY
        case Cause.LOST:
            return _LOST
        case Cause.STATUS:
            return _STATUS
        case Cause.SLOW:
            return _SLOW
        case Cause.SILENT:
            return _SILENT
        case Cause.MALFORMED:
            return _MALFORMED
        case Cause.KEY:
            return _KEY
        case Cause.MODEL:
            return _MODEL
        case Cause.CONTEXT:
            return _CONTEXT
        case Cause.UNFOLDABLE:
            return _UNFOLDABLE
        case Cause.DRAINED:
            return _DRAINED
        case Cause.DIVERGED:
            return _DIVERGED
        case Cause.REFUSED:
            return _REFUSED
        case _:
            assert_never(cause)


_UNREACHABLE = Rule(
    Code.WORKER_UNREACHABLE, Result.WORKER_FAILED, free=True, declined=True
)
# Its queue of connections is full, or the machine is overloaded; it is not dead.
_CROWDED = Rule(
    Code.WORKER_TIMEOUT, Result.BUSY, again=Again.ASKED, free=True, declined=True
)
_LOADING = Rule(
    Code.NO_WORKER, Result.BUSY, again=Again.ASKED, free=True, declined=True
)
_BUSY = Rule(Code.QUEUE_FULL, Result.BUSY, again=Again.ASKED, declined=True)
_LOST = Rule(Code.WORKER_LOST, Result.WORKER_FAILED, again=Again.PAUSE, begun=True)
# A 500 of llama-server often means a bad request, so no worker is blamed for it yet.
_STATUS = Rule(Code.WORKER_PROTOCOL, Result.ERRED, again=Again.PAUSE, begun=True)
_SLOW = Rule(Code.WORKER_SLOW, Result.SLOW, begun=True, hung=True)
_SILENT = Rule(Code.WORKER_TIMEOUT, Result.WORKER_FAILED, begun=True, hung=True)
_MALFORMED = Rule(Code.WORKER_PROTOCOL, Result.WORKER_FAILED, begun=True)
_KEY = Rule(Code.WORKER_REFUSED_KEY, Result.WORKER_FAILED)
_MODEL = Rule(Code.NO_WORKER, Result.REFUSED, free=True, begun=True)
_CONTEXT = Rule(Code.CONTEXT_LENGTH, Result.REFUSED, free=True)
_UNFOLDABLE = Rule(Code.WORKER_PROTOCOL, Result.REFUSED, again=Again.AS_SENT)
_DRAINED = Rule(Code.WORKER_LOST, Result.HUB_STOPPED, free=True, begun=True)
_DIVERGED = Rule(Code.WORKER_INCOMPLETE, Result.REFUSED, elsewhere=False)
_REFUSED = Rule(Code.BAD_REQUEST, Result.REFUSED, elsewhere=False)
