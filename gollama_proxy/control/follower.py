"""Puts in force what is kept in the state: at the start, and as other hubs change it.

Each worker is compared with what is kept by its name, and made to be like that: added,
changed, removed, held back or released.  So it does not matter how many changes there
were, in which order they came, or which of them were made here.

Settings files may differ from hub to hub.  A worker of the file takes precedence at its
hub over a registered one of the same name or address, which is then left out there, and
is put in force as soon as it fits.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from typing import Protocol

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.load import load_worker
from gollama_proxy.config.settings import Config, Revoked, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Files
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.fleet.agents import Agents
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Hold, Source
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.state.facts import Key, StoredWorker
from gollama_proxy.state.local import State
from gollama_proxy.tasks import spawn

logger = logging.getLogger(__name__)

BATCH = 100  # workers that are followed between two turns of the event loop


class Parts(Protocol):
    """The parts of a hub that follow the state."""

    @property
    def config(self) -> Config: ...
    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def state(self) -> State: ...
    @property
    def agents(self) -> Agents: ...
    @property
    def changing(self) -> asyncio.Lock: ...
    @property
    def files(self) -> Files: ...


class Follower:
    """Keeps the fleet and the revocations of a hub as its state has them."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._listed = hub.config.revoked  # in the file of revoked tokens
        self._pending: set[Key] = set()
        # Workers that do not fit, and why.
        self._left_out: dict[str, str] = BoundedDict(1000)
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def __repr__(self) -> str:
        left_out = len(self._left_out)
        return f"<Follower pending={len(self._pending)} left_out={left_out}>"

    def restore(self) -> None:
        """Take up what an earlier hub left in the state folder."""
        self.put_revocations_in_force()
        for stored in self._hub.state.workers:
            if stored.settings:
                self._settle(stored.name, stored)
        self.restore_holds()

    def restore_holds(self) -> None:
        """Hold back the workers that operators have held back, by their names."""
        for worker in self._hub.registry.workers:
            kept = self._hub.state.find(worker.name)
            if kept is not None and kept.hold and worker.held is Hold.NONE:
                worker.hold(Hold(kept.hold))

    # --- Revocations ------------------------------------------------------------------

    def follow_list(self, listed: Revoked) -> None:
        """Take up a new list from the file of revoked tokens."""
        self._listed = listed
        self.put_revocations_in_force()

    def put_revocations_in_force(self) -> None:
        stored, listed = self._hub.state.revoked, self._listed
        if stored or listed:
            both = Revoked(
                listed.tokens | stored.tokens, listed.subjects | stored.subjects
            )
            self._hub.authenticator.revoke(both)

    # --- What other hubs have changed -------------------------------------------------

    def follow(self, changed: Iterable[Key]) -> None:
        """Put changes of other hubs in force: revocations now, workers soon."""
        revoked = False
        for key in changed:
            if key[0] in ("worker", "hold"):
                self._pending.add(key)
            else:
                revoked = True
        if revoked:
            self.put_revocations_in_force()
        ready = self._task is None or self._task.done()
        if self._pending and ready and not self._stopped:
            self._task = spawn(self._follow(), "changes of other hubs")

    async def stop(self) -> None:
        """Follow nothing more, and wait until what has come is in force."""
        self._stopped = True
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _follow(self) -> None:
        while self._pending:
            async with self._hub.changing:
                count = min(len(self._pending), BATCH)
                self.settle([self._pending.pop() for _ in range(count)])
                self.retry()
            await asyncio.sleep(0)

    def settle(self, keys: Iterable[Key]) -> None:
        """Make workers be as the state has them; the caller holds `Hub.changing`."""
        for kind, name in sorted(keys, reverse=True):  # first the worker, then its hold
            stored = self._hub.state.find(name)
            if kind == "worker":
                self._settle(name, stored)
            self._settle_hold(name, stored)

    def retry(self) -> None:
        """Try again what did not fit; the caller holds `Hub.changing`."""
        self.settle([("worker", name) for name in self._left_out])

    def _settle(self, name: str, stored: StoredWorker | None) -> None:
        """Add, change or remove a worker; one that does not fit is left out."""
        if stored is None or not stored.settings:
            self._left_out.pop(name, None)
            self._remove(name)
            return
        source = Source(stored.source)
        try:
            config = self._load(stored)
            worker = self._find(name)
            if worker is not None and worker.source is Source.FILE:
                raise ConfigError("the settings file has a worker of this name")
            if worker is not None and worker.source is not source:
                self._hub.registry.remove(name)
                worker = None
            if worker is None:
                self._hub.registry.add(config, source)
                logger.debug("worker %s: added as it is stored", name)
            elif worker.config != config:
                self._hub.registry.replace(config)
        except ConfigError as exc:
            # The settings file has its name or address now, or a key is missing.
            if self._left_out.get(name) != str(exc):
                text = "the stored worker %r is left out: %s"
                logger.warning(text, name, exc)
            self._left_out[name] = str(exc)
            return
        self._left_out.pop(name, None)
        if source is Source.AGENT:
            self._settle_lease(config, stored)

    def _remove(self, name: str) -> None:
        worker = self._find(name)
        if worker is not None and worker.source is not Source.FILE:
            self._hub.registry.remove(name)
            logger.info("worker %s: removed at another hub", name)

    def _load(self, stored: StoredWorker) -> WorkerConfig:
        row = {**stored.settings, "name": stored.name}
        if models := stored.agent.get("models"):
            row.setdefault("models", models)  # while its machine sleeps
        return load_worker(stored.name, row, os.environ)

    def _settle_lease(self, config: WorkerConfig, stored: StoredWorker) -> None:
        digest = str(stored.agent.get("digest", ""))
        sleeping = bool(stored.agent.get("sleeping"))
        lease = self._hub.agents.find(stored.name)
        known = lease is not None and lease.is_of(digest) and lease.worker == config
        if lease is None or not known or lease.sleeping is not sleeping:
            self._hub.agents.restore(config, digest, sleeping=sleeping)

    def _settle_hold(self, name: str, stored: StoredWorker | None) -> None:
        worker, registry = self._find(name), self._hub.registry
        hold = Hold(stored.hold) if stored is not None and stored.hold else Hold.NONE
        if worker is None or worker.held is hold:
            return
        if hold is Hold.DRAINING:
            registry.drain(name)
        elif hold is Hold.PAUSED:
            registry.pause(name)
        elif worker.held is Hold.DRAINING:
            registry.undrain(name)
        else:
            registry.unpause(name)
        text = {Hold.NONE: "released", Hold.DRAINING: "drained", Hold.PAUSED: "paused"}
        logger.info("worker %s: %s at another hub", name, text[hold])

    def _find(self, name: str) -> Worker | None:
        try:
            return self._hub.registry.find(name)
        except LookupError:
            return None
