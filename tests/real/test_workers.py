"""The main job, with real llama-servers: what people will use the hub for."""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from gollama_proxy.fleet.state import WorkerState
from tests.fakes.client import TruncatedError, Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, until
from tests.real.llama import LlamaServer

if TYPE_CHECKING:  # they are slow to import, and few tests need them
    import openai

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]


def chat(**fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello"}
    return {"model": "tiny", "messages": [message], "max_tokens": 8, **fields}


@asynccontextmanager
async def client_of(hub: RunningHub) -> AsyncIterator[openai.AsyncOpenAI]:
    import openai

    base = f"{hub.url}/v1"
    async with openai.AsyncOpenAI(
        base_url=base, api_key=hub.token(), max_retries=0, timeout=DEADLINE
    ) as client:
        yield client


# --- The official client ----------------------------------------------------------


async def test_the_openai_client_completes(
    tiny_model: Path, llama_server: Start
) -> None:
    """The greedy text of the test model is known (it is the same in every build)."""
    async with running_hub(llama_server(tiny_model)) as hub, client_of(hub) as client:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            temperature=0,
            seed=1,
        )
        assert answer.choices[0].message.content == " no towu ze vide fe ri"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8


async def test_the_openai_client_streams(tiny_model: Path, llama_server: Start) -> None:
    """Pieces of a stream make up the text of the answer that is not streamed."""
    async with running_hub(llama_server(tiny_model)) as hub, client_of(hub) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            temperature=0,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        pieces = [c.delta.content or "" for chunk in chunks for c in chunk.choices]
        assert "".join(pieces) == " no towu ze vide fe ri"
        assert len([piece for piece in pieces if piece]) > 4
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8


async def test_the_openai_client_understands_models_and_errors(
    tiny_model: Path, llama_server: Start
) -> None:
    import openai

    async with (
        running_hub(llama_server(tiny_model), models__strict_models=True) as hub,
        client_of(hub) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist"):
            await client.chat.completions.create(
                model="gpt-9", messages=[{"role": "user", "content": "hello"}]
            )
        with pytest.raises(openai.BadRequestError, match="context") as caught:
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "zo " * 3000}]
            )
        assert caught.value.code == "context_length_exceeded"
        stranger = client.with_options(api_key="not-a-token")
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_an_unknown_name_goes_to_the_only_model(
    tiny_model: Path, llama_server: Start
) -> None:
    async with running_hub(llama_server(tiny_model)) as hub, client_of(hub) as client:
        answer = await client.chat.completions.create(
            model="gpt-4o-mini",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=2,
        )
        assert answer.model == "tiny"


async def test_the_other_routes_work(
    tiny_model: Path, embed_model: Path, llama_server: Start
) -> None:
    """Embeddings, reranking, native and Anthropic routes answer as the worker does."""
    workers = (
        llama_server(tiny_model),
        llama_server(embed_model, name="embed", args=("--embedding",)),
        llama_server(embed_model, name="rank", args=("--reranking",)),
    )
    requests: dict[str, tuple[dict[str, Any], str]] = {
        "/v1/embeddings": ({"model": "embed", "input": ["zo", "mi"]}, "data"),
        "/v1/rerank": (
            {"model": "rank", "query": "zo", "documents": ["zo", "mi"]},
            "results",
        ),
        "/tokenize": ({"model": "tiny", "content": "zo mi"}, "tokens"),
        "/detokenize": ({"model": "tiny", "tokens": [300]}, "content"),
        "/apply-template": (chat(), "prompt"),
        "/completion": ({"model": "tiny", "prompt": "zo", "n_predict": 4}, "content"),
        "/v1/completions": (
            {"model": "tiny", "prompt": "zo", "max_tokens": 4},
            "choices",
        ),
        "/v1/messages": (chat(), "content"),
        "/v1/messages/count_tokens": (chat(), "input_tokens"),
        "/v1/responses": ({"model": "tiny", "input": "zo"}, "output"),
        "/infill": (
            {"model": "tiny", "input_prefix": "a", "input_suffix": "b", "n_predict": 2},
            "content",
        ),
    }
    async with running_hub(*workers) as hub:
        for path, (body, key) in requests.items():
            answer = await hub.post(path, body)
            assert answer.status == 200, (path, answer)
            assert key in answer.json(), path


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/chat/completions", b"data: [DONE]"),
        ("/completion", b'"stop":true'),
        ("/v1/messages", b"message_stop"),
        ("/v1/responses", b"response.completed"),
    ],
)
async def test_every_kind_of_stream_ends_cleanly(
    path: str, last: bytes, tiny_model: Path, llama_server: Start
) -> None:
    """How llama-server marks the end on each route is what the hub looks for."""
    body = chat(stream=True, prompt="zo", n_predict=8, input="zo", max_output_tokens=8)
    async with running_hub(llama_server(tiny_model)) as hub:
        async with await hub.open(path, body) as wire:
            ending = await wire.read_to_end()
        assert ending.clean
        assert last in ending.response.body
        assert b'"error"' not in ending.response.body


# --- Many at once -----------------------------------------------------------------


async def test_llama_server_is_known_to_close_connections_after_streams(
    tiny_model: Path, llama_server: Start
) -> None:
    """However streams and other requests follow each other, none finds a dead one."""
    server = llama_server(tiny_model)
    async with running_hub(server, retry__attempts=1) as hub:
        [pool] = hub.hub.connections.values()
        began = time.monotonic()
        number = 0
        while time.monotonic() < began + 2.5 or number < 30:  # two rounds, at least
            number += 1
            body = chat(stream=number % 3 > 0, max_tokens=1)
            assert (await hub.post("/v1/chat/completions", body)).status == 200
            assert not pool.keeps_after_streams
            await asyncio.sleep(0.02)  # a hundred are enough


async def test_fifty_streams_are_shared_evenly_and_all_complete(
    tiny_model: Path, llama_server: Start
) -> None:
    """None waits behind another on one worker: both have slots for their half."""
    workers = [
        llama_server(tiny_model, slots=32, ctx=32 * 256),
        llama_server(tiny_model, slots=32, ctx=32 * 256),
    ]
    async with (
        # All have the same prompt, which would keep them on the worker that knows it.
        running_hub(*workers, routing__policy="round_robin") as hub,
        client_of(hub) as client,
    ):

        async def one() -> tuple[str, int]:
            raw = await client.chat.completions.with_raw_response.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=40,
                stream=True,
            )
            finish, tokens = None, 0
            async for chunk in raw.parse():
                tokens += bool(chunk.choices and chunk.choices[0].delta.content)
                finish = chunk.choices[0].finish_reason if chunk.choices else finish
            assert finish == "length"
            return raw.headers["x-gollama-worker"], tokens

        results = await asyncio.gather(*(one() for _ in range(50)))
    shares = collections.Counter(worker for worker, _ in results)
    assert sorted(shares.values()) == [25, 25]
    assert all(tokens > 20 for _, tokens in results)


# --- Leaving, dying, coming back --------------------------------------------------


async def busy_slots(server: LlamaServer) -> int:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/slots") as answer:
            return sum(slot["is_processing"] for slot in await answer.json())


async def test_a_client_that_leaves_frees_the_slot(
    slow_model: Path, llama_server: Start
) -> None:
    server = llama_server(slow_model, args=("--slots",))
    async with running_hub(server) as hub:
        async with await hub.open(
            "/v1/chat/completions", chat(stream=True, max_tokens=1000)
        ) as wire:
            await wire.read_event()
            assert await busy_slots(server) == 1
            wire.abort()
        async with asyncio.timeout(DEADLINE):
            while await busy_slots(server):
                await asyncio.sleep(0.05)
        assert hub.hub.registry.workers[0].in_flight == 0


async def read_until_broken(wire: Wire) -> list[bytes]:
    events: list[bytes] = []
    with pytest.raises(TruncatedError):
        while (event := await wire.read_event()) is not None:
            events.append(event)
    return events


async def test_a_worker_that_is_killed_ends_its_answer_honestly(
    slow_model: Path, llama_server: Start
) -> None:
    """The client gets what came, an error event, and no end that looks like one."""
    server = llama_server(slow_model)
    async with running_hub(server) as hub:
        async with await hub.open(
            "/v1/chat/completions", chat(stream=True, max_tokens=1000)
        ) as wire:
            await wire.read_event()
            server.signal(signal.SIGKILL)
            events = await read_until_broken(wire)
        assert b"worker_connection_lost" in events[-1]
        assert not any(b"[DONE]" in event for event in events)


async def test_a_worker_that_comes_back_with_another_model_is_picked_up(
    tiny_model: Path, llama_server: Start
) -> None:
    """No restart of the hub: down is noticed, and what it serves is learnt again."""
    server = llama_server(tiny_model)
    async with running_hub(server, health__recheck=0.02, health__interval=0.1) as hub:
        worker = hub.hub.registry.workers[0]
        assert (await hub.post("/v1/chat/completions", chat())).status == 200
        server.kill()
        await until(lambda: worker.state is WorkerState.DOWN)
        refused = await hub.post("/v1/chat/completions", chat())
        assert refused.status == 503
        assert refused.header("retry-after") is not None
        assert (await hub.get("/readyz", token=None)).status == 503
        server._arguments[server._arguments.index("--alias") + 1] = "other"
        server.launch()
        await until(lambda: worker.available)
        models = (await hub.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["other"]
        answer = await hub.post("/v1/chat/completions", chat(model="other"))
        assert answer.json()["model"] == "other"


async def test_a_worker_behind_a_key_is_used_with_it(
    tiny_model: Path, llama_server: Start, tmp_path: Path
) -> None:
    """The client's token never gets there; the worker's key never gets out."""
    server = llama_server(tiny_model, args=("--api-key", "worker-key-1"))
    settings = tmp_path / "gollama.toml"
    settings.write_text(f'[[workers]]\nurl = "{server.url}"\napi_key_env = "LAB_KEY"\n')
    environ = {"LAB_KEY": "worker-key-1"}
    async with running_hub(environ=environ, file=settings) as hub:
        answer = await hub.post("/v1/chat/completions", chat())
        assert answer.status == 200
        assert b"worker-key-1" not in json.dumps(answer.headers).encode() + answer.body
