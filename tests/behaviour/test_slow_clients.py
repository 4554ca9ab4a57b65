"""Clients that take their time have only so much of it, and cost the others none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from gollama_proxy.edge import server
from tests.fakes.asks import CHAT, MIB, WHOLE
from tests.fakes.authority import Authority
from tests.fakes.client import Wire, request_head
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.process import HubProcess, hub_process
from tests.fakes.replies import chunk, done, finish, last_chunk, role, sse_head, token
from tests.fakes.script import close, send
from tests.fakes.tools import require
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker


@pytest.fixture(params=["http", "https"])
def transport(request: pytest.FixtureRequest, authority: Authority) -> dict[str, Any]:
    """What a hub is started with to speak the one or the other."""
    if request.param == "http":
        return {}
    return {"trust": authority.client(), **authority.issue().settings}


@contextlib.asynccontextmanager
async def dripping(wire: Wire, data: bytes) -> AsyncIterator[None]:
    """Send a byte every 50 ms, until the hub accepts no more."""

    async def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                await wire.send(bytes([byte]))
                await asyncio.sleep(0.05)

    task = asyncio.create_task(drip())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@contextlib.asynccontextmanager
async def not_before(seconds: float) -> AsyncIterator[None]:
    """Check that a wait takes this long; a wait without an end fails by its timeout."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= seconds


async def gone(hub: RunningHub) -> None:
    """Wait until the hub has no client."""
    await until(lambda: hub.hub.clients.open == 0)


# --- Slow to send -----------------------------------------------------------------


async def test_a_head_has_a_deadline(transport: dict[str, Any]) -> None:
    async with running_hub(server__keepalive=1, **transport) as hub:
        async with not_before(0.9), await hub.wire() as wire:
            async with dripping(wire, b"GET / HTTP/1.1\r\nX: " + b"x" * 500):
                await wire.read_eof()
        await gone(hub)


@pytest.mark.parametrize("requests", [0, 1])
async def test_an_idle_connection_is_closed(
    requests: int, transport: dict[str, Any]
) -> None:
    async with running_hub(server__keepalive=1, **transport) as hub:
        async with not_before(0.9), await hub.wire() as wire:
            for _ in range(requests):
                await wire.get("/livez")
                await wire.read_response()
            await wire.read_eof()


async def test_a_body_has_a_deadline(transport: dict[str, Any]) -> None:
    async with running_hub(timeouts__body=0.5, **transport) as hub:
        async with not_before(0.45), await hub.wire() as wire:
            head = [("Content-Length", "1000"), ("Content-Type", "application/json")]
            await wire.send(request_head("POST", CHAT, hub.token(), head))
            async with dripping(wire, b'{"messages": [' * 50):
                response = await wire.read_response()
            assert response.status == 408
            assert response.json()["error"]["code"] == "body_timeout"
            await wire.read_eof()
        await gone(hub)


# --- Slow to read -----------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_GRACE", 0.2)


@pytest.mark.usefixtures("impatient")
async def test_an_unread_answer_in_one_piece_is_dropped_after_a_while(
    transport: dict[str, Any],
) -> None:
    """It is out of the path of a request by then, but in memory."""
    settings = {"upstream__assemble": CHAT, "timeouts__write": 0.2}
    async with ScriptedWorker() as worker:
        async with running_hub(worker, **settings, **transport) as hub:
            worker.script(
                send(sse_head() + chunk(role())),
                *[send(chunk(token("x" * MIB)))] * 10,
                send(chunk(finish() + done()) + last_chunk()),
                close(),
            )
            wire = await hub.open(CHAT, WHOLE, receive_buffer=4096)
            await worker.received()
            await gone(hub)
            assert not (await wire.read_to_end()).clean


@pytest.mark.usefixtures("impatient")
async def test_pipelined_requests_with_unread_answers(
    transport: dict[str, Any],
) -> None:
    names = [f"model-{number}-{'x' * 2000}" for number in range(100)]
    async with ScriptedWorker(*names) as worker:
        async with running_hub(worker, timeouts__write=0.2, **transport) as hub:
            wire = await hub.wire(receive_buffer=4096)
            await wire.send(request_head("GET", "/v1/models", hub.token()) * 50)
            await gone(hub)


# --- Many of them -----------------------------------------------------------------

CONNECTIONS = 500
ANSWERS = 80  # of each hub, at least, in one try
# Below this, a time measures the machine and not the hub.
NOISE = 0.005
# They stay until their program ends: an hour is not reached.
_ATTACK = f"-c {CONNECTIONS} -r {CONNECTIONS} -l 3600 -i 1 -p 5"
_MODES = {
    "slow heads": "-H -u {}/v1/models",
    "slow bodies": f"-B -t POST -s 8192 -u {{}}{CHAT}",
    "ranges": "-R -t HEAD -u {}/livez",
    "slow readers": "-X -w 10 -y 20 -n 1 -z 8 -u {}/v1/models",
}
# The hub answers these, a body at its first byte that is no JSON, and the program ends.
_ANSWERED = ("slow bodies", "ranges")


async def test_500_slow_clients_do_not_slow_down_a_good_one() -> None:
    """The quickest tenth of its answers stays under twice that of an idle hub.

    The idle hub is another one in the same seconds, so that whatever else the machine
    does, the attacker's own work included, concerns both.  A mode may be tried again.
    """
    program = require("slowhttptest", package="slowhttptest")
    # Much to read, and little work to write it.
    names = ["tiny", *(f"model-{number}-{'x' * 10_000}" for number in range(10))]
    # The hub closes none of them: how many are open does not depend on its speed.
    settings = {
        "auth__mode": "off",
        "log__access": "false",
        "server__keepalive": 3600,
        "timeouts__body": 3600,
        "timeouts__write": 3600,
    }
    async with (
        ScriptedWorker(*names, slots=64) as worker,
        hub_process(worker.url, **settings) as hub,
        hub_process(worker.url, **settings) as other,
    ):
        await latencies(hub, other)  # warm
        for mode, arguments in _MODES.items():
            for last in (*(False,) * 4, True):
                async with attack(hub, program, arguments) as process:
                    if mode not in _ANSWERED:
                        await until(lambda: hub.descriptors() > CONNECTIONS / 5, mode)
                        await settled(hub.descriptors)
                    attacked, idle = map(p10, await latencies(hub, other))
                    if mode in _ANSWERED:
                        await asyncio.wait_for(process.wait(), DEADLINE)
                reported = f"{mode}: p10 {attacked * 1e3:.1f}, idle {idle * 1e3:.1f} ms"
                print(reported)
                if attacked < 2 * max(idle, NOISE):
                    break
                assert not last, reported
            # All of them are closed soon after.
            await until(lambda: hub.descriptors() < 50)
        assert not hub.complaints


@contextlib.asynccontextmanager
async def attack(
    hub: HubProcess, program: str, arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    url = f"http://127.0.0.1:{hub.port}"
    process = await asyncio.create_subprocess_exec(
        program,
        *f"{arguments.format(url)} {_ATTACK}".split(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def latencies(*hubs: HubProcess) -> list[list[float]]:
    """Ask each hub again and again, until all have answered often enough.

    Return how long each answer of each hub took, in seconds.
    """
    taken: list[list[float]] = [[] for _ in hubs]

    async def ask(hub: HubProcess, times: list[float]) -> None:
        async with await Wire.connect("127.0.0.1", hub.port) as wire:
            while min(map(len, taken)) < ANSWERS:
                began = time.monotonic()
                await wire.post(CHAT, {**WHOLE, "model": "tiny"})
                assert (await wire.read_response()).status == 200
                times.append(time.monotonic() - began)
                await asyncio.sleep(0.008)

    await asyncio.gather(*map(ask, hubs, taken))
    return taken


def p10(taken: Sequence[float]) -> float:
    """Return what nine in ten exceed: others than the hub decide by how much."""
    return sorted(taken)[int(len(taken) * 0.1)]
