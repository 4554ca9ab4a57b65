"""The effects of the policies in a small simulation of three unequal workers."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.simulate import POLICIES, POOL, SMALL
from benchmarks.simulation import Result, simulate


@cache
def busy(name: str) -> Result:
    """Let twelve clients ask three workers with eight slots, without a pause."""
    return simulate(POLICIES[name], SMALL, 1000, 1.0, seed=1, clients=12)


@cache
def idle(name: str) -> Result:
    """Send so few requests that there are always free slots."""
    return simulate(POLICIES[name], SMALL, 1000, 0.3, seed=1)


def test_the_same_seed_gives_the_same_figures() -> None:
    again = simulate(POLICIES["affinity_fastest"], POOL, 500, 0.8, seed=3)
    once = simulate(POLICIES["affinity_fastest"], POOL, 500, 0.8, seed=3)
    once.pick = again.pick
    assert again == once


def test_by_expected_time_the_first_token_comes_soonest() -> None:
    p95 = {name: idle(name).first_token[94] for name in POLICIES}
    assert p95["fastest"] < 0.6 * min(p95["round_robin"], p95["weighted"])
    assert p95["affinity_fastest"] < 1.05 * p95["fastest"]


@pytest.mark.parametrize("inner", ["least_busy", "fastest"])
def test_with_affinity_turns_find_their_prompts(inner: str) -> None:
    assert idle(f"affinity_{inner}").cached > 0.85
    assert idle("round_robin").cached < 0.7


def test_affinity_needs_patience_when_all_workers_are_busy() -> None:
    patient, plain = busy("affinity_patient"), busy("fastest")
    assert patient.cached > 0.8 > plain.cached + 0.1
    assert patient.throughput > 1.03 * plain.throughput
    assert patient.first_token[94] < plain.first_token[94]


def test_one_queue_in_front_of_the_workers_is_better_than_one_in_each() -> None:
    line = busy("affinity_patient").first_token[94]
    assert line < 0.5 * busy("least_conn").first_token[94]
