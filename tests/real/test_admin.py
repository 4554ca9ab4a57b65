"""Operators manage real llama-servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.control.test_admin import call, error_of, get
from tests.fakes.asks import CHAT, STREAM
from tests.fakes.hub import running_hub
from tests.fakes.waiting import until
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real


def ask(words: int, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello é " * words}
    return {"model": "tiny", "messages": [message], **fields}


async def test_a_server_is_added_and_an_answer_of_it_cancelled(
    slow_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    server = llama_server(slow_model, slots=1)
    async with running_hub(ready=False) as hub:
        row = {"url": server.url, "name": "desk"}
        assert (await call(hub, "POST", "/admin/workers", row)).status == 201
        await until(lambda: hub.hub.registry.ready)
        shown = (await get(hub, "/admin/workers/desk")).json()
        assert (shown["state"], shown["slots"]) == ("ready", 1)
        assert shown["build"]
        asked = {**STREAM, "max_tokens": 4000}
        fields = [("X-Request-Id", "long")]
        async with await hub.open(CHAT, asked, headers=fields) as wire:
            for _ in range(5):
                await wire.read_event()
            [running] = (await get(hub, "/admin/exchanges")).json()["exchanges"]
            assert running["tokens"] >= 4
            assert (await call(hub, "DELETE", "/admin/exchanges/long")).status == 200
            assert b"request_cancelled" in (await wire.read_to_end()).raw
        # The server has noticed: its only slot is free for another answer.
        answer = await hub.post(CHAT, {**STREAM, "max_tokens": 2})
        assert answer.status == 200
        [last, first] = (await get(hub, "/admin/requests")).json()["requests"]
        assert (last["outcome"], first["error"]) == ("complete", "request_cancelled")


async def test_an_explanation_counts_as_the_server_does(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    server = llama_server(tiny_model, ctx=256)
    async with running_hub(server) as hub:
        for words, fits in ((20, True), (2000, False)):
            question = {"request": ask(words, max_tokens=2)}
            shown = (await call(hub, "POST", "/admin/explain", question)).json()
            answer = await hub.post(CHAT, ask(words, max_tokens=2))
            assert shown["context"]["fits"] is fits
            assert shown["context"]["counted"]
            counted = shown["context"]["prompt_tokens"]
            if fits:
                assert shown["code"] == "chosen"
                assert answer.json()["usage"]["prompt_tokens"] == counted
            else:
                code, _, _ = error_of(answer, 400)
                assert shown["code"] == code == "context_length_exceeded"
                assert answer.json()["error"]["n_prompt_tokens"] == counted
