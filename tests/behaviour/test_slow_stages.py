"""Slowness is judged by the stage of a request, and by its cause."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gollama_proxy.fleet import watchdog
from gollama_proxy.fleet.worker import Worker
from tests.behaviour.test_retries import CHAT, records, two
from tests.fakes.hub import RunningHub, shown
from tests.fakes.replies import chunk, ping, role, sse_head, token
from tests.fakes.script import (
    chat_stream,
    expect_eof,
    notify,
    pause,
    send,
    stall,
    wait,
)
from tests.fakes.waiting import settled, until

LONG = "word " * 40_000  # 200 KB
# Short for workers that stay silent, and long enough for the others.
QUICK: dict[str, Any] = {"timeouts__allowance": 0.5, "timeouts__gap": 0.5}


def ask(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "stream": True}


def slow(worker: Worker) -> int:
    return shown(worker.breaker, "slow")


@pytest.fixture(autouse=True)
def _many_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PERIOD", 0.02)


async def worker_of(hub: RunningHub, prompt: str) -> str | None:
    response = await hub.post(CHAT, ask(prompt))
    assert response.status == 200
    assert b"[DONE]" in response.body
    return response.header("x-gollama-worker")


async def test_a_short_prompt_that_is_silent_is_slow() -> None:
    async with two(**QUICK) as (first, second, hub):
        first.script(expect_eof())
        assert await worker_of(hub, "hello") == second.name
        assert slow(records(hub)[0]) == 1


async def test_a_long_prompt_may_be_silent_for_as_long_as_it_takes_to_read() -> None:
    async with two(**QUICK) as (first, second, hub):
        first.script(pause(0.8), *chat_stream(["a"]))
        assert await worker_of(hub, LONG) == first.name
        assert slow(records(hub)[0]) == 0
        assert not second.requests


async def test_a_worker_that_only_sends_a_role_is_silent() -> None:
    async with two(**QUICK) as (first, second, hub):
        first.script(send(sse_head() + chunk(role())), expect_eof())
        assert await worker_of(hub, "hello") == second.name
        assert slow(records(hub)[0]) == 1


async def test_pings_alone_are_a_gap() -> None:
    async with two(rescue__enabled=True, **QUICK) as (first, second, hub):
        pings = [step for _ in range(40) for step in (pause(0.02), send(chunk(ping())))]
        first.script(send(sse_head() + chunk(role() + token("a"))), *pings, stall())
        second.script(*chat_stream(["a", "b"]))
        assert await worker_of(hub, "hello") == first.name  # it has begun it
        assert len(second.requests) == 1
        assert slow(records(hub)[0]) == 1


async def test_a_slow_client_is_no_slow_worker() -> None:
    """While it does not read, the worker cannot write, and no clock runs for it."""
    piece = chunk(token("x" * 16_000))
    async with two(**QUICK) as (first, second, hub):
        many = [send(piece)] * 400
        first.script(send(sse_head() + chunk(role())), *many, notify("all"), wait("go"))
        async with await hub.open(CHAT, ask("hello"), receive_buffer=4096) as wire:
            await wire.read_until(b"data:")
            [worker, _] = records(hub)
            await settled(lambda: first.requests[0].sent)
            blocked = time.monotonic()
            await until(lambda: time.monotonic() > blocked + 1)
            assert worker.in_flight == 1
            assert slow(worker) == 0
        await first.idle()
        assert slow(worker) == 0
        assert not second.requests
