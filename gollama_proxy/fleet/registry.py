"""The workers of the hub, which may change, and the models that they serve."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import WeakValueDictionary

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Config, Models, WorkerConfig
from gollama_proxy.config.values import Aliases, ConfigError, is_name, matches, shown
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.speed import Expectations
from gollama_proxy.fleet.worker import Hold, Source, Worker, WorkerState
from gollama_proxy.wire.errors import Code, NoWorkerError, RequestError

# Seconds after which a client may try again: one or two rechecks.
RETRY_AFTER = 2
# How many removed workers are remembered, and for how many seconds: a machine that is
# moved, or an agent that is restarted, comes back with what was learnt about it.
MOST_ABSENT, LONGEST_ABSENCE = 256, 3600.0
LONGEST_NAME = 200  # of a model for which a route is remembered, in characters

_Way = tuple[object, ...]
Claim = tuple[str, ...] | None


class Listener:
    """A part of the hub that follows the fleet; each method does nothing by default."""

    def added(self, worker: Worker) -> None:
        """Notice a worker that takes requests from now on."""

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        """Notice that a worker has other settings; it is still the same server."""

    def changed(self, worker: Worker) -> None:
        """Notice another state, breaker state or hold of a worker, or other models.

        It may be called in the middle of a step of the worker: only take note of it.
        """

    def removed(self, worker: Worker) -> None:
        """Notice that a worker takes no new request; its running answers go on."""

    def gone(self, worker: Worker) -> None:
        """Notice that the last answer of a removed worker has ended."""


class Registry:
    """The workers, the models that they list, and the names that lead to models.

    `allowed` arguments are the patterns of a token's `models` claim; None allows all.
    """

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.workers: list[Worker] = []
        self.leaving: list[Worker] = []  # removed, with answers that still run
        self._indexes = itertools.count()  # none is used twice at a time
        self._absent = BoundedDict[_Way, tuple[Worker, float]](MOST_ABSENT)
        self._clock = clock
        self._listeners: list[Listener] = []
        # Every pool that something refers to; those of served models are kept.
        self._live: WeakValueDictionary[str, Pool] = WeakValueDictionary()
        self._pools = BoundedDict[str, Pool]()
        # Valid until a worker comes, goes, or lists other models.
        self._names: dict[str, None] | None = None
        self._once = BoundedDict[str, None]()  # all names that were ever listed
        self._routes = BoundedDict[tuple[str | None, Claim], Pool]()
        self._adopt(config)
        for each in config.workers:
            if not each.is_group:  # whose members come when they have been looked up
                self.add(each)

    def __repr__(self) -> str:
        return f"<Registry {self.workers!r}>"

    def reconfigure(self, config: Config) -> None:
        """Take other settings; the workers among them are for `apply`."""
        self._adopt(config)
        self._routes.clear()
        for worker in (*self.workers, *self.leaving):
            self._guide(worker)
            worker.freed()

    def _adopt(self, config: Config) -> None:
        self._config = config
        self._models: Models = config.models
        self._aliases = Aliases(config.models.aliases)
        self._fallbacks = {
            self._models.aliases.get(name, name): names
            for name, names in self._models.fallbacks.items()
        }

    def _guide(self, worker: Worker) -> None:
        """Let a worker follow the settings that are the same for all workers."""
        config, timeouts = self._config, self._config.timeouts
        expectations = Expectations(base=timeouts.allowance, hard=timeouts.first_token)
        extra = config.queue.overcommit
        worker.follow(config.health, config.breaker, expectations, extra)

    # --- Workers that come and go -------------------------------------------------

    def subscribe(self, listener: Listener) -> None:
        """Notify a listener of every change, and of the workers that there are."""
        self._listeners.append(listener)
        for worker in self.workers:
            listener.added(worker)

    def add(self, config: WorkerConfig, source: Source = Source.FILE) -> Worker:
        """Add a worker, which gets requests as soon as a health check is good.

        One that was removed not long ago comes back with what was learnt about it, and
        with the answers of it that still run.

        Raises:
            ConfigError: another worker has this name or this address, or this one is
                a group, which only a configuration can have.
        """
        check_single(config)
        self._refuse_clash(config)
        return self._join(config, source)

    def replace(self, config: WorkerConfig, name: str = "") -> Worker:
        """Give a worker other settings; `name` is its old one if that changes, too.

        What was learnt about a worker belongs to its address, and stays for as long as
        that does.  With another address it is another worker: the old one is removed.

        Raises:
            ConfigError: another worker has this name or this address.
            LookupError: there is no such worker.
        """
        worker = self.find(name or config.name)
        check_single(config)
        self._refuse_clash(config, worker)
        if not _same_server(worker.config, config):
            self._retire(worker, self._deadline(None))
            return self._join(config, worker.source, worker.index)
        self._reconfigure(worker, config)
        return worker

    def remove(self, name: str, within: float | None = None) -> Worker:
        """Remove a worker: it gets no new request, and running ones some time to end.

        After `within` seconds, `server.drain` by default, they are broken off there
        and go on elsewhere.

        Raises:
            LookupError: there is no such worker.
        """
        worker = self.find(name)
        self._retire(worker, self._deadline(within))
        return worker

    def pause(self, name: str) -> Worker:
        """Give a worker no new request; running ones go on.

        Raises:
            LookupError: there is no such worker.
        """
        worker = self.find(name)
        worker.hold(Hold.PAUSED)
        return worker

    def drain(self, name: str, within: float | None = None) -> Worker:
        """Give a worker no new request; running ones have some seconds to end.

        What then still runs goes on elsewhere, as after `remove`.

        Raises:
            LookupError: there is no such worker.
        """
        worker = self.find(name)
        worker.hold(Hold.DRAINING, self._deadline(within))
        return worker

    def unpause(self, name: str) -> Worker:
        """End a pause; harmless for a worker that is not paused.

        Raises:
            LookupError: there is no such worker.
        """
        return self._release(name, Hold.PAUSED)

    def undrain(self, name: str) -> Worker:
        """End a drain; harmless for a worker that is not draining.

        Raises:
            LookupError: there is no such worker.
        """
        return self._release(name, Hold.DRAINING)

    def _release(self, name: str, hold: Hold) -> Worker:
        worker = self.find(name)
        if worker.held is hold:
            worker.hold(Hold.NONE)
            worker.freed()
        return worker

    def _deadline(self, within: float | None) -> float:
        return self._clock() + (self._config.server.drain if within is None else within)

    def apply(self, configs: Sequence[WorkerConfig]) -> None:
        """Add, replace and remove workers until those of the file are these.

        Workers from other sources stay as they are.

        Raises:
            ConfigError: two workers have the same name or address; nothing has changed.
        """
        self.check(configs)
        present = {_way(each.config): each for each in self._of_file()}
        kept = {config: present.pop(_way(config), None) for config in configs}
        places = {worker.name: worker.index for worker in present.values()}
        deadline = self._deadline(None)
        for worker in present.values():
            self._retire(worker, deadline)
        for config, known in kept.items():
            if known is not None:
                self._reconfigure(known, config)
        for config, known in kept.items():
            if known is None:
                self._join(config, Source.FILE, places.get(config.name))

    def check(self, configs: Sequence[WorkerConfig]) -> None:
        """Check that these can be the workers of the file.

        Raises:
            ConfigError: one has the name or address of another one of them, or of a
                worker from another source.
        """
        others = [w for w in self.workers if w.source is not Source.FILE]
        check_distinct([*(worker.config for worker in others), *configs])

    def _of_file(self) -> list[Worker]:
        return [each for each in self.workers if each.source is Source.FILE]

    def find(self, name: str) -> Worker:
        """Return the worker of this name.

        Raises:
            LookupError: there is none.
        """
        for worker in self.workers:
            if worker.name == name:
                return worker
        raise LookupError(f"no worker is named {name!r}")

    def _reconfigure(self, worker: Worker, config: WorkerConfig) -> None:
        before = worker.config
        if before == config:
            return
        worker.reconfigure(config)
        self._note_offer(worker)
        for listener in self._listeners:
            listener.replaced(worker, before)
        worker.freed()  # it may have more slots

    def _join(
        self, config: WorkerConfig, source: Source, index: int | None = None
    ) -> Worker:
        """Add a worker, as the last one if its place is not given."""
        worker = self._known_before(config)
        if worker is None:
            worker = Worker(config, self._config.health, self._clock)
            self._guide(worker)
            worker.on_offer = partial(self._note_offer, worker)
            worker.on_change = partial(self._note_change, worker)
        else:
            worker.reconfigure(config)
            self._guide(worker)  # they may have changed while it was gone
            worker.rejoin()
        worker.source = source
        last = self.workers[-1].index if self.workers else -1
        worker.index = next(self._indexes) if index is None else index
        self.workers.append(worker)
        if worker.index < last:
            self.workers.sort(key=lambda each: each.index)
        self._note_offer(worker)
        for listener in self._listeners:
            listener.added(worker)
        return worker

    def _known_before(self, config: WorkerConfig) -> Worker | None:
        """Find the worker of this address that leaves, or was removed not long ago."""
        for worker in self.leaving:
            if _same_server(worker.config, config):
                self.leaving.remove(worker)
                return worker
        absent = self._absent.pop(_way(config), None)
        if absent is None or self._clock() - absent[1] >= LONGEST_ABSENCE:
            return None
        return absent[0]

    def _refuse_clash(self, config: WorkerConfig, old: Worker | None = None) -> None:
        for worker in self.workers:
            same = worker.name == config.name
            if (same or worker.config.origin.meets(config.origin)) and (
                worker is not old
            ):
                check_distinct([worker.config, config])

    def _retire(self, worker: Worker, deadline: float) -> None:
        self.workers.remove(worker)
        self.leaving.append(worker)
        worker.retire(deadline)
        self._note_offer(worker)
        for listener in self._listeners:
            listener.removed(worker)
        if worker.leases:
            worker.on_gone = partial(self._note_gone, worker)
        else:
            self._note_gone(worker)

    def _note_change(self, worker: Worker) -> None:
        for listener in self._listeners:
            listener.changed(worker)

    def _note_gone(self, worker: Worker) -> None:
        self.leaving.remove(worker)
        for listener in self._listeners:
            listener.gone(worker)
        worker.depart()
        way = _way(worker.config)
        self._absent.pop(way, None)  # so that this is the newest one
        self._absent[way] = worker, self._clock()

    def _note_offer(self, worker: Worker) -> None:
        """Correct what depends on what a worker serves: it has changed."""
        here = not worker.retired and worker in self.workers
        for pool in list(self._live.values()):
            serves = here and worker.serves(pool.model)
            if serves != (worker in pool.workers):
                (pool.add if serves else pool.remove)(worker)
        self._names = None
        self._routes.clear()
        if here:
            for model in worker.models:
                self._once[model.name] = None

    # --- Models ------------------------------------------------------------

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
        """Return the name if it is an alias or matches one; else an empty string."""
        if name is None or not self._models.aliases:
            return ""
        return name if self._alias_key(name) is not None else ""

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
            for model in [models.aliases.get(name) or self.model_of(name)]
            if not self.pool(model).workers
        ]

    def _unseen(self) -> list[str]:
        return [worker.name for worker in self.workers if worker.description is None]

    @property
    def ready(self) -> bool:
        """Whether a request can be served, if only by a machine that has to wake."""
        return any(worker.admits or worker.sleeps for worker in self.workers)

    # --- Routes ------------------------------------------------------------------

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
        if allowed is None or key is None or self._aliases[key] != model:
            return False
        if key == name and is_name(key):
            return may_use(allowed, key)
        return key in allowed

    def model_of(self, name: str) -> str:
        """Return the model of an alias; any other name is returned as it is."""
        key = self._alias_key(name)
        return name if key is None else self._aliases[key]

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
        known = model in self._known() or model in self._fallbacks
        return known or bool(self.pool(model).workers)

    def pools_for(
        self, pool: Pool, fallbacks: Sequence[str], allowed: Sequence[str] | None
    ) -> tuple[Pool, ...]:
        """Return a pool and those of its fallbacks, in their order.

        The client's own `fallbacks`, if there are any, replace the configured ones of
        the model.  Fallbacks that its token does not allow are skipped.
        """
        wanted = fallbacks or self._fallbacks.get(pool.model, ())
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


def check_single(config: WorkerConfig) -> None:
    """Check that a worker is not a group of them.

    Raises:
        ConfigError: it is; only the settings file can have groups.
    """
    if config.is_group:
        text = "a group of workers can only be in the settings file"
        raise ConfigError(f"workers.url = {shown(config.url)}: {text}")


def check_distinct(configs: Sequence[WorkerConfig]) -> None:
    """Check that no two workers have the same name or address.

    Raises:
        ConfigError: two of them have.
    """
    names: dict[str, WorkerConfig] = {}
    taken: dict[tuple[str, str, int, str], WorkerConfig] = {}
    for config in configs:
        for place in config.origin.places:
            if (other := taken.setdefault(place, config)) is not config:
                text = f"already used by the worker {other.name!r}"
                raise ConfigError(f"workers.url = {config.url!r}: {text}")
        if (other := names.setdefault(config.name, config)) is not config:
            text = f"already the name of {other.url!r}"
            raise ConfigError(f"workers.name = {config.name!r}: {text}")


def _same_server(one: WorkerConfig, other: WorkerConfig) -> bool:
    """Whether two settings lead to the same address, with the same certificates."""
    return _way(one) == _way(other)


def _way(config: WorkerConfig) -> _Way:
    files = config.ca_file, config.client_certificate, config.client_key
    return config.origin, *files
