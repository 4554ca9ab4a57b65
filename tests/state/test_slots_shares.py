"""A hub holds what it needs of a worker, gives back what others wait for, no more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gollama_proxy.config.settings import Origin
from gollama_proxy.state.slots import (
    RECENT,
    Grant,
    Share,
    SlotAsk,
    SlotReply,
    Want,
    fair_part,
    fair_parts,
    shared_key,
)

NOTHING = SlotReply("w", [], 0, 4)


def make(*leases: str) -> Share:
    share = Share("w", "a", 0.0)
    share.leases += leases
    return share


def asked(share: Share, slots: int = 4, running: int = 0, *wants: Want) -> SlotAsk:
    ask = share.ask(slots, slots, running, wants)
    assert ask is not None
    return ask


# --- How much a hub holds ---------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "target"), [(0, 0), (1, 2), (2, 3), (3, 4), (8, 12), (100, 150)]
)
def test_it_wants_half_as_many_again_as_it_needed(most: int, target: int) -> None:
    share = make()
    share.note(most, 1.0)
    assert share.target == target
    ask = share.ask(1000, 500, 0)
    assert (ask.spare if ask else 0) == target


def test_what_was_needed_counts_for_some_seconds() -> None:
    share = make()
    share.note(3, 1.0)
    share.note(1, RECENT + 1)
    assert share.target == 4
    share.note(0, 2 * RECENT + 1)
    assert share.target == 2
    share.note(0, 3 * RECENT + 1)
    assert share.target == 0


def test_one_lease_is_held_of_a_worker_whose_model_is_in_demand_elsewhere() -> None:
    share = make()
    share.least = 1
    assert not share.in_demand
    assert asked(share).spare == 1
    share.alert()
    assert share.ask(4, 4, 0) is None
    share.note(2, 1.0)
    assert share.in_demand
    assert share.target == 3


def test_a_long_silence_ends_all_demand() -> None:
    share = make()
    share.note(3, 1.0)
    share.note(0, 2 * RECENT)
    assert share.target == 0


def test_demand_is_counted_from_the_beginning_of_a_share() -> None:
    share = Share("w", "a", 1000.0)
    share.note(3, 1000.0)
    for second in (1.0, 2.0):
        share.note(0, 1000.0 + second)
    assert share.target == 4


def test_a_worker_stays_in_demand_for_a_while_after_one_request() -> None:
    share = make()
    share.note(1, 1.0)
    share.note(0, RECENT + 1)
    assert share.in_demand
    share.note(0, 2 * RECENT + 1)
    assert not share.in_demand


def test_an_ask_names_the_worker_its_slots_and_the_part_of_the_hub() -> None:
    share, want = make("1", "2"), Want("ann", 1, 1, "m")
    share.trim(1)
    share.note(3, 1.0)
    ask = share.ask(8, 2, 1, [want])
    assert ask == SlotAsk("w", 8, 2, ("1",), ("2",), 3, (want,), (), 1)
    assert share.waits


def test_an_idle_worker_is_given_back_and_then_not_asked_for() -> None:
    share = make("1", "2")
    ask = asked(share)
    assert (ask.held, ask.back) == ((), ("2", "1"))
    assert share.owes
    assert share.take(ask, NOTHING) == []
    assert not share.owes
    assert share.ask(4, 4, 0) is None


def test_a_worker_without_anything_to_ask_is_not_scarce() -> None:
    share = make("1")
    share.take(asked(share, 4, 1), SlotReply("w", [], 0, 0))
    assert share.scarce
    share.take(asked(share), SlotReply("w", [], 0, 0))
    assert share.ask(4, 4, 0) is None
    assert not share.scarce


def test_no_more_is_asked_for_than_the_worker_has() -> None:
    share = make("1", "2", "3")
    share.note(3, 0.0)
    assert asked(share, running=3).spare == 1
    assert asked(share, 3, 3).spare == 0


def test_a_worker_that_gets_no_request_keeps_what_runs() -> None:
    share = make("1", "2")
    share.note(2, 0.0)
    ask = share.ask(4, 4, 1, in_use=False)
    assert ask is not None
    assert (ask.held, ask.back, ask.spare) == (("1",), ("2",), 0)
    ask = share.ask(4, 4, 0, in_use=False)
    assert ask is not None
    assert (ask.held, ask.back) == ((), ("2", "1"))


# --- Requests that wait -----------------------------------------------------------


def test_a_first_request_asks_for_a_slot_and_one_to_spare() -> None:
    share = make()
    want = Want("ann", 1, 1, "m")
    assert share.is_urgent([want])
    ask = asked(share, 4, 0, want)
    assert (ask.wants, ask.spare) == ((want,), 1)
    reply = SlotReply("w", [Grant("1", "ann"), Grant("2", "")], 0, 2)
    assert share.take(ask, reply) == reply.granted
    assert share.leases == ["1", "2"]
    assert not share.scarce


def test_a_hub_that_has_every_slot_asks_nobody() -> None:
    share = make("1", "2")
    ask = asked(share, 2, 2, Want("ann", 1, 3, "m"))
    assert (ask.wants, ask.spare) == ((), 0)


def test_a_hub_that_has_every_slot_does_not_call_again_and_again() -> None:
    share, want = make("1", "2"), Want("ann", 1, 1, "m")
    assert share.is_urgent([want])
    share.take(asked(share, 2, 2, want), NOTHING)
    assert not share.is_urgent([want])
    share.alert()
    assert share.is_urgent([want])


def test_calls_between_heartbeats_name_leases_once() -> None:
    share = make("1", "2")

    def ask() -> SlotAsk:
        made = share.ask(8, 4, 4, [Want("ann", 1, 1, "m")], renew=False)
        assert made is not None
        assert made.holds == len(share.leases) == 4
        return made

    share.receive(Grant("3", "ann"))
    lost = ask()
    assert lost.held == ("3", "a:m1")
    again = ask()
    assert again.held == lost.held
    share.take(again, NOTHING)
    assert ask().held == ()


def test_while_no_other_hub_waits_numbers_may_be_late() -> None:
    share = make("1")
    share.take(asked(share, 4, 1, Want("ann", 1, 1, "m")), NOTHING)
    assert not share.is_urgent([Want("ann", 1, 5, "m")])
    assert not share.is_urgent([])
    assert share.is_urgent([Want("bob", 1, 1, "m")])
    share.contended = True
    assert share.is_urgent([Want("ann", 1, 5, "m")])
    assert share.is_urgent([])


def test_a_worker_is_scarce_while_it_has_no_slot_for_a_request() -> None:
    share = make()
    ask = asked(share, 4, 0, Want("ann", 1, 1, "m"))
    share.take(ask, SlotReply("w", [], 0, 0))
    assert share.scarce
    share.take(asked(share, 4, 0), SlotReply("w", [], 0, 1))
    assert not share.scarce
    share.take(asked(share, 4, 0, Want("ann", 1, 1, "m")), NOTHING)
    assert share.scarce, "it got none, so it can get none for now"


# --- Other hubs that wait ---------------------------------------------------------


def test_spare_leases_go_back_when_another_hub_waits() -> None:
    share = make("1", "2", "3")
    share.note(2, 0.0)
    share.take(asked(share, 4, 1), SlotReply("w", [], 2, 0))
    assert share.contended
    ask = asked(share, 4, 1)
    assert (ask.held, ask.back, ask.spare) == (("1",), ("3", "2"), 0)


def test_one_request_that_waits_elsewhere_is_enough() -> None:
    share = make("1")
    share.take(asked(share, 4, 1), SlotReply("w", [], 1, 0))
    assert share.contended


def test_what_goes_back_is_urgent() -> None:
    share = make("1", "2")
    share.take(asked(share, 4, 2), NOTHING)
    assert not share.is_urgent([])
    share.trim(1)
    assert share.is_urgent([])


def test_a_reply_does_not_undo_a_message_that_came_during_the_call() -> None:
    share = make("1")
    ask = asked(share, 4, 1)
    share.alert()
    share.take(ask, NOTHING)
    assert share.contended
    share.take(asked(share, 4, 1), NOTHING)
    assert not share.contended


def test_what_was_not_answered_is_given_back_again() -> None:
    share = make("1", "2")
    first = asked(share)
    second = asked(share)
    assert first.back == second.back
    share.take(second, NOTHING)
    assert not share.owes


def test_what_goes_back_during_a_call_is_in_the_next_one() -> None:
    share = make("1", "2")
    ask = asked(share, 4, 2)
    share.trim(1)
    share.take(ask, NOTHING)
    assert asked(share, 4, 1).back == ("2",)


# --- Grants -----------------------------------------------------------------------


def test_a_grant_counts_once_however_often_it_arrives() -> None:
    share = make()
    grant = Grant("1", "ann")
    ask = asked(share, 4, 0, Want("ann", 1, 1, "m"))
    assert share.receive(grant)
    assert not share.receive(grant)
    assert share.take(ask, SlotReply("w", [grant], 0, 3)) == []
    assert share.leases == ["1"]


@pytest.mark.parametrize(
    ("wants", "left"),
    [
        ([("ann", "m", 3), ("bob", "m", 2)], [("ann", "m", 2), ("bob", "m", 2)]),
        ([("ann", "m", 1), ("bob", "m", 2)], [("bob", "m", 2)]),
        ([("ann", "m", 3), ("bob", "m", 2), ("ann", "n", 3)], [("bob", "m", 2)]),
    ],
    ids=["one of many", "the only one", "of one of two kinds"],
)
def test_after_a_grant_the_store_knows_of_one_request_less(
    wants: list[tuple[str, str, int]], left: list[tuple[str, str, int]]
) -> None:
    def waiting(these: list[tuple[str, str, int]]) -> list[Want]:
        return [Want(subject, 1, number, queue) for subject, queue, number in these]

    share = make()
    share.take(asked(share, 4, 0, *waiting(wants)), SlotReply("w", [], 1, 0))
    assert not share.is_urgent(waiting(wants))
    assert share.receive(Grant("1", ""))
    assert not share.is_urgent(waiting(wants)), "it was for none of them"
    assert share.receive(Grant("2", "ann"))
    assert not share.is_urgent(waiting(left))


def test_a_grant_that_is_of_no_use_gives_the_subject_its_turn_again() -> None:
    share = make()
    assert share.receive(Grant("1", "ann"))
    share.refuse("1")
    assert not share.receive(Grant("1", "ann")), "a late message"
    ask = asked(share)
    assert (ask.unused, ask.back, ask.held) == (("1",), (), ())
    share.take(ask, NOTHING)
    assert not share.owes


# --- Without the store ------------------------------------------------------------


def test_requests_from_the_time_without_the_store_get_leases() -> None:
    share = make("1")
    ask = asked(share, 4, 3)
    assert ask.held == ("1", "a:m1", "a:m2")


def test_leases_that_have_ended_are_not_used_and_not_given_back() -> None:
    share = make("1", "2", "3")
    want = Want("ann", 1, 1, "m")
    asked(share, 4, 3, want)
    share.refuse("3")
    share.trim(1)
    share.expire(1)
    assert not share.owes
    assert not share.waits
    assert share.is_urgent([want])
    ask = asked(share, 4, 1)
    assert (ask.held, ask.back, ask.unused) == (("1",), (), ())


def test_grants_of_a_call_that_was_given_up_go_back_if_they_are_too_many() -> None:
    share = make()
    ask = share.ask(4, 2, 1, careful=True)
    assert ask is not None
    late = [Grant(str(n), "ann") for n in range(3)]
    assert share.take(ask, SlotReply("w", late, 0, 0)) == late[:1]
    assert share.leases == ["a:m1", "0"]
    assert asked(share, 4, 2).unused == ("1", "2")


def test_a_hub_asks_for_as_many_requests_as_its_part_has_slots() -> None:
    wants = [Want(subject, 1, 1, "m") for subject in ("ann", "bob", "cid")]
    ask = make().ask(8, 2, 0, wants, careful=True)
    assert ask is not None
    assert ask.wants == tuple(wants[:2])


def test_until_all_are_back_a_hub_asks_for_no_more_than_its_part() -> None:
    share = make("1")
    wants = [Want("ann", 1, 1, "m"), Want("bob", 1, 5, "m"), Want("cid", 1, 1, "m")]
    ask = share.ask(8, 4, 1, wants, careful=True)
    assert ask is not None
    assert ask.wants == (Want("ann", 1, 1, "m"), Want("bob", 1, 2, "m"))
    assert ask.spare == 0
    share.take(ask, NOTHING)
    assert not share.is_urgent(wants), "it asks again at its heartbeat"
    assert [share.receive(Grant(str(n), "bob")) for n in (2, 3)] == [True, True]
    assert not share.is_urgent(wants)
    assert share.receive(Grant("4", "ann"))
    assert not share.is_urgent(wants), "it has its part"
    share.trim(3)
    share.take(asked(share, 8, 3), NOTHING)
    share.ask(8, 4, 3, careful=True)
    assert share.is_urgent(wants)


@given(st.integers(0, 200), st.integers(1, 20), st.text(max_size=30))
def test_the_parts_of_all_hubs_are_the_slots(slots: int, hubs: int, key: str) -> None:
    parts = [fair_part(slots, hubs, place, key) for place in range(hubs)]
    assert sum(parts) == slots
    assert max(parts) - min(parts) <= 1


@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 6), max_size=8),
    st.lists(st.lists(st.text(max_size=3), max_size=5), max_size=4),
    st.integers(1, 6),
)
def test_each_hub_can_use_each_model_and_no_slot_is_given_twice(
    slots: dict[str, int], pools: list[list[str]], hubs: int
) -> None:
    parts = [fair_parts(slots, pools, hubs, place) for place in range(hubs)]
    for part in parts:
        assert part.keys() == slots.keys()
        for pool in pools:
            known = [key for key in pool if key in slots]
            assert not known or any(part[key] for key in known)
    for key, most in slots.items():
        held = sum(part[key] for part in parts)
        few = [pool for pool in pools if key in pool]
        assert held == most or (held > most and few and most < hubs)


def test_a_slot_in_excess_is_only_for_a_model_that_would_have_none() -> None:
    alone = [fair_parts({"x": 1}, [("x",)], 3, place) for place in range(3)]
    assert alone == [{"x": 1}] * 3
    slots = {"x": 4, "y": 1}
    for place in range(2):
        parts = {key: fair_part(most, 2, place, key) for key, most in slots.items()}
        assert fair_parts(slots, [("x", "y")], 2, place) == parts


def test_what_remains_goes_to_other_hubs_for_other_workers() -> None:
    keys = [f"http://10.0.0.{n}:8080" for n in range(200)]
    first = sum(fair_part(1, 4, 0, key) for key in keys)
    assert 25 <= first <= 75


def test_a_worker_on_this_machine_is_another_one_on_each_machine() -> None:
    far, near = Origin("http", "10.0.0.1", 80, ""), Origin("http", "127.0.0.2", 80, "")
    assert shared_key(far, "one") == shared_key(far, "two") == "http://10.0.0.1:80"
    assert shared_key(near, "one") != shared_key(near, "two")


# --- Several hubs and a store -----------------------------------------------------


class Leases:
    """The leases of one worker, as the store has them: no turns, no time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[str, str] = {}  # lease: hub
        self.wants: dict[str, tuple[Want, ...]] = {}
        self.messages: list[tuple[str, Grant]] = []
        self.unheard: dict[str, list[Grant]] = {}
        self._numbers = itertools.count(1)

    def call(self, hub: str, ask: SlotAsk) -> SlotReply:
        for lease in (*ask.back, *ask.unused):
            assert self.held.pop(lease, hub) == hub
        for lease in ask.held:
            assert self.held.setdefault(lease, hub) == hub
        known = {*ask.held, *ask.back, *ask.unused}
        late = [each for each in self.unheard.get(hub, ()) if each.lease not in known]
        self.unheard[hub] = late
        self.wants[hub] = ask.wants
        granted = [*late]
        for other, wants in list(self.wants.items()):
            for want in wants:
                for _ in range(min(want.requests, self.free)):
                    grant = self._grant(other, want.subject)
                    if other == hub:
                        granted.append(grant)
                    else:
                        self.messages.append((other, grant))
                    left = want.requests - 1
                    self.wants[other] = (want._replace(requests=left),) if left else ()
        if not any(self.wants.values()):
            granted += [self._grant(hub, "") for _ in range(min(ask.spare, self.free))]
        waiting = sum(w.requests for h in self.wants if h != hub for w in self.wants[h])
        return SlotReply("w", granted, waiting, self.free)

    @property
    def free(self) -> int:
        return max(0, self.slots - len(self.held))

    def _grant(self, hub: str, subject: str) -> Grant:
        grant = Grant(f"{hub}:{next(self._numbers)}", subject)
        self.held[grant.lease] = hub
        self.unheard.setdefault(hub, []).append(grant)
        return grant


class Hubs(RuleBasedStateMachine):
    """Three hubs with requests that come and go; messages are late or lost."""

    hubs = st.sampled_from("abc")
    SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.store = Leases(self.SLOTS)
        self.shares = {hub: Share("w", hub, 0.0) for hub in "abc"}
        self.running = dict.fromkeys("abc", 0)
        self.waiting = dict.fromkeys("abc", 0)
        self.asks: dict[str, tuple[SlotAsk, SlotReply]] = {}  # replies on their way
        self.now = 0.0

    def begin(self, hub: str) -> None:
        """Let as many requests run as a hub has leases for."""
        share = self.shares[hub]
        while self.waiting[hub] and self.running[hub] < len(share.leases):
            self.waiting[hub] -= 1
            self.running[hub] += 1

    def receive(self, hub: str, grants: Sequence[Grant]) -> None:
        share = self.shares[hub]
        for grant in grants:
            if grant.subject and not self.waiting[hub] and share.contended:
                share.refuse(grant.lease)
        self.begin(hub)
        self.give_way(hub)

    def give_way(self, hub: str) -> None:
        if self.shares[hub].contended:
            self.shares[hub].trim(self.running[hub])

    @rule(hub=hubs)
    def a_request_comes(self, hub: str) -> None:
        self.waiting[hub] += 1
        self.begin(hub)

    @rule(hub=hubs)
    def a_request_ends(self, hub: str) -> None:
        if self.running[hub]:
            self.running[hub] -= 1
            self.give_way(hub)
            self.begin(hub)

    @rule(hub=hubs)
    def a_request_leaves(self, hub: str) -> None:
        self.waiting[hub] = max(0, self.waiting[hub] - 1)

    @rule(hub=hubs, seconds=st.sampled_from([0.0, 1.0, RECENT]))
    def calls(self, hub: str, seconds: float) -> None:
        if hub in self.asks:
            return
        self.now += seconds
        share, waiting = self.shares[hub], self.waiting[hub]
        share.note(self.running[hub], self.now)
        wants = [Want(hub, 0, waiting)] if waiting else []
        ask = share.ask(self.SLOTS, 1, self.running[hub], wants)
        if ask is not None:
            self.asks[hub] = ask, self.store.call(hub, ask)

    @rule(hub=hubs, lost=st.booleans())
    def a_reply_arrives(self, hub: str, lost: bool) -> None:
        ask, reply = self.asks.pop(hub, (None, None))
        if ask is not None and reply is not None and not lost:
            self.receive(hub, self.shares[hub].take(ask, reply))

    @precondition(lambda self: self.store.messages)
    @rule(lost=st.booleans())
    def a_message_arrives(self, lost: bool) -> None:
        hub, grant = self.store.messages.pop(0)
        if not lost and self.shares[hub].receive(grant):
            self.receive(hub, [grant])

    @rule(hub=hubs)
    def another_hub_is_reported_to_wait(self, hub: str) -> None:
        self.shares[hub].alert()
        self.give_way(hub)

    @invariant()
    def no_slot_is_used_twice(self) -> None:
        assert sum(self.running.values()) <= self.SLOTS
        for hub, share in self.shares.items():
            assert self.running[hub] <= len(share.leases)
            assert len({*share.leases}) == len(share.leases)
            assert all(self.store.held.get(each) == hub for each in share.leases)

    def teardown(self) -> None:
        """Without requests, nothing stays held."""
        self.asks.clear()
        self.running = dict.fromkeys("abc", 0)
        self.waiting = dict.fromkeys("abc", 0)
        self.now += 2 * RECENT
        for _ in range(3):
            for hub in "abc":
                self.calls(hub, 0.0)
                self.a_reply_arrives(hub, lost=False)
                self.now += 2 * RECENT
        assert not self.store.held


TestHubs = Hubs.TestCase
