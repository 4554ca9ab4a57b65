"""A lease is given back exactly once, with its first result, even if forgotten."""

from __future__ import annotations

import asyncio
import math
from typing import cast

import pytest

from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.worker import Worker
from tests.fakes.clock import Clock


class Ledger:
    """Hands out leases as a worker does, and records those that come back."""

    name = "w1"

    def __init__(self) -> None:
        self.clock = Clock(100.0)
        self.returned: list[tuple[Lease, Result]] = []

    def lease(self) -> Lease:
        return Lease(cast(Worker, self))

    def take_back(self, lease: Lease, result: Result) -> None:
        lease.release(Result.WORKER_FAILED)  # from within it is too late, too
        self.returned.append((lease, result))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_a_new_lease_is_held_since_now_and_heard_nothing(ledger: Ledger) -> None:
    lease = ledger.lease()
    ledger.clock.advance(5)
    assert (lease.worker, lease.taken_at, lease.result) == (ledger, 100.0, None)
    assert lease.heard_at < float("-1e300")  # earlier than any clock
    assert ledger.returned == []
    assert repr(lease) == "<Lease on w1 held>"


def test_a_new_lease_proves_nothing_and_has_no_limit(ledger: Ledger) -> None:
    """Until the caller sets them."""
    lease = ledger.lease()
    assert lease.permits == ()
    assert lease.allowance == math.inf


@pytest.mark.parametrize("result", list(Result))
def test_a_lease_goes_back_with_its_outcome(ledger: Ledger, result: Result) -> None:
    lease = ledger.lease()
    lease.release(result)
    assert ledger.returned == [(lease, result)]
    assert lease.result is result
    assert repr(lease) == f"<Lease on w1 {result.name}>"


@pytest.mark.parametrize("first", list(Result))
@pytest.mark.parametrize("second", list(Result))
def test_only_the_first_release_counts(
    ledger: Ledger, first: Result, second: Result
) -> None:
    lease = ledger.lease()
    lease.release(first)
    lease.release(second)
    assert ledger.returned == [(lease, first)]
    assert lease.result is first


def test_a_lease_that_its_block_released_is_not_released_again(ledger: Ledger) -> None:
    with ledger.lease() as lease:
        lease.release(Result.COMPLETE)
    assert ledger.returned == [(lease, Result.COMPLETE)]


@pytest.mark.parametrize(
    "error", [None, ValueError, asyncio.CancelledError, SystemExit]
)
def test_a_lease_that_was_not_released_blames_no_worker(
    ledger: Ledger, error: type[BaseException] | None
) -> None:
    """The client left, or the hub has a bug; the exception goes on."""
    if error is None:
        with ledger.lease() as lease:
            pass
    else:
        with pytest.raises(error), ledger.lease() as lease:
            raise error
    assert ledger.returned == [(lease, Result.CLIENT_GONE)]


def test_two_leases_on_one_worker_are_two(ledger: Ledger) -> None:
    """All their attributes are equal, and still they are two places."""
    one, two = ledger.lease(), ledger.lease()
    assert len({one, two}) == 2
    one.release(Result.COMPLETE)
    assert two.result is None
