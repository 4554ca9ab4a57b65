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

from gollama_proxy.window import SlidingWindow


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
        self._requests = SlidingWindow(window, clock)
        self._retries = SlidingWindow(window, clock)

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
