"""A worker is asked for a stream, for usage, or for the rest of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.wire.asking import (
    ask_for_rest,
    ask_for_stream,
    ask_for_usage,
    can_continue,
    can_rescue,
    choices_of,
    exhausted,
    for_model,
    has_prompts,
)
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes.streams import (
    arguments,
    call,
    chat_body,
    chat_chunk,
    chat_event,
    chat_stream,
    delta,
    dump,
    parsed,
    text_body,
    text_stream,
)

# --- Which requests ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}},
        {"tools": None, "grammar": "", "best_of": None, "max_tokens": None},
        {"tools": [{"type": "function"}], "response_format": {"type": "json_object"}},
        {"max_tokens": 10, "temperature": 0.5, "stop": ["\n"], "seed": 1},
    ],
)
def test_plain_requests_can_be_rescued(fields: dict[str, Any]) -> None:
    assert can_rescue(chat_body(**fields), chat=True)
    assert can_rescue(text_body(**fields), chat=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"best_of": 3},
        {"logprobs": True},
        {"logprobs": 0},
        {"audio": {"voice": "x"}},
        {"max_tokens": "10"},
    ],
)
def test_answers_that_cannot_be_compared_are_not_resumed(
    fields: dict[str, Any],
) -> None:
    assert not can_rescue(chat_body(**fields), chat=True)
    assert not can_rescue(text_body(**fields), chat=False)


CHAT = parsed(chat_stream(["One", " day"], reason=None))
TEXT = parsed(text_stream([" upon"], reason=None))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [{"type": "function"}], "tool_choice": "auto"},
        {"tools": [{"type": "function"}], "tool_choice": None},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{}]},
        {"response_format": {"type": "text"}, "grammar": "", "suffix": None},
    ],
)
def test_tools_without_a_call_do_not_matter(fields: dict[str, Any]) -> None:
    """Agents declare them in every request."""
    for body, partial, chat in (
        (chat_body(**fields), CHAT, True),
        (text_body(**fields), TEXT, False),
    ):
        assert can_rescue(body, chat)
        assert can_continue(body, partial, chat)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"json_schema": {}},
        {"grammar": "root ::= 'a'"},
        {"guided_choice": ["a", "b"]},
        {"structured_outputs": {"json": {}}},
        {"echo": True},
        {"suffix": "the end"},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
    ],
)
def test_an_answer_that_no_message_can_begin_is_requested_again(
    fields: dict[str, Any],
) -> None:
    for body, partial, chat in (
        (chat_body(**fields), CHAT, True),
        (text_body(**fields), TEXT, False),
    ):
        assert can_rescue(body, chat)
        assert not can_continue(body, partial, chat)


@pytest.mark.parametrize(
    "relayed",
    [
        chat_stream([], reason=None),  # there is nothing to go on from
        chat_event(reasoning_content="hm") * 2,  # nor are thoughts that are not over
        chat_stream(["One", " day"], reason=None) + call("paint"),
        chat_stream(["One", " day"], reason=None) + chat_event(reasoning="hm"),
        chat_event(refusal="no") * 2,
        # What may come again without being a repetition.
        chat_stream(["One"], reason=None),
        chat_stream(["--", "--"], reason=None),
        chat_stream(["\n", " ", "\n"], reason=None),
        chat_stream(["\n", "|", "\n"], reason=None),
    ],
)
def test_an_answer_that_nothing_proves_is_requested_again(relayed: bytes) -> None:
    assert can_rescue(chat_body(), chat=True)
    assert not can_continue(chat_body(), parsed(relayed), chat=True)


def test_a_text_is_its_own_proof() -> None:
    """A text after a prompt continues it."""
    partial = parsed(text_stream(["-"], reason=None))
    assert can_continue(text_body(), partial, chat=False)
    assert not can_continue(text_body(prompt=[1, 2]), partial, chat=False)
    partial = parsed(text_stream([], reason="stop"))
    assert not can_continue(text_body(), partial, chat=False)


def test_pictures_do_not_matter() -> None:
    """They are sent again with the rest of the body."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = {"role": "user", "content": [{"type": "text", "text": "a?"}, picture]}
    assert can_rescue(chat_body(messages=[message]), chat=True)


@pytest.mark.parametrize("messages", [[], None, "hello", [{}]])
def test_a_chat_needs_messages(messages: Any) -> None:
    assert not can_rescue(chat_body(messages=messages), chat=True)


def test_an_answer_that_the_client_has_begun_is_asked_for_again() -> None:
    body = chat_body(messages=[{"role": "assistant", "content": "I"}])
    assert can_rescue(body, chat=True)
    assert not can_continue(body, CHAT, chat=True)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], {}, 7, None])
def test_a_prompt_counts_as_a_request_for_text(prompt: Any) -> None:
    assert not can_rescue(text_body(prompt=prompt), chat=False)
    assert can_rescue(text_body(prompt=[1, 2, 3]), chat=False)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"{}", b'{"prompt":"\xff"}', b'{"n":' + b"[" * 9999]
)
def test_invalid_requests_cannot_be_rescued(body: bytes) -> None:
    assert not can_rescue(body, chat=True)
    assert not can_rescue(body, chat=False)


# --- What to ask ------------------------------------------------------------------


def test_the_text_so_far_becomes_the_assistants_unfinished_message() -> None:
    body = chat_body(max_tokens=10, temperature=0.25, max_completion_tokens=-1)
    partial = parsed(chat_stream([" no", ' "to'], reason=None))
    asked = ask_for_rest(body, partial, chat=True)
    expected = json.loads(body)
    expected["messages"].append({"role": "assistant", "content": ' no "to'})
    expected |= {"max_tokens": 8, "continue_final_message": True}
    expected |= {"add_generation_prompt": False, "echo": True}
    assert json.loads(asked) == expected


def test_the_text_so_far_is_added_to_a_prompt() -> None:
    partial = parsed(text_stream([" upon", " a"], reason=None))
    asked = ask_for_rest(text_body(n_predict=3, max_tokens=None), partial, chat=False)
    expected = {"model": "tiny", "prompt": "Once upon a", "n_predict": 1}
    assert json.loads(asked) == {**expected, "max_tokens": None}


def test_thoughts_stand_in_the_message_before_the_text() -> None:
    """Or a model would go on as one that has not thought."""
    thought = chat_event(reasoning_content="two and") + chat_event(reasoning=" two")
    partial = parsed(thought + chat_stream(["That", " is"], reason=None))
    asked = json.loads(ask_for_rest(chat_body(max_tokens=9), partial, chat=True))
    assert asked["messages"][-1] == {
        "role": "assistant",
        "content": "That is",
        "reasoning_content": "two and two",
    }
    assert asked["max_tokens"] == 5


def test_blank_reasoning_is_ignored() -> None:
    partial = parsed(chat_event(reasoning="\n") + chat_stream(["a", "b"], reason=None))
    asked = json.loads(ask_for_rest(chat_body(), partial, chat=True))
    assert "reasoning_content" not in asked["messages"][-1]


def test_another_model_is_asked_for_the_same() -> None:
    body = chat_body(max_tokens=10, stop=["\n"], messages=[{"role": "user", "é": 1e0}])
    asked = for_model(body, 'a "b"')
    assert json.loads(asked) == {**json.loads(body), "model": 'a "b"'}
    assert json.loads(for_model(b"{}", "b")) == {"model": "b"}


# --- Whether there is anything to ask for -----------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
@pytest.mark.parametrize(
    ("limit", "nothing_left"),
    [(1, True), (2, True), (3, False), (0, False), (-1, False), (None, False)],
)
def test_an_answer_with_all_requested_tokens_is_exhausted(
    name: str, limit: int | None, nothing_left: bool
) -> None:
    partial = parsed(chat_stream(["a", "b"], reason=None))
    assert exhausted(chat_body(**{name: limit}), partial) is nothing_left
    assert exhausted(text_body(**{name: limit}), partial) is nothing_left


def test_the_lowest_of_several_limits_applies() -> None:
    partial = parsed(chat_stream(["a", "b"], reason=None))
    assert exhausted(chat_body(max_tokens=2, n_predict=9), partial)
    assert exhausted(chat_body(max_tokens=9, n_predict=2), partial)
    assert not exhausted(chat_body(max_tokens=9, n_predict=-1), partial)


def test_without_a_limit_there_is_always_more() -> None:
    assert not exhausted(chat_body(), parsed(chat_stream(["a"] * 99, reason=None)))


def test_an_answer_without_text_is_started_again() -> None:
    partial = parsed(
        dump(chat_chunk(delta(content=""), usage={"completion_tokens": 4}))
    )
    assert (partial.spans, partial.tokens) == ((), 4)
    assert not exhausted(chat_body(max_tokens=4), partial)


def test_reasoning_and_calls_count_as_tokens() -> None:
    for begun in (chat_event(reasoning="hm") * 2, call("f", "{") + arguments("}")):
        assert exhausted(chat_body(max_tokens=2), parsed(begun))
        assert not exhausted(chat_body(max_tokens=3), parsed(begun))


# --- A stream ---------------------------------------------------------------------

ASKED = b'"stream_options":{"include_usage":true}'
CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT_BODY = {"model": "m", "prompt": "hi"}


def ask(**fields: Any) -> dict[str, Any] | None:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    asked = ask_for_stream(json.dumps(fields).encode(), ENDPOINTS[path])
    return None if asked is None else json.loads(asked.body)


def streaming_body(body: bytes) -> bytes | None:
    asked = ask_for_stream(body, ENDPOINTS["/v1/chat/completions"])
    return None if asked is None else asked.body


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
@pytest.mark.parametrize("request_", [CHAT_BODY, TEXT_BODY, {}])
def test_a_stream_with_usage_is_asked_for(
    request_: dict[str, Any], stream: dict[str, Any]
) -> None:
    assert ask(**request_, **stream) == request_ | STREAM


def test_all_values_stay_as_they_are_byte_for_byte() -> None:
    """Numbers and strings would else be written otherwise: 1.0e3, \\u00e9, 1E400."""
    values = [rb'{ "a" :1.0e3,"b":[ 1E400 , "\u00e9\/"] }', b'"\xc3\xa9"', b"-0.0"]
    body = b'{"messages":%b, "x" : %b ,"temperature":%b}' % tuple(values)
    streaming = streaming_body(body)
    assert streaming is not None
    assert all(value in streaming for value in values)


@given(
    st.dictionaries(
        st.text(max_size=5).map("x{}".format),
        st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    )
)
def test_no_other_field_changes(fields: dict[str, Any]) -> None:
    assert ask(**fields) == fields | STREAM


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True},
        {"stream": 0},  # llama-server will refuse it
        {"stream": "false"},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False}},
        # A stream would lose the end of an answer, or have more of it.
        {"n_indent": 2},
        {"continue_final_message": True},
        {"continue_final_message": "content"},
        {"reasoning_format": "deepseek-legacy"},
        {"reasoning_format": "of the future"},
        {"verbose": True},
        # Of a chat, it would not report all of them.
        {**CHAT_BODY, "logprobs": True},
        {**CHAT_BODY, "n_probs": 1},
    ],
)
def test_no_stream_is_asked_for_where_it_would_lack_something(
    fields: dict[str, Any],
) -> None:
    assert ask(**fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": None},
        {"stop": "x"},
        {"stop": ["x"]},
        {"stop": ""},
        {"stop": []},
        {"n_indent": 0},
        {"continue_final_message": False},
        {"stream_options": None},
        {"reasoning_format": "auto"},
        {"verbose": False},
        {"logprobs": 5, **TEXT_BODY},
        {"n_probs": 2, **TEXT_BODY},
        {"logprobs": False, **CHAT_BODY},
        {"timings_per_token": True, "return_progress": True},
    ],
)
def test_fields_without_effect_are_no_obstacle(fields: dict[str, Any]) -> None:
    assert ask(**fields) == fields | STREAM


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"a":}', b"null", b'{"\xff":1}', b"[" * 100_000]
)
def test_anything_but_an_object_is_left_to_the_worker(body: bytes) -> None:
    assert streaming_body(body) is None


def test_an_escaped_name_is_the_same_field() -> None:
    assert streaming_body(rb'{"n_ind\u0065nt":1}') is None
    assert streaming_body(rb'{"stre\u0061m":true}') is None


@pytest.mark.parametrize(
    ("request_", "choices"),
    [
        ({}, 1),
        ({"n": None}, 1),
        ({"n": 2}, 2),
        ({"n_cmpl": 3}, 3),
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2]}, 1),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": ["a", 1]}, 1),
        ({"prompt": []}, 1),
        ({"n": "2"}, 0),
    ],
)
def test_the_choices_that_a_request_asks_for(request_: Any, choices: int) -> None:
    assert choices_of(json.dumps(request_).encode()) == choices
    assert choices_of(b"{") == 0


# --- Usage ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"stream":true}', b'{%b,"stream":true}' % ASKED),
        (b' {\n "stream" : true }', b' {%b,\n "stream" : true }' % ASKED),
        (b'{"stream_options":null}', b"{%b}" % ASKED),
        (b'{"a":1,"stream_options":{},"b":2}', b'{"a":1,%b,"b":2}' % ASKED),
        (
            b'{"stream_options" : { "include_usage" : false }\n}',
            b'{"stream_options" : {"include_usage":true}\n}',
        ),
        (b'{"stream_options":{"include_usage":null}}', b"{%b}" % ASKED),
        (
            rb'{"stream\u005foptions":null}',
            rb'{"stream\u005foptions":{"include_usage":true}}',
        ),
        # Not the field, but what looks like it.
        (
            b'{"stream":true,"x":{"stream_options":null}}',
            b'{%b,"stream":true,"x":{"stream_options":null}}' % ASKED,
        ),
        (
            rb'{"x":"\"stream_options\":null \u00e9"}',
            rb'{%b,"x":"\"stream_options\":null \u00e9"}' % ASKED,
        ),
        (
            rb'{"x":{"stream_options":{}},"stream\u005foptions":{}}',
            rb'{"x":{"stream_options":{}},"stream\u005foptions":{"include_usage":true}}',
        ),
    ],
)
def test_asking_for_usage_changes_only_that_field(before: bytes, after: bytes) -> None:
    assert ask_for_usage(before) == after
    partial = json.loads(after)
    assert partial.pop("stream_options") == {"include_usage": True}


@pytest.mark.parametrize(
    "options",
    [
        {"include_usage": True},
        {"include_usage": True, "x": 1},
        {"include_usage": False, "continuous_usage_stats": True},
        {"include_obfuscation": False},
        {"include_usage": "no"},
        "x",
        [],
    ],
)
def test_stream_options_of_the_client_are_kept(options: Any) -> None:
    body = json.dumps({"stream": True, "stream_options": options}).encode()
    assert ask_for_usage(body) is None


KEYS = st.sampled_from(["a", "model", "é", 'x"y', "stream", "options"])
VALUES = st.recursive(
    st.text(st.sampled_from('a{}[]:,"\\_é'), max_size=8) | st.none() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.just("stream_options"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    before=st.dictionaries(KEYS, VALUES, max_size=3),
    options=st.sampled_from([None, {}, {"include_usage": False}]) | st.just("absent"),
    after=VALUES,
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
)
def test_all_other_fields_of_a_body_stay(
    before: dict[str, Any], options: Any, after: Any, indent: int | None, ascii: bool
) -> None:
    fields = {**before, **({} if options == "absent" else {"stream_options": options})}
    fields["last"] = after
    body = ask_for_usage(json.dumps(fields, indent=indent, ensure_ascii=ascii).encode())
    assert body is not None
    assert json.loads(body) == fields | {"stream_options": {"include_usage": True}}


def test_several_prompts_are_noticed() -> None:
    assert has_prompts(b'{"prompt" : ["a", "b"]}')
    assert not has_prompts(b'{"prompt":"[a]"}')


def test_a_request_for_a_stream_shows_its_size_alone() -> None:
    asked = ask_for_stream(b'{"prompt":"secret"}', ENDPOINTS["/v1/completions"])
    assert repr(asked) == f"<Streaming {len(asked.body) if asked else 0} bytes>"


def test_a_response_with_a_stop_string_is_asked_for_in_one_piece() -> None:
    endpoint = ENDPOINTS["/v1/responses"]
    assert ask_for_stream(b'{"input":"a","stop":["x"]}', endpoint) is None
    assert ask_for_stream(b'{"input":"a","stop":[]}', endpoint) is not None
