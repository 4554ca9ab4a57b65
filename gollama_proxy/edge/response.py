"""Answers as bytes: heads that the hub writes, answers in one piece, and chunks.

aiohttp's `web.Response` costs some forty calls for each answer.  The hub writes the
head and the body of an answer itself, in one write, and hands aiohttp's server an
object that has nothing left to do (`Sent`).
"""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Protocol

import msgspec
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from gollama_proxy.wire.bodies import CODINGS
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError, status_body
from gollama_proxy.wire.schema import Api

SERVER = "gollama-proxy"
JSON = "Content-Type: application/json\r\n"

_STATUS_LINES = {
    each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n" for each in HTTPStatus
}
# Statuses whose answers have no body (RFC 9110, 6.4.1).
_BODILESS = frozenset({204, 304})


class Response(msgspec.Struct, frozen=True, gc=False):
    """An answer in one piece.

    `fields` are its header lines, each ended by CRLF; those of all answers are added
    when it is written.
    """

    body: bytes = b""
    status: int = 200
    fields: str = JSON

    def __repr__(self) -> str:  # without its text
        return f"<Response {self.status}, {len(self.body)} bytes>"


class Sent(StreamResponse):
    """An answer that has been written, as aiohttp's server sees it."""

    __slots__ = ("keep_alive",)

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        # In aiohttp, this is a property.
        self.keep_alive = keep_alive  # type: ignore[misc]

    async def prepare(self, request: BaseRequest) -> None:
        """Do nothing: the head has been written."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: the body has been written, or was broken off."""


# For a connection that stays open, and for one that closes.
KEEP, CLOSE = Sent(keep_alive=True), Sent(keep_alive=False)


def write_whole(
    request: BaseRequest, response: Response, fields: str, *, keep_alive: bool
) -> int:
    """Write an answer, head and body together; `fields` are those of every answer.

    Returns how many bytes wait because the client has not read them yet.

    Raises:
        ConnectionResetError: the client has left.
    """
    transport, body, status = request.transport, response.body, response.status
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client left")
    bodiless = status in _BODILESS
    if bodiless:
        fields = f"{response.fields}{fields}"
    else:
        fields = f"{response.fields}{fields}Content-Length: {len(body)}\r\n"
    data = head(request, status, fields, keep_alive=keep_alive)
    if bodiless or request.method == "HEAD":
        transport.write(data)
    elif len(body) > 64 << 10:  # a copy would cost more than a second buffer
        transport.writelines((data, body))
    else:
        transport.write(data + body)
    return transport.get_write_buffer_size()


def head(request: BaseRequest, status: int, fields: str, *, keep_alive: bool) -> bytes:
    """Write the head of an answer: its status line, `fields`, `Date`, `Connection`.

    The version is the client's, if the hub conforms to it (RFC 9110, 6.2: a server must
    not claim any other).
    """
    first, connection = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n", ""
    if request.version == (1, 0):
        first = first.replace("1.1", "1.0", 1)
        connection = "Connection: keep-alive\r\n" if keep_alive else ""
    elif not keep_alive:
        connection = "Connection: close\r\n"
    now = time.time()
    if now >= _date_line.ends or now < _date_line.begins:
        _date_line.set(now)
    return f"{first}{fields}{connection}{_date_line.text}\r\n".encode("latin-1")


class _DateLine:
    """The `Date` line of a second (RFC 9110, 6.6.1)."""

    __slots__ = ("begins", "ends", "text")

    def __init__(self) -> None:
        self.begins = self.ends = 0.0  # Unix time
        self.text = ""

    def __repr__(self) -> str:
        return f"<DateLine {self.text!r}>"

    def set(self, second: float) -> None:
        """Write the line of another second."""
        now = time.gmtime(second)
        self.begins = second // 1
        self.ends = self.begins + 1
        day, month = _DAYS[now.tm_wday], _MONTHS[now.tm_mon]
        of_day = f"{now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02}"
        self.text = (
            f"Date: {day}, {now.tm_mday:02} {month} {now.tm_year} {of_day} GMT\r\n"
        )


_date_line = _DateLine()
# In English, whatever the locale is.
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = (
    *("", "Jan", "Feb", "Mar", "Apr", "May", "Jun"),
    *("Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
)


def error_response(error: ProxyError, api: Api = Api.OPENAI) -> Response:
    """Make the answer to a failed request, in the shape of the API that was called."""
    fields = JSON
    if error.retry_after is not None:
        fields += f"Retry-After: {error.retry_after}\r\n"
    if error.allow:
        fields += f"Allow: {error.allow}\r\n"
    if error.code is Code.UNSUPPORTED_ENCODING:  # RFC 9110, 15.5.16
        fields += f"Accept-Encoding: {', '.join(CODINGS)}\r\n"
    if error.code is Code.INVALID_API_KEY:
        # RFC 6750, 3.1, has no error for a request without a token; here all
        # refusals are the same, so that they reveal nothing to a guesser.
        fields += 'WWW-Authenticate: Bearer error="invalid_token"\r\n'
    elif error.code is Code.INSUFFICIENT_SCOPE:
        fields += 'WWW-Authenticate: Bearer error="insufficient_scope"\r\n'
    status = error.code.status
    return Response(status_body(api, status, error.body()), status, fields)


# --- The connection of a client, as a relay uses it -------------------------------


class Writable(Protocol):
    """Takes bytes for a client: its transport, or what changes or keeps them."""

    def write(self, data: bytes, /) -> None: ...


class Pausing(Protocol):
    """Has been notified whether as much waits to be sent as may (`WRITE_BUFFER`)."""

    @property
    def paused(self) -> bool: ...


class Draining(Protocol):
    """Waits until most of it has been sent."""

    async def drain(self) -> None: ...


class Client(msgspec.Struct, frozen=True):
    """The parts of a client's connection that a relay uses, or memory in its place.

    They are objects and not their methods, each of which would take 64 bytes for as
    long as the stream is open.
    """

    transport: Writable
    protocol: Pausing
    writer: Draining
    chunked: bool  # frame each write as a chunk

    def send(self, data: bytes) -> None:
        """Queue bytes from the hub; without effect once the client has left."""
        if data:
            try:
                self.transport.write(frame(data) if self.chunked else data)
            except RuntimeError:
                pass  # uvloop: it has just been closed


def frame(data: bytes) -> bytes:
    """Frame data as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ClientStalledError(Exception):
    """The client did not read for too long."""


class ReportedError(WorkerError):
    """A broken answer whose client already has the worker's own error event."""
