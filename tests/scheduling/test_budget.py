"""Retries stay a share of the recent requests, however the two come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.scheduling.budget import RetryBudget
from tests.fakes.clock import Clock


def spend(budget: RetryBudget) -> int:
    """Withdraw until it refuses; return how often it did not."""
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
