"""Several hubs use the slots of the same workers, and never more than there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gollama_proxy.fleet.state import Hold
from gollama_proxy.scheduling import sharing
from gollama_proxy.scheduling.sharing import Sharing
from gollama_proxy.state import slots
from tests.behaviour.test_sleeping_machines import asleep
from tests.fakes.answers import CONTROL
from tests.fakes.asks import CHAT, WHOLE
from tests.fakes.client import Response
from tests.fakes.exchange import Request
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.script import Script, answer, wait
from tests.fakes.valkey import Partition, StoreServer, running_store
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker


@pytest.fixture(autouse=True)
def _rare_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases last, so that a busy machine changes nothing, and messages suffice."""
    set_times(monkeypatch, lifetime=DEADLINE, heartbeat=DEADLINE)


def set_times(
    monkeypatch: pytest.MonkeyPatch, *, lifetime: float, heartbeat: float
) -> None:
    for module in slots, sharing:
        monkeypatch.setattr(module, "LIFETIME", lifetime)
    monkeypatch.setattr(slots, "PATIENCE", lifetime)
    for module in slots, sharing:
        monkeypatch.setattr(module, "CAUTION", 0.0)
    monkeypatch.setattr(sharing, "HEARTBEAT", heartbeat)
    monkeypatch.setattr(sharing, "WAITING", heartbeat)


class CountingWorker(ScriptedWorker):
    """Answers when the test lets it, and knows how many requests run on it."""

    def __init__(self, slots: int = 4) -> None:
        super().__init__(slots=slots)
        self.running = self.most = 0
        self._finished = asyncio.Semaphore(0)

    def answer(self, request: Request) -> Script:
        if request.path in CONTROL:
            return super().answer(request)
        self.running += 1
        self.most = max(self.most, self.running)
        return (wait(self._finished), *answer({"choices": []}))

    def finish(self, number: int = 1) -> None:
        """Answer so many of the requests that run."""
        for _ in range(min(number, self.running)):
            self.running -= 1
            self._finished.release()

    async def busy(self, number: int) -> None:
        """Wait until so many requests run."""
        await until(lambda: self.running == number, f"{number} running on {self!r}")


class Hubs:
    """Several hubs that share a store and workers."""

    def __init__(self, running: Sequence[RunningHub], store: StoreServer) -> None:
        self.running = running
        self.store = store

    def __iter__(self) -> Iterator[RunningHub]:
        return iter(self.running)

    def queued(self, number: int) -> int:
        """Return how many requests wait in one of the hubs."""
        return self.running[number].hub.queue.admission.waiting

    async def queue(self, *waiting: int) -> None:
        """Wait until so many requests wait in each of the hubs."""
        await until(
            lambda: waiting == tuple(map(self.queued, range(len(self.running)))),
            f"{waiting} requests wait",
        )

    async def known(self, *subjects: str) -> None:
        """Wait until the store knows that requests of these wait, and the first hub."""
        while not {*subjects} <= {*await self._waiting()}:
            await asyncio.sleep(0.005)
        [worker] = self.running[0].hub.registry.workers
        await until(lambda: worker.on_yield is not None, "others wait")

    async def _waiting(self) -> list[str]:
        [key] = await self.store.ask("KEYS", "gollama:slots:line:*")
        line = msgspec.msgpack.decode(await self.store.ask("GET", key))
        return [want[0] for _, wants in line["waiting"].values() for want in wants]

    async def held(self, worker: ScriptedWorker) -> int:
        """Return how many leases of a worker there are in the store."""
        found = await self.store.ask("KEYS", f"gollama:slots:leases:*{worker.url}")
        return sum([await self.store.ask("ZCARD", key) for key in found])


def shared(hub: RunningHub) -> Sharing:
    assert hub.hub.cluster is not None
    return hub.hub.cluster.sharing


@asynccontextmanager
async def hubs(
    store: StoreServer, *fleets: Sequence[ScriptedWorker], **settings: Any
) -> AsyncIterator[Hubs]:
    """Run a hub for each of these lists of workers."""
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(
                running_hub(*fleet, **{"state__url": store.url, **settings})
            )
            for fleet in fleets
        ]
        await until(lambda: not any(shared(each).alone for each in running))
        yield Hubs(running, store)


@asynccontextmanager
async def pair(
    tmp_path: Path, slots: int = 4, engine: str = "valkey", **settings: Any
) -> AsyncIterator[tuple[CountingWorker, RunningHub, RunningHub, Hubs]]:
    """Run two hubs and one worker."""
    async with (
        running_store(tmp_path, engine) as store,
        CountingWorker(slots) as worker,
        hubs(store, [worker], [worker], **settings) as both,
    ):
        yield worker, *both, both
        assert worker.most <= slots


def chat(
    hub: RunningHub, subject: str = "alice", **headers: str
) -> asyncio.Task[Response]:
    """Send a request whose text is its subject."""
    ask = {"messages": [{"role": "user", "content": subject}]}
    posted = hub.post(CHAT, ask, hub.token(subject), headers=[*headers.items()])
    return asyncio.create_task(posted, name=f"fake client {subject}")


async def serve(
    worker: CountingWorker,
    clients: Sequence[asyncio.Task[Response]],
    *others: CountingWorker,
) -> None:
    """Answer whatever comes until all clients have their answers."""
    workers = [worker, *others]
    while not all(client.done() for client in clients):
        await until(
            lambda: (
                any(each.running for each in workers)
                or all(client.done() for client in clients)
            )
        )
        for each in workers:
            each.finish()
    assert {client.result().status for client in clients} == {200}


def order(worker: ScriptedWorker) -> str:
    """Return the subjects of the requests in the order of their arrival."""
    texts = (each.json()["messages"][0]["content"] for each in worker.requests)
    return "".join(texts)


# --- Never more, and never less ---------------------------------------------------


@pytest.mark.parametrize(
    ("number", "engine"), [(2, "valkey"), (4, "valkey"), (2, "redis")]
)
async def test_hubs_never_use_more_slots_than_there_are(
    tmp_path: Path, number: int, engine: str
) -> None:
    async with (
        running_store(tmp_path, engine) as store,
        CountingWorker(slots=4) as worker,
        hubs(store, *[[worker]] * number) as some,
    ):
        clients = [chat(hub) for hub in some for _ in range(10)]
        await worker.busy(4)
        await serve(worker, clients)
        assert worker.most == 4


async def test_a_hub_that_alone_has_work_uses_every_slot(tmp_path: Path) -> None:
    async with pair(tmp_path) as (worker, one, two, both):
        earlier = [chat(two) for _ in range(3)]
        await worker.busy(3)
        await serve(worker, earlier)  # the other hub keeps some leases as spare ones
        clients = [chat(one) for _ in range(5)]
        await worker.busy(4)
        await both.queue(1, 0)
        await serve(worker, clients)


async def test_the_next_request_finds_a_lease(tmp_path: Path) -> None:
    async with pair(tmp_path) as (worker, one, _, _):
        first = chat(one)
        await worker.busy(1)
        await serve(worker, [first])
        calls = shared(one).calls
        for _ in range(5):
            await serve(worker, [chat(one)])
        assert shared(one).calls == calls


async def test_a_slot_that_comes_free_goes_to_the_hub_where_one_waits(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (worker, one, two, both):
        clients = [chat(one, "a") for _ in range(4)]
        await worker.busy(4)
        other = chat(two, "b")
        await both.queue(0, 1)
        worker.finish()
        await worker.busy(4)
        assert order(worker) == "aaaab"
        await serve(worker, [*clients, other])


async def test_two_hubs_share_several_workers(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker(slots=2) as first,
        CountingWorker(slots=3) as second,
        hubs(store, [first, second], [first, second]) as both,
    ):
        clients = [chat(hub) for hub in both for _ in range(8)]
        await first.busy(2)
        await second.busy(3)
        await serve(first, clients, second)
        assert (first.most, second.most) == (2, 3)


async def test_an_idle_worker_is_used_before_a_second_slot_of_a_busy_one(
    tmp_path: Path,
) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker() as first,
        CountingWorker() as second,
        CountingWorker() as third,
        hubs(store, *[[first, second, third]] * 2) as both,
    ):
        clients = []
        for number, hub in enumerate([*both] * 3):
            clients.append(chat(hub))
            await until(
                lambda n=number: first.running + second.running + third.running > n  # type: ignore[misc]
            )
        assert min(first.running, second.running, third.running) == 2
        await serve(first, clients, second, third)


# --- Fair to subjects -------------------------------------------------------------


async def test_subjects_take_turns_over_all_hubs(tmp_path: Path) -> None:
    async with pair(tmp_path, slots=1) as (worker, one, two, both):
        clients = [chat(one, "a") for _ in range(6)]
        await worker.busy(1)
        clients += [chat(two, "b") for _ in range(3)]
        await both.queue(5, 3)
        await both.known("b")
        await serve(worker, clients)
        assert order(worker)[1:7].count("b") == 3, order(worker)


async def test_one_subject_has_one_turn_wherever_it_sends_its_requests(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, slots=1) as (worker, one, two, both):
        clients = [chat(one, "a") for _ in range(4)]
        await worker.busy(1)
        clients += [chat(two, "a") for _ in range(3)]
        clients += [chat(two, "b") for _ in range(3)]
        await both.queue(3, 6)
        await both.known("a", "b")
        await serve(worker, clients)
        turns = order(worker)
        assert turns[1:7].count("b") == 3, turns


async def test_classes_are_strict_over_all_hubs(tmp_path: Path) -> None:
    async with pair(tmp_path, slots=1) as (worker, one, two, both):
        first = chat(one, "x")
        await worker.busy(1)
        batch = [chat(one, "b", **{"X-Gollama-Priority": "batch"}) for _ in range(3)]
        await both.queue(3, 0)
        urgent = [chat(two, "i") for _ in range(3)]
        await both.queue(3, 3)
        await both.known("i")
        await serve(worker, [first, *batch, *urgent])
        assert order(worker) == "xiiibbb"


# --- Changes in the middle --------------------------------------------------------


async def test_a_client_that_leaves_takes_no_slot_with_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as (worker, one, two, both):
        clients = [chat(one) for _ in range(4)]
        await worker.busy(4)
        both.store.pause()
        wires = [await two.open(CHAT, {"messages": []}) for _ in range(6)]
        await both.queue(0, 6)
        worker.finish(4)
        for wire in wires[:4]:
            wire.close()
        await both.queue(0, 2)
        both.store.go_on()
        await worker.busy(2)
        more = [chat(one) for _ in range(2)]
        await worker.busy(4)
        for wire in wires[4:]:
            wire.close()
        await serve(worker, [*clients, *more])


async def test_a_worker_with_other_slots_is_used_up_to_those(tmp_path: Path) -> None:
    async with pair(tmp_path, slots=2) as (worker, *_, both):
        clients = [chat(hub) for hub in both for _ in range(6)]
        await worker.busy(2)
        worker.most, worker.slots = 0, 5
        for hub in both:
            hub.hub.registry.workers[0].suspect()
        await worker.busy(5)
        worker.slots = 1
        for hub in both:
            hub.hub.registry.workers[0].suspect()
            record = hub.hub.registry.workers[0]
            await until(lambda record=record: record.slots == 1)  # type: ignore[misc]
        worker.finish(4)
        await until(lambda: sum(map(both.queued, (0, 1))) == 7)
        assert worker.running == 1
        await serve(worker, clients)
        worker.most = 0


async def test_requests_that_need_no_slot_do_not_wait(tmp_path: Path) -> None:
    async with pair(tmp_path, slots=1) as (worker, one, two, _):
        running = chat(one)
        await worker.busy(1)
        worker.on("/tokenize", *answer({"tokens": []}))
        for hub in one, two:
            response = await hub.post("/tokenize", {"content": "hello"})
            assert response.json() == {"tokens": []}
        await serve(worker, [running])


async def test_more_requests_than_slots_are_allowed_over_all_hubs(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, slots=3, queue__overcommit=2) as (worker, *two, both):
        clients = [chat(hub) for hub in two for _ in range(5)]
        await worker.busy(5)
        await until(lambda: sum(map(both.queued, (0, 1))) == 5)
        await serve(worker, clients)
        assert worker.most == 5
        worker.most = 0


async def test_a_worker_without_a_number_of_slots_is_not_limited(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (worker, one, two, _):
        worker.on("/props", *answer({"error": "no"}, 404))
        for hub in one, two:
            record = hub.hub.registry.workers[0]
            record.suspect()
            await until(lambda record=record: record.slots is None)  # type: ignore[misc]
        clients = [chat(hub) for hub in (one, two) for _ in range(5)]
        await worker.busy(10)
        await serve(worker, clients)
        worker.most = 0


async def test_a_drained_worker_is_left_to_the_others(tmp_path: Path) -> None:
    async with pair(tmp_path) as (worker, one, two, both):
        earlier = [chat(one) for _ in range(3)]
        await worker.busy(3)
        worker.finish(2)
        await until(lambda: worker.running == 1)
        one.hub.registry.hold(worker.name, Hold.PAUSED)
        clients = [chat(two) for _ in range(4)]
        await worker.busy(4)
        await both.queue(0, 1)
        await serve(worker, [*earlier, *clients])


async def test_workers_come_and_go_at_each_hub(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker(slots=2) as worker,
        hubs(store, [worker], []) as both,
    ):
        one, two = both
        clients = [chat(one) for _ in range(2)]
        await worker.busy(2)
        config = one.hub.registry.workers[0].config
        two.hub.registry.add(config)
        await until(lambda: two.hub.registry.workers[0].available)
        clients += [chat(two) for _ in range(3)]
        await both.queue(0, 3)
        one.hub.registry.remove(worker.name)
        worker.finish()
        await worker.busy(2)
        one.hub.registry.add(config)
        await until(lambda: one.hub.registry.workers[0].available)
        clients.append(chat(one))
        await both.queue(1, 2)
        await serve(worker, clients)
        assert worker.most == 2


async def test_a_machine_that_was_woken_gets_the_request(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        asleep(tmp_path, state__url=store.url) as (machine, worker, network, hub),
    ):
        asked = asyncio.create_task(hub.post(CHAT, WHOLE), name="fake client")
        await until(lambda: bool(network.packets), "a packet")
        machine.hang_health = False
        worker.suspect()
        assert (await asked).status == 200


# --- What stays -------------------------------------------------------------------


async def test_idle_hubs_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, lifetime=DEADLINE, heartbeat=0.05)
    monkeypatch.setattr("gollama_proxy.state.slots.RECENT", 0.1)
    async with pair(tmp_path) as (worker, *_, both):
        await serve(worker, [chat(hub) for hub in both for _ in range(4)])
        while await both.held(worker):
            await asyncio.sleep(0.02)


async def test_a_hub_that_ends_gives_back_what_it_holds(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker(slots=2) as worker,
        hubs(store, [worker]) as some,
    ):
        async with hubs(store, [worker]) as others:
            (other,) = others
            await serve(worker, [chat(other)])
            assert await others.held(worker)
        assert not await some.held(worker)


# --- Trouble ----------------------------------------------------------------------


@pytest.mark.usefixtures("usual_timeouts")
async def test_the_slots_of_a_hub_that_is_gone_are_free_after_their_lifetime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, lifetime=1.0, heartbeat=0.1)
    async with (
        running_store(tmp_path) as store,
        Partition(store.socket, tmp_path / "net") as network,
        CountingWorker(slots=2) as worker,
        running_hub(worker, state__url=network.url) as gone,
        hubs(store, [worker]) as some,
    ):
        (hub,) = some
        await until(lambda: not shared(gone).alone)
        lost = [chat(gone) for _ in range(2)]
        await worker.busy(2)
        network.drop()
        clients = [chat(hub) for _ in range(2)]
        await worker.busy(4)  # the gone hub's requests cannot be ended from here
        await serve(worker, [*lost, *clients])


@pytest.mark.usefixtures("usual_timeouts")
async def test_a_hub_without_others_needs_no_store(tmp_path: Path) -> None:
    async with (
        running_store(tmp_path) as store,
        CountingWorker() as worker,
        hubs(store, [worker]) as some,
    ):
        (hub,) = some
        await store.kill()
        await until(lambda: shared(hub).alone)
        clients = [chat(hub) for _ in range(5)]
        await worker.busy(4)
        await serve(worker, clients)
        assert worker.most == 4


@pytest.mark.parametrize("trouble", ["killed", "paused"])
@pytest.mark.usefixtures("usual_timeouts")
async def test_without_the_store_each_hub_uses_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    set_times(monkeypatch, lifetime=0.5, heartbeat=0.1)
    async with pair(tmp_path) as (worker, one, two, both):
        await until(lambda: all(len(cluster_of(hub)) == 2 for hub in both))
        if trouble == "killed":
            await both.store.kill()
        else:
            both.store.pause()
        await until(lambda: all(shared(hub).alone for hub in both))
        clients = [chat(one) for _ in range(6)]
        await worker.busy(2)
        clients += [chat(two) for _ in range(6)]
        await worker.busy(4)
        await both.queue(4, 4)
        worker.finish(2)
        await worker.busy(4)
        if trouble == "killed":
            await both.store.start()
        else:
            both.store.go_on()
        await until(lambda: not any(shared(hub).alone for hub in both))
        await serve(worker, clients)
        alone = [chat(one) for _ in range(4)]
        await worker.busy(4)
        await serve(worker, alone)
        worker.most = 0


async def test_a_store_that_comes_back_empty_learns_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, lifetime=DEADLINE, heartbeat=0.1)
    monkeypatch.setattr(slots, "CAUTION", DEADLINE)
    async with pair(tmp_path) as (worker, one, two, both):
        clients = [chat(hub) for hub in (one, two) for _ in range(6)]
        await worker.busy(4)
        await both.store.restart()
        await until(lambda: not any(shared(hub).alone for hub in both))
        while await both.held(worker) < 4:
            await asyncio.sleep(0.02)
        await serve(worker, clients)


async def test_a_hub_that_starts_without_the_store_serves_after_a_lifetime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, lifetime=0.2, heartbeat=0.1)
    url = f"unix://{tmp_path}/none.sock"
    async with CountingWorker() as worker, running_hub(worker, state__url=url) as hub:
        clients = [chat(hub) for _ in range(5)]
        await worker.busy(4)
        await serve(worker, clients)
        assert shared(hub).alone


def cluster_of(hub: RunningHub) -> Sequence[object]:
    assert hub.hub.cluster is not None
    return hub.hub.cluster.members.all
