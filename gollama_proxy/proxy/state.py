"""The one object of a request, and the states that it passes through.

    READING ──▶ QUEUED ──▶ CONNECTING ◀──▶ WAITING ──▶ STREAMING ──▶ ENDED
                 ▲  ▲           │             │            │
                 │  │           ▼             ▼            │
                 │  ╰──────── BROKEN ◀─────────────────────╯
                 │              │
                 ╰─ RESUMING ◀──╯   the rest of the answer comes from another worker

ENDED may follow every state; WAITING is left for CONNECTING when a used connection
turned out dead.  `TRANSITIONS` is the table.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from aiohttp import web

from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Record

if TYPE_CHECKING:
    from gollama_proxy.edge.auth import Principal
    from gollama_proxy.fleet.lease import Lease
    from gollama_proxy.proxy.attempt import Failure
    from gollama_proxy.proxy.body import Body
    from gollama_proxy.proxy.plan import Plan
    from gollama_proxy.proxy.relay import Relay
    from gollama_proxy.proxy.response import Assembly, Stream
    from gollama_proxy.proxy.resume import Resume
    from gollama_proxy.proxy.rewrite import Plainly
    from gollama_proxy.scheduling.turns import Ticket
    from gollama_proxy.wire.errors import ProxyError
    from gollama_proxy.wire.openai import Endpoint


class State(enum.Enum):
    """Where a request is."""

    READING = "its head and body are read"
    QUEUED = "it waits for a slot"
    CONNECTING = "it is being sent to a worker"
    WAITING = "the worker has it; the first event of the answer has not come"
    STREAMING = "the answer is on its way to the client"
    BROKEN = "the attempt failed"
    RESUMING = "a part of the answer is out; another worker is to continue it"
    ENDED = "it has its outcome"

    # That of `Enum` is a call in Python, for each look into the table.
    __hash__ = object.__hash__


TRANSITIONS: dict[State, frozenset[State]] = {
    State.READING: frozenset({State.QUEUED, State.ENDED}),
    State.QUEUED: frozenset({State.CONNECTING, State.ENDED}),
    State.CONNECTING: frozenset({State.WAITING, State.BROKEN, State.ENDED}),
    State.WAITING: frozenset(
        {State.CONNECTING, State.STREAMING, State.BROKEN, State.ENDED}
    ),
    State.STREAMING: frozenset({State.BROKEN, State.ENDED}),
    State.BROKEN: frozenset({State.QUEUED, State.RESUMING, State.ENDED}),
    State.RESUMING: frozenset({State.QUEUED, State.ENDED}),
    State.ENDED: frozenset(),
}


class Exchange(Record):
    """One client request, from its first byte to its outcome.

    A class attribute is the value before anything else is known, so that a request
    that needs little costs little.
    """

    id = ""
    state = State.READING
    forwarded = b""  # header lines of the client that workers get
    lines = ""  # header lines that the answer has in any case
    keep_alive = False  # the client's connection may carry another request

    # Who asks, and for what
    caller: Principal
    priority: Priority = Priority.INTERACTIVE
    needs_slot = True  # its attempts generate; others are not limited by slots
    max_concurrency = 0  # requests of the subject that may run at once; 0: no limit
    endpoint: Endpoint
    body: Body
    asked = ""  # the model asked for, by the name that its workers have for it
    alias = ""  # the client's name for it, if that is another one
    counted = False  # its tokens have to be known exactly

    # Where it is served
    plan: Plan
    ticket: Ticket | None = None  # its place in the queue
    lease: Lease | None = None
    relay: Relay | None = None
    loading = False  # the worker of this attempt has to load the model first
    waiting_since = 0.0  # monotonic seconds, when this attempt was sent
    patience = 0.0  # seconds for the first byte, whoever else there is
    allowance = 0.0  # seconds for the first event, while another worker could take over

    # What the worker is asked for
    sent = b""  # the body that the worker got, to begin an answer with
    choices = 1  # that a stream is asked for
    hides_usage = False  # the hub has asked for usage, and the client has not
    rewritten = False  # the worker is asked for more than the client wrote
    suspect: Plainly | None = None  # a worker that may not take rewritten requests

    # What the client gets
    delivery: Stream | Assembly | None = None
    resume: Resume | None = None  # the answer broke off, and continues
    lost: ProxyError | None = None  # why an answer that has begun broke off
    failure: Failure | None = None  # the last one
    answered = False  # a worker has begun to generate
    waited = 0.0  # seconds for which no worker was available
    noticed_at = 0.0  # seconds of an attempt, when the client was last notified

    def __init__(self, request: web.BaseRequest, started: float) -> None:
        """Begin; `started` is in monotonic seconds."""
        self.request = request
        self.method = request.method
        self.remote = request.remote or ""
        self.started = started

    def __repr__(self) -> str:  # without what a user wrote
        return f"<Exchange {self.id} {self.state.name} attempts={self.attempts}>"

    def enter(self, state: State) -> None:
        """Take a step.

        Raises:
            RuntimeError: the table does not have it.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state.name}")
        self.state = state

    @property
    def begun(self) -> bool:
        """Whether the head of the answer is out."""
        return self.delivery is not None and self.delivery.begun

    @property
    def fed(self) -> bool:
        """Whether the client has a part of the answer."""
        return self.delivery is not None and self.delivery.fed

    @property
    def client_left(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    @property
    def attempt_lines(self) -> str:
        """The header lines about the attempts so far."""
        if not self.attempts:
            return ""
        return (
            f"X-Gollama-Worker: {self.worker}\r\n"
            f"X-Gollama-Attempts: {self.attempts}\r\n"
            f"X-Gollama-Queue-Ms: {round(self.queued * 1000)}\r\n"
        )

    @property
    def names(self) -> tuple[str, str] | None:
        """The model's name and the client's for it; a fallback keeps its own."""
        model = self.plan.pool.model
        return (model, self.alias) if self.alias and model == self.asked else None
