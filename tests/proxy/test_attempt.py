"""One attempt: the request as a worker sees it, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gollama_proxy import __version__
from gollama_proxy.config import load as config
from gollama_proxy.upstream.pool import PROBATION
from gollama_proxy.wire.errors import Code, RequestError, WorkerError
from tests.fakes.attempts import BODY, Bench, bench
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    error_reply,
    finish,
    head,
    json_reply,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Step,
    answer,
    close,
    expect_eof,
    notify,
    read_body,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

WHOLE = answer(chat_completion("hello"))
EVENTS = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
STREAMED = chunk(role() + token("a")) + chunk(finish() + done()) + last_chunk()
STREAM = (send(sse_head() + STREAMED),)  # the connection stays open


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# --- The request as a worker sees it ----------------------------------------------


async def test_the_head_is_the_hubs_own() -> None:
    """Written by the hub, in its order, whatever the client sent."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        headers = [(b"Accept", b"*/*"), (b"traceparent", b"00-1-2-03")]
        await made.exchange(headers=headers)
        request = await worker.received()
    assert request.head.decode().split("\r\n") == [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {worker.name}",
        f"User-Agent: gollama-proxy/{__version__}",
        "Content-Type: application/json",
        "Accept: */*",
        "traceparent: 00-1-2-03",
        f"Content-Length: {len(BODY)}",
        "",
        "",
    ]
    assert request.body == BODY


async def test_a_worker_behind_a_prefix_and_a_key(tmp_path: Any) -> None:
    async with ScriptedWorker() as worker:
        file = tmp_path / "gollama.toml"
        file.write_text(
            f'[[workers]]\nurl = "{worker.url}/llama/"\napi_key_env = "K"\n'
        )
        made = Bench(config.load(file, {"K": "sk-1"}, {}))
        worker.on("/llama/tokenize", *answer({"tokens": []}))
        relay = await made.exchange(path="/tokenize")
        request = await worker.received()
        made.pool.close()
    assert relay.status == 200
    assert request.target == "/llama/tokenize"
    assert request.header("authorization") == "Bearer sk-1"


@pytest.mark.parametrize("window", [b"", b'{"a":'])
@pytest.mark.parametrize("rest", [[], [b"1}"], [b"1", b",", b'"b":2}' * 1000]])
async def test_a_body_of_unknown_length_goes_in_chunks(
    window: bytes, rest: list[bytes]
) -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(read_body(), *WHOLE)
        await made.exchange(window, rest=pieces(*rest), length=None)
        received = await worker.received()
    assert received.header("transfer-encoding") == "chunked"
    assert received.header("content-length") is None
    assert received.complete
    assert received.body == window + b"".join(rest)


async def test_a_long_body_of_known_length_keeps_its_length() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(read_body(), *WHOLE)
        rest = [bytes([65 + n]) * 50_000 for n in range(20)]
        await made.exchange(rest=pieces(*rest), length=len(BODY) + 1_000_000)
        received = await worker.received()
    assert received.header("content-length") == str(len(BODY) + 1_000_000)
    assert received.body == BODY + b"".join(rest)


# --- Connections used again -------------------------------------------------------


async def test_an_answered_request_leaves_its_connection_to_the_next() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        for _ in range(5):
            assert (await made.exchange()).status == 200
        assert worker.connections == 1
        assert [request.reused for request in worker.requests] == [False] + [True] * 4


@pytest.mark.parametrize(
    "script",
    [
        (send(error_reply(400, "no")),),  # has `Connection: close`
        (send(head(500, [("Content-Length", "0")])),),
        (send(head(503, [("Content-Length", "2")]) + b"{}"),),
        (send(json_reply({}) + b"behind the end"),),
        (send(head(200) + b"{}"), close()),
        (send(head(200, [("Content-Length", "2")], version="1.0") + b"{}"),),
    ],
    ids=["close", "500", "503", "behind", "fin", "http/1.0"],
)
async def test_answers_after_which_a_connection_is_closed(
    script: tuple[Step, ...],
) -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(*script)
        await made.exchange()
        await worker.idle()
        await made.exchange()
        assert worker.connections == 2


async def taught(worker: ScriptedWorker, made: Bench) -> None:
    """Teach the pool that its worker keeps connections after streams."""
    worker.script(*STREAM)
    await made.exchange()
    made.clock.advance(PROBATION)
    made.pool.close_stale()
    await worker.idle()


async def test_a_worker_that_keeps_connections_after_streams_is_learnt() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.default(*STREAM)
        await taught(worker, made)
        for _ in range(3):
            await made.exchange()
        assert [r.reused for r in worker.requests] == [False, False, True, True]


@pytest.mark.parametrize("end", [close(), reset()], ids=["close", "reset"])
async def test_a_connection_that_ends_after_a_stream_costs_nothing(end: Step) -> None:
    """What was learnt of another worker at this address is not true any more."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await taught(worker, made)
        worker.script(*STREAM)
        await made.exchange()
        worker.script(end)
        worker.default(*STREAM)
        for _ in range(3):
            assert (await made.exchange()).status == 200
        reused = [request.reused for request in worker.requests]
        assert reused == [False, False, True, False, False, False]


@pytest.mark.parametrize("length", [len(BODY) + 4, None])
async def test_what_streams_does_not_reuse_the_connection_of_a_stream(
    length: int | None,
) -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await taught(worker, made)
        worker.default(*STREAM)
        await made.exchange()
        worker.script(read_body(), *STREAM)
        await made.exchange(rest=pieces(b"more"), length=length)
        assert not any(request.reused for request in worker.requests)


@pytest.mark.parametrize(
    "script",
    [
        (send(head(500, EVENTS) + chunk(token("a")) + last_chunk()),),
        (send(sse_head() + chunk(token("a")) + last_chunk() + b"more"),),
        (send(head(200, [*EVENTS, ("Connection", "close")]) + STREAMED),),
    ],
    ids=["500", "behind", "close"],
)
async def test_streams_after_which_a_connection_is_closed(
    script: tuple[Step, ...],
) -> None:
    """Even where the worker is known to keep connections after streams."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await taught(worker, made)
        worker.script(*script)
        await made.exchange()
        await worker.idle()


async def test_a_stream_that_is_left_early_leaves_no_connection() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await taught(worker, made)
        worker.script(send(sse_head() + chunk(token("a"))), expect_eof())
        async with made.attempt() as attempt:
            await made.send(attempt)
        await worker.idle()


async def test_an_attempt_that_is_left_early_closes_its_connection() -> None:
    """Which is what makes llama-server stop generating."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(send(sse_head() + chunk(role() + token("a"))), expect_eof())
        async with made.attempt() as attempt:
            relay = await made.send(attempt)
            assert relay.status == 200
            assert repr(relay.connection) == "<Connection ACTIVE used=1>"
        await worker.idle()


async def test_an_attempt_that_is_cancelled_closes_its_connection() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(expect_eof())
        exchange = asyncio.create_task(made.exchange())
        await worker.received()
        exchange.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange
        await worker.idle()


async def test_an_attempt_that_never_began_leaves_nothing() -> None:
    async with bench("http://127.0.0.1:1") as made, made.attempt() as attempt:
        assert attempt.relay is None


# --- Connections that are dead already --------------------------------------------


async def stale(worker: ScriptedWorker, made: Bench, *script: Step) -> None:
    """Fill the pool with a connection whose next request gets this script."""
    worker.script(*WHOLE)
    worker.script(*script)
    await made.exchange()


@pytest.mark.parametrize("end", [close(), reset()])
async def test_a_used_connection_that_dies_unanswered_costs_nothing(end: Step) -> None:
    """The worker may have closed it a moment before the request came."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await stale(worker, made, end)
        assert (await made.exchange()).status == 200
        assert [request.reused for request in worker.requests] == [False, True, False]


async def test_a_request_is_sent_again_once() -> None:
    """A fresh connection that dies is the worker's fault."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await stale(worker, made, close())
        worker.script(close())
        with pytest.raises(WorkerError) as info:
            await made.exchange()
        assert info.value.code is Code.WORKER_LOST
        assert len(worker.requests) == 3


async def test_a_fresh_connection_that_dies_is_a_loss() -> None:
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(reset())
        with pytest.raises(WorkerError) as info:
            await made.exchange()
        assert info.value.code is Code.WORKER_LOST
        assert len(worker.requests) == 1


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ((send(head(200)), reset()), Code.WORKER_LOST),
        ((send(sse_head()), close()), Code.WORKER_LOST),
        ((send(b"garbage"), stall()), Code.WORKER_PROTOCOL),
    ],
    ids=["head", "stream", "garbage"],
)
async def test_a_used_connection_that_was_not_dead_is_not_tried_again(
    script: tuple[Step, ...], code: Code
) -> None:
    """The request may have been executed."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await stale(worker, made, *script)
        with pytest.raises(WorkerError) as info:
            await made.exchange()
        assert info.value.code is code
        assert [request.reused for request in worker.requests] == [False, True]


async def test_what_streams_gets_a_fresh_connection() -> None:
    """It could not be sent twice; the used one stays for others."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await stale(worker, made, read_body(), *WHOLE)
        await made.exchange(rest=pieces(b"more"), length=len(BODY) + 4)
        await made.exchange()
        assert [request.reused for request in worker.requests] == [False, False, True]
        assert worker.connections == 2


# --- Uploads that do not go well --------------------------------------------------


async def test_a_body_that_turns_out_bad_is_not_completed() -> None:
    """The client's error is reported, and the worker does not see the body end well."""

    async def bad() -> AsyncIterator[bytes]:
        yield b"1"
        raise RequestError(Code.INVALID_JSON, "twice")

    for length in (len(BODY) + 2, None):
        async with ScriptedWorker() as worker, bench(worker.url) as made:
            worker.script(read_body())
            with pytest.raises(RequestError, match="twice"):
                await made.exchange(rest=bad(), length=length)
            await worker.idle()
            assert not (await worker.received()).complete


async def test_an_answer_may_come_before_the_body_is_sent() -> None:
    """The upload ends with the attempt, and the connection with it."""
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1000)
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with ScriptedWorker() as worker, bench(worker.url) as made:
        worker.script(read_body(5000), send(error_reply(413, "too much")), stall())
        relay = await made.exchange(rest=endless(), length=1 << 30)
        assert relay.status == 413
        assert ended.is_set()
        await worker.idle()


async def test_a_worker_that_does_not_read_stops_the_upload() -> None:
    """The client is only read as fast as the worker reads."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            yield bytes(64 << 10)
            taken += 1

    async with ScriptedWorker(receive_buffer=4096) as worker, bench(worker.url) as made:
        worker.script(read_body(100_000), notify("enough"), wait("never"))
        sending = made.exchange(rest=endless(), length=1 << 40)
        exchange = asyncio.create_task(sending)
        await worker.reached("enough")
        before = -1
        async with asyncio.timeout(DEADLINE):
            while taken != before:  # as long as buffers of the kernel fill
                before = taken
                await asyncio.sleep(0.05)
        assert taken < 500
        exchange.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange


@pytest.mark.parametrize("url", ["http://127.0.0.1:1"])
async def test_a_worker_that_cannot_be_reached(url: str) -> None:
    async with bench(url) as made:
        with pytest.raises(WorkerError) as info:
            await made.exchange()
    assert info.value.code is Code.WORKER_UNREACHABLE
