"""One worker as the hub knows it: its health, what it serves, what it is doing.

Health is a state machine, driven by the pinger's checks.  All of it is in this file:

    STARTING ──ok──▶ READY ◀──ok── LOADING        STARTING: nobody answered yet
        │              │  ╲──loading──▶             LOADING: it answers "Loading model"
        └──fell──▶   DOWN ◀──fell── (all)           DOWN: out, until `rise` good checks

A failed check of a worker that is READY counts; the `fall`th in a row takes it out.
One that was not READY has nothing to lose: its first failed check takes it to DOWN.
"""

from __future__ import annotations

import enum
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from gollama_proxy.routing.breaker import Breaker, Verdict
from gollama_proxy.routing.lease import Lease, Outcome
from gollama_proxy.routing.slowness import Expectations, Pace
from gollama_proxy.settings import Breaker as Limits
from gollama_proxy.settings import Health, WorkerConfig

logger = logging.getLogger(__name__)


class State(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DOWN = "down"


class Event(enum.Enum):
    ROSE = "enough good checks"
    LOADING = "it is loading its model"
    FELL = "enough failed checks"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.ROSE): State.READY,
    (State.STARTING, Event.LOADING): State.LOADING,
    (State.STARTING, Event.FELL): State.DOWN,
    (State.LOADING, Event.ROSE): State.READY,
    (State.LOADING, Event.LOADING): State.LOADING,
    (State.LOADING, Event.FELL): State.DOWN,
    (State.READY, Event.ROSE): State.READY,
    (State.READY, Event.LOADING): State.LOADING,
    (State.READY, Event.FELL): State.DOWN,
    (State.DOWN, Event.ROSE): State.READY,
    (State.DOWN, Event.LOADING): State.LOADING,
    (State.DOWN, Event.FELL): State.DOWN,
}


class Check(enum.Enum):
    """What one ping has shown."""

    OK = "ok"
    LOADING = "loading"
    FAILED = "failed"
    REFUSED = "refused"  # nobody listens there


# Ends of an attempt after which the pinger had better look at once.
SUSPICIOUS = frozenset({Outcome.WORKER_FAILED, Outcome.SLOW, Outcome.BUSY})


@dataclass(frozen=True, slots=True)
class Model:
    """A model as one worker serves it."""

    name: str
    context: int | None = None  # tokens of one slot


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker told about itself; None where it did not."""

    models: tuple[Model, ...] = ()
    slots: int | None = None
    context: int | None = None  # tokens of one slot
    build: str = ""


@dataclass(slots=True, eq=False)
class Worker:
    """The live record of one worker.  `clock` gives monotonic seconds."""

    config: WorkerConfig
    health: Health
    clock: Callable[[], float]
    index: int = 0  # place in the configuration, from 0
    state: State = State.STARTING
    reason: str = "not reached yet"
    description: Description | None = None  # None until it was reached once
    leases: set[Lease] = field(default_factory=set)
    checked_at: float | None = None
    limits: Limits = field(default_factory=Limits)
    expectations: Expectations = field(default_factory=Expectations)
    rng: random.Random = field(default_factory=random.Random)
    breaker: Breaker = field(init=False)
    # Each of its models has a speed of its own.
    paces: dict[str, Pace] = field(default_factory=dict)
    # Bad statuses are held against a worker and the model asked for, not the machine.
    model_breakers: dict[str, Breaker] = field(default_factory=dict)
    # Called on every suspicion, so that the pinger looks at once.
    on_suspicion: Callable[[], None] | None = None
    _good: int = 0
    _bad: int = 0

    def __post_init__(self) -> None:
        self.breaker = Breaker(self.name, self.limits, self.clock, self.rng)

    def __repr__(self) -> str:
        return (
            f"<Worker {self.name} {self.state.name} in_flight={self.in_flight} "
            f"good={self._good} bad={self._bad}>"
        )

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_down(self) -> bool:
        return self.state is State.DOWN

    @property
    def available(self) -> bool:
        return self.state is State.READY and self.breaker.available

    @property
    def admits(self) -> bool:
        """Whether a request may come, be it as the proof of a half-open breaker."""
        return self.state is State.READY and self.breaker.admits

    def can_serve(self, model: str) -> bool:
        """Whether a request for this model may be sent now."""
        breaker = self.model_breakers.get(model)
        return self.admits and (breaker is None or breaker.admits)

    def breaker_of(self, model: str) -> Breaker:
        """Find, or make, the breaker for one model on this worker."""
        if model not in self.model_breakers:
            name = f"{self.name} {model}"
            self.model_breakers[model] = Breaker(
                name, self.limits, self.clock, self.rng
            )
        return self.model_breakers[model]

    def pace_of(self, model: str) -> Pace:
        """Find, or make, what is known of the speed of one model on this worker."""
        if model not in self.paces:
            self.paces[model] = Pace(self.clock, self.expectations)
        return self.paces[model]

    @property
    def models(self) -> tuple[Model, ...]:
        """What it was last seen to serve."""
        return self.description.models if self.description else ()

    def context_of(self, model: str) -> int | None:
        """Tell the tokens of one slot for a model; None if it is not known."""
        return next((m.context for m in self.models if m.name == model), None)

    @property
    def in_flight(self) -> int:
        return len(self.leases)

    @property
    def in_doubt(self) -> bool:
        """Whether it failed a check lately, and has not fallen yet."""
        return self.state is State.READY and self._bad > 0

    def serves(self, model: str) -> bool:
        return any(model == served.name for served in self.models)

    # --- What a request does ------------------------------------------------------

    def lease(self, model: str = "") -> Lease:
        """Take a place on this worker; whoever takes it gives it back, once.

        Where a breaker is half-open, the lease is its proof.
        """
        lease = Lease(self.name, self.clock, self._give_back)
        lease.model = model
        breakers = [self.breaker, self.model_breakers.get(model)]
        permits = [breaker.permit() for breaker in breakers if breaker is not None]
        lease.permits = tuple(permit for permit in permits if permit is not None)
        lease.generation = self.breaker.generation
        self.leases.add(lease)
        return lease

    def _give_back(self, lease: Lease, outcome: Outcome) -> None:
        beside = len(self.leases)
        self.leases.discard(lease)
        verdict = self._judge(lease, outcome, beside)
        for permit in lease.permits:
            permit.settle(_proof(verdict, outcome))
        self.breaker.record(verdict, lease.generation)
        if outcome in (Outcome.WORKER_FAILED, Outcome.SLOW):
            self._bad += 1
            self._good = 0
        if outcome in SUSPICIOUS:
            self.suspect()

    def _judge(self, lease: Lease, outcome: Outcome, beside: int) -> Verdict:
        """Say what an attempt has shown about this worker."""
        match outcome:
            case Outcome.COMPLETE:
                pace = self.pace_of(lease.model)
                slow = pace.is_slow(lease.tokens, lease.seconds, beside)
                pace.learn(
                    lease.prompt_bytes,
                    lease.first_token,
                    lease.tokens,
                    lease.seconds,
                    beside,
                )
                return Verdict.SLOW if slow else Verdict.SUCCESS
            case Outcome.SLOW:
                if not lease.first_token:
                    self.pace_of(lease.model).missed()
                return Verdict.HUNG
            case Outcome.WORKER_FAILED:
                return Verdict.FAILURE
            case Outcome.CLIENT_GONE:
                # Whoever leaves after a hang has left because of it.
                waited = self.clock() - lease.taken_at
                hung = not lease.first_token and waited > lease.allowance
                return Verdict.HUNG if hung else Verdict.NEUTRAL
            case Outcome.BUSY | Outcome.REFUSED | Outcome.ERRED | Outcome.HUB_STOPPED:
                return Verdict.NEUTRAL
            case _:
                assert_never(outcome)

    def suspect(self) -> None:
        """Have the pinger look at once."""
        if self.on_suspicion is not None:
            self.on_suspicion()

    def heard_since(self, moment: float) -> bool:
        """Tell whether any running answer had a byte since then."""
        return any(lease.heard_at >= moment for lease in self.leases)

    # --- What the pinger sees -----------------------------------------------------

    def observe(
        self, check: Check, reason: str, description: Description | None = None
    ) -> None:
        """Take the result of one ping; `description` is what it learnt, if anything."""
        now = self.clock()
        self.checked_at = now
        if description is not None:
            self.description = description
        if check is Check.FAILED and self.heard_since(now - self.health.timeout):
            # Bursts starve llama-server's HTTP threads, and /health with them, while
            # tokens flow.  Who talks is alive.
            return
        event = self._count(check)
        if event is not None:
            self._step(event, reason)

    def _count(self, check: Check) -> Event | None:
        match check:
            case Check.OK:
                self._good, self._bad = self._good + 1, 0
                needed = self.health.rise if self.state is State.DOWN else 1
                return Event.ROSE if self._good >= needed else None
            case Check.LOADING:
                self._good = self._bad = 0
                return Event.LOADING
            case Check.FAILED | Check.REFUSED:
                self._good, self._bad = 0, self._bad + 1
                needed = self.health.fall if self.state is State.READY else 1
                return Event.FELL if self._bad >= needed else None
            case _:
                assert_never(check)

    def _step(self, event: Event, reason: str) -> None:
        before, self.state = self.state, TRANSITIONS[self.state, event]
        self.reason = reason
        if self.state is State.READY and before in (State.DOWN, State.LOADING):
            for breaker in (self.breaker, *self.model_breakers.values()):
                breaker.renew()
        if self.state is not before:
            level = logging.WARNING if self.state is State.DOWN else logging.INFO
            logger.log(
                level,
                "worker %s: %s -> %s (%s)",
                self.name,
                before.value,
                self.state.value,
                reason,
            )


def _proof(verdict: Verdict, outcome: Outcome) -> bool | None:
    """Say what a request has proved that was let in to prove a worker."""
    if outcome is Outcome.ERRED:
        return False
    if verdict is Verdict.NEUTRAL:
        return None
    return verdict is Verdict.SUCCESS
