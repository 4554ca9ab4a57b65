"""Opens connections to workers, and only to addresses at which a worker can be.

The configuration is checked when it is loaded.  What a name resolves to is chosen by
others and can change (DNS rebinding), so the addresses are checked as well, and the
connection goes to an address that was checked, not to the name.  A name may have
several addresses: in many home networks one of them is link-local, and is skipped.

`loop.create_connection` with a numeric address is the cheapest correct way on uvloop:
28 µs of CPU where the system calls alone take 17.  A socket of our own, connected with
`sock_connect` or `connect_ex`, took 44 to 89 µs.  Resolving a name takes a thread and
another 100 µs, and llama-server needs a new connection after each stream, so addresses
are kept for a moment.

**The workers behind a DNS name** are looked up with `look_up`.  A name that begins with
an underscore has SRV records (RFC 2782), each with the name and the port of one server;
`getaddrinfo` cannot ask for them, so dnspython does.  Any other name has addresses, one
for each worker.  A machine with both IPv4 and IPv6 is one worker, so the IPv6 addresses
count only if there are no others.  Priorities and weights of SRV records are not used:
health checks and the routing policy choose among all workers.

**Machines that sleep** are woken with a Wake-on-LAN packet (`send_magic`).
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Origin, WorkerConfig
from gollama_proxy.config.tls import Credentials
from gollama_proxy.upstream.connection import Connection

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver


# Seconds for which the addresses of a name are used; not beyond a failed connection.
RESOLVED_FOR = 5.0


class Target:
    """A worker, the TLS credentials for it (None for http), and its addresses."""

    def __init__(
        self,
        worker: WorkerConfig,
        tls: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.tls = tls
        self._clock = clock
        self.port = worker.origin.ports[0]
        self.found = len(worker.origin.ports) == 1  # whether it has answered there
        self._addresses: list[str] = []
        self._valid_until = -math.inf
        fixed = worker.origin.address or worker.origin.host
        if addresses.is_plain(fixed):
            # It was checked when the configuration was loaded, or when it was found.
            self._addresses, self._valid_until = [fixed], math.inf

    def __repr__(self) -> str:
        return f"<Target {self.worker.name} {self._addresses}>"

    def at(self, port: int) -> Target:
        """Return the same worker at another port."""
        other = Target(self.worker, self.tls, self._clock)
        other.port = port
        return other

    def known_addresses(self) -> Sequence[str]:
        """Return the addresses if they are known; else none."""
        return self._addresses if self._clock() < self._valid_until else ()

    async def resolve(self) -> Sequence[str]:
        """Look up the addresses.

        Raises:
            OSError: the name does not resolve, or only to addresses that are refused.
        """
        origin = self.worker.origin
        self._addresses = await resolve(origin.host, self.port)
        self._valid_until = self._clock() + RESOLVED_FOR
        return self._addresses

    def forget_addresses(self) -> None:
        """Resolve the name again the next time."""
        if self._valid_until < math.inf:
            self._valid_until = -math.inf


async def connect(target: Target, *, any_answer: bool = False) -> Connection:
    """Open a connection: the worker's addresses are tried one after the other.

    `any_answer` is for answers that no client gets to see (see `Connection`).

    Raises:
        OSError: that of the last address; also for a name that does not resolve
            (`socket.gaierror`) and for TLS (`ssl.SSLError`).
    """
    origin = target.worker.origin
    context = None if target.tls is None else target.tls.context
    factory = functools.partial(Connection, any_answer=True)
    loop = asyncio.get_running_loop()
    failure = OSError()
    try:
        for address in target.known_addresses() or await target.resolve():
            try:
                _, connection = await loop.create_connection(
                    factory if any_answer else Connection,
                    address,
                    target.port,
                    ssl=context,
                    server_hostname=origin.host if context else None,
                )
            except OSError as exc:
                failure = exc
            else:
                return connection
        raise failure
    except BaseException:  # also the end of a time limit
        target.forget_addresses()
        raise


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


class Endpoint(NamedTuple):
    """One server behind a name: a host and a port, or an address of the name."""

    host: str
    port: int
    address: str = ""


async def look_up(
    origin: Origin, timeout: float, resolver: Resolver | None = None
) -> list[Endpoint]:
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
        Endpoint(origin.host, origin.port, str(address)) for address in of_ipv4 or every
    ]


async def _look_up_services(
    name: str, timeout: float, resolver: Resolver | None
) -> list[Endpoint]:
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
        Endpoint(host, port)
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


# --- Machines that sleep ----------------------------------------------------------

WAKE_PORT = 9  # discard


def magic_packet(mac: str) -> bytes:
    """Return the packet that wakes the machine with a hardware address.

    Six bytes of ones, then the address sixteen times (AMD, Magic Packet Technology,
    1995).
    """
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


def send_magic(mac: str, places: Iterable[str]) -> None:
    """Send the packet to each of these broadcast addresses, which may have a port.

    A machine that sleeps has no address of its own.

    Raises:
        OSError: none of them can be reached.
    """
    packet, failure, sent = magic_packet(mac), OSError("no address"), False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setblocking(False)
        for place in places:
            host, _, port = place.partition(":")
            try:
                sock.sendto(packet, (host, int(port or WAKE_PORT)))
            except OSError as exc:
                failure = exc
            else:
                sent = True
    if not sent:
        raise failure
