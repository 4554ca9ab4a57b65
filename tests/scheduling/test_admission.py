"""The waiting line is bounded, fair to every subject, and loses nobody."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gollama_proxy.config.settings import Queue
from gollama_proxy.scheduling import admission
from gollama_proxy.scheduling.admission import RETRY_AFTER, RETRY_AFTER_MOST, Line
from gollama_proxy.scheduling.outlook import Place
from gollama_proxy.scheduling.ticket import Priority, State, Ticket
from gollama_proxy.wire.errors import Code, NoWorkerError
from tests.fakes.clock import Clock

INTERACTIVE, BATCH = Priority


def make(size: int = 256, *, timeout: float = 60.0, clock: Clock | None = None) -> Line:
    return Line(Queue(size=size, timeout=timeout), clock or Clock())


def wait(
    line: Line,
    subjects: Iterable[str],
    model: str = "m",
    priority: Priority = INTERACTIVE,
    limit: int = 0,
) -> list[Ticket]:
    """Have a request join for each letter, in this order."""
    return [line.join(subject, model, priority, limit) for subject in subjects]


def turns(line: Line, models: Collection[str] = "m", *, ends: bool = False) -> str:
    """Give out slots until nobody takes one; tell who did.

    With `ends` each request is over before the next slot is given out.
    """
    had = ""
    while (ticket := line.next(models)) is not None:
        had += ticket.subject
        if ends:
            line.leave(ticket)
    return had


def refused(line: Line, subject: str, priority: Priority = INTERACTIVE) -> str:
    with pytest.raises(NoWorkerError) as caught:
        line.join(subject, "m", priority)
    error = caught.value
    assert (error.code, error.code.status) == (Code.QUEUE_FULL, 429)
    assert error.retry_after is not None
    assert error.retry_after > 0
    return error.message


# --- A life -----------------------------------------------------------------------


def test_a_request_waits_and_runs_and_is_over() -> None:
    line = make()
    (ticket,) = wait(line, "a")
    assert (ticket.state, len(line), line.running("a")) == (State.WAITING, 1, 0)
    assert line.wanted() == {"m"}
    assert repr(line) == "<Line interactive=1 batch=0 subjects=1>"
    assert line.next(["x"]) is None
    assert line.next(["x", "m"]) is ticket
    assert (ticket.state, len(line), line.running("a")) == (State.RUNNING, 0, 1)
    assert not line.wanted()
    line.leave(ticket)
    assert (ticket.state, line.running("a")) == (State.DONE, 0)
    assert line.turns == {INTERACTIVE: 1}
    assert repr(line) == "<Line interactive=0 batch=0 subjects=0>"


def test_a_client_that_leaves_while_it_waits_leaves_the_line() -> None:
    line = make(2)
    first, second = wait(line, "ab")
    line.leave(first)
    assert (first.state, len(line)) == (State.LEFT, 1)
    (third,) = wait(line, "a")
    assert line.next("m") is second
    assert line.next("m") is third


@pytest.mark.parametrize("end", ["left", "done", "displaced"])
def test_leaving_twice_counts_once(end: str) -> None:
    line = make(2)
    one, other = wait(line, "aa", limit=2)
    if end == "displaced":
        wait(line, "b")
        one = other
    elif end == "done":
        assert line.next("m") is one
        assert line.next("m") is other
        line.leave(one)
    else:
        line.leave(one)
    state, length, running = one.state, len(line), line.running("a")
    assert state.value == end
    for _ in range(3):
        line.leave(one)
    assert (one.state, len(line), line.running("a")) == (state, length, running)


# --- Past the line ----------------------------------------------------------------


def test_where_a_slot_is_free_nobody_waits() -> None:
    line = make(0)
    ticket = line.admit("a", "m")
    assert ticket is not None
    assert (ticket.state, line.running("a"), len(line)) == (State.RUNNING, 1, 0)
    assert not line.turns


def test_nobody_passes_those_whose_turn_it_is() -> None:
    line = make()
    wait(line, "a", priority=BATCH)
    assert line.admit("b", "m", BATCH) is None
    assert line.admit("b", "other", BATCH) is not None
    assert line.admit("b", "m", INTERACTIVE) is not None
    wait(line, "a", priority=INTERACTIVE)
    assert line.admit("c", "m", INTERACTIVE) is None
    assert line.admit("c", "m", BATCH) is None
    assert repr(line) == "<Line interactive=1 batch=1 subjects=2>"


def test_who_is_withheld_is_passed() -> None:
    line = make()
    assert line.admit("a", "m", limit=1) is not None
    wait(line, "a", limit=1)
    assert line.admit("b", "m") is not None
    assert line.admit("a", "m", limit=1) is None


# --- Fairness ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4])
def test_a_load_test_delays_a_chat_by_one_generation_at_most(slots: int) -> None:
    """It has all slots and 200 more waiting; the next slot is the chat's."""
    clock = Clock()
    line = make(clock=clock)
    assert all(line.admit("load", "m") for _ in range(slots))
    wait(line, ["load"] * 200)
    for _ in range(5):  # requests of the chat, one after the other
        chat = line.join("chat", "m")
        clock.advance(1)
        assert line.place(chat).position == 1
        assert line.next("m") is chat
        assert line.next("m") is not None
        line.leave(chat)


def test_two_subjects_that_send_again_and_again_do_not_keep_out_a_third() -> None:
    line = make()
    wait(line, "cab")
    had = ""
    while len(had) < 30:
        ticket = line.next("m")
        assert ticket is not None
        line.leave(ticket)
        wait(line, ticket.subject)
        had += ticket.subject
    assert Counter(had) == {"a": 10, "b": 10, "c": 10}


def test_batch_waits_for_as_long_as_anything_interactive_does() -> None:
    line = make()
    wait(line, "aabb", priority=BATCH)
    wait(line, "ccaa")
    assert turns(line) == "cacaabab"


def test_interactive_requests_that_cannot_go_in_do_not_hold_up_batch() -> None:
    line = make()
    wait(line, "a", "big")
    wait(line, "b", "small", BATCH)
    assert line.next(["small"]) is not None
    assert line.admit("c", "m", limit=1)
    wait(line, "c", limit=1)
    wait(line, "d", priority=BATCH)
    assert turns(line) == "d"


@pytest.mark.parametrize("models", ["xy", "yx", "xyx"])
def test_a_subject_has_one_turn_in_a_round_over_all_models_of_a_worker(
    models: str,
) -> None:
    line = make()
    for _ in range(3):
        wait(line, "a", "x")
        wait(line, "a", "y")
    wait(line, "bbb", "x")
    assert turns(line, models) == "abababaaa"


def test_a_subject_is_served_in_its_order_over_all_models_of_a_worker() -> None:
    line = make()
    came = [line.join("a", model) for model in "xyyxyx"]
    assert [line.next("xy") for _ in came] == came


def test_a_newcomer_passes_whoever_had_a_turn_at_another_model_of_the_worker() -> None:
    line = make()
    wait(line, "aaa", "x")
    assert line.next("xy") is not None
    wait(line, "b", "y")
    assert turns(line, "xy") == "baa"


def test_a_turn_at_one_model_of_a_worker_puts_its_subject_last_at_all() -> None:
    """Both run already, so both wait for the next round; one has a turn before it."""
    line = make()
    running = line.admit("a", "z")
    assert line.admit("b", "z") is not None
    wait(line, "aab", "y")
    assert running is not None
    line.leave(running)
    wait(line, "a", "x")
    assert turns(line, "xy") == "abaa"


def test_a_slot_is_not_for_who_waits_for_another_model() -> None:
    line = make()
    wait(line, "aaa", "x")
    wait(line, "b", "y")
    assert turns(line, "y") == "b"
    assert turns(line, "yx") == "aaa"


def test_who_was_failed_by_a_worker_goes_before_all_others_of_its_class() -> None:
    line = make()
    wait(line, "aabb")
    wait(line, "c", priority=BATCH)
    again = line.join("b", "m", first=True)
    last = line.join("d", "m", BATCH, first=True)
    assert line.next("m") is again
    assert turns(line) == "abab" + "dc"
    assert (again.state, last.state) == (State.RUNNING, State.RUNNING)


def test_it_does_so_over_all_models_of_a_worker() -> None:
    line = make()
    wait(line, "a", "x")
    wait(line, "b", "y")
    line.join("c", "y", first=True)
    assert turns(line, "xy") == "cab"


# --- Limits of a subject ----------------------------------------------------------


def test_a_subject_at_its_limit_lets_others_pass() -> None:
    line = make()
    first, *_ = wait(line, "aaa", limit=1)
    wait(line, "bb")
    assert turns(line) == "abb"
    assert not line.wanted()
    assert len(line) == 2
    line.leave(first)
    assert line.wanted() == {"m"}
    assert turns(line) == "a"


def test_who_comes_back_below_its_limit_and_still_runs_is_no_newcomer() -> None:
    line = make()
    running = [line.admit("a", "m", limit=2) for _ in range(2)]
    wait(line, "a", limit=2)
    assert running[0] is not None
    line.leave(running[0])
    wait(line, "b")
    assert turns(line) == "ba"


def test_a_limit_counts_over_all_models() -> None:
    line = make()
    ticket = line.admit("a", "x", limit=1)
    wait(line, "a", "y", limit=1)
    wait(line, "a", "z", BATCH, limit=1)
    assert turns(line, "xyz") == ""
    assert ticket is not None
    line.leave(ticket)
    assert line.wanted() == {"y", "z"}
    assert turns(line, "xyz") == "a"


def test_the_limit_of_a_subject_is_what_its_last_request_said() -> None:
    line = make()
    wait(line, "aaaa", limit=1)
    assert turns(line) == "a"
    wait(line, "a", limit=3)
    assert turns(line) == "aa"
    wait(line, "a")
    assert turns(line) == "aaa"


# --- Room -------------------------------------------------------------------------


def test_a_line_that_is_full_says_so_and_names_the_limit() -> None:
    line = make(2)
    wait(line, "ab")
    assert refused(line, "c") == (
        "Too many requests are waiting: the limit is 2 (queue.size)."
    )
    assert line.refused == {INTERACTIVE: 1}
    assert "limit is 0 (queue.size)" in refused(make(0), "a")


def test_whoever_has_most_waiting_makes_room_for_others() -> None:
    line = make(4)
    gone: list[Ticket] = []
    line.on_displaced = gone.append
    tickets = wait(line, "aaaa")
    refused(line, "a")
    wait(line, "b")
    wait(line, "c")
    assert gone == [tickets[3], tickets[2]]
    assert {ticket.state for ticket in gone} == {State.DISPLACED}
    for subject in "abcd":  # two, one, one: nobody has two more than anybody
        if subject != "d":
            refused(line, subject)
    wait(line, "d")
    refused(line, "e")
    assert turns(line) == "abcd"
    assert line.refused == {INTERACTIVE: 8}


def test_the_newest_request_over_all_models_makes_room() -> None:
    line = make(4)
    wait(line, "a", "x")
    wait(line, "a", "y")
    wait(line, "a", "z", BATCH)
    (newest,) = wait(line, "a", "x")
    refused(line, "b", BATCH)  # in the place of nothing that is interactive
    assert newest.state is State.WAITING
    wait(line, "c")
    wait(line, "d")
    assert newest.state is State.DISPLACED
    assert turns(line, "xyzm") == "acda"


def test_batch_makes_room_for_what_is_interactive() -> None:
    line = make(3)
    batch = wait(line, "abb", priority=BATCH)
    for subject in "abc":
        wait(line, subject)
    assert [ticket.state for ticket in batch] == [State.DISPLACED] * 3
    assert line.refused == {BATCH: 3}
    refused(line, "d")
    refused(line, "d", BATCH)
    assert turns(line) == "abc"


def test_who_made_room_may_leave_from_the_call_that_says_so() -> None:
    line = make(2)
    line.on_displaced = line.leave
    wait(line, "aa")
    wait(line, "b")
    assert turns(line) == "ab"


# --- What clients are told --------------------------------------------------------


def test_a_ticket_knows_until_when_it_may_wait() -> None:
    clock = Clock(1000.0)
    line = make(timeout=5, clock=clock)
    (ticket,) = wait(line, "a")
    clock.advance(3)
    assert line.deadline(ticket) == 1005.0


def test_a_wait_that_ran_out_says_what_was_waited_for() -> None:
    line = make(timeout=1.5)
    (ticket,) = wait(line, "a")
    error = line.too_late(ticket)
    assert (error.code, error.code.status) == (Code.QUEUE_TIMEOUT, 503)
    assert error.message == (
        "No slot for the model 'm' came free within 1.5 s (queue.timeout)."
    )
    assert error.retry_after == RETRY_AFTER
    line.leave(ticket)
    assert line.too_late(ticket).message == error.message


def test_a_wait_for_its_own_requests_says_that_it_was() -> None:
    line = make()
    wait(line, "aaa", limit=2)
    assert turns(line) == "aa"
    (ticket,) = wait(line, "a", limit=2)
    assert line.too_late(ticket).message == (
        "None of your 2 running requests ended within 60 s (queue.timeout), "
        "and no more than 2 may run at once (max_concurrency)."
    )


def test_a_place_tells_who_goes_first_and_how_long_that_may_take() -> None:
    clock = Clock()
    line = make(clock=clock)
    wait(line, "aaaaaa")
    for _ in range(3):
        clock.advance(4)
        assert line.next("m") is not None
    (batch,) = wait(line, "b", priority=BATCH)
    (chat,) = wait(line, "c")
    last = wait(line, "a", "other")[0]
    assert line.place(chat) == Place(1, 5, 4.0)
    assert line.place(batch) == Place(5, 5, 20.0)
    assert line.place(last) == Place(1, 1, None)


def test_the_pace_is_that_of_the_times_when_somebody_waits() -> None:
    clock = Clock()
    line = make(clock=clock)
    wait(line, "aaa")
    for _ in range(3):
        clock.advance(4)
        line.next("m")
    clock.advance(3600)
    (ticket,) = wait(line, "a")
    assert line.place(ticket) == Place(1, 1, 4.0)
    line.next("m")
    assert line.retry_after("m") == 1
    wait(line, "aa")
    assert line.retry_after("m") == 8


def test_retry_after_is_the_time_in_which_those_who_wait_go_in() -> None:
    clock = Clock()
    line = make(timeout=600, clock=clock)
    assert line.retry_after("m") == RETRY_AFTER
    wait(line, "a" * 13)
    assert line.retry_after("m") == RETRY_AFTER
    line.next("m")
    clock.advance(2.5)
    line.next("m")
    assert line.retry_after("m") == 28
    wait(line, "a" * 100)
    assert line.retry_after("m") == RETRY_AFTER_MOST
    turns(line)
    assert line.retry_after("m") == 1
    assert line.retry_after("other") == RETRY_AFTER


def test_nobody_is_told_to_wait_for_longer_than_the_line_itself_waits() -> None:
    clock = Clock()
    line = make(timeout=4.2, clock=clock)
    wait(line, "a" * 9)
    line.next("m")
    clock.advance(3)
    line.next("m")
    assert line.retry_after("m") == 5


@given(
    came=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(Priority)), max_size=40
    ),
    before=st.integers(0, 20),
)
def test_places_foretell_the_turns(
    came: list[tuple[str, Priority]], before: int
) -> None:
    clock = Clock()
    line = make(clock=clock)
    tickets = []
    for number, (subject, priority) in enumerate(came):
        tickets.append(line.join(subject, "m", priority))
        if number < before and number % 2:
            line.next("m")
    clock.advance(1)
    waiting = [each for each in tickets if each.state is State.WAITING]
    foretold = sorted(waiting, key=lambda each: line.place(each).position)
    assert [line.next("m") for _ in waiting] == foretold


# --- What it costs ----------------------------------------------------------------


def test_what_is_remembered_of_models_has_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "REMEMBERED", 3)
    clock = Clock()
    line = make(clock=clock)
    (kept,) = wait(line, "a", "kept")
    for number in range(10):
        model = f"m{number}"
        wait(line, "aa", model)
        line.next([model])
        clock.advance(5)
        line.next([model])
        assert line.retry_after(model) == 1
        assert len(line._outlooks) <= 3
        assert len(line._lanes[INTERACTIVE]) <= 3
    assert line.wanted() == {"kept"}
    assert line.next([f"m{number}" for number in range(10)] + ["kept"]) is kept
    assert not line._lanes[INTERACTIVE]


def test_the_next_is_picked_without_looking_at_all_who_wait() -> None:
    """A hundred times as many waiting; the steps of the interpreter are counted."""

    def steps(waiting: int) -> int:
        line = make(10_000)
        for number in range(waiting):
            line.join(f"subject {number % (waiting // 2)}", f"m{number % 2}")
        models = ["m0", "m1"]
        line.next(models)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        line.next(models)
        sys.setprofile(None)
        return calls

    assert steps(10_000) <= steps(100) + 5


# --- Against a model --------------------------------------------------------------


class Lines(RuleBasedStateMachine):
    """A line, and all that there is to know of it, kept in plain lists."""

    subjects: ClassVar = st.sampled_from("abcd")
    models: ClassVar = st.sampled_from("xy")
    priorities: ClassVar = st.sampled_from(Priority)
    limits: ClassVar = st.sampled_from([0, 0, 1, 2])

    @initialize(size=st.integers(0, 9))
    def begin(self, size: int) -> None:
        self.clock = Clock()
        self.line = Line(Queue(size=size), self.clock)
        self.line.on_displaced = lambda ticket: self.displaced.append(ticket)
        self.displaced: list[Ticket] = []
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.ended: list[Ticket] = []
        self.limit: dict[str, int] = {}
        # Whose turns there were in a lane since somebody could have had one there.
        self.passed: dict[tuple[str, Priority, str], str] = {}

    # --- What is expected ---

    def at_limit(self, subject: str) -> bool:
        limit = self.limit.get(subject, 0)
        running = [ticket.subject for ticket in self.running].count(subject)
        return 0 < limit <= running

    def ready(self, models: str, most: Priority = BATCH) -> list[Ticket]:
        """List those who could go in, of the first class that has any."""
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
        """List those of whom one has to make room; none if it is no one."""
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
        """Whoever has nothing here any more has no limit any more."""
        if all(each.subject != subject for each in self.waiting + self.running):
            self.limit.pop(subject, None)

    # --- What happens ---

    @rule(subject=subjects, model=models, priority=priorities, limit=limits)
    def joins(self, subject: str, model: str, priority: Priority, limit: int) -> None:
        full = len(self.waiting) >= self.line.limits.size
        victims = self.victims(subject, priority) if full else []
        if full and not victims:
            with pytest.raises(NoWorkerError):
                self.line.join(subject, model, priority, limit)
            assert not self.displaced
            return
        ticket = self.line.join(subject, model, priority, limit)
        if full:
            (gone,) = self.displaced
            assert gone in victims
            assert gone.state is State.DISPLACED
            self.displaced.clear()
            self.waiting.remove(gone)
            self.ended.append(gone)
            self.forget(gone.subject)
        self.limit[subject] = limit
        assert ticket.state is State.WAITING
        self.waiting.append(ticket)

    @rule(subject=subjects, model=models, priority=priorities, limit=limits)
    def comes_while_a_slot_is_free(
        self, subject: str, model: str, priority: Priority, limit: int
    ) -> None:
        ticket = self.line.admit(subject, model, priority, limit)
        self.limit[subject] = limit
        has_to_wait = self.at_limit(subject) or self.ready(model, priority)
        assert (ticket is None) == bool(has_to_wait)
        if ticket is not None:
            assert ticket.state is State.RUNNING
            self.running.append(ticket)
        self.forget(subject)

    @precondition(lambda self: self.waiting)
    @rule(models=st.sampled_from(["x", "y", "xy", "yx", "xyz"]))
    def a_slot_comes_free(self, models: str) -> None:
        ready = self.ready(models)
        ticket = self.line.next(models)
        assert (ticket in ready) if ready else ticket is None
        if ticket is None:
            return
        own = [each for each in ready if each.subject == ticket.subject]
        assert ticket is own[0], "first come, first served"
        assert ticket.state is State.RUNNING
        self.note_turn(ticket, models, {each.subject for each in ready})
        self.waiting.remove(ticket)
        self.running.append(ticket)

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
    def somebody_leaves(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting + self.running))
        waited = ticket in self.waiting
        self.line.leave(ticket)
        assert ticket.state is (State.LEFT if waited else State.DONE)
        (self.waiting if waited else self.running).remove(ticket)
        self.ended.append(ticket)
        self.forget(ticket.subject)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def somebody_leaves_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.ended))
        state = ticket.state
        self.line.leave(ticket)
        assert ticket.state is state

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- What always holds ---

    @invariant()
    def nobody_is_lost_and_nobody_there_twice(self) -> None:
        assert len(self.line) == len(self.waiting) <= self.line.limits.size
        for priority in Priority:
            there = [each.priority for each in self.waiting].count(priority)
            assert self.line.waiting(priority) == there
        for subject in "abcd":
            running = [each.subject for each in self.running].count(subject)
            assert self.line.running(subject) == running
        assert {each.state for each in self.waiting} <= {State.WAITING}
        assert {each.state for each in self.running} <= {State.RUNNING}
        here = {each.subject for each in self.waiting + self.running}
        assert self.line._subjects.keys() == here

    @invariant()
    def what_could_go_in_is_wanted(self) -> None:
        wanted = {model for model in "xy" if self.ready(model)}
        assert self.line.wanted() == wanted

    @invariant()
    def everybody_who_waits_has_a_place(self) -> None:
        for ticket in self.waiting:
            place = self.line.place(ticket)
            there = [each.model for each in self.waiting].count(ticket.model)
            assert 1 <= place.position <= place.waiting == there

    @invariant()
    def turns_are_counted_for_who_could_have_had_them(self) -> None:
        able = {
            (each.model, each.priority, each.subject)
            for each in self.waiting
            if not self.at_limit(each.subject)
        }
        self.passed = {key: self.passed.get(key, "") for key in able}


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=200, stateful_step_count=50)


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=60),
    st.randoms(use_true_random=False),
)
def test_over_all_models_of_a_worker_no_subject_has_two_turns_while_another_waits(
    came: list[tuple[str, str]], rng: random.Random
) -> None:
    line = make()
    waiting: list[str] = []
    since: dict[str, str] = {}  # whose turns there were since somebody waits
    for subject, model in came:
        line.join(subject, model)
        waiting.append(subject)
        since.setdefault(subject, "")
        if rng.random() < 0.5:
            continue
        ticket = line.next("xyz")
        assert ticket is not None
        had = ticket.subject
        del since[had]
        since = {each: turns + had for each, turns in since.items()}
        assert all(turns.count(had) == 1 for turns in since.values())
        waiting.remove(had)
        if had in waiting:
            since[had] = ""
        if rng.random() < 0.7:
            line.leave(ticket)


# --- What each ticket and each model has for itself -------------------------------


def test_a_ticket_says_whose_it_is_from_the_first_moment() -> None:
    """Whether it goes in past the line or waits; the numbers rise."""
    line = make()
    admitted = line.admit("a", "m", BATCH)
    assert admitted is not None
    joined = line.join("b", "other", BATCH)
    for ticket, subject, model in ((admitted, "a", "m"), (joined, "b", "other")):
        told = (ticket.subject, ticket.model, ticket.priority, ticket.first)
        assert told == (subject, model, BATCH, False)
    assert 0 < admitted.number < joined.number


def test_a_refusal_tells_of_its_own_models_pace() -> None:
    """Not of that of another model, in front of which more are waiting."""
    clock = Clock()
    line = make(8, clock=clock)
    wait(line, "abcdefgh", "slow")
    for _ in range(4):
        clock.advance(3)
        assert line.next(["slow"]) is not None
    (late,) = wait(line, "x", "slow")
    wait(line, "pqr", "new")
    for refusal in (line.no_room("slow"), line.too_late(late)):
        assert refusal.retry_after == 15
    assert line.no_room("new").retry_after == RETRY_AFTER
    with pytest.raises(NoWorkerError) as caught:
        line.join("x", "slow")
    assert caught.value.retry_after == 15


def test_every_turn_is_counted_and_every_refusal() -> None:
    line = make(2)
    wait(line, "ab", priority=BATCH)
    refused(line, "a", BATCH)
    refused(line, "b", BATCH)
    assert turns(line) == "ab"
    assert line.turns == {BATCH: 2}
    assert line.refused == {BATCH: 2}


def test_with_room_for_one_a_round_is_one_turn() -> None:
    """So ever new subjects cannot keep out one that had its turn."""
    line = make(1)
    had = ""
    for subject in "abcb":
        wait(line, subject)
        had += turns(line, ends=True)
    assert had == "abcb"
    wait(line, "a")
    lane = line._lane("m", INTERACTIVE)
    assert not lane.over
    lane.had_turn("x")  # in another lane, that is served along
    assert lane.over
