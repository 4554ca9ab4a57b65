"""What a client that waits is told is about right, and costs next to nothing."""

from __future__ import annotations

import pytest

from gollama_proxy.scheduling.outlook import FRESH, Outlook, Place
from gollama_proxy.scheduling.ticket import Priority, Ticket
from tests.fakes.clock import Clock


def tickets(count: int) -> list[Ticket]:
    return [
        Ticket(n, "ann", "qwen", Priority.INTERACTIVE, 0.0) for n in range(1, count + 1)
    ]


def paced(outlook: Outlook, clock: Clock, *gaps: float) -> None:
    """Have a turn, and one more after each gap."""
    outlook.had_turn()
    for gap in gaps:
        clock.advance(gap)
        outlook.had_turn()


# --- The pace ---------------------------------------------------------------------


def test_two_turns_make_a_pace() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    assert outlook.interval is None
    assert repr(outlook) == "<Outlook a turn every ? s>"
    outlook.had_turn()
    assert outlook.interval is None
    clock.advance(4)
    outlook.had_turn()
    assert outlook.interval == 4
    assert repr(outlook) == "<Outlook a turn every 4.0 s>"


def test_a_burst_is_evened_out() -> None:
    """Four slots that come free together, every 12 s."""
    clock = Clock()
    outlook = Outlook(clock)
    told = []
    for _ in range(20):
        paced(outlook, clock, 0, 0, 0)
        told.append(outlook.interval)
        clock.advance(12)
    assert told[-1] == pytest.approx(3, abs=1)


def test_a_change_of_pace_is_followed() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    paced(outlook, clock, *[1.0] * 50)
    paced(outlook, clock, *[10.0] * 20)
    assert outlook.interval == pytest.approx(10, rel=0.1)


def test_when_no_turn_comes_nobody_is_told_the_old_pace() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    paced(outlook, clock, 1, 1)
    clock.advance(60)
    assert outlook.interval == 60


def test_a_night_in_which_nobody_waits_does_not_change_the_pace() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    paced(outlook, clock, 2, 2)
    outlook.pause()
    clock.advance(30_000)
    assert outlook.interval == 2
    paced(outlook, clock, 2)
    assert outlook.interval == 2


# --- The place --------------------------------------------------------------------


def test_a_place_comes_with_how_many_wait_and_for_how_long() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    waiting = tickets(7)
    assert outlook.place(waiting[2], 7, lambda: waiting) == Place(3, 7, None)
    paced(outlook, clock, 4)
    assert outlook.place(waiting[2], 7, lambda: waiting) == Place(3, 7, 12.0)


def test_places_are_counted_once_a_second_however_many_ask() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    waiting = tickets(7)
    counted = 0

    def order() -> list[Ticket]:
        nonlocal counted
        counted += 1
        return waiting

    for ticket in waiting:
        outlook.place(ticket, 7, order)
        clock.advance(FRESH / 8)
    assert counted == 1
    clock.advance(FRESH / 8)
    del waiting[0]
    assert outlook.place(waiting[0], 6, order).position == 1
    assert counted == 2


def test_who_came_after_the_last_count_is_the_last() -> None:
    outlook = Outlook(Clock())
    waiting = tickets(4)
    assert outlook.place(waiting[0], 3, lambda: waiting[:3]).position == 1
    assert outlook.place(waiting[3], 4, lambda: waiting) == Place(4, 4, None)


def test_a_place_is_never_behind_all_who_wait() -> None:
    """Three have left since the last count."""
    outlook = Outlook(Clock())
    waiting = tickets(4)
    outlook.place(waiting[3], 4, lambda: waiting)
    assert outlook.place(waiting[3], 1, lambda: waiting[3:]) == Place(1, 1, None)
