"""Chooses the worker for each attempt, by the routing policy of its model.

**Retries** help while few requests fail.  When many do, they are load that comes at the
worst moment: three attempts each turn an overload into three overloads.  So retries are
paid for by requests.  At every withdrawal, within the last `window` seconds,

    retries  <=  ratio x requests + floor

as in Finagle's RetryBudget and in chapter 21 of Google's SRE book ("Handling
Overload"), which allow a fifth and a tenth.  The floor is for quiet hubs: a tenth of
four requests is nothing, and a single lost answer should still be tried again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec.structs import replace

from gollama_proxy.bounded import BoundedDict, SlidingWindow
from gollama_proxy.config.settings import Config, Routing
from gollama_proxy.config.values import matches
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.affinity import Affinity
from gollama_proxy.scheduling.policies import (
    Ask,
    Fastest,
    LeastBusy,
    Policy,
    RoundRobin,
    Turn,
    Weighted,
)
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.errors import NoWorkerError


class Plan(Protocol):
    """The attempts that a request may still make, as scheduling sees them."""

    @property
    def pool(self) -> Pool:
        """The pool that the next attempt is made on."""

    @property
    def pools(self) -> Sequence[Pool]:
        """The current pool, and those that may follow it."""

    @property
    def ask(self) -> Ask:
        """What the policies know of the request."""

    def candidates(self) -> list[Worker]:
        """Return the workers that may have the next attempt; `pool` may change."""

    def can_wait(self, seconds: float) -> bool:
        """Return whether a worker may become available within so many seconds."""

    def awaits(self, worker: Worker) -> bool:
        """Return whether a worker that is out gets the request if it comes back."""

    def reopens_in(self) -> float:
        """Return the seconds until the next busy or open breaker reopens, or inf."""


class Balancer:
    """The routing policies of all models.  `clock` returns monotonic seconds."""

    def __init__(
        self,
        registry: Registry,
        config: Config,
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self.registry = registry
        self.budget = RetryBudget(config.retry.ratio, config.retry.floor, clock=clock)
        self._clock = clock
        self._rng = rng or random.Random()
        self._made: dict[str, Policy] = {}
        self.key = b""  # of the hashes of conversations, if other hubs have the same
        self.turns: dict[int, Turn] = {}  # for the other hubs
        self._adopt(config.routing)

    def __repr__(self) -> str:
        return f"<Balancer {self.policy!r}>"

    def reconfigure(self, config: Config) -> None:
        """Take other settings; a policy that stays in use keeps what it has learnt."""
        self.budget.ratio, self.budget.floor = config.retry.ratio, config.retry.floor
        self._adopt(config.routing)

    def _adopt(self, routing: Routing) -> None:
        names = {routing.policy, *routing.policies.values()}
        self._made = {
            name: self._made.get(name) or make(name, self._clock, self._rng)
            for name in names
        }
        if self.key:
            self.share(self.key)
        self.policy = self._made[routing.policy]  # of models without another one
        self._policies = {
            pattern: self._made[name] for pattern, name in routing.policies.items()
        }
        self._chosen = BoundedDict[str, str | None]()  # patterns, by model

    def policy_of(self, model: str) -> Policy:
        """Return the policy that picks the workers of a model.

        Models with the same policy share the object, which distinguishes them by name.
        """
        if not self._policies:
            return self.policy
        if model not in self._chosen:
            patterns = (each for each in self._policies if matches(model, (each,)))
            self._chosen[model] = next(patterns, None)
        pattern = self._chosen[model]
        return self.policy if pattern is None else self._policies[pattern]

    def follows(self, pool: Pool) -> bool:
        """Return whether the choice depends on the conversation of a request."""
        return len(pool.workers) > 1 and self.policy_of(pool.model).follows

    def share(self, key: bytes) -> None:
        """Follow conversations together with other hubs, which have the same key."""
        self.key = key
        for policy in self._made.values():
            policy.share(key, self.turns)

    def note(self, turn: Turn) -> None:
        """Record a turn that another hub has sent to a worker."""
        self.policy_of(turn.model).note(turn)

    def pick(
        self,
        plan: Plan,
        candidates: Sequence[Worker],
        patience: float = 0.0,
        *,
        dry: bool = False,
    ) -> Worker | None:
        """Pick one of the candidates for the next attempt of a request.

        A worker that has just recovered leaves most of its turns to the others.  None
        if the request should wait for a worker that is no candidate yet, which it may
        do for `patience` seconds.  In a `dry` run it is only found out, and the next
        request is not affected.
        """
        model, workers = plan.pool.model, plan.pool.workers
        if len(workers) == 1:
            return candidates[0]
        policy, ask = self.policy_of(model), plan.ask
        if patience and ask.prefixes:
            ask = replace(ask, patience=patience)
        if dry:
            policy = policy.twin(ask)
        left = set(candidates)
        while True:
            worker = policy.pick(ask, workers, left.__contains__)
            if worker is None or len(left) == 1 or worker.breaker.turn(dry=dry):
                return worker
            left.discard(worker)

    def no_worker(self, plan: Plan, note: str = "") -> NoWorkerError:
        """Make the error of a plan for which no worker is available.

        It counts the workers' states, and `retry_after` is when the first may be back.
        """
        pool = plan.pool
        reopens_in = pool.reopens_in()
        return self.registry.no_worker(pool.model, pool.workers, reopens_in, note)

    def learn(self, plan: Plan, worker: Worker, prefill: Prefill) -> None:
        """Record how a worker has read the prompt of a request that it answered."""
        if prefill.possible:
            policy = self.policy_of(plan.pool.model)
            total = prefill.tokens + prefill.cached
            policy.learn(plan.ask, worker, prefill.cached, total)


# --- The retry budget -------------------------------------------------------------


class RetryBudget:
    """Lets a retry pass while the recent requests pay for it."""

    __slots__ = ("_requests", "_retries", "deposit", "floor", "ratio")

    def __init__(
        self,
        ratio: float = 0.1,
        floor: int = 3,
        window: float = 10.0,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.ratio = ratio
        self.floor = floor
        self._requests = SlidingWindow(window, clock)
        # Counts a request; once for each, whatever its number of attempts.
        self.deposit: Callable[[], None] = self._requests.add
        self._retries = SlidingWindow(window, clock)

    def __repr__(self) -> str:
        spent, requests = self._retries.count, self._requests.count
        return f"<RetryBudget {spent} of {self._allowed:g} spent, {requests} requests>"

    def withdraw(self) -> bool:
        """Ask for one retry, which is spent if the answer is True."""
        if not self.suffices:
            return False
        self._retries.add()
        return True

    @property
    def suffices(self) -> bool:
        """Whether a retry would be allowed now."""
        return self._retries.count + 1 <= self._allowed

    @property
    def _allowed(self) -> float:
        return self.ratio * self._requests.count + self.floor


def make(name: str, clock: Callable[[], float], rng: random.Random) -> Policy:
    """Make the policy of this name, one of `settings.POLICIES`.

    `clock` returns monotonic seconds.
    """
    match name:
        case "round_robin":
            return RoundRobin()
        case "weighted":
            return Weighted()
        case "least_busy":
            return LeastBusy(rng)
        case "fastest":
            return Fastest(rng)
        case "affinity":
            return Affinity(Fastest(rng), clock)
        case _:
            raise ValueError(name)
