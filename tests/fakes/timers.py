"""Timers that only a test lets run, on its own clock."""

from __future__ import annotations

from collections.abc import Callable

from tests.fakes.clock import Clock


class Timer:
    """Stands in for `asyncio.TimerHandle`."""

    def __init__(self, at: float, callback: Callable[[], object]) -> None:
        self.at = at
        self.callback = callback
        self.cancelled = False

    def __repr__(self) -> str:
        return f"<Timer at {self.at:g}>"

    def cancel(self) -> None:
        self.cancelled = True


class Timers:
    """Stands in for `loop.call_later`; `advance()` runs what has become due."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.made = 0
        self._timers: list[Timer] = []

    def __repr__(self) -> str:
        return f"<Timers {self.pending}>"

    def __call__(self, delay: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(self.clock() + delay, callback)
        self._timers.append(timer)
        self.made += 1
        return timer

    @property
    def pending(self) -> list[Timer]:
        return [timer for timer in self._timers if not timer.cancelled]

    def advance(self, seconds: float) -> None:
        """Let time pass, and run in their order the timers that are due by then."""
        end = self.clock() + seconds
        while due := [timer for timer in self.pending if timer.at <= end]:
            timer = min(due, key=lambda timer: timer.at)
            timer.cancel()
            self.clock.now = max(self.clock.now, timer.at)
            timer.callback()
        self.clock.now = end
