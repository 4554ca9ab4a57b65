"""A worker may close an idle connection at any time; clients do not notice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from gollama_proxy.fleet import health
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.upstream import pool as pools
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import ONE_TRY, RunningHub, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    finish,
    head,
    json_reply,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    answer,
    close,
    event_stream,
    notify,
    pause,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

OK = answer(chat_completion("hello"))
KEPT = event_stream(role() + token("a"), finish() + done())[:-1]  # without the close


def numbered(number: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"number {number}"}], **more}


def executions(worker: ScriptedWorker) -> Counter[str]:
    """How often a worker has got each prompt."""
    prompts = (request.json()["messages"][0]["content"] for request in worker.requests)
    return Counter(prompts)


async def ask_one_after_the_other(hub: RunningHub, number: int) -> list[int]:
    """On one client connection, so that nothing slows the next request down."""
    async with await hub.wire() as wire:
        statuses = []
        for n in range(number):
            await wire.post(CHAT, numbered(n), hub.token())
            statuses.append((await wire.read_response()).status)
            for _ in range(n % 7):  # a race is lost at some moments only
                await asyncio.sleep(0)
        return statuses


def assert_not_blamed(hub: RunningHub) -> None:
    [worker] = hub.hub.registry.workers
    assert worker.state is WorkerState.READY
    assert not worker.in_doubt


@pytest.mark.parametrize("end", [close(), reset()], ids=["close", "reset"])
async def test_a_worker_that_closes_after_each_answer(end: Any) -> None:
    """Having announced keep-alive; 200 times, and each request is executed once."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        pings = len(worker.control)
        # A reset takes along what was not received yet.
        worker.default(*OK, *[pause(0.001)] * (end == reset()), end)
        assert await ask_one_after_the_other(hub, 200) == [200] * 200
        assert set(executions(worker).values()) == {1}
        assert len(worker.requests) == 200
        assert len(worker.control) == pings, "no worker was suspected"
        assert_not_blamed(hub)


async def test_a_worker_that_closes_just_when_the_next_request_comes() -> None:
    """After up to 3 ms, of which a request takes one: some races are lost."""
    rolled = random.Random(7)
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for _ in range(400):
            worker.script(*OK, pause(rolled.uniform(0, 0.003)), close())
        results = await asyncio.gather(
            *(ask_one_after_the_other(hub, 100) for _ in range(4))
        )
        assert results == [[200] * 100] * 4
        assert len(worker.requests) == 400
        assert_not_blamed(hub)


async def test_a_worker_that_announces_the_last_answer() -> None:
    """As llama-server does with its 100th answer on a connection."""
    last = head(200, [("Content-Length", "2"), ("Connection", "close")]) + b"{}"
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for number in range(60):
            worker.script(send(last) if number % 5 == 4 else send(json_reply({})))
        assert await ask_one_after_the_other(hub, 60) == [200] * 60
        assert [r.reused for r in worker.requests] == [False, *[True] * 4] * 12


async def test_a_worker_that_was_restarted_between_two_requests() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for number in range(5):
            response = await hub.post(CHAT, numbered(number))
            assert response.status == 200
            await worker.down()
            await worker.up()
        assert set(executions(worker).values()) == {1}
        assert_not_blamed(hub)


async def test_many_idle_connections_may_die_at_once() -> None:
    async with ScriptedWorker(slots=64) as worker, running_hub(worker) as hub:
        for _ in range(3):
            gate = asyncio.Event()
            asked = len(worker.requests)
            worker.default(wait(gate), *OK)
            tasks = [
                asyncio.create_task(hub.post(CHAT, numbered(n))) for n in range(20)
            ]
            await worker.received(asked + 20)  # on 20 connections
            gate.set()
            responses = await asyncio.gather(*tasks)
            assert [response.status for response in responses] == [200] * 20
            await worker.down()
            await worker.up()
        assert set(executions(worker).values()) == {3}
        assert_not_blamed(hub)


async def test_idle_connections_are_closed_in_the_background() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, upstream__keepalive=0.1) as hub,
    ):
        for number in range(3):
            assert (await hub.post(CHAT, numbered(number))).status == 200
        await worker.idle()


async def test_health_checks_have_separate_connections() -> None:
    """Idle ones may be dead, and a health check must not find a dead one."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        [record] = hub.hub.registry.workers
        worker.default(*OK)
        assert (await hub.post(CHAT, numbered(1))).status == 200
        before = worker.connections
        assert await hub.hub.health.look(record)
        assert worker.connections == before + 3
        assert (await hub.post(CHAT, numbered(2))).status == 200
        assert [request.reused for request in worker.requests] == [False, True]
        assert not any(request.reused for request in worker.control)


# --- After event streams ----------------------------------------------------------


async def test_no_connection_of_a_worker_that_closes_after_streams_is_reused() -> None:
    """llama-server does, whatever it has announced; nothing is repeated."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for number in range(50):
            response = await hub.post(CHAT, numbered(number, stream=True))
            assert response.status == 200
        assert not any(request.reused for request in worker.requests)
        assert len(worker.requests) == 50


@pytest.fixture
def _quick_probation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.01)
    monkeypatch.setattr(pools, "PROBATION", 0.01)


@pytest.mark.usefixtures("_quick_probation")
async def test_a_worker_that_keeps_connections_after_streams_is_learnt() -> None:
    """Its connections are reused, by streams and by others, and are sound."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        [pool] = hub.hub.connections.values()
        worker.default(*KEPT)
        await hub.post(CHAT, numbered(0, stream=True))
        await until(lambda: pool.keeps_after_streams)
        for number in range(1, 50):
            stream = number % 3 > 0
            worker.script(*(KEPT if stream else OK))
            response = await hub.post(CHAT, numbered(number, stream=stream))
            assert response.status == 200
        assert [request.reused for request in worker.requests[2:]] == [True] * 48
        assert set(executions(worker).values()) == {1}


@pytest.mark.usefixtures("_quick_probation")
async def test_a_worker_that_stops_keeping_connections_fails_no_request() -> None:
    """A llama-server may have replaced it; at worst one request is repeated."""
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        [pool] = hub.hub.connections.values()
        worker.script(*KEPT)
        await hub.post(CHAT, numbered(0, stream=True))
        await until(lambda: pool.keeps_after_streams)
        worker.default(*KEPT, close())
        for number in range(1, 30):
            response = await hub.post(CHAT, numbered(number, stream=True))
            assert response.status == 200
        assert not pool.keeps_after_streams
        assert len(worker.requests) <= 31
        assert_not_blamed(hub)


# --- Once, or twice ---------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", [close(), reset()], ids=["close", "reset"])
async def test_a_used_connection_that_dies_unanswered_is_asked_again(
    end: Any, stream: bool
) -> None:
    """The one case in which a request may be executed twice (RFC 9112, 9.3.1)."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*OK)
        worker.script(end)
        assert (await hub.post(CHAT, numbered(1))).status == 200
        assert (await hub.post(CHAT, numbered(2, stream=stream))).status == 200
        assert [r.reused for r in worker.requests] == [False, True, False]
        assert executions(worker) == {"number 1": 1, "number 2": 2}
        assert_not_blamed(hub)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_repeated_only_once(stream: bool) -> None:
    """A worker that dies on a fresh connection dies of the request."""
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.script(*OK)
        worker.default(close())
        assert (await hub.post(CHAT, numbered(1))).status == 200
        response = await hub.post(CHAT, numbered(2, stream=stream))
        assert response.status == 502
        assert response.json()["error"]["code"] == "worker_connection_lost"
        assert executions(worker) == {"number 1": 1, "number 2": 2}


@pytest.mark.parametrize(
    "script",
    [
        (send(head(200, [("Content-Length", "9")])), reset()),
        (send(sse_head()), close()),
        (send(sse_head() + chunk(role()[:40])), reset()),
        (send(b"garbage"), stall()),
    ],
    ids=["head", "stream", "event", "garbage"],
)
async def test_a_request_whose_answer_has_begun_is_not_repeated(script: Script) -> None:
    """On a used connection as little as on a fresh one."""
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.script(*OK)
        worker.script(*script)
        assert (await hub.post(CHAT, numbered(1))).status == 200
        assert (await hub.post(CHAT, numbered(2))).status == 502
        assert executions(worker) == {"number 1": 1, "number 2": 1}


@pytest.mark.parametrize("end", [close(), reset()], ids=["close", "reset"])
async def test_a_fresh_connection_that_dies_is_not_asked_again(end: Any) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.script(end)
        assert (await hub.post(CHAT, numbered(1))).status == 502
        assert executions(worker) == {"number 1": 1}


async def test_a_silent_worker_is_not_asked_again() -> None:
    """It may be thinking."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, clock=Clock(), timeouts__first_token=1) as hub,
    ):
        worker.script(*OK)
        worker.script(notify("asked"), stall())
        assert (await hub.post(CHAT, numbered(1))).status == 200
        asking = asyncio.create_task(hub.post(CHAT, numbered(2)))
        await worker.reached("asked")
        hub.pass_time(2)
        assert (await asking).status == 504
        assert executions(worker) == {"number 1": 1, "number 2": 1}


async def test_bytes_without_a_request_are_not_an_answer() -> None:
    """The connection of a worker that sends while idle is closed, and not read."""
    late = json_reply({"whose": "no request"})
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*OK, pause(0.005), send(late))
        assert (await hub.post(CHAT, numbered(1))).status == 200
        await worker.idle()
        response = await hub.post(CHAT, numbered(2))
        assert response.status == 200
        assert "whose" not in response.json()
