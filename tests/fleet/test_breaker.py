"""The breaker follows its table, does not flap, and loses no permit."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from itertools import pairwise, product
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gollama_proxy.fleet.breaker import (
    TRANSITIONS,
    TRUSTED,
    Breaker,
    BreakerEvent,
    BreakerState,
    IllegalStepError,
    OpenCause,
    Permit,
    Policy,
    Verdict,
)
from tests.fakes.clock import Clock

GOOD, SLOW, HUNG, BAD, NEUTRAL = (
    Verdict.SUCCESS,
    Verdict.SLOW,
    Verdict.HUNG,
    Verdict.FAILURE,
    Verdict.NEUTRAL,
)
STEADY = Policy(jitter=0.0)


def make(
    state: BreakerState = BreakerState.CLOSED, policy: Policy = STEADY
) -> tuple[Breaker, Clock]:
    """Make a breaker that has come to a state the way breakers do."""
    clock = Clock()
    breaker = Breaker("w1", policy, clock, random.Random(7))
    if state is not BreakerState.CLOSED:
        record(breaker, *[BAD] * policy.consecutive)
    if state is BreakerState.HALF_OPEN:
        clock.advance(breaker.opens_in())
    assert breaker.state is state
    return breaker, clock


def record(breaker: Breaker, *verdicts: Verdict) -> None:
    for verdict in verdicts:
        breaker.record(verdict)


def prove(breaker: Breaker, *results: bool | None) -> None:
    for good in results:
        take(breaker).settle(good)


def take(breaker: Breaker) -> Permit:
    permit = breaker.permit()
    assert permit is not None
    return permit


# --- What is shown ----------------------------------------------------------------


def test_a_new_breaker_opens_at_the_configured_number_and_not_before() -> None:
    breaker, clock = make()
    assert breaker.since == clock()
    record(breaker, *[BAD] * (STEADY.consecutive - 1))
    assert breaker.closed
    clock.advance(1)
    record(breaker, BAD)
    assert breaker.state is BreakerState.OPEN
    assert breaker.since == clock()


def test_the_next_change_is_the_end_of_a_pause_or_of_the_open_time() -> None:
    breaker, clock = make()
    assert breaker.next_change() == math.inf
    breaker.busy(5.0)
    assert breaker.next_change() == clock() + 5
    clock.advance(5)
    assert breaker.next_change() == math.inf
    breaker, clock = make(BreakerState.OPEN)
    breaker.busy(60.0)
    assert breaker.next_change() == clock() + STEADY.open


def test_an_operator_who_resets_a_breaker_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaker, clock = make(BreakerState.OPEN)
    with caplog.at_level(logging.INFO):
        breaker.reset()
    assert "(reset by an operator)" in caplog.text
    clock.advance(STEADY.window)
    record(breaker, *[BAD] * STEADY.consecutive)
    assert breaker.opens_in() == STEADY.open  # and not twice as long


def test_unavailability_in_a_row_is_the_reason_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaker, _ = make()
    with caplog.at_level(logging.INFO):
        for _ in range(STEADY.consecutive):
            breaker.busy(0.0, unavailable=True)
    assert f"unavailable {STEADY.consecutive} times" in caplog.text


# --- Another policy ---------------------------------------------------------------


def test_another_policy_counts_at_once_and_an_open_breaker_stays_open() -> None:
    breaker, clock = make()
    record(breaker, BAD, BAD)
    breaker.follow(Policy(jitter=0.0, consecutive=3, open=7.0))
    record(breaker, BAD)
    assert breaker.state is BreakerState.OPEN
    breaker.follow(Policy(jitter=0.0, open=1.0, proofs=1))
    assert breaker.opens_in() == 7.0
    clock.advance(7)
    prove(breaker, True)
    assert breaker.state is BreakerState.CLOSED


def test_calls_are_counted_anew_in_another_window() -> None:
    breaker, _ = make(policy=Policy(consecutive=100, minimum_calls=4))
    record(breaker, BAD, BAD, BAD)
    breaker.follow(Policy(consecutive=100, minimum_calls=4, window=5.0))
    record(breaker, BAD, BAD, BAD)
    assert breaker.state is BreakerState.CLOSED
    record(breaker, BAD)
    assert breaker.state is BreakerState.OPEN
    assert breaker.reason == "4 of 4 failed in 5 s"


# --- The table --------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), [*product(BreakerState, BreakerEvent)])
def test_every_step_is_in_the_table_or_refused(
    state: BreakerState, event: BreakerEvent
) -> None:
    breaker, _ = make(state)
    generation, entered = breaker.generation, breaker.transitions.copy()
    reached = TRANSITIONS.get((state, event))
    if reached is None:
        with pytest.raises(IllegalStepError, match=f"{event.name}.*{state.name}$"):
            breaker._step(event, "because")
        assert (breaker._state, breaker.generation) == (state, generation)
        assert breaker.transitions == entered
    else:
        breaker._step(event, "because")
        assert (breaker._state, breaker.reason) == (reached, "because")
        assert breaker.generation == generation + 1
        assert breaker.transitions - entered == {reached: 1}


def test_the_table_leads_round() -> None:
    assert TRANSITIONS == {
        (BreakerState.CLOSED, BreakerEvent.TRIPPED): BreakerState.OPEN,
        (BreakerState.OPEN, BreakerEvent.RESTED): BreakerState.HALF_OPEN,
        (BreakerState.HALF_OPEN, BreakerEvent.PROVED): BreakerState.CLOSED,
        (BreakerState.HALF_OPEN, BreakerEvent.DISPROVED): BreakerState.OPEN,
        (BreakerState.OPEN, BreakerEvent.RESET): BreakerState.CLOSED,
        (BreakerState.HALF_OPEN, BreakerEvent.RESET): BreakerState.CLOSED,
        (BreakerState.CLOSED, BreakerEvent.DOUBTED): BreakerState.HALF_OPEN,
    }


@pytest.mark.parametrize("state", list(BreakerState))
def test_an_operator_may_reset_it_in_any_state(state: BreakerState) -> None:
    breaker, _ = make(state)
    breaker.busy(30.0)
    breaker.reset()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.available


def test_a_reset_forgets_the_past_of_a_closed_one() -> None:
    breaker, _ = make()
    record(breaker, *[BAD] * (STEADY.consecutive - 1))
    breaker.reset()
    record(breaker, *[BAD] * (STEADY.consecutive - 1))
    assert breaker.closed
    record(breaker, BAD)
    assert breaker.opens_in() == STEADY.open, "as at the first time"


def test_its_pool_looks_again_whenever_it_may_admit_other_requests() -> None:
    changes: list[str] = []
    clock = Clock()
    breaker = Breaker("w1", STEADY, clock, random.Random(7), lambda: changes.append(""))

    def changed() -> int:
        count = len(changes)
        changes.clear()
        return count

    breaker.busy(5.0)
    assert changed() == 1
    clock.advance(5)
    record(breaker, *[BAD] * STEADY.consecutive)
    assert changed() == 1
    breaker.renew()  # it may have been repaired
    assert changed() == 1
    assert breaker.state is BreakerState.HALF_OPEN
    assert changed() == 1
    permit = take(breaker)
    assert changed() == 1
    permit.settle(None)
    assert changed() == 1
    breaker.reset()
    assert changed() == 1
    breaker.reset()
    assert changed() == 1
    record(breaker, GOOD, SLOW)
    breaker.renew()
    assert changed() == 0


def test_a_worker_works_while_its_last_answers_were_good() -> None:
    breaker, clock = make()
    assert not breaker.works, "nothing is known"
    record(breaker, GOOD)
    assert breaker.works
    record(breaker, BAD)
    assert not breaker.works
    record(breaker, GOOD)
    assert breaker.works
    clock.advance(2 * TRUSTED)
    assert not breaker.works, "it is long ago"
    breaker, _ = make(BreakerState.OPEN)
    assert not breaker.works
    breaker, _ = make(BreakerState.HALF_OPEN)
    assert not breaker.works


def test_a_permit_of_before_a_reset_proves_nothing() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    permit = breaker.permit()
    assert permit is not None
    breaker.reset()
    permit.settle(False)
    assert breaker.state is BreakerState.CLOSED


def test_each_step_is_logged_once_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "gollama_proxy.fleet.breaker")
    breaker, _ = make(BreakerState.HALF_OPEN)
    prove(breaker, True, True)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "worker w1: breaker closed -> open (5 failures in a row)"),
        ("INFO", "worker w1: breaker open -> half-open (5 s have passed)"),
        ("INFO", "worker w1: breaker half-open -> closed (2 good proofs)"),
    ]
    assert breaker.transitions == dict.fromkeys(BreakerState, 1)
    assert breaker.reason == "2 good proofs"


def test_its_repr_shows_all_and_changes_nothing() -> None:
    breaker, clock = make()
    record(breaker, SLOW, BAD, BAD)
    assert repr(breaker) == (
        "<Breaker w1 CLOSED (never tripped) calls=3 failed=2 slow=1 in_a_row=2 "
        "opens_in=0.0>"
    )
    record(breaker, BAD, BAD, BAD)
    clock.advance(60)
    assert " OPEN (5 failures in a row) " in repr(breaker)
    assert breaker.transitions[BreakerState.HALF_OPEN] == 0
    assert breaker.state is BreakerState.HALF_OPEN


# --- What trips it ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ([BAD] * 5, "5 failures in a row"),
        ([BAD, NEUTRAL] * 4 + [BAD], "5 failures in a row"),
        ([GOOD, BAD] * 5, "5 of 10 failed in 30 s"),
        ([BAD, SLOW] * 5 + [BAD], "6 of 11 failed in 30 s"),
        ([GOOD] * 2 + [SLOW] * 8, "8 of 10 slow in 30 s"),
        ([BAD] * 2 + [SLOW] * 8, "8 of 10 slow in 30 s"),
        ([HUNG] * 5, "5 failures in a row"),
        ([BAD, HUNG, HUNG, NEUTRAL, BAD, HUNG], "5 failures in a row"),
        ([GOOD, *[HUNG] * 4] * 2, "8 of 10 slow in 30 s"),
        ([GOOD, *[HUNG, SLOW] * 2] * 2, "8 of 10 slow in 30 s"),
    ],
)
def test_it_trips_at_the_last_straw_and_not_before(
    verdicts: list[Verdict], reason: str
) -> None:
    breaker, _ = make()
    record(breaker, *verdicts[:-1])
    assert breaker.available
    record(breaker, verdicts[-1])
    assert (breaker.state, breaker.reason) == (BreakerState.OPEN, reason)
    assert not breaker.closed
    assert not breaker.available


@pytest.mark.parametrize(
    "verdicts",
    [
        pytest.param([BAD] * 4 + [GOOD] + [BAD] * 4, id="success between"),
        pytest.param([BAD] * 4 + [SLOW] + [BAD] * 4, id="slow between"),
        pytest.param([GOOD, GOOD, BAD] * 100, id="a third fails"),
        pytest.param([GOOD, SLOW, SLOW, SLOW] * 100, id="three quarters slow"),
        pytest.param([SLOW] * 9, id="too few slow ones"),
        pytest.param([HUNG] * 4 + [SLOW] + [HUNG] * 4, id="hangs, and slow between"),
        pytest.param([GOOD, HUNG, HUNG, HUNG] * 100, id="three quarters hang"),
        pytest.param([GOOD, BAD, HUNG] * 100, id="a third fails, a third hangs"),
        pytest.param([NEUTRAL] * 1000, id="clients leave"),
        pytest.param([BAD] * 4 + [NEUTRAL] * 99, id="clients leave a bad one"),
        pytest.param([BAD, GOOD] * 4 + [BAD] + [GOOD] * 9, id="good news"),
    ],
)
def test_it_bears_what_is_less(verdicts: list[Verdict]) -> None:
    breaker, _ = make()
    record(breaker, *verdicts)
    assert breaker.available


def test_what_left_the_window_is_forgotten() -> None:
    breaker, clock = make()
    record(breaker, *[GOOD, BAD] * 4)
    clock.advance(30)
    record(breaker, *[GOOD, BAD] * 4)
    assert breaker.available
    record(breaker, GOOD, BAD)
    assert breaker.reason == "5 of 10 failed in 30 s"


def test_failures_in_a_row_count_however_far_apart_they_are() -> None:
    breaker, clock = make()
    for _ in range(5):
        assert breaker.available
        clock.advance(3600)
        record(breaker, BAD)
    assert breaker.state is BreakerState.OPEN


@pytest.mark.parametrize("state", [BreakerState.OPEN, BreakerState.HALF_OPEN])
def test_late_results_do_not_move_a_breaker_that_has_tripped(
    state: BreakerState,
) -> None:
    breaker, _ = make(state)
    generation = breaker.generation
    record(breaker, *[GOOD, BAD, SLOW, HUNG, NEUTRAL] * 50)
    assert (breaker.state, breaker.generation) == (state, generation)


def test_stragglers_of_a_breakdown_do_not_trip_it_again() -> None:
    breaker, clock = make()
    began = breaker.generation
    record(breaker, *[BAD] * 5)
    clock.advance(5)
    prove(breaker, True, True)
    for _ in range(20):
        breaker.record(BAD, began)
    assert breaker.available
    for _ in range(5):
        breaker.record(BAD, breaker.generation)
    assert not breaker.available


@pytest.mark.parametrize(
    ("verdicts", "cause"),
    [
        ([BAD] * 5, OpenCause.CONSECUTIVE),
        ([GOOD, BAD] * 5, OpenCause.FAILURE_RATE),
        ([GOOD] * 2 + [SLOW] * 8, OpenCause.SLOW_RATE),
        ([HUNG] * 5, OpenCause.CONSECUTIVE),
        ([GOOD, *[HUNG] * 4] * 2, OpenCause.SLOW_RATE),
    ],
)
def test_what_has_opened_it_is_counted(
    verdicts: list[Verdict], cause: OpenCause
) -> None:
    breaker, clock = make()
    record(breaker, *verdicts)
    assert breaker.causes == {cause: 1}
    for number in (1, 2):
        clock.advance(breaker.opens_in())
        prove(breaker, True, None, False)
        assert breaker.causes == {cause: 1, OpenCause.PROOF: number}
    assert breaker.causes.total() == 3 == breaker.transitions[BreakerState.OPEN]


# --- Busy is not broken -----------------------------------------------------------


def test_a_busy_worker_is_left_alone_for_the_time_and_has_not_failed() -> None:
    breaker, clock = make()
    breaker.busy(2)
    breaker.busy(1)
    assert (breaker.closed, breaker.available, breaker.opens_in()) == (True, False, 2)
    clock.advance(2)
    assert (breaker.available, breaker.opens_in()) == (True, 0)
    assert not breaker.transitions


def test_results_still_count_while_it_is_busy() -> None:
    breaker, _ = make()
    breaker.busy(10)
    record(breaker, *[BAD] * 5)
    assert breaker.state is BreakerState.OPEN
    assert breaker.opens_in() == 10


@pytest.mark.parametrize(
    ("asked", "given"), [(1e9, 60), (float("inf"), 60), (float("nan"), 0), (-1, 0)]
)
def test_a_worker_cannot_ask_for_an_endless_pause(asked: float, given: float) -> None:
    breaker, _ = make()
    breaker.busy(asked)
    assert breaker.opens_in() == given


def test_a_busy_worker_is_not_asked_for_a_proof() -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    breaker.busy(1)
    assert breaker.permit() is None
    clock.advance(1)
    assert breaker.permit() is not None


def test_it_is_left_alone_for_as_long_as_it_may_ask_for() -> None:
    breaker, _ = make()
    assert breaker.busy(3) == 3
    assert breaker.busy(1e9) == STEADY.busy_max


def test_to_be_unavailable_again_and_again_is_to_be_broken() -> None:
    """Canaries find out when it is good again, as of any that is broken."""
    breaker, clock = make()
    for _ in range(STEADY.consecutive - 1):
        breaker.busy(1, unavailable=True)
        clock.advance(1)
    assert breaker.closed
    breaker.busy(1, unavailable=True)
    assert breaker.state is BreakerState.OPEN
    assert breaker.causes[OpenCause.CONSECUTIVE] == 1
    clock.advance(breaker.opens_in())
    breaker.busy(1, unavailable=True)
    assert breaker.state is BreakerState.HALF_OPEN
    clock.advance(1)
    prove(breaker, True, True)
    assert breaker.closed


def test_requests_that_were_under_way_together_are_unavailable_once() -> None:
    breaker, _ = make()
    for _ in range(9 * STEADY.consecutive):
        breaker.busy(1, unavailable=True)
    assert breaker.closed


def test_a_worker_with_too_many_requests_is_never_broken() -> None:
    breaker, clock = make()
    for _ in range(9 * STEADY.consecutive):
        breaker.busy(1)
        clock.advance(1)
    assert breaker.closed


def test_a_good_answer_ends_a_row_of_being_unavailable() -> None:
    breaker, clock = make()
    for _ in range(9 * STEADY.consecutive):
        breaker.busy(1, unavailable=True)
        clock.advance(1)
        record(breaker, GOOD)
    assert breaker.closed


# --- Whom it lets in --------------------------------------------------------------


@pytest.mark.parametrize("canary", [True, False])
@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("state", list(BreakerState))
def test_a_request_may_come_while_it_is_closed_or_as_a_proof_where_that_is_wanted(
    state: BreakerState, busy: bool, canary: bool
) -> None:
    breaker, clock = make(state, Policy(jitter=0.0, canary=canary))
    if busy:
        breaker.busy(1)
    proves = state is BreakerState.HALF_OPEN and not canary
    assert breaker.admits is (not busy and (state is BreakerState.CLOSED or proves))
    assert breaker.available is (not busy and state is BreakerState.CLOSED)
    clock.advance(1)
    assert breaker.admits is (state is BreakerState.CLOSED or proves)


def test_requests_prove_one_at_a_time() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN, Policy(jitter=0.0, canary=False))
    for good in (None, True, True):
        assert breaker.admits
        permit = take(breaker)
        assert not breaker.admits
        permit.settle(good)
    assert breaker.admits
    assert breaker.available


def test_asking_for_admission_takes_the_step_that_time_has_made() -> None:
    breaker, clock = make(BreakerState.OPEN, Policy(jitter=0.0, canary=False))
    assert not breaker.admits
    clock.advance(5)
    assert breaker.admits
    assert breaker.state is BreakerState.HALF_OPEN


# --- Open, and open for longer ----------------------------------------------------


def test_the_open_time_doubles_up_to_its_limit() -> None:
    breaker, clock = make(BreakerState.OPEN)
    times = []
    for _ in range(5):
        times.append(breaker.opens_in())
        clock.advance(times[-1])
        prove(breaker, False)
    assert times == [5, 10, 15, 15, 15]
    assert breaker.reason == "the proof failed"


def test_a_worker_that_was_down_for_weeks_is_still_tried() -> None:
    breaker, clock = make(BreakerState.OPEN)
    for _ in range(2000):
        clock.advance(breaker.opens_in())
        prove(breaker, False)
    assert breaker.opens_in() == pytest.approx(15)


@pytest.mark.parametrize(("closed_for", "then"), [(29.9, 10), (30, 5)])
def test_a_window_of_being_closed_makes_the_doubling_forgotten(
    closed_for: float, then: float
) -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    prove(breaker, True, True)
    clock.advance(closed_for)
    record(breaker, *[BAD] * 5)
    assert breaker.opens_in() == pytest.approx(then)
    clock.advance(then + 0.1)
    prove(breaker, False)
    assert breaker.opens_in() == pytest.approx(min(then * 2, 15))


def test_breakers_that_trip_together_do_not_come_back_together() -> None:
    rng, clock = random.Random(3), Clock()
    breakers = [Breaker(f"w{i}", Policy(), clock, rng) for i in range(100)]
    for breaker in breakers:
        record(breaker, *[BAD] * 5)
    times = sorted(breaker.opens_in() for breaker in breakers)
    assert 4 <= times[0] < 4.2
    assert 5.8 < times[-1] <= 6


def test_the_open_state_ends_when_it_is_read_in_time() -> None:
    breaker, clock = make(BreakerState.OPEN)
    clock.advance(4.9)
    assert breaker.permit() is None
    assert breaker.state is BreakerState.OPEN
    assert breaker.opens_in() == pytest.approx(0.1)
    clock.advance(0.2)
    assert breaker.permit() is not None
    assert (breaker.state, breaker.opens_in()) == (BreakerState.HALF_OPEN, 0)


# --- Permits ----------------------------------------------------------------------


def test_one_of_a_hundred_requests_gets_the_permit() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    permits = [breaker.permit() for _ in range(100)]
    assert [permit is not None for permit in permits] == [True] + [False] * 99


@pytest.mark.parametrize("state", [BreakerState.CLOSED, BreakerState.OPEN])
def test_there_are_permits_only_while_half_open(state: BreakerState) -> None:
    breaker, _ = make(state)
    assert breaker.permit() is None


@pytest.mark.parametrize(
    ("results", "reached"),
    [
        ([True], BreakerState.HALF_OPEN),
        ([True, None, True], BreakerState.CLOSED),
        ([None] * 9, BreakerState.HALF_OPEN),
        ([True, False], BreakerState.OPEN),
    ],
)
def test_good_proofs_in_a_row_close_it_and_a_bad_one_opens_it(
    results: list[bool | None], reached: BreakerState
) -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    prove(breaker, *results)
    assert breaker.state is reached


def test_good_proofs_of_an_earlier_time_do_not_count() -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    prove(breaker, True, False)
    clock.advance(10)
    prove(breaker, True)
    assert breaker.state is BreakerState.HALF_OPEN


def test_a_permit_settles_once() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    permit = take(breaker)
    assert repr(permit) == "<Permit held on w1>"
    permit.settle(True)
    permit.settle(True)
    permit.settle(False)
    assert repr(permit) == "<Permit settled on w1>"
    assert breaker.state is BreakerState.HALF_OPEN
    other = take(breaker)
    permit.settle(None)
    assert breaker.permit() is None
    other.settle(True)
    assert breaker.closed


def test_a_permit_comes_back_from_an_exception() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    with pytest.raises(OSError), take(breaker):
        raise OSError
    with take(breaker) as permit:
        permit.settle(True)
    prove(breaker, True)
    assert breaker.closed


async def test_a_permit_comes_back_from_a_task_that_is_cancelled() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    asked = asyncio.Event()

    async def ask() -> None:
        with take(breaker):
            asked.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(ask())
    await asked.wait()
    assert breaker.permit() is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert breaker.permit() is not None


# --- Coming back ------------------------------------------------------------------


def test_a_worker_that_never_failed_takes_every_turn() -> None:
    breaker, _ = make()
    assert all(breaker.turn() for _ in range(1000))


def test_after_a_recovery_the_share_rises_from_a_tenth_to_all() -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    prove(breaker, True, True)
    taken = []
    for _ in range(12):
        taken.append(0)
        for _ in range(100):
            taken[-1] += breaker.turn()
            clock.advance(0.01)
    line = [100 * (0.1 + 0.09 * (second + 0.5)) for second in range(10)]
    assert taken == pytest.approx([*line, 100, 100], abs=1.5)


def test_a_recovered_worker_gets_its_turns_spread_evenly() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN)
    prove(breaker, True, True)
    turns = [i for i in range(1000) if breaker.turn()]
    gaps = {b - a for a, b in pairwise(turns)}
    assert gaps <= {9, 10, 11}


def test_without_a_ramp_a_recovered_worker_takes_every_turn() -> None:
    breaker, _ = make(BreakerState.HALF_OPEN, Policy(ramp=0.0))
    prove(breaker, True, True)
    assert all(breaker.turn() for _ in range(100))


def test_a_recovered_worker_is_not_blamed_for_what_was_before() -> None:
    breaker, clock = make()
    record(breaker, *[GOOD, BAD] * 5)
    clock.advance(5)
    prove(breaker, True, True)
    record(breaker, *[BAD] * 4, GOOD, *[BAD] * 4)
    assert breaker.available


# --- Away for a while -------------------------------------------------------------


def test_a_worker_that_was_away_need_not_rest_any_longer() -> None:
    """It may have been repaired, and what it was does not count against it."""
    breaker, clock = make(BreakerState.OPEN)
    clock.advance(5)
    prove(breaker, False)
    assert breaker.opens_in() == 10
    breaker.renew()
    assert (breaker.state, breaker.opens_in()) == (BreakerState.HALF_OPEN, 0)
    prove(breaker, False)
    assert breaker.opens_in() == 5


def test_a_proof_goes_on_though_the_worker_was_away() -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    prove(breaker, True)
    permit = take(breaker)
    breaker.renew()
    assert breaker.permit() is None
    clock.advance(1)
    permit.settle(True)
    assert breaker.closed


def test_a_good_worker_that_was_away_begins_anew() -> None:
    """With no past, and a share that rises: its cache is empty, its disk is cold."""
    breaker, clock = make()
    record(breaker, *[BAD] * 4)
    breaker.renew()
    assert breaker.available
    assert sum(breaker.turn() for _ in range(100)) in (9, 10)
    record(breaker, *[BAD] * 4)
    assert breaker.available
    clock.advance(10)
    assert all(breaker.turn() for _ in range(100))
    assert not breaker.transitions


# --- The verdicts of other hubs ---------------------------------------------------


def test_a_doubted_worker_proves_itself_with_one_request_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaker, _ = make()
    with caplog.at_level(logging.INFO):
        assert breaker.doubt("the breaker of hub b is open")
    assert breaker.state is BreakerState.HALF_OPEN
    assert caplog.messages == [
        "worker w1: breaker closed -> half-open (the breaker of hub b is open)"
    ]
    first = take(breaker)
    assert breaker.permit() is None
    first.settle(True)
    prove(breaker, True)
    assert breaker.closed


def test_a_bad_proof_of_a_doubted_worker_opens_its_breaker_for_the_first_time() -> None:
    breaker, clock = make(BreakerState.HALF_OPEN)
    prove(breaker, False)  # twice as long
    clock.advance(breaker.opens_in())
    prove(breaker, True, True)
    clock.advance(STEADY.window)
    assert breaker.doubt("because")
    prove(breaker, False)
    assert breaker.opens_in() == STEADY.open


@pytest.mark.parametrize("state", [BreakerState.OPEN, BreakerState.HALF_OPEN])
def test_only_a_closed_breaker_is_doubted(state: BreakerState) -> None:
    breaker, _ = make(state)
    assert not breaker.doubt("because")
    assert breaker.state is state


def test_a_worker_that_has_just_answered_is_not_doubted() -> None:
    breaker, clock = make()
    record(breaker, GOOD)
    clock.advance(TRUSTED)
    assert not breaker.doubt("because")
    clock.advance(2 * STEADY.window / 10)  # the parts in which answers are counted
    assert breaker.doubt("because")


def test_failures_and_slow_answers_of_here_are_nothing_against_a_doubt() -> None:
    breaker, _ = make()
    record(breaker, BAD, SLOW, HUNG)
    assert breaker.doubt("because")


def test_what_has_just_been_proved_is_not_doubted_again_soon() -> None:
    """A hub that cannot reach the worker must not take it from the others."""
    breaker, clock = make()
    doubts = 0
    for _ in range(600):
        clock.advance(1)
        doubts += breaker.doubt("because")
        if breaker.state is BreakerState.HALF_OPEN:
            prove(breaker, True, True)
    assert doubts == pytest.approx(600 / STEADY.open_max, abs=1)


# --- No flapping ------------------------------------------------------------------


def worst(breaker: Breaker, now: float) -> bool:
    """Prove that all is well, and fail as soon as the traffic comes."""
    return breaker.state is BreakerState.HALF_OPEN


def in_turn(period: float) -> Callable[[Breaker, float], bool]:
    return lambda breaker, now: int(now / period) % 2 == 0


@pytest.mark.parametrize(
    "works", [worst, *(in_turn(p) for p in (0.5, 1, 3, 7, 16, 20, 31, 60))]
)
def test_openings_are_bounded_whatever_the_worker_does(
    works: Callable[[Breaker, float], bool],
) -> None:
    """Ten minutes of a worker that works and fails in turn, asked 20 times a second."""
    policy = Policy()
    breaker, clock = make(policy=policy)
    start = clock()
    for _ in range(600 * 20):
        now = clock.advance(0.05)
        good = works(breaker, now)
        permit = breaker.permit()
        if permit is not None:
            permit.settle(good)
        elif breaker.available and breaker.turn():
            breaker.record(GOOD if good else BAD)
    bound = 2 + (clock() - start) / (policy.open_max * (1 - policy.jitter))
    assert breaker.transitions[BreakerState.OPEN] <= bound
    if works is worst:
        assert breaker.transitions[BreakerState.OPEN] > bound / 2


# --- Against a model --------------------------------------------------------------


class Model:
    """The same machine, which keeps all of its past, at any cost."""

    def __init__(self) -> None:
        self.state, self.since, self.open_time = BreakerState.CLOSED, -1e9, 0.0
        self.past: list[tuple[float, Verdict]] = []
        self.proofs = 0
        self.proved_at = -1e9

    def look(self, now: float) -> None:
        if self.state is BreakerState.OPEN and now >= self.since + self.open_time:
            self.state, self.proofs = BreakerState.HALF_OPEN, 0

    def record(self, now: float, verdict: Verdict) -> None:
        if self.state is not BreakerState.CLOSED or verdict is NEUTRAL:
            return
        self.past.append((now, verdict))
        row = [verdict in (BAD, HUNG) for _, verdict in self.past[-5:]]
        kinds = {HUNG: SLOW}
        kind = kinds.get(verdict, verdict)
        window = [
            kinds.get(v, v) for at, v in self.past if int(at / 3) > int(now / 3) - 10
        ]
        share = window.count(kind) / len(window) if len(window) >= 10 else 0
        limit = {BAD: 0.5, SLOW: 0.8, GOOD: 2.0}[kind]
        if row == [True] * 5 or share >= limit:
            self.open(now, calm=now - self.since >= 30)

    def open(self, now: float, *, calm: bool) -> None:
        longer = self.open_time * 2 or 5.0
        self.open_time = 5.0 if calm else min(longer, 15.0)
        self.state, self.since = BreakerState.OPEN, now

    def settle(self, now: float, good: bool | None) -> None:
        self.proofs += good is True
        if good is False:
            self.open(now, calm=False)
        elif self.proofs == 2:
            self.state, self.since, self.past = BreakerState.CLOSED, now, []
            self.proved_at = now

    def doubt(self, now: float) -> bool:
        recent = [v for at, v in self.past if int(at / 3) > int(now / 3) - 3]
        if (
            self.state is not BreakerState.CLOSED
            or GOOD in recent
            or now - self.proved_at < 15
        ):
            return False
        if now - self.since >= 30:
            self.open_time = 0.0
        self.state, self.proofs, self.since = BreakerState.HALF_OPEN, 0, now
        return True


class Breakers(RuleBasedStateMachine):
    """A breaker and its model live through the same, and must agree throughout."""

    verdicts: ClassVar = st.sampled_from([GOOD, SLOW, HUNG, BAD, BAD, NEUTRAL])

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker("w1", STEADY, self.clock, random.Random(7))
        self.model = Model()
        self.held: Permit | None = None
        self.old: list[Permit] = []

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0, 5.0, 10.0, 15.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.look(self.clock())

    @rule(verdicts=st.lists(verdicts, min_size=1, max_size=12))
    def requests_end(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            self.breaker.record(verdict)
            self.model.record(self.clock(), verdict)

    @rule()
    def another_hub_has_opened_its_own(self) -> None:
        doubted = self.model.doubt(self.clock())
        assert self.breaker.doubt("because") == doubted
        if doubted:
            self.old += [self.held] if self.held is not None else []
            self.held = None

    @rule()
    def somebody_asks(self) -> None:
        permit = self.breaker.permit()
        free = self.model.state is BreakerState.HALF_OPEN and self.held is None
        assert (permit is not None) == free
        self.held = permit or self.held

    @precondition(lambda self: self.held is not None)
    @rule(good=st.sampled_from([True, True, False, None]))
    def the_proof_is_done(self, good: bool | None) -> None:
        assert self.held is not None
        self.held.settle(good)
        self.old.append(self.held)
        self.held = None
        self.model.settle(self.clock(), good)

    @precondition(lambda self: self.old)
    @rule(good=st.sampled_from([True, False, None]))
    def a_settled_permit_is_settled_again(self, good: bool | None) -> None:
        self.old[-1].settle(good)

    @invariant()
    def they_agree(self) -> None:
        assert self.breaker.state is self.model.state
        assert self.breaker.available == (self.model.state is BreakerState.CLOSED)
        if self.model.state is BreakerState.OPEN:
            due = self.model.since + self.model.open_time
            assert self.breaker.opens_in() == due - self.clock()
        else:
            assert self.breaker.opens_in() == 0


TestBreakers = Breakers.TestCase


# --- Counts -----------------------------------------------------------------------


def test_a_new_breaker_has_taken_no_step() -> None:
    assert make()[0].generation == 0


def test_each_opening_is_counted_with_its_cause() -> None:
    breaker, clock = make()
    for count in (1, 2, 3):
        record(breaker, *[BAD] * STEADY.consecutive)
        assert breaker.causes == {OpenCause.CONSECUTIVE: count}
        clock.advance(breaker.opens_in())
        prove(breaker, True, True)
    clock.advance(1000)
    record(breaker, *[BAD] * STEADY.consecutive)
    clock.advance(breaker.opens_in())
    prove(breaker, False)
    assert breaker.causes == {OpenCause.CONSECUTIVE: 4, OpenCause.PROOF: 1}


def test_a_worker_that_has_just_recovered_passes_its_first_turns() -> None:
    """It has a tenth of them, so about the tenth is its first."""
    breaker, _ = make(BreakerState.HALF_OPEN)
    prove(breaker, True, True)
    turns = [breaker.turn() for _ in range(12)]
    assert 9 <= turns.index(True) <= 10
