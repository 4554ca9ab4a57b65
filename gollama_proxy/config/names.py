"""Names that a client may use for a model, and patterns that catch many of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase


class Aliases:
    """A table of names and shell-like patterns, each with the model it stands for.

    A name that is in the table as it is goes before all patterns.  Of the patterns that
    catch a name the longest one counts, and of two of one length the first.
    """

    __slots__ = ("_patterns", "_table")

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = dict(table)
        patterns = [key for key in self._table if not is_plain(key)]
        self._patterns = tuple(sorted(patterns, key=len, reverse=True))

    def __repr__(self) -> str:
        return f"<Aliases {self._table}>"

    def __getitem__(self, key: str) -> str:
        """Tell the model that a key of the table stands for."""
        return self._table[key]

    @property
    def names(self) -> dict[str, str]:
        """The names, without the patterns, and the models that they stand for."""
        return {key: model for key, model in self._table.items() if is_name(key)}

    def __contains__(self, name: str) -> bool:
        """Tell whether a name is in the table as it is."""
        return name in self._table

    def key(self, name: str) -> str | None:
        """Find what a name is in the table, or else is caught by."""
        return name if name in self._table else self.pattern(name)

    def pattern(self, name: str) -> str | None:
        """Find the pattern that catches a name."""
        return next((each for each in self._patterns if matches(name, (each,))), None)

    def way(self, key: str) -> list[str]:
        """Follow a key to its model, and on for as long as that is an alias again.

        There should be these two names, as an alias is followed once.  A pattern that
        catches the key itself is no further step: with `"*" = "qwen"` in the table,
        `fast` may stand for `llama` all the same.
        """
        names = [key, self._table[key]]
        while names[-1] not in names[:-1]:
            found = self.key(names[-1])
            if found is None or found == key or matches(key, (found,)):
                break
            names.append(self._table[found])
            key = found
        return names


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is covered by one of these shell-like patterns.

    Names of models hold brackets (`claude[1m]`), so a bracket in a pattern also stands
    for itself: `x[1m]*` matches `x[1m]-fast` as well as `x1-fast`.
    """
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return True
        if "[" in pattern and fnmatchcase(name, pattern.replace("[", "[[]")):
            return True
    return False


def is_plain(name: str) -> bool:
    """Tell a name from a pattern."""
    return not any(sign in name for sign in "*?[")


def is_name(key: str) -> bool:
    """Return whether a client may use this as the name of a model.

    Unlike asterisks and question marks, brackets do occur in names.
    """
    return not any(sign in key for sign in "*?")
