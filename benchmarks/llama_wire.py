"""What llama-server sends, byte for byte where it matters to a proxy, and its requests.

The chunked event stream, after which the connection is closed; JSON answers, after
which it is kept open; /health, /v1/models and /props.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools

MODEL = "paced"
CONTEXT = 4096  # of a slot
WORD = " we"  # each token of any answer


def event(choice: dict[str, Any], **more: Any) -> bytes:
    document = {
        "choices": [{"finish_reason": None, "index": 0, **choice}],
        "created": 1_795_346_022,
        "id": "chatcmpl-S5QmFoA4tGzUoVBZVxwSXaJvhGKMtpiY",
        "model": MODEL,
        "system_fingerprint": "b10068-571d0d5",
        "object": "chat.completion.chunk",
        **more,
    }
    return b"data: " + encode(document) + b"\n\n"


def encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def answer(document: Any, status: bytes = b"200 OK") -> bytes:
    body = encode(document)
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
ROLE_EVENT = event({"delta": {"role": "assistant", "content": None}})
TOKEN_EVENT = event({"delta": {"content": WORD}})
TOKEN_CHUNK = chunk(TOKEN_EVENT)
# llama-server sends the role and the first token as one HTTP chunk.
STREAM_START = STREAM_HEAD + chunk(ROLE_EVENT + TOKEN_EVENT)

COMPLETION = answer(
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
EMBEDDING = answer(
    {
        "model": MODEL,
        "object": "list",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
        "data": [
            {
                "embedding": [round(0.03 * (n % 7 - 3), 6) for n in range(32)],
                "index": 0,
                "object": "embedding",
            }
        ],
    }
)
NOT_FOUND = answer(
    {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}},
    b"404 Not Found",
)


def pages(slots: int) -> dict[bytes, bytes]:
    """Return the answers to GET requests, by path."""
    return {
        b"/health": answer({"status": "ok"}),
        b"/props": answer(
            {
                "default_generation_settings": {"n_ctx": CONTEXT},
                "total_slots": slots,
                "model_alias": MODEL,
                "build_info": MODEL,
            }
        ),
        b"/v1/models": answer(
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


def stream_end(
    cached: int, read: int, read_seconds: float, written: int, write_seconds: float
) -> bytes:
    """Return the end of a stream, with the times of the prompt and the answer."""
    read_ms, write_ms = read_seconds * 1000, max(write_seconds * 1000, 1.0)
    timings = {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": read_ms,
        "prompt_per_token_ms": read_ms / read,
        "prompt_per_second": read / read_ms * 1000,
        "predicted_n": written,
        "predicted_ms": write_ms,
        "predicted_per_token_ms": write_ms / written,
        "predicted_per_second": written / write_ms * 1000,
    }
    finish = event({"finish_reason": "length", "delta": {}}, timings=timings)
    return chunk(finish) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """Takes the requests of one connection, one after another."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        """Create it; `answers` are the pages."""
        self._pages = answers
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = b""

    def __repr__(self) -> str:
        return f"<Connection {self._path!r}>"

    def stream(self, request: dict[str, Any]) -> None:
        """Answer a request for a stream."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    # The names below are httptools'.

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._path == b"/v1/embeddings":
            self.transport.write(EMBEDDING)
            return
        if self._path != b"/v1/chat/completions":
            self.transport.write(self._pages.get(self._path, NOT_FOUND))
            return
        request = json.loads(self._body)
        if request.get("stream"):
            self.stream(request)
        else:
            self.transport.write(COMPLETION)
