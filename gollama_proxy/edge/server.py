"""aiohttp's low-level server, with the edges filed off.

Its parser, limits, keep-alive and life cycle are used as they are; what is changed is
that a request which is no HTTP gets an answer in the hub's own words, and that its
bytes do not get into a log; that connections are counted; and that a client which does
not read cannot hold one for ever.  The low-level server has no router, so nobody
answers `Expect: 100-continue` before authentication.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import http_parser, web
from aiohttp.http_exceptions import LineTooLong

from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import Config
from gollama_proxy.config.tls import Credentials
from gollama_proxy.edge.connections import Connections
from gollama_proxy.edge.gate import Gate, Terms, peer
from gollama_proxy.edge.response import (
    CLOSE,
    SERVER,
    error_response,
    write_whole,
)
from gollama_proxy.wire.errors import Code, HubError, ProxyError, RequestError

# Seconds by which the deadline of an answer (`timeouts.write`) comes before that of its
# connection: the one knows what to do about the worker, and what to log.
_GRACE = 1.0

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refused = Callable[[web.BaseRequest, ProxyError], None]


def require_parser() -> None:
    """Refuse to serve with aiohttp's parser in Python.

    It is slower, more lenient in what it takes for HTTP, and most of aiohttp's
    advisories about request smuggling were about it alone.

    Raises:
        ConfigError: the one in C is missing, or AIOHTTP_NO_EXTENSIONS is set.
    """
    parser = http_parser.HttpRequestParser
    if parser is http_parser.HttpRequestParserPy:
        raise ConfigError(
            "aiohttp: runs without its parser in C; must be installed from a wheel, or "
            "built with a compiler, and AIOHTTP_NO_EXTENSIONS not be set"
        )


class Server(web.Server):
    """Makes a protocol for each client connection."""

    def __init__(
        self,
        handler: Handler,
        config: Config,
        refused: Refused,
        clients: Connections | None = None,
        tls: Credentials | None = None,
    ) -> None:
        """Make a server; `refused` hears of requests that never get to `handler`.

        It speaks HTTPS if it is given credentials.
        """
        super().__init__(handler, handler_cancellation=True)
        self.refused = refused
        self.clients = clients or Connections(config.limits, time.monotonic)
        self.patience = config.timeouts.write + _GRACE
        self._terms: Terms | None = None
        if tls is not None:
            self._terms = Terms(
                tls,
                self.clients,
                self._make,
                config.timeouts.handshake,
                config.timeouts.write,
                self.patience,
                set(),
            )
        self._options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            # The only deadline that aiohttp has for a request head is this one.
            "keepalive_timeout": config.server.keepalive,
            # How long to listen to a body that nobody wants (413), so that the client
            # gets to read the answer before the connection is reset.
            "lingering_time": 2.0,
            "max_line_size": config.limits.head,
            "max_field_size": config.limits.head,
        }

    def __call__(self) -> Any:
        """Make the protocol of a connection that has just been accepted."""
        return _Counted(self) if self._terms is None else Gate(self._terms)

    def _make(self) -> _Protocol:
        return _Protocol(self)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Hang up on everybody; who is not served yet is not waited for."""
        if self._terms is not None:
            for gate in tuple(self._terms.shaking):
                gate.abort()
        await super().shutdown(timeout)

    def options(self) -> dict[str, Any]:
        return {"loop": asyncio.get_running_loop(), **self._options}


class _Protocol(web.RequestHandler):
    """One connection, as far as HTTP is concerned."""

    __slots__ = ("_deadline", "_patience", "_refused", "_wire")

    def __init__(self, server: Server) -> None:
        super().__init__(server, **server.options())
        self._refused = server.refused
        self._patience = server.patience
        self._deadline: asyncio.TimerHandle | None = None
        # aiohttp lets go of its own reference before all has been sent.
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = self.transport

    def connection_lost(self, exc: BaseException | None) -> None:
        self._wire = None
        self._expect_progress(None)
        super().connection_lost(exc)

    # --- A client that does not read ----------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_progress(self._patience)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect_progress(None)

    async def start(self) -> None:
        """Serve, and then give the client some time to take what is left."""
        try:
            await super().start()
        finally:
            if self._wire is not None:
                self._expect_progress(self._patience)

    def _expect_progress(self, limit: float | None) -> None:
        """Hang up after so many seconds, unless there is another call before."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if limit is not None and self._wire is not None:
            self._deadline = self._loop.call_later(limit, self._wire.abort)

    # --- Requests that are none ---------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Let a body that is framed wrongly fail at once.

        aiohttp's parser tells it as the next request, and whoever waits for the rest
        of the body would wait on.
        """
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            text = "malformed chunk"  # the parser's own words quote the body
            request.content.set_exception(web.RequestPayloadError(text))
            self._lingering_time = 0.0  # nothing more is to be had of it

    def eof_received(self) -> None:
        """Take a client that ends its side as gone, whatever it has left unread."""
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the parser refused, or what went wrong below the handler."""
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
    """A connection that no gate has counted."""

    __slots__ = ("_address", "_clients")

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._clients: Connections | None = server.clients
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
