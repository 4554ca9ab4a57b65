"""One worker: its health, the models that it serves, and its running requests."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, assert_never
from weakref import WeakSet

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Breaker as Policy
from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.fleet.breaker import Breaker, Verdict
from gollama_proxy.fleet.lease import Lease, Result, proof_of
from gollama_proxy.fleet.speed import Expectations, Pace
from gollama_proxy.fleet.state import (
    OUT,
    TRANSITIONS,
    Hold,
    Offer,
    Source,
    WorkerEvent,
    WorkerState,
)
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.description import Check, Description
from gollama_proxy.wire.headers import AnswerHead

if TYPE_CHECKING:
    from gollama_proxy.fleet.pool import Pool

logger = logging.getLogger(__name__)

# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_COMPLETE: Final = Result.COMPLETE
_NEUTRAL: Final = Verdict.NEUTRAL

SETTLING = 15.0  # seconds that a machine may take to fall asleep
SPARE = 3  # threads of a llama-server in addition to one for each slot
MOST_SLOTS = 10_000  # that a worker may report, or be configured with

# Results of an attempt after which the worker is checked at once.
SUSPICIOUS = frozenset({Result.WORKER_FAILED, Result.SLOW, Result.BUSY})


class LastError(NamedTuple):
    """How the last attempt failed that the worker is to blame for."""

    at: float  # monotonic seconds
    code: str
    detail: str  # for operators; without text of users


@dataclass(slots=True, eq=False)
class Worker(Offer):
    """The live record of one worker.  `clock` returns monotonic seconds."""

    health: Health
    clock: Callable[[], float]
    index: int = 0  # its place among the workers
    source: Source = Source.FILE
    name: str = field(init=False)
    state: WorkerState = WorkerState.STARTING
    reason: str = "not reached yet"
    port: int = 0  # at which it was found, if its URL has none; 0: not found yet
    slots: int | None = field(init=False)  # None: unknown, so there is no limit
    weight: float = field(init=False)  # its share of the requests
    leases: set[Lease] = field(default_factory=set)
    policy: Policy = field(default_factory=Policy)
    expectations: Expectations = field(default_factory=Expectations)
    rng: random.Random = field(default_factory=random.Random)
    breaker: Breaker = field(init=False)
    # By model: how fast it is, and the breaker for bad statuses, which are held against
    # the worker and the model together.
    paces: dict[str, Pace] = field(default_factory=BoundedDict)
    model_breakers: dict[str, Breaker] = field(default_factory=BoundedDict)
    # Called when it should be checked at once; when its state, breakers, hold or models
    # have changed; when a slot may be free; when its models or their contexts have
    # changed; when the last request of a retired one has ended.
    on_suspicion: Callable[[], None] | None = None
    on_change: Callable[[], None] | None = None
    on_free: Callable[[], None] | None = None
    on_offer: Callable[[], None] | None = None
    on_gone: Callable[[], None] | None = None
    overcommit: int = 0  # requests beyond its slots
    # The pools that it is in; a request may hold one for longer than the registry does.
    pools: WeakSet[Pool] = field(default_factory=WeakSet)
    retired: bool = False  # it was removed, and takes no new request
    held: Hold = Hold.NONE
    since: float = field(init=False)  # when it entered its state, in monotonic seconds
    deadline: float = math.inf  # when its running requests are broken off
    last_error: LastError | None = None
    answer_head: AnswerHead | None = None  # of its last answer
    _good: int = 0
    _bad: int = 0
    used_at: float = field(init=False)  # when its last request ended
    _settled_at: float = -math.inf  # when a machine that goes to sleep has done so
    _odd_slots: int | None = None
    _odd_timings: bool = False
    _odd_build: str = ""
    # Where hubs share it: the slots that this one may use, whether the others use all
    # the rest, and what is called for each slot that comes free, if that goes to them.
    share: int | None = None  # None: it is not shared
    scarce: bool = True
    on_yield: Callable[[Worker], None] | None = None
    peak: int = 0  # most slots taken at once since this was last set
    full: bool = False  # every slot is taken
    short: bool = False  # the same of this hub's share, and the others may have more
    _taken: int = 0  # slots
    _limit: float = math.inf  # of those that may be taken
    _room: float = math.inf  # the same for all hubs
    _full_since: float | None = None
    _seen: tuple[object, ...] = ()  # what `on_change` was last called for

    def __post_init__(self) -> None:
        self.since = self.used_at = self.clock()
        self.breaker = self._new_breaker(self.config.name)
        self._seen = self._looks
        self._adopt(self.config)

    def _adopt(self, config: WorkerConfig) -> None:
        self.config, self.name = config, config.name
        self.weight = config.weight or config.vram_gib or 1.0
        described = self.description.slots if self.description else None
        self.slots = config.slots or self._believed(described)
        self._note_room()

    def _new_breaker(self, name: str) -> Breaker:
        return Breaker(name, self.policy, self.clock, self.rng, self.changed)

    def __repr__(self) -> str:
        return (
            f"<Worker {self.name} {self.state.name} in_flight={self.in_flight} "
            f"good={self._good} bad={self._bad}>"
        )

    @property
    def url(self) -> str:
        """Its URL, with the port at which it was found if it is configured without."""
        if not self.port:
            return self.config.url
        return self.config.origin._replace(port=self.port).url

    @property
    def is_down(self) -> bool:
        """Whether it answers nothing, for whatever reason."""
        return self.state in OUT

    @property
    def sleeps(self) -> bool:
        """Whether its machine can be woken for a request, or is being woken."""
        awaited = self.state in (WorkerState.ASLEEP, WorkerState.WAKING)
        return awaited and self.takes_requests

    @property
    def available(self) -> bool:
        return self._in_service and self.breaker.available

    @property
    def admits(self) -> bool:
        """Whether it takes requests, if only as the proof of a half-open breaker."""
        return self._in_service and self.breaker.admits

    @property
    def _in_service(self) -> bool:
        return self.state is WorkerState.READY and self.takes_requests

    @property
    def takes_requests(self) -> bool:
        """Whether new requests are wanted on it, if it is well."""
        return not self.retired and self.held is Hold.NONE

    def can_serve(self, model: str) -> bool:
        """Whether a request for this model may be sent now."""
        breaker = self.model_breakers.get(model)
        return self.admits and (breaker is None or breaker.admits)

    def is_busy_with(self, model: str) -> bool:
        """Return whether it is only busy: it asked for a pause with this model.

        A worker that is out, or whose breaker is open, is more than busy.
        """
        sound = all(breaker.closed for breaker in self.breakers(model))
        return self._in_service and sound and self.opens_in(model) > 0

    def opens_in(self, model: str) -> float:
        """Return the seconds for which it certainly takes no request for this model."""
        return max(breaker.opens_in() for breaker in self.breakers(model))

    def next_change(self, model: str) -> float:
        """Return the moment at which time alone changes `can_serve`; inf if never."""
        return min(breaker.next_change() for breaker in self.breakers(model))

    def changed(self) -> None:
        """Have its pools look again: whether it can serve may have changed."""
        for pool in self.pools:
            pool.forget()
        if self.on_change is not None and (looks := self._looks) != self._seen:
            self._seen = looks
            self.on_change()

    @property
    def _looks(self) -> tuple[object, ...]:
        """What an observer sees of it; a breaker's generation counts its steps."""
        return (
            self.state,
            self.held,
            self.breaker.generation,
            {name: each.generation for name, each in self.model_breakers.items()},
            self.description,
            frozenset(self._unloaded),
        )

    def breakers(self, model: str) -> list[Breaker]:
        """Return the breakers that a request for this model has to pass."""
        of_model = self.model_breakers.get(model)
        return [self.breaker] if of_model is None else [self.breaker, of_model]

    def breaker_of(self, model: str) -> Breaker:
        """Return the breaker for one model on this worker; made if there is none."""
        if model not in self.model_breakers:
            self.model_breakers[model] = self._new_breaker(f"{self.name} {model}")
            self.changed()  # the oldest one may have been dropped, and it may be open
        return self.model_breakers[model]

    def pace_of(self, model: str) -> Pace:
        """Return the speed of one model on this worker; unknown if there is none."""
        pace = self.paces.get(model)
        if pace is None:
            pace = self.paces[model] = Pace(self.clock, self.expectations)
        return pace

    @property
    def some_model(self) -> str | None:
        """The name of a model for a canary; None if none is known.

        Rather one that was used: any other may have to be loaded first, in place of it.
        """
        seen = self.description.models if self.description else ()
        names = [model.name for model in (*self.models, *seen)]
        used = (name for name in reversed(self.paces) if name in names)
        loaded = (n for n in chain(used, names) if n not in self._unloaded)
        return next(chain(loaded, names, self.paces), None)

    @property
    def in_flight(self) -> int:
        return len(self.leases)

    @property
    def running(self) -> int:
        """The slots that its requests take; `in_flight` counts all requests."""
        return self._taken

    @property
    def room(self) -> int | None:
        """How many requests it can take at once, from all hubs; None if unknown."""
        return None if self.slots is None else self.slots + self.overcommit

    @property
    def free(self) -> float:
        """How many more requests it can take; below 0 if it has too many.

        Infinite if the number of slots is unknown.
        """
        return self._limit - self._taken

    def surplus(self) -> int:
        """Return how many more requests it has than threads, if that is above 0.

        llama-server has four threads more than slots (`--threads-http`), of which one
        is left for health checks.
        """
        return 0 if self.slots is None else len(self.leases) - self.slots - SPARE

    @property
    def full_for(self) -> float:
        """The seconds for which every slot has been taken without a break."""
        if self._full_since is None or self.free > 0:
            return 0.0
        return self.clock() - self._full_since

    def is_cold(self, model: str) -> bool:
        """Return whether a request for this model would start loading it."""
        return model in self._unloaded and model not in self.loading

    @property
    def loading(self) -> set[str]:
        """The models that it loads, or has a request for that makes it load them."""
        if not self._unloaded:
            return set()
        listed = self.description.models if self.description else ()
        begun = {each.name for each in listed if each.loading}
        begun.update(lease.model for lease in self.leases)
        return begun & self._unloaded

    def note_progress(self, model: str, share: float | None) -> None:
        """Record how much of a model is loaded; None if it is loading no longer."""
        if share is not None and model in self._unloaded:
            self.progress[model] = share
        elif share is None and self.progress.pop(model, None) is not None:
            self.suspect()

    def has_answered(self, lease: Lease) -> None:
        """Record that an answer has begun, or was refused: its model is loaded by now.

        Another one may have been unloaded for it, so the worker is checked.
        """
        if lease.loads:
            self._unloaded.discard(lease.model)
            self.progress.pop(lease.model, None)
            self.changed()
            self.suspect()

    @property
    def unread(self) -> int:
        """Bytes of the prompts whose answers have not begun."""
        unread = 0  # a loop is fastest, and every choice reads this
        for lease in self.leases:
            if not lease.first_token:
                unread += lease.prompt_bytes
        return unread

    @property
    def in_doubt(self) -> bool:
        """Whether it is ready, and has failed its last check."""
        return self.state is WorkerState.READY and self._bad > 0

    def see_build(self, build: str) -> None:
        """Check the worker, once, if an answer names another build than before."""
        known = self.description.build if self.description else ""
        if build and known and build not in (known, self._odd_build):
            self._odd_build = build
            self.suspect()

    # --- What a request does ------------------------------------------------------

    def lease(self, model: str = "", *, slot: bool = True) -> Lease:
        """Take a place on this worker; the caller releases the lease.

        If a breaker is half-open, the lease is its proof.
        """
        lease = Lease(self, model, slot=slot)
        breaker, of_model = self.breaker, self.model_breakers.get(model)
        if not (breaker.closed and (of_model is None or of_model.closed)):
            permits = [each.permit() for each in self.breakers(model)]
            lease.permits = tuple(permit for permit in permits if permit is not None)
        lease.generation = breaker.generation
        lease.loads = model in self._unloaded
        self.leases.add(lease)
        self._taken += slot
        if self._taken > self.peak:
            self.peak = self._taken
        if self._taken >= self._limit:
            self.short = not self.scarce and self._taken < self._room
            self.full = not self.short
            if self.full and self._full_since is None:
                self._full_since = lease.taken_at
        return lease

    def allot(self, share: int | None, *, scarce: bool = True) -> None:
        """Limit it to this hub's share of its slots; None is no limit.

        Unless the rest is `scarce`, it is not full then: the hub may get more.
        """
        self.share, self.scarce = share, scarce
        self._note_room()

    def _note_room(self) -> None:
        room = self.room
        self._room = self._limit = math.inf if room is None else room
        if self.share is not None and room is not None:
            self._limit = min(room, self.share)
        taken = self._taken
        self.short = self._limit <= taken < self._room and not self.scarce
        self.full = taken >= self._limit and not self.short
        if not self.full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = self.clock()

    def take_back(self, lease: Lease, result: Result) -> None:
        """Free what a lease held; `Lease.release` calls this once."""
        leases = self.leases
        beside = len(leases)
        clock = self.clock  # a local is cheaper to call
        self.used_at = lease.released_at = clock()
        leases.discard(lease)
        if lease.slot:
            self._taken -= 1
            if self.on_yield is not None:
                self.on_yield(self)
            if self._taken < self._limit:
                self.full = self.short = False
        verdict = lease.judge(result, beside)
        if lease.permits:
            for permit in lease.permits:
                permit.settle(proof_of(verdict, result))
        if verdict is not _NEUTRAL:
            self.breaker.record(verdict, lease.generation)
        if result is not _COMPLETE:
            self._take_notice(lease, result)
        if self.on_free is not None:
            self.on_free()
        if self._full_since is not None:
            self._note_room()  # a slot that is taken again at once was never free
        if self.on_gone is not None and not leases:
            self.on_gone()

    def _take_notice(self, lease: Lease, result: Result) -> None:
        if result in (Result.WORKER_FAILED, Result.SLOW):
            self._bad += 1
            self._good = 0
        if result in SUSPICIOUS:
            self.suspect()
        if result is Result.REFUSED:
            self.has_answered(lease)

    def doubt(self, reported: Prefill) -> None:
        """Warn, once, of a report about the reading of a prompt that cannot be true."""
        if not self._odd_timings:
            self._odd_timings = True
            logger.warning(
                "worker %s: reports %s tokens read in %s s, and %s from its cache",
                self.name,
                reported.tokens,
                reported.seconds,
                reported.cached,
            )

    def suspect(self) -> None:
        """Have the worker checked at once."""
        if self.on_suspicion is not None:
            self.on_suspicion()

    def freed(self) -> None:
        """Have its slots handed out: there may be a free one, or it may be back."""
        if self.on_free is not None:
            self.on_free()

    def heard_since(self, moment: float) -> bool:
        """Return whether any running answer has had a byte since then."""
        return any(lease.heard_at >= moment for lease in self.leases)

    # --- Its place in the fleet ---------------------------------------------------

    def reconfigure(self, config: WorkerConfig) -> None:
        """Take other settings for the same server; what was learnt about it stays."""
        self._adopt(config)
        self.breaker.name = self.name
        for model, breaker in self.model_breakers.items():
            breaker.name = f"{self.name} {model}"
        self._note_room()
        self.changed()

    def follow(
        self, health: Health, policy: Policy, expectations: Expectations, extra: int
    ) -> None:
        """Take other settings of the hub; `extra` requests are allowed beyond slots."""
        self.health, self.policy, self.overcommit = health, policy, extra
        for breaker in (self.breaker, *self.model_breakers.values()):
            breaker.follow(policy)
        self.expectations = expectations
        for pace in self.paces.values():
            pace.expectations = expectations
        self._note_room()
        self.changed()

    def retire(self, deadline: float = math.inf) -> None:
        """Take no new request; those that still run at the deadline are broken off."""
        self.retired = True
        self.deadline = min(deadline, self.deadline)
        self.changed()

    def rejoin(self) -> None:
        """Take requests again: it was removed, and has been added again.

        A worker that was gone has to be reached first, as if it was new.
        """
        self.retired, self.on_gone = False, None
        self.held, self.deadline = Hold.NONE, math.inf
        self.changed()

    def depart(self) -> None:
        """Forget what may change while it is gone; what was learnt about it stays."""
        self.state, self.reason = WorkerState.STARTING, "not reached yet"
        self.since = self.clock()
        self.description = None
        self._good = self._bad = 0
        self._unloaded = set()
        self._adopt(self.config)

    def reset_breakers(self) -> None:
        """Close its breakers at once, for all of its models."""
        for breaker in (self.breaker, *self.model_breakers.values()):
            breaker.reset()
        self.freed()

    def hold(self, hold: Hold, deadline: float = math.inf) -> None:
        """Take no new request until this is called with `Hold.NONE`.

        Requests that still run at the deadline, in monotonic seconds, are broken off.
        """
        self.held, self.deadline = hold, deadline
        self.changed()

    # --- Health checks ------------------------------------------------------------

    def found_at(self, port: int) -> None:
        """Record the port at which a worker without one in its URL has answered."""
        if port and port != self.port:
            self.port = port
            logger.info("worker %s: found at port %d", self.name, port)

    def observe(
        self, check: Check, reason: str, description: Description | None = None
    ) -> None:
        """Record the result of a health check, and the description if it has one."""
        now = self.clock()
        if description is not None:
            changed = self.describe(description)
            self.slots = self.config.slots or self._believed(description.slots)
            self._note_room()
            self.changed()
            if changed and self.on_offer is not None:
                self.on_offer()
        if check is Check.FAILED and self.heard_since(now - self.health.timeout):
            # Bursts can occupy all of llama-server's HTTP threads, so that /health gets
            # no answer while tokens flow.  A worker that sends tokens is alive.
            return
        if self.state is WorkerState.ASLEEP and now < self._settled_at:
            return  # it still answers, but not for long
        event = self._count(check)
        if event is not None:
            self._step(event, reason)
        self.freed()

    def slept(self) -> None:
        """Record that its machine goes to sleep, as its agent reports."""
        self._settled_at = self.clock() + SETTLING
        self._step(WorkerEvent.SLEPT, "its machine has gone to sleep")

    def stays_awake(self) -> None:
        """Record that its machine is awake, whatever was reported before."""
        self._settled_at = -math.inf
        self.suspect()

    def woken(self) -> None:
        """Record that its machine is being woken; it has to be asleep."""
        self._settled_at = -math.inf
        self._step(WorkerEvent.WOKEN, "its machine is being woken")
        self.suspect()

    def given_up(self, reason: str) -> None:
        """Record that its machine did not wake."""
        self._step(WorkerEvent.GIVEN_UP, reason)

    def learn_context(self, model: str, tokens: int) -> None:
        """Record the context of a model as a refusal reports it; 0 is unknown."""
        known = self.context_of(model)
        if tokens and known in (None, self._contexts.get(model)) and known != tokens:
            self._contexts[model] = tokens
            self.changed()
            if self.on_offer is not None:
                self.on_offer()

    def _believed(self, slots: int | None) -> int | None:
        """Return a number of slots that can be true; warn about any other, once."""
        if slots is None or 1 <= slots <= MOST_SLOTS:
            return slots
        if slots != self._odd_slots:
            self._odd_slots = slots
            logger.warning("worker %s: reports %d slots", self.name, slots)
        return None

    def _count(self, check: Check) -> WorkerEvent | None:
        match check:
            case Check.OK:
                self._good, self._bad = self._good + 1, 0
                needed = self.health.rise if self.state is WorkerState.DOWN else 1
                return WorkerEvent.ROSE if self._good >= needed else None
            case Check.LOADING:
                self._good = self._bad = 0
                return WorkerEvent.LOADING
            case Check.FAILED | Check.REFUSED:
                self._good, self._bad = 0, self._bad + 1
                needed = self.health.fall if self.state is WorkerState.READY else 1
                if self._bad < needed:
                    return None
                asleep = self.config.mac and check is Check.FAILED
                return WorkerEvent.SLEPT if asleep else WorkerEvent.FELL
            case _:
                assert_never(check)

    def _step(self, event: WorkerEvent, reason: str) -> None:
        before, self.state = self.state, TRANSITIONS[self.state, event]
        if self.state is not WorkerState.WAKING or before is not self.state:
            self.reason = reason
        if self.state is not before:
            self.since = self.clock()
        self.changed()
        if self.state is WorkerState.READY and before in (
            *OUT,
            WorkerState.LOADING,
        ):
            self.forget_answers()
            for breaker in (self.breaker, *self.model_breakers.values()):
                breaker.renew()
        if self.state is not before:
            level = logging.WARNING if self.state is WorkerState.DOWN else logging.INFO
            logger.log(
                level,
                "worker %s: %s -> %s (%s)",
                self.name,
                before.value,
                self.state.value,
                reason,
            )
