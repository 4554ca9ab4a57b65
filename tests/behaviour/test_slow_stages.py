"""Slowness is judged by the stage of a request, and by its cause."""

from __future__ import annotations

import asyncio
from typing import Any

from gollama_proxy.fleet.worker import Worker
from tests.behaviour.test_retries import CHAT, posted, records, two
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import relays, shown
from tests.fakes.replies import chunk, ping, role, sse_head, token
from tests.fakes.script import (
    chat_stream,
    expect_eof,
    notify,
    send,
    stall,
    wait,
)
from tests.fakes.waiting import settled, until

LONG = "word " * 40_000  # 200 KB
LIMIT = 10
LIMITS: dict[str, Any] = {"timeouts__allowance": LIMIT, "timeouts__gap": LIMIT}


def ask(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "stream": True}


def slow(worker: Worker) -> int:
    return shown(worker.breaker, "slow")


async def worker_of(asking: asyncio.Task[Response]) -> str | None:
    response = await asking
    assert response.status == 200
    assert b"[DONE]" in response.body
    return response.header("x-gollama-worker")


async def test_a_short_prompt_that_is_silent_is_slow() -> None:
    async with two(clock=Clock(), **LIMITS) as (first, second, hub):
        first.script(expect_eof())
        asking = posted(hub, ask("hello"))
        await first.received()
        hub.pass_time(LIMIT + 2)
        assert await worker_of(asking) == second.name
        assert slow(records(hub)[0]) == 1


async def test_a_long_prompt_may_be_silent_for_as_long_as_it_takes_to_read() -> None:
    async with two(clock=Clock(), **LIMITS) as (first, second, hub):
        first.script(wait("read"), *chat_stream(["a"]))
        asking = posted(hub, ask(LONG))
        await first.received()
        hub.pass_time(1.5 * LIMIT)
        first.release("read")
        assert await worker_of(asking) == first.name
        assert slow(records(hub)[0]) == 0
        assert not second.requests


async def test_a_worker_that_only_sends_a_role_is_silent() -> None:
    async with two(clock=Clock(), **LIMITS) as (first, second, hub):
        first.script(send(sse_head() + chunk(role())), expect_eof())
        asking = posted(hub, ask("hello"))
        await until(lambda: any(relay.status for relay in relays(hub)))
        hub.pass_time(LIMIT + 2)
        assert await worker_of(asking) == second.name
        assert slow(records(hub)[0]) == 1


async def test_pings_do_not_end_a_gap() -> None:
    settings = {"rescue__enabled": True, **LIMITS}
    async with two(clock=Clock(), **settings) as (first, second, hub):
        pings = [step for _ in range(2) for step in (wait("ping"), send(chunk(ping())))]
        first.script(send(sse_head() + chunk(role() + token("a"))), *pings, stall())
        second.script(*chat_stream(["a", "b"]))
        async with await hub.open(CHAT, ask("hello")) as wire:
            assert await wire.read_event() == role()
            assert await wire.read_event() == token("a")
            hub.pass_time(0)
            hub.pass_time(LIMIT)  # and not longer
            first.release("ping")
            for _ in range(2):
                assert await wire.read_event() == ping()
            assert not second.requests
            hub.pass_time(0.1)
            ending = await wire.read_to_end()
        assert b"[DONE]" in ending.response.body
        assert ending.response.header("x-gollama-worker") == first.name
        assert len(second.requests) == 1
        assert slow(records(hub)[0]) == 1


async def test_a_slow_client_is_no_slow_worker() -> None:
    """While it does not read, the worker cannot write, and no clock runs for it."""
    piece = chunk(token("x" * 16_000))
    async with two(clock=Clock(), **LIMITS) as (first, second, hub):
        many = [send(piece)] * 400
        first.script(
            wait("read"),
            send(sse_head() + chunk(role())),
            *many,
            notify("all"),
            wait("go"),
        )
        async with await hub.open(CHAT, ask("hello"), receive_buffer=4096) as wire:
            await first.received()
            hub.pass_time(1)  # the first token takes some time
            first.release("read")
            await wire.read_until(b"data:")
            [worker, _] = records(hub)
            await settled(lambda: first.requests[0].sent)
            for _ in range(3):
                hub.pass_time(LIMIT)
            assert worker.in_flight == 1
            assert slow(worker) == 0
        await first.idle()
        assert slow(worker) == 0
        assert not second.requests
