"""How a value is spelled, checked and described."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from gollama_proxy.config.values import (
    Aliases,
    ConfigError,
    Lists,
    Mistakes,
    Names,
    Origins,
    Seconds,
    Table,
    Text,
    convert,
    describe_hint,
    is_plain,
    number,
    one_of,
    other,
    shown,
    size,
    whole,
)
from tests.fakes.cases import case

WHOLE = Annotated[int, whole(1, 9)]
NUMBER = Annotated[float, number(1, 9)]
SIZE = Annotated[int, size(0)]
CHOICE = Annotated[str, one_of("a", "b")]
SOME = Annotated[
    tuple[Annotated[str, one_of("a", "b", "/c")], ...], other("a list of letters")
]


def size_of(*limits: int) -> Any:
    return Annotated[int, size(*limits)]


def test_a_value_is_read() -> None:
    for hint, value, parsed in [
        (WHOLE, 9, 9),
        (WHOLE, " 9 ", 9),
        (WHOLE, 3.0, 3),
        (NUMBER, 1, 1.0),
        (Seconds, "0.5", 0.5),
        (Seconds, 86_400, 86_400.0),
        (SIZE, 0, 0),
        (SIZE, "64MiB", 64 << 20),
        (SIZE, " 1 gib ", 1 << 30),
        (SIZE, "2KiB", 2048),
        (SIZE, "7 B", 7),
        (CHOICE, "b", "b"),
        (bool, True, True),
        (bool, "Yes", True),
        (bool, "0", False),
        (Text, "Grüße", "Grüße"),
        (Names, ["qwen*", "a, b"], ("qwen*", "a, b")),
        (Table, {"gpt": "qwen"}, {"gpt": "qwen"}),
        (Table, " gpt = qwen , a=b,", {"gpt": "qwen", "a": "b"}),
        (Table, "", {}),
        (Origins, ["http://localhost:3000"], ("http://localhost:3000",)),
        (Origins, "https://a.example, http://[::1]:81", None),
        (Origins, "http://a:80 https://a:443", ("http://a", "https://a")),
        (Origins, "http://a:443 https://a:080", ("http://a:443", "https://a:80")),
        (Origins, ["tauri://localhost"], ("tauri://localhost",)),
        (Origins, "app://obsidian.md app://-", ("app://obsidian.md", "app://-")),
        (Origins, "http://tauri.localhost", ("http://tauri.localhost",)),
        (Origins, "chrome-extension://abcdefghij", ("chrome-extension://abcdefghij",)),
        (Origins, "safari-web-extension://A-1", ("safari-web-extension://A-1",)),
        (Origins, "capacitor://localhost:80", ("capacitor://localhost:80",)),
        (Origins, "", ()),
        (SOME, ["b", "a"], ("b", "a")),
        (SOME, ("/c",), ("/c",)),
        (SOME, [], ()),
        (SOME, "b", ("b",)),
        (SOME, " a, b\t/c,", ("a", "b", "/c")),
        (SOME, "", ()),
        (Lists, {"big": ["medium", "small"]}, {"big": ("medium", "small")}),
        (Lists, {"a": ["b"], "b": ["a"]}, {"a": ("b",), "b": ("a",)}),
        (Lists, {"big": "medium, small"}, {"big": ("medium", "small")}),
        (Lists, {}, {}),
        (
            Lists,
            "big=medium|small,other=x",
            {"big": ("medium", "small"), "other": ("x",)},
        ),
        (Lists, " big = medium , other=x,", {"big": ("medium",), "other": ("x",)}),
        (Lists, "big = medium | small", {"big": ("medium", "small")}),
        (Lists, "org/big:7b=org/small:1b", {"org/big:7b": ("org/small:1b",)}),
        (Lists, "", {}),
    ]:
        with case((hint, value, parsed)):
            if parsed is None:
                parsed = tuple(value.split(", "))
            result = convert(hint, value)
            assert result == parsed
            assert type(result) is type(parsed)


def test_a_value_is_refused() -> None:
    for hint, value in [
        (WHOLE, 0),
        (WHOLE, 10),
        (WHOLE, 3.5),
        (WHOLE, "3.0"),
        (WHOLE, True),
        (WHOLE, [3]),
        (WHOLE, "three"),
        (WHOLE, None),
        (WHOLE, float("inf")),
        (NUMBER, 10**400),
        (NUMBER, "1e400"),
        (Seconds, float("nan")),
        (Seconds, float("inf")),
        (Seconds, "-1"),
        (SIZE, 1.5),
        (SIZE, True),
        (SIZE, "64MB"),
        (SIZE, "MiB"),
        (SIZE, "-1"),
        (size_of(10), "9"),
        (size_of(0, 10), 11),
        (CHOICE, "A"),
        (CHOICE, "ab"),
        (CHOICE, "a\n"),
        (CHOICE, ["a"]),
        (bool, 1),
        (bool, "maybe"),
        (Text, 3),
        (Text, "two\nlines"),
        (Names, "qwen"),
        (Names, []),
        (Names, ["a", ""]),
        (Names, [3]),
        (Names, ["two\nlines"]),
        (Table, ["a"]),
        (Table, "a"),
        (Table, {"a": 1}),
        (Table, {"a": ""}),
        (Table, {"": "b"}),
        (Origins, {"a": "b"}),
        (Origins, "*"),
        (Origins, "null"),
        (Origins, "http://a:0"),
        (Origins, "http://a:65536"),
        (Origins, "http://a:٣"),
        (Origins, ["http://localhost:3000/"]),
        (Origins, [3]),
        (Origins, "http://A"),
        (Origins, "app://"),
        (Origins, "file:///"),
        (Origins, "app://a/b"),
        (Origins, "App://a"),
        (Origins, "app:a"),
        (SOME, ["d"]),
        (SOME, "a, d"),
        (SOME, ["A"]),
        (SOME, [["a"]]),
        (SOME, [""]),
        (SOME, [1]),
        (SOME, {"a": "b"}),
        (SOME, True),
        (SOME, False),
        (Lists, {"big": ["small", "big"]}),
        (Lists, {"big": ["small", "small"]}),
        (Lists, {"big": []}),
        (Lists, {"big": ""}),
        (Lists, {"big": 7}),
        (Lists, {"big": [7]}),
        (Lists, {"big": [""]}),
        (Lists, {"big": {"small": 1}}),
        (Lists, {"a": ["b"], "big": ["big"]}),
        (Lists, {"": ["small"]}),
        (Lists, ["big", "small"]),
        (Lists, 7),
        (Lists, "big"),
        (Lists, "big="),
        (Lists, "=small"),
        (Lists, "big=big"),
        (Lists, "big=small|small"),
        (Lists, "big=|"),
        (Lists, "big=small||tiny"),
    ]:
        with case((hint, value)):
            with pytest.raises(ValueError):
                convert(hint, value)


@pytest.mark.parametrize(
    ("hint", "allowed"),
    [
        (WHOLE, "a whole number from 1 to 9"),
        (NUMBER, "a number from 1 to 9"),
        (Seconds, "a number of seconds from 0 to 86,400"),
        (Annotated[Seconds, "help"], "a number of seconds from 0 to 86,400"),
        (SIZE, "bytes or a size such as 64MiB, at least 0"),
        (CHOICE, "one of a, b"),
        (SOME, "a list of letters"),
        (Text, "text on one line"),
        (bool, "true or false"),
        (Annotated[bool, "help"], "true or false"),
    ],
)
def test_allowed_values_are_described(hint: Any, allowed: str) -> None:
    assert describe_hint(hint) == allowed


def fail(*texts: str) -> None:
    raise ConfigError(*texts)


def test_the_result_of_a_step_is_returned() -> None:
    mistakes = Mistakes()
    assert mistakes.collect(int, "7") == 7
    mistakes.check()
    assert len(mistakes) == 0


def test_all_mistakes_are_raised_together() -> None:
    mistakes = Mistakes()
    assert mistakes.collect(fail, "a") is None
    assert mistakes.collect(fail, "b", "c") is None
    assert len(mistakes) == 3
    assert repr(mistakes) == "<Mistakes 3>"
    with pytest.raises(ConfigError) as caught:
        mistakes.check()
    assert caught.value.args == ("a", "b", "c")
    assert str(caught.value) == "a\nb\nc"


def test_other_errors_are_not_collected() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Mistakes().collect(int, "x")


def test_a_long_value_is_cut() -> None:
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert shown("two\nlines") == r"'two\nlines'"


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
