"""A lease is given back exactly once, whoever forgets it, with the first outcome."""

from __future__ import annotations

import asyncio
import math

import pytest

from gollama_proxy.fleet.lease import Lease, Outcome
from tests.fakes.clock import Clock


class Ledger:
    """Hands out leases and writes down what comes back."""

    def __init__(self) -> None:
        self.clock = Clock(100.0)
        self.returned: list[tuple[Lease, Outcome]] = []

    def lease(self) -> Lease:
        return Lease(
            "w1",
            self.clock,
            lambda lease, outcome: self.returned.append((lease, outcome)),
        )


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_a_new_lease_is_held_since_now_and_heard_nothing(ledger: Ledger) -> None:
    lease = ledger.lease()
    ledger.clock.advance(5)
    assert (lease.worker, lease.taken_at, lease.outcome) == ("w1", 100.0, None)
    assert lease.heard_at < float("-1e300")  # earlier than any clock may say
    assert ledger.returned == []
    assert repr(lease) == "<Lease on w1 held>"


def test_a_new_lease_proves_nothing_and_may_take_for_ever(ledger: Ledger) -> None:
    """Until whoever hands it out knows better."""
    lease = ledger.lease()
    assert lease.permits == ()
    assert lease.allowance == math.inf


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_lease_goes_back_with_its_outcome(ledger: Ledger, outcome: Outcome) -> None:
    lease = ledger.lease()
    lease.release(outcome)
    assert ledger.returned == [(lease, outcome)]
    assert lease.outcome is outcome
    assert repr(lease) == f"<Lease on w1 {outcome.name}>"


@pytest.mark.parametrize("first", list(Outcome))
@pytest.mark.parametrize("second", list(Outcome))
def test_only_the_first_release_counts(
    ledger: Ledger, first: Outcome, second: Outcome
) -> None:
    lease = ledger.lease()
    lease.release(first)
    lease.release(second)
    assert ledger.returned == [(lease, first)]
    assert lease.outcome is first


def test_a_lease_that_its_block_released_is_not_released_again(ledger: Ledger) -> None:
    with ledger.lease() as lease:
        lease.release(Outcome.COMPLETE)
    assert ledger.returned == [(lease, Outcome.COMPLETE)]


@pytest.mark.parametrize(
    "error", [None, ValueError, asyncio.CancelledError, SystemExit]
)
def test_a_lease_that_nobody_released_blames_no_worker(
    ledger: Ledger, error: type[BaseException] | None
) -> None:
    """The client left, or the hub has a bug; the exception goes on."""
    if error is None:
        with ledger.lease() as lease:
            pass
    else:
        with pytest.raises(error), ledger.lease() as lease:
            raise error
    assert ledger.returned == [(lease, Outcome.CLIENT_GONE)]


def test_the_outcome_is_known_to_whom_the_lease_goes_back() -> None:
    seen: list[Outcome | None] = []

    def give_back(lease: Lease, outcome: Outcome) -> None:
        lease.release(Outcome.WORKER_FAILED)  # from within it is too late, too
        seen.append(lease.outcome)

    Lease("w1", Clock(), give_back).release(Outcome.REFUSED)
    assert seen == [Outcome.REFUSED]


def test_two_leases_on_one_worker_are_two(ledger: Ledger) -> None:
    """Equal in all they say, and yet not the same place."""
    one, two = ledger.lease(), ledger.lease()
    assert len({one, two}) == 2
    one.release(Outcome.COMPLETE)
    assert two.outcome is None
