"""A malicious worker can affect only its own request.

While a worker attacks, a good stream goes through the hub: each of its events is seen
before the next one is sent.  Afterwards the connection of the attack is not used again,
and the log is short.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from gollama_proxy.proxy.relay import HOLD_LIMIT
from gollama_proxy.telemetry.lines import TextFormatter
from gollama_proxy.upstream.connection import MAX_HEAD, MAX_HEADERS
from gollama_proxy.wire.description import Check
from gollama_proxy.wire.resume import MAX_EVENT
from tests.fakes.asks import CHAT, MIB
from tests.fakes.cases import case
from tests.fakes.client import Ending
from tests.fakes.clock import Clock
from tests.fakes.hub import NO_BREAKER, RunningHub, running_hub
from tests.fakes.replies import (
    chunk,
    done,
    error_reply,
    event,
    finish,
    head,
    json_reply,
    last_chunk,
    role,
    sse_head,
    timings_of,
    token,
)
from tests.fakes.script import (
    Script,
    chat_stream,
    close,
    flood,
    give_way,
    notify,
    pause,
    reset,
    send,
    stall,
    stream_of,
    wait,
)
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker
from tests.upstream.test_probe import ping

pytestmark = pytest.mark.usefixtures("frequent_rounds")

GOOD, BAD = "good", "bad"
OK = json_reply({"n": 1})
# What the kernel may hold of a flood when the hub has closed the connection already.
IN_SOCKETS = 8 * MIB
MOST_LOGGED = 2000  # bytes, of one attack


def chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def raw(*lines: str, status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    """Build a head that no builder with manners would build."""
    return "\r\n".join([f"{version} {status}", *lines, "", ""]).encode("latin-1")


GAP = 1.5  # seconds on the hub's clock, which only the tests advance
HANGS = "hangs"
HANG = notify(HANGS)  # the step of a script from which on it hangs
LENGTH = "Content-Length: 5"
CHUNKED = "Transfer-Encoding: chunked"
EVENTS = "Content-Type: text/event-stream"
HELLO = b"hello"
CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"
LARGE = b"x" * (64 << 10)
BOMB = gzip.compress(bytes(10 * MIB), 1)
BOMB_LENGTH = f"Content-Length: {len(BOMB)}"
CLOSE = "Connection: close"

# What is no answer at all.
REFUSED: dict[str, Script] = {
    "endless headers": (
        send(b"HTTP/1.1 200 OK\r\n"),
        flood(b"X: %b\r\n" % LARGE[:900]),
    ),
    "an endless header": (send(b"HTTP/1.1 200 OK\r\nX: "), flood(LARGE)),
    "an endless name": (send(b"HTTP/1.1 200 OK\r\n"), flood(LARGE)),
    "an endless reason": (send(b"HTTP/1.1 200 "), flood(LARGE)),
    "many headers": (send(raw(*["a: b"] * (MAX_HEADERS + 1), LENGTH) + HELLO),),
    "a flood of 100": (flood(head(100) * 50),),
    "102": (send(raw(status="102 Processing") + OK),),
    "103": (send(raw("Link: </x>", status="103 Early Hints") + OK),),
    "101": (send(raw("Upgrade: h2c", "Connection: upgrade", status="101 Go") + OK),),
    "302": (send(raw("Location: http://[::1]:9/", LENGTH, status="302 F") + HELLO),),
    "304": (send(raw(status="304 Not Modified")),),
    "status 999": (send(raw(LENGTH, status="999 X") + HELLO),),
    "status 20": (send(raw(LENGTH, status="20 X") + HELLO),),
    "a size of 17 digits": (send(raw(CHUNKED) + b"F" * 17 + b"\r\nhello"), stall()),
    "a negative size": (send(raw(CHUNKED) + b"-5\r\nhello\r\n0\r\n\r\n"),),
    "a size with 0x": (send(raw(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n"),),
    "a size without CR": (send(raw(CHUNKED) + b"5\nhello\n0\n\n"),),
    "an endless extension": (send(raw(CHUNKED) + b"5;"), flood(LARGE)),
    "CR in the reason": (send(b"HTTP/1.1 200 O\rK\r\n" + raw(LENGTH)[17:] + HELLO),),
    "CR in a header": (send(raw("X: a\rb", LENGTH) + HELLO),),
    "NUL in a header": (send(raw("X: a\x00b", LENGTH) + HELLO),),
    "LF for CRLF": (send(raw(LENGTH).replace(b"\r", b"") + HELLO),),
    "a folded header": (send(raw("X: a\r\n b", LENGTH) + HELLO),),
    "a space before the colon": (send(raw("X : a", LENGTH) + HELLO),),
    "no name": (send(raw(": a", LENGTH) + HELLO),),
    "two lengths": (send(raw(LENGTH, LENGTH) + HELLO),),
    "two other lengths": (send(raw(LENGTH, "Content-Length: 6") + HELLO),),
    "a list of lengths": (send(raw("Content-Length: 5, 5") + HELLO),),
    "a signed length": (send(raw("Content-Length: +5") + HELLO),),
    "length and chunks": (send(raw(LENGTH, CHUNKED) + CHUNKS),),
    "chunks and length": (send(raw(CHUNKED, LENGTH) + CHUNKS),),
    "gzip, chunked": (send(raw("Transfer-Encoding: gzip, chunked") + CHUNKS),),
    "chunked, gzip": (send(raw("Transfer-Encoding: chunked, gzip") + CHUNKS), close()),
    "xchunked": (send(raw("Transfer-Encoding: xchunked") + CHUNKS), close()),
    "a bomb": (send(raw("Content-Encoding: gzip", BOMB_LENGTH) + BOMB),),
    "brotli": (send(raw("Content-Encoding: br", LENGTH) + HELLO),),
    "HTTP/0.9": (send(HELLO), close()),
    "a page": (send(b"<html>" + LARGE), close()),
    "HTTP/2.0": (send(raw(LENGTH, version="HTTP/2.0") + HELLO),),
    "HTTP/1.3": (send(raw(LENGTH, version="HTTP/1.3") + HELLO),),
    "another protocol": (send(b"SSH-2.0-OpenSSH_9.2p1\r\n"),),
    "nothing": (close(),),
    "a reset": (reset(),),
}
# What begins as an answer and is none.
CUT: dict[str, Script] = {
    "a length too long": (send(raw("Content-Length: 50") + HELLO), close()),
    "a giant chunk": (send(raw(CHUNKED) + b"7FFFFFFFFFFFFFFF\r\nhello"), close()),
    "a giant chunk that stalls": (
        send(raw(CHUNKED) + b"F" * 16 + b"\r\nhello"),
        HANG,
        stall(),
    ),
    "no CRLF behind a chunk": (send(raw(CHUNKED) + b"5\r\nhelloXX0\r\n\r\n"),),
    # The shape of CVE-2026-69244 (aiohttp's C parser): a bad size, alone in a read.
    "a malformed size, later": (
        send(raw(CHUNKED) + b"5\r\nhello\r\n"),
        pause(0.01),
        send(b"zz\r\n"),
        pause(0.01),
        send(bytes(50)),
    ),
    "a malformed end, later": (
        send(raw(CHUNKED) + b"5\r\nhel"),
        pause(0.01),
        send(b"lo\r"),
        pause(0.01),
        send(b"X\n5\r\n"),
    ),
    "endless trailers": (
        send(raw(CHUNKED) + b"5\r\nhello\r\n0\r\n"),
        flood(b"X: %b\r\n" % LARGE[:900]),
    ),
    "an endless trailer": (
        send(raw(CHUNKED) + b"5\r\nhello\r\n0\r\nX: "),
        flood(LARGE),
    ),
    "endless extensions": (
        send(raw(CHUNKED)),
        flood(b"1;%b\r\nx\r\n" % LARGE),
    ),
}
# What a client may have, because it is what HTTP makes of it.
HARMLESS: dict[str, tuple[Script, int, bytes]] = {
    "bytes behind": ((send(raw(LENGTH) + HELLO + b"HTTP/1.1 200 OK\r\n"),), 200, HELLO),
    "bytes behind, later": ((send(raw(LENGTH) + HELLO), send(OK)), 200, HELLO),
    "NUL in the reason": (
        (send(b"HTTP/1.1 200 O\x00K\r\n" + raw(LENGTH, CLOSE)[17:] + HELLO),),
        200,
        HELLO,
    ),
    "a cookie": (
        (send(raw("Set-Cookie: a=b", CLOSE, LENGTH) + HELLO),),
        200,
        HELLO,
    ),
    "no text": (
        (send(raw(LENGTH, CLOSE) + b"\xff\xfe\x00\xfe\xff"),),
        200,
        b"\xff\xfe\x00\xfe\xff",
    ),
    "obs-text": ((send(raw("X: \xff", CLOSE, LENGTH) + HELLO),), 200, HELLO),
    "HTTP/1.0": ((send(raw(version="HTTP/1.0") + HELLO), close()), 200, HELLO),
    "204 with a body": ((send(raw(LENGTH, status="204 N") + HELLO),), 204, b""),
    "204 with chunks": ((send(raw(CHUNKED, status="204 N") + CHUNKS),), 204, b""),
}


COMMENT = b": \n\n"


class Scene:
    """A hub with a good stream through it, and a worker that attacks it."""

    def __init__(self, hub: RunningHub, worker: ScriptedWorker) -> None:
        self.hub = hub
        self.worker = worker
        self.seen = 0  # events of the good stream
        self.log = io.StringIO()
        self._seen_before = 0

    def __repr__(self) -> str:
        return f"<Scene of {self.seen} good events>"

    async def attack(self, script: Script, *, stream: bool) -> Ending:
        """Send a request to the bad worker; return how it ended.

        Time passes only while a script hangs.
        """
        self.worker.script(*script)
        async with await self.hub.open(CHAT, chat(BAD, stream=stream)) as wire:
            reading = asyncio.create_task(wire.read_to_end(), name="fake client")
            if HANG in script:
                await self.worker.reached(HANGS)
                await self._pass_time_until(reading)
            ending = await reading
        await self.worker.requests[-1].finished.wait()
        return ending

    async def _pass_time_until(self, ended: asyncio.Task[Ending]) -> None:
        """Let no more time pass than the good stream can bear."""
        while not ended.done():
            await self._events(1, ended)
            self.hub.pass_time(GAP / 3)

    async def _events(self, more: int, ended: asyncio.Task[Ending]) -> None:
        at = self.seen + more
        await until(lambda: self.seen >= at or ended.done())

    async def conclude(self) -> None:
        """Check that the attack has changed nothing for other requests."""
        at = self.seen
        await until(lambda: self.seen >= at + 3)
        self.worker.script(send(raw(CLOSE, LENGTH) + HELLO), close())
        assert (await self.hub.post(CHAT, chat(BAD))).body == HELLO
        assert self.seen >= self._seen_before + 3
        assert not self.worker.requests[-1].reused, (
            "the connection of the attack was used again"
        )
        logged = self.log.getvalue()
        assert len(logged) < MOST_LOGGED, logged[:3000]
        lines = logged.splitlines()
        assert all(line[:2] == "20" for line in lines), "a forged line"
        self.log.seek(0)
        self.log.truncate()
        self._seen_before = self.seen


# Built once, since that takes longer than most of these tests.
PACE = wait("the next token")
GOOD_STREAM = stream_of(3_000, "the next token", model=GOOD)


@contextlib.asynccontextmanager
async def beside_a_good_stream(**settings: Any) -> AsyncIterator[Scene]:
    """Keep a good stream running, event by event; check the log at the end."""
    gate = asyncio.Semaphore(0)
    settings = {
        "timeouts__first_token": 2,
        "timeouts__gap": GAP,
        "timeouts__silence": GAP,
        "retry__patience": 0,
        **NO_BREAKER,
    } | settings
    async with (
        ScriptedWorker(GOOD) as good,
        ScriptedWorker(BAD) as bad,
        running_hub(good, bad, clock=Clock(), **settings) as hub,
    ):
        passed = wait(gate)
        good.script(*(passed if step == PACE else step for step in GOOD_STREAM))
        wire = await hub.open(CHAT, chat(GOOD, stream=True))
        await wire.read_event()
        await wire.read_event()
        scene = Scene(hub, bad)
        handler = logging.StreamHandler(scene.log)
        handler.setFormatter(TextFormatter())

        async def follow() -> None:
            while True:
                gate.release()
                reported = await wire.read_event()
                scene.seen += 1
                assert reported == token(f" t{scene.seen}", model=GOOD)
                await asyncio.sleep(0.01)

        following = asyncio.create_task(follow(), name="fake client")
        root = logging.getLogger()
        root.addHandler(handler)
        before = root.level
        root.setLevel(logging.DEBUG)
        try:
            yield scene
            await scene.conclude()
        finally:
            root.setLevel(before)
            root.removeHandler(handler)
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@STREAM
async def test_invalid_answers_are_a_bad_gateway(stream: bool) -> None:
    # One attempt: otherwise the worker would be asked again.
    async with beside_a_good_stream(retry__attempts=1) as scene:
        for name, script in REFUSED.items():
            with case(name):
                ending = await scene.attack(script, stream=stream)
                assert ending.clean
                assert ending.response.status == 502
                assert ending.response.json()["error"]["code"] in (
                    "worker_bad_response",
                    "worker_connection_lost",
                )
                assert scene.worker.requests[-1].sent < IN_SOCKETS
                await scene.conclude()


@STREAM
async def test_later_violations_cut_the_answer(stream: bool) -> None:
    """The client has the beginning, and can detect that the rest is missing."""
    async with beside_a_good_stream() as scene:
        for name, script in CUT.items():
            with case(name):
                ending = await scene.attack(script, stream=stream)
                assert not ending.clean
                assert ending.response.status == 200
                assert HELLO.startswith(ending.response.body[:5].strip(b"x"))
                assert scene.worker.requests[-1].sent < IN_SOCKETS
                await scene.conclude()


@STREAM
async def test_harmless_oddities_are_passed_on_sanitised(stream: bool) -> None:
    async with beside_a_good_stream() as scene:
        for name, (script, status, body) in HARMLESS.items():
            with case(name):
                response = (await scene.attack(script, stream=stream)).response
                assert (response.status, response.body) == (status, body)
                assert not {name for name, _ in response.headers} & {"set-cookie", "x"}
                await scene.conclude()


# --- Time -------------------------------------------------------------------------


async def test_a_head_that_drips_is_cut_at_the_deadline() -> None:
    drip = [step for _ in range(999) for step in (pause(0.02), send(b"X: a\r\n"))]
    script = (send(b"HTTP/1.1 200 OK\r\n"), HANG, *drip)
    async with beside_a_good_stream() as scene:
        ending = await scene.attack(script, stream=True)
    assert ending.response.status == 504
    assert ending.response.json()["error"]["code"] == "worker_timeout"


async def test_an_event_that_drips_is_cut_at_the_gap() -> None:
    drip = [step for _ in range(999) for step in (pause(0.01), send(chunk(b": \n\n")))]
    script = (send(sse_head() + chunk(role() + token("a"))), HANG, *drip)
    async with beside_a_good_stream() as scene:
        ending = await scene.attack(script, stream=True)
    assert not ending.clean
    assert b'"worker_slow"' in ending.response.body


async def test_comments_before_the_first_event_cost_little() -> None:
    """Each byte is looked at once: thousands of reads, and others have their turns."""
    comments = [send(chunk(COMMENT)), give_way()] * 5000
    script = (send(sse_head()), *comments, HANG, stall())
    async with beside_a_good_stream() as scene:
        ending = await scene.attack(script, stream=True)
    assert ending.response.status == 504


async def test_more_comments_than_are_held_are_the_beginning_of_an_answer() -> None:
    comments = [send(chunk(COMMENT * 1000))] * 100
    script = (send(sse_head()), *comments, HANG, stall())
    assert len(COMMENT) * 1000 * 100 > HOLD_LIMIT
    async with beside_a_good_stream(rescue__enabled=False) as scene:
        ending = await scene.attack(script, stream=True)
    assert ending.response.status == 200
    assert not ending.clean
    assert b'"worker_slow"' in ending.response.body


# --- Memory -----------------------------------------------------------------------


async def test_an_answer_without_an_end_costs_no_memory() -> None:
    """Of 10 MB without a line end, of an event of 100 MB: nothing is kept."""
    size = 100 * MIB
    script = (
        send(raw(f"Content-Length: {size + 6}", EVENTS) + b"data: "),
        *[send(LARGE)] * (size // len(LARGE)),
    )
    async with beside_a_good_stream() as scene:
        scene.worker.script(*script)
        wire = await scene.hub.open(CHAT, chat(BAD, stream=True))
        await wire.read_head()
        before = psutil.Process().memory_info().rss
        most, received = 0, 0
        async with asyncio.timeout(DEADLINE):
            while data := await asyncio.get_running_loop().sock_recv(wire._sock, MIB):
                received += len(data)
                most = max(most, psutil.Process().memory_info().rss)
        wire.abort()
    assert received > size * 0.9
    assert most - before < 24 * MIB


async def test_an_endless_event_does_not_continue_an_answer() -> None:
    """Events that have to be whole to be understood have a size limit."""
    async with beside_a_good_stream(
        rescue__enabled=True, retry__attempts=2, retry__patience=2
    ) as scene:
        first = (send(sse_head() + chunk(role() + token("a", model=BAD))), reset())
        scene.worker.script(*first)
        scene.worker.script(
            send(sse_head() + chunk(role()) + b"fffffff\r\ndata: "), flood(LARGE)
        )
        async with await scene.hub.open(CHAT, chat(BAD, stream=True)) as wire:
            ending = await wire.read_to_end()
        assert not ending.clean
        assert ending.response.body.count(b'"error"') == 1
        assert scene.worker.requests[1].sent < MAX_EVENT + IN_SOCKETS


ENDLESS = {
    "an event": (sse_head() + b"fffffff\r\ndata: ", LARGE),
    "events": (sse_head() + chunk(role()), chunk(token("a" * 1000) * 10)),
    "choices": (
        sse_head() + chunk(role()),
        chunk(b"".join(event({"choices": [{"index": n}]}) for n in range(1, 5000))),
    ),
}


@pytest.mark.parametrize(("first", "more"), ENDLESS.values(), ids=ENDLESS)
async def test_an_assembled_answer_has_a_limit(first: bytes, more: bytes) -> None:
    """The limit is enforced as bytes arrive, since such an answer has no end."""
    settings = {"upstream__assemble": CHAT, "limits__answer": 1 << 20}
    # On a busy machine it takes a while to read all this.
    settings |= {"timeouts__gap": 60, "timeouts__silence": 60}
    async with beside_a_good_stream(**settings) as scene:
        # Then it is asked as the client has asked, which the hub need not keep.
        scene.worker.script(send(first), flood(more))
        ending = await scene.attack((send(error_reply(400, "no")),), stream=False)
        assert ending.response.status == 400
        assert scene.worker.requests[0].sent < MIB + IN_SOCKETS


# --- False values -----------------------------------------------------------------

NONSENSE: list[Any] = [-1, 0, 10**15, 10**400, math.pi, True, None, "3", [], {}]


@pytest.mark.parametrize("number", NONSENSE, ids=lambda value: repr(value)[:20])
async def test_invalid_token_counts_are_not_charged(number: Any) -> None:
    """It counts for a subject's limit, and the speed of the worker is learnt of it."""
    reported = {"predicted_n": number, "prompt_n": number, "cache_n": number}
    reported |= {"predicted_ms": number, "prompt_ms": number}
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens"), number)
    async with beside_a_good_stream() as scene:
        token_ = scene.hub.token("bob", tpm=1000)
        for _ in range(2):
            scene.worker.script(
                send(sse_head() + chunk(role() + token("a"))),
                send(
                    chunk(finish(timings=timings_of() | reported, usage=usage) + done())
                ),
                send(last_chunk()),
                close(),
            )
            async with await scene.hub.open(
                CHAT, chat(BAD, stream=True), token_
            ) as wire:
                ending = await wire.read_to_end()
            assert ending.clean
            assert ending.response.status == 200, "the limit was used up by a lie"
        assert (await scene.hub.get("/metrics")).status == 200


async def test_a_continuation_with_numbers_of_any_size_is_passed_on() -> None:
    usage = {"prompt_tokens": 10**400, "completion_tokens": 10**400}
    settings = {"rescue__enabled": True, "retry__attempts": 2, "retry__patience": 2}
    async with beside_a_good_stream(**settings) as scene:
        first = (send(sse_head() + chunk(role() + token("abc", model=BAD))), reset())
        scene.worker.script(*first)
        scene.worker.script(
            *chat_stream(["abc", "d"], usage=True, model=BAD)[:-4],
            send(chunk(finish(usage=usage) + done()) + last_chunk()),
            close(),
        )
        async with await scene.hub.open(CHAT, chat(BAD, stream=True)) as wire:
            ending = await wire.read_to_end()
        assert ending.response.status == 200


async def test_an_invalid_model_list_does_not_harm_the_catalogue() -> None:
    names = ["<script>", "../../etc", "\x1b[2J", "a\nb", "x" * 10_000, '"', "a" * 300]
    listed = {"data": [{"id": n, "meta": {"n_ctx": 10**400}} for n in names]}
    props = {"total_slots": 10**400, "default_generation_settings": {"n_ctx": -3}}
    async with ScriptedWorker() as worker:
        worker.on("/v1/models", send(json_reply(listed)))
        worker.on("/props", send(json_reply(props)))
        async with running_hub(worker) as hub:
            reported = (await hub.get("/v1/models")).json()["data"]
            assert [model["id"] for model in reported] == [
                "<script>",
                "../../etc",
                '"',
                "a" * 300,
            ]
            assert {model["gollama"]["context"] for model in reported} == {None}
            assert (await hub.get("/metrics")).status == 200
            assert (await hub.post(CHAT, chat("a\nb"))).status == 404


async def test_an_answer_before_the_request_is_not_used() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        async with running_hub(f"http://127.0.0.1:{port}") as hub:
            response = await hub.post(CHAT, chat(BAD))
        assert response.status == 503, response
    finally:
        server.close()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/props"])
async def test_answers_to_pings_are_bounded_too(path: str) -> None:
    """The reason is short and on one line, as it is logged."""
    for name, script in REFUSED.items():
        with case(name):
            async with ScriptedWorker() as worker:
                worker.on(path, *script)
                finding = await ping(worker, timeout=0.5)
                worker.violations.clear()
            assert finding.check in Check
            assert len(finding.reason) < 200
            assert finding.reason.isprintable()


def test_the_limits_are_larger_than_any_good_worker_needs() -> None:
    assert len(sse_head()) * 10 < MAX_HEAD
    assert sse_head().count(b"\r\n") * 10 < MAX_HEADERS
    assert len(event({})) < MAX_EVENT
