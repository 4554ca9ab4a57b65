"""Subjects take turns, and a new subject has one before any other has its second."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.scheduling.turns import (
    Counts,
    Priority,
    Rounds,
    Subject,
    Ticket,
    TicketState,
    choose_priority,
)
from gollama_proxy.wire.errors import Code, RequestError

INTERACTIVE, BATCH = Priority

# --- Classes and tickets -----------------------------------------------------------


def test_interactive_comes_before_batch() -> None:
    assert sorted(Priority, key=lambda p: p.rank) == [INTERACTIVE, BATCH]
    assert [str(priority) for priority in Priority] == ["interactive", "batch"]


@pytest.mark.parametrize(
    ("asked", "allowed", "chosen"),
    [
        (None, INTERACTIVE, INTERACTIVE),
        (None, BATCH, BATCH),
        ("interactive", INTERACTIVE, INTERACTIVE),
        ("batch", INTERACTIVE, BATCH),
        ("batch", BATCH, BATCH),
        (" Batch ", BATCH, BATCH),
    ],
)
def test_a_request_may_ask_for_what_its_token_allows(
    asked: str | None, allowed: Priority, chosen: Priority
) -> None:
    assert choose_priority(asked, allowed) is chosen


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("interactive", Code.PRIORITY_NOT_ALLOWED, "'interactive', only 'batch'"),
        ("urgent", Code.INVALID_VALUE, "'urgent' does not exist; known: interactive,"),
        ("", Code.INVALID_VALUE, "'' does not exist"),
        ("x" * 1000, Code.INVALID_VALUE, f"'{'x' * 40}' does"),
        ("a\nb", Code.INVALID_VALUE, r"'a\nb'"),
    ],
)
def test_anything_else_is_refused_in_one_clear_line(
    asked: str, code: Code, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        choose_priority(asked, BATCH)
    assert caught.value.code is code
    assert words in caught.value.message
    assert caught.value.message.isprintable()


def test_a_ticket_shows_what_it_is() -> None:
    ticket = Ticket(7, "ann", "qwen", BATCH, 5.0)
    assert (ticket.state, ticket.first, ticket.joined_at) == (
        TicketState.WAITING,
        False,
        5.0,
    )
    assert repr(ticket) == "<Ticket 7 of 'ann' for 'qwen' batch WAITING>"
    assert Ticket(-8, "ann", "qwen", BATCH, 5.0).first


# --- Rounds ------------------------------------------------------------------------


class Driver:
    """Rounds, and what the admission queue does with them."""

    def __init__(self, most: int = 100) -> None:
        self.rounds = Rounds("qwen", BATCH, most, itertools.count(1))
        self.numbers = itertools.count(1)

    def wait(self, subjects: str, *, late: bool = False, first: bool = False) -> None:
        """Let a ticket join for each letter, in this order."""
        for subject in subjects:
            number = next(self.numbers)
            ticket = Ticket(-number if first else number, subject, "qwen", BATCH, 0.0)
            self.rounds.add(ticket)
            self.rounds.enter(subject, late=late, first=first)

    def turn(self) -> Ticket:
        if self.rounds.over:
            self.rounds.begin_round()
        ticket = self.rounds.oldest(self.rounds.front)
        assert ticket is not None
        self.rounds.had_turn(ticket.subject)
        self.rounds.remove(ticket)
        return ticket

    def turns(self, count: int = 1000) -> str:
        """Take `count` turns, or all; return their subjects."""
        had = ""
        while self.rounds.open and len(had) < count:
            had += self.turn().subject
        return had


def test_new_rounds_are_empty() -> None:
    rounds = Driver().rounds
    assert (rounds.open, rounds.over, rounds.waiting, rounds.tick) == (
        False,
        True,
        0,
        math.inf,
    )
    assert rounds.oldest("a") is None
    assert repr(rounds) == "<Rounds 'qwen' batch waiting=0 now=[] after=[]>"


@pytest.mark.parametrize(
    ("came", "turns"),
    [
        ("abc", "abc"),
        ("aaa", "aaa"),
        ("aaab", "abaa"),
        ("aabbcc", "abcabc"),
        ("abbbbc", "abcbbb"),
        ("cab" * 2, "cabcab"),
    ],
)
def test_each_subject_has_one_turn_in_a_round(came: str, turns: str) -> None:
    driver = Driver()
    driver.wait(came)
    assert [ticket.subject for ticket in driver.rounds.order()] == list(turns)
    assert driver.turns() == turns
    assert not driver.rounds.waiting


def test_within_a_subject_it_is_first_come_first_served() -> None:
    driver = Driver()
    driver.wait("aaa")
    assert driver.rounds.newest("a").number == 3
    assert [driver.turn().number for _ in range(3)] == [1, 2, 3]


# --- Newcomers --------------------------------------------------------------------


def test_a_newcomer_passes_all_that_have_had_their_turn() -> None:
    driver = Driver()
    driver.wait("aaabbb")
    assert driver.turns(2) == "ab"
    driver.wait("c")
    assert driver.turns() == "cabab"


def test_a_newcomer_waits_for_those_that_have_their_turn_to_come() -> None:
    driver = Driver()
    driver.wait("aaabbb")
    assert driver.turns(1) == "a"
    driver.wait("cc")
    assert driver.turns(4) == "bcab"


def test_a_subject_with_requests_running_is_no_newcomer() -> None:
    """It holds all slots and waits for more; a chat arrives after it."""
    driver = Driver()
    driver.wait("aaa", late=True)
    driver.wait("b")
    assert driver.turns() == "baaa"


def test_a_subject_that_was_here_in_this_round_is_no_newcomer() -> None:
    """Two subjects that always have one request each cannot keep out a third."""
    driver = Driver()
    driver.wait("ccab")
    had = ""
    for _ in range(8):
        subject = driver.turn().subject
        had += subject
        driver.wait(subject)  # sends the next request as soon as it has its answer
    assert had == "cabcabca"


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_stream_of_new_subjects_does_not_keep_a_round_open(most: int) -> None:
    driver = Driver(most)
    driver.wait("aa")
    driver.turn()
    letters = (chr(1000 + n) for n in itertools.count())
    driver.wait(next(letters))
    waited = 0
    while driver.turn().subject != "a":
        driver.wait(next(letters))
        waited += 1
    assert waited <= most + 1


def test_a_round_that_ends_early_keeps_subjects_without_a_turn_in_front() -> None:
    driver = Driver(2)
    driver.wait("aabbc")
    assert driver.turns(2) == "ab"
    assert driver.rounds.over
    assert driver.turns() == "cab"


# --- Passing over -----------------------------------------------------------------


def test_a_withheld_subject_keeps_its_tickets() -> None:
    driver = Driver()
    driver.wait("aab")
    driver.rounds.withhold("a")
    assert driver.turns() == "b"
    assert driver.rounds.waiting == 2
    assert [ticket.subject for ticket in driver.rounds.order()] == ["a", "a"]
    driver.rounds.enter("a", late=False)
    assert driver.turns() == "aa"


def test_entering_twice_changes_nothing() -> None:
    driver = Driver()
    driver.wait("ab")
    driver.rounds.enter("a", late=True)
    assert driver.turns() == "ab"


def test_a_request_that_a_worker_failed_goes_first() -> None:
    driver = Driver()
    driver.wait("aabb")
    driver.turn()
    driver.wait("a", first=True)
    ticket = driver.turn()
    assert (ticket.subject, ticket.first) == ("a", True)
    assert driver.turns() == "bab"


def test_a_turn_elsewhere_counts_here() -> None:
    driver = Driver()
    driver.wait("abc")
    driver.rounds.had_turn("a")
    driver.rounds.had_turn("x")
    driver.wait("x")
    assert driver.turns() == "bcax"


# --- Subjects ---------------------------------------------------------------------


def test_a_subject_is_withheld_at_its_limit_from_all_of_its_rounds() -> None:
    one, two = Driver(), Driver()
    for driver in (one, two):
        driver.wait("a")
    holder = Subject("a")
    holder.rounds = {one.rounds: None, two.rounds: None}
    for running, limit, free in [
        (0, 0, True),
        (9, 0, True),
        (1, 2, True),
        (2, 2, False),
        (3, 2, False),
        (1, 1, False),
        (1, 2, True),
    ]:
        holder.running, holder.limit = running, limit
        holder.review()
        assert holder.withheld is not free
        assert one.rounds.open is two.rounds.open is free
    assert repr(holder) == "<Subject 'a' running=1 of 2>"


# --- Fairness, whatever happens ---------------------------------------------------


@given(st.lists(st.sampled_from("abcd...."), max_size=80), st.sampled_from([2, 99]))
def test_while_one_waits_no_other_has_two_turns(steps: list[str], most: int) -> None:
    """A letter waits; a dot is a turn."""
    driver = Driver(most)
    since: dict[str, str] = {}  # the turns since each subject waits
    for step in steps:
        if step != ".":
            driver.wait(step)
            since.setdefault(step, "")
            continue
        for had in driver.turns(1):
            del since[had]
            since = {each: turns + had for each, turns in since.items()}
            assert all(turns.count(had) == 1 for turns in since.values())
            if driver.rounds.oldest(had) is not None:
                since[had] = ""
    assert "".join(sorted(set(driver.turns()))) == "".join(sorted(since))


@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(0, 30))
def test_the_order_predicts_the_turns(came: list[str], before: int) -> None:
    driver = Driver()
    half = len(came) // 2
    driver.wait("".join(came[:half]))
    driver.turns(before)
    driver.wait("".join(came[half:]))
    predicted = [ticket.number for ticket in driver.rounds.order()]
    assert [driver.turn().number for _ in predicted] == predicted


def test_a_subject_that_goes_first_has_one_place_and_not_two() -> None:
    """It was waiting already, for this round or for the next one."""
    for late in (False, True):
        driver = Driver()
        driver.wait("ab")
        driver.wait("c", late=late)
        driver.wait("c", first=True)
        assert list(driver.rounds._now).count("c") == 1
        assert "c" not in driver.rounds._after
        assert driver.turns(2) == "ca"


def test_a_subject_comes_back_as_one_that_has_something_running_or_has_not() -> None:
    """Under its limit again, it has its turn in this round if nothing of it runs."""
    for running, ring in ((0, "_now"), (1, "_after")):
        driver = Driver()
        driver.wait("a")
        subject = Subject("a")
        subject.rounds[driver.rounds] = None
        subject.limit, subject.running = running + 1, running + 1
        subject.review()
        assert not driver.rounds.open
        subject.running = running
        subject.review()
        assert list(getattr(driver.rounds, ring)) == ["a"]


# --- Counts ------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60)


def test_of_nothing_there_is_no_largest() -> None:
    many = Counts()
    assert (many.largest, many.total, many.count("a")) == (None, 0, 0)


def test_of_several_with_as_many_it_is_the_one_that_had_them_first() -> None:
    many = Counts()
    for subject in "abab":
        many.add(subject)
    assert many.largest == "a"
    many.remove("a")
    many.add("a")
    assert many.largest == "b"
    assert repr(many) == "<Counts {'b': 2, 'a': 2}>"


@given(STEPS)
def test_the_counts_are_those_of_a_plain_counter(steps: list[tuple[str, bool]]) -> None:
    many, counts = Counts(), Counter[str]()
    for subject, comes in steps:
        if comes or not counts[subject]:
            many.add(subject)
            counts[subject] += 1
        else:
            many.remove(subject)
            counts[subject] -= 1
        assert many.total == counts.total()
        assert all(many.count(each) == counts[each] for each in "abcd")
        most = max(counts.values())
        if most:
            assert many.largest is not None
            assert counts[many.largest] == most
        else:
            assert many.largest is None
