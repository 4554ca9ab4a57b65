"""Chooses the worker for each attempt, by the routing policy of its model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from gollama_proxy.config.names import matches
from gollama_proxy.config.settings import Config
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.speed import Prefill
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.budget import RetryBudget
from gollama_proxy.scheduling.policies import Policy, make
from gollama_proxy.scheduling.retry import Attempts


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
        self._retry = config.retry
        self._rescue = config.rescue
        self._rng = rng or random.Random()
        routing = config.routing
        names = {routing.policy, *routing.policies.values()}
        made = {name: make(name, clock, self._rng) for name in names}
        self.policy: Policy = made[routing.policy]  # of models without another one
        self._policies = {
            pattern: made[name] for pattern, name in routing.policies.items()
        }

    def __repr__(self) -> str:
        return f"<Balancer {self.policy!r}>"

    def policy_of(self, model: str) -> Policy:
        """Return the policy that picks the workers of a model.

        Models with the same policy share the object, which tells them apart by name.
        """
        for pattern, policy in self._policies.items():
            if matches(model, (pattern,)):
                return policy
        return self.policy

    def follows(self, pool: Pool) -> bool:
        """Return whether the choice depends on the conversation of a request."""
        return len(pool.workers) > 1 and self.policy_of(pool.model).follows

    def attempts(
        self,
        pool: Pool,
        path: str,
        fallbacks: Sequence[str] = (),
        allowed: Sequence[str] | None = None,
    ) -> Attempts:
        """Start the attempts of a request on this path.

        The client's own `fallbacks`, if there are any, replace the configured ones of
        the model.  Fallbacks that its token does not allow are skipped.
        """
        registry = self.registry
        wanted = fallbacks or registry.fallbacks_of(pool.model)
        models = dict.fromkeys(
            model
            for name in wanted
            for model in [registry.model_of(name)]
            if registry.allows(allowed, name, model)
        )
        pools = [registry.pool(model) for model in models if model != pool.model]
        return Attempts(
            [pool, *pools],
            self._retry,
            self.budget,
            self._rng,
            continuations=self._rescue.attempts if self._rescue.enabled else 0,
            once=path in self._retry.once,
        )

    def candidates(self, attempts: Attempts) -> list[Worker]:
        """List the workers that may have the next attempt of a request.

        Raises:
            NoWorkerError: 503 with `retry_after`; the text counts the workers' states.
        """
        asked_for = attempts.pool
        candidates = attempts.candidates()
        if not candidates:
            raise self.registry.no_worker(
                asked_for.model, asked_for.workers, asked_for.reopens_in()
            )
        return candidates

    def pick(
        self, attempts: Attempts, candidates: Sequence[Worker], patience: float = 0.0
    ) -> Worker | None:
        """Pick one of the candidates for the next attempt of a request.

        A worker that has just recovered leaves most of its turns to the others.  None
        if the request should wait for a worker that is no candidate yet, which it may
        do for `patience` seconds.
        """
        model, workers = attempts.pool
        if len(workers) == 1:
            return candidates[0]
        policy, ask = self.policy_of(model), attempts.ask
        if patience and ask.prefixes:
            ask = ask._replace(patience=patience)
        left = set(candidates)
        while True:
            worker = policy.pick(ask, workers, left.__contains__)
            if worker is None or len(left) == 1 or worker.breaker.turn():
                return worker
            left.discard(worker)

    def choose(self, attempts: Attempts) -> Worker:
        """Pick an available worker, however busy it is.

        Raises:
            NoWorkerError: as `candidates` does.
        """
        worker = self.pick(attempts, self.candidates(attempts))
        assert worker is not None, self  # without patience there is always one
        return worker

    def learn(self, attempts: Attempts, worker: Worker, prefill: Prefill) -> None:
        """Record how a worker has read the prompt of a request that it answered."""
        if prefill.possible:
            policy = self.policy_of(attempts.pool.model)
            total = prefill.tokens + prefill.cached
            policy.learn(attempts.ask, worker, prefill.cached, total)
