"""What a request would get now: which worker, why none of the others, or which place.

It is decided by the functions that decide on real requests, in a dry run: the plan's
candidates, the admission queue's order and the policy of the model.  So a request that
followed at once would get what is explained here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Hold, WorkerState
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling.admission import Admission, Place
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.turns import Priority

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
    free = [worker for worker in candidates if worker.free > 0]
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
    if case.needs_slot and worker.free <= 0:
        text = f"All of its slots are taken ({worker.in_flight} requests)."
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
