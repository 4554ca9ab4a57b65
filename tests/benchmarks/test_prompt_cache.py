"""A scripted llama-server finds prompts in its cache as the real one does."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompt_cache import PromptCache, Slot, alike, common

SYSTEM = "s" * 49 + " "


def serve(cache: PromptCache, prompt: str, answer: str = "!") -> tuple[Slot, int]:
    """Answer a prompt; return its slot, and the length that was cached."""
    taken = cache.take(prompt)
    assert taken is not None
    slot, found = taken
    cache.give_back(slot, prompt + answer)
    return slot, found


@given(st.text("ab"), st.text("ab"), st.text("ab"))
def test_the_length_of_a_common_beginning(start: str, one: str, other: str) -> None:
    pairs = list(zip(start + one, start + other, strict=False))
    expected = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert alike(start + one, start + other) == expected


def test_half_a_word_does_not_count_as_common() -> None:
    assert common("bo ke la", "bo ke li") == len("bo ke ")
    assert common("bo\nke", "bo\nli") == len("bo\n")
    assert common("bola", "boli") == 0
    assert common("bo ke", "bo kela") == len("bo ke")


def test_the_next_turn_finds_the_last_one_in_the_same_slot() -> None:
    cache = PromptCache(slots=3, kept=0)
    first, found = serve(cache, "a" * 100)
    assert found == 0
    assert serve(cache, "a" * 100 + "!" + "more") == (first, 101)


def test_a_new_prompt_takes_the_slot_that_was_idle_for_longest() -> None:
    cache = PromptCache(slots=2, kept=0)
    first, _ = serve(cache, "a" * 100)
    second, _ = serve(cache, "b" * 100)
    assert first is not second
    assert serve(cache, "c" * 100) == (first, 0)


def test_a_tenth_in_common_is_not_enough() -> None:
    cache = PromptCache(slots=2, kept=0)
    first, _ = serve(cache, "a " * 50)
    slot, _ = serve(cache, "a " * 5 + "b" * 90)
    assert slot is not first
    assert serve(cache, "a " * 6 + "c" * 88) == (first, 12)


def test_a_state_that_loses_its_slot_is_saved_and_found_again() -> None:
    cache = PromptCache(slots=1, kept=2)
    serve(cache, SYSTEM + "a" * 100)
    assert serve(cache, SYSTEM + "b" * 100)[1] == 50
    assert serve(cache, SYSTEM + "a" * 100 + "!" + "more")[1] == 151
    assert serve(cache, SYSTEM + "b" * 100 + "!" + "more")[1] == 151


def test_the_oldest_state_goes_first() -> None:
    cache = PromptCache(slots=1, kept=1)
    for letter in "abc":
        serve(cache, letter * 100)
    assert serve(cache, "a" * 100)[1] == 0
    assert serve(cache, "c" * 100)[1] == 100


def test_a_slot_that_keeps_half_of_its_state_does_not_look_for_a_better_one() -> None:
    cache = PromptCache(slots=1, kept=9)
    serve(cache, SYSTEM + "a" * 100)
    serve(cache, SYSTEM + "b" * 40)
    assert serve(cache, SYSTEM + "a" * 100 + "!" + "more")[1] == 50


def test_idle_slots_are_saved_with_each_request() -> None:
    cache = PromptCache(slots=2, kept=9)
    first, _ = serve(cache, SYSTEM + "a" * 40)
    second, _ = serve(cache, "b" * 100)
    assert serve(cache, SYSTEM + "c" * 10)[0] is first  # keeps half, so saves nothing
    first.busy = True
    assert serve(cache, SYSTEM + "a" * 40 + "!" + "more") == (second, 91)


def test_a_state_is_not_kept_beside_its_extension() -> None:
    cache = PromptCache(slots=1, kept=9)
    serve(cache, "a" * 100)
    serve(cache, "a" * 100 + "!" + "a" * 100)
    serve(cache, "b" * 100)
    assert repr(cache) == "<PromptCache 0/1 busy, 1 saved>"


def test_nothing_is_taken_while_all_slots_are_busy() -> None:
    cache = PromptCache(slots=1, kept=9)
    assert cache.take("a") is not None
    assert cache.take("a") is None
