"""A worker's health, what it serves, and the places that its requests take."""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from types import FrameType

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from gollama_proxy.config.settings import Breaker as Policy
from gollama_proxy.config.settings import Health, Origin, WorkerConfig
from gollama_proxy.fleet.breaker import Breaker, BreakerState, Verdict
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.speed import Pace
from gollama_proxy.fleet.state import OUT, TRANSITIONS, WorkerEvent, WorkerState
from gollama_proxy.fleet.worker import MOST_SLOTS, Worker
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock
from tests.fakes.pool import pool

CONFIG = WorkerConfig(
    "http://10.0.0.11:8080", Origin("http", "10.0.0.11", 8080, ""), "w1"
)
ABOUT = Description((Model("qwen", 4096), Model("tiny")), slots=4, context=4096)


def make(
    state: WorkerState = WorkerState.STARTING,
    *,
    fall: int = 3,
    rise: int = 1,
    timeout: float = 5.0,
    clock: Clock | None = None,
    policy: Policy | None = None,
) -> Worker:
    """Make a worker that has come to a state the way workers do."""
    health = Health(fall=fall, rise=rise, timeout=timeout)
    worker = Worker(CONFIG, health, clock or Clock(), policy=policy or Policy())
    if state is WorkerState.READY:
        worker.observe(Check.OK, "ok")
    elif state is WorkerState.LOADING:
        worker.observe(Check.LOADING, "loading")
    elif state is WorkerState.DOWN:
        worker.observe(Check.FAILED, "refused")
    elif state in (WorkerState.ASLEEP, WorkerState.WAKING):
        worker.reconfigure(replace(CONFIG, mac="00:11:22:33:44:55"))
        worker.observe(Check.FAILED, "no answer")
        if state is WorkerState.WAKING:
            worker.woken()
    assert worker.state is state
    return worker


def after(worker: Worker, *checks: Check) -> list[WorkerState]:
    """Observe these checks, and list the state after each."""
    states = []
    for check in checks:
        worker.observe(check, check.value)
        states.append(worker.state)
    return states


# --- The table --------------------------------------------------------------------


def test_the_table_has_every_event_in_every_state() -> None:
    assert set(TRANSITIONS) == set(product(WorkerState, WorkerEvent))
    assert set(TRANSITIONS.values()) <= set(WorkerState)


# Those of a worker whose machine cannot be woken.
AWAKE = [
    state
    for state in WorkerState
    if state not in (WorkerState.ASLEEP, WorkerState.WAKING)
]


@pytest.mark.parametrize("state", AWAKE)
@pytest.mark.parametrize(
    ("event", "reached"),
    [
        (WorkerEvent.ROSE, WorkerState.READY),
        (WorkerEvent.LOADING, WorkerState.LOADING),
        (WorkerEvent.FELL, WorkerState.DOWN),
    ],
)
def test_an_event_leads_to_its_state_wherever_it_finds_the_worker(
    state: WorkerState, event: WorkerEvent, reached: WorkerState
) -> None:
    """In particular none leads back to STARTING, and none is lost."""
    assert TRANSITIONS[state, event] is reached


@pytest.mark.parametrize(
    ("event", "reached"),
    [
        (WorkerEvent.SLEPT, WorkerState.ASLEEP),
        (WorkerEvent.WOKEN, None),
        (WorkerEvent.GIVEN_UP, None),
    ],
)
@pytest.mark.parametrize("state", AWAKE)
def test_only_a_worker_that_does_not_answer_is_asleep(
    state: WorkerState, event: WorkerEvent, reached: WorkerState | None
) -> None:
    assert TRANSITIONS[state, event] is (reached or state)


@pytest.mark.parametrize("state", [*AWAKE, WorkerState.ASLEEP])
@pytest.mark.parametrize(
    ("check", "reached"),
    [
        (Check.OK, WorkerState.READY),
        (Check.LOADING, WorkerState.LOADING),
        (Check.FAILED, None),
        (Check.REFUSED, WorkerState.DOWN),
    ],
)
def test_a_worker_with_a_mac_sleeps_while_it_does_not_answer(
    state: WorkerState, check: Check, reached: WorkerState | None
) -> None:
    worker = make(state, fall=1, rise=1)
    worker.reconfigure(replace(CONFIG, mac="00:11:22:33:44:55"))
    assert after(worker, check) == [reached or WorkerState.ASLEEP]


@pytest.mark.parametrize("state", AWAKE)
@pytest.mark.parametrize(
    ("check", "reached"),
    [
        (Check.OK, WorkerState.READY),
        (Check.LOADING, WorkerState.LOADING),
        (Check.FAILED, WorkerState.DOWN),
        (Check.REFUSED, WorkerState.DOWN),
    ],
)
def test_with_fall_and_rise_of_one_each_check_decides(
    state: WorkerState, check: Check, reached: WorkerState
) -> None:
    assert after(make(state, fall=1, rise=1), check) == [reached]


@pytest.mark.parametrize("state", list(WorkerState))
def test_only_a_ready_worker_is_available(state: WorkerState) -> None:
    worker = make(state)
    assert worker.available is worker.admits is (state is WorkerState.READY)
    assert worker.is_down is (state in OUT)


# --- Counting checks --------------------------------------------------------------


def test_a_ready_worker_falls_with_the_last_of_so_many_failed_checks() -> None:
    failed = [Check.FAILED] * 3
    worker = make(WorkerState.READY, fall=3)
    assert after(worker, *failed) == [
        WorkerState.READY,
        WorkerState.READY,
        WorkerState.DOWN,
    ]


@pytest.mark.parametrize("between", [Check.OK, Check.LOADING])
def test_failed_checks_count_in_a_row_only(between: Check) -> None:
    worker = make(WorkerState.READY, fall=2)
    after(worker, Check.FAILED, between, Check.OK)
    assert after(worker, Check.FAILED) == [WorkerState.READY]
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.LOADING])
def test_a_worker_that_was_not_ready_falls_with_the_first_failed_check(
    state: WorkerState,
) -> None:
    assert after(make(state, fall=3), Check.FAILED) == [WorkerState.DOWN]


def test_a_worker_that_is_down_rises_with_the_last_of_so_many_good_checks() -> None:
    worker = make(WorkerState.DOWN, rise=3)
    assert after(worker, *[Check.OK] * 3) == [
        WorkerState.DOWN,
        WorkerState.DOWN,
        WorkerState.READY,
    ]


def test_good_checks_count_in_a_row_only() -> None:
    worker = make(WorkerState.DOWN, rise=2)
    assert set(after(worker, *[Check.OK, Check.FAILED] * 4)) == {WorkerState.DOWN}
    assert after(worker, Check.OK, Check.OK) == [WorkerState.DOWN, WorkerState.READY]


def test_good_checks_of_an_earlier_life_do_not_count() -> None:
    worker = make(WorkerState.READY, fall=1, rise=2)
    after(worker, Check.OK, Check.OK, Check.FAILED)
    assert after(worker, Check.OK, Check.OK) == [WorkerState.DOWN, WorkerState.READY]


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.LOADING])
def test_a_worker_that_was_not_down_is_ready_with_the_first_good_check(
    state: WorkerState,
) -> None:
    assert after(make(state, rise=3), Check.OK) == [WorkerState.READY]


def test_a_ready_worker_that_loads_again_is_out_until_it_has_loaded() -> None:
    worker = make(WorkerState.READY)
    assert after(worker, Check.LOADING, Check.LOADING, Check.OK) == [
        WorkerState.LOADING,
        WorkerState.LOADING,
        WorkerState.READY,
    ]


def test_it_is_in_doubt_between_its_first_failure_and_its_fall() -> None:
    worker = make(WorkerState.READY, fall=2)
    assert not worker.in_doubt
    after(worker, Check.FAILED)
    assert worker.in_doubt
    after(worker, Check.FAILED)
    assert not worker.in_doubt  # there is nothing to doubt about it
    after(worker, Check.OK)
    assert not worker.in_doubt


def test_it_shows_the_reason_for_its_state() -> None:
    worker = make()
    assert worker.reason == "not reached yet"
    worker.observe(Check.OK, "ok in 2 ms")
    assert worker.reason == "ok in 2 ms"
    worker.observe(Check.FAILED, "timed out")
    assert worker.reason == "ok in 2 ms"  # one failed check does not change it
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


# --- What it has listed -----------------------------------------------------------


def test_before_it_was_reached_nothing_is_known_of_it() -> None:
    worker = make()
    assert worker.description is None
    assert not worker.serves("qwen")


def test_it_serves_the_models_that_it_lists_and_no_others() -> None:
    worker = make()
    worker.observe(Check.OK, "ok", ABOUT)
    assert worker.serves("qwen")
    assert worker.serves("tiny")
    assert not worker.serves("Qwen")
    assert not worker.serves("")
    assert worker.context_of("qwen") == 4096
    assert worker.context_of("tiny") is None
    assert worker.context_of("Qwen") is None


def test_what_it_refuses_is_what_it_reports_not_to_take() -> None:
    """Nothing where it reports nothing, or reports it of a model that is not loaded."""
    models = (
        Model("blind", inputs=()),
        Model("seeing", inputs=("image",)),
        Model("silent"),
        Model("resting", loaded=False, inputs=()),
    )
    worker = make()
    worker.observe(Check.OK, "ok", Description(models))
    assert worker.refuses("blind") == {"image", "audio", "video"}
    assert worker.refuses("seeing") == {"audio", "video"}
    assert not worker.refuses("silent")
    assert not worker.refuses("resting")
    assert not worker.refuses("other")


def test_what_was_learnt_stays_when_a_check_learns_nothing() -> None:
    """A worker that is down still serves its model: the answer is 503, not 404."""
    worker = make(fall=1)
    worker.observe(Check.OK, "ok", ABOUT)
    after(worker, Check.OK, Check.FAILED)
    assert worker.state is WorkerState.DOWN
    assert worker.serves("qwen")


def test_another_model_takes_the_place_of_the_last_one() -> None:
    worker = make()
    worker.observe(Check.OK, "ok", ABOUT)
    worker.observe(Check.OK, "ok", Description((Model("llama"),)))
    assert worker.serves("llama")
    assert not worker.serves("qwen")


# --- Models stated by hand --------------------------------------------------------


def stated(*models: str) -> Worker:
    return Worker(replace(CONFIG, models=models), Health(), Clock())


def test_it_answers_to_the_models_that_are_stated_whatever_it_lists() -> None:
    worker = stated("qwen*", "llama-3.1-8b")
    for _ in range(2):
        assert worker.serves("qwen2.5")
        assert worker.serves("llama-3.1-8b")
        assert not worker.serves("tiny")
        assert not worker.serves("Qwen2.5")
        worker.observe(Check.OK, "ok", ABOUT)


def test_its_models_are_those_listed_that_match_and_the_plain_names() -> None:
    worker = stated("q*", "llama", "tin?", "[ab]", "llama", "qwen")
    assert worker.models == (Model("llama"), Model("qwen"))
    listed = (Model("x"), Model("qwen", 9, True), Model("tiny"), Model("a"))
    worker.observe(Check.OK, "ok", Description(listed, context=7))
    assert worker.models == (
        Model("qwen", 9, True),
        Model("tiny"),
        Model("a"),
        Model("llama", 7),
    )
    assert (worker.context_of("qwen"), worker.context_of("llama")) == (9, 7)


def test_a_canary_loads_no_model_if_another_one_was_used() -> None:
    """A router, Ollama and LM Studio list all models that they could load."""
    worker = make()
    loaded = {"first": False, "second": True, "third": None, "fourth": None}
    listed = tuple(Model(name, loaded=each) for name, each in loaded.items())
    worker.observe(Check.OK, "ok", Description(listed))
    assert worker.some_model == "second"
    for name in ("third", "gone", "first"):
        worker.pace_of(name)
    assert worker.some_model == "third"


def test_some_model_is_known_as_soon_as_any_is() -> None:
    """One that it serves, or one that it lists, or one that it has answered to."""
    worker = stated("qwen*")
    assert worker.some_model is None
    lease = worker.lease("qwen3")
    lease.release(Result.COMPLETE)
    assert worker.some_model == "qwen3"
    worker.observe(Check.OK, "ok", Description((Model("model.gguf"),)))
    assert worker.some_model == "model.gguf"
    worker.observe(Check.OK, "ok", Description((Model("m.gguf"), Model("qwen2"))))
    assert worker.some_model == "qwen2"
    assert make().some_model is None


# --- What it has loaded -----------------------------------------------------------


def router(*models: Model, clock: Clock | None = None, slots: int = 1) -> Worker:
    made = make(clock=clock)
    made.observe(Check.OK, "ok", Description(models, slots=slots))
    return made


@pytest.mark.parametrize(
    ("loaded", "loading", "loads", "cold"),
    [
        (None, False, False, False),
        (True, False, False, False),
        (False, False, True, True),
        (False, True, True, False),
    ],
)
def test_what_is_not_loaded_has_to_be(
    loaded: bool | None, loading: bool, loads: bool, cold: bool
) -> None:
    worker = router(Model("a", None, loaded, loading), Model("b"))
    assert (worker.loads("a"), worker.is_cold("a")) == (loads, cold)
    assert worker.has_loaded("a") is loaded
    assert not worker.loads("b")
    assert worker.has_loaded("b") is worker.has_loaded("c") is None
    assert worker.lease("a").loads is loads
    assert not worker.lease("b").loads


def test_an_answer_shows_that_its_model_is_loaded() -> None:
    worker, looks = router(Model("a", loaded=False)), []
    worker.on_suspicion = lambda: looks.append("now")
    first, second = worker.lease("a"), worker.lease("a")
    assert first.loads
    assert second.loads
    worker.has_answered(first)
    assert looks == ["now"]  # another model may have made room for it
    assert worker.has_loaded("a")
    third = worker.lease("a")
    second.release(Result.REFUSED)
    assert looks == ["now", "now"]
    worker.has_answered(third)
    assert not third.loads
    assert looks == ["now", "now"]
    worker.observe(Check.OK, "ok", Description((Model("a", loaded=False),)))
    assert worker.is_cold("a") is False  # a request waits for it
    for lease in (first, second, third):
        lease.release(Result.COMPLETE)
    assert worker.is_cold("a")


def test_the_time_of_a_load_is_no_measure_of_reading() -> None:
    clock = Clock()
    worker = router(Model("a", loaded=False), clock=clock)
    lease = worker.lease("a")
    lease.prompt_bytes, lease.first_token = 10_000, 100.0
    lease.tokens, lease.seconds = 20, 2.0
    lease.release(Result.COMPLETE)
    pace = worker.pace_of("a")
    assert pace.rate == pace.expectations.rate
    assert pace.speed.reads is None
    assert pace.speed.writes() == 10.0


def test_a_slot_that_is_taken_again_at_once_was_not_free() -> None:
    clock = Clock()
    worker = router(Model("a"), clock=clock)
    assert worker.full_for == 0.0
    lease = worker.lease("a")
    clock.advance(3.0)
    assert worker.full_for == 3.0
    seen, leases = [], []

    def hand_out() -> None:
        seen.append(worker.full_for)
        leases.append(worker.lease("a"))

    worker.on_free = hand_out
    lease.release(Result.COMPLETE)
    assert seen == [0.0]
    assert worker.full_for == 3.0
    worker.on_free = None
    leases[0].release(Result.COMPLETE)
    clock.advance(3.0)
    worker.lease("a")
    clock.advance(1.0)
    assert worker.full_for == 1.0
    worker.observe(Check.OK, "ok", Description((Model("a"),), slots=2))
    assert worker.full_for == 0.0


def test_it_takes_no_more_requests_than_this_hub_may_have_of_it() -> None:
    (worker,) = pool(4)
    worker.allot(1)
    assert (worker.free, worker.room, worker.full) == (1, 4, False)
    lease = worker.lease("m")
    assert worker.full
    with worker.lease("m", slot=False):
        assert (worker.in_flight, worker.running) == (2, 1)
    worker.allot(9)
    assert worker.free == 3
    worker.allot(None)
    assert worker.free == 3
    assert worker.peak == 1
    lease.release(Result.COMPLETE)


def test_a_worker_without_a_number_of_slots_has_no_share() -> None:
    (worker,) = pool(None)
    worker.allot(0)
    assert not worker.full
    assert worker.room is None
    worker.observe(Check.OK, "ok", Description((Model("m"),), slots=2))
    assert worker.full


def test_a_slot_that_others_wait_for_is_given_up_before_it_can_be_taken_again() -> None:
    (worker,) = pool(4)
    worker.allot(2)
    seen: list[tuple[int, bool]] = []
    worker.on_yield = lambda it: it.allot(it.running)
    worker.on_free = lambda: seen.append((worker.running, worker.full))
    first, second = worker.lease("m"), worker.lease("m")
    first.release(Result.COMPLETE)
    second.release(Result.COMPLETE)
    assert seen == [(1, True), (0, True)]


def test_it_is_not_full_but_short_of_slots_if_this_hub_can_get_more() -> None:
    (worker,) = pool(2)
    worker.allot(1, scarce=False)
    lease = worker.lease("m")
    assert (worker.full, worker.short) == (False, True)
    worker.clock.advance(10)  # type: ignore[attr-defined]
    assert worker.full_for == 0
    worker.allot(2, scarce=False)
    assert (worker.full, worker.short) == (False, False)
    other = worker.lease("m")
    assert (worker.full, worker.short) == (True, False)
    other.release(Result.COMPLETE)
    lease.release(Result.COMPLETE)
    assert (worker.full, worker.short) == (False, False)


def test_it_is_full_without_a_request_if_other_hubs_have_all_slots() -> None:
    (worker,) = pool(4)
    worker.allot(0, scarce=True)
    worker.clock.advance(10)  # type: ignore[attr-defined]
    assert worker.full_for == 10
    worker.allot(1)
    worker.lease("m")
    worker.clock.advance(3)  # type: ignore[attr-defined]
    assert worker.full_for == 3


def test_slots_are_those_that_it_reported_last() -> None:
    worker = make()
    assert (worker.slots, worker.free) == (None, math.inf)
    worker.observe(Check.OK, "ok", ABOUT)
    assert worker.slots == 4
    worker.observe(Check.OK, "ok")
    assert worker.slots == 4
    worker.observe(Check.OK, "ok", Description(slots=8))
    assert worker.slots == 8
    worker.observe(Check.OK, "ok", Description())
    assert worker.slots is None


def test_configured_slots_are_not_asked_for() -> None:
    config = replace(CONFIG, slots=2)
    worker = Worker(config, Health(), Clock())
    assert worker.slots == 2
    worker.observe(Check.OK, "ok", ABOUT)
    assert worker.slots == 2


def test_free_are_the_slots_that_no_lease_has() -> None:
    worker = make()
    worker.observe(Check.OK, "ok", Description(slots=2))
    leases = [worker.lease() for _ in range(3)]
    assert worker.free == -1
    for lease in leases:
        lease.release(Result.COMPLETE)
    assert worker.free == 2


@pytest.mark.parametrize("slots", [0, -1, MOST_SLOTS + 1, 1 << 62])
def test_impossible_slots_are_ignored_and_logged_once(
    slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make()
    for _ in range(3):
        worker.observe(Check.OK, "ok", Description(slots=slots))
        assert (worker.slots, worker.free) == (None, math.inf)
    reported = [line for line in caplog.messages if "slots" in line]
    assert reported == [f"worker w1: reports {slots} slots"]


@pytest.mark.parametrize(
    ("weight", "vram_gib", "result"),
    [(None, None, 1.0), (2.5, None, 2.5), (None, 24.0, 24.0), (2.5, 24.0, 2.5)],
)
def test_the_weight_is_what_is_configured_else_the_memory(
    weight: float | None, vram_gib: float | None, result: float
) -> None:
    config = replace(CONFIG, weight=weight, vram_gib=vram_gib)
    assert Worker(config, Health(), Clock()).weight == result


# --- Answers prove that a worker is alive -----------------------------------------


def test_a_worker_that_sends_tokens_is_kept_whatever_its_health_check_finds() -> None:
    """Bursts starve llama-server's HTTP threads while tokens flow."""
    clock = Clock()
    worker = make(WorkerState.READY, fall=1, timeout=5, clock=clock)
    lease = worker.lease()
    for _ in range(10):
        lease.heard_at = clock.advance(30)
        clock.advance(5)  # its last byte came when the ping began
        assert after(worker, Check.FAILED) == [WorkerState.READY]
        assert not worker.in_doubt


def test_a_worker_that_fell_silent_before_the_ping_falls() -> None:
    clock = Clock()
    worker = make(WorkerState.READY, fall=1, timeout=5, clock=clock)
    worker.lease().heard_at = clock()
    clock.advance(5.001)
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


def test_an_answer_that_has_not_begun_is_no_sign_of_life() -> None:
    worker = make(WorkerState.READY, fall=1)
    worker.lease()
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


def test_an_answer_that_has_ended_is_no_sign_of_life() -> None:
    clock = Clock()
    worker = make(WorkerState.READY, fall=1, clock=clock)
    lease = worker.lease()
    lease.heard_at = clock()
    lease.release(Result.COMPLETE)
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


def test_a_failed_check_that_is_not_believed_leaves_the_count_as_it_was() -> None:
    clock = Clock()
    worker = make(WorkerState.READY, fall=2, clock=clock)
    after(worker, Check.FAILED)
    lease = worker.lease()
    lease.heard_at = clock()
    after(worker, Check.FAILED, Check.FAILED)
    assert worker.in_doubt
    assert worker.state is WorkerState.READY
    lease.release(Result.COMPLETE)
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


def test_one_active_answer_among_silent_ones_is_enough() -> None:
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock)
    silent, talking = worker.lease(), worker.lease()
    silent.heard_at, talking.heard_at = clock() - 60, clock()
    assert worker.heard_since(clock())
    assert not worker.heard_since(clock() + 0.001)
    talking.release(Result.COMPLETE)
    assert worker.heard_since(clock() - 60)
    assert not worker.heard_since(clock() - 59)


def test_a_worker_that_sends_tokens_and_reports_a_load_is_loading() -> None:
    """Only silence is doubted, not an answer."""
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock)
    worker.lease().heard_at = clock()
    assert after(worker, Check.LOADING) == [WorkerState.LOADING]


def test_bytes_of_answers_that_have_ended_do_not_count() -> None:
    """The last bytes of a process that has died may be very young."""
    clock = Clock()
    worker = make(WorkerState.READY, fall=1, clock=clock)
    worker.lease().heard_at = clock()
    assert after(worker, Check.FAILED) == [WorkerState.READY]
    assert after(worker, Check.REFUSED) == [WorkerState.DOWN]


# --- Leases and suspicion ---------------------------------------------------------

# The ends of an attempt that have the worker asked how it is.
BLAMED = (Result.WORKER_FAILED, Result.SLOW, Result.BUSY)
# Those that count like a failed check.
FAILED = (Result.WORKER_FAILED, Result.SLOW)


def test_a_lease_knows_its_worker_and_its_moment() -> None:
    clock = Clock(70.0)
    worker = make(clock=clock)
    lease = worker.lease()
    assert (lease.worker, lease.taken_at) == (worker, 70.0)


@pytest.mark.parametrize("outcome", list(Result))
def test_what_is_the_workers_own_doing_makes_it_suspect(outcome: Result) -> None:
    """Clients that leave and bad requests show nothing about a worker.

    One that is busy is looked at as well, but only a failure counts, or a hang.
    """
    worker = make(WorkerState.READY)
    suspicions: list[int] = []
    worker.on_suspicion = lambda: suspicions.append(worker.in_flight)
    worker.lease().release(outcome)
    # The place is free by then.
    assert suspicions == ([0] if outcome in BLAMED else [])
    assert worker.in_doubt is (outcome in FAILED)
    assert worker.available  # until a check has failed as well


@pytest.mark.parametrize("outcome", FAILED)
def test_failed_requests_shorten_the_way_down(outcome: Result) -> None:
    worker = make(WorkerState.READY, fall=3)
    for _ in range(2):
        worker.lease().release(outcome)
    assert after(worker, Check.FAILED) == [WorkerState.DOWN]


def test_failed_requests_alone_leave_the_health_as_it_is() -> None:
    """Its health check is asked at once; the requests may have been the reason."""
    worker = make(WorkerState.READY, fall=2)
    for _ in range(9):
        worker.lease().release(Result.WORKER_FAILED)
    assert worker.state is WorkerState.READY
    assert after(worker, Check.OK, Check.FAILED) == [
        WorkerState.READY,
        WorkerState.READY,
    ]


def test_failed_requests_open_the_breaker_which_good_checks_do_not_close() -> None:
    """A process can answer `/health` well although its GPU is lost."""
    worker = make(WorkerState.READY)
    failures = worker.policy.consecutive
    for _ in range(failures - 1):
        worker.lease().release(Result.WORKER_FAILED)
    assert worker.available
    worker.lease().release(Result.WORKER_FAILED)
    assert not worker.available
    assert after(worker, Check.OK, Check.OK) == [WorkerState.READY, WorkerState.READY]
    assert not worker.available


def test_a_failed_request_interrupts_the_way_up() -> None:
    worker = make(WorkerState.READY, fall=1, rise=2)
    lease = worker.lease()
    after(worker, Check.FAILED, Check.OK)
    lease.release(Result.WORKER_FAILED)
    assert after(worker, Check.OK, Check.OK) == [WorkerState.DOWN, WorkerState.READY]


# --- Clients that leave -----------------------------------------------------------


@pytest.mark.parametrize(
    ("waited", "allowance", "first_token", "slow"),
    [
        (2.1, 2.0, 0.0, True),
        (2.0, 2.0, 0.0, False),
        (1.0, 2.0, 0.0, False),
        (2.1, 2.0, 1.0, False),
        (9e9, math.inf, 0.0, False),
    ],
)
def test_a_client_that_leaves_after_a_hang_has_left_because_of_it(
    waited: float, allowance: float, first_token: float, slow: bool
) -> None:
    """A worker that hangs is not protected by its clients' impatience."""
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock, policy=Policy(window=1e12))
    for _ in range(worker.policy.consecutive):
        with worker.lease() as lease:
            lease.allowance, lease.first_token = allowance, first_token
            clock.advance(waited)
        assert lease.result is Result.CLIENT_GONE
    assert worker.available is not slow
    assert f"slow={5 * slow} " in repr(worker.breaker)
    assert not worker.in_doubt


# --- Proofs -----------------------------------------------------------------------

PROVING = Policy(jitter=0.0, canary=False)
PROOFS = {
    Result.COMPLETE: True,
    Result.SLOW: False,
    Result.WORKER_FAILED: False,
    Result.ERRED: False,
    Result.BUSY: None,
    Result.REFUSED: None,
    Result.CLIENT_GONE: None,
    Result.HUB_STOPPED: None,
}


def trip(breaker: Breaker) -> None:
    for _ in range(breaker.policy.consecutive):
        breaker.record(Verdict.FAILURE)
    assert breaker.state is BreakerState.OPEN


def half_open(
    *models: str, machine: bool = True, policy: Policy = PROVING
) -> tuple[Worker, Clock]:
    """Make a worker that has to prove itself, or one of its models."""
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock, policy=policy)
    breakers = [worker.breaker_of(model) for model in models]
    breakers += [worker.breaker] * machine
    for breaker in breakers:
        trip(breaker)
    clock.advance(5)
    assert all(breaker.state is BreakerState.HALF_OPEN for breaker in breakers)
    return worker, clock


@pytest.mark.parametrize("state", list(WorkerState))
@pytest.mark.parametrize("canary", [True, False])
def test_only_without_canaries_a_request_may_prove_a_worker(
    canary: bool, state: WorkerState
) -> None:
    """And only one that is there: it is not for requests to find that out."""
    worker, _ = half_open(policy=Policy(jitter=0.0, canary=canary))
    worker.state = state
    assert worker.can_serve("qwen") is (state is WorkerState.READY and not canary)
    assert worker.admits is worker.can_serve("qwen")
    assert not worker.available
    worker, _ = half_open("qwen", machine=False, policy=worker.policy)
    worker.state = state
    assert worker.can_serve("qwen") is (state is WorkerState.READY and not canary)
    assert worker.can_serve("tiny") is (state is WorkerState.READY)


@pytest.mark.parametrize("outcome", list(Result))
@pytest.mark.parametrize("machine", [True, False])
def test_the_outcome_of_a_request_is_the_proof(outcome: Result, machine: bool) -> None:
    worker, _ = half_open(*[] if machine else ["qwen"], machine=machine)
    breaker = worker.breaker if machine else worker.breaker_of("qwen")
    for _ in range(2):
        if breaker.state is BreakerState.HALF_OPEN:
            worker.lease("qwen").release(outcome)
    assert (
        breaker.state
        is {
            True: BreakerState.CLOSED,
            False: BreakerState.OPEN,
            None: BreakerState.HALF_OPEN,
        }[PROOFS[outcome]]
    )
    assert (breaker.permit() is not None) is (PROOFS[outcome] is None)


@pytest.mark.parametrize("outcome", list(Result))
def test_a_request_proves_the_machine_and_the_model_at_once(outcome: Result) -> None:
    worker, _ = half_open("qwen")
    for _ in range(2):
        if worker.can_serve("qwen"):
            worker.lease("qwen").release(outcome)
    assert worker.breaker.state is worker.breaker_of("qwen").state
    assert worker.breaker.transitions == worker.breaker_of("qwen").transitions


def test_one_request_at_a_time_proves_a_worker() -> None:
    worker, _ = half_open("qwen")
    lease = worker.lease("qwen")
    assert not worker.can_serve("qwen")
    assert not worker.can_serve("tiny")
    lease.release(Result.REFUSED)
    assert worker.can_serve("qwen")
    assert worker.can_serve("tiny")


def test_one_request_at_a_time_proves_a_model_and_the_others_are_not_kept_away() -> (
    None
):
    worker, _ = half_open("qwen", machine=False)
    lease = worker.lease("qwen")
    assert not worker.can_serve("qwen")
    assert worker.can_serve("tiny")
    other = worker.lease("tiny")
    assert (len(lease.permits), len(other.permits)) == (1, 0)
    other.release(Result.COMPLETE)
    assert not worker.can_serve("qwen")


def test_a_client_that_leaves_in_the_middle_of_a_proof_gives_it_back() -> None:
    worker, clock = half_open()
    with pytest.raises(ValueError), worker.lease("qwen"):
        assert not worker.can_serve("qwen")
        raise ValueError
    assert worker.can_serve("qwen")
    with worker.lease("qwen") as lease:
        lease.allowance = 2.0
        clock.advance(2.1)
    assert worker.breaker.state is BreakerState.OPEN


def test_a_canary_keeps_requests_away_while_it_proves() -> None:
    worker, _ = half_open("qwen")
    canary = worker.breaker.permit()
    assert canary is not None
    assert not worker.can_serve("qwen")
    lease = worker.lease("qwen")
    assert len(lease.permits) == 1  # that of the model
    lease.release(Result.REFUSED)
    assert worker.breaker.permit() is None
    canary.settle(None)
    assert worker.can_serve("qwen")


@pytest.mark.parametrize("outcome", list(Result))
def test_a_request_from_before_proves_nothing(outcome: Result) -> None:
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock, policy=PROVING)
    before = worker.lease("qwen")
    trip(worker.breaker)
    clock.advance(5)
    proving = worker.lease("qwen")
    before.release(outcome)
    assert worker.breaker.state is BreakerState.HALF_OPEN
    assert not worker.can_serve("qwen")
    proving.release(Result.COMPLETE)
    assert worker.can_serve("qwen")


@pytest.mark.parametrize("check", [Check.FAILED, Check.REFUSED, Check.LOADING])
def test_a_worker_that_comes_back_from_the_dead_may_prove_itself_at_once(
    check: Check,
) -> None:
    """It has perhaps been repaired, and its models with it."""
    worker = make(WorkerState.READY, fall=1, policy=PROVING)
    breakers = [worker.breaker, worker.breaker_of("qwen")]
    for breaker in breakers:
        trip(breaker)
    after(worker, Check.OK)
    assert all(breaker.state is BreakerState.OPEN for breaker in breakers)
    after(worker, check, Check.OK)
    assert all(breaker.state is BreakerState.HALF_OPEN for breaker in breakers)
    assert worker.can_serve("qwen")


def test_a_model_that_fails_keeps_away_its_own_requests_only() -> None:
    worker = make(WorkerState.READY)
    breaker = worker.breaker_of("qwen")
    assert worker.breaker_of("qwen") is breaker is not worker.breaker_of("tiny")
    trip(breaker)
    assert (worker.can_serve("qwen"), worker.can_serve("tiny")) == (False, True)
    assert worker.available


# --- Speed ------------------------------------------------------------------------


def test_each_model_has_its_speed() -> None:
    worker = make(WorkerState.READY)
    before = worker.pace_of("qwen").allowance(10_000)
    lease = worker.lease("qwen")
    lease.prompt_bytes, lease.first_token = 10_000, 1.0
    lease.release(Result.COMPLETE)
    assert worker.pace_of("qwen").allowance(10_000) < before
    assert worker.pace_of("tiny").allowance(10_000) == before


def answer(worker: Worker, clock: Clock, tokens: int, model: str = "qwen") -> None:
    lease = worker.lease(model)
    lease.first_token, lease.seconds, lease.tokens = 1.0, 10.0, tokens
    clock.advance(10)
    lease.release(Result.COMPLETE)


def test_prompts_are_unread_until_the_answer_begins() -> None:
    worker = make(WorkerState.READY)
    assert worker.unread == 0
    first, second = worker.lease("qwen"), worker.lease("tiny")
    first.prompt_bytes, second.prompt_bytes = 100, 20
    assert worker.unread == 120
    first.first_token = 0.5
    assert worker.unread == 20
    second.release(Result.CLIENT_GONE)
    assert worker.unread == 0


def test_what_a_worker_reports_about_its_cache_counts() -> None:
    worker = make(WorkerState.READY)
    lease = worker.lease("qwen")
    lease.prompt_bytes, lease.first_token = 8000, 1.0
    lease.tokens, lease.seconds = 100, 2.0
    lease.prefill = Prefill(tokens=500, cached=1500, seconds=0.5)
    lease.release(Result.COMPLETE)
    speed = worker.pace_of("qwen").speed
    assert (speed.reads, speed.writes(1)) == (4000, 50)


def test_a_complete_answer_is_slow_if_the_worker_was_four_times_as_fast() -> None:
    """With this model, that is."""
    clock = Clock()
    worker = make(
        WorkerState.READY, clock=clock, policy=Policy(window=1e9, minimum_calls=20)
    )
    for _ in range(10):
        answer(worker, clock, 600)
        answer(worker, clock, 20, "large")
    assert "slow=0" in repr(worker.breaker)
    answer(worker, clock, 100)
    answer(worker, clock, 100, "large")
    assert "slow=1" in repr(worker.breaker)


def test_a_first_token_that_was_missed_lowers_what_is_expected() -> None:
    worker = make(WorkerState.READY)
    pace = worker.pace_of("qwen")
    pace.learn(100_000, 0.1, 0, 0.0)
    fast = pace.rate
    lease = worker.lease("qwen")
    lease.first_token = 1.0
    lease.release(Result.SLOW)
    assert pace.rate == fast  # it stalled later on
    worker.lease("tiny").release(Result.SLOW)
    assert pace.rate == fast
    worker.lease("qwen").release(Result.SLOW)
    assert pace.rate < fast


def test_a_record_of_a_worker_shows_its_work() -> None:
    worker = make(WorkerState.READY)
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
        outcome: Result | None = None
        proves: int | None = None  # the generation of the breaker that it may prove

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        policy = Policy(consecutive=2, open=1, jitter=0.0, canary=False)
        self.worker = make(
            WorkerState.READY, fall=3, rise=2, clock=self.clock, policy=policy
        )
        self.worker.on_suspicion = self.suspect
        self.held: set[Lease] = set()
        self.proving: dict[Leases.Place, None] = {}  # the oldest first
        self.proofs: dict[int, int] = {}  # good ones, by generation
        self.suspicions = self.blamed = 0
        self.bad = self.good = 0
        self.state = WorkerState.READY

    def suspect(self) -> None:
        self.suspicions += 1

    @property
    def proof(self) -> Place | None:
        """The request that is the proof of the breaker now."""
        generation = self.worker.breaker.generation
        proofs = [place for place in self.proving if place.proves == generation]
        assert len(proofs) <= 1
        return proofs[0] if proofs else None

    def end(self, place: Place, outcome: Result, before: int) -> None:
        """Note an end; `before` was the generation of the breaker."""
        if place.outcome is None:
            place.outcome = outcome
            self.held.discard(place.lease)
            self.blamed += outcome in BLAMED
            if outcome in FAILED:
                self.bad, self.good = self.bad + 1, 0
            if place.proves is not None:
                self.proving.pop(place)
            if place.proves is not None and place.proves == before:
                self.judge(before, PROOFS[outcome])

    def judge(self, generation: int, good: bool | None) -> None:
        breaker = self.worker.breaker
        proofs = self.proofs[generation] = self.proofs.get(generation, 0) + bool(good)
        if good is False:
            assert breaker.state is BreakerState.OPEN
        elif proofs < 2:
            assert breaker.state is BreakerState.HALF_OPEN
            assert breaker.generation == generation
        else:
            assert breaker.closed

    @rule(target=leases)
    def take(self) -> Place:
        breaker = self.worker.breaker
        due = breaker.state is BreakerState.HALF_OPEN and self.proof is None
        lease = self.worker.lease()
        self.held.add(lease)
        assert len(lease.permits) == due
        place = self.Place(lease, proves=breaker.generation if due else None)
        if due:
            self.proving[place] = None
        return place

    @precondition(lambda self: self.worker.breaker.closed)
    @rule(long=st.booleans())
    def break_down(self, long: bool) -> None:
        for _ in range(self.worker.policy.consecutive):
            self.release(self.take(), Result.WORKER_FAILED)
        assert self.worker.breaker.state is BreakerState.OPEN
        if long:
            self.clock.advance(self.worker.breaker.opens_in())

    @precondition(lambda self: self.proving)
    @rule(outcome=st.sampled_from(Result))
    def prove(self, outcome: Result) -> None:
        """End a request that was admitted as a proof."""
        self.release(next(iter(self.proving)), outcome)

    @rule(place=leases, outcome=st.sampled_from(Result))
    def release(self, place: Place, outcome: Result) -> None:
        """Release it, perhaps not for the first time."""
        before = self.worker.breaker.generation
        place.lease.release(outcome)
        self.end(place, outcome, before)

    @rule(place=consumes(leases), outcome=st.none() | st.sampled_from(Result))
    def leave(self, place: Place, outcome: Result | None) -> None:
        """Leave its block, and release it there or not."""
        before = self.worker.breaker.generation
        with place.lease:
            if outcome is not None:
                place.lease.release(outcome)
                self.end(place, outcome, before)
        self.end(place, Result.CLIENT_GONE, before)

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
            if self.state is not WorkerState.DOWN or self.good >= 2:
                self.state = WorkerState.READY
        elif check is Check.LOADING:
            self.good = self.bad = 0
            self.state = WorkerState.LOADING
        elif check is Check.REFUSED or all(
            self.clock() - lease.heard_at > 5 for lease in self.held
        ):
            self.good, self.bad = 0, self.bad + 1
            if self.state is not WorkerState.READY or self.bad >= 3:
                self.state = WorkerState.DOWN

    @invariant()
    def places_are_given_back_once(self) -> None:
        assert self.worker.in_flight == len(self.held)
        assert self.worker.leases == self.held
        assert all(lease.result is None for lease in self.held)

    @invariant()
    def one_request_at_a_time_is_a_proof(self) -> None:
        breaker = self.worker.breaker
        if breaker.state is BreakerState.HALF_OPEN:
            assert breaker.admits is (self.proof is None)
        else:
            assert breaker.admits is breaker.closed
        ready = self.state is WorkerState.READY
        assert self.worker.can_serve("qwen") is (ready and breaker.admits)

    @invariant()
    def each_suspicion_is_reported_once(self) -> None:
        assert self.suspicions == self.blamed

    @invariant()
    def health_is_what_the_checks_say(self) -> None:
        assert self.worker.state is self.state
        works = self.worker.breaker.available  # which has its own model and test
        assert self.worker.available is (self.state is WorkerState.READY and works)
        assert self.worker.in_doubt is (
            self.state is WorkerState.READY and self.bad > 0
        )

    def teardown(self) -> None:
        for lease in list(self.held):
            lease.release(Result.HUB_STOPPED)
        assert self.worker.in_flight == 0
        if self.worker.breaker.state is BreakerState.HALF_OPEN:
            assert self.worker.breaker.permit() is not None


TestLeases = Leases.TestCase


# --- Bursts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "taken", "surplus"), [(4, 7, 0), (4, 9, 2), (None, 99, 0)]
)
def test_requests_beyond_the_threads(
    slots: int | None, taken: int, surplus: int
) -> None:
    worker = pool(slots)[0]
    for _ in range(taken):
        worker.lease(slot=False)
    assert worker.surplus() == surplus


# --- What is learnt from answers --------------------------------------------------


def test_a_context_that_is_not_listed_is_learnt_from_a_refusal() -> None:
    worker = make(WorkerState.READY)
    reported: list[str] = []
    worker.on_offer = lambda: reported.append("reported")
    worker.observe(Check.OK, "ok", ABOUT)
    reported.clear()
    worker.learn_context("tiny", 0)
    assert worker.context_of("tiny") is None
    for tokens in (2048, 2048, 1024):
        worker.learn_context("tiny", tokens)
        assert worker.context_of("tiny") == tokens
    assert len(reported) == 2, "once for each news"
    worker.learn_context("qwen", 1)
    assert worker.context_of("qwen") == 4096, "what it lists is believed"


def test_what_was_learnt_from_answers_is_forgotten_with_the_server_that_gave_them() -> (
    None
):
    other = Description((Model("tiny"),), build="b2")
    worker = make(WorkerState.READY)
    worker.observe(Check.OK, "ok", ABOUT)

    def learn() -> None:
        worker.learn_context("tiny", 2048)
        assert worker.accepts_name("tiny", "/tiny.gguf")

    def is_forgotten() -> bool:
        known = worker.answer_names.knows("tiny", "/tiny.gguf")
        return not known and worker.context_of("tiny") is None

    learn()
    worker.observe(Check.OK, "ok", ABOUT)
    assert not is_forgotten()
    worker.observe(Check.OK, "ok", other)
    assert is_forgotten()
    learn()
    after(worker, Check.LOADING, Check.OK)
    assert is_forgotten()


def test_another_build_in_an_answer_is_suspicious_once() -> None:
    worker = make(WorkerState.READY)
    looks: list[str] = []
    worker.on_suspicion = lambda: looks.append("look")
    worker.see_build("b1")  # its own is unknown
    worker.observe(Check.OK, "ok", Description((Model("tiny"),), build="b1"))
    for build in ("", "b1", "b2", "b2", "b1"):
        worker.see_build(build)
    assert len(looks) == 1


def test_a_worker_with_fewer_slots_than_before_is_full_from_then_on() -> None:
    clock = Clock()
    worker = make(WorkerState.READY, clock=clock)
    worker.observe(Check.OK, "ok", ABOUT)
    lease = worker.lease("qwen")
    clock.advance(5)
    worker.observe(Check.OK, "ok", replace(ABOUT, slots=1))
    clock.advance(3)
    assert worker.full_for == 3
    lease.release(Result.COMPLETE)
    assert worker.full_for == 0


# --- What it costs ----------------------------------------------------------------


def frames_of(action: Callable[[], object]) -> list[str]:
    """List the Python functions that are called."""
    called: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return called[1:]


@pytest.mark.parametrize(("tokens", "most"), [(0, 11), (150, 18)])
def test_an_answer_costs_few_calls(tokens: int, most: int) -> None:
    """This many functions run between a lease and what was learnt from its answer."""
    worker = make(WorkerState.READY)
    worker.observe(Check.OK, "ok", ABOUT)
    worker.on_free = lambda: None
    worker.clock = time.monotonic  # in Python it would be counted
    worker.breaker = Breaker("w1", Policy(), time.monotonic, random.Random())
    worker.paces["qwen"] = Pace(time.monotonic)

    def answer() -> None:
        lease = worker.lease("qwen")
        lease.prompt_bytes, lease.first_token = 2000, 0.01
        lease.tokens, lease.seconds = tokens, 2.0 * bool(tokens)
        lease.release(Result.COMPLETE)

    for _ in range(10):
        answer()
    # Now and then a window of the breaker moves on.
    called = min((frames_of(answer) for _ in range(3)), key=len)
    assert len(called) <= most, called
