"""Back to the worker that still has the conversation in its prompt cache.

`conversations.py` knows which worker that is.  This policy decides whether it is worth
it: the worker may be busy, or it may be a laptop that had the first turn because no
other was free.  So it is compared with the worker that would have the request
otherwise, and read the whole prompt:

    seconds here, reading the rest
        <=  seconds there, reading all  +  (PRICE - 1) * seconds of reading it there

Reading a prompt again costs more than the time of its own request: while a prompt is
read, the other answers of that worker stand nearly still.  In `benchmarks/simulate.py`
the first tokens of all requests come soonest at a price of 8 (of 4, 6 and 8).

*There* is first what the other policy's recent choices took on average.  Only if that
would be better, or is not known, the other policy chooses a worker now; most turns go
back without it.

When every slot of the warm worker is taken, a request that has the `patience` waits (it
gets no worker) rather than go elsewhere, for as long as that costs less than the
reading, at the same price.  Another request of the queue can have the slot that it
leaves, so nothing stands idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask, Fits, Policy, place_behind
from gollama_proxy.scheduling.policies.conversations import SIZE, Match, Memory
from gollama_proxy.scheduling.policies.load import expected_seconds, expected_tokens

PRICE = 8.0  # of reading a prompt anew
RECENT = 1.0  # seconds for which the other policy's choices are a measure
RATE = 0.25  # by which each of them counts


class Affinity(Policy):
    """Chooses the worker that holds the conversation; for new ones, as `inner` does."""

    follows = True

    def __init__(
        self, inner: Policy, clock: Callable[[], float], size: int = SIZE
    ) -> None:
        """Keep at most `size` prefixes of conversations."""
        self.inner = inner
        self._clock = clock
        self._memory = Memory(size)
        self._usual = BoundedDict[str, _Usual]()

    def __repr__(self) -> str:
        return f"<Affinity {self._memory!r} {self.inner!r}>"

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the warm worker unless another one is worth the reading."""
        match = self._memory.find(ask) if ask.prefixes else None
        warm = match is not None and _has(workers, match.worker) and fits(match.worker)
        chosen: Worker | None
        if match is not None and warm and self._is_as_good_as_usual(ask, match):
            chosen = match.worker
        else:
            chosen = self._choose(ask, workers, fits)
            if chosen is None:
                return None
            if match is not None and warm and _pays(ask, match, chosen):
                chosen = match.worker
            elif match is not None and self._waits(ask, match, chosen):
                return None
        self._memory.hold(ask, chosen, match)
        return chosen

    def twin(self, ask: Ask) -> Affinity:
        """Return a copy for one request."""
        twin = Affinity(self.inner.twin(ask), self._clock)
        twin._memory = self._memory.excerpt(ask)
        if ask.model in self._usual:
            twin._usual[ask.model] = copy(self._usual[ask.model])
        return twin

    def learn(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Correct what was expected of the worker's cache."""
        self._memory.verify(ask, worker, cached_tokens, prompt_tokens)

    def _choose(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        chosen = self.inner.pick(ask, workers, fits)
        if chosen is not None:
            usual = self._usual.get(ask.model)
            if usual is None:
                usual = self._usual[ask.model] = _Usual()
            usual.note(ask, chosen, self._clock())
        return chosen

    def _is_as_good_as_usual(self, ask: Ask, match: Match) -> bool:
        usual = self._usual.get(ask.model)
        if usual is None or self._clock() >= usual.until:
            return False
        worker, cached = match.worker, match.cached * match.trust
        tokens = expected_tokens(worker, ask)
        here = expected_seconds(worker, ask, tokens, cached)
        there = usual.byte * (ask.prompt_bytes + (PRICE - 1) * cached)
        return here is not None and here <= there + usual.token * tokens

    def _waits(self, ask: Ask, match: Match, other: Worker) -> bool:
        """Return whether a request should wait for its worker, not go elsewhere."""
        worker, model = match.worker, ask.model
        if not ask.patience or worker is other or not worker.full:
            return False
        if not (worker.can_serve(model) and worker.serves(model)):
            return False  # it would wait for more than a slot
        reads = other.pace_of(model).speed.reads
        writes = worker.pace_of(model).speed.writes(worker.in_flight)
        if reads is None or writes is None:
            return False
        now, conversation = self._clock(), match.conversation
        if conversation.awaited_since is None:
            conversation.awaited_since = now
        # Its answers are at all stages: one of n is ready within an nth of their time.
        wait = expected_tokens(worker, ask) / writes / worker.in_flight
        saved = match.cached * match.trust / reads
        waited = now - conversation.awaited_since
        return wait < ask.patience and waited + wait < PRICE * saved


class _Usual:
    """What the other policy's recent choices took, for each byte and token."""

    __slots__ = ("byte", "token", "until")

    def __init__(self) -> None:
        self.byte = self.token = 0.0  # seconds
        self.until = -math.inf  # when it is no measure any more

    def __repr__(self) -> str:
        return f"<{self.byte:.2g} s a byte, {self.token:.2g} s a token>"

    def note(self, ask: Ask, worker: Worker, now: float) -> None:
        speed = (worker.paces.get(ask.model) or worker.pace_of(ask.model)).speed
        writes = speed.writes(len(worker.leases) + 1)
        if speed.reads is None or writes is None:
            return
        byte = (1 + worker.unread / max(ask.prompt_bytes, 1)) / speed.reads
        rate = RATE if now < self.until else 1.0
        self.byte += rate * (byte - self.byte)
        self.token += rate * (1 / writes - self.token)
        self.until = now + RECENT


def _has(workers: Sequence[Worker], worker: Worker) -> bool:
    place = worker.index  # there it is, in a pool of all workers
    if place < len(workers) and workers[place] is worker:
        return True
    place = place_behind(workers, place - 1)
    return place < len(workers) and workers[place] is worker


def _pays(ask: Ask, match: Match, other: Worker) -> bool:
    """Return whether a request is better off where its conversation is."""
    worker, cached = match.worker, match.cached * match.trust
    tokens = expected_tokens(worker, ask)
    here = expected_seconds(worker, ask, tokens, cached)
    there = expected_seconds(other, ask, tokens, (1 - PRICE) * cached)
    if here is None or there is None:
        return worker.in_flight <= other.in_flight
    return here <= there
