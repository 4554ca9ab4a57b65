"""What the admin API shows of a hub: plain values, made when they are asked for.

No prompt, no answer and no secret is in any of them.

What a request would get is decided by the functions that decide on real requests, in a
dry run: the plan's candidates, the admission queue's order and the policy of the model.
So a request that followed at once would get what is explained here.  An operator's
question is read as a real request would be.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import msgspec

from gollama_proxy.config.settings import settings
from gollama_proxy.config.values import masked
from gollama_proxy.control import Parts
from gollama_proxy.control.history import RunningSample, Shown, shown_steps
from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Hold, Source, WorkerState
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.body import Body
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.scheduling.admission import Admission, Place
from gollama_proxy.scheduling.balancer import Balancer, RetryBudget
from gollama_proxy.scheduling.policies import Ask, Policy
from gollama_proxy.scheduling.turns import Priority, TicketState
from gollama_proxy.wire.errors import Code, ProxyError, RequestError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web


class Views:
    """Looks at a hub, and changes nothing."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub

    def __repr__(self) -> str:
        return f"<Views of {self._hub!r}>"

    # --- Workers ------------------------------------------------------------------

    def worker(self, worker: Worker) -> Shown:
        """Show the state of a worker; its models have the breakers that they have."""
        described, error = worker.description, worker.last_error
        agent = self._agent(worker)
        reason = worker.reason
        if agent and (helpers := agent.get("waiting_for")) and worker.is_down:
            reason = f"its server waits for helpers: {', '.join(helpers)}"
        return {
            "name": worker.name,
            "url": worker.url,
            "source": worker.source,
            "state": worker.state.value,
            "since": self._ago(worker.since),
            "reason": reason,
            "hold": worker.held,
            "breaker": self._breaker(worker.breaker),
            "weight": worker.weight,
            "slots": worker.slots,
            "running": worker.in_flight,
            "models": [
                {
                    "name": model.name,
                    "context": worker.context_of(model.name),
                    "loaded": worker.has_loaded(model.name),
                    "progress": worker.progress.get(model.name),
                    "breaker": self._breaker(worker.breakers(model.name)[-1]),
                }
                for model in worker.models
            ],
            "context": worker.config.context or (described and described.context),
            "vram_gib": worker.config.vram_gib,
            "build": (described.build or None) if described else None,
            "speed": self._speed(worker),
            "agent": agent,
            "last_error": None
            if error is None
            else {
                "code": error.code,
                "detail": error.detail,
                "ago": self._ago(error.at),
            },
        }

    def _agent(self, worker: Worker) -> Shown | None:
        """Show what the agent of a worker, if any, has reported of its machine."""
        if worker.source is not Source.AGENT:
            return None
        lease = self._hub.agents.find(worker.name)
        return None if lease is None else lease.report

    def _breaker(self, breaker: Breaker) -> Shown:
        return {
            "state": breaker.state.value,
            "reason": breaker.reason,
            "since": self._ago(breaker.since) if breaker.generation else None,
            "opens_in": round(breaker.opens_in(), 3),
        }

    def _speed(self, worker: Worker) -> Shown:
        """Show how fast a worker is with the model that it had last."""
        model, pace = next(reversed(worker.paces.items()), ("", None))
        speed = None if pace is None else pace.speed
        writes = None if speed is None else speed.writes(max(worker.in_flight, 1))
        reads = None
        if speed is not None and speed.reads is not None:
            reads = self._hub.fitting.prompts.likely_tokens(model, int(speed.reads))
        first = pace.first_token if pace is not None else 0.0
        return {
            "tokens_per_second": writes and round(writes, 2),
            "prompt_tokens_per_second": reads,
            "first_token": round(first, 3) if first else None,
        }

    def models(self) -> list[Shown]:
        """Show each model, what leads to it, and the workers that serve it."""
        registry = self._hub.registry
        waiting = [x.asked for x in self._waiting()]
        leads: dict[str, list[str]] = {}
        for alias, model in registry.aliases().items():
            leads.setdefault(model, []).append(alias)
        return [
            {
                "name": name,
                "aliases": leads.get(name, []),
                "fallbacks": [
                    other.model for other in registry.pools_for(pool, (), None)[1:]
                ],
                "policy": policy_name(self._hub.balancer.policy_of(name)),
                "workers": [
                    {
                        "name": worker.name,
                        "usable": worker in pool.available,
                        "context": worker.context_of(name),
                        "loaded": worker.has_loaded(name),
                    }
                    for worker in pool.workers
                ],
                "waiting": waiting.count(name),
            }
            for name in registry.models()
            for pool in [registry.pool(name)]
        ]

    # --- Requests -----------------------------------------------------------------

    def exchanges(self) -> list[Shown]:
        """Show the requests in flight, the oldest first."""
        return [self.exchange(x) for x in in_flight(self._hub.proxy.running)]

    def exchange(self, x: Exchange) -> Shown:
        """Show a request that has not ended."""
        body = x.body_so_far
        return {
            "id": x.id,
            "subject": x.subject,
            "model": x.model,
            "worker": x.worker,
            "route": x.route,
            "state": x.state.name.lower(),
            "age": self._ago(x.started),
            "tokens": tokens_of(x),
            "attempts": x.attempts,
            "stream": body is not None and body.stream,
            "class": x.priority,
            "trace": "" if x.trace is None else x.trace.trace_id,
            "steps": shown_steps(x.steps),
        }

    def queue(self) -> list[Shown]:
        """Show the requests that wait, by model, in the order of their turns."""
        shown = [self.waiting(x) for x in self._waiting()]
        return sorted(shown, key=lambda each: (each["model"], each["position"] or 0))

    def waiting(self, x: Exchange) -> Shown:
        """Show a request that waits for a slot, or for a worker to come back."""
        ticket, place, since = x.ticket, None, x.started
        if ticket is not None and ticket.state is TicketState.WAITING:
            place, since = self._hub.queue.admission.place(ticket), ticket.joined_at
        eta = None if place is None or place.eta is None else round(place.eta, 3)
        return {
            "id": x.id,
            "subject": x.subject,
            "model": x.plan.pool.model,
            "class": x.priority,
            "position": None if place is None else place.position,
            "waited": self._ago(since),
            "expected": eta,
        }

    def _waiting(self) -> Iterator[Exchange]:
        return (
            x
            for x in in_flight(self._hub.proxy.running)
            # A plan is made before it is queued.
            if x.state is State.QUEUED
        )

    @property
    def fleet(self) -> Sequence[Worker]:
        return self._hub.registry.workers

    def sampled(self) -> tuple[list[RunningSample], int, Sequence[Worker]]:
        """Return what a sample is taken of: requests, how many wait, and workers."""
        hub = self._hub
        running = [
            RunningSample(
                x.id, x.started, x.route, x.worker, x.first_byte, tokens_of(x)
            )
            for x in in_flight(hub.proxy.running)
        ]
        return running, hub.queue.admission.waiting, self.fleet

    # --- Settings -----------------------------------------------------------------

    def settings(self) -> Shown:
        """Show the settings in force, and where each is from."""
        config = self._hub.config
        rows = []
        for row in settings():
            section, _, name = row.key.partition(".")
            given = config.given.get(row.key, "")
            source = "file" if given else "default"
            if given == row.env:
                source = "environment"
            elif given.startswith("--") or given == "flag":
                source = "flag"
            value = masked(getattr(getattr(config, section), name))
            rows.append(
                {"key": row.key, "value": value, "source": source, "from": given}
            )
        return {"file": config.file, "settings": rows}

    def _ago(self, moment: float) -> float:
        return round(max(0.0, self._hub.clock() - moment), 3)


def in_flight(running: Collection[Exchange]) -> Iterable[Exchange]:
    """Return those of the running requests that are for workers, the oldest first."""
    # A copy: a request may end while they are looked at.
    return [x for x in running if x.route in ENDPOINTS]


def tokens_of(x: Exchange) -> int:
    """Return the tokens that were generated for a request so far.

    Those of earlier attempts are added up; those of the present one are events.
    """
    relay = x.relay if x.state is State.STREAMING else None
    return x.tokens + (0 if relay is None else relay.events)


def policy_name(policy: Policy) -> str:
    """Return the name that a policy has in the settings."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(policy).__name__).lower()


# --- What a request would get -----------------------------------------------------


class Case(NamedTuple):
    """A request, as far as scheduling is concerned."""

    plan: Plan
    pools: Sequence[Pool]  # of its model and of the fallbacks
    subject: str
    priority: Priority = Priority.INTERACTIVE
    max_concurrency: int = 0  # requests of the subject that may run at once; 0: any
    needs_slot: bool = True


class Decision(NamedTuple):
    """What a request would get: a worker, a place in the queue, or neither."""

    # chosen, queued, wakes, waits_for_worker, no_worker or queue_full
    code: str
    reason: str
    worker: Worker | None = None
    place: Place | None = None


def decide(
    case: Case,
    balancer: Balancer,
    admission: Admission,
    waker: Waker,
    patience: float,
) -> Decision:
    """Return what a request would get; only its own plan may change.

    `patience` is for how many seconds it would wait if no worker is available
    (`retry.patience`).
    """
    plan = case.plan
    candidates = plan.candidates()
    model = plan.pool.model
    if not candidates:
        sleepers = (waker.would_wake(pool, plan.awaits) for pool in plan.pools)
        sleeper = next(filter(None, sleepers), None)
        if sleeper is not None and case.needs_slot:
            text = f"It would wait until the machine of {sleeper.name!r} is awake."
            return _queued(case, admission, text, "wakes")
        note = waker.refusal(plan.pool.workers)
        text = balancer.no_worker(plan, note).message
        if plan.can_wait(patience):
            return Decision("waits_for_worker", f"{text} It would wait for one.")
        return Decision("no_worker", text)
    if not case.needs_slot:
        worker = balancer.pick(plan, candidates, dry=True)
        return _chosen(worker, "Its requests need no slot.")
    free = [worker for worker in candidates if not worker.full]
    if not free:
        return _queued(case, admission, "No slot is free.")
    running, limit = admission.running(case.subject), case.max_concurrency
    if not admission.would_admit(case.subject, model, case.priority, limit):
        text = "Other requests wait already."
        if 0 < limit <= running:
            text = (
                f"The subject has {running} requests running; "
                f"{limit} may run at once (max_concurrency)."
            )
        return _queued(case, admission, text)
    longest = admission.patience if admission.has_room else 0.0
    worker = balancer.pick(plan, free, longest, dry=True)
    if worker is None:
        text = "It would wait for the worker that has its conversation cached."
        return _queued(case, admission, text)
    return _chosen(worker, "A slot is free.")


def _chosen(worker: Worker | None, reason: str) -> Decision:
    assert worker is not None  # only a request with patience may get none
    return Decision("chosen", reason, worker)


def _queued(
    case: Case, admission: Admission, reason: str, code: str = "queued"
) -> Decision:
    if not admission.would_join(case.subject, case.priority):
        text = f"{reason} The queue is full ({admission.settings.size}, queue.size)."
        return Decision("queue_full", text)
    place = admission.outlook(case.plan.pool.model, case.priority)
    return Decision(code, reason, place=place)


# --- The workers ------------------------------------------------------------------


class Reason(NamedTuple):
    """Why a worker would not get the request."""

    worker: Worker
    code: str
    text: str


def other_workers(
    case: Case, decision: Decision, registry: Registry, policy: str
) -> list[Reason]:
    """Return why each worker but the chosen one would not get the request."""
    others = (each for each in registry.workers if each is not decision.worker)
    return [_why_not(worker, case, decision, policy) for worker in others]


def _why_not(worker: Worker, case: Case, decision: Decision, policy: str) -> Reason:
    plan = case.plan
    pool = next((each for each in case.pools if worker in each.workers), None)
    if pool is None:
        name = case.pools[0].model
        return Reason(worker, "not_serving", f"It does not serve {name!r}.")
    model = pool.model
    if worker.held is not Hold.NONE:
        return Reason(worker, worker.held.value, f"It is {worker.held.value}.")
    if worker.state is not WorkerState.READY:
        text = f"It is {worker.state.value}: {worker.reason}."
        return Reason(worker, worker.state.value, text)
    if not worker.can_serve(model):
        return _why_shut(worker, model)
    if worker not in plan.fitting(pool):
        context, needed = worker.context_of(model), plan.needs.get(model, 0)
        text = f"Its context of {context} tokens is too small for the prompt"
        text += f" of {needed}." if needed else "."
        return Reason(worker, "context_too_small", text)
    if pool is not plan.pool:
        text = f"It serves {model!r}, which is a fallback."
        return Reason(worker, "fallback", text)
    if worker not in plan.candidates():
        text = f"It would have to load {model!r}, which others have loaded."
        return Reason(worker, "must_load", text)
    if case.needs_slot and worker.full:
        text = f"All of its slots are taken ({worker.in_flight} requests)."
        if worker.share is not None:
            text = f"All of its slots are taken ({worker.in_flight} by this hub)."
        return Reason(worker, "full", text)
    if decision.worker is None:
        return Reason(worker, "waits", decision.reason)
    text = f"The policy {policy} prefers {decision.worker.name!r} now."
    return Reason(worker, "not_chosen", text)


def _why_shut(worker: Worker, model: str) -> Reason:
    shut = [breaker for breaker in worker.breakers(model) if not breaker.closed]
    if not shut:
        seconds = math.ceil(worker.opens_in(model))
        return Reason(worker, "busy", f"It asked for a pause; {seconds} s are left.")
    breaker: Breaker = shut[0]
    state, seconds = breaker.state.value, math.ceil(breaker.opens_in())
    text = f"Its breaker is {state} ({breaker.reason})"
    text += f"; {seconds} s are left." if seconds else "."
    return Reason(worker, f"breaker_{state.replace('-', '_')}", text)


# --- A question -------------------------------------------------------------------


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A request to explain."""

    model: str = ""
    subject: str = ""
    path: str = "/v1/chat/completions"
    prompt: str = ""
    request: dict[str, msgspec.Raw] | None = None
    priority: Priority = Priority.INTERACTIVE
    models: tuple[str, ...] | None = None
    max_concurrency: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0

    def body(self) -> bytes:
        """Return the body of the request; of a given one, no byte inside changes."""
        fields: dict[str, Any] = {"model": self.model} if self.model else {}
        if self.request is None:
            message = {"role": "user", "content": self.prompt}
            chat = self.path.endswith(("/chat/completions", "/messages"))
            fields |= {"messages": [message]} if chat else {"prompt": self.prompt}
        else:
            fields |= self.request
        return msgspec.json.encode(fields)


class _Given:
    """A request that was never sent, as far as `Body` reads one."""

    def __init__(self, question: ExplainRequest) -> None:
        self._body = question.body()
        self.content_length = len(self._body)
        self.headers: Mapping[str, str] = {}
        self.content = self

    def __repr__(self) -> str:
        return f"<Given {self.content_length} bytes>"

    def is_eof(self) -> bool:
        return True

    def at_eof(self) -> bool:
        return True

    def read_nowait(self) -> bytes:
        return self._body


async def explain(
    question: ExplainRequest, hub: Parts, request: web.BaseRequest, subject: str
) -> Shown:
    """Return what a request would get; a worker may count a long prompt for it.

    `subject` asks, and is that of the request if the question names none.

    Raises:
        RequestError: 400, the question has no answer.
    """
    x = Exchange(request, hub.clock())
    endpoint = ENDPOINTS.get(question.path)
    if endpoint is None or endpoint.form:
        text = f"path = {question.path[:60]!r}: must be a path that takes JSON."
        raise RequestError(Code.INVALID_VALUE, text, param="path")
    x.endpoint, x.needs_slot = endpoint, endpoint.slot
    x.subject = question.subject or subject
    x.priority = question.priority
    x.body = Body(cast("web.BaseRequest", _Given(question)), endpoint, hub.config)
    try:
        return await _foresee(x, question, hub)
    except ProxyError as error:
        return _without_worker(error)


async def _foresee(x: Exchange, question: ExplainRequest, hub: Parts) -> Shown:
    """Treat a request as a real one, up to the choice of a worker.

    Raises:
        ProxyError: the request would be refused.
    """
    config, body = hub.config, x.body
    registry, balancer = hub.registry, hub.balancer
    await body.read(config.limits.replay_window)
    pool = registry.resolve(body.model, question.models)
    x.model = x.asked = pool.model
    pools = registry.pools_for(pool, body.fallbacks, question.models)
    budget = RetryBudget(config.retry.ratio, config.retry.floor, clock=hub.clock)
    follows = x.endpoint.slot and balancer.follows(pool)
    prefixes = body.prefixes(balancer.key) if follows else ()
    ask = Ask(pool.model, body.size, body.max_tokens, x.subject, prefixes)
    x.plan = Plan(pools, x.endpoint.path, config, budget, random.Random(), ask)
    if not hub.fitting.is_certain(x):
        await hub.fitting.check(x)
    limit = question.max_concurrency or config.queue.max_concurrency
    case = Case(x.plan, pools, x.subject, x.priority, limit, x.needs_slot)
    admission = hub.queue.admission
    decision = decide(case, balancer, admission, hub.waker, config.retry.patience)
    model, place = x.plan.pool.model, decision.place
    policy = policy_name(balancer.policy_of(model))
    tokens, counted = hub.fitting.estimate(x), bool(x.plan.needs.get(model))
    largest = x.plan.pool.largest_context or None
    answer = body.max_tokens * body.answers * body.prompts
    generates = x.endpoint.generates
    return {
        "model": model,
        "worker": decision.worker.name if decision.worker is not None else None,
        "code": decision.code,
        "reason": decision.reason,
        "policy": policy,
        "others": [
            {"worker": worker.name, "code": code, "reason": text}
            for worker, code, text in other_workers(case, decision, registry, policy)
        ],
        "context": {
            "fits": None if largest is None else bool(x.plan.fitting(x.plan.pool)),
            "prompt_tokens": tokens,
            "counted": counted,
            "largest": largest,
        },
        "queue": place
        and {
            "position": place.position,
            "waiting": place.waiting,
            "expected": place.eta,
        },
        "charge": {
            "requests": 1,
            "prompt_tokens": tokens if generates else 0,
            "most_tokens": tokens + answer if answer and generates else None,
        },
    }


def _without_worker(error: ProxyError) -> Shown:
    """Explain a request that would be refused before any worker is looked at."""
    return {
        "model": "",
        "worker": None,
        "code": error.code,
        "reason": error.message,
        "policy": "",
        "others": [],
        "context": {
            "fits": False if error.code is Code.CONTEXT_LENGTH else None,
            "prompt_tokens": error.fields.get("n_prompt_tokens", 0),
            "counted": "n_prompt_tokens" in error.fields,
            "largest": error.fields.get("n_ctx"),
        },
        "queue": None,
        "charge": {"requests": 1, "prompt_tokens": 0, "most_tokens": None},
    }
