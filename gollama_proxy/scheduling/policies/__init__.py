"""Routing policies: how a worker is picked from those that fit."""

from __future__ import annotations

import random
from collections.abc import Callable

from gollama_proxy.scheduling.policies.affinity import Affinity
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy
from gollama_proxy.scheduling.policies.load import (
    Fastest,
    LeastBusy,
    RoundRobin,
    Weighted,
)

__all__ = [
    "Affinity",
    "Ask",
    "Fastest",
    "Fits",
    "LeastBusy",
    "Policy",
    "RoundRobin",
    "Weighted",
    "make",
]


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
