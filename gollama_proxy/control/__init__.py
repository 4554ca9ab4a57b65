"""What a hub has for its operators: the admin API, explanations and events.

`Parts` declares what they need of a hub.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from gollama_proxy.config.settings import Config
    from gollama_proxy.config.watch import Changes, Files
    from gollama_proxy.control.events import Events
    from gollama_proxy.control.history import History, Recent
    from gollama_proxy.control.page import Links
    from gollama_proxy.control.peers import Peers
    from gollama_proxy.control.replies import Replies
    from gollama_proxy.control.workers import Follower
    from gollama_proxy.edge.auth import Authenticator
    from gollama_proxy.edge.quotas import Quotas
    from gollama_proxy.fleet.agents import Agents
    from gollama_proxy.fleet.registry import Registry
    from gollama_proxy.fleet.wake import Waker
    from gollama_proxy.fleet.worker import Worker
    from gollama_proxy.proxy.exchange import Proxy
    from gollama_proxy.proxy.tokens import Fitting
    from gollama_proxy.scheduling.balancer import Balancer
    from gollama_proxy.scheduling.queue import Queue
    from gollama_proxy.state.ledger import Ledger
    from gollama_proxy.state.local import LocalState
    from gollama_proxy.telemetry.metrics import Telemetry


class Parts(Protocol):
    """The parts of a hub that are shown, changed, and shared with other hubs."""

    config: Config
    clock: Callable[[], float]
    state: LocalState
    ledger: Ledger
    files: Files
    authenticator: Authenticator
    quotas: Quotas
    registry: Registry
    agents: Agents
    waker: Waker
    balancer: Balancer
    queue: Queue
    fitting: Fitting
    proxy: Proxy
    telemetry: Telemetry
    recent: Recent
    history: History
    events: Events
    replies: Replies
    links: Links
    follower: Follower
    draining: bool
    peers: Peers | None  # the other hubs; None without a store
    changing: asyncio.Lock  # held while the fleet or the settings change

    @property
    def url(self) -> str:
        """The URL for clients."""

    @property
    def cluster(self) -> Group | None:
        """The hubs that share registrations with this one."""

    async def reload(self) -> Changes:
        """Read the settings again, and apply what has changed."""

    async def revoke(self, kind: str, value: str) -> None:
        """Revoke a token ("jti") or a subject ("sub")."""

    def wake(self, name: str) -> Worker:
        """Wake the machine of a worker; harmless if it does not sleep."""


class Group(Protocol):
    """Hubs that share a store."""

    @property
    def identity(self) -> str: ...
