"""Retries stay a share of the recent requests, however the two come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.scheduling.budget import BUCKETS, Recent, RetryBudget
from tests.fakes.clock import Clock


def spend(budget: RetryBudget) -> int:
    """Withdraw until it refuses, and tell how often it did not."""
    spent = 0
    while budget.withdraw():
        spent += 1
    return spent


# --- The budget -------------------------------------------------------------------


def test_a_quiet_hub_may_retry_a_few_times() -> None:
    budget = RetryBudget(clock=Clock())
    assert spend(budget) == 3


@pytest.mark.parametrize(("requests", "retries"), [(9, 3), (10, 4), (100, 13)])
def test_requests_pay_a_tenth_of_a_retry_each(requests: int, retries: int) -> None:
    budget = RetryBudget(clock=Clock())
    for _ in range(requests):
        budget.deposit()
    assert spend(budget) == retries
    assert repr(budget) == (
        f"<RetryBudget {retries} of {3 + requests / 10:g} spent, {requests} requests>"
    )


def test_a_refused_retry_costs_nothing() -> None:
    budget = RetryBudget(ratio=1.0, floor=0, clock=Clock())
    assert not budget.withdraw()
    budget.deposit()
    assert spend(budget) == 1


def test_what_requests_paid_is_gone_with_the_window_and_so_is_the_debt() -> None:
    clock = Clock()
    budget = RetryBudget(clock=clock)
    for _ in range(1000):
        budget.deposit()
    assert spend(budget) == 103
    clock.advance(8.9)
    assert spend(budget) == 0
    clock.advance(1.1)
    assert spend(budget) == 3


def test_an_outage_makes_a_tenth_more_load_and_not_twice_as_much() -> None:
    """All fail, all are retried at once, for a minute of 100 requests a second."""
    clock = Clock()
    budget = RetryBudget(clock=clock)
    retries = 0
    for _ in range(6000):
        budget.deposit()
        retries += budget.withdraw()
        clock.advance(0.01)
    assert 0.09 * 6000 <= retries <= 0.12 * 6000


@given(
    steps=st.lists(st.sampled_from(["deposit", "withdraw", 0.25, 1.0, 3.5, 10.0])),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    floor=st.integers(0, 3),
)
def test_at_each_withdrawal_the_window_holds_no_more_retries_than_it_pays_for(
    steps: list[str | float], ratio: float, floor: int
) -> None:
    clock = Clock()
    budget = RetryBudget(ratio, floor, 10.0, clock=clock)
    requests: list[int] = []
    retries: list[int] = []
    for step in steps:
        second = int(clock())
        if isinstance(step, float):
            clock.advance(step)
        elif step == "deposit":
            budget.deposit()
            requests.append(second)
        else:
            paid = ratio * sum(at > second - 10 for at in requests) + floor
            spent = sum(at > second - 10 for at in retries)
            assert budget.withdraw() == (spent + 1 <= paid)
            if spent + 1 <= paid:
                retries.append(second)


# --- Counting what is recent ------------------------------------------------------


def test_what_is_older_than_the_span_is_not_counted() -> None:
    clock = Clock(1000.0)
    recent = Recent(10.0, clock)
    for _ in range(10):
        recent.add()
        clock.advance(1.0)
    assert recent.count == 9
    clock.advance(4.0)
    assert recent.count == 5
    assert repr(recent) == "<Recent 5 in 10 s>"
    clock.advance(5.0)
    assert recent.count == 0


@pytest.mark.parametrize("pause", [9.9, 10.0, 11.0, 95.0, 1e9])
def test_a_pause_of_any_length_empties_the_buckets_and_breaks_nothing(
    pause: float,
) -> None:
    clock = Clock(1000.5)
    recent = Recent(10.0, clock)
    recent.add()
    clock.advance(pause)
    assert recent.count == 0
    recent.add()
    assert recent.count == 1


@given(gaps=st.lists(st.floats(0, 40), max_size=50), span=st.sampled_from([1.0, 30.0]))
def test_nine_tenths_of_the_span_are_counted_and_never_more_than_the_span(
    gaps: list[float], span: float
) -> None:
    clock = Clock()
    recent = Recent(span, clock)
    moments: list[float] = []
    for gap in gaps:
        clock.advance(gap)
        recent.add()
        moments.append(clock())
        surely = sum(at > clock() - span * (1 - 1 / BUCKETS) + 1e-6 for at in moments)
        at_most = sum(at > clock() - span - 1e-6 for at in moments)
        assert surely <= recent.count <= at_most


def test_several_at_once_are_counted_and_leave_together() -> None:
    clock = Clock(1000.0)
    recent = Recent(10.0, clock)
    recent.add(5)
    clock.advance(2.0)
    recent.add(2)
    assert recent.count == 7
    clock.advance(8.0)
    assert recent.count == 2


@pytest.mark.parametrize(
    ("amount", "seconds"), [(-1, 0), (0, 0), (1, 7.5), (5, 7.5), (6, 9.5), (99, 9.5)]
)
def test_it_is_known_when_what_is_counted_will_have_left(
    amount: int, seconds: float
) -> None:
    clock = Clock(1000.0)
    recent = Recent(10.0, clock)
    assert recent.leaves_in(amount) == 0
    recent.add(5)
    clock.advance(2.0)
    recent.add(2)
    clock.advance(0.5)
    assert recent.leaves_in(amount) == seconds


@given(
    gaps=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 4)), max_size=30),
    amount=st.integers(0, 40),
    buckets=st.sampled_from([1, 10, 61]),
)
def test_what_was_to_leave_has_left_by_then_and_not_before(
    gaps: list[tuple[float, int]], amount: int, buckets: int
) -> None:
    clock = Clock()
    recent = Recent(61.0, clock, buckets)
    for gap, several in gaps:
        clock.advance(gap)
        recent.add(several)
    before = recent.count
    amount = min(amount, before)
    wait = recent.leaves_in(amount)
    if wait > 1e-3:
        clock.advance(wait - 1e-3)
        assert before - recent.count < amount
        clock.advance(2e-3)
    assert before - recent.count >= amount
