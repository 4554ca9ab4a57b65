"""The leases of workers that agents register: granted, renewed, expired, released.

An agent runs on a worker's machine and holds its worker's place in the fleet for as
long as it renews a lease.  Nothing here takes its word for where the worker is: a new
address is proved first (see `control/agents.py`), and only an agent that knows the
secret of a registration renews it without another proof.

There is no timer: the hub asks once a second which leases have expired (`expire`).

With a store, an agent may renew its lease at any hub; the others `hear` of it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Agents as Settings
from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.wire.errors import Code, RequestError

# Proofs under way at once: each is one connection, for a few seconds.
MOST_PROOFS = 16
# Seconds by which a lease is longer where it was not renewed: the hub that the agent
# calls is the one that ends it.
GRACE = 5.0


class LeaseState(enum.Enum):
    """The life of a registration."""

    PROVING = "proving"  # the hub connects to the agent at the worker's address
    LEASED = "leased"  # its worker is one of the fleet
    ENDED = "ended"


class LeaseEvent(enum.Enum):
    PROVED = "the agent answered at the worker's address"
    UNPROVED = "it did not"
    RENEWED = "the agent renewed it in time"
    EXPIRED = "the agent did not renew it in time"
    RELEASED = "the agent gave it back, or the worker was removed"


# Any other step is a mistake in the program, and raises KeyError.
TRANSITIONS = {
    (LeaseState.PROVING, LeaseEvent.PROVED): LeaseState.LEASED,
    (LeaseState.PROVING, LeaseEvent.UNPROVED): LeaseState.ENDED,
    (LeaseState.LEASED, LeaseEvent.RENEWED): LeaseState.LEASED,
    (LeaseState.LEASED, LeaseEvent.EXPIRED): LeaseState.ENDED,
    (LeaseState.LEASED, LeaseEvent.RELEASED): LeaseState.ENDED,
}


@dataclass(slots=True)
class WorkerLease:
    """One registration; `agent` is the digest of the secret that its agent made."""

    worker: WorkerConfig
    agent: str = field(repr=False)
    state: LeaseState = LeaseState.PROVING
    expires: float = math.inf  # monotonic seconds
    sleeping: bool = False  # its machine sleeps until the hub wakes it
    # The table that the agent registered last, before a name in it was resolved.
    table: dict[str, Any] = field(default_factory=dict, repr=False)
    # What the agent reports of its machine, as it is shown to operators.
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.worker.name

    def is_of(self, agent: str) -> bool:
        return hmac.compare_digest(self.agent, agent)

    def step(self, event: LeaseEvent) -> None:
        self.state = TRANSITIONS[self.state, event]


class Agents:
    """All registrations, by the names of their workers."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.reconfigure(settings)
        self._clock = clock
        self._leases: dict[str, WorkerLease] = {}
        self._proving: dict[str, WorkerLease] = {}
        # Called with each lease that its agent renews here.
        self.on_renewed: Callable[[WorkerLease], None] | None = None

    def __repr__(self) -> str:
        return f"<Agents leases={len(self._leases)} proving={len(self._proving)}>"

    def reconfigure(self, settings: Settings) -> None:
        """Take other settings for new registrations and renewals."""
        self._settings = settings
        self._networks = [ipaddress.ip_network(text) for text in settings.networks]

    def find(self, name: str) -> WorkerLease | None:
        """Return the lease of a worker, if it has one."""
        return self._leases.get(name)

    # --- Registration -------------------------------------------------------------

    def check_address(self, host: str, peer: str) -> None:
        """Check that an agent that connects from `peer` may register this address.

        Raises:
            RequestError: 403, it may not.
        """
        address = addresses.parse(host)
        assert address is not None, host
        inner = getattr(address, "ipv4_mapped", None) or address
        why = addresses.why_address_refused(inner)
        if not why and inner.is_loopback and not addresses.is_loopback(peer):
            why = "is a loopback address, which means the hub itself to the hub"
        elif not why and not inner.is_loopback:
            networks = (net for net in self._networks if net.version == inner.version)
            if not any(inner in network for network in networks):
                allowed = ", ".join(self._settings.networks) or "none"
                why = f"is outside the networks of agents.networks ({allowed})"
        if why:
            text = f"The address {host} {why}."
            raise RequestError(Code.ADDRESS_REFUSED, text, param="url")

    def begin(self, worker: WorkerConfig, agent: str) -> WorkerLease:
        """Return the lease of this agent; a new one has to be proved first.

        A lease that is PROVING is passed to `conclude` in the end.

        Raises:
            RequestError: 409, another agent has this name at another address, or there
                are too many workers; 429, too many proofs are under way.
        """
        known = self._leases.get(worker.name)
        if known is not None and known.is_of(agent):
            if known.worker.origin == worker.origin:
                return known
        elif known is not None and known.worker.origin != worker.origin:
            text = (
                f"The name {worker.name!r} is taken: another agent has registered "
                f"{known.worker.url} by it. Give each worker its own name."
            )
            raise RequestError(Code.CONFLICT, text, param="name")
        if known is None and len(self._leases) >= self._settings.limit:
            text = (
                f"{len(self._leases)} workers are registered, which is the limit "
                "(agents.limit)."
            )
            raise RequestError(Code.CONFLICT, text)
        if worker.name in self._proving or len(self._proving) >= MOST_PROOFS:
            text = "The hub is checking another registration. Try again in a moment."
            raise RequestError(Code.RATE_LIMITED, text, retry_after=1)
        lease = self._proving[worker.name] = WorkerLease(worker, agent)
        return lease

    def conclude(self, lease: WorkerLease, *, proved: bool) -> None:
        """End a proof: the lease begins, in place of an earlier one, or is dropped."""
        del self._proving[lease.name]
        if not proved:
            lease.step(LeaseEvent.UNPROVED)
            return
        lease.step(LeaseEvent.PROVED)
        self._begin(lease)

    def restore(
        self, worker: WorkerConfig, agent: str, *, sleeping: bool = False
    ) -> None:
        """Grant a lease that another hub has granted; its agent may renew it."""
        lease = WorkerLease(worker, agent, LeaseState.LEASED, sleeping=sleeping)
        known = self._leases.get(worker.name)
        if known is not None and known.is_of(agent):
            lease.report = known.report
        self._begin(lease)

    def _begin(self, lease: WorkerLease) -> None:
        lease.expires = self._clock() + self._settings.lease
        self._leases[lease.name] = lease

    def renew(self, lease: WorkerLease, report: dict[str, Any]) -> None:
        """Prolong a lease, and take up what its agent reports."""
        lease.step(LeaseEvent.RENEWED)
        lease.expires = self._clock() + self._settings.lease
        lease.report = report
        if self.on_renewed is not None:
            self.on_renewed(lease)

    def hear(self, name: str, agent: str, report: dict[str, Any], age: float) -> None:
        """Take up that an agent has renewed its lease at another hub, `age` s ago."""
        lease = self._leases.get(name)
        if lease is None or not lease.is_of(agent):
            return
        expires = self._clock() - age + self._settings.lease + GRACE
        if expires > lease.expires:
            lease.expires, lease.report = expires, report

    def prolong(self) -> None:
        """Prolong all leases: it is not known which are renewed at other hubs."""
        least = self._clock() + self._settings.lease + GRACE
        for lease in self._leases.values():
            lease.expires = max(lease.expires, least)

    # --- Ends ---------------------------------------------------------------------

    def expire(self) -> list[WorkerLease]:
        """End the leases that were not renewed in time, and return them."""
        now = self._clock()
        ended = [
            lease
            for lease in self._leases.values()
            if lease.expires <= now and not lease.sleeping
        ]
        for lease in ended:
            lease.step(LeaseEvent.EXPIRED)
            del self._leases[lease.name]
        return ended

    def release(self, name: str) -> WorkerLease | None:
        """End the lease of a worker, and return it; None if it has none."""
        lease = self._leases.pop(name, None)
        if lease is not None:
            lease.step(LeaseEvent.RELEASED)
        return lease


def answer_to(nonce: str, secret: bytes, name: str) -> bytes:
    """Return what the agent of a worker answers to a nonce, in hexadecimal digits."""
    message = f"{nonce} {name}".encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest().encode()
