"""The limits of requests, which are checked once a second or by timers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from gollama_proxy.config.settings import Config, Timeouts
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.attempt import SUSPICIOUS
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.scheduling.affinity import prefixes
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.wire.answer import Prefill
from gollama_proxy.wire.description import Check
from gollama_proxy.wire.errors import Code
from tests.fakes import requests
from tests.fakes.asks import CHAT
from tests.fakes.client import request_head
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.pool import worker
from tests.fakes.replies import chat_completion, chunk, head, sse_head, timings_of
from tests.fakes.script import (
    Step,
    answer,
    chat_stream,
    expect_eof,
    read_body,
    reset,
    send,
    wait,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

ASK = {"messages": [{"role": "user", "content": "hello"}], "stream": True}


def request() -> Exchange:
    return Exchange(requests.request("POST", "/"), 0.0)


# --- Once a second ----------------------------------------------------------------


class Relay:
    """An answer that notes how it is checked."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []
        self.silent = 0.0
        self.abandoned = False
        self.error: Any = None

    def check(self, now: float, gap: float, silence: float) -> float:
        self.seen.append((now, gap, silence))
        return self.silent

    def abandon(self) -> None:
        self.abandoned = True

    def fail(self, error: Any) -> None:
        self.error = error


class Stage:
    """A proxy with one request, which has got as far as `state`."""

    def __init__(self, state: State, *, stream: bool = True) -> None:
        self.clock = Clock()
        config = Config(timeouts=Timeouts(gap=7, silence=9))
        self.proxy = Proxy(
            config,
            {},
            *[Mock()] * 8,
            ended=lambda x: None,
            clock=self.clock,
        )
        self.relay = Relay()
        self.worker: Worker = worker(clock=self.clock)
        self.x = x = request()
        x.config = config
        x.state, x.relay = state, cast(Any, self.relay)
        x.lease = self.worker.lease()
        x.body = cast(Any, SimpleNamespace(stream=stream, replayable=True))
        x.endpoint = Mock()
        x.plan = Mock()
        x.plan.has_other.return_value = False
        x.waiting_since, x.lease.allowance = self.clock(), 10.0
        x.noticed_at = 1e9  # no comments
        self.proxy._running[cast(Any, object())] = x

    def check(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.proxy.check(self.clock())


def test_an_answer_is_checked_while_it_is_relayed() -> None:
    stage = Stage(State.STREAMING)
    now = stage.clock()
    stage.check()
    stage.check(1)
    assert stage.relay.seen == [(now, 7, 9), (now + 1, 7, 9)]
    stage.x.state = State.BROKEN
    stage.check(1)
    assert len(stage.relay.seen) == 2


def test_a_connection_with_a_stream_needs_no_timer_of_idle_ones() -> None:
    stage = Stage(State.STREAMING)
    kept: list[bool] = []
    protocol = cast(Any, stage.x.request.protocol)
    protocol.keep_alive = kept.append
    stage.x.state = State.WAITING
    stage.check()
    assert kept == []
    stage.x.state = State.STREAMING
    stage.check()
    assert kept == [False]


def test_the_worker_of_a_silent_answer_is_checked() -> None:
    stage = Stage(State.STREAMING)
    checks: list[bool] = []
    stage.worker.on_suspicion = lambda: checks.append(True)
    for silent, checked in ((SUSPICIOUS, 0), (SUSPICIOUS + 1, 1)):
        stage.relay.silent = silent
        stage.check()
        assert len(checks) == checked
    assert not stage.relay.abandoned


def test_the_answers_of_a_worker_that_is_down_are_given_up() -> None:
    stage = Stage(State.STREAMING)
    for _ in range(3):
        stage.worker.observe(Check.REFUSED, "connection refused")
    stage.check()
    assert stage.relay.abandoned


def test_a_request_ends_while_it_is_checked() -> None:
    """The requests that run change under the hands of the check."""
    stage = Stage(State.STREAMING)
    stage.relay.check = lambda *_: stage.proxy._running.clear() or 0.0  # type: ignore
    stage.proxy._running[cast(Any, object())] = stage.x
    stage.check()
    assert not stage.proxy.running


def test_the_first_byte_has_a_limit() -> None:
    stage = Stage(State.WAITING, stream=False)
    stage.check(299)
    assert stage.relay.error is None
    stage.check(1)
    assert stage.relay.error.code is Code.WORKER_TIMEOUT
    assert stage.relay.error.message == "Worker w0 sent nothing within 300 s."


def test_a_slow_worker_is_left_for_another_one_and_only_then() -> None:
    stage = Stage(State.WAITING)
    stage.check(11)
    assert stage.relay.error is None
    stage.x.plan.has_other.return_value = True  # type: ignore[attr-defined]
    stage.check(1)
    assert stage.relay.error.code is Code.WORKER_SLOW


def test_a_worker_that_is_down_is_left_at_once() -> None:
    stage = Stage(State.WAITING)
    stage.x.plan.has_other.return_value = True  # type: ignore[attr-defined]
    stage.check(1)
    assert stage.relay.error is None
    for _ in range(3):
        stage.worker.observe(Check.REFUSED, "connection refused")
    stage.check(1)
    assert stage.relay.error.code is Code.WORKER_SLOW


# --- Limits that are shorter than a second ----------------------------------------


@pytest.mark.parametrize(
    "script",
    [(), (send(sse_head()),), (send(sse_head() + chunk(b":\n\n")),)],
    ids=["nothing", "head", "pings"],
)
async def test_a_short_limit_is_kept(script: tuple[Step, ...]) -> None:
    """A head is no event, and neither is a ping."""
    settings = {"timeouts__first_token": 0.1, "retry__attempts": 1}
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        worker.script(*script, expect_eof())
        response = await hub.post(CHAT, ASK)
        await worker.idle()
    assert response.status == 504
    error = response.json()["error"]
    assert error["code"] == "worker_timeout"
    assert error["message"] == f"Worker {worker.name} sent nothing within 0.1 s."


async def test_the_limit_begins_when_the_whole_body_is_out() -> None:
    settings = {
        "timeouts__first_token": 0.1,
        "limits__replay_window": 4096,
        "retry__attempts": 1,
    }
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        worker.script(read_body(), expect_eof())
        head, tail = b'{"model":"tiny","messages":[{"content":"', b'"}]}'
        length = len(head) + 9000 + len(tail)
        async with await hub.wire() as wire:
            token = ("Authorization", f"Bearer {hub.token()}")
            fields = [("Content-Length", str(length)), token]
            await wire.send(request_head("POST", CHAT, None, fields))
            await wire.send(head + b"x" * 8000)
            await worker.received()
            await asyncio.sleep(0.3)  # three times the limit
            await wire.send(b"x" * 1000 + tail)
            response = await wire.read_response()
        assert response.json()["error"]["code"] == "worker_timeout"
        assert (await worker.received()).complete


# --- What workers are chosen by, and what is recorded -----------------------------

MESSAGES = b'[{"role":"user","content":"hello"}]'
WHOLE = b'{"model":"tiny","max_tokens":7,"messages":%b}' % MESSAGES
INPUT = b'{"model":"tiny","input":"hello"}'


async def test_a_plan_has_what_is_known_of_its_request() -> None:
    asks: list[Ask] = []
    async with (
        ScriptedWorker() as first,
        ScriptedWorker() as second,
        running_hub(first, second) as hub,
    ):
        for each in (first, second):
            each.default(*answer(chat_completion("hello")))
            each.on("/v1/embeddings", *answer({"data": []}))
        hub.hub.balancer.share(b"of all hubs")
        hub.hub.proxy.observer = lambda event, x: asks.append(x.plan.ask)
        for path, body in ((CHAT, WHOLE), ("/v1/embeddings", INPUT)):
            response = await hub.post(path, body)
            assert response.status == 200
    hashes = prefixes(MESSAGES, key=b"of all hubs")
    chat = Ask("tiny", len(WHOLE), 7, "alice", hashes)
    other = Ask("tiny", len(INPUT), 0, "alice", ())
    assert asks[0].prefixes
    assert asks == [chat, chat, other, other]  # with its plan, and for an attempt


async def test_a_body_that_comes_in_pieces_may_be_sent_twice() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=2) as hub,
    ):
        worker.script(reset())
        worker.default(*answer(chat_completion("hello")))
        async with await hub.wire() as wire:
            token = ("Authorization", f"Bearer {hub.token()}")
            fields = [("Content-Length", str(len(WHOLE))), token]
            await wire.send(request_head("POST", CHAT, None, fields))
            await until(lambda: hub.hub.proxy.running)
            await wire.send(WHOLE)
            assert (await wire.read_response()).status == 200
        assert [each.body.startswith(WHOLE[:-1]) for each in worker.requests] == [
            True,
            True,
        ]


class Spans:
    """The spans of a request, which note their attempts."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, bool]] = []
        self.ends = 0

    def attempt(self, lease: Lease, *, resumes: bool) -> bytes:
        self.attempts.append((lease.worker.name, resumes))
        return b"traceparent: mine\r\n"

    def end(self, x: Exchange, asked: Any) -> None:
        self.ends += 1


async def test_a_trace_begins_with_its_request_and_names_each_attempt() -> None:
    begun: list[Exchange] = []
    spans = Spans()
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*answer(chat_completion("hello")))
        tracer = SimpleNamespace(begin=lambda x: begun.append(x) or spans)
        hub.hub.proxy.tracer = cast(Any, tracer)
        traced = [("traceparent", "theirs"), ("tracestate", "a=1")]
        assert (await hub.post(CHAT, WHOLE, headers=traced)).status == 200
        await until(lambda: spans.ends == 1)
        hub.hub.proxy.tracer = None  # there is nothing to close
        assert spans.attempts == [(worker.name, False)]
        (sent,) = worker.requests
        assert [value for name, value in sent.headers if "trace" in name] == ["mine"]
    (x,) = begun
    assert cast(Any, x.spans) is spans


async def test_a_whole_answer_is_recorded_with_its_time_and_its_worker_is_well() -> (
    None
):
    seen: list[Exchange] = []
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*answer(chat_completion("hello")))
        hub.hub.proxy.observer = lambda event, x: seen.append(x)
        assert (await hub.post(CHAT, WHOLE)).status == 200
        await until(lambda: hub.hub.recent.count == 1)
    x = seen[0]
    assert x.first_byte is not None
    assert x.lease is not None
    assert x.lease.result is Result.COMPLETE


@pytest.mark.parametrize("streams", [True, False])
async def test_the_bytes_of_an_answer_count_once_and_its_reading_is_learnt(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Exchange] = []
    learnt: list[tuple[str, Prefill]] = []

    def learn(plan: Plan, worker: Worker, reading: Prefill) -> None:
        learnt.append((worker.name, reading))

    body = WHOLE.replace(b"7,", b'7,"stream":%b,' % (b"true" if streams else b"false"))
    async with (
        ScriptedWorker() as first,
        ScriptedWorker() as second,
        running_hub(first, second) as hub,
    ):
        for each in (first, second):
            each.default(*chat_stream("a", timings=timings_of(1, prompt=15, cached=5)))
        hub.hub.proxy.observer = lambda event, x: seen.append(x)
        monkeypatch.setattr(hub.hub.balancer, "learn", learn)
        response = await hub.post(CHAT, body)
        assert response.status == 200
        await until(lambda: hub.hub.recent.count == 1)
        assert seen[0].bytes == len(response.body)
        ((name, reading),) = learnt
        assert name == response.header("x-gollama-worker")
        assert (reading.tokens, reading.cached) == (15, 5)


@pytest.mark.parametrize("model", ["tiny", "another"])
async def test_a_worker_is_checked_where_a_long_answer_ends_with_a_new_name(
    model: str,
) -> None:
    """Most of it has been passed on by then."""
    begun, rest = b'{"data":[],', b'"model":"%b"}' % model.encode()
    length = ("Content-Length", str(len(begun + rest)))
    checks: list[bool] = []
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        (known,) = hub.hub.registry.workers
        known.on_suspicion = lambda: checks.append(True)
        fields = [length, ("Content-Type", "application/json")]
        worker.script(send(head(200, fields) + begun), wait("go"), send(rest))
        async with await hub.open("/v1/embeddings", INPUT) as wire:
            await wire.read_until(b"[],")
            worker.release("go")
            await wire.read_until(b"}")
        await until(lambda: hub.hub.recent.count == 1)
        (record,) = hub.hub.recent.find()
        assert record["outcome"] == "complete"
        assert bool(checks) is (model == "another")
