"""The conversations of the routing benchmark."""

from __future__ import annotations

from itertools import islice

from benchmarks.dialogue import (
    LATER_WORDS,
    MOST_TOKENS,
    MOST_WORDS,
    SYSTEM_WORDS,
    TURNS,
    dialogues,
)
from benchmarks.routing import REAL

TOKENS_PER_WORD = 2  # of the tiny models
TEMPLATE = 100  # tokens, of all that is around the messages of a turn


def test_the_same_seed_gives_the_same_dialogues() -> None:
    one, same, other = (list(islice(dialogues(s), 20)) for s in ("1 0", "1 0", "1 1"))
    assert one == same
    assert one != other
    assert {each.system for each in one + other} == {one[0].system}


def test_half_of_the_requests_are_single_questions() -> None:
    sizes = [len(each.questions) for each in islice(dialogues("1"), 1000)]
    single = sum(size == 1 for size in sizes) / sum(sizes)
    assert 0.45 < single < 0.55
    assert set(sizes) == {1, *TURNS}


def test_a_turn_contains_the_answers_before_it() -> None:
    dialogue = next(each for each in dialogues("1") if len(each.questions) == 3)
    first = dialogue.messages([])
    third = dialogue.messages(["one", "two"])
    assert [message["role"] for message in first] == ["system", "user"]
    assert third[:2] == first
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["role"] for message in third] == roles
    assert [message["content"] for message in third[2::2]] == ["one", "two"]
    assert third[-1]["content"] == dialogue.questions[2].text


def test_any_conversation_fits_its_context() -> None:
    turns = max(TURNS)
    texts = SYSTEM_WORDS + MOST_WORDS + (turns - 1) * max(LATER_WORDS)
    longest = TOKENS_PER_WORD * texts + turns * (MOST_TOKENS + TEMPLATE)
    assert all(longest < build.context for build in REAL)
