"""What is learnt of a worker's speed is the middle of its last answers, and no lie."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.fleet.speed import KEPT, LEVELS, SHARED, Prefill, Speed

KIB = 1024


@pytest.mark.parametrize(
    "told", [Prefill(0, 0), Prefill(5, 3, 1.5), Prefill(1, 0, 1e9)]
)
def test_what_can_be_true(told: Prefill) -> None:
    assert told.possible


@pytest.mark.parametrize(
    "told",
    [Prefill(-1, 0, 1), Prefill(1, -1, 1), Prefill(1, 1, -1), Prefill(1, 1, math.inf)],
)
def test_what_cannot(told: Prefill) -> None:
    assert not told.possible


def test_nothing_is_known_of_who_has_answered_nothing() -> None:
    speed = Speed()
    assert speed.reads is None
    assert [speed.writes(beside) for beside in (0, 1, 1000)] == [None] * 3
    assert speed.tokens == 256
    assert repr(speed) == "<Speed reads ? bytes/s, writes {} tokens/s>"


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
    "told",
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
def test_what_cannot_be_true_is_ignored(told: Prefill) -> None:
    speed = Speed()
    speed.read(8000, 1.0, told)
    assert speed.reads == 8000


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(0, 1.0), (-1, 1.0), (9, 0.0), (9, -1.0), (9, math.inf), (9, math.nan)],
)
def test_what_says_nothing_about_reading(size: int, seconds: float) -> None:
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


def test_more_answers_than_are_told_apart_are_as_the_most_of_them() -> None:
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
def test_what_says_nothing_about_writing(tokens: int, seconds: float) -> None:
    speed = Speed()
    speed.wrote(tokens, seconds)
    assert speed.writes(1) is None
    assert speed.tokens == 256


def test_an_answer_that_nobody_sees_is_as_long_as_its_time() -> None:
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
