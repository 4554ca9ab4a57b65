"""Operators see what happened to a request: where it waited, was tried, and ended."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gollama_proxy.telemetry.accesslog import Step
from tests.behaviour.test_fallbacks import family
from tests.behaviour.test_rescue import BREAKS, asked, continued, pool
from tests.behaviour.test_retries import two
from tests.control.test_admin import CALM, begun, call, complete, endless, get
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import error_reply
from tests.fakes.script import reset, send
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


async def recent(hub: RunningHub, query: str = "") -> list[dict[str, Any]]:
    answer = await get(hub, f"/admin/requests{query}")
    assert answer.status == 200, answer
    requests: list[dict[str, Any]] = answer.json()["requests"]
    return requests


async def steps_of(hub: RunningHub, count: int = 1) -> list[tuple[str, str]]:
    """Return the steps of the last of `count` requests, with their workers."""
    await until(lambda: hub.hub.recent.count == count)
    [last, *_] = await recent(hub)
    times = [step["at"] for step in last["steps"]]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == last["duration"]
    return [(step["step"], step["worker"]) for step in last["steps"]]


async def reasons(hub: RunningHub) -> dict[str, str]:
    """Return the reasons of the last request, by step."""
    [last, *_] = await recent(hub)
    return {step["step"]: step["reason"] for step in last["steps"]}


async def test_a_plain_request_has_an_attempt_and_an_end() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        await hub.post(CHAT, STREAM)
        name = worker.name
        assert await steps_of(hub) == [("attempt", name), ("ended", name)]
        assert (await reasons(hub))["ended"] == "the answer is complete"
        assert all(entry[-1] == () for entry in hub.hub.recent.since(0))


async def test_a_request_that_is_refused_at_once_has_no_attempt() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        await hub.post(CHAT, {**STREAM, "model": "x"}, hub.token(models=["other"]))
        assert await steps_of(hub) == [("ended", "")]
        assert (await reasons(hub))["ended"] == "model_not_allowed"


async def test_a_request_that_waits_is_queued_first() -> None:
    async with ScriptedWorker(slots=1) as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as first:
            await begun(first)
            async with await hub.open(CHAT, STREAM):
                await until(lambda: hub.hub.queue.admission.waiting == 1)
                exchanges = (await get(hub, "/admin/exchanges")).json()["exchanges"]
                [shown] = [each for each in exchanges if each["state"] == "queued"]
                [step] = shown["steps"]
                assert (step["step"], step["worker"]) == ("queued", "")
                worker.default(*complete())
                first.close()
                name = worker.name
                assert await steps_of(hub, 2) == [
                    ("queued", ""),
                    ("attempt", name),
                    ("ended", name),
                ]
        assert (await reasons(hub))["queued"] == "every slot is taken"


async def test_a_failed_attempt_shows_the_worker_and_the_cause() -> None:
    async with two() as (first, second, hub):
        first.default(reset())
        second.default(*complete())
        await hub.post(CHAT, STREAM)
        assert await steps_of(hub) == [
            ("attempt", first.name),
            ("failed", first.name),
            ("attempt", second.name),
            ("ended", second.name),
        ]
        why = (await reasons(hub))["failed"]
        assert why.startswith("the connection was lost, or the answer is incomplete")
        for worker in (first, second):  # also one that was only tried
            assert len(await recent(hub, f"?worker={worker.name}")) == 1
        assert await recent(hub, "?worker=other") == []


async def test_the_last_failure_ends_it() -> None:
    async with two(retry__attempts=1, retry__patience=0) as (first, _second, hub):
        first.default(send(error_reply(500, "oh")))
        await hub.post(CHAT, STREAM)
        name = first.name
        assert await steps_of(hub) == [
            ("attempt", name),
            ("failed", name),
            ("ended", name),
        ]
        assert (await reasons(hub))["failed"] == "the worker answered 5xx"
        assert (await reasons(hub))["ended"] == (
            "the client got the error of the worker"
        )


async def test_a_rescue_is_shown() -> None:
    async with pool() as ([bad, good], hub):
        bad.script(*BREAKS["reset"])
        good.script(*continued())
        await asked(hub)
        assert await steps_of(hub) == [
            ("attempt", bad.name),
            ("failed", bad.name),
            ("resumed", good.name),
            ("ended", good.name),
        ]


async def test_a_fallback_is_shown() -> None:
    async with family(retry__patience=0) as (big, medium, _small, hub):
        big.default(send(error_reply(401, "no", "authentication_error")))
        await hub.post(CHAT, {**STREAM, "model": "big"})
        assert await steps_of(hub) == [
            ("attempt", big.name),
            ("failed", big.name),
            ("fell_back", medium.name),
            ("attempt", medium.name),
            ("ended", medium.name),
        ]
        found = await reasons(hub)
        assert found["failed"].startswith("the worker rejects the hub's key")
        assert found["fell_back"] == "medium instead of big"


async def test_a_cancelled_request_shows_that_it_was() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as wire:
            await begun(wire)
            [x] = hub.hub.proxy.running
            await call(hub, "DELETE", f"/admin/exchanges/{x.id}")
            assert [each[0] for each in await steps_of(hub)] == ["attempt", "ended"]
            assert (await reasons(hub))["ended"] == "request_cancelled"


async def test_a_client_that_left_is_shown() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as wire:
            await begun(wire)
        assert [each[0] for each in await steps_of(hub)] == ["attempt", "ended"]
        assert (await reasons(hub))["ended"] == "the client left"


async def test_steps_are_bounded() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM) as wire:
            await begun(wire)
            [x] = hub.hub.proxy.running
            for _ in range(1000):
                x.note(x.started, "failed", "w", "lost")
            assert len(x.steps) == 100
            assert x.steps[0] == Step(0.0, "failed", "w", "lost")


# --- A range of time --------------------------------------------------------------


async def test_requests_are_found_by_their_time() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        await hub.post(CHAT, STREAM)
        await until(lambda: hub.hub.recent.count == 1)
        now = time.time()
        for query, count in (
            (f"since={now - 60}", 1),
            (f"since={now - 60}&until={now + 60}", 1),
            (f"since={now + 60}", 0),
            (f"until={now - 60:.0f}", 0),
        ):
            assert len(await recent(hub, f"?{query}")) == count


@pytest.mark.parametrize("value", ["x", "-1", "1e9", "", "nan"])
@pytest.mark.parametrize("name", ["since", "until"])
async def test_a_wrong_time_is_refused(name: str, value: str) -> None:
    async with running_hub(ready=False) as hub:
        answer = await get(hub, f"/admin/requests?{name}={value}")
        assert answer.status == 400
        assert answer.json()["error"]["param"] == name
