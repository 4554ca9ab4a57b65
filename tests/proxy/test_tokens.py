"""A prompt is sent only where it fits, and counted only where that is in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.upstream import probe
from tests.fakes.asks import CHAT
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import MODEL, chat_completion, error_reply, json_reply
from tests.fakes.script import answer, chat_stream, reset, send, stall, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

COUNTS = ("/apply-template", "/tokenize")


def ask(size: int, **fields: Any) -> dict[str, Any]:
    """Make a request whose body has a little more than so many bytes."""
    return {"messages": [{"role": "user", "content": "x" * size}], **fields}


def counting(worker: ScriptedWorker, tokens: int) -> ScriptedWorker:
    worker.on("/apply-template", *answer({"prompt": "xxx"}))
    worker.on("/tokenize", *answer({"tokens": [7] * tokens}))
    return worker


def served(*workers: ScriptedWorker) -> list[int]:
    """Return how many requests each had, beside those to count."""
    return [sum(r.path not in COUNTS for r in each.requests) for each in workers]


def counts(*workers: ScriptedWorker) -> int:
    return sum(r.path == "/tokenize" for each in workers for r in each.requests)


def reported(response: Response) -> str:
    """Check that a prompt was refused for its length; return the message."""
    assert response.status == 400, response.body
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"
    message: str = error["message"]
    return message


@asynccontextmanager
async def pair(
    small: int = 1024, large: int = 4096, **settings: Any
) -> AsyncIterator[tuple[ScriptedWorker, ScriptedWorker, RunningHub]]:
    settings = {
        "health__interval": 3600,
        "retry__attempts": 2,
        # The prompts are all alike, and where they can go they are to go in turn.
        "routing__policy": "round_robin",
        **settings,
    }
    async with (
        ScriptedWorker(n_ctx=small) as one,
        ScriptedWorker(n_ctx=large) as two,
        running_hub(one, two, **settings) as hub,
    ):
        yield one, two, hub


# --- Where it goes ----------------------------------------------------------------


async def test_a_short_prompt_is_not_counted() -> None:
    async with pair() as (small, large, hub):
        for _ in range(4):
            assert (await hub.post(CHAT, ask(900))).status == 200
        assert served(small, large) == [2, 2]
        assert not counts(small, large)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_goes_only_where_it_fits(stream: bool) -> None:
    async with pair() as (small, large, hub):
        counting(small, 2000)
        counting(large, 2000)
        for number in range(3):
            response = await hub.post(CHAT, ask(6000, stream=stream))
            assert response.header("x-gollama-worker") == large.name
            assert response.header("x-gollama-attempts") == "1"
            assert counts(small, large) == number + 1  # for the two of them
        assert served(small, large) == [0, 3]


async def test_a_prompt_near_the_limit_that_fits_goes_anywhere() -> None:
    async with pair() as (small, large, hub):
        counting(small, 1023)
        counting(large, 1023)
        for _ in range(4):
            assert (await hub.post(CHAT, ask(6000))).status == 200
        assert served(small, large) == [2, 2]


async def test_a_prompt_that_fits_nowhere_is_refused_and_sent_nowhere() -> None:
    async with pair() as (small, large, hub):
        counting(small, 4096)
        counting(large, 4096)
        for stream in (False, True):
            message = reported(await hub.post(CHAT, ask(6000, stream=stream)))
            assert "the prompt has 4096" in message
            assert f"{MODEL} on {small.name} 1024" in message
            assert f"{MODEL} on {large.name} 4096" in message
        assert served(small, large) == [0, 0]


async def test_how_long_the_answer_may_be_makes_no_difference() -> None:
    async with pair(large=1024) as (small, large, hub):
        response = await hub.post(CHAT, ask(10, max_tokens=100_000))
        assert response.status == 200
        assert not counts(small, large)


async def test_it_is_refused_at_once_though_all_slots_are_taken() -> None:
    async with pair() as (small, large, hub):
        for worker in (small, large):
            counting(worker, 9000)
            worker.default(wait("go"), *answer(chat_completion("a")))
        busy = [asyncio.create_task(hub.post(CHAT, ask(1)), name="b") for _ in range(8)]
        await small.received(4)
        await large.received(4)
        reported(await hub.post(CHAT, ask(9000)))
        for worker in (small, large):
            worker.release("go")
        assert {(await each).status for each in busy} == {200}


async def test_one_that_fits_but_is_away_is_waited_for() -> None:
    async with pair(retry__attempts=1, health__fall=1) as (small, large, hub):
        counting(small, 2000)
        await large.down()
        assert (await hub.post(CHAT, ask(6000))).status == 502  # it is not known yet
        away = hub.hub.registry.workers[1]
        await until(lambda: not away.available)
        response = await hub.post(CHAT, ask(6000))
        assert response.status == 503
        assert int(response.header("retry-after") or "") > 0
        assert served(small) == [0]


# --- Fallbacks --------------------------------------------------------------------


@asynccontextmanager
async def family(
    *contexts: int, **settings: Any
) -> AsyncIterator[tuple[ScriptedWorker, ScriptedWorker, RunningHub]]:
    first, second = contexts
    settings = {"retry__attempts": 2, "health__interval": 3600, **settings}
    async with (
        ScriptedWorker("big", n_ctx=first) as big,
        ScriptedWorker("other", n_ctx=second) as other,
        running_hub(big, other, models__fallbacks="big=other", **settings) as hub,
    ):
        yield big, other, hub


async def test_a_prompt_that_fits_a_fallback_goes_there() -> None:
    """Each model counts it once, with its own tokenizer."""
    async with family(1024, 2048) as (big, other, hub):
        counting(big, 2500)
        counting(other, 1900)
        response = await hub.post(CHAT, ask(6000, model="big"))
        assert response.header("x-gollama-worker") == other.name
        assert (served(big, other), counts(big), counts(other)) == ([0, 1], 1, 1)
        assert other.requests[0].json()["model"] == "other"
        counting(other, 2048)
        message = reported(await hub.post(CHAT, ask(6000, model="big")))
        assert "the prompt has 2500" in message
        assert "other on" in message


@pytest.mark.parametrize("away", [False, True])
async def test_a_fallback_that_comes_into_question_later_is_looked_at_too(
    away: bool,
) -> None:
    async with family(65536, 1024) as (big, other, hub):
        counting(other, 3000)
        big.default(reset())
        if away:
            await big.down()
        response = await hub.post(CHAT, ask(6000, model="big"))
        assert response.status == 502
        assert (served(other), counts(other)) == ([0], 1)


async def test_a_fallback_alone_is_judged_when_no_first_worker_is_up() -> None:
    async with family(65536, 1024, health__fall=1) as (big, other, hub):
        counting(other, 3000)
        await big.down()
        await hub.post(CHAT, ask(10, model="big"))
        while not hub.hub.registry.workers[0].is_down:
            await asyncio.sleep(0.01)
        response = await hub.post(CHAT, ask(6000, model="big"))
        assert response.status == 503  # it would fit, were it there
        assert served(other) == [1]


# --- Where it cannot be counted ---------------------------------------------------


@pytest.mark.parametrize("fault", ["404", "500", "odd", "reset", "silent"])
async def test_a_count_that_fails_changes_nothing(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that refuses the prompt is followed by a larger one, as ever."""
    monkeypatch.setattr(probe, "COUNT_LIMIT", 0.1)
    faults = {
        "404": (send(error_reply(404, "File Not Found")),),
        "500": (send(error_reply(500, "oh")),),
        "odd": answer({"prompt": ["a"]}),
        "reset": (reset(),),
        "silent": (stall(),),
    }
    async with pair() as (small, large, hub):
        for worker in (small, large):
            worker.on("/apply-template", *faults[fault])
        overflow = error_reply(400, "no", "exceed_context_size_error")
        small.default(send(overflow))
        for _ in range(2):
            response = await hub.post(CHAT, ask(6000))
            assert response.header("x-gollama-worker") == large.name
        assert served(large) == [2]
        asked = [r.path for each in (small, large) for r in each.requests]
        assert asked.count("/apply-template") == 2  # and not again for the second one


async def test_a_count_is_no_reason_to_load_a_model() -> None:
    """Nor is it asked of a worker that has not loaded it, while another has."""
    async with (
        ScriptedWorker(n_ctx=1024) as cold,
        ScriptedWorker(n_ctx=1024) as warm,
    ):
        cold.status, warm.status = {MODEL: "unloaded"}, {MODEL: "loaded"}
        async with running_hub(cold, warm, health__interval=3600) as hub:
            counting(warm, 2000)
            counting(cold, 2000)
            for _ in range(2):
                reported(await hub.post(CHAT, ask(6000)))
            assert (counts(cold), counts(warm)) == (0, 2)
        warm.status = {MODEL: "unloaded"}
        async with running_hub(cold, warm, health__interval=3600) as hub:
            assert (await hub.post(CHAT, ask(6000))).status == 200
            assert (counts(cold), counts(warm)) == (0, 2)
            assert sum(served(cold, warm)) == 1


async def test_a_context_that_is_not_known_takes_what_comes() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/props", send(error_reply(404, "no")))
        worker.on("/v1/models", *answer({"data": [{"id": "x"}]}))
        async with running_hub(worker) as hub:
            assert (await hub.post(CHAT, ask(100_000))).status == 200
        assert served(worker) == [1]
        assert not counts(worker)


async def test_only_what_generates_is_counted() -> None:
    async with pair() as (small, large, hub):
        body = {"input": "x" * 9000}
        assert (await hub.post("/v1/embeddings", body)).status == 200
        assert (await hub.post("/tokenize", {"content": "x" * 9000})).status == 200
        assert sum(len(each.requests) for each in (small, large)) == 2


async def test_a_body_beyond_the_replay_window_goes_by_its_size() -> None:
    """It cannot be counted, nor sent twice.  What fits nowhere is no text."""
    async with pair(large=1 << 20, limits__replay_window=4096) as (small, large, hub):
        for _ in range(4):
            assert (await hub.post(CHAT, ask(2 << 20, model="tiny"))).status == 200
        assert served(small, large) == [0, 4]
        for _ in range(4):
            assert (await hub.post(CHAT, ask(8 << 20, model="tiny"))).status == 200
        assert served(small, large) == [2, 6]
        assert not counts(small, large)


# --- What is learnt ---------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_prompt_sizes_in_answers_save_the_count(path: str) -> None:
    """Also those of Anthropic's API, which leaves out what was in the cache."""
    async with pair() as (small, large, hub):
        usage = {"prompt_tokens": 500, "completion_tokens": 1, "total_tokens": 501}
        if path != CHAT:
            usage = {"input_tokens": 5, "cache_read_input_tokens": 495}
        whole = chat_completion("a") | {"usage": usage}
        del whole["timings"]
        for worker in (small, large):
            counting(worker, 500)
            worker.default(send(json_reply(whole)))
        asked = ask(3000, n=1)  # in one piece, and counted by the answer
        for route in ("/completion", path):
            body = {"prompt": "x" * 3000} if route == "/completion" else asked
            assert (await hub.post(route, body)).status == 200
        assert counts(small, large) == 1
        assert (await hub.post(path, ask(3500))).status == 200
        assert counts(small, large) == 1
        assert (await hub.post(CHAT, ask(5000))).status == 200
        assert counts(small, large) == 2


# --- A worker's own refusal -------------------------------------------------------


def overflow(tokens: int | None) -> bytes:
    error: dict[str, Any] = {"code": 400, "type": "exceed_context_size_error"}
    if tokens is not None:
        error["n_prompt_tokens"] = tokens
    return json_reply({"error": error | {"message": "too long"}}, 400)


@pytest.mark.parametrize("tokens", [None, 9000])
async def test_a_refusal_lists_what_each_worker_offers(tokens: int | None) -> None:
    """It may be pictures that make it too long, which no tokenizer counts."""
    async with pair() as (small, large, hub):
        for worker in (small, large):
            worker.default(send(overflow(tokens)))
        for stream in (False, True):
            message = reported(await hub.post(CHAT, ask(10, stream=stream)))
            assert f"{MODEL} on {large.name} 4096" in message
            assert f"the prompt has {tokens or 'more'}" in message


@pytest.mark.parametrize("path", [CHAT, "/completion"])
async def test_the_error_has_the_numbers_as_fields(path: str) -> None:
    """Whether the hub finds it, or a worker, whose words are kept."""
    async with pair() as (small, large, hub):
        for worker in (small, large):
            worker.default(send(overflow(9000)))
        asked = {"prompt": "x"} if path != CHAT else ask(10)
        errors = [(await hub.post(path, asked)).json()["error"]]
        counting(small, 9000)
        counting(large, 9000)
        long = {"prompt": "x" * 20_000} if path != CHAT else ask(20_000)
        errors.append((await hub.post(path, long)).json()["error"])
    assert "too long. The workers offer: " in errors[0]["message"]
    phrase = "request (9000 tokens) exceeds the available context size (4096 tokens)"
    assert phrase in errors[1]["message"]
    for error in errors:
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (9000, 4096)
        assert (error["type"], error["code"]) == (
            ("invalid_request_error", "context_length_exceeded")
            if path == CHAT
            else ("exceed_context_size_error", 400)
        )


async def test_how_long_a_worker_found_it_saves_the_next_ones() -> None:
    async with (
        ScriptedWorker(n_ctx=1024) as small,
        ScriptedWorker(n_ctx=2048) as medium,
        ScriptedWorker(n_ctx=4096) as large,
        running_hub(small, medium, large, retry__attempts=3) as hub,
    ):
        small.default(send(overflow(3000)))
        large.default(*chat_stream(["a"]))
        response = await hub.post(CHAT, ask(10, stream=True))
        assert response.header("x-gollama-worker") == large.name
        assert served(small, medium, large) == [1, 0, 1]


async def test_where_no_context_is_known_the_worker_has_the_last_word() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/props", send(error_reply(404, "no")))
        worker.on("/v1/models", *answer({"data": [{"id": "x"}]}))
        worker.default(send(overflow(9000)))
        async with running_hub(worker) as hub:
            response = await hub.post(CHAT, ask(10))
        error = response.json()["error"]
        assert (error["message"], error["n_prompt_tokens"]) == ("too long", 9000)
        assert error["code"] == "context_length_exceeded"


async def test_a_client_that_has_received_something_gets_an_event() -> None:
    async with ScriptedWorker(slots=1) as worker:
        worker.script(wait("go"), *answer(chat_completion("a")))
        worker.default(send(overflow(9000)))
        async with running_hub(worker, queue__notice=0.05) as hub:
            busy = asyncio.create_task(hub.post(CHAT, ask(1)), name="busy")
            await worker.received()
            async with await hub.open(CHAT, ask(1, stream=True)) as wire:
                assert (await wire.read_event() or b"").startswith(b": queued")
                worker.release("go")
                ending = await wire.read_to_end()
            await busy
        assert b'"code":"context_length_exceeded"' in ending.raw
        assert not ending.clean
