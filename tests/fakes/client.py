"""A client that is nothing but a socket: it sends any bytes and hides none.

It reads only when asked to, so a client that does not read is one that is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

import h11

from tests.fakes.waiting import DEADLINE

_LINGER_ZERO = struct.pack("ii", 1, 0)


class Response(NamedTuple):
    """A whole answer."""

    status: int
    headers: list[tuple[str, str]]  # names in lower case, in the order of arrival
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the one value of a header; a repeated header is an error."""
        values = self.values(name)
        assert len(values) <= 1, f"{name} came {len(values)} times: {values}"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Ending(NamedTuple):
    """How an answer ended."""

    raw: bytes  # every byte of it, from the status line on
    clean: bool  # complete by its own framing (for chunks: the last one was seen)
    reset: bool  # RST instead of FIN
    response: Response  # what could be understood; the status is 0 without a head


class TruncatedError(Exception):
    """The answer broke off before it was complete by its framing."""


class Wire:
    """One client connection; use it with `async with`, or close it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inbox = bytearray()  # received and in no message yet
        self._eof = False
        self._reset = False
        self._method = "GET"
        self._begin()

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else "open"
        return f"<Wire {state}, {len(self._raw)} bytes of an answer>"

    @classmethod
    async def connect(
        cls, host: str, port: int, *, receive_buffer: int | None = None
    ) -> Self:
        """Connect; a small receive buffer makes an unread answer felt sooner."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            async with asyncio.timeout(DEADLINE):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- Sending ------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Write bytes as they are; waits for as long as the peer does not read."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def get(
        self,
        path: str,
        token: str | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        method: str = "GET",
    ) -> None:
        """Send a request without a body."""
        self._expect(method)
        await self.send(request_head(method, path, token, headers))

    async def post(
        self,
        path: str,
        payload: Any,
        token: str | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        version: str = "1.1",
        method: str = "POST",
    ) -> None:
        """Send a request with a body: bytes as they are, anything else as JSON."""
        self._expect(method)
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        given = list(headers)
        if not any(name.lower() == "content-type" for name, _ in given):
            given.append(("Content-Type", "application/json"))
        if not any(name.lower() == "content-length" for name, _ in given):
            given.append(("Content-Length", str(len(body))))
        head = request_head(method, path, token, given, version=version)
        await self.send(head + body)

    # --- Receiving ----------------------------------------------------------------

    async def read_until(self, marker: bytes, timeout: float = DEADLINE) -> bytes:
        """Return the bytes up to and with the marker, past any parsing."""
        async with self._deadline(timeout, f"{marker!r}"):
            while (end := self._inbox.find(marker)) < 0:
                if not await self._receive():
                    raise TruncatedError(f"no {marker!r} in {bytes(self._inbox)!r}")
        taken = bytes(self._inbox[: end + len(marker)])
        del self._inbox[: len(taken)]
        return taken

    async def read_head(self, timeout: float = DEADLINE) -> Response:
        """Return status and headers as soon as they are here, with an empty body."""
        async with self._deadline(timeout, "head of the answer"):
            while self._response is None:
                await self._advance()
        return Response(self._response[0], self._response[1], b"")

    async def read_response(self, timeout: float = DEADLINE) -> Response:
        """Return the rest of one answer whole; raises `TruncatedError`."""
        async with self._deadline(timeout, "end of the answer"):
            while not self._complete:
                await self._advance()
        assert self._response is not None
        response = Response(*self._response, bytes(self._body))
        self._begin()
        return response

    async def read_event(self, timeout: float = DEADLINE) -> bytes | None:
        """Return the next server-sent event, with the empty line that ends it.

        None is the clean end of the stream; any other raises `TruncatedError`.
        """
        async with self._deadline(timeout, "event"):
            searched = 0  # as an event of megabytes comes in hundreds of pieces
            while (end := self._body.find(b"\n\n", searched)) < 0:
                if self._complete:
                    assert not self._body, f"behind the last event: {self._body!r}"
                    return None
                searched = max(len(self._body) - 1, 0)
                await self._advance()
        taken = bytes(self._body[: end + 2])
        del self._body[: end + 2]
        return taken

    async def read_events(self, timeout: float = DEADLINE) -> list[bytes]:
        """Return all events that are left; raises `TruncatedError`."""
        events: list[bytes] = []
        async with self._deadline(timeout, "end of the stream"):
            while (event := await self.read_event(timeout)) is not None:
                events.append(event)
        return events

    async def read_to_end(self, timeout: float = DEADLINE) -> Ending:
        """Return everything up to the end of the answer, whatever the end is like.

        `raw` also holds what other reads have taken of this answer already.
        """
        clean = True
        try:
            async with self._deadline(timeout, "end of the answer"):
                while not self._complete:
                    await self._advance()
        except TruncatedError:
            clean = False
        response = Response(*(self._response or (0, [])), bytes(self._body))
        ending = Ending(bytes(self._raw), clean, self._reset, response)
        self._begin()
        return ending

    async def read_eof(self, timeout: float = DEADLINE) -> bytes:
        """Wait until the peer closes; return what came before."""
        async with self._deadline(timeout, "hang-up of the peer"):
            while await self._receive():
                pass
        return bytes(self._inbox)

    # --- Ending -------------------------------------------------------------------

    def half_close(self) -> None:
        """Send FIN and stay ready to read."""
        self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Send RST, as the kernel does for a client that crashed with data unread."""
        if self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._sock.close()

    def close(self) -> None:
        self._sock.close()

    # --- Below --------------------------------------------------------------------

    def _expect(self, method: str) -> None:
        """Read what comes next as the answer to this method."""
        self._method = method
        if self._complete:
            self._begin()

    def _begin(self) -> None:
        """Get ready for the next answer."""
        self._parser: h11.Connection | None = None
        self._raw = bytearray()
        self._body = bytearray()
        self._response: tuple[int, list[tuple[str, str]]] | None = None
        self._complete = False

    async def _advance(self) -> None:
        """Take one step into the answer, reading from the socket where necessary."""
        if self._parser is None:
            self._parser = h11.Connection(h11.CLIENT, 1 << 20)
            # h11 reads an answer only to a request that it has seen.
            request = h11.Request(
                method=self._method, target="/", headers=[("Host", "hub")]
            )
            self._parser.send(request)
            self._parser.send(h11.EndOfMessage())
        parser = self._parser
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as exc:
            raise TruncatedError(str(exc)) from None
        if event is h11.NEED_DATA:
            if not self._inbox and not await self._receive() and self._reset:
                raise TruncatedError("connection reset")
            self._raw += self._inbox
            data = bytes(self._inbox)
            self._inbox.clear()
            parser.receive_data(data)
        elif isinstance(event, h11.Response):
            headers = [(k.decode(), v.decode("latin-1")) for k, v in event.headers]
            self._response = event.status_code, headers
        elif isinstance(event, h11.Data):
            self._body += event.data
        elif isinstance(event, h11.EndOfMessage):
            self._complete = True
            rest = parser.trailing_data[0]
            if rest:  # of the next answer
                del self._raw[-len(rest) :]
                self._inbox[:0] = rest
        elif isinstance(event, h11.ConnectionClosed):
            raise TruncatedError("closed without an answer")

    async def _receive(self) -> bool:
        """Add to the inbox; False is the end, by FIN or by RST."""
        if self._eof:
            return False
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 256 << 10)
        except ConnectionError:
            data = b""
            self._reset = True
        self._eof = not data
        self._inbox += data
        return bool(data)

    @contextlib.asynccontextmanager
    async def _deadline(self, timeout: float, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise AssertionError(f"{self!r}: no {what} within {timeout} s") from None


class TlsWire(Wire):
    """The same over TLS, of which nothing is hidden either.

    `close` and `abort` send no `close_notify`, as clients that die do not; `notify`
    does.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.notified = False  # the peer has sent close_notify
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    async def shake_hands(self, context: ssl.SSLContext, name: str) -> Self:
        """Set TLS up with a peer of this name.

        Raises:
            ssl.SSLError: it came to nothing.
            ConnectionError: the peer has closed the connection.
        """
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=name
        )
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    try:
                        self.tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        await self._flush()
                        if not await self._fill():
                            raise ConnectionResetError("no handshake") from None
            await self._flush()
        except BaseException:
            self.close()
            raise
        return self

    async def hello(self, context: ssl.SSLContext, name: str) -> None:
        """Send the first half of a handshake."""
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        await self._flush()

    async def hung_up(self) -> None:
        """Wait until the peer closes, whatever it sends before, below TLS."""
        async with self._deadline(DEADLINE, "hang-up of the peer"):
            while await self._fill():
                pass

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self._flush()

    async def notify(self) -> None:
        """Send `close_notify`, and stay ready to read."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self._flush()

    async def _receive(self) -> bool:
        while not self._eof:
            try:
                data = self.tls.read(256 << 10)
                self.notified = self._eof = not data
                self._inbox += data
                return bool(data)
            except ssl.SSLWantReadError:
                await self._flush()
                self._eof = not await self._fill()
            except ssl.SSLZeroReturnError:
                self.notified = self._eof = True
        return False

    async def _flush(self) -> None:
        await super().send(self._outgoing.read())

    async def _fill(self) -> bool:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 256 << 10)
        except ConnectionError:
            data = b""
            self._reset = True
        self._incoming.write(data) if data else self._incoming.write_eof()
        return bool(data)


def request_head(
    method: str,
    path: str,
    token: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
    *,
    version: str = "1.1",
) -> bytes:
    """Build a request head; a Host is added unless one is given."""
    given = list(headers)
    if not any(name.lower() == "host" for name, _ in given):
        given.insert(0, ("Host", "hub"))
    if token is not None:
        given.append(("Authorization", f"Bearer {token}"))
    lines = [f"{method} {path} HTTP/{version}", *(f"{k}: {v}" for k, v in given)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
