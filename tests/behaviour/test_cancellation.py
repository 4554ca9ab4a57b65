"""A client that leaves frees its worker at once, wherever the request is by then."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator

import pytest

from gollama_proxy.fleet import health
from gollama_proxy.fleet.state import WorkerState
from tests.fakes.asks import CHAT, RARELY, STREAM, WHOLE
from tests.fakes.client import Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    head,
    ping,
    role,
    sse_head,
    token,
)
from tests.fakes.script import expect_eof, notify, read_body, send, stream_of, wait
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker, full_backlog

WINDOW = 4096
PROMPT = b'{"model":"tiny","messages":[],"prompt":"' + b"x" * 100_000

Stage = Callable[[ScriptedWorker, RunningHub], Awaitable[Wire]]


@pytest.fixture(autouse=True)
def no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing periodic that could cancel: what is seen here is at once."""
    monkeypatch.setattr(health, "PERIOD", RARELY)


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Clients that leave are no event for an operator."""
    yield
    gc.collect()  # reports the exceptions that were never retrieved
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    noise = [record for record in records if record.levelno >= logging.WARNING]
    assert not noise, [record.getMessage() for record in noise]


async def in_flight(hub: RunningHub, number: int) -> None:
    """Wait until this many requests are held by workers."""
    workers = hub.hub.registry.workers
    await until(lambda: sum(w.in_flight for w in workers) == number)


async def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """Wait for the line of a request in the access log."""

    def lines() -> list[logging.LogRecord]:
        return [r for r in caplog.records if r.name == "gollama_proxy.access"]

    await until(lambda: bool(lines()))
    return [line.__dict__["fields"] for line in lines()]


# --- How far a request has come when its client leaves ----------------------------


async def uploading_the_window(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    """Half of a small body is here, and no worker knows of it."""
    length = [("Content-Length", "1000")]
    return await hub.open(CHAT, b'{"model":"tiny",', headers=length)


async def without_a_byte_back(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    """llama-server sends nothing until it has a free slot."""
    worker.script(expect_eof())
    wire = await hub.open(CHAT, STREAM)
    await worker.received()
    return wire


async def without_a_stream(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    worker.script(expect_eof())
    wire = await hub.open(CHAT, WHOLE)
    await worker.received()
    return wire


async def behind_the_head(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    worker.script(send(sse_head() + chunk(ping())), notify("sent"), expect_eof())
    wire = await hub.open(CHAT, STREAM)
    await worker.reached("sent")
    return wire


async def in_the_stream(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    worker.script(send(sse_head() + chunk(role() + token("a"))), expect_eof())
    wire = await hub.open(CHAT, STREAM)
    assert await wire.read_event() == role()
    return wire


async def in_a_long_answer(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    length = ("Content-Length", "1000")
    worker.script(send(head(200, [length]) + b"{"), expect_eof())
    wire = await hub.open(CHAT, WHOLE)
    await wire.read_head()
    return wire


async def in_an_error(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    """Nothing was passed on: an error is read whole first."""
    length = ("Content-Length", "1000")
    worker.script(send(head(400, [length]) + b"{"), notify("sent"), expect_eof())
    wire = await hub.open(CHAT, WHOLE)
    await worker.reached("sent")
    return wire


async def write_blocked(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    """All buffers are full, from the worker to the client, which reads nothing."""
    piece = chunk(token("x" * 50_000))
    worker.script(send(sse_head()), *[send(piece)] * 1000)
    wire = await hub.open(CHAT, STREAM, receive_buffer=4096)
    request = await worker.received()
    assert await settled(lambda: request.sent) < 1000 * len(piece)
    return wire


async def uploading(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    """The worker has a part of the body, and waits for more."""
    worker.script(read_body(len(PROMPT)), notify("read"), expect_eof())
    wire = await hub.open(CHAT, PROMPT, headers=[("Content-Length", "10000000")])
    await worker.reached("read")
    return wire


async def uploading_in_chunks(worker: ScriptedWorker, hub: RunningHub) -> Wire:
    worker.script(read_body(len(PROMPT)), notify("read"), expect_eof())
    wire = await hub.wire()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: hub"]
    lines += [f"Authorization: Bearer {hub.token()}", "Transfer-Encoding: chunked"]
    head = "\r\n".join([*lines, "", ""]).encode()
    await wire.send(head + chunk(PROMPT) + b"100000\r\nx")
    await worker.reached("read")
    return wire


STAGES: list[Stage] = [
    uploading_the_window,
    without_a_byte_back,
    without_a_stream,
    behind_the_head,
    in_the_stream,
    in_a_long_answer,
    in_an_error,
    uploading,
    uploading_in_chunks,
]


def name_of(stage: Stage) -> str:
    return getattr(stage, "__name__", "")


@pytest.mark.parametrize("how", [Wire.abort, Wire.close, Wire.half_close])
@pytest.mark.parametrize("stage", STAGES, ids=name_of)
async def test_a_client_that_leaves_cancels_its_request(
    stage: Stage, how: Callable[[Wire], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker's connection is closed within a second; the worker is not blamed.

    A client that only ends its sending side counts as gone, as with llama-server:
    otherwise the answer would be generated for nothing.
    """
    caplog.set_level(logging.INFO, "gollama_proxy.access")
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, limits__replay_window=WINDOW) as hub,
    ):
        pings = len(worker.control)
        wire = await stage(worker, hub)
        reached = [request for request in worker.requests if request.path == CHAT]
        await in_flight(hub, len(reached))
        how(wire)
        for request in reached:
            async with asyncio.timeout(DEADLINE):
                await request.closed_by_peer.wait()
        await in_flight(hub, 0)
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        assert not record.in_doubt
        assert len(worker.control) == pings, "no worker was suspected"
        [line] = await logged(caplog)
        assert line["outcome"] == "client_gone", stage
        assert "error" not in line
        assert (await hub.post(CHAT, WHOLE)).status == 200
        assert len(worker.requests) == len(reached) + 1


@pytest.mark.parametrize("how", [Wire.abort, Wire.close])
async def test_a_client_that_leaves_with_everything_full(
    how: Callable[[Wire], None],
) -> None:
    """Its bytes in the hub and in the kernels do not block anything."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await write_blocked(worker, hub)
        [request] = worker.requests
        how(wire)
        async with asyncio.timeout(DEADLINE):
            await request.closed_by_peer.wait()
        await in_flight(hub, 0)
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        assert not record.in_doubt


@pytest.mark.parametrize("how", [Wire.abort, Wire.close, Wire.half_close])
async def test_a_client_that_leaves_while_its_worker_is_dialled(
    how: Callable[[Wire], None],
) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__connect=30) as hub,
    ):
        await worker.down()
        with full_backlog(worker.port):
            wire = await hub.open(CHAT, STREAM)
            await in_flight(hub, 1)
            how(wire)
            await in_flight(hub, 0)
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        assert not record.in_doubt


@pytest.mark.parametrize("how", [Wire.abort, Wire.close])
async def test_a_client_that_leaves_while_its_worker_does_not_read(
    how: Callable[[Wire], None],
) -> None:
    """Its socket is not read either, so it is missed when the worker reads on."""
    async with (
        ScriptedWorker(receive_buffer=4096) as worker,
        running_hub(worker, limits__replay_window=WINDOW, limits__body=1 << 30) as hub,
    ):
        worker.script(read_body(1000), wait("again"), read_body())
        wire = await hub.wire()
        sent = 0

        async def upload() -> None:
            nonlocal sent
            length = [("Content-Length", str(1 << 28))]
            await wire.post(CHAT, PROMPT, hub.token(), headers=length)
            with contextlib.suppress(OSError):
                while True:
                    await wire.send(bytes(32 << 10))
                    sent += 1

        task = asyncio.create_task(upload())
        await worker.received()
        assert await settled(lambda: sent) < 1 << 13
        task.cancel()
        await asyncio.wait([task])
        how(wire)
        worker.release("again")
        await in_flight(hub, 0)
        await worker.idle()
        [request] = worker.requests
        assert not request.complete
        assert not hub.hub.registry.workers[0].in_doubt


async def test_clients_that_disconnect_at_any_moment_leave_nothing_behind() -> None:
    """Aborted after each of many delays; the hub's exit checks for tasks and leases."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*stream_of(20, 0.0005))
        for number in range(60):
            wire = await hub.open(CHAT, STREAM)
            for _ in range(number):
                await asyncio.sleep(0)
            (wire.abort if number % 2 else wire.close)()
        await in_flight(hub, 0)
        await worker.idle()
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY
        assert not record.in_doubt
        assert (await hub.post(CHAT, STREAM)).status == 200


async def test_a_client_that_disconnects_affects_no_other_client() -> None:
    gate = asyncio.Semaphore(0)
    async with ScriptedWorker(slots=64) as worker, running_hub(worker) as hub:
        worker.default(*stream_of(10, gate))
        wires = [await hub.open(CHAT, STREAM) for _ in range(6)]
        for wire in wires:
            await wire.read_event()
        for wire in wires[::2]:
            wire.abort()
        await in_flight(hub, 3)
        # Their scripts have to end first, or they would take a permit.
        await until(lambda: sum(r.finished.is_set() for r in worker.requests) == 3)
        for _ in range(3 * 9):
            gate.release()
        for wire in wires[1::2]:
            assert len(await wire.read_events()) == 12


async def test_a_client_that_disconnects_after_done_has_received_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SDKs close the connection after [DONE]; that is a success of the worker."""
    caplog.set_level("INFO", "gollama_proxy.access")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        events = chunk(token("a")) + chunk(finish()) + chunk(done())
        worker.script(send(sse_head() + events), expect_eof())
        wire = await hub.open("/v1/chat/completions", {"messages": [], "stream": True})
        await wire.read_until(b"[DONE]")
        wire.abort()
        await worker.idle()
        [served] = hub.hub.registry.workers
        async with asyncio.timeout(DEADLINE):
            while served.in_flight:
                await asyncio.sleep(0)
    [record] = [r for r in caplog.records if r.name == "gollama_proxy.access"]
    assert record.fields["outcome"] == "complete"  # type: ignore[attr-defined]
