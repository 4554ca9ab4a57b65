"""Hubs that announce themselves, and how they are found: real mDNS on loopback."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gollama_proxy import agent, registration
from gollama_proxy.config.load import load
from gollama_proxy.config.values import ConfigError
from gollama_proxy.tasks import Signals
from tests.fakes.waiting import DEADLINE

LOOPBACK = ["127.0.0.1"]


@pytest.fixture
def multicast() -> None:
    """Skip where the loopback interface carries no multicast at all."""
    group = socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        try:
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            receiver.bind(("", 0))
            receiver.settimeout(5)
            port = receiver.getsockname()[1]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                interface = socket.inet_aton("127.0.0.1")
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
                sender.sendto(b"x", ("224.0.0.251", port))
            receiver.recv(1)
        except OSError as exc:
            pytest.skip(f"no multicast on the loopback interface: {exc}")


async def found(count: int) -> list[str]:
    async with asyncio.timeout(DEADLINE):
        while len(urls := await registration.discover(0.3, LOOPBACK)) != count:
            pass
    return urls


async def test_a_hub_is_found_as_long_as_it_runs(multicast: None) -> None:
    one, two = "http://127.0.0.1:18000", "http://127.0.0.1:18001"
    async with registration.advertise(one, LOOPBACK, LOOPBACK):
        assert await found(1) == [one]
        async with registration.advertise(two, LOOPBACK, LOOPBACK):
            assert await found(2) == [one, two]
        assert await found(1) == [one]
    assert await found(0) == []


@pytest.mark.parametrize(
    ("url", "addresses", "seen"),
    [
        ("http://0.0.0.0:8000", ["10.0.0.5"], "http://10.0.0.5:8000"),
        ("http://[::]:8000", ["fd00::5", "10.0.0.5"], "http://10.0.0.5:8000"),
        ("http://[::]:8000", ["fd00::5"], "http://[fd00::5]:8000"),
        ("https://0.0.0.0:8443", ["10.0.0.5"], "https://gateway.local:8443"),
        ("http://0.0.0.0:8000", [], ""),
    ],
)
def test_records_lead_to_the_url(
    monkeypatch: pytest.MonkeyPatch, url: str, addresses: list[str], seen: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gateway.lan")
    info = registration.announcement(url, addresses)
    assert info.name == f"gateway-{info.port}._gollama-proxy._tcp.local."
    assert registration.url_of(info) == seen


def test_another_scheme_is_no_hub() -> None:
    info = registration.announcement("ftp://10.0.0.5:21", ["10.0.0.5"])
    assert registration.url_of(info) == ""


def test_the_addresses_of_a_hub() -> None:
    assert registration.addresses_of("127.0.0.1") == ["127.0.0.1"]
    assert "127.0.0.1" in registration.addresses_of("localhost")
    assert "127.0.0.1" not in registration.addresses_of("0.0.0.0")


async def test_an_agent_needs_one_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[], ["http://10.0.0.5:8000"]]

    async def discover() -> list[str]:
        return answers.pop(0)

    monkeypatch.setattr(registration, "discover", discover)
    assert await registration.find_hub(Signals()) == "http://10.0.0.5:8000"
    answers.append(["http://10.0.0.5:8000", "http://10.0.0.6:8000"])
    with pytest.raises(ConfigError, match=r"found several hubs: .*; must be one of"):
        await registration.find_hub(Signals())


async def test_a_signal_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Signals()

    async def discover() -> list[str]:
        signals.asked.set()
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(registration, "discover", discover)
    assert await registration.find_hub(signals) == ""


@pytest.mark.parametrize(
    ("hubs", "discover", "why"),
    [
        ((), False, "--hub: is missing"),
        (
            ("http://gateway:8000",),
            True,
            "--hub: cannot be given together with --discover",
        ),
    ],
)
def test_a_hub_is_named_or_discovered(
    hubs: tuple[str, ...], discover: bool, why: str
) -> None:
    options = agent.Options(hubs, discover, worker="http://127.0.0.1:8080")
    with pytest.raises(ConfigError, match=why):
        agent.check_options(options, {})


def test_discovery_needs_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    how = r"needs zeroconf; pip install 'gollama-proxy\[mdns\]'"
    options = agent.Options((), True, worker="http://127.0.0.1:8080")
    with pytest.raises(ConfigError, match=f"--discover: {how}"):
        agent.check_options(options, {})
    flags = {"server.advertise": True, "server.host": "0.0.0.0"}
    with pytest.raises(ConfigError, match=f"server.advertise = true: {how}"):
        load(None, {"GOLLAMA_JWT_SECRET": "x" * 32}, flags)


def test_a_hub_that_others_cannot_reach_is_not_advertised() -> None:
    with pytest.raises(ConfigError, match="other machines cannot reach"):
        load(None, {"GOLLAMA_JWT_SECRET": "x" * 32}, {"server.advertise": True})
