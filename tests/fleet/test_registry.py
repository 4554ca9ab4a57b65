"""Which workers may answer a request, and what a client is told where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from gollama_proxy.config.settings import (
    Breaker,
    Config,
    Health,
    Models,
    Origin,
    Rescue,
    Retry,
    WorkerConfig,
)
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import RETRY_AFTER, Registry, may_use
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.scheduling.retry import Attempts, Failure
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code, NoWorkerError, RequestError
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock


def registry(
    *workers: str | None,
    clock: Clock | None = None,
    retry: Retry | None = None,
    rescue: Rescue | None = None,
    breaker: Breaker | None = None,
    stated: Sequence[str] = (),
    **models: Any,
) -> Registry:
    """Make one with workers `w0`, `w1` and so on that serve these models.

    "a b" is a worker that serves two; None one that was not reached yet.  The models of
    the first are `stated` by hand.
    """
    configs = tuple(
        WorkerConfig(
            f"http://10.0.0.{index}:8080",
            Origin("http", f"10.0.0.{index}", 8080, ""),
            f"w{index}",
            models=() if index else tuple(stated),
        )
        for index in range(len(workers))
    )
    config = Config(
        workers=configs,
        models=Models(**models),
        health=Health(fall=1),
        retry=retry or Retry(),
        rescue=rescue or Rescue(),
        breaker=breaker or Breaker(jitter=0.0),
    )
    made = Registry(config, clock or Clock())
    for worker, served in zip(made.workers, workers, strict=True):
        if served is not None:
            told = Description(tuple(Model(name) for name in served.split()))
            worker.observe(Check.OK, "ok", told)
    return made


def take_out(*workers: Worker, check: Check = Check.FAILED) -> None:
    for worker in workers:
        worker.observe(check, "by the test")
        assert not worker.available


def trip(*workers: Worker) -> None:
    for worker in workers:
        for _ in range(worker.policy.consecutive):
            worker.breaker.record(Verdict.FAILURE)
        assert not worker.available


def names(pool: Pool) -> list[str]:
    return [worker.name for worker in pool.workers]


def choose(made: Registry, name: str | None) -> Worker:
    """Choose who gets the first attempt of a request."""
    return made.choose(made.attempts(made.resolve(name, None), CHAT))


def refused(
    made: Registry, name: str | None, allowed: Sequence[str] | None = None
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        made.resolve(name, allowed)
    return caught.value


def nobody(
    made: Registry, name: str | None, retry_after: int = RETRY_AFTER
) -> NoWorkerError:
    """Ask for a model that nobody can serve now, and return what was said."""
    with pytest.raises(NoWorkerError) as caught:
        choose(made, name)
    error = caught.value
    assert (error.code, error.code.status) == (Code.NO_WORKER, 503)
    assert error.retry_after == retry_after > 0
    return error


# --- What there is ----------------------------------------------------------------


def test_workers_keep_the_order_of_the_configuration() -> None:
    made = registry("a", "b", None)
    assert [(w.name, w.index) for w in made.workers] == [
        ("w0", 0),
        ("w1", 1),
        ("w2", 2),
    ]
    assert repr(made).startswith("<Registry [<Worker w0 READY")


def test_the_hubs_clock_is_the_clock_of_its_workers() -> None:
    clock = Clock(5.0)
    assert registry("a", clock=clock).workers[0].checked_at == 5.0


def test_a_model_is_listed_once_however_many_serve_it() -> None:
    assert registry("b a", None, "a c").models() == ["b", "a", "c"]
    assert registry(None).models() == []
    assert registry().models() == []


def test_a_model_is_listed_while_its_workers_are_down() -> None:
    """A client that asks for it is told to wait, and not that it does not exist."""
    made = registry("a", "b")
    take_out(*made.workers)
    assert made.models() == ["a", "b"]


# --- Models stated by hand --------------------------------------------------------


def test_a_worker_with_stated_models_is_in_their_pools() -> None:
    made = registry("a qwen2", "a", stated=["qwen*", "b"])
    assert made.models() == ["qwen2", "b", "a"]
    assert names(made.resolve("qwen2", None)) == ["w0"]
    assert names(made.resolve("b", None)) == ["w0"]
    assert names(made.resolve("a", None)) == ["w1"]


def test_a_model_that_matches_a_stated_pattern_is_known_though_nobody_lists_it() -> (
    None
):
    made = registry("x", "a", stated=["qwen*"], aliases={"gpt": "qwen9"})
    assert made.models() == ["a"]
    for name in ("qwen3", "qwen9", "gpt"):
        assert names(made.resolve(name, None)) == ["w0"]
    assert made.resolve("gpt", None).model == "qwen9"
    assert made.resolve("qwen3", ["qwen*"]).model == "qwen3"
    assert refused(made, "qwen3", ["a"]).code is Code.MODEL_NOT_ALLOWED


def test_stated_models_are_known_before_their_worker_was_reached() -> None:
    made = registry(None, stated=["qwen", "phi"])
    assert "1 serve it (1 starting)" in nobody(made, "qwen").message
    assert refused(made, "other").code is Code.MODEL_NOT_FOUND


def test_the_aliases_are_a_copy() -> None:
    made = registry("a", aliases={"gpt": "a"})
    made.aliases()["gpt"] = "b"
    assert made.aliases() == {"gpt": "a"}


def test_a_pool_has_the_workers_that_serve_the_model_whatever_their_state() -> None:
    made = registry("a b", "b", "a", None)
    take_out(made.workers[0])
    pool = made.pool("a")
    assert (pool.model, names(pool)) == ("a", ["w0", "w2"])
    assert pool.available == [made.workers[2]]
    assert names(made.pool("A")) == []


def test_what_a_worker_tells_anew_is_known_at_once() -> None:
    made = registry("a", "b")
    pool = made.pool("a")
    assert made.pool("a") is pool
    assert made.least_context(pool) is None
    first, second = made.workers
    second.observe(Check.OK, "ok", Description((Model("a", 512), Model("c"))))
    assert made.models() == ["a", "c"]
    assert names(made.pool("a")) == ["w0", "w1"]
    assert made.least_context(made.pool("a")) == 512
    first.observe(Check.OK, "ok", Description((Model("a", 256),)))
    assert made.least_context(made.pool("a")) == 256
    grown = made.pool("a")
    first.observe(Check.OK, "ok", Description((Model("a", 1024),)))
    assert made.pool("a") is grown
    assert made.least_context(grown) == 512


def test_the_hub_is_ready_when_any_worker_is() -> None:
    made = registry("a", "a")
    take_out(made.workers[0])
    assert made.ready
    take_out(made.workers[1], check=Check.LOADING)
    assert not made.ready
    assert not registry(None).ready
    assert not registry().ready


@pytest.mark.parametrize(
    ("workers", "strict", "only"),
    [
        (("a", "a", None), False, "a"),
        (("a",), True, None),
        (("a", "b"), False, None),
        (("a b",), False, None),
        ((None,), False, None),
        ((), False, None),
    ],
)
def test_the_only_model_is_the_one_that_needs_no_name(
    workers: tuple[str | None, ...], strict: bool, only: str | None
) -> None:
    assert registry(*workers, strict_models=strict).only_model() == only


# --- Names ------------------------------------------------------------------------


def test_a_model_is_found_by_its_name() -> None:
    made = registry("a", "b", "a")
    assert made.resolve("a", None) == Pool("a", (made.workers[0], made.workers[2]))


def test_an_alias_stands_for_its_model() -> None:
    made = registry("a", "b", aliases={"gpt-4o": "b"})
    pool = made.resolve("gpt-4o", None)
    assert (pool.model, names(pool)) == ("b", ["w1"])


def test_an_alias_goes_before_a_model_of_the_same_name() -> None:
    """So that a name can be taken over without touching the workers."""
    made = registry("a", "b", aliases={"a": "b"})
    assert made.resolve("a", None).model == "b"


def test_an_alias_of_an_alias_is_no_model() -> None:
    made = registry("a", "b", aliases={"x": "y", "y": "a"})
    assert made.resolve("x", None) == Pool("y", ())


@pytest.mark.parametrize("name", ["gpt", "gpt-4o"])
@pytest.mark.parametrize("models", [{}, {"default_model": "a"}], ids=repr)
@pytest.mark.parametrize("workers", [("a",), ("a", "a"), ("a", "b")], ids=repr)
def test_an_alias_stands_for_no_other_model_than_its_own(
    name: str, models: dict[str, Any], workers: tuple[str, ...]
) -> None:
    """While nobody serves that, nobody answers, least of all another model."""
    made = registry(*workers, aliases={"gpt": "gone", "gpt-*": "gone"}, **models)
    pool = made.resolve(name, None)
    assert pool == Pool("gone", ())
    with pytest.raises(NoWorkerError, match="'gone'"):
        made.candidates(made.attempts(pool, CHAT))


def test_names_that_nobody_serves_are_told() -> None:
    made = registry(
        "a",
        "b",
        aliases={"good": "a", "gpt": "gone", "x-*": "b c"},
        fallbacks={"a": ("b", "smal"), "bgi": ("good",)},
        default_model="gpt",
    )
    assert made.unserved() == [
        "models.default_model: no worker serves 'gone'",
        "models.aliases: 'gpt': no worker serves 'gone'",
        "models.aliases: 'x-*': no worker serves 'b c'",
        "models.fallbacks: 'a': no worker serves 'smal'",
        "models.fallbacks: 'bgi': no worker serves 'bgi'",
    ]


def test_a_name_may_be_served_by_a_worker_that_was_not_reached_yet() -> None:
    made = registry("a", None, aliases={"good": "a", "gpt": "big"})
    assert made.unserved() == [
        "models.aliases: 'gpt': no worker serves 'big' (not reached yet: w1)"
    ]
    assert registry("a", aliases={"good": "a"}).unserved() == []


@pytest.mark.parametrize("name", [None, "", "gpt-4o", "A"])
def test_a_single_model_answers_to_any_name_and_to_none(name: str | None) -> None:
    """As llama-server does; clients are configured with all kinds of names."""
    assert registry("a", "a").resolve(name, None).model == "a"


@pytest.mark.parametrize("name", [None, "", "gpt-4o", "A"])
def test_the_default_model_answers_to_unknown_names_and_to_none(
    name: str | None,
) -> None:
    made = registry("a", "b", default_model="b")
    assert made.resolve(name, None).model == "b"
    assert made.resolve("a", None).model == "a"


def test_the_default_model_goes_before_the_only_one() -> None:
    """It is configured; that its worker is not reached yet does not change the name."""
    made = registry("a", None, default_model="b")
    assert made.resolve(None, None) == Pool("b", ())


def test_the_default_model_may_be_an_alias() -> None:
    made = registry("a", "b", default_model="std", aliases={"std": "b"})
    assert made.resolve(None, None).model == "b"


@pytest.mark.parametrize("default", ["", "a"])
def test_strict_models_refuse_an_unknown_name(default: str) -> None:
    made = registry("a", strict_models=True, default_model=default)
    error = refused(made, "gpt-4o")
    assert (error.code, error.param) == (Code.MODEL_NOT_FOUND, "model")
    assert made.resolve("a", None).model == "a"


def test_strict_models_still_know_aliases_and_a_default_for_no_name() -> None:
    made = registry("a", strict_models=True, default_model="a", aliases={"gpt-4o": "a"})
    assert made.resolve("gpt-4o", None).model == "a"
    assert made.resolve(None, None).model == "a"


def test_strict_models_refuse_no_name_even_where_there_is_one_model() -> None:
    error = refused(registry("a", strict_models=True), None)
    assert (error.code, error.param) == (Code.MODEL_MISSING, "model")


# --- Wildcards among the aliases --------------------------------------------------


def test_a_wildcard_catches_what_is_no_alias_and_not_served() -> None:
    table = {"*": "a", "gpt-*": "b", "gpt-4o": "a"}
    made = registry("a", "b gpt-oss", aliases=table)
    asked = {"x": "a", "gpt-4o": "a", "gpt-5": "b", "gpt-oss": "gpt-oss", "b": "b"}
    for name, model in asked.items():
        assert made.resolve(name, None).model == model
        assert made.alias_of(name) == (name if name in ("x", "gpt-4o", "gpt-5") else "")
    assert made.alias_of(None) == ""
    assert made.aliases() == {"gpt-4o": "a"}


def test_a_wildcard_leaves_the_models_alone_that_should_be_there() -> None:
    made = registry("a", None, aliases={"*": "a"}, fallbacks={"big": ("a",)})
    assert made.resolve("big", None).model == "big"
    stated = registry(None, "a", aliases={"*": "a"}, stated=["qwen*"])
    assert stated.resolve("qwen9", None).model == "qwen9"


def test_a_wildcard_goes_before_the_default_and_holds_where_models_are_strict() -> None:
    made = registry(
        "a", "b", aliases={"gpt-*": "b"}, default_model="gpt-9", strict_models=True
    )
    assert made.resolve("gpt-4", None).model == "b"
    assert made.resolve(None, None).model == "b"
    assert refused(made, "x").code is Code.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("allowed", "allows"),
    [
        (["b"], True),
        (["*"], True),
        (["gpt-*"], True),  # to the letter
        (["gpt-4"], False),
        (["gpt-4*"], False),
        (["gpt-?"], False),
        (["g*"], False),
        (["a"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt-4", "gpt-4o", "gpt-*"])
def test_a_name_that_a_client_makes_up_allows_nothing(
    name: str, allowed: list[str], allows: bool
) -> None:
    made = registry("a", "b", aliases={"gpt-*": "b"})
    if allows:
        assert made.resolve(name, allowed).model == "b"
    else:
        assert refused(made, name, allowed).code is Code.MODEL_NOT_ALLOWED
    fallbacks = made.attempts(made.pool("a"), CHAT, [name], allowed)
    assert [pool.model for pool in fallbacks.pools] == ["a", "b"][: 1 + allows]


def test_an_alias_of_what_nobody_serves_allows_only_its_own_model() -> None:
    made = registry("a", "b", aliases={"gpt": "gone"}, default_model="b")
    assert made.resolve("gpt", ["gpt"]) == Pool("gone", ())
    assert made.resolve("gpt", ["gone"]) == Pool("gone", ())
    assert refused(made, "gpt", ["b"]).code is Code.MODEL_NOT_ALLOWED


# --- 400 and 404 ------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    made = registry("b", "a", None, None, aliases={"gpt": "a"})
    error = refused(made, "it's")
    assert error.code is Code.MODEL_NOT_FOUND
    assert error.code.status == 404
    assert error.param == "model"
    assert error.message == (
        'The model "it\'s" does not exist. Available: a, b, gpt. '
        "Not reached yet: w2, w3."
    )


def test_a_missing_name_is_answered_with_the_names_there_are() -> None:
    error = refused(registry("a", "b"), None)
    assert (error.code, error.code.status) == (Code.MODEL_MISSING, 400)
    assert error.message == "`model` is missing. Available: a, b."


@pytest.mark.parametrize("name", [None, "c"])
def test_nobody_is_told_of_models_that_the_token_does_not_allow(
    name: str | None,
) -> None:
    made = registry("a1", "a2", "b", aliases={"a-gpt": "b"})
    assert "Available: a-gpt, a1, a2." in refused(made, name, ["a*"]).message
    error = refused(made, name, ["x*"])
    assert error.message.endswith("Available: nothing that your token allows.")


# --- 403 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "model", "covered"),
    [
        (None, "anything", True),
        ([], "a", False),
        (["a"], "a", True),
        (["a"], "A", False),
        (["a"], "ab", False),
        (["a*"], "ab", True),
        (["a*"], "ba", False),
        (["*"], "", True),
        (["qwen?.[57]b"], "qwen2.7b", True),
        (["qwen?.[57]b"], "qwen2.6b", False),
        (["a", "b"], "b", True),
        (["org/*"], "org/sub/model", True),
        (["a.b"], "axb", False),
    ],
)
def test_the_patterns_of_a_token_are_those_of_a_shell(
    allowed: list[str] | None, model: str, covered: bool
) -> None:
    assert may_use(allowed, model) is covered


@pytest.mark.parametrize("allowed", [["a"], ["a*"], ["x", "?"]])
def test_a_token_reaches_the_models_that_it_allows(allowed: list[str]) -> None:
    made = registry("a", "b", aliases={"gpt": "a"})
    assert made.resolve("a", allowed).model == "a"
    assert made.resolve("gpt", allowed).model == "a"


@pytest.mark.parametrize("allowed", [[], ["a"], ["B"]])
def test_a_token_does_not_reach_what_it_does_not_allow(allowed: list[str]) -> None:
    error = refused(registry("a", "b"), "b", allowed)
    assert (error.code, error.code.status) == (Code.MODEL_NOT_ALLOWED, 403)
    assert error.param == "model"
    assert error.message == "Your token does not allow the model 'b'."


def test_a_token_may_be_for_an_alias_and_not_for_the_name_behind_it() -> None:
    made = registry("a", "b", aliases={"gpt": "b"})
    assert made.resolve("gpt", ["gpt"]).model == "b"
    assert refused(made, "b", ["gpt"]).code is Code.MODEL_NOT_ALLOWED


def test_a_refusal_names_what_the_client_named() -> None:
    """And not the model behind an alias, which it may not know."""
    error = refused(registry("a", "b", aliases={"gpt": "b"}), "gpt", ["a"])
    assert error.message == "Your token does not allow the model 'gpt'."


def test_a_model_that_is_taken_for_want_of_a_name_must_be_allowed_too() -> None:
    made = registry("big", "small", default_model="big")
    error = refused(made, None, ["small"])
    assert error.message == "Your token does not allow the model 'big'."
    assert refused(registry("big"), None, ["small"]).code is Code.MODEL_NOT_ALLOWED
    assert refused(registry("big"), "", ["small"]).code is Code.MODEL_NOT_ALLOWED


@pytest.mark.parametrize("name", ["small-x", "small*", "small"])
@pytest.mark.parametrize("default", ["", "big"])
def test_an_invented_name_that_a_token_allows_is_no_way_to_another_model(
    name: str, default: str
) -> None:
    """The model that stands in for an unknown name must be allowed itself."""
    error = refused(registry("big", default_model=default), name, ["small*"])
    assert error.code is Code.MODEL_NOT_ALLOWED
    made = registry("big", default_model=default, aliases={"small-x": "big"})
    assert (
        made.resolve("small-x", ["small*"]).model == "big"
    )  # configured, not invented


def test_whether_a_model_is_allowed_does_not_depend_on_who_is_up() -> None:
    made = registry("a", "b")
    take_out(*made.workers)
    assert refused(made, "b", ["a"]).code is Code.MODEL_NOT_ALLOWED


# --- 503 --------------------------------------------------------------------------


def test_without_workers_the_reason_is_the_configuration() -> None:
    assert nobody(registry(), "a").message == (
        "No worker serves the model 'a': the hub has none configured."
    )
    assert nobody(registry(), None).message == (
        "No worker serves this request: the hub has none configured."
    )


@pytest.mark.parametrize("name", ["a", None])
def test_while_nothing_is_known_yet_a_client_is_told_to_wait(name: str | None) -> None:
    """404 would be wrong: the model may be on a worker that is starting."""
    made = registry(None, None, None)
    take_out(made.workers[1])
    what = "the model 'a'" if name else "this request"
    assert nobody(made, name).message == (
        f"No worker is available for {what}: "
        "3 known, none seen to serve it (2 starting, 1 down)."
    )


def test_a_pool_that_is_down_is_told_with_its_counts_and_states() -> None:
    made = registry("a", "a", "a", "b")
    take_out(made.workers[0], made.workers[2])
    take_out(made.workers[1], check=Check.LOADING)
    assert nobody(made, "a").message == (
        "No worker is available for the model 'a': 3 serve it (2 down, 1 loading)."
    )
    assert choose(made, "b") is made.workers[3]


def test_a_default_model_that_nobody_serves_yet_is_told_with_all_workers() -> None:
    made = registry("a", None, default_model="b")
    assert nobody(made, None).message == (
        "No worker is available for the model 'b': "
        "2 known, none seen to serve it (1 ready, 1 starting)."
    )


def test_a_worker_that_is_not_ready_does_not_hide_the_names_that_are_known() -> None:
    made = registry("a", None)
    take_out(made.workers[0])
    assert nobody(made, "a").message.endswith("1 serve it (1 down).")


def test_a_pool_that_fails_or_asks_for_a_break_is_told_so() -> None:
    made = registry("a", "a", "a", clock=(clock := Clock()))
    trip(made.workers[0], made.workers[1])
    made.workers[2].breaker.busy(30)
    clock.advance(5)
    trip_again = made.workers[1].breaker.permit()
    assert trip_again is not None
    trip_again.settle(False)
    assert nobody(made, "a").message == (
        "No worker is available for the model 'a': "
        "3 serve it (1 breaker half-open, 1 breaker open, 1 busy)."
    )


def test_a_client_is_told_to_come_back_when_the_first_of_them_may_be_there() -> None:
    made = registry("a", "a", "b", clock=(clock := Clock()))
    trip(made.workers[0])
    made.workers[1].breaker.busy(30)
    nobody(made, "a", retry_after=5)
    clock.advance(0.5)
    nobody(made, "a", retry_after=5)
    clock.advance(3)
    nobody(made, "a", retry_after=RETRY_AFTER)


# --- Choosing ---------------------------------------------------------------------


def test_available_workers_have_their_turns() -> None:
    made = registry("a", "b", "a", "a")
    assert [choose(made, "a").name for _ in range(4)] == ["w0", "w2", "w3", "w0"]


@pytest.mark.parametrize("check", [Check.FAILED, Check.LOADING])
def test_a_worker_that_is_not_ready_is_not_chosen(check: Check) -> None:
    made = registry("a", "a", "a", clock=(clock := Clock()))
    take_out(made.workers[1], check=check)
    assert {choose(made, "a").name for _ in range(6)} == {"w0", "w2"}
    made.workers[1].observe(Check.OK, "ok")
    assert made.workers[1].state is WorkerState.READY
    clock.advance(made.workers[1].policy.ramp)
    assert {choose(made, "a").name for _ in range(6)} == {"w0", "w1", "w2"}


def test_a_pool_shows_who_is_available_now_and_not_when_it_was_made() -> None:
    """Between the two a client may have waited for minutes."""
    made = registry("a", "a")
    attempts = made.attempts(made.resolve("a", None), CHAT)
    take_out(*made.workers)
    with pytest.raises(NoWorkerError):
        made.choose(attempts)
    made.workers[1].observe(Check.OK, "ok")
    assert made.choose(attempts) is made.workers[1]


def test_whoever_has_had_an_attempt_is_not_chosen_again() -> None:
    made = registry("a", "a", "a")
    attempts = made.attempts(made.pool("a"), CHAT)
    chosen = []
    for _ in range(3):
        chosen.append(made.choose(attempts).name)
        attempts.begin(made.workers[int(chosen[-1][1:])])
    assert sorted(chosen) == ["w0", "w1", "w2"]
    with pytest.raises(NoWorkerError):
        made.choose(attempts)


def test_a_worker_that_has_just_recovered_is_passed_over_now_and_then() -> None:
    """If there is another one: somebody has to take it."""
    made = registry("a", "a", "b", clock=(clock := Clock()))
    trip(made.workers[0], made.workers[2])
    clock.advance(5)
    for worker in (made.workers[0], made.workers[2]):
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
    made = registry(*["a"] * number)
    take_out(made.workers[1])
    made.workers[1].observe(Check.OK, "ok")
    assert [choose(made, "a").name for _ in range(1000)].count("w1") >= 10


# --- Fallbacks --------------------------------------------------------------------


def asked(made: Registry, attempts: Attempts) -> list[str]:
    """Have everybody fail, and tell which models were asked."""
    models = []
    pause: float | None = 0.0
    while pause is not None:
        worker = made.choose(attempts)
        models.append(attempts.pool.model)
        attempts.begin(worker)
        pause = attempts.retry_after(Failure.KEY)
    return models


def chain(
    made: Registry,
    name: str,
    fallbacks: Sequence[str] = (),
    allowed: Sequence[str] | None = None,
) -> list[str]:
    pool = made.resolve(name, allowed)
    return asked(made, made.attempts(pool, CHAT, fallbacks, allowed))


def test_the_fallbacks_of_a_model_are_asked_in_their_order() -> None:
    lists = {"big": ("medium", "small"), "medium": ("small",)}
    made = registry("small", "medium", "big", "other", fallbacks=lists)
    assert chain(made, "big") == ["big", "medium", "small"]
    assert chain(made, "medium") == ["medium", "small"]  # each has its own, no more
    assert chain(made, "small") == ["small"]


def test_a_fallback_is_chosen_when_nobody_of_the_model_is_there() -> None:
    made = registry("big", "small", fallbacks={"big": ("small",)})
    assert choose(made, "big") is made.workers[0]
    take_out(made.workers[0])
    attempts = made.attempts(made.resolve("big", None), CHAT)
    assert made.choose(attempts) is made.workers[1]
    assert attempts.pool == made.pool("small")


def test_where_nobody_of_a_fallback_is_there_the_model_asked_for_is_told() -> None:
    """And when it may be back: that of a fallback is for the fallback."""
    lists = {"big": ("small", "none")}
    made = registry("big", "small", fallbacks=lists, clock=(clock := Clock()))
    trip(made.workers[0])
    clock.advance(1)
    take_out(made.workers[1])
    assert nobody(made, "big", retry_after=4).message == (
        "No worker is available for the model 'big': 1 serve it (1 breaker open)."
    )


def test_a_model_that_has_a_fallback_is_known_though_nobody_serves_it() -> None:
    """Its worker may be down since the hub has started."""
    for strict in (False, True):
        made = registry("small", fallbacks={"big": ("small",)}, strict_models=strict)
        assert made.resolve("big", None) == Pool("big", ())
        assert choose(made, "big") is made.workers[0]
        assert made.models() == ["small"]
    made = registry(None, fallbacks={"big": ("small",)})
    assert nobody(made, "big").message.endswith("none seen to serve it (1 starting).")


def test_a_model_with_a_fallback_must_be_allowed_as_any_other() -> None:
    made = registry("small", fallbacks={"big": ("small",)})
    assert refused(made, "big", ["small"]).code is Code.MODEL_NOT_ALLOWED


def test_an_alias_counts_as_its_model_on_either_side() -> None:
    aliases = {"gpt": "big", "mini": "small"}
    for name in ("big", "gpt"):
        for other in ("small", "mini"):
            lists = {name: (other,)}
            made = registry("small", "big", fallbacks=lists, aliases=aliases)
            for asked_for in ("big", "gpt"):
                assert chain(made, asked_for) == ["big", "small"]


def test_a_clients_own_fallbacks_take_the_place_of_the_configured_ones() -> None:
    aliases = {"mini": "small"}
    lists = {"big": ("medium",)}
    made = registry("small", "medium", "big", fallbacks=lists, aliases=aliases)
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
    """A model is no fallback of its own, under whichever of its names."""
    aliases = {"gpt": "big", "mini": "small"}
    assert chain(registry("small", "big", aliases=aliases), "big", fallbacks) == models
    if "" not in fallbacks:
        lists = {"big": tuple(fallbacks)}
        made = registry("small", "big", aliases=aliases, fallbacks=lists)
        assert chain(made, "big") == models


def test_a_fallback_that_the_token_does_not_allow_is_passed_over() -> None:
    lists = {"big": ("medium", "small")}
    made = registry("small", "medium", "big", fallbacks=lists)
    assert chain(made, "big", allowed=["big", "s*"]) == ["big", "small"]
    assert chain(made, "big", ["medium"], allowed=["big", "s*"]) == ["big"]
    assert chain(made, "big", allowed=["big"]) == ["big"]


def test_a_fallback_that_the_token_allows_by_its_alias_is_asked() -> None:
    """As it would be if it were asked for in the first place."""
    aliases = {"mini": "small"}
    for lists, own in (({"big": ("mini",)}, ()), ({}, ["mini"])):
        made = registry("small", "big", fallbacks=lists, aliases=aliases)
        assert made.resolve("mini", ["big", "mini"]).model == "small"
        assert chain(made, "big", own, ["big", "mini"]) == ["big", "small"]


# --- What the settings say --------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_the_number_of_attempts_is_set(limit: int) -> None:
    made = registry("a", "a", "a", "a", "a", retry=Retry(attempts=limit))
    assert len(asked(made, made.attempts(made.pool("a"), CHAT))) == limit


def test_all_requests_share_one_budget() -> None:
    made = registry("a", "a", retry=Retry(ratio=0.0, floor=3))
    counts = [len(asked(made, made.attempts(made.pool("a"), CHAT))) for _ in range(5)]
    assert counts == [2, 2, 2, 1, 1]


def test_on_some_paths_what_a_worker_may_have_begun_is_not_tried_again() -> None:
    made = registry("a", "a", retry=Retry(once=("/v1/rerank",)))
    for path, again in (("/v1/rerank", False), (CHAT, True)):
        attempts = made.attempts(made.pool("a"), path)
        attempts.begin(made.workers[0])
        assert (attempts.retry_after(Failure.RESET) is not None) is again


@pytest.mark.parametrize(
    ("rescue", "number"),
    [(Rescue(attempts=2), 2), (Rescue(enabled=False, attempts=2), 0), (Rescue(), 5)],
)
def test_the_number_of_continuations_is_set(rescue: Rescue, number: int) -> None:
    made = registry(*["a"] * 9, rescue=rescue)
    attempts = made.attempts(made.pool("a"), CHAT)
    attempts.begin(made.workers[8])
    count = 0
    attempts.resume()
    while attempts.retry_after(Failure.RESET) is not None:
        count += 1
        attempts.begin(made.choose(attempts))
        attempts.resume()
    assert count == number


@pytest.mark.parametrize("canary", [True, False])
def test_without_canaries_the_hub_is_ready_for_the_request_that_is_the_proof(
    canary: bool,
) -> None:
    """Or whoever asks for its readiness would keep that request away for ever."""
    made = registry("a", clock=(clock := Clock()), breaker=Breaker(canary=canary))
    trip(made.workers[0])
    assert not made.ready
    clock.advance(10)
    assert bool(made.pool("a").available) is not canary
    assert made.ready is not canary
