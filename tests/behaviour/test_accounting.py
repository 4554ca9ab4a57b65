"""What was used outlives the process of the hub, however that ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.test_rescue import BREAKS, asked, continued, pool
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.client import Wire
from tests.fakes.hub import mint, running_hub
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.replies import chunk, error_reply, role, sse_head, token, usage_of
from tests.fakes.script import answer, send, stall
from tests.fakes.waiting import gone, until
from tests.fakes.worker import ScriptedWorker

# By the month, so that a midnight during a test makes no difference.
LIMITED = {"sub": "alice", "tokens_per_month": 100}
ANSWER = answer({"choices": [], "usage": usage_of(5, 20)})  # 25 tokens


async def ask(hub: HubProcess, **claims: Any) -> int:
    """Send a request, and return the status of its answer."""
    async with await Wire.connect("127.0.0.1", hub.port) as wire:
        await wire.post(CHAT, WHOLE, mint(**{"sub": "alice", **claims}))
        return (await wire.read_response()).status


async def stored(folder: Path) -> int:
    """Return the number of requests in the database of a state folder."""

    def read() -> int:
        with closing(sqlite3.connect(folder / "usage.db")) as database:
            [(count,)] = database.execute("SELECT sum(requests) FROM usage")
        return count or 0

    return await asyncio.to_thread(read)


async def test_a_stopped_hub_loses_nothing(tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        worker.default(*ANSWER)
        async with hub_process(worker.url, state__dir=tmp_path) as hub:
            for _ in range(4):
                assert await ask(hub, **LIMITED) == 200
        assert await stored(tmp_path) == 4
        async with hub_process(worker.url, state__dir=tmp_path) as hub:
            assert await ask(hub, **LIMITED) == 429
            assert await ask(hub, sub="bob") == 200
        assert len(worker.requests) == 5
    assert await stored(tmp_path) == 5


async def test_a_killed_hub_has_what_it_wrote_each_second(tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        worker.default(*ANSWER)
        async with hub_process(worker.url, state__dir=tmp_path) as hub:
            for _ in range(4):
                assert await ask(hub, **LIMITED) == 200
            while await stored(tmp_path) < 4:
                await asyncio.sleep(0.02)
            assert await ask(hub, sub="bob") == 200
            os.kill(hub.pid, signal.SIGKILL)
            await gone(hub.pid)
        assert await stored(tmp_path) in (4, 5)  # the last second may be lost
        async with hub_process(worker.url, state__dir=tmp_path) as hub:
            assert await ask(hub, **LIMITED) == 429


# --- What counts ------------------------------------------------------------------


async def total(hub: Any, **claims: Any) -> dict[str, Any]:
    shown = (await hub.get("/v1/usage", hub.token(**claims))).json()
    assert isinstance(shown["total"], dict)
    return shown["total"]


async def test_a_rescued_answer_is_one_request() -> None:
    """Its prompt counts once, and its slots are those of both workers."""
    async with pool() as ([bad, good], hub):
        bad.script(*BREAKS["reset"])
        good.script(*continued())
        await asked(hub)
        await until(lambda: not hub.hub.proxy.running)
        used = await total(hub)
        assert (used["requests"], used["errors"]) == (1, 0)
        assert used["prompt_tokens"] > 0
        assert used["completion_tokens"] > 1


async def test_a_client_that_leaves_has_used_what_was_generated() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head() + chunk(role() + token("a") + token("b"))), stall()
        )
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_until(b'"b"')
        await until(lambda: not hub.hub.proxy.running)
        used = await total(hub)
        assert (used["requests"], used["errors"]) == (1, 0)
        assert used["completion_tokens"] >= 2  # events: the worker has counted none


@pytest.mark.parametrize("status", [400, 500])
async def test_an_error_of_a_worker_is_an_error(status: int) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        worker.default(send(error_reply(status, "x")))
        assert (await hub.post(CHAT, WHOLE)).status >= 400
        used = await total(hub)
        assert (used["requests"], used["errors"]) == (1, 1)
