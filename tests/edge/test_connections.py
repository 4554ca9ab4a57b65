"""Each connection is counted, and handled below TLS from its handshake to its end."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from gollama_proxy.config.settings import COUNTS, Limits, Process, Server
from gollama_proxy.config.tls import for_server
from gollama_proxy.edge.connections import (
    LOG_EVERY,
    WRITE_BUFFER,
    ConnectionLimiter,
    SharedCounts,
    TlsConnection,
    TlsOptions,
    household,
    peer,
)
from tests.fakes.authority import Authority
from tests.fakes.client import TlsWire
from tests.fakes.clock import Clock
from tests.fakes.waiting import settled, until


def test_as_many_as_there_is_room_for() -> None:
    connections = ConnectionLimiter(Limits(connections=2), Clock())
    assert not connections.by_address
    assert [connections.enter() for _ in range(3)] == [True, True, False]
    assert repr(connections) == "<ConnectionLimiter open=2 of 2>"
    connections.leave()
    assert connections.enter()
    assert connections.refused == {"limit": 1, "address": 0, "handshake": 0}


def test_as_many_as_one_address_may_have() -> None:
    limits = Limits(connections=10, connections_per_address=2)
    connections = ConnectionLimiter(limits, Clock())
    assert connections.by_address
    assert [connections.enter("10.0.0.1") for _ in range(3)] == [True, True, False]
    assert connections.enter("10.0.0.2")
    connections.leave("10.0.0.1")
    assert connections.enter("10.0.0.1")
    assert connections.refused["address"] == 1
    for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
        connections.leave(address)
    assert connections.open == 0
    assert not connections._by_address  # no closed connection is remembered


@pytest.fixture
def processes() -> Iterator[list[ConnectionLimiter]]:
    """Two processes with limits for both: 4 connections, 2 of an address."""
    limits = Limits(connections=4, connections_per_address=2)
    with tempfile.TemporaryFile() as memory:
        memory.truncate(2 * COUNTS)
        yield [
            ConnectionLimiter(
                limits, Clock(), SharedCounts(Process(each, 2, "key", memory.fileno()))
            )
            for each in (1, 2)
        ]


def test_processes_admit_together_what_one_would(
    processes: list[ConnectionLimiter],
) -> None:
    one, two = processes
    assert [each.enter("10.0.0.1") for each in (one, two)] == [True, True]
    assert [each.enter("10.0.0.1") for each in (one, two)] == [False, False]
    assert [each.enter("10.0.0.2") for each in (two, two)] == [True, True]
    assert [each.enter("10.0.0.3") for each in (one, two)] == [False, False]
    assert (one.open, two.open) == (1, 3)
    two.leave("10.0.0.1")
    assert [each.enter("10.0.0.1") for each in (one, two)] == [True, False]
    assert one.refused == {"limit": 1, "address": 1, "handshake": 0}


def test_connections_are_not_counted_by_address_without_need(
    processes: list[ConnectionLimiter],
) -> None:
    one, two = processes
    assert [one.enter("10.0.0.1") for _ in range(2)] == [True, True]
    one.reconfigure(Limits(connections=4))
    assert two.enter("10.0.0.1")  # for this one, they are connections of no address
    one.reconfigure(Limits(connections=9, connections_per_address=2))
    assert [one.enter("10.0.0.1") for _ in range(2)] == [True, False]


def test_other_limits_are_for_new_connections() -> None:
    connections = ConnectionLimiter(Limits(connections=2), Clock())
    assert [connections.enter("10.0.0.1") for _ in range(2)] == [True, True]
    connections.reconfigure(Limits(connections=3, connections_per_address=1))
    assert connections.enter("10.0.0.1")  # those before were not counted by address
    connections.reconfigure(Limits(connections=9, connections_per_address=1))
    assert not connections.enter("10.0.0.1")
    connections.leave("10.0.0.1")
    assert connections.enter("10.0.0.1")
    connections.reconfigure(Limits(connections=9))
    assert connections.enter("10.0.0.1")
    for _ in range(4):
        connections.leave("10.0.0.1")
    assert connections.open == 0
    connections.reconfigure(Limits(connections_per_address=1))
    assert [connections.enter("10.0.0.1") for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("no:address", "no:address"),
        ("", ""),
    ],
)
def test_whose_an_address_is(address: str, name: str) -> None:
    assert household(address) == name


def test_a_flood_is_reported_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    connections = ConnectionLimiter(Limits(connections=1), clock := Clock())
    connections.enter()
    for _ in range(1000):
        connections.enter()
    clock.advance(LOG_EVERY)
    connections.enter()
    connections.refuse("handshake", "why")
    assert [record.getMessage() for record in caplog.records] == [
        "refused connections: 1 (limits.connections = 1)",
        "refused connections: 1000 (limits.connections = 1)",
        "refused connections: 1 (why)",
    ]


class Echo(asyncio.Protocol):
    """The protocol above TLS: it records its calls, and sends data back."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.heard: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.heard.append("made")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard.append("data")
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")

    def eof_received(self) -> None:
        self.heard.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append("lost")


class House:
    """A listening socket with TLS on each connection."""

    port = 0

    def __init__(self, authority: Authority, **changes: Any) -> None:
        pair = authority.issue()
        credentials = for_server(
            Server(tls_certificate=pair.certificate, tls_key=pair.key)
        )
        assert credentials is not None
        limits = Limits(connections=2, connections_per_address=2)
        self.connections = ConnectionLimiter(limits, Clock())
        self.echoes: list[Echo] = []
        self.protocols: list[TlsConnection] = []
        options = TlsOptions(credentials, self.connections, self._echo, 5, 5, 5, set())
        self.options = options._replace(**changes)
        self._trust = authority.client()

    def _echo(self) -> Echo:
        self.echoes.append(echo := Echo())
        return echo

    def _connect(self) -> TlsConnection:
        self.protocols.append(protocol := TlsConnection(self.options))
        return protocol

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[House]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await until(lambda: self.connections.open == 0)

    async def knock(self, **options: Any) -> TlsWire:
        return await TlsWire.connect("127.0.0.1", self.port, **options)

    async def enter(self, **options: Any) -> TlsWire:
        wire = await self.knock(**options)
        return await wire.shake_hands(self._trust, "127.0.0.1")


@pytest.fixture
def house(authority: Authority) -> House:
    return House(authority)


async def test_a_connection_from_its_beginning_to_its_end(house: House) -> None:
    async with house.open():
        async with await house.enter() as wire:
            await wire.send(b"hello")
            assert await wire.read_until(b"hello") == b"hello"
            assert repr(house.protocols[0]) == "<TlsConnection open>"
            assert house.connections.open == 1
            assert not house.options.shaking
        [echo] = house.echoes
        await until(lambda: "lost" in echo.heard)
        # Without `close_notify`, there is no end but that of the connection.
        assert echo.heard == ["made", "data", "lost"]


async def test_data_that_comes_with_the_end_of_the_handshake(house: House) -> None:
    """It must not be there before its connection."""
    async with house.open():
        for _ in range(20):
            wire = await house.knock()
            trust = house._trust
            wire.tls = trust.wrap_bio(
                wire._incoming, wire._outgoing, server_hostname="127.0.0.1"
            )
            while True:
                try:
                    wire.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await wire._flush()
                    await wire._fill()
            await wire.send(b"early")  # in one segment with the client's Finished
            assert await wire.read_until(b"early") == b"early"
            assert house.echoes[-1].heard == ["made", "data"]
            wire.close()
            await until(lambda: house.connections.open == 0)


async def test_connections_over_the_limit_are_closed(house: House) -> None:
    async with house.open():
        inside = [await house.enter(), await house.enter()]
        outside = await house.knock()
        await outside.hung_up()
        assert repr(house.protocols[2]) == "<TlsConnection closed>"
        assert len(house.echoes) == 2
        for wire in (*inside, outside):
            wire.close()


async def test_a_handshake_that_fails(house: House) -> None:
    async with house.open():
        async with await house.knock() as wire:
            await until(lambda: len(house.options.shaking) == 1)
            assert repr(house.protocols[0]) == "<TlsConnection shaking hands>"
            await wire._flush()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(wire._sock, b"GET / HTTP/1.1\r\n\r\n")
            await wire.hung_up()
        await until(lambda: house.connections.open == 0)
        assert house.connections.refused["handshake"] == 1
        assert "made" not in house.echoes[0].heard
        assert not house.options.shaking


async def test_a_handshake_that_is_aborted(house: House) -> None:
    async with house.open():
        async with await house.knock() as wire:
            await until(lambda: len(house.options.shaking) == 1)
            house.protocols[0].abort()
            await wire.hung_up()
        await until(lambda: house.connections.open == 0)
        assert "made" not in house.echoes[0].heard


async def test_unread_data_pauses_the_protocol_above(house: House) -> None:
    async with house.open():
        async with await house.enter(receive_buffer=4096) as wire:
            await until(lambda: bool(house.echoes[0].heard))
            echo = house.echoes[0]
            sent = 0
            while "pause" not in echo.heard:
                echo.transport.write(bytes(WRITE_BUFFER))
                sent += WRITE_BUFFER
                await asyncio.sleep(0)
            assert echo.transport.get_write_buffer_size() <= 2 * WRITE_BUFFER
            got = 0
            while got < sent:
                assert await wire._receive()
                got += len(wire._inbox)
                wire._inbox.clear()
            await until(lambda: echo.heard[-1] == "resume")
            assert house.protocols[0]._deadline is None


async def test_a_client_that_never_reads_is_closed(authority: Authority) -> None:
    """Even if TLS has taken one large write whole, and so never pauses the protocol."""
    house = House(authority, patience=0.1)
    async with house.open():
        async with await house.enter(receive_buffer=4096):
            await until(lambda: bool(house.echoes[0].heard))
            echo = house.echoes[0]
            echo.transport.write(bytes(16 << 20))
            await until(lambda: "lost" in echo.heard)
            assert "pause" not in echo.heard


async def test_a_client_that_ends_its_side(house: House) -> None:
    """Everything read: TLS closes properly.  With unread data: closed at once."""
    async with house.open():
        async with await house.enter() as wire:
            await wire.notify()
            await wire.hung_up()
            assert house.echoes[0].heard == ["made", "eof", "lost"]
        async with await house.enter(receive_buffer=4096) as wire:
            await until(lambda: bool(house.echoes[1].heard))
            echo = house.echoes[1]
            echo.transport.write(bytes(16 << 20))
            raw = house.protocols[1]._raw
            await settled(raw.get_write_buffer_size)
            wire.half_close()
            await until(lambda: "lost" in echo.heard)


def test_a_peer_that_has_closed_has_no_address() -> None:
    class Gone(asyncio.BaseTransport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return default

    assert peer(Gone()) == ""
