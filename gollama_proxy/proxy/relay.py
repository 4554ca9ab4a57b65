"""The bytes of one answer, from a worker to one client.

A relay has three phases; in each, a different method receives the body:

    _hold ─────▶ _forward ─────▶ _ignore
    until the status and the      the fast path: worker's read →      once the answer
    first bytes are known, so     client's transport, one plain       has ended, or is
    that another worker can       call for each read, no task         no longer needed
    still be tried                switch

When the client does not keep up, the worker's socket is not read until the client's
buffer has drained; TCP does the rest.  Whether a stream is complete is read from its
last kilobytes when it has ended (`end`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from gollama_proxy.edge.response import (
    Client,
    ClientStalledError,
    Pausing,
    ReportedError,
    Writable,
)
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.tasks import held_up
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.wire import answer, sse
from gollama_proxy.wire.answer import NO_END, TAIL, Tally, read_end
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.folding import AssemblyError
from gollama_proxy.wire.headers import read_answer_head
from gollama_proxy.wire.resume import MOST_WORDS, Transcript
from gollama_proxy.wire.schema import Ending, Endpoint, EventError
from gollama_proxy.wire.sse import CR, LF

# Bytes that are held until the first event is complete; more are passed on as they are.
HOLD_LIMIT = 256 << 10
MOST_HELD = 100  # pieces that are passed on one by one; more are joined
_NOTHING = Transcript()  # of a relay that has passed nothing on
# Of one that holds nothing any more.  All share it, so an append has to fail.
_NO_PIECES = cast(list[bytes], ())
# Members of an enum, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_DONE, _BODY = Ending.DONE, Ending.BODY
_COLON = ord(":")
_BLANK_LINES = re.compile(rb"(?>\r\n|\n|\r){2,}")
_BLANK = b"\n\n"
MOST_MESSAGE = 500  # characters of such an error that a client gets


class Relay:
    """Receives one answer and passes it on."""

    __slots__ = (
        "_answers",
        "_began",
        "_begun",
        "_blocked",
        "_chunked",
        "_clock",
        "_edge",
        "_ended",
        "_ending",
        "_endpoint",
        "_error",
        "_gatherer",
        "_held",
        "_held_size",
        "_kept",
        "_lease",
        "_progress_at",
        "_protocol",
        "_seen",
        "_takes_chunks",
        "_tally",
        "_transcript",
        "_transport",
        "_wakeup",
        "_watches",
        "body_received",
        "bytes",
        "client_fields",
        "connection",
        "content_type",
        "end",
        "events",
        "headers",
        "is_event_stream",
        "opened_at",
        "status",
    )

    _answers: int  # to the prompt
    _transport: Writable  # of the client, as the next one
    _protocol: Pausing

    def __init__(
        self,
        connection: Connection,
        lease: Lease,
        endpoint: Endpoint,
    ) -> None:
        self.status = 0
        self.content_type = b""
        self.client_fields = ""  # the header lines for the client
        self.is_event_stream = False
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.opened_at: float | None = None
        self.end = NO_END  # known after `stop`
        self.bytes = 0
        self.events = 0
        self.body_received: Callable[[bytes], None] = self._hold
        self._takes_chunks = False  # as they are; otherwise they are parsed first
        self.connection = connection
        self._lease = lease
        self._endpoint = endpoint
        self._ending = endpoint.ending
        self._clock = lease.worker.clock
        self._held: list[bytes] = []
        self._held_size = 0  # bytes
        self._gatherer: sse.Gatherer | None = None
        self._transcript = _NOTHING
        self._began = b""  # what it reports at its beginning, if it may
        self._kept = 0  # bytes that may be kept in the transcript
        self._watches = False  # for the error in which a server fails
        self._begun = b""  # an event that may become this error
        self._edge = _BLANK  # the last bytes before it
        self._tally: Tally | None = None  # of choices, where there are several
        self._chunked = False
        self._blocked = False
        self._ended = False  # all of it has come
        self._seen = 0  # events, at the last round of the watchdog
        self._progress_at = 0.0
        self._error: ProxyError | AssemblyError | None = None
        self._wakeup: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        phase = self.body_received.__name__.strip("_")
        return (
            f"<Relay from {self._lease.worker.name} {phase} status={self.status} "
            f"bytes={self.bytes}{' blocked' if self._blocked else ''}>"
        )

    # --- Until the first bytes are known ------------------------------------------

    async def opened(self) -> None:
        """Wait for the status and the first bytes, of a stream those with content.

        Raises:
            WorkerError: the worker was lost before, sent no HTTP, or ended too early.
        """
        while self.opened_at is None and not self._ended and self._error is None:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        if self.opened_at is None:
            self.opened_at = self._clock()
            if self._error is not None:
                raise self._error
            if self._has_mark:
                end = read_end(self.held, self._ending)
                if not (end.complete or end.done or end.failed):
                    raise self._incomplete()

    @property
    def spares_connection(self) -> bool:
        """Whether the answer has ended so that its connection may be reused."""
        return self.status < 500 and self._ended

    def header(self, wanted: bytes) -> bytes:
        """Read a header of the answer, in lower case; empty where it has none."""
        found = b""
        for name, value in self.headers:
            if name.lower() == wanted:
                found = value
        return found.lower()

    @property
    def held(self) -> bytes:
        """The bytes of the body that have come, until they are passed on."""
        held = self._held
        return held[0] if len(held) == 1 else b"".join(held)

    def held_body(self) -> bytes | None:
        """Return the whole body if the answer has ended, else None."""
        return self.held if self._ended else None

    def early_error(self) -> EventError | None:
        """Read the error that a stream began with: it should have been a status."""
        if not self.is_event_stream:
            return None
        found = map(sse.error_in, sse.events_in(self.held))
        return next((error for error in found if error is not None), None)

    async def whole(self) -> None:
        """Wait until a short answer, such as an error, has come completely.

        Raises:
            WorkerError: the worker was lost before.
        """
        while not (self._ended or self._error or self._blocked):
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        if self._error is not None:
            raise self._error

    def fail(self, error: ProxyError | AssemblyError) -> None:
        """End the answer from outside: it cannot be requested or used any more."""
        self._error = self._error or error
        self._wake()

    # --- The fast path ------------------------------------------------------------

    def begin(
        self,
        client: Client,
        keep: int = 0,
        tally: Tally | None = None,
        answers: int = 1,
        *,
        reports: bool = True,
    ) -> None:
        """Begin to pass the answer on, and remember `keep` bytes of it.

        If several choices are requested, a `tally` counts their ends.  The usage at the
        `end` is that of `answers` answers to the prompt.  Without `reports`, the event
        in which another server than llama-server reports its failure is not passed on.

        Await what `next_step` returns until it is None, then call `finish`; `stop` in
        any case.
        """
        self._chunked = client.chunked
        self._transport, self._protocol = client.transport, client.protocol
        self._kept = keep
        # llama-server sends errors that lie in the answer: another one would send them,
        # too.  Other servers send them when a process of theirs has died.
        if not (reports or self._lease.worker.is_llama_server):
            self._watches = self._has_mark
        self._answers = answers
        self._transcript = Transcript(self._ending, keep)
        if tally is not None and self._has_mark:
            self._tally = tally
        self._go_on()
        # Not needed any more, in what may last for minutes.
        self.headers, self._gatherer = (), None
        held, self._held = self._held, _NO_PIECES
        if self._ending is not _DONE or not self.is_event_stream:
            self._began = answer.beginning(b"".join(held))
        for data in held if len(held) <= MOST_HELD else [b"".join(held)]:
            self.body_received(data)

    def next_step(self, client: Client, write_timeout: float) -> Awaitable[None] | None:
        """Return what to wait for next; None once the answer has ended.

        It raises `ClientStalledError` if the client does not read for `write_timeout`
        seconds.  It is not awaited here: a coroutine takes memory for as long as the
        stream is open.
        """
        if self._blocked:
            return self._drain(client, write_timeout)
        if self._ended or self._error is not None:
            return None
        self._wakeup = asyncio.get_running_loop().create_future()
        return self._wakeup

    def check(self, now: float, gap: float, silence: float) -> float:
        """Check that the answer makes progress; called about once a second.

        While the client blocks, the clocks stand still.  Returns the seconds since the
        last byte.
        """
        if self._blocked or self.events != self._seen or not self._progress_at:
            self._seen, self._progress_at = self.events, now
        silent = now - max(self._lease.heard_at, self._progress_at)
        if self.is_event_stream and now - self._progress_at > gap:
            self._stall(f"no event for {gap:g} s")
        elif silent > silence:
            self._stall(f"no byte for {silence:g} s")
        return silent

    def abandon(self) -> None:
        """Give up on a worker that is known to be down."""
        self._stall("the worker is down")

    def _stall(self, reason: str) -> None:
        text = f"Worker {self._lease.worker.name} stopped in the middle of its answer."
        self.fail(WorkerError(Code.WORKER_SLOW, text, detail=reason))

    async def _drain(
        self, client: Client, write_timeout: float, chances: int = 2
    ) -> None:
        limit = asyncio.timeout(write_timeout)
        try:
            async with limit:
                await client.writer.drain()
        except TimeoutError:
            if chances and held_up(limit):  # the client may have read in the meantime
                await self._drain(client, write_timeout, chances - 1)
                return
            raise ClientStalledError from None
        self._blocked = False
        self.connection.resume_reading()

    def stop(self) -> None:
        """Pass nothing more on, and read the `end`."""
        self.body_received, self._takes_chunks = _ignore, False
        del self._transport  # it may be the stream, which refers to this object
        kept = self._transcript
        self.end = end = read_end(
            kept.tail(), self._ending, self._endpoint.api, self._began, self._answers
        )
        end.complete |= kept.marked
        end.failed |= kept.failed
        if self._tally is not None and not self._tally.is_complete(done=end.done):
            end.complete = False

    def finish(self, client: Client) -> None:
        """Add what a complete answer may lack: a `[DONE]` behind its finish_reason.

        Raises:
            WorkerError: the answer is not complete; what arrived of it was passed on.
            AssemblyError: the answer cannot be assembled.
        """
        if not self._has_mark:
            if self._error is not None:
                raise self._error
            return
        end, rest = self.end, self.end.rest
        # An end that broke off within its [DONE] can be completed.
        whole = not rest or (self._ending is _DONE and sse.DONE.startswith(rest))
        if end.failed:  # whatever follows
            text = "The worker ended the answer with an error."
            raise ReportedError(Code.WORKER_INCOMPLETE, text)
        if not (whole and end.complete):
            raise self._error or self._incomplete()
        if self._ending is _DONE and (rest or not end.done):
            client.send(sse.DONE.removeprefix(rest))

    @property
    def _has_mark(self) -> bool:
        """Whether this is a stream that has a mark where it is complete."""
        streams = self.is_event_stream and self.status == 200
        return streams and self._ending is not _BODY

    def _incomplete(self) -> WorkerError:
        text = (
            f"Worker {self._lease.worker.name} ended the answer before it was complete."
        )
        return WorkerError(Code.WORKER_INCOMPLETE, text)

    @property
    def complete(self) -> bool:
        """Whether a stream has come to its mark, if not to the end of its body."""
        return self.is_event_stream and self.end.complete and not self.end.failed

    def relayed(self) -> bytes | None:
        """Return all that was passed on; None if it was more than `keep` bytes."""
        if self.bytes > self._kept or not self._transcript.limit:
            return None
        body, self._transcript.limit = self._transcript.body(), 0
        return body

    @property
    def tail(self) -> bytes:
        """The last bytes that were passed on, at least `TAIL` of a longer answer."""
        return self._transcript.tail()

    # --- Receiver: what the connection calls --------------------------------------

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        clock = self._clock  # a local is cheaper to call
        self._lease.heard_at = clock()
        self.status = status
        self.headers = headers
        worker = self._lease.worker
        worker.answer_head = head = read_answer_head(headers, worker.answer_head)
        self.content_type, self.client_fields = head.content_type, head.lines
        if head.content_type.startswith(b"text/event-stream"):
            self.is_event_stream = True
            self._gatherer = sse.Gatherer()

    def _hold(self, data: bytes) -> None:
        clock = self._clock
        self._lease.heard_at = now = clock()
        if (
            data[:1] in sse.BEGINNINGS
            and not (self._held or self.is_event_stream)
            and self._looks_like_events()
        ):
            self.is_event_stream = True
            self._gatherer = sse.Gatherer()
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > HOLD_LIMIT:
            self.connection.pause_reading()
            self._blocked = True  # until `begin` has made room
            self._wake()
        elif self._gatherer is not None:
            events = self._gatherer.feed(data)
            if not events or not sse.opens(events, self._ending):
                return
        if self.opened_at is None:
            self.opened_at = now
            self._wake()

    def _looks_like_events(self) -> bool:
        """Whether a body that begins like one is a stream without its Content-Type."""
        texts = (_BODY, Ending.TRANSCRIPT)  # may begin with any letter
        return self.status == 200 and self._ending not in texts

    def _go_on(self) -> None:
        """Pass on what follows, in whole chunks unless choices are counted."""
        self._takes_chunks = self._tally is None
        self.body_received = self._forward if self._takes_chunks else self._count

    def _forward(self, data: bytes) -> None:
        if self._watches and self._withholds(data):
            return
        head = b"%x\r\n" % len(data)
        self.chunk_received(b"%b%b\r\n" % (head, data), head, parsed=True)
        if data[0] != _COLON:
            self.events += data.count(b"data: {") - 1
        if len(data) > TAIL:
            self._transcript.cut()

    def chunk_received(
        self, chunk: bytes, head: bytes, *, parsed: bool = False
    ) -> bool:
        """Pass a whole chunk on: the path of every token, at a few microseconds each.

        Returns whether it was taken; if not, it is parsed, and its body comes instead.
        Time, bytes, events and the tail are recorded here: a helper would cost as much
        again.  Called as `self._clock()`, a function that is an attribute takes three
        times as long.
        """
        if not (self._takes_chunks or parsed):
            return False
        kept, start = self._transcript, len(head)
        word = chunk[start + kept.before : kept.behind]
        # Nearly always the chunk is like the last one but for its word.  One comparison
        # finds that, and that it is framed as it should be, at the cost of a single
        # `startswith`.
        if (
            chunk == b"".join((head, kept.head, word, kept.foot))
            and LF not in word
            and not kept.chunks
        ):
            kept.words.append(word)
            if len(kept.words) == MOST_WORDS:
                kept.fold()
            self.events += 1  # llama-server sends one in a chunk
        elif parsed or (chunk.startswith(head) and chunk.endswith(b"\r\n")):
            if self._watches and not parsed and self._withholds(chunk[start:-2]):
                return True
            kept.add(chunk)
            if chunk[start] != _COLON:  # a comment, such as a ping, is not an event
                self.events += 1
        else:
            return False
        clock = self._clock
        self._lease.heard_at = clock()
        self.bytes += len(chunk) - start - 2
        try:
            self._transport.write(chunk if self._chunked else chunk[start:-2])
        except RuntimeError:
            return True  # uvloop: just closed; the handler is being cancelled
        if self._protocol.paused:
            self._block()
        return True

    def _withholds(self, data: bytes) -> bool:
        """Keep the error of a server that has failed; return whether there is one.

        It ends the answer.  An event that may become one is kept until it is complete,
        as servers and proxies split events; they also join them, so that tokens may
        come before.
        """
        edge = self._edge
        if data.endswith(_BLANK) and b'"error"' not in data:
            self._edge = _BLANK
            return False  # nearly always
        at = data.rfind(b'"error"')
        begin = _after_blank(edge, data, at if at >= 0 else len(data))
        error = None
        if begin >= 0:
            found = map(sse.error_in, sse.events_in(data[begin:]))
            error = next(filter(None, found), None)
        if error is None:
            begin = _after_blank(edge, data, len(data))
            if begin < 0 or not sse.may_become_error(data[begin:]):
                self._edge = (edge + data)[-3:]
                return False
        elif isinstance(error.code, int) and error.code < 500:
            self._edge = (edge + data)[-3:]
            return False
        if begin:
            self._forward(data[:begin])
        if error is None:
            self._begun, self._lease.heard_at = data[begin:], self._clock()
            self.body_received, self._takes_chunks = self._join, False
            return True
        text = f"Worker {self._lease.worker.name} ended the answer with an error"
        if error.message:
            text += f": {error.message[:MOST_MESSAGE]}"
        self.fail(WorkerError(Code.WORKER_INCOMPLETE, text, detail="it sent an error"))
        self.body_received, self._takes_chunks = _ignore, False
        return True

    def _join(self, data: bytes) -> None:
        """Take what follows an event that has begun."""
        if self._tally is not None:
            self._tally.feed(data)
        begun = self._begun + data
        if LF not in data and CR not in data and len(begun) <= sse.MOST_ERROR:
            self._begun, self._lease.heard_at = begun, self._clock()
            return  # incomplete as before
        self._begun = b""
        self._go_on()
        self._forward(begun)

    def _count(self, data: bytes) -> None:
        assert self._tally is not None, self
        self._tally.feed(data)
        self._forward(data)

    def _block(self) -> None:
        if not self._blocked:
            self._blocked = True
            self.connection.pause_reading()
            self._wake()

    def answer_ended(self) -> None:
        self._ended = True
        # Nothing more comes.  An object that has its own methods as attributes stays in
        # memory until the garbage collector runs.
        self.body_received, self._takes_chunks = _ignore, False
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        code = Code.WORKER_LOST
        text = f"The connection to worker {self._lease.worker.name} was lost."
        if malformed:
            code = Code.WORKER_PROTOCOL
            text = f"Worker {self._lease.worker.name} sent something that is not HTTP."
        self.fail(WorkerError(code, text, detail=reason))

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)


def _ignore(data: bytes) -> None:
    pass


def _after_blank(edge: bytes, data: bytes, end: int) -> int:
    """Return where the last event begins that begins before `end`.

    `edge` is what came before; negative if that event began in front of the data.
    """
    size = len(edge)
    blanks = _BLANK_LINES.finditer(edge + data, 0, size + end)
    return max((found.end() for found in blanks), default=0) - size
