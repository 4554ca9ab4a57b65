"""What operators see fits a terminal, and shows the present."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console, Group

from gollama_proxy.commands.display import (
    Overview,
    describe_model,
    hubs_of,
    span,
    workers_table,
)
from tests.fakes.clock import Clock

SPEED = {"tokens_per_second": None, "prompt_tokens_per_second": None}
WORKER: dict[str, Any] = {
    "name": "gpu",
    "state": "ready",
    "hold": "none",
    "breaker": {"state": "closed", "reason": ""},
    "slots": None,
    "running": 0,
    "models": [],
    "reason": "ok",
    "speed": SPEED,
    "last_error": None,
}
WAITING = {"model": "m", "subject": "s", "class": "batch", "position": 1}
WAITING |= {"waited": 3.0, "expected": None}
RUNNING = {"model": "m", "worker": "gpu", "subject": "s", "state": "streaming"}
RUNNING |= {"age": 90.0}


class Hub:
    """A hub that answers with what a test sets."""

    url = "http://hub"

    def __init__(self) -> None:
        self.workers: list[dict[str, Any]] = [WORKER]
        self.queue: list[dict[str, Any]] = []
        self.exchanges: list[dict[str, Any]] = []

    def call(self, method: str, path: str) -> dict[str, Any]:
        return {path: getattr(self, path)}


def printed(overview: Overview, height: int | None = None, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(Group(*overview.rows(height)))
    return capture.get()


def test_the_speed_is_what_was_generated_since_the_last_look() -> None:
    hub, clock = Hub(), Clock()
    overview = Overview(hub, clock)
    hub.exchanges = [RUNNING | {"id": "a", "tokens": 100}]
    overview.update()
    assert "tokens/s 0" in printed(overview)
    clock.advance(2.0)
    # The second one began in between; what it had before the look does not count.
    hub.exchanges = [
        RUNNING | {"id": "a", "tokens": 150},
        RUNNING | {"id": "b", "tokens": 7},
    ]
    overview.update()
    text = printed(overview)
    assert "tokens/s 25" in text
    assert "gpu   ready  0/?      25 " in text
    clock.advance(2.0)
    overview.update()
    assert "tokens/s 0" in printed(overview)


@pytest.mark.parametrize("height", [*range(4, 40, 5), 100])
def test_it_fits_the_terminal(height: int) -> None:
    hub = Hub()
    hub.workers = [WORKER | {"name": f"gpu{n}"} for n in range(30)]
    hub.queue = [WAITING | {"id": f"w{n}"} for n in range(30)]
    hub.exchanges = [RUNNING | {"id": f"r{n}", "tokens": n} for n in range(30)]
    overview = Overview(hub, Clock())
    overview.update()
    overview.error = "x" * 30
    lines = printed(overview, height, width=40).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= 40 for line in lines)
    assert len(printed(overview).splitlines()) > 90


def test_requests_that_wait_are_shown_once() -> None:
    hub = Hub()
    hub.queue = [WAITING | {"id": "next"}]
    queued = RUNNING | {"id": "next", "worker": "", "state": "queued", "tokens": 0}
    hub.exchanges = [queued]
    overview = Overview(hub, Clock())
    overview.update()
    assert printed(overview).count("next") == 1


def test_what_a_hub_sends_cannot_control_the_terminal() -> None:
    hub = Hub()
    hub.workers = [WORKER | {"reason": "\x1b[2J[red]", "state": "down"}]
    overview = Overview(hub, Clock())
    overview.update()
    assert "?[2J[red]" in printed(overview)


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        ({"state": "down", "reason": "refused"}, "refused"),
        ({"breaker": {"state": "open", "reason": "5 failed"}}, "breaker open"),
        ({"breaker": {"state": "open", "reason": "5 failed"}}, "5 failed"),
        ({"last_error": {"detail": "lost", "ago": 300.0}}, "lost (5 min ago)"),
        ({"hold": "paused"}, "ready, paused"),
        ({"slots": 4, "running": 3}, "3/4"),
    ],
)
def test_what_is_wrong_with_a_worker_is_shown(worker: Any, text: str) -> None:
    hub = Hub()
    hub.workers = [WORKER | worker]
    overview = Overview(hub, Clock())
    overview.update()
    assert text in printed(overview)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.04, "0.0 s"),
        (9.4, "9.4 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (7300.0, "2 h"),
        (1e6, "12 d"),
    ],
)
def test_a_time_has_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


def test_a_model_shows_how_far_it_is_loaded() -> None:
    assert describe_model({"name": "qwen", "progress": 0.434}) == "qwen (loading 43%)"
    assert describe_model({"name": "qwen", "progress": None}) == "qwen"


def test_it_shows_what_it_is() -> None:
    assert repr(Overview(Hub(), Clock())).startswith("<Overview of ")


# --- Several hubs -----------------------------------------------------------------


class Cluster(Hub):
    """A hub that has a store."""

    def __init__(self) -> None:
        super().__init__()
        used = {"hub": "a", "running": 1, "state": "ready", "hold": "none"}
        self.workers = [WORKER | {"hubs": [used | {"breaker": "closed"}]}]
        self.exchanges = [RUNNING | {"id": "x", "tokens": 1, "hub": "a"}]
        self.queue = [WAITING | {"id": "y", "hub": "b"}]
        self.store = {"mode": "up", "reason": ""}
        self.missing: list[str] = []

    def call(self, method: str, path: str) -> dict[str, Any]:
        if path != "hubs":
            return super().call(method, path)
        hubs = [{"hub": "a", "running": 1, "waiting": 0}]
        answer = {"store": self.store, "hubs": hubs}
        return answer | ({"missing": self.missing} if self.missing else {})


def test_the_hubs_are_shown_with_what_each_runs() -> None:
    overview = Overview(Cluster(), Clock())
    overview.update()
    lines = printed(overview).splitlines()
    assert lines[1].rstrip() == "hubs   a: 1 running"
    assert any(line.split()[-1:] == ["hub"] for line in lines)
    assert any(line.startswith("x ") and line.split()[-1] == "a" for line in lines)
    assert any(line.startswith("y ") and line.split()[-1] == "b" for line in lines)


def test_hubs_that_do_not_answer_are_named() -> None:
    hub = Cluster()
    overview = Overview(hub, Clock())
    hub.missing = ["b"]
    overview.update()
    assert "without b, which did not answer" in printed(overview)
    hub.store = {"mode": "down", "reason": "closed"}
    overview.update()
    assert "the store cannot be reached (closed): each hub goes on" in printed(overview)
    hub.store = {"mode": "probing", "reason": "connecting"}
    overview.update()
    assert "the hub is connecting to the store: each hub goes on" in printed(overview)


def test_the_hubs_of_a_worker_are_in_its_row() -> None:
    row = {"hub": "a", "running": 2, "state": "ready", "hold": "none"}
    row |= {"breaker": "closed"}
    rows = [row, row | {"hub": "b", "running": 0, "breaker": "open"}]
    worker = WORKER | {"hubs": rows, "url": "http://gpu", "since": 1.0}
    assert hubs_of(worker) == "a: 2, b: 0 (ready, breaker open)"
    titles, [cells] = workers_table([worker])
    assert titles[-1] == "hubs"
    assert [*cells][-1] == hubs_of(worker)
    assert "hubs" not in workers_table([WORKER])[0]
