"""A worker's health is one table, who talks is alive, a place is given back once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gollama_proxy.routing.lease import Lease, Outcome
from gollama_proxy.routing.worker import (
    TRANSITIONS,
    Check,
    Description,
    Event,
    Model,
    State,
    Worker,
)
from gollama_proxy.settings import Health, Origin, WorkerConfig
from tests.fakes.clock import Clock

CONFIG = WorkerConfig(
    "http://10.0.0.11:8080", Origin("http", "10.0.0.11", 8080, ""), "w1"
)
ABOUT = Description((Model("qwen", 4096), Model("tiny")), slots=4, context=4096)


def make(
    state: State = State.STARTING,
    *,
    fall: int = 3,
    rise: int = 1,
    timeout: float = 5.0,
    clock: Clock | None = None,
) -> Worker:
    """Make a worker that has come to a state the way workers do."""
    health = Health(fall=fall, rise=rise, timeout=timeout)
    worker = Worker(CONFIG, health, clock or Clock())
    if state is State.READY:
        worker.observe(Check.OK, "ok")
    elif state is State.LOADING:
        worker.observe(Check.LOADING, "loading")
    elif state is State.DOWN:
        worker.observe(Check.FAILED, "refused")
    assert worker.state is state
    return worker


def after(worker: Worker, *checks: Check) -> list[State]:
    """Let the pinger see these, and tell the state after each."""
    states = []
    for check in checks:
        worker.observe(check, check.value)
        states.append(worker.state)
    return states


# --- The table --------------------------------------------------------------------


def test_the_table_says_where_every_event_leads_from_every_state() -> None:
    assert set(TRANSITIONS) == set(product(State, Event))
    assert set(TRANSITIONS.values()) <= set(State)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    ("event", "reached"),
    [
        (Event.ROSE, State.READY),
        (Event.LOADING, State.LOADING),
        (Event.FELL, State.DOWN),
    ],
)
def test_an_event_leads_to_its_state_wherever_it_finds_the_worker(
    state: State, event: Event, reached: State
) -> None:
    """In particular none leads back to STARTING, and none is lost."""
    assert TRANSITIONS[state, event] is reached


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    ("check", "reached"),
    [
        (Check.OK, State.READY),
        (Check.LOADING, State.LOADING),
        (Check.FAILED, State.DOWN),
    ],
)
def test_with_fall_and_rise_of_one_each_check_decides(
    state: State, check: Check, reached: State
) -> None:
    assert after(make(state, fall=1, rise=1), check) == [reached]


@pytest.mark.parametrize("state", list(State))
def test_only_a_ready_worker_is_available(state: State) -> None:
    assert make(state).available is (state is State.READY)


# --- Counting checks --------------------------------------------------------------


def test_a_ready_worker_falls_with_the_last_of_so_many_failed_checks() -> None:
    failed = [Check.FAILED] * 3
    worker = make(State.READY, fall=3)
    assert after(worker, *failed) == [State.READY, State.READY, State.DOWN]


@pytest.mark.parametrize("between", [Check.OK, Check.LOADING])
def test_failed_checks_count_in_a_row_only(between: Check) -> None:
    worker = make(State.READY, fall=2)
    after(worker, Check.FAILED, between, Check.OK)
    assert after(worker, Check.FAILED) == [State.READY]
    assert after(worker, Check.FAILED) == [State.DOWN]


@pytest.mark.parametrize("state", [State.STARTING, State.LOADING])
def test_who_was_not_ready_falls_with_the_first_failed_check(state: State) -> None:
    assert after(make(state, fall=3), Check.FAILED) == [State.DOWN]


def test_a_worker_that_is_down_rises_with_the_last_of_so_many_good_checks() -> None:
    worker = make(State.DOWN, rise=3)
    assert after(worker, *[Check.OK] * 3) == [State.DOWN, State.DOWN, State.READY]


def test_good_checks_count_in_a_row_only() -> None:
    worker = make(State.DOWN, rise=2)
    assert set(after(worker, *[Check.OK, Check.FAILED] * 4)) == {State.DOWN}
    assert after(worker, Check.OK, Check.OK) == [State.DOWN, State.READY]


def test_good_checks_of_an_earlier_life_do_not_count() -> None:
    worker = make(State.READY, fall=1, rise=2)
    after(worker, Check.OK, Check.OK, Check.FAILED)
    assert after(worker, Check.OK, Check.OK) == [State.DOWN, State.READY]


@pytest.mark.parametrize("state", [State.STARTING, State.LOADING])
def test_who_was_not_down_is_ready_with_the_first_good_check(state: State) -> None:
    assert after(make(state, rise=3), Check.OK) == [State.READY]


def test_a_ready_worker_that_loads_again_is_out_until_it_has_loaded() -> None:
    worker = make(State.READY)
    assert after(worker, Check.LOADING, Check.LOADING, Check.OK) == [
        State.LOADING,
        State.LOADING,
        State.READY,
    ]


def test_it_is_in_doubt_between_its_first_failure_and_its_fall() -> None:
    worker = make(State.READY, fall=2)
    assert not worker.in_doubt
    after(worker, Check.FAILED)
    assert worker.in_doubt
    after(worker, Check.FAILED)
    assert not worker.in_doubt  # there is nothing to doubt about it
    after(worker, Check.OK)
    assert not worker.in_doubt


def test_it_tells_why_it_is_in_its_state() -> None:
    worker = make()
    assert worker.reason == "not reached yet"
    worker.observe(Check.OK, "ok in 2 ms")
    assert worker.reason == "ok in 2 ms"
    worker.observe(Check.FAILED, "timed out")
    assert worker.reason == "ok in 2 ms"  # one failed check does not say that it is
    after(worker, Check.FAILED)
    worker.observe(Check.FAILED, "connection refused")
    assert worker.reason == "connection refused"


def test_each_change_is_logged_once_and_going_down_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    worker = make(fall=2)
    after(worker, Check.LOADING, Check.LOADING, Check.OK, Check.OK)
    after(worker, Check.FAILED, Check.FAILED, Check.FAILED)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "worker w1: starting -> loading (loading)"),
        ("INFO", "worker w1: loading -> ready (ok)"),
        ("WARNING", "worker w1: ready -> down (failed)"),
    ]


# --- What it told about itself ----------------------------------------------------


def test_before_it_was_reached_nothing_is_known_of_it() -> None:
    worker = make()
    assert (worker.description, worker.checked_at) == (None, None)
    assert not worker.serves("qwen")


def test_it_serves_the_models_that_it_told_and_no_others() -> None:
    worker = make()
    worker.observe(Check.OK, "ok", ABOUT)
    assert worker.serves("qwen")
    assert worker.serves("tiny")
    assert not worker.serves("Qwen")
    assert not worker.serves("")


def test_what_was_learnt_stays_when_a_check_learns_nothing() -> None:
    """A worker that is down still serves its model: the answer is 503, not 404."""
    worker = make(fall=1)
    worker.observe(Check.OK, "ok", ABOUT)
    after(worker, Check.OK, Check.FAILED)
    assert worker.state is State.DOWN
    assert worker.serves("qwen")


def test_another_model_takes_the_place_of_the_last_one() -> None:
    worker = make()
    worker.observe(Check.OK, "ok", ABOUT)
    worker.observe(Check.OK, "ok", Description((Model("llama"),)))
    assert worker.serves("llama")
    assert not worker.serves("qwen")


def test_each_check_has_its_moment() -> None:
    clock = Clock(50.0)
    worker = make(clock=clock)
    for check in Check:
        worker.observe(check, "")
        assert worker.checked_at == clock()
        clock.advance(30)


# --- Who talks is alive -----------------------------------------------------------


def test_a_worker_that_talks_is_kept_whatever_its_health_check_says() -> None:
    """Bursts starve llama-server's HTTP threads while tokens flow."""
    clock = Clock()
    worker = make(State.READY, fall=1, timeout=5, clock=clock)
    lease = worker.lease()
    for _ in range(10):
        lease.heard_at = clock.advance(30)
        clock.advance(5)  # its last byte came when the ping began
        assert after(worker, Check.FAILED) == [State.READY]
        assert worker.checked_at == clock()
        assert not worker.in_doubt


def test_a_worker_that_fell_silent_before_the_ping_falls() -> None:
    clock = Clock()
    worker = make(State.READY, fall=1, timeout=5, clock=clock)
    worker.lease().heard_at = clock()
    clock.advance(5.001)
    assert after(worker, Check.FAILED) == [State.DOWN]


def test_an_answer_that_has_not_begun_is_no_sign_of_life() -> None:
    worker = make(State.READY, fall=1)
    worker.lease()
    assert after(worker, Check.FAILED) == [State.DOWN]


def test_an_answer_that_has_ended_is_no_sign_of_life() -> None:
    clock = Clock()
    worker = make(State.READY, fall=1, clock=clock)
    lease = worker.lease()
    lease.heard_at = clock()
    lease.release(Outcome.COMPLETE)
    assert after(worker, Check.FAILED) == [State.DOWN]


def test_a_failed_check_that_is_not_believed_leaves_the_count_as_it_was() -> None:
    clock = Clock()
    worker = make(State.READY, fall=2, clock=clock)
    after(worker, Check.FAILED)
    lease = worker.lease()
    lease.heard_at = clock()
    after(worker, Check.FAILED, Check.FAILED)
    assert worker.in_doubt
    assert worker.state is State.READY
    lease.release(Outcome.COMPLETE)
    assert after(worker, Check.FAILED) == [State.DOWN]


def test_one_talking_answer_among_silent_ones_is_enough() -> None:
    clock = Clock()
    worker = make(State.READY, clock=clock)
    silent, talking = worker.lease(), worker.lease()
    silent.heard_at, talking.heard_at = clock() - 60, clock()
    assert worker.heard_since(clock())
    assert not worker.heard_since(clock() + 0.001)
    talking.release(Outcome.COMPLETE)
    assert worker.heard_since(clock() - 60)
    assert not worker.heard_since(clock() - 59)


def test_a_worker_that_talks_and_says_that_it_loads_is_believed() -> None:
    """Only silence is doubted, not an answer."""
    clock = Clock()
    worker = make(State.READY, clock=clock)
    worker.lease().heard_at = clock()
    assert after(worker, Check.LOADING) == [State.LOADING]


# --- Leases and suspicion ---------------------------------------------------------

# The ends of an attempt that have the worker asked how it is.
BLAMED = (Outcome.WORKER_FAILED, Outcome.SLOW, Outcome.BUSY)


def test_a_lease_knows_its_worker_and_its_moment() -> None:
    clock = Clock(70.0)
    lease = make(clock=clock).lease()
    assert (lease.worker, lease.taken_at) == ("w1", 70.0)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_is_the_workers_own_doing_makes_it_suspect(outcome: Outcome) -> None:
    """Clients that leave and bad requests say nothing about a worker.

    One that is slow or busy is looked at as well, but only a failure counts.
    """
    worker = make(State.READY)
    suspicions: list[int] = []
    worker.on_suspicion = lambda: suspicions.append(worker.in_flight)
    worker.lease().release(outcome)
    # The place is free when it is told.
    assert suspicions == ([0] if outcome in BLAMED else [])
    assert worker.in_doubt is (outcome is Outcome.WORKER_FAILED)
    assert worker.available  # until a check has failed as well


def test_failed_requests_shorten_the_way_down() -> None:
    worker = make(State.READY, fall=3)
    for _ in range(2):
        worker.lease().release(Outcome.WORKER_FAILED)
    assert after(worker, Check.FAILED) == [State.DOWN]


def test_failed_requests_alone_leave_the_health_as_it_is() -> None:
    """Its health check is asked at once; the requests may have been the reason."""
    worker = make(State.READY, fall=2)
    for _ in range(9):
        worker.lease().release(Outcome.WORKER_FAILED)
    assert worker.state is State.READY
    assert after(worker, Check.OK, Check.FAILED) == [State.READY, State.READY]


def test_failed_requests_open_the_breaker_which_good_checks_do_not_close() -> None:
    """A process can be in good `/health` with its GPU gone."""
    worker = make(State.READY)
    failures = worker.limits.consecutive
    for _ in range(failures - 1):
        worker.lease().release(Outcome.WORKER_FAILED)
    assert worker.available
    worker.lease().release(Outcome.WORKER_FAILED)
    assert not worker.available
    assert after(worker, Check.OK, Check.OK) == [State.READY, State.READY]
    assert not worker.available


def test_a_failed_request_interrupts_the_way_up() -> None:
    worker = make(State.READY, fall=1, rise=2)
    lease = worker.lease()
    after(worker, Check.FAILED, Check.OK)
    lease.release(Outcome.WORKER_FAILED)
    assert after(worker, Check.OK, Check.OK) == [State.DOWN, State.READY]


def test_a_record_of_a_worker_tells_what_it_is_doing() -> None:
    worker = make(State.READY)
    worker.lease()
    after(worker, Check.FAILED)
    assert repr(worker) == "<Worker w1 READY in_flight=1 good=0 bad=1>"


def test_two_workers_with_the_same_configuration_are_two() -> None:
    clock = Clock()
    assert len({make(clock=clock), make(clock=clock)}) == 2


class Leases(RuleBasedStateMachine):
    """Requests come and go, checks come in between; a simple model keeps the books."""

    leases = Bundle("leases")

    @dataclass(eq=False)
    class Place:
        lease: Lease
        outcome: Outcome | None = None

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.worker = make(State.READY, fall=3, rise=2, clock=self.clock)
        self.worker.on_suspicion = self.suspect
        self.held: set[Lease] = set()
        self.suspicions = self.blamed = 0
        self.bad = self.good = 0
        self.state = State.READY

    def suspect(self) -> None:
        self.suspicions += 1

    def end(self, place: Place, outcome: Outcome) -> None:
        if place.outcome is None:
            place.outcome = outcome
            self.held.discard(place.lease)
            self.blamed += outcome in BLAMED
            if outcome is Outcome.WORKER_FAILED:
                self.bad, self.good = self.bad + 1, 0

    @rule(target=leases)
    def take(self) -> Place:
        lease = self.worker.lease()
        self.held.add(lease)
        return self.Place(lease)

    @rule(place=leases, outcome=st.sampled_from(Outcome))
    def release(self, place: Place, outcome: Outcome) -> None:
        """Release it, perhaps not for the first time."""
        place.lease.release(outcome)
        self.end(place, outcome)

    @rule(place=consumes(leases), outcome=st.none() | st.sampled_from(Outcome))
    def leave(self, place: Place, outcome: Outcome | None) -> None:
        """Leave its block, and release it there or not."""
        with place.lease:
            if outcome is not None:
                place.lease.release(outcome)
                self.end(place, outcome)
        self.end(place, Outcome.CLIENT_GONE)

    @rule(place=leases)
    def hear(self, place: Place) -> None:
        place.lease.heard_at = self.clock()

    @rule(seconds=st.sampled_from([0.5, 5.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(check=st.sampled_from(Check))
    def observe(self, check: Check) -> None:
        self.worker.observe(check, check.value)
        if check is Check.OK:
            self.good, self.bad = self.good + 1, 0
            if self.state is not State.DOWN or self.good >= 2:
                self.state = State.READY
        elif check is Check.LOADING:
            self.good = self.bad = 0
            self.state = State.LOADING
        elif all(self.clock() - lease.heard_at > 5 for lease in self.held):
            self.good, self.bad = 0, self.bad + 1
            if self.state is not State.READY or self.bad >= 3:
                self.state = State.DOWN

    @invariant()
    def places_are_given_back_once(self) -> None:
        assert self.worker.in_flight == len(self.held)
        assert self.worker.leases == self.held
        assert all(lease.outcome is None for lease in self.held)

    @invariant()
    def each_suspicion_is_told_once(self) -> None:
        assert self.suspicions == self.blamed

    @invariant()
    def health_is_what_the_checks_say(self) -> None:
        assert self.worker.state is self.state
        works = self.worker.breaker.available  # which has books and a test of its own
        assert self.worker.available is (self.state is State.READY and works)
        assert self.worker.in_doubt is (self.state is State.READY and self.bad > 0)

    def teardown(self) -> None:
        for lease in list(self.held):
            lease.release(Outcome.HUB_STOPPED)
        assert self.worker.in_flight == 0


TestLeases = Leases.TestCase
TestLeases.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
