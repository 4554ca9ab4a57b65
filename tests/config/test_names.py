"""Names and patterns that stand for a model."""

from __future__ import annotations

import pytest

from gollama_proxy.config.names import Aliases, is_plain

TABLE = {"gpt-*": "a", "*": "b", "gpt-4*": "c", "gpt-4o": "d", "gpt-?-": "e"}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("qwen", True),
        ("a/b:7b-q4_k.gguf", True),
        ("q*", False),
        ("?", False),
        ("[ab]", False),
    ],
)
def test_a_name_differs_from_a_pattern(name: str, plain: bool) -> None:
    assert is_plain(name) is plain


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o-mini", "gpt-4*"),
        ("gpt-3", "gpt-*"),
        ("gpt-4-", "gpt-4*"),  # of the same length: the first
        ("gpt-5-", "gpt-?-"),
        ("GPT-4o", "*"),
        ("", "*"),
        ("*", "*"),
        ("gpt-*", "gpt-*"),
    ],
)
def test_exact_names_take_precedence_then_the_longest_pattern(
    name: str, key: str
) -> None:
    assert Aliases(TABLE).key(name) == key


def test_a_name_that_nothing_matches_is_not_an_alias() -> None:
    aliases = Aliases({"gpt-*": "a", "b": "c"})
    assert aliases.key("gpt") is None
    assert aliases.pattern("b") is None
    assert "b" in aliases
    assert "gpt-4" not in aliases
    assert (aliases["gpt-*"], aliases["b"]) == ("a", "c")


def test_patterns_are_not_names() -> None:
    aliases = Aliases(TABLE)
    assert aliases.names == {"gpt-4o": "d"}
    assert repr(Aliases({"a": "b"})) == "<Aliases {'a': 'b'}>"


@pytest.mark.parametrize(
    ("table", "key", "way"),
    [
        ({"a": "b"}, "a", ["a", "b"]),
        ({"a": "a"}, "a", ["a", "a"]),
        ({"a": "b", "b": "c"}, "a", ["a", "b", "c"]),
        ({"a*": "b"}, "a*", ["a*", "b"]),
        ({"a*": "ab"}, "a*", ["a*", "ab"]),  # matches its own model
        ({"m[12]": "m1"}, "m[12]", ["m[12]", "m1"]),
        ({"a": "b", "*": "c"}, "a", ["a", "b"]),  # the pattern is for all other names
        ({"a*": "b", "*": "c"}, "a*", ["a*", "b"]),
        ({"a": "b", "b*": "c"}, "a", ["a", "b", "c"]),
        ({"a*": "b", "b": "c"}, "a*", ["a*", "b", "c"]),
        ({"a*": "b1", "b*": "a1"}, "b*", ["b*", "a1", "b1", "a1"]),
    ],
    ids=str,
)
def test_the_way_of_an_alias(table: dict[str, str], key: str, way: list[str]) -> None:
    """More than two names are a chain; a repeated name is a loop."""
    assert Aliases(table).way(key) == way
