"""Turns of a conversation are recognised, and found again where they were."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.affinity import (
    BOUNDARIES,
    LEAST_TRUST,
    OUTBOX,
    SHARED,
    Match,
    Memory,
    prefixes,
)
from gollama_proxy.scheduling.policies import Ask, Turn
from tests.fakes.pool import MODEL, worker

# --- Prefixes -------------------------------------------------------------------------


def chat(*texts: str) -> bytes:
    """Spell messages: the first letter of each is its role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    roles["d"] = "developer"
    messages = [{"role": roles[text[0]], "content": text} for text in texts]
    return json.dumps(messages).encode()


def test_the_next_turn_begins_with_the_last_one() -> None:
    first = prefixes(chat("s", "u1"))
    second = prefixes(chat("s", "u1", "a1", "u2"))
    third = prefixes(chat("s", "u1", "a1", "u2", "a2", "u3"))
    assert (len(first), len(second), len(third)) == (1, 2, 3)
    assert second[:1] == first
    assert third[:2] == second


def test_a_conversation_without_instructions_is_one_too() -> None:
    first = prefixes(chat("u1"))
    assert len(first) == 1
    assert prefixes(chat("u1", "a1", "u2"))[:1] == first


@pytest.mark.parametrize("role", ["s", "d"])
def test_instructions_alone_are_no_conversation(role: str) -> None:
    assert prefixes(chat(role)) == ()
    assert len(prefixes(chat(role, "a greeting"))) == 1
    one, other = prefixes(chat(role, "u1")), prefixes(chat(role, "u2"))
    assert set(one).isdisjoint(other)


def test_with_a_greeting_the_instructions_are_no_conversation_either() -> None:
    first = prefixes(chat("s", "a greeting", "u1"))
    assert len(first) == 1
    assert set(first).isdisjoint(prefixes(chat("s", "a greeting", "u2")))


def test_later_instructions_belong_to_the_conversation() -> None:
    first = prefixes(chat("u1"))
    second = prefixes(chat("u1", "a1", "s", "u2"))
    assert second[:1] == first
    assert len(second) == 2


def test_the_results_of_tools_come_before_an_answer() -> None:
    first = prefixes(chat("s", "u1"))
    second = prefixes(chat("s", "u1", "a call", "t1", "t2", "t3"))
    third = prefixes(chat("s", "u1", "a call", "t1", "t2", "t3", "a1", "u2"))
    assert second[:1] == first
    assert third[:2] == second


def test_a_client_that_rewrites_its_last_message_is_found_one_turn_earlier() -> None:
    second = prefixes(chat("s", "u1", "a1", "u2 with documents"))
    third = prefixes(chat("s", "u1", "a1", "u2", "a2", "u3 with documents"))
    assert set(second) & set(third) == {second[0]}


def test_an_answer_that_is_to_be_continued() -> None:
    first = prefixes(chat("u1"))
    going_on = prefixes(chat("u1", "a half"))
    assert going_on[:1] == first
    assert len(going_on) == 2


def test_only_the_last_boundaries_count() -> None:
    texts = ["s"]
    for turn in range(20):
        texts += [f"u{turn}", f"a{turn}"]
    found = prefixes(chat(*texts, "u"))
    assert len(found) == BOUNDARIES
    assert found[-2] == prefixes(chat(*texts[:-1]))[-1]
    assert len(prefixes(chat(*texts, "u"), limit=3)) == 3
    assert prefixes(chat(*texts, "u"), limit=3) == found[-3:]


@given(st.lists(st.sampled_from(["u1", "u2", "a1", "a2", "t1"]), min_size=1))
def test_other_beginnings_are_other_conversations(texts: list[str]) -> None:
    ours = prefixes(chat("s", *texts, "u"))
    theirs = prefixes(chat("s other", *texts, "u"))
    assert len(ours) == len(theirs)
    assert set(ours).isdisjoint(theirs)
    assert len(set(ours)) == len(ours)


def test_where_one_message_ends_and_the_next_begins_makes_a_difference() -> None:
    assert prefixes([b'{"a":1}', b'{"b":2}']) != prefixes([b'{"a":1,"b":2}'])


def test_the_items_of_the_array_will_do() -> None:
    body = chat("s", "u1", "a1", "u2")
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


# --- Memory ---------------------------------------------------------------------------


A, B = worker(0), worker(1)


def ask(*prefixes: int, size: int = 1000, subject: str = "", model: str = MODEL) -> Ask:
    return Ask(model, size, 0, subject, prefixes)


def turn(
    memory: Memory, request: Ask, where: Worker, cached: float | None = None
) -> Match | None:
    """Let a worker answer; `cached` is the part of the prompt that it reports."""
    match = memory.find(request)
    memory.hold(request, where, match)
    if cached is not None:
        memory.verify(request, where, round(cached * 1000), 1000)
    return match


def others(memory: Memory, count: int, where: Worker = A) -> None:
    """Let a worker answer so many other requests."""
    for number in range(count):
        turn(memory, ask(10_000 + number), where)


# --- Finding ----------------------------------------------------------------------


def test_what_was_never_seen_is_nowhere() -> None:
    memory = Memory()
    assert memory.find(ask(1, 2)) is None
    assert memory.find(ask()) is None


def test_the_next_turn_is_found_where_the_last_one_was() -> None:
    memory = Memory()
    turn(memory, ask(1, size=600), A)
    match = memory.find(ask(1, 2, size=1000))
    assert match is not None
    assert match.worker is A
    assert (match.whole, match.depth, match.cached) == (True, 1, 600)
    assert (match.distance, match.trust) == (0, 1.0)


def test_the_conversation_is_where_its_last_turn_was() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), B)
    for request in (ask(1, 2, 3), ask(1, 9)):
        match = memory.find(request)
        assert match is not None
        assert match.worker is B


def test_the_same_again_is_all_there() -> None:
    memory = Memory()
    turn(memory, ask(1, 2, size=700), A)
    match = memory.find(ask(1, 2, size=700))
    assert match is not None
    assert (match.depth, match.cached) == (2, 700)


def test_no_more_can_be_cached_than_is_asked() -> None:
    memory = Memory()
    turn(memory, ask(1, size=5000), A)
    match = memory.find(ask(1, 2, size=1000))
    assert match is not None
    assert match.cached == 1000


def test_another_branch_is_found_at_the_fork() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), A)
    match = memory.find(ask(1, 3, size=900))
    assert match is not None
    assert (match.worker, match.whole, match.depth) == (A, False, 1)
    assert match.cached == 300


def test_branches_go_their_own_ways() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), A)
    turn(memory, ask(1, 3), B)
    ours, theirs = memory.find(ask(1, 2, 4)), memory.find(ask(1, 3, 4))
    assert ours is not None
    assert theirs is not None
    assert (ours.worker, theirs.worker) == (A, B)


@pytest.mark.parametrize(
    "other", [ask(1, 2, subject="bob"), ask(1, 2, subject="alice", model="tiny")]
)
def test_what_others_have_asked_is_not_found(other: Ask) -> None:
    memory = Memory()
    turn(memory, ask(1, subject="alice"), A)
    assert memory.find(ask(1, 2, subject="alice")) is not None
    assert memory.find(other) is None


def test_what_many_begin_with_is_no_sign() -> None:
    """A greeting that is the same for all must not send all to one worker."""
    memory = Memory()
    found = [turn(memory, ask(1, 100 + number), A) is not None for number in range(10)]
    assert found == [False, *[True] * SHARED, *[False] * (9 - SHARED)]
    for number in range(10):  # each of them is still itself
        match = memory.find(ask(1, 100 + number, 200 + number))
        assert match is not None
        assert (match.whole, match.depth) == (True, 2)


def test_one_long_conversation_is_not_many() -> None:
    memory = Memory()
    texts = [1]
    for number in range(2, 40):
        turn(memory, ask(*texts[-8:]), A)
        texts.append(number)
        match = memory.find(ask(*texts[-8:]))
        assert match is not None
        assert match.whole


# --- Forgetting -------------------------------------------------------------------


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    memory = Memory(size=3)
    turn(memory, ask(1), A)
    turn(memory, ask(2), A)
    turn(memory, ask(3), A)
    turn(memory, ask(1), A)
    turn(memory, ask(4), A)
    assert memory.find(ask(2)) is None
    assert all(memory.find(ask(number)) for number in (1, 3, 4))
    assert repr(memory) == "<Memory of 3 prefixes>"


@given(
    st.integers(1, 10),
    st.lists(st.lists(st.integers(0, 30), max_size=8, unique=True), max_size=60),
)
@settings(deadline=None)
def test_it_never_remembers_more_than_it_may(
    size: int, requests: list[list[int]]
) -> None:
    memory = Memory(size)
    for each in requests:
        request = ask(*each)
        turn(memory, request, A, 0.5)
        assert len(memory) <= size
        match = memory.find(request)
        assert match is None or match.worker is A


# --- Verifying --------------------------------------------------------------------


def test_as_long_as_it_is_true_it_is_trusted() -> None:
    memory = Memory()
    turn(memory, ask(1), A, 0.0)  # nothing was expected
    for number in range(2, 20):
        match = turn(memory, ask(number - 1, number, size=1050), A, 0.99)
        assert match is not None
        assert match.trust > 0.98


def cold(memory: Memory, number: int, distance: int) -> None:
    """Let a conversation come back after so many others, and be cold."""
    turn(memory, ask(number), A)
    others(memory, distance)
    turn(memory, ask(number, number + 1), A, 0.0)


def trust(memory: Memory, distance: int) -> float:
    turn(memory, ask(77), A)
    others(memory, distance)
    match = memory.find(ask(77, 78))
    assert match is not None
    assert match.distance == distance
    return match.trust


def test_what_is_lost_after_some_others_is_lost_after_more_and_not_after_fewer() -> (
    None
):
    memory = Memory()
    for number in range(100, 140, 2):
        cold(memory, number, 20)
    assert trust(memory, 0) == trust(memory, 8) == 1.0
    assert trust(memory, 16) < 0.2
    assert trust(memory, 500) < 0.2
    assert trust(memory, 16) >= LEAST_TRUST


def test_a_worker_that_has_restarted_is_soon_hardly_trusted_and_soon_again() -> None:
    memory = Memory()
    for number in range(100, 110, 2):
        cold(memory, number, 0)
    assert trust(memory, 0) < 0.4
    for number in range(200, 216, 2):
        turn(memory, ask(number), A)
        others(memory, 30)
        turn(memory, ask(number, number + 1), A, 1.0)
    assert trust(memory, 0) > 0.85
    assert trust(memory, 20) > 0.85


def test_other_workers_and_other_models_are_still_trusted() -> None:
    memory = Memory()
    for number in range(100, 120, 2):
        cold(memory, number, 0)
    turn(memory, ask(1), B)
    turn(memory, ask(1, model="tiny"), A)
    for request in (ask(1, 2), ask(1, 2, model="tiny")):
        match = memory.find(request)
        assert match is not None
        assert match.trust == 1.0


def test_a_part_of_what_was_expected_is_a_part() -> None:
    memory = Memory()
    for number in range(100, 200, 2):
        turn(memory, ask(number, size=800), A)
        turn(memory, ask(number, number + 1, size=1000), A, 0.4)
    assert trust(memory, 0) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("cached", "tokens"), [(-1, 1000), (1001, 1000), (0, -1), (1, 0)]
)
def test_what_cannot_be_true_is_ignored(cached: int, tokens: int) -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), A)
    memory.verify(ask(1, 2), A, cached, tokens)
    assert trust(memory, 0) == 1.0


def test_an_empty_prompt_is_cold() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), A)
    memory.verify(ask(1, 2), A, 0, 0)
    assert trust(memory, 0) < 1.0


def test_where_nothing_was_expected_nothing_is_learnt() -> None:
    memory = Memory()
    turn(memory, ask(1), A, 0.0)  # a new conversation
    turn(memory, ask(1, 2), B, 0.0)  # it has moved
    turn(memory, ask(1, 3), A, 0.0)  # a branch; how much is the same was a guess
    memory.verify(ask(1, 2), A, 0, 1000)  # it was another worker's
    memory.verify(ask(5), A, 0, 1000)  # it is forgotten
    memory.verify(ask(), A, 0, 1000)
    assert trust(memory, 0) == 1.0


def test_an_answer_is_counted_once() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    turn(memory, ask(1, 2), A, 0.0)
    once = trust(memory, 0)
    memory.verify(ask(1, 2), A, 0, 1000)
    assert trust(memory, 0) == once < 1.0


def test_requests_that_are_no_conversations_wear_the_cache_out_too() -> None:
    memory = Memory()
    turn(memory, ask(1), A)
    for _ in range(5):
        turn(memory, ask(), A)
    match = memory.find(ask(1, 2))
    assert match is not None
    assert match.distance == 5


def test_a_request_of_unknown_size() -> None:
    memory = Memory()
    turn(memory, ask(1, size=0), A)
    turn(memory, ask(1, 2, size=0), A, 0.0)
    assert trust(memory, 0) == 1.0


def test_what_it_knows_can_be_read() -> None:
    memory = Memory()
    match = turn(memory, ask(1), A)
    match = memory.find(ask(1))
    assert match is not None
    assert repr(match.conversation) == "<Conversation of 1000 bytes on w0>"
    (cache,) = memory._caches.values()
    assert repr(cache) == "<Cache served=1 kept=" + " ".join(["1.00"] * 12) + ">"


# --- Several hubs -----------------------------------------------------------------

KEY = b"k" * 32


def hubs(count: int = 2, *, key: bytes = KEY) -> list[tuple[Memory, dict[int, Turn]]]:
    made = [(Memory(), dict[int, Turn]()) for _ in range(count)]
    for memory, outbox in made:
        memory.share(key, outbox)
    return made


def deliver(outbox: dict[int, Turn], *memories: Memory) -> None:
    """Have hubs hear of the turns of another one."""
    for turn in outbox.values():
        for memory in memories:
            memory.note(turn)
    outbox.clear()


def test_with_a_key_the_next_turn_begins_with_the_last_one_in_every_process() -> None:
    texts = ["s", "u1", "a1", "u2", "a2", "u3"]
    first = prefixes(chat(*texts[:2]), key=b"k" * 32)
    assert first == (8547887772691317023,)
    third = prefixes(chat(*texts), key=KEY)
    assert third[:1] == first
    assert third[:2] == prefixes(chat(*texts[:4]), key=KEY)
    items = msgspec.json.decode(chat(*texts), type=list[msgspec.Raw])
    assert prefixes(items, key=KEY) == third
    assert set(prefixes(chat(*texts), key=b"x" * 32)).isdisjoint(third)


def test_each_turn_is_found_whichever_hub_had_the_last_one() -> None:
    (one, out), (two, back) = hubs()
    turn(one, ask(1, size=600), A)
    deliver(out, two)
    match = turn(two, ask(1, 2, size=1000), B)
    assert match is not None
    assert match.worker is A
    assert (match.whole, match.depth, match.cached) == (True, 1, 600)
    deliver(back, one)
    match = one.find(ask(1, 2, 3, size=1500))
    assert match is not None
    assert match.worker is B
    assert (match.whole, match.depth, match.cached) == (True, 2, 1000)
    assert len(one) == len(two) == 2


def test_what_a_hub_has_sent_out_is_what_was_new_and_no_text() -> None:
    ((memory, out),) = hubs(1)
    turn(memory, ask(1, size=600, subject="alice"), A)
    (first,) = out.values()
    turn(memory, ask(1, 2, 3, size=900, subject="alice"), A)
    last = [*out.values()][-1]
    assert (first.keys, first.before, first.size) == (first.keys[:1], 0, 600)
    assert (last.before, last.size, len(last.keys)) == (first.keys[0], 900, 2)
    assert first.worker is A
    assert first.model == MODEL


def test_other_subjects_and_other_keys_find_nothing() -> None:
    (one, out), (two, _) = hubs()
    turn(one, ask(1, subject="alice"), A)
    deliver(out, two)
    assert two.find(ask(1, 2, subject="alice")) is not None
    assert two.find(ask(1, 2, subject="bob")) is None
    assert two.find(ask(1, 2, subject="alice", model="other")) is None
    two.share(b"x" * 32, {})
    assert two.find(ask(1, 2, subject="alice")) is None
    assert len(two) == 0


def test_the_requests_of_other_hubs_wear_a_cache_out_too() -> None:
    (one, out), (two, _) = hubs()
    turn(one, ask(1), A)
    deliver(out, two)
    others(one, 7)
    deliver(out, two)
    match = two.find(ask(1, 2))
    assert match is not None
    assert match.distance == 7


def test_a_beginning_that_many_share_on_several_hubs_is_no_sign() -> None:
    (one, out), (two, _) = hubs()
    for number in range(SHARED + 1):
        turn(one, ask(1, 10 + number), A)
    deliver(out, two)
    assert two.find(ask(1, 99)) is None
    assert two.find(ask(1, 10, 99)) is not None


def test_a_hub_that_did_not_hear_of_the_first_turns_finds_the_later_ones() -> None:
    (one, out), (two, _) = hubs()
    turn(one, ask(1), A)
    out.clear()
    turn(one, ask(1, 2), A)
    deliver(out, two)
    assert two.find(ask(1, 3)) is None
    assert two.find(ask(1, 2, 3)) is not None


def test_the_outbox_is_bounded_where_nothing_empties_it() -> None:
    ((memory, out),) = hubs(1)
    for number in range(OUTBOX + 10):
        turn(memory, ask(number), A)
    assert len(out) == OUTBOX


def test_what_others_report_is_bounded_too() -> None:
    memory = Memory(size=10)
    for number in range(1, 50):
        memory.note(Turn(MODEL, A, (number * 2, number * 2 + 1), 0, 100))
    assert len(memory) == 10


def test_a_question_that_only_asks_sends_nothing_out() -> None:
    ((memory, out),) = hubs(1)
    turn(memory, ask(1), A)
    part, sent = memory.excerpt(ask(1, 2)), len(out)
    match = part.find(ask(1, 2))
    assert match is not None
    part.hold(ask(1, 2), A, match)
    assert len(out) == sent
