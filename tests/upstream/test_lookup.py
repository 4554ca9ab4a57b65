"""The servers behind a DNS name, from a real name server on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import uvloop
from dns.asyncresolver import Resolver

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Origin
from gollama_proxy.upstream.lookup import Endpoint, look_up


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
    assert found == [Endpoint("node1.lan", 8080), Endpoint("node2.lan", 9931)]


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
    assert endpoints == [Endpoint("llama.lan", 8080, address) for address in kept]
