"""What several hubs answer becomes one answer, which names the hub where it matters."""

from __future__ import annotations

from typing import Any

import pytest

from gollama_proxy.control.merging import (
    SILENCE,
    Answers,
    Elsewhere,
    merge_columns,
    merge_exchanges,
    merge_figures,
    merge_histories,
    merge_known,
    merge_models,
    merge_queues,
    merge_requests,
    merge_samples,
    merge_workers,
)
from tests.fakes.clock import Clock


def worker(name: str = "desk", **fields: Any) -> dict[str, Any]:
    """Return what a hub shows of a worker."""
    breaker = {"state": "closed", "reason": "", "since": None, "opens_in": 0.0}
    made = {
        "name": name,
        "state": "ready",
        "hold": "none",
        "breaker": breaker | {"state": fields.pop("breaker", "closed")},
        "slots": 4,
        "running": 0,
        "context": 4096,
        "build": None,
        "agent": None,
        "speed": {"tokens_per_second": None, "first_token": None},
        "last_error": None,
    }
    return made | fields


# --- Answers ----------------------------------------------------------------------


def test_an_answer_that_makes_no_sense_is_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = {"a": [worker(running=1)], "b": [{}], "c": [worker(running=2)], "d": [3]}
    answers = Answers(found, ["e"])
    [shown] = answers.merge(merge_workers)
    assert shown["running"] == 3
    assert answers.note == {"missing": ["e", "b", "d"]}
    assert caplog.messages == [
        "an answer of the hub b makes no sense",
        "an answer of the hub d makes no sense",
    ]
    assert Answers(found, []).note == {}


# --- Workers and models -----------------------------------------------------------


def test_requests_of_all_hubs_are_summed_and_shown_by_hub() -> None:
    answers = {"a": [worker(running=1)], "b": [worker(running=2)], "c": [worker()]}
    [shown] = merge_workers(answers)
    assert shown["running"] == 3
    assert shown["slots"] == 4
    assert [(each["hub"], each["running"]) for each in shown["hubs"]] == [
        ("a", 1),
        ("b", 2),
    ]


def test_a_hub_that_sees_another_state_is_named() -> None:
    answers = {"a": [worker()], "b": [worker(state="down")]}
    [shown] = merge_workers(answers)
    assert shown["state"] == "ready"
    assert shown["hubs"] == [
        {
            "hub": "b",
            "state": "down",
            "hold": "none",
            "breaker": "closed",
            "running": 0,
        }
    ]
    tripped = {"a": [worker()], "b": [worker(breaker="open")]}
    assert merge_workers(tripped)[0]["hubs"][0]["breaker"] == "open"


def test_an_idle_worker_that_all_see_alike_has_no_hubs() -> None:
    answers = {"a": [worker()], "b": [worker()]}
    assert merge_workers(answers)[0]["hubs"] == []


def test_workers_that_only_another_hub_has_come_last() -> None:
    answers = {"a": [worker("one"), worker("two")], "b": [worker("new"), worker("two")]}
    names = [each["name"] for each in merge_workers(answers)]
    assert names == ["one", "two", "new"]


def test_what_the_asked_hub_does_not_know_is_from_another() -> None:
    speed = {"tokens_per_second": 42.0, "first_token": 0.1}
    error = {"code": "x", "detail": "y", "ago": 5.0}
    newer = error | {"ago": 1.0}
    answers = {
        "a": [worker(slots=None, last_error=error)],
        "b": [worker(speed=speed, agent={"host": "desk"}, last_error=newer)],
    }
    [shown] = merge_workers(answers)
    assert shown["slots"] == 4
    assert shown["speed"] == speed
    assert shown["agent"] == {"host": "desk"}
    assert shown["last_error"] == newer


def test_slots_that_no_hub_knows_stay_unknown() -> None:
    answers = {"a": [worker(slots=None)], "b": [worker(slots=None)]}
    assert merge_workers(answers)[0]["slots"] is None


def test_one_worker_is_shown_if_a_hub_knows_it() -> None:
    assert merge_known({"a": None, "b": None}) is None
    shown = merge_known({"a": None, "b": worker(running=1), "c": worker(running=2)})
    assert shown is not None
    assert shown["running"] == 3


def test_models_count_what_waits_on_all_hubs() -> None:
    def model(waiting: int) -> dict[str, Any]:
        return {"name": "qwen", "policy": "auto", "waiting": waiting}

    merged = merge_models({"a": [model(1)], "b": [model(2)]})
    assert merged == [model(3)]


# --- Requests ---------------------------------------------------------------------


def test_requests_have_their_hub() -> None:
    answers = {"a": [{"id": "1", "age": 1.0}], "b": [{"id": "2", "age": 9.0}]}
    assert merge_exchanges(answers) == [
        {"id": "2", "age": 9.0, "hub": "b"},
        {"id": "1", "age": 1.0, "hub": "a"},
    ]


def test_the_queue_is_by_model_and_place() -> None:
    def waits(
        number: str, model: str, position: int | None, waited: float = 1.0
    ) -> dict[str, Any]:
        return {"id": number, "model": model, "position": position, "waited": waited}

    answers = {
        "a": [waits("1", "x", 1), waits("2", "x", 2)],
        "b": [waits("3", "x", None), waits("4", "x", 1, 2.0), waits("5", "w", 3)],
    }
    order = [each["id"] for each in merge_queues(answers)]
    assert order == ["5", "3", "4", "1", "2"]


def test_the_newest_of_all_requests_are_listed() -> None:
    answers = {
        "a": [{"id": "1", "ended": 5.0}, {"id": "2", "ended": 1.0}],
        "b": [{"id": "3", "ended": 4.0}],
    }
    assert [each["id"] for each in merge_requests(answers, 2)] == ["1", "3"]


# --- Samples ----------------------------------------------------------------------


def test_figures_are_summed_and_percentiles_are_not() -> None:
    one = {"requests": 2, "tokens_per_second": 1.5, "first_token_p50": 100.0}
    two = {"requests": 3, "tokens_per_second": 2.5, "first_token_p50": 300.0}
    one |= {"first_token_p95": 150.0, "errors": None}
    two |= {"first_token_p95": 400.0, "errors": None}
    assert merge_figures([one, two]) == {
        "requests": 5,
        "tokens_per_second": 4,
        "first_token_p50": 200,
        "first_token_p95": 400.0,
        "errors": None,
    }
    assert merge_figures([one]) == one


def test_sums_are_rounded_and_whole_ones_are_integers() -> None:
    def merged(*rates: float) -> str:
        return repr(merge_figures([{"tokens_per_second": rate} for rate in rates]))

    assert merged(1.5, 2.5) == "{'tokens_per_second': 4}"
    assert merged(1.25, 2.51) == "{'tokens_per_second': 3.8}"


def test_samples_of_a_worker_are_one() -> None:
    def figures(running: int, **fields: Any) -> dict[str, Any]:
        state = {"state": "ready", "hold": "none", "breaker": "closed", "slots": 4}
        return {"name": "desk", **state, "running": running, **fields}

    [merged] = merge_samples({"a": [figures(1)], "b": [figures(2, slots=None)]})
    used = [(each["hub"], each["running"]) for each in merged.pop("hubs")]
    assert used == [("a", 1), ("b", 2)]
    assert merged == figures(3)


def test_columns_end_at_the_same_moment() -> None:
    one = {"running": [1, 2, 3], "state": ["ready", None, "down"]}
    two = {"running": [10, None], "state": ["down", "ready"]}
    unknown = {"errors": [None, None], "breaker": [None, "open"]}
    assert merge_columns([unknown, unknown]) == unknown
    assert merge_columns([one, two]) == {
        "running": [1, 12, 3],
        "state": ["ready", "down", "down"],
    }
    assert merge_columns([two, one])["running"] == [1, 12, 3]
    assert merge_columns([{"running": []}, one])["running"] == [1, 2, 3]


def test_histories_have_the_workers_of_all_hubs() -> None:
    own = {"time": 5.0, "step": 1, "hub": {"requests": [1]}, "workers": {}}
    other = own | {"time": 4.5, "workers": {"desk": {"running": [1]}}}
    assert merge_histories({"a": own, "b": other}) == {
        "time": 5.0,
        "step": 1,
        "hub": {"requests": [2]},
        "workers": {"desk": {"running": [1]}},
    }


# --- Events of other hubs ---------------------------------------------------------


def figures(name: str = "desk", running: int = 0, **fields: Any) -> dict[str, Any]:
    made = {"name": name, "state": "ready", "hold": "none", "breaker": "closed"}
    rates = {"tokens_per_second": 0.0, "first_token_p50": None}
    return {**made, **rates, "slots": 4, "running": running, **fields}


def sample(running: int = 0, requests: int = 0, *workers: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"time": 1.0, "requests": requests, "errors": 0}
    made |= {"running": running, "waiting": 0, "tokens_per_second": 1.0}
    made |= {"first_token_p50": None, "first_token_p95": None}
    return {**made, "workers": [*workers]}


def test_the_figures_of_other_hubs_are_added() -> None:
    elsewhere = Elsewhere(Clock())
    elsewhere.take("b", sample(2, 1, figures(running=2)))
    assert elsewhere.changed() == {"desk"}
    shown = elsewhere.sample("a", sample(1, 1), [figures(running=1)])
    assert (shown["running"], shown["requests"]) == (3, 2)
    [worker] = shown["workers"]
    assert worker["running"] == 3
    assert [each["hub"] for each in worker["hubs"]] == ["a", "b"]
    assert [(each["hub"], each["running"]) for each in shown["hubs"]] == [
        ("a", 1),
        ("b", 2),
    ]
    assert repr(elsewhere) == "<Elsewhere hubs=1>"


def test_hubs_have_their_order_and_those_that_wait_do_not_run() -> None:
    elsewhere = Elsewhere(Clock())
    elsewhere.take("a", {**sample(7), "waiting": 3})
    shown = elsewhere.sample("b", sample(1), [])
    assert shown["hubs"] == [
        {"hub": "a", "running": 4, "waiting": 3, "tokens_per_second": 1.0},
        {"hub": "b", "running": 1, "waiting": 0, "tokens_per_second": 1.0},
    ]
    elsewhere.take("a", {**sample(), "tokens_per_second": None})
    assert elsewhere.sample("b", sample(), [])["hubs"][0] == {
        "hub": "a",
        "running": 0,
        "waiting": 0,
        "tokens_per_second": 0,
    }


def test_each_request_is_counted_once() -> None:
    elsewhere = Elsewhere(Clock())
    for _ in range(2):  # two have arrived since the last sample of this hub
        elsewhere.take("b", sample(0, 5))
    assert elsewhere.sample("a", sample(0, 1), [])["requests"] == 11
    assert elsewhere.sample("a", sample(0, 1), [])["requests"] == 1
    elsewhere.take("b", sample(0, 2) | {"errors": None})
    shown = elsewhere.sample("a", sample(0, 1), [])
    assert (shown["requests"], shown["errors"]) == (3, 0)


def test_only_what_differs_has_changed() -> None:
    elsewhere = Elsewhere(Clock())
    elsewhere.take("b", sample(0, 0, figures("one"), figures("two")))
    assert elsewhere.changed() == {"one", "two"}
    elsewhere.take("b", sample(0, 0, figures("one"), figures("two", 1)))
    assert elsewhere.changed() == {"two"}
    assert elsewhere.changed() == set()


def test_a_silent_hub_is_forgotten() -> None:
    clock = Clock()
    elsewhere = Elsewhere(clock)
    elsewhere.take("b", sample(1, 0, figures(running=1)))
    assert elsewhere.changed() == {"desk"}
    clock.advance(SILENCE)
    assert elsewhere.changed() == set()
    clock.advance(0.1)
    assert elsewhere.changed() == {"desk"}
    shown = elsewhere.sample("a", sample(0), [figures()])
    assert shown["running"] == 0
    assert shown["workers"][0]["running"] == 0
    assert [each["hub"] for each in shown["hubs"]] == ["a"]


def test_the_state_of_a_worker_elsewhere_is_noted() -> None:
    elsewhere = Elsewhere(Clock())
    breaker = {"state": "closed"}
    view = figures() | {"breaker": breaker}
    elsewhere.take_worker("b", view | {"state": "down"})  # before any sample of it
    assert elsewhere.worker("a", view)["hubs"] == []
    elsewhere.take("b", sample(1, 0, figures(running=1)))
    elsewhere.take_worker("b", view | {"breaker": {"state": "open"}, "running": 2})
    shown = elsewhere.worker("a", view)
    assert shown["running"] == 2
    [other] = shown["hubs"]
    assert (other["hub"], other["breaker"]) == ("b", "open")


def test_a_new_state_leaves_the_figures_of_a_worker_as_they_were() -> None:
    elsewhere = Elsewhere(Clock())
    elsewhere.take("b", sample(0, 0, figures(tokens_per_second=5.0)))
    for name in ("desk", "new"):
        view = figures(name) | {"breaker": {"state": "closed"}, "state": "down"}
        elsewhere.take_worker("b", view)
        [other] = elsewhere.worker("a", view | {"state": "ready"})["hubs"]
        assert (other["hub"], other["state"]) == ("b", "down")
    [shown] = elsewhere.sample("a", sample(), [figures()])["workers"]
    assert shown["tokens_per_second"] == 5
