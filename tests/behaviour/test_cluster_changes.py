"""Hub processes that are changed while they cannot reach each other."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from tests.behaviour.test_cluster_failures import clock_off_by
from tests.fakes.asks import CHAT
from tests.fakes.client import Wire
from tests.fakes.crowd import HasPort, acts_with, call, running_hubs
from tests.fakes.hub import mint
from tests.fakes.process import HubProcess
from tests.fakes.valkey import running_store
from tests.fakes.waiting import DEADLINE, gone
from tests.fakes.worker import ScriptedWorker


async def shown(hub: HasPort, name: str, key: str, value: object) -> None:
    """Wait until a hub itself has this of a worker."""
    async with asyncio.timeout(DEADLINE):
        while True:
            answer = await call(hub, "GET", f"/admin/workers/{name}")
            if answer.status == 200 and answer.json()[key] == value:
                return
            await asyncio.sleep(0.02)


async def without_store(hub: HasPort) -> None:
    async with asyncio.timeout(DEADLINE):
        while (await call(hub, "GET", "/admin/hubs")).json()["store"]["mode"] == "up":
            await asyncio.sleep(0.02)


async def change(hub: HasPort, method: str, path: str, body: object = None) -> None:
    answer = await call(hub, method, f"/admin/{path}", body)
    assert answer.status in (200, 201), answer


async def is_refused(hub: HasPort, token: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            async with await Wire.connect("127.0.0.1", hub.port) as wire:
                await wire.post(CHAT, {"messages": []}, token)
                if (await wire.read_response()).status == 401:
                    return
            await asyncio.sleep(0.02)


async def test_changes_on_both_sides_are_merged_by_their_age(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    environs = [
        clock_off_by(hours * 3600) | {"GOLLAMA_STATE_DIR": str(folder)}
        for hours, folder in zip((1, -1), folders, strict=True)
    ]
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as worker,
        ScriptedWorker() as added,
    ):
        settings = {"state__url": store.url}
        async with running_hubs(2, worker.url, environs=environs, **settings) as hubs:
            one, other = hubs
            await acts_with(one, 2)
            await acts_with(other, 2)
            name = worker.name
            await change(one, "POST", f"workers/{name}/pause")
            await shown(other, name, "hold", "paused")
            await store.kill()
            for hub in hubs:
                await without_store(hub)
            # The clock of the first one is two hours ahead of the other one's.
            await change(one, "POST", f"workers/{name}/drain")
            await change(one, "POST", "workers", {"name": "new", "url": added.url})
            await kill(one)
            async with running_hubs(
                1, worker.url, environs=environs[:1], **settings
            ) as [again]:
                await shown(again, name, "hold", "draining")  # it has kept that
                # Later by a whole start, as ages are exact only to a round trip.
                await change(other, "POST", f"workers/{name}/unpause")
                await change(other, "POST", "revoke", {"subject": "mallory"})
                await store.start()
                for hub in again, other:
                    await shown(hub, name, "hold", "none")  # the last change
                    await shown(hub, "new", "url", added.url)
                    now = {"iat": 0, "exp": 2**33}
                    await is_refused(hub, mint(sub="mallory", **now))


async def kill(hub: HubProcess) -> None:
    os.kill(hub.pid, signal.SIGKILL)
    await gone(hub.pid)
