"""Usage is asked for by a splice, and hidden again: no other byte changes."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.wire.usage import (
    HELD,
    UsageHider,
    asking,
)
from tests.fakes.replies import (
    done,
    finish,
    ping,
    role,
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
