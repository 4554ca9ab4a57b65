"""A table of names drops the oldest, and never has more than its limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.bounded import BUCKETS, MOST, BoundedDict, SlidingWindow
from tests.fakes.clock import Clock


def test_the_oldest_entry_is_dropped() -> None:
    table = BoundedDict[str, int](3)
    for number, name in enumerate("abcd"):
        table[name] = number
    assert dict(table) == {"b": 1, "c": 2, "d": 3}


def test_an_entry_can_change_without_another_being_dropped() -> None:
    table = BoundedDict[str, int](2)
    table["a"] = table["b"] = 1
    table["a"] = 2
    assert dict(table) == {"a": 2, "b": 1}


def test_the_default_limit() -> None:
    assert BoundedDict[str, int]().most == MOST


@given(keys=st.lists(st.integers(0, 20)), most=st.integers(1, 8))
def test_it_is_a_dict_of_the_last_entries(keys: list[int], most: int) -> None:
    table, came = BoundedDict[int, int](most), dict[int, int]()
    for place, key in enumerate(keys):
        table[key] = place
        if key not in came:
            came[key] = place
            while len(came) > most:
                del came[next(iter(came))]
        assert table.keys() == came.keys()
        assert table[key] == place


def test_its_repr_shows_no_names() -> None:
    table = BoundedDict[str, int](3)
    table["secret"] = 1
    assert repr(table) == "<BoundedDict 1 of 3>"


# --- What happened in the last seconds --------------------------------------------


def test_what_is_older_than_the_span_is_not_counted() -> None:
    clock = Clock(1000.0)
    window = SlidingWindow(10.0, clock)
    for _ in range(10):
        window.add()
        clock.advance(1.0)
    assert window.count == 9
    clock.advance(4.0)
    assert window.count == 5
    assert repr(window) == "<SlidingWindow 5 in 10 s>"
    clock.advance(5.0)
    assert window.count == 0


@pytest.mark.parametrize("pause", [9.9, 10.0, 11.0, 95.0, 1e9])
def test_a_pause_of_any_length_empties_the_buckets_and_breaks_nothing(
    pause: float,
) -> None:
    clock = Clock(1000.5)
    window = SlidingWindow(10.0, clock)
    window.add()
    clock.advance(pause)
    assert window.count == 0
    window.add()
    assert window.count == 1


@given(gaps=st.lists(st.floats(0, 40), max_size=50), span=st.sampled_from([1.0, 30.0]))
def test_nine_tenths_of_the_span_are_counted_and_never_more_than_the_span(
    gaps: list[float], span: float
) -> None:
    clock = Clock()
    window = SlidingWindow(span, clock)
    moments: list[float] = []
    for gap in gaps:
        clock.advance(gap)
        window.add()
        moments.append(clock())
        surely = sum(at > clock() - span * (1 - 1 / BUCKETS) + 1e-6 for at in moments)
        at_most = sum(at > clock() - span - 1e-6 for at in moments)
        assert surely <= window.count <= at_most


def test_what_is_recent_is_counted_to_a_bucket() -> None:
    clock = Clock(100.0)
    window = SlidingWindow(10.0, clock)
    assert window.recent(3.0) == 0
    window.add(2)
    clock.advance(3.0)
    window.add()
    assert (window.recent(0.0), window.recent(2.0), window.recent(3.0)) == (1, 1, 3)
    clock.advance(6.0)
    assert (window.recent(6.0), window.recent(100.0)) == (1, 3)
    clock.advance(4.0)
    assert window.recent(100.0) == 0


def test_several_at_once_are_counted_and_leave_together() -> None:
    clock = Clock(1000.0)
    window = SlidingWindow(10.0, clock)
    window.add(5)
    clock.advance(2.0)
    window.add(2)
    assert window.count == 7
    clock.advance(8.0)
    assert window.count == 2


@pytest.mark.parametrize(
    ("amount", "seconds"), [(-1, 0), (0, 0), (1, 7.5), (5, 7.5), (6, 9.5), (99, 9.5)]
)
def test_it_is_known_when_what_is_counted_will_have_left(
    amount: int, seconds: float
) -> None:
    clock = Clock(1000.0)
    window = SlidingWindow(10.0, clock)
    assert window.leaves_in(amount) == 0
    window.add(5)
    clock.advance(2.0)
    window.add(2)
    clock.advance(0.5)
    assert window.leaves_in(amount) == seconds


@given(
    gaps=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 4)), max_size=30),
    amount=st.integers(0, 40),
    buckets=st.sampled_from([1, 10, 61]),
)
def test_what_was_to_leave_has_left_by_then_and_not_before(
    gaps: list[tuple[float, int]], amount: int, buckets: int
) -> None:
    clock = Clock()
    window = SlidingWindow(61.0, clock, buckets)
    for gap, several in gaps:
        clock.advance(gap)
        window.add(several)
    before = window.count
    amount = min(amount, before)
    wait = window.leaves_in(amount)
    if wait > 1e-3:
        clock.advance(wait - 1e-3)
        assert before - window.count < amount
        clock.advance(2e-3)
    assert before - window.count >= amount
