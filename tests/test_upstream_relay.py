"""The bytes of an answer: held, passed on, judged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from gollama_proxy.routing.lease import Lease
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.relay import (
    HOLD_LIMIT,
    WRITE_BUFFER,
    Client,
    ClientStalledError,
    Relay,
    ToldError,
)
from gollama_proxy.wire import sse
from gollama_proxy.wire.errors import Code, ProxyError, RequestError, WorkerError
from gollama_proxy.wire.openai import Ending
from tests.fakes.clock import Clock
from tests.fakes.replies import (
    chunk,
    done,
    error_event,
    event,
    finish,
    named_event,
    ping,
    role,
    token,
)

EVENTS = [(b"Content-Type", b"text/event-stream")]
JSON = [(b"content-type", b"application/json; charset=utf-8")]


class Line:
    """A worker's connection, of which a relay only needs the brake."""

    def __init__(self) -> None:
        self.reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Sink(asyncio.WriteTransport):
    """A client's transport whose buffer the test fills and empties."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.buffered = 0
        self.closing = False
        self.broken = False
        self.room = asyncio.Event()
        self.drains = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken:
            raise RuntimeError("unable to perform operation on <TCPTransport closed>")
        self.writes.append(cast(bytes, data))

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.buffered

    async def drain(self) -> None:
        self.drains += 1
        await self.room.wait()
        self.buffered = 0


class Stage:
    """A relay with everything around it."""

    def __init__(self, ending: Ending = Ending.DONE, *, chunked: bool = True) -> None:
        self.clock = Clock()
        self.line = Line()
        self.sink = Sink()
        self.lease = Lease("w", self.clock, lambda lease, outcome: None)
        connection = cast(Connection, self.line)
        self.relay = Relay("w", connection, self.lease, ending, self.clock)
        self.client = Client(self.sink, self.sink.drain, chunked)

    @property
    def sent(self) -> bytes:
        return b"".join(self.sink.writes)

    def stream(self, *parts: bytes) -> None:
        """Receive the head of an event stream, and parts of its body."""
        self.relay.head_received(200, EVENTS)
        self.parts(*parts)

    def parts(self, *parts: bytes) -> None:
        for part in parts:
            self.relay.body_received(part)

    async def run(self, write_timeout: float = 5.0) -> None:
        await self.relay.run(self.client, write_timeout)

    def running(self, write_timeout: float = 5.0) -> asyncio.Task[None]:
        return asyncio.create_task(self.run(write_timeout))

    async def play(self, *parts: bytes, lost: str = "") -> None:
        """Receive a whole stream and its end, and pass it on."""
        self.stream(*parts)
        if lost:
            self.relay.answer_lost(lost, malformed=False)
        else:
            self.relay.answer_ended()
        await self.run()


async def steps(number: int = 5) -> None:
    """Let other tasks go as far as they can."""
    for _ in range(number):
        await asyncio.sleep(0)


# --- Until the first bytes are known ----------------------------------------------


@pytest.fixture(params=["body", "chunk"])
def deliver(request: pytest.FixtureRequest) -> Callable[[Relay, bytes], None]:
    """A part of a body comes in one of two ways, and both must do the same."""

    def by_chunk(relay: Relay, data: bytes) -> None:
        framed = chunk(data)
        relay.chunk_received(framed, len(framed) - len(data) - 2)

    if request.param == "chunk":
        return by_chunk
    return lambda relay, data: relay.body_received(data)


async def test_a_stream_is_open_with_its_first_whole_event(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    await steps()
    assert stage.relay.status == 0
    stage.clock.advance(1)
    stage.relay.head_received(200, EVENTS)
    assert stage.relay.status != 0
    assert stage.relay.is_event_stream
    for part in (ping(), b"event: start\n\n", b": a comment\n\n", b"data: ", b"{}\n"):
        deliver(stage.relay, part)
        await steps()
        assert not opening.done()
    stage.clock.advance(1)
    deliver(stage.relay, b"\n")
    await opening
    assert stage.relay.opened_at == stage.clock.now
    stage.clock.advance(1)
    deliver(stage.relay, token("more"))
    await stage.relay.opened()  # as often as one likes
    assert stage.relay.opened_at == stage.clock.now - 1


@pytest.mark.parametrize("headers", [JSON, []])
async def test_any_other_answer_is_open_with_its_first_byte(
    headers: list[tuple[bytes, bytes]],
) -> None:
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    stage.relay.head_received(200, headers)
    await steps()
    assert not opening.done()
    assert not stage.relay.is_event_stream
    stage.parts(b"{")
    await opening
    assert stage.relay.held_body() is None
    stage.parts(b"}")
    stage.relay.answer_ended()
    assert stage.relay.held_body() == b"{}"


async def test_an_answer_without_a_body_is_open_with_its_end() -> None:
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    stage.relay.head_received(413, [])
    stage.relay.answer_ended()
    await opening
    assert stage.relay.held_body() == b""
    assert stage.relay.status == 413


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    ("malformed", "code", "text"),
    [
        (False, Code.WORKER_LOST, "The connection to worker w was lost."),
        (True, Code.WORKER_PROTOCOL, "Worker w sent what is no HTTP answer."),
    ],
)
async def test_a_loss_before_the_first_bytes_is_raised(
    malformed: bool, code: Code, text: str, head: bool
) -> None:
    """The client hears of the worker; the reason is for the log."""
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    if head:
        stage.relay.head_received(200, EVENTS)
    await steps()
    stage.relay.answer_lost("the reason", malformed=malformed)
    with pytest.raises(WorkerError) as info:
        await opening
    error = info.value
    assert (error.code, error.message, error.detail) == (code, text, "the reason")


async def test_a_request_that_could_not_be_sent_ends_the_wait() -> None:
    """The first reason counts; the loss that follows from it does not."""
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    await steps()
    stage.relay.fail(RequestError(Code.INVALID_JSON, "first"))
    stage.relay.answer_lost("second", malformed=False)
    with pytest.raises(RequestError, match="first"):
        await opening


async def test_waiting_can_be_cancelled() -> None:
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    await steps()
    opening.cancel()
    stage.relay.answer_ended()  # in the same breath
    with pytest.raises(asyncio.CancelledError):
        await opening
    await stage.relay.opened()


async def test_no_more_is_held_than_the_limit() -> None:
    """An event without an end is passed on as it is, from there on with the brake."""
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    part = bytes(HOLD_LIMIT // 4)
    stage.stream(b"data: ", *[part] * 3)
    await steps()
    assert not opening.done()
    assert stage.line.reading
    stage.parts(part)
    await opening
    assert not stage.line.reading
    assert "blocked" in repr(stage.relay)
    stage.sink.room.set()
    running = stage.running()
    await steps()
    assert stage.line.reading
    assert stage.sent.count(b"\0") == HOLD_LIMIT
    running.cancel()


def test_headers_are_found_whatever_their_case() -> None:
    stage = Stage()
    stage.relay.head_received(200, [(b"X-A", b"First"), (b"x-a", b"LAST")])
    assert stage.relay.header(b"x-a") == b"last"
    assert stage.relay.header(b"x-b") == b""
    assert not stage.relay.is_event_stream


@pytest.mark.parametrize(
    "value", [b"text/event-stream", b"Text/Event-Stream", b"text/event-stream; a=b"]
)
def test_what_an_event_stream_calls_itself(value: bytes) -> None:
    stage = Stage()
    stage.relay.head_received(200, [(b"content-type", value)])
    assert stage.relay.is_event_stream


def test_an_error_as_the_first_event_is_found() -> None:
    stage = Stage()
    stage.stream(ping(), error_event("no", 503), token("what?"))
    error = stage.relay.early_error()
    assert error is not None
    assert (error.message, error.type, error.code) == ("no", "server_error", 503)


@pytest.mark.parametrize("parts", [(token("error"), error_event("late")), (ping(),)])
def test_an_error_later_on_is_not_early(parts: tuple[bytes, ...]) -> None:
    stage = Stage()
    stage.stream(*parts)
    assert stage.relay.early_error() is None


def test_an_error_body_is_not_an_event() -> None:
    stage = Stage()
    stage.relay.head_received(500, JSON)
    stage.parts(error_event("no"))
    assert stage.relay.early_error() is None


# --- Short answers ----------------------------------------------------------------


async def test_whole_waits_for_the_end() -> None:
    stage = Stage()
    stage.relay.head_received(400, JSON)
    waiting = asyncio.create_task(stage.relay.whole())
    stage.parts(b"{")
    await steps()
    assert not waiting.done()
    stage.parts(b"}")
    stage.relay.answer_ended()
    await waiting
    assert stage.relay.held_body() == b"{}"


async def test_whole_tells_of_a_loss() -> None:
    stage = Stage()
    stage.relay.head_received(400, JSON)
    waiting = asyncio.create_task(stage.relay.whole())
    await steps()
    stage.relay.answer_lost("gone", malformed=False)
    with pytest.raises(WorkerError):
        await waiting


async def test_whole_gives_up_on_what_is_not_short() -> None:
    stage = Stage()
    stage.relay.head_received(400, JSON)
    stage.parts(bytes(HOLD_LIMIT + 1))
    await stage.relay.whole()
    assert stage.relay.held_body() is None


@pytest.mark.parametrize(
    ("status", "headers", "ended", "spared"),
    [
        (200, JSON, True, True),
        (404, JSON, True, True),
        (200, JSON, False, False),
        (500, JSON, True, False),
        (503, JSON, True, False),
        (200, EVENTS, True, False),  # llama-server closes after a stream
    ],
)
def test_after_what_a_connection_can_be_used_again(
    status: int, headers: list[tuple[bytes, bytes]], ended: bool, spared: bool
) -> None:
    stage = Stage()
    stage.relay.head_received(status, headers)
    if ended:
        stage.relay.answer_ended()
    assert stage.relay.spares_connection == spared


# --- Passing on -------------------------------------------------------------------


async def test_what_was_held_goes_first() -> None:
    stage = Stage()
    stage.stream(ping(), role())
    assert repr(stage.relay) == "<Relay from w hold status=200 bytes=0>"
    running = stage.running()
    await steps()
    assert stage.sent == chunk(ping()) + chunk(role())
    stage.parts(token("a"))
    assert stage.sent == chunk(ping()) + chunk(role()) + chunk(token("a"))
    assert repr(stage.relay) == (
        f"<Relay from w forward status=200 bytes={len(ping() + role() + token('a'))}>"
    )
    stage.parts(finish() + done())
    stage.relay.answer_ended()
    await running
    assert stage.sent.endswith(chunk(finish() + done()))
    assert "ignore" in repr(stage.relay)


async def test_a_part_goes_on_in_the_same_call() -> None:
    """No task runs between a worker's token and its client."""
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    stage.parts(token("a"))
    assert stage.sink.writes[-1] == chunk(token("a"))
    running.cancel()


async def test_a_whole_chunk_goes_on_as_it_came() -> None:
    """Not copied, not framed again."""
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    framed = chunk(token("a"))
    stage.relay.chunk_received(framed, 4)
    assert stage.sink.writes[-1] is framed
    running.cancel()


async def test_a_client_of_old_gets_no_chunks(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    stage = Stage(chunked=False)
    stage.stream(role())
    running = stage.running()
    await steps()
    deliver(stage.relay, token("a"))
    stage.client.write(b"own")
    assert stage.sent == role() + token("a") + b"own"
    running.cancel()


async def test_the_books_are_kept(deliver: Callable[[Relay, bytes], None]) -> None:
    """Bytes, events, and when something was heard: of every part, held or not."""
    stage = Stage()
    stage.stream()
    total, count = 0, 0
    running: asyncio.Task[None] | None = None
    for part in (ping(), role() + token("a"), token("b"), ping(), token("data: {")):
        now = stage.clock.advance(1)
        deliver(stage.relay, part)
        assert stage.lease.heard_at == now
        total += len(part)
        count += part.count(b'data: {"choices"')
        if running is None and part != ping():
            running = stage.running()
            await steps()
    assert running is not None
    assert stage.relay.bytes == total
    assert count <= stage.relay.events <= count + 1, "an estimate, of tokens"
    running.cancel()


@pytest.mark.parametrize("size", [1, 7, 300, sse.TAIL - 1, sse.TAIL, 3 * sse.TAIL])
async def test_the_end_is_kept_and_little_else(
    size: int, deliver: Callable[[Relay, bytes], None]
) -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    body = role()
    for number in range(60):
        part = (b"%d," % number * size)[:size]
        deliver(stage.relay, part)
        body += part
        tail = stage.relay.tail
        assert body.endswith(tail)
        assert len(tail) >= min(len(body), sse.TAIL)
        assert len(tail) <= 16 * max(size, sse.TAIL)
    running.cancel()


# --- A client that does not keep up -----------------------------------------------


async def test_a_full_buffer_stops_the_worker_until_there_is_room(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    stage.sink.buffered = WRITE_BUFFER
    deliver(stage.relay, token("a"))
    assert stage.line.reading, "there is room yet"
    stage.sink.buffered += 1
    deliver(stage.relay, token("b"))
    assert not stage.line.reading
    assert repr(stage.relay).endswith(" blocked>")
    deliver(stage.relay, token("c"))  # of the same read
    await steps()
    assert stage.sink.drains == 1
    assert not stage.line.reading
    stage.sink.room.set()
    await steps()
    assert stage.line.reading
    deliver(stage.relay, done())
    stage.relay.answer_ended()
    await running
    parts = [role(), token("a"), token("b"), token("c"), done()]
    assert stage.sent == b"".join(map(chunk, parts))


async def test_a_client_that_does_not_read_for_too_long_is_given_up() -> None:
    stage = Stage()
    stage.stream(role())
    stage.sink.buffered = WRITE_BUFFER + 1
    with pytest.raises(ClientStalledError):
        await stage.run(write_timeout=0.01)


async def test_the_end_waits_for_the_client_too() -> None:
    """An end behind a full buffer is no end yet."""
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    stage.sink.buffered = WRITE_BUFFER + 1
    stage.parts(done())
    stage.relay.answer_ended()
    await steps()
    assert not running.done()
    stage.sink.room.set()
    await running


async def test_a_client_that_left_a_moment_ago() -> None:
    """uvloop raises then; the handler is being cancelled, so nothing else happens."""
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    stage.sink.broken = True
    stage.sink.buffered = WRITE_BUFFER + 1
    stage.parts(token("a"))
    assert stage.line.reading
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_own_bytes_are_not_written_to_a_client_that_left() -> None:
    stage = Stage()
    stage.client.write(b"one")
    stage.sink.closing = True
    stage.client.write(b"two")
    assert stage.sent == chunk(b"one")


async def test_what_comes_behind_the_end_is_not_passed_on() -> None:
    stage = Stage()
    await stage.play(role(), done())
    before = stage.sent
    stage.parts(token("late"))
    stage.relay.chunk_received(chunk(token("late")), 4)
    assert stage.sent == before


# --- The end ----------------------------------------------------------------------

MESSAGE = [named_event({"type": kind}) for kind in ("message_start", "message_delta")]
COMPLETE = {
    "done": (Ending.DONE, [role(), finish(), done()]),
    "only done": (Ending.DONE, [role(), done()]),
    "native": (Ending.STOP, [event({"content": "a"}), event({"stop": True})]),
    "messages": (Ending.NAMED, [*MESSAGE, named_event({"type": "message_stop"})]),
    **{
        kind: (Ending.NAMED, [named_event({"type": f"response.{kind}"})])
        for kind in ("completed", "incomplete", "failed")
    },
}


@pytest.mark.parametrize("lost", ["", "reset"])
@pytest.mark.parametrize(("ending", "parts"), COMPLETE.values(), ids=COMPLETE.keys())
async def test_a_complete_stream_ends_well(
    ending: Ending, parts: list[bytes], lost: str
) -> None:
    """Even where the connection broke behind its mark; nothing is added."""
    stage = Stage(ending)
    await stage.play(*parts, lost=lost)
    assert stage.sent == b"".join(map(chunk, parts))


@pytest.mark.parametrize("lost", ["", "reset"])
async def test_a_finished_stream_gets_the_done_that_it_lacks(lost: str) -> None:
    stage = Stage()
    await stage.play(role(), finish(), lost=lost)
    assert stage.sent == chunk(role()) + chunk(finish()) + chunk(done())


@pytest.mark.parametrize("size", [100, 10_000])
@pytest.mark.parametrize("number", [1, 30])
async def test_a_mark_may_have_long_events_behind_it(number: int, size: int) -> None:
    """Of a response, the closing event holds all of its text once more."""
    stage = Stage(Ending.NAMED)
    stage.sink.room.set()
    closing = b"event: response.completed\n"
    rest = [b"data: " + b"x" * size + b"\n"] * number
    await stage.play(*MESSAGE, closing, *rest, b"\n")
    assert stage.sent.endswith(chunk(b"\n"))


INCOMPLETE = {
    "no finish": (Ending.DONE, [role(), token("a")]),
    "finish in the text": (Ending.DONE, [token('"finish_reason":"stop"')]),
    "done in the text": (Ending.DONE, [token("data: [DONE]\n\n")]),
    "of the router": (Ending.DONE, [role(), b"proxy error: Failed to read"]),
    "native": (Ending.STOP, [event({"content": "a", "stop": False})]),
    "native with a done": (Ending.STOP, [event({"content": "a"}), done()]),
    "stop in the text": (Ending.STOP, [event({"content": '"stop":true'})]),
    "messages": (Ending.NAMED, MESSAGE),
    "messages in the text": (
        Ending.NAMED,
        [event({"text": "\nevent: message_stop\n"})],
    ),
}


@pytest.mark.parametrize("lost", ["", "reset"])
@pytest.mark.parametrize(
    ("ending", "parts"), INCOMPLETE.values(), ids=INCOMPLETE.keys()
)
async def test_a_stream_without_its_mark_is_not_complete(
    ending: Ending, parts: list[bytes], lost: str
) -> None:
    """What came is passed on; how it ended decides what is told."""
    stage = Stage(ending)
    with pytest.raises(WorkerError) as info:
        await stage.play(*parts, lost=lost)
    assert stage.sent == b"".join(map(chunk, parts))
    assert info.value.code is (Code.WORKER_LOST if lost else Code.WORKER_INCOMPLETE)
    assert not isinstance(info.value, ToldError)


@pytest.mark.parametrize("lost", ["", "reset"])
async def test_a_stream_that_told_its_own_error_is_not_told_another(lost: str) -> None:
    stage = Stage()
    with pytest.raises(ToldError):
        await stage.play(role(), error_event("no"), lost=lost)
    assert stage.sent == chunk(role()) + chunk(error_event("no"))


async def test_a_broken_chunk_behind_a_complete_stream_does_not_matter() -> None:
    stage = Stage()
    stage.stream(role(), done())
    stage.relay.answer_lost("malformed", malformed=True)
    await stage.run()


@pytest.mark.parametrize("status", [200, 404])
async def test_an_answer_that_is_no_stream_ends_with_its_body(status: int) -> None:
    stage = Stage()
    stage.relay.head_received(status, JSON)
    stage.parts(b"{}")
    stage.relay.answer_ended()
    await stage.run()
    assert stage.sent == chunk(b"{}")


@pytest.mark.parametrize("early", [True, False])
async def test_an_answer_that_is_cut_is_a_loss(early: bool) -> None:
    stage = Stage()
    stage.relay.head_received(200, JSON)
    stage.parts(b'{"finish_reason":"stop"')
    if early:
        stage.relay.answer_lost("reset", malformed=False)
    running = stage.running()
    await steps()
    if not early:
        stage.relay.answer_lost("reset", malformed=False)
    with pytest.raises(ProxyError) as info:
        await running
    assert info.value.code is Code.WORKER_LOST
    assert stage.sent == chunk(b'{"finish_reason":"stop"')
