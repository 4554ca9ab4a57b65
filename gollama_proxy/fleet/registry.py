"""The workers of the hub, which may change, and the models that they serve."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Config, WorkerConfig
from gollama_proxy.config.values import ConfigError, shown
from gollama_proxy.fleet.pool import Pools
from gollama_proxy.fleet.speed import Expectations
from gollama_proxy.fleet.state import Hold, Source
from gollama_proxy.fleet.worker import Worker

# How many removed workers are remembered, and for how many seconds: a machine that is
# moved, or an agent that is restarted, comes back with what was learnt about it.
MOST_ABSENT, LONGEST_ABSENCE = 256, 3600.0

_Way = tuple[object, ...]


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


class Registry(Pools):
    """The workers, which come and go, and the pools of the models that they list."""

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(config.models)
        self.leaving: list[Worker] = []  # removed, with answers that still run
        self._indexes = itertools.count()  # none is used twice at a time
        self._absent = BoundedDict[_Way, tuple[Worker, float]](MOST_ABSENT)
        self._clock = clock
        self._listeners: list[Listener] = []
        self._config = config
        for each in config.workers:
            if not each.is_group:  # whose members come when they have been looked up
                self.add(each)

    def __repr__(self) -> str:
        return f"<Registry {self.workers!r}>"

    def reconfigure(self, config: Config) -> None:
        """Take other settings; the workers among them are for `apply`."""
        self._config = config
        self.rename(config.models)
        for worker in (*self.workers, *self.leaving):
            self._guide(worker)
            worker.freed()

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

    def hold(self, name: str, hold: Hold, within: float | None = None) -> Worker:
        """Give a worker no new request.

        Running ones go on if it is PAUSED.  If it is DRAINING, they have some seconds
        to end; what then still runs goes on elsewhere, as after `remove`.

        Raises:
            LookupError: there is no such worker.
        """
        worker = self.find(name)
        draining = hold is Hold.DRAINING
        worker.hold(hold, self._deadline(within) if draining else math.inf)
        return worker

    def release(self, name: str, hold: Hold) -> Worker:
        """End a hold; harmless for a worker that is not held, or for another reason.

        Raises:
            LookupError: there is no such worker.
        """
        worker = self.find(name)
        if worker.held is hold:
            worker.hold(Hold.NONE)
            worker.freed()
        return worker

    def _deadline(self, within: float | None) -> float:
        return self._clock() + (self._config.server.drain if within is None else within)

    def apply(self, configs: Sequence[WorkerConfig], most: int | None = None) -> bool:
        """Add, replace and remove workers until those of the file are these.

        Workers from other sources stay as they are.  At most `most` new ones are added,
        in the order of `configs`.  If there are more, nothing else changes yet, and the
        result is False: the caller has to call again.

        Raises:
            ConfigError: two workers have the same name or address; nothing has changed.
        """
        self.check(configs)
        present = {_way(each.config): each for each in self._of_file()}
        pairs = [(config, present.pop(_way(config), None)) for config in configs]
        going = present.values()
        names = {worker.name for worker in self.workers}
        taken = {place for worker in going for place in worker.config.origin.places}
        new: list[WorkerConfig] = []
        moved: list[WorkerConfig] = []
        for config, known in pairs:
            if known is None:
                free = taken.isdisjoint(config.origin.places)
                (new if free and config.name not in names else moved).append(config)
        for config in new[:most]:
            self._join(config, Source.FILE)
        if most is not None and len(new) > most:
            return False
        indexes = {worker.name: worker.index for worker in going}
        deadline = self._deadline(None)
        for worker in going:
            self._retire(worker, deadline)
        for config, known in pairs:
            if known is not None:
                self._reconfigure(known, config)
        for config in moved:
            self._join(config, Source.FILE, indexes.get(config.name))
        return True

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
        if (worker := self.get(name)) is None:
            raise LookupError(f"no worker is named {name!r}")
        return worker

    def get(self, name: str) -> Worker | None:
        """Return the worker of this name; None if there is none."""
        return next((each for each in self.workers if each.name == name), None)

    @property
    def ready(self) -> bool:
        """Whether a request can be served, if only by a machine that has to wake."""
        return any(worker.admits or worker.sleeps for worker in self.workers)

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
        self.follow(worker, here=not worker.retired and worker in self.workers)


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
