"""One HTTP/1.1 connection to a worker, as a bare asyncio protocol.

The body of an answer goes to a receiver by plain calls, one for each read of the
socket: no task, no queue and no future between a worker's token and its client.

Theory of the fast lane.  llama-server writes one chunk for each token, and one read
nearly always holds exactly that chunk.  For a read of `n` bytes there is only one
canonical chunk head that fits (RFC 9112, 7.1: the size in hex), so a look into a table
tells a whole chunk from everything else, and it is passed on as it came, without being
parsed or framed again.  The parser does not see it, and need not: it stands between two
chunks before and after.  Everything else takes the parser's way.

What llama-server does and HTTP does not say (see also `pool.py`): it closes after every
event stream although it announced keep-alive, loses pipelined requests, and keeps a
connection open after an error answer that says `Connection: close`.
"""

from __future__ import annotations

import asyncio
import enum
from typing import NoReturn, Protocol, cast

import httptools

from gollama_proxy.config.tls import explain

# What a worker may make us hold for an answer's head; llama-server's is 250 bytes.
MAX_HEAD = 64 << 10
MAX_HEADERS = 128  # as many as aiohttp takes of a client; llama-server sends eight
_FRAMING = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
# A byte of the body pays for so many of its framing.  The smallest chunk has five, but
# extensions and trailers (RFC 9112, 7.1) can be as long as a worker likes; what is not
# paid for may come to `MAX_HEAD`, the head included.
PAYS_FOR = 16


# Chunks up to this size can take the fast lane; an event is some 240 bytes.
MAX_FAST = 16 << 10


def _chunk_heads() -> list[bytes | tuple[()]]:
    """For each length of a read, the head of the one chunk that fills it exactly."""
    heads: list[bytes | tuple[()]] = [()] * MAX_FAST  # nothing starts with one of none
    for size in range(1, MAX_FAST):
        head = b"%x\r\n" % size
        if (length := len(head) + size + 2) < MAX_FAST:
            heads[length] = head
    return heads


_CHUNK_HEADS = _chunk_heads()


class Receiver(Protocol):
    """Who gets an answer; the calls come in this order, and one of the last two."""

    def head_received(
        self, status: int, headers: list[tuple[bytes, bytes]]
    ) -> None: ...

    def body_received(self, data: bytes) -> None: ...

    def chunk_received(self, chunk: bytes, start: int) -> None:
        """Take a body part that is framed as one chunk; `start` is where it begins.

        It ends two bytes before the end of `chunk`.
        """

    def answer_ended(self) -> None:
        """The answer is complete, as far as HTTP can tell."""

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        """The connection ended too early, or what came is no HTTP."""


class State(enum.Enum):
    IDLE = "idle"  # connected, nothing is asked
    ACTIVE = "active"  # a request is out, its answer not complete
    CLOSED = "closed"


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time."""

    __slots__ = (
        "_any_answer",
        "_at_chunk_end",
        "_between_chunks",
        "_delimited",
        "_ended",
        "_eof",
        "_fault",
        "_feed",
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
        "state",
        "streamed",
        "used",
    )

    def __init__(self, *, any_answer: bool = False) -> None:
        """Make an unconnected one, for `loop.create_connection`.

        `any_answer` accepts redirections and content codings too, which are errors in
        an answer that is passed on to a client.
        """
        self.state = State.IDLE
        self._any_answer = any_answer
        self.used = 0  # requests sent
        self.idle_since = 0.0  # for its pool, as the next one
        self.streamed = False  # the last answer was an event stream
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parts: list[bytes] = []
        # httptools looks its callbacks up once, when the parser is made: a bound
        # `list.append` saves a Python frame for each token.
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._reset_answer()
        self._reusable = True
        self._eof = False  # it was said, which over TLS is more than a FIN
        self._write_waiter: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._reading_paused = False

    def __repr__(self) -> str:
        return f"<Connection {self.state.name} used={self.used}>"

    @property
    def reusable(self) -> bool:
        """Whether another request may follow: asked when an answer has ended."""
        idle = self.state is State.IDLE and not self._reading_paused
        return idle and self._reusable

    @property
    def untouched(self) -> bool:
        """Whether not one byte of an answer has come."""
        return not (self._head_done or self._framing)

    def _reset_answer(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._framing = 0  # bytes that are no body, and not paid for by any
        self._head_done = False
        self._ended = False
        self._fault = ""
        self._at_chunk_end = False  # as of the last callback
        self._between_chunks = False  # as of the last byte
        self._delimited = False  # by a length or by chunks, so that EOF is no end

    # --- Sending the request ------------------------------------------------------

    def start(self, receiver: Receiver) -> None:
        """Bind the connection to the one who gets the next answer."""
        assert self.state is not State.ACTIVE, self
        self.used += 1
        self._reset_answer()
        if self.state is State.CLOSED:  # by a worker that left, or spoke unasked
            receiver.answer_lost("closed before it was asked", malformed=False)
            return
        self.state = State.ACTIVE
        self._receiver = receiver

    def write(self, data: bytes) -> None:
        """Send a part of the request; without effect once the connection is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the worker has taken most of what was written."""
        if self._writing_paused and self.state is not State.CLOSED:
            self._write_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._write_waiter
            finally:
                self._write_waiter = None

    def pause_reading(self) -> None:
        """Let TCP tell the worker to wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._reading_paused = True

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._reading_paused = False

    def close(self) -> None:
        """Hang up at once, which is also how a generation is cancelled."""
        self.state = State.CLOSED
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._wake_writer()

    # --- Receiving the answer -----------------------------------------------------

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            # An answer that nobody asked for; the next request would get it.
            self.close()
            return
        if self._between_chunks and len(data) < MAX_FAST:
            head = _CHUNK_HEADS[len(data)]
            if data.startswith(head) and data.endswith(b"\r\n"):
                receiver.chunk_received(data, len(head))
                return
        self._parse(data, receiver)

    def _parse(self, data: bytes, receiver: Receiver) -> None:
        fault = ""
        self._at_chunk_end = False
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            fault = self._fault or f"malformed answer: {exc}"
        # Half a size line behind the chunk would have no CRLF, a whole one a callback.
        self._between_chunks = self._at_chunk_end and data.endswith(b"\r\n")
        parts = self._parts
        framing = self._framing + len(data)
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            framing = max(0, framing - (1 + PAYS_FOR) * len(body))
            receiver.body_received(body)
        self._framing = framing
        if self._ended:
            # What follows a complete answer is no part of it.
            self._reusable = self._reusable and not fault
            self._end()
        elif fault:
            self._lose(fault, malformed=True)
        elif framing > MAX_HEAD:
            what = "framing" if self._head_done else "a head"
            self._lose(f"{what} larger than {MAX_HEAD} bytes", malformed=True)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:  # a trailer: nobody reads it
            return
        if len(self._headers) == MAX_HEADERS:
            self._stop_parser(f"more than {MAX_HEADERS} headers")
        self._headers.append((name, value))
        lowered = name.lower()
        if lowered in _FRAMING:
            self._check_framing(lowered, value.lower())

    def _check_framing(self, name: bytes, value: bytes) -> None:
        """Look at a header that says how to read the body."""
        if name == b"content-encoding":
            # Nobody asked for one (RFC 9110, 12.5.3): the client may not know it; and
            # in what is compressed, no end could be told from a cut.
            if value != b"identity" and not self._any_answer:
                self._stop_parser("a content coding that nobody asked for")
            return
        # RFC 9112, 7.4: no other transfer coding either, where no TE has asked for it.
        if name == b"transfer-encoding" and value != b"chunked":
            self._stop_parser("a transfer coding that nobody asked for")
        self._delimited = True

    def on_chunk_header(self) -> None:
        self._at_chunk_end = False

    def on_chunk_complete(self) -> None:
        self._at_chunk_end = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._parser.get_http_version() not in ("1.0", "1.1"):
            self._stop_parser("neither HTTP/1.0 nor HTTP/1.1")
        if status == 100:  # RFC 9110, 15.2: to be skipped by who did not ask for it
            self._headers = []
            return
        redirects = 300 <= status < 400 and not self._any_answer
        if redirects or not 200 <= status < 600:
            self._stop_parser(f"unexpected status {status}")
        if status in (204, 205):
            self._delimited = True
        self._head_done = True
        if not self._parser.should_keep_alive() or not self._delimited:
            self._reusable = False
        headers, self._headers = self._headers, []
        if self._receiver is not None:
            self._receiver.head_received(status, headers)

    def on_message_begin(self) -> None:
        if self._ended:
            self._stop_parser("bytes behind the answer")

    def on_message_complete(self) -> None:
        self._ended = self._head_done  # an interim answer (100) ends nothing

    def _stop_parser(self, fault: str) -> NoReturn:
        """Leave a parser callback; httptools wraps what it raises."""
        self._fault = fault
        raise ValueError(fault)

    def _end(self) -> None:
        receiver, self._receiver = self._receiver, None
        self.state = State.IDLE
        if receiver is not None:
            receiver.answer_ended()

    def _lose(self, reason: str, *, malformed: bool = False) -> None:
        receiver = self._receiver
        self.close()
        if receiver is not None:
            receiver.answer_lost(reason, malformed=malformed)

    # --- What the transport says --------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def eof_received(self) -> bool:
        self._eof = True
        if self.state is State.IDLE:
            self.close()  # now: the next request may come before `connection_lost`
        return False  # the transport closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._head_done and not self._delimited and self._eof and exc is None:
            # RFC 9112, 6.3, 8: a body that ends with the connection; and 9.8: TLS that
            # ended without `close_notify` was cut.
            self._end()
            self.state = State.CLOSED
            return
        if exc is None:
            self._lose("connection closed by the worker")
        else:
            self._lose(explain(exc) or str(exc) or type(exc).__name__)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._write_waiter is not None and not self._write_waiter.done():
            self._write_waiter.set_result(None)
