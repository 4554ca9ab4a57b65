"""Workers come and go while answers run: no answer is lost, and new requests follow."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from urllib.parse import urlsplit

import pytest

from gollama_proxy.config.settings import Config, Origin, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Changes
from gollama_proxy.fleet.breaker import BreakerState, Verdict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.hub import BATCH
from tests.fakes.asks import CHAT, RARELY, STREAM
from tests.fakes.authority import Authority
from tests.fakes.client import Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import send, wait
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker

STREAMS = 200
MANY = 1000
EVENTS = role(), token("a"), token("b"), finish(), done()
CALM = {"health__interval": RARELY, "limits__connections": 1000}


def worker(slots: int = STREAMS, tls: ssl.SSLContext | None = None) -> ScriptedWorker:
    """Make a worker whose streams stay in the middle until its event `go`."""
    made = ScriptedWorker(slots=slots, tls=tls)
    begin, end = b"".join(EVENTS[:2]), b"".join(EVENTS[2:])
    made.default(
        send(sse_head() + chunk(begin)),
        wait("go"),
        send(chunk(end) + last_chunk()),
    )
    return made


def settings_of(
    running: ScriptedWorker, name: str = "", **more: object
) -> WorkerConfig:
    address = urlsplit(running.url)
    assert address.hostname is not None
    assert address.port is not None
    origin = Origin("http", address.hostname, address.port, "")
    config = WorkerConfig(running.url, origin, name or running.name)
    return replace(config, **more)  # type: ignore[arg-type]


async def begin(hub: RunningHub, count: int) -> list[Wire]:
    """Open so many streams; each has had its first token."""

    async def one() -> Wire:
        wire = await hub.open(CHAT, STREAM)
        assert (await wire.read_head()).status == 200
        return wire

    return await asyncio.gather(*(one() for _ in range(count)))


async def end(wires: Sequence[Wire], *workers: ScriptedWorker) -> None:
    """Let the streams go on; each has to be complete."""
    for each in workers:
        each.event("go").set()
    rests = await asyncio.gather(*(wire.read_response() for wire in wires))
    assert {rest.body for rest in rests} == {b"".join(EVENTS)}


async def ready(hub: RunningHub, *names: str) -> None:
    """Wait until these workers, and no others, take requests."""
    async with asyncio.timeout(DEADLINE):
        await hub.hub.ready()
    workers = hub.hub.registry.workers
    assert [each.name for each in workers if each.available] == list(names)


def share(hub: RunningHub) -> Counter[str]:
    """Count the running answers of each worker, removed ones included."""
    registry = hub.hub.registry
    both = (*registry.workers, *registry.leaving)
    return Counter({each.name: each.in_flight for each in both if each.in_flight})


def only(hub: RunningHub) -> Worker:
    [worker] = hub.hub.registry.workers
    return worker


async def worker_of(hub: RunningHub) -> str | None:
    """Send a request whose stream may end at once; return the worker's name."""
    response = await hub.post(CHAT, STREAM)
    assert response.status == 200
    return response.header("x-gollama-worker")


# --- One at a time, under load ----------------------------------------------------


async def test_an_added_worker_gets_the_next_requests() -> None:
    async with (
        worker() as old,
        worker() as new,
        running_hub(old, **CALM) as hub,
    ):
        wires = await begin(hub, STREAMS)
        hub.hub.registry.add(settings_of(new, "new"))
        await ready(hub, old.name, "new")
        wires += await begin(hub, 20)
        assert share(hub) == {old.name: STREAMS, "new": 20}
        await end(wires, old, new)


async def test_an_added_worker_gets_the_requests_that_wait() -> None:
    async with (
        worker(slots=1) as old,
        worker(slots=1) as new,
        running_hub(old, **CALM, queue__overcommit=0) as hub,
    ):
        wires = await begin(hub, 1)
        waiting = asyncio.create_task(begin(hub, 1))
        await until(lambda: hub.hub.queue.admission.waiting == 1)
        hub.hub.registry.add(settings_of(new, "new"))
        wires += await waiting
        assert share(hub) == {old.name: 1, "new": 1}
        await end(wires, old, new)


async def test_a_removed_worker_ends_its_answers_and_gets_no_more() -> None:
    async with (
        worker() as old,
        worker() as other,
        running_hub(old, other, **CALM) as hub,
    ):
        wires = await begin(hub, STREAMS)
        inside = hub.hub
        had = share(hub)
        assert set(had) == {old.name, other.name}
        removed = inside.registry.remove(old.name)
        wires += await begin(hub, 20)
        assert share(hub) == had + Counter({other.name: 20})
        assert removed in inside.connections
        assert repr(inside.health) == "<HealthChecker running=2 of 2>"
        await end(wires, old, other)
        await until(lambda: removed not in inside.connections)
        assert inside.registry.leaving == []
        assert repr(inside.health) == "<HealthChecker running=1 of 1>"
        await until(lambda: old.open == 0, "its idle connections are closed")
        assert len(old.requests) == had[old.name]


async def test_a_removed_worker_is_checked_until_its_last_answer_has_ended() -> None:
    """A worker that dies then is found out, and its answers are given up."""
    async with (
        worker() as old,
        worker() as other,
        running_hub(old, **CALM, health__recheck=0.01, health__fall=1) as hub,
    ):
        wires = await begin(hub, 1)
        hub.hub.registry.add(settings_of(other))
        await ready(hub, old.name, other.name)
        removed = hub.hub.registry.remove(old.name)
        await old.down()
        other.event("go").set()
        removed.suspect()
        [rest] = await asyncio.gather(*(wire.read_response() for wire in wires))
        assert rest.body.endswith(done())


async def test_requests_that_wait_for_a_removed_worker_are_not_forgotten() -> None:
    async with (
        worker(slots=1) as old,
        running_hub(old, **CALM, queue__overcommit=0) as hub,
    ):
        wires = await begin(hub, 1)
        waiting = asyncio.create_task(hub.post(CHAT, STREAM))
        await until(lambda: hub.hub.queue.admission.waiting == 1)
        hub.hub.registry.remove(old.name)
        refused = await waiting
        assert refused.status == 503
        assert refused.json()["error"]["code"] == "no_worker_available"
        await end(wires, old)


async def test_a_worker_that_is_added_again_before_it_was_gone_is_the_same() -> None:
    """Its running answers count, and what was learnt about it stays."""
    async with worker(slots=3) as old, running_hub(old, **CALM) as hub:
        wires = await begin(hub, 2)
        removed = hub.hub.registry.remove(old.name)
        assert not removed.available
        again = hub.hub.registry.add(settings_of(old, "again"))
        assert again is removed
        wires += await begin(hub, 1)
        assert share(hub) == {"again": 3}
        await end(wires, old)
        assert hub.hub.registry.workers == [again]
        assert list(hub.hub.connections) == [again]
        assert await worker_of(hub) == "again"


# --- Other settings for a worker --------------------------------------------------


async def test_a_worker_with_the_same_address_keeps_what_was_learnt() -> None:
    async with worker() as old, running_hub(old, **CALM) as hub:
        wires = await begin(hub, STREAMS)
        record = only(hub)
        for _ in range(record.policy.consecutive):
            record.breaker.record(Verdict.FAILURE)
        config = settings_of(old, "renamed", api_key="secret", slots=7)
        assert hub.hub.registry.replace(config, old.name) is record
        assert only(hub) is record
        assert (record.name, record.slots, record.in_flight) == ("renamed", 7, STREAMS)
        assert record.breaker.state is BreakerState.OPEN
        record.breaker.renew()
        for _ in range(record.policy.proofs):
            proof = record.breaker.permit()
            assert proof is not None
            proof.settle(True)
        await end(wires, old)
        assert await worker_of(hub) == "renamed"
        assert old.requests[-1].header("authorization") == "Bearer secret"


async def test_a_worker_with_another_address_is_another_worker() -> None:
    async with worker() as old, worker() as new, running_hub(old, **CALM) as hub:
        hub.hub.registry.replace(settings_of(old, "w"), old.name)
        wires = await begin(hub, STREAMS)
        before = only(hub)
        after = hub.hub.registry.replace(settings_of(new, "w"))
        assert after is not before
        await ready(hub, "w")
        wires += await begin(hub, 20)
        assert (before.in_flight, after.in_flight) == (STREAMS, 20)
        await end(wires, old, new)
        await until(lambda: hub.hub.registry.leaving == [])
        assert len(old.requests) == STREAMS


# --- A whole configuration --------------------------------------------------------


def with_workers(hub: RunningHub, *workers: WorkerConfig) -> Config:
    return replace(hub.hub.config, workers=workers)


async def test_a_configuration_adds_replaces_and_removes_under_load() -> None:
    async with (
        worker() as kept,
        worker() as leaves,
        worker() as moved,
        worker() as comes,
        running_hub(kept, leaves, **CALM) as hub,
    ):
        first = settings_of(kept), settings_of(leaves), settings_of(moved, "home")
        changes = await hub.hub.apply(with_workers(hub, *first))
        assert changes == Changes(added=("home",))
        await ready(hub, kept.name, leaves.name, "home")
        wires = await begin(hub, STREAMS)
        had = share(hub)
        record = hub.hub.registry.find(kept.name)
        second = settings_of(kept, "kept"), settings_of(comes, "home")
        assert await hub.hub.apply(with_workers(hub, *second)) == Changes(
            replaced=("kept", "home"), removed=(leaves.name,)
        )
        await ready(hub, "kept", "home")
        assert hub.hub.registry.find("kept") is record
        wires += await begin(hub, 60)
        counts = [len(each.requests) for each in (leaves, moved)]
        assert counts == [had[leaves.name], had["home"]]
        assert len(comes.requests) > 0
        await end(wires, kept, leaves, moved, comes)
        await until(lambda: hub.hub.registry.leaving == [])
        assert hub.hub.config.workers == second


async def test_a_thousand_workers_come_and_go_while_answers_run() -> None:
    quiet = CALM | {"health__recheck": RARELY}
    async with worker(STREAMS + 1) as one, running_hub(one, **quiet) as hub:
        wires = await begin(hub, STREAMS)
        here = hub.hub.config.workers
        many = tuple(absent(number) for number in range(MANY))
        grown: list[int] = []
        applying = asyncio.create_task(hub.hub.apply(with_workers(hub, *here, *many)))
        while not applying.done():
            grown.append(len(hub.hub.registry.workers))
            await asyncio.sleep(0)
        assert max(b - a for a, b in pairwise(grown)) <= BATCH  # answers go on between
        assert len(hub.hub.connections) == MANY + 1
        assert hub.hub.registry.find(many[-1].name).index == MANY
        wires += await begin(hub, 1)
        await hub.hub.apply(with_workers(hub, *here))
        assert repr(hub.hub.health) == "<HealthChecker running=1 of 1>"
        assert list(hub.hub.connections) == hub.hub.registry.workers == [only(hub)]
        assert share(hub) == {one.name: STREAMS + 1}
        await end(wires, one)


def absent(number: int) -> WorkerConfig:
    """Make a worker at an address where nothing listens."""
    origin = Origin("http", f"127.1.{number // 250}.{1 + number % 250}", 9, "")
    return WorkerConfig(f"http://{origin.authority}", origin, origin.authority)


async def test_the_same_configuration_changes_nothing() -> None:
    async with worker() as one, worker() as two, running_hub(one, two, **CALM) as hub:
        workers = list(hub.hub.registry.workers)
        pools = dict(hub.hub.connections)
        checks = len(one.control)
        assert await hub.hub.apply(hub.hub.config) == Changes()
        assert hub.hub.registry.workers == workers
        assert hub.hub.connections == pools
        assert len(one.control) == checks


async def test_swapped_names_are_not_a_clash() -> None:
    async with worker() as one, worker() as two, running_hub(**CALM) as hub:
        await hub.hub.apply(
            with_workers(hub, settings_of(one, "a"), settings_of(two, "b"))
        )
        a, b = hub.hub.registry.workers
        await hub.hub.apply(
            with_workers(hub, settings_of(one, "b"), settings_of(two, "a"))
        )
        assert hub.hub.registry.workers == [a, b]
        assert (a.name, b.name) == ("b", "a")


async def test_all_workers_leave_and_come_back() -> None:
    async with worker() as one, running_hub(one, **CALM) as hub:
        wires = await begin(hub, STREAMS)
        config = hub.hub.config
        changes = await hub.hub.apply(with_workers(hub))
        assert changes == Changes(removed=(one.name,))
        assert (await hub.get("/readyz", None)).status == 503
        assert (await hub.post(CHAT, STREAM)).status == 503
        await end(wires, one)
        await until(lambda: not hub.hub.connections)
        assert repr(hub.hub.health) == "<HealthChecker running=0 of 0>"
        assert await hub.hub.apply(config) == Changes(added=(one.name,))
        await ready(hub, one.name)
        assert (await hub.get("/readyz", None)).status == 200
        assert await worker_of(hub) == one.name


@pytest.mark.parametrize("field", ["name", "address"])
async def test_a_clash_is_an_error_and_changes_nothing(field: str) -> None:
    async with worker() as one, worker() as two, running_hub(one, **CALM) as hub:
        before = hub.hub.config, list(hub.hub.registry.workers)
        clash = (
            settings_of(two, one.name) if field == "name" else settings_of(one, "new")
        )
        configs = *hub.hub.config.workers, clash
        expected = f"workers.{'name' if field == 'name' else 'url'} = "
        with pytest.raises(ConfigError, match=expected):
            await hub.hub.apply(with_workers(hub, *configs))
        with pytest.raises(ConfigError, match=expected):
            hub.hub.registry.add(clash)
        assert (hub.hub.config, hub.hub.registry.workers) == before


async def test_workers_over_tls_come_and_go_with_their_certificates(
    authority: Authority,
) -> None:
    tls = authority.server(authority.issue("127.0.0.1"))
    async with (
        worker(tls=tls) as one,
        worker(tls=tls) as two,
        running_hub(**CALM) as hub,
    ):
        for each in (one, two):
            each.event("go").set()
        configs = [
            replace(
                settings_of(each),
                origin=Origin("https", "127.0.0.1", each.port, ""),
                ca_file=authority.file,
            )
            for each in (one, two)
        ]
        for config in configs:
            assert config.name in (await hub.hub.apply(with_workers(hub, config))).added
            await ready(hub, config.name)
            assert await worker_of(hub) == config.name
            assert repr(hub.hub.files) == "<Files items=1>"
        for _ in range(2):
            await hub.hub.apply(with_workers(hub))
        assert repr(hub.hub.files) == "<Files items=0>"
        lost = replace(configs[0], ca_file="/nowhere/ca.pem")
        with pytest.raises(ConfigError, match="ca_file"):
            await hub.hub.apply(with_workers(hub, lost))
        assert hub.hub.registry.workers == []
