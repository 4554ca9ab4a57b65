"""Which worker has which conversation in its prompt cache, as far as is known.

What is no conversation.  A system prompt and a greeting, or a few examples, are what
many conversations begin with, and to send them all to the worker that had the first
would be the end of balance.  One request does not show that.  But a prefix that was
part of more than `SHARED` conversations says nothing any more, and is passed over.

Nobody else's.  What is found depends on the subject: nobody shall find out what others
have asked by the time that answers take.

Is it true?  Caches are finite, workers restart, and nobody tells the hub.  But with
each answer a worker tells how much of the prompt was in its cache, and `verify()`
compares that with what was expected.  How far a worker is trusted depends on how many
other requests it had since: what is kept for longer would have been kept for less, and
what is lost sooner would have been lost later, too.  A worker that has restarted
disappoints some conversations, and is then hardly preferred to others; as they come
back and find what they have left there, trust returns.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from gollama_proxy.bounded import Remembered
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask

SIZE = 32_768  # prefixes that are remembered, in some 10 MB
SHARED = 4  # conversations with the same beginning, before it is no sign of any
CACHES = 20_000  # models on workers, of which is known what they keep
LEVELS = 12  # distances that are told apart: 0, 1, 2-3, 4-7 … 1024+
RATE = 0.25  # by which trust moves towards what was found
LEAST_TRUST = 0.1  # so that a worker is still asked, and can prove itself


class Place:
    """Where a conversation is: one for all of its prefixes."""

    __slots__ = (
        "awaited_since",
        "cache",
        "distance",
        "expected",
        "size",
        "stamp",
        "whole",
        "worker",
    )

    def __init__(self, worker: Worker, cache: _Cache) -> None:
        self.worker = worker
        self.cache = cache  # the worker's
        self.whole = 0  # its longest prefix
        self.size = 0  # bytes of its last request
        self.stamp = 0  # requests that the worker had by then
        # The part of the prompt that should be in the cache, until that is verified.
        self.expected = 0.0
        self.distance = 0
        self.awaited_since: float | None = None  # while a request waits for the worker

    def __repr__(self) -> str:
        return f"<Place {self.size} bytes on {self.worker.name}>"


class Match(NamedTuple):
    """A conversation that was found."""

    place: Place
    worker: Worker
    depth: int  # number of prefixes that were known
    whole: bool  # it goes on where it was; else only its beginning is the same
    cached: float  # bytes of the prompt that should be there, if all was kept
    distance: int  # requests that the worker had since
    trust: float  # the part of it that is usually there


class Memory:
    """The places of the last conversations.

    `size` is the number of prefixes, of which each conversation has a few.  Those that
    were not heard of for longest are forgotten.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        # Each prefix with its last place, and the number of places that it has had.
        self._prefixes: OrderedDict[int, tuple[Place, int]] = OrderedDict()
        self._caches = Remembered[tuple[str, Worker], _Cache](CACHES)

    def __repr__(self) -> str:
        return f"<Memory of {len(self)} prefixes>"

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, ask: Ask) -> Match | None:
        """Find the place of the longest beginning that is known."""
        salt, depth = _salt(ask), len(ask.prefixes)
        for prefix in reversed(ask.prefixes):
            known = self._prefixes.get(prefix ^ salt)
            if known is not None and known[1] <= SHARED:
                return self._match(ask, known[0], depth, prefix ^ salt)
            depth -= 1
        return None

    def hold(self, ask: Ask, worker: Worker, match: Match | None) -> None:
        """Note that a worker gets a request, and what was found of it before."""
        if match is not None and match.worker is worker:
            cache = match.place.cache
        else:
            cache = self._cache(ask.model, worker)
        cache.served += 1
        prefixes = ask.prefixes
        if not prefixes:
            return
        salt, new = _salt(ask), 0
        if match is not None and match.whole:
            place, new = match.place, min(match.depth, len(prefixes) - 1)
            place.expected = 0.0
            if match.worker is worker:
                place.expected = match.cached / max(ask.prompt_bytes, 1)
                place.distance = match.distance
            place.worker, place.cache = worker, cache
        else:
            place = Place(worker, cache)
        place.size, place.stamp = ask.prompt_bytes, cache.served
        place.whole = prefixes[-1] ^ salt
        place.awaited_since = None
        for prefix in prefixes[new:] if new else prefixes:
            self._note(prefix ^ salt, place)
        while len(self._prefixes) > self.size:
            self._prefixes.popitem(last=False)

    def verify(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Compare what was expected of a worker's cache with what the worker tells.

        What cannot be true is ignored.
        """
        if not ask.prefixes or not 0 <= cached_tokens <= prompt_tokens:
            return
        known = self._prefixes.get(ask.prefixes[-1] ^ _salt(ask))
        if known is None or known[0].worker is not worker or not known[0].expected:
            return
        place = known[0]
        found = cached_tokens / max(prompt_tokens, 1) / place.expected
        self._cache(ask.model, worker).learn(place.distance, found)
        place.expected = 0.0  # the next one is another request's

    def _match(self, ask: Ask, place: Place, depth: int, key: int) -> Match:
        worker, size = place.worker, ask.prompt_bytes
        whole = key == place.whole
        if whole:
            cached = float(place.size if place.size < size else size)
        else:  # a guess; nobody has counted the bytes
            cached = size * depth / (len(ask.prefixes) + 1)
        cache = place.cache
        distance = cache.served - place.stamp
        trust = cache.trust(distance)
        return Match(place, worker, depth, whole, cached, distance, trust)

    def _note(self, prefix: int, place: Place) -> None:
        known = self._prefixes.get(prefix)
        if known is None:
            self._prefixes[prefix] = (place, 1)
            return
        if known[0] is not place:
            self._prefixes[prefix] = (place, known[1] + 1)
        self._prefixes.move_to_end(prefix)

    def _cache(self, model: str, worker: Worker) -> _Cache:
        cache = self._caches.get((model, worker))
        if cache is None:
            cache = self._caches[model, worker] = _Cache()
        return cache


class _Cache:
    """What a worker was found to keep, by the number of requests that came between."""

    __slots__ = ("_kept", "served")

    def __init__(self) -> None:
        self.served = 0  # requests
        self._kept = [1.0] * LEVELS

    def __repr__(self) -> str:
        kept = " ".join(f"{part:.2f}" for part in self._kept)
        return f"<Cache served={self.served} kept={kept}>"

    def trust(self, distance: int) -> float:
        return self._kept[_level(distance)]

    def learn(self, distance: int, found: float) -> None:
        """Take in which part of what was expected was there."""
        level = _level(distance)
        found = max(LEAST_TRUST, min(found, 1.0))
        for each, kept in enumerate(self._kept):
            better, worse = each <= level, each >= level
            if (better and found > kept) or (worse and found < kept):
                self._kept[each] += RATE * (found - kept)


def _salt(ask: Ask) -> int:
    return hash((ask.subject, ask.model))


def _level(distance: int) -> int:
    return min(distance.bit_length(), LEVELS - 1)
