"""The bytes from a worker become one complete answer, or one loss, in any reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.upstream.connection import (
    MAX_FAST,
    MAX_HEAD,
    MAX_HEADERS,
    PAYS_FOR,
    Connection,
    ConnectionState,
)
from tests.fakes.cases import case
from tests.fakes.replies import chunk, head, last_chunk
from tests.fakes.script import (
    Step,
    close,
    expect_eof,
    not_read_body,
    read_body,
    reset,
    send,
    stall,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

CHUNKED = head(200, [("Transfer-Encoding", "chunked")])
SHORT = head(200, [("Content-Length", "2")]) + b"{}"
# Reads that look like whole chunks, or like the beginning of one.
TRAPS = (
    b"5\r\nhello\r\n",
    b"3\r\nabc\r\n",
    b"a\r\n0123456789\r\n",
    b"0\r\n\r\n",
    b"1",
    b"\r\n",
    b"\n",
)


class Link(asyncio.Transport):
    """A transport without a socket: the test plays the worker's side."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.aborted, "written after the end"
        self.written += bytes(data)

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        assert not self.aborted
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.aborted
        self.reading = True


class Recorder:
    """Receives an answer, and fails on calls that break the receiver's contract."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.whole_chunks = 0
        self.ended = False
        self.lost: tuple[str, bool] | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def over(self) -> bool:
        return self.ended or self.lost is not None

    @property
    def malformed(self) -> bool:
        return self.lost is not None and self.lost[1]

    def head_received(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert not self.status, "a second head"
        assert not self.over
        self.status, self.headers = status, headers

    def body_received(self, data: bytes) -> None:
        assert self.status, "a body without a head"
        assert not self.over, "a body behind the end"
        assert data
        self.parts.append(data)

    def chunk_received(self, chunk: bytes, head: bytes) -> bool:
        if not (chunk.startswith(head) and chunk.endswith(b"\r\n")):
            return False
        data = chunk[len(head) : -2]
        assert chunk == b"%x\r\n%b\r\n" % (len(data), data), "framed otherwise"
        self.whole_chunks += 1
        self.body_received(data)
        return True

    def answer_ended(self) -> None:
        assert self.status, "an end without a head"
        assert not self.over, "a second end"
        self.ended = True

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        assert not self.over, "a second end"
        assert reason
        self.lost = reason, malformed


def connect() -> tuple[Connection, Link]:
    connection, link = Connection(), Link()
    connection.connection_made(link)
    return connection, link


def ask() -> tuple[Connection, Link, Recorder]:
    """Return a connection with a running request."""
    connection, link = connect()
    recorder = Recorder()
    connection.start(recorder)
    return connection, link, recorder


def receive(*reads: bytes) -> tuple[Connection, Link, Recorder]:
    connection, link, recorder = ask()
    for data in reads:
        if connection.state is ConnectionState.CLOSED:
            break  # an aborted transport delivers nothing more
        connection.data_received(data)
    return connection, link, recorder


def cut(data: bytes, ends: Iterable[int]) -> list[bytes]:
    """Cut bytes into reads that end at these places."""
    places = sorted({0, len(data), *ends})
    return [data[i:j] for i, j in pairwise(places)]


# --- Chunked bodies: the parser and the fast path ---------------------------------


@st.composite
def chunked_answers(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Draw a body, and the reads in which an answer with this body arrives."""
    part = st.sampled_from(TRAPS) | st.binary(min_size=1, max_size=20)
    chunks = st.lists(st.lists(part, min_size=1, max_size=4), max_size=6)
    extensions = st.sampled_from(["", "", "", ";a", ";a=b", ';a="b c"'])
    formats = st.sampled_from(["x", "x", "x", "X", "04x", "04X"])
    wire, body = CHUNKED, b""
    marks = {len(wire)}  # places where a cut is interesting
    for parts in draw(chunks):
        data = b"".join(parts)
        size = format(len(data), draw(formats)) + draw(extensions)
        marks |= {len(wire) + 1, len(wire) + len(size), len(wire) + len(size) + 2}
        wire += size.encode() + b"\r\n"
        for piece in parts:
            wire += piece
            marks.add(len(wire))
        wire += b"\r\n"
        marks |= {len(wire) - 1, len(wire)}
        body += data
    wire += draw(st.sampled_from([b"0", b"000", b"0;a=b"])) + b"\r\n"
    marks.add(len(wire))
    wire += draw(st.sampled_from([b"", b"", b"X-Trailer: 5\r\n"])) + b"\r\n"
    places = st.sampled_from(sorted(marks)) | st.integers(0, len(wire))
    return body, cut(wire, draw(st.sets(places, max_size=30)))


@given(chunked_answers())
@example(
    (
        b"a" + bytes(19),
        [CHUNKED + b"1\r\na\r\n1", b"3\r\n" + bytes(19) + b"\r\n0\r\n\r\n"],
    )
)
def test_a_chunked_body_is_the_same_in_any_framing_and_any_reads(
    answer: tuple[bytes, list[bytes]],
) -> None:
    body, reads = answer
    connection, _, recorder = receive(*reads)
    assert recorder.body == body
    assert recorder.ended
    assert connection.reusable


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5), st.data())
def test_whole_chunks_are_not_parsed_wherever_they_come(
    bodies: list[bytes], data: st.DataObject
) -> None:
    """Each chunk is one read or two: only the former take the fast path."""
    reads = [CHUNKED + chunk(b"first")]
    whole = 0
    for body in bodies:
        framed = chunk(body)
        # A read that is only the end of a CRLF does not show what follows it.
        place = data.draw(st.integers(0, len(framed) - 2))
        reads += cut(framed, [place])
        whole += not place
    recorder = receive(*reads, last_chunk())[2]
    assert recorder.body == b"first" + b"".join(bodies)
    assert recorder.whole_chunks == whole
    assert recorder.ended


@pytest.mark.parametrize("read", [b"3\r\nabcde", b"3\r\nabc\r!", b"3\r\nabc\n\n"])
def test_a_chunk_without_its_end_is_not_a_chunk(read: bytes) -> None:
    """Of the right length, between two others."""
    _, _, recorder = receive(CHUNKED + chunk(b"a"), read)
    assert recorder.body == b"aabc"
    assert recorder.malformed


def test_half_a_size_line_at_the_end_of_a_read_is_not_between_chunks() -> None:
    """The next read looks like a chunk of 3 bytes; its size is 0x13."""
    _, _, recorder = receive(CHUNKED + chunk(b"a") + b"1", b"3\r\nabc\r\n")
    assert recorder.parts == [b"a", b"abc\r\n"]
    assert recorder.whole_chunks == 0


@pytest.mark.parametrize("read", [b"5\r\nhello\r\n", b"0\r\n\r\n", b"1", b"1\r\n"])
def test_a_chunk_inside_a_chunk_is_text(read: bytes) -> None:
    """A model that writes about HTTP must not end its own answer."""
    size = b"%x\r\n" % (len(read) * 2)
    reads = [CHUNKED + chunk(b"a") + size, read, read, b"\r\n", last_chunk()]
    _, _, recorder = receive(*reads)
    assert recorder.body == b"a" + read * 2
    assert recorder.whole_chunks == 0
    assert recorder.ended


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (b"05\r\nhello\r\n", b"hello"),
        (b"5;a=b\r\nhello\r\n", b"hello"),
        (b"A\r\n0123456789\r\n", b"0123456789"),  # llama-server writes lower case
        (b"5\r\nhello\r\n5\r\nworld\r\n", b"helloworld"),
    ],
)
def test_a_chunk_in_another_form_is_parsed(read: bytes, data: bytes) -> None:
    _, _, recorder = receive(CHUNKED + chunk(b"a"), read, chunk(b"!"), last_chunk())
    assert recorder.parts == [b"a", data, b"!"]
    assert recorder.whole_chunks == 1
    assert recorder.ended


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_large_chunks_are_parsed(over: int) -> None:
    """Nothing is lost where the table of the fast path ends."""
    framing = len(chunk(bytes(MAX_FAST - 100))) - (MAX_FAST - 100)
    data = bytes(MAX_FAST - framing + over)
    framed = chunk(data)
    assert len(framed) == MAX_FAST + over
    _, _, recorder = receive(CHUNKED + chunk(b"a"), framed, last_chunk())
    assert recorder.body == b"a" + data
    assert recorder.whole_chunks == (over < 0)
    assert recorder.ended


def test_the_chunks_of_one_read_are_one_part() -> None:
    """The receiver is called once for each read, with any number of events."""
    reads = [CHUNKED, b"".join(chunk(b"%d" % n) for n in range(9)) + last_chunk()]
    assert receive(*reads)[2].parts == [b"012345678"]


@pytest.mark.parametrize("heads", [[CHUNKED], [CHUNKED[:-2], CHUNKED[-2:]]])
def test_the_first_chunk_after_a_head_is_a_chunk(heads: list[bytes]) -> None:
    """The head has announced chunks, so these bytes cannot be anything else."""
    reads = [*heads, b"3\r\nabc\r\n", b"3\r\ndef\r\n", last_chunk()]
    _, _, recorder = receive(*reads)
    assert recorder.parts == [b"abc", b"def"]
    assert recorder.whole_chunks == 2


def test_chunks_that_an_interim_answer_announces_are_text() -> None:
    interim = head(100, [("Transfer-Encoding", "chunked")])
    answer = interim + head(200, [("Content-Length", "8")])
    _, _, recorder = receive(answer, b"3\r\nabc\r\n")
    assert recorder.body == b"3\r\nabc\r\n"
    assert recorder.whole_chunks == 0


def test_a_chunk_of_a_body_with_a_length_is_text() -> None:
    reads = [head(200, [("Content-Length", "16")]), *[b"3\r\nabc\r\n"] * 2]
    _, _, recorder = receive(*reads)
    assert recorder.body == b"3\r\nabc\r\n" * 2
    assert recorder.whole_chunks == 0
    assert recorder.ended


@given(st.binary(max_size=300), st.sets(st.integers(0, 400)))
def test_a_body_with_a_length_is_the_same_in_any_reads(
    body: bytes, ends: set[int]
) -> None:
    wire = head(200, [("Content-Length", str(len(body)))]) + body
    connection, _, recorder = receive(*cut(wire, (e for e in ends if e < len(wire))))
    assert (recorder.body, recorder.ended) == (body, True)
    assert connection.reusable


@given(st.binary(max_size=300), st.sets(st.integers(0, 400)))
def test_a_body_that_ends_with_the_connection(body: bytes, ends: set[int]) -> None:
    """As an HTTP/1.0 server sends it (RFC 9112, 6.3, 8)."""
    wire = head(200, version="1.0") + body
    connection, _, recorder = receive(*cut(wire, (e for e in ends if e < len(wire))))
    assert not recorder.over
    connection.eof_received()
    connection.connection_lost(None)
    assert (recorder.body, recorder.ended) == (body, True)
    assert connection.state is ConnectionState.CLOSED
    assert not connection.reusable


# --- Heads ------------------------------------------------------------------------


def test_status_and_headers_are_passed_on_as_sent() -> None:
    """In their order and case, with repetitions and empty values."""
    sent = [("B-b", "1"), ("a", ""), ("B-b", "2"), ("Content-Length", "0")]
    recorder = receive(head(418, sent))[2]
    assert recorder.status == 418
    assert recorder.headers == [(k.encode(), v.encode()) for k, v in sent]
    assert recorder.ended


def test_trailers_are_ignored() -> None:
    """They come too late to describe the body."""
    reads = [CHUNKED + chunk(b"a"), b"0\r\nContent-Type: evil\r\n", b"\r\n"]
    _, _, recorder = receive(*reads)
    assert recorder.headers == [(b"Transfer-Encoding", b"chunked")]
    assert recorder.ended


@pytest.mark.parametrize("status", [200, 201, 299, 400, 404, 500, 503, 599])
def test_final_statuses(status: int) -> None:
    line = f"HTTP/1.1 {status} \r\nContent-Length: 0\r\n\r\n".encode()
    recorder = receive(line)[2]
    assert (recorder.status, recorder.ended) == (status, True)


@pytest.mark.parametrize("status", [101, 102, 103, 199, 301, 302, 304, 399, 600, 999])
def test_an_unexpected_status_is_a_loss(status: int) -> None:
    """Redirections, upgrades and unknown statuses are not passed on."""
    upgrade = b"Connection: upgrade\r\nUpgrade: h2c\r\nLocation: http://10.0.0.1/\r\n"
    line = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n" % status
    connection, link, recorder = receive(line + upgrade + b"\r\n")
    assert recorder.malformed
    assert recorder.lost == (f"unexpected status {status}", True)
    assert connection.state is ConnectionState.CLOSED
    assert link.aborted


@pytest.mark.parametrize("headers", [[], [("Content-Length", "5")]])
def test_an_answer_without_content_ends_with_its_head(
    headers: list[tuple[str, str]],
) -> None:
    """Whatever its head announces (RFC 9110, 15.3.5)."""
    connection, _, recorder = receive(head(204, headers))
    assert (recorder.status, recorder.body, recorder.ended) == (204, b"", True)
    assert connection.reusable


@pytest.mark.parametrize("whole", [True, False])
def test_interim_answers_are_skipped(whole: bool) -> None:
    """`100 Continue` may come although it was not requested."""
    wire = head(100, [("X-Interim", "1")]) * 3 + SHORT
    reads = [wire] if whole else cut(wire, range(len(wire)))
    connection, _, recorder = receive(*reads)
    assert recorder.headers == [(b"Content-Length", b"2")]
    assert (recorder.status, recorder.body, recorder.ended) == (200, b"{}", True)
    assert connection.reusable


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"", head(100)),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: %b\r\n" % (b"b" * 1000)),
        (b"HTTP/1.1 200 ", b"O" * 1000),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 1000),
        (b"HTTP/1.1 200 OK\r\nX-", b"A" * 1000),
    ],
    ids=["interim answers", "headers", "reason", "value", "name"],
)
def test_a_head_without_an_end_is_a_loss(first: bytes, more: bytes) -> None:
    """It is kept up to a limit."""
    connection, link, recorder = ask()
    received = 0
    for data in (first, *[more] * (2 * MAX_HEAD // len(more))):
        if data and not recorder.over:
            connection.data_received(data)
            received += len(data)
    assert recorder.lost == (f"a head larger than {MAX_HEAD} bytes", True)
    assert MAX_HEAD < received <= MAX_HEAD + len(more)
    assert link.aborted


def test_the_number_of_headers_is_limited() -> None:
    lines = b"X-A: b\r\n" * (MAX_HEADERS - 1)
    fits = b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 0\r\n%b\r\n"
    assert receive(fits % b"")[2].ended
    _, link, recorder = receive(fits % b"X-A: b\r\n")
    assert recorder.lost == (f"more than {MAX_HEADERS} headers", True)
    assert link.aborted


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"5;", b"a" * 1000),
        (b"", b"1;%b\r\nx\r\n" % (b"a" * 1000)),
        (chunk(b"hello") + b"0\r\n", b"X: %b\r\n" % (b"a" * 1000)),
        (chunk(b"hello") + b"0\r\nX: ", b"a" * 1000),
        (b"", b"0" * 1000),
    ],
    ids=["an extension", "extensions", "trailers", "a trailer", "zeros"],
)
def test_a_body_of_nothing_but_framing_is_a_loss(first: bytes, more: bytes) -> None:
    """Framing beyond its ratio is limited as a head is."""
    connection, link, recorder = ask()
    connection.data_received(CHUNKED + first)
    received = 0
    while not recorder.over and received < 3 * MAX_HEAD:
        connection.data_received(more)
        received += len(more)
    assert recorder.malformed
    assert received <= 1.1 * MAX_HEAD
    assert link.aborted


def test_any_number_of_the_smallest_chunks_is_accepted() -> None:
    """With one byte in each, and also with short extensions."""
    connection, _, recorder = ask()
    connection.data_received(CHUNKED)
    piece = b"1;a=bcdefgh\r\nx\r\n" * 100
    assert len(piece) <= (1 + PAYS_FOR) * 100
    for _ in range(3 * MAX_HEAD // len(piece)):
        connection.data_received(piece)
    connection.data_received(last_chunk())
    assert recorder.ended


def test_a_request_on_a_connection_that_has_ended_is_a_loss() -> None:
    """The worker sent bytes without a request, or has just closed it."""
    for data in (SHORT, b""):
        connection, _ = connect()
        if data:
            connection.data_received(data)
        else:
            connection.connection_lost(None)
        recorder = Recorder()
        connection.start(recorder)
        assert recorder.lost == ("closed before the request", False)
        connection.write(b"POST")
        assert connection.state is ConnectionState.CLOSED


# --- What is not HTTP -------------------------------------------------------------

MALFORMED = {
    "no http": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "http/0.9": b"<html>hello</html>",
    "an event": b'data: {"choices":[]}\n\n',
    "zeros": bytes(100),
    "tls alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "version": b"HTTP/3.7 200 OK\r\nContent-Length: 0\r\n\r\n",
    "status": b"HTTP/1.1 2xx OK\r\nContent-Length: 0\r\n\r\n",
    "bare lf": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length 2\r\n\r\n{}",
    "space before colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
    "nul in a header": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "cr in a header": b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": head(
        200, [("Content-Length", "5"), ("Transfer-Encoding", "chunked")]
    ),
    "chunks and length": head(
        200, [("Transfer-Encoding", "chunked"), ("Content-Length", "5")]
    ),
    "two lengths": head(200, [("Content-Length", "2"), ("Content-Length", "2")]),
    "negative length": head(200, [("Content-Length", "-2")]),
    "length of words": head(200, [("Content-Length", "two")]),
    "endless length": head(200, [("Content-Length", "9" * 30)]),
    "chunk size": CHUNKED + b"xyz\r\n",
    "negative chunk": CHUNKED + b"-5\r\nhello\r\n",
    "0x chunk": CHUNKED + b"0x5\r\nhello\r\n",
    "giant chunk": CHUNKED + b"f" * 17 + b"\r\n",
    "no chunk size": CHUNKED + b"\r\nhello\r\n",
    "chunk longer than announced": CHUNKED + b"3\r\nhello\r\n",
    "chunk with bare lf": CHUNKED + b"3\nabc\n",
    "no crlf behind a chunk": CHUNKED + b"3\r\nabc3\r\nabc\r\n",
    "http/2": head(200, [("Content-Length", "0")]).replace(b"1.1", b"2.0", 1),
    "compressed": head(200, [("Content-Encoding", "gzip"), ("Content-Length", "2")]),
    "compressed chunks": head(200, [("Transfer-Encoding", "gzip, chunked")]),
    "chunks, compressed": head(200, [("Transfer-Encoding", "chunked, gzip")]),
    "unknown coding": head(200, [("Transfer-Encoding", "xchunked")]),
    "second chunk size": CHUNKED + chunk(b"hello") + b"what?\r\n",
}


def test_what_is_not_http_is_one_loss() -> None:
    """In any reads; the connection is closed and never reused."""
    for step in [1, 7, 1 << 20]:
        for wire in MALFORMED.values():
            with case((step, wire)):
                reads = cut(wire, range(0, len(wire), step))
                connection, link, recorder = receive(*reads)
                assert recorder.malformed
                assert connection.state is ConnectionState.CLOSED
                assert link.aborted
                assert not connection.reusable
                connection.connection_lost(None)  # as the event loop calls it next


@pytest.mark.parametrize("name", ["identity", "Identity"])
def test_the_coding_identity_is_accepted(name: str) -> None:
    coded = head(200, [("Content-Encoding", name), ("Transfer-Encoding", "CHUNKED")])
    assert receive(coded + chunk(b"hello") + last_chunk())[2].body == b"hello"


def test_the_body_before_a_fault_is_passed_on() -> None:
    """A client gets the good part of an answer before the error."""
    _, _, recorder = receive(CHUNKED + chunk(b"good") + b"bad\r")
    assert recorder.body == b"good"
    recorder = receive(CHUNKED, chunk(b"good") + b"bad!")[2]
    assert recorder.body == b"good"
    assert recorder.malformed


@given(st.data())
def test_garbage_raises_nothing(data: st.DataObject) -> None:
    """A good answer with some bytes changed: an end, a loss, or a wait for more.

    Where it ends and h11, which is strict, also reads an answer, it is the same one.
    """
    wire = bytearray(
        head(200, [("X-A", "b"), ("Transfer-Encoding", "chunked")])
        + chunk(b'data: {"a":1}\n\n')
        + chunk(b"data: [DONE]\n\n")
        + last_chunk()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(wire) - 1))
        wire[place] = data.draw(st.sampled_from(b"\0\r\n :;09afxHT\xff"))
    ends = data.draw(st.sets(st.integers(0, len(wire) - 1)))
    connection, _, recorder = receive(*cut(bytes(wire), ends))
    connection.connection_lost(None)
    assert recorder.over
    reported = read_by_h11(bytes(wire))
    if recorder.ended and reported is not None:
        assert recorder.body == reported


def read_by_h11(wire: bytes) -> bytes | None:
    """Read an answer with another parser; None if that rejects it."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(wire)
    body = b""
    try:
        parser.receive_data(b"")
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += event.data
    except h11.RemoteProtocolError:
        return None
    return body


# --- Early ends -------------------------------------------------------------------

COMPLETE = {
    "length": SHORT,
    "chunks": CHUNKED + chunk(b"hello") + chunk(b"world") + last_chunk(),
    "trailer": CHUNKED + chunk(b"hello") + b"0\r\nX: y\r\n\r\n",
    "interim": head(100) + SHORT,
}


@pytest.mark.parametrize("error", [None, ConnectionResetError("reset by peer")])
@pytest.mark.parametrize("wire", COMPLETE.values(), ids=COMPLETE.keys())
def test_an_early_end_of_the_connection_is_one_loss(
    wire: bytes, error: Exception | None
) -> None:
    """After the last byte it is neither."""
    for length in range(len(wire) + 1):
        connection, _, recorder = receive(wire[:length])
        assert connection.eof_received() is False  # which closes the transport
        connection.connection_lost(error)
        if length == len(wire):
            assert recorder.ended
        else:
            assert recorder.lost is not None
            assert not recorder.malformed
            assert ("reset" in recorder.lost[0]) == (error is not None)
        assert connection.state is ConnectionState.CLOSED
        assert not connection.reusable


def test_a_body_without_any_framing_ends_with_fin_and_not_with_a_reset() -> None:
    wire = head(200) + b"hello"
    for length in range(len(wire) + 1):
        for error in (None, ConnectionResetError("reset by peer")):
            connection, _, recorder = receive(wire[:length])
            if error is None:
                connection.eof_received()
            connection.connection_lost(error)
            assert recorder.ended == (error is None and length >= len(head(200)))
            assert recorder.over


def test_a_body_without_any_framing_and_without_close_notify_is_cut() -> None:
    """A FIN alone proves nothing: anything on the network path can send one."""
    connection, _, recorder = receive(head(200) + b"hello")
    connection.connection_lost(None)
    assert recorder.lost is not None
    assert not recorder.ended


def test_an_error_without_a_text_is_reported_by_its_name() -> None:
    connection, _, recorder = ask()
    connection.connection_lost(TimeoutError())
    assert recorder.lost == ("TimeoutError", False)


def test_nothing_is_reported_after_the_connection_was_closed() -> None:
    connection, link, recorder = receive(CHUNKED + chunk(b"a"))
    connection.close()
    assert link.aborted
    connection.close()  # twice is once
    connection.data_received(chunk(b"b"))
    connection.connection_lost(None)
    assert recorder.parts == [b"a"]
    assert not recorder.over


# --- One answer after the other ---------------------------------------------------


def test_a_connection_carries_one_request_at_a_time() -> None:
    connection, _, _ = ask()
    assert not connection.reusable
    assert repr(connection) == "<Connection ACTIVE used=1>"
    with pytest.raises(AssertionError):
        connection.start(Recorder())


@pytest.mark.parametrize(
    "wire", [SHORT, CHUNKED + chunk(b"{}") + last_chunk(), head(204)]
)
def test_a_complete_answer_does_not_affect_the_next(wire: bytes) -> None:
    connection, _ = connect()
    for number in range(1, 4):
        recorder = Recorder()
        connection.start(recorder)
        connection.data_received(wire)
        assert recorder.ended
        assert len(recorder.headers) <= 1
        assert connection.reusable
        assert connection.used == number
    connection.connection_lost(None)
    assert not connection.reusable


def test_the_next_answer_does_not_begin_between_chunks() -> None:
    """Its first read may look like anything."""
    connection, _ = connect()
    connection.start(Recorder())
    for data in (CHUNKED + chunk(b"a"), chunk(b"b"), last_chunk()):
        connection.data_received(data)
    connection.start(recorder := Recorder())
    connection.data_received(chunk(b"c"))
    assert recorder.malformed
    assert not recorder.parts


@pytest.mark.parametrize(
    "wire",
    [
        head(200, [("Connection", "close"), ("Content-Length", "2")]) + b"{}",
        head(200, [("Content-Length", "2")], version="1.0") + b"{}",
        SHORT + b"!",  # bytes after the end
        SHORT + b"HTTP/1.1 700 what\r\n\r\n",
        CHUNKED + last_chunk() + b"5\r\nhello\r\n",
    ],
)
def test_a_connection_may_end_with_a_complete_answer(wire: bytes) -> None:
    connection, _, recorder = receive(wire)
    assert recorder.ended
    assert not connection.reusable


@pytest.mark.parametrize("used", [0, 1])
def test_an_answer_without_a_request_ends_the_connection(used: int) -> None:
    """The next request would get it."""
    connection, link = connect()
    for _ in range(used):
        connection.start(Recorder())
        connection.data_received(SHORT)
    connection.data_received(SHORT)
    assert connection.state is ConnectionState.CLOSED
    assert not connection.reusable
    assert link.aborted


# --- Sending ----------------------------------------------------------------------


async def test_drain_waits_while_the_worker_does_not_read() -> None:
    connection, link, _ = ask()
    await connection.drain()  # nothing to wait for
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.resume_writing()
    await waiting
    await connection.drain()
    assert link.written == b""


@pytest.mark.parametrize("how", ["close", "lost", "malformed"])
async def test_drain_ends_with_the_connection(how: str) -> None:
    connection, _, _ = ask()
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    if how == "close":
        connection.close()
    elif how == "lost":
        connection.connection_lost(ConnectionResetError())
    else:
        connection.data_received(b"what?")
    async with asyncio.timeout(DEADLINE):
        await waiting
    await connection.drain()  # from now on without waiting
    connection.resume_writing()


async def test_drain_ends_with_the_answer() -> None:
    """The worker may have answered without reading the rest."""
    connection, _, _ = ask()
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    connection.data_received(SHORT)
    await waiting


async def test_drain_can_be_cancelled() -> None:
    connection, _, _ = ask()
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    waiting.cancel()
    connection.resume_writing()  # in the same turn of the loop
    with pytest.raises(asyncio.CancelledError):
        await waiting
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    connection.resume_writing()
    await waiting


def test_a_closed_connection_ignores_what_is_written() -> None:
    connection, link, _ = ask()
    connection.write(b"one")
    connection.pause_reading()
    assert not link.reading
    connection.resume_reading()
    assert link.reading
    link.abort()
    connection.write(b"two")
    connection.pause_reading()
    connection.resume_reading()
    connection.connection_lost(None)
    connection.write(b"three")
    connection.pause_reading()
    connection.resume_reading()
    assert link.written == b"one"
    assert link.reading


def test_a_connection_that_is_not_read_is_not_reused() -> None:
    """The next answer would never arrive."""
    connection, _, recorder = ask()
    connection.pause_reading()
    connection.data_received(SHORT)  # had already been sent
    assert recorder.ended
    assert not connection.reusable
    connection.resume_reading()
    assert connection.reusable


def test_an_idle_connection_that_the_worker_ends_is_closed_at_once() -> None:
    """The next request may come before the transport reports the end."""
    connection, link, _ = ask()
    connection.data_received(SHORT)
    connection.eof_received()
    assert connection.state is ConnectionState.CLOSED
    assert link.aborted


# --- With sockets -----------------------------------------------------------------


class Waiting(Recorder):
    """A recorder that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.done = asyncio.Event()

    def answer_ended(self) -> None:
        super().answer_ended()
        self.done.set()

    def answer_lost(self, reason: str, *, malformed: bool) -> None:
        super().answer_lost(reason, malformed=malformed)
        self.done.set()


@asynccontextmanager
async def asked(
    worker: ScriptedWorker, *, length: int = 0
) -> AsyncIterator[tuple[Connection, Waiting]]:
    """Send a request without a body to a worker."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", worker.port)
    recorder = Waiting()
    connection.start(recorder)
    connection.write(
        b"POST / HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n" % length
    )
    try:
        yield connection, recorder
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("wire", "end", "complete"),
    [
        (SHORT, stall, True),
        (head(200) + b"hello", close, True),
        (head(200) + b"hello", reset, False),
        (CHUNKED + chunk(b"hello"), close, False),
        (CHUNKED + chunk(b"hello"), reset, False),
        (b"", close, False),
        (b"", reset, False),
    ],
)
async def test_ends_as_the_kernel_reports_them(
    wire: bytes, end: Callable[[], Step], complete: bool
) -> None:
    async with ScriptedWorker() as worker:
        worker.script(send(wire), end())
        async with asked(worker) as (connection, recorder):
            async with asyncio.timeout(DEADLINE):
                await recorder.done.wait()
            assert recorder.ended == complete
            assert not recorder.malformed
            assert connection.reusable == (wire == SHORT)


async def test_closing_reaches_the_worker_at_once() -> None:
    async with ScriptedWorker() as worker:
        worker.script(send(CHUNKED + chunk(b"a")), expect_eof())
        async with asked(worker) as (connection, recorder):
            await worker.received()
            connection.close()
            await worker.idle()
            assert not recorder.over


async def test_a_writer_that_is_faster_than_the_worker_waits() -> None:
    async with ScriptedWorker(receive_buffer=4096) as worker:
        worker.script(read_body(1000), not_read_body(), stall())
        async with asked(worker, length=1 << 30) as (connection, _):
            for _ in range(1000):
                connection.write(bytes(64 << 10))
                waiting = asyncio.create_task(connection.drain())
                await asyncio.sleep(0)
                if not waiting.done():
                    break
            else:
                raise AssertionError("the writer was never asked to wait")
            connection.close()
            async with asyncio.timeout(DEADLINE):
                await waiting
