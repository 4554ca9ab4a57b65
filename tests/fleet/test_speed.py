"""What is learnt about a worker's speed: beside other workers, and its own past."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.fleet.speed import (
    KEPT,
    LEVELS,
    SHARED,
    Expectations,
    Learnt,
    Pace,
    Speed,
)
from gollama_proxy.wire.answer import Prefill
from tests.fakes.clock import Clock

KIB = 1024

# --- Compared with other workers --------------------------------------------------


@pytest.mark.parametrize(
    "reported", [Prefill(0, 0), Prefill(5, 3, 1.5), Prefill(1, 0, 1e9)]
)
def test_possible_reports(reported: Prefill) -> None:
    assert reported.possible


@pytest.mark.parametrize(
    "reported",
    [Prefill(-1, 0, 1), Prefill(1, -1, 1), Prefill(1, 1, -1), Prefill(1, 1, math.inf)],
)
def test_impossible_reports(reported: Prefill) -> None:
    assert not reported.possible


def test_nothing_is_known_of_a_worker_without_answers() -> None:
    speed = Speed()
    assert speed.reads is None
    assert [speed.writes(beside) for beside in (0, 1, 1000)] == [None] * 3
    assert speed.tokens == 256
    assert repr(speed) == "<Speed reads ? bytes/s, writes {} tokens/s>"


# --- What another hub has learnt --------------------------------------------------


def learnt(reads: float = 1000.0, writes: float = 40.0, tokens: int = 100) -> Learnt:
    speed = Speed()
    speed.read(1000, 1000 / reads)
    speed.wrote(tokens, tokens / writes)
    found = speed.learnt()
    assert found is not None
    return found


def test_what_another_hub_has_learnt_is_assumed_where_nothing_is_known() -> None:
    speed = Speed()
    assert speed.learnt() is None
    speed.assume(learnt())
    assert (speed.reads, speed.writes(1), speed.tokens) == (1000, 40, 100)
    assert speed.writes(2) == 40 * SHARED
    assert speed.learnt() is None  # it is no news for others
    speed.assume(learnt(reads=2000.0, writes=80.0))
    assert (speed.reads, speed.writes(1)) == (2000, 80)


def test_the_first_answer_replaces_what_was_assumed() -> None:
    speed = Speed()
    speed.assume(learnt())
    speed.read(1000, 10.0)
    speed.wrote(50, 10.0)
    assert (speed.reads, speed.writes(1), speed.tokens) == (100, 5, 50)
    speed.assume(learnt())
    assert (speed.reads, speed.writes(1), speed.tokens) == (100, 5, 50)
    assert speed.learnt() == Learnt(100, {0: 5.0}, 50)


def test_what_is_known_in_part_is_assumed_for_the_rest() -> None:
    speed = Speed()
    speed.read(1000, 10.0)
    speed.assume(learnt())
    assert (speed.reads, speed.writes(1)) == (100, 40)
    speed.assume(Learnt(0.0, {}, 9.0))
    assert (speed.reads, speed.writes(1)) == (100, 40)


# --- Reading ----------------------------------------------------------------------


def test_the_first_prompt_is_believed_at_once() -> None:
    speed = Speed()
    speed.read(64 * KIB, 2.0)
    assert speed.reads == 32 * KIB


def test_long_prompts_count_for_more_than_short_ones() -> None:
    """A short one takes as long as it takes to answer at all."""
    speed = Speed()
    for _ in range(20):
        speed.read(100_000, 10.0)
        speed.read(100, 0.1)
    assert speed.reads == pytest.approx(10_000, rel=0.02)


def test_what_was_in_the_cache_was_not_read() -> None:
    speed = Speed()
    speed.read(8000, 1.0, Prefill(tokens=500, cached=1500, seconds=0.5))
    assert speed.reads == 2000 / 0.5


@pytest.mark.parametrize(
    "reported",
    [
        Prefill(0, 2000, 0.1),
        Prefill(-5, 2000, 0.1),
        Prefill(500, -1, 0.1),
        Prefill(500, 1500, 0.0),
        Prefill(500, 1500, -1.0),
        Prefill(500, 1500, math.nan),
        Prefill(500, 1500, 1.2),  # it was answered within a second
        Prefill(500, 1500, math.inf),
    ],
)
def test_impossible_reports_are_ignored(reported: Prefill) -> None:
    speed = Speed()
    speed.read(8000, 1.0, reported)
    assert speed.reads == 8000


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(0, 1.0), (-1, 1.0), (9, 0.0), (9, -1.0), (9, math.inf), (9, math.nan)],
)
def test_what_does_not_measure_reading_is_ignored(size: int, seconds: float) -> None:
    speed = Speed()
    speed.read(size, seconds)
    assert speed.reads is None


def test_a_machine_that_throttles_is_known_for_it_after_some_answers() -> None:
    speed = Speed()
    for _ in range(30):
        speed.read(10_000, 1.0)
    count = 0
    while speed.reads is not None and speed.reads > 5000:
        speed.read(10_000, 4.0)
        count += 1
    assert count <= 5


# --- Writing ----------------------------------------------------------------------


def test_each_number_of_parallel_answers_has_its_own_speed() -> None:
    speed = Speed()
    speed.wrote(100, 1.0, 1)
    speed.wrote(120, 2.0, 3)
    speed.wrote(120, 4.0, 4)
    assert speed.writes(1) == 100
    assert speed.writes(2) == speed.writes(3) == 60
    assert speed.writes(4) == speed.writes(7) == 30
    assert repr(speed) == (
        "<Speed reads ? bytes/s, writes {1+: 100.0, 2+: 60.0, 4+: 30.0} tokens/s>"
    )


def test_for_a_number_that_was_never_seen_the_nearest_one_stands_in() -> None:
    speed = Speed()
    speed.wrote(100, 1.0, 4)
    assert speed.writes(4) == 100
    assert speed.writes(8) == pytest.approx(100 * SHARED)
    assert speed.writes(2) == pytest.approx(100 / SHARED)
    assert speed.writes(1) == pytest.approx(100 / SHARED**2)


def test_more_answers_than_there_are_levels_count_as_the_last_level() -> None:
    speed = Speed()
    speed.wrote(100, 1.0, 10_000)
    assert speed.writes(1 << (LEVELS - 1)) == speed.writes(1 << 20) == 100


def test_a_count_that_was_lost_is_taken_for_one_answer() -> None:
    speed = Speed()
    speed.wrote(100, 1.0, 0)
    assert speed.writes(1) == 100


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(0, 1.0), (-1, 1.0), (9, 0.0), (9, -1.0), (9, math.inf), (9, math.nan)],
)
def test_what_does_not_measure_writing_is_ignored(tokens: int, seconds: float) -> None:
    speed = Speed()
    speed.wrote(tokens, seconds)
    assert speed.writes(1) is None
    assert speed.tokens == 256


def test_an_answer_that_was_not_read_is_estimated_by_its_time() -> None:
    speed = Speed()
    assert speed.generated(1000, 60.0) == 55, "slow, as nothing is known"
    speed.wrote(100, 2.0)
    speed.read(1000, 0.5)
    assert speed.generated(4000, 1.0) == 0, "it reads"
    assert speed.generated(4000, 3.0) == 50
    assert speed.generated(4000, 3.0, 2) == int(50 * SHARED)


def test_it_knows_how_long_answers_are() -> None:
    speed = Speed()
    speed.wrote(50, 1.0)
    assert speed.tokens == 50
    speed.wrote(150, 1.0, 8)
    assert speed.tokens == pytest.approx(60)


@given(
    st.lists(
        st.tuples(st.integers(1, 10_000), st.floats(0.001, 1000)),
        min_size=1,
        max_size=40,
    )
)
def test_a_speed_lies_between_the_slowest_and_the_fastest_answer(
    answers: list[tuple[int, float]],
) -> None:
    speed = Speed()
    for amount, seconds in answers:
        speed.read(amount, seconds)
        speed.wrote(amount, seconds)
    rates = [amount / seconds for amount, seconds in answers]
    for known in (speed.reads, speed.writes(1)):
        assert known is not None
        assert min(rates) * 0.999 <= known <= max(rates) * 1.001
    assert 0 < KEPT < 1


# --- Compared with its own past ---------------------------------------------------


def prefill(pace: Pace, rate: float, times: int = 1, size: int = 64 * KIB) -> None:
    """Let the worker read this many prompts, at so many bytes per second."""
    for _ in range(times):
        pace.learn(size, size / rate, 1, 0.0)


def write(
    pace: Pace, clock: Clock, speed: float, times: int = 1, beside: int = 1
) -> None:
    """Let the worker write this many answers of ten seconds, one after another."""
    for _ in range(times):
        clock.advance(10.0)
        pace.learn(0, 0.0, round(speed * 10), 10.0, beside)


def used_to(speed: float) -> tuple[Pace, Clock]:
    clock = Clock()
    pace = Pace(clock)
    write(pace, clock, speed, 10)
    return pace, clock


# --- How long a first token may take ----------------------------------------------


@pytest.mark.parametrize(
    ("size", "seconds"), [(0, 10.0), (200, 13.0), (8_000, 130.0), (200_000, 300.0)]
)
def test_an_unknown_worker_counts_as_a_slow_one(size: int, seconds: float) -> None:
    assert Pace(Clock()).allowance(size) == seconds


def test_the_allowance_follows_the_prompt_and_what_was_learnt() -> None:
    pace = Pace(Clock())
    prefill(pace, 20_000, 60)
    assert pace.rate == pytest.approx(20_000)
    assert pace.allowance(100) == pytest.approx(10, abs=0.1)
    assert pace.allowance(200_000) == pytest.approx(40)
    assert pace.allowance(20_000_000) == 300


def test_one_fast_prompt_lifts_the_rate_a_little() -> None:
    pace = Pace(Clock())
    prefill(pace, 1e9)
    assert pace.rate == pytest.approx(220)


def test_one_slow_prompt_halves_the_rate_at_most() -> None:
    pace = Pace(Clock())
    prefill(pace, 1)
    assert pace.rate == pytest.approx(100)


def test_the_rate_follows_a_slower_machine_within_a_few_prompts() -> None:
    pace = Pace(Clock())
    prefill(pace, 20_000, 60)
    prefill(pace, 1_000, 5)
    assert pace.rate == pytest.approx(1_000)


def test_ten_cached_prompts_do_not_cut_off_the_one_that_is_read() -> None:
    pace = Pace(Clock())
    prefill(pace, 1_000, 40)
    prefill(pace, 1e7, 10)
    assert pace.allowance(100_000) > 100


def test_mostly_cached_prompts_keep_the_rate_near_the_truth() -> None:
    pace = Pace(Clock())
    rng = random.Random(1)
    missed = 0
    for _ in range(2000):
        rate = 1e7 if rng.random() < 0.8 else 1_000
        if 64 * KIB / rate > pace.allowance(64 * KIB):
            missed += 1
            pace.missed()
        else:
            prefill(pace, rate)
    assert missed < 2000 * 0.2 * 0.1


@pytest.mark.parametrize(
    ("size", "first_token"),
    [
        (1023, 5.2),  # slower than was thought, but that may be latency
        (0, 5.0),
        (-5, 5.0),
        (9999, 0.0),
        (9999, -1.0),
        (9999, math.inf),
        (9999, math.nan),
    ],
)
def test_what_does_not_measure_prefill_is_ignored(
    size: int, first_token: float
) -> None:
    pace = Pace(Clock())
    pace.learn(size, first_token, 100, 1.0)
    assert pace.rate == 200


def test_a_short_prompt_can_only_show_that_a_worker_is_faster() -> None:
    """Else the chats of short questions would leave it at what was feared at first."""
    pace = Pace(Clock())
    for _ in range(100):
        pace.learn(100, 0.05, 1, 0.0)
    assert pace.rate == pytest.approx(2000)
    pace.learn(100, 5.0, 1, 0.0)
    assert pace.rate == pytest.approx(2000)


def test_a_kilobyte_is_worth_measuring() -> None:
    pace = Pace(Clock())
    pace.learn(1024, 0.1, 1, 0.0)
    assert pace.rate == pytest.approx(220)


def test_a_rejected_rate_recovers_with_time() -> None:
    """Only answers that completed are learnt, and these cannot complete."""
    pace = Pace(Clock())
    prefill(pace, 1e9, 100)
    size, needs = 200_000, 200.0
    misses = 0
    while pace.allowance(size) < needs:
        pace.missed()
        misses += 1
    assert misses <= 8


def test_a_stuck_worker_is_thought_of_no_worse_than_an_unknown_one() -> None:
    pace = Pace(Clock())
    prefill(pace, 1_000, 40)
    for _ in range(10):
        pace.missed()
    assert pace.rate == 200
    prefill(pace, 50, 10)
    pace.missed()
    assert pace.rate == pytest.approx(50)


@given(
    prompts=st.lists(st.tuples(st.integers(0, 1 << 26), st.floats())),
    size=st.integers(0, 1 << 26),
)
def test_every_allowance_lies_between_the_base_and_the_hard_limit(
    prompts: list[tuple[int, float]], size: int
) -> None:
    pace = Pace(Clock())
    for prompt, seconds in prompts:
        pace.learn(prompt, seconds, 1, 1.0)
    assert 10 <= pace.allowance(size) <= 300
    assert pace.allowance(size) <= pace.allowance(size + 1)


# --- How fast an answer should be -------------------------------------------------


def test_no_answer_is_slow_before_there_is_a_past() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert not pace.is_slow(8, 100.0)
    write(pace, clock, 60, 4)
    assert not pace.is_slow(8, 100.0)
    write(pace, clock, 60)
    assert pace.is_slow(8, 100.0)


@pytest.mark.parametrize("speed", [2.0, 60.0, 400.0])
def test_slow_is_below_a_quarter_of_what_the_worker_is_used_to(speed: float) -> None:
    pace, _ = used_to(speed)
    tokens = 1000
    assert not pace.is_slow(tokens, tokens / (speed * 0.26))
    assert pace.is_slow(tokens, tokens / (speed * 0.24))


def test_the_first_answers_count_by_their_median() -> None:
    clock = Clock()
    pace = Pace(clock)
    for speed in (60, 5000, 61, 1, 59):
        write(pace, clock, speed)
    assert repr(pace) == "<Pace reads 200 bytes/s, writes {1+: 60.0} tokens/s>"


@pytest.mark.parametrize("at_once", [1, 32])
def test_a_minute_of_throttling_is_not_the_new_normal(at_once: int) -> None:
    """However many answers that minute holds."""
    pace, clock = used_to(60.0)
    for _ in range(6):
        clock.advance(10.0)
        for _ in range(at_once):
            pace.learn(0, 0.0, 60, 10.0)
    assert pace.is_slow(60, 10.0)
    assert pace.is_slow(60, 60 / (60 * 0.25 * 0.92))


def test_what_lasts_is_the_new_normal_some_minutes_later() -> None:
    """Another model, five times as large: that is normal some minutes later."""
    pace, clock = used_to(60.0)
    seconds = 0
    while pace.is_slow(120, 10.0):
        write(pace, clock, 12.0)
        seconds += 10
    assert 120 <= seconds <= 300
    write(pace, clock, 12.0, 200)
    assert not pace.is_slow(120, 30.0)
    assert pace.is_slow(120, 50.0)


def test_a_night_without_answers_lends_no_weight_to_the_next() -> None:
    pace, clock = used_to(60.0)
    clock.advance(8 * 3600)
    pace.learn(0, 0.0, 10, 10.0)
    assert "1+: 59.3" in repr(pace)


def test_answers_that_came_in_one_burst_do_not_lift_the_baseline() -> None:
    pace, clock = used_to(60.0)
    for _ in range(100):
        clock.advance(10.0)
        pace.learn(0, 0.0, 500, 0.001)
    assert not pace.is_slow(600, 10.0)
    assert "1+: 60." in repr(pace)


def test_a_busy_worker_is_compared_with_its_busy_past() -> None:
    pace, clock = used_to(100.0)
    assert pace.is_slow(100, 10.0, beside=1)
    assert not pace.is_slow(100, 10.0, beside=16)
    write(pace, clock, 10.0, 10, beside=16)
    assert not pace.is_slow(100, 10.0, beside=31)
    assert pace.is_slow(100, 50.0, beside=31)
    assert not pace.is_slow(100, 50.0, beside=32)
    assert not pace.is_slow(300, 10.0, beside=1)
    assert repr(pace) == (
        "<Pace reads 200 bytes/s, writes {1+: 100.0, 16+: 10.0} tokens/s>"
    )


def test_a_count_that_was_lost_has_the_baseline_of_one_answer() -> None:
    pace, _ = used_to(100.0)
    assert pace.is_slow(100, 10.0, beside=0)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        (0, 10.0),
        (7, 10.0),
        (-9, 10.0),
        (99, 0.0),
        (99, -1.0),
        (99, math.inf),
        (99, math.nan),
    ],
)
def test_what_does_not_measure_speed_is_neither_learnt_nor_slow(
    tokens: int, seconds: float
) -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        pace.learn(0, 0.0, tokens, seconds)
    assert repr(pace) == "<Pace reads 200 bytes/s, writes {} tokens/s>"
    write(pace, clock, 60)
    assert repr(pace) == "<Pace reads 200 bytes/s, writes {1+: ?} tokens/s>"
    write(pace, clock, 60, 9)
    assert not pace.is_slow(tokens, seconds)


def test_expectations_can_be_other_ones() -> None:
    clock = Clock()
    pace = Pace(clock, Expectations(base=1.0, hard=2.0, answers=1, fraction=0.5))
    assert pace.allowance(0) == 1.0
    assert pace.allowance(1 << 20) == 2.0
    write(pace, clock, 60)
    assert pace.is_slow(29, 1.0)
    assert not pace.is_slow(31, 1.0)


def test_what_is_learnt_helps_to_choose_between_workers_too() -> None:
    pace = Pace(Clock())
    pace.learn(10_000, 2.0, 100, 5.0, 4, Prefill(tokens=1000, cached=0, seconds=1.0))
    assert (pace.speed.reads, pace.speed.writes(4)) == (10_000, 20)
    pace.learn(0, 0.0, 7, 0.001, 4)  # too short to measure anything
    assert pace.speed.writes(4) == 20
