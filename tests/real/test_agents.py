"""An agent that starts a real llama-server brings it, and brings it back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.machine import find_free_ports
from tests.fakes.agent import AgentProcess
from tests.fakes.asks import CHAT
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, gone
from tests.real import llama

pytestmark = pytest.mark.real

QUESTION: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 5,
}


async def answer(hub: RunningHub) -> Response:
    """Wait until a chat is answered."""
    async with asyncio.timeout(2 * DEADLINE):
        while True:
            reply = await hub.post(CHAT, QUESTION)
            if reply.status == 200:
                return reply
            await asyncio.sleep(0.05)


async def test_a_server_that_an_agent_started(tiny_model: Path) -> None:
    (port,) = find_free_ports(1)
    command = [str(llama.binary()), "-m", str(tiny_model), "--alias", "tiny"]
    command += ["-np", "2", "-c", "1024", "-t", "1", "--port", str(port)]
    # Nothing but the agent's reports leads to another check in this time.
    async with running_hub(agents__lease=600, health__interval=600) as hub:
        granted = hub.token("desk", scope="worker")
        arguments = ("--hub", hub.url, "--name", "desk", "--exec", "--", *command)
        async with AgentProcess.serving(*arguments, token=granted) as agent:
            reply = await answer(hub)
            assert reply.header("X-Gollama-Worker") == "desk"
            assert reply.json()["choices"][0]["message"]["content"]
            first = await agent.started()
            assert "llama" in agent.output  # its log comes through

            os.kill(first, signal.SIGKILL)
            await agent.until("ended with SIGKILL; again in 1 s")
            second = await agent.started(2)
            await agent.until("(?s)ended with SIGKILL.*the server answers")
            assert (await answer(hub)).header("X-Gollama-Worker") == "desk"

            body = json.dumps(QUESTION | {"stream": True, "max_tokens": 200})
            async with await hub.open(CHAT, body.encode()) as client:
                await client.read_head()
                agent.signal(signal.SIGTERM)
                ending = await client.read_to_end()
                assert b"data: [DONE]" in ending.raw
            assert await agent.ended() == 0
            await gone(second)
        assert hub.hub.registry.workers == []
