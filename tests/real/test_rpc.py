"""One model over two `ggml-rpc-server`s is one worker; what happens when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.fleet.state import Hold, WorkerState
from tests.behaviour.test_agents import reserved
from tests.fakes.agent import AgentProcess
from tests.fakes.asks import CHAT
from tests.fakes.client import Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, until
from tests.real.llama import LlamaServer, RpcServer, binary

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]

# It goes on for longer than it takes to kill a process.
STORY: dict[str, Any] = {
    "model": "brisk",
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "temperature": 0,
    "max_tokens": 4000,
    "stream": True,
}
SHORT = STORY | {"max_tokens": 4, "stream": False}
# A worker is known to be down, and known to be back, as soon as it is checked; and an
# answer that breaks off waits for no other worker.
EAGER = {"health__fall": 1, "health__recheck": 0.1, "retry__patience": 0.1}


@pytest.fixture(autouse=True)
def no_backtrace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gdb is installed, a crash would take seconds."""
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")


@contextlib.asynccontextmanager
async def two_helpers(folder: Path) -> AsyncIterator[tuple[RpcServer, RpcServer]]:
    """Reserve a place for each of two helpers; neither runs yet."""
    async with reserved() as one, reserved() as two:
        helpers = RpcServer(one, folder / "one.log"), RpcServer(two, folder / "two.log")
        try:
            yield helpers
        finally:
            for each in helpers:
                each.kill()


def flags(*helpers: RpcServer) -> tuple[str, ...]:
    places = ",".join(each.place for each in helpers)
    return "--rpc", places, "-ngl", "99", "--no-warmup"


@contextlib.asynccontextmanager
async def begun(hub: RunningHub) -> AsyncIterator[Wire]:
    """Ask for a story, and wait until it has begun."""
    async with await hub.open(CHAT, STORY) as wire:
        await wire.read_head()
        for _ in range(3):
            await wire.read_event()
        yield wire


async def answered(hub: RunningHub) -> str:
    """Wait until a question is answered; return by which worker."""
    async with asyncio.timeout(2 * DEADLINE):
        while (reply := await hub.post(CHAT, SHORT)).status != 200:
            await asyncio.sleep(0.1)
    return reply.header("X-Gollama-Worker") or ""


async def test_a_helper_that_dies_takes_its_server_and_no_answer_with_it(
    brisk_model: Path, llama_server: Start, tmp_path: Path
) -> None:
    async with two_helpers(tmp_path) as helpers:
        for each in helpers:
            each.start()
        split = llama_server(
            brisk_model, name="brisk", slots=1, ctx=8192, args=flags(*helpers)
        )
        spare = llama_server(brisk_model, name="brisk", slots=1, ctx=8192)
        for each in helpers:
            assert "Accepted client connection" in each.log.read_text()
        async with running_hub(split, spare, **EAGER) as hub:
            first, second = (each.name for each in hub.hub.registry.workers)
            hub.hub.registry.hold(second, Hold.PAUSED)
            assert await answered(hub) == first

            # Without another worker, the answer breaks off, and that is visible.
            async with begun(hub) as wire:
                helpers[1].kill()
                ending = await wire.read_to_end()
            assert split.wait() == -signal.SIGABRT
            assert not ending.clean
            assert b'"code":"worker_connection_lost"' in ending.response.body
            assert b"[DONE]" not in ending.response.body
            head = hub.hub.registry.find(first)
            await until(lambda: head.reason == "connection refused")
            assert head.state is WorkerState.DOWN
            assert (await hub.post(CHAT, SHORT)).status == 503

            # Started again, it is used again.
            helpers[1].start()
            split.start()
            assert await answered(hub) == first

            # With another one, the answer is continued there.
            async with begun(hub) as wire:
                hub.hub.registry.release(second, Hold.PAUSED)
                helpers[0].kill()
                while (event := await wire.read_event()).startswith(b"data: {"):
                    assert b'"error"' not in event
                assert event.startswith(b": gollama rescued 1 by"), event
                assert b'"content"' in await wire.read_event()
            assert await answered(hub) == second


async def test_an_agent_starts_a_server_when_all_of_its_helpers_are_there(
    brisk_model: Path, tmp_path: Path
) -> None:
    """Without one, llama-server would load the whole model on its own machine."""
    async with (
        two_helpers(tmp_path) as helpers,
        reserved() as port,
        running_hub(agents__lease=600, **EAGER) as hub,
    ):
        helpers[0].start()
        missing = helpers[1].place
        command = [str(binary()), "-m", str(brisk_model), "--alias", "brisk"]
        command += ["-np", "1", "-c", "8192", "-t", "1", "--port", str(port)]
        command += flags(*helpers)
        granted = hub.token("big", scope="worker")
        arguments = ("--hub", hub.url, "--name", "big", "--exec", "--", *command)
        async with AgentProcess.serving(*arguments, token=granted) as agent:
            await agent.until(f"not starting the server: no connection to {missing}")
            await until(lambda: _reason(hub) == f"waits for helpers: {missing}")
            assert "started" not in agent.output

            helpers[1].start()
            await agent.started()
            assert await answered(hub) == "big"

            async with begun(hub) as wire:
                helpers[1].kill()
                ending = await wire.read_to_end()
            assert not ending.clean
            await agent.until("ended with SIGABRT; again in 1 s")
            await until(lambda: _reason(hub) == f"waits for helpers: {missing}")

            helpers[1].start()
            await agent.started(2)
            assert await answered(hub) == "big"
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0


def _reason(hub: RunningHub) -> str:
    """Return why the worker is down, as operators see it."""
    reasons = [hub.hub.views.worker(w)["reason"] for w in hub.hub.registry.workers]
    return "".join(reasons).removeprefix("its server ")
