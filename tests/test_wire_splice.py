"""A broken answer goes on elsewhere, and its client cannot tell from the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from gollama_proxy.wire.chunks import DivergedError, UnreadableError
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.splice import MAX_EVENT, Splice
from gollama_proxy.wire.told import closing
from tests.fakes import replies
from tests.fakes.streams import (
    chat_chunk,
    chat_event,
    chat_stream,
    delta,
    dump,
    parsed,
    read,
    spliced,
    text_stream,
)

TEXT = "One day, a fox met a crow. "  # long enough to be no accident
BEGUN = chat_stream(["a"], reason=None)


def splice_behind(relayed: bytes, **options: Any) -> Splice:
    return Splice(parsed(relayed), chat=True, **options)


def fed(splice: Splice, data: bytes) -> bytes:
    return b"".join(splice.feed(data))


def cut_at(data: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


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


class Case(NamedTuple):
    before: list[str]
    after: list[str]
    second: list[str]  # the texts of the second stream
    regenerate: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    way = draw(st.sampled_from(["whole", "pieces", "none", "less", "more", "again"]))
    before, after = draw(TOKENS), draw(TOKENS)
    if way in ("less", "more"):
        before = [draw(st.sampled_from(" \n")) + TEXT, *before]
    told, rest = "".join(before), "".join(after)
    if way == "none":  # what begins alike could be an echo
        assume(rest[0] not in {told[0], told.lstrip()[:1], " "})
        return Case(before, after, after, regenerate=False)
    echo = {"less": told[1:], "more": " " + told}.get(way, told)
    if way in ("pieces", "again"):
        pieces = cut_at(echo + rest, draw(PLACES))
        return Case(before, after, pieces, regenerate=way == "again")
    joined = draw(st.booleans())  # llama-server's first token comes with the echo
    second = [echo + after[0], *after[1:]] if joined else [echo, *after]
    return Case(before, after, second, regenerate=False)


@given(cases(), CUTS, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
@example(Case(["a"], ["a"], ["aa"], False), [], False, b"\n")
@example(Case(["\n"], ["\n"], ["\n", "\n"], False), [], False, b"\n")
@example(Case([" ", TEXT], [" "], [TEXT, " "], False), [1, 2, 3], True, b"\r\n")
def test_a_client_sees_one_answer(
    case: Case, cuts: list[int], escape: bool, eol: bytes
) -> None:
    """However the second worker begins, and however its bytes are cut."""
    relayed = chat_stream(case.before, reason=None, escape=escape)
    splice = splice_behind(relayed, regenerate=case.regenerate)
    stream = chat_stream(case.second, id="chatcmpl-2", escape=escape)
    stream = b":\n\n" + stream
    stream = stream.replace(b"\n", eol)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    out = [event for a, b in pairwise(edges) for event in splice.feed(stream[a:b])]
    assert all(event.endswith(b"\n\n") for event in out)
    assert all(event.count(b"\n\n") == 1 for event in out)
    seen = read(relayed + b"".join(out) + splice.finish())
    whole = "".join(case.before + case.after)
    assert seen == (whole, 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)
    assert "complete" in repr(splice)


@given(TOKENS, TOKENS)
def test_a_prompt_is_never_repeated(before: list[str], after: list[str]) -> None:
    """So what a text completion goes on with is new, whatever it looks like."""
    relayed = text_stream(before, reason=None)
    seen = read(spliced(relayed, text_stream(after), chat=False))
    assert seen.text == "".join(before + after)
    assert (len(seen.ids), seen.reasons, seen.done) == (1, ["stop"], 1)


def test_text_passes_as_soon_as_it_is_new() -> None:
    splice = splice_behind(chat_stream(["a", "b"], reason=None))
    assert fed(splice, chat_event(content="a")) == b""
    assert fed(splice, b":\n\n") == b":\n\n"
    assert read(fed(splice, chat_event(content="bc"))).text == "c"
    assert repr(splice) == "<Splice behind 2 characters, aligned>"


def test_events_are_given_one_by_one() -> None:
    """So that those in front of the one that cannot be passed on are."""
    splice = splice_behind(BEGUN)
    assert isinstance(splice.feed(b""), Iterator)
    events = splice.feed(
        chat_event(content="ab") + b":\n\n" + chat_event(tool_calls=[{"index": 0}])
    )
    assert read(next(events)).text == "b"
    assert next(events) == b":\n\n"
    with pytest.raises(DivergedError):
        next(events)


def test_what_was_cut_is_mended_by_others() -> None:
    """The hub writes it first; here it would come behind what a worker is late for."""
    relayed = chat_stream(["a", "b"], reason=None)[:-1]
    told = parsed(relayed)
    splice = Splice(told, chat=True)
    out = [fed(splice, chat_event(content=text)) for text in ("ab", "cd")]
    assert (told.mend, out[0], out[1].count(b"\n")) == (b"\n", b"", 2)
    assert read(relayed + told.mend + out[1]).text == "abcd"
    assert fed(splice, b":\n\n") == b":\n\n"


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
    """Text that was held back, as it could be a repetition, comes with the end."""
    relayed = chat_stream(["ab", "ab"], reason=None)
    for last, expected in (("ababc", "ababc"), ("a", "ababa"), ("", "abab")):
        assert read(spliced(relayed, chat_event("stop", content=last))).text == expected


def test_whatever_follows_the_end_is_dropped() -> None:
    again = chat_stream(["more"]) + chat_stream(["abc"], usage=replies.usage_of())
    seen = read(spliced(BEGUN, chat_stream(["ab"]) + again))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["stop"], 1)


def test_usage_behind_the_end_comes_alone() -> None:
    usage = dump(chat_chunk(delta("stop", content="b"), usage=replies.usage_of()))
    stream = chat_stream(["ab"]).removesuffix(replies.done()) + usage + replies.done()
    seen = read(spliced(BEGUN, stream))
    assert (seen.text, len(seen.usages), seen.reasons) == ("ab", 1, ["stop"])


def test_the_end_is_added_where_it_lacks() -> None:
    stream = chat_stream(["ab"]).removesuffix(replies.done())
    seen = read(spliced(BEGUN, stream))
    assert (seen.reasons, seen.done) == (["stop"], 1)


@pytest.mark.parametrize("told", [" " * 20, "\n\n"])
@pytest.mark.parametrize("rest", ["x", "\nx"])
def test_white_space_alone_proves_no_repetition(told: str, rest: str) -> None:
    seen = read(spliced(chat_stream([told], reason=None), chat_stream([rest])))
    assert seen.text == told + rest


def test_even_white_space_is_not_told_twice() -> None:
    stream = chat_stream([" " * 8, " " * 12, "x"])
    seen = read(spliced(chat_stream([" " * 20], reason=None), stream))
    assert seen.text == " " * 20 + "x"


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
    out = spliced(relayed, stream, regenerate=True)
    assert read(out).text == "ab"
    assert out.count(b'"hm"') == 1


def test_events_without_data_are_dropped() -> None:
    out = spliced(BEGUN, b"event: x\n\n" + chat_stream(["ab"]))
    assert out.count(b"event") == 0


@pytest.mark.parametrize(
    "event", [b"data: {\n\n", b"event: x\ndata: {]\n\n", b'data: {"choices":7}\n\n']
)
def test_behind_the_repetition_an_event_that_nobody_can_read_passes_raw(
    event: bytes,
) -> None:
    """As it would have without a rescue."""
    splice = splice_behind(BEGUN)
    assert read(fed(splice, chat_event(content="ab"))).text == "b"
    assert fed(splice, event + chat_event(content="c")).startswith(event)
    assert splice.told.text == "abc"


def test_behind_the_end_it_does_not_pass() -> None:
    splice = splice_behind(BEGUN)
    fed(splice, chat_stream(["ab"]))
    assert fed(splice, b"data: {\n\n") == b""


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
        (chat_stream(["And so on."]), {"must_echo": True}),
        (chat_event(reasoning_content="hm"), {}),
        (chat_event(tool_calls=[{"index": 0}]), {}),
        (dump(chat_chunk({"index": 1, "delta": {"content": "a"}})), {}),
        (b"data: {\n\n", {}),
        (b"data: [" + b"[" * 9999 + b"\n\n", {}),
    ],
)
def test_what_cannot_be_the_rest_is_refused(
    stream: bytes, options: dict[str, bool]
) -> None:
    splice = splice_behind(chat_stream([TEXT], reason=None), **options)
    with pytest.raises(DivergedError) as caught:
        fed(splice, stream)
    assert caught.value.code is Code.WORKER_PROTOCOL
    assert caught.value.detail


def test_thoughts_behind_the_text_are_refused() -> None:
    splice = splice_behind(BEGUN, regenerate=True)
    assert fed(splice, chat_event(content="ab"))
    with pytest.raises(DivergedError, match="could not continue"):
        fed(splice, chat_event(reasoning_content="hm"))


def test_an_error_of_the_second_worker_is_its_own() -> None:
    with pytest.raises(WorkerError) as caught:
        fed(splice_behind(BEGUN), replies.error_event("out of memory"))
    assert not isinstance(caught.value, DivergedError)
    assert caught.value.detail == ""


@pytest.mark.parametrize("stream", [b"", chat_stream(["ab"], reason=None)])
def test_an_end_without_a_finish_reason_is_none(stream: bytes) -> None:
    splice = splice_behind(BEGUN)
    assert b"[DONE]" not in fed(splice, stream + replies.done())
    with pytest.raises(WorkerError, match="before it was complete"):
        splice.finish()
    assert "complete" not in repr(splice)


# --- Once more --------------------------------------------------------------------


def test_a_rescued_answer_can_be_rescued_again() -> None:
    """What the client has is all that counts, whoever it came from."""
    first = chat_stream(["a", "b"], reason=None)
    splice = splice_behind(first)
    second = fed(splice, chat_stream(["abc", "d"], reason=None, id="chatcmpl-2"))
    told = parsed(first + second)
    assert (told.id, told.text, told.tokens) == ("chatcmpl-1", "abcd", 4)
    seen = read(spliced(first + second, chat_stream(["abcde"], id="chatcmpl-3")))
    assert seen == ("abcde", 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)


@given(TOKENS, TOKENS, st.integers(0, 9), st.booleans())
def test_it_knows_what_the_client_has_by_then(
    before: list[str], after: list[str], number: int, joined: bool
) -> None:
    """The same as if all that was passed on were read again."""
    relayed = chat_stream(before, reason=None)
    echo = "".join(before)
    pieces = [echo + after[0], *after[1:]] if joined else [echo, *after]
    splice = splice_behind(relayed)
    stream = chat_stream(pieces[:number], reason=None, id="chatcmpl-2")
    passed = fed(splice, stream)
    assert splice.told == parsed(relayed + passed)


def test_what_was_held_back_is_not_told() -> None:
    splice = splice_behind(chat_stream(["ab"], reason=None))
    assert fed(splice, chat_event(role="assistant") + chat_event(content="a")) == b""
    assert splice.told == parsed(chat_stream(["ab"], reason=None))


def test_the_role_is_told_once_whoever_tells_it() -> None:
    splice = splice_behind(dump(chat_chunk()))
    assert not splice.told.role_seen
    fed(splice, chat_stream(["a"], reason=None))
    assert splice.told.role_seen


def test_what_was_cut_is_not_cut_any_more() -> None:
    told = parsed(chat_stream(["a", "b"], reason=None)[:-1])
    assert told.mend
    assert Splice(told, chat=True).told == replace(told, mend=b"")


def test_an_answer_that_was_finished_and_then_broke_needs_its_end_only() -> None:
    """A worker can be lost between its finish_reason and its usage."""
    splice = splice_behind(BEGUN)
    passed = fed(splice, chat_event(content="ab") + chat_event("stop"))
    assert splice.told.finished
    seen = read(BEGUN + passed + closing(splice.told, chat=True))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["stop"], 1)


def test_an_answer_that_thinks_when_it_breaks_off_again_is_not_to_be_continued() -> (
    None
):
    """Or the client would have the thoughts of two."""
    splice = splice_behind(chat_stream([], reason=None))
    assert b'"hm"' in fed(splice, chat_event(reasoning_content="hm"))
    assert splice.told.reasoning_open
    fed(splice, chat_event(content="a"))
    assert not splice.told.reasoning_open


# --- What is not to be held, or read ----------------------------------------------


def test_an_event_that_does_not_end_is_given_up() -> None:
    """It is held until it is complete, and so it has a limit."""
    splice = splice_behind(BEGUN)
    whole = chat_event(content="ab")
    assert fed(splice, whole[:-1]) == b""
    assert splice._gatherer.size == len(whole) - 1
    assert fed(splice, b"\n" + b"data: ") != b""
    assert fed(splice, b"x" * (MAX_EVENT - 6)) == b""
    with pytest.raises(DivergedError) as caught:
        fed(splice, b"x")
    assert str(MAX_EVENT) in caught.value.detail


@pytest.mark.parametrize("junk", [b"\xff", b"1e999", b"9" * 5000, b'"\\ud800"'])
def test_a_field_that_nobody_reads_can_spoil_an_event(junk: bytes) -> None:
    """It is passed over by who reads the event, and not by who writes it anew."""
    event = chat_event(content="ab").replace(b'"created"', b'"x":%b,"created"' % junk)
    with pytest.raises(UnreadableError):
        fed(splice_behind(BEGUN), event.replace(b"\xff", b'"\xff"'))
