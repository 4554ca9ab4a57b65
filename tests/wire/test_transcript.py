"""All that was added comes out again, and takes a tenth of the room in between."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gollama_proxy.wire.transcript import Transcript
from tests.fakes import replies
from tests.fakes.replies import chunk
from tests.fakes.streams import arguments, call, chat_event, dump


def filled(*batches: Iterable[bytes]) -> Transcript:
    transcript = Transcript()
    for batch in batches:
        transcript.add([chunk(data) for data in batch])
    return transcript


def text_event(text: str) -> bytes:
    return dump(replies.text_completion(text, reason=None, last=False))


# --- Nothing is lost --------------------------------------------------------------

WORDS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\x00\x01\x02"\\\n🍌'),
    max_size=6,
)
EVENTS = (
    st.builds(replies.token, WORDS)
    | st.builds(lambda word: chat_event(content=word), WORDS)
    | st.builds(lambda word: dump({"content": word}, escape=True), WORDS)
    | st.builds(text_event, WORDS)
    | st.builds(lambda word: chat_event(reasoning_content=word), WORDS)
    | st.builds(lambda word: chat_event(content=word, role="assistant"), WORDS)
    | st.builds(lambda one, two: replies.token(one) + replies.token(two), WORDS, WORDS)
    | st.sampled_from(
        [
            replies.role(),
            replies.ping(),
            replies.finish(usage=replies.usage_of()),
            replies.done(),
            replies.error_event("no"),
            replies.token("a")[:-1],  # a chunk need not be an event
            b'data: {"content":"',
            b'"content":"a"',
            b"\x00",
            b"\x01",
            b"\x02",
            b"proxy error: Failed to read connection",
        ]
    )
    | st.binary(max_size=12)
)


@settings(deadline=None)
@given(st.lists(st.lists(EVENTS, max_size=7), max_size=8))
@example([[replies.token("a"), b"\x01"], [replies.token("b")]])
@example([[b"\x02", replies.token("a")], [replies.token("b")]])
@example([[replies.token("a")], [replies.token("b"), b"\x02"], [replies.token("c")]])
@example([[b'\x01"content":"a"'], [b'\x01"content":"b"']])
@example([[], [replies.token("a")], [], [b""]])
def test_what_was_added_comes_out_again(batches: list[list[bytes]]) -> None:
    """Without the frames, whatever the chunks hold and however they were added."""
    transcript = filled(*batches)
    body = b"".join(data for batch in batches for data in batch)
    assert transcript.body() == body
    assert transcript.body() == body  # as often as one likes


def test_in_the_beginning_there_is_nothing() -> None:
    assert Transcript().body() == b""


# --- It takes little room ---------------------------------------------------------


@pytest.mark.parametrize("event", [replies.token, text_event])
@pytest.mark.parametrize("batch", [6, 100])
def test_a_stream_is_kept_in_a_tenth_of_its_size(
    event: Callable[[str], bytes], batch: int
) -> None:
    """The words of a batch, and what it takes to hold them."""
    words = [f" {number:x}" for number in range(1000)]
    ends = [replies.finish(usage=replies.usage_of()), replies.done()]
    tracemalloc.start()
    try:
        transcript = filled([replies.role(), replies.ping(), event("!")])
        for at in range(0, len(words), batch):
            transcript.add([chunk(event(word)) for word in words[at : at + batch]])
        transcript.add(list(map(chunk, ends)))
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    stream = [replies.role(), replies.ping(), *map(event, ["!", *words]), *ends]
    assert transcript.body() == b"".join(stream)
    assert used < len(b"".join(stream)) / 10
    assert repr(transcript).startswith("<Transcript ")


def test_it_is_learnt_from_the_first_batch_that_ends_with_a_word() -> None:
    words = [replies.token(f" {number}") for number in range(200)]
    first = [replies.role(), chat_event(reasoning_content="hm"), replies.ping()]
    tracemalloc.start()
    try:
        transcript = filled(first, words[:1])
        for at in range(1, len(words), 7):
            transcript.add([chunk(data) for data in words[at : at + 7]])
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert transcript.body() == b"".join([*first, *words])
    assert used < len(b"".join(words)) / 5


def test_it_is_learnt_anew_when_thoughts_end_or_a_call_begins() -> None:
    words = [f" {number}" for number in range(200)]
    thoughts = [chat_event(reasoning_content=word) for word in words]
    calls = [call("paint"), *map(arguments, words)]
    events = [replies.role(), *thoughts, *map(replies.token, words), *calls]
    tracemalloc.start()
    try:
        transcript = Transcript()
        for at in range(0, len(events), 6):
            transcript.add([chunk(data) for data in events[at : at + 6]])
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert transcript.body() == b"".join(events)
    assert used < len(b"".join(events)) / 6


def test_what_changes_with_each_event_is_not_learnt_for_ever() -> None:
    events = [dump({"n": n, "content": "x" * n}) for n in range(100)]
    transcript = filled(*([event] for event in events))
    assert transcript.body() == b"".join(events)
    assert transcript._learnt == 8


# --- What looks like a word and is none -------------------------------------------


@pytest.mark.parametrize("mark", [b"\x00", b"\x01", b"\x02"])
@pytest.mark.parametrize(
    "event", [b'%b"content":"a"}', b'"content":"a"%b}', b'"content":"a%b"}']
)
def test_control_characters_change_nothing(event: bytes, mark: bytes) -> None:
    """JSON does not have them, but nobody has checked that it is JSON."""
    for first in (event % mark, event % b""):
        transcript = filled([first], [event % mark] * 3, [event % b""])
        assert transcript.body() == first + event % mark * 3 + event % b""


@pytest.mark.parametrize("length", [1, 99, 300, 5000])
def test_an_event_in_which_both_ends_overlap_stays_as_it_is(length: int) -> None:
    """The quote that opens the word is not the one that closes it."""
    head = b'data: {"pad":"%b","content":"' % (b"x" * length)
    whole, half = head + b'a"}\n\n', head + b"}\n\n"
    assert filled([whole], [half], [whole]).body() == whole + half + whole
