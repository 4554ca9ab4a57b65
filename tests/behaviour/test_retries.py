"""Until a byte of an answer was sent, another worker can replace a failing one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.worker import Worker
from tests.fakes.asks import CHAT, RARELY, STREAM, WHOLE
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub, shown
from tests.fakes.pool import InOrder
from tests.fakes.replies import (
    chunk,
    error_event,
    error_reply,
    finish,
    head,
    json_reply,
    loading,
    responses,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    close,
    event_stream,
    expect_eof,
    notify,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.worker import ScriptedWorker

PAYLOADS = pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])


def with_headers(reply: bytes, *headers: tuple[str, str]) -> bytes:
    first, rest = reply.split(b"\r\n", 1)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return b"%b\r\n%b%b" % (first, lines.encode(), rest)


def busy(seconds: str | None) -> Script:
    headers = [] if seconds is None else [("Retry-After", seconds)]
    reply = error_reply(429, "later", "rate_limit_error")
    return (send(with_headers(reply, *headers)),)


def overflow() -> Script:
    return (send(error_reply(400, "too long", "exceed_context_size_error")),)


# What a worker can do instead of answering, each before a byte that could be passed on.
FAULTS: dict[str, Script] = {
    "reset": (reset(),),
    "close": (close(),),
    "half a head": (send(sse_head()[:30]), reset()),
    "a head and nothing": (send(sse_head()), reset()),
    "garbage": (send(b"SSH-2.0-OpenSSH_9.2\r\n"), close()),
    "a redirect": (send(head(302, [("Location", "/elsewhere")])), close()),
    "500": (send(error_reply(500, "oh")),),
    "502": (send(json_reply({"error": "upstream"}, 502)),),
    "504": (send(json_reply({"error": "upstream"}, 504)),),
    "half an error": (send(head(500, [("Content-Length", "99")]) + b"{"), reset()),
    "loading": (send(loading()),),
    "429": busy("30"),
    "429, and not until when": busy(None),
    "401": (send(error_reply(401, "Invalid API Key", "authentication_error")),),
    "an error for a first event": event_stream(error_event("oh")),
}


@asynccontextmanager
async def two(**settings: Any) -> AsyncIterator[tuple[Any, Any, RunningHub]]:
    """Run two workers and a hub that tries up to three times, always `first` first."""
    settings = {"retry__attempts": 3, "health__interval": RARELY, **settings}
    async with (
        ScriptedWorker() as first,
        ScriptedWorker() as second,
        running_hub(first, second, **settings) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        yield first, second, hub


def posted(hub: RunningHub, payload: dict[str, Any]) -> asyncio.Task[Response]:
    return asyncio.create_task(hub.post(CHAT, payload), name="fake client")


def records(hub: RunningHub) -> list[Worker]:
    return hub.hub.registry.workers


def failures(breaker: Breaker) -> int:
    return shown(breaker, "failed")


def answered(response: Response, worker: ScriptedWorker, attempts: int) -> bool:
    """Check that this is the good answer of that worker, after so many attempts."""
    assert response.status == 200, response.body
    assert b" towu" in response.body or b'"wu"' in response.body
    assert response.header("x-gollama-worker") == worker.name
    assert response.header("x-gollama-attempts") == str(attempts)
    return True


# --- Another worker ---------------------------------------------------------------


@PAYLOADS
@pytest.mark.parametrize("fault", FAULTS)
async def test_another_worker_answers_for_one_that_fails(
    fault: str, payload: dict[str, Any]
) -> None:
    """The client sees nothing of it but the number; each has executed it once."""
    if fault in ("a head and nothing", "an error for a first event"):
        payload = STREAM
    async with two() as (bad, good, hub):
        bad.script(*FAULTS[fault])
        assert answered(await hub.post(CHAT, payload), good, 2)
        assert (len(bad.requests), len(good.requests)) == (1, 1)
        assert bad.requests[0].body == good.requests[0].body


@PAYLOADS
async def test_another_worker_answers_for_one_that_is_gone(
    payload: dict[str, Any],
) -> None:
    async with two() as (bad, good, hub):
        await bad.down()
        assert answered(await hub.post(CHAT, payload), good, 2)
        assert (len(bad.requests), len(good.requests)) == (0, 1)


@pytest.mark.parametrize("sent", [b"", sse_head()], ids=["nothing", "a head"])
async def test_another_worker_answers_for_one_that_is_slow_to_begin(
    sent: bytes,
) -> None:
    """The first connection is closed, which ends its generation; it counts as slow."""
    async with two(clock=Clock(), timeouts__allowance=10) as (slow, good, hub):
        slow.script(send(sent), notify("here"), expect_eof())
        asking = posted(hub, STREAM)
        await slow.reached("here")
        hub.pass_time(12)
        assert answered(await asking, good, 2)
        await slow.idle()
        assert (len(slow.requests), len(good.requests)) == (1, 1)
        breaker = records(hub)[0].breaker
        assert shown(breaker, "slow") == 1
        assert failures(breaker) == 0


async def test_a_whole_answer_may_take_longer_than_the_first_event_of_a_stream() -> (
    None
):
    """Its first byte is its last: silence shows nothing about the worker."""
    settings = {"upstream__assemble": "", "timeouts__allowance": 10}
    async with two(clock=Clock(), **settings) as (first, second, hub):
        first.script(wait("go"), send(json_reply({"choices": []})))
        asking = posted(hub, WHOLE)
        await first.received()
        hub.pass_time(30)
        first.release("go")
        response = await asking
        assert response.header("x-gollama-attempts") == "1"
        assert response.json() == {"choices": []}
        assert not second.requests


async def test_after_the_hard_limit_another_worker_answers_for_a_silent_one() -> None:
    async with two(clock=Clock(), timeouts__first_token=60) as (silent, good, hub):
        silent.script(expect_eof())
        asking = posted(hub, WHOLE)
        await silent.received()
        hub.pass_time(60)
        assert answered(await asking, good, 2)
        assert (len(silent.requests), len(good.requests)) == (1, 1)
        assert failures(records(hub)[0].breaker) == 1


async def test_the_other_worker_gets_the_very_same_request() -> None:
    body = json.dumps({"messages": [], "n": 1, "model": "tiny"}, indent=3).encode()
    async with two(upstream__assemble="") as (bad, good, hub):
        bad.script(reset())
        await hub.post(CHAT, body, headers=[("traceparent", "00-1-2-03")])
        [was], [again] = bad.requests, good.requests
        assert again.body == was.body == body
        assert again.header("traceparent") == was.header("traceparent") == "00-1-2-03"


async def test_the_number_of_attempts_is_limited() -> None:
    """The last one's words are what the client gets."""
    workers = [ScriptedWorker() for _ in range(4)]
    async with (
        workers[0],
        workers[1],
        workers[2],
        workers[3],
        running_hub(*workers, retry__attempts=3, health__interval=RARELY) as hub,
    ):
        for worker in workers:
            worker.default(reset())
        response = await hub.post(CHAT, WHOLE)
        assert (response.status, response.json()["error"]["code"]) == (
            502,
            "worker_connection_lost",
        )
        assert response.header("x-gollama-attempts") == "3"
        assert sorted(len(worker.requests) for worker in workers) == [0, 1, 1, 1]


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 501])
async def test_errors_that_every_worker_would_give_are_not_retried(
    status: int,
) -> None:
    async with two() as (first, second, hub):
        first.default(send(error_reply(status, "no", "invalid_request_error")))
        response = await hub.post(CHAT, WHOLE)
        assert response.status == status
        # Once more as the client has written it: the hub has asked for a stream.
        assert response.header("x-gollama-attempts") == "2"
        assert (len(first.requests), len(second.requests)) == (2, 0)


async def test_a_stream_that_begins_with_the_clients_mistake_is_not_tried_again() -> (
    None
):
    async with two() as (first, second, hub):
        first.script(*event_stream(error_event("no", 400)))
        assert (await hub.post(CHAT, STREAM)).status == 400
        assert (len(first.requests), len(second.requests)) == (1, 0)


# --- No other worker --------------------------------------------------------------


@asynccontextmanager
async def one(**settings: Any) -> AsyncIterator[tuple[ScriptedWorker, RunningHub]]:
    settings = {"retry__attempts": 3, "health__interval": RARELY, **settings}
    async with ScriptedWorker() as worker, running_hub(worker, **settings) as hub:
        yield worker, hub


@pytest.mark.parametrize(
    "fault",
    [
        "reset",
        "close",
        "half a head",
        "half an error",
        "500",
        "502",
        "an error for a first event",
    ],
)
async def test_the_only_worker_gets_a_second_chance(fault: str) -> None:
    async with one() as (worker, hub):
        worker.script(*FAULTS[fault])
        assert answered(await hub.post(CHAT, STREAM), worker, 2)
        assert len(worker.requests) == 2


async def test_the_only_worker_gets_no_third_chance() -> None:
    async with one() as (worker, hub):
        worker.default(send(error_reply(500, "oh")))
        response = await hub.post(CHAT, WHOLE)
        assert (response.status, response.json()["error"]["message"]) == (500, "oh")
        assert len(worker.requests) == 2


@pytest.mark.parametrize("fault", ["garbage", "a redirect", "401"])
async def test_a_failure_that_the_only_worker_would_repeat_is_not_retried(
    fault: str,
) -> None:
    async with one() as (worker, hub):
        worker.default(*FAULTS[fault])
        assert (await hub.post(CHAT, WHOLE)).status == 502
        assert len(worker.requests) == 1


async def test_a_refused_connection_of_the_only_worker_is_reported_immediately() -> (
    None
):
    async with one() as (worker, hub):
        await worker.down()
        response = await hub.post(CHAT, WHOLE)
        assert response.json()["error"]["code"] == "worker_unreachable"
        assert response.header("x-gollama-attempts") == "1"


@PAYLOADS
async def test_the_only_worker_has_until_the_hard_limit_and_no_second_chance(
    payload: dict[str, Any],
) -> None:
    """The allowance applies only if there is another worker to try."""
    limits = {"timeouts__allowance": 0.02, "timeouts__first_token": 0.3}
    async with one(**limits) as (worker, hub):
        worker.default(stall())
        began = asyncio.get_running_loop().time()
        response = await hub.post(CHAT, payload)
        assert asyncio.get_running_loop().time() - began >= 0.29
        assert response.status == 504
        assert response.json()["error"]["code"] == "worker_timeout"
        assert len(worker.requests) == 1


async def test_the_only_worker_may_be_slower_than_the_allowance() -> None:
    async with one(clock=Clock(), timeouts__allowance=10) as (worker, hub):
        worker.default(wait("go"), *event_stream(role(), token("wu"), finish()))
        asking = posted(hub, STREAM)
        await worker.received()
        hub.pass_time(30)
        worker.release("go")
        assert answered(await asking, worker, 1)


async def test_a_request_waits_for_the_only_worker_if_it_is_briefly_busy() -> None:
    """As long as it asks for, and not shorter."""
    async with one() as (worker, hub):
        worker.script(*busy("1"))
        began = asyncio.get_running_loop().time()
        assert answered(await hub.post(CHAT, WHOLE), worker, 2)
        assert asyncio.get_running_loop().time() - began >= 0.99
        assert len(worker.requests) == 2


@pytest.mark.parametrize("again", ["0", "00"])
async def test_a_busy_worker_may_be_asked_again_immediately(again: str) -> None:
    async with one() as (worker, hub):
        worker.script(*busy(again))
        assert answered(await hub.post(CHAT, WHOLE), worker, 2)


@pytest.mark.parametrize("asked", ["86400", "9" * 400])
async def test_the_time_that_a_busy_worker_asks_for_is_limited(asked: str) -> None:
    """Beyond that it is not believed, so that a short limit makes it worth waiting."""
    async with one(breaker__busy_max=0.1) as (worker, hub):
        worker.script(*busy(asked))
        assert answered(await hub.post(CHAT, WHOLE), worker, 2)


async def test_a_new_request_waits_for_the_only_worker_while_it_is_busy() -> None:
    """No longer than for `retry.patience`; a longer wait is rejected at once."""
    async with one(breaker__busy_max=0.3) as (worker, hub):
        [record] = records(hub)
        record.breaker_of("tiny").busy(0.3)
        assert not record.can_serve("tiny")
        assert answered(await hub.post(CHAT, WHOLE), worker, 1)
    async with one() as (worker, hub):
        records(hub)[0].breaker_of("tiny").busy(30)
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 503
        assert b"1 busy" in response.body
        assert response.header("retry-after") == "30"
        assert not worker.requests


@pytest.mark.parametrize("status", [429, 503])
async def test_busy_with_one_model_is_not_busy_with_another(status: int) -> None:
    refuses = send(
        with_headers(error_reply(status, "later"), ("Retry-After", "30")),
    )
    async with (
        ScriptedWorker("one", "other") as worker,
        running_hub(worker, health__interval=RARELY) as hub,
    ):
        worker.script(refuses)
        refused = await hub.post(CHAT, WHOLE | {"model": "one"})
        assert refused.status == status
        for _ in range(2):
            response = await hub.post(CHAT, WHOLE | {"model": "other"})
            assert response.status == 200
        assert (await hub.post(CHAT, WHOLE | {"model": "one"})).status == 503
        assert len(worker.requests) == 3


async def test_a_worker_that_is_busy_for_long_is_not_waited_for() -> None:
    """Its 429 goes to the client with the moment to come back at."""
    async with one() as (worker, hub):
        worker.script(*busy("30"))
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 429
        assert response.header("retry-after") == "30"
        assert len(worker.requests) == 1
        # And until then it is left alone.
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 503
        assert "1 busy" in response.json()["error"]["message"]
        assert int(response.header("retry-after") or "") in (29, 30)
        assert len(worker.requests) == 1


async def test_the_worker_that_failed_last_is_tried_again() -> None:
    """Not one that is known to refuse connections."""
    async with two() as (gone, shaky, hub):
        await gone.down()
        shaky.script(reset())
        assert answered(await hub.post(CHAT, WHOLE), shaky, 3)
        assert len(shaky.requests) == 2


# --- Prompts that are too long ----------------------------------------------------


async def test_a_prompt_that_is_too_long_goes_to_a_larger_worker_and_nowhere_else() -> (
    None
):
    async with (
        ScriptedWorker(n_ctx=1024) as small,
        ScriptedWorker(n_ctx=1024) as as_small,
        ScriptedWorker(n_ctx=4096) as large,
        running_hub(
            small, as_small, large, retry__attempts=3, health__interval=RARELY
        ) as hub,
    ):
        small.default(*overflow())
        as_small.default(*overflow())
        # More often than there is a budget for: to be refused unread is cheap.
        for _ in range(12):
            response = await hub.post(CHAT, STREAM)
            assert response.status == 200
            assert response.header("x-gollama-worker") == large.name
            assert response.header("x-gollama-attempts") in ("1", "2")
        assert len(large.requests) == 12
        assert small.requests


async def test_a_prompt_that_is_too_long_for_all_is_refused_once() -> None:
    async with two() as (first, second, hub):
        first.default(*overflow())
        second.default(*overflow())
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert len(first.requests) + len(second.requests) == 1


async def test_a_smaller_worker_does_not_replace_a_larger_one_that_fails() -> None:
    async with (
        ScriptedWorker(n_ctx=1024) as small,
        ScriptedWorker(n_ctx=4096) as large,
        running_hub(small, large, retry__attempts=3, health__interval=RARELY) as hub,
    ):
        small.default(*overflow())
        large.script(reset())
        response = await hub.post(CHAT, STREAM)
        assert response.status == 200
        assert response.header("x-gollama-attempts") == "3"
        assert (len(small.requests), len(large.requests)) == (1, 2)


# --- Paths on which nothing is done twice -----------------------------------------


@pytest.mark.parametrize(
    ("fault", "again"),
    [
        ("reset", False),
        ("500", False),
        ("garbage", False),
        ("loading", True),
        ("429", True),
        ("401", True),
    ],
)
async def test_retries_of_requests_that_may_have_begun_can_be_forbidden(
    fault: str, again: bool
) -> None:
    """What it has refused unread may still go elsewhere; so may other paths."""
    async with two(retry__once=[CHAT]) as (bad, _, hub):
        bad.script(*FAULTS[fault])
        response = await hub.post(CHAT, WHOLE)
        assert response.header("x-gollama-attempts") == str(1 + again)
        assert (response.status == 200) is again
        bad.script(reset())
        body = {"input": "hello"}
        assert (await hub.post("/v1/embeddings", body)).status == 200


async def test_a_slow_worker_is_awaited_on_a_path_without_retries() -> None:
    """Although another one could take over."""
    settings = {"retry__once": [CHAT], "timeouts__allowance": 10}
    async with two(clock=Clock(), **settings) as (slow, other, hub):
        slow.script(wait("go"), *event_stream(role() + token("wu") + finish()))
        asking = posted(hub, STREAM)
        await slow.received()
        hub.pass_time(30)
        slow.release("go")
        response = await asking
        assert response.header("x-gollama-attempts") == "1"
        assert not other.requests


# --- Whose fault a 500 was --------------------------------------------------------


async def test_a_500_from_all_workers_is_blamed_on_the_request() -> None:
    """The worker's own error passes, and no breaker counts it."""
    async with two(breaker__consecutive=1) as (first, second, hub):
        for worker in (first, second):
            worker.default(send(error_reply(500, f"of {worker.name}")))
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 500
        assert response.json()["error"]["message"].startswith("of 127.0.0.1:")
        for worker in records(hub):
            assert worker.can_serve("tiny")
            assert not worker.in_doubt
            assert failures(worker.breaker) == 0
            assert failures(worker.breaker_of("tiny")) == 0


@pytest.mark.parametrize("fault", ["500", "502", "an error for a first event"])
async def test_a_500_is_blamed_on_the_worker_if_another_succeeds(
    fault: str,
) -> None:
    """It counts against the worker and this model, not against the machine."""
    async with two(breaker__consecutive=2) as (bad, good, hub):
        bad.default(*FAULTS[fault])
        record, other = records(hub)
        for count in (1, 2):
            assert record.can_serve("tiny")
            assert answered(await hub.post(CHAT, STREAM), good, 2)
            assert len(bad.requests) == count
        assert not record.can_serve("tiny")
        assert record.available
        assert not record.in_doubt
        assert other.can_serve("tiny")
        assert answered(await hub.post(CHAT, STREAM), good, 1)
        assert len(bad.requests) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_that_fails_before_its_first_word_is_retried(
    stream: bool,
) -> None:
    """Its server ends the stream in an orderly way, but without any text."""
    begun = {"id": "resp_1", "object": "response", "status": "in_progress"}
    error = {"code": "server_error", "message": "engine died"}
    created = responses("created", response=begun | {"error": None})
    failed = responses("failed", response=begun | {"status": "failed", "error": error})
    path, body = "/v1/responses", {"input": "hello", "stream": stream}
    async with two() as (bad, good, hub):
        bad.default(*event_stream(created, failed))
        reply = await hub.post(path, body)
        assert reply.status == 200
        assert reply.header("x-gollama-worker") == good.name
        assert reply.header("x-gollama-attempts") == "2"
        good.default(*event_stream(created, failed))
        reply = await hub.post(path, body)
        assert reply.status == 502
        assert reply.json()["error"]["message"] == "engine died"


async def test_a_worker_that_does_better_the_second_time_is_not_blamed() -> None:
    async with one(breaker__consecutive=1) as (worker, hub):
        worker.script(*FAULTS["500"])
        assert answered(await hub.post(CHAT, WHOLE), worker, 2)
        assert records(hub)[0].can_serve("tiny")


async def test_a_good_answer_ends_a_series_of_500s() -> None:
    async with two(breaker__consecutive=2) as (bad, good, hub):
        for _ in range(3):
            bad.script(*FAULTS["500"])
            assert answered(await hub.post(CHAT, WHOLE), good, 2)
            assert answered(await hub.post(CHAT, WHOLE), bad, 1)
        assert records(hub)[0].can_serve("tiny")


# --- When it is too late ----------------------------------------------------------


async def test_nothing_is_retried_after_the_first_byte() -> None:
    async with two(rescue__enabled=False) as (bad, good, hub):
        bad.script(send(sse_head() + chunk(role() + token("wu"))), stall())
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event()
            await bad.down()
            ending = await wire.read_to_end()
        assert not ending.clean
        assert b"worker_connection_lost" in ending.raw
        assert not good.requests


async def test_a_whole_answer_that_is_cut_is_not_tried_again() -> None:
    """Its status was out."""
    async with two() as (bad, good, hub):
        bad.script(send(head(200, [("Content-Length", "100")]) + b"{"), reset())
        async with await hub.open(CHAT, WHOLE) as wire:
            ending = await wire.read_to_end()
        assert not ending.clean
        assert not good.requests


@pytest.mark.parametrize(
    "fault", ["reset", "500", "loading", "429", "garbage", "overflow"]
)
async def test_a_body_beyond_the_replay_window_is_not_tried_again(fault: str) -> None:
    """It is not there any more.

    A smaller one may be complete, in buffers, when the first attempt begins.
    """
    async with two(limits__replay_window=4096) as (bad, good, hub):
        bad.default(*({**FAULTS, "overflow": overflow()}[fault]))
        payload = {"model": "tiny", "messages": [], "padding": "x" * 1_000_000}
        response = await hub.post(CHAT, payload)
        assert response.status >= 400
        assert response.header("x-gollama-attempts") == "1"
        assert not good.requests


async def test_a_client_that_leaves_while_the_hub_waits_is_not_served() -> None:
    async with one() as (worker, hub):
        worker.script(*busy("4"), notify("begun"))
        async with await hub.open(CHAT, WHOLE) as wire:
            await worker.reached("begun")
            await worker.idle()
            wire.abort()
        # Leaving the hub's block finds no task that waits.
    assert len(worker.requests) == 1


# --- The budget -------------------------------------------------------------------

UNBREAKABLE = {
    "breaker__consecutive": 1000,
    "breaker__minimum_calls": 10_000,
    "health__fall": 100,
}


@pytest.mark.parametrize("fault", ["reset", "500", "garbage"])
async def test_an_outage_is_not_multiplied(fault: str) -> None:
    """Of 100 requests a tenth may be tried again, and three on top."""
    settings = {"clock": Clock(), "retry__floor": 3, **UNBREAKABLE}
    async with two(**settings) as (first, second, hub):
        for worker in (first, second):
            worker.default(*FAULTS[fault])
        responses = await asyncio.gather(*(hub.post(CHAT, WHOLE) for _ in range(100)))
        assert {response.status for response in responses} <= {500, 502}
        attempts = len(first.requests) + len(second.requests)
        assert attempts == sum(
            int(response.header("x-gollama-attempts") or "") for response in responses
        )
        assert 100 + 3 <= attempts <= 100 + 10 + 3


@pytest.mark.parametrize("fault", ["gone", "loading"])
async def test_failures_that_cost_a_worker_nothing_use_no_retry_budget(
    fault: str,
) -> None:
    async with two(retry__ratio=0, retry__floor=0, **UNBREAKABLE) as (bad, good, hub):
        if fault == "gone":
            await bad.down()
        bad.default(send(loading()))
        assert answered(await hub.post(CHAT, WHOLE), good, 2)


async def test_a_quiet_hub_can_afford_a_few_retries() -> None:
    async with two(retry__ratio=0, retry__floor=2, **UNBREAKABLE) as (bad, good, hub):
        bad.default(reset())
        for _ in range(2):
            assert answered(await hub.post(CHAT, WHOLE), good, 2)
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 502
        assert response.header("x-gollama-attempts") == "1"
        assert len(good.requests) == 2
