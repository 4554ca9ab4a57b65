"""Which workers of a model can take a request now, and when the others can."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gollama_proxy.bounded import MOST
from gollama_proxy.config.settings import Breaker, Health, Origin, WorkerConfig
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.pool import LOAD_AFTER, Pool
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock

STEADY = Breaker(jitter=0.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def worker(clock: Clock, *, ready: bool = True, policy: Breaker = STEADY) -> Worker:
    config = WorkerConfig("http://a:80", Origin("http", "a", 80, ""), "a")
    made = Worker(config, Health(fall=1), clock, policy=policy)
    made.observe(Check.OK if ready else Check.FAILED, "by the test")
    return made


def trip(worker: Worker, model: str | None = None) -> None:
    breaker = worker.breaker_of(model) if model else worker.breaker
    for _ in range(worker.policy.consecutive):
        breaker.record(Verdict.FAILURE)
    assert not breaker.closed


# --- Available workers ------------------------------------------------------------


def test_those_that_are_ready_are_available_in_their_order(clock: Clock) -> None:
    a, b, c = worker(clock), worker(clock, ready=False), worker(clock)
    pool = Pool("tiny", (a, b, c))
    assert pool.available == [a, c]
    b.observe(Check.OK, "by the test")
    a.observe(Check.LOADING, "by the test")
    assert pool.available == [b, c]
    assert Pool("tiny", ()).available == []


def test_one_that_fails_is_not_and_neither_is_one_that_fails_with_this_model(
    clock: Clock,
) -> None:
    a, b, c = worker(clock), worker(clock), worker(clock)
    trip(a)
    trip(b, "tiny")
    trip(c, "other")
    assert Pool("tiny", (a, b, c)).available == [c]
    assert Pool("other", (a, b, c)).available == [b]


def test_one_that_asked_for_a_break_is_available_when_it_is_over(clock: Clock) -> None:
    a = worker(clock)
    pool = Pool("tiny", (a,))
    a.breaker.busy(2)
    assert pool.available == []
    clock.advance(2)
    assert pool.available == [a]


def test_one_that_is_to_prove_itself_by_a_request_is_available_for_that(
    clock: Clock,
) -> None:
    for canary in (True, False):
        a = worker(clock, policy=Breaker(jitter=0.0, canary=canary))
        trip(a)
        clock.advance(a.breaker.opens_in())
        assert Pool("tiny", (a,)).available == ([] if canary else [a])


# --- Workers that have the model loaded -------------------------------------------


def router(clock: Clock, model: Model, slots: int = 1) -> Worker:
    made = worker(clock)
    made.observe(Check.OK, "ok", Description((model,), slots=slots))
    return made


WARM, COLD = Model("tiny", loaded=True), Model("tiny", loaded=False)
LOADING = Model("tiny", loaded=False, loading=True)


def test_workers_that_have_it_loaded_go_first_with_those_that_do_not_report_it(
    clock: Clock,
) -> None:
    cold, warm, silent = (
        router(clock, each) for each in (COLD, WARM, Model("tiny", loaded=None))
    )
    pool = Pool("tiny", (cold, warm, silent))
    assert pool.available == [warm, silent]
    assert pool.able == [cold, warm, silent]
    assert pool.preferred([cold]) == [cold]
    assert pool.preferred([warm]) == [warm]
    assert pool.preferred([]) == []
    trip(warm)
    trip(silent)
    assert pool.available == [cold]


def test_one_that_is_loading_it_goes_before_one_that_would_have_to_begin(
    clock: Clock,
) -> None:
    cold, loading, asked = (router(clock, each) for each in (COLD, LOADING, COLD))
    pool = Pool("tiny", (cold, loading, asked))
    assert pool.available == [loading]
    lease = asked.lease("tiny")
    assert lease.loads
    assert pool.available == [loading, asked]
    lease.release(Result.WORKER_FAILED)
    assert pool.available == [loading]


def test_when_all_are_full_for_long_another_one_is_to_load_it(clock: Clock) -> None:
    cold, warm, other = (router(clock, each) for each in (COLD, WARM, WARM))
    pool = Pool("tiny", (cold, warm, other))
    lease = warm.lease("tiny")
    clock.advance(1.0)
    other.lease("tiny")
    clock.advance(LOAD_AFTER - 0.5)
    assert pool.available == [warm, other]
    clock.advance(0.5)
    assert pool.available == [cold, warm, other]
    lease.release(Result.COMPLETE)
    assert pool.available == [warm, other]


# --- When it opens again ----------------------------------------------------------


def test_a_pool_opens_again_with_the_first_of_its_workers(clock: Clock) -> None:
    a, b = worker(clock), worker(clock)
    pool = Pool("tiny", (a, b))
    assert pool.reopens_in() == 0
    trip(a)
    clock.advance(2)
    trip(b)
    assert pool.reopens_in() == 3
    b.breaker.renew()
    assert pool.reopens_in() == 0


def test_a_worker_opens_again_when_both_its_breakers_do(clock: Clock) -> None:
    a = worker(clock)
    trip(a)
    clock.advance(2)
    trip(a, "tiny")
    assert Pool("tiny", (a,)).reopens_in() == 5
    assert Pool("other", (a,)).reopens_in() == 3
    clock.advance(4)
    assert Pool("tiny", (a,)).reopens_in() == 1


def test_a_worker_that_is_down_will_not_open_by_waiting(clock: Clock) -> None:
    a, b = worker(clock), worker(clock, ready=False)
    trip(a)
    trip(b)
    clock.advance(2)
    b.breaker.renew()
    assert Pool("tiny", (a, b)).reopens_in() == 3
    assert Pool("tiny", (b,)).reopens_in() == 0
    assert Pool("tiny", ()).reopens_in() == 0


# --- What is computed once --------------------------------------------------------


def test_the_lists_are_the_same_until_something_changes(clock: Clock) -> None:
    a, b = worker(clock), worker(clock)
    pool = Pool("tiny", (a, b))
    able = pool.able
    a.lease("tiny").release(Result.COMPLETE)
    assert pool.able is able
    assert pool.available is able
    trip(a)
    assert pool.able == [b]
    assert repr(pool) == "<Pool of 2 workers>"


@pytest.mark.parametrize("model", [None, "tiny"])
def test_a_break_that_is_over_is_noticed_at_its_very_end(
    clock: Clock, model: str | None
) -> None:
    a, b = worker(clock), worker(clock)
    pool = Pool("tiny", (a, b))
    (a.breaker_of(model) if model else a.breaker).busy(2)
    b.breaker.busy(3)
    for advance, able in ((0, []), (1.999, []), (0.001, [a]), (0.999, [a])):
        clock.advance(advance)
        assert pool.able == able
    clock.advance(0.001)
    assert pool.able == [a, b]
    assert pool.able is pool.able


def test_an_open_breaker_is_noticed_when_it_takes_a_proof(clock: Clock) -> None:
    a = worker(clock, policy=Breaker(jitter=0.0, canary=False, proofs=2))
    pool = Pool("tiny", (a,))
    trip(a)
    assert pool.able == []
    clock.advance(a.breaker.opens_in())
    for _ in range(2):
        assert pool.able == [a]
        proof = a.lease("tiny")
        assert pool.able == []  # there is one proof at a time
        proof.release(Result.COMPLETE)
    assert a.breaker.closed
    assert pool.able == [a]


def test_an_open_breaker_of_a_worker_that_was_away_is_noticed(clock: Clock) -> None:
    a = worker(clock, policy=Breaker(jitter=0.0, canary=False))
    pool = Pool("tiny", (a,))
    trip(a)
    a.observe(Check.FAILED, "by the test")
    assert pool.able == []
    a.observe(Check.OK, "by the test")
    assert pool.able == [a]


def test_an_open_breaker_that_is_forgotten_is_open_no_more(clock: Clock) -> None:
    """The models of clients can be any number, so the oldest breakers are dropped."""
    a = worker(clock)
    pool = Pool("tiny", (a,))
    trip(a, "tiny")
    assert pool.able == []
    for number in range(MOST):
        a.breaker_of(f"other{number}")
    assert pool.able == [a]


def test_the_contexts_of_a_pool_follow_what_is_learnt(clock: Clock) -> None:
    a, b = worker(clock), worker(clock)
    pool = Pool("tiny", (a, b))
    assert (pool.least_context, pool.largest_context) == (None, 0)
    a.learn_context("tiny", 512)
    assert (pool.least_context, pool.largest_context) == (512, 512)
    b.observe(Check.OK, "ok", Description((Model("tiny", 256),)))
    assert (pool.least_context, pool.largest_context) == (256, 512)
    pool.remove(b)
    assert (pool.least_context, pool.largest_context) == (512, 512)
    pool.add(b)
    assert (pool.least_context, pool.largest_context) == (256, 512)


class Cached(RuleBasedStateMachine):
    """Whatever happens, in whatever order: the lists are what they would be anew."""

    @initialize(canary=st.booleans())
    def begin(self, canary: bool) -> None:
        self.clock = Clock()
        policy = Breaker(consecutive=2, open=2, open_max=4, canary=canary, proofs=1)
        self.workers = [worker(self.clock, policy=policy) for _ in range(3)]
        self.pool = Pool("tiny", self.workers)
        self.leases: list[Lease] = []

    some = st.integers(0, 2)
    models = st.sampled_from(["tiny", "other"])

    @rule(number=some, check=st.sampled_from(Check))
    def check(self, number: int, check: Check) -> None:
        self.workers[number].observe(check, "by the test")

    @rule(number=some, loaded=st.sampled_from([True, False, None]))
    def list_the_model(self, number: int, loaded: bool | None) -> None:
        listed = Description((Model("tiny", loaded=loaded),), slots=1)
        self.workers[number].observe(Check.OK, "by the test", listed)

    @rule(number=some, model=models)
    def take(self, number: int, model: str) -> None:
        self.leases.append(self.workers[number].lease(model))

    @precondition(lambda self: self.leases)
    @rule(result=st.sampled_from(Result))
    def release(self, result: Result) -> None:
        self.leases.pop(0).release(result)

    @rule(number=some, model=models, verdict=st.sampled_from(Verdict))
    def judge(self, number: int, model: str, verdict: Verdict) -> None:
        self.workers[number].breaker_of(model).record(verdict)

    @rule(number=some, model=models, seconds=st.sampled_from([0.5, 3.0]))
    def be_busy(self, number: int, model: str, seconds: float) -> None:
        self.workers[number].breaker_of(model).busy(seconds, unavailable=True)

    @rule(number=some)
    def be_busy_as_a_machine(self, number: int) -> None:
        self.workers[number].breaker.busy(1.0)

    @rule(number=some)
    def leave_or_come_back(self, number: int) -> None:
        one = self.workers[number]
        (one.rejoin if one.retired else one.retire)()

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, LOAD_AFTER]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def the_lists_are_right(self) -> None:
        able, available = self.pool.able, self.pool.available
        anew = [each for each in self.workers if each.can_serve("tiny")]
        assert able == anew
        assert available == self.pool.preferred(anew)


TestCached = Cached.TestCase
