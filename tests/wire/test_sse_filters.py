"""Usage is hidden and a model renamed; no other byte changes, wherever it was cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.wire.sse import HELD, MOST_SPACES, Renamer, UsageHider, renamed
from tests.fakes.cases import case
from tests.fakes.replies import (
    done,
    finish,
    ping,
    role,
    token,
    usage_of,
)


def fed(pieces: list[bytes]) -> bytes:
    hider = UsageHider()
    return b"".join([*map(hider.feed, pieces), hider.finish()])


def cut(data: bytes, at: set[int]) -> list[bytes]:
    """Cut data at these places."""
    places = [0, *sorted(place for place in at if 0 < place < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


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
def test_events_with_more_than_usage_are_passed_on(shown: bytes) -> None:
    assert fed([shown]) == shown
    size = 1 + len(shown) // 1000  # the one that is too long to hold comes in parts
    assert fed([shown[i : i + size] for i in range(0, len(shown), size)]) == shown


@pytest.mark.parametrize("hidden", HIDDEN)
def test_usage_alone_is_left_out(hidden: bytes) -> None:
    around = [token("a"), hidden, done()]
    assert fed(around) == token("a") + done()
    whole = b"".join(around)
    assert fed([whole]) == token("a") + done()
    for place in range(len(whole)):
        assert fed([whole[:place], whole[place:]]) == token("a") + done()


def test_usage_is_removed_from_each_of_several_choices() -> None:
    """As llama-server sends it: after each choice, and so in the middle."""
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
def test_only_bytes_that_may_be_usage_are_held_back(begun: bytes, held: bytes) -> None:
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
    """Where an answer is resumed, the event that was cut is completed elsewhere."""
    hider = UsageHider()
    half = token("a")[:-9]
    assert hider.feed(half) + hider.finish() == half
    assert hider.feed(USAGE) == b""


def test_held_bytes_can_be_withdrawn() -> None:
    hider = UsageHider()
    assert hider.feed(token("a") + USAGE[:-1]) == token("a")
    assert hider.withdraw() == USAGE[:-1]
    assert hider.feed(token("b")) + hider.finish() == token("b")


def test_a_hider_shows_how_much_it_holds() -> None:
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


OLD, NEW = "tiny", "gpt-4o-mini"
CHUNK = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":%b}}],'
    b'"created":1795346022,"id":"chatcmpl-1","model":%b,"object":"x"}\n\n'
)


def chunk(content: Any, model: str) -> bytes:
    return CHUNK % (json.dumps(content).encode(), json.dumps(model).encode())


def renamed_in(pieces: list[bytes], old: str = OLD, new: str = NEW) -> bytes:
    renamer = Renamer(old, new)
    return b"".join([*map(renamer.feed, pieces), renamer.finish()])


def cut_at(data: bytes, at: set[int]) -> list[bytes]:
    """Cut data at these places."""
    places = [0, *sorted(place for place in at if 0 < place < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


# --- What is renamed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"tiny"}', b'{"model":"gpt-4o-mini"}'),
        (b'{"model": "tiny", "x":1}', b'{"model": "gpt-4o-mini", "x":1}'),
        (b'{\n\t"model" \r\n: "tiny"\n}', b'{\n\t"model" \r\n: "gpt-4o-mini"\n}'),
        (b'{"a":{"model":"tiny"}}', b'{"a":{"model":"gpt-4o-mini"}}'),
        (rb'{"model":"t\u0069ny"}', b'{"model":"gpt-4o-mini"}'),
        (
            b'{"model":"tiny"}{"model":"tiny"}',
            b'{"model":"gpt-4o-mini"}{"model":"gpt-4o-mini"}',
        ),
    ],
)
def test_the_name_is_replaced_and_nothing_else(before: bytes, after: bytes) -> None:
    assert renamed(before, OLD, NEW) == after


def test_everything_but_the_name_stays() -> None:
    for body in [
        b"",
        b"{}",
        b'{"model":"tin"}',
        b'{"model":"tiny2"}',
        b'{"model":"Tiny"}',
        b'{"model":""}',
        b'{"model":null}',
        b'{"model":["tiny"]}',
        b'{"model":{"id":"tiny"}}',
        b'{"models":"tiny"}',
        b'{"amodel":"tiny"}',
        b'{"MODEL":"tiny"}',
        b'{"id":"tiny","root":"tiny"}',
        b'{"a":"model","b":"tiny"}',
        b'["model","tiny"]',
        rb'{"content":"\"model\":\"tiny\""}',
        rb'{"content":"\\\"model\\\":\\\"tiny\\\""}',
        rb'{"a\"model":"tiny"}',
        rb'{"a\\\"model":"tiny"}',
        b'{"model":"tiny',
        b'{"model":"t\xffny"}',
        rb'{"model":"\ud800"}',
        rb'{"model":"t\xny"}',
        b'{"model"%b:"tiny"}' % (b" " * (MOST_SPACES + 1)),
        b": tiny\n\ndata: [DONE]\n\n",
        b"proxy error: Failed to read connection",
    ]:
        with case(body):
            assert renamed(body, OLD, NEW) == body
            assert renamed_in([body[i : i + 1] for i in range(len(body))]) == body


@pytest.mark.parametrize(
    ("old", "spellings"),
    [
        ("a/b:7b", [rb"a/b:7b", rb"a\/b:7b", rb"\u0061\u002fb:7b"]),
        ("Größe", ["Größe".encode(), rb"Gr\u00f6\u00DFe"]),
        ("🦙", ["🦙".encode(), rb"\ud83e\udd99"]),
        ('"\\', [rb"\"\\", rb"\u0022\u005c"]),
        ("C:\\models\\x.gguf", [rb"C:\\models\\x.gguf"]),
    ],
)
def test_a_name_is_known_in_every_spelling_that_json_has_for_it(
    old: str, spellings: list[bytes]
) -> None:
    for spelling in spellings:
        body = b'{"model" : "%b","x":0}' % spelling
        expected = '{"model" : "nëw","x":0}'.encode()
        assert renamed(body, old, "nëw") == expected
        for place in range(len(body)):
            assert renamed_in([body[:place], body[place:]], old, "nëw") == expected


# --- Streams ----------------------------------------------------------------------


def test_an_event_with_a_name_goes_out_whole() -> None:
    """Nothing is held back that is not cut_at."""
    renamer = Renamer(OLD, NEW)
    for content in ("a", '"model":"tiny"', "model", '"', "\\", '{"model":"tiny"}\n'):
        assert renamer.feed(chunk(content, OLD)) == chunk(content, NEW)
    assert renamer.feed(b": \n\n") == b": \n\n"
    assert renamer.feed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    assert renamer.finish() == b""


@pytest.mark.parametrize(
    ("data", "held"),
    [
        (b'{"', b'"'),
        (b'{"mod', b'"mod'),
        (b'{"model"', b'"model"'),
        (b'{"model" \n:  ', b'"model" \n:  '),
        (b'{"model":"ti', b'"model":"ti'),
        (b'{"model":"\\', b'"model":"\\'),
        (b'{"model":"' + b"t" * 24, b'"model":"' + b"t" * 24),
        (b'{"model":"' + b"t" * 25, b""),
        (b'{"model":{"a', b""),
        (b'{"model"' + b" " * (MOST_SPACES + 1), b""),
        (b'{"mode":', b""),
        (b'{"model":"tiny"', b""),
        (b'{"content":"a\\', b"\\"),
        (b'{"content":"a\\"mod', b'\\"mod'),
    ],
)
def test_only_bytes_that_may_become_the_name_are_held_back(
    data: bytes, held: bytes
) -> None:
    renamer = Renamer(OLD, NEW)
    passed = renamer.feed(data)
    assert renamer.finish() == held
    assert passed + held == data.replace(
        b'"model":"tiny"', b'"model":"%b"' % NEW.encode()
    )
    assert renamer.finish() == b""


def test_the_longest_spelling_of_a_name_is_reassembled() -> None:
    spaces = b" " * MOST_SPACES
    name = b"".join(rb"\u%04x" % ord(letter) for letter in OLD)
    key = b'"model"%b:%b' % (spaces, spaces)
    renamer = Renamer(OLD, NEW)
    assert renamer.feed(b'{%b"%b' % (key, name)) == b"{"
    assert renamer.feed(b'"}') == b'%b"%b"}' % (key, NEW.encode())


def test_a_renamer_shows_the_name_that_it_replaces() -> None:
    renamer = Renamer(OLD, NEW)
    renamer.feed(b'{"model":')
    assert repr(renamer) == "<Renamer of 'tiny' held=8>"


TEXTS = st.text(
    st.sampled_from('abmodelty:{}[], \n"\\/é🦙'), max_size=30
) | st.sampled_from(
    ['"model":"tiny"', '\\"model\\":\\"tiny\\"', 'x"model', "model", '{"model":"tiny"}']
)
# Also keys: a logit_bias, the arguments of a tool, whatever a server may echo.
VALUES = st.recursive(
    TEXTS | st.none() | st.integers(0, 9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)
CUTS = st.sets(st.integers(0, 400), max_size=12)


def replaced(value: Any) -> Any:
    """Do the same to what was decoded."""
    if isinstance(value, list):
        return [replaced(each) for each in value]
    if isinstance(value, dict):
        return {
            key: NEW if key == "model" and each == OLD else replaced(each)
            for key, each in value.items()
        }
    return value


@given(
    events=st.lists(
        st.tuples(VALUES, st.sampled_from([OLD, OLD, "other"]), VALUES), max_size=4
    ),
    spaced=st.booleans(),
    ascii=st.booleans(),
    cuts=CUTS,
)
def test_any_stream_is_renamed_with_any_cuts(
    events: list[tuple[Any, str, Any]], spaced: bool, ascii: bool, cuts: set[int]
) -> None:
    separators = (" , ", " : ") if spaced else (",", ":")

    def write(value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=ascii, separators=separators)
        return f"data: {text}\n\n".encode()

    passed = [{"a": before, "model": m, "z": after} for before, m, after in events]
    stream = b"".join(map(write, passed))
    expected = b"".join(write(replaced(event)) for event in passed)
    assert renamed(stream, OLD, NEW) == expected
    assert renamed_in(cut_at(stream, cuts)) == expected


@given(value=VALUES, indent=st.sampled_from([None, 0, 4]), cuts=CUTS)
def test_any_whole_answer_with_any_cuts(
    value: Any, indent: int | None, cuts: set[int]
) -> None:
    body = json.dumps({"model": OLD, "x": value}, indent=indent).encode()
    expected = json.dumps(replaced({"model": OLD, "x": value}), indent=indent).encode()
    assert renamed_in(cut_at(body, cuts)) == expected


@given(
    parts=st.lists(
        st.sampled_from(
            [b'"', b"\\", b"model", b'"model"', b":", b" ", b"tiny", b'"tiny"', b"\n"]
        )
        | st.binary(max_size=3),
        max_size=20,
    ),
    cuts=CUTS,
)
@example(parts=[b'"model"', b":", b'"tiny"'] * 2, cuts={6, 14, 15, 16, 20})
@example(parts=[b"\\", b'"model"', b":", b'"tiny"'], cuts={1})
@example(parts=[b'"model"', b":", b'"', b"\\", b'"tiny"'], cuts={10})
def test_cuts_make_no_difference_even_where_it_is_no_json(
    parts: list[bytes], cuts: set[int]
) -> None:
    data = b"".join(parts)
    whole = renamed(data, OLD, NEW)
    assert renamed_in(cut_at(data, cuts)) == whole
    assert re.sub(rb'(:\s*)"gpt-4o-mini"', rb'\1"tiny"', whole) == data


def test_the_held_back_bytes_are_limited() -> None:
    renamer = Renamer(OLD, NEW)
    spelled = b'{"model":"' + rb"\u0074" * 10_000
    spaced = b'{"model"' + b" " * 10_000
    held = 0
    for data in (spelled, spaced, b'{"model":"' + b"t" * 10_000, spaced):
        for at in range(0, len(data), 10):
            piece = data[at : at + 10]
            held += len(piece) - len(renamer.feed(piece))
            assert held <= 200
    assert held == len(renamer.finish())
