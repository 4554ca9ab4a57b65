"""What a request would get now: which worker, why none of the others, or which place.

It is decided by the functions that decide on real requests, in a dry run: the plan's
candidates, the admission queue's order and the policy of the model.  So a request that
followed at once would get what is explained here.  An operator's question is read as a
real request would be.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import msgspec

from gollama_proxy.control.history import Shown
from gollama_proxy.control.views import Parts, policy_name
from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Hold, WorkerState
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.body import Body
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.scheduling.admission import Admission, Place
from gollama_proxy.scheduling.balancer import Balancer, RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.wire.errors import Code, ProxyError, RequestError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web

# --- The decision -----------------------------------------------------------------


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


class Question(msgspec.Struct, forbid_unknown_fields=True):
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

    def __init__(self, question: Question) -> None:
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
    question: Question, hub: Parts, request: web.BaseRequest, subject: str
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


async def _foresee(x: Exchange, question: Question, hub: Parts) -> Shown:
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
