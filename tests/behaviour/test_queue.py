"""While every slot is busy, requests wait in the hub, bounded and in fair order."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gollama_proxy.config.settings import POLICIES
from gollama_proxy.fleet import health
from gollama_proxy.proxy import attempt
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.upstream.pool import SPACING
from tests.fakes.asks import CHAT, RARELY
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import error_reply, json_reply
from tests.fakes.script import (
    answer,
    chat_stream,
    close,
    expect_eof,
    notify,
    reset,
    send,
    wait,
)
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker


def ask(name: str = "x", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": name}], **fields}


def asked(worker: ScriptedWorker) -> list[str]:
    """Return the contents of the requests in the order of their arrival."""
    return [each.json()["messages"][0]["content"] for each in worker.requests]


@asynccontextmanager
async def crowded(
    slots: int = 1, **settings: Any
) -> AsyncIterator[tuple[ScriptedWorker, RunningHub, Queue]]:
    """Run a hub and a worker that answers when the test releases `go`."""
    settings = {"health__interval": RARELY, **settings}
    async with (
        ScriptedWorker(slots=slots) as worker,
        running_hub(worker, **settings) as hub,
    ):
        worker.default(wait("go"), *answer({"choices": []}))
        yield worker, hub, hub.hub.queue


def sent(
    hub: RunningHub, name: str, token: str | None = None, **headers: str
) -> asyncio.Task[Response]:
    given = [(key.replace("_", "-"), value) for key, value in headers.items()]
    posted = hub.post(CHAT, ask(name), token or hub.token(), headers=given)
    return asyncio.create_task(posted, name=f"fake client {name}")


async def waiting(queue: Queue, number: int) -> None:
    await until(lambda: queue.admission.waiting == number)


# --- Slots ------------------------------------------------------------------------


async def test_a_worker_never_gets_more_than_it_has_slots() -> None:
    async with crowded(slots=4) as (worker, hub, queue):
        clients = [sent(hub, str(n)) for n in range(40)]
        await waiting(queue, 36)
        await worker.received(4)
        assert len(worker.requests) == 4
        [record] = hub.hub.registry.workers
        assert record.in_flight == 4
        worker.release("go")
        assert {each.status for each in await asyncio.gather(*clients)} == {200}
        assert len(worker.requests) == 40
    assert not queue.admission.waiting


async def test_a_burst_beyond_the_threads_of_a_worker_is_spaced() -> None:
    async with crowded() as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        worker.on("/tokenize", wait("go"), *answer({"tokens": []}))
        began = time.monotonic()
        posts = [hub.post("/tokenize", {"content": "x"}) for _ in range(6)]
        clients = [asyncio.create_task(each, name="fake client") for each in posts]
        await worker.received(7)  # one slot, four threads, and two on top
        assert time.monotonic() - began >= 2 * SPACING
        worker.release("go")
        await asyncio.gather(running, *clients)


async def test_a_worker_that_does_not_report_its_slots_is_not_limited() -> None:
    async with crowded() as (worker, hub, queue):
        worker.on("/props", send(error_reply(404, "no", "not_found_error")))
        hub.hub.registry.workers[0].suspect()
        await until(lambda: hub.hub.registry.workers[0].slots is None)
        clients = [sent(hub, str(n)) for n in range(20)]
        await worker.received(20)
        worker.release("go")
        await asyncio.gather(*clients)
        assert not queue.admission.waiting


async def test_requests_that_need_no_slot_do_not_wait() -> None:
    async with crowded() as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        worker.on("/tokenize", *answer({"tokens": []}))
        response = await hub.post("/tokenize", {"content": "hello"})
        assert response.json() == {"tokens": []}
        worker.release("go")
        await running


async def test_additional_slots_are_used_without_a_restart() -> None:
    async with crowded() as (worker, hub, queue):
        clients = [sent(hub, str(n)) for n in range(3)]
        await waiting(queue, 2)
        worker.slots = 3
        hub.hub.registry.workers[0].suspect()
        await worker.received(3)
        worker.release("go")
        await asyncio.gather(*clients)


async def test_more_requests_than_slots_can_be_allowed() -> None:
    async with crowded(queue__overcommit=2) as (worker, hub, queue):
        clients = [sent(hub, str(n)) for n in range(4)]
        await waiting(queue, 1)
        await worker.received(3)
        assert len(worker.requests) == 3
        worker.release("go")
        await asyncio.gather(*clients)


# --- Bounds -----------------------------------------------------------------------


async def test_a_full_queue_rejects_immediately_and_names_its_limit() -> None:
    async with crowded(queue__size=8) as (worker, hub, queue):
        clients = [sent(hub, str(n)) for n in range(9)]
        await waiting(queue, 8)
        refused = await asyncio.gather(*(hub.post(CHAT, ask()) for _ in range(50)))
        for response in refused:
            assert response.status == 429
            error = response.json()["error"]
            assert error["code"] == "queue_full"
            assert "8 (queue.size)" in error["message"]
            assert int(response.header("retry-after") or "") >= 1
        assert len(worker.requests) == 1
        worker.release("go")
        assert {each.status for each in await asyncio.gather(*clients)} == {200}


async def test_a_wait_that_is_too_long_ends_with_an_error() -> None:
    async with crowded(queue__timeout=0.1) as (worker, hub, queue):
        running = sent(hub, "a")
        await worker.received(1)
        response = await hub.post(CHAT, ask())
        assert response.status == 503
        error = response.json()["error"]
        assert error["code"] == "queue_timeout"
        assert "0.1 s (queue.timeout)" in error["message"]
        assert response.header("retry-after")
        assert not queue.admission.waiting
        worker.release("go")
        assert (await running).status == 200


async def test_a_client_that_leaves_leaves_the_queue() -> None:
    async with crowded() as (worker, hub, queue):
        running = sent(hub, "a")
        await worker.received(1)
        async with await hub.open(CHAT, ask("gone")) as wire:
            await waiting(queue, 1)
            wire.abort()
        await waiting(queue, 0)
        worker.release("go")
        assert (await running).status == 200
        assert asked(worker) == ["a"]


async def test_a_slot_that_comes_just_when_its_client_leaves_is_not_lost() -> None:
    async with crowded() as (worker, hub, queue):
        running = sent(hub, "a")
        await worker.received(1)
        wires = [await hub.open(CHAT, ask("gone")) for _ in range(20)]
        await waiting(queue, 20)
        worker.release("go")
        for wire in wires:
            wire.abort()
        assert (await running).status == 200
        assert (await hub.post(CHAT, ask("b"))).status == 200


# --- Order ------------------------------------------------------------------------


async def test_a_load_test_delays_a_chat_by_one_generation_at_most() -> None:
    async with crowded() as (worker, hub, queue):
        loads: list[asyncio.Task[Response]] = []
        while len(loads) < 30:  # one by one, so that their order is known
            loads.append(sent(hub, f"load{len(loads)}", hub.token("load")))
            await worker.received(1)
            await waiting(queue, len(loads) - 1)
        chat = sent(hub, "chat", hub.token("alice"))
        await waiting(queue, 30)
        worker.release("go")
        await asyncio.gather(chat, *loads)
        order = asked(worker)
        assert order.index("chat") == 1
        assert [name for name in order if name != "chat"] == [
            f"load{n}" for n in range(30)
        ]


async def test_interactive_requests_go_before_a_batch() -> None:
    async with crowded() as (worker, hub, queue):
        running = sent(hub, "first")
        await worker.received(1)
        batch = sent(hub, "batch", hub.token("b", priority="batch"))
        await waiting(queue, 1)
        header = sent(hub, "header", X_Gollama_Priority="batch")
        await waiting(queue, 2)
        chat = sent(hub, "chat")
        await waiting(queue, 3)
        worker.release("go")
        await asyncio.gather(running, batch, header, chat)
        assert asked(worker)[:2] == ["first", "chat"]


@pytest.mark.parametrize(
    ("asked_for", "status", "code"),
    [
        ("interactive", 403, "priority_not_allowed"),
        ("urgent", 400, "invalid_value"),
    ],
)
async def test_a_priority_that_is_not_allowed_is_refused(
    asked_for: str, status: int, code: str
) -> None:
    async with crowded() as (worker, hub, _):
        token = hub.token(priority="batch")
        response = await sent(hub, "x", token, X_Gollama_Priority=asked_for)
        assert response.status == status
        assert response.json()["error"]["code"] == code
        assert not worker.requests


async def test_a_subject_has_no_more_running_requests_than_allowed() -> None:
    """The other slots are for other subjects meanwhile."""
    async with crowded(slots=4) as (worker, hub, queue):
        token = hub.token("greedy", max_concurrency=2)
        greedy = [sent(hub, f"greedy{n}", token) for n in range(5)]
        await waiting(queue, 3)
        await worker.received(2)
        assert len(worker.requests) == 2
        other = sent(hub, "other", hub.token("bob"))
        await worker.received(3)
        assert asked(worker)[2] == "other"
        worker.release("go")
        for each in await asyncio.gather(other, *greedy):
            assert each.status == 200


# --- With what else can happen ----------------------------------------------------


async def test_a_request_that_failed_goes_before_those_that_wait() -> None:
    """On another worker, which is busy as well."""
    async with (
        ScriptedWorker(slots=1) as bad,
        ScriptedWorker(slots=1) as good,
        running_hub(bad, good, retry__attempts=3, health__interval=RARELY) as hub,
    ):
        bad.script(notify("asked"), wait("fail"), reset())
        good.default(wait("go"), *answer({"choices": []}))
        bad.default(wait("go"), *answer({"choices": []}))
        first = sent(hub, "first")
        await bad.reached("asked")
        second = sent(hub, "second")
        await good.received(1)
        third = sent(hub, "third")
        await waiting(hub.hub.queue, 1)
        bad.release("fail")
        await bad.received(2)  # the one that waited has its slot
        good.release("go")
        bad.release("go")
        for each in await asyncio.gather(first, second, third):
            assert each.status == 200
        assert asked(good) == ["second", "first"]


async def test_no_request_waits_for_a_model_whose_workers_are_all_down() -> None:
    async with (
        ScriptedWorker("big", slots=1) as big,
        ScriptedWorker("small") as small,
        running_hub(
            big,
            small,
            models__fallbacks="big=small",
            health__interval=0.05,
            health__recheck=0.05,
        ) as hub,
    ):
        big.default(expect_eof())
        running = sent_to(hub, "big")
        await big.received(1)
        waits = sent_to(hub, "big")
        await waiting(hub.hub.queue, 1)
        await big.down()
        for response in await asyncio.gather(running, waits):
            assert response.status == 200
            assert response.header("x-gollama-worker") == small.name


def sent_to(hub: RunningHub, model: str) -> asyncio.Task[Response]:
    posted = hub.post(CHAT, ask(model=model))
    return asyncio.create_task(posted, name="fake client")


async def test_the_queue_shows_in_the_metrics() -> None:
    async with crowded(metrics__open=True) as (worker, hub, queue):
        clients = [sent(hub, str(n)) for n in range(4)]
        await waiting(queue, 3)
        page = (await hub.get("/metrics")).body.decode()
        assert 'gollama_queue_waiting{class="interactive"} 3.0' in page
        assert 'gollama_queue_waiting{class="batch"} 0.0' in page
        worker.release("go")
        await asyncio.gather(*clients)


# --- Notices ----------------------------------------------------------------------

STREAM: dict[str, Any] = {"stream": True}


async def test_the_client_of_a_stream_is_notified_that_it_waits() -> None:
    """By comments, which every client of an event stream passes over."""
    async with crowded(queue__notice=0.05) as (worker, hub, queue):
        running = sent(hub, "a")
        await worker.received(1)
        async with await hub.open(CHAT, ask("b", **STREAM)) as wire:
            head = await wire.read_head()
            assert head.status == 200
            assert head.header("content-type") == "text/event-stream"
            assert await wire.read_event() == b": queued 1/1\n\n"
            worker.script(*chat_stream(["a", "b"]))
            worker.release("go")
            ending = await wire.read_to_end()
        assert ending.clean
        # The head was too early to name the worker.
        assert f": worker {worker.name}\n\ndata: ".encode() in ending.response.body
        assert b"[DONE]" in ending.raw
        assert (await running).status == 200
    assert not queue.admission.waiting


async def test_a_client_that_does_not_stream_is_not_notified() -> None:
    async with crowded(queue__notice=0.02) as (worker, hub, queue):
        running = sent(hub, "a")
        await worker.received(1)
        waits = sent(hub, "b")
        await waiting(queue, 1)
        # A later client that is notified shows that it would have been, too.
        async with await hub.open(CHAT, ask("c", **STREAM)) as wire:
            assert await wire.read_event() == b": queued 2/2\n\n"
        worker.release("go")
        assert (await waits).json() == {"choices": []}
        await running


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (error_reply(400, "too\nbad", "invalid_request_error"), 400),
        (json_reply({"choices": []}), "worker_bad_response"),
        (b"SSH-2.0\r\n\r\n", "worker_bad_response"),
    ],
    ids=["400", "no stream", "garbage"],
)
async def test_an_error_after_a_notice_is_an_event(
    fault: bytes, code: int | str
) -> None:
    async with crowded(queue__notice=0.05) as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        async with await hub.open(CHAT, ask("b", **STREAM)) as wire:
            assert (await wire.read_event() or b"").startswith(b": queued")
            worker.script(send(fault), close())
            worker.release("go")
            ending = await wire.read_to_end()
        await running
    assert not ending.clean
    *_, event, nothing = ending.response.body.split(b"\n\n")
    assert nothing == b""
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == code


async def test_a_wait_that_is_too_long_ends_with_an_event_after_a_notice() -> None:
    async with crowded(queue__notice=0.05, queue__timeout=1) as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        async with await hub.open(CHAT, ask("b", **STREAM)) as wire:
            ending = await wire.read_to_end()
        assert not ending.clean
        assert b": queued 1/1\n\n" in ending.response.body
        assert b'"code":"queue_timeout"' in ending.response.body
        worker.release("go")
        await running


async def test_another_worker_can_still_take_over_after_a_notice() -> None:
    async with (
        ScriptedWorker(slots=1) as bad,
        ScriptedWorker(slots=1) as good,
        running_hub(
            bad,
            good,
            queue__notice=0.05,
            retry__attempts=3,
            health__interval=RARELY,
        ) as hub,
    ):
        for worker in (bad, good):
            worker.script(notify("here"), wait("go"), *answer({"choices": []}))
        running = [sent(hub, "a"), sent(hub, "b")]
        await bad.reached("here")
        await good.reached("here")
        async with await hub.open(CHAT, ask("c", **STREAM)) as wire:
            assert (await wire.read_event() or b"").startswith(b": queued")
            bad.script(reset())
            good.script(*chat_stream(["a", "b"]))
            bad.release("go")
            await bad.received(2)
            good.release("go")
            ending = await wire.read_to_end()
        await asyncio.gather(*running)
    assert ending.clean
    assert b"[DONE]" in ending.raw


async def test_a_client_is_notified_when_its_prompt_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.02)
    monkeypatch.setattr(attempt, "PROCESSING_AFTER", 0.1)
    async with crowded() as (worker, hub, _):
        worker.script(wait("read"), *chat_stream(["a"]))
        async with await hub.open(CHAT, ask(**STREAM)) as wire:
            assert await wire.read_event() == b": processing\n\n"
            worker.release("read")
            ending = await wire.read_to_end()
    assert ending.clean
    assert b"[DONE]" in ending.raw


async def test_the_official_client_skips_the_notices() -> None:
    import openai

    async with crowded(queue__notice=0.05) as (worker, hub, _):
        running = sent(hub, "a")
        await worker.received(1)
        client = openai.AsyncOpenAI(base_url=f"{hub.url}/v1", api_key=hub.token())
        async with client:
            asking = asyncio.create_task(
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "b"}],
                    stream=True,
                ),
                name="fake client",
            )
            stream = await asking  # its head is there with the notice
            worker.script(*chat_stream(["a", "b"]))
            worker.release("go")
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == "ab"
        await running


# --- Whatever the policy ----------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_uses_every_slot_and_no_more(policy: str) -> None:
    async with (
        ScriptedWorker(slots=1) as one,
        ScriptedWorker(slots=3) as two,
        running_hub(one, two, routing__policy=policy, health__interval=RARELY) as hub,
    ):
        for worker in (one, two):
            worker.default(wait("go"), *answer({"choices": []}))
        clients = [sent(hub, str(n)) for n in range(12)]
        await waiting(hub.hub.queue, 8)
        await one.received(1)
        await two.received(3)
        assert (len(one.requests), len(two.requests)) == (1, 3)
        one.release("go")
        two.release("go")
        assert {each.status for each in await asyncio.gather(*clients)} == {200}
