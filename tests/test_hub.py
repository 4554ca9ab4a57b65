"""A hub starts whole or not at all, and ends without losing what it has begun."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gollama_proxy.config import load as config
from gollama_proxy.hub import Hub
from tests.fakes.asks import CHAT
from tests.fakes.client import Response, Wire, request_head
from tests.fakes.hub import SECRET, running_hub
from tests.fakes.replies import head
from tests.fakes.script import close, read_body, send, stall, stream_of, wait
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

STREAM = {"messages": [], "stream": True}


def new_hub(host: str = "127.0.0.1", port: int = 0, *workers: str) -> Hub:
    flags = {"server.host": host, "server.port": port}
    environ = {"GOLLAMA_JWT_SECRET": SECRET}
    return Hub(config.load(None, environ, flags, workers))


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that a hub without `running_hub` leaves no task either."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before
    if left:
        _, left = await asyncio.wait(left, timeout=DEADLINE)
    assert not left


async def soon(drain: asyncio.Task[None]) -> None:
    """Wait for a drain that has nothing to wait for: less than its limit of 30 s."""
    async with asyncio.timeout(DEADLINE):
        await drain


def error_code(response: Response) -> str:
    return str(response.json()["error"]["code"])


def drain(hub: Hub) -> asyncio.Task[None]:
    return asyncio.create_task(hub.drain(), name="test drains")


async def refused(host: str, port: int) -> bool:
    try:
        wire = await Wire.connect(host, port)
    except ConnectionRefusedError:
        return True
    wire.close()
    return False


# --- Start ------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        hub = new_hub("127.0.0.1", taken.getsockname()[1], "http://127.0.0.1:1")
        async with nothing_left():
            with pytest.raises(OSError, match="in use"):
                await hub.start()
        assert repr(hub) == "<Hub new workers=1>"
        assert "running=0" in repr(hub.health)
        await hub.drain()  # there is nothing to end
        await hub.abort()


async def test_an_address_that_is_not_ours_is_an_error() -> None:
    async with nothing_left():
        with pytest.raises(OSError):
            await new_hub("192.0.2.1").start()


async def test_the_url_has_the_port_that_was_really_taken() -> None:
    hub = new_hub()
    async with nothing_left():
        await hub.start()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)", hub.url)
        assert match
        assert int(match[1]) > 0
        assert not await refused("127.0.0.1", int(match[1]))
        assert repr(hub) == "<Hub running workers=0>"
        await hub.abort()


async def test_the_url_of_an_ipv6_address_has_brackets() -> None:
    hub = new_hub("::1")
    async with nothing_left():
        try:
            await hub.start()
        except OSError as exc:
            pytest.skip(f"no IPv6 here: {exc}")
        match = re.fullmatch(r"http://\[::1\]:(\d+)", hub.url)
        assert match
        reader, writer = await asyncio.open_connection("::1", int(match[1]))
        writer.write(request_head("GET", "/livez"))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
        await hub.abort()


async def test_inherited_sockets_take_the_place_of_the_address() -> None:
    """The first URL is one for browsers; that of a Unix socket is only shown."""
    name = f"\0gollama-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("", 0)) as tcp:
        local.bind(name)
        local.listen()
        port = tcp.getsockname()[1]
        hub = new_hub()
        await hub.start([local.dup(), tcp.dup()])
        try:
            assert hub.urls == [f"http://0.0.0.0:{port}", f"unix:@{name[1:]}"]
            assert hub.url == hub.urls[0]
        finally:
            await hub.drain()
        with socket.create_connection(("127.0.0.1", port)):
            pass  # it still listens: the socket is not the hub's alone


async def test_connections_can_be_left_to_other_processes_at_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as shared:
        shared.setblocking(False)
        port = shared.getsockname()[1]
        hub = new_hub()
        await hub.start([shared.dup()], accept=False)
        try:
            assert hub.url == f"http://127.0.0.1:{port}"
            async with await Wire.connect("127.0.0.1", port):
                for _ in range(10):
                    await asyncio.sleep(0)
                shared.accept()[0].close()  # it waits for any process
            await hub.accept()
            async with await Wire.connect("127.0.0.1", port) as wire:
                await wire.get("/livez", None)
                assert (await wire.read_response()).status == 200
        finally:
            await hub.drain()
        await hub.accept()


async def test_if_one_socket_cannot_be_served_on_none_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as good:
        kept, closed = good.dup(), socket.socket()
        closed.close()
        with pytest.raises((OSError, ValueError)):
            await new_hub().start([kept, closed])
        assert kept.fileno() == -1


async def test_no_worker_has_to_be_there() -> None:
    async with ScriptedWorker(up=False) as worker, running_hub(worker) as hub:
        assert (await hub.get("/livez", None)).status == 200
        response = await hub.post(CHAT, {"messages": []})
        assert (response.status, error_code(response)) == (503, "no_worker_available")
        assert response.header("retry-after")


async def test_ready_waits_until_each_worker_was_asked() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        two.on("/health", wait("go"), close())
        async with running_hub(one, two, ready=False) as hub:
            ready = asyncio.create_task(hub.hub.ready())
            await until(lambda: hub.hub.registry.workers[0].available)
            assert not ready.done()
            two.release("go")
            async with asyncio.timeout(DEADLINE):
                await ready
            assert [w.available for w in hub.hub.registry.workers] == [True, False]


# --- Drain: clients that were connected before ------------------------------------


async def test_a_drain_lets_a_running_stream_finish() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        steps = asyncio.Semaphore(0)
        worker.script(*stream_of(4, steps))
        wire = await hub.open(CHAT, STREAM)
        assert await wire.read_event()
        draining = drain(hub.hub)
        await asyncio.sleep(0)
        assert repr(hub.hub) == "<Hub draining workers=1>"
        for _ in range(3):
            assert not draining.done()
            steps.release()
            assert await wire.read_event()
        events = await wire.read_events()
        assert events[-1] == b"data: [DONE]\n\n"
        assert await wire.read_eof() == b""
        await soon(draining)
        await worker.idle()


@pytest.mark.parametrize("begun", [True, False])
async def test_a_drain_lets_a_document_finish(begun: bool) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        document = b'{"whole":true}'
        start = head(200, [("Content-Length", str(len(document)))]) + document[:5]
        steps = [send(start), wait("go")] if begun else [wait("go"), send(start)]
        worker.script(*steps, send(document[5:]))
        wire = await hub.open(CHAT, {"messages": []})
        await worker.received()
        if begun:
            assert (await wire.read_head()).status == 200
        draining = drain(hub.hub)
        await asyncio.sleep(0)
        assert not draining.done()
        worker.release("go")
        assert (await wire.read_response()).body == document
        await soon(draining)


async def test_no_new_client_is_accepted_during_a_drain() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(2, "go"))
        wire = await hub.open(CHAT, STREAM)
        assert await wire.read_event()
        draining = drain(hub.hub)
        await asyncio.sleep(0)
        assert await refused(hub.host, hub.port)
        assert not draining.done()
        worker.release("go")
        assert (await wire.read_events())[-1] == b"data: [DONE]\n\n"
        await soon(draining)


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT"])
async def test_a_connection_without_a_request_is_closed(sent: bytes) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await hub.wire()
        await wire.get("/livez")
        assert (await wire.read_response()).status == 200
        await wire.send(sent)
        await soon(drain(hub.hub))
        assert await wire.read_eof() == b""


async def test_a_kept_connection_does_not_hold_up_a_drain() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await hub.wire()
        worker.script(*stream_of(2, "go"))
        await wire.post(CHAT, STREAM, hub.token())
        assert await wire.read_event()
        draining = drain(hub.hub)
        await wire.get("/livez")
        worker.release("go")
        assert (await wire.read_events())[-1] == b"data: [DONE]\n\n"
        await wire.read_eof()
        await soon(draining)


async def test_a_drain_ends_what_belongs_to_the_hub() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(
            # A worker closes behind a stream: what is assembled keeps no connection.
            worker,
            health__interval=0.02,
            upstream__assemble="",
        ) as hub,
    ):
        await worker.pinged(2)
        assert (await hub.post(CHAT, {"messages": []})).status == 200
        assert worker.open > 0  # kept for the next request
        await soon(drain(hub.hub))
        assert repr(hub.hub.health) == "<HealthChecker running=0 of 1>"
        await worker.idle()


async def test_a_drain_without_requests_is_over_at_once() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await soon(drain(hub.hub))
        await soon(drain(hub.hub))  # and so is the second
        await hub.hub.abort()


# --- Drain: answers that did not end in time --------------------------------------


async def test_a_stream_that_does_not_end_in_time_gets_an_error() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=0.02) as hub,
    ):
        worker.script(*stream_of(3, "never"))
        wire = await hub.open(CHAT, STREAM)
        first = await wire.read_event()
        assert first
        await soon(drain(hub.hub))
        ending = await wire.read_to_end()
        assert not ending.clean
        assert not ending.reset
        assert ending.response.status == 200
        assert not ending.raw.endswith(b"0\r\n\r\n")
        assert b"[DONE]" not in ending.raw
        event = ending.response.body.split(b"\n\n")[-2]
        error = json.loads(event.removeprefix(b"data: "))["error"]
        assert error["code"] == "hub_draining"
        assert error.keys() == {"message", "type", "param", "code"}
        request = worker.requests[0]
        await asyncio.wait_for(request.closed_by_peer.wait(), DEADLINE)
        # The worker did nothing wrong.
        [known] = hub.hub.registry.workers
        assert known.available
        assert not known.in_doubt


async def test_a_stream_with_named_events_gets_a_named_error() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=0.02) as hub,
    ):
        worker.script(*stream_of(3, "never"))
        wire = await hub.open("/v1/messages", STREAM)
        assert await wire.read_event()
        await soon(drain(hub.hub))
        ending = await wire.read_to_end()
        assert not ending.clean
        assert b"\nevent: error\ndata: {" in ending.response.body


async def test_half_a_document_is_not_ended_well() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=0.02) as hub,
    ):
        headers = [("Content-Type", "application/json"), ("Content-Length", "100")]
        worker.script(send(head(200, headers) + b'{"half":'), stall())
        wire = await hub.open(CHAT, {"messages": []})
        assert (await wire.read_head()).status == 200
        await soon(drain(hub.hub))
        ending = await wire.read_to_end()
        assert not ending.clean
        assert ending.response.body == b'{"half":'


async def test_a_request_without_an_answer_yet_gets_an_error() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=0.02) as hub,
    ):
        worker.script(stall())
        wire = await hub.open(CHAT, {"messages": []})
        request = await worker.received()
        await soon(drain(hub.hub))
        response = await wire.read_response()
        assert (response.status, error_code(response)) == (503, "hub_draining")
        assert response.header("retry-after")
        assert response.header("connection") == "close"
        assert response.header("x-gollama-worker") == worker.name
        assert await wire.read_eof() == b""
        await asyncio.wait_for(request.closed_by_peer.wait(), DEADLINE)


@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_request_that_is_still_arriving_gets_an_error(size: int) -> None:
    """Within the replay window no worker has it; beyond, one has a part of it."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=0.02, limits__replay_window=4096) as hub,
    ):
        worker.script(read_body())
        wire = await hub.wire()
        headers = [("Content-Length", "1000000"), ("Expect", "100-continue")]
        await wire.send(request_head("POST", CHAT, hub.token(), headers))
        await wire.read_until(b"100 Continue\r\n\r\n")
        await wire.send(b'{"messages":["' + b"x" * size)
        if size > 4096:
            await worker.received()
        await soon(drain(hub.hub))
        response = await wire.read_response()
        assert (response.status, error_code(response)) == (503, "hub_draining")
        assert await wire.read_eof() == b""
        assert [request.complete for request in worker.requests] == (
            [False] if size > 4096 else []
        )


# --- Abort ------------------------------------------------------------------------


async def test_an_abort_ends_a_drain_that_is_under_way() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=3600) as hub,
    ):
        worker.script(*stream_of(3, "never"))
        wire = await hub.open(CHAT, STREAM)
        assert await wire.read_event()
        draining = drain(hub.hub)
        done, _ = await asyncio.wait([draining], timeout=0.02)
        assert not done
        await hub.hub.abort()
        await soon(draining)
        ending = await wire.read_to_end()
        assert not ending.clean
        assert b"hub_draining" in ending.response.body


async def test_an_abort_does_not_wait() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, server__drain=3600) as hub,
    ):
        worker.default(stall())
        wires = [await hub.open(CHAT, {"messages": []}) for _ in range(3)]
        await worker.received(3)
        async with asyncio.timeout(DEADLINE):
            await hub.hub.abort()
        for wire in wires:
            assert error_code(await wire.read_response()) == "hub_draining"
        assert await refused(hub.host, hub.port)


async def test_a_hub_that_never_ran_has_nothing_to_end() -> None:
    hub = new_hub()
    await hub.drain()
    await hub.abort()
    assert repr(hub) == "<Hub new workers=0>"


async def test_two_hubs_in_one_process_do_not_know_each_other() -> None:
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("phi") as two,
        running_hub(one) as first,
        running_hub(two) as second,
    ):

        async def models(hub: Any) -> list[str]:
            rows = (await hub.get("/v1/models")).json()["data"]
            return [row["id"] for row in rows]

        assert (await models(first), await models(second)) == (["qwen"], ["phi"])
        await first.hub.drain()
        assert (await second.get("/readyz", None)).status == 200


@pytest.mark.parametrize("path", ["/readyz", CHAT])
async def test_a_kept_connection_is_answered_during_a_drain(path: str) -> None:
    """With 503, and closed: nothing that is sent on it may vanish in silence."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(2, "go"))
        stream = await hub.open(CHAT, {"messages": [], "stream": True})
        assert await stream.read_event()
        kept = await hub.wire()
        await kept.get("/livez")
        assert (await kept.read_response()).status == 200
        draining = asyncio.create_task(hub.hub.drain(), name="fake drain")
        await asyncio.sleep(0)
        if path == CHAT:
            await kept.post(CHAT, {"messages": []}, hub.token())
        else:
            await kept.get(path)
        response = await kept.read_response()
        assert response.status == 503
        assert response.header("connection") == "close"
        worker.release("go")
        await draining
