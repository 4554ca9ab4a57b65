"""Counting the connections of clients, in all and by address."""

from __future__ import annotations

import pytest

from gollama_proxy.config.settings import Limits
from gollama_proxy.edge.connections import LOG_EVERY, ConnectionLimiter, household
from tests.fakes.clock import Clock


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
    assert not connections._by_address  # nobody is remembered who has left


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


def test_a_flood_is_told_of_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
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
