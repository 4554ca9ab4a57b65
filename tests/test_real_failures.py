"""Real llama-servers that are stopped, killed and restarted under load."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.routing.breaker import State
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, until
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]
# Quick enough for a test: an overdue first token after half a second.
IMPATIENT: dict[str, Any] = {
    "retry__attempts": 3,
    "retry__ratio": 1,
    "timeouts__allowance": 0.5,
    "breaker__open": 0.5,
    "breaker__ramp": 0.5,
    "health__recheck": 0.05,
}


async def one_stream(hub: RunningHub) -> tuple[str, float]:
    """Stream an answer to its end; tell its worker and the time to its first event."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "stream": True,
    }
    began = time.monotonic()
    async with await hub.open("/v1/chat/completions", body) as wire:
        await wire.read_event()
        first = time.monotonic() - began
        ending = await wire.read_to_end()
    assert ending.clean
    assert b"data: [DONE]" in ending.raw
    return ending.response.header("x-gollama-worker") or "", first


async def test_a_stopped_worker_fails_nobody_and_is_taken_back(
    tiny_model: Path, llama_server: Start
) -> None:
    """SIGSTOP: it accepts connections and says nothing, the worst kind of dead."""
    servers = [llama_server(tiny_model, slots=16, ctx=16 * 256) for _ in range(3)]
    async with running_hub(*servers, **IMPATIENT) as hub:
        stopped = hub.hub.registry.workers[0]
        servers[0].signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                results = await asyncio.gather(*(one_stream(hub) for _ in range(12)))
                # The allowance, and one attempt more.
                assert max(first for _, first in results) < 0.5 + 2.0
            await until(lambda: not stopped.available)
            results = await asyncio.gather(*(one_stream(hub) for _ in range(12)))
            assert stopped.name not in {worker for worker, _ in results}
        finally:
            servers[0].signal(signal.SIGCONT)
        await until(lambda: stopped.available)
        assert stopped.breaker.state is State.CLOSED
        served = set()
        async with asyncio.timeout(DEADLINE):
            while stopped.name not in served:
                served |= {(await one_stream(hub))[0]}


async def test_a_killed_worker_fails_no_new_request(
    tiny_model: Path, llama_server: Start
) -> None:
    """What it had not begun to answer goes to the others."""
    servers = [llama_server(tiny_model, slots=16, ctx=16 * 256) for _ in range(2)]
    async with running_hub(*servers, **IMPATIENT) as hub:
        servers[0].signal(signal.SIGKILL)
        results = await asyncio.gather(*(one_stream(hub) for _ in range(20)))
        alive = hub.hub.registry.workers[1].name
        assert {worker for worker, _ in results} == {alive}
