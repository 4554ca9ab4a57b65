"""Which worker gets the next attempt of a request, and which models may be asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gollama_proxy.config.settings import Config, Rescue, Retry, Routing
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.scheduling import balancer as balancing
from gollama_proxy.scheduling.balancer import Balancer, RetryBudget
from gollama_proxy.scheduling.policies import Ask, Fits, Policy, Turn
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.description import Check
from gollama_proxy.wire.errors import Code, NoWorkerError
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.pool import InOrder
from tests.fakes.registry import balancer, plan, take_out, trip


def choose(made: Balancer, name: str | None) -> Worker:
    """Choose the worker for the first attempt of a request."""
    return choose_next(made, plan(made, made.registry.resolve(name, None)))


def choose_next(made: Balancer, attempts: Plan) -> Worker:
    candidates = attempts.candidates()
    if not candidates:
        raise made.no_worker(attempts)
    worker = made.pick(attempts, candidates)
    assert worker is not None
    return worker


def no_worker(made: Balancer, name: str, retry_after: int) -> str:
    """Return the message about a model for which no worker is available."""
    with pytest.raises(NoWorkerError) as caught:
        choose(made, name)
    error = caught.value
    assert (error.code, error.code.status) == (Code.NO_WORKER, 503)
    assert error.retry_after == retry_after
    return error.message


# --- Choosing ---------------------------------------------------------------------


def test_available_workers_have_their_turns() -> None:
    made = balancer("a", "b", "a", "a")
    assert [choose(made, "a").name for _ in range(4)] == ["w0", "w2", "w3", "w0"]


@pytest.mark.parametrize("check", [Check.FAILED, Check.LOADING])
def test_a_worker_that_is_not_ready_is_not_chosen(check: Check) -> None:
    made = balancer("a", "a", "a", clock=(clock := Clock()))
    take_out(made.registry.workers[1], check=check)
    assert {choose(made, "a").name for _ in range(6)} == {"w0", "w2"}
    made.registry.workers[1].observe(Check.OK, "ok")
    assert made.registry.workers[1].state is WorkerState.READY
    clock.advance(made.registry.workers[1].policy.ramp)
    assert {choose(made, "a").name for _ in range(6)} == {"w0", "w1", "w2"}


def test_a_pool_shows_what_is_available_now_and_not_when_it_was_made() -> None:
    """Between the two a client may have waited for minutes."""
    made = balancer("a", "a")
    attempts = plan(made, made.registry.resolve("a", None))
    take_out(*made.registry.workers)
    with pytest.raises(NoWorkerError):
        choose_next(made, attempts)
    made.registry.workers[1].observe(Check.OK, "ok")
    assert choose_next(made, attempts) is made.registry.workers[1]


def test_a_worker_that_has_had_an_attempt_is_not_chosen_again() -> None:
    made = balancer("a", "a", "a")
    attempts = plan(made, made.registry.pool("a"))
    chosen = []
    for _ in range(3):
        chosen.append(choose_next(made, attempts).name)
        attempts.begin(made.registry.workers[int(chosen[-1][1:])])
    assert sorted(chosen) == ["w0", "w1", "w2"]
    with pytest.raises(NoWorkerError):
        choose_next(made, attempts)


def test_a_worker_that_has_just_recovered_is_passed_over_now_and_then() -> None:
    """If there is another one: the only one takes all."""
    made = balancer("a", "a", "b", clock=(clock := Clock()))
    trip(made.registry.workers[0], made.registry.workers[2])
    clock.advance(5)
    for worker in (made.registry.workers[0], made.registry.workers[2]):
        for _ in range(worker.policy.proofs):
            permit = worker.breaker.permit()
            assert permit is not None
            permit.settle(True)
    chosen = [choose(made, "a").name for _ in range(100)]
    assert 5 <= chosen.count("w0") <= 10
    assert {choose(made, "b").name for _ in range(100)} == {"w2"}


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_a_worker_that_has_just_recovered_has_its_share_among_any_number(
    number: int,
) -> None:
    """A tenth of the turns is what it begins with."""
    made = balancer(*["a"] * number)
    take_out(made.registry.workers[1])
    made.registry.workers[1].observe(Check.OK, "ok")
    assert [choose(made, "a").name for _ in range(1000)].count("w1") >= 10


# --- Policies ---------------------------------------------------------------------


def test_a_model_has_the_policy_that_is_configured_for_it() -> None:
    routing = Routing(policy="weighted", policies={"a*": "affinity", "b": "affinity"})
    made = balancer("a1", "a1", "b", "b", "c", "c", "a2", routing=routing)
    assert repr(made).startswith("<Balancer <Weighted")
    assert made.policy_of("c") is made.policy
    assert made.policy_of("a1") is made.policy_of("b") is not made.policy
    follows = {name: made.follows(made.registry.pool(name)) for name in "bc"}
    assert follows == {"b": True, "c": False}
    assert not made.follows(made.registry.pool("a2"))  # it has one worker


def test_a_single_worker_needs_no_policy() -> None:
    made = balancer("a", "b")
    made.policy = Policy()  # which cannot pick
    assert choose(made, "a") is made.registry.workers[0]


def test_policies_learn_what_was_found_in_a_cache() -> None:
    class Pupil(InOrder):
        learnt: ClassVar[list[tuple[Ask, Worker, int, int]]] = []

        def learn(
            self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
        ) -> None:
            self.learnt.append((ask, worker, cached_tokens, prompt_tokens))

    made = balancer("a", "a")
    made.policy = Pupil()
    attempts = plan(made, made.registry.pool("a"))
    worker = made.registry.workers[1]
    made.learn(attempts, worker, Prefill(5, 3))
    made.learn(attempts, worker, Prefill(-5, 3))
    assert Pupil.learnt == [(attempts.ask, worker, 3, 8)]


class Noted(InOrder):
    """A policy that keeps what it gets."""

    def __init__(self) -> None:
        self.shared: list[tuple[bytes, dict[int, Turn]]] = []
        self.turns: list[Turn] = []
        self.asked: list[Ask] = []  # twins

    def share(self, key: bytes, outbox: dict[int, Turn]) -> None:
        self.shared.append((key, outbox))

    def note(self, turn: Turn) -> None:
        self.turns.append(turn)

    def twin(self, ask: Ask) -> Policy:
        self.asked.append(ask)
        return InOrder()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Noted]:
    """Have every policy keep what it gets; they are listed by name."""
    made: dict[str, Noted] = {}

    def make(name: str, clock: Clock, rng: random.Random) -> Policy:
        return made.setdefault(name, Noted())

    monkeypatch.setattr(balancing, "make", make)
    return made


def test_policies_share_conversations_with_the_same_key(
    noted: dict[str, Noted],
) -> None:
    made = balancer("a", "a", routing=Routing("fastest"))
    assert (noted["fastest"].shared, made.turns) == ([], {})
    made.share(b"key")
    assert noted["fastest"].shared == [(b"key", made.turns)]
    made.reconfigure(Config(routing=Routing("affinity")))
    assert noted["affinity"].shared == [(b"key", made.turns)]
    assert noted["affinity"].shared[0][1] is made.turns


def test_without_a_key_a_new_policy_shares_nothing(noted: dict[str, Noted]) -> None:
    made = balancer("a", "a", routing=Routing("fastest"))
    made.reconfigure(Config(routing=Routing("affinity")))
    assert noted["affinity"].shared == []


def test_the_policy_of_a_model_is_the_one_that_is_used(noted: dict[str, Noted]) -> None:
    made = balancer("a", "a", routing=Routing("fastest", {"a": "affinity"}))
    worker = made.registry.workers[0]
    turn = Turn("a", worker, (1,), 0, 9)
    made.note(turn)
    assert (noted["affinity"].turns, noted["fastest"].turns) == ([turn], [])
    attempts = plan(made, made.registry.pool("a"))
    assert made.pick(attempts, attempts.candidates(), dry=True) is worker
    assert noted["affinity"].asked == [attempts.ask]


def test_a_dry_run_leaves_a_worker_that_has_just_recovered_its_turn() -> None:
    made = balancer("a", "a")
    made.policy = InOrder()
    recovered, other = made.registry.workers
    take_out(recovered)
    recovered.observe(Check.OK, "ok")
    attempts = plan(made, made.registry.pool("a"))
    candidates = attempts.candidates()
    for _ in range(20):  # its shares would add up to a whole one
        assert made.pick(attempts, candidates, dry=True) is other
    picks = [made.pick(attempts, candidates) for _ in range(20)]
    assert picks.count(recovered) == 2


def test_only_with_prefixes_has_a_request_patience() -> None:
    class Patient(InOrder):
        def pick(
            self, ask: Ask, workers: Sequence[Worker], fits: Fits
        ) -> Worker | None:
            return None if ask.patience else super().pick(ask, workers, fits)

    made = balancer("a", "a")
    made.policy = Patient()
    attempts = plan(made, made.registry.pool("a"))
    candidates = attempts.candidates()
    assert made.pick(attempts, candidates, 3.0) is made.registry.workers[0]
    attempts.ask = replace(attempts.ask, prefixes=(1,))
    assert made.pick(attempts, candidates, 3.0) is None
    assert made.pick(attempts, candidates) is made.registry.workers[0]


# --- Fallbacks --------------------------------------------------------------------


def asked(made: Balancer, attempts: Plan) -> list[str]:
    """Let every worker fail; return the models that were asked."""
    models = []
    pause: float | None = 0.0
    while pause is not None:
        worker = choose_next(made, attempts)
        models.append(attempts.pool.model)
        attempts.begin(worker)
        pause = attempts.retry_after(Cause.KEY)
    return models


def chain(
    made: Balancer,
    name: str,
    fallbacks: Sequence[str] = (),
    allowed: Sequence[str] | None = None,
) -> list[str]:
    pool = made.registry.resolve(name, allowed)
    return asked(made, plan(made, pool, fallbacks, allowed))


def test_the_fallbacks_of_a_model_are_asked_in_their_order() -> None:
    lists = {"big": ("medium", "small"), "medium": ("small",)}
    made = balancer("small", "medium", "big", "other", fallbacks=lists)
    assert chain(made, "big") == ["big", "medium", "small"]
    assert chain(made, "medium") == ["medium", "small"]  # each has its own, no more
    assert chain(made, "small") == ["small"]


def test_a_fallback_is_chosen_when_no_worker_of_the_model_is_there() -> None:
    made = balancer("big", "small", fallbacks={"big": ("small",)})
    assert choose(made, "big") is made.registry.workers[0]
    take_out(made.registry.workers[0])
    attempts = plan(made, made.registry.resolve("big", None))
    assert choose_next(made, attempts) is made.registry.workers[1]
    assert attempts.pool == made.registry.pool("small")


def test_without_workers_of_a_fallback_the_error_names_the_model_asked_for() -> None:
    """And when it may be back: that of a fallback is for the fallback."""
    lists = {"big": ("small", "none")}
    made = balancer("big", "small", fallbacks=lists, clock=(clock := Clock()))
    trip(made.registry.workers[0])
    clock.advance(1)
    take_out(made.registry.workers[1])
    assert no_worker(made, "big", retry_after=4) == (
        "No worker is available for the model 'big': 1 serve it (1 breaker open)."
    )


def test_an_error_ends_with_a_note() -> None:
    made = balancer("a", "a")
    error = made.no_worker(plan(made, made.registry.pool("a")), " It sleeps.")
    assert error.message.endswith(" It sleeps.")


def test_an_alias_counts_as_its_model_on_either_side() -> None:
    aliases = {"gpt": "big", "mini": "small"}
    for name in ("big", "gpt"):
        for other in ("small", "mini"):
            lists = {name: (other,)}
            made = balancer("small", "big", fallbacks=lists, aliases=aliases)
            for asked_for in ("big", "gpt"):
                assert chain(made, asked_for) == ["big", "small"]


def test_a_clients_own_fallbacks_take_the_place_of_the_configured_ones() -> None:
    aliases = {"mini": "small"}
    lists = {"big": ("medium",)}
    made = balancer("small", "medium", "big", fallbacks=lists, aliases=aliases)
    assert chain(made, "big", ["mini"]) == ["big", "small"]
    assert chain(made, "big", ["small", "medium"]) == ["big", "small", "medium"]
    assert chain(made, "small", ["big"]) == ["small", "big"]
    assert chain(made, "big", []) == ["big", "medium"]


@pytest.mark.parametrize(
    ("fallbacks", "models"),
    [
        (["big"], ["big"]),
        (["gpt"], ["big"]),
        (["small", "big", "gpt"], ["big", "small"]),
        (["small", "mini", "small"], ["big", "small"]),
        (["what?", "", "small"], ["big", "small"]),
    ],
)
def test_no_model_is_asked_twice_and_none_that_is_not_there(
    fallbacks: list[str], models: list[str]
) -> None:
    """A model is no fallback of itself, under any of its names."""
    aliases = {"gpt": "big", "mini": "small"}
    assert chain(balancer("small", "big", aliases=aliases), "big", fallbacks) == models
    if "" not in fallbacks:
        lists = {"big": tuple(fallbacks)}
        made = balancer("small", "big", aliases=aliases, fallbacks=lists)
        assert chain(made, "big") == models


def test_a_fallback_that_the_token_does_not_allow_is_passed_over() -> None:
    lists = {"big": ("medium", "small")}
    made = balancer("small", "medium", "big", fallbacks=lists)
    assert chain(made, "big", allowed=["big", "s*"]) == ["big", "small"]
    assert chain(made, "big", ["medium"], allowed=["big", "s*"]) == ["big"]
    assert chain(made, "big", allowed=["big"]) == ["big"]


def test_a_fallback_that_the_token_allows_by_its_alias_is_asked() -> None:
    """As it would be if it were asked for in the first place."""
    aliases = {"mini": "small"}
    for lists, own in (({"big": ("mini",)}, ()), ({}, ["mini"])):
        made = balancer("small", "big", fallbacks=lists, aliases=aliases)
        assert made.registry.resolve("mini", ["big", "mini"]).model == "small"
        assert chain(made, "big", own, ["big", "mini"]) == ["big", "small"]


# --- Settings ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_the_number_of_attempts_is_set(limit: int) -> None:
    made = balancer("a", "a", "a", "a", "a", retry=Retry(attempts=limit))
    assert len(asked(made, plan(made, made.registry.pool("a")))) == limit


def test_all_requests_share_one_budget() -> None:
    made = balancer("a", "a", retry=Retry(ratio=0.0, floor=2))
    counts = [len(asked(made, plan(made, made.registry.pool("a")))) for _ in range(5)]
    assert counts == [2, 2, 1, 1, 1]


def test_other_settings_of_retries_count_at_once() -> None:
    made = balancer("a", "a", retry=Retry(ratio=0.0, floor=0))
    assert not made.budget.suffices
    made.reconfigure(Config(retry=Retry(ratio=0.5, floor=1)))
    assert made.budget.suffices
    assert (made.budget.ratio, made.budget.floor) == (0.5, 1)


def test_a_policy_that_stays_in_use_keeps_what_it_has_learnt() -> None:
    made = balancer("a", "a", routing=Routing(policy="weighted"))
    before = made.policy
    made.reconfigure(Config(routing=Routing("affinity", {"b": "weighted"})))
    assert made.policy_of("b") is before
    assert made.policy_of("a") is not before
    assert made.follows(made.registry.pool("a"))
    made.reconfigure(Config(routing=Routing("weighted")))
    assert made.policy_of("a") is made.policy_of("b") is before


def test_on_some_paths_what_a_worker_may_have_begun_is_not_tried_again() -> None:
    made = balancer("a", "a", retry=Retry(once=("/v1/rerank",)))
    for path, again in (("/v1/rerank", False), (CHAT, True)):
        attempts = plan(made, made.registry.pool("a"), path=path)
        attempts.begin(made.registry.workers[0])
        assert (attempts.retry_after(Cause.LOST) is not None) is again


@pytest.mark.parametrize(
    ("rescue", "number"),
    [(Rescue(attempts=2), 2), (Rescue(enabled=False, attempts=2), 0), (Rescue(), 5)],
)
def test_the_number_of_continuations_is_set(rescue: Rescue, number: int) -> None:
    made = balancer(*["a"] * 9, rescue=rescue)
    attempts = plan(made, made.registry.pool("a"))
    attempts.begin(made.registry.workers[8])
    count = 0
    attempts.resume()
    while attempts.retry_after(Cause.LOST) is not None:
        count += 1
        attempts.begin(choose_next(made, attempts))
        attempts.resume()
    assert count == number


# --- Retries ----------------------------------------------------------------------


def spend(budget: RetryBudget) -> int:
    """Withdraw until it refuses; return how often it did not."""
    spent = 0
    while budget.withdraw():
        spent += 1
    return spent


# --- The budget -------------------------------------------------------------------


def test_a_quiet_hub_may_retry_a_few_times() -> None:
    budget = RetryBudget(clock=Clock())
    assert spend(budget) == 3


@pytest.mark.parametrize(("requests", "retries"), [(9, 3), (10, 4), (100, 13)])
def test_requests_pay_a_tenth_of_a_retry_each(requests: int, retries: int) -> None:
    budget = RetryBudget(clock=Clock())
    for _ in range(requests):
        budget.deposit()
    assert spend(budget) == retries
    assert repr(budget) == (
        f"<RetryBudget {retries} of {3 + requests / 10:g} spent, {requests} requests>"
    )


def test_a_refused_retry_costs_nothing() -> None:
    budget = RetryBudget(ratio=1.0, floor=0, clock=Clock())
    assert not budget.withdraw()
    budget.deposit()
    assert spend(budget) == 1


def test_what_requests_paid_is_gone_with_the_window_and_so_is_the_debt() -> None:
    clock = Clock()
    budget = RetryBudget(clock=clock)
    for _ in range(1000):
        budget.deposit()
    assert spend(budget) == 103
    clock.advance(8.9)
    assert spend(budget) == 0
    clock.advance(1.1)
    assert spend(budget) == 3


def test_an_outage_makes_a_tenth_more_load_and_not_twice_as_much() -> None:
    """All fail, all are retried at once, for a minute of 100 requests a second."""
    clock = Clock()
    budget = RetryBudget(clock=clock)
    retries = 0
    for _ in range(6000):
        budget.deposit()
        retries += budget.withdraw()
        clock.advance(0.01)
    assert 0.09 * 6000 <= retries <= 0.12 * 6000


@given(
    steps=st.lists(st.sampled_from(["deposit", "withdraw", 0.25, 1.0, 3.5, 10.0])),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    floor=st.integers(0, 3),
)
def test_at_each_withdrawal_the_window_holds_no_more_retries_than_it_pays_for(
    steps: list[str | float], ratio: float, floor: int
) -> None:
    clock = Clock()
    budget = RetryBudget(ratio, floor, 10.0, clock=clock)
    requests: list[int] = []
    retries: list[int] = []
    for step in steps:
        second = int(clock())
        if isinstance(step, float):
            clock.advance(step)
        elif step == "deposit":
            budget.deposit()
            requests.append(second)
        else:
            paid = ratio * sum(at > second - 10 for at in requests) + floor
            spent = sum(at > second - 10 for at in retries)
            assert budget.withdraw() == (spent + 1 <= paid)
            if spent + 1 <= paid:
                retries.append(second)
