"""The part of an answer that a client has is read from what it was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.partial import (
    END,
    DivergedError,
    Event,
    Partial,
    Span,
    UnreadableError,
    closing,
    joined,
    read_event,
)
from tests.fakes import replies
from tests.fakes.cases import case
from tests.fakes.streams import (
    arguments,
    call,
    chat_chunk,
    chat_event,
    chat_stream,
    delta,
    dump,
    parsed,
    read,
    read_calls,
    spliced,
    text_stream,
)


def event_of(raw: bytes) -> Event:
    event = read_event(raw.removesuffix(b"\n\n"))
    assert event is not None
    return event


@pytest.mark.parametrize(
    "raw", [b"", b":", b": ping", b"event: x\nid: 7", b": data: {", b"proxy error: x"]
)
def test_events_without_data_are_ignored(raw: bytes) -> None:
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


# --- Its text ---------------------------------------------------------------------


def test_an_event_has_its_spans_and_marks() -> None:
    for raw, expected in [
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
    ]:
        with case((raw, expected)):
            event = event_of(raw)
            nothing = {"spans": [], "role": False, "finish": False}
            partial = {name: getattr(event, name) for name in nothing}
            assert partial == {**nothing, **expected}
            assert event.fields == json.loads(raw[6:])


def test_the_text_of_an_event_can_be_replaced() -> None:
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


def test_a_span_does_not_show_its_text() -> None:
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
def test_the_worker_may_count_the_tokens(more: dict[str, Any], tokens: int) -> None:
    assert event_of(dump(chat_chunk(delta(content="🍌"), **more))).tokens == tokens


# --- What cannot be continued -----------------------------------------------------


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
def test_anything_but_a_chunk_cannot_be_read(raw: bytes) -> None:
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
    """It can be read, so no guess is needed."""
    with pytest.raises(DivergedError) as caught:
        read_event(raw)
    assert not isinstance(caught.value, UnreadableError)
    assert why in caught.value.detail
    assert caught.value.message.endswith("another worker could not continue it.")


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "out of memory"}},
        {"error": "out of memory"},
        {"object": "error", "message": "out of memory", "code": 500},  # vLLM
    ],
)
def test_an_error_is_the_workers_own(error: dict[str, Any]) -> None:
    with pytest.raises(WorkerError) as caught:
        read_event(dump(error))
    assert not isinstance(caught.value, DivergedError)
    assert caught.value.code is Code.WORKER_INCOMPLETE
    assert caught.value.detail == "", "it may quote a prompt, and would be logged"
    assert "out of memory" not in caught.value.message


def test_null_is_not_an_error() -> None:
    event = event_of(dump(chat_chunk(delta(content="a"), error=None)))
    assert event.spans == [Span("text", "a")]


# --- What the client has ----------------------------------------------------------


def test_a_partial_answer_does_not_show_its_text() -> None:
    partial = parsed(chat_stream(["secret"], reason=None))
    assert repr(partial) == "<Partial 6 characters, 1 tokens, open>"


def test_the_broken_answer_is_read() -> None:
    partial = parsed(b":\n\n" + chat_stream(["a", "b", " c"], reason=None))
    assert (partial.id, partial.created, partial.model) == ("chatcmpl-1", 1, "tiny")
    assert (partial.text, partial.tokens, partial.mend) == ("ab c", 3, b"")
    assert partial.spans == (Span("text", "ab c"),)
    assert (partial.pieces, partial.is_plain) == (3, True)
    assert partial.role_seen
    assert not partial.finished


def test_the_count_of_a_worker_is_better_than_that_of_events() -> None:
    """One event can hold the tokens of a whole character, or of a whole line."""
    choice = delta(content="🍌")
    timings: dict[str, Any] = {"timings": {"predicted_n": 3}}
    assert parsed(dump(chat_chunk(choice, **timings))).tokens == 3
    usage: dict[str, Any] = {"usage": {"completion_tokens": 4}}
    assert parsed(dump(chat_chunk(choice, **usage))).tokens == 4
    uncounted = dump(chat_chunk(choice))
    assert parsed(dump(chat_chunk(choice, **usage)) + uncounted).tokens == 4


def test_a_finished_answer_needs_no_more_than_its_end() -> None:
    stream = chat_stream(["a"])
    assert parsed(stream).done
    cut = parsed(stream.removesuffix(replies.done()))
    assert cut.finished
    assert not cut.done


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_unfinished_reasoning_differs_from_finished_reasoning(
    key: str,
) -> None:
    thought = chat_event(**{key: "hm"})
    partial = parsed(thought + thought)
    assert (partial.reasoning, partial.text, partial.tokens) == ("hmhm", "", 2)
    assert not partial.is_plain
    partial = parsed(thought + chat_stream(["a"], reason=None))
    assert (partial.reasoning, partial.text, partial.tokens, partial.pieces) == (
        "hm",
        "a",
        2,
        1,
    )
    assert partial.is_plain


def test_an_answer_that_calls_a_tool_is_more_than_a_text() -> None:
    begun = chat_stream(["Let me", " see."], reason=None)
    partial = parsed(begun + call("paint", "{") + arguments('"a"') + arguments(": 1"))
    assert partial.spans == (
        Span("text", "Let me see."),
        Span("name", "paint", 0),
        Span("arguments", '{"a": 1', 0),
    )
    assert (partial.text, partial.tokens, partial.pieces) == ("Let me see.", 5, 2)
    assert not partial.is_plain


def test_reasoning_between_texts_cannot_begin_a_message() -> None:
    thought = chat_event(reasoning_content="hm")
    assert not parsed(chat_stream(["a"], reason=None) + thought).is_plain


@pytest.mark.parametrize(
    "relayed",
    [
        b"",
        b":\n\n",
        replies.done(),
        b"data: {}\n\n",
        b"data: nonsense\n\n",
        b'data: {"choices":7}\n\n',
        dump({"choices": [delta(content="a")]}),
        chat_stream(["a"], reason=None) + replies.error_event("out of memory"),
        dump(chat_chunk(delta(content="a"), delta(content="b"))),
        dump(chat_chunk({"index": 1, "delta": {"content": "a"}})),
    ],
)
def test_an_unreadable_answer_is_not_continued(relayed: bytes) -> None:
    assert Partial.parse(relayed) is None


# --- Cut in mid-event -------------------------------------------------------------

WORDS = ["Hi", ' "Ü\\', "\n", "🍌", " end"]


def cuts(stream: bytes, first: int, eol: bytes) -> Sequence[int]:
    """Return where to cut: at any byte, but with CRLF only around the ends of lines."""
    places = range(first, len(stream))
    if eol == b"\n":
        return places
    return [at for at in places if eol in stream[at - 8 : at + 8]]


@pytest.mark.parametrize(
    ("escape", "eol"), [(False, b"\n"), (True, b"\n"), (False, b"\r\n")]
)
def test_a_cut_at_any_byte_is_mended_or_refused(escape: bool, eol: bytes) -> None:
    """Whatever follows, the client sees whole events and every character once."""
    whole = "".join(WORDS)
    stream = chat_stream(WORDS, escape=escape).replace(b"\n", eol)
    first = stream.index(b'"content":"')
    refused, places = 0, cuts(stream, first, eol)
    for cut in places:
        relayed = stream[:cut]
        partial = Partial.parse(relayed)
        if partial is None:
            refused += 1
            continue
        assert whole.startswith(partial.text)
        if partial.finished:
            seen = read(relayed + partial.mend + closing(partial, chat=True))
        else:
            rest = chat_stream(
                [partial.text, whole[len(partial.text) :]], id="chatcmpl-2"
            )
            seen = read(spliced(relayed, rest))
        assert seen == (whole, 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1), cut
    # What is cut: the first text, characters and escapes, the last event.
    assert refused / len(places) < 0.5
    assert all(
        Partial.parse(stream[: at + 2 * len(eol)]) is not None
        for at in range(first, len(stream))
        if stream[at:].startswith(2 * eol)
    )


def test_the_last_token_is_halved_where_its_text_was_cut() -> None:
    stream = chat_stream(["ab", "cd"], reason=None)
    place = stream.index(b'cd"')
    for cut, text, halved in (
        (place, "ab", False),
        (place + 1, "abc", True),
        (place + 2, "abcd", True),  # more may have come
        (place + 3, "abcd", False),
        (len(stream), "abcd", False),
    ):
        partial = parsed(stream[:cut])
        assert (partial.text, partial.halved) == (text, halved), cut


def test_a_text_completion_that_was_cut_is_mended() -> None:
    stream = text_stream(["ab", "cd"], reason=None)
    cut = stream.rindex(b'd","index"')
    partial = parsed(stream[:cut])
    assert (partial.text, partial.tokens, partial.halved) == ("abc", 2, True)
    seen = read(spliced(stream[:cut], text_stream(["de"]), chat=False))
    assert (seen.text, seen.reasons, seen.done) == ("abcde", ["stop"], 1)


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_thoughts_and_calls_that_were_cut_are_mended(eol: bytes) -> None:
    """The rest is requested with the whole answer, and compared."""
    events = [replies.role(), chat_event(reasoning_content="hm")]
    events += [chat_event(reasoning_content=", so"), chat_event(content="I")]
    events += [chat_event(content=" see."), call("paint", "{"), arguments('"a"')]
    events += [arguments(": 1"), arguments("}"), chat_event("tool_calls")]
    whole = b"".join([*events, replies.done()]).replace(b"\n", eol)
    refused, places = 0, cuts(whole, len(events[0]), eol)
    for cut in places:
        relayed = whole[:cut]
        if (partial := Partial.parse(relayed)) is None:
            refused += 1
            continue
        if partial.finished:
            out = relayed + partial.mend + closing(partial, chat=True)
        else:
            out = spliced(relayed, whole, regenerate=True)
        calls = read_calls(out)
        assert calls == {0: ("call-1", "paint", '{"a": 1}')}, cut
        assert read(out)[:3] == ("I see.", 1, ["tool_calls"]), cut
        assert parsed(out).reasoning == "hm, so", cut
    # What is cut: the first event of a kind, and the last one.
    assert refused / len(places) < 0.5


@pytest.mark.parametrize("half", [b"\n", b"\ndata: {", b'data: {"choices":['])
def test_more_blank_lines_than_needed_do_no_harm(half: bytes) -> None:
    first, second = replies.role(), replies.token("a")
    relayed = first + b"\n" + second + half
    stream = b"\n:\n\n\n" + chat_stream(["ab"])
    out = spliced(relayed, stream)
    assert read(out).text == "ab"
    assert out.count(b":\n\n") == 1


@pytest.mark.parametrize("half", [b"data: [DO", b'data: {"choices":[', b"da"])
def test_after_the_finish_reason_only_the_end_is_missing(half: bytes) -> None:
    relayed = chat_stream(["a"]).removesuffix(replies.done()) + half
    partial = parsed(relayed)
    assert partial.finished
    seen = read(relayed + partial.mend + closing(partial, chat=True))
    assert (seen.text, seen.reasons, seen.done) == ("a", ["stop"], 1)


def test_an_incomplete_end_is_completed() -> None:
    partial = parsed(chat_stream(["a"])[:-6])
    assert (partial.done, partial.mend) == (True, replies.done()[-6:])


@pytest.mark.parametrize("half", [b":", b": ping", b":\n", b': data: {"a'])
def test_half_a_comment_is_ended(half: bytes) -> None:
    relayed = chat_stream(["a"], reason=None) + half
    assert read(spliced(relayed, chat_stream(["ab"]))).text == "ab"


@pytest.mark.parametrize(
    "half",
    [
        b"proxy error: Failed to read connection",  # the router of llama-server
        b"event: x",
        b"id: 7\nretry: 3",
        b"daily: news",
    ],
)
def test_half_a_line_that_can_be_no_data_is_ended(half: bytes) -> None:
    """Events without data are ignored, so a blank line makes it harmless."""
    relayed = chat_stream(["a", "b"], reason=None)
    partial = parsed(relayed + half)
    assert partial == replace(parsed(relayed + half + b"\n\n"), mend=b"\n\n")
    assert (partial.text, partial.tokens) == ("ab", 2)


@pytest.mark.parametrize(
    "half",
    [
        b"data: {7",
        b'data: {"choices":7',
        b"event: x\n",
        b"event: x\nda",
        b": ping\ndata: {",
        b"event: x\ndata: {",
    ],
)
def test_other_incomplete_lines_are_not_mended(half: bytes) -> None:
    assert Partial.parse(chat_stream(["a"], reason=None) + half) is None


def test_the_first_event_cannot_be_mended() -> None:
    role = chat_stream([], reason=None)
    assert Partial.parse(role[:-20]) is None
    assert parsed(role[:-1]).text == ""


@pytest.mark.parametrize("half", [b"d", b"data", b"data:", b"data: {"])
def test_without_a_text_nothing_shows_how_an_event_ends(half: bytes) -> None:
    role, relayed = chat_stream([], reason=None), chat_stream(["a"], reason=None)
    assert Partial.parse(role + half) is None
    assert read(spliced(relayed + half, chat_stream(["ab"]))).text == "ab"


# --- Nothing is left to generate --------------------------------------------------


def test_an_answer_of_max_tokens_is_closed_for_its_length() -> None:
    relayed = chat_stream(["a", "b"], reason=None)
    seen = read(relayed + closing(parsed(relayed), chat=True))
    assert seen == ("ab", 1, ["length"], {("chatcmpl-1", 1, "tiny")}, [], 1)
    relayed = text_stream(["a", "b"], reason=None)
    seen = read(relayed + closing(parsed(relayed), chat=False))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["length"], 1)


@pytest.mark.parametrize(
    ("chat", "kind", "nothing"),
    [
        (True, "chat.completion.chunk", {"delta": {}}),
        (False, "text_completion", {"text": ""}),
    ],
)
def test_the_last_event_has_the_shape_of_its_api(
    chat: bool, kind: str, nothing: dict[str, Any]
) -> None:
    last = closing(parsed(chat_stream(["a"], reason=None)), chat=chat)
    data = last.removeprefix(b"data: ").removesuffix(b"\n\n" + replies.done())
    assert json.loads(data) == {
        "id": "chatcmpl-1",
        "object": kind,
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, **nothing, "finish_reason": "length"}],
    }


def test_closing_a_closed_answer_adds_nothing() -> None:
    """But what was cut, which the hub writes before anything else."""
    stream = chat_stream(["a"])
    for relayed, mend in ((stream, b""), (stream[:-1], b"\n")):
        partial = parsed(relayed)
        assert (closing(partial, chat=True), partial.mend) == (b"", mend)
