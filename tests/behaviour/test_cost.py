"""What a request costs, in Python frames: the budget of the request path.

The limits are a little above what is measured.  Lower them with each improvement; raise
one only for a feature that is worth its price.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import Counter
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest

from tests.fakes.asks import CHAT, EMBED, STREAM, WHOLE
from tests.fakes.client import Wire
from tests.fakes.frames import Cost, count_frames, listening_at
from tests.fakes.hub import mint, running_hub
from tests.fakes.process import hub_process
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import Script, answer, close, pause, send
from tests.fakes.tools import missing
from tests.fakes.valkey import running_store
from tests.fakes.worker import ScriptedWorker

WARM_UP = 10
APART = 0.01  # seconds between two packets of a worker, so that they are read apart
END = chunk(finish() + done()) + last_chunk()
EMBEDDING = {"model": "tiny", "input": "hello"}
VECTOR = {"object": "list", "data": [{"index": 0, "embedding": [0.0] * 4}]}

SHORT = answer(VECTOR)
ONE_TOKEN = (
    send(sse_head() + chunk(role() + token("a"))),
    pause(APART),
    send(END),
    close(),
)
TWO_TOKENS = (
    send(sse_head() + chunk(role() + token("a"))),
    pause(APART),
    send(chunk(token("b"))),
    pause(APART),
    send(END),
    close(),
)


async def warm_cost(wire: Wire, counts: Path, path: str, body: dict[str, Any]) -> Cost:
    """Return what a request costs once the hub has answered some like it."""
    bearer = mint(sub="alice")

    async def request() -> None:
        await wire.post(path, body, bearer)
        response = await wire.read_response()
        assert response.status == 200, response

    for _ in range(WARM_UP):
        await request()
    return await count_frames(counts, request)


@pytest.mark.parametrize(
    ("path", "body", "script", "limit"),
    [
        pytest.param(EMBED, EMBEDDING, SHORT, 142, id="short request"),
        pytest.param(CHAT, STREAM, ONE_TOKEN, 222, id="stream of one token"),
        pytest.param(CHAT, WHOLE, TWO_TOKENS, 263, id="assembled chat of two tokens"),
    ],
)
async def test_a_request_takes_no_more_frames_than(
    tmp_path: Path, path: str, body: dict[str, Any], script: Script, limit: int
) -> None:
    """Of a warm hub, on a kept connection, with the settings and logs of production."""
    counts = tmp_path / "frames"
    async with (
        ScriptedWorker() as worker,
        hub_process(
            worker.url, module="tests.fakes.frames", environ=listening_at(counts)
        ) as hub,
        await Wire.connect("127.0.0.1", hub.port) as wire,
    ):
        worker.default(*script)
        cost = await warm_cost(wire, counts, path, body)
    print(f"{cost.frames} frames, {cost.ours} of them ours; the limit is {limit}")
    frames = cost.frames
    assert frames <= limit, cost.table()


@pytest.mark.parametrize(
    ("path", "body", "script", "limit"),
    [
        pytest.param(EMBED, EMBEDDING, SHORT, 142, id="short request"),
        pytest.param(CHAT, STREAM, ONE_TOKEN, 222, id="stream of one token"),
    ],
)
async def test_where_hubs_share_a_store_a_request_takes_no_more_frames_than(
    tmp_path: Path, path: str, body: dict[str, Any], script: Script, limit: int
) -> None:
    """The hub holds a slot for it, so nothing is asked of the store."""
    counts = tmp_path / "frames"
    async with (
        ScriptedWorker() as worker,
        running_store(tmp_path) as store,
        hub_process(
            worker.url,
            module="tests.fakes.frames",
            environ={**listening_at(counts), "GOLLAMA_STATE_URL": store.url},
        ) as hub,
        await Wire.connect("127.0.0.1", hub.port) as wire,
    ):
        worker.default(*script)
        cost = await warm_cost(wire, counts, path, body)
    print(f"{cost.frames} frames; the limit is {limit}")
    assert cost.frames <= limit, cost.table()


TRACING = {
    "GOLLAMA_TRACING_ENABLED": "true",
    "GOLLAMA_TRACING_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
    "OTEL_BSP_SCHEDULE_DELAY": "3600000",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "0.1",
}


@pytest.mark.parametrize(("sampler", "limit"), [("always_on", 98), ("always_off", 28)])
async def test_a_trace_takes_no_more_frames_than(
    tmp_path: Path, sampler: str, limit: int
) -> None:
    """Of a short request; those of the thread that sends spans are not counted."""
    if importlib.util.find_spec("opentelemetry") is None:
        missing("the extra otel is not installed (make install)")
    found = []
    for variables in {}, TRACING | {"OTEL_TRACES_SAMPLER": sampler}:
        counts = tmp_path / f"frames-{len(found)}"
        async with (
            ScriptedWorker() as worker,
            hub_process(
                worker.url,
                module="tests.fakes.frames",
                environ=listening_at(counts) | variables,
            ) as hub,
            await Wire.connect("127.0.0.1", hub.port) as wire,
        ):
            worker.default(*SHORT)
            cost = await warm_cost(wire, counts, EMBED, EMBEDDING)
            found.append(cost.frames)
    plain, traced = found
    print(f"{traced - plain} frames for a trace; the limit is {limit}")
    assert traced <= plain + limit


@pytest.mark.parametrize(
    ("path", "body", "script"),
    [
        pytest.param(EMBED, EMBEDDING, SHORT, id="short request"),
        pytest.param(CHAT, STREAM, ONE_TOKEN, id="stream of one token"),
        pytest.param(CHAT, WHOLE, TWO_TOKENS, id="assembled chat of two tokens"),
    ],
)
async def test_a_request_leaves_nothing_to_the_garbage_collector(
    path: str, body: dict[str, Any], script: Script
) -> None:
    """Its objects are freed at its end, and so the next request finds memory warm."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker.url) as hub,
        await Wire.connect("127.0.0.1", hub.port) as wire,
    ):
        worker.default(*script)

        async def request() -> None:
            await wire.post(path, body, hub.token())
            assert (await wire.read_response()).status == 200

        await request()  # makes what is made once
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):
                await request()
            gc.collect()
            left = Counter(_kind(found) for found in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    ours = {kind: n for kind, n in left.items() if kind.startswith("gollama_proxy.")}
    assert not ours, left


def _kind(found: object) -> str:
    """Name the type of an object, and of a method the function."""
    named = found.__func__ if isinstance(found, MethodType) else type(found)
    named = found if isinstance(found, FunctionType) else named
    return f"{named.__module__}.{named.__qualname__}"
