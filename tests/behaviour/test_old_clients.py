"""HTTP/1.0, `Connection: close`, pipelining, HEAD: what old clients rely on."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.client import Response, request_head
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    finish,
    head,
    last_chunk,
    role,
    token,
)
from tests.fakes.script import chat_stream, close, event_stream, reset, send, stream_of
from tests.fakes.worker import ScriptedWorker

STREAMED = role() + token("a") + finish() + done()
KEEP = [("Connection", "keep-alive")]
CLOSE = [("Connection", "close")]


def tokens(response: Response) -> set[str]:
    """Return the values of the Connection headers of a reply."""
    return {
        part.strip().lower()
        for value in response.values("connection")
        for part in value.split(",")
    }


# --- HTTP/1.0 ---------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[], KEEP, CLOSE], ids=["", "keep", "close"])
async def test_an_http_1_0_client_gets_a_stream_up_to_the_end_of_its_connection(
    headers: list[tuple[str, str]],
) -> None:
    """Chunks are unknown to it; keep-alive would leave it without an end."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*event_stream(role(), token("a"), finish() + done()))
        async with await hub.wire() as wire:
            await wire.post(CHAT, STREAM, hub.token(), headers=headers, version="1.0")
            response = await wire.read_response()
            assert await wire.read_eof() == b""
    assert response.status == 200
    assert response.header("transfer-encoding") is None
    assert response.header("content-length") is None
    assert "keep-alive" not in tokens(response)
    assert response.body == STREAMED


async def test_an_http_1_0_client_sees_each_event_at_once() -> None:
    gate = asyncio.Semaphore(0)
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*stream_of(10, gate))
        async with await hub.wire() as wire:
            await wire.post(CHAT, STREAM, hub.token(), version="1.0")
            assert await wire.read_event() == role()
            for number in range(10):
                assert await wire.read_event() == token(f" t{number}")
                gate.release()


async def test_the_connection_of_an_http_1_0_client_is_closed_without_keep_alive() -> (
    None
):
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.post(CHAT, WHOLE, hub.token(), version="1.0")
            response = await wire.read_response()
            assert await wire.read_eof() == b""
    assert response.json() == chat_completion(" no towu")
    assert response.header("content-length") == str(len(response.body))


async def test_an_http_1_0_client_may_keep_its_connection() -> None:
    """The header is needed, as the default is the opposite."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            for _ in range(3):
                await wire.post(CHAT, WHOLE, hub.token(), headers=KEEP, version="1.0")
                response = await wire.read_response()
                assert response.status == 200
                assert "keep-alive" in tokens(response)
                assert response.header("content-length")


async def test_an_answer_in_chunks_reaches_an_http_1_0_client_without_them() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        framing = head(200, [("Transfer-Encoding", "chunked")])
        parts = [send(chunk(b"x" * 1000))] * 500
        worker.script(send(framing), *parts, send(last_chunk()))
        async with await hub.wire() as wire:
            await wire.post(CHAT, WHOLE, hub.token(), headers=KEEP, version="1.0")
            response = await wire.read_response()
    assert response.body == b"x" * 500_000
    assert response.header("transfer-encoding") is None


async def test_an_http_1_0_client_can_detect_a_truncated_stream() -> None:
    # Where it is not continued, that is.
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, rescue__enabled=False) as hub,
    ):
        worker.script(*event_stream(role(), token("a"))[:-2], reset())
        async with await hub.wire() as wire:
            await wire.post(CHAT, STREAM, hub.token(), version="1.0")
            ending = await wire.read_to_end()
    body = ending.response.body
    assert body.startswith(role() + token("a") + b'data: {"error":{')
    assert b"[DONE]" not in body


@pytest.mark.parametrize(
    ("path", "token_", "status"), [(CHAT, None, 401), ("/nope", "x", 404)]
)
async def test_an_http_1_0_client_gets_errors_with_a_length(
    path: str, token_: str | None, status: int
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.post(path, WHOLE, token_, version="1.0")
            response = await wire.read_response()
            await wire.read_eof()
    assert response.status == status
    assert response.header("content-length") == str(len(response.body))


async def test_an_http_1_0_client_need_not_name_a_host() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.send(b"GET /livez HTTP/1.0\r\n\r\n")
            assert (await wire.read_response()).status == 200


async def test_an_http_1_0_client_gets_no_100_continue() -> None:
    """`100 Continue` came with HTTP/1.1 (RFC 9110, 10.1.1)."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        headers = [("Expect", "100-continue")]
        async with await hub.wire() as wire:
            await wire.post(CHAT, WHOLE, hub.token(), headers=headers, version="1.0")
            ending = await wire.read_to_end()
    assert ending.raw.startswith(b"HTTP/1.0 200 ")


# --- Connection: close ------------------------------------------------------------


@pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_a_connection_is_closed_if_the_client_asks_for_it(
    payload: object,
) -> None:
    """After a whole answer, framed as usual."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.post(CHAT, payload, hub.token(), headers=CLOSE)
            response = await wire.read_response()
            assert await wire.read_eof() == b""
    assert response.status == 200
    assert "close" in tokens(response)
    framed = response.header("content-length") or response.header("transfer-encoding")
    assert framed


async def test_a_client_that_closes_does_not_close_the_workers_connection() -> None:
    """Its connection and that of the hub are two."""
    # A worker closes behind a stream: what is assembled keeps no connection.
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, upstream__assemble="") as hub,
    ):
        for _ in range(3):
            async with await hub.open(CHAT, WHOLE, headers=CLOSE) as wire:
                assert (await wire.read_response()).status == 200
        assert [request.reused for request in worker.requests] == [False, True, True]
        assert not any(request.values("connection") for request in worker.requests)


# --- Pipelining -------------------------------------------------------------------


def post_bytes(hub: RunningHub, payload: bytes) -> bytes:
    length = [("Content-Length", str(len(payload)))]
    return request_head("POST", CHAT, hub.token(), length) + payload


def whole(number: int) -> bytes:
    return b'{"messages":[],"seed":%d}' % number


def stream(number: int) -> bytes:
    return b'{"messages":[],"stream":true,"seed":%d}' % number


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    """One at a time: llama-server loses what is pipelined, so it never is."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            worker.script(*chat_stream(["first"]))
            bodies = [stream(1), whole(2), stream(3), whole(4)]
            await wire.send(b"".join(post_bytes(hub, body) for body in bodies))
            first = await wire.read_response()
            kinds = [first.header("content-type")]
            kinds += [
                (await wire.read_response()).header("content-type") for _ in bodies[1:]
            ]
        assert token("first") in first.body
        events, json = "text/event-stream", "application/json"
        assert kinds == [events, json, events, json]
        assert [request.json()["seed"] for request in worker.requests] == [1, 2, 3, 4]


async def test_a_pipelined_request_waits_for_the_stream_before_it() -> None:
    """Its worker is not asked before, and its answer does not get in between."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            worker.script(*chat_stream(["a", "b"], pace="go"))
            await wire.send(post_bytes(hub, stream(1)) + post_bytes(hub, whole(2)))
            assert await wire.read_event() == role()
            assert await wire.read_event() == token("a")
            assert len(worker.requests) == 1
            worker.release("go")
            events = await wire.read_events()
            assert events[0] == token("b")
            assert events[-1] == done()
        async with await hub.wire() as wire:
            await wire.send(post_bytes(hub, whole(3)) + post_bytes(hub, whole(4)))
            for _ in range(2):
                assert (await wire.read_response()).status == 200


@pytest.mark.parametrize("token_", [None, "nonsense"])
async def test_each_pipelined_request_needs_its_own_token(token_: str | None) -> None:
    poison = request_head("POST", CHAT, token_, [("Content-Length", "2")]) + b"{}"
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.send(post_bytes(hub, whole(1)) + poison)
            assert (await wire.read_response()).status == 200
            assert (await wire.read_response()).status == 401
        assert len(worker.requests) == 1


async def test_a_refused_request_does_not_affect_the_next_one() -> None:
    refused = request_head("GET", "/nope")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.send(refused + post_bytes(hub, whole(1)))
            assert (await wire.read_response()).status == 404
            assert (await wire.read_response()).status == 200


async def test_no_answer_follows_a_truncated_stream() -> None:
    """The client could not find the beginning of the next answer."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*event_stream(role() + token("a"))[:-2], close())
        async with await hub.wire() as wire:
            await wire.send(post_bytes(hub, stream(1)) + post_bytes(hub, whole(2)))
            ending = await wire.read_to_end()
            assert not ending.clean
            assert ending.raw.count(b"HTTP/1.1 ") == 1
        assert len(worker.requests) == 1


# --- HEAD -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/health", "/v1/models", "/models", "/metrics"]
)
async def test_head_is_get_without_a_body(path: str) -> None:
    """With the headers that GET would have; the connection stays open."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            token = hub.token(scope="metrics")
            await wire.get(path, token, method="HEAD")
            bare = await wire.read_response()
            await wire.get(path, token)
            full = await wire.read_response()
    assert bare.status == full.status == 200
    assert bare.body == b""
    assert bare.header("content-type") == full.header("content-type")
    if path != "/metrics":  # which has changed meanwhile
        assert bare.header("content-length") == str(len(full.body))


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_head_is_not_allowed_where_get_is_not(path: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.get(path, hub.token(), method="HEAD")
            response = await wire.read_response()
            assert response.status == 405
            assert response.header("allow") == "POST"
            assert response.body == b""
            await wire.get("/livez")
            assert (await wire.read_response()).status == 200
        assert not worker.requests
