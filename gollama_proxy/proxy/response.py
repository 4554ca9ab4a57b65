"""The client's side of an answer: it begins once and ends once, from any workers.

A `Stream` passes bytes on as they arrive; its status is sent with the first one.  An
`Assembly` is built in memory from the stream of a worker, and the client gets nothing
before it is complete.  llama-server notices at once that the client of a stream has
disconnected, and frees the slot; without streaming it may never notice while other
slots are busy (`server_response::recv_with_timeout`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from gollama_proxy.edge.response import (
    CLOSE,
    KEEP,
    Client,
    Pausing,
    ReportedError,
    Response,
    Sent,
    head,
)
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import ProxyError, status_body, write_error_event
from gollama_proxy.wire.folding import Assembler, AssemblyError
from gollama_proxy.wire.schema import Ending
from gollama_proxy.wire.sse import ErrorReshaper, Renamer, UsageHider, renamed

_LINGER_ZERO = struct.pack("ii", 1, 0)
_STREAM = "".join(f"{name}: {value}\r\n" for name, value in sse.STREAM_HEADERS.items())
# Members of an enum, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_DONE, _NAMED = Ending.DONE, Ending.NAMED
_EVENTS = "Content-Type: text/event-stream\r\n"


class Filter(Protocol):
    """Changes a body as it passes through, however it is split."""

    def feed(self, data: bytes) -> bytes:
        """Take a piece; return the output that is certain so far."""

    def finish(self) -> bytes:
        """Return the output that was held back."""


class Stream:
    """An answer that is passed on as it arrives."""

    __slots__ = (
        "_client",
        "_filters",
        "_framed",
        "_hider",
        "_mended",
        "_relay",
        "_transport",
        "_x",
        "begun",
        "fed",
    )

    _client: Client
    _transport: asyncio.Transport

    def __init__(self, x: Exchange) -> None:
        self.begun = False  # its head has been sent, so the status is final
        self.fed = False  # a part of the answer has been sent
        self._x = x
        names = x.names
        self._filters: tuple[Filter, ...] = ()
        if names is not None:
            self._filters = (Renamer(*names),)
        self._hider: UsageHider | None = None  # the first of the filters
        self._relay: Relay | None = None  # the first one, whose bytes the client gets
        self._framed = False  # the client can see where the body ends
        self._mended = False

    def __repr__(self) -> str:
        return f"<Stream {'begun' if self.begun else 'not begun'}>"

    def hide_usage(self) -> None:
        """Remove the usage that only the hub requested; call this before `open`."""
        if self._hider is None:  # not twice, when an answer continues elsewhere
            self._hider = UsageHider()
            self._filters = (self._hider, *self._filters)

    def withdraw(self) -> bytes:
        """Drop and return an incomplete event that may have been usage.

        A worker that dies in the middle of that event then does no harm.
        """
        return b"" if self._hider is None else self._hider.withdraw()

    # --- Its beginning ------------------------------------------------------------

    def open(self, relay: Relay) -> Client:
        """Send the head unless it has been sent; return the client for the relay.

        Raises:
            ConnectionResetError: the client has left.
        """
        if not self.begun:
            fields = relay.client_fields
            length = b""
            if relay.is_event_stream:
                if not relay.content_type:
                    fields += _EVENTS
                fields += _STREAM
            elif not self._filters:
                length = relay.header(b"content-length")
            self._begin(relay.status, fields, length)
        elif self._relay is None:  # its head was sent with a comment, too early for it
            self.notify(f"worker {self._x.worker}")
        if self._relay is None:
            self._relay, self.fed = relay, True
            endpoint = self._x.endpoint
            if relay.is_event_stream and endpoint.ending is _NAMED:
                self._filters += (ErrorReshaper(endpoint.api),)
        client = self._client
        if not self._filters:
            return client
        return Client(self, client.protocol, client.writer, chunked=False)

    def notify(self, comment: str) -> None:
        """Send a comment to a waiting client, after the head of its stream.

        Raises:
            ConnectionResetError: the client has left.
        """
        if not self.begun:
            self._begin(200, _EVENTS + _STREAM, b"")
        self._client.send(b": %b\n\n" % comment.encode())

    def _begin(self, status: int, fields: str, length: bytes) -> None:
        x = self._x
        transport = x.request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client left")
        chunked = False
        if length:
            fields += f"Content-Length: {length.decode()}\r\n"
        elif x.request.version >= (1, 1):
            chunked = True
            fields += "Transfer-Encoding: chunked\r\n"
        else:  # HTTP/1.0: the body ends with the connection
            x.keep_alive = False
        fields += x.header_lines()
        transport.write(head(x.request, status, fields, keep_alive=x.keep_alive))
        self.begun = True
        x.status = status
        self._framed = bool(chunked or length)
        self._transport = transport
        protocol: Pausing = x.request.protocol  # type: ignore[assignment]
        self._client = Client(transport, protocol, x.request.writer, chunked)

    def write(self, data: bytes) -> None:
        """Take a piece of an answer that passes through filters."""
        for each in self._filters:
            data = each.feed(data)
        self._client.send(data)

    # --- Its end ------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Add bytes from the hub, which also complete an event that was cut."""
        self._send_rest()
        self._client.send(data)
        self._mended = True

    def _send_rest(self) -> None:
        """Send what the filters held back."""
        if not self._filters:
            return
        rest = b""
        for each in self._filters:
            rest = each.feed(rest) + each.finish()
        self._client.send(rest)

    def finish(self) -> Sent:
        """End an answer that is complete."""
        self._send_rest()
        if self._client.chunked:
            try:
                self._transport.write(b"0\r\n\r\n")
            except RuntimeError:
                pass  # uvloop: it has just been closed
        return KEEP if self._x.keep_alive else CLOSE

    def break_off(self, error: ProxyError) -> Sent:
        """End visibly: with an error event for a stream, and without a last chunk.

        But a stream in which the worker has reported its failure by the last event of
        its API ends as the worker's does.

        `close` still sends what is buffered, including the error event; `abort` would
        discard it.
        """
        relay = self._relay
        reported = isinstance(error, ReportedError)
        if (
            reported
            and relay is not None
            and self._x.endpoint.ending is _NAMED
            and relay.end.complete
            and not relay.end.rest
        ):
            return self.finish()
        self._send_rest()
        events = relay is None or relay.is_event_stream
        if events and not reported:
            if relay is not None and not self._mended and relay.end.rest:
                self._client.send(b"\n\n")
            self._end_by(error.code.status, error.body())
        elif events or self._framed:
            self._transport.close()
        else:
            self._reset()
        return CLOSE

    def refuse(self, refusal: Response) -> Sent:
        """Send a refusal as an event, as the head has been sent already."""
        self._end_by(refusal.status, refusal.body)
        return CLOSE

    def _end_by(self, status: int, error: bytes) -> None:
        before = self._relay.tail if self._relay is not None else b""
        event = write_error_event(self._x.endpoint.api, status, error, before)
        self._client.send(event)
        self._transport.close()

    def drop(self) -> Sent:
        """Close the connection of a client that does not read."""
        if self._framed:
            self._transport.abort()
        else:
            self._reset()
        return CLOSE

    def _reset(self) -> None:
        """Close with RST: without chunks and length, FIN would mean a complete body."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()


class Assembly:
    """An answer in one piece for the client, which a worker sends as a stream."""

    begun = fed = False

    def __init__(self, x: Exchange, assembler: Assembler) -> None:
        self._x = x
        self._assembler = assembler
        self._names = x.names
        self._error: AssemblyError | None = None
        self._fail: Callable[[AssemblyError], None] = _ignore

    def __repr__(self) -> str:
        return f"<Assembly {self._assembler!r}>"

    def open(self, relay: Relay) -> Client:
        """Return the client for the relay, which writes into memory."""
        self._fail = relay.fail
        return Client(self, _MEMORY, _MEMORY, chunked=False)

    def write(self, data: bytes) -> None:
        """Take a piece of the stream."""
        if self._error is None:
            try:
                self._assembler.feed(data)
            except AssemblyError as exc:
                self._error = exc
                self._fail(exc)  # else the worker would keep generating in vain

    send = write  # what the hub adds is a part of the stream

    def finish(self) -> Response:
        """Return the answer that the stream contains.

        Raises:
            AssemblyError: it contains none.
        """
        if self._error is not None:
            raise self._error
        answer = self._assembler.finish()
        if self._names is not None:
            answer = renamed(answer, *self._names)
        self._x.bytes = len(answer)
        return Response(answer)

    def break_off(self, error: ProxyError) -> Sent:
        """Raise the error, as nothing has been sent to the client."""
        raise error

    def refuse(self, refusal: Response) -> Response:
        return refusal


class _Memory:
    """Takes everything at once."""

    __slots__ = ()

    paused = False

    async def drain(self) -> None: ...


_MEMORY = _Memory()


def _ignore(error: AssemblyError) -> None:
    """Do nothing: no answer has begun."""


def in_one_piece(x: Exchange, relay: Relay) -> Response:
    """Return an answer whose whole body has come."""
    body = relay.held
    x.bytes = len(body)
    if x.alias and x.names is not None:
        body = renamed(body, *x.names)
    return Response(body, relay.status, relay.client_fields)


def in_shape_of(x: Exchange, refusal: Response) -> Response:
    """Give a worker's refusal the shape of errors of the API."""
    body = status_body(x.endpoint.api, refusal.status, refusal.body)
    return Response(body, refusal.status, refusal.fields)


def open_answer(x: Exchange, relay: Relay) -> Client:
    """Begin or continue the answer; return the client for the relay."""
    if x.delivery is None or not relay.is_event_stream:
        x.delivery = Stream(x)
    if x.hides_usage and relay.is_event_stream:
        assert isinstance(x.delivery, Stream), x
        x.delivery.hide_usage()
    client = x.delivery.open(relay)
    if not (
        x.config.rescue.enabled
        and x.endpoint.ending is _DONE
        and x.body.replayable
        and relay.is_event_stream
    ):
        x.sent = b""  # it cannot be rescued
    if x.delivery.fed:
        x.body.forget()
    if x.resume is None:
        return client
    return x.resume.client_of(client, x.model, x.worker, relay.fail)
