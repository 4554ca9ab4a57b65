"""The workers that serve one model name, and those of them that can take a request.

A pool follows the fleet: the registry adds and removes workers while requests hold the
pool, and each worker reports its transitions to the pools that it is in.  Which workers
can take a request is therefore computed when it changes, and not for every request.

A worker in router mode loads a model when it is asked for it, which takes up to minutes
and may cost another model its place.  Waiting for a slot elsewhere is usually quicker,
so a worker that has the model loaded goes before one that has not, even if it is busy.
Once every worker that has it loaded has been full for `LOAD_AFTER` seconds without a
break, there is more work than they can do, and another one may load it.  While a worker
is loading the model, no second one is asked to load it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gollama_proxy.fleet.worker import Worker, WorkerState

LOAD_AFTER = 10.0  # seconds


class Pool:
    """The workers that serve one model name, in the configured order."""

    __slots__ = (
        "__weakref__",
        "_able",
        "_able_until",
        "_contexts",
        "_unloaded",
        "missed",
        "model",
        "workers",
    )

    def __init__(self, model: str, workers: Iterable[Worker] = ()) -> None:
        self.model = model
        self.missed = False  # a request went to a fallback, as none was available
        self.workers = tuple(workers)
        for worker in self.workers:
            worker.pools.add(self)
        self.forget()

    def __repr__(self) -> str:
        return f"<Pool of {len(self.workers)} workers>"

    # --- The fleet ----------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        last = self.workers[-1].index if self.workers else -1
        self.workers = (*self.workers, worker)
        if worker.index < last:
            self.workers = tuple(sorted(self.workers, key=lambda each: each.index))
        worker.pools.add(self)
        self.forget()

    def remove(self, worker: Worker) -> None:
        self.workers = tuple(each for each in self.workers if each is not worker)
        worker.pools.discard(self)
        self.forget()

    def forget(self) -> None:
        """Drop what was computed: a worker has changed."""
        self._able: list[Worker] | None = None
        self._able_until = math.inf  # when time alone may change it
        self._unloaded = False  # some worker would have to load the model
        self._contexts: tuple[int, ...] | None = None  # those that are known, sorted

    # --- Who can take a request ---------------------------------------------------

    @property
    def able(self) -> list[Worker]:
        """The workers that a request may be sent to; not to be modified."""
        able = self._able
        if able is not None and (
            self._able_until == math.inf or self.workers[0].clock() < self._able_until
        ):
            return able
        model = self.model
        # A look at a breaker may be what moves it on, so the moments come second.
        able = [worker for worker in self.workers if worker.can_serve(model)]
        moments = [worker.next_change(model) for worker in self.workers]
        self._able_until = min(moments, default=math.inf)
        self._unloaded = any(worker.loads(model) for worker in able)
        self._able = able
        return able

    @property
    def available(self) -> list[Worker]:
        """The workers that the next request should be sent to; not to be modified."""
        able = self._able
        if able is None or self._able_until < math.inf:
            able = self.able
        return self.preferred(able) if self._unloaded else able

    def preferred(self, workers: list[Worker]) -> list[Worker]:
        """Leave out those that would have to load the model, while others have it."""
        if not any(worker.loads(self.model) for worker in workers):
            return workers
        loaded = [worker for worker in workers if not worker.loads(self.model)]
        loaded = loaded or [w for w in workers if not w.is_cold(self.model)]
        if not loaded or all(worker.full_for >= LOAD_AFTER for worker in loaded):
            return workers
        return loaded

    @property
    def least_context(self) -> int | None:
        """The smallest context of a worker, in tokens; None if none is known."""
        contexts = self._contexts
        if contexts is None:
            contexts = self._sort_contexts()
        return contexts[0] if contexts else None

    @property
    def largest_context(self) -> int:
        """The largest context of a worker, in tokens; 0 if none is known."""
        contexts = self._contexts
        if contexts is None:
            contexts = self._sort_contexts()
        return contexts[-1] if contexts else 0

    def _sort_contexts(self) -> tuple[int, ...]:
        contexts = [worker.context_of(self.model) for worker in self.workers]
        known = [context for context in contexts if context is not None]
        self._contexts = tuple(sorted(known))
        return self._contexts

    def busy_for(self) -> float:
        """Return the seconds until some worker is no longer busy; inf if none is."""
        waits = [
            worker.opens_in(self.model)
            for worker in self.workers
            if worker.is_busy_with(self.model)
        ]
        return min(waits, default=math.inf)

    def reopens_in(self) -> float:
        """Return the seconds until some worker that is out may prove itself again."""
        waits = [
            worker.opens_in(self.model)
            for worker in self.workers
            if worker.state is WorkerState.READY and worker.takes_requests
        ]
        return min(waits, default=0.0)
