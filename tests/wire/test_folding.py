"""A stream folded into one answer: what went in comes out, or nothing does."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.wire.assemble import (
    MessageAssembler,
    NativeAssembler,
    ResponseAssembler,
)
from gollama_proxy.wire.folding import (
    ANY,
    AssemblyError,
    ChatAssembler,
    LostTextError,
    Requested,
    TextAssembler,
    UnfoldableError,
)
from tests.fakes import replies
from tests.fakes.replies import error_event, event, named_event
from tests.fakes.streams import chat_stream

Kind = Literal["chat", "text"]
LIMIT = 1 << 20


def fold(
    stream: bytes, kind: Kind = "chat", limit: int = LIMIT, asked: Requested = ANY
) -> dict[str, Any]:
    assembler = (ChatAssembler if kind == "chat" else TextAssembler)(limit, asked)
    assembler.feed(stream)
    answer: dict[str, Any] = json.loads(assembler.finish())
    return answer


def delta(delta: Any, index: int = 0, **choice: Any) -> bytes:
    reason = choice.pop("finish_reason", None)
    choices = [{"index": index, "delta": delta, "finish_reason": reason, **choice}]
    return replies.event({"id": "x", "choices": choices})


def usage(tokens: int = 3) -> bytes:
    """Build the closing event of others: no choice, and the usage of all."""
    return replies.event({"id": "x", "choices": [], "usage": replies.usage_of(tokens)})


def end(reason: str = "stop", index: int = 0, **choice: Any) -> bytes:
    return delta({}, index, finish_reason=reason, **choice)


# --- Whole answers, in any cuts ---------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.sampled_from(["content", "reasoning_content", "refusal", "reasoning"])
CALLS = st.lists(st.tuples(TEXTS, TEXTS), max_size=2)
LOGPROB = st.fixed_dictionaries({"token": TEXTS, "logprob": st.floats(-99, 0)})


@st.composite
def chat_choices(draw: st.DrawFn, index: int) -> tuple[dict[str, Any], list[bytes]]:
    """Draw a choice, and the events that bring it."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    events = [delta({"role": "assistant", "content": None}, index)]
    logprobs: list[Any] = []
    for name, text in draw(st.lists(st.tuples(NAMES, TEXTS), min_size=1)):
        message[name] = message.get(name, "") + text
        parts = draw(st.lists(LOGPROB, max_size=2))
        logprobs += parts
        choice = {"logprobs": {"content": parts}} if parts else {}
        events.append(delta({name: text}, index, **choice))
    for number, (name, arguments) in enumerate(draw(CALLS)):
        function = {"name": name, "arguments": arguments}
        call = {"type": "function", "id": f"c{number}", "function": function}
        message.setdefault("tool_calls", []).append(call)
        cut = draw(st.integers(0, len(arguments)))
        first = {"index": number, **call, "function": {"name": name}}
        events.append(delta({"tool_calls": [first]}, index))
        for part in (arguments[:cut], arguments[cut:]):
            piece = {"index": number, "function": {"arguments": part}}
            events.append(delta({"tool_calls": [piece]}, index))
    reason = draw(st.sampled_from(["stop", "tool_calls"]))
    events.append(end(reason, index))
    choice = {"finish_reason": reason, "index": index, "message": message}
    return choice | ({"logprobs": {"content": logprobs}} if logprobs else {}), events


@st.composite
def chat_streams(draw: st.DrawFn) -> tuple[list[Any], list[bytes]]:
    """Draw choices, and their events in turns."""
    drawn = [draw(chat_choices(index)) for index in range(draw(st.integers(1, 3)))]
    waiting = [events[:] for _, events in drawn]
    events = []
    while any(waiting):
        source = draw(st.sampled_from([events for events in waiting if events]))
        events.append(source.pop(0))
    return [choice for choice, _ in drawn], events


@st.composite
def cut(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]


@given(st.data(), chat_streams(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_pieces_are_assembled_to_one_answer(
    data: st.DataObject, drawn: tuple[list[Any], list[bytes]], newline: bytes
) -> None:
    """Whatever the cuts and the line ends are, and whatever stands between events."""
    choices, events = drawn
    between = data.draw(st.sampled_from([b"", b":\n\n", b"event: x\nid: 1\n"]))
    stream = between.join([*events, usage(1), replies.done()])
    assembler = ChatAssembler(LIMIT)
    for piece in data.draw(cut(stream.replace(b"\n", newline))):
        assembler.feed(piece)
    answer = json.loads(assembler.finish())
    assert answer.pop("choices") == choices
    assert answer == {
        "id": "x",
        "object": "chat.completion",
        "usage": replies.usage_of(1),
    }


@given(st.lists(st.tuples(TEXTS, st.lists(LOGPROB)), min_size=1))
def test_texts_and_their_probabilities_are_joined(
    parts: list[tuple[str, list[Any]]],
) -> None:
    """The last event of llama-server has a null for them, which does not undo them."""
    choice = {"index": 0, "finish_reason": None}
    events = [
        {
            "text": text,
            "logprobs": {"content": probabilities} if probabilities else None,
        }
        for text, probabilities in parts
    ]
    stream = b"".join(replies.event({"choices": [choice | event]}) for event in events)
    last = replies.text_completion("", reason="stop")
    last["usage"] = replies.usage_of(1)
    stream += replies.event(last) + replies.done()
    answer = fold(stream, "text")
    logprobs = [value for _, values in parts for value in values]
    assert answer["choices"] == [
        {
            "text": "".join(text for text, _ in parts),
            "index": 0,
            "logprobs": {"content": logprobs} if logprobs else None,
            "finish_reason": "stop",
        }
    ]
    assert answer == last | {"choices": answer["choices"]}


def test_an_answer_has_the_fields_of_llama_server() -> None:
    stream = replies.role() + replies.token("a") + replies.token(" b")
    stream += replies.finish("length", usage=replies.usage_of(2), tokens=2)
    expected = replies.chat_completion("a b", reason="length", tokens=2)
    assert fold(stream + replies.done()) == expected


# --- Odd events -------------------------------------------------------------------


def test_the_usage_of_the_first_choice_counts_in_llama_server() -> None:
    """It comes after the last event of each choice, in any order of them."""
    first = delta({"content": "a"}) + end() + usage(1)
    second = delta({"content": "b"}, 1) + end(index=1) + usage(2)
    for stream in (first + second, second + first):
        assert fold(stream)["usage"]["completion_tokens"] == 1


def test_the_one_usage_of_others_follows_all_choices() -> None:
    stream = delta({"content": "a"}) + delta({"content": "b"}, 1)
    stream += end() + end(index=1) + usage(7)
    assert fold(stream)["usage"]["completion_tokens"] == 7


def test_a_stream_without_usage_needs_its_done() -> None:
    """Else the usage may have been cut off, or another choice."""
    stream = delta({"content": "a"}) + end()
    with pytest.raises(AssemblyError, match="before the answer was complete"):
        fold(stream)
    assert "usage" not in fold(stream + replies.done())


def test_other_fields_of_the_last_event_stay() -> None:
    choices = [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]
    event = {"choices": choices, "usage": None, "service_tier": "x", "y": [1.50]}
    answer = fold(replies.event(event) + replies.done())
    assert (answer["service_tier"], answer["y"]) == ("x", [1.5])


def test_events_without_content_are_passed_over() -> None:
    odd = b"data: null\n\ndata:\n\ndata: {}\n\n\n:\n\nretry: 5\n\ndata\n\n"
    stream = odd + delta({"content": "a"}) + odd + end() + odd + usage() + odd
    assert fold(stream)["choices"][0]["message"]["content"] == "a"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_data_of_several_lines_is_one_event(newline: bytes) -> None:
    """Also byte by byte: the LF of a CRLF is not another line."""
    event = b'data: {"choices":\ndata:[{"delta":{"content":"a"},\ndata:"index":0}]}\n\n'
    assembler = ChatAssembler(LIMIT)
    for byte in (event + end() + usage()).replace(b"\n", newline):
        assembler.feed(bytes([byte]))
    assert b'"content":"a"' in assembler.finish()


def test_nothing_counts_after_the_done() -> None:
    stream = delta({"content": "a"}) + end() + replies.done() + b"data: nonsense\n\n"
    assert fold(stream)["choices"][0]["message"]["content"] == "a"


def test_repeated_fields_are_not_doubled() -> None:
    """Some servers repeat the role, or the name of a call, in each delta."""
    call = {"index": 0, "id": "i", "type": "function", "function": {"name": "f"}}
    parts = delta({"role": "assistant", "tool_calls": [call]})
    message = fold(parts + parts + end() + usage())["choices"][0]["message"]
    function = {"name": "f", "arguments": ""}
    calls = [{"type": "function", "function": function, "id": "i"}]
    assert message == {"role": "assistant", "content": "", "tool_calls": calls}


def test_a_null_stays_where_no_text_comes() -> None:
    """The content alone is never null, as in llama-server."""
    stream = delta({"content": None, "refusal": None, "annotations": []})
    stream += delta({"content": "a", "tool_calls": []}, logprobs=None) + end() + usage()
    choice = fold(stream)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "a", "refusal": None}
    assert choice["logprobs"] is None


def test_lists_of_probabilities_may_be_null() -> None:
    def parts(content: Any, refusal: Any) -> bytes:
        logprobs = {"content": content, "refusal": refusal}
        return delta({"content": "a"}, logprobs=logprobs)

    stream = parts([1], None) + parts([2], None) + parts(None, [3]) + end() + usage()
    logprobs = fold(stream)["choices"][0]["logprobs"]
    assert logprobs == {"content": [1, 2], "refusal": [3]}


# --- What is no answer ------------------------------------------------------------


def test_no_cut_off_stream_is_an_answer() -> None:
    """Not one byte may be missing before the event with usage is complete."""
    stream = replies.role() + replies.token("a")
    stream += replies.finish("stop", usage=replies.usage_of())
    for length in range(len(stream)):
        with pytest.raises(AssemblyError):
            fold(stream[:length])
    fold(stream)


def test_a_done_without_the_end_of_each_choice_is_no_answer() -> None:
    stream = delta({"content": "a"}) + delta({"content": "b"}, 1) + end()
    for cut_off in (b"", delta({"content": "a"}), stream):
        with pytest.raises(AssemblyError, match="before the answer was complete"):
            fold(cut_off + replies.done())


@pytest.mark.parametrize("event", ["%b", "event: error\n%b"])
def test_the_workers_own_error_is_passed_on(event: str) -> None:
    parts = event.encode() % replies.error_event("no such luck", 503)
    with pytest.raises(AssemblyError, match="with an error") as caught:
        fold(replies.token("a") + parts)
    error = caught.value.error
    assert error is not None
    assert (error.message, error.code) == ("no such luck", 503)


@pytest.mark.parametrize(
    "event",
    [
        b"data: nonsense\n\n",
        b'data: {"choices":[{"delta":{"content":"\\ud800"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":%b}}]}\n\n' % (b"[" * 100_000),
        b'data: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[{"delta":{"audio":{"data":"x"}}}]}\n\n',
        b'data: {"choices":[{"delta":{"images":[{"index":0}]}}]}\n\n',
    ],
)
def test_an_event_that_cannot_be_folded_makes_no_answer(event: bytes) -> None:
    with pytest.raises(AssemblyError, match="cannot be") as caught:
        fold(event)
    assert caught.value.error is None


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_an_answer_without_its_text_is_none(kind: Kind, reason: str) -> None:
    """llama-server has it raw, such as '<tool_call>{"na', but not in the stream."""
    stream = delta({"role": "assistant", "content": None}) + end(reason) + usage(5)
    with pytest.raises(LostTextError):
        fold(stream, kind)


def test_an_answer_that_stops_at_once_is_empty() -> None:
    """Its one token is the end of turn."""
    answer = fold(replies.role() + replies.finish("stop", usage=replies.usage_of(1)))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}


def feed_often(assembler: ChatAssembler, data: bytes, times: int) -> None:
    for _ in range(times):
        assembler.feed(data)


@pytest.mark.parametrize(
    "event",
    [
        delta({"content": "x" * 100}),
        delta({"tool_calls": [{"index": 0, "function": {"arguments": "x" * 100}}]}),
        delta({"content": ""}, logprobs={"content": ["x" * 100]}),
    ],
    ids=["text", "arguments", "logprobs"],
)
def test_an_answer_has_a_limit(event: bytes) -> None:
    with pytest.raises(AssemblyError, match="longer than 10000 characters"):
        feed_often(ChatAssembler(10_000), event, 100)


def test_choices_and_calls_count_even_if_they_are_empty() -> None:
    calls = (delta({"tool_calls": [{"index": n}]}) for n in range(1000))
    for events in (calls, (delta({}, n) for n in range(1000))):
        with pytest.raises(AssemblyError, match="longer than"):
            fold(b"".join(events), limit=100_000)


@pytest.mark.parametrize("piece", [b"x", b"data: x\n"], ids=["line", "event"])
def test_an_event_without_an_end_has_a_limit(piece: bytes) -> None:
    with pytest.raises(AssemblyError, match="longer than"):
        feed_often(ChatAssembler(1000), piece, 1001)


def test_a_long_answer_of_short_events_is_accepted() -> None:
    """What counts is the answer, which is a fraction of what its events take."""
    assembler = ChatAssembler(10_000)
    feed_often(assembler, delta({"content": "x"}), 5000)
    assembler.feed(end() + usage())
    assert b"x" * 5000 in assembler.finish()
    assert re.fullmatch(r"<ChatAssembler size=\d+ open>", repr(assembler))


@pytest.mark.parametrize("where", [b'"created"', b'"model"'])
def test_no_answer_is_made_of_invalid_utf_8(where: bytes) -> None:
    """Fields are taken over unread, and would get into the answer as they are."""
    stream = chat_stream(["a"]).replace(where, b'"x":"\xff",' + where)
    with pytest.raises(AssemblyError):
        assembled = ChatAssembler(1 << 20)
        assembled.feed(stream)
        assembled.finish()


# --- Calls of tools ---------------------------------------------------------------


def call(**fields: Any) -> dict[str, Any]:
    names = {name: fields.pop(name) for name in ("name", "arguments") if name in fields}
    return {"type": "function", "function": names, **fields}


def calls_of(*parts: dict[str, Any]) -> list[tuple[Any, ...]]:
    events = b"".join(delta({"tool_calls": [each]}) for each in parts)
    message = fold(events + end("tool_calls") + usage())["choices"][0]["message"]
    return [
        (each.get("id"), each["function"]["name"], each["function"]["arguments"])
        for each in message["tool_calls"]
    ]


@pytest.mark.parametrize("index", [{"index": 0}, {}], ids=["index 0", "no index"])
def test_calls_are_distinguished_by_their_ids(index: dict[str, int]) -> None:
    """Some servers give each call the index 0, and others give none."""
    parts = calls_of(
        call(id="a", name="write", arguments='{"x"', **index),
        call(arguments=":1}", **index),
        call(id="b", name="write", arguments='{"x":2}', **index),
    )
    assert parts == [("a", "write", '{"x":1}'), ("b", "write", '{"x":2}')]


def test_calls_with_one_id_are_distinguished_by_their_index() -> None:
    parts = [call(index=n, id="call", name="f", arguments=str(n)) for n in range(2)]
    assert calls_of(*parts) == [("call", "f", "0"), ("call", "f", "1")]


def test_calls_are_in_the_order_of_their_indices() -> None:
    parts = [call(index=n, id=str(n), name="f", arguments="{}") for n in (1, 0)]
    assert [each[0] for each in calls_of(*parts)] == ["0", "1"]


def test_an_id_may_follow_the_name_of_a_call() -> None:
    parts = [
        call(index=0, name="f"),
        call(index=0, id="a"),
        call(index=0, arguments="1"),
    ]
    assert calls_of(*parts) == [("a", "f", "1")]


@pytest.mark.parametrize("name", ["f", "g"])
def test_calls_that_cannot_be_distinguished_are_refused(name: str) -> None:
    parts = [
        call(index=0, name="f", arguments="{}"),
        call(index=0, name=name, arguments="{}"),
    ]
    with pytest.raises(UnfoldableError, match="distinguished"):
        calls_of(*parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"content": "a", "reasoning_details": [{"text": "x"}]},
        {"content": "a", "provider_specific_fields": {"x": 1}},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"tool_calls": [call(index=0, id="a", name="f", extra_content={"x": 1})]},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "strict": True}}]},
        {"tool_calls": {"0": {}}},
        {"tool_calls": [{"index": "0"}]},
        {"content": ["a"]},
        "a",
    ],
)
def test_a_shape_that_is_unknown_cannot_be_folded(parts: Any) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold(delta(parts) + end() + usage())
    assert not isinstance(caught.value, LostTextError)


# --- Choices ----------------------------------------------------------------------


def test_fields_of_a_choice_stay() -> None:
    """Such as vLLM's `stop_reason`; but not those that change."""
    stream = delta({"content": "a"}, stop_reason=None) + end(stop_reason=7) + usage()
    assert fold(stream)["choices"][0]["stop_reason"] == 7
    grows = delta({}, token_ids=[1]) + delta({}, token_ids=[2]) + end() + usage()
    with pytest.raises(UnfoldableError):
        fold(grows)


def test_two_choices_of_one_index_cannot_be_folded() -> None:
    """Nor another number of them than was asked for, as of a server without `n`."""
    one = delta({"content": "a"}) + end()
    with pytest.raises(UnfoldableError, match="after its end"):
        fold(one + delta({"content": "b"}) + end() + usage())
    with pytest.raises(UnfoldableError, match="number of choices"):
        fold(one + usage(), asked=Requested(choices=2))
    assert fold(one + usage(), asked=Requested(choices=1))


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_text_held_back_for_a_stop_string_is_noticed(kind: Kind) -> None:
    stream = delta({"content": "a"}, text="a") + end("length") + usage()
    with pytest.raises(LostTextError, match="lack the last text"):
        fold(stream, kind, asked=Requested(stops=True))
    stream = delta({"content": "a"}, text="a") + end("stop") + usage()
    assert fold(stream, kind, asked=Requested(stops=True))


# --- Events that differ in a word -------------------------------------------------


class Plain(ChatAssembler):
    """Learns nothing, so that each event is decoded."""

    def _learn(self, *learnt: Any) -> None:
        pass


WORDS = st.text(max_size=4) | st.sampled_from(['"', "\\", "~", '","x":"', "\n\n", "é"])
SHAPES: list[dict[str, Any]] = [
    {"content": ""},
    {"content": "", "role": "assistant"},
    {"reasoning_content": ""},
    {"content": "", "reasoning_content": "same"},
    {"content": "", "other": None},
    {"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": ""}}]},
    {"content": "~", "reasoning": ""},
]


@st.composite
def similar_events(draw: st.DrawFn) -> list[bytes]:
    """Draw a stream whose events mostly have the shape of the one before."""
    events = []
    runs = st.lists(st.tuples(st.sampled_from(SHAPES), st.lists(WORDS, max_size=6)))
    for shape, words in draw(runs):
        index, escaped = draw(st.sampled_from([0, 0, 0, 1])), draw(st.booleans())
        more = draw(st.sampled_from([{}, {}, {"logprobs": {"content": [1]}}, {"a": 1}]))
        for word in words:
            parts = {
                name: value or word for name, value in shape.items() if value != []
            }
            choice = {"index": index, "delta": parts, "finish_reason": None, **more}
            event = json.dumps({"id": "x", "choices": [choice]}, ensure_ascii=escaped)
            events.append(b"data: %b\n\n" % event.encode(errors="replace"))
    damaged = draw(
        st.sampled_from([b"", b"", b"\\", b'"', b"\xff", b"\\ud83d", b"\x01"])
    )
    if events and damaged:
        at = draw(st.integers(0, len(events) - 1))
        events[at] = events[at].replace(b'"}', damaged + b'"}')
    return [*events, end(), end(index=1), usage(), replies.done()]


@given(similar_events(), st.booleans(), st.sampled_from([300, 2000, LIMIT]))
def test_learning_does_not_change_the_result(
    events: list[bytes], together: bool, limit: int
) -> None:
    """The answer is the same, or there is none for the same kind of reason."""

    def assembled(make: type[ChatAssembler]) -> Any:
        assembler = make(limit)
        try:
            for piece in [b"".join(events)] if together else events:
                assembler.feed(piece)
            return json.loads(assembler.finish())
        except AssemblyError as exc:
            return type(exc)

    assert assembled(ChatAssembler) == assembled(Plain)


def test_only_the_changing_word_of_similar_events_is_kept() -> None:
    assembler = ChatAssembler(LIMIT)
    for word in ("a", "b", "\n", "é", '"', "z"):
        assembler.feed(delta({"content": word}))
    assert len(assembler._words) == 3
    assembler.feed(end() + replies.done())
    assert not assembler._words
    answer = json.loads(assembler.finish())
    assert answer["choices"][0]["message"]["content"] == 'ab\né"z'


def test_a_word_that_cannot_be_read_is_noticed_in_time() -> None:
    assembler = ChatAssembler(LIMIT)
    for word in (b"a", b"b", b"c", b"\xff"):
        assembler.feed(delta({"content": "?"}).replace(b"?", word))
    with pytest.raises(UnfoldableError, match="cannot be read"):
        assembler.finish()


@pytest.mark.parametrize("word", ['"', "\\", '","x":"'])
def test_bytes_that_are_not_a_word_are_read_as_events(word: str) -> None:
    """They look like one between what was learnt, and end the string too early."""
    assembler = ChatAssembler(LIMIT)
    for text in ("a", "b", "c"):
        assembler.feed(delta({"content": text}))
    broken = delta({"content": "?"}).replace(b"?", word.encode())
    if word == '","x":"':
        assembler.feed(broken)
        assert not assembler._words
    else:
        with pytest.raises(UnfoldableError):
            assembler.feed(broken)


def test_escapes_count_for_what_they_stand_for() -> None:
    assembler = ChatAssembler(700)
    event = delta({"content": "é"}).replace("é".encode(), rb"\u00e9")
    for _ in range(50):
        assembler.feed(event)
    assembler.feed(end() + replies.done())
    assert (
        json.loads(assembler.finish())["choices"][0]["message"]["content"] == "é" * 50
    )


def test_events_that_keep_changing_are_learnt_a_few_times() -> None:
    assembler = ChatAssembler(LIMIT)
    for number in range(60):
        name = "content" if number % 3 else "reasoning_content"
        assembler.feed(delta({name: "a"}) + delta({name: "b"}))
    assert assembler._learnt == 8
    assembler.feed(end() + replies.done())
    assert (
        json.loads(assembler.finish())["choices"][0]["message"]["content"] == "ab" * 40
    )


def test_a_call_may_repeat_its_name_while_its_arguments_come() -> None:
    def call(arguments: str) -> bytes:
        function = {"name": "paint", "arguments": arguments}
        return delta({"tool_calls": [{"index": 0, "function": function}]})

    (choice,) = fold(call('{"a"') + call(":1}") + end() + replies.done())["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "paint", "arguments": '{"a":1}'}


def test_a_server_with_more_text_in_its_answer_is_noticed() -> None:
    event = replies.event({"choices": [], "__verbose": {"content": "a"}})
    with pytest.raises(UnfoldableError, match="__verbose"):
        fold(event)


def test_nothing_that_is_assembled_shows_its_text() -> None:
    assembler = ChatAssembler(LIMIT)
    call = {"index": 0, "id": "a", "function": {"name": "secret", "arguments": "{}"}}
    assembler.feed(delta({"content": "secret", "tool_calls": [call]}))
    choice = assembler._choices[0]
    assert choice.calls is not None
    shown = [assembler, choice, choice.texts, choice.calls, *choice.calls.all]
    assert not [each for each in shown if "secret" in repr(each)]


# --- Messages, and llama-server's own API -----------------------------------------


USAGE = {"input_tokens": 3, "output_tokens": 0, "cache_read_input_tokens": 9}
MESSAGE = {"id": "m", "type": "message", "role": "assistant", "content": []}
MESSAGE |= {"model": "x", "stop_reason": None, "stop_sequence": None, "usage": USAGE}
DELTA: dict[str, Any] = {"type": "content_block_delta", "index": 0}
START = named_event({"type": "message_start", "message": MESSAGE})
STOP = named_event({"type": "message_stop"})


def block(index: int, begun: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    start = {"type": "content_block_start", "index": index, "content_block": begun}
    events = [named_event(start)]
    events += [
        named_event({"type": "content_block_delta", "index": index, "delta": delta})
        for delta in deltas
    ]
    return b"".join(events) + named_event(
        {"type": "content_block_stop", "index": index}
    )


def message_end(reason: str = "end_turn", tokens: int = 5) -> bytes:
    delta = {"stop_reason": reason, "stop_sequence": None}
    usage = {"output_tokens": tokens}
    return named_event({"type": "message_delta", "delta": delta, "usage": usage}) + STOP


def text(*pieces: str) -> bytes:
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return block(0, {"type": "text", "text": ""}, *deltas)


def fold_message(stream: bytes, asked: Requested = ANY, limit: int = LIMIT) -> Any:
    assembler = MessageAssembler(limit, asked)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    return json.loads(assembler.finish())


def test_a_message_has_the_blocks_of_its_stream_and_the_usage_of_both_ends() -> None:
    thoughts = [
        {"type": "thinking_delta", "thinking": "so "},
        {"type": "thinking_delta", "thinking": "then"},
        {"type": "signature_delta", "signature": "abc"},
    ]
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    pieces = ['{"c"', ': "red"}']
    inputs = [{"type": "input_json_delta", "partial_json": each} for each in pieces]
    stream = START + named_event({"type": "ping"})
    stream += block(
        1, {"type": "text", "text": "a"}, {"type": "text_delta", "text": "b"}
    )
    stream += block(0, {"type": "thinking", "thinking": ""}, *thoughts)
    stream += block(2, call, *inputs) + block(3, call | {"id": "u"})
    answer = fold_message(stream + message_end("tool_use"))
    assert answer["content"] == [
        {"type": "thinking", "thinking": "so then", "signature": "abc"},
        {"type": "text", "text": "ab"},
        call | {"input": {"c": "red"}},
        call | {"id": "u"},
    ]
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"] == USAGE | {"output_tokens": 5}
    assert (answer["id"], answer["model"]) == ("m", "x")


def test_no_cut_off_message_is_an_answer() -> None:
    stream = START + text("a") + message_end()
    for length in range(len(stream)):
        with pytest.raises(UnfoldableError):
            fold_message(stream[:length])


@pytest.mark.parametrize(
    "event",
    [
        {"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta"}},
        {"type": "content_block_start", "index": 0, "content_block": {}},
        {"type": "something_new"},
        DELTA | {"delta": {"type": "citations_delta"}},
        DELTA | {"delta": {"type": "text_delta", "text": 3}},
        DELTA | {"index": "0"},
    ],
)
def test_unknown_events_of_a_message_cannot_be_folded(event: dict[str, Any]) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold_message(START + text("a") + named_event(event) + message_end())
    assert not isinstance(caught.value, LostTextError)


def test_a_message_that_was_cut_may_have_more_than_its_stream() -> None:
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    half = {"type": "input_json_delta", "partial_json": '{"c"'}
    for stream, asked in (
        (START + message_end("max_tokens"), ANY),
        (START + message_end(), ANY),
        (START + block(0, call, half) + message_end("max_tokens"), ANY),
        (START + text("a") + message_end("max_tokens"), Requested(stops=True)),
    ):
        with pytest.raises(LostTextError):
            fold_message(stream, asked)
    assert fold_message(START + message_end(tokens=1))["content"] == []
    assert fold_message(START + text("a") + message_end(), Requested(stops=True))


def test_the_error_of_a_message_is_the_workers() -> None:
    error = {"type": "overloaded_error", "message": "Overloaded"}
    with pytest.raises(AssemblyError) as caught:
        fold_message(START + named_event({"type": "error", "error": error}))
    assert caught.value.error is not None
    assert caught.value.error.message == "Overloaded"


def test_a_message_has_a_limit() -> None:
    with pytest.raises(LostTextError, match="longer than"):
        fold_message(START + text(*["x" * 100] * 20), limit=2000)
    blocks = b"".join(block(n, {"type": "text"}) for n in range(20))
    with pytest.raises(LostTextError, match="longer than"):
        fold_message(START + blocks, limit=2000)


# --- Responses --------------------------------------------------------------------


def response(stream: bytes) -> Any:
    assembler = ResponseAssembler(LIMIT)
    assembler.feed(stream)
    return json.loads(assembler.finish())


def last(kind: str = "completed", **fields: Any) -> bytes:
    return named_event({"type": f"response.{kind}", "response": fields})


def test_the_last_event_of_a_response_has_all_of_it() -> None:
    content = {
        "id": "r",
        "status": "completed",
        "completed_at": 4,
        "output": [{"a": 1}],
    }
    created = named_event({"type": "response.created", "response": {"id": "r"}})
    assert response(created + last(**content)) == content
    assert response(created + last("incomplete", **content)) == content


def test_fields_that_llama_server_does_not_stream_are_added() -> None:
    content = {
        "status": "completed",
        "created_at": 4,
        "output": [{"type": "reasoning"}],
    }
    answer = response(last(**content))
    assert answer["completed_at"] == 4
    assert answer["output"] == [{"type": "reasoning", "status": "completed"}]


def test_a_response_without_its_last_event_or_its_text_is_none() -> None:
    created = named_event({"type": "response.created", "response": {"id": "r"}})
    for stream in (b"", created, last(output=[])):
        with pytest.raises(UnfoldableError):
            response(stream)
    with pytest.raises(AssemblyError) as caught:
        response(created + named_event({"type": "error", "error": {"message": "no"}}))
    assert caught.value.error is not None


def part(content: str, index: int = 0, **fields: Any) -> bytes:
    content = {"index": index, "content": content, "tokens": [7], "stop": False}
    return event(content | fields)


def native_end(index: int = 0, **fields: Any) -> bytes:
    content = {"index": index, "content": "", "tokens": [], "stop": True, "model": "m"}
    settings = {"stream": True, "seed": 1}
    content |= {
        "generation_settings": settings,
        "stop_type": "eos",
        "tokens_predicted": 2,
    }
    return event(content | fields)


def fold_native(stream: bytes, asked: Requested = ANY, limit: int = 1 << 20) -> Any:
    assembler = NativeAssembler(limit, asked)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    return json.loads(assembler.finish())


def test_the_last_event_has_all_but_the_text() -> None:
    answer = fold_native(b"data: null\n\n" + part("a") + part("b") + native_end())
    assert (answer["content"], answer["tokens"], answer["model"]) == ("ab", [], "m")
    assert answer["generation_settings"] == {"stream": False, "seed": 1}
    assert fold_native(part("a") + part("b") + native_end(), Requested(tokens=True))[
        "tokens"
    ] == [7, 7]


def test_probabilities_are_joined() -> None:
    content = [part(each, completion_probabilities=[each]) for each in "ab"]
    assert fold_native(b"".join(content) + native_end())[
        "completion_probabilities"
    ] == [
        "a",
        "b",
    ]


def test_several_prompts_have_several_answers() -> None:
    stream = part("b", 1) + part("a") + native_end(1) + native_end()
    answers = fold_native(stream, Requested(choices=2))
    assert [(each["index"], each["content"]) for each in answers] == [
        (0, "a"),
        (1, "b"),
    ]
    with pytest.raises(UnfoldableError, match="number"):
        fold_native(stream, Requested(choices=3))


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        part("a"),
        part("a") + part("b", 1) + native_end(),
        part("a") + native_end() + part("b") + native_end(),
        part("a", index="x"),
        b"data: nonsense\n\n",
    ],
)
def test_incomplete_or_unknown_events_make_no_answer(stream: bytes) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold_native(stream)
    assert not isinstance(caught.value, LostTextError)


def test_a_completion_that_was_cut_may_have_more_than_its_stream() -> None:
    cut = {"stop_type": "limit"}
    with pytest.raises(LostTextError):
        fold_native(part("a") + native_end(**cut), Requested(stops=True))
    assert (
        fold_native(part("a") + native_end(), Requested(stops=True))["content"] == "a"
    )
    for fields in (cut, {}):
        with pytest.raises(LostTextError):
            fold_native(native_end(**fields))
    assert fold_native(native_end(tokens_predicted=1))["content"] == ""
    with pytest.raises(LostTextError, match="longer"):
        fold_native(part("a" * 3000) + native_end(), limit=2000)


def test_the_error_is_the_workers_own() -> None:
    with pytest.raises(AssemblyError) as caught:
        fold_native(part("a") + error_event("no such luck", 503))
    assert caught.value.error is not None


def test_answers_of_other_servers_lack_the_fields_of_llama_server() -> None:
    answer = fold_native(
        event({"content": "a"}) + event({"content": "b", "stop": True})
    )
    assert answer == {"content": "ab", "stop": True}
    assert "completed_at" not in response(last(output=[{"a": 1}]))


def test_no_message_that_is_assembled_shows_its_text() -> None:
    message, native = MessageAssembler(LIMIT), NativeAssembler(LIMIT)
    message.feed(START + text("secret"))
    native.feed(part("secret"))
    shown = [*message._blocks.values(), *native._completions.values()]
    assert len(shown) == 2
    assert not [each for each in shown if "secret" in repr(each)]
    assert message._blocks[0].answer()["text"] == "secret"


def test_a_tool_without_input_has_an_empty_one() -> None:
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    nothing = {"type": "input_json_delta", "partial_json": ""}
    answer = fold_message(START + block(0, call, nothing) + message_end("tool_use"))
    assert answer["content"] == [call]
