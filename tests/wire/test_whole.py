"""A body in one piece: what the short way finds is what the scanner finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gollama_proxy.wire.errors import RequestError
from gollama_proxy.wire.fields import (
    MAX_DEPTH,
    MAX_TOKEN,
    WANTED,
    Field,
    FieldScanner,
    check_json,
)
from gollama_proxy.wire.whole import read_whole

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
# What is measured here is what is found, not how busy the machine is.
UNHURRIED = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)


def scan(body: bytes) -> dict[str, Field]:
    scanner = FieldScanner()
    scanner.feed(body)
    scanner.finish()
    check_json(body)
    return scanner.found


def agree(body: bytes) -> bool:
    """Compare both ways; False where the short way passes."""
    found = read_whole(body)
    if found is None:
        return False
    scanned = scan(body)
    assert found.keys() == scanned.keys()
    assert found["model"] == scanned["model"]
    for name, field in scanned.items():
        assert (found[name].kind, found[name].raw) == (field.kind, field.raw)
    return True


@UNHURRIED
@given(BODIES, st.sampled_from([None, 2]), st.booleans())
def test_both_ways_find_the_same(
    fields: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    agree(json.dumps(fields, indent=indent, ensure_ascii=ascii_only).encode())


@given(st.binary(max_size=40))
def test_what_is_no_json_is_left_to_the_scanner(body: bytes) -> None:
    agree(body)
    agree(b'{"model":"m","x":' + body + b"}")


@UNHURRIED
@given(BODIES, st.data())
def test_a_damaged_body_is_accepted_by_both_or_by_the_scanner_alone(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    body = bytearray(json.dumps(fields | {"model": "m"}).encode())
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 127))
    agree(bytes(body))


def test_the_common_case_takes_the_short_way() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "m"}
    assert agree(json.dumps(body).encode())
    assert agree(json.dumps(body | {"stream": True, "max_tokens": 5}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"stream":true}',
        b'{"model":"m",}',
        b'{"model":"m","model":"n"}',
        b'{"model":"m","mod\\u0065l":"n"}',
        b'{"mod\\u0065l":"n"}',
        b'{"model":"m","x":"\xc3\xa9"}',
        b'{"model":"m","x":{"model":"n"}}',
        b'{"x":"model","model":"m"}',
        b'{"model":"%b"}' % (b"m" * MAX_TOKEN),
        b'{"model":"m","x":%b%b}' % (b"[" * MAX_DEPTH, b"]" * MAX_DEPTH),
        b'{"model":"m","x":%b%b}' % (b"[" * 9000, b"]" * 9000),
    ],
)
def test_everything_unusual_is_left_to_the_scanner(body: bytes) -> None:
    assert read_whole(body) is None


def test_the_scanner_then_says_what_is_wrong() -> None:
    with pytest.raises(RequestError, match="'model' occurs twice"):
        scan(b'{"model":"m","model":"n"}')
