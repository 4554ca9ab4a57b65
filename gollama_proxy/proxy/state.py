"""The one object of a request, the states that it passes through, and those that run.

    READING ──▶ QUEUED ──▶ CONNECTING ◀──▶ WAITING ──▶ STREAMING ──▶ ENDED
                 ▲  ▲           │             │            │
                 │  │           ▼             ▼            │
                 │  ╰──────── BROKEN ◀─────────────────────╯
                 │              │
                 ╰─ RESUMING ◀──╯   the rest of the answer comes from another worker

ENDED may follow every state.  A request that gets a slot at once is never QUEUED, and
one that gets an open connection is never CONNECTING, unless that connection was dead.
`TRANSITIONS` is the table.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from gollama_proxy.edge.response import SERVER
from gollama_proxy.fleet.pool import RETRY_AFTER
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.accesslog import Outcome, Record, Step
from gollama_proxy.wire.errors import Code, HubError, RequestError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from aiohttp import web

    from gollama_proxy.config.settings import Config
    from gollama_proxy.edge.auth import Principal
    from gollama_proxy.proxy.attempt import Failure, Upload
    from gollama_proxy.proxy.body import Body, Plainly
    from gollama_proxy.proxy.plan import Plan
    from gollama_proxy.proxy.recovery import Resume
    from gollama_proxy.proxy.relay import Relay
    from gollama_proxy.proxy.response import Assembly, Stream
    from gollama_proxy.scheduling.turns import Subject, Ticket
    from gollama_proxy.telemetry.tracing import Spans
    from gollama_proxy.wire.errors import ProxyError
    from gollama_proxy.wire.schema import Endpoint


class State(enum.Enum):
    """The state of a request."""

    READING = "its head and body are being read"
    QUEUED = "it waits for a slot"
    CONNECTING = "a connection to a worker is being opened for it"
    WAITING = "the worker has it; the answer has not begun"
    STREAMING = "the answer is being sent to the client"
    BROKEN = "the attempt failed"
    RESUMING = "a part of the answer was sent; another worker will continue it"
    ENDED = "it has its outcome"

    # The hash of `Enum` is written in Python: a call for each lookup in the table.
    __hash__ = object.__hash__


_READING, _ENDED = State.READING, State.ENDED  # as in `exchange.py`
_INTERACTIVE = Priority.INTERACTIVE
_ATTEMPT = {State.QUEUED, State.CONNECTING, State.WAITING}  # where one begins

TRANSITIONS: dict[State, frozenset[State]] = {
    State.READING: frozenset({*_ATTEMPT, State.ENDED}),
    State.QUEUED: frozenset({State.CONNECTING, State.WAITING, State.ENDED}),
    State.CONNECTING: frozenset({State.WAITING, State.BROKEN, State.ENDED}),
    State.WAITING: frozenset(
        {State.CONNECTING, State.STREAMING, State.BROKEN, State.ENDED}
    ),
    State.STREAMING: frozenset({State.BROKEN, State.ENDED}),
    State.BROKEN: frozenset({*_ATTEMPT, State.RESUMING, State.ENDED}),
    State.RESUMING: frozenset({*_ATTEMPT, State.ENDED}),
    State.ENDED: frozenset(),
}


class Exchange(Record):
    """One client request, from its first byte to its outcome."""

    __slots__ = (
        *("alias", "answered", "asked", "body", "caller", "choices", "config"),
        *("counted", "cut", "delivery", "endpoint", "failure", "forwarded"),
        *("hides_usage", "holder", "keep_alive", "lines", "loading", "lost"),
        *("max_concurrency",),
        *("needs_slot", "noticed_at", "plan", "priority", "relay", "repeated"),
        *("request", "resume", "rewritten", "sent", "spans", "state", "suspect"),
        *("ticket", "upload", "waited", "waiting_since"),
    )

    config: Config  # the settings when it began; later ones are for later requests
    caller: Principal
    endpoint: Endpoint
    body: Body
    plan: Plan

    def __init__(self, request: web.BaseRequest, started: float) -> None:
        """Begin; `started` is in monotonic seconds."""
        super().__init__("", request.method, remote=request.remote or "")
        self.request = request
        self.started = started
        self.state = _READING
        self.forwarded = b""  # header lines of the client for workers
        self.lines = ""  # further header lines of its answer
        self.spans: Spans | None = None  # unless the hub traces no requests
        self.keep_alive = False  # the client's connection may carry another request

        # The caller, and the request
        self.priority: Priority = _INTERACTIVE
        self.needs_slot = True  # its attempts generate tokens; others need no slot
        self.max_concurrency = 0  # concurrent requests of the subject; 0: no limit
        self.asked = ""  # the requested model, by the name that its workers use
        self.alias = ""  # the client's name for it, if that differs
        self.counted = False  # its tokens must be known exactly

        # The attempts
        self.ticket: Ticket | None = None  # while it waits in the queue
        self.holder: Subject | None = None  # once it was admitted to a slot
        self.relay: Relay | None = None
        self.upload: Upload | None = None  # of a long body
        self.loading = False  # the worker of this attempt must load the model first
        self.waiting_since = 0.0  # monotonic seconds, when this attempt was sent

        # What the worker gets
        self.sent = b""  # the body that the worker got, to begin an answer with
        self.choices = 1  # requested from a stream
        self.hides_usage = False  # the hub requested usage, and the client did not
        self.rewritten = False  # the request differs from the client's
        self.suspect: Plainly | None = None  # a worker may refuse rewritten requests

        # What the client gets
        self.delivery: Stream | Assembly | None = None
        self.resume: Resume | None = None  # the answer broke off, and is continued
        self.repeated = 0  # tokens of it that the worker of this attempt gets as prompt
        self.lost: ProxyError | None = None  # why the answer broke off
        self.failure: Failure | None = None  # the last one
        self.answered = False  # a worker has begun to generate
        self.waited = 0.0  # seconds for which no worker was available
        self.cut: ProxyError | None = None  # why the hub has cancelled it, if it has
        self.noticed_at = 0.0  # seconds of an attempt, when the client got a notice

    def __repr__(self) -> str:  # without text of the user
        return f"<Exchange {self.id} {self.state.name} attempts={self.attempts}>"

    def enter(self, state: State) -> None:
        """Enter the next state.

        Raises:
            RuntimeError: the table does not allow it.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state.name}")
        self.state = state

    def note(self, at: float, step: str, worker: str = "", reason: str = "") -> None:
        """Keep a step, for operators; `at` is in monotonic seconds."""
        if len(self.steps) < MOST_STEPS:
            self.steps += (Step(at - self.started, step, worker, reason),)

    def fail(self, error: ProxyError) -> None:
        """Set the outcome of a request that ends with an error of the hub."""
        self.end(Outcome.ERROR, error.code, error.detail)

    def end(self, outcome: Outcome, error: str = "", detail: str = "") -> None:
        """Set the one outcome; what happens after it does not change it."""
        if self.outcome is None:
            self.outcome = outcome
            if error:
                self.error, self.detail = error, detail
        self.state = _ENDED

    @property
    def body_so_far(self) -> Body | None:
        """The body; there is none before the head of the request was read."""
        return getattr(self, "body", None)

    @property
    def begun(self) -> bool:
        """Whether the head of the answer has been sent."""
        return self.delivery is not None and self.delivery.begun

    @property
    def fed(self) -> bool:
        """Whether a part of the answer has been sent."""
        return self.delivery is not None and self.delivery.fed

    @property
    def client_left(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def header_lines(self) -> str:
        """Return the header lines that the hub adds to the answer."""
        if not (attempts := self.attempts):
            return f"{_BEFORE_ID}{self.id}\r\n{self.lines}"
        return (
            f"{_BEFORE_ID}{self.id}\r\n{self.lines}X-Gollama-Worker: {self.worker}\r\n"
            f"X-Gollama-Attempts: {attempts}\r\n"
            f"X-Gollama-Queue-Ms: {round(self.queued * 1000.0)}\r\n"
        )

    @property
    def names(self) -> tuple[str, str] | None:
        """The model's name and the client's; a fallback keeps its own name."""
        model = self.plan.pool.model
        return (model, self.alias) if self.alias and model == self.asked else None


_BEFORE_ID = f"Server: {SERVER}\r\nX-Request-Id: "
MOST_STEPS = 100  # of one request; more are not kept

# --- The requests that run --------------------------------------------------------


class Running:
    """The requests that have no outcome yet, each in a task."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[object], Exchange] = {}
        self._idle: asyncio.Future[None] | None = None  # done when none is running
        self._draining = False

    @property
    def running(self) -> Collection[Exchange]:
        """The requests that have no outcome yet."""
        return self._running.values()

    def cancel(self, x: Exchange) -> None:
        """Cancel a running request for an operator; its client gets an error."""
        text = "An operator of the hub has cancelled this request."
        for task, each in self._running.items():
            if each is x and x.cut is None:
                x.cut = RequestError(Code.CANCELLED, text)
                task.cancel()

    async def drain(self, limit: float) -> None:
        """Wait for running requests, at most `limit` seconds; then cut the rest.

        New requests on open connections are refused from now on.
        """
        self._draining = True
        try:
            async with asyncio.timeout(limit):
                await self._no_request()
        except TimeoutError:
            logger.warning("cutting %d running requests", len(self._running))
        self.cut()
        await self._no_request()

    async def _no_request(self) -> None:
        """Wait until no request is running."""
        while self._running:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle])

    def cut(self) -> None:
        """Cancel every running request; clients are notified if possible."""
        for task, x in self._running.items():
            x.cut = x.cut or draining()
            task.cancel()


def took_too_long(limit: float) -> HubError:
    """Make the error of a request that reaches `timeouts.request`, in seconds."""
    text = f"The request took more than {limit:g} s."
    return HubError(Code.REQUEST_TIMEOUT, text)


def draining() -> HubError:
    """Make the error of a request that arrives while the hub shuts down."""
    return HubError(Code.DRAINING, "The hub is shutting down.", retry_after=RETRY_AFTER)
