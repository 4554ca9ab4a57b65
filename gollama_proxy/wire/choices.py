"""Whether each of several choices in a stream has come to its end."""

from __future__ import annotations

from gollama_proxy.wire.openai import Ending
from gollama_proxy.wire.sse import Gatherer, ends_in, events_in

# Far above what is ever requested; a longer event is not that of a choice.
MOST_CHOICES = 10_000
MOST_HELD = 1 << 20


class Tally:
    """Counts the ends of the choices in a stream that is relayed.

    It reads each event, so it is for requests that ask for several choices.
    """

    __slots__ = ("_asked", "_ended", "_ending", "_gatherer", "_open")

    def __init__(self, ending: Ending, asked: int) -> None:
        self._ending = ending
        self._asked = asked
        self._gatherer: Gatherer | None = Gatherer()  # None: too much to look at
        self._open = set[int]()
        self._ended = set[int]()

    def __repr__(self) -> str:
        return f"<Tally {len(self._ended)} of {self._asked} ended>"

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream."""
        if self._gatherer is None:
            return
        for event in events_in(self._gatherer.feed(data)):
            for index, ends in ends_in(event, self._ending).items():
                if ends:
                    self._ended.add(index)
                self._open.add(index)
        if self._gatherer.size > MOST_HELD or len(self._open) > MOST_CHOICES:
            self._gatherer = None

    def is_complete(self, *, done: bool) -> bool:
        """Say whether all choices have ended; `done` says that the stream says so.

        A server that says so may give fewer than were asked for, and may be one that
        does not tell the end of each.
        """
        if self._gatherer is None:
            return True
        if done and not self._ended:
            return True
        return self._ended == self._open and (done or len(self._ended) >= self._asked)
