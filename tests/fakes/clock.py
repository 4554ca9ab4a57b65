"""A clock that moves only when a test advances it."""

from __future__ import annotations


class Clock:
    """Stands in for `time.monotonic`: call it for the time, `advance()` it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return f"<Clock {self.now:g}>"

    def advance(self, seconds: float) -> float:
        """Let time pass and return the new time; a monotonic clock never goes back."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self.now += seconds
        return self.now
