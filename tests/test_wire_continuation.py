"""Which requests can be gone on with elsewhere, and what another worker is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gollama_proxy.wire.continuation import (
    can_rescue,
    continuation,
    exhausted,
    for_model,
)
from tests.fakes.streams import (
    chat_body,
    chat_chunk,
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
        {"max_tokens": 10, "temperature": 0.5, "stop": ["\n"], "seed": 1},
    ],
)
def test_plain_requests_can_be_rescued(fields: dict[str, Any]) -> None:
    assert can_rescue(chat_body(**fields), chat=True)
    assert can_rescue(text_body(**fields), chat=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"json_schema": {}},
        {"grammar": "root ::= 'a'"},
        {"guided_choice": ["a", "b"]},
        {"n": 2},
        {"best_of": 3},
        {"logprobs": True},
        {"logprobs": 0},
        {"echo": True},
        {"suffix": "the end"},
        {"audio": {"voice": "x"}},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"max_tokens": "10"},
    ],
)
def test_what_cannot_be_continued_is_not(fields: dict[str, Any]) -> None:
    assert not can_rescue(chat_body(**fields), chat=True)
    assert not can_rescue(text_body(**fields), chat=False)


def test_pictures_do_not_matter() -> None:
    """They are sent again with the rest of the body."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = {"role": "user", "content": [{"type": "text", "text": "a?"}, picture]}
    assert can_rescue(chat_body(messages=[message]), chat=True)


@pytest.mark.parametrize(
    "messages", [[], None, "hello", [{}], [{"role": "assistant", "content": "I"}]]
)
def test_a_chat_needs_messages_and_the_last_is_not_the_assistants(
    messages: Any,
) -> None:
    assert not can_rescue(chat_body(messages=messages), chat=True)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2, 3], None])
def test_a_prompt_is_one_string(prompt: Any) -> None:
    assert not can_rescue(text_body(prompt=prompt), chat=False)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"{}", b'{"prompt":"\xff"}', b'{"tools":' + b"[" * 9999]
)
def test_nonsense_cannot_be_rescued(body: bytes) -> None:
    assert not can_rescue(body, chat=True)
    assert not can_rescue(body, chat=False)


# --- What to ask ------------------------------------------------------------------


def test_the_text_so_far_becomes_the_assistants_unfinished_message() -> None:
    body = chat_body(max_tokens=10, temperature=0.25, max_completion_tokens=-1)
    told = parsed(chat_stream([" no", ' "to'], reason=None))
    asked = continuation(body, told, chat=True)
    expected = json.loads(body)
    expected["messages"].append({"role": "assistant", "content": ' no "to'})
    expected |= {"max_tokens": 8, "continue_final_message": True}
    expected |= {"add_generation_prompt": False, "echo": True}
    assert json.loads(asked) == expected


def test_the_text_so_far_is_put_behind_a_prompt() -> None:
    told = parsed(text_stream([" upon", " a"], reason=None), chat=False)
    asked = continuation(text_body(n_predict=3, max_tokens=None), told, chat=False)
    expected = {"model": "tiny", "prompt": "Once upon a", "n_predict": 1}
    assert json.loads(asked) == {**expected, "max_tokens": None}


@pytest.mark.parametrize("chat", [True, False])
def test_without_a_text_so_far_the_request_is_sent_as_it_was(chat: bool) -> None:
    body = chat_body()
    told = parsed(chat_stream([], reason=None))
    assert continuation(body, told, chat) == body


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
def test_who_has_as_many_tokens_as_were_asked_for_has_all(
    name: str, limit: int | None, nothing_left: bool
) -> None:
    told = parsed(chat_stream(["a", "b"], reason=None))
    assert exhausted(chat_body(**{name: limit}), told) is nothing_left
    assert exhausted(text_body(**{name: limit}), told) is nothing_left


def test_of_several_limits_the_lowest_counts() -> None:
    told = parsed(chat_stream(["a", "b"], reason=None))
    assert exhausted(chat_body(max_tokens=2, n_predict=9), told)
    assert exhausted(chat_body(max_tokens=9, n_predict=2), told)
    assert not exhausted(chat_body(max_tokens=9, n_predict=-1), told)


def test_without_a_limit_there_is_always_more() -> None:
    assert not exhausted(chat_body(), parsed(chat_stream(["a"] * 99, reason=None)))


def test_an_answer_that_has_no_text_yet_is_begun_anew() -> None:
    """What it has taken to think does not count: it will be thought again."""
    told = parsed(dump(chat_chunk(delta(content=""), usage={"completion_tokens": 4})))
    assert (told.text, told.tokens) == ("", 4)
    assert not exhausted(chat_body(max_tokens=4), told)
