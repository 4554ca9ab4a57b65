"""Hubs learn from each other, and believe themselves first."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.config.settings import Routing
from gollama_proxy.fleet.breaker import TRUSTED, BreakerState, Verdict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling import hints
from gollama_proxy.scheduling.affinity import Affinity
from gollama_proxy.scheduling.hints import Hints, Rates, Report, Visit
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.state.facts import decode, encode
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock
from tests.fakes.pool import has_room
from tests.fakes.registry import balancer

MODEL = "qwen"
KEY = b"k" * 32


class FakeHub:
    """The parts of a hub that hints are about."""

    def __init__(self, name: str, clock: Clock, count: int = 3) -> None:
        routing = Routing(policy="affinity")
        self.clock = clock
        models = [MODEL] * count
        self.balancer = balancer(*models, clock=clock, routing=routing, slots=4)
        self.balancer.share(KEY)
        self.registry = self.balancer.registry
        self.hints = Hints(self.registry, self.balancer, name, lambda w: w.url, clock)

    @property
    def workers(self) -> list[Worker]:
        return self.registry.workers

    def serve(self, number: int, verdict: Verdict = Verdict.SUCCESS) -> None:
        self.workers[number].breaker.record(verdict)

    def breaks(self, number: int) -> None:
        """Have every request of this hub to a worker fail, until it gets none."""
        breaker = self.workers[number].breaker
        for _ in range(breaker.policy.consecutive):
            breaker.record(Verdict.FAILURE)

    def state(self, number: int) -> BreakerState:
        return self.workers[number].breaker.state

    def pick(self, *prefixes: int, size: int = 8000) -> Worker | None:
        policy = self.balancer.policy_of(MODEL)
        asked = Ask(MODEL, size, 0, "alice", prefixes)
        return policy.pick(asked, self.registry.pool(MODEL).workers, has_room)


def two(count: int = 3) -> tuple[FakeHub, FakeHub, Clock]:
    clock = Clock()
    return FakeHub("a", clock, count), FakeHub("b", clock, count), clock


def deliver(hub: FakeHub, *others: FakeHub) -> Report | None:
    """Have other hubs take all that one has to report; return the last report."""
    report = None
    for _ in range(hints.CYCLE * hints.EVERY):
        found = hub.hints.gather()
        if found is not None:
            report = decode(Report, encode(found), "here")
            assert report == found
            for each in others:
                each.hints.take(report)
    return report


# --- Breakers ---------------------------------------------------------------------


def test_an_open_breaker_is_doubted_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other, _ = two()
    one.serve(1)
    one.breaks(0)
    suspected: list[int] = []
    other.workers[0].on_suspicion = lambda: suspected.append(0)
    deliver(one, other)
    assert [other.state(number) for number in range(3)] == [
        BreakerState.HALF_OPEN,
        BreakerState.CLOSED,
        BreakerState.CLOSED,
    ]
    assert suspected == [0]
    assert "closed -> half-open (that of the hub 'a' is open)" in caplog.text
    assert deliver(other, one) is None  # a doubt is no verdict


def test_each_opening_is_reported_once() -> None:
    one, _, clock = two()
    one.serve(1)
    one.breaks(0)
    first = deliver(one)
    assert first is not None
    assert (first.places, first.opened) == (((one.workers[0].url, ""),), (0,))
    assert deliver(one) is None
    clock.advance(one.workers[0].breaker.opens_in())
    permit = one.workers[0].breaker.permit()
    assert permit is not None
    permit.settle(False)
    one.serve(1)
    again = deliver(one)
    assert again is not None
    assert again.opened == (0,)


def test_a_worker_that_has_just_answered_here_is_not_doubted() -> None:
    one, other, _ = two()
    one.serve(1)
    one.breaks(0)
    other.serve(0)
    deliver(one, other)
    assert other.state(0) is BreakerState.CLOSED


def test_a_worker_that_sends_tokens_here_is_not_doubted() -> None:
    one, other, clock = two()
    one.serve(1)
    one.breaks(0)
    lease = other.workers[0].lease(MODEL)
    clock.advance(100)
    lease.heard_at = clock() - TRUSTED + 1
    one.serve(1)
    deliver(one, other)
    assert other.state(0) is BreakerState.CLOSED


@pytest.mark.parametrize("broken", [(0, 1), (0, 1, 2)])
def test_a_hub_to_which_most_workers_fail_keeps_that_for_itself(
    broken: tuple[int, ...],
) -> None:
    one, other, _ = two()
    for number in range(3):
        one.serve(number)
    for number in broken:
        one.breaks(number)
    deliver(one, other)
    assert {other.state(number) for number in range(3)} == {BreakerState.CLOSED}


def test_a_hub_that_loses_its_network_poisons_no_other() -> None:
    """Each failure is tried again elsewhere, so all workers begin to fail at once."""
    one, other, clock = two()
    for number in range(3):
        one.serve(number)
        other.serve(number)
    clock.advance(60)
    for _ in range(10):
        for number in range(3):
            one.serve(number, Verdict.FAILURE)
            deliver(one, other)
    assert {one.state(number) for number in range(3)} == {BreakerState.OPEN}
    assert {other.state(number) for number in range(3)} == {BreakerState.CLOSED}


def test_a_hub_without_any_good_answer_keeps_its_verdicts_for_itself() -> None:
    one, other, _ = two()
    one.breaks(0)
    deliver(one, other)
    assert other.state(0) is BreakerState.CLOSED


def test_the_breaker_of_a_model_is_doubted_for_that_model() -> None:
    one, other, _ = two()
    one.serve(0)
    for _ in range(5):
        one.workers[0].breaker_of(MODEL).record(Verdict.FAILURE)
        one.workers[0].breaker_of("unknown there").record(Verdict.FAILURE)
    deliver(one, other)
    assert other.state(0) is BreakerState.CLOSED
    (found,) = other.workers[0].model_breakers.items()
    assert (found[0], found[1].state) == (MODEL, BreakerState.HALF_OPEN)


def test_an_old_verdict_says_nothing() -> None:
    one, other, _ = two()
    one.serve(1)
    one.breaks(0)
    report = deliver(one)
    assert report is not None
    other.hints.take(report, age=hints.OLD)
    assert other.state(0) is BreakerState.CLOSED
    other.hints.take(report, age=hints.OLD - 1)
    assert other.state(0) is BreakerState.HALF_OPEN


# --- Speeds -----------------------------------------------------------------------


def teach(worker: Worker, reads: float = 1000.0, writes: float = 50.0) -> None:
    speed = worker.pace_of(MODEL).speed
    speed.read(1000, 1000 / reads)
    speed.wrote(100, 100 / writes)


def test_a_speed_is_assumed_where_nothing_was_learnt() -> None:
    one, other, _ = two()
    teach(one.workers[0])
    teach(one.workers[1])
    teach(other.workers[1], 10, 5)
    deliver(one, other)
    speeds = [worker.pace_of(MODEL).speed for worker in other.workers]
    assert [each.reads for each in speeds] == [1000, 10, None]
    assert [each.writes(1) for each in speeds] == [50, 5, None]


def test_what_was_assumed_is_not_reported_as_learnt() -> None:
    one, other, _ = two()
    teach(one.workers[0])
    deliver(one, other)
    assert deliver(other, one) is None


def test_a_speed_is_reported_again_when_it_has_changed() -> None:
    one, _, _ = two()
    teach(one.workers[0])
    assert deliver(one) is not None
    teach(one.workers[0], 1010, 50.5)
    assert deliver(one) is None
    teach(one.workers[0], 10, 50)
    assert deliver(one) is not None
    one.workers[0].pace_of(MODEL).speed.wrote(100, 4, beside=2)
    assert deliver(one) is not None
    one.hints.repeat()
    assert deliver(one) is not None


def looks(hub: FakeHub, calls: int) -> list[int]:
    """Return how many speeds each call of `gather` reports."""
    reports = [hub.hints.gather() for _ in range(calls)]
    return [len(report.rates) if report else 0 for report in reports]


def test_few_calls_look_at_the_speed_of_a_worker_or_a_few() -> None:
    every = hints.EVERY
    one = FakeHub("a", Clock(), count=3)
    for worker in one.workers:
        teach(worker)
    quiet = [0] * (every - 1)
    assert looks(one, 3 * every) == [*quiet, 1] * 3
    many = FakeHub("a", Clock(), count=4 * hints.CYCLE)
    for worker in many.workers[1:]:  # the first one has learnt nothing
        teach(worker)
    assert looks(many, every) == [*quiet, 4]
    for worker in many.workers:
        teach(worker, 10)
    assert looks(many, 7 * every) == [*quiet, 5] * 7, "the rest of the 40"
    assert looks(many, 2 * every) == [*quiet, 5, *quiet, 0], "from the first again"


def test_the_last_call_looks_at_all_speeds() -> None:
    one, _, _ = two()
    for _ in range(hints.EVERY):
        one.hints.gather()
    for worker in one.workers:
        teach(worker)
    report = one.hints.gather(last=True)
    assert report is not None
    assert [report.places[each.place] for each in report.rates] == [
        (worker.url, MODEL) for worker in one.workers
    ]


def test_the_places_of_speeds_are_remembered_by_worker_and_model() -> None:
    one, _, _ = two()
    for number, worker in enumerate(one.workers):
        teach(worker, 1000 * (number + 1))
    assert deliver(one) is not None
    assert deliver(one) is None


def test_a_model_without_a_speed_hides_no_other() -> None:
    one, _, _ = two()
    one.workers[0].pace_of("unused")
    one.workers[0].pace_of(MODEL)
    teach(one.workers[0])
    report = deliver(one)
    assert report is not None
    assert report.places == ((one.workers[0].url, MODEL),)


def test_a_worker_that_lists_its_models_later_has_the_speed_by_then() -> None:
    clock = Clock()
    one, late = FakeHub("a", clock), FakeHub("b", clock, count=0)
    teach(one.workers[0])
    one.workers[0].pace_of("other").speed.read(1000, 2)
    deliver(one, late)
    worker = late.registry.add(one.workers[0].config)
    late.hints.gather()
    assert not worker.paces
    models = Model(MODEL), Model("other")
    worker.observe(Check.OK, "ok", Description(models, slots=4))
    late.hints.gather()
    assert worker.pace_of(MODEL).speed.reads == 1000
    assert worker.pace_of(MODEL).speed.tokens == 100
    assert worker.pace_of("other").speed.reads == 500


def test_a_model_that_a_worker_does_not_have_is_not_assumed() -> None:
    one, other, _ = two()
    one.workers[0].pace_of("invented").speed.read(1000, 1)
    deliver(one, other)
    assert not other.workers[0].paces


# --- Conversations ----------------------------------------------------------------


def test_the_next_turn_goes_to_the_worker_that_another_hub_has_chosen() -> None:
    one, other, _ = two()
    for number in range(100, 120):
        first = one.pick(number)
        assert first is not None
        deliver(one, other)
        second = other.pick(number, 1000 + number)
        assert second is not None
        assert second.name == first.name
        deliver(other, one)
        assert repr(one.balancer.policy) == repr(other.balancer.policy)
        third = one.pick(number, 1000 + number, 2000 + number)
        assert third is first


def test_a_turn_on_a_worker_that_is_unknown_here_is_ignored() -> None:
    clock = Clock()
    one, other = FakeHub("a", clock), FakeHub("b", clock, count=0)
    one.pick(1)
    deliver(one, other)
    policy = other.balancer.policy
    assert isinstance(policy, Affinity)
    assert "Memory of 0" in repr(policy)


def test_a_worker_that_was_removed_gets_no_hints() -> None:
    one, other, _ = two(count=1)
    one.pick(1)
    other.registry.remove("w0")
    deliver(one, other)
    assert "Memory of 0" in repr(other.balancer.policy)


def test_much_is_reported_in_parts() -> None:
    one, _, _ = two()
    for number in range(hints.VISITS + 1):
        one.pick(number)
    sizes = []
    while (report := one.hints.gather()) is not None:
        sizes.append(len(report.visits))
    assert sizes == [hints.VISITS, 1]


# --- Hubs that start later --------------------------------------------------------


def test_a_copy_has_the_turns_since_the_last_and_the_breakers_that_are_open() -> None:
    one, other, clock = two()
    one.pick(1)
    one.serve(1)
    one.breaks(0)
    deliver(one)
    copy = one.hints.copy()
    assert copy is not None
    assert len(copy.visits) == len(copy.opened) == 1
    other.hints.take(copy, age=5)
    assert other.state(0) is BreakerState.HALF_OPEN
    clock.advance(100)
    one.serve(1)
    assert one.hints.copy() is None


def test_a_copy_of_a_hub_that_may_be_broken_itself_has_no_breakers() -> None:
    one, _, _ = two()
    one.serve(1)
    one.breaks(0)
    deliver(one)
    one.breaks(1)
    one.breaks(2)
    assert one.hints.copy() is None


def test_a_copy_has_the_breakers_of_models() -> None:
    one, _, _ = two()
    one.serve(1)
    for _ in range(5):
        one.workers[0].breaker_of(MODEL).record(Verdict.FAILURE)
    deliver(one)
    copy = one.hints.copy()
    assert copy is not None
    assert [copy.places[place] for place in copy.opened] == [
        (one.workers[0].url, MODEL)
    ]


def test_a_copy_is_bounded() -> None:
    one, _, _ = two()
    for _ in range(2):
        for number in range(hints.KEPT + 50):
            one.pick(number)
        deliver(one)
        copy = one.hints.copy()
        assert copy is not None
        assert len(copy.visits) == hints.KEPT


def test_what_has_arrived_already_changes_nothing() -> None:
    one, other, _ = two()
    one.pick(1)
    deliver(one, other)
    before = repr(other.balancer.policy), len(other.balancer.turns)
    copy = one.hints.copy()
    assert copy is not None
    other.hints.take(copy)
    assert (repr(other.balancer.policy), len(other.balancer.turns)) == before


# --- Garbage ----------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 4), st.integers(0, 2**62))
names = st.one_of(
    st.sampled_from([f"http://10.0.0.{number}:8080" for number in range(3)]),
    st.sampled_from(["", MODEL]),
    st.text(max_size=10),
)
reports = st.builds(
    Report,
    hub=st.sampled_from(["a", "b", "c", ""]),
    places=st.lists(st.tuples(names, names), max_size=4).map(tuple),
    opened=st.lists(numbers, max_size=4).map(tuple),
    rates=st.lists(
        st.builds(
            Rates,
            numbers,
            st.floats(0, 1e12),
            st.dictionaries(st.integers(0, 63), st.floats(1e-300, 1e12), max_size=3),
            st.floats(1e-300, 1e12),
        ),
        max_size=3,
    ).map(tuple),
    visits=st.lists(
        st.builds(
            Visit,
            numbers,
            st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5).map(tuple),
            st.integers(0, 2**63 - 1),
            numbers,
        ),
        max_size=5,
    ).map(tuple),
)


@given(st.lists(reports, max_size=5))
@settings(deadline=None)
def test_whatever_is_reported_the_hub_works(found: list[Report]) -> None:
    hub = FakeHub("a", Clock())
    for each in found:
        report = decode(Report, encode(each), "here")
        assert report == each
        hub.hints.take(report)
        hub.hints.gather()
    assert hub.pick(1, 2) is not None
    assert BreakerState.OPEN not in {hub.state(number) for number in range(3)}


def test_its_repr_shows_no_text_of_others() -> None:
    one, _, _ = two()
    assert repr(one.hints) == "<Hints of a workers=3>"
