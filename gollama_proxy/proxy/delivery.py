"""The client's side of an answer: it begins once and ends once, whoever gives it.

A `Stream` passes on what comes; its status is out with its first byte.  A `Whole` is
put together in memory from the stream of a worker, and the client has nothing before
it is complete.  llama-server notices at once that the client of a stream has left, and
frees its slot; of a request that does not stream it may never notice while other slots
are busy (`server_response::recv_with_timeout`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from gollama_proxy.edge.server import json_response
from gollama_proxy.proxy.client import Client, ToldError
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import begin_early, begin_response
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire import shapes
from gollama_proxy.wire.assemble import Assembler, AssemblyError
from gollama_proxy.wire.errors import ProxyError
from gollama_proxy.wire.filters import Renamer, UsageHider, renamed
from gollama_proxy.wire.openai import ENDPOINTS, Ending, Endpoint
from gollama_proxy.wire.shapes import ErrorReshaper

_LINGER_ZERO = struct.pack("ii", 1, 0)


class Delivery(Protocol):
    """What the path of a request knows of either."""

    @property
    def begun(self) -> bool:
        """Whether its head is out, so that there can be no other status."""

    @property
    def fed(self) -> bool:
        """Whether the client has a part of it, which cannot be taken back."""

    async def open(self, relay: Relay) -> Client:
        """Begin with what a worker sends, if that has not been done."""

    def send(self, data: bytes) -> None:
        """Add something of the hub's own, which also completes what was cut."""

    async def finish(self) -> web.StreamResponse:
        """End what is complete."""

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """End what is not, so that nobody can think it is."""

    def refuse(self, told: web.Response) -> web.StreamResponse:
        """Tell what a worker has refused it with."""


class Filter(Protocol):
    """Changes a body on its way, in whatever pieces it comes."""

    def feed(self, data: bytes) -> bytes:
        """Take a piece; return what is decided by now."""

    def finish(self) -> bytes:
        """Return what was held back until more is known."""


class Stream:
    """An answer that is passed on as it comes."""

    __slots__ = (
        "_client",
        "_filters",
        "_framed",
        "_hider",
        "_mended",
        "_record",
        "_relay",
        "_request",
        "_response",
        "_transport",
        "begun",
    )

    _client: Client
    _response: web.StreamResponse
    _transport: asyncio.Transport

    def __init__(
        self, request: web.BaseRequest, record: Record, renamer: Renamer | None = None
    ) -> None:
        """Make one; a `renamer` gives its model the name that the client knows."""
        self.begun = False
        self._filters: list[Filter] = [] if renamer is None else [renamer]
        self._hider: UsageHider | None = None  # is the first of them
        self._relay: Relay | None = None  # of which the client sees each byte
        self._request = request
        self._record = record
        self._framed = False  # the client knows where the body has to end
        self._mended = False

    def __repr__(self) -> str:
        return f"<Stream {'begun' if self.begun else 'not begun'}>"

    def hide_usage(self) -> None:
        """Leave out what the hub alone has asked for; to be called before `open`."""
        if self._hider is None:  # not twice, when an answer goes on elsewhere
            self._hider = UsageHider()
            self._filters.insert(0, self._hider)

    def withdraw(self) -> bytes:
        """Drop the half event that may have been usage; return it.

        So a worker that dies in the middle of what the hub alone wanted does no harm.
        """
        return b"" if self._hider is None else self._hider.withdraw()

    async def open(self, relay: Relay) -> Client:
        """Send the head, unless it is out.

        Raises:
            ConnectionResetError: the client has left.
        """
        if not self.begun:
            sized = not self._filters
            response = begin_response(self._request, relay, self._record, sized=sized)
            await self._begin(response)
        if self._relay is None:
            self._relay = relay
            if relay.is_event_stream and self._endpoint.ending is Ending.NAMED:
                self._filters.append(ErrorReshaper(self._endpoint.api))
        if not self._filters:
            return self._client
        drain, buffered = self._client.drain, self._client.buffered
        return Client(self._filter, drain, buffered, chunked=False)

    @property
    def _endpoint(self) -> Endpoint:
        return ENDPOINTS[self._record.route]

    def _filter(self, data: bytes) -> None:
        for each in self._filters:
            data = each.feed(data)
        self._client.send(data)

    def _send_rest(self) -> None:
        """Send what was held back, as there will be no more of it."""
        rest = b""
        for each in self._filters:
            rest = each.feed(rest) + each.finish()
        self._client.send(rest)

    async def tell(self, comment: bytes) -> None:
        """Tell a client that waits how it stands: the head of its stream goes out.

        Raises:
            ConnectionResetError: the client has left.
        """
        if not self.begun:
            await self._begin(begin_early(self._request, self._record))
        self._client.send(b": %b\n\n" % comment)

    @property
    def fed(self) -> bool:
        return self._relay is not None

    async def _begin(self, response: web.StreamResponse) -> None:
        writer = await response.prepare(self._request)
        transport = self._request.transport
        if transport is None or writer is None:
            raise ConnectionResetError("the client left")
        self._record.status = response.status
        self._framed = response.chunked or response.content_length is not None
        # With 4,000 streams, what nobody reads any more would be 15 MB.
        for sent in (self._record.headers, response.headers):
            sent.clear()
        self._response, self._transport = response, transport
        self.begun = True
        self._client = Client(
            transport.write,
            writer.drain,
            transport.get_write_buffer_size,
            response.chunked,
        )

    def send(self, data: bytes) -> None:
        self._send_rest()
        self._client.send(data)
        self._mended = True

    async def finish(self) -> web.StreamResponse:
        self._send_rest()
        await self._response.write_eof()
        return self._response

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """End it visibly: an error event for a stream, and no last chunk for anything.

        `close` still sends what is buffered, the error event among it, which `abort`
        would throw away.
        """
        record = self._record
        record.outcome = Outcome.ERROR
        record.error, record.detail = error.code, error.detail
        relay = self._relay
        self._send_rest()
        events = relay is None or relay.is_event_stream
        if events and not isinstance(error, ToldError):
            if relay is not None and not self._mended and relay.end.rest:
                self._client.send(b"\n\n")
            self._end_by(error.code.status, error.body())
        elif events or self._framed:
            self._transport.close()
        else:
            self._reset()
        return self._response

    def refuse(self, told: web.Response) -> web.StreamResponse:
        """Tell as an event what would have been the answer if there were no head."""
        self._record.outcome = Outcome.REFUSED
        assert isinstance(told.body, bytes), told
        self._end_by(told.status, told.body)
        return self._response

    def _end_by(self, status: int, error: bytes) -> None:
        before = self._relay.tail if self._relay is not None else b""
        event = shapes.error_event(self._endpoint.api, status, error, before)
        self._client.send(event)
        self._transport.close()

    def drop(self) -> web.StreamResponse:
        """Hang up on a client that does not read; what it has not taken is lost."""
        record = self._record
        record.outcome, record.error = Outcome.CLIENT_GONE, "client_stalled"
        if self._framed:
            self._transport.abort()
        else:
            self._reset()
        return self._response

    def _reset(self) -> None:
        """Hang up with RST: without chunks and length, FIN says that all is well."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()


class Whole:
    """An answer that the client wants in one piece, and a worker gives as a stream."""

    begun = fed = False

    def __init__(
        self,
        assembler: Assembler,
        record: Record,
        names: tuple[str, str] | None = None,
    ) -> None:
        """Make one; `names` are the model's, old and new."""
        self._names = names
        self._record = record
        self._assembler = assembler
        self._error: AssemblyError | None = None
        self._fail: Callable[[AssemblyError], None] = _ignore

    def __repr__(self) -> str:
        return f"<Whole {self._assembler!r}>"

    async def open(self, relay: Relay) -> Client:
        self._fail = relay.fail
        return Client(self.send, _no_wait, int, chunked=False)

    def send(self, data: bytes) -> None:
        if self._error is None:
            try:
                self._assembler.feed(data)
            except AssemblyError as exc:
                self._error = exc
                self._fail(exc)  # or the worker would go on and on, for nobody

    async def finish(self) -> web.StreamResponse:
        """Give the answer that the stream stands for.

        Raises:
            AssemblyError: it stands for none.
        """
        if self._error is not None:
            raise self._error
        answer = self._assembler.finish()
        if self._names is not None:
            answer = renamed(answer, *self._names)
        self._record.bytes = len(answer)
        return json_response(answer)

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """Tell the error; the client has heard nothing yet."""
        raise error

    def refuse(self, told: web.Response) -> web.StreamResponse:
        return told


async def _no_wait() -> None:
    """Memory takes everything at once."""


def _ignore(error: AssemblyError) -> None:
    """Nobody is there to be told."""
