"""A request keeps its place in the trace of its client, at workers and in records."""

from __future__ import annotations

import io
import json
import logging

import pytest

from gollama_proxy.telemetry import logs
from gollama_proxy.telemetry.lines import JsonFormatter
from gollama_proxy.telemetry.logs import BatchHandler
from tests.behaviour.test_retries import two
from tests.behaviour.test_steps import recent
from tests.control.test_admin import CALM, begun, complete, endless, get
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.script import reset
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
TRACED = [("Traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2,,")]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Return the program's log, in JSON."""
    stream = io.StringIO()
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [BatchHandler(stream, JsonFormatter())])
    root.setLevel(logging.INFO)
    return stream


async def test_a_worker_gets_the_trace_as_the_client_has_sent_it() -> None:
    async with two() as (bad, good, hub):
        bad.script(reset())
        await hub.post(CHAT, STREAM, headers=TRACED)
        for [request] in bad.requests, good.requests:
            assert [pair for pair in request.headers if "trace" in pair[0]] == [
                (name.lower(), value) for name, value in TRACED
            ]


async def test_no_trace_is_begun_for_a_client_that_has_none(log: io.StringIO) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        worker.default(*complete())
        await hub.post(CHAT, STREAM)
        await hub.post(CHAT, STREAM, headers=[("traceparent", PARENT.upper())])
        await until(lambda: hub.hub.recent.count == 2)
        assert [shown["trace"] for shown in await recent(hub)] == ["", ""]
    logs.flush()
    assert "trace" not in log.getvalue()


async def test_operators_see_the_trace_of_a_request(log: io.StringIO) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        endless(worker)
        async with await hub.open(CHAT, STREAM, headers=TRACED) as client:
            await begun(client)
            [shown] = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert shown["trace"] == TRACE
        await until(lambda: hub.hub.recent.count == 1)
        [shown] = await recent(hub, f"?trace={TRACE}")
        assert shown["trace"] == TRACE
        assert await recent(hub, f"?trace={TRACE[::-1]}") == []
    logs.flush()
    entries = map(json.loads, log.getvalue().splitlines())
    [line] = [each for each in entries if each.get("route") == CHAT]
    assert line["trace"] == TRACE


async def test_the_line_about_a_bug_has_the_trace(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **CALM) as hub:
        monkeypatch.setattr(hub.hub.registry, "resolve", None)
        response = await hub.post(CHAT, STREAM, headers=TRACED)
        assert response.status == 500
    entries = map(json.loads, log.getvalue().splitlines())
    [line] = [each for each in entries if "exception" in each]
    assert line["trace"] == TRACE
    assert line["message"] == f"request {response.header('x-request-id')} failed"
