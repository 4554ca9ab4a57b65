"""One event is read for what a rescue has to know, or refused for a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gollama_proxy.wire.chunks import (
    BLANK_LINE,
    END,
    DivergedError,
    Event,
    Span,
    UnreadableError,
    joined,
    read_event,
)
from gollama_proxy.wire.errors import Code, WorkerError
from tests.fakes import replies
from tests.fakes.streams import chat_chunk, chat_event, delta, dump


def event_of(raw: bytes) -> Event:
    event = read_event(raw.removesuffix(b"\n\n"))
    assert event is not None
    return event


# --- Which bytes are an event -----------------------------------------------------


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
def test_events_end_with_a_blank_line_of_any_kind(eol: bytes) -> None:
    stream = eol.join([b"data: a", b"data: b", b"", b": c", b"", b"data: d"])
    whole = [eol.join([b"data: a", b"data: b"]), b": c", b"data: d"]
    assert BLANK_LINE.split(stream) == whole


def test_one_crlf_is_not_two_line_ends() -> None:
    assert BLANK_LINE.search(b"data: a\r\ndata: b\r\n") is None


@pytest.mark.parametrize(
    "raw", [b"", b":", b": ping", b"event: x\nid: 7", b": data: {", b"proxy error: x"]
)
def test_what_has_no_data_is_no_event(raw: bytes) -> None:
    assert read_event(raw) is None


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
def test_data_may_take_several_lines_among_others(eol: bytes) -> None:
    lines = [b"event: x", b'data: {"choices":', b": why", b'data:[],"id":"a"}']
    event = event_of(eol.join(lines))
    assert event.fields == {"choices": [], "id": "a"}
    assert event.chunk.id == "a"


@pytest.mark.parametrize(
    "raw", [b"data: [DONE]", b"data:[DONE]", b"id: 1\ndata: [DONE]"]
)
def test_the_end_is_known_by_its_name(raw: bytes) -> None:
    assert read_event(raw) is END
    assert (END.spans, END.role, END.finish, END.tokens) == ([], False, False, 0)


# --- What it says -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (chat_event(role="assistant", content=None), {"role": True}),
        (chat_event(content="a"), {"spans": [Span("text", "a")]}),
        (chat_event(content=""), {}),
        (chat_event(reasoning_content="hm"), {"spans": [Span("reasoning", "hm")]}),
        (chat_event(reasoning="hm"), {"spans": [Span("reasoning", "hm")]}),
        (
            chat_event(
                reasoning="hm", reasoning_content="hm"
            ),  # as vLLM did for a time
            {"spans": [Span("reasoning", "hm")]},
        ),
        (
            chat_event(content="a", reasoning_content="hm"),
            {"spans": [Span("reasoning", "hm"), Span("text", "a")]},
        ),
        (chat_event(refusal="no"), {"spans": [Span("refusal", "no")]}),
        (
            chat_event(function_call={"name": "f", "arguments": "{"}),
            {"spans": [Span("name", "f"), Span("arguments", "{")]},
        ),
        (
            chat_event(
                tool_calls=[
                    {"index": 1, "id": "x", "function": {"name": "f", "arguments": ""}},
                    {"index": 2, "function": {"arguments": "{"}},
                ]
            ),
            {"spans": [Span("name", "f", 1), Span("arguments", "{", 2)]},
        ),
        (
            chat_event(tool_calls=[{"id": "x", "function": {"name": "f"}}]),
            {"spans": [Span("name", "f", 0)]},  # Ollama counts no calls
        ),
        (chat_event(tool_calls=[{"index": 0}, {"function": None}]), {}),
        (chat_event(reasoning_content="", reasoning=None), {}),
        (chat_event("stop"), {"finish": True}),
        (
            chat_event("length", content="a"),
            {"finish": True, "spans": [Span("text", "a")]},
        ),
        (chat_event("", content="a"), {"spans": [Span("text", "a")]}),
        (chat_event(tool_calls=[], function_call=None, refusal=""), {}),
        (
            dump(replies.text_completion("b", reason=None, last=False)),
            {"spans": [Span("text", "b")]},
        ),
        (dump(replies.text_completion("", reason="stop")), {"finish": True}),
        (dump({"choices": [{}]}), {}),
        (dump({"choices": [{"delta": None, "text": None}]}), {}),
        (dump({"choices": []}), {}),
        (dump({"choices": None}), {}),
        (dump({}), {}),
    ],
)
def test_an_event_says_what_news_it_has(raw: bytes, said: dict[str, Any]) -> None:
    event = event_of(raw)
    nothing = {"spans": [], "role": False, "finish": False}
    told = {name: getattr(event, name) for name in nothing}
    assert told == {**nothing, **said}
    assert event.fields == json.loads(raw[6:])


def test_what_an_event_says_can_be_changed_where_it_stands() -> None:
    raw = chat_event(
        reasoning="hm",
        reasoning_content="hm",
        content="a",
        tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{}"}}],
    )
    event = event_of(raw)
    for leaf, text in zip(event.leaves, ("", "b", "", "}"), strict=True):
        leaf.put(text)
    [choice] = event.fields["choices"]
    calls = [{"index": 0, "function": {"arguments": "}"}}]
    assert choice["delta"] == {"content": "b", "tool_calls": calls}


def test_neighbours_that_are_pieces_of_the_same_are_joined() -> None:
    a, b, other = Span("text", "a"), Span("text", "b"), Span("name", "f", 0)
    assert joined([a, b, other, a]) == (Span("text", "ab"), other, a)
    assert joined([Span("name", "f", 1), other]) == (Span("name", "f", 1), other)


def test_a_span_does_not_show_what_it_says() -> None:
    [leaf] = event_of(chat_event(content="secret")).leaves
    assert repr(leaf) == "<Leaf of <Span of 6 characters, text>>"


def test_an_event_has_the_names_of_its_answer() -> None:
    chunk = event_of(chat_event(content="a")).chunk
    assert (chunk.id, chunk.created, chunk.model) == ("chatcmpl-1", 1, "tiny")


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, 0),
        ({"usage": None, "timings": None}, 0),
        ({"usage": {"completion_tokens": 4}}, 4),
        ({"timings": {"predicted_n": 3}}, 3),
        ({"usage": {"completion_tokens": 4}, "timings": {"predicted_n": 3}}, 4),
        ({"usage": {"completion_tokens": 2}, "timings": {"predicted_n": 3}}, 3),
        ({"usage": {"prompt_tokens": 9}, "timings": {"prompt_n": 9}}, 0),
    ],
)
def test_the_worker_may_say_how_many_tokens_there_are(
    more: dict[str, Any], tokens: int
) -> None:
    assert event_of(dump(chat_chunk(delta(content="🍌"), **more))).tokens == tokens


# --- What cannot be gone on with --------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"data:",
        b"data: {",
        b"data: nonsense",
        b"data: 7",
        b'data: {"choices":7}',
        b'data: {"choices":[7]}',
        b'data: {"choices":[{"delta":{"content":7}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":[7]}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":7}}]}}]}',
        b'data: {"x":1e999}',
        b'data: {"id":"\xff"}',
        b'data: {"id":"\\ud800"}',
        b"data: " + b"[" * 99_999,
    ],
)
def test_what_is_no_chunk_cannot_be_read(raw: bytes) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_event(raw)
    assert caught.value.code is Code.WORKER_PROTOCOL
    assert caught.value.detail.startswith("an event that cannot be read: ")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (dump(chat_chunk(delta(content="a"), delta(content="b"))), "more than one"),
        (dump(chat_chunk({"index": 1, "delta": {"content": "a"}})), "more than one"),
    ],
)
def test_a_chunk_of_one_of_several_answers(raw: bytes, why: str) -> None:
    """It can be read, so nobody has to guess what it is."""
    with pytest.raises(DivergedError) as caught:
        read_event(raw)
    assert not isinstance(caught.value, UnreadableError)
    assert why in caught.value.detail
    assert caught.value.message.endswith("another worker could not continue it.")


@pytest.mark.parametrize("error", [{"message": "out of memory"}, "out of memory"])
def test_an_error_is_the_workers_own(error: Any) -> None:
    with pytest.raises(WorkerError) as caught:
        read_event(dump({"error": error}))
    assert not isinstance(caught.value, DivergedError)
    assert caught.value.code is Code.WORKER_INCOMPLETE
    assert caught.value.detail == "", "it may quote a prompt, and would be logged"
    assert "out of memory" not in caught.value.message


def test_a_null_is_no_error() -> None:
    event = event_of(dump(chat_chunk(delta(content="a"), error=None)))
    assert event.spans == [Span("text", "a")]
