"""A token that is taken back opens nothing any more, a moment later and for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config import watch
from gollama_proxy.config.keys import RevocationList
from gollama_proxy.wire import headers
from tests.fakes.asks import CHAT
from tests.fakes.client import TruncatedError
from tests.fakes.files import replace
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.script import stream_of
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

STREAM = {"messages": [], "stream": True}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a long time for a test."""
    monkeypatch.setattr(watch, "PERIOD", 0.002)


@contextlib.asynccontextmanager
async def hub_with(
    file: Path, *workers: ScriptedWorker, **settings: Any
) -> AsyncIterator[RunningHub]:
    async with running_hub(*workers, auth__revoked=file, **settings) as hub:
        yield hub


async def status(hub: RunningHub, token: str) -> int:
    return (await hub.post(CHAT, {"messages": []}, token)).status


async def becomes(hub: RunningHub, token: str, expected: int) -> None:
    """Wait until a token gets another answer."""
    async with asyncio.timeout(DEADLINE):
        while await status(hub, token) != expected:
            pass


async def test_a_token_is_revoked_and_restored(tmp_path: Path) -> None:
    file = tmp_path / "revoked"
    file.write_text("# jti:a1 sub:alice\n")
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        lost, kept = hub.token(jti="a1"), hub.token(jti="a2")
        bob = hub.token("bob", jti="b1")
        assert [await status(hub, t) for t in (lost, kept, bob)] == [200] * 3
        with file.open("a") as stream:
            stream.write("jti:a1\n")
        await becomes(hub, lost, 401)
        assert [await status(hub, t) for t in (kept, bob)] == [200] * 2
        # Everything of hers, also what is signed from now on.
        replace(file, "sub:alice\n")
        await becomes(hub, kept, 401)
        assert await status(hub, hub.token(jti="a3")) == 401
        assert await status(hub, bob) == 200
        refused = len(worker.requests)
        assert await status(hub, lost) == 401
        assert (await hub.get("/v1/models", lost)).status == 401
        assert (await hub.get("/metrics", lost)).status == 401
        assert len(worker.requests) == refused
        replace(file, "")
        await becomes(hub, lost, 200)
        assert await status(hub, kept) == 200


async def test_requests_on_one_connection_are_judged_one_by_one(
    tmp_path: Path,
) -> None:
    """Though their heads are the same to the byte, or differ in one."""
    file = tmp_path / "revoked"
    file.write_text("")
    body = {"messages": []}
    large = [("X-Large", "x" * headers.MOST_KEPT)]
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        alice, bob = hub.token(), hub.token("bob")
        async with await hub.wire() as wire:

            async def post(token: str, path: str = CHAT, **given: Any) -> int:
                await wire.post(path, given.pop("body", body), token, **given)
                return (await wire.read_response()).status

            assert [await post(alice) for _ in range(2)] == [200, 200]
            served = len(worker.requests)
            assert await post(alice, "/v1/none") == 404
            assert await post(alice, method="PUT") == 405
            assert await post(alice, body=b'{"messages":!}') == 400
            assert len(worker.requests) == served
            assert await post(bob) == 200
            # The last byte of a signature may have bits without a meaning.
            forged = alice[:-9] + ("A" if alice[-9] != "A" else "B") + alice[-8:]
            assert [await post(each) for each in (alice, forged, alice)] == [
                *(200, 401, 200),
            ]
            assert [await post(alice, headers=large) for _ in range(2)] == [200, 200]
            assert await post(alice) == 200
            replace(file, "sub:alice\n")
            await becomes(hub, alice, 401)
            assert [await post(each) for each in (alice, bob, alice)] == [
                *(401, 200, 401),
            ]
            assert await post(bob) == 200
            assert await post(bob, version="1.0") == 200
            with pytest.raises((TruncatedError, OSError)):  # it was the last one
                await post(bob)


async def test_a_token_on_the_list_at_the_start_is_never_accepted(
    tmp_path: Path,
) -> None:
    file = tmp_path / "revoked"
    file.write_text("sub:alice\n")
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        assert await status(hub, hub.token()) == 401
        assert worker.requests == []


async def test_a_missing_file_does_not_restore_revoked_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "revoked"
    file.write_text("sub:alice\n")
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        file.unlink()
        async with asyncio.timeout(DEADLINE):
            while "the last good list stays" not in caplog.text:
                await asyncio.sleep(0.001)
        assert await status(hub, hub.token()) == 401
        assert await status(hub, hub.token("bob")) == 200


async def test_a_running_answer_is_completed(tmp_path: Path) -> None:
    """A token is checked when its request begins, and not again."""
    file = tmp_path / "revoked"
    file.write_text("")
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        worker.script(*stream_of(3, "go"))
        wire = await hub.open(CHAT, STREAM)
        assert await wire.read_event()
        replace(file, "sub:alice\n")
        await becomes(hub, hub.token(), 401)
        worker.release("go")
        ending = await wire.read_to_end()
        assert ending.clean
        assert ending.response.body.endswith(b"data: [DONE]\n\n")
        # Its connection is kept, and is as much worth as any other.
        await wire.post(CHAT, STREAM, hub.token())
        assert (await wire.read_response()).status == 401


async def test_a_token_may_expire_during_a_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        now = 2_000_000_000.0
        monkeypatch.setattr(hub.hub.authenticator, "_clock", lambda: now)
        token = hub.token(iat=int(now), exp=int(now) + 60)
        worker.script(*stream_of(3, "go"))
        wire = await hub.open(CHAT, STREAM, token)
        assert await wire.read_event()
        now += 3_600
        worker.release("go")
        assert (await wire.read_events())[-1] == b"data: [DONE]\n\n"
        assert await status(hub, token) == 401


async def test_no_request_looks_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "revoked"
    file.write_text("jti:x\n")
    looks: list[str] = []
    monkeypatch.setattr(watch, "PERIOD", 3_600)
    monkeypatch.setattr(RevocationList, "_stat", lambda self: looks.append("stat"))
    async with ScriptedWorker() as worker, hub_with(file, worker) as hub:
        replace(file, "sub:alice\n")
        for _ in range(20):
            assert await status(hub, hub.token()) == 200
        assert looks == []
        monkeypatch.undo()
        await hub.hub.reload()
        await becomes(hub, hub.token(), 401)
