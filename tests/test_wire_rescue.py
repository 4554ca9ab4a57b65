"""A broken answer goes on elsewhere, and its client cannot tell from the text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.rescue import (
    DivergedError,
    Splice,
    Told,
    can_rescue,
    closing,
    continuation,
)
from tests.fakes import replies

TEXT = "One day, a fox met a crow. "  # long enough to be no accident


def chat_body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": "tiny", "messages": messages, **fields}).encode()


def text_body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "Once", **fields}).encode()


def chat_chunk(*choices: Any, id: str = "chatcmpl-1", **more: Any) -> dict[str, Any]:
    known = {"created": 1, "id": id, "model": "tiny", "system_fingerprint": "b1"}
    return {"choices": list(choices), **known, **more}


def delta(_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"finish_reason": _reason, "index": 0, "delta": fields}


def chat_stream(
    pieces: Iterable[str],
    *,
    reason: str | None = "stop",
    usage: dict[str, Any] | None = None,
    id: str = "chatcmpl-1",
    escape: bool = False,
) -> bytes:
    """Build a stream as llama-server does; without a `reason`, one that was cut."""
    chunks = [chat_chunk(delta(role="assistant", content=None), id=id)]
    chunks += [chat_chunk(delta(content=piece), id=id) for piece in pieces]
    if reason is not None:
        chunks.append(chat_chunk(delta(reason), id=id))
        if usage is not None:
            chunks.append(chat_chunk(id=id, usage=usage, timings=replies.timings_of()))
    done = replies.done() if reason is not None else b""
    return b"".join(dump(chunk, escape) for chunk in chunks) + done


def dump(obj: Any, escape: bool = False) -> bytes:
    text = json.dumps(obj, ensure_ascii=escape, separators=(",", ":"))
    return b"data: %b\n\n" % text.encode()


def text_stream(pieces: Sequence[str], *, reason: str | None = "stop") -> bytes:
    chunks = [
        replies.text_completion(piece, reason=None, last=False) for piece in pieces
    ]
    if reason is not None:
        chunks.append(replies.text_completion("", reason=reason))
    done = replies.done() if reason is not None else b""
    return b"".join(map(dump, chunks)) + done


class Seen(NamedTuple):
    """What a client makes of a stream."""

    text: str
    roles: int
    reasons: list[str]
    ids: set[tuple[str, int, str]]
    usages: list[dict[str, Any]]
    done: int


def read(stream: bytes) -> Seen:
    """Read a stream strictly: whole events, each of them JSON, `[DONE]` at the end."""
    stream = stream.replace(b"\r\n", b"\n")
    assert stream.endswith(b"\n\n")
    events = [event.strip(b"\n") for event in stream.split(b"\n\n")]
    data = [e.removeprefix(b"data: ") for e in events if e and not e.startswith(b":")]
    chunks = [json.loads(item) for item in data if item != b"[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice.get("delta", {}) for choice in choices]
    if b"[DONE]" in data:
        assert data[-1] == b"[DONE]"
    return Seen(
        "".join(c.get("delta", c).get("content") or c.get("text", "") for c in choices),
        sum("role" in delta for delta in deltas),
        [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks},
        [chunk["usage"] for chunk in chunks if "usage" in chunk],
        data.count(b"[DONE]"),
    )


def parsed(relayed: bytes, *, chat: bool = True) -> Told:
    told = Told.parse(relayed, chat)
    assert told is not None
    return told


def spliced(
    relayed: bytes, stream: bytes, *, chat: bool = True, **options: bool
) -> bytes:
    """Return all that a client gets whose answer goes on with `stream`."""
    splice = Splice(parsed(relayed, chat=chat), chat, **options)
    return relayed + splice.feed(stream) + splice.finish()


def cut_at(data: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


# --- Which requests ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}},
        {"tools": None, "grammar": "", "best_of": None, "max_tokens": None},
        {"max_tokens": 10, "temperature": 0.5, "stop": ["\n"], "seed": 1},
    ],
)
def test_plain_requests_can_be_rescued(fields: dict[str, Any]) -> None:
    assert can_rescue(chat_body(**fields), chat=True)
    assert can_rescue(text_body(**fields), chat=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"json_schema": {}},
        {"grammar": "root ::= 'a'"},
        {"guided_choice": ["a", "b"]},
        {"n": 2},
        {"best_of": 3},
        {"logprobs": True},
        {"logprobs": 0},
        {"echo": True},
        {"suffix": "the end"},
        {"audio": {"voice": "x"}},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"max_tokens": "10"},
    ],
)
def test_what_cannot_be_continued_is_not(fields: dict[str, Any]) -> None:
    assert not can_rescue(chat_body(**fields), chat=True)
    assert not can_rescue(text_body(**fields), chat=False)


def test_pictures_do_not_matter() -> None:
    """They are sent again with the rest of the body."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = {"role": "user", "content": [{"type": "text", "text": "a?"}, picture]}
    assert can_rescue(chat_body(messages=[message]), chat=True)


@pytest.mark.parametrize(
    "messages", [[], None, "hello", [{}], [{"role": "assistant", "content": "I"}]]
)
def test_a_chat_needs_messages_and_the_last_is_not_the_assistants(
    messages: Any,
) -> None:
    assert not can_rescue(chat_body(messages=messages), chat=True)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2, 3], None])
def test_a_prompt_is_one_string(prompt: Any) -> None:
    assert not can_rescue(text_body(prompt=prompt), chat=False)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"{}", b'{"prompt":"\xff"}', b'{"tools":' + b"[" * 9999]
)
def test_nonsense_cannot_be_rescued(body: bytes) -> None:
    assert not can_rescue(body, chat=True)
    assert not can_rescue(body, chat=False)


# --- What the client has ----------------------------------------------------------


def test_the_broken_answer_is_read() -> None:
    told = parsed(b":\n\n" + chat_stream(["a", "b", " c"], reason=None))
    assert (told.id, told.created, told.model) == ("chatcmpl-1", 1, "tiny")
    assert (told.text, told.tokens, told.mend) == ("ab c", 3, b"")
    assert told.role_seen
    assert not told.finished
    assert not told.reasoning_open


def test_the_count_of_a_worker_is_better_than_that_of_events() -> None:
    """One event can hold the tokens of a whole character, or of a whole line."""
    choice = delta(content="🍌")
    timings: dict[str, Any] = {"timings": {"predicted_n": 3}}
    assert parsed(dump(chat_chunk(choice, **timings))).tokens == 3
    usage: dict[str, Any] = {"usage": {"completion_tokens": 4}}
    assert parsed(dump(chat_chunk(choice, **usage))).tokens == 4


def test_a_finished_answer_needs_no_more_than_its_end() -> None:
    stream = chat_stream(["a"])
    assert parsed(stream).done
    cut = parsed(stream.removesuffix(replies.done()))
    assert cut.finished
    assert not cut.done


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_an_answer_that_still_thinks_is_told_from_one_that_has_thought(
    key: str,
) -> None:
    thought = dump(chat_chunk(delta(**{key: "hm"})))
    assert parsed(thought).reasoning_open
    assert not parsed(thought + chat_stream(["a"], reason=None)).reasoning_open


@pytest.mark.parametrize(
    "relayed",
    [
        b"",
        b":\n\n",
        replies.done(),
        b"data: {}\n\n",
        b"data: nonsense\n\n",
        b'data: {"choices":7}\n\n',
        dump({"choices": [delta(content="a")]}),
        chat_stream(["a"], reason=None) + replies.error_event("out of memory"),
        dump(chat_chunk(delta(content="a"), delta(content="b"))),
        dump(chat_chunk({"index": 1, "delta": {"content": "a"}})),
        dump(chat_chunk(delta(tool_calls=[{"index": 0}]))),
        dump(chat_chunk(delta(refusal="no"))),
    ],
)
def test_what_cannot_be_understood_is_not_continued(relayed: bytes) -> None:
    assert Told.parse(relayed, chat=True) is None


# --- Cut in mid-event -------------------------------------------------------------

WORDS = ["Hi", ' "Ü\\', "\n", "🍌", " end"]


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
@pytest.mark.parametrize("escape", [False, True])
def test_a_cut_at_any_byte_is_mended_or_refused(escape: bool, eol: bytes) -> None:
    """Whatever follows, the client sees whole events and every character once."""
    whole = "".join(WORDS)
    stream = chat_stream(WORDS, escape=escape).replace(b"\n", eol)
    first = stream.index(b'"content":"')
    refused = 0
    for cut in range(first, len(stream)):
        relayed = stream[:cut]
        told = Told.parse(relayed, chat=True)
        if told is None:
            refused += 1
            continue
        assert whole.startswith(told.text)
        if told.finished:
            seen = read(relayed + closing(told, chat=True))
        else:
            rest = chat_stream([told.text, whole[len(told.text) :]], id="chatcmpl-2")
            seen = read(spliced(relayed, rest))
        assert seen == (whole, 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1), cut
    # What is cut: the first text, characters and escapes, the last event.
    assert refused / (len(stream) - first) < 0.4
    assert all(
        Told.parse(stream[: at + 2 * len(eol)], chat=True) is not None
        for at in range(first, len(stream))
        if stream[at:].startswith(2 * eol)
    )


def test_a_text_completion_that_was_cut_is_mended() -> None:
    stream = text_stream(["ab", "cd"], reason=None)
    cut = stream.rindex(b'd","index"')
    told = parsed(stream[:cut], chat=False)
    assert (told.text, told.tokens) == ("abc", 2)
    seen = read(spliced(stream[:cut], text_stream(["de"]), chat=False))
    assert (seen.text, seen.reasons, seen.done) == ("abcde", ["stop"], 1)


def test_what_was_cut_is_mended_once() -> None:
    relayed = chat_stream(["a", "b"], reason=None)[:-1]
    splice = Splice(parsed(relayed), chat=True)
    out = [splice.feed(dump(chat_chunk(delta(content=text)))) for text in ("ab", "cd")]
    assert (out[0], out[1].count(b"\n")) == (b"", 3)
    assert read(relayed + out[1]).text == "abcd"
    assert splice.feed(b":\n\n") == b":\n\n"


@pytest.mark.parametrize("half", [b"\n", b"\ndata: {", b'data: {"choices":['])
def test_more_blank_lines_than_needed_do_no_harm(half: bytes) -> None:
    first, second = replies.role(), replies.token("a")
    relayed = first + b"\n" + second + half
    stream = b"\n:\n\n\n" + chat_stream(["ab"])
    out = spliced(relayed, stream)
    assert read(out).text == "ab"
    assert out.count(b":\n\n") == 1


@pytest.mark.parametrize("half", [b"data: [DO", b'data: {"choices":[', b"da"])
def test_behind_the_finish_reason_only_the_end_is_missing(half: bytes) -> None:
    relayed = chat_stream(["a"]).removesuffix(replies.done()) + half
    told = parsed(relayed)
    assert told.finished
    seen = read(relayed + closing(told, chat=True))
    assert (seen.text, seen.reasons, seen.done) == ("a", ["stop"], 1)


@pytest.mark.parametrize("half", [b":", b": ping", b":\n"])
def test_half_a_comment_is_ended(half: bytes) -> None:
    relayed = chat_stream(["a"], reason=None) + half
    assert read(spliced(relayed, chat_stream(["ab"]))).text == "ab"


@pytest.mark.parametrize("half", [b"event: x", b"data: {7", b': data: {"a'])
def test_half_of_something_else_is_not_mended(half: bytes) -> None:
    assert Told.parse(chat_stream(["a"], reason=None) + half, chat=True) is None


def test_the_first_event_cannot_be_mended() -> None:
    role = chat_stream([], reason=None)
    assert Told.parse(role[:-20], chat=True) is None
    assert parsed(role[:-1]).text == ""


# --- What to ask ------------------------------------------------------------------


def test_the_text_so_far_becomes_the_assistants_unfinished_message() -> None:
    body = chat_body(max_tokens=10, temperature=0.25, max_completion_tokens=-1)
    told = parsed(chat_stream([" no", ' "to'], reason=None))
    asked = continuation(body, told, chat=True)
    assert asked is not None
    expected = json.loads(body)
    expected["messages"].append({"role": "assistant", "content": ' no "to'})
    expected |= {"max_tokens": 8, "continue_final_message": True}
    expected |= {"add_generation_prompt": False, "echo": True}
    assert json.loads(asked) == expected


def test_the_text_so_far_is_put_behind_a_prompt() -> None:
    told = parsed(text_stream([" upon", " a"], reason=None), chat=False)
    asked = continuation(text_body(n_predict=3, max_tokens=None), told, chat=False)
    assert asked is not None
    expected = {"model": "tiny", "prompt": "Once upon a", "n_predict": 1}
    assert json.loads(asked) == {**expected, "max_tokens": None}


@pytest.mark.parametrize("chat", [True, False])
def test_without_a_text_so_far_the_request_is_sent_as_it_was(chat: bool) -> None:
    body = chat_body()
    told = parsed(chat_stream([], reason=None))
    assert continuation(body, told, chat) == body


@pytest.mark.parametrize("limit", [1, 2])
def test_an_answer_of_max_tokens_is_closed_for_its_length(limit: int) -> None:
    relayed = chat_stream(["a", "b"], reason=None)
    told = parsed(relayed)
    assert continuation(chat_body(max_tokens=limit), told, chat=True) is None
    seen = read(relayed + closing(told, chat=True))
    assert seen == ("ab", 1, ["length"], {("chatcmpl-1", 1, "tiny")}, [], 1)
    relayed = text_stream(["a", "b"], reason=None)
    seen = read(relayed + closing(parsed(relayed, chat=False), chat=False))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["length"], 1)


def test_closing_what_is_closed_adds_nothing() -> None:
    stream = chat_stream(["a"])
    assert closing(parsed(stream), chat=True) == b""
    assert closing(parsed(stream[:-1]), chat=True) == b"\n"


# --- What comes -------------------------------------------------------------------

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
    splice = Splice(parsed(relayed), chat=True, regenerate=case.regenerate)
    stream = chat_stream(case.second, id="chatcmpl-2", escape=escape)
    stream = b":\n\n" + stream
    stream = stream.replace(b"\n", eol)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    out = [splice.feed(stream[a:b]) for a, b in pairwise(edges)]
    assert all(not part or part.endswith(b"\n\n") for part in out)
    seen = read(relayed + b"".join(out) + splice.finish())
    whole = "".join(case.before + case.after)
    assert seen == (whole, 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)
    assert splice.complete


@given(TOKENS, TOKENS)
def test_a_prompt_is_never_repeated(before: list[str], after: list[str]) -> None:
    """So what a text completion goes on with is new, whatever it looks like."""
    relayed = text_stream(before, reason=None)
    seen = read(spliced(relayed, text_stream(after), chat=False))
    assert seen.text == "".join(before + after)
    assert (len(seen.ids), seen.reasons, seen.done) == (1, ["stop"], 1)


def test_text_passes_as_soon_as_it_is_new() -> None:
    splice = Splice(parsed(chat_stream(["a", "b"], reason=None)), chat=True)
    assert splice.feed(dump(chat_chunk(delta(content="a")))) == b""
    assert splice.feed(b":\n\n") == b":\n\n"
    assert read(splice.feed(dump(chat_chunk(delta(content="bc"))))).text == "c"
    assert "aligned" in repr(splice)
    assert not splice.complete


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
    stream = dump(chat_chunk(delta(content="ab"))) + dump(finish)
    out = spliced(chat_stream(["a"], reason=None), stream)
    assert b'"predicted_n":7' in out


def test_a_last_event_with_text_is_aligned_like_any_other() -> None:
    """Text that was held back, as it could be a repetition, comes with the end."""
    relayed = chat_stream(["ab", "ab"], reason=None)
    for last, expected in (("ababc", "ababc"), ("a", "ababa"), ("", "abab")):
        stream = dump(chat_chunk(delta("stop", content=last)))
        assert read(spliced(relayed, stream)).text == expected


def test_whatever_follows_the_end_is_dropped() -> None:
    again = chat_stream(["more"]) + chat_stream(["abc"], usage=replies.usage_of())
    seen = read(spliced(chat_stream(["a"], reason=None), chat_stream(["ab"]) + again))
    assert (seen.text, seen.reasons, seen.done) == ("ab", ["stop"], 1)


def test_usage_behind_the_end_comes_alone() -> None:
    usage = dump(chat_chunk(delta("stop", content="b"), usage=replies.usage_of()))
    stream = chat_stream(["ab"]).removesuffix(replies.done()) + usage + replies.done()
    seen = read(spliced(chat_stream(["a"], reason=None), stream))
    assert (seen.text, len(seen.usages), seen.reasons) == ("ab", 1, ["stop"])


@pytest.mark.parametrize("told", [" " * 20, "\n\n"])
@pytest.mark.parametrize("rest", ["x", "\nx"])
def test_white_space_alone_proves_no_repetition(told: str, rest: str) -> None:
    seen = read(spliced(chat_stream([told], reason=None), chat_stream([rest])))
    assert seen.text == told + rest


def test_even_white_space_is_not_told_twice() -> None:
    stream = chat_stream([" " * 8, " " * 12, "x"])
    seen = read(spliced(chat_stream([" " * 20], reason=None), stream))
    assert seen.text == " " * 20 + "x"


def test_the_end_is_added_where_it_lacks() -> None:
    stream = chat_stream(["ab"]).removesuffix(replies.done())
    seen = read(spliced(chat_stream(["a"], reason=None), stream))
    assert (seen.reasons, seen.done) == (["stop"], 1)


def test_an_answer_that_had_not_begun_passes_whole() -> None:
    """Thoughts included, and its role only if the client does not have it."""
    thought = dump(chat_chunk(delta(reasoning_content="hm")))
    stream = thought + chat_stream(["ab"])
    out = spliced(chat_stream([], reason=None), stream)
    assert (read(out).text, read(out).roles) == ("ab", 1)
    assert b'"hm"' in out
    empty = dump(chat_chunk())
    assert read(spliced(empty, stream + stream)).roles == 1


def test_thoughts_are_not_repeated() -> None:
    thought = dump(chat_chunk(delta(reasoning_content="hm")))
    relayed = thought + chat_stream(["a"], reason=None)
    stream = thought + chat_stream(["ab"])
    out = spliced(relayed, stream, regenerate=True)
    assert read(out).text == "ab"
    assert out.count(b'"hm"') == 1


def test_events_without_data_are_dropped() -> None:
    relayed = chat_stream(["a"], reason=None)
    assert spliced(relayed, b"event: x\n\n" + chat_stream(["ab"])).count(b"event") == 0


# --- What cannot be the rest ------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "options"),
    [
        (chat_stream(["One day, a fox met nobody."]), {}),  # as another answer would
        (chat_stream([TEXT.rstrip(), "\tAnd"]), {}),  # its space was cut off
        (chat_stream(["One night."]), {"regenerate": True}),
        (chat_stream(["One day"]), {"regenerate": True}),
        (chat_stream(["And so on."]), {"must_echo": True}),
        (dump(chat_chunk(delta(reasoning_content="hm"))), {}),
        (dump(chat_chunk(delta(tool_calls=[{"index": 0}]))), {}),
        (dump(chat_chunk({"index": 1, "delta": {"content": "a"}})), {}),
        (b"data: {\n\n", {}),
        (b"data: [" + b"[" * 9999 + b"\n\n", {}),
    ],
)
def test_what_cannot_be_the_rest_is_refused(
    stream: bytes, options: dict[str, bool]
) -> None:
    splice = Splice(parsed(chat_stream([TEXT], reason=None)), chat=True, **options)
    with pytest.raises(DivergedError) as caught:
        splice.feed(stream)
    assert caught.value.code is Code.WORKER_PROTOCOL
    assert caught.value.detail


def test_thoughts_behind_the_text_are_refused() -> None:
    relayed = chat_stream(["a"], reason=None)
    splice = Splice(parsed(relayed), chat=True, regenerate=True)
    assert splice.feed(dump(chat_chunk(delta(content="ab"))))
    with pytest.raises(DivergedError, match="could not continue"):
        splice.feed(dump(chat_chunk(delta(reasoning_content="hm"))))


def test_an_error_of_the_second_worker_is_its_own() -> None:
    splice = Splice(parsed(chat_stream(["a"], reason=None)), chat=True)
    with pytest.raises(WorkerError) as caught:
        splice.feed(replies.error_event("out of memory"))
    assert not isinstance(caught.value, DivergedError)
    assert "out of memory" in caught.value.detail


@pytest.mark.parametrize("stream", [b"", chat_stream(["ab"], reason=None)])
def test_an_end_without_a_finish_reason_is_none(stream: bytes) -> None:
    splice = Splice(parsed(chat_stream(["a"], reason=None)), chat=True)
    assert b"[DONE]" not in splice.feed(stream + replies.done())
    with pytest.raises(WorkerError, match="before it was complete"):
        splice.finish()
    assert "complete" not in repr(splice)


def test_a_rescued_answer_can_be_rescued_again() -> None:
    """What the client has is all that counts, whoever it came from."""
    first = chat_stream(["a", "b"], reason=None)
    splice = Splice(parsed(first), chat=True)
    second = splice.feed(chat_stream(["abc", "d"], reason=None, id="chatcmpl-2"))
    told = parsed(first + second)
    assert (told.id, told.text, told.tokens) == ("chatcmpl-1", "abcd", 4)
    seen = read(spliced(first + second, chat_stream(["abcde"], id="chatcmpl-3")))
    assert seen == ("abcde", 1, ["stop"], {("chatcmpl-1", 1, "tiny")}, [], 1)
