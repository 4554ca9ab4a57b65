r"""A worker's name becomes the client's, and no other byte of an answer changes."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gollama_proxy.wire.rename import MOST_SPACES, Renamer, renamed

OLD, NEW = "tiny", "gpt-4o-mini"
CHUNK = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":%b}}],'
    b'"created":1795346022,"id":"chatcmpl-1","model":%b,"object":"x"}\n\n'
)


def chunk(content: Any, model: str) -> bytes:
    return CHUNK % (json.dumps(content).encode(), json.dumps(model).encode())


def fed(pieces: list[bytes], old: str = OLD, new: str = NEW) -> bytes:
    renamer = Renamer(old, new)
    return b"".join([*map(renamer.feed, pieces), renamer.finish()])


def cut(data: bytes, at: set[int]) -> list[bytes]:
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


@pytest.mark.parametrize(
    "body",
    [
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
    ],
)
def test_whatever_is_not_the_name_stays(body: bytes) -> None:
    assert renamed(body, OLD, NEW) == body
    assert fed([body[i : i + 1] for i in range(len(body))]) == body


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
            assert fed([body[:place], body[place:]], old, "nëw") == expected


# --- Streams ----------------------------------------------------------------------


def test_an_event_goes_out_whole_as_it_comes() -> None:
    """Nothing is held back that is not cut."""
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
def test_no_more_is_held_back_than_what_may_become_the_name(
    data: bytes, held: bytes
) -> None:
    renamer = Renamer(OLD, NEW)
    told = renamer.feed(data)
    assert renamer.finish() == held
    assert told + held == data.replace(
        b'"model":"tiny"', b'"model":"%b"' % NEW.encode()
    )
    assert renamer.finish() == b""


def test_the_longest_spelling_of_a_name_comes_together_again() -> None:
    spaces = b" " * MOST_SPACES
    name = b"".join(rb"\u%04x" % ord(letter) for letter in OLD)
    key = b'"model"%b:%b' % (spaces, spaces)
    renamer = Renamer(OLD, NEW)
    assert renamer.feed(b'{%b"%b' % (key, name)) == b"{"
    assert renamer.feed(b'"}') == b'%b"%b"}' % (key, NEW.encode())


def test_a_renamer_says_what_it_does() -> None:
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
def test_any_stream_with_any_cuts(
    events: list[tuple[Any, str, Any]], spaced: bool, ascii: bool, cuts: set[int]
) -> None:
    separators = (" , ", " : ") if spaced else (",", ":")

    def write(value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=ascii, separators=separators)
        return f"data: {text}\n\n".encode()

    told = [{"a": before, "model": m, "z": after} for before, m, after in events]
    stream = b"".join(map(write, told))
    expected = b"".join(write(replaced(event)) for event in told)
    assert renamed(stream, OLD, NEW) == expected
    assert fed(cut(stream, cuts)) == expected


@given(value=VALUES, indent=st.sampled_from([None, 0, 4]), cuts=CUTS)
def test_any_whole_answer_with_any_cuts(
    value: Any, indent: int | None, cuts: set[int]
) -> None:
    body = json.dumps({"model": OLD, "x": value}, indent=indent).encode()
    expected = json.dumps(replaced({"model": OLD, "x": value}), indent=indent).encode()
    assert fed(cut(body, cuts)) == expected


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
    assert fed(cut(data, cuts)) == whole
    assert re.sub(rb'(:\s*)"gpt-4o-mini"', rb'\1"tiny"', whole) == data


def test_how_much_is_held_back_has_a_bound() -> None:
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
