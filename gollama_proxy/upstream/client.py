"""A small HTTP client for the hub's own requests to workers.

Each has its own connection, which is closed after the answer: an idle one would cost
the worker a thread, and a pooled one may be dead already.  No cookies, no redirects, no
proxy of the environment.

An answer is bounded in time and size.  Compression is not requested; a server in front
of a worker may compress all the same, and what it sends is unpacked in bounded steps.
Nothing that a worker sends can hold up the event loop: framing that brings no body is
limited by `Connection`, and unpacking lets others run between two pieces.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import NamedTuple

from gollama_proxy import __version__
from gollama_proxy.config.tls import explain
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.dial import Target, connect
from gollama_proxy.wire.coding import CodingError, Unpacker, coding_of
from gollama_proxy.wire.sse import Gatherer, data_of

PIECE = 64 << 10  # bytes of a request's body that are written in one go


class Reply(NamedTuple):
    """An answer; if its body cannot be read, it is empty, and `flaw` has the reason."""

    status: int
    body: bytes
    flaw: str = ""

    def __repr__(self) -> str:
        flaw = self.flaw and f", {self.flaw}"
        return f"<Reply {self.status}, {len(self.body)} bytes{flaw}>"


class FetchError(Exception):
    """No whole answer came; its text is the reason, without anything a worker sent."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused  # the port is closed


async def fetch(
    target: Target,
    path: str,
    body: bytes | None = None,
    *,
    limit: int,
    timeout: float,
) -> Reply:
    """Send a request and return its answer; a POST if it has a JSON `body`.

    `limit` bounds the body, packed and unpacked, in bytes; `timeout` is for all of it,
    in seconds.

    Raises:
        FetchError: the worker cannot be reached, or did not answer in time and in HTTP.
    """
    deadline = asyncio.timeout(timeout)
    try:
        async with deadline:
            connection = await connect(target, any_answer=True)
            try:
                answer = _Answer(limit)
                connection.start(answer)
                await _send(connection, answer, _head(target, path, body), body or b"")
                await answer.over
                return await answer.read()
            finally:
                connection.close()
    except OSError as exc:  # a TimeoutError is one
        if deadline.expired():
            raise FetchError(f"no answer within {timeout:g} s") from None
        refused = isinstance(exc, ConnectionRefusedError)
        raise FetchError(_why_unreachable(exc), refused=refused) from exc


def _why_unreachable(error: OSError) -> str:
    if why := explain(error):  # whose number is one of OpenSSL's
        return why
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return error.strerror or "cannot be reached"  # name resolution


def _head(target: Target, path: str, body: bytes | None) -> bytes:
    worker = target.worker
    lines = [
        f"{'GET' if body is None else 'POST'} {worker.origin.prefix}{path} HTTP/1.1",
        f"Host: {worker.origin.authority}",
        f"User-Agent: gollama-proxy/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    ]
    if worker.api_key:
        lines.append(f"Authorization: Bearer {worker.api_key}")
    if body is not None:
        lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode()


async def _send(
    connection: Connection, answer: _Answer, head: bytes, body: bytes
) -> None:
    """Send a large body in pieces, so that others get their turn of the loop."""
    connection.write(head + body[:PIECE])
    for start in range(PIECE, len(body), PIECE):
        await connection.drain()
        await asyncio.sleep(0)
        if answer.over.done():  # such as an error, for which no whole body is needed
            return
        connection.write(body[start : start + PIECE])


async def follow(
    target: Target, path: str, notice: Callable[[bytes], None], *, timeout: float
) -> bool:
    """Read a stream of events until it ends; `notice` is called with the data of each.

    Returns False at once if the worker has no event stream there.  `timeout` is for
    its first byte, in seconds; the wait between two events has no limit.

    Raises:
        FetchError: the worker cannot be reached, or the stream breaks off.
    """
    try:
        async with asyncio.timeout(timeout):
            connection = await connect(target, any_answer=True)
            events = _Events(notice)
            connection.start(events, _head(target, path, None))
            try:
                await events.begun
            except BaseException:
                connection.close()
                raise
    except OSError as exc:  # a TimeoutError is one
        raise FetchError(_why_unreachable(exc)) from exc
    try:
        return events.begun.result() and await events.over
    finally:
        connection.close()


class _Events:
    """Receives one stream of events (see `connection.Receiver`)."""

    def __init__(self, notice: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[bool] = loop.create_future()
        self.over: asyncio.Future[bool] = loop.create_future()
        self._notice = notice
        self._gatherer = Gatherer()

    def __repr__(self) -> str:
        return f"<_Events {self._gatherer!r}>"

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        kinds = [value for name, value in headers if name.lower() == b"content-type"]
        events = any(kind.startswith(b"text/event-stream") for kind in kinds)
        self.begun.set_result(status == 200 and events)

    def body_received(self, data: bytes) -> None:
        if self.over.done() or not self.begun.result():
            return
        for event in self._gatherer.feed(data):
            found = data_of(event)
            if found is not None:
                self._notice(found)
        if self._gatherer.size > PIECE:
            self.over.set_exception(FetchError("an event without an end"))

    def chunk_received(self, chunk: bytes, start: int) -> None:
        self.body_received(chunk[start:-2])

    def answer_ended(self) -> None:
        if not self.over.done():
            self.over.set_result(True)

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        error = FetchError(reason)
        if not self.begun.done():
            self.begun.set_exception(error)
        elif not self.over.done():
            self.over.set_exception(error)


class _Answer:
    """Receives one answer (see `connection.Receiver`)."""

    def __init__(self, limit: int) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._failure = ""
        self._status = 0
        self._coding = ""
        self._body = bytearray()

    def __repr__(self) -> str:
        return f"<_Answer {self._status}, {len(self._body)} bytes>"

    async def read(self) -> Reply:
        """Return what has come, unpacked if necessary.

        Raises:
            FetchError: the answer is not complete.
        """
        if self._failure:
            raise FetchError(self._failure)
        if len(self._body) > self._limit:
            return self._too_large()
        body = bytearray()
        try:
            unpacker = Unpacker(self._coding)
            for piece in unpacker.feed(bytes(self._body)):
                body += piece
                if len(body) > self._limit:
                    return self._too_large()
                await asyncio.sleep(0)  # a kilobyte can stand for a megabyte
            unpacker.end()
        except CodingError as exc:
            return Reply(self._status, b"", f"with {exc}")
        return Reply(self._status, bytes(body))

    def _too_large(self) -> Reply:
        return Reply(self._status, b"", f"more than {self._limit} bytes")

    # --- What the connection calls ------------------------------------------------

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        self._coding = coding_of(
            value.decode("latin-1")
            for name, value in headers
            if name.lower() == b"content-encoding"
        )

    def body_received(self, data: bytes) -> None:
        if len(self._body) <= self._limit:
            self._body += data
            if len(self._body) > self._limit:
                self._finish()

    def chunk_received(self, chunk: bytes, start: int) -> None:
        self.body_received(chunk[start:-2])

    def answer_ended(self) -> None:
        self._finish()

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        if malformed:
            reason = "sent something that is not HTTP"
        elif self._status:
            reason = "its answer broke off"
        self._failure = reason
        self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
