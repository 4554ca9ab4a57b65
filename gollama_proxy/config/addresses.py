"""Where no worker can be: addresses of nobody, of everybody, and of clouds.

Loopback and private networks are where workers live, so those are not asked about.
What is refused is what a worker's URL, or a name that somebody else resolves, must not
make the hub talk to (OWASP, SSRF prevention): the metadata services of clouds, which
hand out credentials, and what no single machine has.
"""

from __future__ import annotations

import ipaddress
import socket

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# AWS, Google, Azure, Oracle, DigitalOcean … and AWS, Google, Alibaba, Azure, Oracle.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",
            "fd00:ec2::254",
            "fd20:ce::254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
        ),
    )
)
_METADATA_NAMES = frozenset(
    {"metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"}
)
# RFC 1122, 3.2.1.3: "this network", of which Linux takes 0.0.0.0 for loopback; RFC
# 1112, 4: class E, with the broadcast address.
_NOWHERE = (ipaddress.ip_network("0.0.0.0/8"), ipaddress.ip_network("240.0.0.0/4"))
# IPv6 prefixes with an IPv4 address in their last four bytes: compatible and mapped
# (RFC 4291, 2.5.5), and NAT64 (RFC 6052, 2.1).
_CARRIERS = tuple(
    map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "64:ff9b::/96"))
)


def why_refused(host: str) -> str:
    """Say why no worker can be at a host; empty if one can, or if that is not known.

    `host` is an address in any spelling, or a name, whose addresses are another
    question.
    """
    name = host.rstrip(".").lower()
    if name in _METADATA_NAMES:
        return "is a cloud's metadata service"
    address = parse(name)
    return why_address_refused(address) if address is not None else ""


def why_address_refused(address: IPAddress) -> str:
    """Say why no worker can be at an address; empty if one can."""
    if isinstance(address, ipaddress.IPv6Address):
        # Without its zone, which is no part of what is compared here.
        address = ipaddress.IPv6Address(int(address))
        inner = None if address.is_loopback else _carried(address)
        if inner is not None and (why := why_address_refused(inner)):
            return why
    if address in _METADATA:
        return "is a cloud's metadata service"
    if address.is_link_local:
        return "is a link-local address"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_unspecified or any(address in network for network in _NOWHERE):
        return "is no address of a machine"
    return ""


def parse(host: str) -> IPAddress | None:
    """Read an address in any spelling that a resolver takes; None if it is a name.

    `inet_aton` and so `getaddrinfo` take 2852039166, 0xa9fea9fe and 0251.254.43518 for
    169.254.169.254.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine alone."""
    address = parse(host)
    return host == "localhost" if address is None else address.is_loopback


def is_plain(host: str) -> bool:
    """Say whether a host is an address in the one spelling that all programs share."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _carried(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Take the IPv4 address out of an IPv6 address that stands for one."""
    if any(address in network for network in _CARRIERS):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour  # RFC 3056
