"""Workers that answer a client's own request, and not the one that the hub makes of it.

The hub asks for a stream where its client wants one piece, or for usage where its
client wants a stream.  A worker that refuses that, or streams what cannot be put
together, gets the request as the client wrote it.  That is remembered for a while, lest
each request is made in vain first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gollama_proxy.bounded import Remembered

REMEMBERED = 600.0  # seconds; a worker may have been updated by then


class Suspect(NamedTuple):
    """What a worker is remembered for."""

    worker: str
    model: str
    path: str
    stream: bool  # the client wants one


class Unstreamed:
    """Remembers workers that are to get requests as their clients have written them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = Remembered[Suspect, float]()

    def __repr__(self) -> str:
        return f"<Unstreamed {len(self._until)}>"

    def add(self, suspect: Suspect) -> None:
        self._until[suspect] = self._clock() + REMEMBERED

    def __contains__(self, suspect: Suspect) -> bool:
        until = self._until.get(suspect)
        return until is not None and self._clock() < until
