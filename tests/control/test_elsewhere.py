"""What other hubs have sent is added up, and forgotten when they are silent."""

from __future__ import annotations

from typing import Any

from gollama_proxy.control.elsewhere import SILENCE, Elsewhere
from tests.fakes.clock import Clock


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


def test_each_request_is_counted_once() -> None:
    elsewhere = Elsewhere(Clock())
    for _ in range(2):  # two have arrived since the last sample of this hub
        elsewhere.take("b", sample(0, 5))
    assert elsewhere.sample("a", sample(0, 1), [])["requests"] == 11
    assert elsewhere.sample("a", sample(0, 1), [])["requests"] == 1


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
    clock.advance(SILENCE + 0.1)
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
