"""Answers that break at a dozen places, continued by a second llama-server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.wire.partial import (
    DivergedError,
    Partial,
    ask_for_rest,
    can_continue,
    can_rescue,
    closing,
    exhausted,
)
from gollama_proxy.wire.resume import Resumer
from tests.fakes.asks import CHAT, TEXT
from tests.fakes.streams import read_calls
from tests.fakes.waiting import DEADLINE
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]
Pair = tuple[LlamaServer, LlamaServer]

CUTS = 12
CUTS_OF_SENTENCES = 3  # of the larger model, each token of which takes long
# What builds do not know of the request for the rest.
UNKNOWN: dict[str, tuple[str, ...]] = {
    "as it is sent": (),
    "to a build that repeats unasked": (
        "continue_final_message",
        "add_generation_prompt",
        "echo",
    ),
}
# One that wraps thoughts in the text, and takes them out of those of earlier turns.
THINKING = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{%- set content = message.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}
{%- endif %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# With the tiny model's weights: a call at once, which ends, and has no blanks.
PAINT: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "paint",
                "parameters": {
                    "type": "object",
                    "properties": {"colour": {"enum": ["red", "blue"]}},
                    "required": ["colour"],
                },
            },
        }
    ],
    "tool_choice": "required",
    "logit_bias": {"8": 100, "9": 90, "3": 200, "19": -100, "20": -100},
    "max_tokens": 99,
}
FORM: dict[str, Any] = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"schema": {"enum": ["a long answer", "another one"]}},
    },
    "logit_bias": {"19": -100, "20": -100},
}


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Start two servers with the tiny model, which answer for all tests."""
    folder = tmp_path_factory.mktemp("pair")
    servers = tuple(LlamaServer(tiny_model, folder / f"{n}.log") for n in (1, 2))
    try:
        yield servers[0].start(), servers[1].start()
    finally:
        for server in servers:
            server.kill()


def stream_of(server: LlamaServer, path: str, body: bytes) -> list[bytes]:
    """Ask, and return the body chunk by chunk as it was sent, but for pings.

    A server sends those when a busy machine makes it slow.
    """
    head = (
        f"POST {path} HTTP/1.1\r\nHost: worker\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as wire:
        wire.sendall(head.encode() + body)
        with wire.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 200"), answer.read()
            while answer.readline().strip():
                pass
            chunks = []
            while size := int(answer.readline(), 16):
                chunk = answer.read(size)
                if not chunk.startswith(b":"):
                    chunks.append(chunk)
                answer.readline()
            return chunks


def request(chat: bool, **fields: Any) -> bytes:
    text = "Tell me a short story about a fox 🦊."
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if not chat:
        asked = {"prompt": "Once upon a time, a fox"}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({**asked, "temperature": 0, "max_tokens": 24, **fields}).encode()


def read(stream: bytes) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Return the text, the calls, and all that has to be there exactly once.

    The ids of calls are made up anew for each answer.
    """
    assert stream.endswith(b"data: [DONE]\n\n")
    chunks = chunks_of(stream)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice.get("delta", choice) for choice in choices]
    text = "".join(d.get("content") or d.get("text") or "" for d in deltas)
    once = [delta["role"] for delta in deltas if "role" in delta]
    once += [c["finish_reason"] for c in choices if c["finish_reason"]]
    once += sorted({chunk["id"] for chunk in chunks})
    once += ["[DONE]"] * stream.count(b"data: [DONE]")
    return text, [(name, text) for _, name, text in read_calls(stream).values()], once


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


def rest_of(
    second: LlamaServer,
    path: str,
    body: bytes,
    reported: Partial,
    unknown: tuple[str, ...] = (),
) -> tuple[bytes, bool]:
    """Ask for the rest as the hub does; also return whether it was a continuation."""
    chat = path == CHAT
    for goes_on in (True, False):
        if goes_on and not can_continue(body, reported, chat):
            continue
        asked = (
            without(ask_for_rest(body, reported, chat), unknown) if goes_on else body
        )
        resumer = Resumer(reported, chat, regenerate=not goes_on)
        stream = stream_of(second, path, asked)
        try:
            rest = b"".join(event for data in stream for event in resumer.feed(data))
        except DivergedError:
            assert goes_on, "not even the whole answer is the same"
            continue
        return rest + resumer.finish(), goes_on
    raise AssertionError("unreachable")


def check(
    first: LlamaServer,
    second: LlamaServer,
    path: str = CHAT,
    *,
    cuts: int = CUTS,
    unknown: tuple[str, ...] = (),
    **fields: Any,
) -> set[bool]:
    """Break one answer at many of its chunks; each one must come out the same.

    Return how it was resumed: as a continuation, or by asking for all again.
    """
    body = request(path == CHAT, **fields)
    chat = path == CHAT
    assert can_rescue(body, chat)
    chunks = stream_of(first, path, body)
    assert all(chunk.endswith(b"\n\n") for chunk in chunks), "half events do occur"
    unbroken = b"".join(chunks)
    seen, usage = read(unbroken), usage_of(unbroken)
    last = len(chunks) - 3  # chunks; behind it come a token, the end and `[DONE]`
    ways = set()
    for place in sorted({1 + (last - 1) * i // (cuts - 1) for i in range(cuts)}):
        relayed = b"".join(chunks[:place])
        reported = Partial.parse(relayed)
        assert reported is not None
        assert reported.mend == b""
        assert not exhausted(body, reported), place
        rest, goes_on = rest_of(second, path, body, reported, unknown)
        assert read(relayed + rest) == seen, f"cut behind chunk {place}"
        assert usage_of(rest) == usage, f"cut behind chunk {place}"
        ways.add(goes_on)
    return ways


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN)
def test_a_broken_chat_is_the_unbroken_one(
    unknown: tuple[str, ...], pair: Pair
) -> None:
    """Text, usage, role, finish_reason and id are as if nothing had happened."""
    first, second = pair
    assert True in check(first, second, unknown=unknown)


def test_a_build_without_echo_is_asked_for_the_whole_answer(pair: Pair) -> None:
    first, second = pair
    assert check(first, second, unknown=("echo",)) == {False}


def test_a_broken_text_is_the_unbroken_one(pair: Pair) -> None:
    first, second = pair
    assert check(first, second, TEXT) == {True}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_that_lacks_only_its_end_gets_it(path: str, pair: Pair) -> None:
    chat, server = path == CHAT, pair[0]
    body = request(chat)
    chunks = stream_of(server, path, body)
    relayed = b"".join(chunks[:-2])
    reported = Partial.parse(relayed)
    assert reported is not None
    assert exhausted(body, reported)
    seen = read(relayed + closing(reported, chat))
    assert seen == read(b"".join(chunks))


def test_an_agents_text_goes_on(pair: Pair) -> None:
    """With tools a build writes no white space in front of what it repeats."""
    first, second = pair
    assert True in check(first, second, tools=PAINT["tools"])


@pytest.mark.parametrize("fields", [PAINT, FORM], ids=["a call", "a form"])
def test_answers_held_to_a_grammar_can_be_cut_anywhere(
    fields: dict[str, Any], pair: Pair
) -> None:
    first, second = pair
    assert check(first, second, cuts=99, **fields) == {False}


def test_a_tool_call_after_text_is_resumed_too(pair: Pair) -> None:
    """In the continuation, which is forced to call."""
    first, second = pair
    chunks = stream_of(first, CHAT, request(chat=True, tools=PAINT["tools"]))
    relayed = b"".join(chunks[:9])
    reported = Partial.parse(relayed)
    assert reported is not None
    body = request(chat=True, **PAINT | {"tool_choice": "auto"})
    forced = json.loads(ask_for_rest(body, reported, chat=True)) | {
        "tool_choice": "required"
    }
    resumer = Resumer(reported, chat=True)
    stream = b"".join(stream_of(second, CHAT, json.dumps(forced).encode()))
    rest = b"".join(resumer.feed(stream)) + resumer.finish()
    text, calls, once = read(relayed + rest)
    assert (text, calls) == (reported.text, [("paint", '{"colour": "red"}')])
    assert "tool_calls" in once


def test_real_sentences_go_on(talking_model: Path, llama_server: Start) -> None:
    """The same with words of several tokens and a model that can stop.

    One server answers all, as each token of this model takes long.
    """
    server = llama_server(talking_model, slots=1, ctx=512)
    few: dict[str, Any] = {"cuts": CUTS_OF_SENTENCES, "max_tokens": 12}
    for unknown in UNKNOWN.values():
        assert True in check(server, server, unknown=unknown, **few)
    assert check(server, server, TEXT, **few) == {True}


def test_a_template_that_leaves_out_what_was_begun_proves_nothing(
    tiny_model: Path, llama_server: Start
) -> None:
    """So all of it is asked for again, although the model writes the same by itself."""
    args = ("--skip-chat-parsing",)
    first = llama_server(tiny_model, slots=1, ctx=512, args=args)
    second = llama_server(tiny_model, slots=1, ctx=512, args=args)
    ways = check(first, second, cuts=CUTS_OF_SENTENCES, max_tokens=16)
    assert ways == {False}


@pytest.fixture
def thinking(llama_server: Start, tmp_path: Path) -> Callable[..., LlamaServer]:
    """Start a server of a model whose template has a place for thoughts."""
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)

    def start(model: Path, *args: str) -> LlamaServer:
        args = ("--jinja", "--chat-template-file", str(template), *args)
        return llama_server(model, slots=1, ctx=512, args=args)

    return start


def test_a_repetition_is_known_behind_what_the_template_puts_there(
    talking_model: Path, thinking: Callable[..., LlamaServer]
) -> None:
    """It may go on in other words, as its prompt has another beginning."""
    server = thinking(talking_model, "--reasoning-format", "none")
    body = request(chat=True, max_tokens=12)
    chunks = stream_of(server, CHAT, body)
    for place in (5, len(chunks) // 2):
        relayed = b"".join(chunks[:place])
        reported = Partial.parse(relayed)
        assert reported is not None
        rest, goes_on = rest_of(server, CHAT, body, reported)
        assert goes_on
        text, _, once = read(relayed + rest)
        assert text.startswith(reported.text)
        assert text.count(reported.text) == 1
        assert "<think>" not in text
        assert len(once) == 4


def test_an_answer_goes_on_as_it_would_have_behind_its_thoughts(
    tiny_model: Path, thinking: Callable[..., LlamaServer]
) -> None:
    """The model does not think by itself, so its thoughts are put into its mouth."""
    first, second = thinking(tiny_model), thinking(tiny_model)
    thoughts = "A fox is red, so the story is about a red dress."
    asked = json.loads(request(chat=True))
    message = {"role": "assistant", "reasoning_content": thoughts, "content": "Once,"}
    asked["messages"].append(message)
    asked |= {"continue_final_message": True, "add_generation_prompt": False}
    chunks = stream_of(first, CHAT, json.dumps(asked | {"echo": True}).encode())
    seen = read(b"".join(chunks))
    plain = read(b"".join(stream_of(first, CHAT, request(chat=True))))
    assert seen[0] != plain[0], "the thoughts make no difference"
    body = request(chat=True)
    for place in range(4, len(chunks) - 3, 12):
        relayed = b"".join(chunks[:place])
        reported = Partial.parse(relayed)
        assert reported is not None
        assert reported.reasoning == thoughts
        limit = reported.tokens + len(chunks) - 2 - place
        body = request(chat=True, max_tokens=limit)
        rest, goes_on = rest_of(second, CHAT, body, reported)
        assert goes_on
        out = relayed + rest
        assert read(out) == seen, f"cut behind chunk {place}"
        assert out.count(b'"reasoning_content"') == 1
