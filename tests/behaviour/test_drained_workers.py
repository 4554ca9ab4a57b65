"""A worker is taken out of service: its answers end in time, or go on elsewhere."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest

from gollama_proxy.fleet.breaker import BreakerState, Verdict
from gollama_proxy.fleet.state import Hold
from gollama_proxy.fleet.worker import Worker
from tests.behaviour.test_fleet_changes import settings_of
from tests.behaviour.test_rescue import (
    BODY,
    FIRST,
    broken_off,
    complete,
    continued,
    partial,
    pool,
)
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.hub import RunningHub, shown
from tests.fakes.script import chat_stream, expect_eof, notify, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

STREAMS = 20


def first(hub: RunningHub) -> Worker:
    return hub.hub.registry.workers[0]


def take_out(hub: RunningHub, way: str, within: float | None = None) -> Worker:
    registry = hub.hub.registry
    name = first(hub).name
    if way == "drain":
        worker = registry.hold(name, Hold.DRAINING, within)
    else:
        worker = registry.remove(name, within)
    hub.hub.watchdog.round()  # what checks the deadline, once a second
    return worker


def unblamed(worker: Worker) -> bool:
    assert worker.breaker.state is BreakerState.CLOSED
    assert shown(worker.breaker, "calls") == 0
    return True


@pytest.mark.parametrize("way", ["drain", "remove"])
async def test_what_has_not_ended_by_the_deadline_goes_on_elsewhere(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    workers = ScriptedWorker(slots=STREAMS), ScriptedWorker(slots=STREAMS)
    async with pool(*workers) as ([old, new], hub), AsyncExitStack() as stack:
        old.default(*partial(expect_eof()))
        new.default(*continued())
        wires = [
            await stack.enter_async_context(await hub.open(CHAT, BODY))
            for _ in range(STREAMS)
        ]
        for wire in wires:
            for _ in range(1 + len(FIRST)):  # the role, and the tokens
                await wire.read_event()
        worker = take_out(hub, way, within=0)
        rest = await asyncio.gather(*(wire.read_to_end() for wire in wires))
        assert all(ending.response.body.endswith(b"[DONE]\n\n") for ending in rest)
        assert {_text(ending.response.body) for ending in rest} == {b" a crow."}
        assert len(new.requests) == STREAMS
        assert unblamed(worker)
        assert worker.held is (Hold.DRAINING if way == "drain" else Hold.NONE)
        await until(lambda: hub.hub.registry.leaving == [])
        assert (await hub.post(CHAT, BODY)).header("x-gollama-worker") == new.name
    lost = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.getMessage() for r in lost] == []


def _text(body: bytes) -> bytes:
    pieces = body.split(b'"content":"')[1:]
    return b"".join(piece.partition(b'"')[0] for piece in pieces)


async def test_a_request_whose_answer_has_not_begun_goes_to_another_worker() -> None:
    async with pool() as ([old, new], hub):
        old.script(notify("asked"), expect_eof())
        new.script(*continued(echo=FIRST))
        async with await hub.open(CHAT, BODY) as wire:
            await old.reached("asked")
            worker = take_out(hub, "drain", within=0)
            assert complete(await wire.read_to_end(), rescued=0)
        assert unblamed(worker)


async def test_an_answer_in_one_piece_goes_on_elsewhere() -> None:
    async with pool() as ([old, new], hub):
        old.script(*partial(notify("begun"), expect_eof()))
        new.script(*continued())
        asked = asyncio.create_task(hub.post(CHAT, {"model": "tiny", **WHOLE}))
        await old.reached("begun")
        take_out(hub, "drain", within=0)
        answer = await asked
        assert answer.status == 200
        message = answer.json()["choices"][0]["message"]
        assert message["content"].endswith(" a crow.")


@pytest.mark.parametrize("way", ["drain", "remove"])
async def test_an_answer_may_end_before_the_deadline(way: str) -> None:
    async with pool(server__drain=1000) as ([old, new], hub):
        old.script(wait("go"), *chat_stream(FIRST[:1]))
        async with await hub.open(CHAT, BODY) as wire:
            await old.received(1)
            take_out(hub, way)
            old.release("go")
            ending = await wire.read_to_end()
        assert ending.clean
        assert not new.requests


async def test_a_pause_breaks_nothing_off() -> None:
    async with pool(server__drain=0) as ([old, new], hub):
        old.script(*partial(notify("begun"), wait("go"), *chat_stream([])[1:]))
        async with await hub.open(CHAT, BODY) as wire:
            await old.reached("begun")
            hub.hub.registry.hold(first(hub).name, Hold.PAUSED)
            hub.hub.watchdog.round()
            new.script(*chat_stream([" b"]))
            assert (await hub.post(CHAT, BODY)).header("x-gollama-worker") == new.name
            old.release("go")
            assert (await wire.read_to_end()).clean
        hub.hub.registry.release(first(hub).name, Hold.PAUSED)
        old.script(*chat_stream([" a"]))
        assert (await hub.post(CHAT, BODY)).header("x-gollama-worker") == old.name


async def test_without_another_worker_it_ends_honestly() -> None:
    async with pool(ScriptedWorker(), retry__patience=0) as ([only], hub):
        only.script(*partial(notify("begun"), expect_eof()))
        async with await hub.open(CHAT, BODY) as wire:
            await only.reached("begun")
            take_out(hub, "remove", within=0)
            ending = await wire.read_to_end()
        assert broken_off(ending, "worker_connection_lost")
        assert b"was taken out of service" in ending.raw


async def test_requests_that_wait_for_a_drained_worker_get_their_error() -> None:
    async with pool(ScriptedWorker(slots=1), queue__overcommit=0) as ([only], hub):
        only.script(*partial(notify("begun"), wait("go"), *chat_stream([])[1:]))
        async with await hub.open(CHAT, BODY) as wire:
            await only.reached("begun")
            waiting = asyncio.create_task(hub.post(CHAT, STREAM))
            await until(lambda: hub.hub.queue.admission.waiting == 1)
            hub.hub.registry.hold(first(hub).name, Hold.DRAINING)
            refused = await waiting
            assert refused.status == 503
            assert "(1 draining)" in refused.json()["error"]["message"]
            hub.hub.registry.release(first(hub).name, Hold.DRAINING)
            only.release("go")
            assert (await wire.read_to_end()).clean


async def test_a_worker_that_was_away_comes_back_with_what_was_learnt() -> None:
    async with pool() as ([old, _], hub):
        worker = first(hub)
        for _ in range(worker.policy.consecutive):
            worker.breaker.record(Verdict.FAILURE)
        pace = worker.pace_of("tiny")
        hub.hub.registry.remove(worker.name)
        assert worker not in hub.hub.connections
        again = hub.hub.registry.add(settings_of(old, "again"))
        assert again is worker
        assert (again.name, again.pace_of("tiny")) == ("again", pace)
        assert again.state.value == "starting"  # it has to be reached first
        await until(lambda: again.state.value == "ready")
        assert again.breaker.state is BreakerState.OPEN
        assert [each.name for each in hub.hub.registry.pool("tiny").workers][1:] == [
            "again"
        ]
