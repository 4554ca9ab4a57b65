"""Leases: which agents get one, how long it lasts, and for which addresses."""

from __future__ import annotations

from typing import Any

import pytest

from gollama_proxy.config.load import load_worker
from gollama_proxy.config.settings import Agents as Settings
from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.fleet import agents
from gollama_proxy.fleet.agents import (
    GRACE,
    TRANSITIONS,
    Agents,
    LeaseEvent,
    LeaseState,
    WorkerLease,
    answer_to,
)
from gollama_proxy.wire.errors import Code, RequestError
from tests.fakes.clock import Clock

ONE, OTHER = "1" * 64, "2" * 64  # digests of two agents


def worker(name: str = "desk", url: str = "http://10.0.0.1:8080") -> WorkerConfig:
    return load_worker("worker", {"name": name, "url": url}, {})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Agents:
    return Agents(Settings(), clock)


def leased(fleet: Agents, config: WorkerConfig, agent: str = ONE) -> WorkerLease:
    lease = fleet.begin(config, agent)
    assert lease.state is LeaseState.PROVING
    fleet.conclude(lease, proved=True)
    return lease


def test_every_step_leads_somewhere() -> None:
    ends = {state for _, state in TRANSITIONS.items()}
    assert ends == {LeaseState.LEASED, LeaseState.ENDED}
    lease = WorkerLease(worker(), ONE)
    with pytest.raises(KeyError):
        lease.step(LeaseEvent.RENEWED)  # not before it is proved
    lease.step(LeaseEvent.UNPROVED)
    for event in LeaseEvent:
        with pytest.raises(KeyError):
            lease.step(event)


def test_a_lease_lasts_from_each_renewal(fleet: Agents, clock: Clock) -> None:
    lease = leased(fleet, worker())
    clock.advance(29)
    assert fleet.expire() == []
    fleet.renew(lease, {"load": 0.5})
    assert lease.report == {"load": 0.5}
    clock.advance(29)
    assert fleet.expire() == []
    clock.advance(1)
    assert fleet.expire() == [lease]
    assert lease.state is LeaseState.ENDED
    assert fleet.find("desk") is None
    assert fleet.expire() == []


def test_a_lease_that_has_ended_is_not_renewed(fleet: Agents) -> None:
    lease = leased(fleet, worker())
    fleet.release("desk")
    with pytest.raises(KeyError):
        fleet.renew(lease, {})


def test_an_agent_keeps_its_lease_without_another_proof(fleet: Agents) -> None:
    lease = leased(fleet, worker())
    assert fleet.begin(worker(), ONE) is lease


@pytest.mark.parametrize(
    ("url", "agent"),
    [("http://10.0.0.2:8080", ONE), ("http://10.0.0.1:8080", OTHER)],
)
def test_another_address_or_agent_is_proved(
    fleet: Agents, url: str, agent: str
) -> None:
    first = leased(fleet, worker())
    second = leased(fleet, worker(url=url), agent)
    assert fleet.find("desk") is second is not first


def test_a_failed_proof_leaves_the_lease_that_there_is(fleet: Agents) -> None:
    first = leased(fleet, worker())
    second = fleet.begin(worker(), OTHER)
    fleet.conclude(second, proved=False)
    assert second.state is LeaseState.ENDED
    assert fleet.find("desk") is first


def refusal(fleet: Agents, config: WorkerConfig, agent: str = OTHER) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fleet.begin(config, agent)
    return caught.value


def test_a_name_belongs_to_one_address(fleet: Agents, clock: Clock) -> None:
    leased(fleet, worker())
    error = refusal(fleet, worker(url="http://10.0.0.2:8080"))
    assert (error.code, error.param) == (Code.CONFLICT, "name")
    assert "http://10.0.0.1:8080" in str(error)
    clock.advance(30)
    fleet.expire()
    leased(fleet, worker(url="http://10.0.0.2:8080"), OTHER)  # it is free again


def test_proofs_and_leases_are_limited(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "MOST_PROOFS", 2)
    fleet = Agents(Settings(limit=1), clock)
    first = fleet.begin(worker("a"), ONE)
    error = refusal(fleet, worker("a"), ONE)
    assert (error.code, error.retry_after) == (Code.RATE_LIMITED, 1)
    assert error.message == (
        "The hub is checking another registration. Try again in a moment."
    )
    fleet.begin(worker("b"), ONE)
    assert refusal(fleet, worker("c"), ONE).code is Code.RATE_LIMITED
    fleet.conclude(first, proved=True)
    error = refusal(fleet, worker("c"), ONE)
    assert (error.code, error.message) == (
        Code.CONFLICT,
        "1 workers are registered, which is the limit (agents.limit).",
    )
    assert fleet.begin(worker("a"), ONE) is first
    assert repr(fleet) == "<Agents leases=1 proving=1>"


def test_a_lease_is_released_once(fleet: Agents) -> None:
    lease = leased(fleet, worker())
    assert fleet.release("desk") is lease
    assert lease.state is LeaseState.ENDED
    assert fleet.release("desk") is None


def test_a_restored_lease_has_its_time(fleet: Agents, clock: Clock) -> None:
    fleet.restore(worker(), ONE)
    lease = fleet.begin(worker(), ONE)
    assert lease.state is LeaseState.LEASED
    clock.advance(30)
    assert fleet.expire() == [lease]


def test_the_secret_is_not_shown() -> None:
    assert ONE not in repr(WorkerLease(worker(), ONE))


def test_an_answer_depends_on_everything_it_is_for() -> None:
    answers = {
        answer_to(nonce, secret, name)
        for nonce in ("n", "m")
        for secret in (b"s", b"t")
        for name in ("a", "b")
    }
    assert len(answers) == 8


# --- Addresses --------------------------------------------------------------------

FAR, NEAR = "10.0.0.9", "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("10.1.2.3", FAR),
        ("172.31.0.1", FAR),
        ("192.168.1.20", "192.168.1.20"),
        ("100.64.0.7", FAR),
        ("fd12::1", "fd12::1"),
        ("10.1.2.3", NEAR),
        ("127.0.0.1", NEAR),
        ("::1", NEAR),
        ("127.0.0.1", "::1"),
        ("::ffff:10.0.0.1", FAR),
    ],
)
def test_an_address_in_a_private_network(fleet: Agents, host: str, peer: str) -> None:
    fleet.check_address(host, peer)


@pytest.mark.parametrize(
    ("host", "peer", "reason"),
    [
        ("8.8.8.8", FAR, "outside the networks"),
        ("172.32.0.1", FAR, "outside the networks"),
        ("2001:db8::1", FAR, "outside the networks"),
        ("::ffff:8.8.8.8", FAR, "outside the networks"),
        ("127.0.0.1", FAR, "loopback"),
        ("127.9.9.9", FAR, "loopback"),
        ("::1", FAR, "loopback"),
        ("::ffff:127.0.0.1", FAR, "loopback"),
        ("127.0.0.1", "", "loopback"),
        ("169.254.169.254", NEAR, "metadata"),
        ("100.100.100.200", FAR, "metadata"),
        ("169.254.7.7", "169.254.7.7", "link-local"),
        ("fe80::1", "fe80::1", "link-local"),
        ("0.0.0.0", NEAR, "not the address of a machine"),
        ("255.255.255.255", FAR, "not the address of a machine"),
    ],
)
def test_another_address(fleet: Agents, host: str, peer: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        fleet.check_address(host, peer)
    assert (caught.value.code, caught.value.param) == (Code.ADDRESS_REFUSED, "url")


@pytest.mark.parametrize(
    ("networks", "listed"),
    [((), "none"), (("10.0.0.0/8", "2001:db8::/32"), "10.0.0.0/8, 2001:db8::/32")],
)
def test_the_networks_are_settings(clock: Clock, networks: Any, listed: str) -> None:
    fleet = Agents(Settings(networks=networks), clock)
    with pytest.raises(RequestError) as caught:
        fleet.check_address("8.8.8.8", FAR)
    assert caught.value.message == (
        f"The address 8.8.8.8 is outside the networks of agents.networks ({listed})."
    )
    fleet.reconfigure(Settings(networks=("8.8.8.0/24",)))
    fleet.check_address("8.8.8.8", FAR)


def test_other_settings_are_for_new_leases_and_renewals(clock: Clock) -> None:
    fleet = Agents(Settings(limit=0), clock)
    assert refusal(fleet, worker("a"), ONE).code is Code.CONFLICT
    fleet.reconfigure(Settings(lease=7.0, networks=()))
    lease = leased(fleet, worker("a"))
    assert lease.expires == clock() + 7
    with pytest.raises(RequestError, match=r"agents\.networks"):
        fleet.check_address("10.0.0.1", FAR)


def test_a_lease_that_is_renewed_at_another_hub_lasts(
    fleet: Agents, clock: Clock
) -> None:
    lease = leased(fleet, worker())
    renewed: list[WorkerLease] = []
    fleet.on_renewed = renewed.append
    fleet.renew(lease, {"load": 0.5})
    assert renewed == [lease]
    lasts = lease.expires - clock()
    clock.advance(20)
    fleet.hear("unknown", ONE, {}, 0)
    fleet.hear(lease.name, OTHER, {}, 0)  # another registration of its name
    fleet.hear(lease.name, ONE, {"load": 0.1}, 26)  # before the one here
    assert lease.report == {"load": 0.5}
    assert lease.expires == clock() - 20 + lasts
    fleet.hear(lease.name, ONE, {"load": 0.7}, 2)
    assert lease.report == {"load": 0.7}
    assert lease.expires == clock() - 2 + lasts + GRACE
    assert renewed == [lease]
    clock.advance(lasts)
    fleet.prolong()
    assert lease.expires == clock() + lasts + GRACE
    clock.advance(lasts + GRACE)
    assert fleet.expire() == [lease]


def test_a_restored_lease_keeps_what_its_agent_has_reported(fleet: Agents) -> None:
    lease = leased(fleet, worker())
    fleet.renew(lease, {"load": 0.5})
    fleet.restore(lease.worker, ONE, sleeping=True)
    again = fleet.find(lease.name)
    assert again is not None
    assert (again.report, again.sleeping) == ({"load": 0.5}, True)
    fleet.restore(lease.worker, OTHER)
    other = fleet.find(lease.name)
    assert other is not None
    assert other.report == {}
