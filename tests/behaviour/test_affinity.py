"""Turns of one conversation go back to the worker that holds its prompt cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from gollama_proxy.config import load as config
from gollama_proxy.fleet.lease import Result
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.balancer import Balancer, Plan
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes import replies
from tests.fakes.asks import CHAT
from tests.fakes.client import Response
from tests.fakes.clock import Clock
from tests.fakes.hub import RunningHub, running_hub, shown
from tests.fakes.registry import plan
from tests.fakes.script import answer, chat_stream, event_stream, wait
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

SYSTEM = {
    "role": "system",
    "content": "You are what the system prompt of all users describes.",
}


def turn(name: str, number: int, **fields: Any) -> dict[str, Any]:
    """Build the request for this turn of a conversation, from 1."""
    messages = [SYSTEM]
    for each in range(1, number + 1):
        messages.append({"role": "user", "content": f"{name} asks {each}"})
        if each < number:
            messages.append({"role": "assistant", "content": f"answer {each}"})
    return {"messages": messages, **fields}


def asked(worker: ScriptedWorker) -> list[str]:
    """Return the content of each request that a worker received."""
    return [each.json()["messages"][-1]["content"] for each in worker.requests]


def settings(**more: Any) -> dict[str, Any]:
    return {"routing__policy": "affinity", "health__interval": 3600, **more}


def teach(worker: Worker, *, reads: float = 0.0, writes: float = 0.0) -> None:
    """Let a worker be known for so many bytes/s, and so many tokens/s with one slot."""
    speed = worker.pace_of(replies.MODEL).speed
    if reads:
        speed.read(1000, 1000 / reads)
    if writes:
        speed.wrote(100, 100 / writes)


# --- Going back -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_each_turn_goes_to_the_worker_of_the_first(stream: bool) -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        ScriptedWorker() as three,
        running_hub(one, two, three, **settings()) as hub,
    ):
        names = [f"client {number}" for number in range(9)]
        for number in (1, 2, 3):
            for name in names:
                body = turn(name, number, stream=stream)
                assert (await hub.post(CHAT, body)).status == 200
        served = [
            {each.split(" asks")[0] for each in asked(w)} for w in (one, two, three)
        ]
        assert sorted(name for each in served for name in each) == sorted(names)


async def test_the_same_words_of_another_subject_are_another_conversation() -> None:
    """Or one could find out by the time of an answer what others have asked."""
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        running_hub(one, two, **settings()) as hub,
    ):
        await hub.post(CHAT, turn("x", 1), hub.token("alice"))
        busy, other = (one, two) if one.requests else (two, one)
        await hub.post(CHAT, turn("x", 2), hub.token("bob"))
        assert (len(busy.requests), len(other.requests)) == (1, 1)


async def test_a_policy_can_apply_to_some_models_only() -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        running_hub(
            one,
            two,
            health__interval=3600,
            routing__policies={"other*": "affinity", "t?ny": "affinity"},
            routing__policy="round_robin",
        ) as hub,
    ):
        balancer = hub.hub.balancer
        assert repr(balancer.policy_of("qwen")).startswith("<RoundRobin")
        assert balancer.policy_of("tiny") is balancer.policy_of("other-1")
        for number in (1, 2, 3, 4):
            await hub.post(CHAT, turn("x", number))
        assert sorted((len(one.requests), len(two.requests))) == [0, 4]


async def test_requests_that_generate_nothing_are_not_part_of_a_conversation() -> None:
    async with (
        ScriptedWorker() as one,
        ScriptedWorker() as two,
        running_hub(one, two, **settings()) as hub,
    ):
        for worker in (one, two):
            worker.on("/v1/messages/count_tokens", *answer({"input_tokens": 20}))
        await hub.post("/v1/completions", {"prompt": "no conversation"})
        await hub.post("/v1/messages/count_tokens", turn("x", 1))
        policy = hub.hub.balancer.policy_of(replies.MODEL)
        assert "<Memory of 0 prefixes>" in repr(policy)
        await hub.post(CHAT, turn("x", 1))
        assert "<Memory of 1 prefixes>" in repr(policy)


async def test_with_one_worker_there_is_nothing_to_remember() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **settings()) as hub:
        for number in (1, 2):
            assert (await hub.post(CHAT, turn("x", number))).status == 200
        policy = hub.hub.balancer.policy_of(replies.MODEL)
        assert "<Memory of 0 prefixes>" in repr(policy)


# --- Is it true? ------------------------------------------------------------------


@pytest.mark.parametrize(
    "timings",
    [
        {"prompt_n": -5, "prompt_ms": 1, "cache_n": 3},
        {"prompt_n": 5, "prompt_ms": -1, "cache_n": 3},
    ],
)
async def test_impossible_timings_are_ignored_and_reported_once(
    timings: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **settings()) as hub:
        end = replies.finish(timings=timings)
        worker.default(*event_stream(replies.token("hello"), end, replies.done()))
        with caplog.at_level(logging.WARNING, "gollama_proxy.fleet.worker"):
            for number in (1, 2, 3):
                response = await hub.post(CHAT, turn("x", number, stream=True))
                assert response.body.endswith(replies.done())
        assert [r.message for r in caplog.records if "tokens read" in r.message] == [
            caplog.records[0].message
        ]


async def test_invalid_timings_are_ignored() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **settings()) as hub:
        for timings in (
            {"prompt_n": "x"},
            {"prompt_n": None, "prompt_ms": []},
            {"prompt_n": 5, "prompt_ms": 1e999},
            {},
        ):
            end = replies.finish(timings=timings).replace(b"Infinity", b"1e999")
            worker.script(*event_stream(replies.token("hello"), end, replies.done()))
            response = await hub.post(CHAT, turn("x", 1, stream=True))
            assert response.body.endswith(replies.done())


# --- Waiting for it ---------------------------------------------------------------


@asynccontextmanager
async def occupied(
    **more: Any,
) -> AsyncIterator[
    tuple[ScriptedWorker, ScriptedWorker, RunningHub, asyncio.Task[Response]]
]:
    """Have the worker that holds x busy with something else, for as long as `go` waits.

    The other one is free, and takes a second for each byte that it reads.
    """
    async with (
        ScriptedWorker(slots=1) as one,
        ScriptedWorker(slots=1) as two,
        running_hub(one, two, **settings(**more)) as hub,
    ):
        await hub.post(CHAT, turn("x", 1))
        warm, other = (one, two) if one.requests else (two, one)
        records = {each.config.url: each for each in hub.hub.registry.workers}
        for record in records.values():
            teach(record, writes=1e4)
        teach(records[other.url], reads=1)
        teach(records[warm.url], reads=1e6)
        warm.default(wait("go"), *chat_stream("warm"))
        busy = asyncio.create_task(hub.post(CHAT, turn("y", 1)), name="fake client y")
        await warm.received(2)
        other.default(*answer({"choices": []}))
        yield warm, other, hub, busy
        warm.release("go")
        await busy


def held_up(queue: Queue) -> Callable[[], bool]:
    return lambda: shown(queue, "passed_over") > 0


async def test_a_turn_waits_for_its_worker_while_others_use_the_free_one() -> None:
    async with occupied() as (warm, other, hub, _):
        second = asyncio.create_task(hub.post(CHAT, turn("x", 2)), name="fake client x")
        await until(held_up(hub.hub.queue))
        await hub.post(CHAT, turn("z", 1))
        assert asked(other) == ["z asks 1"]
        warm.release("go")
        assert (await second).status == 200
        assert asked(warm)[2:] == ["x asks 2"]


async def test_a_request_that_has_waited_long_enough_goes_elsewhere() -> None:
    """The watchdog checks again; no request has begun or ended in the meantime."""
    async with occupied(clock=Clock(), timeouts__allowance=300) as (_, other, hub, _b):
        asking = asyncio.create_task(hub.post(CHAT, turn("x", 2)), name="fake client x")
        await until(held_up(hub.hub.queue))
        hub.pass_time(30.1)  # half of `queue.timeout`
        assert (await asking).status == 200
        assert asked(other) == ["x asks 2"]


class Recorded(Balancer):
    """Records the patience of the requests that could start."""

    def pick(
        self, plan: Plan, candidates: Sequence[Worker], patience: float = 0.0
    ) -> Worker | None:
        self.patience = patience
        return super().pick(plan, candidates, patience)


@pytest.mark.parametrize(
    ("environ", "patience"),
    [
        ({}, 30.0),
        ({"GOLLAMA_QUEUE_TIMEOUT": "3600"}, 30.0),
        ({"GOLLAMA_QUEUE_TIMEOUT": "20"}, 10.0),
    ],
)
async def test_the_wait_for_a_warm_worker_does_not_grow_with_the_queues_timeout(
    environ: dict[str, str], patience: float
) -> None:
    loaded = config.load(None, environ, {}, ["http://127.0.0.1:1"])
    registry = Registry(loaded, Clock())
    balancer = Recorded(registry, loaded, Clock())
    reported = Description((Model("tiny"),), slots=1)
    registry.workers[0].observe(Check.OK, "ok", reported)
    queue = Queue(balancer, loaded.queue, Clock())
    attempts = plan(balancer, registry.pool("tiny"))
    attempts.ask = replace(attempts.ask, prefixes=(1,))  # a conversation
    entry = SimpleNamespace(
        plan=attempts,
        subject="alice",
        priority=Priority.INTERACTIVE,
        max_concurrency=0,
        needs_slot=True,
        ticket=None,
        holder=None,
    )
    lease = queue.try_acquire(entry)
    assert lease is not None
    lease.release(Result.COMPLETE)
    assert balancer.patience == patience


async def test_no_request_waits_when_waiting_is_off() -> None:
    async with occupied(queue__size=0) as (_, other, hub, _busy):
        assert (await hub.post(CHAT, turn("x", 2))).status == 200
        assert asked(other) == ["x asks 2"]


async def test_a_turn_goes_elsewhere_when_the_worker_it_waits_for_goes_down() -> None:
    async with occupied(retry__attempts=2) as (warm, other, hub, busy):
        second = asyncio.create_task(hub.post(CHAT, turn("x", 2)), name="fake client x")
        await until(held_up(hub.hub.queue))
        await warm.down()
        assert (await second).status == 200
        assert asked(other)[-1:] == ["x asks 2"]
        assert (await busy).status == 200


# --- Real servers -----------------------------------------------------------------


@pytest.mark.real
async def test_real_servers_find_the_second_turn_in_their_cache(
    tiny_model: Path, llama_server: Callable[..., LlamaServer]
) -> None:
    """What the servers themselves count; each has a slot for each conversation."""
    servers = [llama_server(tiny_model, slots=4) for _ in range(2)]
    async with running_hub(*servers, **settings()) as hub:
        shares: list[float] = []
        for name in ("a", "b", "c", "d"):
            messages: list[dict[str, Any]] = [SYSTEM]
            for number in (1, 2, 3):
                asks = f"{name} asks {number} " + f"{name}{number} " * 40
                messages.append({"role": "user", "content": asks})
                body = {"messages": messages, "max_tokens": 8, "temperature": 0}
                reply = (await hub.post(CHAT, body)).json()
                messages.append(reply["choices"][0]["message"])
                if number > 1:
                    timings, known = reply["timings"], shares
                    total = timings["cache_n"] + timings["prompt_n"]
                    new = len(asks) / sum(len(m["content"]) for m in messages[:-1])
                    known.append(timings["cache_n"] / total / (1 - new))
        assert sum(shares) / len(shares) > 0.9
        # And not because all went to one.
        assert all(each.paces for each in hub.hub.registry.workers)
