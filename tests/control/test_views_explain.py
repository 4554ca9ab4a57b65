"""An explanation agrees with what then happens, and changes nothing."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from gollama_proxy.config.settings import POLICIES, Retry, Routing, Wake
from gollama_proxy.config.settings import Queue as Settings
from gollama_proxy.control.views import Case, Decision, decide, other_workers
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.speed import Prefill
from gollama_proxy.fleet.state import Hold
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import NoWorkerError
from tests.fakes.clock import Clock
from tests.fakes.registry import balancer, plan, take_out, trip
from tests.scheduling.test_queue import Request

PATIENCE = Retry().patience
MODELS = "a", "b"


class Fleet:
    """A random fleet, and the requests that it has."""

    def __init__(self, seed: int, policy: str) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        served = [
            self.rng.choice(["a", "b", "a b"])
            for _ in range(self.rng.choice([1, 2, 5, 12]))
        ]
        self.balancer: Balancer = balancer(
            *served,
            clock=self.clock,
            slots=self.rng.choice([1, 2, None]),
            routing=Routing(policy=policy),
            fallbacks={"a": ("b",)},
        )
        settings = Settings(size=self.rng.choice([0, 3, 256]))
        self.waker = Waker(Wake(), lambda worker: None, self.clock)
        self.queue = Queue(self.balancer, settings, self.clock, waker=self.waker)
        registry = self.balancer.registry
        registry.subscribe(self.waker)
        for worker in registry.workers[::3]:
            registry.replace(replace(worker.config, mac="02:00:00:00:00:01"))
        self.served: list[tuple[Request, Lease]] = []
        self.numbers = itertools.count()

    @property
    def workers(self) -> list[Worker]:
        return self.balancer.registry.workers

    def disturb(self) -> None:
        """Let something happen to the fleet."""
        worker = self.rng.choice(self.workers)
        match self.rng.randrange(12):
            case 0:
                take_out(worker)
            case 1:
                if worker.breaker.closed and worker.available:
                    trip(worker)
            case 2:
                worker.hold(self.rng.choice(list(Hold)))
            case 3:
                names = [model.name for model in worker.models]
                models = tuple(
                    Model(
                        name,
                        self.rng.choice([512, 4096, None]),
                        self.rng.choice([True, False, None]),
                    )
                    for name in names
                )
                worker.observe(Check.OK, "ok", Description(models, slots=worker.slots))
            case 4:
                worker.breaker_of("a").busy(3.0)
            case 5:
                worker.reset_breakers()
                worker.hold(Hold.NONE)
                worker.observe(Check.OK, "ok")
            case 6 | 7 | 8:
                self.clock.advance(self.rng.choice([0.1, 5.0, 20.0]))
            case _:
                self.rng.shuffle(self.served)
                for request, lease in self.served[:4]:
                    lease.prompt_bytes, lease.first_token = 4000, self.rng.random()
                    lease.seconds, lease.tokens = 1 + self.rng.random(), 30
                    lease.release(Result.COMPLETE)
                    self.queue.leave(request)
                del self.served[:4]

    def request(self) -> tuple[Request, Case]:
        """Make a request, and the same one to be explained."""
        rng = self.rng
        registry = self.balancer.registry
        pool = registry.pool(rng.choice(MODELS))
        subject = rng.choice(["ann", "bob", "cy"])
        talk = rng.randrange(4)
        ask = Ask(
            pool.model,
            rng.choice([100, 50_000]),
            rng.choice([0, 20]),
            subject,
            tuple(range(10 * talk, 10 * talk + rng.randrange(4))),
        )
        needs = {pool.model: rng.choice([100, 1000])} if rng.random() < 0.3 else {}
        priority = rng.choice(list(Priority))
        limit = rng.choice([0, 0, 2])
        slot = rng.random() < 0.9

        def planned() -> Plan:
            made = plan(self.balancer, pool)
            made.ask = ask
            made.needs = needs
            return made

        pools = registry.pools_for(pool, (), None)
        case = Case(planned(), pools, subject, priority, limit, slot)
        return Request(planned(), subject, priority, limit, slot), case

    def explain(self, case: Case) -> Decision:
        admission = self.queue.admission
        return decide(case, self.balancer, admission, self.waker, PATIENCE)

    def serve(self, request: Request) -> tuple[str, Worker | None]:
        """Do what is done for a real request; return what it got."""
        lease = self.queue.try_acquire(request)
        if lease is not None:
            self.served.append((request, lease))
            if request.plan.ask.prefixes:
                prefill = Prefill(10, 90, 0.1)
                self.balancer.learn(request.plan, lease.worker, prefill)
            return "chosen", lease.worker
        plan, code = request.plan, "queued"
        if not plan.candidates():
            woken = [self.waker.wake_for(pool, plan.awaits) for pool in plan.pools]
            if not (any(woken) and request.needs_slot):
                waits = plan.can_wait(PATIENCE)
                return ("waits_for_worker" if waits else "no_worker"), None
            code = "wakes"
        if request.holder is not None:
            self.queue.admission.release(request.holder)
        model = request.plan.pool.model
        try:
            self.queue.admission.join(
                request.subject, model, request.priority, request.max_concurrency
            )
        except NoWorkerError:
            return "queue_full", None
        return code, None


@pytest.mark.parametrize("policy", POLICIES)
def test_it_agrees_with_what_then_happens(policy: str) -> None:
    """For 1,000 random requests to each policy, in 20 random fleets."""
    seen: Counter[str] = Counter()
    for seed in range(20):
        fleet = Fleet(seed, policy)
        fleet.queue.admission.on_displaced = None
        for _ in range(50):
            fleet.disturb()
            request, case = fleet.request()
            # Twice: explaining it changes nothing, not even what is explained next.
            decision = fleet.explain(case)
            again = fleet.explain(case)
            assert again == decision
            others = other_workers(case, decision, fleet.balancer.registry, policy)
            assert len(others) + (decision.worker is not None) == len(fleet.workers)
            code, worker = fleet.serve(request)
            assert (decision.code, decision.worker) == (code, worker), (seed, fleet)
            seen[code] += 1
            seen.update({each.code for each in others})
    assert {"chosen", "queued", "no_worker", "queue_full"} <= seen.keys()
    assert {"down", "paused", "full", "not_chosen", "context_too_small"} <= seen.keys()
    assert {"not_serving", "breaker_open", "must_load", "fallback"} <= seen.keys()
    assert {"asleep", "wakes", "waking"} <= seen.keys()
