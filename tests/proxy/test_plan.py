"""Whether a request is tried again, where, and after how long: all of the table."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.config.settings import (
    Config,
    Health,
    Origin,
    Rescue,
    Retry,
    WorkerConfig,
)
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Again, Cause, rule_of
from gollama_proxy.proxy.plan import PAUSE, Plan
from gollama_proxy.scheduling.balancer import RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import OVERFLOW_TYPE, Overflow
from tests.fakes.asks import CHAT
from tests.fakes.cases import case
from tests.fakes.clock import Clock

RULES = {cause: rule_of(cause) for cause in Cause}
AGAIN = {cause for cause, rule in RULES.items() if rule.again is Again.PAUSE}
LATER = {cause for cause, rule in RULES.items() if rule.again is Again.ASKED}
FREE = {cause for cause, rule in RULES.items() if rule.free}
DECLINED = {cause for cause, rule in RULES.items() if rule.declined}
BEGUN = {cause for cause, rule in RULES.items() if rule.begun}
FINAL = {cause for cause, rule in RULES.items() if not rule.elsewhere}

# What is tried again elsewhere and not on the same worker, whatever others there are.
ELSEWHERE = [
    Cause.UNREACHABLE,
    Cause.LOADING,
    Cause.LOST,
    Cause.STATUS,
    Cause.BUSY,
    Cause.SLOW,
    Cause.SILENT,
    Cause.MALFORMED,
    Cause.KEY,
    Cause.MODEL,
    Cause.DRAINED,
]


def worker(
    name: str,
    context: int | None = 1024,
    *,
    models: Sequence[str] = ("tiny",),
    clock: Clock | None = None,
) -> Worker:
    origin = Origin("http", "127.0.0.1", 8080, "")
    config = WorkerConfig("http://127.0.0.1:8080", origin, name)
    made = Worker(config, Health(fall=1), clock or Clock())
    reported = Description(tuple(Model(model, context) for model in models))
    made.observe(Check.OK, "ok", reported)
    return made


def take_out(worker: Worker) -> None:
    worker.observe(Check.FAILED, "by the test")
    assert not worker.available


def bring_back(worker: Worker) -> None:
    worker.observe(Check.OK, "by the test")
    assert worker.available


def attempts(
    *workers: Worker,
    fallbacks: Sequence[Sequence[Worker]] = (),
    budget: RetryBudget | None = None,
    continuations: int = 0,
    once: bool = False,
    **limits: Any,
) -> Plan:
    pools = [Pool("tiny", workers)]
    pools += [Pool(f"other{n}", tuple(some)) for n, some in enumerate(fallbacks, 1)]
    retry = Retry(once=(CHAT,) if once else (), **limits)
    rescue = Rescue(enabled=continuations > 0, attempts=continuations)
    return Plan(
        pools,
        CHAT,
        Config(retry=retry, rescue=rescue),
        budget or RetryBudget(1.0, 1000, clock=Clock()),
        random.Random(7),
        Ask("tiny"),
    )


def broke() -> RetryBudget:
    """Make a budget that allows nothing."""
    return RetryBudget(0.0, 0, clock=Clock())


def failed(made: Plan, *tried: Worker) -> Plan:
    for each in tried:
        made.begin(each)
    return made


# --- Workers ----------------------------------------------------------------------


def test_at_first_every_worker_may_try() -> None:
    a, b = worker("a"), worker("b")
    made = attempts(a, b)
    assert made.candidates() == [a, b]
    assert made.has_other()
    for empty in (attempts(), made):
        take_out(a)
        take_out(b)
        assert empty.candidates() == []
        assert not empty.has_other()


def test_workers_without_an_attempt_go_first() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    assert failed(attempts(a, b, c), a).candidates() == [b, c]
    assert failed(attempts(a, b, c), a, b).candidates() == [c]


def test_when_all_have_had_an_attempt_the_last_one_has_another() -> None:
    """But only where that has been decided: one is not asked again for being there."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b), a, b)
    assert made.candidates() == []
    assert made.retry_after(Cause.LOST)
    assert made.candidates() == [b]
    assert not made.has_other()
    made.begin(b)
    assert made.candidates() == []


def test_a_worker_that_comes_back_goes_before_the_last_one() -> None:
    a, b = worker("a"), worker("b")
    take_out(b)
    made = failed(attempts(a, b), a)
    assert made.retry_after(Cause.LOST)
    assert made.candidates() == [a]
    bring_back(b)
    assert made.candidates() == [b]


def test_one_that_is_not_available_any_more_is_not_asked_once_more() -> None:
    """Nor is the one before it, which failed as well."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b), a, b)
    assert made.retry_after(Cause.LOST)
    take_out(b)
    assert made.candidates() == []


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_worker_is_left_when_the_attempts_are_used_up(limit: int) -> None:
    workers = [worker(name) for name in "abcd"]
    made = attempts(*workers, attempts=limit)
    for each in workers[:limit]:
        assert made.has_other()
        made.begin(each)
    assert not made.has_other()
    for failure in ELSEWHERE:
        if failure is not Cause.UNREACHABLE:
            assert made.retry_after(failure, 0.0) is None


def test_a_worker_that_was_not_reached_uses_up_no_attempt() -> None:
    """Of as many as there are, the one that can be reached gets the request."""
    workers = [worker(name) for name in "abcd"]
    made = attempts(*workers, attempts=1, budget=broke())
    for each in workers[:3]:
        made.begin(each)
        assert made.retry_after(Cause.UNREACHABLE) == 0.0
    assert made.candidates() == workers[3:]
    made.begin(workers[3])
    assert made.retry_after(Cause.LOST) is None


# --- The table --------------------------------------------------------------------


@pytest.mark.parametrize("failure", ELSEWHERE)
def test_another_worker_is_asked_at_once(failure: Cause) -> None:
    """A busy one's Retry-After is for itself."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b), a)
    assert made.retry_after(failure, 30.0) == 0.0
    assert made.candidates() == [b]


@pytest.mark.parametrize("failure", [f for f in ELSEWHERE if f not in LATER])
def test_the_only_worker_is_asked_once_more_for_what_may_pass(
    failure: Cause,
) -> None:
    a = worker("a")
    made = failed(attempts(a), a)
    pause = made.retry_after(failure, 0.0)
    if failure in (Cause.LOST, Cause.STATUS):
        assert pause is not None
        assert PAUSE[0] <= pause <= PAUSE[1]
        assert made.candidates() == [a]
    else:
        assert pause is None
        assert made.candidates() == []


def test_what_would_be_the_same_everywhere_is_not_tried_again() -> None:
    made = attempts(worker("a"), worker("b"), fallbacks=[[worker("c")]])
    assert failed(made, made.candidates()[0]).retry_after(Cause.REFUSED, 0.0) is None
    assert made.pool.model == "tiny"


def test_the_pause_varies_so_that_retries_do_not_coincide() -> None:
    a = worker("a")
    budget = RetryBudget(1.0, 1000, clock=Clock())
    rng = random.Random(7)
    pauses = set()
    for _ in range(10):
        one = Plan([Pool("tiny", (a,))], CHAT, Config(), budget, rng, Ask("tiny"))
        pauses.add(failed(one, a).retry_after(Cause.LOST))
    assert len(pauses) == 10


@pytest.mark.parametrize("failure", sorted(AGAIN | LATER, key=str))
def test_no_worker_is_asked_a_third_time(failure: Cause) -> None:
    a = worker("a")
    made = failed(attempts(a, attempts=9), a)
    assert made.retry_after(failure, 0.0) is not None
    made.begin(a)
    assert made.retry_after(failure, 0.0) is None
    assert made.candidates() == []


def test_the_only_worker_is_waited_for_if_it_is_busy_for_a_short_time() -> None:
    """A little longer than it asks for: an early request is refused again."""
    for failure in sorted(LATER, key=str):
        for asked, patience, waits in [
            (None, 5.0, False),
            (0.0, 5.0, True),
            (1.0, 5.0, True),
            (5.0, 5.0, True),
            (5.1, 5.0, False),
            (0.0, 0.0, True),
            (1.0, 0.0, False),
        ]:
            with case((failure, asked, patience, waits)):
                a = worker("a")
                made = failed(attempts(a, patience=patience), a)
                pause = made.retry_after(failure, asked)
                assert (pause is not None) is waits
                if pause is not None:
                    assert asked is not None
                    assert asked + PAUSE[0] <= pause <= asked + PAUSE[1]


def test_a_busy_worker_is_waited_for_though_it_is_not_available_meanwhile() -> None:
    clock = Clock()
    a = worker("a", clock=clock)
    made = failed(attempts(a), a)
    a.breaker.busy(1.0)
    pause = made.retry_after(Cause.BUSY, 1.0)
    assert pause
    assert made.candidates() == []
    clock.advance(pause)
    assert made.candidates() == [a]


# --- Prompts that are too long ----------------------------------------------------


def test_a_prompt_that_is_too_long_goes_to_a_worker_with_more_context() -> None:
    small, same, large = worker("a"), worker("b"), worker("c", 4096)
    made = failed(attempts(small, same, large), small)
    assert made.retry_after(Cause.CONTEXT) == 0.0
    assert made.candidates() == [large]


def test_without_more_context_no_worker_is_asked() -> None:
    """Nor the same worker, which has none either."""
    small, same, smaller = worker("a"), worker("b"), worker("c", 512)
    made = failed(attempts(small, same, smaller), small)
    assert made.retry_after(Cause.CONTEXT) is None
    assert made.candidates() == []


@pytest.mark.parametrize(("one", "other"), [(None, 4096), (1024, None), (None, None)])
def test_a_context_that_is_not_known_may_be_more(
    one: int | None, other: int | None
) -> None:
    a, b = worker("a", one), worker("b", other)
    for made in (attempts(a, b), attempts(a, fallbacks=[[b]])):
        failed(made, a)
        assert made.retry_after(Cause.CONTEXT) == 0.0
        assert made.candidates() == [b]


def test_a_context_that_is_known_to_be_more_goes_before_one_that_is_not_known() -> None:
    a, b, c = worker("a", None), worker("b", None), worker("c", 4096)
    made = failed(attempts(a, b, c), a)
    assert made.retry_after(Cause.CONTEXT) == 0.0
    assert made.candidates() == [c]
    made.begin(c)
    assert made.retry_after(Cause.CONTEXT) == 0.0
    assert made.candidates() == [b]


def test_every_step_leads_to_more_context() -> None:
    a, b, c = worker("a", 1024), worker("b", 2048), worker("c", 4096)
    made = failed(attempts(a, b, c), a)
    assert made.retry_after(Cause.CONTEXT) == 0.0
    made.begin(b)
    assert made.retry_after(Cause.CONTEXT) == 0.0
    assert made.candidates() == [c]


def test_what_failed_otherwise_is_not_given_to_a_smaller_worker() -> None:
    small, large = worker("a"), worker("b", 4096)
    made = failed(attempts(small, large), small)
    made.retry_after(Cause.CONTEXT)
    made.begin(large)
    assert made.retry_after(Cause.LOST)
    assert made.candidates() == [large]


def test_a_prompt_that_is_too_long_costs_no_retry() -> None:
    """It was refused unread, and it is not for an outage that it is sent again."""
    small, large = worker("a"), worker("b", 4096)
    made = failed(attempts(small, large, budget=broke()), small)
    assert made.retry_after(Cause.CONTEXT) == 0.0


def test_a_prompt_that_is_too_long_may_fit_a_fallback() -> None:
    """One that has more context, that is; others are skipped."""
    small = worker("a", 1024)
    same, large = worker("b", 1024, models=["other1"]), worker("c", models=["other2"])
    large.observe(Check.OK, "ok", Description((Model("other2", 4096),)))
    made = failed(attempts(small, fallbacks=[[same], [large]], budget=broke()), small)
    assert made.has_other()
    assert made.retry_after(Cause.CONTEXT) == 0.0
    assert (made.pool.model, made.candidates()) == ("other2", [large])


# --- Prompts that were counted ----------------------------------------------------


def test_a_prompt_goes_only_where_it_fits() -> None:
    """It needs room for one token of the answer, too."""
    small, exact, large = worker("a"), worker("b", 2000), worker("c", 2001)
    unknown = worker("d", None)
    made = attempts(small, exact, large, unknown)
    made.need("tiny", 2000)
    assert made.candidates() == [large, unknown]
    assert made.fitting(made.pool) == [large, unknown]


def test_the_pools_that_are_left_are_named() -> None:
    a, b = worker("a"), worker("b", models=["other1"])
    made = attempts(a, fallbacks=[[b]])
    assert [pool.model for pool in made.pools] == ["tiny", "other1"]
    take_out(a)
    assert made.candidates() == [b]
    assert [pool.model for pool in made.pools] == ["other1"]


def test_whether_it_fits_somewhere_does_not_depend_on_which_workers_are_up() -> None:
    small, large = worker("a"), worker("b", 4096)
    take_out(large)
    made = attempts(small, large)
    made.need("tiny", 2000)
    assert made.fitting(made.pool) == []
    assert made.fits_somewhere
    made.need("tiny", 5000)
    assert not made.fits_somewhere


def test_each_model_counts_for_itself() -> None:
    first, second = worker("a"), worker("b", models=["other1"])
    made = attempts(first, fallbacks=[[second]])
    made.needs = {"tiny": 2000, "other1": 900}
    assert made.fits_somewhere
    assert made.candidates() == [second]
    assert made.pool.model == "other1"
    made.need("other1", 1024)
    assert not made.fits_somewhere
    error = made.too_long()
    assert error is not None
    assert "the prompt has 2000" in error.message
    assert "tiny on a 1024, other1 on b 1024" in error.message
    assert attempts(worker("a", None)).too_long() is None
    error = attempts(worker("a")).too_long()
    assert error is not None
    assert "the prompt has more" in error.message


# --- What is remembered -----------------------------------------------------------


def test_only_a_first_attempt_on_a_fallback_misses_a_worker() -> None:
    """A machine of the requested model may be woken for the next request."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]]), a)
    requested = made.pool
    assert made.retry_after(Cause.UNREACHABLE) == 0.0
    made.begin(b)
    assert not requested.missed
    take_out(a)
    made = attempts(a, fallbacks=[[b]])
    requested = made.pool
    assert made.candidates() == [b]
    made.begin(b)
    assert requested.missed is True
    assert not made.pool.missed


def test_a_worker_that_is_out_is_waited_for_if_it_may_have_the_request() -> None:
    a, b = worker("a"), worker("b", 4096)
    made = attempts(a, b)
    assert made.awaits(a)
    made.need("tiny", 2000)
    assert not made.awaits(a)
    assert made.awaits(b)
    made.begin(b)
    assert not made.awaits(b)


def test_a_worker_may_be_waited_for_as_long_as_it_is_busy() -> None:
    clock = Clock()
    a = worker("a", clock=clock)
    made = attempts(a)
    assert made.busy_for() == math.inf
    assert not made.can_wait(3600)
    a.breaker.busy(5.0)
    assert made.busy_for() == 5.0
    assert made.can_wait(5.0)
    assert not made.can_wait(4.9)
    assert made.reopens_in() == 5.0


def test_of_several_workers_the_first_that_comes_back_is_waited_for() -> None:
    clock = Clock()
    a, b, f = (worker(name, clock=clock) for name in "abf")
    made = attempts(a, b, fallbacks=[[f]])
    assert made.reopens_in() == math.inf
    f.breaker.busy(0.5)
    b.breaker.busy(5.0)
    assert made.busy_for() == 0.5
    assert made.reopens_in() == 0.5
    clock.advance(1.0)
    a.breaker_of("tiny").busy(3.0)
    assert made.reopens_in() == 3.0


def test_workers_of_every_pool_may_take_over() -> None:
    a, b, c = (worker(name) for name in "abc")
    made = failed(attempts(a, b, fallbacks=[[c]]), a)
    assert made.has_other()
    for full in (b, c):
        take_out(full)
        assert made.has_other() is (full is b)
    bring_back(b)
    assert made.has_other()


def test_every_worker_that_stalled_is_barred_from_a_continuation() -> None:
    a, b, c = (worker(name) for name in "abc")
    made = failed(attempts(a, b, c, continuations=9), a)
    for each in (b, c):
        assert made.retry_after(Cause.SILENT) == 0.0
        made.resume()
        made.begin(each)
    assert made.retry_after(Cause.LOST) is not None
    made.resume()
    assert made.candidates() in ([], [c])


def test_the_last_worker_is_never_among_those_that_another_outdid() -> None:
    a, b, c = (worker(name) for name in "abc")
    made = failed(attempts(a, b, c), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    made.begin(b)
    assert made.retry_after(Cause.LOST) == 0.0
    made.begin(c)
    assert made.succeeded() == [a]


def test_a_request_that_moves_to_a_fallback_asks_for_its_model() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]]), a)
    assert made.ask.model == "tiny"
    assert made.retry_after(Cause.UNREACHABLE) == 0.0
    assert made.candidates() == [b]
    assert made.ask.model == "other1"


def test_a_refusal_of_a_worker_keeps_its_words() -> None:
    made = attempts(worker("a", None))
    refusal = Overflow("too many tokens", 2000, 1024)
    error, own = made.too_long(refusal), made.too_long(refusal, native=True)
    assert error is not None
    assert own is not None
    assert error.message.startswith("too many tokens")
    assert error.fields == {"n_prompt_tokens": 2000, "n_ctx": 1024}
    assert own.fields == {**error.fields, "type": OVERFLOW_TYPE, "code": 400}


# --- Streams in place of answers --------------------------------------------------


def test_a_request_that_has_to_be_sent_as_it_was_is_a_new_one() -> None:
    """The same worker tries again, at once, and it costs no retry."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b, budget=broke()), a)
    assert not made.as_sent
    assert made.retry_after(Cause.UNFOLDABLE) == 0.0
    assert made.as_sent
    assert made.candidates() == [a]
    assert not made.tried


# --- The budget -------------------------------------------------------------------


def test_a_retry_is_paid_for() -> None:
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.0, 2, clock=Clock())
    for allowed in (True, True, False):
        made = failed(attempts(a, b, budget=budget), a)
        assert (made.retry_after(Cause.LOST) is not None) is allowed


@pytest.mark.parametrize("failure", ELSEWHERE)
def test_what_has_cost_the_worker_nothing_is_free(failure: Cause) -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b, budget=broke()), a)
    assert (made.retry_after(failure) == 0.0) is (failure in FREE)
    free = {Cause.UNREACHABLE, Cause.CROWDED, Cause.LOADING, Cause.MODEL, Cause.DRAINED}
    assert (failure in FREE) is (failure in free)


def test_waiting_for_a_worker_that_loads_is_free_and_for_a_busy_one_is_not() -> None:
    for failure in LATER:
        a = worker("a")
        made = failed(attempts(a, budget=broke()), a)
        free = failure in (Cause.LOADING, Cause.CROWDED)
        assert (made.retry_after(failure, 1.0) is not None) is free


def test_without_a_retry_left_no_worker_could_take_over() -> None:
    """But a fallback, which is free; and asking spends nothing."""
    a, b, c = worker("a"), worker("b"), worker("c")
    budget = RetryBudget(0.0, 1, clock=Clock())
    made = failed(attempts(a, b, budget=budget, continuations=5), a)
    assert all(made.has_other() for _ in range(9))
    assert made.retry_after(Cause.LOST) == 0.0
    assert not made.has_other()
    assert attempts(a, b, fallbacks=[[c]], budget=budget).has_other()
    made.resume()
    assert made.has_other()


def test_what_is_not_tried_again_costs_nothing() -> None:
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.0, 1, clock=Clock())
    assert failed(attempts(a, budget=budget), a).retry_after(Cause.KEY) is None
    assert failed(attempts(a, b, budget=budget), a).retry_after(Cause.KEY) == 0.0


def test_every_request_pays_once() -> None:
    """A tenth of ten requests is a retry."""
    a, b = worker("a"), worker("b")
    budget = RetryBudget(0.1, 0, clock=Clock())
    made = [failed(attempts(a, b, budget=budget), a) for _ in range(9)]
    assert made[0].retry_after(Cause.LOST) is None
    failed(attempts(a, b, budget=budget), a)
    assert made[0].retry_after(Cause.LOST) == 0.0
    assert made[1].retry_after(Cause.LOST) is None


# --- Whose fault a 5xx was --------------------------------------------------------


def test_a_5xx_blames_its_worker_when_another_one_succeeds() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, b), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    made.begin(b)
    assert made.succeeded() == [a]


def test_a_5xx_from_two_workers_is_believed() -> None:
    """No other worker of the model is asked then, and none is blamed."""
    a, b, c = (worker(name) for name in "abc")
    made = failed(attempts(a, b, c), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    made.begin(b)
    assert made.has_other()
    assert made.retry_after(Cause.STATUS) is None


def test_a_fallback_is_asked_before_a_believed_5xx_is_passed_on() -> None:
    """Another model may read what this one cannot."""
    a, b, c, d = (worker(name) for name in "abcd")
    made = failed(attempts(a, b, c, fallbacks=[[d]]), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    made.begin(b)
    assert made.retry_after(Cause.STATUS) == 0.0
    assert made.candidates() == [d]
    made.begin(d)
    assert made.succeeded() == []


def test_of_several_failures_before_a_success_the_5xx_is_blamed() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, b, c, attempts=9), a)
    for failure, each in ((Cause.LOST, b), (Cause.STATUS, c)):
        assert made.retry_after(failure) == 0.0
        made.begin(each)
    assert made.succeeded() == [b]


def test_a_5xx_that_one_worker_sends_twice_is_not_believed() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]]), a)
    assert made.retry_after(Cause.STATUS)
    made.begin(a)
    assert made.retry_after(Cause.STATUS) == 0.0
    assert made.candidates() == [b]


def test_another_failure_between_two_5xx_changes_nothing() -> None:
    a, b, c, d = (worker(name) for name in "abcd")
    made = failed(attempts(a, b, c, d, attempts=9), a)
    for failure, each in ((Cause.STATUS, b), (Cause.LOST, c)):
        assert made.retry_after(failure) == 0.0
        made.begin(each)
    assert made.retry_after(Cause.STATUS) is None


def test_a_worker_that_does_better_itself_is_not_to_blame() -> None:
    a = worker("a")
    made = failed(attempts(a), a)
    made.retry_after(Cause.STATUS)
    made.begin(a)
    assert made.succeeded() == []


@pytest.mark.parametrize("failure", [f for f in Cause if f is not Cause.STATUS])
def test_other_failures_are_held_against_a_worker_elsewhere(failure: Cause) -> None:
    a, b = worker("a"), worker("b", 4096)
    made = failed(attempts(a, b), a)
    made.retry_after(failure)
    made.begin(b)
    assert made.succeeded() == []


# --- Fallbacks --------------------------------------------------------------------


def test_without_a_worker_the_fallback_is_asked() -> None:
    """The first fallback that has a worker; its answer may take as long as it needs."""
    a, b, c = worker("a"), worker("b"), worker("c")
    take_out(a)
    take_out(b)
    made = attempts(a, fallbacks=[[b], [], [c]])
    assert made.has_other()
    assert made.candidates() == [c]
    assert made.pool.model == "other3"
    assert repr(made) == "<Plan 0 of 3 on 'other3'>"
    assert made.candidates() == [c]


def test_without_a_worker_of_a_fallback_none_is_asked() -> None:
    a, b = worker("a"), worker("b")
    take_out(a)
    take_out(b)
    made = attempts(a, fallbacks=[[b]])
    assert not made.has_other()
    assert made.candidates() == []


def test_a_fallback_that_is_there_waits_for_the_model_that_was_asked_for() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = attempts(a, b, fallbacks=[[c]])
    assert made.candidates() == [a, b]
    assert failed(made, a).retry_after(Cause.LOST) == 0.0
    assert made.candidates() == [b]


def test_when_the_attempts_are_used_up_the_fallback_has_as_many() -> None:
    """At once, and it is not paid for."""
    for failure in ELSEWHERE:
        for limit in [1, 2]:
            with case((failure, limit)):
                first = [worker(name) for name in "abc"]
                second = [worker(name) for name in "def"]
                budget = RetryBudget(0.0, limit - 1, clock=Clock())
                made = attempts(
                    *first, fallbacks=[second], budget=budget, attempts=limit
                )
                asked: list[Worker] = []
                while (some := made.candidates()) and len(asked) < 10:
                    asked.append(some[0])
                    made.begin(some[0])
                    if made.retry_after(failure, 30.0) is None:
                        break
                if failure is Cause.UNREACHABLE:  # uses up none of them
                    limit = 3
                assert asked == [*first[:limit], *second[:limit]]


def test_a_retry_that_cannot_be_paid_for_is_the_fallbacks() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, b, fallbacks=[[c]], budget=broke()), a)
    assert made.retry_after(Cause.LOST) == 0.0
    assert made.candidates() == [c]


def test_the_only_worker_has_its_second_chance_before_a_fallback() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]]), a)
    assert made.retry_after(Cause.LOST)
    assert made.candidates() == [a]
    made.begin(a)
    assert made.retry_after(Cause.LOST) == 0.0
    assert made.candidates() == [b]


def test_a_worker_may_try_again_with_the_other_model() -> None:
    a = worker("a", models=["tiny", "other1"])
    made = failed(attempts(a, fallbacks=[[a]], attempts=1), a)
    assert made.retry_after(Cause.LOST) == 0.0
    assert (made.pool.model, made.candidates(), made.tried) == ("other1", [a], ())


def test_a_fallback_that_succeeds_blames_no_worker() -> None:
    """Another model proves nothing about the first one."""
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]], attempts=1), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    made.begin(b)
    assert made.succeeded() == []


def test_two_models_that_answer_5xx_are_not_two_workers_that_agree() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, fallbacks=[[b], [c]], attempts=1), a)
    for each in (b, c):
        assert made.retry_after(Cause.STATUS) == 0.0
        assert made.candidates() == [each]
        made.begin(each)
    assert made.retry_after(Cause.STATUS) is None


def test_a_worker_of_a_fallback_could_take_over() -> None:
    a, b = worker("a"), worker("b")
    made = failed(attempts(a, fallbacks=[[b]]), a)
    assert made.has_other()
    take_out(b)
    assert not made.has_other()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.sampled_from([*ELSEWHERE, Cause.CONTEXT]), min_size=60, max_size=60),
)
def test_whatever_happens_it_comes_to_an_end(
    sizes: list[int], limit: int, failures: list[Cause]
) -> None:
    """Each model has its attempts, and no worker more than two of them."""
    pools = [
        [worker(f"{n}{m}", m) for m in range(size)] for n, size in enumerate(sizes)
    ]
    budget = RetryBudget(0.0, 1000, clock=Clock())
    made = attempts(*pools[0], fallbacks=pools[1:], budget=budget, attempts=limit)
    asked: list[str] = []
    for failure in failures:
        some = made.candidates()
        if not some:
            break
        asked.append(some[0].name)
        made.begin(some[0])
        if made.retry_after(failure, 0.0) is None:
            break
    else:
        pytest.fail("it goes on and on")
    assert asked == sorted(asked, key=lambda name: name[0])
    for number in range(len(pools)):
        of_pool = [name for name in asked if name[0] == str(number)]
        unreached = sum(
            failure is Cause.UNREACHABLE
            for name, failure in zip(asked, failures, strict=False)
            if name[0] == str(number)
        )
        assert len(of_pool) <= limit + unreached
        assert all(of_pool.count(name) <= 2 for name in of_pool)
        again = [name for name in of_pool if of_pool.count(name) > 1]
        assert again == of_pool[len(of_pool) - len(again) :], "others come first"


# --- At most once -----------------------------------------------------------------


@pytest.mark.parametrize("failure", [*ELSEWHERE, Cause.CONTEXT])
def test_what_a_worker_may_have_begun_is_not_tried_again_where_that_is_wanted(
    failure: Cause,
) -> None:
    """Not by a fallback either; what it surely has not begun is."""
    a, b = worker("a", 1024), worker("b", 4096, models=["tiny", "other1"])
    for made in (attempts(a, b, once=True), attempts(a, fallbacks=[[b]], once=True)):
        failed(made, a)
        assert (made.retry_after(failure, 30.0) is None) is (failure in BEGUN)
        assert made.candidates() == [b]  # whatever workers there are


def test_what_may_have_begun_differs_from_what_surely_has_not() -> None:
    refused = {Cause.UNREACHABLE, Cause.CROWDED, Cause.LOADING, Cause.BUSY, Cause.KEY}
    assert set(Cause) - BEGUN - FINAL == refused | {Cause.CONTEXT, Cause.UNFOLDABLE}


def test_without_retries_no_worker_could_take_over() -> None:
    """So that a worker is not given up for being slow."""
    a, b, c = worker("a"), worker("b"), worker("c")
    assert not attempts(a, b, fallbacks=[[c]], once=True).has_other()
    assert attempts(a, b, fallbacks=[[c]], once=True).candidates() == [a, b]


# --- Answers that broke off -------------------------------------------------------


def resumed(made: Plan, worker: Worker) -> Plan:
    """Have an answer of this worker break off in its middle."""
    made.begin(worker)
    made.resume()
    return made


def test_an_answer_that_broke_off_goes_on_with_another_worker_unpaid() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = attempts(a, b, fallbacks=[[c]], budget=broke(), continuations=5)
    resumed(made, a)
    assert made.has_other()
    assert made.retry_after(Cause.LOST) == 0.0
    assert made.candidates() == [b]


def test_it_may_go_on_though_the_attempts_were_used_up() -> None:
    """What it took to begin with the answer does not count any more."""
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, b, c, attempts=2, continuations=5), a)
    resumed(made, b)
    assert made.tried == (a, b)
    assert made.retry_after(Cause.LOST) == 0.0
    assert made.candidates() == [c]


def test_a_fallback_goes_on_before_those_that_have_failed_the_answer() -> None:
    """Then they do, with the model that was asked for, and the last one at last."""
    a, b, f = worker("a"), worker("b"), worker("f")
    made = resumed(attempts(a, b, fallbacks=[[f]], continuations=9), a)
    order = []
    for _ in range(5):
        assert made.retry_after(Cause.LOST) is not None
        some = made.candidates()
        order.append((made.pool.model, some[0]))
        resumed(made, some[0])
    assert order == [
        ("tiny", b),
        ("other1", f),
        ("tiny", a),
        ("tiny", b),
        ("tiny", a),
    ]


@pytest.mark.parametrize("failure", [*ELSEWHERE, Cause.CONTEXT])
def test_a_worker_that_declined_the_request_has_not_failed_its_answer(
    failure: Cause,
) -> None:
    """A busy worker may be free by the time at which another one's answer breaks."""
    a, b, f = worker("a", 1024), worker("b", 4096), worker("f", 4096)
    made = failed(attempts(a, b, fallbacks=[[f]], continuations=5), a)
    assert made.retry_after(failure) == 0.0
    resumed(made, b)
    assert made.retry_after(Cause.LOST) == 0.0
    expected = [a] if failure in DECLINED else [f]
    assert made.candidates() == expected


def test_all_workers_that_declined_the_request_may_continue_its_answer() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, b, c, continuations=5), a)
    for each in (b, c):
        assert made.retry_after(Cause.BUSY) == 0.0
        made.begin(each)
    made.resume()
    assert made.candidates() == [a, b]


def test_without_rescue_no_answer_is_continued() -> None:
    config = Config(rescue=Rescue(enabled=False, attempts=2))
    budget = RetryBudget(1.0, 1000, clock=Clock())
    pools = [Pool("tiny", (worker("a"), worker("b")))]
    made = Plan(pools, CHAT, config, budget, random.Random(7), Ask("tiny"))
    resumed(made, pools[0].workers[0])
    assert not made.some_left
    assert made.candidates() == []


def test_an_answer_of_a_fallback_may_go_back_to_the_model_that_was_asked_for() -> None:
    """Its workers were out when it began."""
    a, f, g = worker("a"), worker("f"), worker("g")
    take_out(a)
    made = attempts(a, fallbacks=[[f], [g]], continuations=5)
    resumed(made, made.candidates()[0])
    assert made.pool.model == "other1"
    bring_back(a)
    assert made.retry_after(Cause.LOST) == 0.0
    assert (made.pool.model, made.candidates()) == ("tiny", [a])


def test_a_worker_that_failed_before_may_continue_when_none_else_is_left() -> None:
    """It may have been started again; but a worker that stalled would stall again."""
    a, b, c, d = worker("a"), worker("b"), worker("c"), worker("d")
    made = resumed(attempts(a, b, c, d, continuations=9), a)
    for each, failure in ((b, Cause.SLOW), (c, Cause.LOST), (d, Cause.LOST)):
        assert made.retry_after(Cause.LOST) == 0.0
        made.begin(each)
        made.retry_after(failure)
    assert made.candidates() == [a, c]


def test_the_only_worker_may_break_off_more_than_once() -> None:
    a = worker("a")
    made = attempts(a, continuations=3)
    for _ in range(3):
        resumed(made, a)
        assert made.retry_after(Cause.LOST) is not None
        assert made.candidates() == [a]


def test_then_a_fallback_goes_on_before_the_same_worker_does() -> None:
    a, b = worker("a"), worker("b")
    made = resumed(attempts(a, fallbacks=[[b]], continuations=5), a)
    assert made.has_other()
    assert made.retry_after(Cause.LOST) == 0.0
    assert (made.pool.model, made.candidates()) == ("other1", [b])


@pytest.mark.parametrize("failure", ELSEWHERE)
def test_at_last_the_same_worker_goes_on(failure: Cause) -> None:
    """Where it would have been asked once more for an answer that had not begun."""
    a = worker("a")
    made = resumed(attempts(a, continuations=5, budget=broke(), attempts=1), a)
    assert not made.has_other()
    pause = made.retry_after(failure, 0.0)
    assert (pause is not None) is (failure in AGAIN | LATER)
    assert made.candidates() == ([a] if failure in AGAIN | LATER else [])


@pytest.mark.parametrize("continuations", [0, 1, 3])
def test_there_are_only_so_many_continuations_of_an_answer(continuations: int) -> None:
    """Whether the next one breaks off as well or fails before it has begun."""
    for breaks in (True, False):
        workers = [worker(str(number)) for number in range(9)]
        made = attempts(
            *workers, fallbacks=[[worker("f")]], continuations=continuations, attempts=9
        )
        resumed(made, workers[0])
        for each in workers[1 : continuations + 1]:
            assert made.retry_after(Cause.LOST) == 0.0
            made.begin(each)
            if breaks:
                made.resume()
        assert made.retry_after(Cause.LOST) is None


def test_without_continuations_left_no_worker_could_take_over() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = resumed(attempts(a, b, c, continuations=1), a)
    assert made.has_other()
    assert not failed(made, b).has_other()


def test_without_continuations_left_a_fallback_is_not_waiting_either() -> None:
    """Or the last one would be given up for being slow, with no other to take over."""
    a, b, c = worker("a"), worker("b"), worker("c")
    made = resumed(attempts(a, b, fallbacks=[[c]], continuations=1), a)
    made.begin(b)
    assert made.retry_after(Cause.SLOW) is None
    assert not made.has_other()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(0, 5),
    st.lists(
        st.sampled_from([*ELSEWHERE, "breaks off", "is asked for all"]),
        min_size=60,
        max_size=60,
    ),
)
def test_whatever_happens_to_the_rest_it_comes_to_an_end(
    sizes: list[int], continuations: int, events: list[Cause | str]
) -> None:
    pools = [[worker(f"{n}{m}") for m in range(size)] for n, size in enumerate(sizes)]
    made = attempts(
        worker("first"), *pools[0], fallbacks=pools[1:], continuations=continuations
    )
    resumed(made, made.candidates()[0])
    pause = made.retry_after(Cause.LOST)
    number = 0
    for event in events:
        some = made.candidates()
        if pause is None or not some:
            break
        number += 1
        made.begin(some[0])
        if event == "is asked for all":
            made.repeat()
            made.begin(made.candidates()[0])
            pause = made.retry_after(Cause.STATUS)
        elif event == "breaks off":
            made.resume()
            pause = made.retry_after(Cause.LOST)
        else:
            assert isinstance(event, Cause)
            pause = made.retry_after(event, 0.0)
    else:
        pytest.fail("it goes on and on")
    assert number <= continuations


def test_workers_that_broke_off_come_after_those_that_did_not() -> None:
    """Two bad workers do not play an answer to and fro while a good one is there."""
    a, b, c = worker("a"), worker("b"), worker("c")
    made = attempts(a, b, c, continuations=5)
    for each, others in ((a, [b, c]), (b, [c]), (c, [a, b])):
        resumed(made, each)
        assert made.retry_after(Cause.LOST) == 0.0
        assert made.candidates() == others


def test_a_5xx_from_before_blames_no_worker() -> None:
    """The answer that broke off has shown nothing, and what follows is another one."""
    a, b, c = worker("a"), worker("b"), worker("c")
    made = failed(attempts(a, b, c, continuations=5), a)
    assert made.retry_after(Cause.STATUS) == 0.0
    resumed(made, b)
    assert made.retry_after(Cause.LOST) == 0.0
    made.begin(c)
    assert made.succeeded() == []


# --- The same worker, asked for something else ------------------------------------


def test_the_last_worker_gets_another_request_although_others_are_up() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = resumed(attempts(a, b, c, continuations=5), a)
    made.begin(b)
    made.repeat()
    assert made.candidates() == [b]
    made.begin(b)
    assert made.candidates() == [c]


def test_one_that_was_removed_meanwhile_is_not_waited_for() -> None:
    a, b, c = worker("a"), worker("b"), worker("c")
    made = resumed(attempts(a, b, c, continuations=5), a)
    made.begin(b)
    made.repeat()
    for _ in range(3):
        b.observe(Check.REFUSED, "connection refused")
    assert made.candidates() == [c]


def test_that_is_the_same_continuation() -> None:
    """Or a refusal to go on would cost the one that begins anew."""
    a, b, c = worker("a"), worker("b"), worker("c")
    made = resumed(attempts(a, b, c, continuations=1), a)
    made.begin(b)
    assert not made.some_left
    made.repeat()
    assert made.some_left
    made.begin(b)
    assert made.retry_after(Cause.LOST) is None


def test_attempts_show_their_number() -> None:
    a = worker("a")
    assert repr(failed(attempts(a), a)) == "<Plan 1 of 3 on 'tiny'>"
