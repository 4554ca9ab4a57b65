"""Whatever other programs write into the keys and channels of hubs, the hubs work.

So does what a hub of another release writes there.  A store that several programs use
is a mistake, and it costs hints and other conveniences, but no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.control import peers
from gollama_proxy.fleet.state import Hold
from gollama_proxy.scheduling import sharing
from gollama_proxy.state import members
from gollama_proxy.state import store as store_module
from gollama_proxy.state.facts import encode
from gollama_proxy.state.members import LIFETIME, Member
from tests.behaviour.test_affinity import settings, turn
from tests.fakes.asks import CHAT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.valkey import StoreServer, connected, is_up, running_store
from tests.fakes.waiting import until
from tests.fakes.worker import ScriptedWorker

READ = [
    f"/admin/{name}"
    for name in (
        "hubs",
        "models",
        "queue",
        "exchanges",
        "requests",
        "requests?id=x",
        "history",
        "usage",
        "workers",
    )
]
GARBAGE = [
    b"\x00\xff garbage",
    b"\x93\xa1a\xa1b\xa1c",  # msgpack
    json.dumps({"v": 99, "hub": "x", "name": 7}).encode(),
    b"",
    b"{}",
    b"[[[[",
    b"0",
    b"-1",
    b"1e999",
    json.dumps({"v": 1, "hub": None, "places": 3}).encode(),
    b"\x81\xa1v\x01",
    b"\xdd\xff\xff\xff\xff",  # msgpack: an array of 4 billion
    b"x" * 10_000,
]


@pytest.fixture(autouse=True)
def _usual_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached through the store answers no other one."""
    monkeypatch.setattr(peers, "PATIENCE", 0.5)
    for module in (store_module, members, sharing):
        monkeypatch.setattr(module, "HEARTBEAT", 0.2)
    monkeypatch.setattr(store_module, "BACK_OFF_MAX", 0.2)


@contextlib.asynccontextmanager
async def two_hubs(
    folder: Path, **more: Any
) -> AsyncIterator[tuple[StoreServer, ScriptedWorker, list[RunningHub]]]:
    """Run two hubs that have shared something of everything."""
    more = settings(**more)
    async with (
        running_store(folder) as store,
        ScriptedWorker() as worker,
        ScriptedWorker() as spare,
        running_hub(worker, spare, state__url=store.url, **more) as one,
        running_hub(worker, spare, state__url=store.url, **more) as other,
    ):
        made = [one, other]
        for hub in made:
            await works(hub)
        await operate(one, f"workers/{spare.name}/pause")
        await operate(one, "revoke", {"jti": "abc"})
        await until(lambda: all(each.hub.cluster.members.others for each in made))
        yield store, worker, made


def admin(hub: RunningHub) -> str:
    return hub.token(scope="admin")


async def operate(hub: RunningHub, path: str, body: Any = None) -> None:
    response = await hub.post(f"/admin/{path}", body or {}, admin(hub))
    assert response.status == 200, response


async def share_again(hubs: Sequence[RunningHub]) -> None:
    """Check that hubs learn what is done at others."""
    one, other = (hub.hub for hub in hubs)
    worker, same = one.registry.workers[1], other.registry.workers[1]
    for verb, hold in ("unpause", Hold.NONE), ("pause", Hold.PAUSED):
        await operate(hubs[0], f"workers/{worker.name}/{verb}")
        await until(lambda: same.held is hold)  # noqa: B023
    assert one.cluster is not None
    assert other.cluster is not None
    assert one.cluster.members.count == other.cluster.members.count == 2
    assert not one.cluster.sharing.alone
    assert not other.cluster.sharing.alone


async def works(hub: RunningHub, number: int = 1) -> None:
    """Check that a hub serves clients and operators."""
    for name in ("a", "b", "c"):
        response = await hub.post(CHAT, turn(name, number))
        assert response.status == 200, response
    for path in ("/admin/workers", "/admin/requests", "/admin/hubs", "/admin/usage"):
        response = await hub.get(path, admin(hub))
        assert response.status == 200, (path, response)
    assert (await hub.get("/metrics")).status == 200


async def channels(store: StoreServer) -> list[str]:
    found = await store.ask("PUBSUB", "CHANNELS", "*")
    return sorted(name.decode() for name in found)


async def kinds(store: StoreServer) -> dict[str, str]:
    """Return the types of all keys."""
    keys = sorted(key.decode() for key in await store.ask("KEYS", "*"))
    return {key: (await store.ask("TYPE", key)).decode() for key in keys}


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.exc_info]


async def spoil(store: StoreServer, key: str, kind: str, garbage: bytes) -> None:
    """Put garbage in the place of what hubs have written, of the same type."""
    match kind:
        case "string":
            await store.ask("SET", key, garbage)
        case "hash":
            for field in await store.ask("HKEYS", key):
                await store.ask("HSET", key, field, garbage)
            for each in GARBAGE:
                await store.ask("HSET", key, each, each)
        case "zset":
            for score in ("-inf", "0", "1e300", "inf"):
                pairs = [part for each in GARBAGE for part in (score, each)]
                await store.ask("ZADD", key, *pairs)
        case "stream":
            for each in GARBAGE:
                await store.ask("XADD", key, "*", "report", each)
        case _:
            assert kind == "none", (key, kind)  # it has just been removed


async def test_garbage_in_every_channel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_hubs(tmp_path) as (store, _, hubs):
        for channel in await channels(store):
            assert channel.startswith("gollama:")
            for garbage in GARBAGE:
                await store.ask("PUBLISH", channel, garbage)
        for hub in hubs:
            await works(hub, 2)
    assert tracebacks(caplog) == []


async def test_garbage_in_every_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_hubs(tmp_path) as (store, _, hubs):
        for number, garbage in enumerate(GARBAGE[:4]):
            for key, kind in (await kinds(store)).items():
                assert key.startswith("gollama:")
                if key != "gollama:epoch":
                    await spoil(store, key, kind, garbage)
            for hub in hubs:
                await works(hub, 2 * number)
            await beats(hubs)
            for hub in hubs:
                await works(hub, 2 * number + 1)
        await share_again(hubs)
    assert tracebacks(caplog) == []


async def test_another_type_in_every_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_hubs(tmp_path) as (store, _, hubs):
        # In one step, between two of the hubs.
        replace = "redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[1], 'x')"
        for key in await kinds(store):
            await store.ask("EVAL", replace, 1, key)
        for hub in hubs:
            await works(hub, 2)
        await beats(hubs)
        for hub in hubs:
            await works(hub, 3)
        await store.ask("FLUSHALL")
        for hub in hubs:
            await works(hub, 4)
        for hub in hubs:
            await is_up(hub.hub.cluster.store)
        await beats(hubs)
        await share_again(hubs)
    assert tracebacks(caplog) == []


async def beats(hubs: Sequence[RunningHub]) -> None:
    """Wait until each hub has spoken with the store again."""
    for hub in hubs:
        cluster = hub.hub.cluster
        assert cluster is not None
        before = cluster.store.operations + cluster.store.failures
        now = lambda: cluster.store.operations + cluster.store.failures  # noqa: E731, B023
        await until(lambda: now() > before + 10)  # noqa: B023


# --- Answers that make no sense ---------------------------------------------------

VALUES: list[Any] = [None, 7, "x", [], {}, [7], ["x"], {"x": 7}, [{"x": []}], [[1, 2]]]


@contextlib.asynccontextmanager
async def strange_hub(store: StoreServer, value: Any) -> AsyncIterator[str]:
    """Register a hub that answers every question with the same value."""
    run = "0123456789abcdef"
    about = encode(
        Member(
            run=run,
            name="strange",
            host="host",
            pid=1,
            group=run,
            url="http://strange",
        )
    )
    [seconds, _] = await store.ask("TIME")
    await store.ask("ZADD", "gollama:hubs", (int(seconds) + LIFETIME) * 1000, run)
    await store.ask("SET", f"gollama:hub:{run}", about)

    async with connected(store.url) as connection:
        tasks: list[asyncio.Task[None]] = []

        def take(data: bytes) -> None:
            question = json.loads(peers.inflate(data))
            answer = {"v": 1, "hub": run, "number": question["number"], "value": value}
            channel = f"gollama:peers:{question['hub']}"
            sending = connection.publish(channel, json.dumps(answer))
            tasks.append(asyncio.create_task(sending, name="fake answer"))

        await connection.listen("gollama:peers", take)
        try:
            yield run
        finally:
            await asyncio.gather(*tasks)


@pytest.mark.parametrize("value", VALUES, ids=repr)
async def test_answers_of_another_hub_that_make_no_sense(
    tmp_path: Path, value: Any
) -> None:
    async with (
        running_store(tmp_path) as store,
        ScriptedWorker() as worker,
        running_hub(worker, state__url=store.url, **settings()) as hub,
        strange_hub(store, value) as run,
    ):
        cluster = hub.hub.cluster
        assert cluster is not None
        await until(lambda: run in cluster.members.others)
        await works(hub)
        for path in READ:
            response = await hub.get(path, admin(hub))
            assert response.status in (200, 404), (path, response)
