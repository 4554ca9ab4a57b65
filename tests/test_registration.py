"""What an agent with hubs decides: of a cluster, one is called, others stand by."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gollama_proxy import registration
from gollama_proxy.agent import Agent, Options
from gollama_proxy.registration import HubLink, HubReply, Refusal, Schedule
from tests.fakes.script import answer
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

PATH = "/agent/workers/desk"
LATEST = max  # of a range of waits
OFTEN = 0.3  # seconds of a lease, of which an agent lets a third pass


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first hub answer before the next is called, however slow that is."""
    monkeypatch.setattr(registration, "FIRST_ANSWER", 3600.0)


def grant(hub: ScriptedWorker, cluster: str = "", **more: Any) -> None:
    """Let a hub register each worker, as a member of this cluster."""
    body = {"name": "desk", "lease": OFTEN, "running": 0, "drain": 5} | more
    hub.on(PATH, *answer(body | {"cluster": cluster} if cluster else body))


def refuse(hub: ScriptedWorker, status: int, code: str) -> None:
    hub.on(PATH, *answer({"error": {"message": "No.", "code": code}}, status))


def calls(hub: ScriptedWorker, method: str = "PUT") -> int:
    """Count what a hub was asked by agents."""
    return sum(request.method == method for request in hub.control + hub.requests)


@contextlib.asynccontextmanager
async def agent_of(*hubs: ScriptedWorker, **options: Any) -> AsyncIterator[Agent]:
    """Run an agent whose server answers."""
    async with ScriptedWorker() as worker:
        urls = tuple(hub.url for hub in hubs)
        given: dict[str, Any] = {"hubs": urls, "worker": worker.url, "name": "desk"}
        agent = Agent(Options(**given | options), None)
        async with agent.answering(), agent.serving():
            yield agent


def keeper_of(agent: Agent) -> HubLink | None:
    """Return the hub that has the registration, once the others stand by."""
    kept = [each for each in agent.hubs if each.registered]
    waiting = [each for each in agent.hubs if each.standing_by]
    settled = len(kept) == 1 and len(waiting) == len(agent.hubs) - 1
    return kept[0] if settled else None


async def test_one_hub_of_a_cluster_has_the_registration() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        grant(one, "c")
        grant(two, "c")
        async with agent_of(one, two) as agent:
            await until(lambda: keeper_of(agent) is not None)
            assert keeper_of(agent) is agent.hubs[0]
            before, seen = calls(two), calls(one)
            await until(lambda: calls(one) > seen + 3)
            assert calls(two) == before
            assert agent.describe().startswith(
                "registered as desk with 1 of 2 hubs, 1 standing by"
            )
            assert repr(agent.hubs[1]) == f"<HubLink {two.url} standing by>"


async def test_the_next_hub_is_called_when_one_does_not_answer() -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker() as three,
    ):
        for hub in (one, two, three):
            grant(hub, "c")
        async with agent_of(one, two, three) as agent:
            first, second, _ = agent.hubs
            await until(lambda: keeper_of(agent) is first)
            await one.down()
            await until(lambda: second.registered)
            # One that is back does not take the registration from the one that has it.
            await one.up()
            await until(lambda: keeper_of(agent) is second)
            await two.down()
            await until(lambda: not second.registered)
            await until(lambda: first.registered or agent.hubs[2].registered)


async def test_the_next_hub_is_called_when_one_drains() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        grant(one, "c")
        grant(two, "c")
        async with agent_of(one, two) as agent:
            await until(lambda: keeper_of(agent) is agent.hubs[0])
            refuse(one, 503, "hub_draining")
            await until(lambda: agent.hubs[1].registered)


async def test_hubs_that_share_nothing_are_all_called() -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker() as three,
    ):
        grant(one)
        grant(two)
        grant(three, "c")
        async with agent_of(one, two, three) as agent:
            await until(lambda: all(each.registered for each in agent.hubs))
            seen = [calls(hub) for hub in (one, two, three)]
            await until(lambda: calls(one) > seen[0] + 2)
            await until(lambda: calls(two) > seen[1] and calls(three) > seen[2])


async def test_a_hub_without_its_store_is_on_its_own() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        grant(one, "c")
        grant(two, "c")
        async with agent_of(one, two) as agent:
            await until(lambda: keeper_of(agent) is agent.hubs[0])
            grant(one)  # it cannot pass the registration on to the other
            await until(lambda: all(each.registered for each in agent.hubs))
            grant(one, "c")
            await until(lambda: keeper_of(agent) is not None)


async def test_a_machine_that_sleeps_asks_each_hub_of_a_cluster() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        grant(one, "c")
        grant(two, "c")
        options = {"sleep_after": 3600.0, "mac": "00:11:22:aa:bb:cc"}
        async with agent_of(one, two, **options):
            await until(lambda: calls(one) > 2 and calls(two) > 2)


async def test_a_hub_that_is_away_does_not_keep_the_next_one_from_being_called() -> (
    None
):
    async with ScriptedWorker(up=False) as one, ScriptedWorker() as two:
        grant(two, "c")
        async with agent_of(one, two) as agent:
            await until(lambda: agent.hubs[1].registered)


async def test_each_hub_of_a_cluster_lets_its_own_answers_end() -> None:
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        grant(one, "c")
        grant(two, "c", running=1)
        async with agent_of(one, two) as agent:
            await until(lambda: keeper_of(agent) is agent.hubs[0])
            grant(two, "c")
            await agent.leave()
            assert calls(one, "DELETE") == calls(two, "DELETE") == 1


# --- Answers of hubs --------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (200, "", Refusal.NONE),
        (201, "", Refusal.NONE),
        (0, "", Refusal.PASSING),
        (429, "rate_limit_exceeded", Refusal.PASSING),
        (500, "", Refusal.PASSING),
        (503, "hub_draining", Refusal.PASSING),
        (409, "conflict", Refusal.PATIENT),
        (403, "address_refused", Refusal.PATIENT),
        (403, "insufficient_scope", Refusal.LASTING),
        (401, "invalid_api_key", Refusal.LASTING),
        (400, "invalid_value", Refusal.LASTING),
        (404, "unknown_url", Refusal.LASTING),
        (301, "", Refusal.LASTING),
    ],
)
def test_what_an_answer_means(status: int, code: str, expected: Refusal) -> None:
    assert HubReply(status, "", {"code": code}).refusal is expected


def test_a_lease_is_renewed_three_times_in_its_life() -> None:
    schedule = Schedule(LATEST)
    assert schedule.after(HubReply(200, "", {"lease": 30})) == 10
    for lease in (None, "x", 0, -1, 1e9, float("nan"), True):
        assert 0 < schedule.after(HubReply(200, "", {"lease": lease})) <= 10


def test_a_hub_that_is_away_is_tried_less_and_less_often() -> None:
    schedule, away = Schedule(LATEST), HubReply(0)
    waits = [schedule.after(away) for _ in range(7)]
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    schedule.after(HubReply(200))
    assert schedule.after(away) == 1
    early = Schedule(min)
    assert [early.after(away) for _ in range(3)] == [0.5, 1, 2]


def test_a_refusal_is_tried_again_slowly() -> None:
    schedule = Schedule(LATEST)
    assert schedule.after(HubReply(409)) == Schedule.SLOW
    assert schedule.after(HubReply(401)) == Schedule.LASTING


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (401, b'{"error": {"message": "No\\n token."}}', "No token."),
        (404, b"<html>", "answered 404; is it a hub?"),
        (200, b"[]", "answered 200; is it a hub?"),
        (500, b'{"error": 3}', "answered 500"),
        (500, b'{"error": {"message": null}}', "answered 500"),
    ],
)
def test_an_error_is_one_line(status: int, body: bytes, text: str) -> None:
    assert registration.read_reply(status, body).text == text
