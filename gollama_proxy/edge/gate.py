"""TLS with clients: from the accepted connection to the protocol that speaks HTTP.

A server that is simply given a context hears of a connection when its handshake is
over, and of one that never gets there not at all.  So the listening sockets are plain,
and a gate stands at each connection, below TLS:

    accept ─▶ counted ─▶ handshake ─▶ the HTTP protocol, on the transport of TLS
                │            │
                └─ too many  └─ failed, or too slow: closed

The gate takes the certificate of the moment, so that a renewed one serves all new
connections, and stays below to see the end of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

from gollama_proxy.config.tls import Credentials, explain
from gollama_proxy.edge.connections import Connections

# What a client may leave unread in the hub before its worker is paused.  It is the
# high-water mark of the transport, below which `drain` would not wait.
WRITE_BUFFER = 64 << 10


class Terms(NamedTuple):
    """What all gates of a server have in common."""

    credentials: Credentials
    connections: Connections
    make: Callable[[], asyncio.Protocol]  # the protocol above TLS
    handshake: float  # seconds it may take
    shutdown: float  # seconds to send what is left and to part
    patience: float  # seconds for a client to take what has been encrypted for it
    shaking: set[Gate]  # those whose handshake goes on


class Gate(asyncio.BufferedProtocol):
    """Lets one connection in, has it shake hands, and passes its bytes up."""

    __slots__ = (
        "_above",
        "_address",
        "_counted",
        "_deadline",
        "_raw",
        "_shaking",
        "_terms",
        "_top",
    )

    _raw: asyncio.Transport
    _top: asyncio.Protocol
    _shaking: Generator[Any, None, asyncio.Transport]

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._address = ""
        self._counted = False
        self._above: asyncio.BufferedProtocol | None = None  # TLS itself
        self._deadline: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = "open" if self._above else "shaking hands" if self._counted else "shut"
        return f"<Gate {state}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in or not, and begin with TLS before a byte of it is read.

        `start_tls` is a coroutine that puts its protocol in place, and then waits for
        one future.  As a task it would begin a moment too late, behind the first bytes
        of the client, and a task for each handshake is not needed.
        """
        self._raw = raw = cast(asyncio.Transport, transport)
        terms = self._terms
        self._address = peer(raw) if terms.connections.by_address else ""
        if not terms.connections.enter(self._address):
            raw.abort()
            return
        self._counted = True
        self._top = terms.make()
        starting = asyncio.get_running_loop().start_tls(
            raw,
            self._top,
            terms.credentials.context,
            server_side=True,
            ssl_handshake_timeout=terms.handshake,
            ssl_shutdown_timeout=terms.shutdown,
        )
        self._shaking = cast("Generator[Any, None, asyncio.Transport]", starting)
        self._shaking.send(None).add_done_callback(self._shaken)
        terms.shaking.add(self)

    def abort(self) -> None:
        """Hang up at once."""
        self._raw.abort()

    def _shaken(self, done: object) -> None:
        self._terms.shaking.discard(self)
        try:
            self._shaking.send(None)
        except StopIteration as stop:
            transport: asyncio.Transport = stop.value
        except OSError as exc:  # as TLS errors are
            self._fail(exc)
            return
        else:
            raise RuntimeError("start_tls waits for more than a handshake")
        if transport.is_closing():  # it has left in the meantime
            self._fail(None)
            return
        self._above = cast(asyncio.BufferedProtocol, self._raw.get_protocol())
        self._raw.set_protocol(self)
        # Else half a megabyte could wait here, and the relay's own limit would be none.
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._top.connection_made(transport)

    def _fail(self, error: Exception | None) -> None:
        if error is not None:
            why = explain(error) or "the client left, or took too long"
            self._terms.connections.refuse("handshake", why)
        self._leave()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._terms.connections.leave(self._address)

    # --- Between the socket and TLS -----------------------------------------------

    def get_buffer(self, sizehint: int) -> Any:
        assert self._above is not None, self
        return self._above.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        assert self._above is not None, self
        self._above.buffer_updated(nbytes)

    def pause_writing(self) -> None:
        assert self._above is not None, self
        self._above.pause_writing()
        # An answer in one piece is all here by now, and TLS has room for the next.
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._terms.patience, self._raw.abort)

    def resume_writing(self) -> None:
        assert self._above is not None, self
        self._above.resume_writing()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def eof_received(self) -> bool | None:
        """Take a client that ends its side as gone, whatever it has left unread.

        TLS would wait until it had read everything, and tell nobody meanwhile.
        """
        assert self._above is not None, self
        if self._raw.get_write_buffer_size():
            self._raw.abort()
            return None
        return self._above.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._stop_waiting()
        if self._above is not None:
            self._above.connection_lost(exc)
            self._above = None


def peer(transport: asyncio.BaseTransport) -> str:
    """Name the address at the other end; empty where there is none any more."""
    name = transport.get_extra_info("peername")
    return str(name[0]) if name else ""
