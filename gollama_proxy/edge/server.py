"""aiohttp's low-level server, with some of its behaviour changed.

Its parser, limits, keep-alive and life cycle are used unchanged.  What differs: invalid
HTTP is answered with an error of the hub, and its bytes are not logged; connections are
counted; and a client that does not read cannot hold a connection indefinitely.  The
low-level server has no router, so `Expect: 100-continue` is not answered before
authentication.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from aiohttp import http_parser, web_server
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from gollama_proxy.config.addresses import BACKLOG
from gollama_proxy.config.settings import Config
from gollama_proxy.config.tls import Credentials
from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge.connections import (
    ConnectionLimiter,
    TlsConnection,
    TlsOptions,
    peer,
)
from gollama_proxy.edge.response import (
    CLOSE,
    SERVER,
    error_response,
    write_whole,
)
from gollama_proxy.wire.errors import Code, HubError, ProxyError, RequestError
from gollama_proxy.wire.headers import Head

# Seconds by which the limit of a connection exceeds that of an answer
# (`timeouts.write`), as only the latter stops the worker and sets the outcome.
_GRACE = 1.0

logger = logging.getLogger(__name__)

Handler = Callable[["Request"], Awaitable[StreamResponse]]
Refused = Callable[[BaseRequest, ProxyError], None]


def require_parser() -> None:
    """Refuse to serve with aiohttp's parser in Python.

    It is slower and more lenient, and most of aiohttp's advisories about request
    smuggling affected only this parser.

    Raises:
        ConfigError: the parser in C is missing, or AIOHTTP_NO_EXTENSIONS is set.
    """
    parser = http_parser.HttpRequestParser
    if parser is http_parser.HttpRequestParserPy:
        raise ConfigError(
            "aiohttp: runs without its parser in C; must be installed from a wheel, or "
            "built with a compiler, and AIOHTTP_NO_EXTENSIONS must not be set"
        )


class Server(web_server.Server):
    """Makes a protocol for each client connection."""

    def __init__(
        self,
        handler: Handler,
        config: Config,
        refused: Refused,
        clients: ConnectionLimiter | None = None,
        tls: Credentials | None = None,
    ) -> None:
        """Make a server, for HTTPS if it gets credentials.

        `refused` is called for requests that never reach `handler`.
        """
        super().__init__(
            cast(Callable[[BaseRequest], Awaitable[StreamResponse]], handler),
            request_factory=Request,
            handler_cancellation=True,
        )
        self.refused = refused
        self.clients = clients or ConnectionLimiter(config.limits, time.monotonic)
        self._shaking: set[TlsConnection] = set()
        self._tls_options: TlsOptions | None = None
        self._options: dict[str, Any] = {}
        self._listening: list[asyncio.Server] = []
        self.patience = 0.0
        self.reconfigure(config, tls)

    def reconfigure(self, config: Config, tls: Credentials | None) -> None:
        """Take other settings and credentials for new connections."""
        self.patience = config.timeouts.write + _GRACE
        if tls is not None:
            self._tls_options = TlsOptions(
                tls,
                self.clients,
                self._make,
                config.timeouts.handshake,
                config.timeouts.write,
                self.patience,
                self._shaking,
            )
        self._options = {
            "access_log": None,
            "auto_decompress": False,
            # aiohttp has no other time limit for receiving a request head.
            "keepalive_timeout": config.server.keepalive,
            # How long to receive the rest of a rejected body (413), so that the client
            # can read the answer before the connection is reset.
            "lingering_time": 2.0,
            "max_line_size": config.limits.head,
            "max_field_size": config.limits.head,
        }

    def __call__(self) -> Any:
        """Make the protocol of a connection that has just been accepted."""
        if self._tls_options is None:
            return _Counted(self)
        return TlsConnection(self._tls_options)

    def _make(self) -> _Protocol:
        return _Protocol(self)

    # --- Listening ----------------------------------------------------------------

    async def listen(
        self,
        host: str,
        port: int,
        inherited: Sequence[socket.socket] = (),
        *,
        accept: bool = True,
    ) -> None:
        """Take connections at an address, or on inherited sockets instead.

        Unless it is to `accept` them, they wait until `accept()`.

        Raises:
            OSError: the address is in use, or not one of this machine.
        """
        loop = asyncio.get_running_loop()
        try:
            for each in inherited:
                found = await loop.create_server(
                    self, sock=each, backlog=BACKLOG, start_serving=accept
                )
                self._listening.append(found)
            if not inherited:
                found = await loop.create_server(
                    self, host, port, backlog=BACKLOG, start_serving=accept
                )
                self._listening.append(found)
        except BaseException:
            self.stop_listening()
            raise

    async def accept(self) -> None:
        """Take the connections that wait; harmless when it does."""
        for each in self._listening:
            await each.start_serving()

    @property
    def addresses(self) -> list[Any]:
        """Those it listens on: a host and a port, or the name of a Unix socket."""
        sockets = [each for server in self._listening for each in server.sockets]
        return [each.getsockname() for each in sockets]

    @property
    def urls(self) -> list[str]:
        """The URLs for clients; those that begin with unix: are paths of sockets."""
        scheme = "http" if self._tls_options is None else "https"
        found = []
        for address in self.addresses:
            if isinstance(address, (str, bytes)):  # abstract ones are bytes
                path = os.fsdecode(address).replace("\0", "@", 1)
                found.append(f"unix:{path}")
                continue
            host, port = address[:2]
            host = f"[{host}]" if ":" in host else host
            found.append(f"{scheme}://{host}:{port}")
        return sorted(found, key=lambda url: url.startswith("unix:"))

    def stop_listening(self) -> None:
        """Take no more connections; those that are open stay."""
        for each in self._listening:
            each.close()
        self._listening = []

    async def close(self) -> None:
        """Close idle connections at once, and the others a second later."""
        self.stop_listening()
        await asyncio.sleep(0)  # what has just arrived is a request by then
        self.pre_shutdown()
        await self.shutdown(1.0)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Close all connections; unfinished TLS handshakes are aborted."""
        for connection in tuple(self._shaking):
            connection.abort()
        await super().shutdown(timeout)

    def options(self) -> dict[str, Any]:
        return {"loop": asyncio.get_running_loop(), **self._options}


class Request(BaseRequest):
    """A request as aiohttp makes it, with what every request needs.

    In aiohttp each of these is a property, which costs a call whenever it is read.
    """

    __slots__ = (
        "content",
        "headers",
        "keep_alive",
        "method",
        "protocol",
        "raw_headers",
        "raw_path",
        "remote",
        "task",
        "version",
    )

    protocol: _Protocol

    def __init__(
        self,
        message: RawRequestMessage,
        content: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        """Make one; `task` serves all requests of its connection."""
        assert isinstance(protocol, _Protocol)
        super().__init__(message, content, protocol, writer, task, task.get_loop())
        self.content = content
        self.headers = message.headers
        self.keep_alive = not message.should_close
        self.method = message.method
        self.protocol = protocol
        self.raw_headers = message.raw_headers
        self.raw_path = message.path
        self.remote = protocol.remote
        self.task = task  # type: ignore[misc]  # a property in aiohttp
        self.version = message.version
        protocol.content = content
        if protocol.task is None:
            protocol.serve_in(task)


class _Protocol(RequestHandler):
    """The HTTP protocol of one connection."""

    __slots__ = (
        "_deadline",
        "_held",
        "_patience",
        "_refused",
        "_wire",
        "content",
        "head",
        "paused",
        "remote",
        "task",
    )

    def __init__(self, server: Server) -> None:
        super().__init__(server, **server.options())
        self.content: StreamReader | None = None  # the body of the present request
        self.head: Head | None = None  # of the last one, unless it was large
        self.paused = False  # as much waits to be sent to the client as may
        self.remote = ""  # the client's address
        self.task: asyncio.Task[None] | None = None  # it serves all requests
        self._held = False  # nothing is read from the client
        self._refused = server.refused
        self._patience = server.patience
        self._deadline: asyncio.TimerHandle | None = None
        # aiohttp drops its own reference before everything has been sent.
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = self.transport
        self.remote = peer(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._wire = None
        self._expect_progress(None)
        super().connection_lost(exc)

    # --- A body that is larger than aiohttp's buffer ------------------------------

    def pause_reading(self) -> None:
        self._held = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on, if reading was paused.

        aiohttp calls this twice for each body, and parses and resumes without need.
        """
        if self._held:
            self._held = False
            super().resume_reading(resume_parser)

    # --- A client that does not read ----------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused = True
        self._expect_progress(self._patience)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.paused = False
        self._expect_progress(None)

    def serve_in(self, task: asyncio.Task[None]) -> None:
        """Note the task of all requests, whose end leaves a rest to be read."""
        self.task = task
        # A third of the memory of a lambda, for as long as the connection is open.
        task.add_done_callback(self._task_ended)

    def _task_ended(self, _task: asyncio.Task[None]) -> None:
        self._expect_progress(self._patience)

    def _expect_progress(self, limit: float | None) -> None:
        """Close the connection after `limit` seconds unless there is another call."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if limit is not None and self._wire is not None:
            self._deadline = self._loop.call_later(limit, self._wire.abort)

    # --- Invalid requests ---------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Let a body with invalid framing fail at once.

        aiohttp's parser reports the error as the next request, so that a handler that
        waits for the rest of the body would keep waiting.
        """
        super().data_received(data)
        content = self.content
        if self._messages and content is not None and not content.is_eof():
            text = "malformed chunk"  # the parser's own message quotes the body
            content.set_exception(RequestPayloadError(text))
            content.feed_eof()  # aiohttp must not wait for the rest,
            self.close()  # nor answer it

    def eof_received(self) -> None:
        """Treat a client that closes its side as gone, even with unread data."""
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """Answer a request that the parser rejected, or an error below the handler."""
        error: ProxyError
        if isinstance(exc, LineTooLong):
            text = "A line of the request head is too long."
            error = RequestError(Code.HEAD_TOO_LARGE, text)
        elif status == 400:
            text = "The request is not valid HTTP/1.1."
            error = RequestError(Code.BAD_REQUEST, text)
        else:
            logger.error("error below the request handler", exc_info=exc)
            error = HubError(Code.INTERNAL, "The hub failed.")
        self._refused(request, error)
        response = error_response(error)
        write_whole(request, response, f"Server: {SERVER}\r\n", keep_alive=False)
        return CLOSE


class _Counted(_Protocol):
    """A connection without TLS, which counts itself."""

    __slots__ = ("_address", "_clients")

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._clients: ConnectionLimiter | None = server.clients
        self._address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self._clients is not None, self
        if self._clients.by_address:
            self._address = peer(transport)
        if self._clients.enter(self._address):
            super().connection_made(transport)
        else:
            self._clients = None
            cast(asyncio.Transport, transport).abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._clients is not None:
            self._clients.leave(self._address)
        super().connection_lost(exc)
