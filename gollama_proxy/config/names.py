"""Names of models, and shell-like patterns that match many of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase


class Aliases:
    """A table of names and shell-like patterns, each with the model it stands for.

    An exact name takes precedence over all patterns.  Of the patterns that match a
    name, the longest counts; of two with the same length, the first.
    """

    __slots__ = ("_patterns", "_table")

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = dict(table)
        patterns = [key for key in self._table if not is_plain(key)]
        self._patterns = tuple(sorted(patterns, key=len, reverse=True))

    def __repr__(self) -> str:
        return f"<Aliases {self._table}>"

    def __getitem__(self, key: str) -> str:
        """Return the model that a key of the table stands for."""
        return self._table[key]

    @property
    def names(self) -> dict[str, str]:
        """The names without the patterns, and the models that they stand for."""
        return {key: model for key, model in self._table.items() if is_name(key)}

    def __contains__(self, name: str) -> bool:
        """Return whether the table has this exact name."""
        return name in self._table

    def key(self, name: str) -> str | None:
        """Return the key of a name: itself, or else a pattern that matches it."""
        return name if name in self._table else self.pattern(name)

    def pattern(self, name: str) -> str | None:
        """Return the pattern that counts for a name, if one matches."""
        return next((each for each in self._patterns if matches(name, (each,))), None)

    def way(self, key: str) -> list[str]:
        """Follow a key to its model, and on while that is another alias.

        A correct alias has two names, as aliases are followed only once.  A pattern
        that also matches the key itself is not another step: beside `"*" = "qwen"`,
        `fast` may still stand for `llama`.
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
    """Return whether a name matches one of these shell-like patterns.

    Names of models may contain brackets (`claude[1m]`), so a bracket in a pattern also
    stands for itself: `x[1m]*` matches `x[1m]-fast` as well as `x1-fast`.
    """
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return True
        if "[" in pattern and fnmatchcase(name, pattern.replace("[", "[[]")):
            return True
    return False


def is_plain(name: str) -> bool:
    """Return whether this is a name, and not a pattern."""
    return not any(sign in name for sign in "*?[")


def is_name(key: str) -> bool:
    """Return whether a client may use this as the name of a model.

    Unlike asterisks and question marks, brackets are allowed in names.
    """
    return not any(sign in key for sign in "*?")
