"""Answers that the hub writes: heads in every version, bodies, errors."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from gollama_proxy.edge.auth import AuthError
from gollama_proxy.edge.response import (
    CLOSE,
    KEEP,
    Client,
    ReportedError,
    Response,
    error_response,
    frame,
    head,
    write_whole,
)
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    RequestError,
    WorkerError,
)
from tests.fakes import requests
from tests.fakes.replies import chunk


def shape(body: bytes) -> str:
    """Check that a body has the shape of an OpenAI error; return its code."""
    [(name, error)] = json.loads(body).items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return str(error["code"])


def written(
    response: Response, method: str = "GET", *, keep_alive: bool = True
) -> bytes:
    """Write an answer; return what its client gets."""
    transport = Mock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    request = requests.request(method, "/", transport=transport)
    write_whole(request, response, "X: y\r\n", keep_alive=keep_alive)
    parts = [call.args[0] for call in transport.write.call_args_list]
    for call in transport.writelines.call_args_list:
        parts += call.args[0]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("version", "keep_alive", "begins", "connection"),
    [
        (HttpVersion11, True, "HTTP/1.1 200 OK", None),
        (HttpVersion11, False, "HTTP/1.1 200 OK", "close"),
        (HttpVersion10, True, "HTTP/1.0 200 OK", "keep-alive"),
        (HttpVersion10, False, "HTTP/1.0 200 OK", None),
        (HttpVersion(2, 0), False, "HTTP/1.1 200 OK", "close"),
    ],
)
def test_a_head_is_in_a_version_that_the_hub_speaks(
    version: HttpVersion, keep_alive: bool, begins: str, connection: str | None
) -> None:
    request = requests.request("GET", "/", version=version)
    text = head(request, 200, "X: y\r\n", keep_alive=keep_alive).decode()
    first, *lines = text.removesuffix("\r\n\r\n").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert (first, fields["X"], fields.get("Connection")) == (begins, "y", connection)
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", fields["Date"])


def test_the_date_is_the_present_second() -> None:
    request = requests.request("GET", "/")
    before = int(time.time())
    text = head(request, 200, "", keep_alive=True).decode()
    dates = [
        time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
        for second in range(before, int(time.time()) + 1)
    ]
    assert any(date in text for date in dates)


@pytest.mark.parametrize("size", [0, 5, 1 << 20])
def test_head_and_body_are_written_together(size: int) -> None:
    answer = written(Response(b"x" * size))
    before, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % size in before
    assert body == b"x" * size


def test_the_answer_to_head_has_no_body_but_its_length() -> None:
    answer = written(Response(b"hello"), "HEAD")
    assert b"Content-Length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
def test_some_statuses_have_neither_body_nor_length(status: int) -> None:
    answer = written(Response(b"hello", status))
    assert b"Content-Length" not in answer
    assert answer.endswith(b"\r\n\r\n")


def test_a_client_that_has_left_gets_nothing() -> None:
    request = requests.request("GET", "/")
    request.protocol.transport = None
    with pytest.raises(ConnectionResetError):
        write_whole(request, Response(), "", keep_alive=True)


def test_what_was_sent_states_what_the_connection_does_next() -> None:
    assert (KEEP.keep_alive, CLOSE.keep_alive) == (True, False)
    assert repr(Response(b"secret", 400)) == "<Response 400, 6 bytes>"


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (RequestError(Code.INVALID_JSON, "No JSON."), {}),
        (NoWorkerError(Code.NO_WORKER, "Nobody.", retry_after=2), {"Retry-After": "2"}),
        (HubError(Code.DRAINING, "Bye.", retry_after=0), {"Retry-After": "0"}),
        (AuthError("the cause"), {"WWW-Authenticate": 'Bearer error="invalid_token"'}),
    ],
)
def test_an_error_becomes_an_answer(error: Any, headers: dict[str, str]) -> None:
    response = error_response(error)
    assert response.status == error.code.status
    assert isinstance(response.body, bytes)
    assert shape(response.body) == error.code
    assert b"the cause" not in response.body
    lines = {"Content-Type": "application/json", **headers}
    assert response.fields == "".join(f"{k}: {v}\r\n" for k, v in lines.items())


# --- The connection of a client, as a relay uses it -------------------------------


class Written:
    paused = False

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        if self.closed:
            raise RuntimeError("unable to perform operation on <TCPTransport closed>")
        self.written.append(data)

    async def drain(self) -> None: ...


@pytest.mark.parametrize("chunked", [True, False])
def test_bytes_of_the_hubs_own_are_framed_as_the_rest_is(chunked: bool) -> None:
    connection = Written()
    client = Client(connection, connection, connection, chunked)
    client.send(b"one")
    client.send(b"a longer one")
    own = [b"one", b"a longer one"]
    assert connection.written == (list(map(chunk, own)) if chunked else own)


def test_nothing_is_not_sent() -> None:
    """An empty chunk would be the last one."""
    connection = Written()
    Client(connection, connection, connection, chunked=True).send(b"")
    assert connection.written == []


def test_a_client_that_left_a_moment_ago_is_not_written_to() -> None:
    connection = Written()
    client = Client(connection, connection, connection, chunked=True)
    client.send(b"one")
    connection.closed = True
    client.send(b"two")
    assert connection.written == [chunk(b"one")]


@pytest.mark.parametrize("size", [1, 15, 16, 255, 256, 70_000])
def test_a_frame_is_one_chunk(size: int) -> None:
    assert frame(b"x" * size) == chunk(b"x" * size)


def test_an_error_that_was_already_sent_still_blames_the_worker() -> None:
    error = ReportedError(Code.WORKER_INCOMPLETE, "because")
    assert isinstance(error, WorkerError)
