"""What those who wait for a model are told: their place, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from gollama_proxy.scheduling.ticket import Ticket

# A new measurement counts for an eighth, as TCP smooths its round-trip times
# (RFC 6298, 2): a burst of turns is evened out, a change is followed within ten or so.
GAIN = 1 / 8
FRESH = 1.0  # seconds for which places are believed once they were counted


class Place(NamedTuple):
    """Where a ticket is: "3 of 7, in about 12 s"."""

    position: int  # from 1
    waiting: int  # for the same model, in all classes
    eta: float | None  # seconds; None while nothing is known of the pace


class Outlook:
    """Follows the turns that are had for one model.  `clock` gives monotonic seconds.

    Counting the places takes time in proportion to who waits.  It is done once in
    `FRESH` seconds at most, so that many who ask do not add up.
    """

    __slots__ = ("_clock", "_counted_at", "_last", "_mean", "_places")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mean: float | None = None  # seconds from turn to turn
        self._last: float | None = None  # turn, while somebody waits
        self._places: dict[Ticket, int] = {}
        self._counted_at = 0.0

    def __repr__(self) -> str:
        mean = "?" if self._mean is None else f"{self._mean:.1f}"
        return f"<Outlook a turn every {mean} s>"

    def had_turn(self) -> None:
        """Take in that one of those who wait has had its turn."""
        now = self._clock()
        if self._last is not None:
            gap = now - self._last
            mean = gap if self._mean is None else self._mean
            self._mean = mean + GAIN * (gap - mean)
        self._last = now

    def pause(self) -> None:
        """Take in that nobody waits: the time to the next turn will say nothing."""
        self._last = None
        self._places = {}

    @property
    def interval(self) -> float | None:
        """Seconds from one turn to the next; longer than ever if none comes."""
        if self._mean is None or self._last is None:
            return self._mean
        return max(self._mean, self._clock() - self._last)

    def place(
        self, ticket: Ticket, waiting: int, order: Callable[[], Iterable[Ticket]]
    ) -> Place:
        """Tell where a ticket is among those `waiting`; `order` counts them out.

        A place may be a second old; who came after the last count is the last.
        """
        if not self._places or self._clock() - self._counted_at >= FRESH:
            self._places = {each: place for place, each in enumerate(order(), 1)}
            self._counted_at = self._clock()
        position = min(self._places.get(ticket, waiting), waiting)
        interval = self.interval
        return Place(
            position, waiting, None if interval is None else position * interval
        )
