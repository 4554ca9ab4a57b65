"""Usage is asked for by a splice, and hidden again: no other byte changes."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.wire.openai import Api
from gollama_proxy.wire.usage import (
    HELD,
    Prompt,
    Usage,
    UsageHider,
    asking,
    beginning,
    read,
    read_end,
)
from tests.fakes.replies import (
    chat_completion,
    done,
    event,
    finish,
    named_event,
    ping,
    role,
    timings_of,
    token,
    usage_of,
)

ASKED = b'"stream_options":{"include_usage":true}'


def fed(pieces: list[bytes]) -> bytes:
    hider = UsageHider()
    return b"".join([*map(hider.feed, pieces), hider.finish()])


def cut(data: bytes, at: set[int]) -> list[bytes]:
    """Cut data at these places."""
    places = [0, *sorted(place for place in at if 0 < place < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


# --- Asking -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"stream":true}', b'{%b,"stream":true}' % ASKED),
        (b' {\n "stream" : true }', b' {%b,\n "stream" : true }' % ASKED),
        (b'{"stream_options":null}', b"{%b}" % ASKED),
        (b'{"a":1,"stream_options":{},"b":2}', b'{"a":1,%b,"b":2}' % ASKED),
        (
            b'{"stream_options" : { "include_usage" : false }\n}',
            b'{"stream_options" : {"include_usage":true}\n}',
        ),
        (b'{"stream_options":{"include_usage":null}}', b"{%b}" % ASKED),
        (
            rb'{"stream\u005foptions":null}',
            rb'{"stream\u005foptions":{"include_usage":true}}',
        ),
        # Not the field, but what looks like it.
        (
            b'{"stream":true,"x":{"stream_options":null}}',
            b'{%b,"stream":true,"x":{"stream_options":null}}' % ASKED,
        ),
        (
            rb'{"x":"\"stream_options\":null \u00e9"}',
            rb'{%b,"x":"\"stream_options\":null \u00e9"}' % ASKED,
        ),
        (
            rb'{"x":{"stream_options":{}},"stream\u005foptions":{}}',
            rb'{"x":{"stream_options":{}},"stream\u005foptions":{"include_usage":true}}',
        ),
    ],
)
def test_asking_is_a_splice(before: bytes, after: bytes) -> None:
    assert asking(before) == after
    told = json.loads(after)
    assert told.pop("stream_options") == {"include_usage": True}


@pytest.mark.parametrize(
    "options",
    [
        {"include_usage": True},
        {"include_usage": True, "x": 1},
        {"include_usage": False, "continuous_usage_stats": True},
        {"include_obfuscation": False},
        {"include_usage": "no"},
        "x",
        [],
    ],
)
def test_a_client_that_says_how_is_left_alone(options: Any) -> None:
    body = json.dumps({"stream": True, "stream_options": options}).encode()
    assert asking(body) is None


KEYS = st.sampled_from(["a", "model", "é", 'x"y', "stream", "options"])
VALUES = st.recursive(
    st.text(st.sampled_from('a{}[]:,"\\_é'), max_size=8) | st.none() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.just("stream_options"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    before=st.dictionaries(KEYS, VALUES, max_size=3),
    options=st.sampled_from([None, {}, {"include_usage": False}]) | st.just("absent"),
    after=VALUES,
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
)
def test_all_else_of_any_body_stays(
    before: dict[str, Any], options: Any, after: Any, indent: int | None, ascii: bool
) -> None:
    fields = {**before, **({} if options == "absent" else {"stream_options": options})}
    fields["last"] = after
    body = asking(json.dumps(fields, indent=indent, ensure_ascii=ascii).encode())
    assert body is not None
    assert json.loads(body) == fields | {"stream_options": {"include_usage": True}}


# --- Hiding -----------------------------------------------------------------------

USAGE = b'data: {"choices":[],"model":"m","usage":{"completion_tokens":3}}\n\n'
SHOWN = [
    role(),
    token("a"),
    token('"usage":{"x":1} \n\n "choices":[]'),
    finish(),
    done(),
    ping(),
    b": queued 3/7 eta 12s\n\n",
    b": half a comment\ndata: {}\n\n",
    b"\n\n",
    b"proxy error: Failed to read connection\n\n",
    b'data: {"choices":[],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{}}],"usage":{"completion_tokens":3}}\n\n',
    b'data: {"usage":{"completion_tokens":3}}\n\n',
    b'data: {"choices":null,"usage":{}}\n\n',
    b'data: {"choices":[],"usage":{},"error":{"message":"x"}}\n\n',
    b'data: {"choices":[],"usage":{}\n\n',
    b'data: {"choices":[],"usage":{"x":"\xff"}}\n\n',
    b'data: {"error":{"message":"\\"usage\\""}}\n\n',
    b'data: {"choices":[],"usage":{},"x":"%b"}\n\n' % (b"a" * HELD),
]
HIDDEN = [
    USAGE,
    finish(usage=usage_of()).split(b"\n\n")[1] + b"\n\n",
    USAGE.replace(b":", b" : ").replace(b"data : ", b"data:"),
    USAGE.replace(b"\n", b"\r\n"),
    USAGE.replace(b"\n", b"\r"),
    b': by the way\ndata: {"choices":[],\ndata: "usage":{}}\n\n',
    b'data: {"usage":{},"choices":[]}\n\n',
]


@pytest.mark.parametrize("shown", SHOWN)
def test_what_is_not_usage_alone_is_passed_on(shown: bytes) -> None:
    assert fed([shown]) == shown
    assert fed([shown[i : i + 1] for i in range(len(shown))]) == shown


@pytest.mark.parametrize("hidden", HIDDEN)
def test_usage_alone_is_left_out(hidden: bytes) -> None:
    around = [token("a"), hidden, done()]
    assert fed(around) == token("a") + done()
    whole = b"".join(around)
    assert fed([whole]) == token("a") + done()
    for place in range(len(whole)):
        assert fed([whole[:place], whole[place:]]) == token("a") + done()


def test_of_several_choices_each_has_its_usage_left_out() -> None:
    """As llama-server tells it: behind each choice, and so in the middle."""
    one = finish(usage=usage_of(3))
    shown = one.split(b"\n\n")[0] + b"\n\n"
    assert fed([one, token("b"), one + done()]) == shown + token("b") + shown + done()


def test_an_event_goes_out_whole_as_it_comes() -> None:
    """Nothing is held back that is not cut."""
    hider = UsageHider()
    for each in (role() + token("a"), token("b"), finish(), ping(), done()):
        assert hider.feed(each) == each
    assert hider.finish() == b""


@pytest.mark.parametrize(
    ("begun", "held"),
    [
        (b"data: ", b"data: "),
        (b'data: {"choices":[', b'data: {"choices":['),
        (b'data: {"choices":[],"us', b'data: {"choices":[],"us'),
        (b'data: {"choices":[{', b""),
        (b'data: {"choices":[{"delta"\n', b"\n"),
        (b'data: {"choices" : [ 1', b""),
        (b"data: " + b"x" * HELD, b""),
    ],
)
def test_no_more_is_held_back_than_what_may_be_usage(begun: bytes, held: bytes) -> None:
    hider = UsageHider()
    assert hider.feed(token("a") + begun) == token("a") + begun.removesuffix(held)
    assert hider.finish() == held
    assert hider.finish() == b""


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (USAGE[:-1], b""),
        (USAGE[:-2], b""),
        (USAGE.replace(b"\n", b"\r"), b""),
        (USAGE[:-3], USAGE[:-3]),
        (b"data: [DO", b"data: [DO"),
    ],
)
def test_a_stream_may_end_anywhere(end: bytes, left: bytes) -> None:
    assert fed([token("a"), end]) == token("a") + left
    assert fed([token("a") + end]) == token("a") + left


def test_after_a_cut_the_next_event_is_seen() -> None:
    """Where an answer goes on: what was cut has been completed behind its back."""
    hider = UsageHider()
    half = token("a")[:-9]
    assert hider.feed(half) + hider.finish() == half
    assert hider.feed(USAGE) == b""


def test_what_nobody_has_seen_can_be_withdrawn() -> None:
    hider = UsageHider()
    assert hider.feed(token("a") + USAGE[:-1]) == token("a")
    assert hider.withdraw() == USAGE[:-1]
    assert hider.feed(token("b")) + hider.finish() == token("b")


def test_a_hider_says_what_it_holds() -> None:
    hider = UsageHider()
    hider.feed(b"data: {")
    assert repr(hider) == "<UsageHider held=7>"


CUTS = st.sets(st.integers(0, 1500), max_size=20)


@given(
    events=st.lists(st.sampled_from(SHOWN[:-1] + HIDDEN), max_size=8),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=CUTS,
)
def test_any_stream_with_any_cuts(
    events: list[bytes], line_end: bytes, cuts: set[int]
) -> None:
    """The client's bytes are the worker's, without the events of usage."""

    def written(each: bytes) -> bytes:
        return re.sub(rb"\r\n|\r|\n", lambda _: line_end, each)

    shown = b"".join(written(each) for each in events if each not in HIDDEN)
    assert fed(cut(b"".join(map(written, events)), cuts)) == shown


@given(
    parts=st.lists(
        st.sampled_from(
            [
                b"\n",
                b"\r",
                b"\n\n",
                b"data: ",
                USAGE[:-2],
                b'{"choices":[',
                b"{}],",
                b":",
            ]
        )
        | st.binary(max_size=3),
        max_size=20,
    ),
    cuts=CUTS,
)
@example(parts=[USAGE[:-2], b"\r", b"\r", USAGE[:-2], b"\n\n"], cuts={64, 65, 66, 67})
@example(parts=[b'data: {"choices":[1]\n', USAGE], cuts={20, 21})
@example(parts=[b'data: {"choices":[1', b"\r", b"\r", USAGE], cuts={19, 20, 21})
def test_cuts_make_no_difference_even_where_it_is_no_stream(
    parts: list[bytes], cuts: set[int]
) -> None:
    data = b"".join(parts)
    assert fed(cut(data, cuts)) == fed([data])


# --- Reading ----------------------------------------------------------------------

# The same answer as each API tells it: a prompt of 290 tokens, 289 of them from the
# cache, and 4 tokens generated.  As a llama-server does it (build b10068).
OPENAI = {
    "completion_tokens": 4,
    "prompt_tokens": 290,
    "total_tokens": 294,
    "prompt_tokens_details": {"cached_tokens": 289},
}
RESPONSES = {
    "input_tokens": 290,
    "output_tokens": 4,
    "total_tokens": 294,
    "input_tokens_details": {"cached_tokens": 289},
}
ANTHROPIC = {"cache_read_input_tokens": 289, "input_tokens": 1, "output_tokens": 4}
NATIVE = {"tokens_predicted": 4, "tokens_evaluated": 290, "tokens_cached": 293}
TIMINGS = timings_of(4, 1, 289)
COUNTED = Usage(290, 4, Prompt(1, 289, 0.0))
TIMED = Usage(290, 4, Prompt(1, 289, TIMINGS["prompt_ms"] / 1000))


def whole(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("api", "fields", "expected"),
    [
        (Api.OPENAI, {"usage": OPENAI}, COUNTED),
        (Api.OPENAI, {"usage": OPENAI, "timings": TIMINGS}, TIMED),
        (Api.RESPONSES, {"usage": RESPONSES}, COUNTED),
        (Api.ANTHROPIC, {"usage": ANTHROPIC}, COUNTED),
        (Api.NATIVE, {**NATIVE, "timings": TIMINGS}, TIMED),
        (Api.NATIVE, NATIVE, Usage(290, 4)),
        # Half of the prompt is in the cache, and some of the rest has come into it.
        (
            Api.ANTHROPIC,
            {
                "usage": {
                    "input_tokens": 50,
                    "cache_creation_input_tokens": 95,
                    "cache_read_input_tokens": 145,
                    "cache_creation": {"ephemeral_5m_input_tokens": 95},
                    "output_tokens": 4,
                }
            },
            Usage(290, 4, Prompt(145, 145, 0.0)),
        ),
        (
            Api.ANTHROPIC,
            {
                "usage": {
                    "input_tokens": 9,
                    "cache_read_input_tokens": None,
                    "output_tokens": 0,
                }
            },
            Usage(9, 0),
        ),
        # Embeddings and ranks, which only cost their prompt.
        (Api.OPENAI, {"usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9)),
        (Api.OPENAI, {"usage": {"total_tokens": 9}}, Usage(9)),
        # What a llama-server is not.
        (
            Api.OPENAI,
            {"usage": usage_of(4, 9) | {"prompt_tokens_details": None}},
            Usage(9, 4),
        ),
        (Api.OPENAI, {"usage": None}, Usage()),
        (Api.OPENAI, {"usage": [1], "timings": 5}, Usage()),
        (Api.OPENAI, {}, Usage()),
        # Nobody's definition but that of its own API counts.
        (Api.OPENAI, {"usage": OPENAI | ANTHROPIC}, COUNTED),
        (Api.RESPONSES, {"usage": OPENAI}, Usage()),
        (Api.ANTHROPIC, {"input_tokens": 26}, Usage()),
    ],
)
def test_an_answer_has_the_usage_of_its_api(
    api: Api, fields: dict[str, Any], expected: Usage
) -> None:
    assert read(api, whole(**fields)) == expected


def test_several_answers_in_a_list_are_added() -> None:
    body = json.dumps([NATIVE, NATIVE | {"tokens_predicted": 5}, {}]).encode()
    assert read(Api.NATIVE, body) == Usage(580, 9)
    assert read(Api.NATIVE, body, answers=2) == Usage(290, 9)
    assert read(Api.NATIVE, b'[{"index":0,"embedding":[[0.5]]}]') == Usage()


def test_of_several_answers_a_llama_server_tells_of_one() -> None:
    """Others tell of all, and have no timings."""
    choices: list[object] = [{}, {}, {}]
    body = whole(choices=choices, usage=OPENAI, timings=TIMINGS)
    assert read(Api.OPENAI, body) == TIMED._replace(generated=12)
    assert read(Api.OPENAI, whole(choices=choices, usage=OPENAI)) == COUNTED
    end = finish(timings=TIMINGS, usage=OPENAI)
    assert read_end(Api.OPENAI, end, answers=3) == TIMED._replace(generated=12)
    assert read_end(Api.OPENAI, event({"usage": OPENAI}), answers=3) == COUNTED
    all_of_them = finish(timings=TIMINGS, usage=OPENAI | {"completion_tokens": 9})
    assert read_end(Api.OPENAI, all_of_them, answers=3).generated == 9
    assert read_end(Api.RESPONSES, end, answers=3).generated == 4
    assert read(Api.OPENAI, whole(choices=5, timings=TIMINGS)) == Usage()


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"null", b"\xff", b'{"usage":' + b"[" * 100_000, b"[1]"]
)
def test_what_cannot_be_read_tells_nothing(body: bytes) -> None:
    for api in Api:
        assert read(api, body) == read_end(api, body) == Usage()


def test_an_object_in_an_answer_is_not_its_usage() -> None:
    """The arguments of an Anthropic tool are no string: a model writes them."""
    call = {"type": "tool_use", "input": {"usage": {"input_tokens": 1}}}
    body = whole(usage=ANTHROPIC, content=[call], tokens_predicted=0)
    assert read(Api.ANTHROPIC, body) == COUNTED


@pytest.mark.parametrize("number", [b"100000000", b"9" * 400, b"-3", b"1e3", b"2.5"])
def test_a_count_that_cannot_be_true_is_none(number: bytes) -> None:
    counts = b'"completion_tokens":%b,"prompt_tokens":%b' % (number, number)
    counts += b',"input_tokens":%b,"output_tokens":%b' % (number, number)
    native = b'"tokens_evaluated":%b,"tokens_predicted":%b' % (number, number)
    timings = b'"prompt_n":%b,"cache_n":%b,"predicted_n":%b' % (number, number, number)
    body = b'{"usage":{%b},%b,"timings":{%b}}' % (counts, native, timings)
    for api in Api:
        for told in (read(api, body), read_end(api, body)):
            assert (told.prompt, told.generated) == (None, None)


def test_a_large_count_is_one() -> None:
    body = whole(usage=usage_of(99_999_999, 10_000_000))
    assert read(Api.OPENAI, body)[:2] == (10_000_000, 99_999_999)


# --- Reading streams --------------------------------------------------------------

_START = named_event(
    {"type": "message_start", "message": {"usage": ANTHROPIC | {"output_tokens": 1}}}
)
_DELTA = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}


@pytest.mark.parametrize(
    ("api", "stream", "expected"),
    [
        (Api.OPENAI, finish(timings=TIMINGS) + done(), TIMED),
        (Api.OPENAI, finish(timings=TIMINGS, usage=OPENAI) + done(), TIMED),
        (Api.OPENAI, event({"choices": [], "usage": OPENAI}) + done(), COUNTED),
        (
            Api.RESPONSES,
            named_event(
                {"type": "response.completed", "response": {"usage": RESPONSES}}
            ),
            COUNTED,
        ),
        (
            Api.ANTHROPIC,
            _START + named_event(_DELTA | {"usage": {"output_tokens": 4}}),
            COUNTED,
        ),
        # Anthropic tells all of it again.
        (Api.ANTHROPIC, _START + named_event(_DELTA | {"usage": ANTHROPIC}), COUNTED),
        # Some have no numbers in the beginning, and some none at the end.
        (
            Api.ANTHROPIC,
            event({"usage": dict.fromkeys(ANTHROPIC, 0)})
            + named_event(_DELTA | {"usage": ANTHROPIC}),
            COUNTED,
        ),
        (
            Api.ANTHROPIC,
            _START + named_event(_DELTA | {"usage": ANTHROPIC | {"input_tokens": 0}}),
            COUNTED,
        ),
        (Api.NATIVE, event({**NATIVE, "stop": False}), Usage(290, 4)),
        (Api.NATIVE, event({**NATIVE, "stop": True, "timings": TIMINGS}), TIMED),
    ],
)
def test_a_stream_has_the_usage_of_its_api(
    api: Api, stream: bytes, expected: Usage
) -> None:
    assert read_end(api, stream, beginning(stream)) == expected


def test_a_stream_that_was_cut_has_what_was_told_by_then() -> None:
    """What it has generated is not what its beginning says."""
    assert read_end(Api.ANTHROPIC, b"", beginning(_START)) == COUNTED._replace(
        generated=None
    )
    assert read_end(Api.OPENAI, role() + token("a")) == Usage()
    half = finish(timings=TIMINGS)
    assert read_end(Api.OPENAI, half[: half.index(b"predicted_ms")]) == Usage()


def test_the_last_count_is_the_one_that_counts() -> None:
    """Some servers send the usage so far with every event, and others a null."""
    running = b"".join(event({"usage": {"completion_tokens": n}}) for n in (1, 2))
    running += event({"usage": None})
    assert read_end(Api.OPENAI, running).generated == 2


def test_an_answer_that_came_in_pieces_is_read_from_both_ends() -> None:
    """Embeddings have their usage in front; chats have it behind."""
    head = b'{"model":"a","usage":{"prompt_tokens":9,"total_tokens":9},"data":[['
    assert read_end(Api.OPENAI, b"0.5]]}", beginning(head)) == Usage(9)
    body = json.dumps(chat_completion("a" * 5000, tokens=7)).encode()
    assert read_end(Api.OPENAI, body[-1400:], beginning(body[:1400]))[:2] == (20, 7)


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        ('"timings":{"cache_n":236,"prompt_n":1,"prompt_ms":31}', (1, 236, 0.031)),
        ('"timings":{"prompt_n":7,"prompt_ms":1e3}', (7, 0, 1.0)),
        ('"timings":{"prompt_n":-7,"prompt_ms":5,"cache_n":2}', (-7, 2, 0.005)),
        (
            '"timings":{"prompt_n":1} "timings":{"prompt_n":2,"prompt_ms":2}',
            (2, 0, 0.002),
        ),
        ('"timings":{"prompt_n":"x","prompt_ms":1}', None),
        ('"timings":{"prompt_n":1e999,"prompt_ms":1}', None),
        ('"timings":{"prompt_n":null,"prompt_ms":1}', None),
        ('"timings":{"prompt_n":1}', None),
        (
            '"usage":{"prompt_tokens":20,"prompt_tokens_details":{"cached_tokens":15}}',
            (5, 15, 0.0),
        ),
        ('"usage":{"prompt_tokens":20}', None),
        ("", None),
    ],
)
def test_how_a_prompt_was_read(tail: str, told: tuple[int, int, float] | None) -> None:
    assert read_end(Api.OPENAI, tail.encode()).reading == told
