"""A worker is asked for a stream, or for usage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.wire.assemble import (
    ask_for_stream,
    ask_for_usage,
    choices_of,
    has_prompts,
)
from gollama_proxy.wire.schema import ENDPOINTS

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
    assert repr(asked) == f"<StreamRequest {len(asked.body) if asked else 0} bytes>"


def test_a_response_with_a_stop_string_is_asked_for_in_one_piece() -> None:
    endpoint = ENDPOINTS["/v1/responses"]
    assert ask_for_stream(b'{"input":"a","stop":["x"]}', endpoint) is None
    assert ask_for_stream(b'{"input":"a","stop":[]}', endpoint) is not None
