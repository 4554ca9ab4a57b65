"""The emptiest worker, in proportion to its slots."""

from __future__ import annotations

import random
from collections import Counter
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import Ask, LeastBusy
from tests.fakes.pool import MODEL, has_room, occupy, pool

ASK = Ask(MODEL)


def policy(seed: int = 1) -> LeastBusy:
    return LeastBusy(random.Random(seed))


def fill(made: LeastBusy, workers: tuple[Worker, ...], count: int) -> list[int]:
    """Have so many requests come and stay; tell who got them."""
    picked = []
    for _ in range(count):
        chosen = made.pick(ASK, workers, has_room)
        assert chosen is not None
        occupy(chosen)
        picked.append(chosen.index)
    return picked


def test_the_part_of_the_slots_counts_and_not_their_number() -> None:
    workers = pool(2, 8)
    occupy(workers[0], 1)
    occupy(workers[1], 3)
    assert policy().pick(ASK, workers, has_room) is workers[1]


def test_of_two_that_are_half_full_the_smaller_one_does_less() -> None:
    workers = pool(8, 2)
    occupy(workers[0], 4)
    occupy(workers[1], 1)
    assert policy().pick(ASK, workers, has_room) is workers[1]


def test_equals_have_their_turns() -> None:
    made, workers = policy(), pool(4, 4, 4)
    picked = [made.pick(ASK, workers, has_room) for _ in range(7)]
    assert [w.index for w in picked if w] == [0, 1, 2, 0, 1, 2, 0]


def test_a_pool_fills_evenly() -> None:
    workers = pool(1, 2, 4, 8)
    made = policy()
    fill(made, workers, 15)
    assert [w.free for w in workers] == [0, 0, 0, 0]
    assert made.pick(ASK, workers, has_room) is None


def test_who_does_not_tell_its_slots_is_taken_for_a_usual_one() -> None:
    workers = pool(None, 4)
    assert fill(policy(), workers, 8) == [0, 1] * 4
    assert fill(policy(), workers, 2) == [0, 0]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=30),
    st.integers(),
)
@settings(deadline=None)
def test_who_does_not_fit_is_never_picked(
    machines: list[tuple[int, int]], seed: int
) -> None:
    workers = pool(*[slots for slots, _ in machines])
    for worker, (slots, taken) in zip(workers, machines, strict=True):
        occupy(worker, min(slots, taken))
    chosen = policy(seed).pick(ASK, workers, has_room)
    assert (chosen is not None) == any(map(has_room, workers))
    assert chosen is None or has_room(chosen)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=8))
def test_of_a_small_pool_it_is_the_emptiest(taken: list[int]) -> None:
    workers = pool(*[8] * len(taken))
    for worker, count in zip(workers, taken, strict=True):
        occupy(worker, count)
    chosen = policy().pick(ASK, workers, has_room)
    if chosen is None:
        assert min(taken) == 8
    else:
        assert chosen.in_flight == min(taken)


def test_of_a_large_one_the_better_of_two_is_nearly_as_good() -> None:
    """Machines of unequal size are equally full; by lot alone they are not."""
    workers = pool(*[4, 8, 16] * 100)
    fill(policy(), workers, 1400)  # half of the slots
    full = [w.in_flight / (w.slots or 1) for w in workers]
    for kind in range(3):
        assert fmean(full[kind::3]) == pytest.approx(0.5, abs=0.07)
        assert pstdev(w.in_flight for w in workers[kind::3]) < 1.5
    alone = random.Random(1).choices(range(300), weights=[4, 8, 16] * 100, k=1400)
    by_lot = [Counter(alone)[i] / (w.slots or 1) for i, w in enumerate(workers)]
    assert max(by_lot) > 1.2 > max(full)


def test_it_tells_whose_turn_was_the_last() -> None:
    made, workers = policy(), pool(4, 4)
    made.pick(ASK, workers, has_room)
    assert repr(made) == "<LeastBusy <Candidates last={'qwen': 0}>>"
