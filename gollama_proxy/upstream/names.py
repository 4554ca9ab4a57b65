"""Names of workers: their addresses, and the groups of workers behind them.

The configuration is checked when it is loaded.  What a name resolves to is chosen by
others and can change (DNS rebinding), so the addresses are checked as well, and the
connection goes to an address that was checked, not to the name.  A name may have
several addresses: in many home networks one of them is link-local, and is skipped.

A worker with the URL `dns+http://llama.lan:8080` is a group: the name is looked up
again and again, and each address that it leads to is a worker with the settings of the
group.  A name that has no answer, or an empty one, keeps its last members for a while:
name servers fail more often than all machines of a group do.

A name that begins with an underscore has SRV records (RFC 2782), each with the name and
the port of one server; `getaddrinfo` cannot ask for them, so dnspython does.  Any other
name has addresses, one for each worker.  A machine with both IPv4 and IPv6 is one
worker, so the IPv6 addresses count only if there are no others.  Priorities and weights
of SRV records are not used: health checks and the routing policy choose among all
workers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Health, Origin, WorkerConfig
from gollama_proxy.tasks import Periodic

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver

logger = logging.getLogger(__name__)

# Seconds for which the last members are kept without an answer.
KEPT = 300.0
MOST = 256  # members of a group


async def resolve(host: str, port: int) -> list[str]:
    """Look up the addresses of a name at which a worker can be; raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return admitted(host, (str(entry[4][0]) for entry in found))


def admitted(host: str, found: Iterable[str]) -> list[str]:
    """Return the addresses at which a worker can be; raise OSError if there is none."""
    kept: list[str] = []
    why = "has no address"
    for address in found:
        refused = addresses.why_address_refused(ipaddress.ip_address(address))
        if refused:
            why = f"resolves to {address}, which {refused}"
        else:
            kept.append(address)
    if not kept:
        raise socket.gaierror(socket.EAI_NONAME, f"{host} {why}")
    return kept


# --- Looking up the workers behind a name -----------------------------------------


class ServerAddress(NamedTuple):
    """One server behind a name: a host and a port, or an address of the name."""

    host: str
    port: int
    address: str = ""


async def look_up(
    origin: Origin, timeout: float, resolver: Resolver | None = None
) -> list[ServerAddress]:
    """Return what a name leads to, in a fixed order; `timeout` in seconds.

    Raises:
        OSError: it does not resolve, or to nothing at which a worker can be.
    """
    if origin.host.startswith("_"):
        return await _look_up_services(origin.host, timeout, resolver)
    found = await resolve(origin.host, origin.ports[0])
    every = sorted(map(ipaddress.ip_address, set(found)), key=lambda a: a.packed)
    of_ipv4 = [address for address in every if address.version == 4]
    return [
        ServerAddress(origin.host, origin.port, str(address))
        for address in of_ipv4 or every
    ]


async def _look_up_services(
    name: str, timeout: float, resolver: Resolver | None
) -> list[ServerAddress]:
    from dns.asyncresolver import Resolver as SystemResolver
    from dns.exception import DNSException

    try:
        answer = await (resolver or SystemResolver()).resolve(
            name, "SRV", lifetime=timeout, search=True
        )
    except DNSException as exc:
        raise OSError(f"{name}: {_explain(exc)}") from exc
    found = {
        (record.target.to_text(omit_final_dot=True).lower(), record.port)
        for record in answer
    }
    usable = [
        ServerAddress(host, port)
        for host, port in sorted(found)
        # RFC 2782: a target of "." means that there is no such service.
        if host and port and not addresses.why_refused(host)
    ]
    if not usable:
        raise OSError(f"{name}: its SRV records name no server")
    return usable


def _explain(error: Exception) -> str:
    reasons = {
        "NXDOMAIN": "no such name",
        "NoAnswer": "no SRV record",
        "NoNameservers": "no name server answered",
        "LifetimeTimeout": "no answer in time",
        "NoResolverConfiguration": "no name server is configured",
    }
    return reasons.get(type(error).__name__, "cannot be looked up")


# --- Groups -----------------------------------------------------------------------

LookUp = Callable[[Origin, float], Awaitable[Sequence[ServerAddress]]]


class Groups:
    """Looks up the names of all groups; `changed` is called for other members.

    `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        health: Health,
        look_up: LookUp,
        changed: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._health = health
        self._look_up = look_up
        self._changed = changed
        self._clock = clock
        self._groups: dict[Origin, _Group] = {}
        self._running = False

    def __repr__(self) -> str:
        return f"<Groups {list(self._groups.values())!r}>"

    def follow(self, configs: Iterable[WorkerConfig]) -> None:
        """Look up the groups among these workers from now on, and no others."""
        wanted = {each.origin: each for each in configs if each.is_group}
        for origin in [each for each in self._groups if each not in wanted]:
            group = self._groups.pop(origin)
            group.loop.cancel()
            group.first.set()
        for origin, config in wanted.items():
            if origin not in self._groups:
                group = self._groups[origin] = _Group(
                    config.name, partial(self._refresh, origin), self._health.interval
                )
                if self._running:
                    group.loop.start()

    def reconfigure(self, health: Health) -> None:
        """Look names up as often as these settings require."""
        self._health = health
        for group in self._groups.values():
            group.loop.wake()

    def expand(
        self, configs: Iterable[WorkerConfig], others: Iterable[WorkerConfig] = ()
    ) -> list[WorkerConfig]:
        """Return these workers with the known members of each group in its place.

        A member that is configured by itself as well, or is among the `others`, is left
        out: its own settings come first.
        """
        configs = list(configs)
        if not any(each.is_group for each in configs):
            return [*configs]
        single = [*(each for each in configs if not each.is_group), *others]
        names = {each.name for each in single}
        places = {place for each in single for place in each.origin.places}
        found: list[WorkerConfig] = []
        for config in configs:
            if not config.is_group:
                found.append(config)
                continue
            group = self._groups.get(config.origin)
            for endpoint in group.members if group is not None else ():
                member = member_of(config, endpoint)
                if member.name in names or not places.isdisjoint(member.origin.places):
                    continue
                names.add(member.name)
                places.update(member.origin.places)
                found.append(member)
        return found

    def failures(self) -> list[str]:
        """Describe each group whose name leads nowhere at present."""
        return [
            f"{group.name}: {group.failing}"
            for group in self._groups.values()
            if group.failing
        ]

    # --- Life ---------------------------------------------------------------------

    def start(self) -> None:
        self._running = True
        for group in self._groups.values():
            group.loop.start()

    async def stop(self) -> None:
        self._running = False
        for group in list(self._groups.values()):
            await group.loop.stop()

    async def looked_up(self) -> None:
        """Wait until every name has been looked up once."""
        for group in list(self._groups.values()):
            await group.first.wait()

    async def refresh(self) -> None:
        """Look up every name once, without a hub, and wait for the answers."""
        for origin in self._groups:
            await self._refresh(origin)

    async def _refresh(self, origin: Origin) -> float:
        group = self._groups[origin]
        try:
            found = await self._look_up(origin, self._health.timeout)
        except OSError as exc:
            members = group.fail(exc.strerror or str(exc), self._clock())
        else:
            members = group.succeed(found, self._clock())
        if members != group.members and self._groups.get(origin) is group:
            group.members = members
            self._changed()
        group.first.set()
        return self._health.interval


class _Group:
    """One name, and where it led to."""

    def __init__(
        self, name: str, step: Callable[[], Awaitable[float]], period: float
    ) -> None:
        self.loop = Periodic(f"look-up of {name}", step, period, delay=0.0)
        self.first = asyncio.Event()  # the end of its first look-up
        self.members: tuple[ServerAddress, ...] = ()
        self.name = name
        self._answered = 0.0  # when it had an answer, in monotonic seconds
        self.failing = ""  # why the last look-up had no answer

    def __repr__(self) -> str:
        return f"<_Group {self.name} members={len(self.members)}>"

    def succeed(
        self, found: Sequence[ServerAddress], now: float
    ) -> tuple[ServerAddress, ...]:
        """Return the members after an answer."""
        if not found:
            return self.fail("an empty answer", now)
        self._answered, self.failing = now, ""
        if len(found) > MOST:
            logger.warning(
                "group %s: %d addresses, of which %d are used",
                self.name,
                len(found),
                MOST,
            )
        members = tuple(found[:MOST])
        if members != self.members:
            logger.info("group %s: %d workers", self.name, len(members))
        return members

    def fail(self, reason: str, now: float) -> tuple[ServerAddress, ...]:
        """Return the members after a look-up without an answer."""
        kept = self.members if now - self._answered < KEPT else ()
        if reason != self.failing or len(kept) != len(self.members):
            self.failing = reason
            logger.warning(
                "group %s: %s; %d workers are kept", self.name, reason, len(kept)
            )
        return kept


def member_of(group: WorkerConfig, endpoint: ServerAddress) -> WorkerConfig:
    """Return one worker of a group, with its settings."""
    origin = Origin(
        group.origin.scheme.removeprefix("dns+"),
        endpoint.host,
        endpoint.port,
        group.origin.prefix,
        endpoint.address,
    )
    shown = origin._replace(host=endpoint.address or endpoint.host, address="")
    suffix = endpoint.address or f"{endpoint.host}:{endpoint.port}"
    return replace(
        group,
        url=shown.url,
        origin=origin,
        name=f"{group.name}-{suffix}",
        parent=group.name,
    )
