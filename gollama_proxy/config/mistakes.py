"""Mistakes in the settings: one line each, collected and reported together."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ConfigError(Exception):
    """Raised for unusable settings; each argument is one line about one mistake."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class Mistakes:
    """Collects the mistakes of several steps, so that none hides another."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __repr__(self) -> str:
        return f"<Mistakes {len(self._found)}>"

    def __len__(self) -> int:
        return len(self._found)

    def collect(
        self, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T | None:
        """Run a step and return its result; None if it raised a `ConfigError`."""
        try:
            return step(*args, **kwargs)
        except ConfigError as exc:
            self._found += exc.args
            return None

    def add(self, text: str) -> None:
        self._found.append(text)

    def check(self) -> None:
        """Raise all mistakes that were collected, if any.

        Raises:
            ConfigError: with a line for each.
        """
        if self._found:
            raise ConfigError(*self._found)


def shown(value: object) -> str:
    """Quote a value for a mistake."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Shorten a text that would make a line too long."""
    return text if len(text) <= 80 else text[:77] + "..."
