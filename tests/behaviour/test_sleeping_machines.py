"""Machines that sleep until a request needs them, woken by real UDP packets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.values import ConfigError
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.upstream.probe import magic_packet
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

MAC = "00:11:22:aa:bb:cc"


class Network(asyncio.DatagramProtocol):
    """Receives the packets that would reach the sleeping machines."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.packets.append(data)


@asynccontextmanager
async def asleep(
    tmp_path: Path, *others: ScriptedWorker, models: str = '["tiny"]', **settings: Any
) -> AsyncIterator[tuple[ScriptedWorker, Worker, Network, RunningHub]]:
    """Run a hub and a worker whose machine does not answer until a test lets it."""
    loop = asyncio.get_running_loop()
    transport, network = await loop.create_datagram_endpoint(
        Network, local_addr=("127.0.0.1", 0)
    )
    port = transport.get_extra_info("sockname")[1]
    settings = {
        "health__interval": 3600,
        "health__recheck": 0.02,
        "health__timeout": 0.3,
        "queue__notice": 0.02,
        "wake__broadcast": f"127.0.0.1:{port}",
        **settings,
    }
    async with ScriptedWorker() as machine:
        machine.hang_health = True
        tables = [
            (
                f"[[workers]]\nurl = {machine.url!r}\nname = 'desktop'\n"
                f"mac = {MAC!r}\nmodels = {models}\n"
            ),
            *(f"[[workers]]\nurl = {each.url!r}\n" for each in others),
        ]
        file = tmp_path / "gollama.toml"
        file.write_text("".join(tables))
        try:
            async with running_hub(file=file, **settings) as hub:
                worker = hub.hub.registry.workers[0]
                assert worker.state is WorkerState.ASLEEP
                yield machine, worker, network, hub
        finally:
            transport.close()


async def test_a_request_wakes_the_machine_and_waits_for_it(tmp_path: Path) -> None:
    async with asleep(tmp_path) as (machine, worker, network, hub):
        assert (await hub.get("/readyz", token=None)).status == 200
        async with await hub.open(CHAT, STREAM) as wire:
            assert await wire.read_event() == b": waking desktop\n\n"
            await until(lambda: bool(network.packets), "a packet")
            assert network.packets == [magic_packet(MAC)]
            assert worker.state is WorkerState.WAKING
            assert hub.hub.queue.admission.waiting == 1, "in the visible queue"
            machine.hang_health = False
            ending = await wire.read_to_end()
        assert b"[DONE]" in ending.raw
        assert worker.breaker.generation == 0
        assert (await hub.post(CHAT, WHOLE)).status == 200
        assert len(network.packets) == 1


async def test_many_requests_are_served_by_the_one_that_wakes(tmp_path: Path) -> None:
    async with asleep(tmp_path) as (machine, _worker, network, hub):
        waiting = [
            asyncio.create_task(hub.post(CHAT, WHOLE), name="c") for _ in "abcdef"
        ]
        await until(lambda: hub.hub.queue.admission.waiting == 6, "six wait")
        machine.hang_health = False
        assert {(await each).status for each in waiting} == {200}
        assert len(network.packets) == 1


async def test_a_request_for_no_slot_waits_as_well(tmp_path: Path) -> None:
    async with asleep(tmp_path) as (machine, _worker, network, hub):
        ask = {"model": "tiny", "content": "hello"}
        asking = asyncio.create_task(hub.post("/tokenize", ask), name="client")
        await until(lambda: bool(network.packets), "a packet")
        machine.hang_health = False
        assert (await asking).status == 200


async def test_a_machine_that_does_not_wake_is_a_clear_error(tmp_path: Path) -> None:
    clock = Clock()
    async with asleep(tmp_path, clock=clock) as (machine, _worker, network, hub):
        asking = asyncio.create_task(hub.post(CHAT, WHOLE), name="client")
        await until(lambda: hub.hub.queue.admission.waiting == 1, "one waits")
        hub.pass_time(119)
        assert not asking.done()
        hub.pass_time(1)
        for answer in await asking, await hub.post(CHAT, WHOLE):
            assert answer.status == 503
            error = answer.json()["error"]
            assert error["code"] == "no_worker_available"
            assert error["message"].endswith(
                "(1 asleep). desktop did not wake within 120 s."
            )
        assert set(network.packets) == {magic_packet(MAC)}
        seen = len(network.packets)
        assert hub.hub.queue.admission.waiting == 0
        hub.pass_time(301)
        machine.hang_health = False
        assert (await hub.post(CHAT, WHOLE)).status == 200, "tried again"
        assert len(network.packets) > seen


async def test_a_client_that_leaves_waits_no_longer(tmp_path: Path) -> None:
    async with asleep(tmp_path) as (_machine, _worker, _network, hub):
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_event()
        await until(lambda: hub.hub.queue.admission.waiting == 0, "none waits")


async def test_another_worker_with_the_model_lets_it_sleep(tmp_path: Path) -> None:
    async with ScriptedWorker() as other:
        async with asleep(tmp_path, other) as (_, worker, network, hub):
            assert (await hub.post(CHAT, WHOLE)).status == 200
            assert worker.state is WorkerState.ASLEEP
            assert not network.packets


async def test_a_fallback_answers_while_the_machine_wakes(tmp_path: Path) -> None:
    async with ScriptedWorker("small") as other:
        settings = {"models": '["big"]', "models__fallbacks": "big=small"}
        async with asleep(tmp_path, other, **settings) as (_, worker, network, hub):
            answer = await hub.post(CHAT, {**WHOLE, "model": "big"})
            assert answer.header("x-gollama-worker") == other.name
            hub.hub.watchdog.round()
            await until(lambda: bool(network.packets), "a packet")
            assert worker.state is WorkerState.WAKING


async def test_an_operator_wakes_a_machine_by_a_request(tmp_path: Path) -> None:
    async with ScriptedWorker("small") as other:
        async with asleep(tmp_path, other) as (_, _, network, hub):
            admin = hub.token(scope="admin")
            path = "/admin/workers/desktop/wake"
            for _ in range(2):
                answer = await hub.post(path, {}, admin)
                assert answer.status == 200
                assert answer.json()["worker"]["state"] == "waking"
            await until(lambda: len(network.packets) == 1, "one packet")
            answer = await hub.post(path.replace("desktop", other.name), {}, admin)
            assert answer.status == 400
            assert answer.json()["error"]["param"] == "mac"
            assert (await hub.post(path, {})).status == 403


async def test_an_operator_wakes_a_machine(tmp_path: Path) -> None:
    async with ScriptedWorker("small") as other:
        async with asleep(tmp_path, other) as (machine, worker, network, hub):
            for _ in range(2):
                assert hub.hub.wake("desktop") is worker
                assert worker.state is WorkerState.WAKING
            machine.hang_health = False
            await until(lambda: worker.state is WorkerState.READY, "it is up")
            hub.hub.wake("desktop")
            await until(lambda: len(network.packets) == 1, "one packet")
            with pytest.raises(ConfigError, match="has none"):
                hub.hub.wake(other.name)
            with pytest.raises(LookupError):
                hub.hub.wake("nobody")
