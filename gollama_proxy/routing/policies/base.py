"""The interface of a policy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

from gollama_proxy.routing.worker import Worker

Fits = Callable[[Worker], bool]


class Ask(NamedTuple):
    """What a policy may know of a request."""

    model: str
    prompt_bytes: int = 0
    max_tokens: int = 0  # 0: not said
    subject: str = ""
    prefixes: tuple[int, ...] = ()  # of the conversation, the shortest first


class Policy(Protocol):
    """Picks a worker; keeps what state it needs, and knows no sockets."""

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose one of a pool's workers that `fits`; None if none does.

        The workers are in the configured order.  It is the same object again for as
        long as the pool is the same, and its contents never change: what takes long to
        find out about a pool is remembered.  Whether a worker fits can be another
        matter at any moment, and is asked of as few as possible.

        When one worker of a full pool becomes free, it can be offered alone to those
        who wait: `workers` has just that one then, and nobody looks for it among all.
        Only a policy that was made `patient` may turn down a worker that fits.
        """
        ...


def place_behind(workers: Sequence[Worker], index: int) -> int:
    """Find the first worker behind a place in the configuration; 0 behind the last."""
    place = bisect_right(workers, index, key=_index)
    return place if place < len(workers) else 0


_index = attrgetter("index")
