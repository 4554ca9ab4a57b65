"""The live list of workers, and which of them serve the model that a client names."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from gollama_proxy.bounded import Remembered
from gollama_proxy.config.names import Aliases, is_name, matches
from gollama_proxy.config.settings import Config, Models
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.slowness import Expectations
from gollama_proxy.fleet.worker import Worker, WorkerState
from gollama_proxy.wire.errors import Code, NoWorkerError, RequestError

# How long a client should wait before it asks again: one or two rechecks.
RETRY_AFTER = 2


class Registry:
    """Workers by configuration, models by what the workers told.

    `allowed` arguments are the patterns of a token's `models` claim; None allows all.
    """

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.workers = [
            Worker(
                worker,
                config.health,
                clock,
                index,
                policy=config.breaker,
                overcommit=config.queue.overcommit,
                expectations=Expectations(
                    base=config.timeouts.allowance, hard=config.timeouts.first_token
                ),
            )
            for index, worker in enumerate(config.workers)
        ]
        self._models: Models = config.models
        self._aliases = Aliases(config.models.aliases)
        self._pools = Remembered[str, Pool]()
        self._fallbacks = {
            self._models.aliases.get(name, name): names
            for name, names in self._models.fallbacks.items()
        }
        # What holds until some worker tells something else.
        self._names: dict[str, None] | None = None
        self._once = Remembered[str, None]()  # names that were known at some time
        self._settled = Remembered[str, None]()  # models whose pool is as it should be
        self._least = Remembered[str, int | None]()  # context, by model
        for worker in self.workers:
            worker.on_told = self._forget

    def __repr__(self) -> str:
        return f"<Registry {self.workers!r}>"

    # --- What there is ------------------------------------------------------------

    def models(self) -> list[str]:
        """List the names of all models that any worker is known to serve."""
        return list(self._known())

    def _known(self) -> dict[str, None]:
        if self._names is None:
            self._names = {
                model.name: None for worker in self.workers for model in worker.models
            }
            for name in self._names:
                self._once[name] = None
        return self._names

    def _forget(self) -> None:
        """Take in that a worker serves something else than before."""
        self._names = None
        self._settled.clear()
        self._least.clear()
        self._known()  # lest a name be missed that no request asks for

    def aliases(self) -> dict[str, str]:
        """List the configured other names, and the model that each stands for.

        Patterns are no names.
        """
        return self._aliases.names

    def alias_of(self, name: str | None) -> str:
        """Give a name back if it is configured to stand for a model, else nothing."""
        return name if name is not None and self._alias_key(name) is not None else ""

    def pool(self, model: str) -> Pool:
        """Give the pool of a model: the same object for as long as it is the same."""
        pool = self._pools.get(model)
        if pool is not None and model in self._settled:
            return pool
        workers = tuple(worker for worker in self.workers if worker.serves(model))
        if pool is None or pool.workers != workers:
            pool = Pool(model, workers)
        if workers:  # or clients could grow it by names that they make up
            self._pools[model] = pool
            self._settled[model] = None
        return pool

    def least_context(self, pool: Pool) -> int | None:
        """Tell the smallest context in a pool, in tokens; None if none is known."""
        model, workers = pool
        if model not in self._least:
            contexts = [worker.context_of(model) for worker in workers]
            known = [context for context in contexts if context is not None]
            self._least[model] = min(known, default=None)
        return self._least[model]

    def only_model(self) -> str | None:
        """Name the one model that every worker serves, if there is just one.

        A request then needs no name: llama-server ignores it anyway.
        """
        names = self._known()
        if len(names) != 1 or self._models.strict_models:
            return None
        return next(iter(names))

    def unserved(self) -> list[str]:
        """Tell of each name in the settings that leads to a model of no worker."""
        models, told = self._models, []
        if models.default_model:
            told.append(("default_model", models.default_model))
        told += [(f"aliases: {key!r}", key) for key in models.aliases]
        for key, fallbacks in models.fallbacks.items():
            where = f"fallbacks: {key!r}"
            told += [(where, key), *((where, name) for name in fallbacks)]
        unseen = self._unseen()
        more = f" (not reached yet: {', '.join(unseen)})" if unseen else ""
        return [
            f"models.{where}: no worker serves {model!r}{more}"
            for where, name in told
            for model in [models.aliases.get(name) or self.model_of(name)]
            if not self.pool(model).workers
        ]

    def _unseen(self) -> list[str]:
        return [worker.name for worker in self.workers if worker.description is None]

    @property
    def ready(self) -> bool:
        return any(worker.admits for worker in self.workers)

    # --- Whom to ask --------------------------------------------------------------

    def resolve(self, name: str | None, allowed: Sequence[str] | None) -> Pool:
        """Find the pool for the model that a client named, or named not.

        Raises:
            RequestError: 400 no name, 403 the token does not allow it, 404 unknown.
            NoWorkerError: 503, nobody has been reached yet, so that nothing is known.
        """
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
        """Tell whether a token allows the model that a client's name stands for.

        An alias may be allowed in place of its model.  Any other name that stands for a
        model is the client's own invention, and allows nothing.  That goes for names
        that a wildcard catches, too: what has to be in the claim is the wildcard as it
        is configured, to the letter, lest `llama-x` be a way through `*` to any model.
        """
        if may_use(allowed, model):
            return True
        key = None if name is None else self._alias_key(name)
        if allowed is None or key is None or self._aliases[key] != model:
            return False
        if key == name and is_name(key):
            return may_use(allowed, key)
        return key in allowed

    def model_of(self, name: str) -> str:
        """Tell the model that a name stands for; a name that is no alias is its own."""
        key = self._alias_key(name)
        return name if key is None else self._aliases[key]

    def _alias_key(self, name: str) -> str | None:
        """Find the alias that a name is, or the wildcard that catches it.

        A model that is served is not caught, so that `*` is for the rest.
        """
        if name in self._aliases:
            return name
        key = self._aliases.pattern(name)
        return None if key is None or self._is_served(name) else key

    def _is_served(self, model: str) -> bool:
        # One that has a fallback is known, though nobody was seen yet to serve it.
        known = model in self._known() or model in self._fallbacks
        return known or bool(self.pool(model).workers)

    def fallbacks_of(self, model: str) -> Sequence[str]:
        """Return the configured fallbacks of a model, by the names of the settings."""
        return self._fallbacks.get(model, ())

    def _resolve_name(self, name: str | None) -> str | None:
        if name is not None:
            model = self.model_of(name)
            # An alias stands for its model and no other, whether that is served or not.
            if self.alias_of(name) or self._is_served(model):
                return model
            if self._models.strict_models:
                return None
            if model in self._once and not self._models.default_model:
                return None  # a model that has gone, and not a name that was made up
        default = self._models.default_model
        return self.model_of(default) if default else self.only_model()

    # --- How to say no ------------------------------------------------------------

    def _offer(self, models: Iterable[str], allowed: Sequence[str] | None) -> str:
        names = sorted({*models, *self.aliases()})
        names = [name for name in names if may_use(allowed, name)]
        text = f"Available: {', '.join(names) or 'nothing that your token allows'}."
        if unseen := self._unseen():
            text += f" Not reached yet: {', '.join(unseen)}."
        return text

    def no_worker(
        self, model: str | None, workers: Sequence[Worker], reopens_in: float = 0.0
    ) -> NoWorkerError:
        """Make the error of a model that none of these workers can serve now."""
        what = f"the model {model!r}" if model else "this request"
        if not self.workers:
            text = f"No worker serves {what}: the hub has none configured."
        else:
            states = Counter(
                _state_of(worker, model) for worker in workers or self.workers
            )
            told = ", ".join(f"{n} {state}" for state, n in states.items())
            whose = "serve it" if workers else "known, none seen to serve it"
            count = len(workers or self.workers)
            text = f"No worker is available for {what}: {count} {whose} ({told})."
        wait = max(RETRY_AFTER, math.ceil(reopens_in))
        return NoWorkerError(Code.NO_WORKER, text, retry_after=wait)


def _state_of(worker: Worker, model: str | None) -> str:
    """Name what keeps a worker from being used, as an operator would."""
    if worker.state is not WorkerState.READY or worker.can_serve(model or ""):
        return worker.state.value
    shut = [b.state.value for b in worker.breakers(model or "") if not b.closed]
    return f"breaker {shut[0]}" if shut else "busy"


def may_use(allowed: Sequence[str] | None, model: str) -> bool:
    """Tell whether a `models` claim covers a model name; patterns are shell-like."""
    return allowed is None or matches(model, allowed)
