"""Hubs announce themselves on the local network, and agents find them there (mDNS).

Multicast DNS (RFC 6762) and DNS-SD (RFC 6763) through the package zeroconf, which is
optional.  Anyone on the network can announce a hub, and an agent sends its token to the
hub that it finds: discovery is for networks whose machines are trusted.

`interfaces` are addresses of this machine; None for all of them.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gollama_proxy import __version__

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

SERVICE = "_gollama-proxy._tcp.local."
LOOK_FOR = 3.0  # seconds in which hubs have to answer
ASK_AGAIN = 1.0  # seconds that one hub has to describe itself


def announcement(url: str, addresses: Sequence[str]) -> ServiceInfo:
    """Return the records of the hub at a URL, which has these addresses."""
    from zeroconf import ServiceInfo

    parts = urlsplit(url)
    assert parts.port is not None, url
    host = socket.gethostname().partition(".")[0] or "hub"
    return ServiceInfo(
        SERVICE,
        f"{host}-{parts.port}.{SERVICE}",
        port=parts.port,
        properties={"scheme": parts.scheme, "version": __version__},
        server=f"{host}.local.",
        parsed_addresses=list(addresses),
    )


def url_of(info: ServiceInfo) -> str:
    """Return the URL of a hub that announced itself; "" if it cannot be a hub.

    With https it has the name of the machine, for which its certificate is more likely.
    """
    scheme = (info.properties.get(b"scheme") or b"").decode(errors="replace")
    addresses = info.parsed_scoped_addresses()
    if scheme not in ("http", "https") or not info.port or not addresses:
        return ""
    if scheme == "https":
        host = (info.server or "").rstrip(".")
    else:
        best = min(addresses, key=lambda a: ":" in a)  # IPv4, if there is one
        host = f"[{best}]" if ":" in best else best
    return f"{scheme}://{host}:{info.port}"


def addresses_of(host: str) -> list[str]:
    """Return the addresses at which a hub that listens on `host` can be reached."""
    import ifaddr

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    if not address.is_unspecified:
        return [host]
    every = [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4 or address.version == 6
    ]
    return [ip for ip in every if not _is_local(ip)]


def _is_local(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return address.is_loopback or address.is_link_local


@asynccontextmanager
async def advertise(
    url: str, addresses: Sequence[str], interfaces: Sequence[str] | None = None
) -> AsyncIterator[None]:
    """Announce the hub at a URL until the block is left.

    Raises:
        OSError: no interface can send to other machines.
    """
    await asyncio.to_thread(_import)
    from zeroconf.asyncio import AsyncZeroconf

    info = announcement(url, addresses)
    zeroconf = AsyncZeroconf(**_choice(interfaces))
    try:
        # Two hubs of a machine have different ports, and so different names.
        await (await zeroconf.async_register_service(info, allow_name_change=True))
        yield
        await (await zeroconf.async_unregister_service(info))
    finally:
        await zeroconf.async_close()


async def discover(
    seconds: float = LOOK_FOR, interfaces: Sequence[str] | None = None
) -> list[str]:
    """Return the URLs of the hubs that answer within some seconds.

    Raises:
        OSError: no interface can ask other machines.
    """
    await asyncio.to_thread(_import)
    from zeroconf import ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

    names: set[str] = set()

    def note(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: Any
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            names.discard(name)
        else:
            names.add(name)

    zeroconf = AsyncZeroconf(**_choice(interfaces))
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, [SERVICE], handlers=[note])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
        infos = await asyncio.gather(
            *(
                zeroconf.async_get_service_info(SERVICE, name, int(ASK_AGAIN * 1000))
                for name in sorted(names)
            )
        )
        urls = {url_of(info) for info in infos if info is not None}
        return sorted(urls - {""})
    finally:
        await zeroconf.async_close()


def _import() -> None:
    """Import what is needed; it starts ldconfig, so it would block the event loop."""
    importlib.import_module("zeroconf.asyncio")


def _choice(interfaces: Sequence[str] | None) -> dict[str, Any]:
    return {} if interfaces is None else {"interfaces": list(interfaces)}
