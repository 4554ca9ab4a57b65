"""An offer of another protocol is ignored (RFC 9110, 7.8), as a llama-server does."""

from __future__ import annotations

import json

import pytest

from tests.fakes.asks import CHAT
from tests.fakes.client import request_head
from tests.fakes.hub import running_hub
from tests.fakes.replies import MODEL
from tests.fakes.worker import ScriptedWorker

BODY = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "hello" * 20}]}
).encode()
JAVA = [
    ("Connection", "Upgrade, HTTP2-Settings"),
    ("HTTP2-Settings", "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"),
    ("Upgrade", "h2c"),
]
OFFERS = {
    "java.net.http, curl --http2": JAVA,
    "websocket": [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ],
    "a list": [("Connection", "keep-alive, Upgrade"), ("Upgrade", "h2c, websocket")],
    "TLS": [("Connection", "Upgrade"), ("Upgrade", "TLS/1.0")],
    "without Connection": [("Upgrade", "h2c")],
}


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("offer", OFFERS)
async def test_the_request_is_served_and_the_worker_gets_no_upgrade(
    offer: str, framing: str
) -> None:
    half = len(BODY) // 2
    pieces = [BODY[:half], BODY[half:]]
    field = ("Content-Length", str(len(BODY)))
    if framing == "chunks":
        field = ("Transfer-Encoding", "chunked")
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
        pieces.append(b"0\r\n\r\n")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        headers = [*OFFERS[offer], field]
        async with await hub.wire() as wire:
            await wire.send(request_head("POST", CHAT, hub.token(), headers))
            for piece in pieces:
                await wire.send(piece)
            response = await wire.read_response()
            await wire.read_eof()
        [request] = worker.requests
    assert response.status == 200
    assert response.header("upgrade") is None
    assert response.header("connection") == "close"
    names = {name for name, _ in request.headers}
    assert not names & {"upgrade", "http2-settings", "sec-websocket-key"}
    assert json.loads(request.body)["messages"] == json.loads(BODY)["messages"]


async def test_a_stream_and_a_request_without_a_body_are_served_too() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        body = json.loads(BODY) | {"stream": True}
        response = await hub.post(CHAT, body, headers=JAVA)
        assert response.body.endswith(b"data: [DONE]\n\n")
        assert (await hub.get("/v1/models", headers=JAVA)).status == 200


@pytest.mark.parametrize("offer", OFFERS)
async def test_bytes_after_an_upgrade_are_not_a_request(offer: str) -> None:
    """The parser drops what it has read beyond; the rest would begin in mid-request."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        headers = [*OFFERS[offer], ("Content-Length", str(len(BODY)))]
        request = request_head("POST", CHAT, hub.token(), headers) + BODY
        async with await hub.wire() as wire:
            await wire.send(request * 2)
            ending = await wire.read_eof()
        assert len(worker.requests) == 1
    assert ending.count(b"HTTP/1.1 ") == 1
