"""A registry without servers, and the balancer in front of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from gollama_proxy.config.settings import (
    Breaker,
    Config,
    Health,
    Models,
    Origin,
    Rescue,
    Retry,
    Routing,
    WorkerConfig,
)
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock


def registry(*workers: str | None, clock: Clock | None = None, **more: Any) -> Registry:
    """Make the registry of a `balancer`."""
    return balancer(*workers, clock=clock, **more).registry


def balancer(
    *workers: str | None,
    clock: Clock | None = None,
    retry: Retry | None = None,
    rescue: Rescue | None = None,
    breaker: Breaker | None = None,
    stated: Sequence[str] = (),
    slots: int | None = None,
    routing: Routing | None = None,
    **models: Any,
) -> Balancer:
    """Make one with workers `w0`, `w1` and so on that serve these models.

    "a b" is a worker that serves two; None one that was not reached yet.  The models of
    the first are `stated` by hand.  Each has so many `slots`; None is no limit.
    """
    clock = clock or Clock()
    configs = tuple(
        WorkerConfig(
            f"http://10.0.0.{index}:8080",
            Origin("http", f"10.0.0.{index}", 8080, ""),
            f"w{index}",
            models=() if index else tuple(stated),
        )
        for index in range(len(workers))
    )
    config = Config(
        workers=configs,
        models=Models(**models),
        health=Health(fall=1),
        retry=retry or Retry(),
        rescue=rescue or Rescue(),
        breaker=breaker or Breaker(jitter=0.0),
        routing=routing or Routing(),
    )
    made = Registry(config, clock)
    for worker, served in zip(made.workers, workers, strict=True):
        if served is not None:
            found = Description(
                tuple(Model(name) for name in served.split()), slots=slots
            )
            worker.observe(Check.OK, "ok", found)
    balancer = Balancer(made, config, clock)
    _configs[balancer] = config
    return balancer


_configs = WeakKeyDictionary[Balancer, Config]()


def plan(
    balancer: Balancer,
    pool: Pool,
    fallbacks: Sequence[str] = (),
    allowed: Sequence[str] | None = None,
    path: str = CHAT,
) -> Plan:
    """Plan a request as the path of a request does."""
    config = _configs.get(balancer) or Config()
    pools = balancer.registry.pools_for(pool, fallbacks, allowed)
    return Plan(pools, path, config, balancer.budget, random.Random(7), Ask(pool.model))


def take_out(*workers: Worker, check: Check = Check.FAILED) -> None:
    for worker in workers:
        worker.observe(check, "by the test")
        assert not worker.available


def trip(*workers: Worker) -> None:
    for worker in workers:
        for _ in range(worker.policy.consecutive):
            worker.breaker.record(Verdict.FAILURE)
        assert not worker.available
