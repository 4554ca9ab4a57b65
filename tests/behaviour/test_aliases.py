"""A client that calls a model by another name sees that name in the replies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.config.settings import STREAMED
from tests.fakes.asks import CHAT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chat_completion, head
from tests.fakes.script import answer, chat_stream, reset, send
from tests.fakes.worker import ScriptedWorker

BODY: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "hello"}],
}
STREAM = BODY | {"stream": True}
TRAP = 'the key is "model":"qwen", and \\"model\\":\\"qwen\\"'


@asynccontextmanager
async def aliased(**settings: Any) -> AsyncIterator[tuple[ScriptedWorker, RunningHub]]:
    settings = {"models__aliases": {"gpt-4o": "qwen"}, **settings}
    async with (
        ScriptedWorker("qwen") as worker,
        running_hub(worker, **settings) as hub,
    ):
        yield worker, hub


async def test_each_event_names_the_model_as_the_client_does() -> None:
    """And not another byte is changed."""
    async with aliased() as (worker, hub):
        script = chat_stream([TRAP, " b", " c"], model="qwen")
        worker.script(*script)
        renamed = (await hub.post(CHAT, STREAM)).body
        worker.script(*script)
        plain = (await hub.post(CHAT, STREAM | {"model": "qwen"})).body
    assert worker.requests[0].json()["model"] == "qwen"
    name = b'"object":"chat.completion.chunk"'
    assert name in plain
    assert renamed == plain.replace(b',"model":"qwen",', b',"model":"gpt-4o",')
    assert b"gpt-4o" in renamed
    events = [e for e in renamed.split(b"\n\n") if e.startswith(b"data: {")]
    assert {json.loads(event[6:])["model"] for event in events} == {"gpt-4o"}


@pytest.mark.parametrize("assemble", [STREAMED, ()])
async def test_a_complete_answer_names_the_model_as_the_client_does(
    assemble: tuple[str, ...],
) -> None:
    async with aliased(upstream__assemble=assemble) as (worker, hub):
        if assemble:
            worker.script(*chat_stream([TRAP], model="qwen", usage=True))
        else:
            worker.script(*answer(chat_completion(TRAP, model="qwen")))
        response = await hub.post(CHAT, BODY)
    assert response.json()["model"] == "gpt-4o"
    assert response.json()["choices"][0]["message"]["content"] == TRAP


async def test_a_long_answer_that_is_passed_on_in_pieces_is_not_cut() -> None:
    """Its length is another one then."""
    body = json.dumps({"model": "qwen", "data": ["x" * 1000] * 600}).encode()
    async with aliased() as (worker, hub):
        length = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
        ]
        worker.script(send(head(200, length) + body[:9000]), send(body[9000:]))
        response = await hub.post("/v1/embeddings", {"model": "gpt-4o", "input": "a"})
    assert response.json() == json.loads(body) | {"model": "gpt-4o"}


async def test_a_name_matched_by_a_wildcard_is_restored_too() -> None:
    """Whatever it is made of."""
    odd = 'gpt-"\n\\é'
    async with aliased(models__aliases={"gpt-*": "qwen"}) as (worker, hub):
        for name in ("gpt-7", odd):
            worker.script(*chat_stream([TRAP, " b"], model="qwen"))
            streamed = await hub.post(CHAT, STREAM | {"model": name})
            events = [e for e in streamed.body.split(b"\n\n") if b"choices" in e]
            assert {json.loads(event[6:])["model"] for event in events} == {name}
        assert all(each.json()["model"] == "qwen" for each in worker.requests)
        plain = await hub.post(CHAT, STREAM | {"model": "qwen"})
        assert b"gpt-" not in plain.body
        shown = (await hub.get("/v1/models/gpt-7")).json()
        assert (shown["id"], shown["gollama"]["alias_of"]) == ("gpt-7", "qwen")
        listed = (await hub.get("/v1/models")).json()["data"]
        assert [row["id"] for row in listed] == ["qwen"]
        token = hub.token(models=["gpt-7"])
        assert (await hub.get("/v1/models/gpt-7", token)).status == 404
        assert (await hub.post(CHAT, STREAM | {"model": "gpt-7"}, token)).status == 403


async def test_a_fallback_keeps_its_own_name() -> None:
    async with (
        ScriptedWorker("qwen") as big,
        ScriptedWorker("phi") as small,
        running_hub(
            big,
            small,
            models__aliases={"gpt-4o": "qwen"},
            models__fallbacks="qwen=phi",
            retry__attempts=2,
        ) as hub,
    ):
        big.default(reset())
        small.script(*chat_stream(["a"], model="phi"))
        response = await hub.post(CHAT, STREAM)
    assert b'"model":"phi"' in response.body
    assert b"gpt-4o" not in response.body


async def test_a_rescued_answer_keeps_the_name_that_the_client_knows() -> None:
    async with (
        ScriptedWorker("qwen") as bad,
        ScriptedWorker("qwen") as good,
        running_hub(
            bad,
            good,
            models__aliases={"gpt-4o": "qwen"},
            rescue__enabled=True,
            retry__attempts=2,
        ) as hub,
    ):
        both = (bad, good)
        for worker in both:
            worker.script(*chat_stream(["a", "b"], model="qwen")[:3], reset())
            worker.default(*chat_stream(["ab", "c"], model="qwen"))
        response = await hub.post(CHAT, STREAM)
    assert b": gollama rescued" in response.body
    assert b'"model":"qwen"' not in response.body
    assert response.body.count(b"[DONE]") == 1
