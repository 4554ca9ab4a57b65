"""Connections go only to addresses at which a worker can be."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import uvloop

from gollama_proxy.upstream.dial import admitted, resolve

Found = list[tuple[Any, ...]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Set what each name resolves to; any other look-up is an error."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(
        self: object, host: str, port: int, *, type: int, **_: Any
    ) -> Found:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        assert type == socket.SOCK_STREAM
        return [entry(address, port) for address in known[host]]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    return known


def entry(address: str, port: int) -> tuple[Any, ...]:
    """Build an entry of getaddrinfo's result."""
    name: tuple[Any, ...] = (address, port)
    family = socket.AF_INET
    if ":" in address:
        family = socket.AF_INET6
        name = (address, port, 0, 0)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", name)


async def test_an_address_is_not_looked_up(names: dict[str, list[str]]) -> None:
    for address in ("127.0.0.1", "10.0.0.1", "::1", "fd00::1%eth0"):
        assert await resolve(address, 80) == [address]


async def test_a_name_resolves_to_its_addresses_in_order(
    names: dict[str, list[str]],
) -> None:
    names["gpu.lan"] = ["fd00::11", "10.0.0.11"]
    assert await resolve("gpu.lan", 80) == ["fd00::11", "10.0.0.11"]


async def test_refused_addresses_are_skipped(names: dict[str, list[str]]) -> None:
    """mDNS names often have a link-local address beside a good one."""
    names["mac.local"] = ["fe80::1%lo", "169.254.7.7", "192.168.1.7"]
    assert await resolve("mac.local", 80) == ["192.168.1.7"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("169.254.169.254", "a cloud's metadata service"),
        ("::ffff:169.254.169.254", "a cloud's metadata service"),
        ("fd00:ec2::254", "a cloud's metadata service"),
        ("0.0.0.0", "no address of a machine"),
        ("fe80::1", "a link-local address"),
        ("239.1.1.1", "a multicast address"),
    ],
)
async def test_a_name_with_only_refused_addresses_is_an_error(
    address: str, why: str, names: dict[str, list[str]]
) -> None:
    names["rebound.example"] = [address]
    text = f"rebound.example resolves to {address}, which is {why}"
    with pytest.raises(OSError, match="rebound") as caught:
        await resolve("rebound.example", 80)
    assert caught.value.strerror == text


async def test_an_unknown_name_is_an_error(names: dict[str, list[str]]) -> None:
    with pytest.raises(socket.gaierror, match="not known"):
        await resolve("nobody.example", 80)
    with pytest.raises(socket.gaierror, match="has no address"):
        admitted("nobody.example", [])


async def test_localhost_is_resolved() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)
