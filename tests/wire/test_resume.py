"""An answer goes on with another worker where it broke off, or not at all."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gollama_proxy.wire.answer import TAIL
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.partial import DivergedError, Span, UnreadableError, closing
from gollama_proxy.wire.resume import MAX_EVENT, MOST_WORDS, Resumer, Transcript
from gollama_proxy.wire.schema import Ending
from tests.fakes import replies
from tests.fakes.replies import chunk
from tests.fakes.streams import (
    arguments,
    call,
    chat_chunk,
    chat_event,
    chat_stream,
    delta,
    dump,
    parsed,
    read,
    read_calls,
    spliced,
    text_stream,
)


def filled(*batches: Iterable[bytes]) -> Transcript:
    transcript = Transcript(limit=1 << 20)
    for data in itertools.chain(*batches):
        transcript.add(chunk(data))
    return transcript


def pass_on(transcript: Transcript, data: bytes) -> None:
    """Keep a chunk as the relay does: its word alone, if it is like the last ones."""
    framed = chunk(data)
    start = framed.index(b"\n") + 1
    word = framed[start + transcript.before : transcript.behind]
    alike = framed[start:] == transcript.head + word + transcript.foot
    if not alike or transcript.chunks or b"\n" in word:
        transcript.add(framed)
        return
    transcript.words.append(word)
    if len(transcript.words) == MOST_WORDS:
        transcript.fold()


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
def test_all_added_chunks_come_out_again(batches: list[list[bytes]]) -> None:
    """Without the frames, whatever the chunks hold and however they were added."""
    transcript = filled(*batches)
    body = b"".join(data for batch in batches for data in batch)
    assert transcript.body() == body
    assert transcript.body() == body  # as often as one likes


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=20), st.lists(WORDS, max_size=40))
@example([], ["a\x00b"] * 6)
def test_words_come_out_as_the_chunks_that_they_were(
    others: list[bytes], words: list[str]
) -> None:
    passed = [*map(replies.token, "abcdef"), *others, *map(replies.token, words)]
    # A line may end within a word, and a separator may stand in one.
    passed += [replies.token("@").replace(b"@", raw) for raw in (b"\r", b"\0", b"y")]
    transcript = Transcript(limit=1 << 20)
    stream = b""
    for data in passed:
        pass_on(transcript, data)
        stream += data
        tail = transcript.tail()
        assert stream.endswith(tail)
        assert len(tail) >= min(len(stream), TAIL)
    assert transcript.body() == stream


def test_words_are_kept_apart_from_their_frames() -> None:
    transcript = filled(map(replies.token, "abcdef"))
    transcript.cut()
    pass_on(transcript, replies.token("g"))
    assert transcript.words == [b"g"]


def test_of_a_stream_beyond_the_limit_the_end_is_kept() -> None:
    transcript = Transcript(limit=50_000)
    passed = [replies.token(f" {number}") for number in range(2000)]
    for data in passed:
        pass_on(transcript, data)
    stream, body = b"".join(passed), transcript.body()
    assert len(stream) > 4 * 50_000
    assert stream.endswith(body)
    assert TAIL <= len(body) < 2 * 50_000
    assert stream.endswith(transcript.tail())
    assert len(transcript.tail()) >= TAIL


def test_of_events_that_differ_the_end_is_kept_as_well() -> None:
    transcript = Transcript(limit=10_000)
    passed = [dump({"n": number, "x": "y" * 100}) for number in range(1000)]
    for data in passed:
        pass_on(transcript, data)
    stream, body = b"".join(passed), transcript.body()
    assert stream.endswith(body)
    assert TAIL <= len(body) < 2 * 10_000


@pytest.mark.parametrize("again", [False, True])
def test_an_error_or_a_mark_long_before_the_end_is_noted(again: bool) -> None:
    later = [replies.token(f" {number}") for number in range(50)]
    failed = filled([replies.token("a"), replies.error_event("no")], later)
    marked = Transcript(Ending.STOP, limit=1 << 20)
    assert not failed.marked
    for data in (dump({"content": "", "stop": True}), *later):
        pass_on(marked, data)
    for transcript in (failed, marked):
        if again:
            transcript.add(chunk(replies.token('an "error"')))
        transcript.cut()
        assert b'"no"' not in transcript.tail()
        assert b"stop" not in transcript.tail()
    assert (failed.failed, marked.failed) == (True, False)
    assert marked.marked


def test_no_mark_is_noted_before_it_has_come() -> None:
    transcript = Transcript(Ending.STOP, limit=1 << 20)
    for number in range(50):
        pass_on(transcript, dump({"content": str(number), "stop": False}))
    transcript.cut()
    assert not transcript.marked


def test_a_new_transcript_is_empty() -> None:
    assert Transcript().body() == b""


# --- It takes little room ---------------------------------------------------------


@pytest.mark.parametrize("event", [replies.token, text_event])
def test_a_stream_is_kept_in_a_tenth_of_its_size(
    event: Callable[[str], bytes],
) -> None:
    """The words of a batch, and what it takes to hold them."""
    words = [f" {number:x}" for number in range(1000)]
    ends = [replies.finish(usage=replies.usage_of()), replies.done()]
    tracemalloc.start()
    try:
        transcript = filled([replies.role(), replies.ping(), event("!")])
        for data in [*map(event, words), *ends]:
            transcript.add(chunk(data))
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
        for data in words[1:]:
            transcript.add(chunk(data))
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
        transcript = Transcript(limit=1 << 20)
        for data in events:
            transcript.add(chunk(data))
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert transcript.body() == b"".join(events)
    assert used < len(b"".join(events)) / 6


def test_events_that_all_differ_are_learnt_a_few_times() -> None:
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
    """JSON does not have them, but the bytes need not be JSON."""
    for first in (event % mark, event % b""):
        transcript = filled([first], [event % mark] * 3, [event % b""])
        assert transcript.body() == first + event % mark * 3 + event % b""


def test_a_word_in_which_a_line_ends_goes_before_what_follows() -> None:
    events = [b'data: {"content":"%b"}\n\n' % word for word in (b"a", b"b", b"c\rd")]
    transcript = filled(events[:2])
    transcript.cut()
    pass_on(transcript, events[2])
    assert transcript.words == [b"c\rd"]
    transcript.add(chunk(replies.ping()))
    assert transcript.body() == b"".join([*events, replies.ping()])


@pytest.mark.parametrize("length", [1, 99, 300, 5000])
def test_an_event_in_which_both_ends_overlap_stays_as_it_is(length: int) -> None:
    """The quote that opens the word is not the one that closes it."""
    head = b'data: {"pad":"%b","content":"' % (b"x" * length)
    whole, half = head + b'a"}\n\n', head + b"}\n\n"
    assert filled([whole], [half], [whole]).body() == whole + half + whole


TEXT = "One day, a fox met a crow. "  # long enough to be no accident
BEGUN = chat_stream(["a"], reason=None)


def splice_behind(relayed: bytes, **options: Any) -> Resumer:
    return Resumer(parsed(relayed), chat=True, **options)


def fed(resumer: Resumer, data: bytes) -> bytes:
    return b"".join(resumer.feed(data))


def cut_at(data: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


# --- However it begins, however it is cut -----------------------------------------

TOKENS = st.lists(
    st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n🍌é")
    ).filter(bool),
    min_size=1,
    max_size=8,
)
PLACES = st.lists(st.integers(1, 400), max_size=6)
CUTS = st.lists(st.integers(1, 3000), max_size=12)


WRAPPERS = ["<think></think>", "<think>\n\n</think>\n\n", "assistant\n", "x" * 128]


class Case(NamedTuple):
    before: list[str]
    after: list[str]
    second: list[str]  # the texts of the second stream
    regenerate: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    way = draw(st.sampled_from(["whole", "less", "more", "wrapped", "again"]))
    before, after = draw(TOKENS), draw(TOKENS)
    if way in ("less", "more", "wrapped"):
        before = [draw(st.sampled_from(" \n")) + TEXT, *before]
    known, rest = "".join(before), "".join(after)
    if way == "again":
        pieces = cut_at(known + rest, draw(PLACES))
        return Case(before, after, pieces, regenerate=True)
    wrapped = draw(st.sampled_from(WRAPPERS)) + known
    echo = {"less": known.lstrip(), "more": " " + known, "wrapped": wrapped}.get(
        way, known
    )
    joined = draw(st.booleans())  # llama-server's first token comes with the echo
    second = [echo + after[0], *after[1:]] if joined else [echo, *after]
    return Case(before, after, second, regenerate=False)


@given(cases(), CUTS, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
@example(Case(["a"], ["a"], ["aa"], False), [], False, b"\n")
@example(Case([" ", TEXT], [" "], [TEXT, " "], False), [1, 2, 3], True, b"\r\n")
def test_a_client_sees_one_answer(
    case: Case, cuts: list[int], escape: bool, eol: bytes
) -> None:
    """However the second worker begins, and however its bytes are cut."""
    relayed = chat_stream(case.before, reason=None, escape=escape)
    resumer = splice_behind(relayed, regenerate=case.regenerate)
    stream = chat_stream(case.second, id="chatcmpl-2", escape=escape)
    stream = b":\n\n" + stream
    stream = stream.replace(b"\n", eol)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    out = [
        event
        for a, b in itertools.pairwise(edges)
        for event in resumer.feed(stream[a:b])
    ]
    assert all(event.endswith(b"\n\n") for event in out)
    assert all(event.count(b"\n\n") == 1 for event in out)
    seen = read(relayed + b"".join(out) + resumer.finish())
    whole = "".join(case.before + case.after)
    assert seen == (whole, 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)
    assert "complete" in repr(resumer)


@given(TOKENS, TOKENS)
def test_a_prompt_is_never_repeated(before: list[str], after: list[str]) -> None:
    """So what a text completion goes on with is new, whatever it looks like."""
    relayed = text_stream(before, reason=None)
    seen = read(spliced(relayed, text_stream(after), chat=False))
    assert seen.text == "".join(before + after)
    assert (len(seen.ids), seen.reasons, seen.done) == (1, ["stop"], 1)


def test_text_passes_as_soon_as_it_is_new() -> None:
    relayed = chat_stream(["a", "b"], reason=None)
    resumer = splice_behind(relayed, regenerate=True)
    assert fed(resumer, chat_event(content="a")) == b""
    assert fed(resumer, b":\n\n") == b":\n\n"
    assert "held" in repr(resumer)
    assert read(fed(resumer, chat_event(content="bc"))).text == "c"
    assert (
        repr(resumer) == "<Resumer of <Partial 2 characters, 2 tokens, open>, aligned>"
    )


def test_events_are_given_one_by_one() -> None:
    """So that those in front of the one that cannot be passed on are."""
    resumer = splice_behind(BEGUN)
    assert isinstance(resumer.feed(b""), Iterator)
    events = resumer.feed(
        chat_event(content="ab") + b":\n\n" + dump(chat_chunk(delta(), delta()))
    )
    assert read(next(events)).text == "b"
    assert next(events) == b":\n\n"
    with pytest.raises(DivergedError):
        next(events)


def test_a_comment_may_follow_an_empty_line() -> None:
    assert fed(splice_behind(BEGUN), b"\r\n: hi\n\n") == b": hi\n\n"


def test_a_cut_event_is_completed_from_others() -> None:
    """The hub writes it first; here it would come after events of a later worker."""
    relayed = chat_stream(["a", "b"], reason=None)[:-1]
    known = parsed(relayed)
    resumer = Resumer(known, chat=True)
    out = [fed(resumer, chat_event(content=text)) for text in ("ab", "cd")]
    assert (known.mend, out[0], out[1].count(b"\n")) == (b"\n", b"", 2)
    assert read(relayed + known.mend + out[1]).text == "abcd"
    assert fed(resumer, b":\n\n") == b":\n\n"


# --- Numbers ----------------------------------------------------------------------


def test_usage_is_that_of_one_answer() -> None:
    """The second worker took the first part for prompt: 20 of prompt, 2 and 3."""
    usage = replies.usage_of(completion=3, prompt=22, cached=21)
    stream = chat_stream(["abc"], usage=usage)
    seen = read(spliced(chat_stream(["a", "b"], reason=None), stream))
    assert seen.usages == [replies.usage_of(completion=5, prompt=20, cached=20)]
    plain = {"prompt_tokens": 22, "completion_tokens": 3}
    stream = chat_stream(["abc"], usage=plain)
    seen = read(spliced(chat_stream(["a", "b"], reason=None), stream))
    expected = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
    assert seen.usages == [expected]


def test_a_prompt_of_which_nothing_is_left_has_no_tokens() -> None:
    usage = replies.usage_of(completion=3, prompt=2)
    out = spliced(
        chat_stream(["a", "b"], reason=None), chat_stream(["abc"], usage=usage)
    )
    [seen] = read(out).usages
    assert (seen["prompt_tokens"], seen["total_tokens"]) == (0, 5)


def test_usage_of_an_answer_that_was_repeated_is_right_as_it_is() -> None:
    usage = replies.usage_of(completion=5, prompt=20, cached=20)
    stream = chat_stream(["a", "b", "c"], usage=usage)
    relayed = chat_stream(["a", "b"], reason=None)
    assert read(spliced(relayed, stream, regenerate=True)).usages == [usage]


def test_the_timings_are_those_of_the_second_worker() -> None:
    finish = chat_chunk(delta("stop"), timings=replies.timings_of(7))
    out = spliced(BEGUN, chat_event(content="ab") + dump(finish))
    assert b'"predicted_n":7' in out


# --- The end ----------------------------------------------------------------------


def test_a_last_event_with_text_is_aligned_like_any_other() -> None:
    relayed = chat_stream(["ab", "ab"], reason=None)
    for last, regenerate in itertools.product(("ababc", "abab"), (True, False)):
        end = chat_event("stop", content=last)
        assert read(spliced(relayed, end, regenerate=regenerate)).text == last


@pytest.mark.parametrize("last", ["", "ab", "b"])
@pytest.mark.parametrize("regenerate", [True, False])
def test_an_end_before_everything_is_repeated_is_not_an_end(
    last: str, regenerate: bool
) -> None:
    resumer = splice_behind(
        chat_stream(["ab", "ab"], reason=None), regenerate=regenerate
    )
    with pytest.raises(DivergedError):
        fed(resumer, chat_event("stop", content=last))


def test_whatever_follows_the_end_is_dropped() -> None:
    again = chat_stream(["more"]) + chat_stream(["abc"], usage=replies.usage_of())
    seen = read(spliced(BEGUN, chat_stream(["ab"]) + again))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["stop"], 1)


def test_usage_after_the_end_comes_alone() -> None:
    usage = dump(chat_chunk(delta("stop", content="b"), usage=replies.usage_of()))
    stream = chat_stream(["ab"]).removesuffix(replies.done()) + usage + replies.done()
    seen = read(spliced(BEGUN, stream))
    assert (seen.text, len(seen.usages), seen.reasons) == ("ab", 1, ["stop"])


def test_a_missing_end_is_added() -> None:
    stream = chat_stream(["ab"]).removesuffix(replies.done())
    seen = read(spliced(BEGUN, stream))
    assert (seen.reasons, seen.done) == (["stop"], 1)


# --- What else passes -------------------------------------------------------------


def test_an_answer_that_had_not_begun_passes_whole() -> None:
    """Thoughts included, and its role only if the client does not have it."""
    thought = chat_event(reasoning_content="hm")
    stream = thought + chat_stream(["ab"])
    out = spliced(chat_stream([], reason=None), stream)
    assert (read(out).text, read(out).roles) == ("ab", 1)
    assert b'"hm"' in out
    empty = dump(chat_chunk())
    assert read(spliced(empty, stream + stream)).roles == 1


def test_thoughts_are_not_repeated() -> None:
    thought = chat_event(reasoning_content="hm")
    relayed = thought + chat_stream(["a"], reason=None)
    stream = thought + chat_stream(["ab"])
    for regenerate in (True, False):
        out = spliced(relayed, stream, regenerate=regenerate)
        assert read(out).text == "ab"
        assert out.count(b'"hm"') == 1


@pytest.mark.parametrize(
    "echo",
    [
        [chat_event(reasoning_content="hm.\n"), chat_event(content=TEXT + " So")],
        [chat_event(reasoning_content="hm.", content=TEXT + " So")],
        [chat_event(content=TEXT + " So")],  # its template has no place for them
        [chat_event(content=f"<think>\nhm.\n</think>\n\n{TEXT} So")],
        [chat_event(reasoning_content=" hm.\n"), chat_event(content=TEXT + " So")],
    ],
)
def test_thoughts_may_be_repeated_in_any_form_or_not_at_all(echo: list[bytes]) -> None:
    thoughts = chat_event(reasoning_content="hm") + chat_event(reasoning=".\n")
    relayed = thoughts + chat_stream([TEXT], reason=None)
    out = spliced(relayed, b"".join([replies.role(), *echo]) + chat_event("stop"))
    assert (read(out).text, read(out).roles) == (TEXT + " So", 1)
    assert parsed(out).reasoning == "hm.\n"


def test_long_thoughts_may_be_repeated_in_the_text() -> None:
    thoughts = "I have to think about foxes and crows. " * 20
    relayed = chat_event(reasoning_content=thoughts) + chat_stream([TEXT], reason=None)
    echo = chat_event(content=f"<think>\n{thoughts}\n</think>\n\n{TEXT} So")
    assert read(spliced(relayed, echo + chat_event("stop"))).text == TEXT + " So"


def test_thoughts_that_broke_off_go_on_where_they_were() -> None:
    thoughts = [chat_event(reasoning_content=text) for text in ("hm", ", so", "!")]
    relayed = replies.role() + b"".join(thoughts[:2])
    stream = replies.role() + b"".join(thoughts) + chat_stream(["ab"])
    out = spliced(relayed, stream, regenerate=True)
    assert parsed(out).spans == (Span("reasoning", "hm, so!"), Span("text", "ab"))


def test_thoughts_may_follow_a_text() -> None:
    """Some models think between parts of their answer."""
    resumer = splice_behind(BEGUN, regenerate=True)
    assert fed(resumer, chat_event(content="ab"))
    assert b'"hm"' in fed(resumer, chat_event(reasoning_content="hm"))
    assert resumer.partial.spans == (Span("text", "ab"), Span("reasoning", "hm"))


def test_events_without_data_are_dropped() -> None:
    out = spliced(BEGUN, b"event: x\n\n" + chat_stream(["ab"]))
    assert out.count(b"event") == 0


@pytest.mark.parametrize(
    "event", [b"data: {\n\n", b"event: x\ndata: {]\n\n", b'data: {"choices":7}\n\n']
)
def test_after_the_repetition_an_unreadable_event_passes_raw(
    event: bytes,
) -> None:
    """As it would have without a rescue."""
    resumer = splice_behind(BEGUN)
    assert read(fed(resumer, chat_event(content="ab"))).text == "b"
    assert fed(resumer, event + chat_event(content="c")).startswith(event)
    assert resumer.partial.text == "abc"


def test_unreadable_events_after_the_end_are_dropped() -> None:
    resumer = splice_behind(BEGUN)
    fed(resumer, chat_stream(["ab"]))
    assert fed(resumer, b"data: {\n\n") == b""


def test_another_model_goes_on_under_its_own_name() -> None:
    stream = chat_stream(["ab"], usage=replies.usage_of(), id="chatcmpl-2")
    seen = read(spliced(BEGUN, stream, model="other"))
    names = {("chatcmpl-1", 1, "tiny"), ("chatcmpl-1", 1, "other")}
    assert (seen.text, seen.ids) == ("ab", names)


# --- What cannot be the rest ------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "options"),
    [
        (chat_stream(["One day, a fox met nobody."]), {}),  # as another answer would
        (chat_stream([TEXT.rstrip(), "\tAnd"]), {}),  # its space was cut off
        (chat_stream(["One night."]), {"regenerate": True}),
        (chat_stream(["One day"]), {"regenerate": True}),
        (chat_stream(["And so on."]), {}),
        (chat_stream([TEXT[:9], TEXT[9:], "And so on."]), {}),  # generated anew
        (chat_stream(["assistant\n", TEXT, "And so on."]), {}),
        (chat_stream(["x" * 129 + TEXT]), {}),
        (chat_event(reasoning_content="hm"), {}),
        (chat_event(reasoning_content="hm"), {"regenerate": True}),
        (call("paint"), {}),
        (call("paint"), {"regenerate": True}),
        (dump(chat_chunk({"index": 1, "delta": {"content": "a"}})), {}),
        (b"data: {\n\n", {}),
        (b"data: [" + b"[" * 9999 + b"\n\n", {}),
    ],
)
def test_a_stream_that_cannot_be_the_rest_is_refused(
    stream: bytes, options: dict[str, bool]
) -> None:
    resumer = splice_behind(chat_stream([TEXT], reason=None), **options)
    with pytest.raises(DivergedError) as caught:
        fed(resumer, stream)
    assert caught.value.code is Code.WORKER_PROTOCOL
    assert caught.value.detail


def test_a_short_text_after_a_wrapper_is_no_repetition() -> None:
    """It may be found in any words."""
    resumer = splice_behind(chat_stream(["h", "e"], reason=None))
    with pytest.raises(DivergedError):
        fed(resumer, chat_event(content="<think></think>he"))


def test_a_text_of_sixteen_characters_is_found_behind_a_wrapper() -> None:
    resumer = splice_behind(chat_stream([TEXT[:16]], reason=None))
    assert read(fed(resumer, chat_event(content="\n" + TEXT))).text == TEXT[16:]
    resumer = splice_behind(chat_stream([TEXT[:15]], reason=None))
    with pytest.raises(DivergedError):
        fed(resumer, chat_event(content="\n" + TEXT))


def test_an_answer_that_repeats_itself_is_no_repetition() -> None:
    """What does not echo goes on as it began, piece by piece."""
    resumer = splice_behind(chat_stream(["la ", "la "], reason=None))
    with pytest.raises(DivergedError):
        fed(resumer, chat_stream(["la ", "la ", "la!"]))


def test_a_continuation_does_not_think_again() -> None:
    relayed = chat_event(reasoning_content="hm") + chat_stream([TEXT], reason=None)
    resumer = splice_behind(relayed)
    with pytest.raises(DivergedError):
        fed(resumer, chat_event(reasoning_content="hm, well"))


@pytest.mark.parametrize(
    "event",
    [
        replies.error_event("out of memory"),
        replies.event({"error": "out of memory"}),
        replies.event({"object": "error", "message": "out of memory", "code": 500}),
    ],
)
def test_an_error_of_the_second_worker_is_its_own(event: bytes) -> None:
    with pytest.raises(WorkerError) as caught:
        fed(splice_behind(BEGUN), event)
    assert not isinstance(caught.value, DivergedError)
    assert caught.value.detail == ""


@pytest.mark.parametrize("stream", [b"", chat_stream(["ab"], reason=None)])
def test_an_end_without_a_finish_reason_is_not_an_end(stream: bytes) -> None:
    resumer = splice_behind(BEGUN)
    assert b"[DONE]" not in fed(resumer, stream + replies.done())
    with pytest.raises(
        WorkerError, match=r"^The worker ended .* complete\.$"
    ) as caught:
        resumer.finish()
    assert caught.value.code is Code.WORKER_INCOMPLETE
    assert "complete" not in repr(resumer)


def test_a_role_and_lines_without_data_do_not_come_again() -> None:
    resumer = splice_behind(BEGUN)
    assert fed(resumer, b"id: 1\n\n") == b""
    assert fed(resumer, b": a comment\n\n") == b": a comment\n\n"
    rest = fed(resumer, chat_event(content="amore", role="assistant"))
    assert b'"more"' in rest
    assert b"role" not in rest


def test_what_else_a_server_counts_is_passed_on() -> None:
    resumer = splice_behind(BEGUN)
    fed(resumer, chat_stream(["amore"]).removesuffix(replies.done()))
    counts = {"prompt_tokens": 9, "completion_tokens": 2, "other": 3}
    rest = fed(resumer, dump(chat_chunk(usage=counts)))
    usage = json.loads(rest.removeprefix(b"data: "))["usage"]
    assert usage["other"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


# --- Once more --------------------------------------------------------------------


def test_a_rescued_answer_can_be_rescued_again() -> None:
    """Everything that the client has counts, from all workers."""
    first = chat_stream(["a", "b"], reason=None)
    resumer = splice_behind(first)
    second = fed(resumer, chat_stream(["abc", "d"], reason=None, id="chatcmpl-2"))
    known = parsed(first + second)
    assert (known.id, known.text, known.tokens) == ("chatcmpl-1", "abcd", 4)
    third = chat_stream(["abcde"], id="chatcmpl-3")
    third = third.replace(b'"created":1', b'"created":2')
    assert third.count(b'"created":2') > 2
    seen = read(spliced(first + second, third))
    assert seen == ("abcde", 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)


@given(TOKENS, TOKENS, st.integers(0, 9), st.booleans())
def test_a_resumed_answer_knows_what_the_client_has(
    before: list[str], after: list[str], number: int, joined: bool
) -> None:
    """The same as if all that was passed on were read again."""
    relayed = chat_stream(before, reason=None)
    echo = "".join(before)
    pieces = [echo + after[0], *after[1:]] if joined else [echo, *after]
    resumer = splice_behind(relayed)
    stream = chat_stream(pieces[:number], reason=None, id="chatcmpl-2")
    passed = fed(resumer, stream)
    assert resumer.partial == parsed(relayed + passed)


def test_text_that_was_held_back_is_missing() -> None:
    resumer = splice_behind(chat_stream(["ab"], reason=None), regenerate=True)
    assert fed(resumer, chat_event(role="assistant") + chat_event(content="a")) == b""
    assert resumer.partial == parsed(chat_stream(["ab"], reason=None))


def test_the_role_is_passed_on_once() -> None:
    resumer = splice_behind(dump(chat_chunk()))
    assert not resumer.partial.role_seen
    fed(resumer, chat_stream(["a"], reason=None))
    assert resumer.partial.role_seen


def test_a_completed_event_is_whole() -> None:
    known = parsed(chat_stream(["a", "b"], reason=None)[:-1])
    assert known.mend
    assert Resumer(known, chat=True).partial == replace(known, mend=b"")


def test_an_answer_that_was_finished_and_then_broke_needs_its_end_only() -> None:
    """A worker can be lost between its finish_reason and its usage."""
    resumer = splice_behind(BEGUN)
    passed = fed(resumer, chat_event(content="ab") + chat_event("stop"))
    assert resumer.partial.finished
    seen = read(BEGUN + passed + closing(resumer.partial, chat=True))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["stop"], 1)


def test_thoughts_that_were_passed_on_are_known() -> None:
    resumer = splice_behind(chat_stream([], reason=None))
    assert b'"hm"' in fed(resumer, chat_event(reasoning_content="hm"))
    assert (resumer.partial.reasoning, resumer.partial.is_plain) == ("hm", False)
    fed(resumer, chat_event(content="a"))
    assert (resumer.partial.tokens, resumer.partial.pieces) == (2, 1)
    assert resumer.partial.is_plain


# --- Calls ------------------------------------------------------------------------

CALLS = [
    replies.role(),
    chat_event(content="Let me"),
    chat_event(content=" paint."),
    call("paint", "{", id="first-0"),
    arguments('"colour"'),
    arguments(': "red"}'),
    call("wash", "", id="first-1", index=1),
    arguments("{}", index=1),
    chat_event("tool_calls"),
    replies.done(),
]
# The same from another run, in other pieces; ids are made up each time.
SAME = [
    replies.role(),
    chat_event(content="Let me paint."),
    call("paint", '{"colour": ', id="second-0"),
    chat_event(
        tool_calls=[{"index": 0, "id": "second-0", "function": {"arguments": '"red"}'}}]
    ),
    call("wash", "{}", id="second-1", index=1),
    chat_event("tool_calls"),
    replies.done(),
]


@pytest.mark.parametrize("place", range(1, len(CALLS) - 1))
def test_a_call_that_broke_off_goes_on_where_it_was(place: int) -> None:
    """Under the id that the client knows, wherever the two streams were cut."""
    relayed = b"".join(CALLS[:place])
    for stream in (SAME, [event.replace(b"first-", b"second-") for event in CALLS]):
        out = spliced(relayed, b"".join(stream), regenerate=True)
        run = ["first" if place > at else "second" for at in (3, 6)]
        assert read_calls(out) == {
            0: (f"{run[0]}-0", "paint", '{"colour": "red"}'),
            1: (f"{run[1]}-1", "wash", "{}"),
        }
        assert read(out)[:3] == ("Let me paint.", 1, ["tool_calls"])
        assert b"[]" not in out


def test_a_call_may_follow_in_a_continuation() -> None:
    resumer = splice_behind(b"".join(CALLS[:3]))
    stream = [CALLS[0], chat_event(content="Let me paint."), *SAME[2:]]
    rest = fed(resumer, b"".join(stream))
    assert read_calls(rest) == read_calls(b"".join(SAME))
    assert resumer.partial.finished


def test_only_a_call_that_the_client_knows_loses_its_new_id() -> None:
    """And its type, which came with the first id."""

    def more(index: int) -> bytes:
        piece = {"index": index, "id": f"second-{index}", "type": "function"}
        return chat_event(tool_calls=[piece | {"function": {"arguments": "1"}}])

    resumer = splice_behind(b"".join(CALLS[:4]), regenerate=True)
    fed(resumer, b"".join(CALLS[:4]))
    known = fed(resumer, more(0))
    assert known
    assert b"second-0" not in known
    assert b'"type"' not in known
    assert b"wash" in fed(resumer, call("wash", "", id="second-1", index=1))
    assert b'"second-1"' in fed(resumer, more(1))


@pytest.mark.parametrize(
    "other",
    [
        call("paint", '{"color": "red"}'),
        call("wash", "{"),
        call("paint", "{", index=1),
        chat_event(content="No."),
        chat_event("tool_calls"),
    ],
)
def test_another_call_is_refused(other: bytes) -> None:
    resumer = splice_behind(b"".join(CALLS[:5]), regenerate=True)
    with pytest.raises(DivergedError):
        fed(resumer, b"".join(CALLS[:3]) + other)


def test_calls_that_share_an_index_stay_apart() -> None:
    """Some servers count each of them as the first."""
    stream = [CALLS[0], call("a", "{}", id="1"), call("b", "{}", id="2")]
    stream += [chat_event("tool_calls"), replies.done()]
    other = [event.replace(b'"id":"', b'"id":"other-') for event in stream]
    out = spliced(b"".join(stream[:2]), b"".join(other), regenerate=True)
    assert read_calls(out) == {0: ("other-2", "ab", "{}{}")}
    assert parsed(out).spans == parsed(b"".join(stream)).spans


def test_a_call_as_it_was_called_before_goes_on() -> None:
    begin = chat_event(function_call={"name": "f", "arguments": "{"})
    end = chat_event(function_call={"arguments": "}"}) + chat_event("function_call")
    out = spliced(replies.role() + begin, begin + end, regenerate=True)
    assert parsed(out).spans == (Span("name", "f"), Span("arguments", "{}"))


# --- What is not to be held, or read ----------------------------------------------


def test_an_event_that_does_not_end_is_given_up() -> None:
    """It is held until it is complete, and so it has a limit."""
    resumer = splice_behind(BEGUN)
    whole = chat_event(content="ab")
    assert fed(resumer, whole[:-1]) == b""
    assert resumer._gatherer.size == len(whole) - 1
    assert fed(resumer, b"\n" + b"data: ") != b""
    assert fed(resumer, b"x" * (MAX_EVENT - 6)) == b""
    with pytest.raises(DivergedError) as caught:
        fed(resumer, b"x")
    assert str(MAX_EVENT) in caught.value.detail


@pytest.mark.parametrize("junk", [b"\xff", b"1e999", b"9" * 5000, b'"\\ud800"'])
def test_an_unused_field_can_make_an_event_unreadable(junk: bytes) -> None:
    """A reader of the event skips it; a writer of the event must not."""
    event = chat_event(content="ab").replace(b'"created"', b'"x":%b,"created"' % junk)
    with pytest.raises(UnreadableError):
        fed(splice_behind(BEGUN), event.replace(b"\xff", b'"\xff"'))
