"""Of several choices in a stream, each has to come to its end."""

from __future__ import annotations

from typing import Any

import pytest

from gollama_proxy.wire.choices import MOST_CHOICES, MOST_HELD, Tally
from gollama_proxy.wire.openai import Ending
from tests.fakes.replies import event


def choice(index: int, reason: str | None = None) -> bytes:
    told: dict[str, Any] = {"index": index, "delta": {"content": "a"}}
    return event({"choices": [told | {"finish_reason": reason}]})


def tally(*events: bytes, asked: int = 2) -> Tally:
    counts = Tally(Ending.DONE, asked)
    for byte in b"".join(events):
        counts.feed(bytes([byte]))
    return counts


@pytest.mark.parametrize("done", [True, False])
def test_a_choice_that_has_begun_has_to_end(done: bool) -> None:
    begun = choice(0), choice(1), choice(0, "stop")
    assert not tally(*begun).is_complete(done=done)
    assert tally(*begun, choice(1, "length")).is_complete(done=done)


def test_a_choice_that_was_asked_for_has_to_begin() -> None:
    """Unless the stream says that this was all: it may be a server without `n`."""
    counts = tally(choice(0, "stop"))
    assert not counts.is_complete(done=False)
    assert counts.is_complete(done=True)


def test_a_server_may_tell_no_reasons() -> None:
    assert tally(choice(0), choice(1)).is_complete(done=True)
    assert not tally(choice(0), choice(1)).is_complete(done=False)


def test_native_completions_have_their_own_mark() -> None:
    counts = Tally(Ending.STOP, 2)
    counts.feed(event({"index": 1, "stop": True}) + event({"index": 0, "stop": False}))
    assert not counts.is_complete(done=False)
    counts.feed(event({"index": 0, "stop": True}))
    assert counts.is_complete(done=False)
    assert repr(counts) == "<Tally 2 of 2 ended>"


def test_what_is_kept_has_a_limit() -> None:
    """Behind it, the end of the stream alone counts."""
    long, many = Tally(Ending.DONE, 2), Tally(Ending.DONE, 2)
    long.feed(b"x" * (MOST_HELD + 1))
    for index in range(MOST_CHOICES + 1):
        many.feed(event({"choices": [{"index": index}]}))
    for counts in (long, many):
        counts.feed(choice(0))
        assert counts.is_complete(done=False)
