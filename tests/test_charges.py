"""What a request costs its subject: every token, on every route, however it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import named_event
from tests.fakes.script import answer, event_stream
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

TPM = 100_000


async def left(hub: RunningHub, token: str) -> int:
    """Ask how many tokens of its minute a subject has left; that costs none."""
    response = await hub.post("/tokenize", {"content": "x"}, token)
    return int(response.header("x-ratelimit-remaining-tokens") or "")


async def cost(hub: RunningHub, path: str, body: dict[str, Any]) -> int:
    """Make a request that succeeds, as a subject of its own."""
    token = hub.token(f"{path} {len(json.dumps(body))}", tpm=TPM)
    before = await left(hub, token)
    assert (await hub.post(path, body, token)).status == 200
    return before - await left(hub, token)


# --- Every API has its own definition ---------------------------------------------

CACHED = {"cache_read_input_tokens": 289, "input_tokens": 1}
MESSAGE = {"type": "message", "role": "assistant", "content": [], "model": "tiny"}


async def test_a_prompt_from_the_cache_costs_as_much_as_any() -> None:
    """Anthropic's `input_tokens` are only those that were not in the cache."""
    whole = MESSAGE | {"usage": CACHED | {"output_tokens": 4}}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on("/v1/messages", *answer(whole))
        assert await cost(hub, "/v1/messages", STREAM | {"stream": False}) == 294


@pytest.mark.parametrize("words", [1, 1000])
async def test_a_streamed_message_costs_the_prompt_that_its_beginning_tells(
    words: int,
) -> None:
    """The end of a long one has nothing of it; and no words can tell otherwise."""
    usage = CACHED | {"output_tokens": 1}
    start = {"type": "message_start", "message": MESSAGE | {"usage": usage}}
    text = '"usage":{"input_tokens":5,"output_tokens":5}'
    delta = {"type": "content_block_delta", "delta": {"text": text}}
    end = {"type": "message_delta", "usage": {"output_tokens": 4}}
    events = [start, *[delta] * words, end, {"type": "message_stop"}]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.on("/v1/messages", *event_stream(*map(named_event, events)))
        assert await cost(hub, "/v1/messages", STREAM) == 294


async def test_routes_that_generate_nothing_are_free() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path, body in (
            ("/v1/messages/count_tokens", {"messages": []}),
            ("/tokenize", {"content": "x" * 1000}),
            ("/apply-template", {"messages": []}),
        ):
            worker.on(path, *answer({"input_tokens": 26, "usage": CACHED}))
            assert await cost(hub, path, body) == 0


async def test_vectors_and_ranks_cost_their_prompt() -> None:
    """Large ones come in pieces, and their usage is in front of the numbers."""
    data = [{"embedding": [0.5] * 50_000, "index": 0, "object": "embedding"}]
    usage = {"prompt_tokens": 10, "total_tokens": 10}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in ("/v1/embeddings", "/v1/rerank"):
            for rest in ({"results": []}, {"data": data}):
                body = {"model": "tiny", "usage": usage, **rest}
                worker.on(path, *answer(body))
                assert await cost(hub, path, {"input": "hello"}) == 10


PROMPT = "hello there " * 30
CHATTED = {"messages": [{"role": "user", "content": PROMPT}]}


@pytest.mark.real
@pytest.mark.parametrize("ask_first", [False, True], ids=["cold", "warm"])
async def test_the_same_request_costs_the_same_on_every_route(
    ask_first: bool, llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    """Of a real server: streamed or not, with what is in its cache or without."""
    chat = CHATTED | {"max_tokens": 4}
    text = {"prompt": PROMPT, "max_tokens": 4}
    same_prompts: list[dict[str, dict[str, Any]]] = [
        {
            CHAT: chat,
            "/chat/completions": chat,
            "/v1/messages": chat,
            "/v1/responses": {"input": PROMPT, "max_output_tokens": 4},
        },
        {
            "/v1/completions": text,
            "/completion": {"prompt": PROMPT, "n_predict": 4},
            "/completions": {"prompt": PROMPT, "n_predict": 4},
        },
    ]
    for bodies in same_prompts:
        costs = {}
        for path, body in bodies.items():
            for stream in (False, True):
                # Its cache is empty, and then it is full.
                server = llama_server(tiny_model, slots=1)
                async with running_hub(server) as hub:
                    asked = {"model": "tiny", "temperature": 0, **body}
                    if ask_first:
                        await hub.post(path, asked)
                    got = await cost(hub, path, asked | {"stream": stream})
                    costs[path, stream] = got
                server.kill()
        assert len(set(costs.values())) == 1, costs
        [total] = set(costs.values())
        assert total > 250


@pytest.mark.real
async def test_counting_costs_nothing_at_a_real_server(
    llama_server: Callable[..., LlamaServer], tiny_model: Path
) -> None:
    async with running_hub(llama_server(tiny_model)) as hub:
        assert await cost(hub, "/v1/messages/count_tokens", CHATTED) == 0
