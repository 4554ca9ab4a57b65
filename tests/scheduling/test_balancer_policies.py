"""Every name that can be set makes its policy, and every policy does the same job."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from gollama_proxy.config.settings import POLICIES
from gollama_proxy.scheduling.affinity import Affinity
from gollama_proxy.scheduling.balancer import make
from gollama_proxy.scheduling.policies import (
    Ask,
    Fastest,
    LeastBusy,
    Policy,
    RoundRobin,
    Weighted,
    place_behind,
)
from tests.fakes.clock import Clock
from tests.fakes.pool import MODEL, pool, worker

KINDS = {
    "round_robin": RoundRobin,
    "weighted": Weighted,
    "least_busy": LeastBusy,
    "fastest": Fastest,
    "affinity": Affinity,
}


def made(name: str) -> Policy:
    return make(name, Clock(), random.Random(1))


def test_each_name_is_a_policy() -> None:
    assert {name: type(made(name)) for name in POLICIES} == KINDS


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="magic"):
        made("magic")


@pytest.mark.parametrize("name", POLICIES)
def test_of_idle_equals_each_has_its_part(name: str) -> None:
    policy, workers = made(name), pool(4, 4, 4)
    picked = Counter(
        policy.pick(Ask(MODEL, 100), workers, lambda w: True) for _ in range(30)
    )
    assert picked == dict.fromkeys(workers, 10)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_single_one_that_fits_is_found(name: str, size: int) -> None:
    policy, workers = made(name), pool(*[4] * size)
    for wanted in workers:
        ask = Ask(MODEL, 100, prefixes=(1, 2))
        assert policy.pick(ask, workers, lambda w, one=wanted: w is one) is wanted
    assert policy.pick(Ask(MODEL), workers, lambda w: False) is None
    assert policy.pick(Ask(MODEL), (), lambda w: True) is None


def test_the_place_behind_another() -> None:
    workers = [worker(index) for index in (2, 3, 7)]
    places = [place_behind(workers, index) for index in (-1, 0, 2, 3, 6, 7, 9)]
    assert places == [0, 0, 1, 2, 2, 0, 0]
    assert place_behind((), 3) == 0
