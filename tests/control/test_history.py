"""The last requests and the last quarter of an hour are kept, and nothing older."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.control.history import (
    SAMPLES,
    History,
    Recent,
    RunningSample,
    percentiles,
)
from gollama_proxy.telemetry.accesslog import Outcome, Record
from tests.control.test_admin import CALM, complete, error_of, get
from tests.fakes.asks import CHAT, EMBED, STREAM
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.registry import registry, trip
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

OF_WORKER = {
    *("state", "breaker", "running", "tokens_per_second"),
    *("first_token_p50", "first_token_p95"),
}


def record(number: int, route: str = CHAT, **fields: Any) -> Record:
    made = Record(str(number), "POST", route, subject="ann", status=200)
    made.outcome, made.duration = Outcome.COMPLETE, 1.0
    for name, value in fields.items():
        setattr(made, name, value)
    return made


# --- Requests that have ended -----------------------------------------------------


def test_only_the_last_requests_are_kept() -> None:
    recent = Recent(kept=3)
    for number in range(5):
        recent.add(record(number))
    recent.add(record(9, "/metrics"))
    assert [each["id"] for each in recent.find()] == ["4", "3", "2"]
    assert recent.count == 5
    assert repr(recent) == "<Recent requests=3>"
    assert [each["id"] for each in recent.find(1, subject="ann")] == ["4"]
    assert recent.find(subject="bob") == []


def test_the_end_of_a_request_is_shown_in_unix_time() -> None:
    recent, before = Recent(), time.time()
    recent.add(record(1, duration=2.0))
    [shown] = recent.find()
    assert before - 0.001 <= shown["ended"] <= time.time() + 0.001
    assert recent.find() == [shown]
    assert "started" not in shown
    assert recent.find(since=shown["ended"] + 1) == []
    assert recent.find(until=shown["ended"] - 3) == []
    assert recent.find(until=shown["ended"] - 1) == [shown]  # it ran at that time


# --- Samples ----------------------------------------------------------------------


class Kept:
    """A history with a clock, the last requests, and two workers."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.recent = Recent()
        self.history = History(self.recent, self.clock)
        self.workers = list(registry("tiny", "tiny").workers)
        self.number = 0

    def take(
        self, *running: RunningSample, waiting: int = 0, after: float = 1.0
    ) -> Any:
        """Take a sample; return the workers that have changed, by their names."""
        self.clock.advance(after)
        changed = self.history.take(running, waiting, self.workers)
        return {each["name"]: each for each in changed}

    def end(self, **fields: Any) -> None:
        """End a request on the first worker."""
        self.number += 1
        given = {"worker": "w0", "started": self.clock() - 0.5, **fields}
        self.recent.add(record(self.number, **given))

    def last(self, name: str = "") -> dict[str, Any]:
        """Return the last values of the hub, or of a worker."""
        columns = (
            self.history.of_worker(name, 1, 1) if name else self.history.of_hub(1, 1)
        )
        assert columns is not None
        return {key: values[-1] for key, values in columns.items()}


def running(
    id: str, tokens: int, first: float | None, worker: str = "w0"
) -> RunningSample:
    return RunningSample(id, 900.0, CHAT, worker, first, tokens)


def test_requests_that_ended_are_counted_once() -> None:
    kept = Kept()
    kept.end()
    kept.end()
    kept.end(outcome=Outcome.ERROR, status=502)
    kept.end(outcome=Outcome.ERROR, status=200)  # it broke off
    kept.end(outcome=Outcome.ERROR, status=400)  # a mistake of the client
    kept.end(outcome=Outcome.CLIENT_GONE, status=499)
    kept.take()
    assert (kept.last()["requests"], kept.last()["errors"]) == (6, 2)
    kept.take()
    assert (kept.last()["requests"], kept.last()["errors"]) == (0, 0)


def test_tokens_are_counted_as_they_come() -> None:
    kept = Kept()
    kept.take(running("a", 10, 0.2), running("b", 0, None, "w1"))
    assert kept.last()["tokens_per_second"] == 10
    assert kept.last("w0")["tokens_per_second"] == 10
    assert kept.last("w1")["tokens_per_second"] == 0
    kept.take(running("a", 14, 0.2), running("b", 6, 0.1, "w1"), after=2.0)
    assert kept.last("w0")["tokens_per_second"] == 2
    assert kept.last("w1")["tokens_per_second"] == 3
    kept.end(id="a", started=900.0, tokens=20)
    kept.take()
    assert kept.last("w0")["tokens_per_second"] == 6
    kept.take()
    assert kept.last("w0")["tokens_per_second"] == 0


def test_the_tokens_of_an_attempt_that_failed_before_the_answer_count_once() -> None:
    kept = Kept()
    for expected in (5, 0, 0):
        kept.take(running("a", 5, None))
        assert kept.last("w0")["tokens_per_second"] == expected
    kept.take(running("a", 7, 0.25))
    assert kept.last("w0")["tokens_per_second"] == 2
    assert kept.last("w0")["first_token_p50"] == 250
    kept.end(id="a", started=900.0, tokens=8, first_byte=0.25)
    kept.take()
    assert kept.last("w0")["tokens_per_second"] == 1


def test_an_answer_that_had_fewer_tokens_than_events_counts_nothing_back() -> None:
    kept = Kept()
    kept.take(running("a", 10, 0.2))
    kept.end(id="a", started=900.0, tokens=7)
    kept.take()
    assert kept.last()["tokens_per_second"] == 0


def test_the_first_token_of_an_answer_counts_when_it_comes() -> None:
    kept = Kept()
    kept.take(running("a", 0, None))
    assert kept.last("w0")["first_token_p50"] is None
    kept.take(running("a", 1, 0.25))
    assert kept.last("w0")["first_token_p50"] == 250
    assert kept.last("w1")["first_token_p50"] is None
    kept.end(id="a", started=900.0, first_byte=0.25)
    for first in (0.1, 0.2, 0.3):
        kept.end(first_byte=first)
    kept.end(route=EMBED, first_byte=9.0)  # which has no tokens
    kept.take()
    assert kept.last("w0")["first_token_p50"] == 200
    assert kept.last()["first_token_p95"] == 300
    kept.take()
    assert kept.last()["first_token_p95"] is None


@given(st.lists(st.floats(0, 100), min_size=1))
def test_percentiles_are_values_that_were_measured(seconds: list[float]) -> None:
    middle, high = percentiles(seconds)
    allowed = {round(each * 1000, 1) for each in seconds}
    assert {middle, high} <= allowed
    assert middle is not None
    assert high is not None
    below = [each for each in seconds if round(each * 1000, 1) <= middle]
    assert len(below) * 2 >= len(seconds)
    assert middle <= high
    assert sum(round(each * 1000, 1) > high for each in seconds) <= 0.05 * len(seconds)


def test_only_workers_that_changed_are_returned() -> None:
    kept = Kept()
    assert kept.take().keys() == {"w0", "w1"}
    assert kept.take() == {}
    trip(kept.workers[0])
    assert kept.take()["w0"]["breaker"] == "open"
    kept.take(running("a", 5, 0.1, "w1"))
    assert kept.take().keys() == {"w1"}  # its tokens per second are none again
    present = kept.history.present(kept.workers)
    assert [each["name"] for each in present] == ["w0", "w1"]
    assert present[1]["state"] == "ready"
    assert present[1].keys() >= OF_WORKER | {"hold", "slots"}


# --- The ring ---------------------------------------------------------------------


def test_a_quarter_of_an_hour_is_kept_and_no_more() -> None:
    kept = Kept()
    for number in range(SAMPLES + 50):
        kept.take(waiting=number)
    columns = kept.history.of_hub(SAMPLES, 1)
    assert columns["waiting"] == [*range(50, SAMPLES + 50)]
    assert {len(each) for each in columns.values()} == {SAMPLES}
    of_worker = kept.history.of_worker("w0", SAMPLES, 1)
    assert of_worker is not None
    assert of_worker.keys() == OF_WORKER
    assert {len(each) for each in of_worker.values()} == {SAMPLES}
    assert repr(kept.history) == f"<History samples={SAMPLES + 50} workers=2>"


def test_before_that_there_are_fewer() -> None:
    kept = Kept()
    assert kept.history.of_hub(SAMPLES, 1)["waiting"] == []
    assert kept.history.of_hub(SAMPLES, 7)["waiting"] == []
    for number in range(3):
        kept.take(waiting=number)
    assert kept.history.of_hub(SAMPLES, 1)["waiting"] == [0, 1, 2]
    assert kept.history.of_hub(2, 1)["waiting"] == [1, 2]


def test_seconds_that_were_missed_are_empty() -> None:
    kept = Kept()
    kept.take(waiting=1)
    kept.take(waiting=2, after=4.1)
    kept.take(waiting=3, after=0.9)
    waiting = kept.history.of_hub(SAMPLES, 1)["waiting"]
    assert waiting == [1, None, None, None, 2, 3]
    states = kept.history.of_worker("w0", SAMPLES, 1)
    assert states is not None
    assert states["state"] == ["ready", None, None, None, "ready", "ready"]
    kept.take(waiting=4, after=1e6)  # a machine that slept
    waiting = kept.history.of_hub(SAMPLES, 1)["waiting"]
    assert waiting == [None] * (SAMPLES - 1) + [4]


def test_a_larger_step_gives_means_and_the_trouble_within() -> None:
    kept = Kept()
    for number in range(6):
        if number == 4:
            trip(kept.workers[0])
        if number == 5:
            kept.workers[0].reset_breakers()
        for first in range(number):
            kept.end(first_byte=float(first))
        kept.take(waiting=number)
    columns = kept.history.of_hub(5, 3)
    assert columns["waiting"] == [1.5, 4]  # of two seconds, and of three
    assert columns["requests"] == [1.5, 4]
    assert columns["first_token_p95"] == [1000, 4000]
    assert columns["first_token_p50"] == [0, 1333.3]
    of_worker = kept.history.of_worker("w0", 6, 3)
    assert of_worker is not None
    assert of_worker["breaker"] == ["closed", "open"]
    assert of_worker["state"] == ["ready", "ready"]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3)), max_size=6))
def test_values_that_stay_are_all_there(runs: list[tuple[int, int]]) -> None:
    kept, expected = Kept(), list[int]()
    kept.workers = []
    for seconds, waiting in runs:
        for _ in range(seconds):
            kept.take(waiting=waiting)
        expected += [waiting] * seconds
        if waiting == 2:  # reading in between changes nothing
            kept.history.of_hub(3, 1)
    assert kept.history.of_hub(SAMPLES, 1)["waiting"] == expected[-SAMPLES:]


def test_a_worker_that_left_is_forgotten() -> None:
    kept = Kept()
    kept.take()
    gone = kept.workers.pop()
    kept.take()
    assert kept.history.names == ["w0"]
    assert kept.history.of_worker(gone.name, 1, 1) is None
    kept.workers.append(gone)
    kept.take()
    again = kept.history.of_worker(gone.name, 3, 1)
    assert again is not None
    assert again["state"] == [None, None, "ready"]


def test_more_requests_than_are_kept_are_all_counted() -> None:
    kept = Kept()
    for _ in range(1500):
        kept.end(outcome=Outcome.ERROR, status=502)
    kept.take()
    assert (kept.last()["requests"], kept.last()["errors"]) == (1500, 1000)


# --- The call ---------------------------------------------------------------------


async def test_the_history_is_kept_without_a_listener() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        await hub.post(CHAT, STREAM)
        await until(lambda: hub.hub.recent.count == 1)
        hub.hub.history.take(*hub.hub.views.sampled())
        answer = (await get(hub, "/admin/history")).json()
        assert (answer["step"], answer["workers"]) == (1, {})
        assert answer["time"] == pytest.approx(time.time(), abs=60)
        assert sum(filter(None, answer["hub"]["requests"])) == 1
        name = f"127.0.0.1:{worker.port}"
        for query in (f"worker={name}&worker={name}", "worker=*"):
            answer = (await get(hub, f"/admin/history?{query}")).json()
            [columns] = answer["workers"].values()
            assert columns.keys() == OF_WORKER
            assert columns["state"][-1] == "ready"


async def test_a_long_history_is_compressed() -> None:
    async with running_hub(ready=False) as hub:
        fields = [("Accept-Encoding", "gzip")]
        token = hub.token(scope="monitor")
        answer = await hub.get("/admin/history", token, headers=fields)
        assert answer.header("content-encoding") == "gzip"
        assert answer.header("vary") == "Accept-Encoding"
        assert "hub" in json.loads(gzip.decompress(answer.body))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("seconds=0", "seconds"),
        ("seconds=901", "seconds"),
        ("seconds=x", "seconds"),
        ("step=0", "step"),
        ("step=61", "step"),
        ("since=1", "since"),
    ],
)
async def test_a_wrong_question_names_the_field(query: str, param: str) -> None:
    async with running_hub(ready=False) as hub:
        answer = await get(hub, f"/admin/history?{query}")
        assert error_of(answer, 400)[:2] == ("invalid_value", param)


async def test_an_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gollama_proxy.control.admin._MOST_VALUES", 899)
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await until(lambda: hub.hub.history.names)
        assert error_of(await get(hub, "/admin/history?worker=*"), 400)[1] == "step"
        answer = await get(hub, "/admin/history?worker=*&step=2")
        assert answer.status == 200


async def test_a_worker_without_a_history_is_not_found() -> None:
    async with running_hub(ready=False) as hub:
        answer = await get(hub, "/admin/history?worker=no%20such")
        code, param, text = error_of(answer, 404)
        assert (code, param) == ("not_found", "worker")
        assert "'no such'" in text
