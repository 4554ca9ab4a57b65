"""A stand-in for llama-server that streams tokens at a fixed pace and costs little.

    python -m benchmarks.paced_worker --port 9001 --rate 50

It speaks the part of llama-server that a proxy meets: the chunked event stream with
its connection closed at the end, the kept-open JSON answer, /health, /v1/models and
/props.  Every stream gets the same bytes, encoded once at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import httptools
import uvloop

MODEL = "paced"
SLOTS = 4096
CONTEXT = 4096
# libuv's timers count in milliseconds: a finer tick would not be kept.
TICK = 0.001


# --- What is on the wire ----------------------------------------------------------


def _event(choice: dict[str, Any], **more: Any) -> bytes:
    document = {
        "choices": [{"finish_reason": None, "index": 0, **choice}],
        "created": 1_795_346_022,
        "id": "chatcmpl-S5QmFoA4tGzUoVBZVxwSXaJvhGKMtpiY",
        "model": MODEL,
        "system_fingerprint": "b10068-571d0d5",
        "object": "chat.completion.chunk",
        **more,
    }
    return b"data: " + _encode(document) + b"\n\n"


def _encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def _answer(document: Any, status: bytes = b"200 OK") -> bytes:
    body = _encode(document)
    head = b"HTTP/1.1 %b\r\nServer: llama.cpp\r\nContent-Length: %d\r\n"
    return head % (status, len(body)) + b"Content-Type: application/json\r\n\r\n" + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Keep-Alive: timeout=5, max=100\r\n"
    b"Transfer-Encoding: chunked\r\n"
    b"Access-Control-Allow-Origin: \r\n"
    b"X-Accel-Buffering: no\r\n"
    b"Server: llama.cpp\r\n"
    b"Content-Type: text/event-stream\r\n\r\n"
)
ROLE_EVENT = _event({"delta": {"role": "assistant", "content": None}})
TOKEN_EVENT = _event({"delta": {"content": " we"}})
TOKEN_CHUNK = _chunk(TOKEN_EVENT)
# llama-server sends the role and the first token as one HTTP chunk.
STREAM_START = STREAM_HEAD + _chunk(ROLE_EVENT + TOKEN_EVENT)

COMPLETION = _answer(
    {
        "choices": [
            {
                "finish_reason": "stop",
                "index": 0,
                "message": {"role": "assistant", "content": "Yes."},
            }
        ],
        "created": 1_795_346_022,
        "model": MODEL,
        "system_fingerprint": "b10068-571d0d5",
        "object": "chat.completion",
        "usage": {"completion_tokens": 3, "prompt_tokens": 12, "total_tokens": 15},
        "id": "chatcmpl-S5QmFoA4tGzUoVBZVxwSXaJvhGKMtpiY",
    }
)
NOT_FOUND = _answer(
    {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}},
    b"404 Not Found",
)
PAGES = {
    b"/health": _answer({"status": "ok"}),
    b"/props": _answer(
        {
            "default_generation_settings": {"n_ctx": CONTEXT},
            "total_slots": SLOTS,
            "model_alias": MODEL,
            "build_info": MODEL,
        }
    ),
    b"/v1/models": _answer(
        {
            "object": "list",
            "data": [
                {
                    "id": MODEL,
                    "object": "model",
                    "created": 1_795_346_022,
                    "owned_by": "llamacpp",
                    "meta": {"n_ctx": CONTEXT, "n_ctx_train": CONTEXT},
                }
            ],
        }
    ),
}


def _stream_end(tokens: int, seconds: float) -> bytes:
    timings = {
        "cache_n": 0,
        "prompt_n": 12,
        "prompt_ms": 1.0,
        "prompt_per_token_ms": 0.083,
        "prompt_per_second": 12_000.0,
        "predicted_n": tokens,
        "predicted_ms": seconds * 1000,
        "predicted_per_token_ms": seconds * 1000 / tokens,
        "predicted_per_second": tokens / max(seconds, 1e-3),
    }
    finish = _event({"finish_reason": "length", "delta": {}}, timings=timings)
    return _chunk(finish) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


# --- Pace -------------------------------------------------------------------------


class Stream:
    """One answer under way: what is left of it, and where it goes."""

    __slots__ = ("left", "slot", "started", "tokens", "transport")

    def __init__(self, transport: asyncio.WriteTransport, tokens: int) -> None:
        self.transport = transport
        self.tokens = tokens
        self.left = tokens - 1  # the first token goes out with the head
        self.started = time.monotonic()
        self.slot: set[Stream] = set()

    def __repr__(self) -> str:
        return f"<Stream {self.tokens - self.left}/{self.tokens}>"

    def advance(self) -> bool:
        """Send the next token; false when it was the end that was sent."""
        if self.left > 0:
            self.left -= 1
            self.transport.write(TOKEN_CHUNK)
            return True
        seconds = time.monotonic() - self.started
        self.transport.write(_stream_end(self.tokens, seconds))
        self.transport.close()
        return False


class Wheel:
    """Gives each stream one token per turn; the streams are spread over the turn.

    Its deadlines are absolute, so a late tick is caught up with and no error adds up.
    """

    def __init__(self, rate: float) -> None:
        turn = 1 / rate
        self._slots: list[set[Stream]] = [
            set() for _ in range(max(1, round(turn / TICK)))
        ]
        self._tick = turn / len(self._slots)
        self._position = 0
        self._due = 0.0
        self._streams = 0

    def __repr__(self) -> str:
        return f"<Wheel {self._streams} streams in {len(self._slots)} slots>"

    def add(self, stream: Stream) -> None:
        stream.slot = min(self._slots, key=len)
        stream.slot.add(stream)
        self._streams += 1
        if self._streams == 1:
            self._due = time.monotonic() + self._tick
            self._arm()

    def remove(self, stream: Stream) -> None:
        if stream in stream.slot:
            stream.slot.remove(stream)
            self._streams -= 1

    def _arm(self) -> None:
        # Never zero: what falls due within the next millisecond is caught up with.
        delay = max(self._due - time.monotonic(), TICK)
        asyncio.get_running_loop().call_later(delay, self._turn)

    def _turn(self) -> None:
        now = time.monotonic()
        while self._due <= now:
            for stream in list(self._slots[self._position]):
                if not stream.advance():
                    self.remove(stream)
            self._position = (self._position + 1) % len(self._slots)
            self._due += self._tick
        if self._streams:
            self._arm()


# --- Connections ------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """Answers the requests of one connection, one after another."""

    def __init__(self, wheel: Wheel) -> None:
        self._wheel = wheel
        self._parser = httptools.HttpRequestParser(self)
        self._stream: Stream | None = None
        self._path = b""
        self._body = b""

    def __repr__(self) -> str:
        return f"<Connection {self._path!r} {self._stream}>"

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream:
            self._wheel.remove(self._stream)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    # The names below are httptools'.

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._path != b"/v1/chat/completions":
            self._transport.write(PAGES.get(self._path, NOT_FOUND))
            return
        request = json.loads(self._body)
        if not request.get("stream"):
            self._transport.write(COMPLETION)
            return
        self._stream = Stream(self._transport, max(1, request.get("max_tokens", 16)))
        self._transport.write(STREAM_START)
        self._wheel.add(self._stream)


async def serve(port: int, rate: float) -> None:
    """Listen on a port of the loopback interface until cancelled."""
    wheel = Wheel(rate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(wheel), "127.0.0.1", port, backlog=SLOTS
    )
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens/s of a stream")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.rate))


if __name__ == "__main__":
    main()
