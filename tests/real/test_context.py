"""Prompts near and beyond the context of real llama-servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gollama_proxy.config import load as config
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.pool import Target
from gollama_proxy.wire.answer import read_usage
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes.asks import CHAT
from tests.fakes.hub import running_hub
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint it.",
        "parameters": {"type": "object", "properties": {"colour": {"enum": ["red"]}}},
    },
}


def ask(words: int, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello é " * words}
    return {"model": "tiny", "messages": [message], "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask(1)),
        (CHAT, ask(100)),
        (CHAT, ask(5, stream=True, temperature=0, stop=["x"], logprobs=True)),
        (CHAT, ask(5, tools=[TOOL])),
        (CHAT, ask(5, response_format={"type": "json_object"})),
        (CHAT, ask(5, messages=[{"role": "system", "content": "<|im_end|> a"}] * 3)),
        ("/v1/completions", {"prompt": "hello <|im_start|>", "max_tokens": 2}),
        ("/completion", {"prompt": "zo mi " * 50, "n_predict": 2}),
        ("/v1/messages", ask(9)),
        ("/v1/responses", {"input": "hello " * 20, "max_output_tokens": 2}),
    ],
)
async def test_the_count_equals_the_workers_own(
    path: str,
    body: dict[str, Any],
    tiny_model: Path,
    llama_server: Callable[..., LlamaServer],
) -> None:
    server = llama_server(tiny_model)
    [worker] = config.load(None, {"GOLLAMA_AUTH_MODE": "off"}, {}, [server.url]).workers
    reported = await probe.count_tokens(
        Target(worker), path, "tiny", json.dumps(body).encode()
    )
    async with aiohttp.ClientSession() as session:
        async with session.post(server.url + path, json={**body, "stream": False}) as r:
            answer = await r.read()
    assert reported == read_usage(answer, ENDPOINTS[path].api).prompt


async def test_a_prompt_goes_to_the_worker_whose_context_it_fits(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    small = llama_server(tiny_model, slots=1, ctx=256)
    large = llama_server(tiny_model, slots=1, ctx=1024)
    # In turns, so that only the context keeps a prompt from the small one.
    async with running_hub(small, large, routing__policy="round_robin") as hub:
        for _ in range(3):
            response = await hub.post(CHAT, ask(40))
            assert response.status == 200
            assert response.json()["usage"]["prompt_tokens"] > 256
            assert response.header("x-gollama-worker") == large.url[7:]
            assert response.header("x-gollama-attempts") == "1"
        short = {
            (await hub.post(CHAT, ask(1))).header("x-gollama-worker") for _ in range(2)
        }
        assert short == {small.url[7:], large.url[7:]}


async def test_the_official_client_knows_a_prompt_that_fits_nowhere(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    import openai

    async with running_hub(llama_server(tiny_model, slots=1, ctx=256)) as hub:
        client = openai.AsyncOpenAI(base_url=f"{hub.url}/v1", api_key=hub.token())
        async with client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**ask(300))
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["n_prompt_tokens"] > 300
    assert caught.value.body["n_ctx"] == 256


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask(300)),  # the hub finds out
        ("/v1/completions", {"prompt": [5] * 300}),  # it does not count those
        ("/completion", {"prompt": "zo mi " * 300}),
        ("/infill", {"input_prefix": "zo mi " * 300, "input_suffix": "a"}),
    ],
)
async def test_the_error_of_a_prompt_that_is_too_long_has_all_that_the_servers_has(
    path: str,
    body: dict[str, Any],
    tiny_model: Path,
    llama_server: Callable[..., LlamaServer],
) -> None:
    server = llama_server(tiny_model, slots=1, ctx=256)
    async with running_hub(server) as hub, aiohttp.ClientSession() as session:
        async with session.post(server.url + path, json=body) as response:
            direct = (await response.json())["error"]
        response = await hub.post(path, {"model": "tiny", **body})
    error = response.json()["error"]
    assert response.status == direct["code"] == 400
    assert direct["message"] in error["message"]
    for name in ("n_prompt_tokens", "n_ctx"):
        assert error[name] == direct[name]
    if path.startswith("/v1/"):
        assert error["code"] == "context_length_exceeded"
    else:
        assert (error["type"], error["code"]) == (direct["type"], 400)
