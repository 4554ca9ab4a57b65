"""How many retries the hub may spend: a share of the traffic, and a few on top.

Retries help while few requests fail.  When many do, they are load that comes at the
worst moment: three attempts each turn an overload into three overloads.  So retries
are paid for by requests.  At every withdrawal, within the last `window` seconds,

    retries  <=  ratio x requests + floor

as in Finagle's RetryBudget and in chapter 21 of Google's SRE book ("Handling
Overload"), which allow a fifth and a tenth.  The floor is for quiet hubs: a tenth of
four requests is nothing, and a single lost answer should still be tried again.
"""

from __future__ import annotations

from collections.abc import Callable

# Into how many parts a window is cut.  Ten keep the error below a tenth of the window.
BUCKETS = 10


class RetryBudget:
    """Lets a retry pass while the recent requests pay for it."""

    __slots__ = ("_requests", "_retries", "floor", "ratio")

    def __init__(
        self,
        ratio: float = 0.1,
        floor: int = 3,
        window: float = 10.0,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.ratio = ratio
        self.floor = floor
        self._requests = Recent(window, clock)
        self._retries = Recent(window, clock)

    def __repr__(self) -> str:
        spent, requests = self._retries.count, self._requests.count
        return f"<RetryBudget {spent} of {self._allowed:g} spent, {requests} requests>"

    def deposit(self) -> None:
        """Count a request; once for each, whatever its number of attempts."""
        self._requests.add()

    def withdraw(self) -> bool:
        """Ask for one retry, which is spent if the answer is True."""
        if not self.suffices:
            return False
        self._retries.add()
        return True

    @property
    def suffices(self) -> bool:
        """Whether a retry would be allowed now."""
        return self._retries.count + 1 <= self._allowed

    @property
    def _allowed(self) -> float:
        return self.ratio * self._requests.count + self.floor


class Recent:
    """Counts what happened in the last `span` seconds, at constant cost.

    Time is cut into buckets, and the oldest leaves as a whole.  What is counted is
    therefore the last nine to ten tenths of the span (with ten buckets), and never more
    than the span.
    """

    __slots__ = ("_buckets", "_clock", "_count", "_tick", "_width")

    def __init__(
        self, span: float, clock: Callable[[], float], buckets: int = BUCKETS
    ) -> None:
        self._clock = clock
        self._width = span / buckets
        self._buckets = [0] * buckets  # a ring: tick t is at t % buckets
        self._tick = self._now()
        self._count = 0

    def __repr__(self) -> str:
        return f"<Recent {self.count} in {self._width * len(self._buckets):g} s>"

    @property
    def count(self) -> int:
        self._expire()
        return self._count

    def add(self, amount: int = 1) -> None:
        self._expire()
        self._buckets[self._tick % len(self._buckets)] += amount
        self._count += amount

    def leaves_in(self, amount: int) -> float:
        """Tell the seconds until so much of what is counted, or all, counts no more."""
        self._expire()
        amount, size = min(amount, self._count), len(self._buckets)
        tick = self._tick - size  # the last one that has left
        while amount > 0:
            tick += 1
            amount -= self._buckets[tick % size]
        return max(0.0, (tick + size) * self._width - self._clock())

    def _expire(self) -> None:
        now, size = self._now(), len(self._buckets)
        # After a long pause each bucket is emptied once, and not once for each round.
        for tick in range(max(self._tick, now - size) + 1, now + 1):
            self._count -= self._buckets[tick % size]
            self._buckets[tick % size] = 0
        self._tick = now

    def _now(self) -> int:
        return int(self._clock() / self._width)
