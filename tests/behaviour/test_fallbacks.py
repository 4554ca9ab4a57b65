"""When no worker of a model can answer, its fallbacks do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.fleet.worker import Worker
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.pool import InOrder
from tests.fakes.replies import error_event, error_reply, loading, not_found
from tests.fakes.script import (
    Script,
    answer,
    chat_stream,
    event_stream,
    expect_eof,
    reset,
    send,
)
from tests.fakes.worker import ScriptedWorker


def sent(payload: dict[str, Any], model: str) -> dict[str, Any]:
    """Return what a worker is asked for; one piece is assembled from a stream."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return payload | {"model": model} | ({} if payload.get("stream") else streamed)


@asynccontextmanager
async def family(
    **settings: Any,
) -> AsyncIterator[tuple[ScriptedWorker, ScriptedWorker, ScriptedWorker, RunningHub]]:
    """Run a hub with a big, a medium and a small model, and as many workers."""
    settings = {
        "models__fallbacks": "big=medium|small",
        "retry__attempts": 2,
        "health__interval": 3600,
        **settings,
    }
    async with (
        ScriptedWorker("big") as big,
        ScriptedWorker("medium") as medium,
        ScriptedWorker("small") as small,
        running_hub(big, medium, small, **settings) as hub,
    ):
        yield big, medium, small, hub


def answered(response: Response, worker: ScriptedWorker, attempts: int) -> bool:
    """Check that the answer comes from that worker and names the worker's model."""
    assert response.status == 200, response.body
    assert response.header("x-gollama-worker") == worker.name
    assert response.header("x-gollama-attempts") == str(attempts)
    assert f'"model":"{worker.models[0]}"'.encode() in response.body
    return True


def worker_of(hub: RunningHub, worker: ScriptedWorker) -> Worker:
    """Find the record of a worker."""
    return next(w for w in hub.hub.registry.workers if w.name == worker.name)


FAULTS: dict[str, Script] = {
    "reset": (reset(),),
    "loading": (send(loading()),),
    "429": (send(error_reply(429, "later", "rate_limit_error")),),
    "500": (send(error_reply(500, "oh")),),
    "401": (send(error_reply(401, "no", "authentication_error")),),
}


@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fallback_answers_when_the_attempts_are_used_up(
    fault: str, payload: dict[str, Any]
) -> None:
    async with family(retry__patience=0) as (big, medium, small, hub):
        big.default(*FAULTS[fault])
        again = 2 if fault in ("reset", "500") else 1
        response = await hub.post(CHAT, payload | {"model": "big"})
        assert answered(response, medium, again + 1)
        assert len(big.requests) == again
        assert medium.requests[0].json() == sent(payload, "medium")
        assert not small.requests


async def test_a_fallback_answers_when_no_worker_is_up() -> None:
    async with family() as (big, medium, small, hub):
        await big.down()
        await medium.down()
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, small, 3)


async def test_a_model_that_no_worker_has_ever_served_has_its_fallback() -> None:
    """Its machine was off when the hub was started."""
    async with (
        ScriptedWorker("big", up=False) as big,
        ScriptedWorker("small") as small,
        running_hub(big, small, models__fallbacks="big=small") as hub,
    ):
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, small, 1)


async def test_a_fallback_takes_over_when_the_first_token_is_overdue() -> None:
    settings = {"clock": Clock(), "timeouts__allowance": 1}
    async with family(**settings) as (big, medium, _, hub):
        big.script(expect_eof())
        asking = asyncio.create_task(hub.post(CHAT, STREAM | {"model": "big"}))
        await big.received()
        hub.pass_time(3)
        assert answered(await asking, medium, 2)
        await big.idle()


async def test_fallbacks_are_not_paid_from_the_budget() -> None:
    async with family(retry__ratio=0, retry__floor=0) as (big, medium, small, hub):
        big.default(reset())
        medium.script(reset())
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, medium, 3)
        assert not small.requests


async def test_errors_that_every_worker_would_give_do_not_fall_back() -> None:
    async with family() as (big, medium, small, hub):
        big.default(send(error_reply(400, "no", "invalid_request_error")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert response.status == 400
        assert not medium.requests
        assert not small.requests


async def test_a_prompt_that_is_too_long_goes_to_a_fallback_with_more_context() -> None:
    async with (
        ScriptedWorker("big", n_ctx=1024) as big,
        ScriptedWorker("tight", n_ctx=1024) as tight,
        ScriptedWorker("long", n_ctx=4096) as long,
        running_hub(big, tight, long, models__fallbacks="big=tight|long") as hub,
    ):
        big.default(send(error_reply(400, "no", "exceed_context_size_error")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, long, 2)
        assert not tight.requests


@pytest.mark.parametrize("status", [429, 503])
async def test_a_model_that_is_only_busy_has_its_fallback_on_the_same_machine(
    status: int,
) -> None:
    """For the request that it refuses, and for those that come while it is busy."""
    async with (
        ScriptedWorker("big", "small") as worker,
        running_hub(
            worker, models__fallbacks="big=small", health__interval=3600
        ) as hub,
    ):
        reply = error_reply(status, "later").replace(
            b"\r\n", b"\r\nRetry-After: 30\r\n", 1
        )
        worker.script(send(reply))
        for attempts in (2, 1):
            response = await hub.post(CHAT, WHOLE | {"model": "big"})
            assert response.status == 200
            assert response.header("x-gollama-attempts") == str(attempts)
        asked = [request.json()["model"] for request in worker.requests]
        assert asked == ["big", "small", "small"]


VLLM = (
    "This model's maximum context length is 4096 tokens. However, you requested 5000 "
    "tokens (4500 in the messages, 500 in the completion). Please reduce the length of "
    "the messages or completion."
)


def no_llama(worker: ScriptedWorker, **fields: Any) -> None:
    """Have it be a server that is asked for its models and has no `/props`."""
    entry = {"id": worker.models[0], "object": "model", **fields}
    worker.on("/v1/models", *answer({"object": "list", "data": [entry]}))
    worker.on("/props", send(not_found()))


def early(message: str) -> Script:
    """A stream that begins with an error, in place of a status."""
    return event_stream(error_event(message, 400))


@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [400, 413, 422, 500])
async def test_a_prompt_too_long_for_another_server_goes_to_a_fallback(
    status: int, payload: dict[str, Any]
) -> None:
    """A worker that does not report its context, at first or at all."""
    async with (
        ScriptedWorker("big") as big,
        ScriptedWorker("small") as small,
        running_hub(
            big, small, models__fallbacks="big=small", health__interval=3600
        ) as hub,
    ):
        for worker in (big, small):
            no_llama(worker)
            await hub.hub.health.look(worker_of(hub, worker))
        big.default(send(error_reply(status, VLLM, "BadRequestError")))
        response = await hub.post(CHAT, payload | {"model": "big"})
        assert answered(response, small, 2)
        assert worker_of(hub, big).context_of("big") == 4096
        assert worker_of(hub, big).breaker.closed
        small.default(send(error_reply(400, "the prompt is too long for me")))
        response = await hub.post(CHAT, payload | {"model": "big"})
        assert response.status == 400


async def test_a_stream_that_begins_with_an_overflow_counts_as_an_overflow() -> None:
    async with (
        ScriptedWorker("big") as big,
        ScriptedWorker("small") as small,
        running_hub(
            big, small, models__fallbacks="big=small", health__interval=3600
        ) as hub,
    ):
        for worker in (big, small):
            no_llama(worker)
            await hub.hub.health.look(worker_of(hub, worker))
        big.default(*early(VLLM))
        for payload in (WHOLE, STREAM):
            response = await hub.post(CHAT, payload | {"model": "big"})
            assert answered(response, small, 2)


async def test_a_worker_that_is_known_to_have_more_context_goes_first() -> None:
    """As vLLM reports in its list; the one that refused has put it in its message."""
    async with (
        ScriptedWorker("big") as tight,
        ScriptedWorker("big") as unknown,
        ScriptedWorker("big") as large,
        running_hub(tight, unknown, large, health__interval=3600) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        no_llama(tight)
        no_llama(unknown)
        no_llama(large, max_model_len=8192)
        for worker in (tight, unknown, large):
            await hub.hub.health.look(worker_of(hub, worker))
        tight.default(send(error_reply(400, VLLM, "BadRequestError")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, large, 2)
        assert not unknown.requests


async def test_an_error_that_two_workers_agree_on_still_has_a_fallback() -> None:
    async with (
        ScriptedWorker("big") as one,
        ScriptedWorker("big") as two,
        ScriptedWorker("small") as small,
        running_hub(
            one, two, small, models__fallbacks="big=small", health__interval=3600
        ) as hub,
    ):
        for worker in (one, two):
            worker.default(send(error_reply(500, "no eyes")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert answered(response, small, 3)
        small.default(send(error_reply(500, "no eyes either")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert response.json()["error"]["message"] == "no eyes either"
        assert response.status == 500


async def test_when_every_fallback_refuses_the_last_refusal_is_passed_on() -> None:
    async with family(retry__attempts=1, retry__patience=0.1) as (*workers, hub):
        for worker in workers:
            worker.default(send(error_reply(429, f"of {worker.models[0]}")))
        response = await hub.post(CHAT, WHOLE | {"model": "big"})
        assert response.status == 429
        assert response.json()["error"]["message"] == "of small"


# --- The client's own wishes ------------------------------------------------------


@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
async def test_a_request_may_name_its_own_fallbacks(payload: dict[str, Any]) -> None:
    """They come in place of the configured ones; the worker does not see them."""
    async with family() as (big, medium, small, hub):
        big.default(reset())
        wished = payload | {"model": "big", "fallbacks": ["small"]}
        assert answered(await hub.post(CHAT, wished), small, 3)
        assert small.requests[0].json() == sent(payload, "small")
        assert "fallbacks" not in big.requests[0].json()
        assert not medium.requests


async def test_a_token_that_does_not_allow_a_fallback_does_not_get_it() -> None:
    async with family() as (big, medium, small, hub):
        big.default(reset())
        token = hub.token(models=["big", "small"])
        configured = await hub.post(CHAT, WHOLE | {"model": "big"}, token)
        assert answered(configured, small, 3)
        wished = WHOLE | {"model": "big", "fallbacks": ["medium"]}
        assert (await hub.post(CHAT, wished, token)).status == 502
        assert not medium.requests


@pytest.mark.parametrize(
    "wished", ["small", 7, {"a": 1}, [1], [["small"]], ["x"] * 9, [None]], ids=str
)
async def test_invalid_fallbacks_are_refused(wished: Any) -> None:
    async with family() as (big, _, _, hub):
        response = await hub.post(CHAT, WHOLE | {"model": "big", "fallbacks": wished})
        assert response.status == 400
        assert response.json()["error"]["param"] == "fallbacks"
        assert not big.requests


async def test_only_the_fallbacks_are_removed_from_a_body() -> None:
    body = {"fallbacks": ["small"], "model": "big", "é": [1.50, "\u2028"], **WHOLE}
    async with family() as (big, _, _, hub):
        await hub.post(CHAT, json.dumps(body, ensure_ascii=False).encode())
        del body["fallbacks"]
        assert big.requests[0].json() == sent(body, "big")


async def test_an_alias_may_have_a_fallback_and_be_one() -> None:
    async with family(
        models__aliases="huge=big,tiny=small", models__fallbacks="huge=tiny"
    ) as (big, _, small, hub):
        big.default(reset())
        assert answered(await hub.post(CHAT, WHOLE | {"model": "huge"}), small, 3)


# --- Reports ----------------------------------------------------------------------


async def test_a_fallback_shows_in_the_metrics() -> None:
    async with family(metrics__open=True) as (big, medium, _, hub):
        big.default(reset())
        medium.script(*chat_stream(["a"], model="medium"))
        await hub.post(CHAT, STREAM | {"model": "big"})
        page = (await hub.get("/metrics")).body.decode()
    assert 'gollama_fallbacks_total{fallback="medium",model="big"} 1.0' in page
