"""All workers of a small pool are compared, and a few of a large one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import (
    DRAWS,
    PICKS,
    SMALL,
    TICKETS,
    Ask,
    Shortlist,
)
from tests.fakes.pool import among, indexes, pool

# --- Shortlists -----------------------------------------------------------------------


ASK = Ask("qwen")


def slots(worker: Worker, model: str) -> float | None:
    assert model == "qwen"
    return worker.slots


def shortlist(seed: int = 1) -> Shortlist:
    return Shortlist(slots, random.Random(seed))


def everyone(worker: Worker) -> bool:
    return True


# --- Small pools ------------------------------------------------------------------


@given(st.integers(0, SMALL), st.sets(st.integers(0, SMALL - 1)))
def test_of_a_small_pool_all_that_fit_are_compared(size: int, fit: set[int]) -> None:
    workers = pool(*[4] * size)
    found = shortlist().of(ASK, workers, lambda w: w.index in fit)
    assert set(indexes(found)) == {index for index in fit if index < size}


def test_the_first_one_was_not_chosen_for_longest() -> None:
    made, workers = shortlist(), pool(4, 4, 4, 4)
    assert indexes(made.of(ASK, workers, everyone)) == [0, 1, 2, 3]
    made.chose(ASK, workers[1])
    assert indexes(made.of(ASK, workers, everyone)) == [2, 3, 0, 1]
    made.chose(ASK, workers[3])
    assert indexes(made.of(ASK, workers, everyone)) == [0, 1, 2, 3]
    assert repr(made) == "<Shortlist last=<BoundedDict 1 of 1000>>"


# --- Large pools ------------------------------------------------------------------


def test_of_a_large_pool_two_are_compared_and_not_twice_the_same() -> None:
    made, workers = shortlist(), pool(*[4] * (SMALL + 1))
    for _ in range(500):
        first, second = made.of(ASK, workers, everyone)
        assert first is not second


def test_each_is_drawn_for_what_it_can_carry() -> None:
    made, workers = shortlist(), pool(*[16] * 10, *[4] * 10)
    count: Counter[int] = Counter()
    for _ in range(3000):
        count.update(w.slots or 0 for w in made.of(ASK, workers, everyone))
    assert count[16] / count[4] == pytest.approx(4, rel=0.15)


def test_an_unknown_worker_is_drawn_like_the_average() -> None:
    made, workers = shortlist(), pool(*[None] * 10, *[8] * 5, *[16] * 5)
    count: Counter[int | None] = Counter()
    for _ in range(3000):
        count.update(w.slots for w in made.of(ASK, workers, everyone))
    assert count[None] == pytest.approx(3000, rel=0.1)


def test_even_the_weakest_is_drawn_now_and_then() -> None:
    made, workers = shortlist(), pool(*[10_000] * 20, 1)
    drawn = [made.of(ASK, workers, everyone) for _ in range(3000)]
    assert sum(workers[-1] in some for some in drawn) > 5


def test_where_nothing_is_known_all_are_drawn_alike() -> None:
    made, workers = shortlist(), pool(*[None] * 20)
    count = Counter(
        w.index for _ in range(2000) for w in made.of(ASK, workers, everyone)
    )
    assert min(count.values()) > 120


@given(st.sets(st.integers(0, 29)), st.integers())
@settings(deadline=None)
def test_workers_that_fit_are_found_and_no_others(fit: set[int], seed: int) -> None:
    made, workers = shortlist(seed), pool(*range(1, 31))
    for _ in range(5):
        found = made.of(ASK, workers, lambda w: w.index in fit)
        assert set(indexes(found)) <= fit
        assert bool(found) == bool(fit)
        assert len(set(found)) == len(found)


def test_where_the_strong_ones_are_full_the_weak_are_drawn_evenly() -> None:
    """They have next to no tickets, and are still not looked for one by one."""
    made, workers = shortlist(), pool(*[10_000] * 20, *[1] * 20)
    most = 0
    for _ in range(200):
        asked: list[Worker] = []
        found = made.of(ASK, workers, lambda w, a=asked: a.append(w) or w.index >= 20)
        assert found
        most = max(most, len(asked))
    assert most <= 2 * DRAWS


def test_how_many_are_asked_does_not_depend_on_the_size_of_the_pool() -> None:
    made, workers = shortlist(), pool(*[4] * 1000)
    asked: list[Worker] = []
    for _ in range(1000):
        made.of(ASK, workers, lambda w: not asked.append(w))
    assert 2000 <= len(asked) <= 2010


def test_the_only_one_that_fits_is_found_among_many() -> None:
    made, workers = shortlist(), pool(*[4] * 200)
    found = made.of(ASK, workers, among(workers[123]))
    assert found == [workers[123]]


def test_what_workers_can_carry_is_looked_up_again_after_some_picks() -> None:
    looked: list[Worker] = []

    def capacity(worker: Worker, model: str) -> float:
        looked.append(worker)
        return 1.0

    made, workers = Shortlist(capacity, random.Random(1)), pool(*[4] * 50)
    for _ in range(PICKS * 50):
        made.of(ASK, workers, everyone)
    assert len(looked) == 50
    made.of(ASK, workers, everyone)
    assert len(looked) == 100
    made.of(ASK, workers[:20], everyone)
    assert len(looked) == 120


def test_each_model_has_its_own_lots_and_turns() -> None:
    made = Shortlist(lambda worker, model: 1.0, random.Random(1))
    workers, other = pool(4, 4), Ask("other")
    made.chose(other, workers[0])
    assert indexes(made.of(ASK, workers, everyone)) == [0, 1]
    assert indexes(made.of(other, workers, everyone)) == [1, 0]
    many = pool(*[4] * 50)
    made.of(ASK, many, everyone)
    assert made.of(other, many[:10], everyone)
    lots = made._lots
    assert repr(lots["qwen"]) == f"<Lots of 50 workers for {50 * PICKS - 1} picks>"
    assert len(lots["other"].tickets) == 10 * TICKETS
