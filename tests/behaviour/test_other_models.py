"""A worker that has come back with another model does not answer for the old one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.asks import CHAT, RARELY
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.pool import InOrder
from tests.fakes.replies import (
    chunk,
    error_reply,
    event,
    json_reply,
    named_event,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    answer,
    chat_stream,
    event_stream,
    reset,
    send,
    wait,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

MESSAGES = [{"role": "user", "content": "hello"}]
TEXT, EMBEDDINGS, RERANK = "/v1/completions", "/v1/embeddings", "/v1/rerank"
ANTHROPIC, RESPONSES, NATIVE = "/v1/messages", "/v1/responses", "/completion"


def a_message(model: str, content: Any = ()) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": list(content),
        "model": model,
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def a_response(model: str) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "metadata": {"model": "a car"},
        "model": model,
        "status": "completed",
        "output": [],
    }


def chat_whole(model: str) -> Script:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}}
    choice["finish_reason"] = "stop"
    return answer({"choices": [choice], "object": "chat.completion", "model": model})


def text(model: str) -> dict[str, Any]:
    choice = {"index": 0, "text": "hi", "finish_reason": "stop"}
    return {"choices": [choice], "object": "text_completion", "model": model}


def messages_stream(model: str) -> Script:
    return event_stream(
        named_event({"type": "message_start", "message": a_message(model)}),
        named_event({"type": "content_block_delta", "index": 0, "delta": {}}),
        named_event({"type": "message_stop"}),
    )


def responses_stream(model: str) -> Script:
    return event_stream(
        named_event({"type": "response.created", "response": a_response(model)}),
        named_event({"type": "response.output_text.delta", "delta": "hi"}),
        named_event({"type": "response.completed", "response": a_response(model)}),
    )


def native_stream(model: str) -> Script:
    return event_stream(
        event({"content": "hi", "model": model, "stop": False}),
        event({"content": "", "model": model, "stop": True}),
    )


STREAM = {"stream": True}
# What is asked, and how a worker answers it in the name of a model.
ROUTES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "chat, streamed": (
        CHAT,
        {"messages": MESSAGES, **STREAM},
        lambda model: chat_stream(["hi", " you"], model=model),
    ),
    "chat, assembled": (
        CHAT,
        {"messages": MESSAGES},
        lambda model: chat_stream(["hi", " you"], model=model),
    ),
    "chat, in one piece": (CHAT, {"messages": MESSAGES}, chat_whole),
    "text, streamed": (
        TEXT,
        {"prompt": "hello", **STREAM},
        lambda model: event_stream(event(text(model)), b"data: [DONE]\n\n"),
    ),
    "text": (TEXT, {"prompt": "hello"}, lambda model: answer(text(model))),
    "embeddings": (
        EMBEDDINGS,
        {"input": "hello"},
        lambda model: answer({"object": "list", "data": [], "model": model}),
    ),
    "rerank": (
        RERANK,
        {"query": "hello", "documents": []},
        lambda model: answer({"results": [], "model": model}),
    ),
    "messages": (
        ANTHROPIC,
        {"messages": MESSAGES, "max_tokens": 9},
        lambda model: answer(a_message(model)),
    ),
    "messages, streamed": (
        ANTHROPIC,
        {"messages": MESSAGES, "max_tokens": 9, **STREAM},
        messages_stream,
    ),
    "responses": (
        RESPONSES,
        {"input": "hello"},
        lambda model: answer(a_response(model)),
    ),
    "responses, streamed": (RESPONSES, {"input": "hello", **STREAM}, responses_stream),
    "native": (
        NATIVE,
        {"prompt": "hello"},
        lambda model: answer({"content": "hi", "model": model, "stop": True}),
    ),
    "native, streamed": (NATIVE, {"prompt": "hello", **STREAM}, native_stream),
}
EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES)


@asynccontextmanager
async def hub_of(
    *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[RunningHub]:
    """Run a hub that pings rarely, and asks the workers in their order."""
    async with running_hub(*workers, health__interval=RARELY, **settings) as hub:
        hub.hub.balancer.policy = InOrder()
        yield hub


def come_back_with(worker: ScriptedWorker, model: str, replies: Script) -> None:
    """Have a worker be another one, unnoticed, as after a quick restart."""
    worker.models = [model]
    worker.default(*replies)


@EVERY_ROUTE
async def test_an_answer_of_another_model_comes_from_another_worker(route: str) -> None:
    """The one that came back is looked at, and not asked for the old model again."""
    path, payload, replies = ROUTES[route]
    async with (
        ScriptedWorker("old") as back,
        ScriptedWorker("old") as good,
        hub_of(back, good) as hub,
    ):
        come_back_with(back, "new", replies("new"))
        good.default(*replies("old"))
        for attempts in ("2", "1"):
            response = await hub.post(path, payload | {"model": "old"})
            assert response.status == 200
            assert response.header("x-gollama-worker") == good.name
            assert response.header("x-gollama-attempts") == attempts
            assert b'"new"' not in response.body
        assert len(back.requests) == 1
        assert hub.hub.registry.models() == ["new", "old"]
        [record, _] = hub.hub.registry.workers
        assert record.breaker.closed
        assert not record.model_breakers


@EVERY_ROUTE
async def test_without_another_worker_the_error_is_passed_on(route: str) -> None:
    """First that it was removed, then that there is none; not an answer of another."""
    path, payload, replies = ROUTES[route]
    async with ScriptedWorker("old") as back, hub_of(back) as hub:
        come_back_with(back, "new", replies("new"))
        response = await hub.post(path, payload | {"model": "old"})
        assert response.status == 503
        assert b"no longer serves the model 'old'" in response.body
        assert int(response.header("retry-after") or "") > 0
        for _ in range(2):
            response = await hub.post(path, payload | {"model": "old"})
            assert response.status == 404
        assert len(back.requests) == 1
        assert (await hub.post(path, payload | {"model": "new"})).status == 200
        # A name that never was one still stands for the only model there is.
        assert (await hub.post(path, payload | {"model": "gpt-4"})).status == 200


async def test_an_answer_that_names_its_model_too_late_triggers_a_health_check() -> (
    None
):
    """One in one piece whose first bytes were passed on; the next one is not."""
    async with (
        ScriptedWorker("old") as back,
        ScriptedWorker("old") as good,
        hub_of(back, good) as hub,
    ):
        content = [{"type": "text", "text": "hello " * 1000}]
        whole = json_reply(a_message("new", content))
        half = len(whole) // 2
        come_back_with(
            back, "new", (send(whole[:half]), wait("go"), send(whole[half:]))
        )
        body = {"messages": MESSAGES, "max_tokens": 9, "model": "old"}
        async with await hub.open(ANTHROPIC, body) as wire:
            await wire.read_head()
            back.release("go")
            await until(lambda: hub.hub.registry.models() == ["new", "old"])
        good.default(*answer(a_message("old", content)))
        response = await hub.post(ANTHROPIC, body)
        assert response.header("x-gollama-worker") == good.name


async def test_a_fallback_answers_for_a_model_that_is_gone() -> None:
    async with (
        ScriptedWorker("old") as back,
        ScriptedWorker("small") as small,
        hub_of(back, small, models__fallbacks="old=small") as hub,
    ):
        come_back_with(back, "new", chat_stream(["hi"], model="new"))
        for _ in range(2):
            response = await hub.post(CHAT, {"messages": MESSAGES, "model": "old"})
            assert response.status == 200
            assert response.header("x-gollama-worker") == small.name


@EVERY_ROUTE
async def test_a_worker_may_have_another_name_for_its_model(route: str) -> None:
    """One look shows that it serves it all the same, and is not repeated."""
    path, payload, replies = ROUTES[route]
    async with ScriptedWorker("tiny") as worker, hub_of(worker) as hub:
        worker.default(*replies("/models/tiny.gguf"))
        assert (await hub.post(path, payload | {"model": "tiny"})).status == 200
        pings = len(worker.control)
        assert (await hub.post(path, payload | {"model": "tiny"})).status == 200
        assert len(worker.control) == pings
        assert len(worker.requests) == 2


@EVERY_ROUTE
async def test_an_answer_that_names_no_model_is_passed_on(route: str) -> None:
    path, payload, replies = ROUTES[route]
    async with ScriptedWorker("tiny") as worker, hub_of(worker) as hub:
        worker.default(*replies(None))
        pings = len(worker.control)
        assert (await hub.post(path, payload | {"model": "tiny"})).status == 200
        assert len(worker.control) == pings


async def test_a_model_in_the_text_of_an_answer_is_not_its_source() -> None:
    call = {"type": "tool_use", "id": "t", "name": "buy", "input": {"model": "a car"}}
    async with ScriptedWorker("tiny") as worker, hub_of(worker) as hub:
        worker.default(*answer(a_message("tiny", [call])))
        pings = len(worker.control)
        body = {"messages": MESSAGES, "max_tokens": 9, "model": "tiny"}
        response = await hub.post(ANTHROPIC, body)
        assert response.status == 200
        assert b"a car" in response.body
        assert len(worker.control) == pings


async def test_names_in_the_settings_keep_working(tmp_path: Path) -> None:
    """Whatever the worker lists, and calls itself."""
    file = tmp_path / "gollama.toml"
    async with ScriptedWorker("/models/tiny.gguf") as worker:
        file.write_text(
            f'[[workers]]\nurl = "{worker.url}"\nmodels = ["mine", "our-*"]\n'
            '[models]\naliases = { "gpt" = "mine" }\n'
        )
        async with running_hub(file=file, health__interval=RARELY) as hub:
            for name in ("mine", "our-own", "gpt"):
                for _ in range(2):
                    body = {"messages": MESSAGES, "model": name}
                    assert (await hub.post(CHAT, body)).status == 200


@pytest.mark.parametrize("stated", ["old", "o*"])
async def test_a_stated_name_that_the_worker_has_listed_can_be_gone(
    stated: str, tmp_path: Path
) -> None:
    """It was stated to leave others out, and not because the list lacked it."""
    file = tmp_path / "gollama.toml"
    async with ScriptedWorker("old", "other") as worker:
        file.write_text(f'[[workers]]\nurl = "{worker.url}"\nmodels = ["{stated}"]\n')
        async with running_hub(file=file, health__interval=RARELY) as hub:
            body = {"messages": MESSAGES, "model": "old"}
            assert (await hub.post(CHAT, body)).status == 200
            come_back_with(worker, "new", chat_stream(["hi"], model="new"))
            assert [(await hub.post(CHAT, body)).status for _ in range(2)] == [503, 503]
            assert len(worker.requests) == 2
            come_back_with(worker, "old", chat_stream(["hi"], model="old"))
            await hub.hub.health.look(hub.hub.registry.workers[0])
            assert (await hub.post(CHAT, body)).status == 200


async def test_a_new_build_triggers_one_health_check() -> None:
    """Its answer is passed on meanwhile, and what it has become is learnt at once."""
    async with (
        ScriptedWorker("tiny", build="b0-0000000", slots=1) as worker,
        hub_of(worker) as hub,
    ):
        [record] = hub.hub.registry.workers
        worker.slots = 7
        body = {"messages": MESSAGES, "model": "tiny"}
        assert (await hub.post(CHAT, body)).status == 200
        await until(lambda: record.slots == 7)
        pings = len(worker.control)
        assert (await hub.post(CHAT, body)).status == 200
        assert len(worker.control) == pings


async def test_an_answer_that_broke_off_is_not_continued_by_another_model() -> None:
    async with (
        ScriptedWorker("old") as broken,
        ScriptedWorker("old") as back,
        ScriptedWorker("old") as good,
        hub_of(broken, back, good) as hub,
    ):
        first = chunk(role(model="old") + token("one", model="old"))
        broken.script(send(sse_head()), send(first), reset())
        come_back_with(back, "new", chat_stream(["one", " two"], model="new"))
        good.script(*chat_stream(["one", " two"], model="old"))
        body = {"messages": MESSAGES, "model": "old", "stream": True}
        response = await hub.post(CHAT, body)
        assert b'"new"' not in response.body
        assert response.body.count(b"two") == 1
        assert response.body.endswith(b"data: [DONE]\n\n")
        assert [len(w.requests) for w in (broken, back, good)] == [1, 1, 1]


async def test_a_worker_that_does_not_list_its_models_is_not_used() -> None:
    async with (
        ScriptedWorker("old") as back,
        ScriptedWorker("old") as good,
        hub_of(back, good) as hub,
    ):
        come_back_with(back, "new", chat_stream(["hi"], model="new"))
        back.on("/v1/models", send(error_reply(500, "not yet")))
        response = await hub.post(CHAT, {"messages": MESSAGES, "model": "old"})
        assert response.status == 200
        assert response.header("x-gollama-worker") == good.name
