"""A token may limit the requests and tokens of its subject per minute."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.hub import running_hub
from tests.fakes.replies import usage_of
from tests.fakes.script import answer, chat_stream
from tests.fakes.worker import ScriptedWorker


async def test_requests_a_minute_are_counted_and_reported() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token(rpm=2)
        for left in ("1", "0"):
            response = await hub.post(CHAT, WHOLE, token)
            assert response.status == 200
            assert response.header("x-ratelimit-limit-requests") == "2"
            assert response.header("x-ratelimit-remaining-requests") == left
        response = await hub.post(CHAT, WHOLE, token)
        assert response.status == 429
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert "rpm = 2" in response.json()["error"]["message"]
        assert 1 <= int(response.header("retry-after") or "") <= 61
        assert len(worker.requests) == 2
        assert (await hub.post(CHAT, WHOLE, hub.token("bob", rpm=2))).status == 200


@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
async def test_tokens_a_minute_are_those_of_prompt_and_answer(
    payload: dict[str, Any],
) -> None:
    """As the worker counts them, whether or not the client has asked for usage."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token(tpm=30)
        usage = usage_of(5, 20)
        if payload is STREAM:
            worker.script(*chat_stream(["a"] * 5))
        else:
            worker.script(*answer({"choices": [], "usage": usage}))
        assert (await hub.post(CHAT, payload, token)).status == 200
        response = await hub.post(CHAT, payload, token)
        assert response.status == 200
        assert response.header("x-ratelimit-remaining-tokens") == "5"
        assert (await hub.post(CHAT, payload, token)).status == 429


async def test_the_official_client_sees_a_rate_limit() -> None:
    import openai

    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        client = openai.AsyncOpenAI(
            base_url=f"{hub.url}/v1", api_key=hub.token(rpm=1), max_retries=0
        )
        async with client:
            await client.chat.completions.create(model="tiny", messages=[])
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model="tiny", messages=[])


async def test_a_request_that_is_refused_touches_no_worker_and_no_body() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token(rpm=1)
        await hub.post(CHAT, WHOLE, token)
        async with await hub.wire() as wire:
            await wire.post(CHAT, b"", token, headers=[("Content-Length", "9999999")])
            assert (await wire.read_response()).status == 429
        assert len(worker.requests) == 1
