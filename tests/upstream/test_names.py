"""Connections go only to addresses at which a worker can be."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import uvloop
from dns.asyncresolver import Resolver

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Origin, WorkerConfig
from gollama_proxy.upstream.names import ServerAddress, admitted, look_up, resolve
from gollama_proxy.upstream.pool import RESOLVED_FOR, Target, connect
from gollama_proxy.upstream.probe import magic_packet, send_magic
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE
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
        ("0.0.0.0", "not the address of a machine"),
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


# --- Looking up the workers behind a name -----------------------------------------


def origin_of(url: str) -> Origin:
    return config.load(None, {}, {}, [url]).workers[0].origin


class NameServer(asyncio.DatagramProtocol):
    """Answers with the SRV records that it has, in zone file format."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.silent = False
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.AA
        name = query.question[0].name
        found = self.records.get(name.to_text(omit_final_dot=True))
        if found is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        elif found:
            reply.answer.append(dns.rrset.from_text_list(name, 5, "IN", "SRV", found))
        if not self.silent and self.transport is not None:
            self.transport.sendto(reply.to_wire(), addr)


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        NameServer, local_addr=("127.0.0.1", 0)
    )
    yield server
    transport.close()


def resolver_of(server: NameServer) -> Resolver:
    assert server.transport is not None
    resolver = Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = server.transport.get_extra_info("sockname")[1]
    return resolver


async def test_srv_records_have_the_host_and_the_port(server: NameServer) -> None:
    server.records["_llama._tcp.lan"] = [
        "10 5 9931 node2.lan.",
        "0 5 8080 Node1.lan.",
        "0 5 8080 node1.lan.",
    ]
    origin = origin_of("dns+http://_llama._tcp.lan/api")
    found = await look_up(origin, 5.0, resolver_of(server))
    assert found == [ServerAddress("node1.lan", 8080), ServerAddress("node2.lan", 9931)]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (None, "no such name"),
        ([], "no SRV record"),
        (["0 0 0 ."], "its SRV records name no server"),
        (["0 0 80 metadata.google.internal."], "its SRV records name no server"),
    ],
)
async def test_a_name_without_servers(
    server: NameServer, records: list[str] | None, reason: str
) -> None:
    if records is not None:
        server.records["_llama._tcp.lan"] = records
    origin = origin_of("dns+http://_llama._tcp.lan")
    with pytest.raises(OSError, match=f"^_llama._tcp.lan: {reason}$"):
        await look_up(origin, 5.0, resolver_of(server))


async def test_a_name_server_that_does_not_answer(server: NameServer) -> None:
    server.silent = True
    origin = origin_of("dns+http://_llama._tcp.lan")
    with pytest.raises(OSError, match="no answer in time"):
        await look_up(origin, 0.05, resolver_of(server))


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (["10.0.0.12", "10.0.0.2", "10.0.0.2"], ["10.0.0.2", "10.0.0.12"]),
        (["10.0.0.2", "fd00::2"], ["10.0.0.2"]),
        (["fd00::3", "fd00::2"], ["fd00::2", "fd00::3"]),
        (["169.254.169.254", "10.0.0.2"], ["10.0.0.2"]),
    ],
    ids=["in order", "one machine with both", "only IPv6", "refused"],
)
async def test_each_address_of_a_name_is_a_server(
    monkeypatch: pytest.MonkeyPatch, found: list[str], kept: list[str]
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in found]

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    endpoints = await look_up(origin_of("dns+http://llama.lan:8080"), 5.0)
    assert endpoints == [ServerAddress("llama.lan", 8080, address) for address in kept]


# --- Machines that sleep ----------------------------------------------------------

MAC = "00:11:22:aa:bb:cc"


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(DEADLINE)
        yield sock


def test_the_packet_holds_the_address_sixteen_times() -> None:
    packet = magic_packet(MAC)
    assert packet == b"\xff" * 6 + b"\x00\x11\x22\xaa\xbb\xcc" * 16
    assert len(packet) == 102


def test_the_packet_goes_to_each_place(receiver: socket.socket) -> None:
    place = f"127.0.0.1:{receiver.getsockname()[1]}"
    send_magic(MAC, [place, place])
    for _ in range(2):
        assert receiver.recv(2000) == magic_packet(MAC)


def test_one_place_that_can_be_reached_is_enough(receiver: socket.socket) -> None:
    place = f"127.0.0.1:{receiver.getsockname()[1]}"
    send_magic(MAC, ["0.0.0.0:0", place])
    assert receiver.recv(2000) == magic_packet(MAC)


def test_no_place_that_can_be_reached_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sendto(*_: object) -> int:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "sendto", sendto)
    with pytest.raises(OSError, match="unreachable"):
        send_magic(MAC, ["255.255.255.255"])
