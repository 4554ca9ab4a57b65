"""Connections of clients: a limit to their number, and TLS below HTTP.

A connection counts as soon as it is accepted, before TLS and before a request, so that
the limits also stop a client that opens thousands of them and sends nothing.

A server with an SSL context is notified of a connection after its handshake, and never
of one whose handshake does not end.  So the listening sockets are plain, and this
protocol handles each connection below TLS:

    accept ─▶ counted ─▶ handshake ─▶ the HTTP protocol, on the transport of TLS
                │            │
                └─ too many  └─ failed, or too slow: closed

It uses the current certificate, so that a renewed one applies to all new connections,
and stays below TLS until the connection ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import mmap
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

from gollama_proxy.config.settings import COUNTS, COUNTS_ROW, Limits, Process
from gollama_proxy.config.tls import Credentials, explain_tls
from gollama_proxy.telemetry.logs import Throttle

logger = logging.getLogger(__name__)

# Seconds between two log lines about the same kind of refusal.
LOG_EVERY = 10.0
# Why connections are refused: too many in total, too many from one address, or a failed
# TLS handshake.
KINDS = ("limit", "address", "handshake")


_PART = COUNTS // 4  # numbers of a process


class SharedCounts:
    """Counts of connections that all processes at one address can read.

    Each process writes only its own part, so there is no lock: what is read at the same
    moment may be off by the connections of that moment.

    Open connections are one number.  Those of each address are two rows of numbers, at
    places that two hashes of the address choose (a count-min sketch): the smaller one
    is too large only if other addresses share both places.
    """

    def __init__(self, process: Process) -> None:
        """Use the memory that the processes of one parent have in common."""
        size = process.of * COUNTS
        self._memory = memoryview(mmap.mmap(process.memory, size)).cast("i")
        self._first = (process.number - 1) * _PART
        self._key = process.group.encode()

    def __repr__(self) -> str:
        return f"<SharedCounts open={self.open}>"

    @property
    def open(self) -> int:
        """The open connections of all processes."""
        return sum(self._memory[::_PART])

    def note(self, open: int) -> None:
        """Publish the open connections of this process."""
        self._memory[self._first] = open

    def elsewhere(self, host: str) -> int:
        """Return the connections of a host at the other processes."""
        return min(
            sum(self._memory[place::_PART]) - self._memory[self._first + place]
            for place in self._places(host)
        )

    def change(self, host: str, by: int) -> None:
        """Publish that this process has more or fewer connections of a host."""
        for place in self._places(host):
            self._memory[self._first + place] += by

    def forget(self) -> None:
        """Publish that this process counts the connections of no host."""
        row = self._first + 1
        self._memory[row : self._first + _PART] = memoryview(
            bytes(8 * COUNTS_ROW)
        ).cast("i")

    def _places(self, host: str) -> tuple[int, int]:
        digest = hashlib.blake2b(host.encode(), key=self._key, digest_size=8).digest()
        one, two = (
            int.from_bytes(each) % COUNTS_ROW for each in (digest[:4], digest[4:])
        )
        return 1 + one, 1 + COUNTS_ROW + two


class ConnectionLimiter:
    """Counts client connections, and refuses those over a limit."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        shared: SharedCounts | None = None,
    ) -> None:
        """Make a count; `clock` gives monotonic seconds.

        With `shared`, the limits are for all processes together.
        """
        self.open = 0
        self._shared = shared
        self.refused: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._by_address: Counter[str] = Counter()
        self._throttle = Throttle(clock, LOG_EVERY)
        self.reconfigure(limits)

    def reconfigure(self, limits: Limits) -> None:
        """Take other limits for new connections; open ones stay."""
        self._limit = limits.connections
        self._each = limits.connections_per_address
        if not self._each:
            self._by_address.clear()
            if self._shared is not None:
                self._shared.forget()

    def __repr__(self) -> str:
        return f"<ConnectionLimiter open={self.open} of {self._limit}>"

    @property
    def by_address(self) -> bool:
        """Whether `enter` and `leave` need the address."""
        return self._each > 0

    def enter(self, address: str = "") -> bool:
        """Count a connection; False: close it.  Each True requires a `leave` later."""
        shared = self._shared
        if (self.open if shared is None else shared.open) >= self._limit:
            self.refuse("limit", f"limits.connections = {self._limit}")
            return False
        if self._each and address:  # those of a Unix socket are a proxy's
            host = household(address)
            elsewhere = 0 if shared is None else shared.elsewhere(host)
            if self._by_address[host] + elsewhere >= self._each:
                text = f"limits.connections_per_address = {self._each}, last {host}"
                self.refuse("address", text)
                return False
            self._by_address[host] += 1
            if shared is not None:
                shared.change(host, 1)
        self.open += 1
        if shared is not None:
            shared.note(self.open)
        return True

    def leave(self, address: str = "") -> None:
        self.open -= 1
        if self._shared is not None:
            self._shared.note(self.open)
        if self._each and address and (host := household(address)) in self._by_address:
            self._by_address[host] -= 1
            if self._shared is not None:
                self._shared.change(host, -1)
            if self._by_address[host] <= 0:
                del self._by_address[host]

    def refuse(self, kind: str, why: str) -> None:
        """Count a refused connection, and log such now and then (`LOG_EVERY`)."""
        self.refused[kind] += 1
        if count := self._throttle.count(kind):
            logger.warning("refused connections: %d (%s)", count, why)


def household(address: str) -> str:
    """Return the host of an address; an IPv6 host has a whole /64 (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


# --- TLS --------------------------------------------------------------------------

# What a client may leave unread in the hub before its worker is paused.  It is the
# high-water mark of the transport, below which `drain` would not wait.
WRITE_BUFFER = 64 << 10


class TlsOptions(NamedTuple):
    """What all connections of a server share."""

    credentials: Credentials
    connections: ConnectionLimiter
    make: Callable[[], asyncio.Protocol]  # the protocol above TLS
    handshake: float  # seconds it may take
    shutdown: float  # seconds to send the rest and close TLS
    patience: float  # seconds for a client to read what was encrypted for it
    shaking: set[TlsConnection]  # connections in their handshake


class TlsConnection(asyncio.BufferedProtocol):
    """Counts one connection, performs its handshake, and passes its bytes to TLS."""

    __slots__ = (
        "_above",
        "_address",
        "_counted",
        "_deadline",
        "_options",
        "_raw",
        "_shaking",
        "_top",
    )

    _raw: asyncio.Transport
    _top: asyncio.Protocol
    _shaking: Generator[Any, None, asyncio.Transport]

    def __init__(self, options: TlsOptions) -> None:
        self._options = options
        self._address = ""
        self._counted = False
        self._above: asyncio.BufferedProtocol | None = None  # TLS itself
        self._deadline: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = (
            "open" if self._above else "shaking hands" if self._counted else "closed"
        )
        return f"<TlsConnection {state}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and begin TLS before a byte is read.

        `start_tls` is a coroutine that installs its protocol and then waits for one
        future.  It is driven by hand here: a task would start too late, after the first
        bytes of the client, and would cost more.
        """
        self._raw = raw = cast(asyncio.Transport, transport)
        options = self._options
        self._address = peer(raw) if options.connections.by_address else ""
        if not options.connections.enter(self._address):
            raw.abort()
            return
        self._counted = True
        self._top = options.make()
        starting = asyncio.get_running_loop().start_tls(
            raw,
            self._top,
            options.credentials.context,
            server_side=True,
            ssl_handshake_timeout=options.handshake,
            ssl_shutdown_timeout=options.shutdown,
        )
        self._shaking = cast("Generator[Any, None, asyncio.Transport]", starting)
        self._shaking.send(None).add_done_callback(self._shaken)
        options.shaking.add(self)

    def abort(self) -> None:
        """Close the connection at once."""
        self._raw.abort()

    def _shaken(self, done: object) -> None:
        self._options.shaking.discard(self)
        try:
            self._shaking.send(None)
        except StopIteration as stop:
            transport: asyncio.Transport = stop.value
        except OSError as exc:  # as TLS errors are
            self._fail(exc)
            return
        else:
            raise RuntimeError("start_tls waits for more than a handshake")
        if transport.is_closing():  # the client has left in the meantime
            self._fail(None)
            return
        self._above = cast(asyncio.BufferedProtocol, self._raw.get_protocol())
        self._raw.set_protocol(self)
        # The default of half a megabyte would defeat the relay's own limit.
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._top.connection_made(transport)

    def _fail(self, error: Exception | None) -> None:
        if error is not None:
            why = explain_tls(error) or "the client left, or took too long"
            self._options.connections.refuse("handshake", why)
        self._leave()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._options.connections.leave(self._address)

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
        # An answer in one piece has been written completely by now.
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._options.patience, self._raw.abort)

    def resume_writing(self) -> None:
        assert self._above is not None, self
        self._above.resume_writing()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def eof_received(self) -> bool | None:
        """Treat a client that closes its side as gone, even with unread data.

        TLS would wait until the client had read everything, without notifying anyone.
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
    """Return the address of the peer; empty if it has gone, or has none."""
    name = transport.get_extra_info("peername")
    # That of a Unix socket is a path, or empty.
    return str(name[0]) if name and isinstance(name, tuple) else ""
