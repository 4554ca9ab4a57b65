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
from typing import Protocol

from aiohttp import web

from gollama_proxy.edge.answer import begin_response
from gollama_proxy.edge.server import json_response
from gollama_proxy.ops.accesslog import Record
from gollama_proxy.upstream.client import Client, ToldError
from gollama_proxy.upstream.relay import Relay
from gollama_proxy.wire import sse
from gollama_proxy.wire.assemble import Assembler, AssemblyError
from gollama_proxy.wire.errors import ProxyError
from gollama_proxy.wire.openai import ENDPOINTS, Ending, Endpoint

_LINGER_ZERO = struct.pack("ii", 1, 0)


class Delivery(Protocol):
    """What the path of a request knows of either."""

    begun: bool  # the client has a part of it, which cannot be taken back

    async def open(self, relay: Relay) -> Client:
        """Begin with what a worker sends, if that has not been done."""

    def send(self, data: bytes) -> None:
        """Add something of the hub's own, which also completes what was cut."""

    async def finish(self) -> web.StreamResponse:
        """End what is complete."""

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """End what is not, so that nobody can think it is."""


class Stream:
    """An answer that is passed on as it comes."""

    _client: Client
    _response: web.StreamResponse
    _transport: asyncio.Transport
    _relay: Relay  # of which the client sees each byte

    def __init__(self, request: web.BaseRequest, record: Record) -> None:
        self.begun = False
        self._request = request
        self._record = record
        self._framed = False  # the client knows where the body has to end
        self._mended = False

    def __repr__(self) -> str:
        return f"<Stream {'begun' if self.begun else 'not begun'}>"

    async def open(self, relay: Relay) -> Client:
        """Send the head, unless it is out.

        Raises:
            ConnectionResetError: the client has left.
        """
        if self.begun:
            return self._client
        response = begin_response(self._request, relay, self._record)
        writer = await response.prepare(self._request)
        transport = self._request.transport
        if transport is None or writer is None:
            raise ConnectionResetError("the client left")
        self._record.status = relay.status
        self._framed = response.chunked or response.content_length is not None
        # With 4,000 streams, what nobody reads any more would be 15 MB.
        for sent in (self._record.headers, response.headers):
            sent.clear()
        self._response, self._transport, self._relay = response, transport, relay
        self.begun = True
        self._client = Client(
            transport.write,
            writer.drain,
            transport.get_write_buffer_size,
            response.chunked,
        )
        return self._client

    def send(self, data: bytes) -> None:
        self._client.send(data)
        self._mended = True

    async def finish(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """End it visibly: an error event for a stream, and no last chunk for anything.

        `close` still sends what is buffered, the error event among it, which `abort`
        would throw away.
        """
        record = self._record
        record.outcome, record.error, record.detail = "error", error.code, error.detail
        events = self._relay.is_event_stream
        if events and not isinstance(error, ToldError):
            if not self._mended and sse.unfinished(self._relay.tail):
                self._client.send(b"\n\n")
            named = ENDPOINTS[record.route].ending is Ending.NAMED
            self._client.send(sse.error_event(error.body(), named=named))
        if events or self._framed:
            self._transport.close()
        else:
            self._reset()
        return self._response

    def drop(self) -> web.StreamResponse:
        """Hang up on a client that does not read; what it has not taken is lost."""
        record = self._record
        record.outcome, record.error = "client_gone", "client_stalled"
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

    begun = False

    def __init__(self, endpoint: Endpoint, record: Record, limit: int) -> None:
        chat = endpoint.path.endswith("chat/completions")
        self._record = record
        self._assembler = Assembler("chat" if chat else "text", limit)
        self._error: AssemblyError | None = None

    def __repr__(self) -> str:
        return f"<Whole {self._assembler!r}>"

    async def open(self, relay: Relay) -> Client:
        return Client(self.send, _no_wait, int, chunked=False)

    def send(self, data: bytes) -> None:
        if self._error is None:
            try:
                self._assembler.feed(data)
            except AssemblyError as exc:
                self._error = exc

    async def finish(self) -> web.StreamResponse:
        """Give the answer that the stream stands for.

        Raises:
            AssemblyError: it stands for none.
        """
        if self._error is not None:
            raise self._error
        answer = self._assembler.finish()
        record = self._record
        record.bytes, record.tokens = len(answer), self._assembler.tokens
        return json_response(answer)

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """Tell the error; the client has heard nothing yet."""
        raise error


async def _no_wait() -> None:
    """Memory takes everything at once."""
