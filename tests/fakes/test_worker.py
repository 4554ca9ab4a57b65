"""The fakes have to be right before anything can be tested with them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.cases import case
from tests.fakes.client import TruncatedError, Wire
from tests.fakes.clock import Clock
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    json_reply,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Step,
    chat_stream,
    close,
    expect_eof,
    not_read_body,
    notify,
    read_body,
    reset,
    send,
    stall,
    stream_of,
    wait,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer


async def connect(worker: ScriptedWorker) -> Wire:
    return await Wire.connect("127.0.0.1", worker.port)


async def test_tests_run_on_the_loop_of_production() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


# --- Clock ------------------------------------------------------------------------


def test_clock_moves_only_when_advanced() -> None:
    clock = Clock(5.0)
    assert clock() == clock() == 5.0
    assert clock.advance(1.5) == clock() == 6.5
    with pytest.raises(ValueError, match="go back"):
        clock.advance(-1)


# --- ScriptedWorker ---------------------------------------------------------------


async def test_control_routes_look_like_llama_server() -> None:
    async with ScriptedWorker("qwen", "phi", slots=3, n_ctx=512) as worker:
        async with await connect(worker) as wire:
            await wire.get("/health")
            health = await wire.read_response()
            await wire.get("/v1/models")
            models = await wire.read_response()
            await wire.get("/props")
            props = (await wire.read_response()).json()
        assert (health.status, health.json()) == (200, {"status": "ok"})
        assert health.header("access-control-allow-origin") == ""
        rows = models.json()["data"]
        assert [row["id"] for row in rows] == ["qwen", "phi"]
        assert rows[0]["meta"]["n_ctx"] == 512
        assert props["total_slots"] == 3
        assert props["default_generation_settings"]["n_ctx"] == 512
        assert props["build_info"]
        assert worker.requests == []
        assert [request.reused for request in worker.control] == [False, True, True]


async def test_loading_is_503_on_every_path() -> None:
    async with ScriptedWorker() as worker:
        worker.loading = True
        for path in ("/health", "/nope", CHAT):
            async with await connect(worker) as wire:
                await wire.post(path, WHOLE)
                response = await wire.read_response()
            assert response.status == 503
            assert response.json()["error"]["message"] == "Loading model"
            assert response.header("connection") == "close"


async def test_a_health_route_that_stalls_does_not_affect_the_rest() -> None:
    async with ScriptedWorker() as worker:
        worker.hang_health = True
        async with await connect(worker) as hanging, await connect(worker) as wire:
            await hanging.get("/health")
            await worker.pinged()
            await wire.post(CHAT, WHOLE)
            assert (await wire.read_response()).status == 200


async def test_down_refuses_and_comes_back_on_the_same_port() -> None:
    async with ScriptedWorker(up=False) as worker:
        with pytest.raises(ConnectionRefusedError):
            await connect(worker)
        await worker.up()
        port = worker.port
        async with await connect(worker) as wire:
            await wire.get("/health")
            await wire.read_response()
            await worker.down()
            assert await wire.read_eof() == b""
        with pytest.raises(ConnectionRefusedError):
            await connect(worker)
        await worker.up()
        async with await connect(worker) as wire:
            await wire.get("/health")
            assert (await wire.read_response()).status == 200
        assert worker.port == port
        assert " up, 0 requests" in repr(worker)


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/completions",
        "/completion",
        "/infill",
        "/v1/messages",
        "/v1/responses",
        "/embeddings",
        "/v1/rerank",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/v1/messages/count_tokens",
    ],
)
async def test_default_answers_are_complete(path: str) -> None:
    async with ScriptedWorker("qwen") as worker:
        async with await connect(worker) as wire:
            await wire.post(path, WHOLE)
            assert isinstance((await wire.read_response()).json(), dict)
            await wire.post(path, STREAM)
            ending = await wire.read_to_end()
            assert ending.clean
            if ending.raw.endswith(b"\r\n0\r\n\r\n"):
                assert await wire.read_eof() == b""  # as llama-server does
        assert worker.connections == 1
        assert [request.json() for request in worker.requests] == [WHOLE, STREAM]


async def test_stream_has_the_bytes_of_a_llama_server() -> None:
    async with ScriptedWorker() as worker:
        worker.script(*chat_stream([" no", " to", "wu"], reason="length"))
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            ending = await wire.read_to_end()
            assert await wire.read_eof() == b""
    head, _, body = ending.raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\n")
    # Lengths as recorded: the role and the first token share a chunk.
    sizes = [b"1e2\r\n", b"e8\r\n", b"e7\r\n", b"1c5\r\n", b"e\r\ndata: [DONE]\n\n\r\n"]
    at = -1
    for size in sizes:
        assert (at := body.find(size, at + 1)) >= 0, size
    assert body.startswith(sizes[0])
    assert body.endswith(sizes[-1] + b"0\r\n\r\n")


async def test_usage_comes_with_the_finish_event() -> None:
    async with ScriptedWorker() as worker:
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM | {"stream_options": {"include_usage": True}})
            *_, finished, usage, last = await wire.read_events()
    assert b'"finish_reason":"stop"' in finished
    assert b"timings" not in finished
    assert b'"choices":[],' in usage
    assert b'"total_tokens":23' in usage
    assert last == done()


async def test_scripts_are_played_in_order_then_the_default() -> None:
    async with ScriptedWorker() as worker:
        worker.default(send(json_reply({"n": 0})))
        worker.script(send(json_reply({"n": 1})))
        worker.script(send(json_reply({"n": 2}, 500)))
        async with await connect(worker) as wire:
            answers = []
            for _ in range(3):
                await wire.post(CHAT, WHOLE)
                answers.append(await wire.read_response())
        assert [(a.status, a.json()["n"]) for a in answers] == [
            (200, 1),
            (500, 2),
            (200, 0),
        ]


async def test_route_script_wins_even_for_control() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/health", send(json_reply({"status": "odd"})))
        async with await connect(worker) as wire:
            await wire.get("/health")
            assert (await wire.read_response()).json() == {"status": "odd"}


async def test_barriers_hold_a_script_until_released() -> None:
    async with ScriptedWorker() as worker:
        worker.script(
            send(sse_head()),
            send(chunk(role() + token("a"))),
            notify("halfway"),
            wait("go"),
            send(chunk(finish() + done())),
            send(last_chunk()),
        )
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            await worker.reached("halfway")
            assert await wire.read_event() == role()
            assert await wire.read_event() == token("a")
            request = worker.requests[0]
            assert not request.finished.is_set()
            worker.release("go")
            assert await wire.read_event() == finish()
            assert await wire.read_event() == done()
            assert await wire.read_event() is None
            assert not request.closed_by_peer.is_set()


async def test_semaphore_releases_token_by_token() -> None:
    gate = asyncio.Semaphore(0)
    async with ScriptedWorker() as worker:
        worker.script(*stream_of(3, gate))
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            assert await wire.read_event() == role()
            assert await wire.read_event() == token(" t0")
            for number in (1, 2):
                with pytest.raises(AssertionError, match="no event within"):
                    await wire.read_event(timeout=0.02)
                gate.release()
                assert await wire.read_event() == token(f" t{number}")


async def test_a_peer_that_closes_ends_the_script_and_is_recorded() -> None:
    async with ScriptedWorker() as worker:
        worker.script(send(sse_head()), stall())
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            await wire.read_head()
            request = await worker.received()
            assert worker.open == 1
        await worker.idle()
        assert request.closed_by_peer.is_set()
        assert request.closed_by_peer_at is not None
        assert request.finished.is_set()


@pytest.mark.parametrize("how", ["close", "abort", "half_close"])
async def test_expect_eof_sees_every_way_to_close(how: str) -> None:
    async with ScriptedWorker() as worker:
        worker.script(send(sse_head()), notify("sent"), expect_eof())
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            await worker.reached("sent")
            getattr(wire, how)()
            await asyncio.wait_for(worker.requests[0].finished.wait(), DEADLINE)
            await worker.idle()


async def test_expect_eof_fails_the_block_if_the_peer_does_not_close() -> None:
    async def stay() -> None:
        async with ScriptedWorker() as worker:
            worker.script(expect_eof(0.01))
            async with await connect(worker) as wire:
                await wire.post(CHAT, STREAM)
                await wire.read_eof()

    with pytest.raises(AssertionError, match="no hang-up"):
        await stay()


async def test_reset_is_a_reset() -> None:
    async with ScriptedWorker() as worker:
        worker.script(reset())
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            loop = asyncio.get_running_loop()
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(wire._sock, 1)


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"GARBAGE\r\n\r\n", "illegal request line"),
        (
            (
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            "beside Transfer-Encoding",
        ),
        (b"GET / HTTP/1.1\r\n\r\n", "Host"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2, "pipelined"),
    ],
)
async def test_violations_fail_the_block(payload: bytes, problem: str) -> None:
    async def violate() -> None:
        async with ScriptedWorker() as worker, await connect(worker) as wire:
            await wire.send(payload)
            await wire.read_until(b"\r\n\r\n")

    with pytest.raises(AssertionError, match=problem):
        await violate()


async def test_request_is_recorded_as_it_came() -> None:
    async with ScriptedWorker(keep_body=10) as worker:
        async with await connect(worker) as wire:
            head = (
                b"POST /tokenize?a=b HTTP/1.1\r\nHost: x\r\nX-Two: 1\r\nx-two: 2\r\n"
                b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            await wire.send(head)
            assert (
                await wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            )
            await wire.send(b"8\r\nabcdefgh\r\n8\r\nijklmnop\r\n0\r\n\r\n")
            await wire.read_response()
        request = worker.requests[0]
        assert (request.method, request.target) == ("POST", "/tokenize?a=b")
        assert request.path == "/tokenize"
        assert request.head == head
        assert request.values("X-Two") == ["1", "2"]
        assert (request.body, request.body_length) == (b"", 16)
        assert request.complete


async def test_unread_body_brings_the_sender_to_a_halt() -> None:
    body = b"x" * (32 << 20)
    async with ScriptedWorker(receive_buffer=8 << 10) as worker:
        worker.script(not_read_body(), notify("head"), wait("go"))
        async with await connect(worker) as wire:
            sending = asyncio.create_task(wire.post(CHAT, body))
            await worker.reached("head")
            _, pending = await asyncio.wait({sending}, timeout=0.2)
            assert pending
            sending.cancel()
            await asyncio.wait({sending})
            worker.release("go")


async def test_body_can_be_read_in_part() -> None:
    body = b"x" * (1 << 20)
    async with ScriptedWorker() as worker:
        worker.script(read_body(1000), send(json_reply({}, 413)), close())
        async with await connect(worker) as wire:
            sending = asyncio.create_task(wire.post(CHAT, body))
            request = await worker.received()
            await asyncio.wait_for(request.finished.wait(), DEADLINE)
            await asyncio.wait({sending})
            sending.exception()
        assert 1000 <= request.body_length < len(body)
        assert not request.complete


async def test_an_unread_answer_is_held_back() -> None:
    block = b"x" * (1 << 20)
    async with ScriptedWorker() as worker:
        worker.script(send(sse_head()), notify("on"), *[send(chunk(block))] * 64)
        wire = await Wire.connect("127.0.0.1", worker.port, receive_buffer=8 << 10)
        async with wire:
            await wire.post(CHAT, STREAM)
            await worker.reached("on")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(worker.requests[0].finished.wait(), 0.2)
            assert worker.requests[0].sent < 32 << 20


async def test_unfinished_upload_is_no_violation() -> None:
    async with ScriptedWorker() as worker:
        async with await connect(worker) as wire:
            await wire.send(
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab"
            )
            request = await worker.received()
        await worker.idle()
        assert (request.complete, request.body) == (False, b"ab")
        assert request.closed_by_peer.is_set()


async def test_waiting_in_vain_names_the_condition() -> None:
    async with ScriptedWorker() as worker:
        with pytest.raises(AssertionError, match="still not 1 requests"):
            await worker.received(1, timeout=0.01)
        with pytest.raises(AssertionError, match="'x' was not reached"):
            await worker.reached("x", timeout=0.01)


def test_steps_show_and_compare() -> None:
    assert send(b"abc") == send(b"abc") != send(b"abd")
    assert repr(send(b"abc")) == "send(b'abc')"
    assert isinstance(stall(), Step)
    assert len(repr(send(b"x" * 1000))) < 80


# --- Wire -------------------------------------------------------------------------

PREFIX = sse_head() + chunk(token("a"))


async def test_wire_recognises_a_clean_end() -> None:
    async with ScriptedWorker() as worker:
        for sent, clean in [
            (PREFIX + last_chunk(), True),
            (PREFIX, False),
            (PREFIX + b"0\r\n", False),
            (PREFIX + b"5\r\nab", False),
            (PREFIX + b"zz\r\n", False),
            (sse_head(), False),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", False),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", True),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", True),
            (b"HTTP/1.1 200", False),
            (b"", False),
        ]:
            for end in [close, reset]:
                with case((sent, clean, end)):
                    # A reset may overtake what was sent and not read yet.
                    worker.script(send(sent), wait("read"), end())
                    async with await connect(worker) as wire:
                        await wire.post(CHAT, STREAM)
                        await wire.read_until(sent)
                        wire._inbox += sent
                        worker.release("read")
                        ending = await wire.read_to_end()
                        by_length = b"HTTP/1.0" not in sent
                        assert ending.clean == (clean and (by_length or end is close))
                        assert ending.raw == sent
                        assert ending.reset == (
                            end is reset and not ending.clean and b"zz" not in sent
                        )


async def test_wire_reads_events_across_chunks() -> None:
    events = [role(), token("ä"), token("\U0001f600"), done()]
    raw = b"".join(events)
    async with ScriptedWorker() as worker:
        pieces = [send(chunk(raw[at : at + 7])) for at in range(0, len(raw), 7)]
        worker.script(send(sse_head()), *pieces, send(last_chunk()))
        async with await connect(worker) as wire:
            await wire.post(CHAT, STREAM)
            assert (await wire.read_head()).header("Server") == "llama.cpp"
            assert await wire.read_events() == events
            assert (await wire.read_to_end()).clean
            # The connection was kept: the next answer is a new one.
            await wire.post(CHAT, WHOLE)
            assert (await wire.read_response()).status == 200
        assert worker.requests[1].reused


async def test_wire_never_passes_off_a_truncated_answer() -> None:
    async with ScriptedWorker() as worker:
        for read in (Wire.read_event, Wire.read_response, Wire.read_events):
            worker.script(send(sse_head() + chunk(b"data: 1")), close())
            async with await connect(worker) as wire:
                await wire.post(CHAT, STREAM)
                with pytest.raises(TruncatedError):
                    await read(wire)


async def test_wire_reads_the_answer_to_head() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/health", send(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n"))
        async with await connect(worker) as wire:
            await wire.get("/health", method="HEAD")
            assert (await wire.read_response()).body == b""


# --- Real workers -----------------------------------------------------------------


def test_tiny_model_is_the_same_everywhere(tiny_model: Path) -> None:
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert digest.startswith("6a68d7f3e5d5")


@pytest.mark.real
async def test_llama_server_answers_a_streamed_chat(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    server = llama_server(tiny_model, name="alpha", slots=2, ctx=1024)
    async with await Wire.connect("127.0.0.1", server.port) as wire:
        await wire.post(CHAT, STREAM | {"max_tokens": 5, "temperature": 0})
        events = await wire.read_events()
        assert await wire.read_eof() == b""
    assert events[0].startswith(b'data: {"choices":[{"finish_reason":null,"index":0,')
    assert b'"model":"alpha"' in events[0]
    assert events[-1] == done()
    server.kill()
    assert server.wait() == -signal.SIGKILL
    with pytest.raises(ConnectionRefusedError):
        await Wire.connect("127.0.0.1", server.port)
    port = server.port
    assert server.start().port == port


@pytest.mark.real
async def test_fake_has_the_events_of_the_real_one(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    """Same keys in the same order, event by event and chunk by chunk."""
    server = llama_server(tiny_model)
    request = STREAM | {"max_tokens": 3, "temperature": 0}
    shapes = []
    async with ScriptedWorker() as worker:
        worker.script(*chat_stream([" no", " to", "wu"], reason="length"))
        for port in (server.port, worker.port):
            async with await Wire.connect("127.0.0.1", port) as wire:
                await wire.post(CHAT, request)
                ending = await wire.read_to_end()
            headers = sorted(ending.response.headers)  # versions order them differently
            shapes.append((headers, _shape(ending.response.body)))
    assert shapes[0] == shapes[1]


def _shape(body: bytes) -> list[object]:
    """Reduce events to their keys, and the texts that greedy sampling decides."""

    def keys(value: object) -> object:
        if isinstance(value, dict):
            # A build reports its number.
            reported = {**value, "system_fingerprint": None} if "id" in value else value
            return [(key, keys(item)) for key, item in reported.items()]
        if isinstance(value, list):
            return [keys(item) for item in value]
        return value if isinstance(value, str) and len(value) < 20 else None

    datas = [line[6:] for line in body.split(b"\n") if line]
    return [data if data == b"[DONE]" else keys(json.loads(data)) for data in datas]


@pytest.mark.real
async def test_embedding_model_embeds(
    embed_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    import openai

    server = llama_server(embed_model, name="embed", args=("--embedding",))
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused")
    async with client:
        reply = await client.embeddings.create(model="embed", input=["hello", "you"])
    assert [len(row.embedding) for row in reply.data] == [64, 64]


@pytest.mark.real
async def test_slow_model_can_be_cut(
    slow_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    server = llama_server(slow_model, name="slow", slots=1, ctx=2048)
    async with await Wire.connect("127.0.0.1", server.port) as wire:
        await wire.post(CHAT, STREAM | {"max_tokens": 1000})
        for _ in range(3):
            await wire.read_event()
        server.signal(signal.SIGKILL)
        assert not (await wire.read_to_end()).clean


@pytest.mark.real
def test_llama_server_that_cannot_start_shows_the_reason(
    llama_server: Callable[..., LlamaServer],
) -> None:
    # It writes this itself; what it logs, it may lose when it ends.
    with pytest.raises(pytest.fail.Exception, match=r"(?s)did not start.*no-such-flag"):
        llama_server(None, args=("--no-such-flag",))
