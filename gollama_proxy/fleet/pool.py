"""The workers that serve one model name, and the names in requests that lead there.

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
from collections import Counter
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Models
from gollama_proxy.config.values import Aliases, is_name, matches
from gollama_proxy.fleet.state import Hold, WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.errors import Code, NoWorkerError, RequestError

LOAD_AFTER = 10.0  # seconds
# Seconds after which a client may try again: one or two rechecks.
RETRY_AFTER = 2
LATEST = ":latest"  # the tag of a model of Ollama that has no other
LONGEST_NAME = 200  # of a model for which a route is remembered, in characters

Claim = tuple[str, ...] | None


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
        "selects",
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
        # Some worker is known not to take pictures, sound or video; valid once
        # `least_context` has been read.
        self.selects = False

    # --- Workers that can take a request ------------------------------------------

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
        self.selects = any(worker.refuses(self.model) for worker in self.workers)
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


# --- Names ------------------------------------------------------------------------


class Pools:
    """The pools of all models, and the names that lead to them.

    `allowed` arguments are the patterns of a token's `models` claim; None allows all.
    """

    def __init__(self, models: Models) -> None:
        self.workers: list[Worker] = []
        # Every pool that something refers to; those of served models are kept.
        self._live: WeakValueDictionary[str, Pool] = WeakValueDictionary()
        self._pools = BoundedDict[str, Pool]()
        # Valid until a worker comes, goes, or lists other models.
        self._names: dict[str, None] | None = None
        self._once = BoundedDict[str, None]()  # all names that were ever listed
        self._routes = BoundedDict[tuple[str | None, Claim], Pool]()
        self._take(models)

    def __repr__(self) -> str:
        return f"<Pools of {len(self.workers)} workers>"

    def rename(self, models: Models) -> None:
        """Take other aliases, fallbacks and defaults."""
        self._take(models)
        self._routes.clear()

    def _take(self, models: Models) -> None:
        self._models = models
        self._aliases = Aliases(models.aliases)
        self._fallbacks = {
            models.aliases.get(name, name): names
            for name, names in models.fallbacks.items()
        }

    def follow(self, worker: Worker, *, here: bool) -> None:
        """Correct what depends on what a worker serves, and on whether it is here."""
        for pool in list(self._live.values()):
            serves = here and worker.serves(pool.model)
            if serves != (worker in pool.workers):
                (pool.add if serves else pool.remove)(worker)
        self._names = None
        self._routes.clear()
        if here:
            for model in worker.models:
                self._once[model.name] = None

    # --- Models -------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return the names of all models that some worker serves."""
        return list(self._known())

    def _known(self) -> dict[str, None]:
        if self._names is None:
            self._names = {
                model.name: None for worker in self.workers for model in worker.models
            }
        return self._names

    def aliases(self) -> dict[str, str]:
        """Return the configured aliases, without patterns, and their models."""
        return self._aliases.names

    def alias_of(self, name: str | None) -> str:
        """Return the name if it stands for another one; else an empty string.

        It is an alias, or matches one, or lacks a tag.
        """
        if name is None:
            return ""
        stands = self._alias_key(name) is not None or self._in_full(name) != name
        return name if stands else ""

    def pool(self, model: str) -> Pool:
        """Return the pool of a model: one object, as long as something refers to it."""
        pool = self._pools.get(model)
        if pool is not None:
            return pool
        pool = self._live.get(model)
        if pool is None:
            pool = Pool(model, (w for w in self.workers if w.serves(model)))
            self._live[model] = pool
        if pool.workers:  # otherwise clients could fill it with invented names
            self._pools[model] = pool
        return pool

    def only_model(self) -> str | None:
        """Return the only model that is served, or None if there are several.

        A request then needs no name: llama-server ignores it anyway.
        """
        names = self._known()
        if len(names) != 1 or self._models.strict_models:
            return None
        return next(iter(names))

    def unserved(self) -> list[str]:
        """Describe each name in the settings whose model no worker serves."""
        models, named = self._models, []
        if models.default_model:
            named.append(("default_model", models.default_model))
        named += [(f"aliases: {key!r}", key) for key in models.aliases]
        for key, fallbacks in models.fallbacks.items():
            where = f"fallbacks: {key!r}"
            named += [(where, key), *((where, name) for name in fallbacks)]
        unseen = self._unseen()
        more = f" (not reached yet: {', '.join(unseen)})" if unseen else ""
        return [
            f"models.{where}: no worker serves {model!r}{more}"
            for where, name in named
            for alias in [models.aliases.get(name)]
            for model in [self._in_full(alias) if alias else self.model_of(name)]
            if not self.pool(model).workers
        ]

    def _unseen(self) -> list[str]:
        return [worker.name for worker in self.workers if worker.description is None]

    # --- Routes -------------------------------------------------------------------

    def resolve(self, name: str | None, allowed: Sequence[str] | None) -> Pool:
        """Return the pool for the name in a request, which may have none.

        Raises:
            RequestError: 400 no name, 403 not allowed by the token, 404 unknown.
            NoWorkerError: 503, no worker has been reached yet, so no model is known.
        """
        key = name, None if allowed is None else tuple(allowed)
        pool = self._routes.get(key)
        if pool is not None:
            return pool
        pool = self._resolve(name, allowed)
        if len(name or "") <= LONGEST_NAME:
            self._routes[key] = pool
        return pool

    def _resolve(self, name: str | None, allowed: Sequence[str] | None) -> Pool:
        models = self._known()
        if not models:
            raise self.no_worker(name, ())
        model = self._resolve_name(name)
        if model is None and name is None:
            text = f"`model` is missing. {self._offer(models, allowed)}"
            raise RequestError(Code.MODEL_MISSING, text, param="model")
        if model is None:
            text = f"The model {name!r} does not exist. {self._offer(models, allowed)}"
            raise RequestError(Code.MODEL_NOT_FOUND, text, param="model")
        if not self.allows(allowed, name, model):
            text = f"Your token does not allow the model {name or model!r}."
            raise RequestError(Code.MODEL_NOT_ALLOWED, text, param="model")
        return self.pool(model)

    def allows(
        self, allowed: Sequence[str] | None, name: str | None, model: str
    ) -> bool:
        """Return whether a token allows the model that the client's name leads to.

        An alias may be allowed instead of its model.  For a name that a wildcard alias
        matches, the claim has to hold that wildcard exactly as it is configured:
        otherwise a token for `llama-x` could reach the model behind `*`.  Any other
        name was invented by the client, and allows nothing.
        """
        if may_use(allowed, model):
            return True
        key = None if name is None else self._alias_key(name)
        if name is not None and name + LATEST == model and may_use(allowed, name):
            return True
        if allowed is None or key is None or self.model_of(key) != model:
            return False
        if key == name and is_name(key):
            return may_use(allowed, key)
        return key in allowed

    def model_of(self, name: str) -> str:
        """Return the model of an alias; any other name is returned as it is.

        Of Ollama's models, `llama3.2` is short for `llama3.2:latest`.
        """
        key = self._alias_key(name)
        return self._in_full(name if key is None else self._aliases[key])

    def _in_full(self, model: str) -> str:
        """Return the name of a model with its tag, if it is served by that only."""
        tagged, known = model + LATEST, self._known()
        return tagged if tagged in known and model not in known else model

    def _alias_key(self, name: str) -> str | None:
        """Return the alias that a name is, or the wildcard alias that it matches.

        A model that is served matches none, so that `*` is for all other names.
        """
        if name in self._aliases:
            return name
        key = self._aliases.pattern(name)
        return None if key is None or self._is_served(name) else key

    def _is_served(self, model: str) -> bool:
        # A model with fallbacks counts as served even before a worker has listed it.
        known = self._in_full(model) in self._known() or model in self._fallbacks
        return known or bool(self.pool(model).workers)

    def pools_for(
        self, pool: Pool, fallbacks: Sequence[str], allowed: Sequence[str] | None
    ) -> tuple[Pool, ...]:
        """Return a pool and those of its fallbacks, in their order.

        The client's own `fallbacks`, if there are any, replace the configured ones of
        the model.  Fallbacks that its token does not allow are skipped.
        """
        if not (fallbacks or self._fallbacks):
            return (pool,)
        model = pool.model
        wanted = fallbacks or self._fallbacks.get(model, ())
        if not wanted and model.endswith(LATEST):
            wanted = self._fallbacks.get(model.removesuffix(LATEST), ())
        if not wanted:
            return (pool,)
        models = dict.fromkeys(
            model
            for name in wanted
            for model in [self.model_of(name)]
            if model != pool.model and self.allows(allowed, name, model)
        )
        return (pool, *map(self.pool, models))

    def _resolve_name(self, name: str | None) -> str | None:
        if name is not None:
            model = self.model_of(name)
            # An alias leads to its model only, whether that is served or not.
            if self.alias_of(name) or self._is_served(model):
                return model
            if self._models.strict_models:
                return None
            if model in self._once and not self._models.default_model:
                return None  # a model that was served, not a name that was invented
        default = self._models.default_model
        return self.model_of(default) if default else self.only_model()

    # --- Errors -------------------------------------------------------------------

    def _offer(self, models: Iterable[str], allowed: Sequence[str] | None) -> str:
        names = sorted({*models, *self.aliases()})
        names = [name for name in names if may_use(allowed, name)]
        text = f"Available: {', '.join(names) or 'nothing that your token allows'}."
        if unseen := self._unseen():
            text += f" Not reached yet: {', '.join(unseen)}."
        return text

    def no_worker(
        self,
        model: str | None,
        workers: Sequence[Worker],
        reopens_in: float = 0.0,
        note: str = "",
    ) -> NoWorkerError:
        """Return the error for a model that none of these workers can serve now.

        A `note` is a further sentence, after a space.
        """
        what = f"the model {model!r}" if model else "this request"
        if not self.workers:
            text = f"No worker serves {what}: the hub has none configured."
        else:
            states = Counter(
                _state_of(worker, model) for worker in workers or self.workers
            )
            counts = ", ".join(f"{n} {state}" for state, n in states.items())
            whose = "serve it" if workers else "known, none seen to serve it"
            count = len(workers or self.workers)
            text = f"No worker is available for {what}: {count} {whose} ({counts})."
        wait = max(RETRY_AFTER, math.ceil(reopens_in))
        return NoWorkerError(Code.NO_WORKER, text + note, retry_after=wait)


def _state_of(worker: Worker, model: str | None) -> str:
    """Describe why a worker takes no requests, in an operator's words."""
    if worker.state is not WorkerState.READY or worker.can_serve(model or ""):
        return worker.state.value
    if worker.held is not Hold.NONE:
        return worker.held.value
    shut = [b.state.value for b in worker.breakers(model or "") if not b.closed]
    return f"breaker {shut[0]}" if shut else "busy"


def may_use(allowed: Sequence[str] | None, model: str) -> bool:
    """Return whether a `models` claim covers a name; patterns are shell-like."""
    return allowed is None or matches(model, allowed)
