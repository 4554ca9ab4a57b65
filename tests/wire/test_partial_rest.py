"""A worker is asked for the rest of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from gollama_proxy.wire.partial import (
    ask_for_rest,
    can_continue,
    can_rescue,
    exhausted,
    for_model,
)
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


def test_two_pieces_with_two_characters_are_proof_enough() -> None:
    partial = parsed(chat_stream(["a", "b"], reason=None))
    assert can_continue(chat_body(), partial, chat=True)


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


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [1, "a"], {}, 7, None])
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


def test_half_a_token_is_not_counted() -> None:
    """The worker that continues may write the whole of it."""
    partial = parsed(chat_stream(["a", "b"], reason=None))
    body = chat_body(max_tokens=2)
    assert exhausted(body, partial)
    assert not exhausted(body, replace(partial, halved=True))


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
