"""Whether a request is tried again, where, and after how long: all of the table."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gollama_proxy.routing.budget import RetryBudget
from gollama_proxy.routing.retry import AGAIN, PAUSE, Attempts, Failure
from gollama_proxy.routing.worker import Check, Description, Model, Worker
from gollama_proxy.settings import Health, Origin, Retry, WorkerConfig
from tests.fakes.clock import Clock

# What is tried again elsewhere and not on the same worker, whoever else is there.
ELSEWHERE = [
    Failure.UNREACHABLE,
    Failure.RESET,
    Failure.STATUS,
    Failure.BUSY,
    Failure.SLOW,
    Failure.SILENT,
    Failure.MALFORMED,
    Failure.KEY,
]


def worker(name: str, context: int | None = 1024) -> Worker:
    origin = Origin("http", "127.0.0.1", 8080, "")
    config = WorkerConfig("http://127.0.0.1:8080", origin, name)
    made = Worker(config, Health(), Clock())
    made.observe(Check.OK, "ok", Description((Model("tiny", context),)))
    return made


def attempts(budget: RetryBudget | None = None, **limits: Any) -> Attempts:
    budget = budget or RetryBudget(1.0, 1000, clock=Clock())
    return Attempts("tiny", Retry(**limits), budget, random.Random(7))


def failed(made: Attempts, *tried: Worker) -> Attempts:
    for each in tried:
        made.begin(each)
    return made


# --- Who --------------------------------------------------------------------------


def test_at_first_everybody_may_try() -> None:
    a, b = worker("a"), worker("b")
    made = attempts()
    assert made.candidates([a, b]) == [a, b]
    assert made.has_other([a, b])
    assert made.candidates([]) == []
    assert not made.has_other([])


def test_whoever_has_had_an_attempt_comes_behind_whoever_has_not() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    assert failed(attempts(), a).candidates([a, b, c]) == [b, c]
    assert failed(attempts(), a, b).candidates([a, b, c]) == [c]


def test_when_all_have_had_one_it_is_the_last_ones_once_more() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(), a, b)
    assert made.candidates([a, b]) == [b]
    assert not made.has_other([a, b])


def test_one_that_is_not_available_any_more_is_not_asked_once_more() -> None:
    """Nor is the one before it, which failed as well."""
    a, b = worker("a"), worker("b")
    assert failed(attempts(), a, b).candidates([a]) == []


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_nobody_is_left_when_the_attempts_are_used_up(limit: int) -> None:
    workers = [worker(name) for name in "abcd"]
    made = attempts(attempts=limit)
    for each in workers[:limit]:
        assert made.has_other(workers)
        made.begin(each)
    assert not made.has_other(workers)
    for failure in ELSEWHERE:
        assert made.retry_after(failure, workers, 0.0) is None


# --- The table --------------------------------------------------------------------


@pytest.mark.parametrize("failure", ELSEWHERE)
def test_another_worker_is_asked_at_once(failure: Failure) -> None:
    """A busy one's Retry-After is for itself."""
    a, b = worker("a"), worker("b")
    assert failed(attempts(), a).retry_after(failure, [a, b], 30.0) == 0.0


@pytest.mark.parametrize("failure", [f for f in ELSEWHERE if f is not Failure.BUSY])
def test_the_only_worker_is_asked_once_more_for_what_may_pass(
    failure: Failure,
) -> None:
    a = worker("a")
    pause = failed(attempts(), a).retry_after(failure, [a], 0.0)
    if failure in (Failure.RESET, Failure.STATUS):
        assert pause is not None
        assert PAUSE[0] <= pause <= PAUSE[1]
    else:
        assert pause is None


def test_the_pause_varies_so_that_those_who_failed_together_do_not_return_so() -> None:
    a = worker("a")
    made = RetryBudget(1.0, 1000, clock=Clock())
    rng = random.Random(7)
    pauses = set()
    for _ in range(10):
        one = Attempts("tiny", Retry(), made, rng)
        pauses.add(failed(one, a).retry_after(Failure.RESET, [a]))
    assert len(pauses) == 10


@pytest.mark.parametrize("failure", sorted(AGAIN, key=str))
def test_nobody_is_asked_a_third_time(failure: Failure) -> None:
    a = worker("a")
    made = failed(attempts(attempts=9), a)
    assert made.retry_after(failure, [a]) is not None
    made.begin(a)
    assert made.retry_after(failure, [a]) is None


@pytest.mark.parametrize(
    ("asked", "patience", "waits"),
    [
        (None, 5.0, False),
        (0.0, 5.0, True),
        (1.0, 5.0, True),
        (5.0, 5.0, True),
        (5.1, 5.0, False),
        (0.0, 0.0, True),
        (1.0, 0.0, False),
    ],
)
def test_the_only_worker_is_waited_for_if_it_is_busy_for_a_short_time(
    asked: float | None, patience: float, waits: bool
) -> None:
    """A little longer than it asks for: whoever is early is sent away again."""
    a = worker("a")
    made = failed(attempts(patience=patience), a)
    pause = made.retry_after(Failure.BUSY, [a], asked)
    assert (pause is not None) is waits
    if pause is not None:
        assert asked is not None
        assert asked + PAUSE[0] <= pause <= asked + PAUSE[1]


def test_a_busy_worker_is_waited_for_though_it_is_not_available_meanwhile() -> None:
    assert failed(attempts(), worker("a")).retry_after(Failure.BUSY, [], 1.0)


# --- Prompts that are too long ----------------------------------------------------


def test_a_prompt_that_is_too_long_goes_to_a_worker_with_more_context() -> None:
    small, same, large = worker("a"), worker("b"), worker("c", 4096)
    made = failed(attempts(), small)
    assert made.retry_after(Failure.CONTEXT, [small, same, large]) == 0.0
    assert made.candidates([small, same, large]) == [large]


def test_where_nobody_has_more_context_nobody_is_asked() -> None:
    """Nor the same worker, which has none either."""
    small, same, smaller = worker("a"), worker("b"), worker("c", 512)
    made = failed(attempts(), small)
    assert made.retry_after(Failure.CONTEXT, [small, same, smaller]) is None
    assert made.candidates([small, same, smaller]) == []


@pytest.mark.parametrize(("one", "other"), [(None, 4096), (1024, None), (None, None)])
def test_a_context_that_is_not_known_is_not_more(
    one: int | None, other: int | None
) -> None:
    a, b = worker("a", one), worker("b", other)
    made = failed(attempts(), a)
    assert made.retry_after(Failure.CONTEXT, [a, b]) is None


def test_every_step_leads_to_more_context() -> None:
    a, b, c = worker("a", 1024), worker("b", 2048), worker("c", 4096)
    made = failed(attempts(), a)
    assert made.retry_after(Failure.CONTEXT, [a, b, c]) == 0.0
    made.begin(b)
    assert made.retry_after(Failure.CONTEXT, [a, b, c]) == 0.0
    assert made.candidates([a, b, c]) == [c]


def test_what_failed_otherwise_is_not_given_to_a_smaller_worker() -> None:
    small, large = worker("a"), worker("b", 4096)
    made = failed(attempts(), small)
    made.retry_after(Failure.CONTEXT, [small, large])
    made.begin(large)
    assert made.retry_after(Failure.RESET, [small, large])
    assert made.candidates([small, large]) == [large]


def test_a_prompt_that_is_too_long_costs_no_retry() -> None:
    """It was refused unread, and it is not for an outage that it is sent again."""
    small, large = worker("a"), worker("b", 4096)
    made = failed(attempts(RetryBudget(0.0, 0, clock=Clock())), small)
    assert made.retry_after(Failure.CONTEXT, [small, large]) == 0.0


# --- Streams in place of answers --------------------------------------------------


def test_a_request_that_has_to_be_sent_as_it_was_is_a_new_one() -> None:
    """Whoever has tried may try again, at once, and it costs no retry."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(RetryBudget(0.0, 0, clock=Clock())), a)
    assert not made.as_sent
    assert made.retry_after(Failure.STREAM, [a, b]) == 0.0
    assert made.as_sent
    assert made.candidates([a, b]) == [a, b]


# --- The budget -------------------------------------------------------------------


def test_a_retry_is_paid_for() -> None:
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.0, 2, clock=Clock())
    for allowed in (True, True, False):
        pause = failed(attempts(budget), a).retry_after(Failure.RESET, [a, b])
        assert (pause is not None) is allowed


def test_what_is_not_tried_again_costs_nothing() -> None:
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.0, 1, clock=Clock())
    assert failed(attempts(budget), a).retry_after(Failure.KEY, [a]) is None
    assert failed(attempts(budget), a).retry_after(Failure.KEY, [a, b]) == 0.0


def test_every_request_pays_once() -> None:
    """A tenth of ten requests is a retry."""
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.1, 0, clock=Clock())
    made = [failed(attempts(budget), a) for _ in range(9)]
    assert made[0].retry_after(Failure.RESET, [a, b]) is None
    failed(attempts(budget), a)
    assert made[0].retry_after(Failure.RESET, [a, b]) == 0.0
    assert made[1].retry_after(Failure.RESET, [a, b]) is None


# --- Whose fault a 5xx was --------------------------------------------------------


def test_a_5xx_is_held_against_those_whom_another_worker_outdid() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = attempts()
    for each in (a, b):
        made.begin(each)
        made.retry_after(Failure.STATUS, [a, b, c])
    made.begin(c)
    assert made.succeeded() == [a, b]


def test_a_worker_that_does_better_itself_is_not_to_blame() -> None:
    a = worker("a")
    made = failed(attempts(), a)
    made.retry_after(Failure.STATUS, [a])
    made.begin(a)
    assert made.succeeded() == []


@pytest.mark.parametrize("failure", [f for f in Failure if f is not Failure.STATUS])
def test_other_failures_are_held_against_a_worker_elsewhere(failure: Failure) -> None:
    a, b = worker("a"), worker("b", 4096)
    made = failed(attempts(), a)
    made.retry_after(failure, [a, b])
    made.begin(b)
    assert made.succeeded() == []


def test_attempts_say_how_many_they_are() -> None:
    assert repr(failed(attempts(), worker("a"))) == "<Attempts 1 of 3>"
