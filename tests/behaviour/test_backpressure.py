"""A client that does not read costs little memory, and is dropped in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gollama_proxy.fleet.state import WorkerState
from tests.fakes.asks import CHAT, MIB, STREAM
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.process import hub_process
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    head,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import Script, close, send, stream_of
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker

EVENT = token("x" * MIB)


def stream_of_megabytes(number: int) -> Script:
    ending = [send(chunk(finish() + done())), send(last_chunk()), close()]
    return (send(sse_head() + chunk(role())), *[send(chunk(EVENT))] * number, *ending)


def body_of_megabytes(number: int) -> Script:
    length = ("Content-Length", str(number * MIB))
    return (send(head(200, [length])), *[send(bytes(MIB))] * number)


async def released(hub: RunningHub) -> None:
    """Wait until the worker holds no request any more."""
    [worker] = hub.hub.registry.workers
    await until(lambda: not worker.in_flight)


@pytest.mark.parametrize("script", [stream_of_megabytes, body_of_megabytes])
async def test_an_unread_answer_stays_with_the_worker(
    script: Callable[[int], Script],
) -> None:
    """200 MB to a client that reads nothing: TCP makes the worker wait."""
    async with ScriptedWorker() as worker, hub_process(worker.url) as hub:
        worker.script(*script(1))  # to have everything in place that is ever needed
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_response()
        async with hub.growing_less_than(16 * MIB):
            worker.script(*script(200))
            wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
            request = await worker.received(2)
            assert await settled(lambda: request.sent) < 50 * MIB
        assert not request.finished.is_set()
        wire.abort()
        await worker.idle()


async def test_many_clients_that_do_not_read_cost_little_each() -> None:
    async with ScriptedWorker(slots=64) as worker, hub_process(worker.url) as hub:
        worker.default(*stream_of_megabytes(50))
        async with hub.growing_less_than(40 * MIB):
            wires = [
                await hub.open(CHAT, STREAM, receive_buffer=4096) for _ in range(20)
            ]
            await worker.received(20)
            await settled(lambda: sum(request.sent for request in worker.requests))
        for wire in wires:
            wire.abort()
        await worker.idle()


async def test_a_client_that_pauses_for_a_moment_gets_everything() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of_megabytes(24))
        async with await hub.open(CHAT, STREAM, receive_buffer=256 << 10) as wire:
            assert await wire.read_event() == role()
            request = await worker.received()
            assert await settled(lambda: request.sent) < 24 * MIB
            for _ in range(24):
                assert await wire.read_event() == EVENT
            assert await wire.read_events() == [finish(), done()]


async def test_a_client_that_stops_reading_is_dropped() -> None:
    """At the write deadline; the worker is free then, and not blamed."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__write=0.2) as hub,
    ):
        pings = len(worker.control)
        worker.script(*stream_of_megabytes(100))
        wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
        request = await worker.received()
        async with asyncio.timeout(DEADLINE):
            await request.closed_by_peer.wait()
        await released(hub)
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        assert not record.in_doubt
        assert len(worker.control) == pings
        ending = await wire.read_to_end()
        assert not ending.clean
        assert b"[DONE]" not in ending.raw


async def test_a_client_that_reads_slowly_is_not_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its limit begins anew whenever it continues: the whole may take any time."""
    write, begun, timeout = 77.0, 0, asyncio.timeout

    def noted(delay: float | None) -> asyncio.Timeout:
        nonlocal begun
        begun += delay == write
        return timeout(None if delay == write else delay)

    monkeypatch.setattr(asyncio, "timeout", noted)
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__write=write) as hub,
    ):
        worker.script(*stream_of_megabytes(32))
        async with await hub.open(CHAT, STREAM, receive_buffer=256 << 10) as wire:
            assert await wire.read_event() == role()
            for number in range(32):
                if number == 8:  # more are left than the kernel holds
                    await until(lambda: begun > 1)
                assert await wire.read_event() == EVENT
            assert await wire.read_events() == [finish(), done()]


async def test_a_client_that_does_not_read_delays_no_other() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of_megabytes(100))
        idle = await hub.open(CHAT, STREAM, receive_buffer=4096)
        request = await worker.received()
        await settled(lambda: request.sent)
        worker.script(*stream_of(200))
        async with await hub.open(CHAT, STREAM) as wire:
            assert len(await wire.read_events()) == 203
        idle.abort()


async def test_tokens_to_a_client_that_does_not_read_come_when_it_does() -> None:
    """Small events fill the buffers just as well; none is lost or out of order."""
    # 50 MB: more than the kernel holds of both connections, with up to 32 MiB for one.
    number, word = 30_000, "a" * 1500
    tokens = [token(f" {n} {word}") for n in range(number)]
    packs = [b"".join(map(chunk, tokens[i : i + 500])) for i in range(0, number, 500)]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head() + chunk(role())),
            *map(send, packs),
            send(chunk(done()) + last_chunk()),
            close(),
        )
        async with await hub.open(CHAT, STREAM, receive_buffer=64 << 10) as wire:
            request = await worker.received()
            sent = await settled(lambda: request.sent)
            assert sent < len(b"".join(packs))
            # h11 reads so many small chunks slowly.
            response = await wire.read_response(timeout=4 * DEADLINE)
    assert response.body == role() + b"".join(tokens) + done()


async def test_a_client_that_reads_too_late_gets_a_truncated_answer() -> None:
    """It can detect that: the length or the last chunk is missing."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__write=0.1) as hub,
    ):
        worker.script(*body_of_megabytes(50))
        wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
        await worker.received()
        await worker.idle()
        await released(hub)
        ending = await wire.read_to_end()
        assert not ending.clean
        assert 0 < len(ending.response.body) < 50 * MIB
