"""One HTTP/1.1 connection to a worker, as a bare asyncio protocol.

The body of an answer goes to a receiver in plain calls, one for each read of the
socket: no task, no queue and no future between a worker's token and its client.

The fast path: llama-server writes one chunk for each token, and one read nearly always
holds exactly that chunk.  For a read of `n` bytes only one canonical chunk head fits
(RFC 9112, 7.1: the size in hex), so one look into a table recognises a whole chunk.
The receiver compares it, together with what it expects of its body, and passes it on as
it came, without being parsed or framed again.  The parser does not see it and need not:
it is between two chunks before and after.  Everything else is parsed.

Where llama-server differs from HTTP (see also `pool.py`): it closes the connection
after every event stream although it has announced keep-alive, loses pipelined requests,
and keeps a connection open after an error answer with `Connection: close`.
"""

from __future__ import annotations

import asyncio
import enum
from typing import NoReturn, Protocol, cast

import httptools

from gollama_proxy.config.tls import explain_tls

# Bytes of an answer's head that are accepted; llama-server's has 250.
MAX_HEAD = 64 << 10
MAX_HEADERS = 128  # as many as aiohttp accepts from a client; llama-server sends 8
# Once the receiver has them.  All connections share it, so an append has to fail.
_NO_HEADERS = cast(list[tuple[bytes, bytes]], ())
_FRAMING = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
# Bytes of framing that are accepted for each byte of the body.  The smallest chunk has
# five, but extensions and trailers (RFC 9112, 7.1) can have any length; what is beyond
# this ratio may come to `MAX_HEAD`, the head included.
PAYS_FOR = 16
# Chunks up to this size can take the fast path; an event is some 240 bytes.  The table
# takes 60 bytes of memory for each of them.
MAX_FAST = 4 << 10


def _chunk_heads() -> list[bytes]:
    """Return, for each length of a read, the head of the chunk that fills it exactly.

    Where there is none, it is longer than the read.
    """
    heads = [bytes(MAX_FAST)] * MAX_FAST
    for size in range(1, MAX_FAST):
        head = b"%x\r\n" % size
        if (length := len(head) + size + 2) < MAX_FAST:
            heads[length] = head
    return heads


_CHUNK_HEADS = _chunk_heads()


class Receiver(Protocol):
    """Receives one answer: the calls come in this order, with one of the last two."""

    def head_received(
        self, status: int, headers: list[tuple[bytes, bytes]]
    ) -> None: ...

    def body_received(self, data: bytes) -> None: ...

    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        """Receive one chunk, if this is one: it has this head, and ends with CRLF.

        Returns whether it was taken.  If not, it is parsed, and its body is received.
        """

    def answer_ended(self) -> None:
        """The answer is complete at the level of HTTP."""

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        """The connection ended too early, or the answer is not HTTP (`malformed`)."""


class ConnectionState(enum.Enum):
    IDLE = "idle"  # connected, no request is running
    ACTIVE = "active"  # a request was started, its answer is not complete
    CLOSED = "closed"


# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_IDLE, _ACTIVE, _CLOSED = (
    ConnectionState.IDLE,
    ConnectionState.ACTIVE,
    ConnectionState.CLOSED,
)


class Connection(asyncio.Protocol):
    """Carries one request at a time, and several one after the other."""

    __slots__ = (
        "_any_answer",
        "_between_chunks",
        "_chunk_marks",
        "_chunked",
        "_delimited",
        "_ended",
        "_eof",
        "_fault",
        "_framing",
        "_head_done",
        "_headers",
        "_parser",
        "_parts",
        "_reading_paused",
        "_receiver",
        "_reusable",
        "_transport",
        "_write_waiter",
        "_writing_paused",
        "idle_since",
        "on_body",
        "on_chunk_complete",
        "on_chunk_header",
        "state",
        "streamed",
        "used",
    )

    def __init__(self, *, any_answer: bool = False) -> None:
        """Prepare it for `loop.create_connection`.

        `any_answer` also accepts redirections and content codings, which are errors in
        an answer that is passed on to a client.
        """
        self.state = _IDLE
        self._any_answer = any_answer
        self.used = 0  # requests sent
        self.idle_since = 0.0  # for its pool, as the next one
        self.streamed = False  # the last answer was an event stream
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parts: list[bytes] = []
        # httptools looks up its callbacks once, when the parser is made: a bound
        # `list.append` saves a Python frame for each token.
        self.on_body = self._parts.append
        # The same for the two ends of a chunk, which come in turn: each call swaps the
        # marks, of which the first is true between two chunks.
        self._chunk_marks = [True, False]
        self.on_chunk_header = self.on_chunk_complete = self._chunk_marks.reverse
        self._parser = httptools.HttpResponseParser(self)
        self._reset_answer()
        self._reusable = True
        self._eof = False  # in TLS this takes a close_notify, not just a FIN
        self._write_waiter: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._reading_paused = False

    def __repr__(self) -> str:
        return f"<Connection {self.state.name} used={self.used}>"

    @property
    def reusable(self) -> bool:
        """Whether another request may follow, now that an answer has ended."""
        idle = self.state is _IDLE and not self._reading_paused
        return idle and self._reusable

    @property
    def untouched(self) -> bool:
        """Whether no byte of an answer has come."""
        return not (self._head_done or self._framing)

    def _reset_answer(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._framing = 0  # bytes that are not body, beyond `PAYS_FOR`
        self._head_done = False
        self._ended = False
        self._fault = ""
        self._chunked = False
        self._between_chunks = False  # as of the last byte
        self._delimited = False  # by a length or by chunks, and not by EOF

    # --- Sending the request ------------------------------------------------------

    def start(self, receiver: Receiver, data: bytes = b"") -> None:
        """Begin a request with its first bytes; its answer goes to this receiver."""
        assert self.state is not _ACTIVE, self
        if self.used:
            self._reset_answer()
        self.used += 1
        if self.state is _CLOSED:
            receiver.answer_lost("closed before the request", malformed=False)
            return
        self.state = _ACTIVE
        self._receiver = receiver
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def write(self, data: bytes) -> None:
        """Send a part of the request; does nothing once the connection is closed."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the worker has taken most of what was written, or has answered."""
        if self._writing_paused and self.state is not _CLOSED:
            self._write_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._write_waiter
            finally:
                self._write_waiter = None

    def pause_reading(self) -> None:
        """Stop reading, so that TCP makes the worker wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._reading_paused = True

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._reading_paused = False

    def close(self) -> None:
        """Close the connection at once; this also cancels a running generation."""
        self.state = _CLOSED
        self._receiver = None
        # It refers to this object: only the garbage collector could free the two.
        self._parser = None  # type: ignore[assignment]
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self._write_waiter is not None:
            self._wake_writer()

    # --- Receiving the answer -----------------------------------------------------

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            # Bytes without a request: the next one would get them as its answer.
            self.close()
            return
        if (
            self._between_chunks
            and (size := len(data)) < MAX_FAST
            and receiver.chunk_received(data, _CHUNK_HEADS[size])
        ):
            return
        self._parse(data, receiver)

    def _parse(self, data: bytes, receiver: Receiver) -> None:
        fault = ""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            fault = self._fault or f"malformed answer: {exc}"
        # Half a size line after the chunk would lack CRLF; a whole one has a callback.
        self._between_chunks = (
            self._chunked
            and self._head_done
            and self._chunk_marks[0]
            and data.endswith(b"\r\n")
        )
        parts = self._parts
        framing = self._framing + len(data)
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            framing = max(0, framing - (1 + PAYS_FOR) * len(body))
            receiver.body_received(body)
        self._framing = framing
        if self._ended:
            # What follows a complete answer is not part of it.
            self._reusable = self._reusable and not fault
            self._end()
        elif fault:
            self._lose(fault, malformed=True)
        elif framing > MAX_HEAD:
            what = "framing" if self._head_done else "a head"
            self._lose(f"{what} larger than {MAX_HEAD} bytes", malformed=True)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:  # a trailer, which is ignored
            return
        if len(self._headers) == MAX_HEADERS:
            self._stop_parser(f"more than {MAX_HEADERS} headers")
        self._headers.append((name, value))
        lowered = name.lower()
        if lowered in _FRAMING:
            self._check_framing(lowered, value.lower())

    def _check_framing(self, name: bytes, value: bytes) -> None:
        """Check a header that determines how the body is read."""
        if name == b"content-encoding":
            # None was requested (RFC 9110, 12.5.3), so the client may not support it;
            # and the end of a compressed stream could not be judged.
            if value != b"identity" and not self._any_answer:
                self._stop_parser("a content coding that was not requested")
            return
        # RFC 9112, 7.4: nor any other transfer coding, without a TE header.
        if name == b"transfer-encoding":
            if value != b"chunked":
                self._stop_parser("a transfer coding that was not requested")
            self._chunked = True
        self._delimited = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._parser.get_http_version() not in ("1.0", "1.1"):
            self._stop_parser("neither HTTP/1.0 nor HTTP/1.1")
        if status == 100:  # RFC 9110, 15.2: to be skipped where it was not expected
            self._headers = []
            self._delimited = self._chunked = False
            return
        redirects = 300 <= status < 400 and not self._any_answer
        if redirects or not 200 <= status < 600:
            self._stop_parser(f"unexpected status {status}")
        if status in (204, 205):
            self._delimited = True
        self._head_done = True
        if not self._parser.should_keep_alive() or not self._delimited:
            self._reusable = False
        headers, self._headers = self._headers, _NO_HEADERS
        if self._receiver is not None:
            self._receiver.head_received(status, headers)

    def on_message_begin(self) -> None:
        if self._ended:
            self._stop_parser("bytes after the answer")

    def on_message_complete(self) -> None:
        self._ended = self._head_done  # an interim answer (100) ends nothing

    def _stop_parser(self, fault: str) -> NoReturn:
        """Leave a parser callback; httptools wraps what it raises."""
        self._fault = fault
        raise ValueError(fault)

    def _end(self) -> None:
        receiver, self._receiver = self._receiver, None
        self.state = _IDLE
        if receiver is not None:
            receiver.answer_ended()
        if self._write_waiter is not None:
            self._wake_writer()

    def _lose(self, reason: str, *, malformed: bool = False) -> None:
        receiver = self._receiver
        self.close()
        if receiver is not None:
            receiver.answer_lost(reason, malformed=malformed)

    # --- What the transport calls -------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def eof_received(self) -> bool:
        self._eof = True
        if self.state is _IDLE:
            self.close()  # now: the next request may come before `connection_lost`
        return False  # the transport closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.state is _CLOSED:  # by this side
            return
        if self._head_done and not self._delimited and self._eof and exc is None:
            # RFC 9112, 6.3, 8: a body that ends with the connection; 9.8: in TLS it was
            # cut if there was no `close_notify`.
            self._end()
            self.state = _CLOSED
            return
        if exc is None:
            self._lose("connection closed by the worker")
        else:
            self._lose(explain_tls(exc) or str(exc) or type(exc).__name__)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_result(None)
