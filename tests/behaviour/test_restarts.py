"""What was changed while a hub ran is there when the next one starts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gollama_proxy.state.facts import StoredWorker
from gollama_proxy.state.local import LocalState
from tests.fakes.asks import CHAT
from tests.fakes.hub import running_hub
from tests.fakes.worker import ScriptedWorker

QUESTION = {"messages": []}


async def keep(folder: Path, *workers: StoredWorker) -> None:
    state = await asyncio.to_thread(LocalState, folder)
    for worker in workers:
        await state.put(worker)
    await state.close()


async def test_a_stored_worker_is_used(tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        await keep(tmp_path, StoredWorker("one", "admin", {"url": worker.url}))
        async with running_hub(state__dir=tmp_path) as hub:
            answer = await hub.post(CHAT, QUESTION)
            assert answer.status == 200
            assert answer.header("X-Gollama-Worker") == "one"


async def test_a_worker_of_the_settings_takes_precedence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedWorker() as worker:
        await keep(tmp_path, StoredWorker("stored", "admin", {"url": worker.url}))
        async with running_hub(worker, state__dir=tmp_path) as hub:
            assert len(hub.hub.registry.workers) == 1
    assert "stored worker 'stored' is left out" in caplog.text


async def test_a_stored_worker_without_its_key_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = {"url": "http://10.0.0.1:1", "api_key_env": "NOWHERE"}
    await keep(tmp_path, StoredWorker("stored", "admin", table))
    async with running_hub(state__dir=tmp_path) as hub:
        assert hub.hub.registry.workers == []
        # It may have its key at the next start.
        assert hub.hub.state.find("stored") is not None
    assert "api_key_env = 'NOWHERE': is not set" in caplog.text


async def test_a_hold_without_settings_is_no_worker(tmp_path: Path) -> None:
    await keep(tmp_path, StoredWorker("of the file", "file", hold="paused"))
    async with running_hub(state__dir=tmp_path) as hub:
        assert hub.hub.registry.workers == []


async def test_a_revocation_outlives_the_hub(tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("sub:bob\n")
    settings = {"state__dir": tmp_path / "state", "auth__revoked": revoked}
    async with ScriptedWorker() as worker:
        for run in range(2):
            async with running_hub(worker, **settings) as hub:
                statuses = [
                    (await hub.post(CHAT, QUESTION, hub.token(sub))).status
                    for sub in ("bob", "carol")
                ]
                assert statuses == [401, 200]
                alice = hub.token("alice", jti="a1")
                if not run:
                    assert (await hub.post(CHAT, QUESTION, alice)).status == 200
                    await hub.hub.revoke("jti", "a1")
                assert (await hub.post(CHAT, QUESTION, alice)).status == 401
