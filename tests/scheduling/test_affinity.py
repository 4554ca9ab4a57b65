"""Turns go back to the warm worker, as long as that is worth it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.affinity import PRICE, RECENT, Affinity
from gollama_proxy.scheduling.policies import (
    Ask,
    Fastest,
    Fits,
    LeastBusy,
    Policy,
    RoundRobin,
    Weighted,
)
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.clock import Clock
from tests.fakes.pool import MODEL, has_room, occupy, pool, teach

INNERS: list[Callable[[], Policy]] = [
    RoundRobin,
    Weighted,
    lambda: LeastBusy(random.Random(1)),
    lambda: Fastest(random.Random(1)),
]


class Fixed(Policy):
    """Stands in for the other policy: picks one worker, whatever fits."""

    def __init__(self, chosen: Worker | None) -> None:
        self.chosen = chosen
        self.asked = 0

    def pick(self, ask: Ask, workers: object, fits: Fits) -> Worker | None:
        self.asked += 1
        return self.chosen


def ask(
    *prefixes: int, size: int = 8000, subject: str = "alice", patience: float = 0.0
) -> Ask:
    return Ask(MODEL, size, 0, subject, prefixes, patience)


def patient(*prefixes: int) -> Ask:
    return ask(*prefixes, patience=60)


def equals(count: int, *, slots: int = 4) -> tuple[Worker, ...]:
    """Make workers that read 1000 bytes/s and write 100 tokens in 2 s."""
    workers = pool(*[slots] * count)
    for each in workers:
        teach(each, 1000, 50)
    return workers


def warm(made: Affinity, where: Worker, *prefixes: int, size: int = 8000) -> None:
    """Have a conversation begin on this worker."""
    made.inner = Fixed(where)
    assert made.pick(ask(*prefixes, size=size), (where,), has_room) is where


def setting(
    count: int = 2, *, slots: int = 4
) -> tuple[Affinity, Fixed, tuple[Worker, ...], Clock]:
    """Make a conversation (1) on the first worker; others would go to the second."""
    clock, workers = Clock(), equals(count, slots=slots)
    made = Affinity(Fixed(None), clock)
    warm(made, workers[0], 1)
    made.inner = inner = Fixed(workers[1])
    return made, inner, workers, clock


# --- Going back -------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("count", [3, 20])
def test_all_turns_of_a_conversation_go_to_one_worker(
    inner: Callable[[], Policy], count: int
) -> None:
    made, workers = Affinity(inner(), Clock()), equals(count)
    where: dict[int, Worker] = {}
    for turn in range(1, 6):
        for conversation in range(40):
            turns = [conversation * 100 + number for number in range(turn)]
            chosen = made.pick(ask(*turns), workers, has_room)
            assert chosen is not None
            assert where.setdefault(conversation, chosen) is chosen
    if count == 3 and not isinstance(made.inner, Fastest):
        assert set(Counter(where.values()).values()) == {13, 14}


def test_new_conversations_go_where_the_other_policy_sends_them() -> None:
    made, inner, workers, _ = setting()
    assert made.pick(ask(5), workers, has_room) is workers[1]
    assert made.pick(ask(), workers, has_room) is workers[1]
    assert made.pick(ask(1, 2, subject="bob"), workers, has_room) is workers[1]
    assert inner.asked == 3


def test_a_common_system_prompt_does_not_pull_all_requests_to_one_worker() -> None:
    """Neither alone, for it is no prefix, nor with a greeting, after a few of them."""
    made, workers = Affinity(RoundRobin(), Clock()), equals(4)
    picked = [
        made.pick(ask(7, 100 + number), workers, has_room) for number in range(100)
    ]
    had = Counter(each.index for each in picked if each)
    assert max(had.values()) - min(had.values()) <= 6


def test_most_turns_go_back_without_the_other_policy() -> None:
    made, inner, workers, clock = setting()
    assert made.pick(ask(1, 2), workers, has_room) is workers[0]
    assert inner.asked == 0
    clock.advance(RECENT)  # its last choice is no measure any more
    assert made.pick(ask(1, 2, 3), workers, has_room) is workers[0]
    assert inner.asked == 1


def test_where_no_speed_is_known_the_warm_worker_must_not_be_busier() -> None:
    workers = pool(4, 4)
    made = Affinity(Fixed(None), Clock())
    warm(made, workers[0], 1)
    made.inner = Fixed(workers[1])
    occupy(workers[0])
    occupy(workers[1])
    assert made.pick(ask(1, 2), workers, has_room) is workers[0]
    occupy(workers[0])
    assert made.pick(ask(1, 2), workers, has_room) is workers[1]


# --- Leaving ----------------------------------------------------------------------


def test_a_busy_worker_is_left_when_that_costs_more_than_the_reading() -> None:
    """It would take PRICE * 8 s to read the prompt anew, and 2 s to answer."""
    made, _, workers, clock = setting()
    clock.advance(RECENT)
    occupy(workers[0], unread=int(PRICE * 8000) - 1000)
    assert made.pick(ask(1, 2), workers, has_room) is workers[0]
    occupy(workers[0], unread=2000)
    assert made.pick(ask(1, 2), workers, has_room) is workers[1]


def test_a_worker_that_is_much_slower_is_left() -> None:
    clock, workers = Clock(), pool(4, 4)
    teach(workers[0], 1000, 1)
    teach(workers[1], 10_000, 100)
    made = Affinity(Fixed(None), clock)
    warm(made, workers[0], 1)
    made.inner = Fixed(workers[1])
    assert made.pick(ask(1, 2), workers, has_room) is workers[0]  # as it seems
    clock.advance(RECENT)
    assert made.pick(ask(1, 2, 3), workers, has_room) is workers[1]
    assert made.pick(ask(1, 2, 3, 4), workers, has_room) is workers[1]


def test_what_was_worse_than_usual_is_compared_with_the_choice_of_now() -> None:
    """Usual is the average of the other policy's recent choices."""
    made, inner, workers, _ = setting(3)
    occupy(workers[0], unread=100_000)
    made.pick(ask(5), workers, has_room)
    inner.chosen = workers[2]
    occupy(workers[2], unread=200_000)
    assert made.pick(ask(1, 2), workers, has_room) is workers[0]
    assert inner.asked == 2
    inner.chosen = workers[1]
    for number in range(10, 30):
        made.pick(ask(number), workers, has_room)
    assert made.pick(ask(1, 2, 3), workers, has_room) is workers[1]


@pytest.mark.parametrize("patience", [0, 60])
def test_a_worker_that_cannot_have_it_is_left(patience: float) -> None:
    made, _, workers, _ = setting()
    workers[0].health = workers[0].health.__class__(fall=1)
    workers[0].observe(Check.FAILED, "gone")
    fits = [workers[1]].__contains__
    assert made.pick(ask(1, 2, patience=patience), workers, fits) is workers[1]
    again = ask(1, 2, 3, patience=patience)
    assert made.pick(again, workers, lambda w: True) is workers[1]


def test_a_worker_that_was_tried_already_is_left_though_it_has_room() -> None:
    made, _, workers, _ = setting()
    assert made.pick(patient(1, 2), workers, [workers[1]].__contains__) is workers[1]


def test_a_worker_that_is_no_longer_in_the_pool_is_left() -> None:
    made, _, workers, _ = setting()
    assert made.pick(patient(1, 2), workers[1:], lambda w: True) is workers[1]
    occupy(workers[0], 4)
    warm(made, workers[0], 9)
    workers[0].observe(Check.OK, "ok", Description((Model("another"),), slots=4))
    made.inner = Fixed(workers[1])
    assert made.pick(patient(9, 10), workers[1:], has_room) is workers[1]


def test_a_cold_cache_is_found_out() -> None:
    """As after a restart: the worker is hardly preferred to others any more."""
    made, _, workers, clock = setting()
    for number in range(100, 120, 2):
        warm(made, workers[0], number)
        made.pick(ask(number, number + 1), workers, has_room)
        made.learn(ask(number, number + 1), workers[0], 0, 2000)
    made.inner = Fixed(workers[1])
    occupy(workers[0], unread=16_000)
    clock.advance(RECENT)
    assert made.pick(ask(1, 2), workers, has_room) is workers[1]


def test_none_fits() -> None:
    made, inner, workers, _ = setting()
    inner.chosen = None
    assert made.pick(ask(1, 2), workers, lambda w: False) is None
    assert made.pick(ask(5), (), lambda w: False) is None
    assert made.pick(ask(1, 2), (), lambda w: False) is None


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 19)),
        max_size=60,
    ),
    st.sampled_from(INNERS),
    st.sampled_from([0.0, 60.0]),
    st.sampled_from([3, 20]),
)
@settings(deadline=None)
def test_a_worker_that_does_not_fit_is_never_picked(
    requests: list[tuple[int, int, int]],
    inner: Callable[[], Policy],
    patience: float,
    count: int,
) -> None:
    made = Affinity(inner(), Clock(), 16)
    workers = equals(count, slots=2)
    for conversation, turn, out in requests:
        turns = [conversation * 100 + number for number in range(turn)]
        fits = lambda w, o=out: w.free > 0 and w.index != o  # noqa: E731
        chosen = made.pick(ask(*turns, patience=patience), workers, fits)
        if chosen is None:
            assert patience or not any(map(fits, workers))
            continue
        assert fits(chosen)
        occupy(chosen)
        made.learn(ask(*turns), chosen, 500, 1000)


# --- Waiting ----------------------------------------------------------------------


def test_without_patience_a_full_worker_is_left() -> None:
    made, _, workers, _ = setting()
    occupy(workers[0], 4)
    assert made.pick(ask(1, 2), workers, has_room) is workers[1]


def test_with_patience_it_is_waited_for_as_long_as_that_is_worth_it() -> None:
    """Four answers of 4 s each: a slot is free in a second, or soon thereafter."""
    made, _, workers, clock = setting()
    teach(workers[0], None, 25, beside=4)
    occupy(workers[0], 4)
    worth = PRICE * 8 - 4 / 4
    assert made.pick(patient(1, 2), workers, has_room) is None
    clock.advance(worth - 0.1)
    assert made.pick(patient(1, 2), workers, has_room) is None
    clock.advance(0.2)
    assert made.pick(patient(1, 2), workers, has_room) is workers[1]
    assert made.pick(patient(1, 2, 3), workers, has_room) is workers[1]


def test_when_its_worker_is_free_it_goes_there_and_the_wait_is_forgotten() -> None:
    made, _, workers, clock = setting()
    teach(workers[0], None, 25, beside=4)
    leases = occupy(workers[0], 4)
    assert made.pick(patient(1, 2), workers, has_room) is None
    workers[0].leases.remove(leases[0])
    clock.advance(20)
    made.inner = Fixed(workers[0])
    assert made.pick(patient(1, 2), (workers[0],), has_room) is workers[0]
    occupy(workers[0])
    made.inner = Fixed(workers[1])
    clock.advance(20)
    assert made.pick(patient(1, 2, 3), workers, has_room) is None


def test_it_leaves_a_slot_that_is_offered_to_the_next_in_the_line() -> None:
    made, _, workers, _ = setting()
    teach(workers[0], None, 25, beside=4)
    occupy(workers[0], 4)
    assert made.pick(patient(1, 2), workers[1:], has_room) is None
    assert made.pick(patient(5), workers[1:], has_room) is workers[1]


def test_no_request_waits_for_longer_than_its_patience() -> None:
    made, _, workers, _ = setting()
    teach(workers[0], None, 25, beside=4)
    occupy(workers[0], 4)
    assert made.pick(ask(1, 2, patience=1.1), workers, has_room) is None
    assert made.pick(ask(1, 2, patience=0.9), workers, has_room) is workers[1]


@pytest.mark.parametrize("reads", [True, False])
def test_without_a_known_speed_no_request_waits(reads: bool) -> None:
    workers = pool(4, 4)
    made = Affinity(Fixed(None), Clock())
    warm(made, workers[0], 1)
    occupy(workers[0], 4)
    made.inner = Fixed(workers[1])
    if reads:
        teach(workers[1], 1000, None)
    else:
        teach(workers[0], None, 50)
    assert made.pick(patient(1, 2), workers, has_room) is workers[1]


def test_its_repr_shows_what_it_knows() -> None:
    made, _, _, _ = setting()
    made.inner = RoundRobin()
    inner = "<RoundRobin last=<BoundedDict 0 of 1000>>"
    assert repr(made) == f"<Affinity <Memory of 1 prefixes> {inner}>"
    assert repr(made._usual["qwen"]) == "<0.001 s a byte, 0.02 s a token>"


@pytest.mark.parametrize("inner", INNERS)
def test_a_worker_that_is_back_gets_its_share_of_new_conversations(
    inner: Callable[[], Policy],
) -> None:
    """The others hold many conversations by then, and keep those alone."""
    clock = Clock()
    policy, workers = Affinity(inner(), clock), equals(3)
    away = workers[2]
    got: Counter[Worker] = Counter()
    for number in range(600):
        clock.advance(0.1)
        back = number >= 300
        chosen = policy.pick(
            ask(number), workers, lambda worker, back=back: back or worker is not away
        )
        assert chosen is not None
        if back:
            got[chosen] += 1
    assert got[away] >= 90
