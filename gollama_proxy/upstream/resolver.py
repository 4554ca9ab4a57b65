"""A worker's name becomes addresses, without those where no worker can be.

The configuration is checked when it is loaded; what a name stands for is somebody
else's choice, and may change (DNS rebinding).  So it is looked at each time, and the
connection goes to the address that was looked at, not to the name again.  A name may
have more than one: in many a home network one of them is link-local, and is passed by.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

import aiohttp
from aiohttp.abc import ResolveResult

from gollama_proxy.config import addresses


async def resolve(host: str, port: int) -> list[str]:
    """Look up where to connect: once for a new connection, never for a request.

    Raises:
        OSError: the name is not known, or it stands only for what is refused.
    """
    if addresses.is_plain(host):
        return [host]  # checked when it was read
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return admitted(host, (str(entry[4][0]) for entry in found))


def admitted(host: str, found: Iterable[str]) -> list[str]:
    """Leave out where no worker can be; raises OSError if that is all there is."""
    kept: list[str] = []
    why = "has no address"
    for address in found:
        refused = addresses.why_address_refused(ipaddress.ip_address(address))
        if refused:
            why = f"stands for {address}, which {refused}"
        else:
            kept.append(address)
    if not kept:
        raise socket.gaierror(socket.EAI_NONAME, f"{host} {why}")
    return kept


class Resolver(aiohttp.ThreadedResolver):
    """The same for the control plane, whose connections aiohttp makes."""

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        kept = admitted(host, (entry["host"] for entry in found))
        return [entry for entry in found if entry["host"] in kept]
