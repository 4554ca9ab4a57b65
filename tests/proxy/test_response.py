"""An answer begins once and ends once, and half of it never looks like the whole."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, cast
from unittest.mock import Mock

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from gollama_proxy.edge.response import Client, ReportedError
from gollama_proxy.proxy.attempt import report_of
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly, Stream, in_one_piece
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.wire.answer import read_end
from gollama_proxy.wire.assemble import ask_for_stream
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.folding import AssemblyError, LostTextError, UnfoldableError
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes import requests
from tests.fakes.clock import Clock
from tests.fakes.pool import worker
from tests.fakes.relays import pass_on
from tests.fakes.replies import (
    anthropic,
    chunk,
    done,
    error_event,
    responses,
    role,
    token,
    usage_of,
)
from tests.fakes.streams import chat_stream, text_stream

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = (b"Content-Type", b"application/json")
LENGTH = (b"Content-Length", b"100")
EVENTS = (b"Content-Type", b"text/event-stream")
LOST = WorkerError(Code.WORKER_LOST, "because", detail="reset")


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.end = ""
        self.socket: Mock | None = Mock(spec=socket.socket)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return len(self.written)

    def is_closing(self) -> bool:
        return bool(self.end)

    def close(self) -> None:
        self.end = self.end or "closed"

    def abort(self) -> None:
        self.end = self.end or "reset"

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.socket if name == "socket" else default

    @property
    def lingers(self) -> bool:
        """Whether its end would be a FIN, as that of a complete answer is."""
        linger = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.socket is None or linger not in [
            call.args for call in self.socket.setsockopt.call_args_list
        ]


def exchange(
    route: str = CHAT, version: HttpVersion = HttpVersion11, alias: str = ""
) -> Exchange:
    """Make the exchange of a request whose client gets an answer now."""
    request = requests.request("POST", route, version=version, transport=Transport())
    x = Exchange(request, 0.0)
    x.route, x.endpoint, x.keep_alive = route, ENDPOINTS[route], True
    x.worker, x.attempts = "w", 1
    x.plan = Mock()
    x.plan.pool.model = x.asked = "tiny"
    x.alias = alias
    return x


class Stage:
    """A stream to a client, and a relay to pass on."""

    def __init__(self, route: str = CHAT, *, chunked: bool = True) -> None:
        self.x = exchange(route, HttpVersion11 if chunked else HttpVersion10)
        transport = self.x.request.transport
        assert isinstance(transport, Transport)
        self.transport = transport
        self.stream = self.x.delivery = Stream(self.x)
        self.head = ""

    def open(self, relay: Relay) -> Client:
        """Open the stream, and take its head off what was written."""
        client = self.stream.open(relay)
        if not self.head:
            head, _, self.transport.written = self.transport.written.partition(
                b"\r\n\r\n"
            )
            self.head = head.decode() + "\r\n"
        return client

    async def pass_on(self, relay: Relay) -> WorkerError:
        """Pass on what came of an answer, until it breaks off."""
        with pytest.raises(WorkerError) as caught:
            await pass_on(relay, self.open(relay))
        return caught.value


def received(
    *parts: bytes,
    headers: tuple[tuple[bytes, bytes], ...] = (EVENTS,),
    lost: bool = True,
) -> Relay:
    """Make a relay that has received a part of an answer, and lost its worker."""
    clock = Clock()
    lease = worker(name="w", clock=clock).lease()
    relay = Relay(cast(Connection, None), lease, ENDPOINTS[CHAT])
    relay.head_received(200, list(headers))
    for part in parts:
        relay.body_received(part)
    if lost:
        relay.answer_lost("reset", malformed=False)
    return relay


# --- A stream: its beginning ------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_stream_begins_with_its_head(chunked: bool) -> None:
    stage = Stage(chunked=chunked)
    assert not stage.stream.begun
    assert repr(stage.stream) == "<Stream not begun>"
    client = stage.open(received(role()))
    assert stage.stream.begun
    assert repr(stage.stream) == "<Stream begun>"
    assert (client.chunked, client.protocol.paused) == (chunked, False)
    assert " 200 " in stage.head.partition("\r\n")[0]
    assert "X-Gollama-Worker: w\r\n" in stage.head
    assert stage.x.status == 200
    client.transport.write(b"one")
    client.send(b"two")
    assert stage.transport.written == b"one" + (chunk(b"two") if chunked else b"two")
    assert client.protocol is stage.x.request.protocol
    await client.writer.drain()


@pytest.mark.parametrize(
    ("version", "headers", "chunked", "length"),
    [
        (HttpVersion11, (JSON,), True, None),
        (HttpVersion11, (EVENTS,), True, None),
        (HttpVersion11, (JSON, LENGTH), False, 100),
        (HttpVersion11, (EVENTS, LENGTH), True, None),
        (HttpVersion10, (JSON, LENGTH), False, 100),
        (HttpVersion10, (EVENTS,), False, None),
    ],
)
def test_how_a_client_knows_where_an_answer_ends(
    version: HttpVersion,
    headers: tuple[tuple[bytes, bytes], ...],
    chunked: bool,
    length: int | None,
) -> None:
    """By its length, by its last chunk, or by the end of the connection."""
    stage = Stage(chunked=version is HttpVersion11)
    client = stage.open(received(headers=headers))
    assert client.chunked is chunked
    assert ("Transfer-Encoding: chunked" in stage.head) is chunked
    assert (f"Content-Length: {length}" in stage.head) is (length is not None)
    assert stage.x.keep_alive is bool(chunked or length)


def test_a_stream_begins_once_whatever_continues_it() -> None:
    stage = Stage()
    client = stage.stream.open(received(role()))
    written = stage.transport.written
    assert stage.stream.open(received(role())) is client
    assert stage.transport.written == written


def test_a_client_that_has_left_gets_no_stream() -> None:
    stage = Stage()
    stage.x.request.protocol.transport = None
    with pytest.raises(ConnectionResetError):
        stage.stream.open(received(role()))
    assert not stage.stream.begun
    assert stage.transport.written == b""


@pytest.mark.parametrize("chunked", [True, False])
def test_a_complete_stream_ends_with_its_last_chunk(chunked: bool) -> None:
    stage = Stage(chunked=chunked)
    stage.open(received(role()))
    response = stage.stream.finish()
    assert response.keep_alive is chunked
    assert stage.transport.written == (b"0\r\n\r\n" if chunked else b"")
    assert stage.transport.end == ""


def test_a_comment_begins_a_stream() -> None:
    stage = Stage()
    stage.stream.notify("queued 1/1")
    assert stage.stream.begun
    assert not stage.stream.fed
    assert stage.transport.written.endswith(chunk(b": queued 1/1\n\n"))
    assert b"Content-Type: text/event-stream\r\n" in stage.transport.written


# --- An answer in one piece -------------------------------------------------------


def whole_answer(status: int, body: bytes, *, ended: bool = True) -> Relay:
    relay = received(body, headers=(JSON,), lost=False)
    relay.status = status
    if ended:
        relay.answer_ended()
    return relay


def test_a_short_answer_goes_out_in_one_piece() -> None:
    x = exchange()
    answer = in_one_piece(x, whole_answer(200, b'{"a":1}'))
    assert (answer.status, answer.body, x.bytes) == (200, b'{"a":1}', 7)
    assert answer.fields == "Content-Type: application/json\r\n"


def test_an_answer_has_the_name_that_the_client_knows() -> None:
    x = exchange(alias="mini")
    answer = in_one_piece(x, whole_answer(200, b'{"model":"tiny"}'))
    assert answer.body == b'{"model":"mini"}'


def test_a_long_answer_and_a_stream_do_not() -> None:
    assert report_of(exchange(), whole_answer(200, b"{", ended=False)) is None
    assert report_of(exchange(), received(role())) is None


# --- A stream: when it breaks off -------------------------------------------------


@pytest.mark.parametrize(
    ("route", "error", "written"),
    [
        (CHAT, WorkerError, b"data: {"),
        ("/v1/messages", WorkerError, b"event: error\ndata: {"),
        (CHAT, ReportedError, b""),
    ],
)
async def test_a_broken_stream_ends_with_one_error_event(
    route: str, error: type[ProxyError], written: bytes
) -> None:
    """And not with a second one, where the worker's own was passed on."""
    stage = Stage(route, chunked=False)
    stage.open(received())
    because = error(Code.WORKER_LOST, "because", detail="reset")
    response = stage.stream.break_off(because)
    assert not response.keep_alive
    assert stage.transport.written.startswith(written)
    assert bool(stage.transport.written) is bool(written)
    assert stage.transport.end == "closed"


@pytest.mark.parametrize(
    ("route", "tail", "whole"),
    [
        ("/v1/responses", responses("failed"), True),
        ("/v1/responses", responses("failed")[:-1], False),
        ("/v1/messages", anthropic("error"), False),
        (CHAT, error_event("no") + done(), False),
    ],
)
async def test_a_failure_that_ends_an_answer_is_its_regular_end(
    route: str, tail: bytes, whole: bool
) -> None:
    stage = Stage(route)
    relay = received()
    stage.open(relay)
    relay.end = read_end(tail, ENDPOINTS[route].ending)
    assert relay.end.failed
    response = stage.stream.break_off(ReportedError(Code.WORKER_INCOMPLETE, "because"))
    assert response.keep_alive is whole
    assert stage.transport.written == (b"0\r\n\r\n" if whole else b"")
    assert (stage.transport.end == "closed") is not whole


@pytest.mark.parametrize(
    ("headers", "chunked", "end"),
    [
        ((JSON,), True, "closed"),
        ((JSON, LENGTH), True, "closed"),
        ((JSON, LENGTH), False, "closed"),
        ((JSON,), False, "reset"),
    ],
)
async def test_a_broken_answer_is_not_added_to(
    headers: tuple[tuple[bytes, bytes], ...], chunked: bool, end: str
) -> None:
    """Where only the end of the connection ends the answer, it ends with a reset."""
    stage = Stage(chunked=chunked)
    await stage.pass_on(received(b"{", headers=headers))
    before = stage.transport.written
    stage.stream.break_off(LOST)
    assert (stage.transport.written, stage.transport.end) == (before, end)
    assert stage.transport.lingers is (end == "closed")


@pytest.mark.parametrize(
    ("last", "half"),
    [
        (token("a"), False),
        (token("a")[:-1], True),
        (token("a")[:-9], True),
        (b"proxy error: Failed to read connection", True),
    ],
)
async def test_the_error_is_a_separate_event(last: bytes, half: bool) -> None:
    stage = Stage()
    error = await stage.pass_on(received(role(), last))
    before = stage.transport.written
    stage.stream.break_off(error)
    added = stage.transport.written.removeprefix(before)
    assert added.startswith(chunk(b"\n\n") if half else b"")
    assert added.removeprefix(chunk(b"\n\n")).partition(b"\r\n")[2].startswith(b"data:")


async def test_what_was_completed_already_is_not_completed_once_more() -> None:
    """Behind half an event the hub has sent the rest of it, or a whole rescue."""
    stage = Stage()
    error = await stage.pass_on(received(role(), token("a")[:-1]))
    stage.stream.send(b"\n")
    stage.stream.send(token("b"))
    before = stage.transport.written
    assert before.endswith(chunk(b"\n") + chunk(token("b")))
    stage.stream.break_off(error)
    added = stage.transport.written.removeprefix(before)
    assert added.partition(b"\r\n")[2].startswith(b'data: {"error"')


async def test_where_nothing_was_cut_nothing_is_completed() -> None:
    stage = Stage()
    await stage.pass_on(received(role()))
    before = stage.transport.written
    stage.stream.send(b"")
    assert stage.transport.written == before


async def test_the_bytes_of_another_worker_are_not_the_clients() -> None:
    """They go through a splice, which passes on whole events."""
    stage = Stage()
    error = await stage.pass_on(received(role()))
    stage.stream.send(b"")
    second = received(role(), token("a")[:-1])
    assert stage.open(second)
    before = stage.transport.written
    stage.stream.break_off(error)
    assert chunk(b"\n\n") not in stage.transport.written.removeprefix(before)


# --- A client that does not read --------------------------------------------------


@pytest.mark.parametrize("headers", [(EVENTS,), (JSON,), (JSON, LENGTH)])
@pytest.mark.parametrize("chunked", [True, False])
async def test_the_connection_of_a_client_that_does_not_read_is_closed(
    chunked: bool, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    """It gets nothing more, and by no means what looks like a good end."""
    stage = Stage(chunked=chunked)
    stage.open(received(headers=headers))
    assert not stage.stream.drop().keep_alive
    assert (stage.transport.end, stage.transport.written) == ("reset", b"")
    assert stage.transport.lingers is (chunked or LENGTH in headers)


async def test_a_connection_without_a_socket_is_closed_all_the_same() -> None:
    stage = Stage(chunked=False)
    stage.open(received())
    stage.transport.socket = None
    stage.stream.drop()
    assert stage.transport.end == "reset"


# --- A whole ----------------------------------------------------------------------


def assembly(route: str = CHAT, limit: int = 1 << 20) -> tuple[Assembly, Exchange]:
    x = exchange(route)
    asked = ask_for_stream(b"{}", ENDPOINTS[route])
    assert asked is not None
    return Assembly(x, asked.assembler(limit)), x


def answer_of(delivery: Assembly) -> Any:
    return json.loads(delivery.finish().body)


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_whole_is_put_together_from_what_was_written(size: int) -> None:
    delivery, x = assembly()
    client = delivery.open(received())
    assert not client.chunked
    stream = chat_stream(["Good ", "day"], usage=usage_of(3))
    for at in range(0, len(stream), size):
        client.transport.write(stream[at : at + size])
        assert not client.protocol.paused
        await client.writer.drain()
    assert not delivery.begun
    response = delivery.finish()
    assert (response.status, response.fields) == (
        200,
        "Content-Type: application/json\r\n",
    )
    answer = json.loads(response.body)
    assert answer["choices"][0]["message"]["content"] == "Good day"
    assert answer["object"] == "chat.completion"
    assert x.bytes == len(response.body)


@pytest.mark.parametrize("route", [TEXT, "/chat/completions"])
async def test_a_whole_is_of_the_kind_that_its_path_has(route: str) -> None:
    delivery, _ = assembly(route)
    stream = text_stream(["a"]) if route == TEXT else chat_stream(["a"])
    delivery.open(received()).transport.write(stream)
    kind = "text_completion" if route == TEXT else "chat.completion"
    assert (answer_of(delivery))["object"] == kind


async def test_another_worker_may_go_on_with_a_whole() -> None:
    """What the hub adds between the two is a comment, or completes an event."""
    delivery, _ = assembly()
    for_one = delivery.open(received())
    for_one.transport.write(chat_stream(["Good "], reason=None)[:-1])
    delivery.send(b"\n")
    for_another = delivery.open(received())
    for_another.send(b": gollama rescued 1\n\n")
    for_another.send(chat_stream(["day"]))
    answer = answer_of(delivery)
    assert answer["choices"][0]["message"]["content"] == "Good day"


@pytest.mark.parametrize(
    ("stream", "error", "why"),
    [
        (b"", UnfoldableError, "before the answer was complete"),
        (chat_stream(["a"], reason=None), UnfoldableError, "before the answer"),
        (chat_stream([], reason="length"), LostTextError, "lacks the text"),
        (b"data: {\n\n" + chat_stream(["a"]), UnfoldableError, "cannot be read"),
        (chat_stream(["a" * 5000]), LostTextError, "longer than 4096 characters"),
    ],
)
async def test_what_makes_up_no_answer_is_an_error_at_its_end(
    stream: bytes, error: type[AssemblyError], why: str
) -> None:
    """And not in the call that reads from the worker."""
    delivery, x = assembly(limit=4096)
    client = delivery.open(received())
    client.transport.write(stream)
    with pytest.raises(AssemblyError, match=why) as caught:
        delivery.finish()
    assert type(caught.value) is error
    assert x.bytes == 0


async def test_the_first_thing_that_is_wrong_counts() -> None:
    delivery, _ = assembly()
    delivery.send(error_event("out of memory"))
    delivery.send(b"data: nonsense\n\n")
    with pytest.raises(AssemblyError) as caught:
        delivery.finish()
    assert caught.value.error is not None
    assert caught.value.error.message == "out of memory"


def test_a_whole_that_breaks_off_has_not_begun() -> None:
    """So its client gets a status."""
    delivery, _ = assembly()
    delivery.send(chat_stream(["a"], reason=None))
    with pytest.raises(WorkerError) as caught:
        delivery.break_off(LOST)
    assert caught.value is LOST


def test_an_answer_in_one_piece_shows_its_progress() -> None:
    delivery, _ = assembly()
    assert repr(delivery) == "<Assembly <ChatAssembler size=0 open>>"
