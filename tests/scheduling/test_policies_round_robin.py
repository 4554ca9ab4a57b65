"""Each worker in turn, for each model, also while others come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.scheduling.policies import Ask, Policy, RoundRobin
from tests.fakes.pool import worker

WORKERS = tuple(worker(index) for index in range(6))


def turns(
    policy: Policy, count: int, *indexes: int, model: str = "qwen"
) -> Sequence[int]:
    """Ask so many times, while these workers fit; tell who was picked."""
    picked = []
    for _ in range(count):
        chosen = policy.pick(Ask(model), WORKERS, lambda w: w.index in indexes)
        assert chosen is not None
        picked.append(chosen.index)
    return picked


def test_each_has_its_turn_in_the_configured_order() -> None:
    assert turns(RoundRobin(), 7, 0, 1, 2) == [0, 1, 2, 0, 1, 2, 0]


def test_one_worker_gets_all() -> None:
    assert turns(RoundRobin(), 3, 4) == [4, 4, 4]


@given(st.sets(st.integers(0, 5), min_size=1), st.integers(1, 5))
@settings(deadline=None)
def test_the_shares_are_even(indexes: set[int], rounds: int) -> None:
    shares = Counter(turns(RoundRobin(), rounds * len(indexes), *indexes))
    assert shares == dict.fromkeys(indexes, rounds)


def test_each_model_has_its_own_round() -> None:
    """A busy model must not take the turns of another."""
    policy = RoundRobin()
    assert turns(policy, 1, 0, 1, model="a") == [0]
    assert turns(policy, 1, 0, 1, model="b") == [0]
    assert turns(policy, 3, 0, 1, model="a") == [1, 0, 1]
    assert turns(policy, 1, 0, 1, model="b") == [1]


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
def test_when_one_drops_out_the_others_keep_their_order(before: int, gone: int) -> None:
    policy = RoundRobin()
    turns(policy, before, 0, 1, 2, 3)
    left = [index for index in range(4) if index != gone]
    due = [(before + step) % 4 for step in range(4)]
    expected = [index for index in due if index != gone]
    assert turns(policy, 3, *left) == expected
    assert turns(policy, 3, *left) == expected


def test_one_that_comes_back_has_its_turn_at_its_place() -> None:
    policy = RoundRobin()
    assert turns(policy, 2, 0, 1, 2) == [0, 1]
    assert turns(policy, 2, 0, 1) == [0, 1]
    assert turns(policy, 4, 0, 1, 2) == [2, 0, 1, 2]


def test_the_last_one_may_drop_out_behind_its_turn() -> None:
    policy = RoundRobin()
    assert turns(policy, 3, 0, 1, 2) == [0, 1, 2]
    assert turns(policy, 3, 0, 1) == [0, 1, 0]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 5), min_size=1), st.integers(1, 6)), min_size=1
    )
)
def test_whoever_comes_and_goes_nobody_who_stays_is_passed_over(
    phases: list[tuple[set[int], int]],
) -> None:
    """Between two turns of one worker no other has two, unless the first was away."""
    policy = RoundRobin()
    since: dict[int, Counter[int]] = {}
    for indexes, count in phases:
        for away in set(since) - indexes:
            del since[away]
        for _ in range(count):
            (chosen,) = turns(policy, 1, *indexes)
            assert chosen in indexes
            for index in indexes - {chosen}:
                others = since.setdefault(index, Counter())
                others[chosen] += 1
                assert others[chosen] <= 1
            since[chosen] = Counter()


def test_where_nobody_fits_nobody_is_picked_and_no_turn_is_lost() -> None:
    policy = RoundRobin()
    assert turns(policy, 1, 0, 1) == [0]
    assert policy.pick(Ask("qwen"), WORKERS, lambda w: False) is None
    assert policy.pick(Ask("qwen"), (), lambda w: True) is None
    assert turns(policy, 1, 0, 1) == [1]


def test_no_more_workers_are_asked_than_it_takes() -> None:
    asked = []
    policy = RoundRobin()
    turns(policy, 2, *range(6))
    policy.pick(Ask("qwen"), WORKERS, lambda w: not asked.append(w) and w.index == 4)
    assert asked == [WORKERS[2], WORKERS[3], WORKERS[4]]


def test_workers_may_leave_the_pool_and_others_join_it() -> None:
    policy = RoundRobin()
    ask, all_fit = Ask("qwen"), lambda w: True
    assert policy.pick(ask, WORKERS[1:4], all_fit) is WORKERS[1]
    assert policy.pick(ask, WORKERS[3:], all_fit) is WORKERS[3]
    assert policy.pick(ask, WORKERS[:4], all_fit) is WORKERS[0]


def test_it_tells_whose_turn_was_the_last() -> None:
    policy = RoundRobin()
    turns(policy, 2, 0, 1)
    assert repr(policy) == "<RoundRobin last={'qwen': 1}>"
