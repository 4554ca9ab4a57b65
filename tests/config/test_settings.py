"""Each setting is declared once, and what is declared is what people are told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from gollama_proxy.config.settings import (
    FLAG,
    FLAGS,
    LISTS,
    NAMES,
    ORIGINS,
    SECTIONS,
    TABLE,
    TEXT,
    Config,
    Kind,
    Origin,
    choice,
    number,
    seconds,
    settings,
    size,
    some_of,
    variable,
)

ROWS = list(settings())
SOME = some_of(("a", "b", "/c"), "a list of letters")


@pytest.mark.parametrize(
    ("kind", "value", "parsed"),
    [
        (number(1, 9, whole=True), 9, 9),
        (number(1, 9, whole=True), " 9 ", 9),
        (number(1, 9, whole=True), 3.0, 3),
        (number(1, 9), 1, 1.0),
        (seconds(), "0.5", 0.5),
        (seconds(), 86_400, 86_400.0),
        (size(), 0, 0),
        (size(), "64MiB", 64 << 20),
        (size(), " 1 gib ", 1 << 30),
        (size(), "2KiB", 2048),
        (size(), "7 B", 7),
        (choice("a", "b"), "b", "b"),
        (FLAG, True, True),
        (FLAG, "Yes", True),
        (FLAG, "0", False),
        (TEXT, "Grüße", "Grüße"),
        (NAMES, ["qwen*", "a, b"], ("qwen*", "a, b")),
        (TABLE, {"gpt": "qwen"}, {"gpt": "qwen"}),
        (TABLE, " gpt = qwen , a=b,", {"gpt": "qwen", "a": "b"}),
        (TABLE, "", {}),
        (ORIGINS, ["http://localhost:3000"], ("http://localhost:3000",)),
        (ORIGINS, "https://a.example, http://[::1]:81", None),
        (ORIGINS, "http://a:80 https://a:443", ("http://a", "https://a")),
        (ORIGINS, "http://a:443 https://a:080", ("http://a:443", "https://a:80")),
        (ORIGINS, ["tauri://localhost"], ("tauri://localhost",)),
        (ORIGINS, "app://obsidian.md app://-", ("app://obsidian.md", "app://-")),
        (ORIGINS, "http://tauri.localhost", ("http://tauri.localhost",)),
        (ORIGINS, "chrome-extension://abcdefghij", ("chrome-extension://abcdefghij",)),
        (ORIGINS, "safari-web-extension://A-1", ("safari-web-extension://A-1",)),
        (ORIGINS, "capacitor://localhost:80", ("capacitor://localhost:80",)),
        (ORIGINS, "", ()),
        (SOME, ["b", "a"], ("b", "a")),
        (SOME, ("/c",), ("/c",)),
        (SOME, [], ()),
        (SOME, "b", ("b",)),
        (SOME, " a, b\t/c,", ("a", "b", "/c")),
        (SOME, "", ()),
        (LISTS, {"big": ["medium", "small"]}, {"big": ("medium", "small")}),
        (LISTS, {"a": ["b"], "b": ["a"]}, {"a": ("b",), "b": ("a",)}),
        (LISTS, {"big": "medium, small"}, {"big": ("medium", "small")}),
        (LISTS, {}, {}),
        (
            LISTS,
            "big=medium|small,other=x",
            {"big": ("medium", "small"), "other": ("x",)},
        ),
        (LISTS, " big = medium , other=x,", {"big": ("medium",), "other": ("x",)}),
        (LISTS, "big = medium | small", {"big": ("medium", "small")}),
        (LISTS, "org/big:7b=org/small:1b", {"org/big:7b": ("org/small:1b",)}),
        (LISTS, "", {}),
    ],
)
def test_a_value_is_read(kind: Kind, value: Any, parsed: Any) -> None:
    if parsed is None:
        parsed = tuple(value.split(", "))
    result = kind.parse(value)
    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (number(1, 9, whole=True), 0),
        (number(1, 9, whole=True), 10),
        (number(1, 9, whole=True), 3.5),
        (number(1, 9, whole=True), "3.0"),
        (number(1, 9, whole=True), True),
        (number(1, 9, whole=True), [3]),
        (number(1, 9, whole=True), "three"),
        (seconds(), float("nan")),
        (seconds(), float("inf")),
        (seconds(), "-1"),
        (size(), 1.5),
        (size(), True),
        (size(), "64MB"),
        (size(), "MiB"),
        (size(), "-1"),
        (size(10), "9"),
        (size(0, 10), 11),
        (choice("a"), "A"),
        (choice("a"), ["a"]),
        (FLAG, 1),
        (FLAG, "maybe"),
        (TEXT, 3),
        (TEXT, "two\nlines"),
        (NAMES, "qwen"),
        (NAMES, []),
        (NAMES, ["a", ""]),
        (NAMES, [3]),
        (NAMES, ["two\nlines"]),
        (TABLE, ["a"]),
        (TABLE, "a"),
        (TABLE, {"a": 1}),
        (TABLE, {"a": ""}),
        (TABLE, {"": "b"}),
        (ORIGINS, {"a": "b"}),
        (ORIGINS, "*"),
        (ORIGINS, "null"),
        (ORIGINS, "http://a:0"),
        (ORIGINS, "http://a:65536"),
        (ORIGINS, "http://a:٣"),
        (ORIGINS, ["http://localhost:3000/"]),
        (ORIGINS, [3]),
        (ORIGINS, "http://A"),
        (ORIGINS, "app://"),
        (ORIGINS, "file:///"),
        (ORIGINS, "app://a/b"),
        (ORIGINS, "App://a"),
        (ORIGINS, "app:a"),
        (SOME, ["d"]),
        (SOME, "a, d"),
        (SOME, ["A"]),
        (SOME, [["a"]]),
        (SOME, [""]),
        (SOME, [1]),
        (SOME, {"a": "b"}),
        (SOME, True),
        (SOME, False),
        (LISTS, {"big": ["small", "big"]}),
        (LISTS, {"big": ["small", "small"]}),
        (LISTS, {"big": []}),
        (LISTS, {"big": ""}),
        (LISTS, {"big": 7}),
        (LISTS, {"big": [7]}),
        (LISTS, {"big": [""]}),
        (LISTS, {"big": {"small": 1}}),
        (LISTS, {"a": ["b"], "big": ["big"]}),
        (LISTS, {"": ["small"]}),
        (LISTS, ["big", "small"]),
        (LISTS, 7),
        (LISTS, "big"),
        (LISTS, "big="),
        (LISTS, "=small"),
        (LISTS, "big=big"),
        (LISTS, "big=small|small"),
        (LISTS, "big=|"),
        (LISTS, "big=small||tiny"),
    ],
)
def test_a_value_is_refused(kind: Kind, value: Any) -> None:
    with pytest.raises(ValueError):
        kind.parse(value)


def test_every_default_is_allowed() -> None:
    kinds = {
        f"{section}.{name}": entry.metadata["kind"]
        for section, cls in SECTIONS.items()
        for name, entry in cls.__dataclass_fields__.items()
    }
    for row in ROWS:
        given = list(row.default) if isinstance(row.default, tuple) else row.default
        assert kinds[row.key].parse(given) == row.default, row.key


def test_rows_are_whole_and_in_the_order_of_the_sections() -> None:
    assert len({row.key for row in ROWS}) == len({row.env for row in ROWS}) == len(ROWS)
    assert list(dict.fromkeys(row.key.partition(".")[0] for row in ROWS)) == list(
        SECTIONS
    )
    for row in ROWS:
        assert row.help, row.key
        assert row.allowed, row.key
        assert row.help.isprintable(), row.key
        assert row.env == variable(*row.key.split(".")), row.key


def test_every_flag_is_for_a_setting() -> None:
    assert FLAGS.keys() <= {row.key for row in ROWS}


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(FrozenInstanceError):
        config.server.port = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.workers = ()  # type: ignore[misc]


def test_two_configs_do_not_share_their_aliases() -> None:
    assert Config().models.aliases is not Config().models.aliases
    assert Config().models.fallbacks is not Config().models.fallbacks


@pytest.mark.parametrize(
    ("host", "authority"),
    [("10.0.0.11", "10.0.0.11:8080"), ("::1", "[::1]:8080"), ("gpu", "gpu:8080")],
)
def test_authority_brackets_ipv6(host: str, authority: str) -> None:
    assert Origin("http", host, 8080, "").authority == authority
