"""Measure what a changing fleet costs: workers that come and go, and picks beside them.

    python -m benchmarks.churn

No servers are involved: the numbers are those of the hub's own decisions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

from gollama_proxy.config.settings import Config, Origin, WorkerConfig
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.wire.description import Check, Description, Model

FEW, MANY = 3, 1000
MODEL = "tiny"
PICKS = 10_000
RUNS = 5  # of which the fastest counts: others had disturbances


def worker(number: int) -> WorkerConfig:
    host = f"10.0.{number // 250}.{1 + number % 250}"
    origin = Origin("http", host, 8080, "")
    return WorkerConfig(origin.url, origin, f"w{number}", slots=4)


def add(registry: Registry, *numbers: int) -> None:
    """Add workers that serve the model."""
    found = Description((Model(MODEL),))
    for number in numbers:
        registry.add(worker(number)).observe(Check.OK, "ok", found)


def remove(registry: Registry, *numbers: int) -> None:
    for number in numbers:
        registry.remove(f"w{number}")


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure() -> dict[str, float]:
    """Return microseconds of each step, by what it is."""
    config = Config()
    registry = Registry(config)
    balancer = Balancer(registry, config, time.monotonic)
    add(registry, *range(FEW))
    pool = registry.pool(MODEL)
    rng, path = random.Random(1), "/v1/chat/completions"
    plan = Plan((pool,), path, config, balancer.budget, rng, Ask(MODEL))

    def pick() -> float:
        def picks() -> None:
            for _ in range(PICKS):
                balancer.pick(plan, plan.candidates())

        return min(seconds(picks) for _ in range(RUNS)) / PICKS * 1e6

    many = range(FEW, FEW + MANY)
    found = {"a pick of 3 workers": pick()}
    found["adding one of 1000"] = seconds(lambda: add(registry, *many)) / MANY * 1e6
    found["a pick of 1003 workers"] = pick()
    found["removing one"] = seconds(lambda: remove(registry, *many)) / MANY * 1e6
    found["a pick of 3, after that"] = pick()
    workers = tuple(worker(number) for number in range(FEW + MANY))
    apply = replace(config, workers=workers).workers
    found["applying 1000 new ones, each"] = (
        seconds(lambda: registry.apply(apply)) / MANY * 1e6
    )
    return found


def main() -> None:
    for what, microseconds in measure().items():
        print(f"{what:<30} {microseconds:8.2f} µs")


if __name__ == "__main__":
    main()
