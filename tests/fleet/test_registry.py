"""Which workers may answer a request, and the error if there is none."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gollama_proxy import bounded
from gollama_proxy.config.settings import (
    Breaker,
    Config,
    Health,
    Models,
    Origin,
    Queue,
    Timeouts,
    WorkerConfig,
)
from gollama_proxy.config.values import ConfigError
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.pool import RETRY_AFTER, Pool, may_use
from gollama_proxy.fleet.registry import (
    LONGEST_ABSENCE,
    MOST_ABSENT,
    Listener,
    Registry,
)
from gollama_proxy.fleet.state import Hold, Source, WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code, NoWorkerError, RequestError
from tests.fakes.cases import case
from tests.fakes.clock import Clock
from tests.fakes.registry import balancer, plan, registry, take_out, trip


def found(pool: Pool) -> tuple[str, tuple[Worker, ...]]:
    return pool.model, pool.workers


def names(pool: Pool) -> list[str]:
    return [worker.name for worker in pool.workers]


def refused(
    made: Registry, name: str | None, allowed: Sequence[str] | None = None
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        made.resolve(name, allowed)
    return caught.value


def unavailable(
    made: Registry, name: str | None, retry_after: int = RETRY_AFTER
) -> NoWorkerError:
    """Return the error of a model that no worker can serve now."""
    try:
        pool = made.resolve(name, None)
    except NoWorkerError as exc:
        error = exc
    else:
        assert not pool.available
        error = made.no_worker(pool.model, pool.workers, pool.reopens_in())
    assert (error.code, error.code.status) == (Code.NO_WORKER, 503)
    assert error.retry_after == retry_after > 0
    return error


# --- What there is ----------------------------------------------------------------


def test_other_settings_hold_for_every_worker() -> None:
    """Also for one that was removed, and still has an answer to end."""
    made = registry("a", "a")
    first, second = made.workers
    lease = second.lease("a")
    made.remove(second.name, 60.0)
    config = Config(
        breaker=Breaker(consecutive=7),
        health=Health(fall=4),
        timeouts=Timeouts(allowance=12.0, first_token=34.0),
        queue=Queue(overcommit=2),
        models=Models(aliases={"b": "a"}),
    )
    made.reconfigure(config)
    for worker in (first, second):
        assert (worker.policy, worker.health) == (config.breaker, config.health)
        assert (worker.expectations.base, worker.expectations.hard) == (12.0, 34.0)
        assert worker.overcommit == 2
    assert made.resolve("b", None).model == "a"
    added = made.add(config_of(9))
    assert (added.policy, added.health) == (config.breaker, config.health)
    lease.release(Result.COMPLETE)


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
    assert registry("a", clock=clock).workers[0].lease().taken_at == 5.0


def test_a_model_is_listed_once_however_many_serve_it() -> None:
    assert registry("b a", None, "a c").models() == ["b", "a", "c"]
    assert registry(None).models() == []
    assert registry().models() == []


def test_a_model_is_listed_while_its_workers_are_down() -> None:
    """A request for it gets the error to wait, not the one that it does not exist."""
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


def test_a_model_that_matches_a_stated_pattern_is_known_before_it_is_listed() -> None:
    made = registry("x", "a", stated=["qwen*"], aliases={"gpt": "qwen9"})
    assert made.models() == ["a"]
    for name in ("qwen3", "qwen9", "gpt"):
        assert names(made.resolve(name, None)) == ["w0"]
    assert made.resolve("gpt", None).model == "qwen9"
    assert made.resolve("qwen3", ["qwen*"]).model == "qwen3"
    assert refused(made, "qwen3", ["a"]).code is Code.MODEL_NOT_ALLOWED


def test_stated_models_are_known_before_their_worker_was_reached() -> None:
    made = registry(None, stated=["qwen", "phi"])
    assert "1 serve it (1 starting)" in unavailable(made, "qwen").message
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


def test_what_a_worker_reports_anew_is_known_at_once() -> None:
    made = registry("a", "b")
    pool = made.pool("a")
    assert made.pool("a") is pool
    assert pool.least_context is None
    first, second = made.workers
    second.observe(Check.OK, "ok", Description((Model("a", 512), Model("c"))))
    assert made.models() == ["a", "c"]
    assert names(made.pool("a")) == ["w0", "w1"]
    assert made.pool("a").least_context == 512
    first.observe(Check.OK, "ok", Description((Model("a", 256),)))
    assert made.pool("a").least_context == 256
    grown = made.pool("a")
    first.observe(Check.OK, "ok", Description((Model("a", 1024),)))
    assert made.pool("a") is grown
    assert grown.least_context == 512


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
    assert found(made.resolve("a", None)) == ("a", (made.workers[0], made.workers[2]))


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
    assert found(made.resolve("x", None)) == ("y", ())


@pytest.mark.parametrize("name", ["gpt", "gpt-4o"])
@pytest.mark.parametrize("models", [{}, {"default_model": "a"}], ids=repr)
@pytest.mark.parametrize("workers", [("a",), ("a", "a"), ("a", "b")], ids=repr)
def test_an_alias_stands_for_no_other_model_than_its_own(
    name: str, models: dict[str, Any], workers: tuple[str, ...]
) -> None:
    """While no worker serves it, there is no answer, and none of another model."""
    made = registry(*workers, aliases={"gpt": "gone", "gpt-*": "gone"}, **models)
    assert found(made.resolve(name, None)) == ("gone", ())
    assert "'gone'" in unavailable(made, name).message


def test_names_that_no_worker_serves_are_reported() -> None:
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
    assert found(made.resolve(None, None)) == ("b", ())


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


def test_a_name_that_a_client_makes_up_allows_nothing() -> None:
    for allowed, allows in [
        (["b"], True),
        (["*"], True),
        (["gpt-*"], True),  # to the letter
        (["gpt-4"], False),
        (["gpt-4*"], False),
        (["gpt-?"], False),
        (["g*"], False),
        (["a"], False),
    ]:
        for name in ["gpt-4", "gpt-4o", "gpt-*"]:
            with case((allowed, allows, name)):
                balanced = balancer("a", "b", aliases={"gpt-*": "b"})
                made = balanced.registry
                if allows:
                    assert made.resolve(name, allowed).model == "b"
                else:
                    assert refused(made, name, allowed).code is Code.MODEL_NOT_ALLOWED
                fallbacks = plan(balanced, made.pool("a"), [name], allowed)
                assert [pool.model for pool in fallbacks.pools] == ["a", "b"][
                    : 1 + allows
                ]


def test_an_alias_of_an_unserved_model_allows_only_that_model() -> None:
    made = registry("a", "b", aliases={"gpt": "gone"}, default_model="b")
    assert found(made.resolve("gpt", ["gpt"])) == ("gone", ())
    assert found(made.resolve("gpt", ["gone"])) == ("gone", ())
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
def test_errors_do_not_list_models_that_the_token_does_not_allow(
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


def test_whether_a_model_is_allowed_does_not_depend_on_its_workers() -> None:
    made = registry("a", "b")
    take_out(*made.workers)
    assert refused(made, "b", ["a"]).code is Code.MODEL_NOT_ALLOWED


# --- 503 --------------------------------------------------------------------------


def test_without_workers_the_reason_is_the_configuration() -> None:
    assert unavailable(registry(), "a").message == (
        "No worker serves the model 'a': the hub has none configured."
    )
    assert unavailable(registry(), None).message == (
        "No worker serves this request: the hub has none configured."
    )


@pytest.mark.parametrize("name", ["a", None])
def test_while_nothing_is_known_yet_clients_have_to_wait(name: str | None) -> None:
    """404 would be wrong: the model may be on a worker that is starting."""
    made = registry(None, None, None)
    take_out(made.workers[1])
    what = "the model 'a'" if name else "this request"
    assert unavailable(made, name).message == (
        f"No worker is available for {what}: "
        "3 known, none seen to serve it (2 starting, 1 down)."
    )


def test_the_error_of_a_pool_that_is_down_counts_the_states() -> None:
    made = registry("a", "a", "a", "b")
    take_out(made.workers[0], made.workers[2])
    take_out(made.workers[1], check=Check.LOADING)
    assert unavailable(made, "a").message == (
        "No worker is available for the model 'a': 3 serve it (2 down, 1 loading)."
    )


def test_the_error_of_an_unserved_default_model_counts_all_workers() -> None:
    made = registry("a", None, default_model="b")
    assert unavailable(made, None).message == (
        "No worker is available for the model 'b': "
        "2 known, none seen to serve it (1 ready, 1 starting)."
    )


def test_a_worker_that_is_not_ready_does_not_hide_the_names_that_are_known() -> None:
    made = registry("a", None)
    take_out(made.workers[0])
    assert unavailable(made, "a").message.endswith("1 serve it (1 down).")


def test_the_error_of_a_pool_that_fails_or_is_busy_names_that() -> None:
    made = registry("a", "a", "a", clock=(clock := Clock()))
    trip(made.workers[0], made.workers[1])
    made.workers[2].breaker.busy(30)
    clock.advance(5)
    trip_again = made.workers[1].breaker.permit()
    assert trip_again is not None
    trip_again.settle(False)
    assert unavailable(made, "a").message == (
        "No worker is available for the model 'a': "
        "3 serve it (1 breaker half-open, 1 breaker open, 1 busy)."
    )


def test_retry_after_is_when_the_first_worker_may_be_back() -> None:
    made = registry("a", "a", "b", clock=(clock := Clock()))
    trip(made.workers[0])
    made.workers[1].breaker.busy(30)
    unavailable(made, "a", retry_after=5)
    clock.advance(0.5)
    unavailable(made, "a", retry_after=5)
    clock.advance(3)
    unavailable(made, "a", retry_after=RETRY_AFTER)


def test_a_model_that_has_a_fallback_is_known_though_it_is_not_served() -> None:
    """Its worker may be down since the hub has started."""
    for strict in (False, True):
        made = registry("small", fallbacks={"big": ("small",)}, strict_models=strict)
        assert found(made.resolve("big", None)) == ("big", ())
        names = [pool.model for pool in made.pools_for(made.pool("big"), (), None)]
        assert names == ["big", "small"]
        assert made.models() == ["small"]
    made = registry(None, fallbacks={"big": ("small",)})
    assert unavailable(made, "big").message.endswith(
        "none seen to serve it (1 starting)."
    )


def test_a_model_with_a_fallback_must_be_allowed_as_any_other() -> None:
    made = registry("small", fallbacks={"big": ("small",)})
    assert refused(made, "big", ["small"]).code is Code.MODEL_NOT_ALLOWED


@pytest.mark.parametrize("canary", [True, False])
def test_without_canaries_the_hub_is_ready_for_the_request_that_is_the_proof(
    canary: bool,
) -> None:
    """Otherwise a load balancer that reads the readiness would never send the proof."""
    made = registry("a", clock=(clock := Clock()), breaker=Breaker(canary=canary))
    trip(made.workers[0])
    assert not made.ready
    clock.advance(10)
    assert bool(made.pool("a").available) is not canary
    assert made.ready is not canary


# --- Workers that come and go -----------------------------------------------------


class Notes(Listener):
    """Records what it is notified of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def added(self, worker: Worker) -> None:
        self.seen.append(("added", worker.name))

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        self.seen.append(("replaced", before.name, worker.name))

    def changed(self, worker: Worker) -> None:
        self.seen.append(("changed", worker.name))

    def removed(self, worker: Worker) -> None:
        assert not worker.available
        self.seen.append(("removed", worker.name))

    def gone(self, worker: Worker) -> None:
        self.seen.append(("gone", worker.name))


def config_of(number: int, name: str = "", **more: Any) -> WorkerConfig:
    host = f"10.0.0.{number}"
    origin = Origin("http", host, 8080, "")
    return WorkerConfig(f"http://{host}:8080", origin, name or f"w{number}", **more)


def see(worker: Worker, *models: str) -> None:
    worker.observe(Check.OK, "ok", Description(tuple(map(Model, models))))


def test_a_listener_is_notified_of_the_workers_that_there_are_and_of_changes() -> None:
    made, notes = registry("a", "a"), Notes()
    made.subscribe(Listener())  # one that is interested in nothing
    made.subscribe(notes)
    made.add(config_of(2))
    made.replace(config_of(1, weight=2.0))
    made.replace(config_of(1, weight=2.0))  # as it is already
    made.replace(config_of(2, "new"), "w2")
    made.replace(config_of(3, "w0"))
    made.remove("new")
    assert notes.seen == [
        ("added", "w0"),
        ("added", "w1"),
        ("added", "w2"),
        ("replaced", "w1", "w1"),
        ("replaced", "w2", "new"),
        ("removed", "w0"),
        ("gone", "w0"),
        ("added", "w0"),
        ("removed", "new"),
        ("gone", "new"),
    ]
    assert [worker.name for worker in made.workers] == ["w0", "w1"]


def test_a_pool_that_a_request_holds_follows_the_fleet() -> None:
    made = registry("a b", "a")
    pool = made.pool("a")
    see(made.add(config_of(2)), "a")
    assert names(pool) == ["w0", "w1", "w2"]
    made.remove("w1")
    assert names(pool) == ["w0", "w2"]
    see(made.replace(config_of(5, "w0")), "a")
    assert names(pool) == ["w0", "w2"]
    assert pool.workers == tuple(made.workers)
    made.remove("w0")
    made.remove("w2")
    assert (names(pool), pool.able) == ([], [])
    see(made.add(config_of(3)), "a")
    assert names(pool) == ["w3"]
    assert made.pool("a") is pool


def test_a_pool_that_was_empty_is_the_one_that_is_filled() -> None:
    """A request may wait with it for a worker to come."""
    made = registry()
    pool = made.pool("a")
    see(made.add(config_of(0)), "a")
    assert made.pool("a") is pool
    assert made.pool("a").available == made.workers


def test_a_removed_worker_is_gone_when_its_last_answer_has_ended() -> None:
    made, notes = registry("a"), Notes()
    made.subscribe(notes)
    [worker] = made.workers
    leases = [worker.lease("a") for _ in range(2)]
    made.remove("w0")
    assert (made.workers, made.leaving) == ([], [worker])
    assert (worker.available, worker.admits, worker.can_serve("a")) == (False,) * 3
    assert not worker.is_busy_with("a")
    leases[0].release(Result.COMPLETE)
    assert notes.seen[1:] == [("removed", "w0")]
    leases[1].release(Result.COMPLETE)
    assert notes.seen[2:] == [("gone", "w0")]
    assert made.leaving == []


def test_a_worker_that_comes_back_while_answers_run_is_the_same() -> None:
    made, notes = registry("a"), Notes()
    [worker] = made.workers
    lease = worker.lease("a")
    made.remove("w0")
    see(made.add(config_of(7, "w0")), "a")  # the name is free again
    assert made.add(config_of(0, "back")) is worker
    made.subscribe(notes)
    lease.release(Result.COMPLETE)
    assert notes.seen == [("added", "w0"), ("added", "back")]
    assert worker.available
    assert names(made.pool("a")) == ["w0", "back"]


def test_another_name_is_the_name_of_the_breakers_too() -> None:
    made = registry("a")
    [worker] = made.workers
    worker.breaker_of("a")
    made.replace(config_of(0, "new", slots=3, vram_gib=12.0), "w0")
    assert (worker.slots, worker.weight) == (3, 12.0)
    assert [breaker.name for breaker in worker.breakers("a")] == ["new", "new a"]


def test_models_that_are_stated_anew_are_served_at_once() -> None:
    made = registry("a")
    assert made.pool("x").workers == ()
    made.replace(config_of(0, models=("x",)))
    assert names(made.pool("x")) == ["w0"]
    assert names(made.pool("a")) == []


@pytest.mark.parametrize("other", [{"ca_file": "ca.pem"}, {"client_key": "key.pem"}])
def test_other_certificates_are_another_worker(other: dict[str, str]) -> None:
    made = registry("a")
    before = made.workers[0]
    assert made.replace(config_of(0, **other)) is not before


@pytest.mark.parametrize(
    ("clash", "text"),
    [
        (config_of(5, "w0"), "workers.name = 'w0': already the name of 'http://10.0.0"),
        (config_of(0, "w5"), "workers.url = 'http://10.0.0.0:8080': already used by"),
    ],
)
def test_a_clash_is_refused_and_changes_nothing(clash: WorkerConfig, text: str) -> None:
    made, notes = registry("a", "a"), Notes()
    made.subscribe(notes)
    with pytest.raises(ConfigError, match=re.escape(text)):
        made.add(clash)
    with pytest.raises(ConfigError, match=re.escape(text)):
        made.replace(clash, "w1")
    with pytest.raises(ConfigError, match=re.escape(text)):
        made.apply([config_of(0), clash])
    assert notes.seen == [("added", "w0"), ("added", "w1")]


def test_a_worker_that_there_is_not_cannot_be_changed() -> None:
    made = registry("a")
    changes: list[Callable[[], object]] = [
        lambda: made.remove("w5"),
        lambda: made.replace(config_of(5)),
    ]
    for change in changes:
        with pytest.raises(LookupError, match="no worker is named 'w5'"):
            change()


def test_applying_what_there_is_notifies_of_nothing() -> None:
    made, notes = registry("a", "a"), Notes()
    made.subscribe(notes)
    made.apply([config_of(1), config_of(0)])
    assert notes.seen == [("added", "w0"), ("added", "w1")]


def test_applying_keeps_what_has_its_address_and_the_places_of_names() -> None:
    made = registry("a", "a", "a")
    _, second, third = made.workers
    made.apply(
        [config_of(9), config_of(5, "w0"), config_of(2, "w1"), config_of(1, "w2")]
    )
    assert [worker.name for worker in made.workers] == ["w0", "w2", "w1", "w9"]
    assert made.workers[1:3] == [second, third]
    made.apply([])
    assert (made.workers, made.leaving) == ([], [])


def test_new_workers_come_in_batches_and_all_else_changes_behind_them() -> None:
    made = registry("a", "a")
    wanted = [config_of(0, "renamed"), *map(config_of, (2, 3, 4))]

    def present() -> list[str]:
        return [worker.name for worker in made.workers]

    assert not made.apply(wanted, most=2)
    assert present() == ["w0", "w1", "w2", "w3"]
    assert made.apply(wanted, most=2)
    assert present() == ["renamed", "w2", "w3", "w4"]


def test_a_new_worker_in_the_place_of_another_one_is_no_addition() -> None:
    made = registry("a")
    assert made.apply([config_of(5, "w0")], most=0)
    assert [(each.name, each.config.url) for each in made.workers] == [
        ("w0", config_of(5).url)
    ]


# --- Workers that come back -------------------------------------------------------


def test_a_worker_that_was_gone_comes_back_with_what_was_learnt() -> None:
    made = registry("a", "a")
    worker, breaker = made.workers[0], made.workers[0].breaker_of("a")
    trip(worker)
    breaker.busy(30)
    pace = worker.pace_of("a")
    made.hold("w0", Hold.DRAINING)
    made.remove("w0")
    assert made.leaving == []
    again = made.add(config_of(0, "again"))
    assert again is worker
    assert (again.pace_of("a"), again.breaker_of("a")) == (pace, breaker)
    assert (again.state, again.held) == (WorkerState.STARTING, Hold.NONE)
    assert (again.deadline, again.retired) == (math.inf, False)
    assert names(made.pool("a")) == ["w1"]  # it may serve another model by now
    see(again, "a")
    assert names(made.pool("a")) == ["w1", "again"]
    assert not again.available  # its breaker is as open as it was


def test_another_server_at_an_address_is_a_new_worker_after_an_hour() -> None:
    clock = Clock()
    made = registry("a", clock=clock)
    [worker] = made.workers
    made.remove("w0")
    clock.advance(LONGEST_ABSENCE - 1)
    assert made.add(config_of(0)) is worker
    made.remove("w0")
    clock.advance(LONGEST_ABSENCE)
    assert made.add(config_of(0)) is not worker


def test_only_so_many_absent_workers_are_remembered() -> None:
    made = registry("a", "a")
    first, second = made.workers
    made.remove("w0")
    made.remove("w1")
    for number in range(2, MOST_ABSENT):
        made.add(config_of(number))
        made.remove(f"w{number}")
    assert made.add(config_of(0)) is first
    made.remove("w0")  # the newest one now, and w1 is the oldest
    made.add(config_of(900))
    made.remove("w900")
    assert made.add(config_of(1)) is not second
    assert made.add(config_of(0)) is first


def test_a_pick_costs_the_same_after_a_thousand_workers_have_come_and_gone() -> None:
    """Counted in calls, as a time would depend on the machine."""
    hub = balancer("a", "a", "a")
    made = hub.registry
    request = plan(hub, made.pool("a"))

    def pick() -> int:
        """Count the calls of a few picks: they differ a little with the turns."""
        candidates = request.candidates()
        return calls(lambda: [hub.pick(request, candidates) for _ in range(30)])

    def come(numbers: range) -> int:
        return calls(lambda: [see(made.add(config_of(n)), "a") for n in numbers])

    before = pick()
    few = come(range(10, 20))
    for number in range(10, 20):
        made.remove(f"w{number}")
    for number in range(1000, 2000):
        see(made.add(config_of(number)), "a")
    assert len(made.pool("a").workers) == 1003
    for number in range(1000, 2000):
        made.remove(f"w{number}")
    assert made.pool("a").workers == tuple(made.workers)
    assert pick() <= before * 1.1
    assert come(range(20, 30)) <= few * 1.5


def calls(action: Callable[[], object]) -> int:
    """Count the calls of functions in an action."""
    count = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


# --- Workers from elsewhere than the file -----------------------------------------


def test_a_configuration_changes_only_the_workers_of_its_file() -> None:
    made = registry("a")
    added = made.add(config_of(5, "added"), Source.ADMIN)
    agent = made.add(config_of(6, "agent"), source=Source.AGENT)
    assert [w.source.value for w in made.workers] == ["file", "admin", "agent"]
    made.apply([config_of(9)])
    assert [worker.name for worker in made.workers] == ["added", "agent", "w9"]
    for clash in (config_of(7, "added"), config_of(6, "w6")):
        with pytest.raises(ConfigError, match=r"added|agent"):
            made.apply([clash])
    assert made.workers[:2] == [added, agent]
    replaced = made.replace(config_of(8, "agent"))
    assert replaced.source is Source.AGENT
    made.remove("agent")
    made.apply([config_of(8, "agent")])
    assert made.find("agent").source is Source.FILE


def test_a_worker_that_comes_back_has_the_source_that_brought_it_back() -> None:
    made = registry("a")
    lease = made.workers[0].lease("a")
    made.remove("w0")
    assert made.add(config_of(0), Source.ADMIN).source is Source.ADMIN
    lease.release(Result.COMPLETE)


# --- Workers that are held back ---------------------------------------------------


def test_a_paused_worker_gets_no_new_request_until_the_pause_ends() -> None:
    made = registry("a", "a")
    first, second = made.workers
    lease = first.lease("a")
    assert made.hold("w0", Hold.PAUSED) is first
    made.hold("w0", Hold.PAUSED)
    assert (first.held, first.deadline) == (Hold.PAUSED, math.inf)
    assert made.pool("a").available == [second]
    assert (first.available, first.admits, first.can_serve("a")) == (False,) * 3
    made.release("w0", Hold.DRAINING)  # it is paused, not draining
    assert first.held is Hold.PAUSED
    made.release("w0", Hold.PAUSED)
    made.release("w0", Hold.PAUSED)
    assert first.held is Hold.NONE
    assert made.pool("a").available == [first, second]
    lease.release(Result.COMPLETE)


def test_a_draining_worker_has_a_deadline() -> None:
    clock = Clock(5.0)
    made = registry("a", clock=clock)
    [worker] = made.workers
    assert made.hold("w0", Hold.DRAINING) is worker
    assert (worker.held, worker.deadline) == (Hold.DRAINING, 35.0)
    made.hold("w0", Hold.DRAINING, 3.0)
    assert (worker.held, worker.deadline) == (Hold.DRAINING, 8.0)
    made.release("w0", Hold.PAUSED)
    assert worker.held is Hold.DRAINING
    made.release("w0", Hold.DRAINING)
    assert (worker.held, worker.deadline) == (Hold.NONE, math.inf)
    assert made.ready


def test_the_error_for_a_held_worker_names_the_hold() -> None:
    made = registry("a", "a")
    made.hold("w0", Hold.PAUSED)
    made.hold("w1", Hold.DRAINING)
    assert "2 serve it (1 paused, 1 draining)" in str(unavailable(made, "a"))
    assert not made.ready


def test_a_change_of_what_is_visible_is_notified_once() -> None:
    made, notes = registry("a"), Notes()
    made.subscribe(notes)
    [worker] = made.workers
    changes: list[Callable[[], object]] = [
        lambda: made.hold("w0", Hold.PAUSED),
        lambda: made.release("w0", Hold.PAUSED),
        lambda: see(worker, "a", "b"),
        lambda: take_out(worker),
        lambda: see(worker, "a", "b"),
        lambda: trip(worker),
        lambda: worker.breaker_of("a"),
        lambda: [worker.breaker_of("a").record(Verdict.FAILURE) for _ in range(5)],
    ]
    for change in changes:
        notes.seen.clear()
        change()
        assert notes.seen == [("changed", "w0")]
    notes.seen.clear()
    see(worker, "a", "b")  # a check that finds nothing new
    made.release("w0", Hold.PAUSED)
    made.apply([worker.config])
    assert notes.seen == []
    made.apply([config_of(0, weight=2.0)])
    assert notes.seen == [("replaced", "w0", "w0")]


# --- Routes -----------------------------------------------------------------------


def test_a_route_is_found_anew_when_something_else_is_served() -> None:
    made = registry("a", aliases={"fast": "a"})
    assert made.resolve("fast", None) is made.resolve("fast", None)
    assert made.resolve("fast", ("fast",)).model == "a"
    assert refused(made, "fast", ("b",)).code is Code.MODEL_NOT_ALLOWED
    assert made.resolve("made up", None).model == "a"
    see(made.workers[0], "a", "b")
    assert refused(made, "made up").code is Code.MODEL_NOT_FOUND


def test_routes_for_invented_names_are_limited() -> None:
    made = registry("a")
    for number in range(bounded.MOST + 5):
        assert made.resolve(f"x{number}", None).model == "a"
    assert made.resolve("x" * 1000, None).model == "a"
    assert len(made._routes) == bounded.MOST


# --- Any order of changes ---------------------------------------------------------

NUMBERS = st.integers(0, 5)
SOURCES = st.sampled_from(Source)


class Fleet(RuleBasedStateMachine):
    """Workers come, change, are held back and go, while requests run on them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.made = registry("a", clock=self.clock)
        self.followed: dict[Worker, str] = {}  # by a listener, and their last event
        self.leases: list[Lease] = []
        self.made.subscribe(self)  # type: ignore[arg-type]

    # --- As a listener --------------------------------------------------------

    def added(self, worker: Worker) -> None:
        assert self.followed.get(worker) in (None, "removed", "gone")
        self.followed[worker] = "added"

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        assert self.followed[worker] == "added"
        assert worker.config != before

    def changed(self, worker: Worker) -> None:
        pass

    def removed(self, worker: Worker) -> None:
        assert self.followed[worker] == "added"
        self.followed[worker] = "removed"

    def gone(self, worker: Worker) -> None:
        assert self.followed[worker] == "removed"
        assert not worker.leases
        self.followed[worker] = "gone"

    # --- Steps ----------------------------------------------------------------

    @rule(number=NUMBERS, name=NUMBERS, source=SOURCES)
    def add(self, number: int, name: int, source: Source) -> None:
        config = config_of(number, f"w{name}")
        taken = [w for w in self.made.workers if w.name == config.name]
        taken += [w for w in self.made.workers if w.config.origin == config.origin]
        if taken:
            with pytest.raises(ConfigError):
                self.made.add(config, source)
        else:
            assert self.made.add(config, source).source is source

    @rule(numbers=st.sets(NUMBERS), models=st.sampled_from(["", "a", "b"]))
    def apply(self, numbers: set[int], models: str) -> None:
        listed = (models,) if models else ()
        configs = [config_of(number, models=listed) for number in numbers]
        others = [w for w in self.made.workers if w.source is not Source.FILE]
        names = {w.name for w in others} & {each.name for each in configs}
        origins = {w.config.origin for w in others} & {each.origin for each in configs}
        if names or origins:
            with pytest.raises(ConfigError):
                self.made.apply(configs)
        else:
            self.made.apply(configs)
            assert {w.config for w in self.made.workers if w not in others} == {
                *configs
            }
        assert all(worker in self.made.workers for worker in others)

    @precondition(lambda self: self.made.workers)
    @rule(
        data=st.data(), step=st.sampled_from(["remove", "paused", "draining", "free"])
    )
    def hold(self, data: st.DataObject, step: str) -> None:
        name = data.draw(st.sampled_from(self.made.workers)).name
        if step == "free":
            self.made.release(name, Hold.PAUSED)
            self.made.release(name, Hold.DRAINING)
        elif step == "remove":
            self.made.remove(name)
        else:
            self.made.hold(name, Hold(step))

    @precondition(lambda self: self.made.workers)
    @rule(data=st.data(), models=st.sampled_from(["a", "b", "a b", ""]))
    def describe(self, data: st.DataObject, models: str) -> None:
        see(data.draw(st.sampled_from(self.made.workers)), *models.split())

    @rule(model=st.sampled_from(["a", "b"]))
    def request(self, model: str) -> None:
        for worker in self.made.pool(model).available[:1]:
            assert worker in self.made.workers
            assert worker.held is Hold.NONE
            self.leases.append(worker.lease(model))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        lease.release(Result.COMPLETE)

    @rule(seconds=st.sampled_from([1.0, LONGEST_ABSENCE]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # --- What always holds ----------------------------------------------------

    @invariant()
    def workers_are_in_order_and_distinct(self) -> None:
        workers = self.made.workers
        assert len({w.name for w in workers}) == len(workers)
        assert len({w.config.origin for w in workers}) == len(workers)
        indexes = [worker.index for worker in workers]
        assert indexes == sorted(set(indexes))

    @invariant()
    def pools_have_the_workers_that_serve_their_model(self) -> None:
        for model in ("a", "b"):
            serving = tuple(w for w in self.made.workers if w.serves(model))
            assert self.made.pool(model).workers == serving

    @invariant()
    def no_answer_is_forgotten(self) -> None:
        running = {lease.worker for lease in self.leases}
        leaving = self.made.leaving
        assert {w for w in running if w not in self.made.workers} == {*leaving}
        assert len(leaving) == len({*leaving})
        assert all(worker.retired for worker in leaving)
        assert not any(worker.retired for worker in self.made.workers)
        assert [w for w, event in self.followed.items() if event == "added"] == (
            sorted(self.made.workers, key=[*self.followed].index)
        )


TestFleet = Fleet.TestCase
