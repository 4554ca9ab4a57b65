"""Messages between hubs: what another release or another program wrote is ignored."""

from __future__ import annotations

import json
import logging
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.state import facts
from gollama_proxy.state.facts import Message, decode, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["v", "text", "parts"]), inner)
    ),
    max_leaves=8,
)


class Note(Message):
    version: ClassVar[int] = 3
    text: str
    parts: tuple[int, ...] = ()


@pytest.fixture(autouse=True)
def nothing_was_logged_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_complaints", {})


def test_a_message_comes_back_as_it_was_with_its_version() -> None:
    note = Note(text="x", parts=(1, 2))
    assert json.loads(encode(note)) == {"v": 3, "text": "x", "parts": [1, 2]}
    assert decode(Note, encode(note), "here") == note


def test_a_newer_release_may_add_fields() -> None:
    assert decode(Note, '{"v": 3, "text": "x", "more": {}}', "here") == Note(text="x")


def test_another_version_is_ignored_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for version in (4, 4, 5, 2):
        assert decode(Note, f'{{"v": {version}, "text": 1}}', "here") is None
    assert caplog.messages == [
        "a message in here is ignored: its format has version 4, and this hub knows 3"
    ]
    decode(Note, '{"v": 4}', "there")
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"text": "x"}',
        b'{"v": "3", "text": "x"}',
        b'{"v": 3}',
        b'{"v": 3, "text": 1}',
        b'{"v": 3, "text": "x", "parts": [1e400]}',
        b'{"v": 3, "text": "x"',
        b"[" * 100_000,
        b'{"v": 3, "text": "x", "deep": ' + b"[" * 100_000,
        '{"v": 3, "text": "\ud800"}',
        b'{"v": 3, "text": "' + b"x" * facts.MOST_BYTES + b'"}',
    ],
    ids=lambda data: repr(data[:30]),
)
def test_garbage_is_ignored_and_logged_once_without_its_contents(
    data: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert decode(Note, data, "here") is None
        assert decode(Note, data, "here") is None
    assert caplog.messages == ["a message in here is ignored: it is malformed"]


@given(st.one_of(st.binary(), st.text(), JSON.map(json.dumps)))
def test_nothing_raises(data: bytes | str) -> None:
    found = decode(Note, data, "here")
    assert found is None or found.v == 3
