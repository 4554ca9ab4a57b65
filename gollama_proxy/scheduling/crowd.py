"""How many each subject has waiting, and who has most."""

from __future__ import annotations

from collections import OrderedDict


class Crowd:
    """How many each subject has waiting in one class; every answer is there in O(1)."""

    __slots__ = ("_counts", "_most", "_ranks", "total")

    def __init__(self) -> None:
        self.total = 0
        self._counts: dict[str, int] = {}
        self._ranks: dict[int, OrderedDict[str, None]] = {}  # who has so many
        self._most = 0

    def __repr__(self) -> str:
        return f"<Crowd {self._counts}>"

    @property
    def largest(self) -> str | None:
        return next(iter(self._ranks[self._most])) if self._most else None

    def count(self, subject: str) -> int:
        return self._counts.get(subject, 0)

    def add(self, subject: str) -> None:
        self._move(subject, 1)

    def remove(self, subject: str) -> None:
        self._move(subject, -1)

    def _move(self, subject: str, by: int) -> None:
        before = self._counts.pop(subject, 0)
        count = before + by
        if before:
            rank = self._ranks[before]
            del rank[subject]
            if not rank:
                del self._ranks[before]
        if count:
            self._counts[subject] = count
            self._ranks.setdefault(count, OrderedDict())[subject] = None
        if count > self._most or self._most not in self._ranks:
            self._most = count
        self.total += by
