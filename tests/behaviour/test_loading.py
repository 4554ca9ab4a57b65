"""Workers that load a model when they are asked for it: llama-server's router mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.fleet import pool
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.clock import Clock
from tests.fakes.exchange import Exchange
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, event, not_found, sse_head
from tests.fakes.script import (
    Step,
    answer,
    chat_stream,
    expect_eof,
    reset,
    send,
    wait,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

FAST = 1e9  # bytes/s of a prompt: it makes an allowance no longer


@asynccontextmanager
async def routers(
    *status: str, slots: int = 1, **settings: Any
) -> AsyncIterator[tuple[list[ScriptedWorker], RunningHub]]:
    """Run a hub and workers of one model, which is loaded there or not."""
    settings = {"health__interval": 3600, "retry__attempts": 2, **settings}
    workers = [ScriptedWorker(slots=slots) for _ in status]
    for worker, each in zip(workers, status, strict=True):
        worker.status = {"tiny": each}
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        hub = await stack.enter_async_context(running_hub(*workers, **settings))
        yield workers, hub


# --- Workers that are asked -------------------------------------------------------


async def test_a_worker_that_has_the_model_loaded_gets_all_requests() -> None:
    async with routers("unloaded", "loaded", "unloaded") as (workers, hub):
        for _ in range(6):
            assert (await hub.post(CHAT, WHOLE)).status == 200
        assert [len(each.requests) for each in workers] == [0, 6, 0]


async def test_a_request_waits_for_it_rather_than_have_another_one_load() -> None:
    async with routers("unloaded", "loaded") as ((cold, warm), hub):
        warm.default(wait("go"), *answer({"choices": []}))
        both = [asyncio.create_task(hub.post(CHAT, WHOLE), name="c") for _ in "ab"]
        await until(lambda: hub.hub.queue.admission.waiting == 1)
        warm.release("go")
        assert [(await each).status for each in both] == [200, 200]
        assert not cold.requests


async def test_a_request_waits_for_a_loaded_model_only_briefly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "LOAD_AFTER", 0.2)
    async with routers("unloaded", "loaded") as ((cold, warm), hub):
        warm.default(wait("go"), *answer({"choices": []}))
        first = asyncio.create_task(hub.post(CHAT, WHOLE), name="first")
        await warm.received()
        assert (await hub.post(CHAT, WHOLE)).header("x-gollama-worker") == cold.name
        warm.release("go")
        await first
        assert len(warm.requests) == 1


async def test_an_unloaded_worker_replaces_a_loaded_one_that_fails() -> None:
    async with routers("loaded", "unloaded") as ((warm, cold), hub):
        warm.default(reset())
        response = await hub.post(CHAT, WHOLE)
        assert response.header("x-gollama-worker") == cold.name


async def test_many_requests_make_only_one_worker_load() -> None:
    async with routers("unloaded", "unloaded", slots=4) as (workers, hub):
        for worker in workers:
            worker.default(wait("go"), *answer({"choices": []}))
        waiting = [asyncio.create_task(hub.post(CHAT, WHOLE), name="c") for _ in "abc"]
        await until(lambda: sum(len(each.requests) for each in workers) == 3)
        for worker in workers:
            worker.release("go")
        assert {(await each).status for each in waiting} == {200}
        assert sorted(len(each.requests) for each in workers) == [0, 3]


async def test_a_worker_that_is_already_loading_is_preferred() -> None:
    async with routers("unloaded", "loading") as ((cold, loading), hub):
        assert (await hub.post(CHAT, WHOLE)).status == 200
        assert (len(cold.requests), len(loading.requests)) == (0, 1)


# --- While it loads ---------------------------------------------------------------


async def test_the_client_of_a_stream_is_notified_and_no_other_worker_takes_over() -> (
    None
):
    """Loading is not slow, and nothing is learnt from it about reading."""
    settings = {"clock": Clock(), "queue__notice": 2, "timeouts__allowance": 1}
    async with routers("unloaded", "unloaded", slots=4, **settings) as (workers, hub):
        for worker in workers:
            worker.default(wait("loaded"), *chat_stream(["a", "b"]))
        for record in hub.hub.registry.workers:
            record.pace_of("tiny").rate = FAST
        async with await hub.open(CHAT, STREAM) as wire:
            await until(lambda: any(each.requests for each in workers))
            hub.pass_time(2)
            assert await wire.read_event() == b": loading model\n\n"
            [busy] = [each for each in workers if each.requests]
            busy.release("loaded")
            ending = await wire.read_to_end()
        assert ending.clean
        assert b"[DONE]" in ending.raw
        assert sum(len(each.requests) for each in workers) == 1
        assert all(r.pace_of("tiny").rate == FAST for r in hub.hub.registry.workers)


async def test_a_worker_with_the_model_loaded_gets_no_extra_time() -> None:
    settings = {"clock": Clock(), "queue__notice": 2, "timeouts__allowance": 10}
    async with routers("loaded", "loaded", **settings) as ((one, two), hub):
        for record in hub.hub.registry.workers:
            record.pace_of("tiny").rate = FAST
        one.script(expect_eof())
        two.default(*chat_stream(["a"]))
        asking = asyncio.create_task(hub.post(CHAT, STREAM), name="client")
        await one.received()
        hub.pass_time(11)
        response = await asking
        assert response.header("x-gollama-attempts") == "2"
        assert b"loading model" not in response.body


async def test_notices_can_be_switched_off() -> None:
    async with routers("unloaded", clock=Clock(), queue__notice=0) as ((worker,), hub):
        worker.script(wait("loaded"), *chat_stream(["a"]))
        asking = asyncio.create_task(hub.post(CHAT, STREAM), name="client")
        await worker.received()
        hub.pass_time(20)
        worker.release("loaded")
        assert b"loading" not in (await asking).body


# --- How far it has got -----------------------------------------------------------


def loading(share: float, stage: str = "text_model") -> bytes:
    """Build an event of `GET /models/sse`, as llama-server sends it."""
    stages = ["text_model", "mmproj_model"]
    progress = {"stages": stages, "current": stage, "value": share}
    return load_event({"status": "loading", "progress": progress})


def load_event(data: dict[str, Any]) -> bytes:
    return chunk(event({"model": "tiny", "event": "status_change", "data": data}))


async def test_the_client_of_a_stream_is_notified_of_the_progress() -> None:
    settings = {"clock": Clock(), "queue__notice": 2}
    async with routers("unloaded", **settings) as ((worker,), hub):
        worker.script(wait("loaded"), *chat_stream(["a"]))
        worker.on(
            "/models/sse",
            send(sse_head()),
            send(load_event({"status": "loading"})),
            send(loading(0.86)),
            wait("more"),
            send(loading(0.5, "mmproj_model")),
            wait("end"),
            send(load_event({"status": "loaded", "info": {}})),
            expect_eof(),
        )
        [record] = hub.hub.registry.workers
        async with await hub.open(CHAT, STREAM) as wire:
            await worker.received()
            hub.pass_time(0)
            await until(lambda: record.progress == {"tiny": 0.43}, "43 %")
            hub.pass_time(2)
            assert await wire.read_event() == b": loading model 43%\n\n"
            worker.release("more")
            await until(lambda: record.progress == {"tiny": 0.75}, "75 %")
            hub.pass_time(5)
            assert await wire.read_event() == b": loading model 75%\n\n"
            worker.release("end")
            await until(lambda: not record.progress, "no progress any more")
            worker.release("loaded")
            ending = await wire.read_to_end()
        assert b"[DONE]" in ending.raw
        hub.pass_time(0)
        await worker.idle()  # the stream of events is closed


async def test_a_worker_without_such_events_is_asked_once() -> None:
    settings = {"clock": Clock(), "queue__notice": 2}
    async with routers("unloaded", **settings) as ((worker,), hub):
        worker.script(wait("loaded"), *chat_stream(["a"]))
        worker.on("/models/sse", send(not_found()))
        async with await hub.open(CHAT, STREAM) as wire:
            await worker.received()
            for _ in range(3):
                hub.pass_time(5)
                assert await wire.read_event() == b": loading model\n\n"
                await until(lambda: "open=0" in repr(hub.hub.loading), "no feed")
            worker.release("loaded")
            await wire.read_to_end()
        targets = [each.target for each in (*worker.control, *worker.requests)]
        assert targets.count("/models/sse") == 1


async def test_nothing_is_followed_while_nothing_loads() -> None:
    async with routers("loaded", clock=Clock()) as ((worker,), hub):
        worker.script(wait("go"), *chat_stream(["a"]))
        asking = asyncio.create_task(hub.post(CHAT, STREAM), name="client")
        await worker.received()
        hub.pass_time(1)
        assert repr(hub.hub.loading) == "<LoadingFeeds open=0>"
        worker.release("go")
        await asking


# --- What is known of it ----------------------------------------------------------


async def test_the_list_of_models_shows_which_are_loaded() -> None:
    """After an answer that is known at once, and the others are checked."""
    async with routers("unloaded", "unloaded") as (workers, hub):

        async def loaded() -> tuple[bool | None, list[bool | None]]:
            [row] = (await hub.get("/v1/models")).json()["data"]
            reported = row["gollama"]
            return reported["loaded"], [each["loaded"] for each in reported["workers"]]

        def loading(worker: ScriptedWorker) -> Step:
            async def load(exchange: Exchange) -> None:
                worker.status = {"tiny": "loaded"}

            return Step("load", (), load)

        for each in workers:
            each.default(loading(each), *answer({"choices": []}))
        assert await loaded() == (False, [False, False])
        pings = [len(each.control) for each in workers]
        assert (await hub.post(CHAT, WHOLE)).status == 200
        [busy] = [each for each in workers if each.requests]
        assert await loaded() == (True, [each is busy for each in workers])
        index = workers.index(busy)
        await until(lambda: len(busy.control) > pings[index])
        assert len(workers[1 - index].control) == pings[1 - index]
