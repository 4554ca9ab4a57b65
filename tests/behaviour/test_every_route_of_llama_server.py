"""Each route of a llama-server is forwarded, answered by the hub, or refused."""

from __future__ import annotations

import pytest

from gollama_proxy.wire.schema import ENDPOINTS, REFUSED
from tests.fakes.asks import WHOLE
from tests.fakes.cases import case
from tests.fakes.hub import running_hub
from tests.fakes.script import answer, notify, stall
from tests.fakes.worker import ScriptedWorker

# What tools/server/server.cpp of llama.cpp b11434 registers, its router mode included.
THEIRS = """
POST /models
POST /models/load
POST /models/unload
GET /models/sse
DELETE /models
GET /health
GET /v1/health
GET /metrics
GET /props
POST /props
GET /models
GET /v1/models
POST /completion
POST /completions
POST /v1/completions
POST /chat/completions
POST /v1/chat/completions
POST /v1/chat/completions/control
POST /v1/responses
POST /responses
POST /v1/audio/transcriptions
POST /audio/transcriptions
POST /v1/messages
POST /infill
POST /embedding
POST /embeddings
POST /v1/embeddings
POST /rerank
POST /reranking
POST /v1/rerank
POST /v1/reranking
POST /v1/systemone
POST /tokenize
POST /detokenize
POST /apply-template
POST /chat/completions/input_tokens
POST /v1/chat/completions/input_tokens
POST /responses/input_tokens
POST /v1/responses/input_tokens
POST /v1/messages/count_tokens
GET /lora-adapters
POST /lora-adapters
GET /slots
POST /slots/:id_slot
GET /v1/stream
POST /v1/streams/lookup
DELETE /v1/stream
GET /cors-proxy
POST /cors-proxy
GET /tools
POST /tools
POST /predict
""".strip().splitlines()
# Answered by the hub itself.
OWN = {
    "GET /health",
    "GET /v1/health",
    "GET /metrics",
    "GET /models",
    "GET /v1/models",
}
COUNTING = [
    "/v1/chat/completions/input_tokens",
    "/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
    "/responses/input_tokens",
    "/v1/messages/count_tokens",
]


def test_each_route_is_in_exactly_one_list() -> None:
    forwarded = {f"POST {path}" for path in ENDPOINTS}
    for route in THEIRS:
        lists = [forwarded, OWN, REFUSED.keys()]
        assert sum(route in each for each in lists) == 1, route
    assert {*forwarded, *OWN, *REFUSED} == set(THEIRS)
    assert all(REFUSED.values())


async def test_a_refused_route_reaches_no_worker() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker) as hub,
    ):
        for route in REFUSED:
            with case(route):
                method, path = route.replace(":id_slot", "0").split()
                async with await hub.wire() as wire:
                    await wire.get(path, hub.token(), method=method)
                    response = await wire.read_response()
                assert response.status in (404, 405)
                assert not worker.requests


async def test_the_health_route_has_two_names() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in ("/health", "/v1/health"):
            assert (await hub.get(path, None)).status == 200


@pytest.mark.parametrize("path", COUNTING)
async def test_counting_tokens_needs_no_slot_and_is_free(path: str) -> None:
    """All slots are taken, and the queue has no room."""
    async with (
        ScriptedWorker(slots=1) as worker,
        running_hub(worker, queue__size=0) as hub,
    ):
        worker.script(notify("running"), stall())
        async with await hub.open("/v1/chat/completions", WHOLE):
            await worker.event("running").wait()
            worker.script(*answer({"input_tokens": 12}))
            response = await hub.post(
                path, WHOLE | {"input": "hello"}, hub.token(tpm=5)
            )
            assert response.status == 200
            assert response.json() == {"input_tokens": 12}
            assert response.header("x-ratelimit-remaining-tokens") == "5"
            response = await hub.post(path, WHOLE, hub.token(tpm=5))
            assert response.header("x-ratelimit-remaining-tokens") == "5"
