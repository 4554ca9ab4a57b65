"""What a request holds on a worker, given back exactly once, and what it shows."""

from __future__ import annotations

import enum
import math
from types import TracebackType
from typing import TYPE_CHECKING, Final, assert_never

from gollama_proxy.fleet.breaker import Permit, Verdict
from gollama_proxy.wire.answer import Prefill

if TYPE_CHECKING:
    from gollama_proxy.fleet.worker import Worker


class Result(enum.Enum):
    """How an attempt ended, as far as the worker is concerned."""

    COMPLETE = "complete"
    SLOW = "slow"  # no event for too long, from a worker that can be reached
    BUSY = "busy"  # it answered 429, or that it is loading its model
    REFUSED = "refused"  # it answered with an error that the request has caused
    ERRED = "erred"  # it answered 5xx, which the worker or the request has caused
    CLIENT_GONE = "client gone"
    HUB_STOPPED = "hub stopped"
    WORKER_FAILED = "worker failed"


# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_COMPLETE: Final = Result.COMPLETE
_SUCCESS: Final = Verdict.SUCCESS


class Lease:
    """A place on one worker.

    `heard_at` is the moment of the worker's last byte (monotonic seconds); the relay
    writes it at every read, and a late `/health` counts for less.

    Used as a context manager, it cannot leak: a lease that was not released counts as
    a client that left, or as a bug in the hub.  The worker is not blamed for either,
    unless the client has waited for its first token for longer than `allowance`.
    """

    __slots__ = (
        "allowance",
        "first_token",
        "generation",
        "heard_at",
        "loads",
        "model",
        "permits",
        "prefill",
        "prompt_bytes",
        "released_at",
        "result",
        "seconds",
        "slot",
        "taken_at",
        "tokens",
        "worker",
    )

    def __init__(self, worker: Worker, model: str = "", *, slot: bool = True) -> None:
        self.worker = worker
        self.model = model
        self.slot = slot  # it takes one of the worker's slots
        clock = worker.clock  # a local is cheaper to call
        self.taken_at = clock()
        self.released_at = 0.0  # when it was given back
        self.heard_at = -math.inf
        self.result: Result | None = None  # None while it is held
        self.loads = False  # the worker has to load the model first
        self.generation = 0  # of the worker's breaker, when the lease was taken
        self.permits: tuple[Permit, ...] = ()  # of breakers that are half-open
        self.allowance = math.inf  # seconds that the first token may take
        # What a complete answer shows about the worker's speed; 0 is not known.
        self.prompt_bytes = 0
        self.first_token = 0.0  # seconds from the request to the first event
        self.seconds = 0.0  # from the first event to the last
        self.tokens = 0
        self.prefill: Prefill | None = None  # as the worker reports it

    def __repr__(self) -> str:
        held = self.result.name if self.result is not None else "held"
        return f"<Lease on {self.worker.name} {held}>"

    def release(self, result: Result) -> None:
        """Give the place back; only the first call counts."""
        if self.result is None:
            self.result = result
            self.worker.take_back(self, result)

    def judge(self, result: Result, beside: int) -> Verdict:
        """Learn from how the attempt ended, one of `beside`; return what it shows."""
        worker = self.worker
        if result is _COMPLETE:
            if self.prefill is not None and not self.prefill.possible:
                worker.doubt(self.prefill)
            model, tokens, seconds = self.model, self.tokens, self.seconds
            pace = worker.paces.get(model) or worker.pace_of(model)
            slow = tokens and pace.is_slow(tokens, seconds, beside)
            pace.learn(
                0 if self.loads else self.prompt_bytes,  # not a time of reading
                self.first_token,
                tokens,
                seconds,
                beside,
                self.prefill,
            )
            return Verdict.SLOW if slow else _SUCCESS
        match result:
            case Result.SLOW:
                if not self.first_token:
                    worker.pace_of(self.model).missed()
                return Verdict.HUNG
            case Result.WORKER_FAILED:
                return Verdict.FAILURE
            case Result.CLIENT_GONE:
                # A client that leaves after a hang has left because of it.
                waited = worker.clock() - self.taken_at
                hung = not self.first_token and waited > self.allowance
                return Verdict.HUNG if hung else Verdict.NEUTRAL
            case Result.BUSY | Result.REFUSED | Result.ERRED | Result.HUB_STOPPED:
                return Verdict.NEUTRAL
            case _:
                assert_never(result)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release(Result.CLIENT_GONE)


def proof_of(verdict: Verdict, result: Result) -> bool | None:
    """Return what a request proves that was admitted as a proof; None is nothing."""
    if result is Result.ERRED:
        return False
    if verdict is Verdict.NEUTRAL:
        return None
    return verdict is Verdict.SUCCESS
