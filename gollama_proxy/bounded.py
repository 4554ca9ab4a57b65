"""Bounded memory: tables of limited size, and counts of recent events.

Tables are kept by names that clients and workers choose.  A worker can be configured to
serve `qwen*`, and then clients can invent any number of models; and a worker can list
other models at each health check.  So what is kept by the name of a model is kept for a
limited number of names.  What was dropped is learnt again when a request needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 1000  # names; llama-server's router mode with all of its presets has about 100


class BoundedDict(dict[K, V]):
    """A dict that drops its oldest entry to make room for a new one."""

    __slots__ = ("most",)

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def __repr__(self) -> str:
        return f"<BoundedDict {len(self)} of {self.most}>"  # clients choose the keys

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)


# --- What happened in the last seconds --------------------------------------------


# Parts that a window is cut into.  Ten keep the error below a tenth of the window.
BUCKETS = 10


class SlidingWindow:
    """Counts what happened in the last `span` seconds.

    Time is cut into buckets, and the oldest bucket leaves as a whole.  The count
    therefore covers the last nine to ten tenths of the span (with ten buckets), and
    never more than the span.  `clock` returns monotonic seconds.
    """

    __slots__ = ("_at", "_buckets", "_clock", "_count", "_ends", "_tick", "_width")

    def __init__(
        self, span: float, clock: Callable[[], float], buckets: int = BUCKETS
    ) -> None:
        self._clock = clock
        self._width = span / buckets
        self._buckets = [0] * buckets  # a ring: tick t is at t % buckets
        self._tick = int(clock() / self._width)
        self._ends = (self._tick + 1) * self._width  # the newest bucket
        self._at = self._tick % buckets
        self._count = 0

    def __repr__(self) -> str:
        return f"<SlidingWindow {self.count} in {self._width * len(self._buckets):g} s>"

    @property
    def count(self) -> int:
        now = self._clock()
        if now >= self._ends:
            self._expire(now)
        return self._count

    def add(self, amount: int = 1) -> None:
        clock = self._clock  # a local is cheaper to call
        now = clock()
        if now >= self._ends:
            self._expire(now)
        self._buckets[self._at] += amount
        self._count += amount

    def recent(self, seconds: float) -> int:
        """Return what was counted in the last seconds; up to one bucket more."""
        size, buckets = len(self._buckets), math.ceil(seconds / self._width) + 1
        if not self.count:  # which empties the buckets that have left
            return 0
        newest = range(self._tick - min(buckets, size) + 1, self._tick + 1)
        return sum(self._buckets[tick % size] for tick in newest)

    def leaves_in(self, amount: int) -> float:
        """Return the seconds until `amount` of the count, or all of it, has left."""
        amount, size = min(amount, self.count), len(self._buckets)
        tick = self._tick - size  # the last bucket that has left
        while amount > 0:
            tick += 1
            amount -= self._buckets[tick % size]
        return max(0.0, (tick + size) * self._width - self._clock())

    def _expire(self, now: float) -> None:
        size, newest = len(self._buckets), int(now / self._width)
        # After a long pause each bucket is emptied once, not once for each round.
        for tick in range(max(self._tick, newest - size) + 1, newest + 1):
            self._count -= self._buckets[tick % size]
            self._buckets[tick % size] = 0
        self._tick, self._at = newest, newest % size
        self._ends = (newest + 1) * self._width
