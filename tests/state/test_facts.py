"""Facts that hubs share: how they are written down, and which version wins."""

from __future__ import annotations

import pytest

from gollama_proxy.state.facts import (
    Comparison,
    Fact,
    Stamp,
    StoredWorker,
    compare,
    is_sound,
    left_over,
    texts_of,
    with_fact,
)

ONE = StoredWorker("one", "admin", {"url": "http://10.0.0.1:1", "slots": 4}, "paused")
TWO = StoredWorker(
    "two", "agent", {"url": "http://10.0.0.2:1"}, agent={"digest": "f00d"}
)
HELD = StoredWorker("of the file", "file", hold="draining")


@pytest.mark.parametrize("worker", [ONE, TWO, HELD], ids=lambda each: each.name)
def test_a_worker_is_the_sum_of_its_facts(worker: StoredWorker) -> None:
    facts = [
        Fact(kind, worker.name, text, 1) for kind, text in texts_of(worker).items()
    ]
    for order in facts, facts[::-1]:
        found: StoredWorker | None = None
        for fact in order:
            assert is_sound(fact)
            found = with_fact(found, fact)
        assert found == worker


def test_a_worker_without_facts_is_none() -> None:
    assert texts_of(None) == {"worker": "", "hold": ""}
    assert with_fact(TWO, Fact("worker", "two", "", 2)) is None
    assert with_fact(ONE, Fact("worker", "one", "", 2)) == StoredWorker(
        "one", "file", hold="paused"
    )


@pytest.mark.parametrize(
    "fact",
    [
        Fact("worker", "one", "{", 1),
        Fact("worker", "one", '{"v": 1}', 1),
        Fact("worker", "one", '{"v": 1, "source": "file", "settings": {"url": ""}}', 1),
        Fact("worker", "one", '{"v": 1, "source": "admin", "settings": {}}', 1),
        Fact("worker", "one", '{"v": 99, "source": "admin", "settings": {"a": 1}}', 1),
        Fact("hold", "one", "stuck", 1),
        Fact("jti", "f00d", "", 1),
        Fact("jti", "", "1", 1),
        Fact("colour", "one", "red", 1),
        Fact("hold", "x" * 70_000, "paused", 1),
    ],
)
def test_what_cannot_be_used_is_not_sound(fact: Fact) -> None:
    assert not is_sound(fact)


TAKE, SEND, NOTHING = Comparison(take=True), Comparison(send=True), Comparison()


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        (None, 5, TAKE),
        (Stamp(4, 0.0, sent=True), 5, TAKE),
        (Stamp(5, 0.0, sent=True), 5, NOTHING),
        (Stamp(6, 0.0, sent=True), 5, SEND),  # the store is filled from older copies
        (Stamp(4, 0.0, sent=False), 5, SEND),  # the store compares their ages
        (Stamp(0, 0.0, sent=False), 5, SEND),
    ],
)
def test_the_greatest_version_wins(
    mine: Stamp | None, theirs: int, verdict: Comparison
) -> None:
    assert compare(mine, theirs) == verdict


@pytest.mark.parametrize(
    ("mine", "same_life", "verdict"),
    [
        (Stamp(4, 0.0, sent=True), True, TAKE),  # it was removed long ago
        (Stamp(4, 0.0, sent=False), True, SEND),
        (Stamp(0, 0.0, sent=True), True, SEND),
        (Stamp(4, 0.0, sent=True), False, SEND),  # the store has lost its data
    ],
)
def test_a_store_without_a_fact_gets_it_unless_it_was_removed(
    mine: Stamp, same_life: bool, verdict: Comparison
) -> None:
    assert left_over(mine, same_life=same_life) == verdict
