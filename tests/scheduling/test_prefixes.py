"""What two turns of a conversation have in common is found, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.scheduling.prefixes import BOUNDARIES, prefixes


def say(*said: str) -> bytes:
    """Spell messages: the first letter of each is its role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    roles["d"] = "developer"
    messages = [{"role": roles[text[0]], "content": text} for text in said]
    return json.dumps(messages).encode()


def test_the_next_turn_begins_with_the_last_one() -> None:
    first = prefixes(say("s", "u1"))
    second = prefixes(say("s", "u1", "a1", "u2"))
    third = prefixes(say("s", "u1", "a1", "u2", "a2", "u3"))
    assert (len(first), len(second), len(third)) == (1, 2, 3)
    assert second[:1] == first
    assert third[:2] == second


def test_a_conversation_without_instructions_is_one_too() -> None:
    first = prefixes(say("u1"))
    assert len(first) == 1
    assert prefixes(say("u1", "a1", "u2"))[:1] == first


@pytest.mark.parametrize("role", ["s", "d"])
def test_instructions_alone_are_no_conversation(role: str) -> None:
    assert prefixes(say(role)) == ()
    assert len(prefixes(say(role, "a greeting"))) == 1
    one, other = prefixes(say(role, "u1")), prefixes(say(role, "u2"))
    assert set(one).isdisjoint(other)


def test_with_a_greeting_the_instructions_are_no_conversation_either() -> None:
    first = prefixes(say("s", "a greeting", "u1"))
    assert len(first) == 1
    assert set(first).isdisjoint(prefixes(say("s", "a greeting", "u2")))


def test_later_instructions_belong_to_the_conversation() -> None:
    first = prefixes(say("u1"))
    second = prefixes(say("u1", "a1", "s", "u2"))
    assert second[:1] == first
    assert len(second) == 2


def test_the_results_of_tools_come_before_an_answer() -> None:
    first = prefixes(say("s", "u1"))
    second = prefixes(say("s", "u1", "a call", "t1", "t2", "t3"))
    third = prefixes(say("s", "u1", "a call", "t1", "t2", "t3", "a1", "u2"))
    assert second[:1] == first
    assert third[:2] == second


def test_a_client_that_rewrites_its_last_message_is_found_one_turn_earlier() -> None:
    second = prefixes(say("s", "u1", "a1", "u2 with documents"))
    third = prefixes(say("s", "u1", "a1", "u2", "a2", "u3 with documents"))
    assert set(second) & set(third) == {second[0]}


def test_an_answer_that_is_to_be_continued() -> None:
    first = prefixes(say("u1"))
    going_on = prefixes(say("u1", "a half"))
    assert going_on[:1] == first
    assert len(going_on) == 2


def test_only_the_last_boundaries_count() -> None:
    said = ["s"]
    for turn in range(20):
        said += [f"u{turn}", f"a{turn}"]
    found = prefixes(say(*said, "u"))
    assert len(found) == BOUNDARIES
    assert found[-2] == prefixes(say(*said[:-1]))[-1]
    assert len(prefixes(say(*said, "u"), limit=3)) == 3
    assert prefixes(say(*said, "u"), limit=3) == found[-3:]


@given(st.lists(st.sampled_from(["u1", "u2", "a1", "a2", "t1"]), min_size=1))
def test_other_beginnings_are_other_conversations(said: list[str]) -> None:
    ours = prefixes(say("s", *said, "u"))
    theirs = prefixes(say("s other", *said, "u"))
    assert len(ours) == len(theirs)
    assert set(ours).isdisjoint(theirs)
    assert len(set(ours)) == len(ours)


def test_where_one_message_ends_and_the_next_begins_makes_a_difference() -> None:
    assert prefixes([b'{"a":1}', b'{"b":2}']) != prefixes([b'{"a":1,"b":2}'])


def test_the_items_of_the_array_will_do() -> None:
    body = say("s", "u1", "a1", "u2")
    items = msgspec.json.decode(body, type=list[msgspec.Raw])
    assert prefixes(items) == prefixes(body)
    assert prefixes([bytes(item) for item in items]) == prefixes(body)


@pytest.mark.parametrize(
    "messages",
    [
        b"",
        b"{}",
        b"[",
        b"null",
        b'"text"',
        b"[1]",
        b'[{"role":"user"},null]',
        b'[{"role":7}]',
        b'[{"role":"\\ud800"}]',
        b'[{"role":"\xff"}]',
        b"[" * 100_000,
    ],
)
def test_what_is_no_array_of_messages_has_none(messages: bytes) -> None:
    assert prefixes(messages) == ()


def test_no_messages() -> None:
    assert prefixes(b"[]") == ()
    assert prefixes([]) == ()


def test_a_message_without_a_role_is_a_message() -> None:
    messages: list[dict[str, Any]] = [{"content": "a"}, {"content": "b"}]
    assert len(prefixes(json.dumps(messages).encode())) == 1
