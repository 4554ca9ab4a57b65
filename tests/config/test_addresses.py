"""Addresses that no worker can have are rejected, in every spelling."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.config.addresses import (
    is_loopback,
    is_plain_host,
    parse,
    why_address_refused,
    why_refused,
)
from tests.fakes.cases import case

METADATA = "is a cloud's metadata service"
LINK_LOCAL = "is a link-local address"
MULTICAST = "is a multicast address"
NOWHERE = "is not the address of a machine"


def test_a_rejected_host() -> None:
    for host, why in [
        ("169.254.169.254", METADATA),
        ("169.254.169.254.", METADATA),
        ("fd00:ec2::254", METADATA),
        ("fd20:ce::254", METADATA),
        ("100.100.100.200", METADATA),
        ("168.63.129.16", METADATA),
        ("192.0.0.192", METADATA),
        ("metadata.google.internal", METADATA),
        ("METADATA.google.internal.", METADATA),
        ("metadata.goog", METADATA),
        ("instance-data.ec2.internal", METADATA),
        # Other spellings of these
        ("2852039166", METADATA),
        ("0xa9fea9fe", METADATA),
        ("0xA9.0xFE.0xA9.0xFE", METADATA),
        ("0251.0376.0251.0376", METADATA),
        ("025177524776", METADATA),
        ("169.254.43518", METADATA),
        ("169.16689662", METADATA),
        ("0251.254.0xa9fe", METADATA),
        # The same inside IPv6 addresses
        ("::ffff:169.254.169.254", METADATA),
        ("::ffff:a9fe:a9fe", METADATA),
        ("0:0:0:0:0:FFFF:A9FE:A9FE", METADATA),
        ("::169.254.169.254", METADATA),
        ("64:ff9b::169.254.169.254", METADATA),
        ("2002:a9fe:a9fe::1", METADATA),
        ("::ffff:169.254.169.254%eth0", METADATA),
        ("fd00:ec2::254%eth0", METADATA),
        # Link-local
        ("169.254.0.0", LINK_LOCAL),
        ("169.254.255.255", LINK_LOCAL),
        ("fe80::", LINK_LOCAL),
        ("fe80::1%eth0", LINK_LOCAL),
        ("febf:ffff::1", LINK_LOCAL),
        ("::ffff:169.254.1.2", LINK_LOCAL),
        # Unspecified, multicast, broadcast
        ("0.0.0.0", NOWHERE),
        ("0", NOWHERE),
        ("0x0", NOWHERE),
        ("0.1.2.3", NOWHERE),
        ("::", NOWHERE),
        ("0:0:0:0:0:0:0:0", NOWHERE),
        ("::%eth0", NOWHERE),
        ("::ffff:0.0.0.0", NOWHERE),
        ("::2", NOWHERE),
        ("240.0.0.1", NOWHERE),
        ("255.255.255.255", NOWHERE),
        ("4294967295", NOWHERE),
        ("224.0.0.1", MULTICAST),
        ("239.255.255.255", MULTICAST),
        ("ff02::1", MULTICAST),
        ("ff02::1%eth0", MULTICAST),
        ("::ffff:224.0.0.1", MULTICAST),
    ]:
        with case((host, why)):
            assert why_refused(host) == why


def test_an_allowed_host() -> None:
    """Workers are on loopback and private networks."""
    for host in [
        "localhost",
        "127.0.0.1",
        "127.255.255.254",
        "::1",
        "::1%lo",
        "::ffff:127.0.0.1",
        "10.0.0.11",
        "172.16.0.1",
        "192.168.1.1",
        "::ffff:192.168.1.1",
        "64:ff9b::10.0.0.1",
        "100.64.0.1",  # RFC 6598, which Tailscale uses
        "fd00::1",
        "fd00:ec2::253",
        "fec0::1",
        "fe7f::1",
        "2001:db8::1",
        "2002:a00:1::1",
        "1.1.1.1",
        "169.253.255.255",
        "169.255.0.0",
        "223.255.255.255",
        "1.0.0.0",
        "gpu.lan",
        "169.254.169.254.example",
        "metadata",
        "metadata.google.internal.example",
        "10.0.0.256",  # not an address, so at best a name
        "a9fea9fe",
        "",
    ]:
        with case(host):
            assert why_refused(host) == ""


@given(st.ip_addresses(v=4))
def test_an_address_inside_an_ipv6_address_is_treated_alike(
    address: ipaddress.IPv4Address,
) -> None:
    why = why_address_refused(address)
    mapped = ipaddress.IPv6Address(f"::ffff:{address}")
    translated = ipaddress.IPv6Address(f"64:ff9b::{address}")
    assert why_address_refused(mapped) == why_address_refused(translated) == why
    for spelling in (str(int(address)), hex(int(address)), f"0{int(address):o}"):
        assert parse(spelling) == address
        assert not is_plain_host(spelling)
        assert why_refused(spelling) == why
    assert is_plain_host(str(address))


@given(st.text(max_size=30))
def test_any_text_gets_an_answer(host: str) -> None:
    if host.isascii() and "\0" not in host:
        assert why_refused(host) in ("", METADATA, LINK_LOCAL, MULTICAST, NOWHERE)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("127.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_a_loopback_host(host: str, local: bool) -> None:
    assert is_loopback(host) is local
