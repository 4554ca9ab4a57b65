"""Workers behind one DNS name: they come and go as its addresses do."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import uvloop

from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.hub import running_hub
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


class Group:
    def __init__(self, port: int) -> None:
        self.url = f"dns+http://llama.test:{port}"


async def test_workers_follow_the_addresses_of_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses: list[str] = ["127.0.0.1", "127.0.0.2"]

    real = uvloop.Loop.getaddrinfo

    async def getaddrinfo(
        loop: Any, host: str, *args: Any, **options: Any
    ) -> list[tuple[Any, ...]]:
        if host != "llama.test":
            found: list[tuple[Any, ...]] = await real(loop, host, *args, **options)
            return found
        stream = socket.SOCK_STREAM
        return [(socket.AF_INET, stream, 6, "", (each, 0)) for each in addresses]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    async with ScriptedWorker() as worker:
        group = Group(worker.port)
        async with running_hub(
            group, health__interval=0.02, health__recheck=0.02
        ) as hub:
            registry = hub.hub.registry
            names = [each.name for each in registry.workers]
            assert names == ["llama.test-127.0.0.1", "llama.test-127.0.0.2"]
            answer = await hub.post(CHAT, WHOLE)
            assert answer.status == 200
            assert answer.header("x-gollama-worker") == "llama.test-127.0.0.1"
            [request] = worker.requests
            assert request.values("host") == [f"llama.test:{worker.port}"]

            path = "/admin/workers/llama.test-127.0.0.1"
            admin = hub.token(scope="admin")
            async with await hub.wire() as wire:
                await wire.post(path, {"weight": 2}, admin, method="PATCH")
                answer = await wire.read_response()
            assert answer.status == 400
            assert "belongs to the group 'llama.test'" in answer.body.decode()

            addresses.remove("127.0.0.2")
            await until(lambda: len(registry.workers) == 1, f"one: {registry!r}")
            assert (await hub.post(CHAT, WHOLE)).status == 200
            addresses.clear()
            await until(lambda: bool(hub.hub.groups.failures()), "a failure")
            assert (await hub.post(CHAT, WHOLE)).status == 200, "kept for a while"

            await hub.hub.apply(hub.hub.config)
            assert len(registry.workers) == 1, "a reload changes nothing"
