"""What aiohttp's server does by itself is what the hub wants, or it is changed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from gollama_proxy.config import settings
from gollama_proxy.config.settings import Config
from gollama_proxy.edge import server as edge_server
from gollama_proxy.edge.response import (
    CLOSE,
    KEEP,
    Response,
    error_response,
    write_whole,
)
from gollama_proxy.edge.server import Handler, Server
from gollama_proxy.wire.errors import Code, RequestError
from tests.fakes.client import Wire, request_head
from tests.fakes.waiting import DEADLINE, until

GET = b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n"


async def say_hello(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="hello")


@contextlib.asynccontextmanager
async def serving(
    handler: Handler = say_hello, config: Config | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Run a server with one handler; yields its address."""
    runner = web.ServerRunner(
        Server(handler, config or Config(), lambda *_: None), shutdown_timeout=1
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield host, port
    finally:
        await runner.cleanup()


def shape(body: bytes) -> str:
    """Check that a body has the shape of an OpenAI error; return its code."""
    [(name, error)] = json.loads(body).items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return str(error["code"])


# --- What is no HTTP --------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"canary\r\n\r\n",
        b"GET canary\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03canary",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"get / HTTP/1.1\r\nHost: hub\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: hub\n\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\ncanary\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\nX : canary\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\nX: \x00canary\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\nHost: canary\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\nContent-Length: canary\r\n\r\n",
        b"GET /canary\x00 HTTP/1.1\r\nHost: hub\r\n\r\n",
        b"GET /canary HTTP/1.3\r\nHost: hub\r\n\r\n",
        b"\r\n\r\n\0",
    ],
)
async def test_what_is_not_http_gets_an_error_of_the_hub(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp would answer with text, and log what was sent, with a traceback."""
    caplog.set_level(logging.DEBUG)
    async with serving() as address, await Wire.connect(*address) as wire:
        await wire.send(sent)
        response = await wire.read_response()
        assert (response.status, shape(response.body)) == (400, "bad_request")
        assert response.header("server") == "gollama-proxy"
        assert response.header("content-type") == "application/json"
        assert b"canary" not in response.body
        assert await wire.read_eof() == b""
    assert [r for r in caplog.records if r.name.startswith(("aiohttp", "gollama"))] == (
        []
    )
    assert "canary" not in caplog.text


async def test_what_follows_what_is_no_http_is_not_read() -> None:
    calls = 0

    async def count(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return web.Response(text="hello")

    async with serving(count) as address, await Wire.connect(*address) as wire:
        await wire.send(b"canary\r\n\r\n" + GET * 3)
        assert (await wire.read_response()).status == 400
        assert await wire.read_eof() == b""
    assert calls == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\nHost: hub\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\nX: " + b"x" * 2000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: hub\r\n" + b"x" * 2000 + b": x\r\n\r\n",
        b"GET /" + b"x" * 2000,  # and it does not end
    ],
)
async def test_a_line_that_is_too_long_is_reported(sent: bytes) -> None:
    config = Config(limits=settings.Limits(head=1024))
    async with serving(config=config) as address, await Wire.connect(*address) as wire:
        await wire.send(sent)
        response = await wire.read_response()
        assert (response.status, shape(response.body)) == (431, "head_too_large")
        assert response.header("server") == "gollama-proxy"
        assert await wire.read_eof() == b""


async def test_a_line_within_the_limit_is_read() -> None:
    config = Config(limits=settings.Limits(head=1024))
    async with serving(config=config) as address, await Wire.connect(*address) as wire:
        await wire.get("/", headers=[("X", "x" * 1000)])
        assert (await wire.read_response()).status == 200


# --- What goes wrong below --------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("canary"), TimeoutError("canary")])
async def test_an_error_of_a_handler_is_logged_and_not_shown(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        raise error

    async with serving(fail) as address, await Wire.connect(*address) as wire:
        await wire.send(GET)
        response = await wire.read_response()
        assert (response.status, shape(response.body)) == (500, "internal_error")
        assert b"canary" not in response.body
        assert await wire.read_eof() == b""
    [record] = caplog.records
    assert (record.name, record.levelname) == ("gollama_proxy.edge.server", "ERROR")


# --- What aiohttp would do by itself ----------------------------------------------


async def test_there_is_no_100_continue_before_the_handler_allows_it() -> None:
    async def refuse(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=401)

    async with serving(refuse) as address, await Wire.connect(*address) as wire:
        headers = [("Expect", "100-continue"), ("Content-Length", "5")]
        await wire.send(request_head("POST", "/", None, headers))
        assert (await wire.read_until(b"\r\n")).startswith(b"HTTP/1.1 401 ")


async def test_a_body_that_is_framed_wrongly_fails_at_once_and_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The handler is notified while it waits; no more is read, and no body logged."""
    faults: list[str] = []
    reading = asyncio.Event()

    async def read(request: web.BaseRequest) -> web.StreamResponse:
        reading.set()
        try:
            return web.Response(body=await request.content.read())
        except web.RequestPayloadError as exc:
            faults.append(str(exc))
            return web.Response(status=400)

    async with serving(read) as address, await Wire.connect(*address) as wire:
        chunked = [("Transfer-Encoding", "chunked")]
        await wire.send(request_head("POST", "/", None, chunked) + b"5\r\nhello\r\n")
        await reading.wait()
        await wire.send(b"canary\r\n")
        assert (await wire.read_response()).status == 400
        assert await wire.read_eof() == b""
    assert faults == ["malformed chunk"]
    assert not caplog.records


async def test_a_compressed_body_is_not_unpacked() -> None:
    """A zip bomb stays as small as it is."""

    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await request.content.read())

    packed = gzip.compress(b"x" * (1 << 20))
    async with serving(echo) as address, await Wire.connect(*address) as wire:
        await wire.post("/", packed, headers=[("Content-Encoding", "gzip")])
        assert (await wire.read_response()).body == packed


async def test_a_handler_ends_when_its_client_leaves() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def linger(request: web.BaseRequest) -> web.StreamResponse:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()
        raise AssertionError

    async with serving(linger) as address, await Wire.connect(*address) as wire:
        await wire.send(GET)
        async with asyncio.timeout(DEADLINE):
            await started.wait()
            wire.close()
            await cancelled.wait()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHo", GET + b"GET / "])
async def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes) -> None:
    """Slowloris: aiohttp's own deadline is an hour, and any byte moves it.

    Half a second, so that a slow machine reads a head that did come within it.
    """
    config = Config(server=settings.Server(keepalive=0.5))
    loop = asyncio.get_running_loop()
    async with serving(config=config) as address:
        began = loop.time()
        async with await Wire.connect(*address) as wire:
            await wire.send(sent)
            if sent.startswith(GET):
                assert (await wire.read_response()).status == 200
            await wire.read_eof()
        assert loop.time() - began >= 0.49


async def test_an_answer_without_the_timer_of_idle_connections_sets_it_again() -> None:
    """The watchdog stops the timer of a connection that has a stream."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        request.protocol.keep_alive(False)
        write_whole(request, Response(b"{}"), "", keep_alive=True)
        return KEEP

    config = Config(server=settings.Server(keepalive=0.5))
    async with (
        serving(answer, config) as address,
        await Wire.connect(*address) as wire,
    ):
        for _ in range(2):
            await wire.send(GET)
            assert (await wire.read_response()).status == 200
        assert await wire.read_eof() == b""


async def test_a_head_that_drips_is_not_waited_for() -> None:
    config = Config(server=settings.Server(keepalive=0.1))
    async with serving(config=config) as address, await Wire.connect(*address) as wire:

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\nX: " + b"x" * 500:
                    await wire.send(bytes([byte]))
                    await asyncio.sleep(0.01)

        task = asyncio.create_task(drip())
        await wire.read_eof()
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("how", ["close", "keep"])
async def test_what_is_left_of_an_answer_is_dropped_after_a_limit(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transport that is closed waits until all is sent, and a client may never read.

    Less than what would pause the writer is left here, so there was no notice.
    """
    monkeypatch.setattr(edge_server, "_GRACE", 0.1)
    left = asyncio.get_running_loop().create_future()

    async def leave(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        if how == "close":
            response.force_close()
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        while not transport.get_write_buffer_size():
            transport.write(b"x" * 1000)
            await asyncio.sleep(0)
        left.set_result(transport)
        return response

    limits = settings.Timeouts(write=0.1)
    config = Config(server=settings.Server(keepalive=0.2), timeouts=limits)
    async with serving(leave, config) as address:
        async with await Wire.connect(*address, receive_buffer=4096) as wire:
            await wire.send(GET)
            transport = await left
            assert 0 < transport.get_write_buffer_size() < 64 << 10
            await until(lambda: transport.get_extra_info("socket").fileno() < 0)


async def test_an_answer_arrives_although_its_client_is_still_sending() -> None:
    """A close with unread bytes is a reset, which takes the answer with it."""

    async def refuse(request: web.BaseRequest) -> web.StreamResponse:
        response = error_response(RequestError(Code.BODY_TOO_LARGE, "Too large."))
        write_whole(request, response, "", keep_alive=False)
        return CLOSE

    async with serving(refuse) as address, await Wire.connect(*address) as wire:
        await wire.post("/", b"x" * (8 << 20))
        response = await wire.read_response()
        assert (response.status, shape(response.body)) == (413, "body_too_large")
        assert await wire.read_eof() == b""


async def test_aiohttp_keeps_no_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as address, await Wire.connect(*address) as wire:
        await wire.send(GET)
        assert (await wire.read_response()).body == b"hello"
    assert "aiohttp" not in "".join(record.name for record in caplog.records)
