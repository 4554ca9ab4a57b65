"""Real llama-servers that are stopped, killed and restarted under load."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gollama_proxy.fleet.breaker import BreakerState
from tests.fakes.asks import CHAT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.waiting import DEADLINE, until
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]
# Quick enough for a test, and not for a busy machine: an overdue first token after 2 s.
# Each worker has its share of the answers, so that one which fails concerns some.
IMPATIENT: dict[str, Any] = {
    "retry__ratio": 1,
    "routing__policy": "round_robin",
    "timeouts__allowance": 2,
    "breaker__open": 0.5,
    "breaker__ramp": 0.5,
    "health__recheck": 0.05,
}


async def one_stream(hub: RunningHub) -> tuple[str, float]:
    """Stream a whole answer; return its worker and the time to its first event."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "stream": True,
    }
    began = time.monotonic()
    async with await hub.open(CHAT, body) as wire:
        await wire.read_event()
        first = time.monotonic() - began
        ending = await wire.read_to_end()
    assert ending.clean
    assert b"data: [DONE]" in ending.raw
    return ending.response.header("x-gollama-worker") or "", first


async def test_a_stopped_worker_fails_no_request_and_returns(
    tiny_model: Path, llama_server: Start
) -> None:
    """SIGSTOP: it accepts connections and does not answer, the worst failure."""
    servers = [llama_server(tiny_model, slots=16, ctx=16 * 256) for _ in range(3)]
    async with running_hub(*servers, **IMPATIENT) as hub:
        stopped = hub.hub.registry.workers[0]
        allowance = stopped.pace_of("tiny").allowance(200)  # bytes, of the whole body
        servers[0].signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                results = await asyncio.gather(*(one_stream(hub) for _ in range(12)))
                # The allowance and one attempt more; the hard limit is minutes away.
                assert max(first for _, first in results) < allowance + DEADLINE
            await until(lambda: not stopped.available)
            results = await asyncio.gather(*(one_stream(hub) for _ in range(12)))
            assert stopped.name not in {worker for worker, _ in results}
        finally:
            servers[0].signal(signal.SIGCONT)
        await until(lambda: stopped.available)
        assert stopped.breaker.state is BreakerState.CLOSED
        served = set()
        async with asyncio.timeout(DEADLINE):
            while stopped.name not in served:
                served |= {(await one_stream(hub))[0]}


async def test_a_killed_worker_fails_no_new_request(
    tiny_model: Path, llama_server: Start
) -> None:
    """What it had not begun to answer goes to the others."""
    servers = [llama_server(tiny_model, slots=16, ctx=16 * 256) for _ in range(2)]
    async with running_hub(*servers, **IMPATIENT) as hub:
        servers[0].signal(signal.SIGKILL)
        results = await asyncio.gather(*(one_stream(hub) for _ in range(20)))
        alive = hub.hub.registry.workers[1].name
        assert {worker for worker, _ in results} == {alive}


# --- In the middle of an answer ---------------------------------------------------

PROMPTS = ["hello", "once upon a time", "the sea", "a fox and a crow", "winter"]
TOKENS = 120
RESCUE: dict[str, Any] = {**IMPATIENT, "retry__floor": 100}


class Told(NamedTuple):
    """What a client has got of an answer when it has ended."""

    text: str
    worker: str
    clean: bool
    rescued: int
    finish_reasons: int
    completion_tokens: int


async def reported(
    hub: RunningHub, prompt: str, begun: asyncio.Semaphore | None = None
) -> Told:
    """Have a long answer streamed, at temperature 0; return when it has begun."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with await hub.open(CHAT, body) as wire:
        for _ in range(4):
            await wire.read_event(DEADLINE)
        if begun is not None:
            begun.release()
        ending = await wire.read_to_end(2 * DEADLINE)
    # What was read before is in `raw` only, and there with the frames of its chunks.
    raw = b"".join(chunks_of(ending.raw)).decode()
    lines = raw.split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert not any("error" in each for each in chunks), ending.raw[-400:]
    choices = [choice for each in chunks for choice in each["choices"]]
    assert len({each["id"] for each in chunks}) == 1
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert raw.count("data: [DONE]") == 1
    return Told(
        "".join(choice["delta"].get("content") or "" for choice in choices),
        ending.response.header("x-gollama-worker") or "",
        ending.clean,
        raw.count(": gollama rescued"),
        sum(choice["finish_reason"] is not None for choice in choices),
        sum(each["usage"]["completion_tokens"] for each in chunks if "usage" in each),
    )


def chunks_of(raw: bytes) -> list[bytes]:
    """Take the chunks of an answer out of their frames."""
    rest, chunks = raw.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return chunks


_TEXTS: dict[str, str] = {}  # of the model, the same for all tests


async def unbroken(hub: RunningHub) -> dict[str, str]:
    """Return the answers as they are when nothing happens to them."""
    if not _TEXTS:
        answers = await asyncio.gather(*(reported(hub, each) for each in PROMPTS))
        assert not any(each.rescued for each in answers)
        _TEXTS.update(zip(PROMPTS, (each.text for each in answers), strict=True))
    return _TEXTS


# A test that was held up may find that answers had ended before; then it tries again.
TRIES = 5


async def hit_in_mid_answer(
    hub: RunningHub, prompts: list[str], hit: Callable[[], object]
) -> list[Told]:
    """Have all of these answered at once, and do it when all have begun."""
    begun = asyncio.Semaphore(0)
    answers = [
        asyncio.create_task(reported(hub, prompt, begun), name="fake client")
        for prompt in prompts
    ]
    for _ in prompts:
        await begun.acquire()
    hit()
    return await asyncio.gather(*answers)


async def test_answers_are_complete_although_a_worker_is_killed(
    brisk_model: Path, llama_server: Start
) -> None:
    """Ten at once on three workers, each the same to the last character."""
    servers = [llama_server(brisk_model, slots=16, ctx=16 * 256) for _ in range(3)]
    async with running_hub(*servers, **RESCUE) as hub:
        expected = await unbroken(hub)
        prompts, lost = PROMPTS * 2, 0
        victim = hub.hub.registry.workers[0]

        def kill() -> None:
            nonlocal lost
            lost = victim.in_flight
            servers[0].signal(signal.SIGKILL)

        for _ in range(TRIES):
            results = await hit_in_mid_answer(hub, prompts, kill)
            if any(each.rescued for each in results):
                break
            servers[0].start()
            await until(lambda: victim.available)
    assert [each.text for each in results] == [expected[prompt] for prompt in prompts]
    assert all(each.clean for each in results)
    # What had ended, and was still on its way, needed none.
    assert 0 < sum(each.rescued for each in results) <= lost <= 4
    assert {each.finish_reasons for each in results} == {1}
    assert {each.completion_tokens for each in results} == {TOKENS}


async def test_a_worker_that_is_terminated_breaks_no_answer(
    brisk_model: Path, llama_server: Start
) -> None:
    """SIGTERM: llama-server does not drain, and may even fall silent before it ends."""
    servers = [llama_server(brisk_model, slots=4, ctx=4 * 256) for _ in range(2)]
    async with running_hub(*servers, timeouts__gap=4, **RESCUE) as hub:
        expected = await unbroken(hub)
        results = await hit_in_mid_answer(
            hub, PROMPTS[:4], lambda: servers[0].signal(signal.SIGTERM)
        )
    assert [each.text for each in results] == [expected[p] for p in PROMPTS[:4]]
    assert all(each.clean for each in results)


async def test_a_worker_that_is_stopped_in_mid_answer_is_not_waited_for(
    brisk_model: Path, llama_server: Start
) -> None:
    """SIGSTOP: the connection lives, and no event comes any more."""
    servers = [llama_server(brisk_model, slots=4, ctx=4 * 256) for _ in range(2)]
    async with running_hub(*servers, timeouts__gap=4, **RESCUE) as hub:
        expected = await unbroken(hub)
        stopped = hub.hub.registry.workers[0]
        for _ in range(TRIES):
            await until(lambda: stopped.available)
            try:
                results = await hit_in_mid_answer(
                    hub, PROMPTS[:4], lambda: servers[0].signal(signal.SIGSTOP)
                )
            finally:
                servers[0].signal(signal.SIGCONT)
            if (rescued := sum(each.rescued for each in results)) == 2:
                break
    assert [each.text for each in results] == [expected[p] for p in PROMPTS[:4]]
    assert rescued == 2


async def test_a_worker_that_is_restarted_is_taken_back_once_it_has_loaded(
    tiny_model: Path, llama_server: Start
) -> None:
    """It refuses, then reports that it is loading, and no client notices either."""
    servers = [llama_server(tiny_model, slots=16, ctx=16 * 256) for _ in range(2)]
    async with running_hub(*servers, **RESCUE) as hub:
        for _ in range(3):
            servers[0].signal(signal.SIGKILL)
            servers[0].wait()
            results = [one_stream(hub) for _ in range(8)]
            servers[0].launch()
            results += [one_stream(hub) for _ in range(8)]
            assert len(await asyncio.gather(*results)) == 16
            async with asyncio.timeout(DEADLINE):
                while (await one_stream(hub))[0] != hub.hub.registry.workers[0].name:
                    await asyncio.sleep(0.02)
