"""Looks up the workers behind a DNS name.

A name that begins with an underscore has SRV records (RFC 2782), each with the name and
the port of one server; `getaddrinfo` cannot ask for them, so dnspython does.  Any other
name has addresses, one for each worker.  A machine with both IPv4 and IPv6 is one
worker, so the IPv6 addresses count only if there are no others.

Priorities and weights of SRV records are not used: health checks and the routing policy
choose among all workers.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Origin
from gollama_proxy.upstream.dial import resolve

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver


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
