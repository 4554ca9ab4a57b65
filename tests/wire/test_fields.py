"""The scanner sees what a JSON parser sees, however the body is cut, or refuses it."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.fields import (
    MAX_DEPTH,
    MAX_NAMES,
    MAX_TOKEN,
    WANTED,
    Field,
    FieldScanner,
    check_json,
    count_prompts,
    encode,
    find_model,
    media_in,
    messages_of,
    read_whole,
    take_names,
    text_of,
    with_model,
)
from tests.fakes.cases import case


def scan(*pieces: bytes) -> FieldScanner:
    scanner = FieldScanner()
    for piece in pieces:
        scanner.feed(piece)
    scanner.finish()
    return scanner


def refusal(*pieces: bytes) -> str:
    """Scan what must not be accepted, and return why it was not."""
    with pytest.raises(RequestError) as caught:
        scan(*pieces)
    assert caught.value.code is Code.INVALID_JSON
    return caught.value.message


def halves(body: bytes) -> Iterable[list[bytes]]:
    """Cut at every byte into two, and then into single bytes."""
    for at in range(len(body) + 1):
        yield [body[:at], body[at:]]
    yield [body[at : at + 1] for at in range(len(body))]


def pieces_of(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    at = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[start:end] for start, end in pairwise(at)]


def outcome(pieces: Iterable[bytes]) -> dict[str, Field] | None:
    """Scan anything; what is neither accepted nor a `RequestError` fails the test."""
    try:
        scanner = scan(*pieces)
    except RequestError:
        return None
    return scanner.found


# --- What is found ----------------------------------------------------------------


def test_the_messages_of_a_body() -> None:
    body = b'{"model":"x", "messages": [ {"role":"user"},  7 ]}'
    assert [bytes(item) for item in messages_of(body)] == [
        b'{"role":"user"}',
        b"7",
    ]
    for other in (b"{}", b'{"messages":7}', b"[]", b"{", b"[" * 2000):
        assert messages_of(other) == []


def test_the_wanted_fields_are_found_with_their_places() -> None:
    body = b' { "model" : "qwen", "messages":[{"model":"x"}],"stream":true, "a":1}\n'
    found = scan(body).found
    assert found == {
        "model": Field('"', b'"qwen"', 13, 19),
        "messages": Field("[", b"", 32, 32),
        "stream": Field("t", b"true", 57, 61),
    }
    assert body[13:19] == b'"qwen"'


def test_fields_that_routing_needs_are_wanted() -> None:
    assert {
        "model",
        "stream",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "n_cmpl",
        "n_predict",
        "messages",
        "documents",
        "tokens",
        "fallbacks",
        "stream_options",
    } == WANTED


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ('"x"', '"'),
        ("[1]", "["),
        ('{"a":1}', "{"),
        ("true", "t"),
        ("false", "f"),
        ("null", "n"),
        ("0", "0"),
        ("-0", "0"),
        ("7", "0"),
        ("-12.50", "0"),
        ("1e9", "0"),
        ("1.5E+300", "0"),
        ("1" + "0" * 18, "0"),
    ],
)
def test_the_kind_of_a_value_is_its_first_character(value: str, kind: str) -> None:
    field = scan(b'{"max_tokens":%b}' % value.encode()).found["max_tokens"]
    assert field.kind == kind
    assert field.raw == (b"" if kind in "[{" else value.encode())


def test_values_that_parsers_disagree_on_have_no_kind() -> None:
    """Too large for 64 bits, or no JSON at all: a check of the kind refuses it."""
    for value in [
        *("1" + "0" * 19, "-" + "9" * 20, "1e1000"),
        *("01", "00", "0x1", "1.", ".5", "+1", "1e", "1_0", "-", "NaN"),
        *("tru", "truex", "True", "nul", "nulll", "f", "x", "é"),
    ]:
        for key in ["max_tokens", "stream", "model"]:
            with case((value, key)):
                body = f'{{"{key}":{value}}}'.encode()
                start = len(key) + 4
                assert scan(body).found == {
                    key: Field("?", value.encode(), start, len(body) - 1)
                }


@pytest.mark.parametrize("where", ["[%b]", "{%b}", '"%b"', '["%b"]', '{"a":["%b"]}'])
def test_nested_fields_are_not_found(where: str) -> None:
    inner = b'"model":"evil"'
    if '"%b"' in where:
        inner = json.dumps(inner.decode())[1:-1].encode()
    elif where == "[%b]":
        inner = b'{"model":"evil"}, "model"'
    body = b'{"x":%b,"model":"good"}' % (where.encode() % inner)
    assert text_of(scan(body).found["model"]) == "good"


@pytest.mark.parametrize("body", [b"{}", b" \t\r\n{ \t\r\n} \t\r\n"])
def test_an_empty_object_differs_from_one_with_fields(body: bytes) -> None:
    for pieces in halves(body):
        scanner = scan(*pieces)
        assert scanner.found == {}
        named = with_model(body, None, "m")
        assert json.loads(named) == {"model": "m"}


def test_empty_pieces_change_nothing() -> None:
    assert scan(b"", b'{"model"', b"", b':"a"', b"", b"}", b"").found == {
        "model": Field('"', b'"a"', 9, 12)
    }


def test_a_scanner_shows_its_state() -> None:
    scanner = FieldScanner()
    assert repr(scanner) == "<FieldScanner START found=[]>"
    scanner.feed(b'{"stream":true,"model":"a", "x":[')
    assert repr(scanner) == "<FieldScanner NESTED found=['model', 'stream']>"


def test_a_field_is_known_as_soon_as_it_is_complete() -> None:
    """Routing does not wait for 200 MB of images after the model's name."""
    scanner = FieldScanner()
    scanner.feed(b'{"model":"qwen')
    assert scanner.found == {}
    scanner.feed(b'"')
    assert text_of(scanner.found["model"]) == "qwen"
    scanner.feed(b',"messages":[')
    assert scanner.found["messages"].kind == "["


# --- Against a parser -------------------------------------------------------------


@st.composite
def spelled(draw: st.DrawFn, value: str) -> str:
    """Write a string as JSON in one of its many spellings."""
    plain = json.dumps(value, ensure_ascii=draw(st.booleans()))[1:-1]
    if draw(st.booleans()):
        units = value.encode("utf-16-be")
        spelling = draw(st.sampled_from(["\\u{:04x}", "\\u{:04X}"]))
        plain = "".join(
            spelling.format(units[at] << 8 | units[at + 1])
            for at in range(0, len(units), 2)
        )
    return f'"{plain}"'


space = st.text(" \t\r\n", max_size=2)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ['"', "\\", "{[", "]}", '\\"model":', "é", "🦙", "\x00", "\u2028"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("model"), inner, max_size=3)
    ),
    max_leaves=6,
)
other_keys = st.text(max_size=6).filter(
    lambda key: key not in WANTED
) | st.sampled_from(["Model", "model ", "models", "", "\\", '"'])


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Build an object with wanted keys, once each, among others, twice perhaps."""
    wanted = draw(st.lists(st.sampled_from(sorted(WANTED)), max_size=4, unique=True))
    keys = draw(st.permutations([*wanted, *draw(st.lists(other_keys, max_size=3))]))
    members = []
    for key in keys:
        value = json.dumps(
            draw(values),
            ensure_ascii=draw(st.booleans()),
            indent=draw(st.sampled_from([None, 1])),
        )
        before, behind = draw(space), draw(space)
        members.append(f"{before}{draw(spelled(key))}{behind}:{before}{value}{behind}")
    return f"{draw(space)}{{{','.join(members)}{draw(space)}}}{draw(space)}".encode()


cuts = st.lists(st.integers(0, 1 << 16), max_size=8)


@given(documents(), cuts)
def test_the_scanner_finds_what_a_parser_finds(body: bytes, cut_at: list[int]) -> None:
    """The same fields with the same values, and each exactly at its place."""
    found = scan(*pieces_of(body, cut_at)).found
    parsed = json.loads(body)
    assert set(found) == WANTED & set(parsed)
    for name, field in found.items():
        value = parsed[name]
        if isinstance(value, (list, dict)):
            assert field.kind == ("[" if isinstance(value, list) else "{")
            assert (field.raw, field.end) == (b"", field.start)
            assert body[field.start : field.start + 1] == field.kind.encode()
            continue
        assert body[field.start : field.end] == field.raw
        assert json.loads(field.raw) == value
        if isinstance(value, str):
            assert field.kind == '"'
            assert text_of(field) == value
        elif value is None or isinstance(value, bool):
            assert field.kind == json.dumps(value)[0]
        elif abs(value) < 10**18:
            assert field.kind == "0"


@settings(max_examples=25)
@given(documents())
def test_a_body_cut_at_any_byte_is_the_same_body(body: bytes) -> None:
    whole = outcome([body])
    assert whole is not None
    for pieces in halves(body):
        assert outcome(pieces) == whole


@given(documents(), st.text())
def test_a_model_can_be_inserted_where_the_scanner_points(
    body: bytes, name: str
) -> None:
    """In place of the old name, or first of all; nothing else changes."""
    scanner = scan(body)
    parsed = json.loads(body)
    old = scanner.found.get("model")
    if old is not None and not old.raw:
        return  # an array or an object: refused, not replaced
    changed = with_model(body, old, name)
    assert json.loads(changed) == parsed | {"model": name}
    assert text_of(scan(changed).found["model"]) == name


@given(st.text())
def test_a_name_comes_back_as_it_was(name: str) -> None:
    assert text_of(Field('"', encode(name), 0, 0)) == name
    assert json.loads(encode(name)) == name


# --- Arbitrary bytes --------------------------------------------------------------

scraps = st.sampled_from(
    [
        *(bytes([byte]) for byte in b'{}[]",:\\ 0-.e\n\x00\x0b\x1f'),
        *(b'"model"', b'"mod\\u0065l"', b'"stream"', b'"a"', b'"messages"'),
        *(b"true", b"null", b"12", b"1e5", b"NaN", b"\\u00", b"\\ud83d", b"\\n"),
        *("é".encode(), "🦙".encode(), b"\xc3", b"\x80", b"\xed\xa0\x80", b"\xff"),
    ]
)
debris = st.lists(scraps, max_size=12).map(b"".join)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Build a document and break it in a place or two, perhaps."""
    body = draw(documents())
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(debris) + body[at + draw(st.integers(0, 3)) :]
    return body


anything = damaged() | debris.map(b"{".__add__) | debris | st.binary(max_size=40)


@given(anything, cuts)
@example(b"", [])
@example(b"\xef\xbb\xbf{}", [])
@example(b'{"model":"\\', [9])
@example(b'{"a":"\\', [7])
@example(b'{"a":"x\\"y"}', [8])
def test_the_verdict_does_not_depend_on_cuts(body: bytes, cut_at: list[int]) -> None:
    """No other exception, and no second opinion because of how TCP cut it."""
    assert outcome(pieces_of(body, cut_at)) == outcome([body])


@given(anything)
@example(b'{"model":"a","model":"b"}')
@example(b'{"stream":tru}')
@example(b'{"a":"\xc3\xa9\x01"}')
@example(b'{"a":[}}')
@example(b'{"a":"\\ud800"}')
def test_accepted_bodies_are_read_alike_by_all_parsers(body: bytes) -> None:
    """A worker must not see another model than the one that was routed and allowed."""
    seen = outcome([body])
    if seen is None:
        return
    try:
        check_json(body)
    except RequestError:
        return
    parsed = json.loads(body.decode(), parse_int=float, parse_constant=_no_constant)
    assert set(seen) == WANTED & set(parsed)
    model = seen.get("model")
    if model is not None and model.kind == '"':
        assert text_of(model) == parsed["model"]
    else:
        assert not isinstance(parsed.get("model"), str)
    stream = seen.get("stream")
    is_true = stream is not None and stream.raw == b"true"
    assert is_true is (parsed.get("stream") is True)


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


# --- Keys that occur twice --------------------------------------------------------


def test_a_wanted_key_that_occurs_twice_is_refused() -> None:
    """Two parsers disagree on which of them counts; that would bypass a token."""
    for key in sorted(WANTED):
        for first in ['"a"', "1", "[]", "{}", "null"]:
            with case((key, first)):
                body = f'{{"{key}": {first}, "x": 1, "{key}": "b"}}'.encode()
                assert f"the key {key!r} occurs twice" in refusal(body)


@pytest.mark.parametrize(
    "spelling",
    [
        rb"mod\u0065l",
        rb"\u006dodel",
        rb"\u006D\u006F\u0064\u0065\u006C",
        rb"mode\u006c",
    ],
)
def test_a_key_is_the_same_however_it_is_spelled(spelling: bytes) -> None:
    for one, two in ((b"model", spelling), (spelling, b"model"), (spelling, spelling)):
        body = b'{"%b":"a","%b":"b"}' % (one, two)
        for pieces in halves(body):
            assert "the key 'model' occurs twice" in refusal(*pieces)
    assert text_of(scan(b'{"%b":"a"}' % spelling).found["model"]) == "a"


def test_a_key_in_another_case_is_another_key() -> None:
    assert text_of(scan(b'{"Model":"a","model":"b","MODEL":"c"}').found["model"]) == "b"


def test_other_fields_may_occur_twice() -> None:
    assert scan(b'{"a":1,"a":2}').found == {}


# --- Nesting ----------------------------------------------------------------------


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """Build an object that is so many levels deep, itself included."""
    return b'{"a":' + opening * (depth - 1) + b"0" + closing * (depth - 1) + b"}"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_the_depth_of_a_body_is_limited(opening: bytes, closing: bytes) -> None:
    body = nested(MAX_DEPTH, opening, closing)
    scan(body)
    check_json(body)
    assert f"deeper than {MAX_DEPTH} levels" in refusal(
        nested(MAX_DEPTH + 1, opening, closing)
    )


@pytest.mark.parametrize("key", [b"a", b"messages", b"model"])
def test_a_depth_bomb_is_refused_before_it_ends(key: bytes) -> None:
    scanner = FieldScanner()
    with pytest.raises(RequestError, match="nested deeper"):
        scanner.feed(b'{"%b":' % key + b"[" * 1_000_000)
    scanner = FieldScanner()
    scanner.feed(b'{"%b":' % key)
    with pytest.raises(RequestError, match="nested deeper"):
        for _ in range(MAX_DEPTH):
            scanner.feed(b"[")


def test_brackets_in_strings_and_siblings_are_no_depth() -> None:
    scan(b'{"a":["' + b"[{" * 500 + b'"],"b":"' + b"[{" * 500 + b'"}')
    scan(b'{"a":[' + b",".join([b"[[]]"] * 500) + b"]}")
    scan(b"{" + b",".join(b'"%d":[[[]]]' % n for n in range(500)) + b"}")


# --- Text -------------------------------------------------------------------------

TEXTS = ["é", "ß\u0080", "\u07ff\u0800", "漢字", "\ud7ff\ue000\uffff", "🦙\U0010ffff"]


def test_a_character_may_be_cut_at_every_byte() -> None:
    for text in TEXTS:
        for form in [
            '{"model":"%s"}',
            '{"%s":1,"model":"x"}',
            '{"a":"%s"}',
            '{"a":["%s",1]}',
        ]:
            with case((text, form)):
                body = (form % text).encode()
                whole = outcome([body])
                assert whole is not None
                for pieces in halves(body):
                    assert outcome(pieces) == whole


def test_invalid_utf_8_is_refused_wherever_it_is_cut() -> None:
    """Overlong, a surrogate, too large, or cut: each parser replaces it its own way."""
    for bad in [
        b"\x80",
        b"\xbf\xbf",
        b"\xc3",
        b"\xc3(",
        b"\xc3a\xa9",
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf0\x9f\xa6",
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xfe",
        b"\xff",
    ]:
        for form in [b'{"model":"%b"}', b'{"a":["%b"]}', b'{"a":"%b"}']:
            with case((bad, form)):
                for pieces in halves(form % bad):
                    assert "not UTF-8" in refusal(*pieces)


def test_a_body_that_ends_in_the_middle_of_a_character_is_refused() -> None:
    assert "not UTF-8" in refusal(b'{"a":"', "é".encode()[:1])


@pytest.mark.parametrize(
    "bad", [rb"\ud800", rb"\udc00", rb"\ud800x", rb"\udc00\ud800", rb"\ud800\u0041"]
)
def test_an_incomplete_surrogate_pair_is_not_text(bad: bytes) -> None:
    """Python reads it, and cannot encode it; llama-server refuses it."""
    with pytest.raises(RequestError) as caught:
        text_of(scan(b'{"model":"%b"}' % bad).found["model"])
    assert caught.value.code is Code.INVALID_JSON
    assert "invalid escape" in refusal(b'{"%b":1}' % bad)
    with pytest.raises(RequestError):
        check_json(b'{"a":"%b"}' % bad)


def test_a_surrogate_pair_is_one_character() -> None:
    for pieces in halves(rb'{"model":"\ud83e\udd99"}'):
        assert text_of(scan(*pieces).found["model"]) == "🦙"


@pytest.mark.parametrize("bad", [rb"\x41", rb"\u00", rb"\u00g0", rb"\'", b"\\\n"])
def test_an_invalid_escape_is_no_text(bad: bytes) -> None:
    assert "invalid escape" in refusal(b'{"%b":1}' % bad)
    with pytest.raises(RequestError):
        text_of(scan(b'{"model":"%b"}' % bad).found["model"])


@pytest.mark.parametrize("control", [b"\x00", b"\n", b"\t", b"\x1f"])
def test_a_control_character_in_a_key_or_a_name_is_refused(control: bytes) -> None:
    for form in (b'{"mod%bel":"a"}', b'{"model":"a%bb"}'):
        for pieces in halves(form % control):
            refusal(*pieces)


@pytest.mark.parametrize(
    "text",
    [
        rb"a\"b",
        rb"\\",
        rb"\\\"",
        rb"\\\\",
        rb"\"",
        rb"\/\b\f\n\r\t",
        rb"\",\"model\":\"x",
    ],
)
def test_an_escaped_quote_ends_no_string(text: bytes) -> None:
    forms = (b'{"%b":1,"model":"m"}', b'{"a":"%b","model":"m"}')
    for form in (*forms, b'{"a":["%b"],"model":"m"}', b'{"a":{"%b":2},"model":"m"}'):
        body = form % text
        assert json.loads(body)["model"] == "m"
        for pieces in halves(body):
            assert text_of(scan(*pieces).found["model"]) == "m"


# --- What is no JSON object -------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t "])
def test_an_empty_body_is_refused_as_such(body: bytes) -> None:
    assert "the body is empty" in refusal(body)


@pytest.mark.parametrize(
    "body",
    [b"[]", b'"x"', b"null", b"1", b"x", b"}", b"\xef\xbb\xbf{}", b"\x00{}", b"\x0b{}"],
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert "must be an object" in refusal(body)


def test_utf_16_is_refused() -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le"):
        refusal('{"model":"a"}'.encode(encoding))


def test_a_mistake_on_the_top_level_is_refused_with_its_place() -> None:
    for body, why in [
        (b"{a:1}", "a key was expected at byte 1"),
        (b"{,}", "a key was expected at byte 1"),
        (b'{"a":1,}', "a key was expected at byte 7"),
        (b'{"a":1,,"b":2}', "a key was expected at byte 7"),
        (b'{"a" 1}', "':' was expected at byte 5"),
        (b'{"a"}', "':' was expected at byte 4"),
        (b'{"a":}', "a value was expected at byte 5"),
        (b'{"a"::1}', "a value was expected at byte 5"),
        (b'{"a":,"b":1}', "a value was expected at byte 5"),
        (b'{"a":]}', "a value was expected at byte 5"),
        (b'{"a":1 2}', "',' or '}' was expected at byte 7"),
        (b'{"a":1:2}', "',' or '}' was expected at byte 6"),
        (b'{"a":1]', "',' or '}' was expected at byte 6"),
        (b'{"a":[]]}', "',' or '}' was expected at byte 7"),
        (b'{"a":"b" "c"}', "',' or '}' was expected at byte 9"),
        (b'{"a":1\x0b}', "',' or '}' was expected at byte 6"),
        (b"{}{}", "something follows the object"),
        (b'{"model":"a"} {"model":"b"}', "something follows the object"),
        (b"{} \n x", "something follows the object"),
        (b"{}\x00", "something follows the object"),
        (b"{}}", "something follows the object"),
    ]:
        with case((body, why)):
            for pieces in halves(body):
                assert why in refusal(*pieces)


@pytest.mark.parametrize(
    "whole",
    [
        b'{"model":"a\\nb","stream":true,"max_tokens":12,"x":{"y":["z",1,null]},"w":-1.5}',
        b'{"x":"y"}',
        b"{}",
    ],
)
def test_a_body_that_ends_too_early_is_refused_wherever_it_ends(whole: bytes) -> None:
    scan(whole)
    for end in range(1, len(whole)):
        assert "the body ends too early" in refusal(whole[:end])


def test_a_mistake_inside_of_a_value_is_seen_by_the_grammar() -> None:
    """The scanner passes over other values; `check_json` reads bodies that are kept."""
    for body, where in [
        (b'{"a":[1,]}', "byte 8"),
        (b'{"a":[}}', "byte 6"),
        (b'{"a":{"b":1]}', "byte 11"),
        (b'{"a":{"b"}}', "byte 9"),
        (b'{"a":[1 2]}', "byte 8"),
        (b'{"a":tru}', "byte"),
        (b'{"a":NaN}', "byte 5"),
        (b'{"a":[Infinity]}', "byte 6"),
        (b'{"a":-}', "byte 6"),
        (b'{"a":01}', "byte 6"),
        (b'{"a":1.}', "byte 7"),
        (b'{"a":1e}', "byte 7"),
        (b'{"a":"\x01"}', "byte 6"),
        (b'{"a":["\n"]}', "byte 7"),
        (b'{"a":"\\x"}', "byte 7"),
        (b'{"a":"x\\\n"}', "byte 8"),
        (b'{"a":["\\\n"]}', "byte 8"),
    ]:
        with case((body, where)):
            scan(body)
            with pytest.raises(RequestError, match=where) as caught:
                check_json(body)
            assert caught.value.code is Code.INVALID_JSON
            assert caught.value.message.startswith("The body is not valid JSON: ")
            assert "malformed" not in caught.value.message  # which the text has once


def test_numbers_of_any_size_are_json() -> None:
    for number in (b"9" * 4000, b"-" + b"9" * 400, b"1e999", b"0." + b"0" * 400 + b"1"):
        body = b'{"a":[%b],"b":%b}' % (number, number)
        scan(body)
        check_json(body)
    assert math.isinf(json.loads("1e999"))


# --- Limits -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b'{"model":"', "'model'"),
        (b'{"model":', "'model'"),
        (b'{"max_tokens":', "'max_tokens'"),
        (b'{"', "a key"),
    ],
)
def test_a_key_or_a_wanted_value_without_end_is_refused(
    start: bytes, name: str
) -> None:
    """It would be kept until memory is full."""
    scanner = FieldScanner()
    scanner.feed(start)
    with pytest.raises(RequestError) as caught:
        for _ in range(MAX_TOKEN + 1):
            scanner.feed(b"1")
    assert f"{name} is longer than {MAX_TOKEN} bytes" in caught.value.message


def test_a_name_may_be_as_long_as_the_limit() -> None:
    name = b"m" * (MAX_TOKEN - 2)
    body = b'{"model":"%b"}' % name
    scanner = scan(*(body[at : at + 1] for at in range(len(body))))
    assert text_of(scanner.found["model"]) == name.decode()


@pytest.mark.parametrize("form", [b'{"model":"%b"}', b'{"%b":1}', b'{"n_predict":%b}'])
def test_the_limit_of_a_token_holds_wherever_it_is_cut(form: bytes) -> None:
    body = form % (b"1" * (MAX_TOKEN + 1))
    for at in (0, 10, 99, MAX_TOKEN, MAX_TOKEN + 10, len(body) - 2):
        assert f"longer than {MAX_TOKEN} bytes" in refusal(body[:at], body[at:])


@pytest.mark.parametrize(
    "filler",
    [
        b"A" * 65_536,
        b'\\"' * 32_768,
        "é".encode() * 32_768,
        b"A" * 65_535 + b"\\",
    ],
)
@pytest.mark.parametrize("start", [b'{"x":"', b'{"messages":["', b'{"x":[{"y":"'])
def test_skipped_bytes_take_no_memory(start: bytes, filler: bytes) -> None:
    """An image of 200 MB in front of the model's name is read and forgotten."""
    scanner = FieldScanner()
    scanner.feed(start)
    tracemalloc.start()
    try:
        scanner.feed(filler)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(8):
            scanner.feed(filler)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Of eight; a thread of pytest-xdist may need a few KB meanwhile.
    assert now - before < len(filler)
    assert peak - before < 4 * len(filler)  # the decoded piece, while it is checked


def test_a_long_body_is_scanned_to_its_end() -> None:
    image = b'{"type":"image_url","url":"data:image/png;base64,%b"}' % (
        b"iVBO" * 65_536
    )
    body = b'{"messages":[%b,%b],"model":"qwen"}' % (image, image)
    pieces = pieces_of(body, range(0, len(body), 65_521))
    found = scan(*pieces).found
    assert (found["messages"].kind, text_of(found["model"])) == ("[", "qwen")
    assert body[found["model"].start : found["model"].end] == b'"qwen"'


def view(body: bytes) -> dict[str, Any]:
    return {name: field.kind for name, field in scan(body).found.items()}


def test_a_real_request_is_understood() -> None:
    """What the OpenAI SDK sends."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": 'Say "hi" to {model}'}],
            "model": "qwen2.5:7b",
            "max_completion_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.2,
            "tools": None,
        }
    )
    assert view(body.encode()) == {
        "messages": "[",
        "model": '"',
        "max_completion_tokens": "0",
        "stream": "t",
        "stream_options": "{",
    }


# --- A list of names that is for the hub alone ------------------------------------


@pytest.mark.parametrize(
    ("body", "names", "rest"),
    [
        (b'{"to":["a","b"]}', ("a", "b"), b"{}"),
        (b'{"to":[]}', (), b"{}"),
        (b'{"x":1e0,"to":["a"],"y":[ 1.0 ]}', ("a",), b'{"x":1e0,"y":[ 1.0 ]}'),
        (b' { "to" : [ "a" ] , "x" : {"to":["b"]} } ', ("a",), b'{"x":{"to":["b"]}}'),
        (rb'{"t\u006f":["\u0061 \"b\""],"x":"\u0061"}', ('a "b"',), rb'{"x":"\u0061"}'),
        ('{"é":"🍌","to":["ü"]}'.encode(), ("ü",), '{"é":"🍌"}'.encode()),
    ],
)
def test_names_are_taken_out_of_a_body(
    body: bytes, names: tuple[str, ...], rest: bytes
) -> None:
    """Not a byte of another value changes."""
    assert take_names(body, "to") == (names, rest)


@given(
    st.dictionaries(st.text(max_size=5), st.text() | st.lists(st.floats(0, 9))),
    st.lists(st.text(max_size=5), max_size=MAX_NAMES),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_body_without_names_means_the_same(
    fields: dict[str, Any], names: list[str], place: int, escape: bool
) -> None:
    fields.pop("to", None)
    items = list(fields.items())
    items.insert(place, ("to", names))
    body = json.dumps(dict(items), ensure_ascii=escape).encode()
    taken, rest = take_names(body, "to")
    assert list(taken) == names
    assert list(json.loads(rest).items()) == list(fields.items())
    check_json(rest)
    scan(rest)


@pytest.mark.parametrize(
    "value",
    [
        b"null",
        b'"a"',
        b"7",
        b'{"a":"b"}',
        b"[7]",
        b"[null]",
        b'["a",["b"]]',
        b"[%b]" % b",".join([b'"a"'] * (MAX_NAMES + 1)),
    ],
)
def test_anything_but_a_list_of_names_is_refused(value: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        take_names(b'{"x":1,"to":%b}' % value, "to")
    assert (caught.value.code, caught.value.param) == (Code.INVALID_VALUE, "to")
    assert caught.value.message == "`to` must be a list of at most 8 names."


def test_there_may_be_as_many_names_as_the_limit() -> None:
    names = [str(number) for number in range(MAX_NAMES)]
    assert take_names(json.dumps({"to": names}).encode(), "to") == (tuple(names), b"{}")


# --- Several prompts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"prompt":"a"}', 1),
        (b'{"prompt":["a","b","c"]}', 3),
        (b'{"prompt" : [ [1,2], [3] ]}', 2),
        (b'{"prompt":[1,2,3]}', 1),
        (b'{"prompt":[1,"a",3]}', 1),
        (b'{"prompt":[]}', 1),
        (b'{"prompt":"\\"prompt\\":[1]","x":{"prompt":["a","b"]}}', 1),
        (b'{"prompt":["a"', 1),
        (b"", 1),
    ],
)
def test_the_prompts_of_a_completion_are_counted(body: bytes, count: int) -> None:
    assert count_prompts(body) == count


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
NAMES = st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=10,
)
BODIES = st.dictionaries(st.sampled_from(sorted(WANTED)) | NAMES, VALUES, max_size=6)


def scan_whole(body: bytes) -> dict[str, Field]:
    scanner = FieldScanner()
    scanner.feed(body)
    scanner.finish()
    check_json(body)
    return scanner.found


def agree(body: bytes) -> bool:
    """Compare both ways; False where the short way passes."""
    wanted = read_whole(body)
    if wanted is None:
        return False
    scanned = scan_whole(body)
    values = msgspec.structs.asdict(wanted)
    found = {name: each for name, each in values.items() if each is not msgspec.UNSET}
    assert found.keys() == scanned.keys()
    assert find_model(body) == scanned.get("model")
    for name, field in scanned.items():
        if name == "model":
            assert found[name] == json.loads(field.raw)
        elif field.kind in "[{":
            assert bytes(found[name])[:1] == field.kind.encode()
        else:
            assert bytes(found[name]) == field.raw
    return True


@given(BODIES, st.sampled_from([None, 2]), st.booleans())
def test_both_readers_find_the_same(
    fields: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(fields, indent=indent, ensure_ascii=ascii_only)
    agree(body.encode(errors="replace"))


@given(BODIES, VALUES, st.sampled_from(["messages", "x", "mess"]), st.booleans())
def test_both_ways_find_the_same_around_long_messages(
    fields: dict[str, Any], value: Any, first: str, at_the_end: bool
) -> None:
    long = {"messages": [{"content": "x" * 3000, "model": "n"}, value]}
    others = {first: {"messages": value}, **fields, "model": "m"}
    whole = others | long if at_the_end else long | others
    if "messages" in fields:
        whole |= long
    agree(json.dumps(whole).encode(errors="replace"))
    double = json.dumps(whole)[:-1] + ', "messages": null}'
    assert read_whole(double.encode(errors="replace")) is None


@given(st.binary(max_size=40))
def test_invalid_json_is_left_to_the_scanner(body: bytes) -> None:
    agree(body)
    agree(b'{"model":"m","x":' + body + b"}")


@given(BODIES, st.data())
def test_a_damaged_body_is_accepted_by_both_or_by_the_scanner_alone(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    escaped = data.draw(st.booleans())
    text = json.dumps(fields | {"model": "m"}, ensure_ascii=escaped)
    body = bytearray(text.encode(errors="replace"))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    agree(bytes(body))


def test_the_common_case_takes_the_short_way() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "m"}
    assert agree(json.dumps(body).encode())
    assert agree(json.dumps(body | {"stream": True, "max_tokens": 5}).encode())
    assert agree(b"{}")
    assert agree(b'{"stream":true}')
    for escaped in (True, False):
        words = json.dumps(body | {"x": "é 漢字 🦙"}, ensure_ascii=escaped)
        assert agree(words.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"model":"m",}',
        b'{"model":"m","model":"n"}',
        b'{"model":"m","mod\\u0065l":"n"}',
        b'{"mod\\u0065l":"n"}',
        b'{"model":"m","x":"\xe9"}',
        b'{"model":"m","x":"\xed\xa0\x80"}',
        b'{"model":"m","x":{"model":"n"}}',
        b'{"x":"model","model":"m"}',
        b'{"model":"%b"}' % (b"m" * MAX_TOKEN),
        b'{"model":"m","x":%b%b}' % (b"[" * MAX_DEPTH, b"]" * MAX_DEPTH),
        b'{"model":"m","x":%b%b}' % (b"[" * 9000, b"]" * 9000),
    ],
)
def test_everything_unusual_is_left_to_the_scanner(body: bytes) -> None:
    assert read_whole(body) is None


def test_the_scanner_then_names_the_mistake() -> None:
    with pytest.raises(RequestError, match="'model' occurs twice"):
        scan_whole(b'{"model":"m","model":"n"}')


# --- Pictures and sound -----------------------------------------------------------

IMAGE = {"type": "image", "source": {}}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"messages": [{"role": "user", "content": "image_url"}]}, set()),
        ({"messages": [{"content": [{"type": "text", "text": "a"}]}]}, set()),
        ({"messages": [{"content": [{"type": "image_url", "x": [{}]}]}]}, {"image"}),
        (
            {"messages": [{"content": None}, {"content": [{"type": "image"}]}]},
            {"image"},
        ),
        ({"messages": [{"content": [{"type": "input_audio"}]}]}, {"audio"}),
        ({"messages": [{"content": [{"type": "video_url"}]}]}, {"video"}),
        (
            {"messages": [{"content": [{"type": "tool_result", "content": [IMAGE]}]}]},
            {"image"},
        ),
        ({"messages": [{"content": [{"type": "x", "content": [IMAGE]}]}]}, set()),
        (
            {"messages": [{"content": [{"type": "tool_result", "content": "a"}]}]},
            set(),
        ),
        ({"input": "image"}, set()),
        ({"input": [{"content": [{"type": "input_image"}]}]}, {"image"}),
        ({"input": [{"type": "function_call"}], "messages": []}, set()),
        ({"tools": [{"type": "image_url"}], "messages": [{"content": "a"}]}, set()),
        ({"messages": ["a"]}, set()),
        ({"messages": [{"content": ["image_url"]}]}, set()),
        ({"messages": [{"content": [{"type": ["image"]}]}]}, set()),
    ],
)
def test_what_a_conversation_has_besides_text(
    body: dict[str, Any], found: set[str]
) -> None:
    data = json.dumps(body).encode()
    assert media_in(data) == found
