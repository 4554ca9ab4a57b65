"""The script of slots against a model of it, with hubs that die, pause and return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from benchmarks.leases import Leases, Message
from gollama_proxy.state.slots import CAUTION, LIFETIME, PATIENCE, Grant, SlotAsk, Want
from tests.fakes.slots import SlotStore, slot_server
from tests.fakes.valkey import ENGINES

HUBS = ("a", "b", "c")
SLOTS = {"one": 1, "three": 3}
SUBJECTS = ("x", "y", "z")
# Workers that a request can use, by its model.
MODELS = {"small": ("one", "three"), "large": ("three",)}

TIMES = (0.0, 0.001, 0.5, 0.999, 1.0, 1.001, 2.0, PATIENCE, PATIENCE + 0.001)

hubs = st.sampled_from(HUBS)
workers = st.sampled_from(sorted(SLOTS))
requests = st.tuples(
    st.sampled_from(SUBJECTS),
    st.integers(0, 1),
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 2),
)
lost = st.sampled_from([False, False, False, True])


class Hub:
    """One hub: its requests, and the leases that it knows of."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.heard_at = 0.0  # when the store last got a call of it
        self.waiting: Counter[tuple[str, int, str]] = Counter()  # subject, rank, model
        self.used: dict[str, set[str]] = {worker: set() for worker in SLOTS}
        self.spare: dict[str, set[str]] = {worker: set() for worker in SLOTS}
        self.back: dict[str, set[str]] = {worker: set() for worker in SLOTS}
        self.unused: dict[str, set[str]] = {worker: set() for worker in SLOTS}

    def asks(self, spare: int) -> list[SlotAsk]:
        return [
            SlotAsk(
                worker,
                slots,
                fair=(slots + len(HUBS) - 1 - HUBS.index(self.run[0])) // len(HUBS),
                held=sorted(self.used[worker] | self.spare[worker]),
                back=sorted(self.back[worker]),
                unused=sorted(self.unused[worker]),
                spare=spare,
                holds=len(self.used[worker] | self.spare[worker]),
                wants=[
                    Want(subject, rank, count, model)
                    for (subject, rank, model), count in sorted(self.waiting.items())
                    if count and worker in MODELS[model]
                ],
            )
            for worker, slots in SLOTS.items()
        ]

    def knows(self, worker: str, lease: str) -> bool:
        kinds = self.used, self.spare, self.back, self.unused
        return any(lease in kind[worker] for kind in kinds)

    def take(self, worker: str, grant: Grant) -> None:
        """Serve a request of the subject, or give the slot back."""
        if self.knows(worker, grant.lease):
            return
        if not grant.subject:
            self.spare[worker].add(grant.lease)
            return
        for key, count in sorted(self.waiting.items(), key=lambda item: item[0][1]):
            if count and key[0] == grant.subject and worker in MODELS[key[2]]:
                self.waiting[key] -= 1
                self.used[worker].add(grant.lease)
                return
        self.unused[worker].add(grant.lease)

    def finish(self, worker: str) -> None:
        if self.used[worker]:
            lease = min(self.used[worker])
            self.used[worker].remove(lease)
            self.back[worker].add(lease)

    def give_back_spare(self) -> None:
        for worker, leases in self.spare.items():
            self.back[worker] |= leases
            leases.clear()

    def confirm(self, asks: list[SlotAsk]) -> None:
        """Forget the leases that were given back by a call."""
        for ask in asks:
            self.back[ask.worker].clear()
            self.unused[ask.worker].clear()


class Cluster(RuleBasedStateMachine):
    """Three hubs, two workers, one store and its model."""

    socket: Path

    def __init__(self) -> None:
        super().__init__()
        self.store = SlotStore(self.socket)
        self.store.client.flushall()
        self.store.listen(*HUBS, *(f"{hub}2" for hub in HUBS))
        self.model = Leases()
        self.hubs = {name: Hub(name) for name in HUBS}
        self.gone: list[Hub] = []
        self.owners: dict[str, str] = {}  # of all leases that were granted
        self.call(self.hubs["a"])
        self.time_passes(CAUTION)

    def teardown(self) -> None:
        try:
            self.all_are_served()
        finally:
            self.store.close()

    # --- What happens -------------------------------------------------------------

    @rule(name=hubs, subject=st.sampled_from(SUBJECTS))
    def requests_leave(self, name: str, subject: str) -> None:
        for key in self.hubs[name].waiting:
            if key[0] == subject:
                self.hubs[name].waiting[key] = 0

    @rule(
        name=hubs,
        seconds=st.sampled_from(TIMES),
        arriving=st.lists(requests, max_size=2),
        ending=st.lists(workers, max_size=6),
        spare=st.integers(0, 2),
        lost=lost,
        dropped=lost,
    )
    def a_hub_calls(
        self,
        name: str,
        seconds: float,
        arriving: list[tuple[str, int, str, int]],
        ending: list[str],
        spare: int,
        lost: bool,
        dropped: bool,
    ) -> None:
        """Some time later, when requests have arrived and ended."""
        hub = self.hubs[name]
        for subject, rank, model, count in arriving:
            hub.waiting[subject, rank, model] += count
        for worker in ending:
            hub.finish(worker)
        if not spare:
            hub.give_back_spare()
        self.time_passes(seconds)
        self.call(hub, spare=spare, lost=lost, dropped=dropped)

    @rule(name=hubs)
    def a_hub_dies_and_another_starts(self, name: str) -> None:
        hub = self.hubs[name]
        if hub.run in HUBS:  # a second life is enough
            self.gone.append(hub)
            self.hubs[name] = Hub(f"{name}2")

    @rule(seconds=st.sampled_from([PATIENCE, CAUTION, LIFETIME, LIFETIME + 0.001]))
    def time_passes(self, seconds: float) -> None:
        self.store.now = round(self.store.now + seconds, 3)

    @rule()
    def the_store_comes_back_empty(self) -> None:
        self.store.client.flushall()
        self.model = Leases()

    def call(
        self, hub: Hub, *, spare: int = 0, lost: bool = False, dropped: bool = False
    ) -> None:
        """Call; the reply may be lost, or the messages for other hubs."""
        store, asks = self.store, hub.asks(spare)
        replies = store.sync(hub.run, *asks)
        messages = store.heard()
        outcome = self.model.sync(hub.run, asks, store.now)
        # Repeated grants come in any order.
        assert [r._replace(granted=sorted(r.granted)) for r in replies] == [
            r._replace(granted=sorted(r.granted)) for r in outcome.replies
        ]
        assert messages.pop("wanted", []) == outcome.wanted
        assert messages == outcome.messages
        hub.heard_at = store.now
        own = [(r.worker, grant) for r in replies for grant in r.granted]
        self.check(hub, own, outcome.messages)
        if not lost:
            hub.confirm(asks)
            for worker, grant in own:
                hub.take(worker, grant)
        if not dropped:
            for other in self.hubs.values():
                for worker, grant in outcome.messages.get(other.run, []):
                    other.take(worker, grant)

    # --- What has to hold ---------------------------------------------------------

    def check(
        self,
        hub: Hub,
        own: list[Message],
        messages: dict[str, list[Message]],
    ) -> None:
        new = [(hub.run, *each) for each in own if each[1].lease not in self.owners]
        new += [(run, *each) for run, them in messages.items() for each in them]
        for run, worker, grant in new:
            assert grant.lease not in self.owners, "one lease of two hubs"
            self.owners[grant.lease] = run
            assert self.registered(worker) <= SLOTS[worker], "above the slots"
        for run, _, grant in ((hub.run, *each) for each in own):
            assert self.owners[grant.lease] == run

    def registered(self, worker: str, of: str = "") -> int:
        """Count the leases of a worker that have not ended, of all hubs or of one."""
        key = f"{self.store.prefix}:slots:leases:{worker}"
        above = f"({self.store.now * 1000:.0f}"
        found = self.store.client.zrangebyscore(key, above, "+inf")
        return sum(lease.decode().startswith(of) for lease in found)

    @invariant()
    def dead_hubs_hold_nothing(self) -> None:
        for hub in self.gone:
            if self.store.now >= hub.heard_at + LIFETIME:
                for worker in SLOTS:
                    assert self.registered(worker, f"{hub.run}:") == 0

    def all_are_served(self) -> None:
        """When hubs call every second and requests end, none waits for long."""
        waiting = sum(sum(hub.waiting.values()) for hub in self.hubs.values())
        for _ in range(waiting + 20):
            for hub in self.hubs.values():
                for worker in SLOTS:
                    hub.finish(worker)
                hub.give_back_spare()
                self.call(hub)
            self.time_passes(1.0)
        for hub in self.hubs.values():
            assert not hub.waiting.total(), hub.waiting
        for _ in range(2):
            for hub in self.hubs.values():
                for worker in SLOTS:
                    hub.finish(worker)
                self.call(hub)
        for worker in SLOTS:
            assert self.registered(worker) == 0


@pytest.fixture(scope="module", params=ENGINES)
def socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    with slot_server(request.param) as path:
        yield path


def test_the_script_does_what_the_model_does(socket: Path) -> None:
    class Case(Cluster):
        pass

    Case.socket = socket
    run_state_machine_as_test(
        Case,
        settings=settings(
            max_examples=10,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # to shrink a failure takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
