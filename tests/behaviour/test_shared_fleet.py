"""What an operator changes at one hub is in force at all hubs of a store."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.load import load_worker
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.fleet.state import Hold
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling import sharing
from gollama_proxy.state import store
from tests.fakes.asks import CHAT
from tests.fakes.client import Response
from tests.fakes.hub import HasUrl, RunningHub, running_hub
from tests.fakes.replies import chat_completion
from tests.fakes.script import answer, wait
from tests.fakes.valkey import ENGINES, StoreServer, is_down, running_store
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

QUESTION = {"messages": []}


@contextlib.asynccontextmanager
async def hubs(
    server: StoreServer, *workers: HasUrl | str, count: int = 2, **settings: Any
) -> AsyncIterator[list[RunningHub]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_hub(*workers, state__url=server.url, **settings)
            )
            for _ in range(count)
        ]


async def admin(
    hub: RunningHub, method: str, path: str, payload: Any = None
) -> Response:
    body = json.dumps(payload).encode()
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    async with await hub.wire() as wire:
        token = hub.token("root", scope="admin")
        await wire.get(path, token, method=method, headers=fields)
        await wire.send(body)
        return await wire.read_response()


def worker_of(hub: RunningHub, name: str) -> Worker | None:
    return next((w for w in hub.hub.registry.workers if w.name == name), None)


async def everywhere(
    running: list[RunningHub], name: str, check: Callable[[Worker | None], bool]
) -> None:
    for hub in running:
        await until(partial(_checks, hub, name, check), f"{name} at {hub!r}")


def _checks(hub: RunningHub, name: str, check: Callable[[Worker | None], bool]) -> bool:
    return check(worker_of(hub, name))


def is_held(hold: Hold) -> Callable[[Worker | None], bool]:
    return lambda worker: worker is not None and worker.held is hold


def declared(folder: Path, name: str, worker: ScriptedWorker) -> Path:
    """Write settings with one worker."""
    file = folder / "settings.toml"
    file.write_text(f"[[workers]]\nname = {name!r}\nurl = {worker.url!r}\n")
    return file


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_worker_that_is_added_serves_at_all_hubs(
    tmp_path: Path, engine: str
) -> None:
    async with running_store(tmp_path, engine) as server, ScriptedWorker() as worker:
        async with hubs(server, count=3) as running:
            a, b, c = running
            row = {"name": "new", "url": worker.url, "slots": 3}
            assert (await admin(a, "POST", "/admin/workers", row)).status == 201
            await everywhere(running, "new", lambda w: w is not None and w.admits)
            for hub in running:
                answer = await hub.post(CHAT, QUESTION)
                assert answer.status == 200
                assert answer.header("X-Gollama-Worker") == "new"
            change = {"slots": 7}
            assert (await admin(b, "PATCH", "/admin/workers/new", change)).status == 200
            await everywhere(running, "new", lambda w: w is not None and w.slots == 7)
            assert (await admin(c, "DELETE", "/admin/workers/new")).status == 200
            await everywhere(running, "new", lambda w: w is None)


@pytest.mark.parametrize(
    ("begin", "end", "hold"),
    [("drain", "undrain", Hold.DRAINING), ("pause", "unpause", Hold.PAUSED)],
)
async def test_a_worker_of_the_settings_is_held_back_at_all_hubs(
    tmp_path: Path, begin: str, end: str, hold: Hold
) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, worker) as running:
            a, b = running
            name = a.hub.registry.workers[0].name
            path = f"/admin/workers/{name}"
            assert (await admin(a, "POST", f"{path}/{begin}")).status == 200
            await everywhere(running, name, is_held(hold))
            async with hubs(server, worker, count=1) as later:
                await everywhere(later, name, is_held(hold))
                assert (await admin(b, "POST", f"{path}/{end}")).status == 200
                await everywhere([*running, *later], name, is_held(Hold.NONE))


async def test_a_worker_of_the_settings_is_changed_at_all_hubs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, worker, count=3) as running:
            name = running[0].hub.registry.workers[0].name
            path = f"/admin/workers/{name}"
            taken = {"name": "taken", "url": "http://127.0.0.1:9"}
            running[2].hub.registry.add(load_worker("workers", taken, {}))
            assert (await admin(running[0], "PATCH", path, {"slots": 7})).status == 200
            await everywhere(running, name, lambda w: w is not None and w.slots == 7)
            answered = await admin(running[1], "PATCH", path, {"name": "taken"})
            assert answered.status == 200
            await everywhere(running[:2], name, lambda w: w is None)
            await until(lambda: "at another hub does not fit here" in caplog.text)
            assert worker_of(running[2], name) is not None
            path = "/admin/workers/taken"
            assert (await admin(running[0], "DELETE", path)).status == 200
            await everywhere(running, "taken", lambda w: w is None)
            # The settings take precedence at the next reload.
            await running[0].hub.reload()
            assert worker_of(running[0], name) is not None


async def test_a_revocation_is_in_force_at_all_hubs(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, worker, count=3) as running:
            tokens = {
                "jti": running[0].token("bob", jti="b1"),
                "sub": running[0].token(),
            }
            for hub in running:
                for token in tokens.values():
                    assert (await hub.post(CHAT, QUESTION, token)).status == 200
            await running[0].hub.revoke("jti", "b1")
            await running[1].hub.revoke("sub", "alice")
            async with asyncio.timeout(DEADLINE):
                for hub in running:
                    for token in tokens.values():
                        while (await hub.post(CHAT, QUESTION, token)).status != 401:
                            await asyncio.sleep(0.005)


async def test_the_settings_of_a_hub_take_precedence_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_store(tmp_path) as server,
        ScriptedWorker() as worker,
        ScriptedWorker() as other,
        hubs(server, count=1, file=declared(tmp_path, "same", other)) as [a],
        hubs(server, count=1) as [b],
    ):
        row = {"name": "same", "url": worker.url}
        assert (await admin(b, "POST", "/admin/workers", row)).status == 201
        await until(lambda: "stored worker 'same' is left out" in caplog.text)
        kept = worker_of(a, "same")
        assert kept is not None
        assert kept.config.url == other.url
        # It is there as soon as the settings have another one no more.
        await a.hub.apply(b.hub.config)
        moved = worker_of(a, "same")
        assert moved is not None
        assert moved.config.url == worker.url
        # Removed elsewhere, the worker of a file stays.
        assert (await admin(b, "DELETE", "/admin/workers/same")).status == 200
        await until(lambda: worker_of(a, "same") is None)


async def test_a_hub_that_starts_without_the_store_has_what_it_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Until then, it leaves the slots to hubs that may be at the store.
    monkeypatch.setattr(sharing, "LIFETIME", 1.0)
    monkeypatch.setattr(store, "BACK_OFF_MAX", 0.2)
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, count=1) as [a]:
            row = {"name": "new", "url": worker.url}
            assert (await admin(a, "POST", "/admin/workers", row)).status == 201
            settings = {"state__dir": tmp_path / "b"}
            async with hubs(server, count=1, **settings) as [b]:
                assert worker_of(b, "new") is not None  # from its start
            await server.kill()
            async with hubs(server, count=1, **settings) as [b]:
                await b.hub.ready()
                assert (await b.post(CHAT, QUESTION)).status == 200
                # Changes of both sides are merged when the store is back, empty.
                path = "/admin/workers/new/pause"
                assert (await admin(b, "POST", path)).status == 200
                await a.hub.revoke("sub", "mallory")
                await server.start()
                await everywhere([a], "new", is_held(Hold.PAUSED))
                await until(lambda: "mallory" in b.hub.state.revoked.subjects)


async def test_two_hubs_that_change_one_worker_end_with_the_same(
    tmp_path: Path,
) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        async with hubs(server, worker) as [a, b]:
            name = a.hub.registry.workers[0].name
            path = f"/admin/workers/{name}"
            for _ in range(5):
                await asyncio.gather(
                    admin(a, "POST", f"{path}/pause"), admin(b, "POST", f"{path}/drain")
                )
            first, second = worker_of(a, name), worker_of(b, name)
            assert first is not None
            assert second is not None
            await until(lambda: first.held is second.held is not Hold.NONE)


async def usage_of(hub: RunningHub, path: str = "/admin/usage") -> dict[str, Any]:
    found = await hub.get(path, hub.token("alice", scope="admin", tokens_per_day=300))
    assert found.status == 200
    shown: dict[str, Any] = found.json()
    return shown


async def test_usage_and_limits_are_those_of_all_hubs(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker() as worker:
        worker.default(
            *answer(chat_completion("yes", tokens=80))
        )  # 100 with the prompt
        async with hubs(server, worker) as [a, b]:

            async def counted(requests: int, *running: RunningHub) -> None:
                for hub in running:
                    async with asyncio.timeout(DEADLINE):
                        while (await usage_of(hub))["total"]["requests"] < requests:
                            await asyncio.sleep(0.05)

            for hub in a, b, a:
                token = hub.token("alice", tokens_per_day=300)
                assert (await hub.post(CHAT, QUESTION, token)).status == 200
            await counted(3, a, b)
            for hub in a, b:
                shown = await usage_of(hub, "/v1/usage")
                assert shown["total"]["completion_tokens"] == 240
                assert shown["limits"]["tokens_per_day"]["remaining"] == 0
                assert "missing" not in shown
                refused = await hub.post(CHAT, QUESTION, token)
                assert refused.status == 429
            await server.kill()
            assert a.hub.cluster is not None
            await is_down(a.hub.cluster.store)
            shown = await usage_of(a)
            assert shown["total"]["requests"] == 3
            [other] = shown["missing"]
            assert str(b.port) in other


async def test_the_limits_of_a_token_hold_at_all_hubs(tmp_path: Path) -> None:
    async with running_store(tmp_path) as server, ScriptedWorker(slots=4) as worker:
        async with hubs(server, worker) as [a, b]:
            token = a.token("alice", rpm=2, max_concurrency=1)
            worker.script(wait("end"), *answer(chat_completion("yes")))
            first = await a.open(CHAT, QUESTION, token)
            await worker.received()
            admission = b.hub.queue.admission
            await until(lambda: admission.elsewhere == {"alice": 1})
            second = await b.open(CHAT, QUESTION, token)
            await until(lambda: admission.waiting == 1, "it waits for the other hub")
            worker.release("end")
            for wire in first, second:
                assert (await wire.read_response()).status == 200
            for hub in a, b:
                await until(partial(uses_all, hub.hub.quotas))
                assert (await hub.post(CHAT, QUESTION, token)).status == 429


def uses_all(quotas: Quotas) -> bool:
    gauge = quotas.look("alice", 2, None).requests
    return gauge is not None and gauge.remaining == 0
