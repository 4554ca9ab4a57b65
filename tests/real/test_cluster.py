"""Two hub processes share a real llama-server: its own queue stays empty."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.client import Response, Wire
from tests.fakes.crowd import acts_with, running_hubs
from tests.fakes.hub import mint
from tests.fakes.process import HubProcess
from tests.fakes.valkey import running_store
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

QUESTION: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 16,
    "temperature": 0,
}


async def ask(hub: HubProcess, subject: str) -> Response:
    async with await Wire.connect("127.0.0.1", hub.port) as wire:
        await wire.post(CHAT, QUESTION, mint(sub=subject))
        return await wire.read_response()


async def deferred(server: LlamaServer) -> int:
    """Return how many requests wait in a llama-server for one of its slots."""
    async with await Wire.connect("127.0.0.1", server.port) as wire:
        await wire.get("/metrics")
        page = (await wire.read_response()).body.decode()
    match = re.search(r"(?m)^llamacpp:requests_deferred (\d+)", page)
    assert match is not None, page
    return int(match[1])


async def test_two_hubs_never_queue_in_a_llama_server(
    tmp_path: Path, tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    server = llama_server(tiny_model, slots=2, args=("--metrics",))
    async with (
        running_store(tmp_path) as store,
        running_hubs(2, server.url, times="patient", state__url=store.url) as hubs,
    ):
        for hub in hubs:
            await acts_with(hub, 2)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(ask(hubs[n % 2], f"user-{n % 5}"), name="fake client")
                for n in range(24)
            ]
            waited = 0
            while not all(task.done() for task in tasks):
                waited = max(waited, await deferred(server))
        answers = [task.result() for task in tasks]
        assert {answer.status for answer in answers} == {200}
        texts = {
            answer.json()["choices"][0]["message"]["content"] for answer in answers
        }
        assert len(texts) == 1
        assert waited == 0
        os.kill(hubs[0].pid, signal.SIGKILL)
        assert (await ask(hubs[1], "user-0")).status == 200
