"""Connections go only to addresses at which a worker can be."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvloop

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.upstream.dial import (
    RESOLVED_FOR,
    Target,
    admitted,
    connect,
    resolve,
)
from tests.fakes.clock import Clock
from tests.fakes.worker import ScriptedWorker, full_backlog

Found = list[tuple[Any, ...]]


def target_of(url: str, clock: Clock | None = None) -> Target:
    [worker] = config.load(None, {}, {}, [url]).workers
    return Target(worker, None, clock or Clock())


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


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "[::1]", "[fd00::1%eth0]"])
def test_an_address_is_not_looked_up(host: str) -> None:
    target = target_of(f"http://{host}:80")
    assert target.known_addresses() == [host.strip("[]")]
    target.forget_addresses()  # there is nothing to look up
    assert target.known_addresses() == [host.strip("[]")]


async def test_the_addresses_of_a_name_are_kept_for_a_moment(
    names: dict[str, list[str]],
) -> None:
    names["gpu.lan"] = ["127.0.0.1"]
    async with ScriptedWorker() as worker:
        clock = Clock()
        target = target_of(f"http://gpu.lan:{worker.port}", clock)
        assert target.known_addresses() == ()
        (await connect(target)).close()
        names["gpu.lan"] = ["10.0.0.1"]
        clock.advance(RESOLVED_FOR - 0.01)
        (await connect(target)).close()
        assert worker.connections == 2
        clock.advance(0.01)
        assert target.known_addresses() == ()
        assert await target.resolve() == ["10.0.0.1"]


async def test_a_failed_connection_has_a_name_resolved_again(
    names: dict[str, list[str]],
) -> None:
    """The worker may have another address by now."""
    names["gpu.lan"] = ["127.0.0.2"]
    async with ScriptedWorker() as worker:
        target = target_of(f"http://gpu.lan:{worker.port}", Clock())
        with pytest.raises(ConnectionRefusedError):
            await connect(target)
        names["gpu.lan"] = ["127.0.0.1"]
        (await connect(target)).close()
        assert worker.connections == 1


async def test_a_connection_that_takes_too_long_has_a_name_resolved_again(
    names: dict[str, list[str]],
) -> None:
    names["gpu.lan"] = ["127.0.0.1"]
    with full_backlog() as url:
        target = target_of(url.replace("127.0.0.1", "gpu.lan"), Clock())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connect(target)
    assert target.known_addresses() == ()


def test_a_target_shows_no_key() -> None:
    origin = target_of("http://gpu.lan").worker.origin
    worker = WorkerConfig("http://gpu.lan", origin, "gpu", "sk-secret")
    assert repr(Target(worker)) == "<Target gpu []>"


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
