"""The bytes of an answer: held, passed on, judged."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.edge.connections import WRITE_BUFFER
from gollama_proxy.edge.response import Client, ClientStalledError, ReportedError
from gollama_proxy.proxy.relay import (
    HOLD_LIMIT,
    MOST_HELD,
    Relay,
)
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.wire.answer import TAIL, Prefill, Tally, Usage
from gollama_proxy.wire.errors import Code, ProxyError, RequestError, WorkerError
from gollama_proxy.wire.schema import Ending, Endpoint
from tests.fakes.cases import case
from tests.fakes.clock import Clock
from tests.fakes.pool import worker as a_worker
from tests.fakes.relays import pass_on
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


class Sink:
    """A client's connection whose buffer the test fills and empties."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.buffered = 0
        self.broken = False
        self.room = asyncio.Event()
        self.drains = 0

    @property
    def paused(self) -> bool:
        return self.buffered > WRITE_BUFFER

    def write(self, data: bytes) -> None:
        if self.broken:
            raise RuntimeError("unable to perform operation on <TCPTransport closed>")
        self.writes.append(data)

    async def drain(self) -> None:
        self.drains += 1
        await self.room.wait()
        self.buffered = 0


class Stage:
    """A relay with everything around it."""

    def __init__(
        self,
        ending: Ending = Ending.DONE,
        *,
        chunked: bool = True,
        path: str = "/v1/chat/completions",
    ) -> None:
        self.clock = Clock()
        self.line = Line()
        self.sink = Sink()
        self.lease = a_worker(name="w", clock=self.clock).lease()
        connection = cast(Connection, self.line)
        endpoint = Endpoint(path, ending)
        self.relay = Relay(connection, self.lease, endpoint)
        self.client = Client(self.sink, self.sink, self.sink, chunked)

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

    async def run(self, write_timeout: float = 5.0, keep: int = 0) -> None:
        await pass_on(self.relay, self.client, write_timeout, keep)

    def running(self, keep: int = 0) -> asyncio.Task[None]:
        return asyncio.create_task(self.run(keep=keep))

    async def play(self, *parts: bytes, lost: str = "", keep: int = 0) -> None:
        """Receive a whole stream and its end, and pass it on."""
        self.stream(*parts)
        if lost:
            self.relay.answer_lost(lost, malformed=False)
        else:
            self.relay.answer_ended()
        await self.run(keep=keep)


def head_of(framed: bytes) -> bytes:
    """Return the first line of a chunk."""
    return framed[: framed.index(b"\n") + 1]


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
        if not relay.chunk_received(framed, head_of(framed)):
            relay.body_received(data)

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


async def test_a_stream_is_not_open_before_its_first_event() -> None:
    """Some servers send the role before they have read the prompt."""
    stage = Stage()
    opening = asyncio.create_task(stage.relay.opened())
    stage.stream(role(), ping(), role())
    await steps()
    assert not opening.done()
    stage.parts(token("a"))
    await opening
    stage.relay.answer_ended()
    assert stage.relay.held_body() == role() + ping() + role() + token("a")


@pytest.mark.parametrize(
    ("ending", "parts"),
    [
        (Ending.DONE, []),
        (Ending.DONE, [ping(), role()]),
        (Ending.DONE, [b"proxy error: Failed to read"]),
        (Ending.DONE, [token("a")[:-1]]),
        (Ending.STOP, [ping()]),
        (Ending.NAMED, [named_event({"type": "message_start"})]),
    ],
)
async def test_a_stream_that_ends_without_an_event_is_a_failure(
    ending: Ending, parts: list[bytes]
) -> None:
    """In time for another worker to be asked."""
    stage = Stage(ending)
    opening = asyncio.create_task(stage.relay.opened())
    stage.stream(*parts)
    stage.relay.answer_ended()
    with pytest.raises(WorkerError) as info:
        await opening
    assert info.value.code is Code.WORKER_INCOMPLETE
    assert not isinstance(info.value, ReportedError)


@pytest.mark.parametrize(
    ("ending", "last"),
    [
        (Ending.DONE, b"data: [DONE]\n"),  # its blank line is all that it lacks
        (Ending.DONE, error_event("no")[:-1]),
        (Ending.STOP, event({"stop": True})[:-1]),
        (Ending.BODY, ping()),
    ],
)
async def test_a_stream_that_ends_with_its_mark_is_complete(
    ending: Ending, last: bytes
) -> None:
    stage = Stage(ending)
    stage.stream(last)
    stage.relay.answer_ended()
    await stage.relay.opened()


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
        (True, Code.WORKER_PROTOCOL, "Worker w sent something that is not HTTP."),
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


async def test_many_small_pieces_go_on_as_one() -> None:
    """Each piece that was held costs a write; what matters is that none is lost."""
    stage = Stage()
    pings = [b": %d\n\n" % number for number in range(MOST_HELD)]
    await stage.play(*pings, role() + token("a"), finish() + done())
    assert len(stage.sink.writes) == 1
    for ping_ in pings:
        assert ping_ in stage.sent
    assert token("a") in stage.sent


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


@pytest.mark.parametrize("before", [ping(), role(), role() + token("a")])
def test_an_error_is_early_until_something_was_passed_on(before: bytes) -> None:
    """What is held can be taken back."""
    stage = Stage()
    stage.stream(before + error_event("late"))
    error = stage.relay.early_error()
    assert error is not None
    assert error.message == "late"


@pytest.mark.parametrize("part", [token("error"), ping(), error_event("half")[:-1]])
def test_without_an_error_event_there_is_no_early_error(part: bytes) -> None:
    stage = Stage()
    stage.stream(part)
    assert stage.relay.early_error() is None


async def test_an_error_later_on_is_not_early() -> None:
    stage = Stage()
    stage.stream(token("a"))
    running = stage.running()
    await steps()
    stage.parts(error_event("late"))
    assert stage.relay.early_error() is None
    running.cancel()


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


async def test_a_loss_of_an_answer_in_one_piece_is_reported() -> None:
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
        (200, EVENTS, True, True),
        (200, EVENTS, False, False),
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
    assert stage.relay.chunk_received(framed, head_of(framed))
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
    stage.client.send(b"own")
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


USAGE = {"input_tokens": 1, "cache_read_input_tokens": 289, "output_tokens": 1}


@pytest.mark.parametrize("ending", list(Ending))
async def test_the_usage_that_a_stream_begins_with_is_kept(ending: Ending) -> None:
    """A `message_start` is long past when the stream ends; others report it there."""
    stage = Stage(ending, path="/v1/messages")
    start = named_event({"type": "message_start", "message": {"usage": USAGE}})
    delta = named_event({"type": "content_block_delta", "usage": {"input_tokens": 7}})
    stage.stream(start, delta, *[token("a")] * 40)
    running = stage.running()
    await steps()
    running.cancel()
    await steps()
    expected = Usage() if ending is Ending.DONE else Usage(290, None, Prefill(1, 289))
    assert stage.relay.end.usage == expected


@pytest.mark.parametrize("size", [1, 7, 300, TAIL - 1, TAIL, 3 * TAIL])
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
        assert len(tail) >= min(len(body), TAIL)
        assert len(tail) <= 16 * max(size, TAIL)
    running.cancel()


# --- What is remembered -----------------------------------------------------------


async def test_all_that_was_passed_on_is_remembered(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """What was held, and what came then, however it is cut."""
    for size in [1, 7, 240, TAIL - 1, TAIL, 3 * TAIL]:
        for number in [0, 1, 5, 12, 13, 60]:
            with case((size, number)):
                stage = Stage()
                stage.stream(ping(), role())
                running = stage.running(keep=1 << 20)
                await steps()
                body = ping() + role()
                for count in range(number):
                    part = (b"%d," % count * size)[:size]
                    deliver(stage.relay, part)
                    body += part
                assert stage.relay.relayed() == body
                running.cancel()


SIZES = st.lists(
    st.sampled_from([1, 2, 50, 240, 999, TAIL, 20_000]) | st.integers(1, 3000),
    max_size=40,
)


@given(SIZES, st.booleans(), st.booleans())
@example([1] * 13 + [20_000], True, True)
@example([20_000] + [1] * 13, False, True)
@example([240] * 25, True, False)
async def test_huge_and_tiny_parts_are_remembered_alike(
    sizes: list[int], whole: bool, chunked: bool
) -> None:
    stage = Stage(chunked=chunked)
    stage.stream(role())
    running = stage.running(keep=1 << 20)
    await steps()
    body = role()
    for number, size in enumerate(sizes):
        part = (token(str(number)) * (1 + size // 200))[:size]
        if whole:
            framed = chunk(part)
            assert stage.relay.chunk_received(framed, head_of(framed))
        else:
            stage.parts(part)
        body += part
    assert stage.relay.relayed() == body
    running.cancel()


@pytest.mark.parametrize("number", [1, 7, 13, 14, 100])
async def test_no_more_is_remembered_than_is_worth_it(number: int) -> None:
    parts = [token(str(count)) for count in range(number)]
    size = len(b"".join([role(), *parts]))
    kept = {1: False, size - 1: False, size: True, size + 1: True}
    for keep, remembered in kept.items():
        stage = Stage()
        with pytest.raises(WorkerError):
            await stage.play(role(), *parts, lost="reset", keep=keep)
        assert stage.relay.bytes == size
        expected = b"".join([role(), *parts]) if remembered else None
        assert stage.relay.relayed() == expected


@pytest.mark.parametrize("number", [0, 3, 30])
async def test_without_a_wish_nothing_is_remembered(number: int) -> None:
    stage = Stage()
    with pytest.raises(WorkerError):
        await stage.play(role(), *[token("a")] * number, lost="reset")
    assert stage.relay.relayed() is None


async def test_what_the_hub_adds_is_not_remembered() -> None:
    stage = Stage()
    await stage.play(role(), finish(), keep=1 << 20)
    assert stage.sent.endswith(chunk(done()))
    assert stage.relay.relayed() == role() + finish()


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


async def test_a_client_is_not_given_up_because_the_event_loop_was_held_up() -> None:
    """It may have read meanwhile: timers come before sockets."""
    stage = Stage()
    stage.stream(role())
    stage.sink.buffered = WRITE_BUFFER + 1
    running = asyncio.create_task(stage.run(write_timeout=0.05))
    await steps()
    time.sleep(0.25)  # noqa: ASYNC251 (no callback runs meanwhile)
    asyncio.get_running_loop().call_later(0.001, stage.sink.room.set)
    stage.parts(done())
    stage.relay.answer_ended()
    await running


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


async def test_what_comes_behind_the_end_is_not_passed_on() -> None:
    stage = Stage()
    await stage.play(role(), done())
    before = stage.sent
    stage.parts(token("late"))
    late = chunk(token("late"))
    stage.relay.chunk_received(late, head_of(late))
    assert stage.sent == before


# --- An answer that does not go on ------------------------------------------------


async def test_a_stream_that_stops_is_ended_by_its_reader() -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    for seconds in (1, 4, 5):
        stage.relay.check(now=100 + seconds, gap=5, silence=50)
    await steps()
    assert not running.done()
    stage.parts(ping())  # is no event
    stage.relay.check(now=106.1, gap=5, silence=50)
    with pytest.raises(WorkerError) as info:
        await running
    error = info.value
    assert (error.code, error.detail) == (Code.WORKER_SLOW, "no event for 5 s")


async def test_the_time_without_a_sign_of_life_is_shown() -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    look = functools.partial(stage.relay.check, gap=50, silence=50)
    assert look(stage.clock.advance(1)) == 0  # it begins with the first look
    assert look(stage.clock.advance(3)) == 3
    stage.parts(ping())  # is heard, though it is no event
    assert look(stage.clock.advance(2)) == 2
    stage.parts(token("a"))
    assert look(stage.clock.advance(4)) == 0
    running.cancel()


async def test_a_worker_that_is_down_is_not_waited_for() -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    stage.relay.abandon()
    with pytest.raises(WorkerError) as info:
        await running
    error = info.value
    assert (error.code, error.detail) == (Code.WORKER_SLOW, "the worker is down")


async def test_each_event_starts_the_clock_anew() -> None:
    stage = Stage()
    stage.stream(role())
    running = stage.running()
    await steps()
    for seconds in range(1, 100, 4):
        stage.parts(token("a"))
        stage.relay.check(now=seconds, gap=5, silence=50)
    await steps()
    assert not running.done()
    running.cancel()


async def test_an_answer_in_one_piece_need_only_be_heard() -> None:
    stage = Stage()
    stage.relay.head_received(200, JSON)
    stage.parts(b"{")
    running = stage.running()
    await steps()
    for _ in range(3):
        stage.relay.check(stage.clock.advance(40), gap=5, silence=50)
        stage.parts(b" ")
    await steps()
    assert not running.done()
    stage.relay.check(stage.clock.advance(40), gap=5, silence=50)
    stage.relay.check(stage.clock.advance(51), gap=5, silence=50)
    with pytest.raises(WorkerError) as info:
        await running
    assert info.value.detail == "no byte for 50 s"


async def test_while_the_client_does_not_read_the_clock_stands_still() -> None:
    stage = Stage()
    stage.stream(role())
    stage.sink.buffered = WRITE_BUFFER + 1
    running = stage.running()
    await steps()
    for seconds in range(1, 1000, 100):
        stage.relay.check(now=seconds, gap=5, silence=50)
    assert not running.done()
    stage.sink.room.set()
    await steps()
    stage.relay.check(now=906, gap=5, silence=50)
    await steps()
    assert not running.done()
    stage.relay.check(now=907, gap=5, silence=50)
    with pytest.raises(WorkerError):
        await running


# --- The end ----------------------------------------------------------------------

MESSAGE = [named_event({"type": kind}) for kind in ("message_start", "message_delta")]
COMPLETE = {
    "done": (Ending.DONE, [role(), finish(), done()]),
    "only done": (Ending.DONE, [role(), done()]),
    "native": (Ending.STOP, [event({"content": "a"}), event({"stop": True})]),
    "messages": (Ending.NAMED, [*MESSAGE, named_event({"type": "message_stop"})]),
    **{
        kind: (Ending.NAMED, [named_event({"type": f"response.{kind}"})])
        for kind in ("completed", "incomplete")
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


@pytest.mark.parametrize(("ending", "parts"), COMPLETE.values(), ids=COMPLETE.keys())
async def test_with_its_mark_a_stream_is_complete(
    ending: Ending, parts: list[bytes]
) -> None:
    """A client that leaves then has not missed anything."""
    for number in (0, len(parts)):
        stage = Stage(ending)
        stage.stream()
        running = stage.running()
        await steps()
        stage.parts(*parts[:number])
        running.cancel()
        await steps()
        assert stage.relay.complete is (number > 0)


async def test_nothing_is_passed_on_when_its_reader_has_left() -> None:
    stage = Stage()
    stage.stream(role(), token("a"))
    running = stage.running()
    await steps()
    running.cancel()
    await steps()
    sent = stage.sent
    stage.parts(token("b"))
    assert stage.sent == sent


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
    """What came is passed on; how it ended decides what is reported."""
    stage = Stage(ending)
    with pytest.raises(WorkerError) as info:
        await stage.play(*parts, lost=lost)
    assert stage.sent == b"".join(map(chunk, parts))
    assert info.value.code is (Code.WORKER_LOST if lost else Code.WORKER_INCOMPLETE)
    assert not isinstance(info.value, ReportedError)


@pytest.mark.parametrize("lost", ["", "reset"])
async def test_a_stream_with_its_own_error_gets_no_other(lost: str) -> None:
    stage = Stage()
    with pytest.raises(ReportedError):
        await stage.play(role(), error_event("no"), lost=lost)
    assert stage.sent == chunk(role()) + chunk(error_event("no"))


@pytest.mark.parametrize("lost", ["", "reset"])
@pytest.mark.parametrize("number", [1, 30])
async def test_a_response_that_failed_is_passed_on_as_a_failure(
    number: int, lost: str
) -> None:
    """However long its last event is."""
    stage = Stage(Ending.NAMED)
    stage.sink.room.set()
    closing = b"event: response.failed\n"
    parts = [*MESSAGE, closing, *[b"data: " + b"x" * 1000 + b"\n"] * number, b"\n"]
    with pytest.raises(ReportedError):
        await stage.play(*parts, lost=lost)
    assert stage.sent == b"".join(map(chunk, parts))
    assert stage.relay.end.complete
    assert not stage.relay.complete


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


# --- A server that reports its failure --------------------------------------------

FAILURE = error_event("engine died")
# The bytes in front of it, those that reach the client, and those behind it.
FAILED_STREAMS = {
    "alone": (b"", b"", b""),
    "named": (b"event: error\n", b"", b""),
    "behind a comment": (b": ping\n\n", b": ping\n\n", b""),
    "behind a token": (token("c"), token("c"), b""),
    "before the end": (b"", b"", done()),
}


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(
    ("before", "passed", "behind"), FAILED_STREAMS.values(), ids=FAILED_STREAMS
)
async def test_no_part_of_a_failure_is_passed_on(
    before: bytes,
    passed: bytes,
    behind: bytes,
    eol: bytes,
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """However its bytes arrive; the answer can continue on another worker."""
    failed = (before + FAILURE + behind).replace(b"\n", eol)
    passed = (role() + token("a") + passed).replace(b"\n", eol)
    for at in range(len(failed)):
        stage = Stage(chunked=False)
        stage.stream((role() + token("a")).replace(b"\n", eol))
        run = asyncio.create_task(
            pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
        )
        await steps()
        for part in filter(None, (failed[:at], failed[at:])):
            deliver(stage.relay, part)
        with pytest.raises(WorkerError, match="engine died"):
            await run
        # What lacks its blank line gets it with the continuation.
        assert stage.sent.rstrip(b"\r\n") == passed.rstrip(b"\r\n")
        assert passed.startswith(stage.sent)
        assert stage.relay.relayed() == stage.sent
        if not at:  # in one piece, of which only what the client gets counts
            assert stage.relay.events == passed.count(b"data: ")


async def test_events_that_are_split_are_passed_on_in_order(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """Byte by byte as well, although each may be the first one of a failure."""
    events = (b"id: 5\n" + token("b"), b": ping\n\n", finish(), done())
    for size in (1, 7, 50, 90):
        stage = Stage(chunked=False)
        stage.stream(role(), token("a"))
        run = asyncio.create_task(
            pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
        )
        await steps()
        rest = b"".join(events)
        for at in range(0, len(rest), size):
            deliver(stage.relay, rest[at : at + size])
        stage.relay.answer_ended()
        await run
        assert stage.sent == role() + token("a") + rest
        assert stage.relay.complete


async def test_an_event_that_is_complete_does_not_wait_for_the_next_one(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """Its blank line may consist of any line ends; half of a CRLF is one, too."""
    for eol in (b"\n", b"\r\n", b"\r"):
        event = b'data: {"a":1}\n\n'.replace(b"\n", eol)
        for at in range(len(event)):
            stage = Stage(chunked=False)
            stage.stream(role(), token("a"))
            run = asyncio.create_task(
                pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
            )
            await steps()
            for part in filter(None, (event[:at], event[at:])):
                deliver(stage.relay, part)
            assert stage.sent == role() + token("a") + event
            stage.relay.answer_ended()
            with pytest.raises(WorkerError, match="before it was complete"):
                await run


async def test_the_middle_of_an_event_is_not_taken_for_a_beginning(
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """A long event comes in many pieces; the first letter of one means nothing."""
    stage = Stage(chunked=False)
    stage.stream(role(), token("a"))
    run = asyncio.create_task(
        pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
    )
    await steps()
    passed = role() + token("a")
    middle = b"data of it", b"id", b"event: error"
    for part in (token("b" * 99)[:120], *middle, b'"}}]}\n', b"\n", b"\n"):
        deliver(stage.relay, part)
        passed += part
        assert stage.sent == passed
    for part in (b"event: err", b"or\n", FAILURE[:-1], b"\n"):
        deliver(stage.relay, part)
        assert stage.sent == passed
    with pytest.raises(WorkerError, match="engine died"):
        await run


async def test_each_choice_is_counted_although_its_event_is_split() -> None:
    stage = Stage(chunked=False)
    stage.stream(role(), token("a"))
    tally = Tally(Ending.DONE, 1)
    run = asyncio.create_task(
        pass_on(stage.relay, stage.client, keep=1 << 20, tally=tally, reports=False)
    )
    await steps()
    rest = finish() + done()
    stage.parts(rest[:9], rest[9:])
    stage.relay.answer_ended()
    await run
    assert stage.sent == role() + token("a") + rest
    assert stage.relay.complete


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (JSON, [b'{"data":[{"embedding":[0.5', b"e-05,0.25]}]}"]),
        ([(b"content-type", b"text/plain")], [b"As ", b"it is."]),
        ([(b"content-type", b"text/plain")], [b"A", b"data: ", b'{"error":']),
    ],
)
async def test_what_is_no_stream_has_no_events_to_wait_for(
    kind: list[tuple[bytes, bytes]],
    parts: list[bytes],
    deliver: Callable[[Relay, bytes], None],
) -> None:
    """Although a part of it begins as an event does."""
    stage = Stage(Ending.BODY, chunked=False)
    stage.relay.head_received(200, kind)
    stage.parts(parts[0])
    run = asyncio.create_task(
        pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
    )
    await steps()
    for part in parts[1:]:
        deliver(stage.relay, part)
        assert stage.sent.endswith(part)
    stage.relay.answer_ended()
    await run
    assert stage.sent == b"".join(parts)


async def test_a_worker_is_heard_while_an_event_is_incomplete() -> None:
    stage = Stage(chunked=False)
    stage.stream(role(), token("a"))
    run = asyncio.create_task(
        pass_on(stage.relay, stage.client, keep=1 << 20, reports=False)
    )
    await steps()
    stage.relay.check(stage.clock(), 60, 10)
    stage.clock.advance(9)
    stage.parts(b"event: err")
    stage.clock.advance(9)
    assert stage.relay.check(stage.clock(), 60, 10) == 9
    stage.parts(b"or\n" + FAILURE)
    with pytest.raises(WorkerError, match="engine died"):
        await run
