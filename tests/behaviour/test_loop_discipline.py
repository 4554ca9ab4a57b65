"""Nothing holds the event loop for more than 50 ms."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
from blockbuster import BlockBuster, BlockingError

from gollama_proxy.config import tls
from gollama_proxy.config.settings import Server
from tests.fakes.asks import CHAT
from tests.fakes.authority import Authority
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import close, send
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

LIMIT = 0.050  # seconds of processor time
STREAMS = 300
EVENTS = 100


async def test_blocking_calls_of_the_hub_are_found(
    authority: Authority, no_blocking: BlockBuster
) -> None:
    """In every test, by a fixture; this one shows that it works."""
    pair = authority.issue()
    server = Server(tls_certificate=pair.certificate, tls_key=pair.key)
    credentials = tls.for_server(server)  # which may block: nothing is served yet
    assert credentials is not None
    with pytest.raises(BlockingError):
        credentials.refresh()
    await asyncio.to_thread(credentials.refresh)


async def test_errors_that_are_never_retrieved_are_found(
    unretrieved: list[str],
) -> None:
    """In every test, by a fixture; this one shows that it works."""
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(ValueError("lost"))
    del failed
    gc.collect()
    [text] = unretrieved
    assert "exception was never retrieved" in text
    unretrieved.clear()


async def test_no_callback_takes_long_under_load(tmp_path: Path) -> None:
    """Hundreds of streams, long prompts, large answers, many clients, lists."""
    probe = tmp_path / "probe"
    events = chunk(role()) + b"".join(chunk(token(f" {n}")) for n in range(EVENTS))
    stream = (
        send(sse_head()),
        send(events + chunk(finish() + done()) + last_chunk()),
        close(),
    )
    names = ["tiny", *(f"model-{number}" for number in range(200))]
    async with ScriptedWorker(*names, slots=STREAMS) as worker:
        worker.default(*stream)
        async with hub_process(
            worker.url,
            module="tests.fakes.probed",
            environ={"PROBE_FILE": str(probe)},
            log__access="false",
            timeouts__connect=60,  # the worker is in this process, and has much to do
        ) as hub:
            async with asyncio.timeout(4 * DEADLINE), asyncio.TaskGroup() as group:
                for number in range(STREAMS):
                    group.create_task(ask(hub, stream=number % 3 > 0))
                for _ in range(4):
                    group.create_task(ask(hub, stream=True, prompt="x" * (8 << 20)))
                for _ in range(10):
                    group.create_task(look(hub))
    reported = await asyncio.to_thread(probe.read_text)
    calls, longest, culprit = reported.split(maxsplit=2)
    print(f"longest {float(longest) * 1e3:.1f} ms of {calls} calls: {culprit}")
    assert int(calls) > STREAMS
    assert float(longest) < LIMIT, culprit


async def ask(hub: HubProcess, *, stream: bool, prompt: str = "hello") -> None:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "tiny", "messages": messages, "stream": stream}
    async with await hub.open(CHAT, body) as wire:
        response = await wire.read_response(4 * DEADLINE)
    assert response.status == 200, response.body
    assert b"99" in response.body


async def look(hub: HubProcess) -> None:
    assert "gollama_connections" in await hub.metrics()
