"""The admission queue is bounded, fair to every subject, and loses no request."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gollama_proxy.config.settings import Queue
from gollama_proxy.scheduling.admission import (
    FRESH,
    KEPT,
    MOST_PATIENCE,
    RETRY_AFTER,
    RETRY_AFTER_MOST,
    Admission,
    Forecast,
    Place,
)
from gollama_proxy.scheduling.turns import Priority, Subject, Ticket, TicketState
from gollama_proxy.wire.errors import Code, NoWorkerError
from tests.fakes.clock import Clock

INTERACTIVE, BATCH = Priority


def make(
    size: int = 256, *, timeout: float = 60.0, clock: Clock | None = None
) -> Admission:
    return Admission(Queue(size=size, timeout=timeout), clock or Clock())


def wait(
    admission: Admission,
    subjects: Iterable[str],
    model: str = "m",
    priority: Priority = INTERACTIVE,
    limit: int = 0,
) -> list[Ticket]:
    """Let a request join for each letter, in this order."""
    return [admission.join(subject, model, priority, limit) for subject in subjects]


def turns(
    admission: Admission, models: Collection[str] = "m", *, ends: bool = False
) -> str:
    """Give out slots until none is taken; return the subjects in their order.

    With `ends` each request is over before the next slot is given out.
    """
    had = ""
    while (ticket := admission.next(models)) is not None:
        had += ticket.subject
        if ends:
            admission.leave(ticket)
    return had


def refused(
    admission: Admission, subject: str, priority: Priority = INTERACTIVE
) -> str:
    with pytest.raises(NoWorkerError) as caught:
        admission.join(subject, "m", priority)
    error = caught.value
    assert (error.code, error.code.status) == (Code.QUEUE_FULL, 429)
    assert error.retry_after is not None
    assert error.retry_after > 0
    return error.message


# --- A life -----------------------------------------------------------------------


def test_a_request_waits_and_runs_and_is_over() -> None:
    admission = make()
    (ticket,) = wait(admission, "a")
    assert (ticket.state, admission.waiting, admission.running("a")) == (
        TicketState.WAITING,
        1,
        0,
    )
    assert admission.wanted() == {"m"}
    assert repr(admission) == "<Admission interactive=1 batch=0 subjects=1>"
    assert admission.next(["x"]) is None
    assert admission.next(["x", "m"]) is ticket
    assert (ticket.state, admission.waiting, admission.running("a")) == (
        TicketState.RUNNING,
        0,
        1,
    )
    assert not admission.wanted()
    admission.leave(ticket)
    assert (ticket.state, admission.running("a")) == (TicketState.DONE, 0)
    assert admission.turns == {INTERACTIVE: 1}
    assert repr(admission) == "<Admission interactive=0 batch=0 subjects=0>"


def test_only_so_many_subjects_without_requests_are_kept() -> None:
    admission = make()
    for number in range(KEPT + 10):
        holder = admission.admit(str(number), "m")
        assert holder is not None
        admission.release(holder)
    assert len(admission._subjects) == KEPT
    assert repr(admission) == "<Admission interactive=0 batch=0 subjects=0>"


def test_a_subject_that_comes_back_has_the_limit_of_its_last_request() -> None:
    admission = make()
    admission.note_elsewhere({"a": 1})
    holder = admission.admit("a", "m")
    assert holder is not None
    admission.release(holder)
    assert admission.admit("a", "m", limit=1) is None
    admission.note_elsewhere({})
    assert admission.admit("a", "m", limit=1) is holder
    assert admission.admit("a", "m", limit=1) is None
    assert admission.admit("a", "m") is holder


def test_a_subject_that_was_not_admitted_is_not_kept_either() -> None:
    admission = make()
    wait(admission, "w")
    for number in range(KEPT + 10):
        assert admission.admit(str(number), "m") is None
    assert len(admission._subjects) == KEPT


def test_nor_is_one_that_stops_waiting_or_makes_room() -> None:
    admission = make(KEPT + 1)
    some = wait(admission, map(str, range(KEPT + 1)))
    admission.leave(some.pop())
    assert len(admission._subjects) == KEPT
    admission = make(KEPT + 1)
    wait(admission, map(str, range(KEPT + 1)), priority=BATCH)
    wait(admission, ["chat"])
    assert len(admission._subjects) == KEPT + 1


def test_a_subject_that_runs_or_waits_is_kept() -> None:
    admission = make()
    holders = [admission.admit(str(number), "m") for number in range(KEPT + 1)]
    for name in ("0", "1"):
        holder = admission.admit(name, "m")
        assert holder is not None
        admission.release(holder)
        assert admission.running(name) == 1
    (ticket,) = wait(admission, ["1"])
    for holder in holders:
        assert holder is not None
        admission.release(holder)
    assert admission.next("m") is ticket
    assert admission.running("1") == 1


def test_the_tickets_that_may_go_in_are_known_in_their_order() -> None:
    admission = make()
    for name, limit in (("a", 2), ("b", 3)):
        assert admission.admit(name, "m", limit=limit) is not None
    tickets = wait(admission, "aab", limit=2)
    tickets += wait(admission, "b", limit=3)
    tickets += wait(admission, "ccd")
    tickets += wait(admission, "e", priority=BATCH)
    wait(admission, "f", "other")
    # Those with requests running are no newcomers, and their limits hold.
    for most, expected in ((9, "cdabcbe"), (3, "cda"), (0, "")):
        found = admission.in_turn("m", most)
        assert "".join(ticket.subject for ticket in found) == expected
        assert set(found) <= set(tickets)


def test_what_is_expected_of_the_wait_of_a_new_request() -> None:
    clock = Clock()
    admission = make(clock=clock)
    wait(admission, "aaaaa")
    assert admission.expected_wait("m") is None
    for _ in range(2):
        clock.advance(4)
        admission.next("m")
    wait(admission, "b", "other")
    assert admission.expected_wait("m") == 12.0
    assert admission.expected_wait("other") is None


def test_what_runs_elsewhere_counts_for_a_subject_that_is_new_here() -> None:
    admission = make()
    admission.note_elsewhere({"a": 1, "b": 2})
    assert admission.admit("a", "m", limit=2) is not None
    assert admission.admit("a", "m", limit=2) is None
    assert admission.admit("b", "m", limit=2) is None
    assert admission.admit("c", "m", limit=1) is not None
    admission.note_elsewhere({"c": 5, "a": 0})
    assert admission.admit("a", "m", limit=2) is not None
    assert admission.admit("c", "m", limit=6) is None


def test_a_subject_takes_a_slot_by_class_and_then_by_order() -> None:
    admission = make()
    wait(admission, "a", "m", BATCH)
    wait(admission, "a", "n", INTERACTIVE)
    wait(admission, "a", "m", INTERACTIVE)
    taken = [admission.take("a", "mn", lambda ticket: True) for _ in range(4)]
    assert [ticket and (ticket.model, ticket.priority) for ticket in taken] == [
        ("n", INTERACTIVE),
        ("m", INTERACTIVE),
        ("m", BATCH),
        None,
    ]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place(2, 5, None), "queued 2/5"),
        (Place(1, 1, 0.2), "queued 1/1 eta 1s"),
        (Place(3, 4, 12.0), "queued 3/4 eta 12s"),
    ],
)
def test_a_place_is_written_for_clients(place: Place, text: str) -> None:
    assert str(place) == text


def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    admission = make(2)
    first, second = wait(admission, "ab")
    admission.leave(first)
    assert (first.state, admission.waiting) == (TicketState.LEFT, 1)
    (third,) = wait(admission, "a")
    assert admission.next("m") is second
    assert admission.next("m") is third


@pytest.mark.parametrize("end", ["left", "done", "displaced"])
def test_leaving_twice_counts_once(end: str) -> None:
    admission = make(2)
    one, other = wait(admission, "aa", limit=2)
    if end == "displaced":
        wait(admission, "b")
        one = other
    elif end == "done":
        assert admission.next("m") is one
        assert admission.next("m") is other
        admission.leave(one)
    else:
        admission.leave(one)
    state, length, running = one.state, admission.waiting, admission.running("a")
    assert state.value == end
    for _ in range(3):
        admission.leave(one)
    assert (one.state, admission.waiting, admission.running("a")) == (
        state,
        length,
        running,
    )


# --- Admitted at once --------------------------------------------------------------


def test_where_a_slot_is_free_no_request_waits() -> None:
    admission = make(0)
    holder = admission.admit("a", "m")
    assert holder is not None
    assert (holder.name, admission.running("a"), admission.waiting) == ("a", 1, 0)
    assert not admission.turns
    admission.release(holder)
    assert admission.running("a") == 0
    assert repr(admission) == "<Admission interactive=0 batch=0 subjects=0>"


def test_a_ticket_that_was_admitted_gives_way_to_the_place_that_it_got() -> None:
    admission = make()
    ticket = admission.join("a", "m", limit=1)
    assert admission.next("m") is ticket
    holder = admission.keep(ticket)
    for _ in range(2):
        assert (ticket.state, admission.running("a")) == (TicketState.DONE, 1)
        admission.leave(ticket)  # it has ended
    waits = admission.join("a", "m", limit=1)
    assert admission.next("m") is None
    admission.release(holder)
    assert admission.next("m") is waits


def test_no_request_passes_those_with_the_next_turn() -> None:
    admission = make()
    wait(admission, "a", priority=BATCH)
    assert admission.admit("b", "m", BATCH) is None
    assert admission.admit("b", "other", BATCH) is not None
    assert admission.admit("b", "m", INTERACTIVE) is not None
    wait(admission, "a", priority=INTERACTIVE)
    assert admission.admit("c", "m", INTERACTIVE) is None
    assert admission.admit("c", "m", BATCH) is None
    assert repr(admission) == "<Admission interactive=1 batch=1 subjects=2>"


def test_a_withheld_subject_is_passed() -> None:
    admission = make()
    assert admission.admit("a", "m", limit=1) is not None
    wait(admission, "a", limit=1)
    assert admission.admit("b", "m") is not None
    assert admission.admit("a", "m", limit=1) is None


# --- Fairness ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4])
def test_a_load_test_delays_a_chat_by_one_generation_at_most(slots: int) -> None:
    """It has all slots and 200 more waiting; the next slot is the chat's."""
    clock = Clock()
    admission = make(clock=clock)
    assert all(admission.admit("load", "m") for _ in range(slots))
    wait(admission, ["load"] * 200)
    for _ in range(5):  # requests of the chat, one after the other
        chat = admission.join("chat", "m")
        clock.advance(1)
        assert admission.place(chat).position == 1
        assert admission.next("m") is chat
        assert admission.next("m") is not None
        admission.leave(chat)


def test_two_subjects_that_send_again_and_again_do_not_keep_out_a_third() -> None:
    admission = make()
    wait(admission, "cab")
    had = ""
    while len(had) < 30:
        ticket = admission.next("m")
        assert ticket is not None
        admission.leave(ticket)
        wait(admission, ticket.subject)
        had += ticket.subject
    assert Counter(had) == {"a": 10, "b": 10, "c": 10}


def test_batch_waits_for_as_long_as_anything_interactive_does() -> None:
    admission = make()
    wait(admission, "aabb", priority=BATCH)
    wait(admission, "ccaa")
    assert turns(admission) == "cacaabab"


def test_interactive_requests_that_cannot_go_in_do_not_hold_up_batch() -> None:
    admission = make()
    wait(admission, "a", "big")
    wait(admission, "b", "small", BATCH)
    assert admission.next(["small"]) is not None
    assert admission.admit("c", "m", limit=1)
    wait(admission, "c", limit=1)
    wait(admission, "d", priority=BATCH)
    assert turns(admission) == "d"


@pytest.mark.parametrize("models", ["xy", "yx", "xyx"])
def test_a_subject_has_one_turn_in_a_round_over_all_models_of_a_worker(
    models: str,
) -> None:
    admission = make()
    for _ in range(3):
        wait(admission, "a", "x")
        wait(admission, "a", "y")
    wait(admission, "bbb", "x")
    assert turns(admission, models) == "abababaaa"


def test_a_subject_is_served_in_its_order_over_all_models_of_a_worker() -> None:
    admission = make()
    came = [admission.join("a", model) for model in "xyyxyx"]
    assert [admission.next("xy") for _ in came] == came


def test_a_newcomer_passes_subjects_with_a_turn_at_another_model_of_the_worker() -> (
    None
):
    admission = make()
    wait(admission, "aaa", "x")
    assert admission.next("xy") is not None
    wait(admission, "b", "y")
    assert turns(admission, "xy") == "baa"


def test_a_turn_at_one_model_of_a_worker_puts_its_subject_last_at_all() -> None:
    """Both have requests running, so both wait; one has a turn before that."""
    admission = make()
    running = admission.admit("a", "z")
    assert admission.admit("b", "z") is not None
    wait(admission, "aab", "y")
    assert running is not None
    admission.release(running)
    wait(admission, "a", "x")
    assert turns(admission, "xy") == "abaa"


def test_a_slot_is_not_for_requests_for_another_model() -> None:
    admission = make()
    wait(admission, "aaa", "x")
    wait(admission, "b", "y")
    assert turns(admission, "y") == "b"
    assert turns(admission, "yx") == "aaa"


def test_a_request_that_a_worker_failed_goes_before_all_others_of_its_class() -> None:
    admission = make()
    wait(admission, "aabb")
    wait(admission, "c", priority=BATCH)
    again = admission.join("b", "m", first=True)
    last = admission.join("d", "m", BATCH, first=True)
    assert admission.next("m") is again
    assert turns(admission) == "abab" + "dc"
    assert (again.state, last.state) == (TicketState.RUNNING, TicketState.RUNNING)


def test_it_does_so_over_all_models_of_a_worker() -> None:
    admission = make()
    wait(admission, "a", "x")
    wait(admission, "b", "y")
    admission.join("c", "y", first=True)
    assert turns(admission, "xy") == "cab"


# --- Limits of a subject ----------------------------------------------------------


def test_a_subject_at_its_limit_lets_others_pass() -> None:
    admission = make()
    first, *_ = wait(admission, "aaa", limit=1)
    wait(admission, "bb")
    assert turns(admission) == "abb"
    assert not admission.wanted()
    assert admission.waiting == 2
    admission.leave(first)
    assert admission.wanted() == {"m"}
    assert turns(admission) == "a"


def test_a_subject_back_below_its_limit_with_requests_running_is_no_newcomer() -> None:
    admission = make()
    running = [admission.admit("a", "m", limit=2) for _ in range(2)]
    wait(admission, "a", limit=2)
    assert running[0] is not None
    admission.release(running[0])
    wait(admission, "b")
    assert turns(admission) == "ba"


def test_a_limit_counts_over_all_models() -> None:
    admission = make()
    running = admission.admit("a", "x", limit=1)
    wait(admission, "a", "y", limit=1)
    wait(admission, "a", "z", BATCH, limit=1)
    assert turns(admission, "xyz") == ""
    assert running is not None
    admission.release(running)
    assert admission.wanted() == {"y", "z"}
    assert turns(admission, "xyz") == "a"


def test_the_limit_of_a_subject_is_that_of_its_last_request() -> None:
    admission = make()
    wait(admission, "aaaa", limit=1)
    assert turns(admission) == "a"
    wait(admission, "a", limit=3)
    assert turns(admission) == "aa"
    wait(admission, "a")
    assert turns(admission) == "aaa"


# --- Room -------------------------------------------------------------------------


def test_a_full_queue_names_its_limit() -> None:
    admission = make(2)
    wait(admission, "ab")
    assert refused(admission, "c") == (
        "Too many requests are waiting: the limit is 2 (queue.size)."
    )
    assert admission.refused == {INTERACTIVE: 1}
    assert "limit is 0 (queue.size)" in refused(make(0), "a")


def test_the_subject_with_most_waiting_makes_room_for_others() -> None:
    admission = make(4)
    gone: list[Ticket] = []
    admission.on_displaced = gone.append
    tickets = wait(admission, "aaaa")
    refused(admission, "a")
    wait(admission, "b")
    wait(admission, "c")
    assert gone == [tickets[3], tickets[2]]
    assert {ticket.state for ticket in gone} == {TicketState.DISPLACED}
    for subject in "abcd":  # two, one, one: none has two more than another
        if subject != "d":
            refused(admission, subject)
    wait(admission, "d")
    refused(admission, "e")
    assert turns(admission) == "abcd"
    assert admission.refused == {INTERACTIVE: 8}


def test_the_newest_request_over_all_models_makes_room() -> None:
    admission = make(4)
    wait(admission, "a", "x")
    wait(admission, "a", "y")
    wait(admission, "a", "z", BATCH)
    (newest,) = wait(admission, "a", "x")
    refused(admission, "b", BATCH)  # in the place of nothing that is interactive
    assert newest.state is TicketState.WAITING
    wait(admission, "c")
    wait(admission, "d")
    assert newest.state is TicketState.DISPLACED
    assert turns(admission, "xyzm") == "acda"


def test_batch_makes_room_for_what_is_interactive() -> None:
    admission = make(3)
    batch = wait(admission, "abb", priority=BATCH)
    for subject in "abc":
        wait(admission, subject)
    assert [ticket.state for ticket in batch] == [TicketState.DISPLACED] * 3
    assert admission.refused == {BATCH: 3}
    refused(admission, "d")
    refused(admission, "d", BATCH)
    assert turns(admission) == "abc"


def test_a_displaced_ticket_may_leave_in_the_call_that_reports_it() -> None:
    admission = make(2)
    admission.on_displaced = admission.leave
    wait(admission, "aa")
    wait(admission, "b")
    assert turns(admission) == "ab"


# --- What would happen ------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "model", "priority", "limit", "admitted"),
    [
        ("new", "m", INTERACTIVE, 0, True),
        ("new", "m", BATCH, 0, False),  # `batch` goes first
        ("new", "other", BATCH, 0, True),
        ("runs", "m", INTERACTIVE, 0, True),
        ("runs", "m", INTERACTIVE, 1, False),
        ("runs", "m", INTERACTIVE, 2, True),
        ("elsewhere", "m", INTERACTIVE, 1, False),
        ("withheld", "m", INTERACTIVE, 1, False),
        ("withheld", "late", INTERACTIVE, 2, False),  # its own one goes first
        ("withheld", "late", BATCH, 2, False),
        ("withheld", "m", INTERACTIVE, 2, True),
        ("held", "late", INTERACTIVE, 2, True),  # its own one is of a lower class
        ("held", "late", BATCH, 2, False),
        ("other", "late", BATCH, 0, True),  # those that wait cannot go in
    ],
)
def test_what_would_be_decided_is_known_without_deciding_it(
    subject: str, model: str, priority: Priority, limit: int, admitted: bool
) -> None:
    admission = make()
    admission.note_elsewhere({"elsewhere": 1})
    assert admission.admit("runs", "m") is not None
    for name, own in (("withheld", INTERACTIVE), ("held", BATCH)):
        assert admission.admit(name, "m", limit=1) is not None
        admission.join(name, "late", own, 1)
    wait(admission, ["batch"], priority=BATCH)
    before = repr(admission), admission.wanted()
    assert admission.would_admit(subject, model, priority, limit) is admitted
    assert (repr(admission), admission.wanted()) == before
    if subject not in ("withheld", "held"):  # `admit` leaves that order to the queue
        assert (admission.admit(subject, model, priority, limit) is None) != admitted


def test_an_empty_queue_admits_a_subject_below_its_limit() -> None:
    admission = make()
    assert admission.would_admit("new", "m", BATCH, 0)
    assert admission.would_admit("new", "m", BATCH, 1)


@pytest.mark.parametrize(
    ("waiting", "subject", "priority", "room"),
    [
        ("a", "a", INTERACTIVE, True),  # not full
        ("aa", "b", INTERACTIVE, True),  # in place of one of `a`
        ("aa", "b", BATCH, False),
        ("aa", "a", INTERACTIVE, False),
        ("ab", "c", INTERACTIVE, False),
    ],
)
def test_whether_a_request_would_find_room_is_known(
    waiting: str, subject: str, priority: Priority, room: bool
) -> None:
    admission = make(2)
    wait(admission, waiting)
    assert admission.would_join(subject, priority) is room
    assert admission.waiting == len(waiting)
    if room:
        admission.join(subject, "m", priority)
    else:
        refused(admission, subject, priority)


def test_the_place_of_a_request_that_has_not_come() -> None:
    clock = Clock()
    admission = make(clock=clock)
    assert admission.outlook("m", BATCH) == Place(1, 1, None)
    wait(admission, "aaaa")
    for _ in range(2):
        clock.advance(4)
        admission.next("m")
    wait(admission, "bbb", priority=BATCH)
    wait(admission, "c", "other")
    assert admission.outlook("m", INTERACTIVE) == Place(3, 6, 12.0)
    assert admission.outlook("m", BATCH) == Place(6, 6, 24.0)
    assert admission.outlook("other", BATCH) == Place(2, 2, None)


@pytest.mark.parametrize(("timeout", "seconds"), [(10, 5), (600, MOST_PATIENCE)])
def test_a_request_waits_half_of_its_time_for_a_better_worker(
    timeout: float, seconds: float
) -> None:
    assert make(timeout=timeout).patience == seconds


def test_only_what_runs_of_limited_subjects_is_reported() -> None:
    admission = make()
    for name, limit in (("a", 0), ("b", 2), ("b", 2), ("c", 3)):
        assert admission.admit(name, "m", limit=limit) is not None
    wait(admission, "d", limit=1)
    assert admission.limited() == {"b": 2, "c": 1}


# --- Places and errors -------------------------------------------------------------


def test_a_ticket_knows_until_when_it_may_wait() -> None:
    clock = Clock(1000.0)
    admission = make(timeout=5, clock=clock)
    (ticket,) = wait(admission, "a")
    clock.advance(3)
    assert admission.deadline(ticket) == 1005.0


def test_the_error_of_a_timeout_names_what_was_waited_for() -> None:
    admission = make(timeout=1.5)
    (ticket,) = wait(admission, "a")
    error = admission.too_late(ticket)
    assert (error.code, error.code.status) == (Code.QUEUE_TIMEOUT, 503)
    assert error.message == (
        "No slot for the model 'm' came free within 1.5 s (queue.timeout)."
    )
    assert error.retry_after == RETRY_AFTER
    admission.leave(ticket)
    assert admission.too_late(ticket).message == error.message


def test_the_error_of_a_wait_for_own_requests_names_them() -> None:
    admission = make()
    wait(admission, "aaa", limit=2)
    assert turns(admission) == "aa"
    (ticket,) = wait(admission, "a", limit=2)
    assert admission.too_late(ticket).message == (
        "None of your 2 running requests ended within 60 s (queue.timeout), "
        "and no more than 2 may run at once (max_concurrency)."
    )


def test_a_place_has_the_position_and_the_expected_time() -> None:
    clock = Clock()
    admission = make(clock=clock)
    wait(admission, "aaaaaa")
    for _ in range(3):
        clock.advance(4)
        assert admission.next("m") is not None
    (batch,) = wait(admission, "b", priority=BATCH)
    (chat,) = wait(admission, "c")
    last = wait(admission, "a", "other")[0]
    assert admission.place(chat) == Place(1, 5, 4.0)
    assert admission.place(batch) == Place(5, 5, 20.0)
    assert admission.place(last) == Place(1, 1, None)


def test_the_pace_is_that_of_the_times_with_requests_waiting() -> None:
    clock = Clock()
    admission = make(clock=clock)
    wait(admission, "aaa")
    for _ in range(3):
        clock.advance(4)
        admission.next("m")
    clock.advance(3600)
    (ticket,) = wait(admission, "a")
    assert admission.place(ticket) == Place(1, 1, 4.0)
    admission.next("m")
    assert admission.retry_after("m") == 1
    wait(admission, "aa")
    assert admission.retry_after("m") == 8


def test_retry_after_is_the_time_in_which_those_that_wait_are_admitted() -> None:
    clock = Clock()
    admission = make(timeout=600, clock=clock)
    assert admission.retry_after("m") == RETRY_AFTER
    wait(admission, "a" * 13)
    assert admission.retry_after("m") == RETRY_AFTER
    admission.next("m")
    clock.advance(2.5)
    admission.next("m")
    assert admission.retry_after("m") == 28
    wait(admission, "a" * 100)
    assert admission.retry_after("m") == RETRY_AFTER_MOST
    turns(admission)
    assert admission.retry_after("m") == 1
    assert admission.retry_after("other") == RETRY_AFTER


def test_retry_after_is_no_longer_than_the_timeout_of_the_queue() -> None:
    clock = Clock()
    admission = make(timeout=4.2, clock=clock)
    wait(admission, "a" * 9)
    admission.next("m")
    clock.advance(3)
    admission.next("m")
    assert admission.retry_after("m") == 5


@given(
    came=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(Priority)), max_size=40
    ),
    before=st.integers(0, 20),
)
def test_places_predict_the_turns(
    came: list[tuple[str, Priority]], before: int
) -> None:
    clock = Clock()
    admission = make(clock=clock)
    tickets = []
    for number, (subject, priority) in enumerate(came):
        tickets.append(admission.join(subject, "m", priority))
        if number < before and number % 2:
            admission.next("m")
    clock.advance(1)
    waiting = [each for each in tickets if each.state is TicketState.WAITING]
    predicted = sorted(waiting, key=lambda each: admission.place(each).position)
    assert [admission.next("m") for _ in waiting] == predicted


# --- What it costs ----------------------------------------------------------------


def test_what_is_remembered_of_models_has_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gollama_proxy.scheduling.admission.REMEMBERED", 3)
    clock = Clock()
    admission = make(clock=clock)
    (kept,) = wait(admission, "a", "kept")
    for number in range(10):
        model = f"m{number}"
        wait(admission, "aa", model)
        admission.next([model])
        clock.advance(5)
        admission.next([model])
        assert admission.retry_after(model) == 1
        assert len(admission._forecasts) <= 3
        assert len(admission._rounds[INTERACTIVE]) <= 3
    assert admission.wanted() == {"kept"}
    assert admission.next([f"m{number}" for number in range(10)] + ["kept"]) is kept
    assert not admission._rounds[INTERACTIVE]


def test_the_next_is_picked_without_looking_at_all_requests() -> None:
    """A hundred times as many waiting; the steps of the interpreter are counted."""

    def steps(waiting: int) -> int:
        admission = make(10_000)
        for number in range(waiting):
            admission.join(f"subject {number % (waiting // 2)}", f"m{number % 2}")
        models = ["m0", "m1"]
        admission.next(models)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        admission.next(models)
        sys.setprofile(None)
        return calls

    assert steps(10_000) <= steps(100) + 5


# --- Against a model --------------------------------------------------------------


class Admissions(RuleBasedStateMachine):
    """An admission queue, and all that is known of it, in plain lists."""

    subjects: ClassVar = st.sampled_from("abcd")
    models: ClassVar = st.sampled_from("xy")
    priorities: ClassVar = st.sampled_from(Priority)
    limits: ClassVar = st.sampled_from([0, 0, 1, 2])

    @initialize(size=st.integers(0, 9))
    def begin(self, size: int) -> None:
        self.clock = Clock()
        self.admission = Admission(Queue(size=size), self.clock)
        self.admission.on_displaced = lambda ticket: self.displaced.append(ticket)
        self.displaced: list[Ticket] = []
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.admitted: list[Subject] = []  # an entry for each request
        self.ended: list[Ticket] = []
        self.limit: dict[str, int] = {}
        # The turns in some rounds since a subject could have had one there.
        self.passed: dict[tuple[str, Priority, str], str] = {}

    # --- What is expected ---

    def at_limit(self, subject: str) -> bool:
        limit = self.limit.get(subject, 0)
        return 0 < limit <= self.runs(subject)

    def runs(self, subject: str) -> int:
        had_to_wait = [ticket.subject for ticket in self.running].count(subject)
        return had_to_wait + [each.name for each in self.admitted].count(subject)

    def ready(self, models: str, most: Priority = BATCH) -> list[Ticket]:
        """List those that could be admitted, of the first class that has any."""
        for priority in Priority:
            found = [
                ticket
                for ticket in self.waiting
                if ticket.model in models
                and ticket.priority is priority
                and not self.at_limit(ticket.subject)
            ]
            if found and priority.rank <= most.rank:
                return found
        return []

    def victims(self, subject: str, priority: Priority) -> list[Ticket]:
        """List those of which one has to make room; empty if none has."""
        for lower in [BATCH] if priority is BATCH else [BATCH, INTERACTIVE]:
            there = [each for each in self.waiting if each.priority is lower]
            counts = Counter(each.subject for each in there)
            most = max(counts.values(), default=0)
            if most >= (counts[subject] + 2 if lower is priority else 1):
                largest = [each for each in counts if counts[each] == most]
                newest = {each.subject: each for each in there}
                return [newest[each] for each in largest]
        return []

    def forget(self, subject: str) -> None:
        """A subject without requests has no limit any more."""
        waits = any(each.subject == subject for each in self.waiting)
        if not (waits or self.runs(subject)):
            self.limit.pop(subject, None)

    # --- What happens ---

    @rule(subject=subjects, model=models, priority=priorities, limit=limits)
    def joins(self, subject: str, model: str, priority: Priority, limit: int) -> None:
        full = len(self.waiting) >= self.admission.settings.size
        victims = self.victims(subject, priority) if full else []
        if full and not victims:
            with pytest.raises(NoWorkerError):
                self.admission.join(subject, model, priority, limit)
            assert not self.displaced
            return
        ticket = self.admission.join(subject, model, priority, limit)
        if full:
            (gone,) = self.displaced
            assert gone in victims
            assert gone.state is TicketState.DISPLACED
            self.displaced.clear()
            self.waiting.remove(gone)
            self.ended.append(gone)
            self.forget(gone.subject)
        self.limit[subject] = limit
        assert ticket.state is TicketState.WAITING
        self.waiting.append(ticket)

    @rule(subject=subjects, model=models, priority=priorities, limit=limits)
    def comes_while_a_slot_is_free(
        self, subject: str, model: str, priority: Priority, limit: int
    ) -> None:
        holder = self.admission.admit(subject, model, priority, limit)
        self.limit[subject] = limit
        has_to_wait = self.at_limit(subject) or self.ready(model, priority)
        assert (holder is None) == bool(has_to_wait)
        if holder is not None:
            assert holder.name == subject
            self.admitted.append(holder)
        self.forget(subject)

    @precondition(lambda self: self.waiting)
    @rule(models=st.sampled_from(["x", "y", "xy", "yx", "xyz"]))
    def a_slot_comes_free(self, models: str) -> None:
        ready = self.ready(models)
        ticket = self.admission.next(models)
        assert (ticket in ready) if ready else ticket is None
        if ticket is None:
            return
        own = [each for each in ready if each.subject == ticket.subject]
        assert ticket is own[0], "first come, first served"
        assert ticket.state is TicketState.RUNNING
        self.note_turn(ticket, models, {each.subject for each in ready})
        self.waiting.remove(ticket)
        self.running.append(ticket)

    @precondition(lambda self: self.waiting)
    @rule(
        subject=subjects,
        models=st.sampled_from(["x", "y", "xy", "yx", "xyz"]),
        able=st.sampled_from(["x", "y", "xy", ""]),
    )
    def a_slot_is_for_one_subject(self, subject: str, models: str, able: str) -> None:
        own = [
            each
            for priority in Priority
            for each in self.waiting
            if each.priority is priority
            and each.subject == subject
            and each.model in able
            and not self.at_limit(subject)
        ]
        ticket = self.admission.take(subject, models, lambda each: each.model in able)
        assert ticket is (own[0] if own else None), "the oldest one of the best class"
        if ticket is None:
            return
        assert ticket.state is TicketState.RUNNING
        self.passed.clear()  # the order is not this admission's
        self.waiting.remove(ticket)
        self.running.append(ticket)

    @invariant()
    def those_that_may_go_in_are_listed(self) -> None:
        for model in "xy":
            listed = self.admission.in_turn(model, 100)
            left = {
                each: limit - self.runs(each)
                for each, limit in self.limit.items()
                if limit
            }
            able = [each for each in self.waiting if each.model == model]
            for subject in "abcd":
                own = [each for each in able if each.subject == subject]
                own.sort(key=lambda each: each.priority.rank)
                most = max(left.get(subject, len(own)), 0)
                there = [each for each in listed if each.subject == subject]
                assert there == own[:most]
            ranks = [each.priority.rank for each in listed]
            assert ranks == sorted(ranks)
            assert self.admission.in_turn(model, 1) == listed[:1]

    def note_turn(self, ticket: Ticket, models: str, others: set[str]) -> None:
        for subject in others - {ticket.subject}:
            key = (ticket.model, ticket.priority, subject)
            if key in self.passed:
                assert ticket.subject not in self.passed[key], "a second turn"
                self.passed[key] += ticket.subject
        for model in models:
            self.passed.pop((model, ticket.priority, ticket.subject), None)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def a_ticket_leaves(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting + self.running))
        waited = ticket in self.waiting
        self.admission.leave(ticket)
        assert ticket.state is (TicketState.LEFT if waited else TicketState.DONE)
        (self.waiting if waited else self.running).remove(ticket)
        self.ended.append(ticket)
        self.forget(ticket.subject)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_ticket_becomes_a_place(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        holder = self.admission.keep(ticket)
        assert (holder.name, ticket.state) == (ticket.subject, TicketState.DONE)
        self.running.remove(ticket)
        self.ended.append(ticket)
        self.admitted.append(holder)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def a_request_without_a_ticket_ends(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.admitted))
        self.admission.release(holder)
        self.admitted.remove(holder)
        self.forget(holder.name)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def a_ticket_leaves_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.ended))
        state = ticket.state
        self.admission.leave(ticket)
        assert ticket.state is state

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- What always holds ---

    @invariant()
    def no_ticket_is_lost_or_there_twice(self) -> None:
        assert (
            self.admission.waiting == len(self.waiting) <= self.admission.settings.size
        )
        for priority in Priority:
            there = [each.priority for each in self.waiting].count(priority)
            assert self.admission.waiting_in(priority) == there
        for subject in "abcd":
            assert self.admission.running(subject) == self.runs(subject)
        assert {each.state for each in self.waiting} <= {TicketState.WAITING}
        assert {each.state for each in self.running} <= {TicketState.RUNNING}
        here = {each.subject for each in self.waiting + self.running}
        here |= {each.name for each in self.admitted}
        subjects = self.admission._subjects.items()
        assert {name for name, each in subjects if each.running or each.rounds} == here

    @invariant()
    def what_could_go_in_is_wanted(self) -> None:
        wanted = {model for model in "xy" if self.ready(model)}
        assert self.admission.wanted() == wanted

    @invariant()
    def each_ticket_that_waits_has_a_place(self) -> None:
        for ticket in self.waiting:
            place = self.admission.place(ticket)
            there = [each.model for each in self.waiting].count(ticket.model)
            assert 1 <= place.position <= place.waiting == there

    @invariant()
    def turns_are_counted_for_subjects_that_could_have_had_them(self) -> None:
        able = {
            (each.model, each.priority, each.subject)
            for each in self.waiting
            if not self.at_limit(each.subject)
        }
        self.passed = {key: self.passed.get(key, "") for key in able}


TestAdmissions = Admissions.TestCase


def test_a_turn_that_was_granted_counts_for_each_model_of_the_worker() -> None:
    admission = make()
    wait(admission, "aab", "x")
    wait(admission, "a", "y")
    ticket = admission.take("a", "xy", lambda each: each.model == "y")
    assert ticket is not None
    assert ticket.model == "y"
    assert turns(admission, "x") == "baa"


def test_a_retry_goes_before_the_subjects_other_requests() -> None:
    admission = make()
    wait(admission, "aa")
    first = admission.join("a", "m", first=True)
    assert admission.take("a", "m", lambda each: True) is first


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=60),
    st.randoms(use_true_random=False),
)
def test_over_all_models_of_a_worker_no_subject_has_two_turns_while_another_waits(
    came: list[tuple[str, str]], rng: random.Random
) -> None:
    admission = make()
    waiting: list[str] = []
    since: dict[str, str] = {}  # the turns since each subject waits
    for subject, model in came:
        admission.join(subject, model)
        waiting.append(subject)
        since.setdefault(subject, "")
        if rng.random() < 0.5:
            continue
        ticket = admission.next("xyz")
        assert ticket is not None
        had = ticket.subject
        del since[had]
        since = {each: turns + had for each, turns in since.items()}
        assert all(turns.count(had) == 1 for turns in since.values())
        waiting.remove(had)
        if had in waiting:
            since[had] = ""
        if rng.random() < 0.7:
            admission.leave(ticket)


# --- What each ticket and each model has for itself -------------------------------


def test_a_ticket_has_its_subject_from_the_first_moment() -> None:
    """And its model and class; the numbers rise."""
    admission = make()
    first = admission.join("a", "m", BATCH)
    second = admission.join("b", "other", BATCH)
    for ticket, subject, model in ((first, "a", "m"), (second, "b", "other")):
        found = (ticket.subject, ticket.model, ticket.priority, ticket.first)
        assert found == (subject, model, BATCH, False)
    assert 0 < first.number < second.number


def test_a_refusal_reports_the_pace_of_its_model() -> None:
    """Not that of another model, for which more requests wait."""
    clock = Clock()
    admission = make(8, clock=clock)
    wait(admission, "abcdefgh", "slow")
    for _ in range(4):
        clock.advance(3)
        assert admission.next(["slow"]) is not None
    (late,) = wait(admission, "x", "slow")
    wait(admission, "pqr", "new")
    for refusal in (admission.no_room("slow"), admission.too_late(late)):
        assert refusal.retry_after == 15
    assert admission.no_room("new").retry_after == RETRY_AFTER
    with pytest.raises(NoWorkerError) as caught:
        admission.join("x", "slow")
    assert caught.value.retry_after == 15


def test_every_turn_is_counted_and_every_refusal() -> None:
    admission = make(2)
    wait(admission, "ab", priority=BATCH)
    refused(admission, "a", BATCH)
    refused(admission, "b", BATCH)
    assert turns(admission) == "ab"
    assert admission.turns == {BATCH: 2}
    assert admission.refused == {BATCH: 2}


def test_with_room_for_one_a_round_is_one_turn() -> None:
    """So a stream of new subjects cannot keep out one that had its turn."""
    admission = make(1)
    had = ""
    for subject in "abcb":
        wait(admission, subject)
        had += turns(admission, ends=True)
    assert had == "abcb"
    wait(admission, "a")
    rounds = admission._rounds_of("m", INTERACTIVE)
    assert not rounds.over
    rounds.had_turn("x")  # in other rounds that are served with these
    assert rounds.over


# --- Forecasts ---------------------------------------------------------------------


def tickets(count: int) -> list[Ticket]:
    return [
        Ticket(n, "ann", "qwen", Priority.INTERACTIVE, 0.0) for n in range(1, count + 1)
    ]


def paced(forecast: Forecast, clock: Clock, *gaps: float) -> None:
    """Have a turn, and one more after each gap."""
    forecast.had_turn()
    for gap in gaps:
        clock.advance(gap)
        forecast.had_turn()


# --- The pace ---------------------------------------------------------------------


def test_two_turns_make_a_pace() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    assert forecast.interval is None
    assert repr(forecast) == "<Forecast a turn every ? s>"
    forecast.had_turn()
    assert forecast.interval is None
    clock.advance(4)
    forecast.had_turn()
    assert forecast.interval == 4
    assert repr(forecast) == "<Forecast a turn every 4.0 s>"


def test_a_burst_is_evened_out() -> None:
    """Four slots that come free together, every 12 s."""
    clock = Clock()
    forecast = Forecast(clock)
    intervals = []
    for _ in range(20):
        paced(forecast, clock, 0, 0, 0)
        intervals.append(forecast.interval)
        clock.advance(12)
    assert intervals[-1] == pytest.approx(3, abs=1)


def test_a_change_of_pace_is_followed() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    paced(forecast, clock, *[1.0] * 50)
    paced(forecast, clock, *[10.0] * 20)
    assert forecast.interval == pytest.approx(10, rel=0.1)


def test_without_turns_the_old_pace_does_not_count() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    paced(forecast, clock, 1, 1)
    clock.advance(60)
    assert forecast.interval == 60


def test_a_turn_at_once_predicts_nothing() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    for _ in range(4):
        forecast.had_turn(at_once=True)
        clock.advance(0.004)
    assert forecast.interval is None
    clock.advance(8)
    forecast.had_turn()
    assert forecast.interval == pytest.approx(8, abs=0.01)


def test_a_request_that_got_a_free_slot_of_the_store_is_no_pace() -> None:
    clock = Clock()
    admission = make(clock=clock)
    for _ in range(4):
        admission.join("a", "m", Priority.INTERACTIVE)
        clock.advance(0.004)
        admission.next("m")
    waiting = admission.join("a", "m", Priority.INTERACTIVE)
    assert admission.place(waiting).eta is None
    assert admission.expected_wait("m") is None


def test_it_is_none_while_another_request_waits_either() -> None:
    clock = Clock()
    admission = make(clock=clock)
    wait(admission, "b", priority=BATCH)
    for _ in range(4):
        wait(admission, "a")
        clock.advance(0.004)
        admission.next("m")
    assert admission.expected_wait("m") is None


def test_a_night_without_requests_does_not_change_the_pace() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    paced(forecast, clock, 2, 2)
    forecast.pause()
    clock.advance(30_000)
    assert forecast.interval == 2
    paced(forecast, clock, 2)
    assert forecast.interval == 2


# --- The place --------------------------------------------------------------------


def test_a_place_comes_with_how_many_wait_and_for_how_long() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    waiting = tickets(7)
    assert forecast.place(waiting[2], 7, lambda: waiting) == Place(3, 7, None)
    paced(forecast, clock, 4)
    assert forecast.place(waiting[2], 7, lambda: waiting) == Place(3, 7, 12.0)


def test_places_are_counted_once_a_second_however_many_ask() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    waiting = tickets(7)
    counted = 0

    def order() -> list[Ticket]:
        nonlocal counted
        counted += 1
        return waiting

    for ticket in waiting:
        forecast.place(ticket, 7, order)
        clock.advance(FRESH / 8)
    assert counted == 1
    clock.advance(FRESH / 8)
    del waiting[0]
    assert forecast.place(waiting[0], 6, order).position == 1
    assert counted == 2


def test_a_ticket_that_joined_after_the_last_count_is_the_last() -> None:
    forecast = Forecast(Clock())
    waiting = tickets(4)
    assert forecast.place(waiting[0], 3, lambda: waiting[:3]).position == 1
    assert forecast.place(waiting[3], 4, lambda: waiting) == Place(4, 4, None)


def test_a_place_is_never_behind_all_that_wait() -> None:
    """Three have left since the last count."""
    forecast = Forecast(Clock())
    waiting = tickets(4)
    forecast.place(waiting[3], 4, lambda: waiting)
    assert forecast.place(waiting[3], 1, lambda: waiting[3:]) == Place(1, 1, None)
