"""A token says which class its requests may have at most, and a header which it has."""

from __future__ import annotations

import pytest

from gollama_proxy.scheduling.ticket import Priority, State, Ticket, choose_priority
from gollama_proxy.wire.errors import Code, RequestError

INTERACTIVE, BATCH = Priority


def test_interactive_comes_before_batch() -> None:
    assert sorted(Priority, key=lambda p: p.rank) == [INTERACTIVE, BATCH]
    assert [str(priority) for priority in Priority] == ["interactive", "batch"]


@pytest.mark.parametrize(
    ("asked", "allowed", "chosen"),
    [
        (None, INTERACTIVE, INTERACTIVE),
        (None, BATCH, BATCH),
        ("interactive", INTERACTIVE, INTERACTIVE),
        ("batch", INTERACTIVE, BATCH),
        ("batch", BATCH, BATCH),
        (" Batch ", BATCH, BATCH),
    ],
)
def test_a_request_may_ask_for_what_its_token_allows(
    asked: str | None, allowed: Priority, chosen: Priority
) -> None:
    assert choose_priority(asked, allowed) is chosen


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("interactive", Code.PRIORITY_NOT_ALLOWED, "'interactive', only 'batch'"),
        ("urgent", Code.INVALID_VALUE, "'urgent' does not exist; known: interactive,"),
        ("", Code.INVALID_VALUE, "'' does not exist"),
        ("x" * 1000, Code.INVALID_VALUE, f"'{'x' * 40}' does"),
        ("a\nb", Code.INVALID_VALUE, r"'a\nb'"),
    ],
)
def test_anything_else_is_refused_in_one_clear_line(
    asked: str, code: Code, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        choose_priority(asked, BATCH)
    assert caught.value.code is code
    assert words in caught.value.message
    assert caught.value.message.isprintable()


def test_a_ticket_says_what_it_is() -> None:
    ticket = Ticket(7, "ann", "qwen", BATCH, 5.0)
    assert (ticket.state, ticket.first, ticket.joined_at) == (State.WAITING, False, 5.0)
    assert repr(ticket) == "<Ticket 7 of 'ann' for 'qwen' batch WAITING>"
    assert Ticket(-8, "ann", "qwen", BATCH, 5.0).first
