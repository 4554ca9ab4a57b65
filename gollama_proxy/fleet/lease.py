"""What a request holds on a worker, given back exactly once, with an outcome."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from types import TracebackType

from gollama_proxy.fleet.breaker import Permit
from gollama_proxy.fleet.speed import Prefill


class Outcome(enum.Enum):
    """How an attempt ended, as far as the worker is concerned."""

    COMPLETE = "complete"
    SLOW = "slow"  # no event for too long, while the worker is there
    BUSY = "busy"  # it said so: 429, or loading its model
    REFUSED = "refused"  # the worker answered, with an error of the request's making
    ERRED = "erred"  # it answered 5xx, and whose fault that was is not known
    CLIENT_GONE = "client gone"
    HUB_STOPPED = "hub stopped"
    WORKER_FAILED = "worker failed"


class Lease:
    """A place on one worker.

    `heard_at` is the moment of the worker's last byte (monotonic seconds); the relay
    writes it at every read, and the pinger believes it more than a late `/health`.

    Used as a context manager, it cannot leak: what nobody released counts as a client
    that left, or as a bug in the hub; the worker is not blamed for either, unless the
    client has waited for longer than `allowance` for a first token.
    """

    __slots__ = (
        "_give_back",
        "allowance",
        "first_token",
        "generation",
        "heard_at",
        "loads",
        "model",
        "outcome",
        "permits",
        "prefill",
        "prompt_bytes",
        "seconds",
        "slot",
        "taken_at",
        "tokens",
        "worker",
    )

    def __init__(
        self,
        worker: str,
        clock: Callable[[], float],
        give_back: Callable[[Lease, Outcome], None],
    ) -> None:
        self.worker = worker
        self.taken_at = clock()
        self.heard_at = float("-inf")
        self.outcome: Outcome | None = None
        self.model = ""
        self.slot = True  # it takes one of the worker's slots
        self.loads = False  # the worker has to load the model first
        self.generation = 0  # of the worker's breaker, when the lease was taken
        self.permits: tuple[Permit, ...] = ()  # of breakers that are half-open
        self.allowance = math.inf  # seconds that the first token may take
        # What a complete answer tells about the worker's speed; 0 is not known.
        self.prompt_bytes = 0
        self.first_token = 0.0  # seconds from the request to the first event
        self.seconds = 0.0  # from the first event to the last
        self.tokens = 0
        self.prefill: Prefill | None = None  # as the worker tells it
        self._give_back = give_back

    def __repr__(self) -> str:
        held = self.outcome.name if self.outcome is not None else "held"
        return f"<Lease on {self.worker} {held}>"

    def release(self, outcome: Outcome) -> None:
        """Give the place back; only the first call counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._give_back(self, outcome)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release(Outcome.CLIENT_GONE)
