"""What a hub shares with others through the store: the parts, their start and stop.

A hub without `state.url` has no cluster, and imports nothing of this.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

from gollama_proxy.config.settings import Config
from gollama_proxy.config.values import ConfigError
from gollama_proxy.control.agents import Renewals
from gollama_proxy.control.events import Events
from gollama_proxy.control.follower import Follower
from gollama_proxy.control.limits import SharedLimits
from gollama_proxy.control.page import Links
from gollama_proxy.control.peers import Peers
from gollama_proxy.control.replies import Peers as Answering
from gollama_proxy.control.replies import Replies
from gollama_proxy.control.stored import GroupMetrics, LinksInStore
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.fleet.agents import Agents
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.shares import shared_key
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.hints import Hints, Reports
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.sharing import Sharing
from gollama_proxy.state.link import StoreError
from gollama_proxy.state.local import State
from gollama_proxy.state.members import Members, describe_me
from gollama_proxy.state.shared import SharedState
from gollama_proxy.state.store import Mode, Store
from gollama_proxy.telemetry.families import METRICS
from gollama_proxy.telemetry.metrics import Telemetry

logger = logging.getLogger(__name__)


class Parts(Protocol):
    """The parts of a hub that share something."""

    config: Config
    state: State
    clock: Callable[[], float]
    follower: Follower
    agents: Agents
    authenticator: Authenticator
    quotas: Quotas
    replies: Replies
    events: Events
    peers: Answering | None
    registry: Registry
    queue: Queue
    telemetry: Telemetry
    links: Links
    balancer: Balancer


class Cluster:
    """The parts of one hub that share something with other hubs."""

    store: Store
    members: Members  # after `open`
    peers: Peers | None = None  # after `start`
    sharing: Sharing  # after `open`

    def __init__(self, hub: Parts) -> None:
        """Prepare; nothing happens before `open`."""
        self._hub = hub
        # How to end what has been started, the last part first.
        self._ends = contextlib.AsyncExitStack()
        state = hub.config.state
        self._me = describe_me(hub.config.process)
        run = self._me.run
        self.store = Store(state.url, state.prefix, hub.clock)
        self.shared = SharedState(hub.state, self.store, run, hub.clock)
        self.shared.on_change = hub.follower.follow
        renewals = Renewals(hub.agents, state.prefix, run)
        self.shared.add(lambda: [renewals])
        self.shared.on_round = self._note_round
        hub.state = self.shared

    def __repr__(self) -> str:
        return f"<Cluster {self.store!r}>"

    @property
    def identity(self) -> str:
        """The same for all hubs that share registrations; empty without the store."""
        return self.store.epoch if self.store.mode is Mode.UP else ""

    async def open(self) -> None:
        """Connect to the store and join the other hubs, before there are clients.

        A store that cannot be reached delays nothing: the hub goes on without it.

        Raises:
            ConfigError: the store can never be used like this.
        """
        try:
            await self._open()
        except BaseException as exc:
            await self.close()
            if not isinstance(exc, StoreError):
                raise
            url = self._hub.config.state.url
            raise ConfigError(f"state.url = {url!r}: {exc}") from exc

    async def _open(self) -> None:
        ends = self._ends
        ends.push_async_callback(self.store.close)
        await self.store.open()
        self.members = Members(self.store, self._me, self._hub.clock)
        self._hub.telemetry.follow_store(self.store, lambda: self.members.count)
        ends.push_async_callback(self.members.stop)
        await self.members.start()
        self.shared.others = lambda: [member.name for member in self.members.all[1:]]
        self._share_limits()
        # The fleet is that of all hubs before the first client comes.
        ends.push_async_callback(self.shared.stop)
        await self.shared.start()
        await self.shared.round()
        self.sharing = self._share_slots()
        ends.push_async_callback(self.sharing.stop)
        await self.sharing.start()
        self._reports = self._make_reports()
        ends.push_async_callback(self._reports.stop)
        await self._reports.start()

    def _note_round(self) -> None:
        """Follow whether the state of this hub is that of all hubs."""
        hub, shared = self._hub, self.shared
        if shared.caught_up:
            if hub.authenticator.suspended:
                logger.warning("the store is reached again: tokens are accepted")
            hub.authenticator.resume()
            return
        hub.agents.prolong()
        self._limits.lose()
        trust = hub.config.state.trust
        if trust and hub.clock() - shared.read_at >= trust:
            before = hub.authenticator.suspended
            hub.authenticator.suspend()
            if hub.authenticator.suspended and not before:
                text = (
                    "the store was not reached for %g s (state.trust): tokens are "
                    "refused, as revocations may have been missed"
                )
                logger.error(text, trust)

    def _share_limits(self) -> None:
        hub, members = self._hub, self.members
        limits = SharedLimits(
            hub.quotas,
            hub.queue.admission,
            hub.queue.look_again,
            prefix=self.store.prefix,
            run=members.me.run,
            clock=hub.clock,
        )
        self.shared.add(lambda: [limits])
        members.on_leave(lambda member: limits.forget(member.run))
        self._limits = limits

    def _share_slots(self) -> Sharing:
        members = self.members
        return Sharing(
            self.store,
            self._hub.registry,
            self._hub.queue,
            self._hub.clock,
            hub=members.me.run,
            machine=members.me.host,
            hubs=lambda: [member.run for member in members.all],
        )

    def _make_reports(self) -> Reports:
        hub, me = self._hub, self.members.me
        hints = Hints(
            hub.registry,
            hub.balancer,
            me.run,
            lambda worker: shared_key(worker.config.origin, me.host),
            hub.clock,
        )
        return Reports(self.store, self.members, hub.balancer, hints, hub.clock)

    async def start(self, url: str) -> None:
        """Begin to serve the other hubs; `url` is where clients reach this one."""
        hub, me, port = self._hub, self.members.me, urlsplit(url).port
        name = f"{me.host}:{port}" if port else me.host
        if number := hub.config.process.number:
            name = f"{name}/{number}"
        await self.members.listens_at(url, name)

        async def collect(_: object) -> dict[str, object]:
            families = await hub.telemetry.collect()
            return {"run": self.members.me.run, "families": families}

        self.peers = Peers(
            self.store,
            self.members,
            {**hub.replies.table, "metrics": collect},
            hub.events.take_news,
            clock=hub.clock,
        )
        self._ends.push_async_callback(self.peers.stop)
        await self.peers.start()
        hub.peers = self.peers
        hub.events.join(self.peers)
        hub.links.shared = LinksInStore(self.store)
        me = self.members.me
        if me.group != me.run:
            group = GroupMetrics(self.store, self.peers, me.group, me.run, METRICS)
            hub.telemetry.others = group.collect

    async def close(self) -> None:
        """Give back what this hub holds, and leave the others; harmless when closed."""
        await self._ends.aclose()
