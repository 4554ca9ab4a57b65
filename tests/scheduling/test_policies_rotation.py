"""Each worker in turn, evenly or by weight, also while others come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import Ask, Policy, RoundRobin, Weighted
from tests.fakes.pool import among, weighted, worker

# --- Round robin ----------------------------------------------------------------------


WORKERS = tuple(worker(index) for index in range(6))


def turns(
    policy: Policy, count: int, *indexes: int, model: str = "qwen"
) -> Sequence[int]:
    """Pick `count` times, while these workers fit; return their places."""
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
def test_while_others_come_and_go_no_worker_that_stays_is_passed_over(
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


def test_where_none_fits_none_is_picked_and_no_turn_is_lost() -> None:
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


def test_its_repr_shows_how_many_models_it_knows() -> None:
    policy = RoundRobin()
    turns(policy, 2, 0, 1)
    assert repr(policy) == "<RoundRobin last=<BoundedDict 1 of 1000>>"


# --- By weight ------------------------------------------------------------------------


ASK = Ask("qwen")
WEIGHTS = st.lists(st.floats(0.1, 50), min_size=2, max_size=12)


def turns_of(
    policy: Weighted, workers: Sequence[Worker], count: int, *fit: int
) -> list[int]:
    """Pick `count` times, while these workers fit, or all; return their places."""
    picked = []
    for _ in range(count):
        chosen = policy.pick(ASK, workers, lambda w: not fit or w.index in fit)
        assert chosen is not None
        picked.append(chosen.index)
    return picked


def test_equal_weights_are_a_round() -> None:
    workers = weighted(1, 1, 1)
    assert turns_of(Weighted(), workers, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_turns_of_the_strong_one_lie_between_those_of_the_others() -> None:
    workers = weighted(4, 1, 1)
    picked = turns_of(Weighted(), workers, 600)
    assert Counter(picked) == {0: 400, 1: 100, 2: 100}
    runs = "".join(map(str, picked)).replace("1", " ").replace("2", " ").split()
    assert max(map(len, runs)) == 4


@given(WEIGHTS, st.integers(0, 300), st.integers(1, 300))
@settings(deadline=None)
def test_in_every_window_each_has_its_share_to_within_a_turn(
    weights: list[float], before: int, count: int
) -> None:
    """Measured against each other worker, which may be a turn ahead itself."""
    policy, workers = Weighted(), weighted(*weights)
    turns_of(policy, workers, before)
    had = Counter(turns_of(policy, workers, count))
    for a, b in combinations(range(len(weights)), 2):
        ahead = had[a] / weights[a] - had[b] / weights[b]
        assert abs(ahead) <= 1 / weights[a] + 1 / weights[b] + 1e-6


@given(WEIGHTS)
@settings(deadline=None)
def test_none_starves(weights: list[float]) -> None:
    policy, workers = Weighted(), weighted(*weights)
    total = sum(weights)
    patience = [total / weight + len(weights) + 1 for weight in weights]
    since = [0] * len(weights)
    for picked in turns_of(policy, workers, 500):
        since = [waited + 1 for waited in since]
        since[picked] = 0
        assert all(w <= most for w, most in zip(since, patience, strict=True))


@given(WEIGHTS, st.data())
@settings(deadline=None)
def test_of_those_that_fit_each_has_its_share(
    weights: list[float], data: st.DataObject
) -> None:
    places = st.sets(st.integers(0, len(weights) - 1), min_size=1)
    fit = sorted(data.draw(places))
    policy, workers = Weighted(), weighted(*weights)
    turns_of(policy, workers, 20)
    had = Counter(turns_of(policy, workers, 200, *fit))
    assert set(had) <= set(fit)
    for a, b in combinations(fit, 2):
        ahead = had[a] / weights[a] - had[b] / weights[b]
        assert abs(ahead) <= 1 / weights[a] + 1 / weights[b] + 1e-6


@pytest.mark.parametrize("away", [1, 50, 5000])
def test_a_worker_that_was_away_comes_back_to_its_share_alone(
    away: int,
) -> None:
    policy, workers = Weighted(), weighted(8, 1, 1)
    turns_of(policy, workers, 100)
    turns_of(policy, workers, away, 1, 2)
    had = Counter(turns_of(policy, workers, 100))
    assert had[0] == pytest.approx(80, abs=2)


def test_a_few_that_do_not_fit_cost_little() -> None:
    """Each is asked once for each turn that it would have had, not at every pick."""
    policy, workers = Weighted(), weighted(*[1] * 1000)
    out, asked = set(workers[:50]), []
    for _ in range(950):
        policy.pick(ASK, workers, lambda w: not asked.append(w) and w not in out)
    assert len(asked) == 1000


def test_where_none_fits_none_loses_a_turn() -> None:
    policy, workers = Weighted(), weighted(3, 2, 1)
    first = turns_of(policy, workers, 4)
    assert policy.pick(ASK, workers, lambda w: False) is None
    again = Weighted()
    assert first + turns_of(policy, workers, 20) == turns_of(again, workers, 24)
    assert policy.pick(ASK, (), lambda w: True) is None


def test_a_weight_may_change() -> None:
    policy, workers = Weighted(), weighted(1, 1)
    turns_of(policy, workers, 10)
    workers[0].weight = 3.0
    assert Counter(turns_of(policy, workers, 400))[0] == pytest.approx(300, abs=2)


def test_a_worker_that_joins_does_not_disturb_the_others() -> None:
    policy, few = Weighted(), weighted(1, 1)
    assert turns_of(policy, few, 101)[-1] == 0
    more = (*few, worker(2, weight=1))
    picked = turns_of(policy, more, 30)
    assert Counter(picked) == {0: 10, 1: 10, 2: 10}
    assert picked[:2] != [2, 2]
    assert turns_of(policy, few[1:], 3) == [1, 1, 1]


def test_each_model_has_its_own_weighted_round() -> None:
    policy, workers = Weighted(), weighted(1, 1)
    assert turns_of(policy, workers, 1) == [0]
    chosen = policy.pick(Ask("other"), workers, lambda w: True)
    assert chosen is workers[0]
    assert turns_of(policy, workers, 1) == [1]


def test_a_worker_that_is_offered_alone_disturbs_nothing() -> None:
    policy, workers = Weighted(), weighted(1, 1, 1)
    turns_of(policy, workers, 1)
    assert policy.pick(ASK, workers[2:], lambda w: True) is workers[2]
    assert policy.pick(ASK, workers[2:], among()) is None
    assert turns_of(policy, workers, 3) == [1, 2, 0]


def test_its_repr_shows_which_is_due() -> None:
    policy, workers = Weighted(), weighted(4, 1)
    turns_of(policy, workers, 1)
    assert repr(policy) == "<Weighted <BoundedDict 1 of 1000>>"
    assert repr(policy._rounds["qwen"]) == "<due: w0 0.38, w1 0.50>"
