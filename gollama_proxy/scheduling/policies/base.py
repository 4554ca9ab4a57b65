"""The interface of a policy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import ClassVar, NamedTuple

from gollama_proxy.fleet.worker import Worker

Fits = Callable[[Worker], bool]


class Ask(NamedTuple):
    """What a policy may know of a request."""

    model: str
    prompt_bytes: int = 0
    max_tokens: int = 0  # 0: not said
    subject: str = ""
    prefixes: tuple[int, ...] = ()  # of the conversation, the shortest first
    patience: float = 0.0  # seconds for which it may still wait for a better worker


class Policy:
    """Picks a worker; keeps what state it needs, and knows no sockets."""

    # Whether it looks at the `prefixes`, and is to `learn()`.
    follows: ClassVar[bool] = False

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose one of a pool's workers that `fits`; None if none does.

        The workers are in the configured order.  It is the same object again for as
        long as the pool is the same, and its contents never change: what takes long to
        find out about a pool is remembered.  Whether a worker fits can be another
        matter at any moment, and is asked of as few as possible.

        When one worker of a full pool becomes free, it can be offered alone to those
        who wait: `workers` has just that one then, and nobody looks for it among all.
        Only a request with some `patience` may be given nobody though somebody fits; it
        will be asked for again when a slot comes free, or a second later.
        """
        raise NotImplementedError

    def learn(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Take in how much of a prompt the worker has found in its cache.

        `prompt_tokens` are all of them, as in `usage`; in llama-server's `timings` they
        are `cache_n + prompt_n`, and `cached_tokens` is `cache_n`.
        """


def place_behind(workers: Sequence[Worker], index: int) -> int:
    """Find the first worker behind a place in the configuration; 0 behind the last."""
    place = bisect_right(workers, index, key=_index)
    return place if place < len(workers) else 0


_index = attrgetter("index")
