"""Slots of workers as leases in the store: what one call does, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gollama_proxy.state import slots
from gollama_proxy.state.slots import (
    CAUTION,
    LIFETIME,
    MOST_WANTS,
    PATIENCE,
    SlotAsk,
    Want,
)
from tests.fakes.slots import SlotStore, leases_of, slot_server
from tests.fakes.valkey import ENGINES


@pytest.fixture(scope="module", params=ENGINES)
def socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    with slot_server(request.param) as path:
        yield path


@pytest.fixture
def store(socket: Path) -> Iterator[SlotStore]:
    """A store that has been in use for a while."""
    store = SlotStore(socket)
    store.client.flushall()
    store.sync("a", SlotAsk("other", 1, 1))
    store.now += CAUTION
    yield store
    store.close()


def subjects(store: SlotStore, hub: str, count: int, **of: object) -> list[str]:
    """Return the subjects that are granted a slot, one after the other."""
    reply = store.ask(hub, slots=count, **of)
    return [grant.subject for grant in reply.granted]


# --- Leases -----------------------------------------------------------------------


def test_spare_leases_are_half_of_what_is_free(store: SlotStore) -> None:
    first = store.ask("a", spare=4)
    assert [grant.subject for grant in first.granted] == ["", ""]
    assert first.free == 2
    assert len(store.ask("b", spare=4).granted) == 1
    assert store.ask("c", spare=4).granted == []
    assert len({*leases_of(first.granted)}) == 2


def test_a_hub_alone_gets_all_spare_leases_that_it_asks_for(store: SlotStore) -> None:
    assert len(store.ask("a", fair=4, spare=3).granted) == 3
    assert store.ask("a", fair=4).free == 1


def test_a_lease_ends_unless_it_is_renewed(store: SlotStore) -> None:
    held = leases_of(store.ask("a", spare=4).granted)
    for _ in range(3):
        store.now += LIFETIME - 0.001
        store.sync("b", SlotAsk("other", 1, 1))
        assert store.ask("a", held=held).free == 2
    store.now += LIFETIME - 0.001
    assert store.ask("b").free == 2
    store.now += 0.001
    assert store.ask("b").free == 4


def test_a_lease_that_is_given_back_is_free_at_once(store: SlotStore) -> None:
    held = leases_of(store.ask("a", spare=4).granted)
    assert store.ask("a", back=held[:1], held=held[1:]).free == 3
    assert store.ask("a", back=held[:1], held=held[1:]).free == 3


def test_what_runs_is_registered_again_even_above_the_slots(store: SlotStore) -> None:
    wants = [Want("s", 0, 4)]
    held = leases_of(store.ask("a", wants=wants).granted)
    store.sync("a", SlotAsk("w", 4, 2, held=held))
    store.now += LIFETIME
    store.sync("b", SlotAsk("other", 1, 1))
    store.now += LIFETIME - 1
    assert len(store.ask("b", wants=wants).granted) == 4
    reply = store.ask("a", held=held, wants=[Want("s", 0, 1)])
    assert reply.free == 0
    assert reply.granted == []
    assert store.client.zcard("test:slots:leases:w") == 8


def test_a_call_between_heartbeats_names_new_leases_only(store: SlotStore) -> None:
    store.listen()
    held = leases_of(store.ask("a", wants=[Want("s", 0, 4)]).granted)
    store.ask("a", held=held)
    reply = store.ask("a", holds=4, wants=[Want("s", 0, 1)])
    assert (reply.granted, reply.free) == ([], 0)
    assert store.heard() == {}  # no other hub holds a lease
    store.client.flushall()
    assert len(store.ask("a", holds=1, wants=[Want("s", 0, 1)]).granted) == 1
    assert store.ask("a", holds=2, wants=[Want("s", 0, 2)]).free == 0


def test_many_leases_are_renewed_at_once(store: SlotStore) -> None:
    held = [f"a:m{n}" for n in range(5000)]
    assert store.ask("a", slots=6000, held=held).free == 1000
    assert store.ask("a", slots=6000, back=held).free == 6000


# --- The line ---------------------------------------------------------------------


def test_classes_come_first_then_turns_of_subjects(store: SlotStore) -> None:
    wants = [Want("b", 1, 1), Want("x", 0, 3), Want("y", 0, 1), Want("z", 0, 2)]
    order = ["x", "y", "z", "x", "z", "x", "b"]
    assert subjects(store, "a", 7, wants=wants) == order


def test_a_subject_that_arrives_has_its_turn_before_the_next_round(
    store: SlotStore,
) -> None:
    held = []
    for count in range(1, 5):
        reply = store.ask("a", slots=count, held=held, wants=[Want("x", 0, 200)])
        held += leases_of(reply.granted)
    store.ask("b", slots=4, wants=[Want("y", 0, 5)])
    reply = store.ask("a", held=held[2:], back=held[:2], wants=[Want("x", 0, 200)])
    assert [grant.subject for grant in reply.granted] == ["x"]
    assert reply.waiting == 4


def test_subjects_that_alternate_do_not_keep_out_a_third(store: SlotStore) -> None:
    held: list[str] = []
    served = []
    for turn in range(6):
        wants = [Want("third", 0, 9), Want(["x", "y"][turn % 2], 0, 1)]
        reply = store.ask("a", slots=1, back=held, wants=wants)
        held = leases_of(reply.granted)
        served += [grant.subject for grant in reply.granted]


def test_new_subjects_cannot_keep_a_round_open(store: SlotStore) -> None:
    store.ask("a", slots=0, wants=[Want("old", 0, 9)])
    served, held = [], list[str]()
    for n in range(600):
        wants = [Want("old", 0, 9), Want(f"new{n}", 0, 1), Want(f"also{n}", 0, 1)]
        reply = store.ask("a", slots=1, back=held, wants=wants)
        held = leases_of(reply.granted)
        served += [grant.subject for grant in reply.granted]
    assert 2 <= served.count("old") <= 4


def test_the_hubs_of_one_subject_take_turns(store: SlotStore) -> None:
    store.listen("a", "b")
    store.ask("b", slots=0, wants=[Want("s", 0, 9)])
    store.ask("a", slots=0, wants=[Want("s", 0, 9)])
    reply = store.ask("a", slots=4, wants=[Want("s", 0, 9)])
    assert len(reply.granted) == 2
    assert reply.waiting == 7
    assert [worker for worker, _ in store.heard()["b"]] == ["w", "w"]


def test_a_released_slot_goes_to_the_hub_whose_turn_it_is(store: SlotStore) -> None:
    store.listen("b")
    held = leases_of(store.ask("a", wants=[Want("s", 0, 4)]).granted)
    assert store.ask("b", wants=[Want("t", 0, 1)]).granted == []
    reply = store.ask("a", held=held[1:], back=held[:1], wants=[Want("s", 0, 2)])
    assert reply.granted == []
    assert (reply.waiting, reply.free) == (0, 0)
    [(worker, grant)] = store.heard()["b"]
    assert (worker, grant.subject) == ("w", "t")
    assert grant.lease.startswith("b:")
    assert store.ask("b", held=[grant.lease]).granted == []


def test_requests_of_a_hub_that_is_gone_do_not_wait(store: SlotStore) -> None:
    held = leases_of(store.ask("a", wants=[Want("s", 0, 4)]).granted)
    store.ask("b", wants=[Want("t", 0, 3)])
    store.now += PATIENCE
    assert store.ask("a", held=held).waiting == 3
    store.now += 0.001
    assert store.ask("a", held=held).waiting == 0


def test_slots_of_a_dead_hub_are_free_within_a_lifetime(store: SlotStore) -> None:
    """Also those that it was granted after its death, by the call of another hub."""
    held = leases_of(store.ask("a", wants=[Want("s", 0, 4)]).granted)
    store.ask("b", wants=[Want("t", 0, 3)])
    store.now += PATIENCE
    store.ask("a", back=held)
    assert store.ask("a").free == 1
    store.now += LIFETIME - PATIENCE
    assert store.ask("a").free == 4


def test_the_same_request_is_granted_one_slot(store: SlotStore) -> None:
    wants = [Want("s", 0, 2, "model"), Want("s", 0, 1, "another")]
    asks = [SlotAsk(f"w{n}", 1, 1, wants=wants) for n in range(5)]
    replies = store.sync("a", *asks)
    assert sum(len(reply.granted) for reply in replies) == 3
    assert [reply.waiting for reply in store.sync("b", *asks)] == [0] * 5


def test_a_request_that_was_granted_a_slot_does_not_wait_elsewhere(
    store: SlotStore,
) -> None:
    store.sync("b", SlotAsk("full", 0, 0), SlotAsk("free", 1, 1))
    wants = [Want("s", 0, 1)]
    store.sync(
        "b", SlotAsk("full", 0, 0, wants=wants), SlotAsk("free", 1, 1, wants=wants)
    )
    assert store.sync("a", SlotAsk("full", 0, 0))[0].waiting == 0


# --- Messages ---------------------------------------------------------------------


def test_a_grant_is_repeated_until_its_hub_names_it(store: SlotStore) -> None:
    wants = [Want("s", 0, 2)]
    first = store.ask("a", slots=2, wants=wants)
    again = store.ask("a", slots=2, wants=wants)
    assert sorted(again.granted) == sorted(first.granted)
    assert again.free == 0
    held, back = leases_of(first.granted)
    assert store.ask("a", slots=2, held=[held], back=[back]).granted == []
    assert store.ask("a", slots=2, held=[held]).granted == []


def test_a_grant_that_is_given_back_unused_costs_no_turn(store: SlotStore) -> None:
    wants = [Want("x", 0, 9), Want("y", 0, 9)]
    for used in (False, True):
        store.client.delete("test:slots:leases:w", "test:slots:line:w")
        [grant] = store.ask("a", slots=1, wants=wants).granted
        assert grant.subject == "x"
        back = {"back" if used else "unused": [grant.lease]}
        [grant] = store.ask("a", slots=1, wants=wants, **back).granted
        assert grant.subject == ("y" if used else "x")


def test_hubs_are_notified_that_requests_wait_once_a_second(store: SlotStore) -> None:
    store.listen()
    held = leases_of(store.ask("a", wants=[Want("s", 0, 4)]).granted)
    store.ask("a", held=held, wants=[Want("s", 0, 4)])
    assert store.heard() == {}  # no other hub could give back a lease
    store.ask("a", held=held)
    store.ask("b", wants=[Want("t", 0, 1)])
    assert store.heard() == {"wanted": ["w"]}
    store.now += 0.999
    store.ask("b", wants=[Want("t", 0, 1)])
    assert store.heard() == {}
    store.now += 0.001
    store.ask("b", wants=[Want("t", 0, 1)])
    assert store.heard() == {"wanted": ["w"]}
    store.ask("b")
    store.ask("b", wants=[Want("t", 0, 1)])
    assert store.heard() == {"wanted": ["w"]}


def test_a_hub_that_was_alone_in_the_line_is_notified_at_once(
    store: SlotStore,
) -> None:
    held = leases_of(store.ask("a", wants=[Want("s", 0, 2)]).granted)
    other = leases_of(store.ask("b", wants=[Want("t", 0, 3)]).granted)
    store.listen()
    store.ask("a", held=held, wants=[Want("s", 0, 1)])
    store.ask("b", held=other)
    assert store.ask("a", held=held, wants=[Want("s", 0, 1)]).waiting == 0
    store.heard()
    store.ask("b", held=other, wants=[Want("t", 0, 1)])
    assert store.heard() == {"wanted": ["w"]}
    store.ask("b", held=other, wants=[Want("t", 0, 2)])
    assert store.heard() == {}


def test_no_spare_lease_while_a_request_waits(store: SlotStore) -> None:
    store.ask("b", slots=0, wants=[Want("t", 0, 1)])
    reply = store.ask("a", slots=1, fair=1, spare=1)
    assert reply.granted == []
    assert (reply.waiting, reply.free) == (0, 0)


# --- Outages ----------------------------------------------------------------------


@pytest.mark.parametrize("empty", [True, False])
def test_after_an_outage_hubs_get_their_fair_part(
    store: SlotStore, empty: bool
) -> None:
    """The others may hold leases that are not registered any more."""
    held = leases_of(store.ask("b", wants=[Want("t", 0, 3)]).granted)
    if empty:
        store.client.flushall()
    else:
        store.now += LIFETIME + 0.001
    reply = store.ask("a", wants=[Want("s", 0, 9)])
    assert len(reply.granted) == 2
    assert reply.free == 0  # for this hub
    mine = leases_of(reply.granted)
    reply = store.ask("b", held=held)
    assert (reply.waiting, reply.free) == (7, 0)
    store.now += CAUTION - 0.001
    assert store.ask("b", held=held[1:], back=held[:1]).free == 0
    assert store.ask("b", held=held[2:], back=held[1:2]).free == 1
    assert store.ask("a", held=mine, wants=[Want("s", 0, 7)]).granted == []
    store.now += 0.001
    assert len(store.ask("a", held=mine, wants=[Want("s", 0, 7)]).granted) == 1


def test_a_store_that_lost_its_data_waits_for_all_hubs(store: SlotStore) -> None:
    """One of them may hold more than its part."""
    held = leases_of(store.ask("b", wants=[Want("t", 0, 3)]).granted)
    store.client.flushall()
    store.client.set("test:epoch", "new")
    now = {"epoch": "new", "hubs": 2}
    whole = {**now, "whole": True}
    wants = [Want("s", 0, 4)]
    # Hubs have to notice the loss, and to name all that they hold.
    assert store.ask("b", held=held, options={"epoch": "old", "whole": True}).free == 0
    assert store.ask("b", held=held[:1], holds=3, options=now).free == 0
    assert store.ask("a", wants=wants, options=whole).granted == []
    assert store.ask("b", held=held, options=whole).waiting == 4
    assert len(store.ask("a", wants=wants, options=now).granted) == 1


def test_a_hub_that_does_not_come_back_is_awaited_for_some_seconds(
    store: SlotStore,
) -> None:
    store.client.flushall()
    options = {"hubs": 2, "whole": True}
    wants = [Want("s", 0, 4)]
    assert store.ask("a", wants=wants, options=options).granted == []
    store.now += CAUTION
    assert len(store.ask("a", wants=wants, options=options).granted) == 4


def test_a_hub_that_holds_nothing_registers_that(store: SlotStore) -> None:
    store.client.flushall()
    assert store.sync("b", hubs=2, whole=True) == []
    reply = store.ask("a", wants=[Want("s", 0, 4)], options={"hubs": 2, "whole": True})
    assert len(reply.granted) == 2


def test_leases_of_another_life_of_the_store_are_not_granted_again(
    store: SlotStore,
) -> None:
    before = {*leases_of(store.ask("a", fair=4, spare=4).granted)}
    store.client.flushall()
    store.now += 0.001
    assert before.isdisjoint(leases_of(store.ask("a", fair=4, spare=4).granted))


def test_a_store_whose_clock_goes_back_keeps_no_lease_for_longer(
    store: SlotStore,
) -> None:
    store.ask("b", wants=[Want("t", 0, 4)])
    store.now -= 3600
    assert store.ask("a", fair=4).free == 4
    store.now += CAUTION
    assert len(store.ask("a", wants=[Want("s", 0, 4)]).granted) == 4


@pytest.mark.parametrize(
    "line", [b"\xc1garbage", b"", msgspec.msgpack.encode({"format": 2, "sent": 1})]
)
def test_a_line_of_another_version_is_replaced(store: SlotStore, line: bytes) -> None:
    store.client.set("test:slots:line:w", line)
    assert len(store.ask("a", wants=[Want("s", 0, 2)]).granted) == 2


# --- Bounds -----------------------------------------------------------------------


def test_all_that_is_kept_is_bounded_and_expires(store: SlotStore) -> None:
    wants = [Want(f"s{n}", 0, 1) for n in range(MOST_WANTS + 10)]
    store.ask("a", slots=2, spare=1, wants=wants)
    assert store.ask("b", slots=2).waiting == MOST_WANTS - 2
    store.sync("b", SlotAsk("another", 1, 1, held=["b:m1"]))
    keys = store.client.keys()
    assert len(keys) == 5
    assert all(0 < store.client.pttl(key) <= 600_000 for key in keys)


def test_a_line_is_removed_with_its_last_request(store: SlotStore) -> None:
    held = leases_of(store.ask("a", wants=[Want("s", 0, 2)]).granted)
    assert store.client.exists("test:slots:line:w")
    store.ask("a", back=held)
    assert not store.client.exists("test:slots:line:w")


def test_large_calls_are_split(store: SlotStore) -> None:
    asks = [
        SlotAsk(f"w{n}", 900, 900, held=[f"a:m{n}-{k}" for k in range(800)])
        for n in range(12)
    ]
    before = store.client.info("commandstats")["cmdstat_eval"]["calls"]
    replies = store.sync("a", *asks)
    after = store.client.info("commandstats")["cmdstat_eval"]["calls"]
    assert [reply.worker for reply in replies] == [ask.worker for ask in asks]
    assert {reply.free for reply in replies} == {100}
    assert after - before == 3
    assert store.sync("a") == []


def test_the_script_is_sent_without_comments() -> None:
    assert "--" not in slots.SCRIPT
    assert "\n\n" not in slots.SCRIPT
