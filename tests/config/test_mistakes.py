"""Mistakes are collected and reported together."""

from __future__ import annotations

import pytest

from gollama_proxy.config.mistakes import ConfigError, Mistakes, shown


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
