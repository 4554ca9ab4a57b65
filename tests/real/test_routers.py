"""Real llama-servers in router mode: models are loaded when they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Health
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.pool import Target
from gollama_proxy.upstream.probe import MAX_ANSWER, fetch
from tests.fakes.asks import CHAT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, until
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real


def ask(model: str, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello"}
    return {"model": model, "messages": [message], "max_tokens": 8, **fields}


async def loaded(hub: RunningHub, model: str) -> list[bool | None]:
    row = (await hub.get(f"/v1/models/{model}")).json()
    return [worker["loaded"] for worker in row["gollama"]["workers"]]


async def test_a_router_loads_on_demand_and_loaded_workers_are_preferred(
    tiny_model: Path,
    llama_server: Callable[..., LlamaServer],
    tmp_path: Path,
) -> None:
    for name in ("alpha", "beta"):
        (tmp_path / "models").mkdir(exist_ok=True)
        shutil.copy(tiny_model, tmp_path / "models" / f"{name}.gguf")
    mode = ("--models-dir", str(tmp_path / "models"), "--models-max", "1")
    servers = [llama_server(None, name=name, args=mode) for name in ("one", "two")]
    async with running_hub(*servers, health__interval=3600) as hub:
        workers = hub.hub.registry.workers
        assert await loaded(hub, "alpha") == await loaded(hub, "beta") == [False] * 2
        assert workers[0].context_of("alpha") is None
        first = await hub.post(CHAT, ask("alpha"))
        assert first.json()["model"] == "alpha"
        home = first.header("x-gollama-worker")
        for _ in range(4):
            again = await hub.post(CHAT, ask("alpha", stream=True))
            assert again.header("x-gollama-worker") == home
            assert b"[DONE]" in again.body
        # A health check has run, and learnt the context with it.
        [at] = [index for index, each in enumerate(workers) if each.name == home]
        await until(lambda: workers[at].context_of("alpha") == 1024)
        assert await loaded(hub, "alpha") == [index == at for index in (0, 1)]
        # The other model has the other worker to go to, but may evict as well.
        other = await hub.post(CHAT, ask("beta"))
        assert other.status == 200
        there = other.header("x-gollama-worker")
        [at] = [index for index, each in enumerate(workers) if each.name == there]
        await until(lambda: workers[at].has_loaded("alpha") is False)
        assert await loaded(hub, "beta") == [index == at for index in (0, 1)]


async def test_a_prompt_is_counted_by_a_router(
    tiny_model: Path, llama_server: Callable[..., LlamaServer], tmp_path: Path
) -> None:
    """Once the model is loaded; a count is no reason to load it."""
    (tmp_path / "models").mkdir()
    shutil.copy(tiny_model, tmp_path / "models" / "alpha.gguf")
    mode = ("--models-dir", str(tmp_path / "models"))
    async with running_hub(llama_server(None, args=mode)) as hub:
        [worker] = hub.hub.registry.workers
        long = ask("alpha", messages=[{"role": "user", "content": "zo " * 3000}])
        first = await hub.post(CHAT, long)
        assert first.status == 400  # in the worker's words, as nothing was known
        assert "3020 tokens" in first.json()["error"]["message"]
        await until(lambda: worker.context_of("alpha") == 1024)
        second = await hub.post(CHAT, long)
        assert second.json()["error"]["code"] == "context_length_exceeded"
        assert second.header("x-gollama-worker") is None


async def test_a_router_reports_how_far_it_has_loaded_a_model(
    tiny_model: Path, llama_server: Callable[..., LlamaServer], tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(tiny_model, tmp_path / "models" / "alpha.gguf")
    server = llama_server(None, args=("--models-dir", str(tmp_path / "models")))
    [worker] = config.load(None, {}, {}, [server.url]).workers
    target, health = Target(worker), Health()
    notes: list[tuple[str, float | None]] = []

    async def have(path: str, status: str) -> None:
        """Load or unload the model, and wait until that is done."""
        body = b'{"model": "alpha"}'
        reply = await fetch(target, path, body, limit=MAX_ANSWER, timeout=DEADLINE)
        assert reply.status == 200
        while status not in await models():
            pass

    async def models() -> str:
        reply = await fetch(target, "/models", limit=MAX_ANSWER, timeout=DEADLINE)
        [row] = json.loads(reply.body)["data"]
        return str(row["status"]["value"]).join("<>")

    async with asyncio.timeout(DEADLINE):
        following = asyncio.create_task(
            probe.follow_loading(target, lambda *note: notes.append(note), health)
        )
        while ("alpha", 1.0) not in notes or notes[-1] != ("alpha", None):
            await have("/models/load", "<loaded>")
            await have("/models/unload", "<unloaded>")
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
