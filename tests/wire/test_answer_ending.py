"""How an answer ended is read from its last bytes, whatever text was generated."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.wire.answer import (
    MOST_CHOICES,
    MOST_HELD,
    TAIL,
    End,
    Tally,
    Usage,
    ends_in,
    has_error,
    is_complete,
    read_end,
    read_tail,
)
from gollama_proxy.wire.schema import Api, Ending
from gollama_proxy.wire.sse import DONE, events_in
from tests.fakes import replies
from tests.fakes.replies import anthropic, event, native, responses

NOTHING = (False, False, False)
STREAMED = [Ending.DONE, Ending.STOP, Ending.NAMED]
LINE_ENDS = pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])


def marks(tail: bytes, ending: Ending) -> tuple[bool, bool, bool]:
    """Return whether a tail is complete, has a `[DONE]`, and has an error."""
    end = read_end(tail, ending)
    return end.complete, end.done, end.failed


def rest_of(tail: bytes) -> bytes:
    return read_end(tail, Ending.DONE).rest


# --- How a stream ended -----------------------------------------------------------


@pytest.mark.parametrize("usage", [None, replies.usage_of()])
@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_a_chat_is_complete_with_its_done(
    reason: str, usage: dict[str, Any] | None
) -> None:
    tail = replies.token("a") + replies.finish(reason, usage=usage) + replies.done()
    assert marks(tail, Ending.DONE) == (True, True, False)


def test_a_chat_is_complete_with_a_finish_reason_but_lacks_its_done() -> None:
    """The relay adds it then; SDKs wait for it."""
    end = replies.token("a") + replies.finish()
    assert marks(end, Ending.DONE) == (True, False, False)


def test_a_done_without_a_finish_reason_is_enough() -> None:
    """The servers that send no finish_reason do send this."""
    end = replies.token("a") + replies.done()
    assert marks(end, Ending.DONE) == (True, True, False)


@pytest.mark.parametrize(
    "spelled", [b'"finish_reason" : "stop"', b'"finish_reason":"x"']
)
def test_the_spacing_of_a_finish_reason_does_not_matter(spelled: bytes) -> None:
    assert read_end(b"data: {%b}\n\n" % spelled, Ending.DONE).complete


@pytest.mark.parametrize("spelled", [b"null", b'""', b'"'])
def test_an_empty_finish_reason_ends_nothing(spelled: bytes) -> None:
    """Some servers send an empty one with every event."""
    assert marks(b'data: {"finish_reason":%b' % spelled, Ending.DONE) == NOTHING


def test_a_text_completion_ends_with_its_finish_reason() -> None:
    first = replies.event(replies.text_completion("a", reason=None, last=False))
    last = replies.event(replies.text_completion("", reason="length"))
    assert not read_end(first, Ending.DONE).complete
    assert read_end(first + last, Ending.DONE).complete


@pytest.mark.parametrize(
    "done", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n"]
)
def test_a_done_is_seen_at_the_very_beginning_and_with_any_line_end(
    done: bytes,
) -> None:
    assert read_end(done, Ending.DONE).done
    assert read_end(b"data: {}\r\r" + done.replace(b"\r\n", b"\r"), Ending.DONE).done


@pytest.mark.parametrize("cut", range(1, len(b"data: [DONE]\n")))
def test_an_incomplete_done_is_not_a_done(cut: int) -> None:
    tail = replies.token("a") + b"data: [DONE]\n"[:cut]
    assert marks(tail, Ending.DONE) == NOTHING


def test_a_native_completion_is_complete_with_its_stop() -> None:
    assert marks(native("a", stop=False), Ending.STOP) == NOTHING
    assert read_end(
        native("a", stop=False) + native("", stop=True), Ending.STOP
    ).complete
    assert read_end(b'data: {"stop" : true}\n\n', Ending.STOP).complete


@pytest.mark.parametrize(
    "last",
    [
        anthropic("message_stop"),
        anthropic("message_stop").replace(b"\n", b"\r\n"),
        b"event:message_stop\ndata: {}\n\n",
        responses("completed", response={}),
        responses("incomplete", response={}),
        responses("failed", response={}),
    ],
)
def test_a_stream_with_named_events_is_complete_with_its_last_one(last: bytes) -> None:
    before = anthropic("content_block_delta", delta={"text": "a"})
    assert marks(before, Ending.NAMED) == NOTHING
    assert read_end(before + last, Ending.NAMED).complete
    assert read_end(last, Ending.NAMED).complete


@pytest.mark.parametrize(
    "event",
    [
        anthropic("message_delta", delta={"stop_reason": "end_turn"}),
        anthropic("message_stopped"),
        anthropic("content_block_stop"),
        responses("in_progress"),
        responses("output_text.done"),
        responses("completed_"),
        b"event: responseXcompleted\n\n",
        b"data: event: message_stop\n\n",
    ],
)
def test_another_named_event_ends_nothing(event: bytes) -> None:
    assert marks(event, Ending.NAMED) == NOTHING


@pytest.mark.parametrize("tail", [b"", b"{}", replies.token("a")])
def test_a_body_that_is_no_stream_is_complete_when_it_ends(tail: bytes) -> None:
    assert marks(tail, Ending.BODY) == (True, False, False)


@pytest.mark.parametrize("ending", STREAMED)
def test_the_mark_of_another_api_does_not_count(ending: Ending) -> None:
    marks = {
        Ending.DONE: replies.finish() + replies.done(),
        Ending.STOP: native("", stop=True),
        Ending.NAMED: anthropic("message_stop"),
    }
    for other in STREAMED:
        assert read_end(marks[other], ending).complete is (other is ending)


@pytest.mark.parametrize("ending", STREAMED)
@pytest.mark.parametrize(
    "error",
    [
        replies.error_event("Context size has been exceeded."),
        b'data:{"error" : {}}\n\n',
        b'event: error\ndata: {"type":"error"}\n\n',
        b"event:error\r\ndata: x\r\n\r\n",
    ],
)
def test_an_error_from_the_worker_is_seen(error: bytes, ending: Ending) -> None:
    fields = (False, False, True)
    assert marks(error, ending) == fields
    assert marks(replies.token("a") + error, ending) == fields


@pytest.mark.parametrize("ending", STREAMED)
@pytest.mark.parametrize(
    "line",
    [b"data: [DONE]", b'data: {"error":{}}', b"event: error", b"event: message_stop"],
)
def test_a_mark_within_a_line_is_not_a_mark(line: bytes, ending: Ending) -> None:
    """In a comment, in the name of an event, or after the other kind of data."""
    for before in (b": ", b"event: ", b"data: ", b"id: ", b" "):
        assert marks(before + line + b"\n\n", ending) == NOTHING


@pytest.mark.parametrize("ending", STREAMED)
@pytest.mark.parametrize("tail", [b"", replies.ping() * 4, replies.role()])
def test_a_stream_that_just_stops_is_not_complete(tail: bytes, ending: Ending) -> None:
    assert marks(tail, ending) == NOTHING


QUOTES = [
    "data: [DONE]\n\n",
    "\r\ndata: [DONE]\r\n",
    '"finish_reason":"stop"',
    '{"finish_reason": "length"}',
    '"stop":true',
    '"stop" : true',
    '"stop_type":"limit"',
    "\nevent: message_stop\n",
    "\r\nevent: response.completed\r\n",
    'data: {"error": {"message": "x"}}\n\n',
    "\nevent: error\n",
    '"completion_tokens":7',
    '"usage":{"prompt_tokens":1,"input_tokens":1,"output_tokens": 7}',
    '"timings":{"predicted_n": 7}',
    '"tokens_evaluated":7,"tokens_predicted": 7}',
    "\\",
    '\\"',
]


@pytest.mark.parametrize("words", QUOTES)
def test_generated_text_ends_no_stream(words: str) -> None:
    """Nor does the tail, which begins anywhere: for example in the middle of a word."""
    arguments = [{"index": 0, "function": {"arguments": json.dumps({"x": words})}}]
    tool_call = {"choices": [{"delta": {"tool_calls": arguments}}]}
    delta = {"type": "text_delta", "text": words}
    tail = replies.token(words) + native(words, stop=False) + replies.event(tool_call)
    tail += anthropic("content_block_delta", index=0, delta=delta)
    for start in range(len(tail)):
        for ending in STREAMED:
            assert marks(tail[start:], ending) == NOTHING
        for api in Api:
            assert read_tail(api, tail[start:]) == Usage()


@given(
    words=st.lists(st.text(max_size=5) | st.sampled_from(QUOTES), max_size=5),
    start=st.integers(0, 400),
)
def test_text_of_a_model_does_not_end_a_stream(words: list[str], start: int) -> None:
    tail = (replies.token("".join(words)) + native("".join(words), stop=False))[start:]
    for ending in STREAMED:
        assert marks(tail, ending) == NOTHING
    for api in Api:
        assert read_tail(api, tail) == Usage()


def test_the_tail_holds_the_last_events() -> None:
    """The widest end there is: a finish, usage with timings, and `[DONE]`."""
    last = replies.finish(usage=replies.usage_of(9), tokens=9) + replies.done()
    tail = (replies.token("x" * TAIL) + last)[-TAIL:]
    assert tail.endswith(last)
    assert marks(tail, Ending.DONE) == (True, True, False)
    assert read_tail(Api.OPENAI, tail).generated == 9


@LINE_ENDS
@pytest.mark.parametrize(
    "half", [b"", b"data: [DO", b": ping", b"data: {}\n", b"x\r\ny"]
)
def test_the_rest_after_the_last_blank_line_is_unfinished(
    half: bytes, eol: bytes
) -> None:
    assert rest_of(half) == half
    assert rest_of(replies.token("a").replace(b"\n", eol) + half) == half
    assert rest_of(b"half" + eol * 2 + b"data: x" + eol * 2 + half) == half


# --- Several choices, and errors with something after them ------------------------


def of_choice(index: int, reason: str | None) -> bytes:
    choices = [{"index": index, "delta": {}, "finish_reason": reason}]
    return b"data: %b\n\n" % json.dumps({"choices": choices}).encode()


def test_half_of_several_choices_is_not_complete() -> None:
    half = of_choice(0, None) + of_choice(1, None) + of_choice(0, "stop")
    for tail in (half, half + DONE):
        assert not read_end(tail, Ending.DONE).complete
    assert read_end(half + of_choice(1, "length"), Ending.DONE).complete
    reasonless = of_choice(0, None) + of_choice(1, None) + DONE
    assert read_end(reasonless, Ending.DONE).complete


def test_half_of_several_native_completions_is_not_complete() -> None:
    ended = b'data: {"index":1,"stop":true}\n\n'
    assert not marks(b'data: {"index":0,"stop":false}\n\n' + ended, Ending.STOP)[0]
    assert marks(b'data: {"index":0,"stop":true}\n\n' + ended, Ending.STOP)[0]


def test_a_choice_that_has_ended_may_have_another_event() -> None:
    """Servers may send the usage of a choice behind its reason."""
    ends = of_choice(1, "stop") + of_choice(0, "stop")
    assert is_complete(ends + of_choice(1, None) + of_choice(0, "stop"), Ending.DONE)
    assert not is_complete(of_choice(1, None) + of_choice(0, "stop"), Ending.DONE)


@pytest.mark.parametrize(
    ("data", "ending", "ends"),
    [
        (b'{"index":1,"stop":true}', Ending.STOP, {1: True}),
        (b'{"index":0,"stop":false}', Ending.STOP, {0: False}),
        (b'{"content":"a"}', Ending.STOP, {}),  # of a server without several answers
        (b'{"choices":[{"index":2,"finish_reason":"stop"}]}', Ending.DONE, {2: True}),
        (b'{"choices":[{"index":2}]}', Ending.DONE, {2: False}),
        (b'{"choices":null}', Ending.DONE, {}),
        (b"[DONE]", Ending.DONE, {}),
        (b'{"index":1,"stop":true}', Ending.NAMED, {}),
    ],
)
def test_the_choices_that_end_in_an_event(
    data: bytes, ending: Ending, ends: dict[int, bool]
) -> None:
    assert ends_in(data, ending) == ends


@pytest.mark.parametrize("ending", [Ending.NAMED, Ending.TRANSCRIPT, Ending.BODY])
def test_other_streams_have_fields_for_errors_of_their_own(ending: Ending) -> None:
    item = b'data: {"type":"item","item":{"error":"no such file"}}\n\n'
    assert not has_error(item, ending)


@pytest.mark.parametrize("ending", [Ending.DONE, Ending.STOP])
@pytest.mark.parametrize(
    "error",
    [
        b'{"error":{"message":"no"}}',
        b'{ "error": "no"}',
        b'{"id":"x","choices":[],"error":{"code":500}}',
        b'{"object":"error","message":"no"}',
    ],
)
def test_an_error_counts_whatever_follows(error: bytes, ending: Ending) -> None:
    assert read_end(b"data: %b\n\n" % error + DONE, ending).failed
    written = error.replace(b'"', rb"\"")
    assert not read_end(b'data: {"content":"%b"}\n\n' % written, ending).failed
    assert not read_end(b'data: {"choices":[],"error":null}\n\n', ending).failed


@LINE_ENDS
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("completed", (True, False, False)),
        ("incomplete", (True, False, False)),  # as with `max_output_tokens`
        ("failed", (True, False, True)),
        ("failed.not", NOTHING),
    ],
)
def test_a_response_that_failed_is_at_its_end_and_has_an_error(
    kind: str, found: tuple[bool, bool, bool], eol: bytes
) -> None:
    last = responses(kind, response={"status": "x"})
    assert marks(last.replace(b"\n", eol), Ending.NAMED) == found
    written = responses("output_text.delta", delta="\nevent: response.failed\n")
    assert marks(written, Ending.NAMED) == NOTHING


def test_the_error_of_a_message_is_no_end() -> None:
    error = anthropic("error", error={"type": "overloaded_error", "message": "no"})
    assert marks(error, Ending.NAMED) == (False, False, True)


def test_an_end_has_the_usage_of_its_api() -> None:
    counts = {"input_tokens": 9, "output_tokens": 4}
    tail = event({"usage": counts, "timings": replies.timings_of(4, 9)})
    began = b'{"cache_read_input_tokens":20}'
    end = read_end(tail, Ending.NAMED, Api.ANTHROPIC, began, answers=3)
    assert (end.usage.prompt, end.usage.generated) == (29, 4)
    end = read_end(tail, Ending.DONE, Api.OPENAI, b"", answers=3)
    assert (end.usage.prompt, end.usage.generated) == (9, 12)


# --- A tally ----------------------------------------------------------------------


def choice(index: int, reason: str | None = None) -> bytes:
    fields: dict[str, Any] = {"index": index, "delta": {"content": "a"}}
    return event({"choices": [fields | {"finish_reason": reason}]})


def tally(*events: bytes, asked: int = 2) -> Tally:
    counts = Tally(Ending.DONE, asked)
    for byte in b"".join(events):
        counts.feed(bytes([byte]))
    return counts


@pytest.mark.parametrize("done", [True, False])
def test_a_choice_that_has_begun_has_to_end(done: bool) -> None:
    begun = choice(0), choice(1), choice(0, "stop")
    assert not tally(*begun).is_complete(done=done)
    assert tally(*begun, choice(1, "length")).is_complete(done=done)


def test_a_choice_that_was_asked_for_has_to_begin() -> None:
    """Unless the stream has its `[DONE]`: it may be a server without `n`."""
    counts = tally(choice(0, "stop"))
    assert not counts.is_complete(done=False)
    assert counts.is_complete(done=True)


def test_a_server_may_send_no_reasons() -> None:
    assert tally(choice(0), choice(1)).is_complete(done=True)
    assert not tally(choice(0), choice(1)).is_complete(done=False)


def test_native_completions_have_their_own_mark() -> None:
    counts = Tally(Ending.STOP, 2)
    counts.feed(event({"index": 1, "stop": True}) + event({"index": 0, "stop": False}))
    assert not counts.is_complete(done=False)
    counts.feed(event({"index": 0, "stop": True}))
    assert counts.is_complete(done=False)
    assert repr(counts) == "<Tally 2 of 2 ended>"


def test_a_tally_has_limits() -> None:
    """Behind it, the end of the stream alone counts."""
    long, many = Tally(Ending.DONE, 2), Tally(Ending.DONE, 2)
    long.feed(b"x" * (MOST_HELD + 1))
    for index in range(MOST_CHOICES + 1):
        many.feed(event({"choices": [{"index": index}]}))
    for counts in (long, many):
        counts.feed(choice(0))
        assert counts.is_complete(done=False)


# --- The same as plain regular expressions ----------------------------------------
#
# Searching for strings first is for speed.  What is found has to be what these
# expressions find, on any bytes.

_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_DONE_LINE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\][\r\n]")
_MARKS = {
    Ending.STOP: re.compile(rb'"stop"\s*:\s*true|"stop_type"\s*:\s*"(?!none)'),
    Ending.NAMED: re.compile(
        rb"(?:^|[\r\n])event: ?"
        rb"(?:message_stop|response\.(?:completed|incomplete|failed))[\r\n]"
    ),
    Ending.TRANSCRIPT: re.compile(
        _DONE_LINE.pattern + rb'|"type"\s*:\s*"transcript\.text\.done"'
    ),
    Ending.BODY: re.compile(rb""),
}
_REASONS = re.compile(rb'"finish_reason"\s*:\s*(null|""|"[^"]+")')
_LATER = re.compile(rb'"index"\s*:\s*[1-9]')
_USAGE_OBJECT = re.compile(
    rb'"usage"\s*:\s*(\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\})',
)
_TIMINGS_OBJECT = re.compile(rb'"timings"\s*:\s*(\{[^{}]*+\})')


def plain_end(tail: bytes, ending: Ending) -> tuple[bool, bool, bytes]:
    """Return whether a tail is complete and has a `[DONE]`, and its rest."""
    done = _DONE_LINE.search(tail) is not None
    if ending is Ending.DONE:
        reasons = _REASONS.findall(tail)
        reason = reasons[-1] if reasons else b""
        complete = done or (len(reason) > 2 and reason != b"null")
    else:
        complete = _MARKS[ending].search(tail) is not None
    if complete and _LATER.search(tail):
        ended: dict[int, bool] = {}
        for data in plain_events(tail):
            for index, ends in ends_in(data, ending).items():
                ended[index] = ended.get(index, False) or ends
        complete = all(ended.values()) or not any(ended.values())
    return complete, done, _BLANK_LINE.split(tail)[-1]


def plain_events(tail: bytes) -> list[bytes]:
    found = []
    for whole in _BLANK_LINE.split(tail)[:-1]:
        lines = re.split(rb"\r\n|\n|\r", whole)
        data = [line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:")]
        if data:
            found.append(b"\n".join(data))
    return found


def plain_usage(tail: bytes) -> bytes:
    """Return the objects that count, alone."""
    usages, timings = _USAGE_OBJECT.findall(tail), _TIMINGS_OBJECT.findall(tail)
    return b'"usage":%b,"timings":%b' % (
        usages[-1] if usages else b"null",
        timings[-1] if timings else b"null",
    )


PIECES = [
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"data: [DONE]",
    b"data:[DONE]",
    b"[DONE]",
    b"data: ",
    b"data: {",
    b"event: message_stop",
    b"event:response.failed",
    b"event: error",
    b'"finish_reason":null',
    b'"finish_reason" : "stop"',
    b'"finish_reason":""',
    b'"stop":true',
    b'"stop_type": "limit"',
    b'"index":0',
    b'"index" : 1',
    b'"index":10',
    b'"type":"transcript.text.done"',
    b'"usage":{"completion_tokens":4}',
    b'"usage": {"a":{"completion_tokens":5},"completion_tokens":6}',
    b'"usage":null',
    b'"usage":{"usage":{"completion_tokens":7}}',
    b'"',
    b"}",
    of_choice(0, None),
    of_choice(0, "stop"),
    of_choice(1, "length"),
    replies.finish(usage=replies.usage_of(9), tokens=9),
    replies.token("words"),
    replies.done(),
]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=14))
@example([b"data: [DONE]\n", b"\n\n"])
@example([b"\r", replies.done()])
@example([replies.token("a"), b"\n\n\n"])
@example([b'"usage":{"usage":{"completion_tokens":7}}'])
def test_any_bytes_are_read_as_by_plain_expressions(pieces: list[bytes]) -> None:
    tail = b"".join(pieces)
    for ending in Ending:
        end = read_end(tail, ending)
        assert (end.complete, end.done, end.rest) == plain_end(tail, ending)
        assert is_complete(tail, ending) == end.complete
        assert has_error(tail, ending) == end.failed
    assert list(events_in(tail)) == plain_events(tail)
    assert end.usage == read_tail(Api.OPENAI, plain_usage(tail))


def test_an_end_shows_no_text() -> None:
    end = read_end(replies.done() + b"data: secret", Ending.DONE)
    assert repr(end) == "<End complete done rest=12>"
    assert repr(End()) == "<End incomplete rest=0>"
