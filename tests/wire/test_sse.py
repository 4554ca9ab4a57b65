"""A relay reads the first event and the last bytes, and is not fooled by either."""

from __future__ import annotations

import json
from itertools import cycle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gollama_proxy.wire import sse
from gollama_proxy.wire.schema import Ending
from gollama_proxy.wire.sse import (
    DONE,
    STREAM_HEADERS,
    EventError,
    Gatherer,
    data_of,
    error_in,
    events_in,
    split_events,
)
from tests.fakes import replies
from tests.fakes.cases import case
from tests.fakes.replies import anthropic, native, responses

LINE_ENDS = pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])


def first_data(held: bytes) -> bytes | None:
    return next(events_in(held), None)


def opens(held: bytes, ending: Ending) -> bool:
    return sse.opens(split_events(held)[0], ending)


# --- Whole events -----------------------------------------------------------------

_some_lines = st.lists(
    st.sampled_from([b"data: a", b"", b": c", b"data: b\xff", b"\n", b"\r", b"\r\n"]),
    max_size=12,
)


@settings(deadline=None, database=None)
@given(
    lines=_some_lines,
    eol=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    sizes=st.lists(st.integers(1, 9), max_size=30),
)
@example(lines=[b"data: a", b"", b""], eol=b"\r\n", sizes=[1] * 30)
def test_pieces_are_gathered_to_whole_events(
    lines: list[bytes], eol: bytes, sizes: list[int]
) -> None:
    """What comes out is what went in, and each event is there with its blank line."""
    data = b"".join(line + eol for line in lines)
    gatherer, at = Gatherer(), 0
    events: list[bytes] = []
    for size in [*sizes, len(data)]:
        piece = data[at : at + size]
        at += len(piece)
        events += gatherer.feed(piece)
        rest = data[at - gatherer.size : at]
        assert not list(events_in(rest)), "an event is held that is complete"
    assert [found for each in events if (found := data_of(each)) is not None] == list(
        events_in(data)
    )


def test_a_gatherer_shows_how_much_it_holds_and_no_text() -> None:
    gatherer = Gatherer()
    assert gatherer.feed(b"data: a\n\ndata: secret") == [b"data: a"]
    assert repr(gatherer) == "<Gatherer, 12 bytes of an event>"


def test_each_byte_is_examined_once() -> None:
    """A thousand pieces of one event are joined when it ends, and not before."""
    gatherer = Gatherer()
    for _ in range(1000):
        assert gatherer.feed(b"x") == []
    assert len(gatherer._rest) == 1000
    assert gatherer.feed(b"\n\ny") == [b"x" * 1000]
    assert gatherer._rest == [b"y"]


@LINE_ENDS
def test_events_end_with_a_blank_line_of_any_kind(eol: bytes) -> None:
    stream = eol.join([b"data: a", b"data: b", b"", b": c", b"", b"data: d"])
    whole = [eol.join([b"data: a", b"data: b"]), b": c"]
    assert split_events(stream) == (whole, b"data: d")


def test_one_crlf_is_not_two_line_ends() -> None:
    assert split_events(b"data: a\r\ndata: b\r\n")[0] == []


# --- The first event --------------------------------------------------------------


@LINE_ENDS
def test_the_data_of_the_first_event_is_found(eol: bytes) -> None:
    held = eol.join([b'data: {"a":1}', b"", b'data: {"b":2}', b"", b""])
    assert first_data(held) == b'{"a":1}'


@LINE_ENDS
def test_an_event_is_not_seen_before_its_blank_line_is_complete(eol: bytes) -> None:
    """Whatever the pieces in which it comes; of a CRLF the CR is enough."""
    event = b"id: 7" + eol + b"data: one" + eol + b"data: two" + eol + eol[:1]
    for cut in range(len(event)):
        assert first_data(event[:cut]) is None
    assert first_data(event) == first_data(event + eol[1:]) == b"one\ntwo"


@LINE_ENDS
def test_comments_pings_and_events_without_data_are_passed_over(eol: bytes) -> None:
    before = [
        b":",
        b"",
        b": ping",
        b"",
        b"event: ping",
        b"id: 3",
        b"",
        b"",
        b"retry: 5",
    ]
    held = eol.join([*before, b"", b": why", b"data: x", b"event: y", b"", b""])
    assert first_data(held) == b"x"
    assert first_data(eol.join([*before, b"", b""])) is None


def test_the_pings_of_llama_server_do_not_begin_an_answer() -> None:
    assert first_data(replies.ping() * 3) is None
    held = replies.ping() * 3 + replies.role() + replies.token("a")
    data = first_data(held)
    assert data is not None
    assert json.loads(data)["choices"][0]["delta"]["role"] == "assistant"


def test_the_name_of_an_event_is_not_its_data() -> None:
    assert first_data(b"event: data: x\ndatum: y\n:data: z\n\n") is None


@pytest.mark.parametrize(
    ("line", "data"),
    [(b"data:x", b"x"), (b"data: x", b"x"), (b"data:", b""), (b"data: a: b", b"a: b")],
)
def test_the_space_after_the_colon_is_not_data(line: bytes, data: bytes) -> None:
    assert first_data(line + b"\n\n") == data


def test_there_is_no_event_before_the_first_byte() -> None:
    assert first_data(b"") is None


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=9).map(
    str.encode
)


@settings(deadline=None)
@given(
    noise=st.lists(LINE.map(b": ".__add__) | st.just(b""), max_size=4),
    data=st.lists(LINE.filter(lambda line: not line.startswith(b" ")), min_size=1),
    eols=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1),
    behind=st.binary(max_size=20),
)
@example(noise=[], data=[b"x"], eols=[b"\n", b"\r\n"], behind=b"")
@example(noise=[], data=[b"x"], eols=[b"\r\n", b"\n"], behind=b"")
@example(noise=[], data=[b"x"], eols=[b"\n", b"\r"], behind=b"")
def test_first_data_reads_what_the_standard_reads(
    noise: list[bytes], data: list[bytes], eols: list[bytes], behind: bytes
) -> None:
    """HTML standard, 9.2.6: the data lines of an event, joined with line feeds.

    Each line may have another end, if only a CR and an LF stay apart.
    """
    held = b""
    ends = cycle(eols)
    for line in [*noise, *(b"data: " + line for line in data), b""]:
        end = next(ends)
        held += line + (b"\r" if (held + line)[-1:] == b"\r" and end == b"\n" else end)
    assert first_data(held + behind) == b"\n".join(data)


@LINE_ENDS
def test_the_data_of_each_event_is_found(eol: bytes) -> None:
    """Each of them when it is complete, and the unfinished one after them never."""
    lines = [b"data: one", b"", b": ping", b"", b"data: two", b"data: 2", b"", b""]
    held = eol.join([*lines, b"event: x", b"", b"data: three", b"", b"data: half"])
    assert list(events_in(held)) == [b"one", b"two\n2", b"three"]


@settings(deadline=None)
@given(
    data=st.lists(st.lists(LINE.map(bytes.lstrip), min_size=1, max_size=3), max_size=4),
    eol=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cut=st.integers(0, 200),
)
def test_a_cut_loses_no_complete_event(
    data: list[list[bytes]], eol: bytes, cut: int
) -> None:
    """The events that have come are read as in the whole stream."""
    events = [
        eol.join([*(b"data: " + line for line in lines), b"", b""]) for lines in data
    ]
    held = b"".join(events)
    read = list(events_in(held))
    assert read == [b"\n".join(lines) for lines in data]
    some = list(events_in(held[:cut]))
    assert some == read[: len(some)]
    assert len(some) >= sum(
        len(b"".join(events[: n + 1])) <= cut for n in range(len(events))
    )


# --- Whether a stream has begun in earnest ----------------------------------------


def chat(_reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": _reason}
    return replies.event({"id": "x", "choices": [choice]})


@pytest.mark.parametrize(
    "event",
    [
        replies.role(),
        chat(role="assistant"),
        chat(role="assistant", content=""),  # OpenAI, vLLM
        chat(role="assistant", content=None, refusal=None, tool_calls=[]),
        chat(role="assistant", content="", reasoning_content=""),
        chat(),
        chat("", content=""),
        replies.event({"choices": [{"index": 0, "text": "", "finish_reason": None}]}),
        replies.event({"choices": [{}]}),
        replies.event({"choices": [{"delta": None}, {"text": None}]}),
        replies.ping(),
        b": OPENROUTER PROCESSING\n\n",
        b"event: start\nid: 7\n\n",
        b"",
    ],
)
def test_a_role_alone_does_not_begin_an_answer(event: bytes) -> None:
    """Other servers than llama-server do so before they have read the prompt."""
    assert not opens(event, Ending.DONE)
    assert not opens(event * 3, Ending.DONE)
    assert opens(event * 3 + replies.token("a"), Ending.DONE)


def test_text_that_quotes_an_event_is_no_content() -> None:
    quoting = {"choices": [{"delta": {"role": '"delta":{"content":"a'}}]}
    assert not opens(replies.event(quoting), Ending.DONE)


def test_a_stream_begins_with_the_first_event_that_has_something() -> None:
    """Whatever it is: what cannot be read is not ours to judge."""
    for event in [
        replies.token("a"),
        replies.token(" "),
        replies.token('"'),
        replies.token("\\"),
        chat(role="assistant", content="a"),
        chat(reasoning_content="hm"),
        chat(reasoning="hm"),
        chat(refusal="no"),
        chat(tool_calls=[{"index": 0}]),
        chat("stop"),
        chat("length", content=""),
        replies.finish(),
        replies.event(replies.text_completion("a", reason=None, last=False)),
        replies.event(replies.text_completion("", reason="stop")),
        replies.event({"choices": [{}, {"index": 1, "delta": {"content": "a"}}]}),
        replies.event({"choices": [], "usage": replies.usage_of()}),
        replies.event({"choices": [{}], "prompt_progress": {"processed": 1}}),
        replies.event({}),
        replies.error_event("no"),
        replies.done(),
        b"data: 7\n\n",
        b"data:\n\n",
        b'data: {"choices":7}\n\n',
        b'data: {"choices":[7]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b"data: " + b"[" * 99_999 + b"\n\n",
    ]:
        with case(event):
            assert opens(event, Ending.DONE)
            assert opens(replies.ping() + replies.role() + event, Ending.DONE)
            assert not opens(event[:-1], Ending.DONE)


@pytest.mark.parametrize(
    "event",
    [
        anthropic("message_start", message={"content": []}),
        anthropic("content_block_start", index=0),
        anthropic("ping"),
        responses("created", response={}),
        responses("queued"),
        responses("in_progress"),
        responses("output_item.added", item={}),
        responses("content_part.added"),
        b'event: message_start\ndata: {"message": {}, "type" : "message_start"}\n\n',
    ],
)
def test_the_preamble_of_an_api_with_named_events_does_not_begin_an_answer(
    event: bytes,
) -> None:
    assert not opens(event, Ending.NAMED)
    word = anthropic("content_block_delta", delta={"text": "a"})
    assert opens(event + word, Ending.NAMED)


@pytest.mark.parametrize(
    "event",
    [
        anthropic("content_block_delta", delta={"text": "a"}),
        anthropic("message_delta"),
        anthropic("message_stop"),
        anthropic("pings"),
        responses("output_text.delta", delta="a"),
        responses("completed"),
        responses("failed"),
        b'event: error\ndata: {"type":"error"}\n\n',
        b"data: nonsense\n\n",
        anthropic("content_block_delta", delta={"text": '"type":"message_start"'}),
    ],
)
def test_any_other_event_with_a_name_is_a_beginning(event: bytes) -> None:
    assert opens(event, Ending.NAMED)
    assert opens(anthropic("message_start") + anthropic("ping") + event, Ending.NAMED)


@pytest.mark.parametrize("ending", [Ending.STOP, Ending.BODY])
def test_elsewhere_any_event_is_a_beginning(ending: Ending) -> None:
    assert opens(native("", stop=False), ending)
    assert opens(replies.role(), ending)
    assert not opens(replies.ping(), ending)
    assert not opens(native("a", stop=False)[:-1], ending)


# --- Errors as events -------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            b'{"error":{"code":500,"message":"boom","type":"server_error"}}',
            EventError("boom", "server_error", 500),
        ),
        (
            b'{"error": {"message": "no", "code": "rate_limit", "param": null}}',
            EventError("no", "server_error", "rate_limit"),
        ),
        (
            b'{"type":"error","error":{"type":"overloaded_error","message":"Busy"}}',
            EventError("Busy", "overloaded_error", None),
        ),
        (b'{"error":{}}', EventError()),
        (b'{"error":"text"}', EventError("text")),  # LM Studio
        (b'{"error":{"code":"503"}}', EventError(code=503)),
        (b'{"error":{"code":"5xx"}}', EventError(code="5xx")),
        (b'{"error":{"message":null,"type":null,"code":true}}', EventError()),
        (b'{"error":["text"]}', EventError()),
        (b'{"error":500}', EventError()),
        (
            b'{"object":"error","message":"boom","type":"E","param":null,"code":500}',
            EventError("boom", "E", 500),  # vLLM, until it had an object for it
        ),
    ],
)
def test_an_event_that_is_an_error_is_read(data: bytes, error: EventError) -> None:
    assert error_in(data) == error


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[DONE]",
        b'{"error":null,"choices":[]}',
        b'{"error":{"message":',
        b'{"id":"error","choices":[]}',
        b'"error"',
        json.dumps({"content": '"error": {"message": "x"}'}).encode(),
        json.dumps({"choices": [], "pad": "x" * 64, "error": {}}).encode(),
        b'{"error":{"message":"caf\xe9"}}',
        b'{"error":{"message":"\\ud800"}}',
        b'{"error":{},"x":' + b"[" * 100_000,
    ],
)
def test_other_events_are_not_errors(data: bytes) -> None:
    assert error_in(data) is None


def test_the_first_event_of_an_answer_is_no_error() -> None:
    for event in (replies.role(), replies.token('"error"'), native("a", stop=False)):
        data = first_data(event)
        assert data is not None
        assert error_in(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b'{"code":500,"message":"no","type":"server_error"}',  # llama-server
        b'{"type":"error","code":500,"message":"no"}',
        b'{"type":"error","message":"no","param":null}',
    ],
)
def test_an_error_may_have_no_object_around_it(data: bytes) -> None:
    error = error_in(data)
    assert error is not None
    assert error.message == "no"


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"message_start","message":{"role":"assistant"}}',
        b'{"type":"x","message":"no","code":"a"}',
        b'{"message":"no"}',
    ],
)
def test_a_message_alone_is_not_an_error(data: bytes) -> None:
    assert error_in(data) is None


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("server_error", "server_error", "server_error"),
        ("rate_limit_exceeded", "rate_limit_error", 429),
        ("invalid_prompt", "invalid_request_error", 400),
        ("image_too_large", "invalid_request_error", 400),
        (None, "server_error", None),
    ],
)
def test_a_response_that_failed_is_an_error(
    code: str | None, kind: str, status: int | str | None
) -> None:
    """Servers write its fields in any order (vLLM the type at the end)."""
    error = {"code": code, "message": "no"}
    response = {"id": "resp_1", "object": "response", "error": error}
    for event in (
        {"type": "response.failed", "response": response},
        {"response": response, "sequence_number": 3, "type": "response.failed"},
    ):
        assert error_in(json.dumps(event).encode()) == EventError("no", kind, status)


@pytest.mark.parametrize("response", [None, "no", {}, {"error": None}, {"error": "x"}])
def test_a_response_that_failed_may_have_no_reason(response: object) -> None:
    event = {"type": "response.failed", "response": response, "error": None}
    assert error_in(json.dumps(event).encode()) == EventError()


def test_a_response_that_runs_is_no_error() -> None:
    for kind in ("response.created", "response.in_progress", "response.completed"):
        response = {"error": None, "metadata": {"a": "response.failed"}}
        event = {"type": kind, "response": response}
        assert error_in(json.dumps(event).encode()) is None


def test_whether_an_event_is_an_error_is_known_from_its_beginning() -> None:
    error = replies.error_event("engine died " * 20).removesuffix(b"\n\n")
    named = b"event: error\n" + error
    for event in (error, named, error.replace(b"data: ", b"data:")):
        for size in range(1, len(event)):
            assert sse.may_become_error(event[:size]), event[:size]
    for begun in (b"", b": ping\n", b"\n", b"data: [DO", b"x"):
        assert not sse.may_become_error(begun)
    token_ = replies.token("word " * 20).removesuffix(b"\n\n")
    assert not sse.may_become_error(token_)
    assert not sse.may_become_error(token_[:80])
    assert not sse.may_become_error(error + b"x" * sse.MOST_ERROR)


# --- What the hub adds ------------------------------------------------------------


def test_the_done_that_the_hub_adds_is_the_one_that_workers_send() -> None:
    assert replies.done() == DONE


def test_streams_ask_proxies_not_to_buffer() -> None:
    assert STREAM_HEADERS == {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def test_events_with_content_are_counted_and_errors_are_not() -> None:
    held = replies.role() + replies.token("a") + replies.token("b")
    ended = replies.error_event("no") + replies.done()
    assert sse.content_events(held + ended, Ending.DONE) == 2
