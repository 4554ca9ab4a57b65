"""Every request ends once: with one outcome, one status, and one answer at most."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web

from gollama_proxy.config.settings import Config, Server
from gollama_proxy.edge.response import CLOSE, KEEP, Response, Sent
from gollama_proxy.proxy.exchange import CLIENT_CLOSED, Proxy
from gollama_proxy.proxy.state import Exchange, State, draining
from gollama_proxy.tasks import spawn
from gollama_proxy.telemetry.accesslog import Outcome
from gollama_proxy.wire.errors import Code, HubError, RequestError
from tests.fakes import requests
from tests.fakes.clock import Clock

PATH = "/thing"
Handler = Callable[[web.BaseRequest, Exchange], Awaitable[Response | Sent]]


class Client(requests.Nowhere):
    """A client's end of a connection, which keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.received = b""
        self.unread = 0  # bytes that wait
        self.left = self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.received += data

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.left

    def abort(self) -> None:
        self.aborted = True


class Stage:
    """A proxy with a route that no worker answers, and the records of its requests."""

    def __init__(self, handler: Handler, **settings: Any) -> None:
        self.client = Client()
        self.ended: list[Exchange] = []
        self.clock = Clock()
        self.proxy = Proxy(
            Config(**settings),
            {PATH: {"POST": handler, "GET": handler}},
            *[Mock()] * 8,
            ended=self.ended.append,
            clock=self.clock,
        )

    def request(
        self,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        version: HttpVersion = HttpVersion11,
    ) -> Any:
        """Make a request on a new connection, as a `Request` of the server has it."""
        made = requests.request(method, PATH, headers, version=version)
        return SimpleNamespace(
            protocol=SimpleNamespace(head=None),
            content=made.content,
            headers=made.headers,
            keep_alive=made.keep_alive,
            method=method,
            raw_headers=made.raw_headers,
            raw_path=PATH,
            remote="",
            transport=self.client,
            version=version,
            writer=made.writer,
        )

    async def serve(self, method: str = "POST", **more: Any) -> Sent:
        return await self.pass_on(self.request(method, **more))

    async def pass_on(self, request: Any) -> Sent:
        request.task = asyncio.current_task()
        return await self.proxy(request)

    @property
    def record(self) -> Exchange:
        """The record of the one request, after its end."""
        [x] = self.ended
        assert x.delivery is None
        assert not self.proxy.running
        return x

    @property
    def status(self) -> int:
        """The status that the client has got; 0 without one."""
        received = self.client.received
        return int(received.split(b" ", 2)[1]) if received else 0


def raising(error: BaseException) -> Handler:
    async def handle(request: web.BaseRequest, x: Exchange) -> Response:
        raise error

    return handle


async def answer(request: web.BaseRequest, x: Exchange) -> Response:
    return Response(b"{}")


# --- Answers ----------------------------------------------------------------------


async def test_an_answer_is_written_and_its_connection_kept() -> None:
    stage = Stage(answer)
    stage.clock.advance(7)
    assert await stage.serve() is KEEP
    x = stage.record
    assert (x.state, x.outcome, x.status) == (State.ENDED, Outcome.COMPLETE, 200)
    assert (x.route, x.method, x.started) == (PATH, "POST", stage.clock())
    assert stage.client.received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"X-Request-Id: %b\r\n" % x.id.encode() in stage.client.received
    assert b"Connection:" not in stage.client.received


async def test_each_request_has_an_id_unless_it_brings_one() -> None:
    stage = Stage(answer)
    await stage.serve()
    await stage.serve()
    await stage.serve(headers={"X-Request-Id": "mine"})
    first, second, third = (x.id for x in stage.ended)
    assert len(first) == len(second) == 16
    assert first != second
    assert third == "mine"


async def test_what_the_handler_has_written_is_not_written_again() -> None:
    async def stream(request: web.BaseRequest, x: Exchange) -> Sent:
        x.status = 206
        return CLOSE

    stage = Stage(stream)
    assert await stage.serve() is CLOSE
    assert (stage.record.status, stage.client.received) == (206, b"")


@pytest.mark.parametrize("name", ["Transfer-Encoding", "Upgrade", "X-Other"])
async def test_a_connection_ends_with_a_head_that_may_be_read_in_two_ways(
    name: str,
) -> None:
    stage = Stage(answer)
    lasts = name == "X-Other"
    sent = await stage.serve(headers={name: "chunked"})
    assert sent is (KEEP if lasts else CLOSE)
    assert stage.record.keep_alive is lasts
    assert (b"Connection: close" in stage.client.received) is not lasts


async def test_a_client_that_keeps_no_connection_gets_none() -> None:
    stage = Stage(answer)
    assert await stage.serve(version=HttpVersion10) is CLOSE
    assert stage.client.received.startswith(b"HTTP/1.0 200 OK\r\n")


async def test_a_slow_client_is_waited_for() -> None:
    stage = Stage(answer)
    drained = asyncio.Event()

    async def drain() -> None:
        drained.set()

    stage.client.unread = 1
    request = stage.request()
    request.writer.drain = drain
    assert await stage.pass_on(request) is KEEP
    assert drained.is_set()


async def test_a_slow_client_may_leave() -> None:
    stage = Stage(answer)

    async def drain() -> None:
        raise ConnectionResetError

    stage.client.unread = 1
    request = stage.request()
    request.writer.drain = drain
    assert await stage.pass_on(request) is CLOSE
    assert stage.record.outcome is Outcome.COMPLETE


async def test_a_client_that_has_left_gets_nothing() -> None:
    stage = Stage(answer)
    stage.client.left = True
    assert await stage.serve() is CLOSE
    assert stage.client.received == b""
    assert stage.record.status == 200


# --- Errors -----------------------------------------------------------------------


async def test_an_error_is_the_answer() -> None:
    stage = Stage(raising(HubError(Code.INTERNAL, "no", detail="why")))
    assert await stage.serve() is KEEP
    x = stage.record
    assert (x.outcome, x.error, x.detail) == (Outcome.ERROR, Code.INTERNAL, "why")
    assert x.status == stage.status == Code.INTERNAL.status


@pytest.mark.parametrize("begun", [False, True])
async def test_a_bug_is_logged_and_ends_the_request(
    begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: web.BaseRequest, x: Exchange) -> Response:
        if begun:
            x.delivery = cast(Any, SimpleNamespace(begun=True))
        raise LookupError("secret")

    stage = Stage(fail)
    sent = await stage.serve()
    x = stage.record
    assert (x.outcome, x.error, x.detail) == (
        Outcome.ERROR,
        Code.INTERNAL,
        "LookupError",
    )
    assert caplog.messages == [f"request {x.id} failed"]
    assert (sent is KEEP, stage.client.aborted) == (not begun, begun)
    assert stage.status == (0 if begun else 500)
    assert b"secret" not in stage.client.received


async def test_a_client_that_leaves_between_two_steps() -> None:
    stage = Stage(raising(ConnectionResetError()))
    assert await stage.serve() is CLOSE
    x = stage.record
    assert (x.outcome, x.status) == (Outcome.CLIENT_GONE, CLIENT_CLOSED)
    assert stage.client.received == b""


def test_a_request_that_is_no_http_is_recorded() -> None:
    stage = Stage(answer)
    stage.clock.advance(3)
    error = RequestError(Code.BAD_REQUEST, "no", detail="why")
    stage.proxy.refused(stage.request(), error)
    x = stage.record
    assert (x.id, x.method, x.started) == ("-", "-", stage.clock())
    assert (x.outcome, x.error, x.status) == (Outcome.ERROR, Code.BAD_REQUEST, 400)


async def test_a_head_of_another_origin_gets_its_lines() -> None:
    stage = Stage(answer, server=Server(cors_origins=("http://a.example",)))
    await stage.serve(headers={"Origin": "http://a.example"})
    expected = b"Access-Control-Allow-Origin: http://a.example\r\n"
    assert expected in stage.client.received
    stage.client.received = b""
    await stage.serve(headers={"Origin": "http://b.example"})
    assert b"Allow-Origin" not in stage.client.received


# --- Ends from outside ------------------------------------------------------------


async def begun(stage: Stage, **more: Any) -> asyncio.Task[Sent]:
    """Begin a request, and return its task once the handler has it."""
    task = spawn(stage.serve(**more), "request")
    await asyncio.sleep(0)
    assert len(stage.proxy.running) == 1
    return task


async def wait(request: web.BaseRequest, x: Exchange) -> Response:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def test_a_client_that_leaves_while_it_waits() -> None:
    stage = Stage(wait)
    task = await begun(stage)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    x = stage.record
    assert (x.outcome, x.status) == (Outcome.CLIENT_GONE, CLIENT_CLOSED)
    assert stage.client.received == b""


async def test_a_client_that_leaves_in_an_answer_has_had_its_status() -> None:
    async def stream(request: web.BaseRequest, x: Exchange) -> Response:
        x.status = 200
        return await wait(request, x)

    stage = Stage(stream)
    task = await begun(stage)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (stage.record.outcome, stage.record.status) == (Outcome.CLIENT_GONE, 200)


async def test_a_request_that_is_cut_gets_the_reason_and_loses_its_connection() -> None:
    stage = Stage(wait)
    task = await begun(stage)
    [x] = stage.proxy.running
    stage.proxy.cancel(x)
    assert await task is CLOSE
    assert not task.cancelling()
    assert (x.outcome, x.error) == (Outcome.ERROR, Code.CANCELLED)
    assert x.status == stage.status == Code.CANCELLED.status
    assert b"Connection: close\r\n" in stage.client.received
    assert stage.record is x


async def test_a_slow_client_has_time_to_read_why_it_is_cut() -> None:
    stage = Stage(wait)
    stage.client.unread = 1
    task = await begun(stage)
    [x] = stage.proxy.running
    read: list[State] = []

    async def drain() -> None:
        read.append(x.state)

    cast(Any, x.request).writer = SimpleNamespace(drain=drain)
    stage.proxy.cancel(x)
    assert await task is CLOSE
    assert read == [State.ENDED]


@pytest.mark.parametrize("state", ["begun", "ended"])
async def test_a_request_that_is_cut_late_gets_no_second_answer(state: str) -> None:
    stage = Stage(wait)
    task = await begun(stage)
    [x] = stage.proxy.running
    if state == "begun":
        x.delivery = cast(Any, SimpleNamespace(begun=True))
    else:
        x.end(Outcome.COMPLETE)
    stage.proxy.cancel(x)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.client.received == b""
    outcome = Outcome.CLIENT_GONE if state == "begun" else Outcome.COMPLETE
    assert stage.record.outcome is outcome


async def test_a_hub_that_drains_takes_no_new_work_and_answers_what_it_can() -> None:
    stage = Stage(answer)
    await stage.proxy.drain(0)
    assert await stage.serve() is CLOSE
    assert (stage.ended[0].error, stage.status) == (Code.DRAINING, 503)
    stage.client.received = b""
    assert await stage.serve("GET") is CLOSE
    assert (stage.ended[1].error, stage.status) == ("", 200)
    assert b"Connection: close\r\n" in stage.client.received


async def test_the_last_request_ends_the_drain() -> None:
    async def slow(request: web.BaseRequest, x: Exchange) -> Response:
        await may_end.wait()
        return Response()

    may_end = asyncio.Event()
    stage = Stage(slow)
    tasks = [spawn(stage.serve(), "request") for _ in range(2)]
    await asyncio.sleep(0)
    drain = spawn(stage.proxy.drain(60.0), "drain")
    await asyncio.sleep(0)
    assert not drain.done()
    may_end.set()
    assert [await task for task in tasks] == [CLOSE, CLOSE]
    await drain
    assert [x.outcome for x in stage.ended] == [Outcome.COMPLETE] * 2


async def test_a_proxy_shows_how_many_requests_run() -> None:
    stage = Stage(wait)
    task = await begun(stage)
    assert repr(stage.proxy) == "<Proxy running=1>"
    stage.proxy.cut()
    await task
    assert stage.record.error == draining().code
    assert repr(stage.proxy) == "<Proxy running=0>"
