"""Groups of workers: what a name leads to, and for how long."""

from __future__ import annotations

import logging

import pytest

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Config, Health, Origin, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.upstream.names import KEPT, MOST, Groups, ServerAddress, member_of
from tests.fakes.clock import Clock
from tests.fakes.waiting import until


def configured(*urls: str) -> tuple[WorkerConfig, ...]:
    return config.load(None, {}, {}, urls).workers


def at(*addresses: str, port: int = 8080) -> list[ServerAddress]:
    return [ServerAddress("llama.lan", port, address) for address in addresses]


class Names:
    """A resolver with a script."""

    def __init__(self) -> None:
        self.answers: dict[str, list[ServerAddress] | OSError] = {}
        self.changes = 0
        self.clock = Clock()
        self.groups = Groups(Health(), self.look_up, self.note, self.clock)

    async def look_up(self, origin: Origin, timeout: float) -> list[ServerAddress]:
        assert timeout == Health().timeout
        answer = self.answers[origin.host]
        if isinstance(answer, OSError):
            raise answer
        return answer

    def note(self) -> None:
        self.changes += 1


@pytest.fixture
def names() -> Names:
    return Names()


GROUP = configured("dns+http://llama.lan:8080")


async def test_each_address_is_a_worker_with_the_settings_of_the_group(
    names: Names,
) -> None:
    names.answers["llama.lan"] = at("10.0.0.1", "10.0.0.2")
    names.groups.follow(GROUP)
    assert names.groups.expand(GROUP) == []
    await names.groups.refresh()
    one, two = names.groups.expand(GROUP)
    assert [one.name, two.name] == ["llama.lan-10.0.0.1", "llama.lan-10.0.0.2"]
    assert one.url == "http://10.0.0.1:8080"
    assert one.origin == Origin("http", "llama.lan", 8080, "", "10.0.0.1")
    assert one.origin.authority == "llama.lan:8080", "for `Host`, and for TLS"
    assert one.parent == "llama.lan"


async def test_names_are_looked_up_at_once_with_other_settings(names: Names) -> None:
    names.answers["llama.lan"] = at("10.0.0.1")
    names.groups.follow(GROUP)
    names.groups.start()
    await names.groups.looked_up()
    names.answers["llama.lan"] = at("10.0.0.2")
    names.groups.reconfigure(Health(rise=2))
    await until(lambda: names.changes == 2)
    [member] = names.groups.expand(GROUP)
    assert member.origin.address == "10.0.0.2"
    await names.groups.stop()


async def test_addresses_come_and_go(names: Names) -> None:
    names.groups.follow(GROUP)
    for found in at("10.0.0.1"), at("10.0.0.1", "10.0.0.2"), at("10.0.0.2"):
        names.answers["llama.lan"] = found
        await names.groups.refresh()
        await names.groups.refresh()
        addresses = [each.origin.address for each in names.groups.expand(GROUP)]
        assert addresses == [each.address for each in found]
    assert names.changes == 3, "none for the same answer"


@pytest.mark.parametrize("answer", [[], OSError("no such name")])
async def test_the_last_members_are_kept_for_a_while(
    names: Names,
    answer: list[ServerAddress] | OSError,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names.groups.follow(GROUP)
    names.answers["llama.lan"] = at("10.0.0.1")
    await names.groups.refresh()
    names.answers["llama.lan"] = answer
    names.clock.advance(KEPT - 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await names.groups.refresh()
    assert len(names.groups.expand(GROUP)) == 1
    assert len(caplog.messages) == 1, "logged once"
    assert caplog.messages[0].startswith("group llama.lan: ")
    assert names.groups.failures()
    names.clock.advance(1)
    await names.groups.refresh()
    assert names.groups.expand(GROUP) == []
    names.answers["llama.lan"] = at("10.0.0.1")
    await names.groups.refresh()
    assert len(names.groups.expand(GROUP)) == 1
    assert names.groups.failures() == []


async def test_a_worker_that_is_configured_by_itself_is_no_member(
    names: Names,
) -> None:
    """Its own settings come first, and those of workers from other sources."""
    names.answers["llama.lan"] = at("10.0.0.1", "10.0.0.2", "10.0.0.3")
    single, other = configured("http://10.0.0.1:8080", "http://10.0.0.2")
    both = (*GROUP, single)
    names.groups.follow(both)
    await names.groups.refresh()
    expanded = names.groups.expand(both, [other])
    assert [each.name for each in expanded] == ["llama.lan-10.0.0.3", "10.0.0.1:8080"]


async def test_an_endless_answer_is_cut(names: Names) -> None:
    names.answers["llama.lan"] = at(*(f"10.0.{n}.1" for n in range(MOST - 1)), *"abc")
    names.groups.follow(GROUP)
    await names.groups.refresh()
    assert len(names.groups.expand(GROUP)) == MOST


async def test_a_group_that_was_removed_has_no_members(names: Names) -> None:
    names.answers["llama.lan"] = at("10.0.0.1")
    names.groups.follow(GROUP)
    await names.groups.refresh()
    names.groups.follow(())
    assert names.groups.expand(GROUP) == []
    assert repr(names.groups) == "<Groups []>"


def test_a_server_of_an_srv_record_has_its_own_port() -> None:
    [group] = configured("dns+https://_llama._tcp.lan/api")
    member = member_of(group, ServerAddress("node1.lan", 9931))
    assert member.url == "https://node1.lan:9931/api"
    assert member.name == "_llama._tcp.lan-node1.lan:9931"
    assert member.origin == Origin("https", "node1.lan", 9931, "/api")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("dns+http://10.0.0.1:8080", "must be a name, after dns+"),
        ("dns+http://_llama._tcp.lan:80", "SRV records of the name have the port"),
        ("dns+ftp://llama.lan", "the scheme must be"),
        ("dns+http://metadata.google.internal", "metadata"),
    ],
)
def test_a_wrong_group(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        configured(url)


def test_srv_records_need_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gollama-proxy\[dns\]'"):
        configured("dns+http://_llama._tcp.lan")
    configured("dns+http://llama.lan")


async def test_a_group_that_comes_while_others_are_looked_up(names: Names) -> None:
    names.answers["llama.lan"] = at("10.0.0.1")
    names.groups.start()
    names.groups.follow(GROUP)
    await names.groups.looked_up()
    assert repr(names.groups) == "<Groups [<_Group llama.lan members=1>]>"
    await names.groups.stop()


def test_only_settings_can_have_a_group() -> None:
    registry = Registry(Config(workers=configured("http://10.0.0.1:8080")))
    with pytest.raises(ConfigError, match="a group of workers can only be"):
        registry.add(GROUP[0])
    with pytest.raises(ConfigError, match="a group of workers can only be"):
        registry.replace(GROUP[0], "10.0.0.1:8080")
