"""A token may limit the requests and tokens of its subject per minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.state.ledger import day_of
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import usage_of
from tests.fakes.script import answer, chat_stream
from tests.fakes.worker import ScriptedWorker

NOON = day_of("2026-11-29") * 86_400 + 43_200.0


async def stop_calendar(hub: RunningHub) -> None:
    """Let no midnight come during a test."""
    hub.hub.ledger.clock = Clock(NOON)
    await hub.hub.ledger.save()  # it finds the usage of another day


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


def script_usage(worker: ScriptedWorker, payload: dict[str, Any]) -> None:
    """Let the worker answer with 5 tokens, to a prompt of 20."""
    if payload is STREAM:
        worker.script(*chat_stream(["a"] * 5))
    else:
        worker.script(*answer({"choices": [], "usage": usage_of(5, 20)}))


@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
async def test_tokens_a_minute_are_those_of_prompt_and_answer(
    payload: dict[str, Any],
) -> None:
    """As the worker counts them, whether or not the client has asked for usage."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        token = hub.token(tpm=30)
        script_usage(worker, payload)
        assert (await hub.post(CHAT, payload, token)).status == 200
        response = await hub.post(CHAT, payload, token)
        assert response.status == 200
        assert response.header("x-ratelimit-remaining-tokens") == "5"
        assert (await hub.post(CHAT, payload, token)).status == 429


@pytest.mark.parametrize(
    ("claim", "days", "end"),
    [
        ("tokens_per_day", 0.5, "2026-11-30 00:00 UTC"),
        ("tokens_per_month", 1.5, "2026-12-01 00:00 UTC"),
    ],
)
@pytest.mark.parametrize("payload", [WHOLE, STREAM], ids=["whole", "stream"])
async def test_tokens_of_a_day_and_a_month_are_limited(
    payload: dict[str, Any], claim: str, days: float, end: str
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await stop_calendar(hub)
        token = hub.token(**{claim: 30})
        script_usage(worker, payload)
        assert (await hub.post(CHAT, payload, token)).status == 200
        response = await hub.post(CHAT, payload, token)
        assert response.status == 200
        assert response.header("x-ratelimit-limit-tokens") is None
        refused = await hub.post(CHAT, payload, token)
        assert refused.status == 429
        error = refused.json()["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert f"{claim} = 30" in error["message"]
        assert end in error["message"]
        assert refused.header("retry-after") == str(round(days * 86_400))
        assert len(worker.requests) == 2
        assert (await hub.post(CHAT, WHOLE, hub.token("bob"))).status == 200


async def test_a_limit_per_day_has_tokens_counted_by_any_server() -> None:
    """Another server than llama-server reports no usage unless it is asked."""
    async with ScriptedWorker(build="") as worker, running_hub(worker) as hub:
        await hub.post(CHAT, STREAM, hub.token(tokens_per_day=100))
    assert worker.requests[0].json()["stream_options"] == {"include_usage": True}


async def test_quotas_of_days_survive_a_restart(tmp_path: Path) -> None:
    # In whatever year it runs, that day is not too old to be kept.
    kept = {"state__dir": tmp_path, "usage__days": 3660}
    async with ScriptedWorker() as worker:
        worker.script(*answer({"choices": [], "usage": usage_of(5, 20)}))
        async with running_hub(worker, **kept) as hub:
            await stop_calendar(hub)
            token = hub.token(tokens_per_day=25)
            assert (await hub.post(CHAT, WHOLE, token)).status == 200
        async with running_hub(worker, **kept) as hub:
            await stop_calendar(hub)
            refused = await hub.post(CHAT, WHOLE, token)
            assert refused.status == 429
            more = hub.token(tokens_per_day=26)
            assert (await hub.post(CHAT, WHOLE, more)).status == 200


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
