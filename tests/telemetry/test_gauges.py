"""The page shows the present state of workers, queue and connections."""

from __future__ import annotations

import asyncio

from gollama_proxy import __version__
from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Limits, Queue
from gollama_proxy.edge.connections import ConnectionLimiter
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.telemetry.gauges import ClientCollector, FleetCollector
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import running_hub
from tests.fakes.page import parse, scrape, scraped_until, value
from tests.fakes.script import stream_of
from tests.fakes.worker import ScriptedWorker


def test_workers_are_shown_in_their_present_state() -> None:
    clock = Clock()
    loaded = config.load(None, {}, {}, ["http://a:1", "http://b:2"])
    registry = Registry(loaded, clock)
    telemetry = Telemetry(registry, Admission(Queue(), Clock()))
    a, b = registry.workers

    samples = parse(telemetry.exposition())
    assert value(samples, "gollama_build_info", version=__version__) == 1
    for name in ("a:1", "b:2"):
        assert value(samples, "gollama_worker_up", worker=name) == 0
        assert value(samples, "gollama_in_flight", worker=name) == 0
        state = value(samples, "gollama_worker_state", worker=name, state="starting")
        assert state == 1
        assert value(samples, "gollama_worker_slots", worker=name) is None

    a.observe(Check.OK, "ok", Description((Model("qwen"),), slots=3))
    b.observe(Check.OK, "ok", Description())  # does not report its slots
    lease = a.lease()
    samples = parse(telemetry.exposition())
    assert value(samples, "gollama_worker_up", worker="a:1") == 1
    assert value(samples, "gollama_in_flight", worker="a:1") == 1
    assert value(samples, "gollama_in_flight", worker="b:2") == 0
    assert value(samples, "gollama_worker_slots", worker="a:1") == 3
    assert value(samples, "gollama_worker_slots", worker="b:2") is None
    states = {
        state: value(samples, "gollama_worker_state", worker="a:1", state=state)
        for state in ("starting", "loading", "ready", "down")
    }
    assert states == {"starting": 0, "loading": 0, "ready": 1, "down": 0}

    with lease:
        pass
    samples = parse(telemetry.exposition())
    assert value(samples, "gollama_in_flight", worker="a:1") == 0


def test_requests_in_the_queue_are_shown_by_class() -> None:
    admission = Admission(Queue(), Clock())
    registry = Registry(config.load(None, {}, {}, ["http://a:1"]), Clock())
    telemetry = Telemetry(registry, admission)
    admission.join("alice", "qwen", Priority.BATCH)
    samples = parse(telemetry.exposition())
    assert value(samples, "gollama_queue_waiting", **{"class": "batch"}) == 1
    assert value(samples, "gollama_queue_waiting", **{"class": "interactive"}) == 0
    assert repr(FleetCollector(registry, admission)) == "<FleetCollector workers=1>"


def test_connections_are_shown_with_the_refused_ones_by_reason() -> None:
    clients = ConnectionLimiter(Limits(connections=1), Clock())
    registry = Registry(config.load(None, {}, {}, ["http://a:1"]), Clock())
    telemetry = Telemetry(registry, Admission(Queue(), Clock()), clients)
    assert clients.enter()
    assert not clients.enter()
    samples = parse(telemetry.exposition())
    assert value(samples, "gollama_connections") == 1
    refused = "gollama_connections_refused_total"
    assert value(samples, refused, reason="limit") == 1
    assert value(samples, refused, reason="address") == 0
    shown = "<ClientCollector of <ConnectionLimiter open=1 of 1>>"
    assert repr(ClientCollector(clients)) == shown


async def test_running_requests_are_in_flight() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        steps = asyncio.Semaphore(0)
        worker.default(*stream_of(2, steps))
        payload = {"messages": [], "stream": True}
        wires = [await hub.open(CHAT, payload) for _ in range(3)]
        for wire in wires:
            assert await wire.read_event()  # the first token: the answer has begun
        samples = await scrape(hub)
        assert value(samples, "gollama_in_flight", worker=worker.name) == 3
        for _ in wires:
            steps.release()
        for wire in wires:
            await wire.read_events()
        await scraped_until(
            hub, lambda s: value(s, "gollama_in_flight", worker=worker.name) == 0
        )
