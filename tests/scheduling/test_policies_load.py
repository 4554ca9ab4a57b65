"""The emptiest worker, or the one that is expected to have answered first."""

from __future__ import annotations

import random
from collections import Counter
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import (
    FORGOTTEN,
    NEAR,
    Ask,
    Fastest,
    LeastBusy,
    expected_seconds,
    expected_tokens,
)
from tests.fakes.pool import MODEL, has_room, occupy, pool, teach, weighted, worker

# --- The emptiest ---------------------------------------------------------------------


ASK = Ask(MODEL)


def policy(seed: int = 1) -> LeastBusy:
    return LeastBusy(random.Random(seed))


def fill(made: LeastBusy, workers: tuple[Worker, ...], count: int) -> list[int]:
    """Let so many requests arrive and stay; return the places of their workers."""
    picked = []
    for _ in range(count):
        chosen = made.pick(ASK, workers, has_room)
        assert chosen is not None
        occupy(chosen)
        picked.append(chosen.index)
    return picked


def test_the_part_of_the_slots_counts_and_not_their_number() -> None:
    workers = pool(2, 8)
    occupy(workers[0], 1)
    occupy(workers[1], 3)
    assert policy().pick(ASK, workers, has_room) is workers[1]


def test_of_two_that_are_half_full_the_smaller_one_does_less() -> None:
    workers = pool(8, 2)
    occupy(workers[0], 4)
    occupy(workers[1], 1)
    assert policy().pick(ASK, workers, has_room) is workers[1]


def test_equals_have_their_turns() -> None:
    made, workers = policy(), pool(4, 4, 4)
    picked = [made.pick(ASK, workers, has_room) for _ in range(7)]
    assert [w.index for w in picked if w] == [0, 1, 2, 0, 1, 2, 0]


def test_a_pool_fills_evenly() -> None:
    workers = pool(1, 2, 4, 8)
    made = policy()
    fill(made, workers, 15)
    assert [w.free for w in workers] == [0, 0, 0, 0]
    assert made.pick(ASK, workers, has_room) is None


def test_a_worker_with_unknown_slots_counts_as_a_usual_one() -> None:
    workers = pool(None, 4)
    assert fill(policy(), workers, 8) == [0, 1] * 4
    assert fill(policy(), workers, 2) == [0, 0]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=30),
    st.integers(),
)
@settings(deadline=None)
def test_a_worker_that_does_not_fit_is_never_picked(
    machines: list[tuple[int, int]], seed: int
) -> None:
    workers = pool(*[slots for slots, _ in machines])
    for each, (slots, taken) in zip(workers, machines, strict=True):
        occupy(each, min(slots, taken))
    chosen = policy(seed).pick(ASK, workers, has_room)
    assert (chosen is not None) == any(map(has_room, workers))
    assert chosen is None or has_room(chosen)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=8))
def test_of_a_small_pool_it_is_the_emptiest(taken: list[int]) -> None:
    workers = pool(*[8] * len(taken))
    for each, count in zip(workers, taken, strict=True):
        occupy(each, count)
    chosen = policy().pick(ASK, workers, has_room)
    if chosen is None:
        assert min(taken) == 8
    else:
        assert chosen.in_flight == min(taken)


def test_of_a_large_one_the_better_of_two_is_nearly_as_good() -> None:
    """Machines of unequal size are equally full; by lot alone they are not."""
    workers = pool(*[4, 8, 16] * 100)
    fill(policy(), workers, 1400)  # half of the slots
    full = [w.in_flight / (w.slots or 1) for w in workers]
    for kind in range(3):
        assert fmean(full[kind::3]) == pytest.approx(0.5, abs=0.07)
        assert pstdev(w.in_flight for w in workers[kind::3]) < 1.5
    alone = random.Random(1).choices(range(300), weights=[4, 8, 16] * 100, k=1400)
    by_lot = [Counter(alone)[i] / (w.slots or 1) for i, w in enumerate(workers)]
    assert max(by_lot) > 1.2 > max(full)


def test_its_repr_shows_how_many_models_it_knows() -> None:
    made, workers = policy(), pool(4, 4)
    made.pick(ASK, workers, has_room)
    assert repr(made) == "<LeastBusy <Shortlist last=<BoundedDict 1 of 1000>>>"


# --- The fastest ----------------------------------------------------------------------


SHORT = Ask(MODEL, prompt_bytes=100)
LONG = Ask(MODEL, prompt_bytes=100_000, max_tokens=20)


def fastest(seed: int = 1) -> Fastest:
    return Fastest(random.Random(seed))


def pick(made: Fastest, workers: tuple[Worker, ...], ask: Ask = SHORT) -> Worker | None:
    return made.pick(ask, workers, has_room)


def known(*speeds: tuple[float, float], slots: int = 4) -> tuple[Worker, ...]:
    """Make workers that read and write as fast as this."""
    workers = pool(*[slots] * len(speeds))
    for each, (reads, writes) in zip(workers, speeds, strict=True):
        teach(each, reads, writes)
    return workers


# --- What is expected -------------------------------------------------------------


def test_of_an_unknown_worker_nothing_is_expected() -> None:
    assert expected_seconds(worker(), SHORT, 100) is None
    assert expected_tokens(worker(), SHORT) == 256


def test_the_prompt_is_read_and_the_answer_written() -> None:
    (each,) = known((1000, 50))
    assert expected_seconds(each, Ask(MODEL, 2000), 100) == 2 + 2
    assert expected_seconds(each, Ask(MODEL, 2000), 100, cached=1500) == 0.5 + 2


def test_what_is_known_in_part_counts_for_the_part() -> None:
    reader, writer = pool(4, 4)
    teach(reader, 1000, None)
    teach(writer, None, 50)
    assert expected_seconds(reader, Ask(MODEL, 2000), 100) == 2
    assert expected_seconds(writer, Ask(MODEL, 2000), 100) == 2


def test_prompts_that_came_before_are_read_before() -> None:
    (each,) = known((1000, 1e9))
    occupy(each, unread=3000)
    assert expected_seconds(each, Ask(MODEL, 2000), 1) == pytest.approx(5)


def test_other_answers_make_it_slower() -> None:
    (each,) = known((1e9, 100))
    teach(each, None, 25, beside=4)
    alone = expected_seconds(each, SHORT, 100)
    occupy(each, 3)
    busy = expected_seconds(each, SHORT, 100)
    assert (alone, busy) == (pytest.approx(1), pytest.approx(4))


def test_without_a_slot_it_has_to_wait() -> None:
    (each,) = known((1e9, 100), slots=1)
    occupy(each, 1)
    one = expected_seconds(each, SHORT, 100)
    occupy(each, 1)
    two = expected_seconds(each, SHORT, 100)
    assert one is not None
    assert two is not None
    assert one > 2
    assert two > one


def test_an_answer_is_as_long_as_usual_but_no_longer_than_it_may_be() -> None:
    (each,) = known((1000, 50))
    assert expected_tokens(each, SHORT) == 100
    assert expected_tokens(each, Ask(MODEL, max_tokens=4096)) == 100
    assert expected_tokens(each, Ask(MODEL, max_tokens=20)) == 20


# --- Picks ------------------------------------------------------------------------


def test_a_long_prompt_goes_to_the_fast_reader_and_a_short_one_to_the_writer() -> None:
    made, workers = fastest(), known((10_000, 20), (1000, 60))
    for _ in range(20):
        assert pick(made, workers, LONG) is workers[0]
        assert pick(made, workers, SHORT) is workers[1]


def test_a_machine_that_is_busy_enough_loses_to_a_slower_one() -> None:
    workers = known((1e6, 100), (1e6, 60))
    teach(workers[0], None, 30, beside=4)
    assert pick(fastest(), workers) is workers[0]
    occupy(workers[0], 3)
    assert pick(fastest(), workers) is workers[1]


def test_a_worker_that_reads_a_long_prompt_is_avoided() -> None:
    workers = known((1000, 100), (1000, 80))
    occupy(workers[0], unread=50_000)
    assert pick(fastest(), workers) is workers[1]


def test_equally_fast_workers_have_their_turns() -> None:
    made, workers = fastest(), known(*[(1000, 50)] * 3)
    picked = [pick(made, workers) for _ in range(6)]
    assert [w.index for w in picked if w] == [0, 1, 2, 0, 1, 2]


def test_none_fits() -> None:
    workers = known((1000, 50), slots=1)
    occupy(workers[0])
    assert pick(fastest(), workers) is None
    assert pick(fastest(), ()) is None


@given(
    st.lists(
        st.tuples(st.floats(1, 1e6), st.floats(1, 1e3), st.integers(0, 4)),
        min_size=1,
        max_size=30,
    )
)
@settings(deadline=None)
def test_one_that_does_not_fit_is_never_the_fastest(
    machines: list[tuple[float, float, int]],
) -> None:
    workers = known(*[(reads, writes) for reads, writes, _ in machines])
    for each, (_, _, taken) in zip(workers, machines, strict=True):
        occupy(each, taken)
    chosen = pick(fastest(), workers)
    assert (chosen is not None) == any(map(has_room, workers))
    assert chosen is None or has_room(chosen)


@given(
    st.lists(
        st.tuples(st.floats(1, 1e6), st.floats(1, 1e3), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 1 << 20),
    st.integers(0, 4096),
)
@settings(deadline=None)
def test_of_a_small_pool_it_is_one_of_the_fastest(
    machines: list[tuple[float, float, int]], size: int, max_tokens: int
) -> None:
    workers = known(*[(reads, writes) for reads, writes, _ in machines])
    for each, (_, _, taken) in zip(workers, machines, strict=True):
        occupy(each, taken)
    ask = Ask(MODEL, size, max_tokens)
    chosen = pick(fastest(), workers, ask)
    assert chosen is not None
    tokens = expected_tokens(chosen, ask)
    expected = [expected_seconds(each, ask, tokens) or 0.0 for each in workers]
    assert (expected_seconds(chosen, ask, tokens) or 0.0) <= NEAR * min(expected)


def test_of_those_that_are_nearly_as_fast_each_has_its_turn() -> None:
    workers = known((1000, 50), (1050, 50), (1000, 49), (500, 50))
    made = fastest()
    picked = [pick(made, workers, LONG) for _ in range(6)]
    assert [each.index for each in picked if each is not None] == [0, 1, 2] * 2


def test_in_a_large_pool_the_fast_ones_get_most_of_it_and_not_all_at_once() -> None:
    workers = known(*[(10_000, 100), (1000, 10)] * 100)
    made, picked = fastest(), Counter[int]()
    for _ in range(400):
        chosen = pick(made, workers)
        assert chosen is not None
        occupy(chosen)
        picked[chosen.index] += 1
    fast = sum(count for index, count in picked.items() if index % 2 == 0)
    assert fast > 360
    assert max(picked.values()) == 4
    assert fmean(picked[index] for index in range(0, 200, 2)) == fast / 100


# --- Unknown workers --------------------------------------------------------------


def test_an_unknown_worker_comes_first_once() -> None:
    workers = (*known((1e6, 1000)), worker(1), worker(2))
    made = fastest()
    first = pick(made, workers)
    assert first is workers[1]
    occupy(first)
    second = pick(made, workers)
    assert second is workers[2]
    occupy(second)
    assert pick(made, workers) is workers[0]
    teach(workers[1], 1e7, 1e4)
    assert pick(made, workers) is workers[1]


def test_where_nothing_is_known_the_declared_weight_decides() -> None:
    workers = weighted(1, 3, 2)
    made, picked = fastest(), []
    for _ in range(9):
        chosen = pick(made, workers)
        assert chosen is not None
        occupy(chosen)
        picked.append(chosen.index)
    assert picked[:3] == [1, 2, 0]
    assert Counter(picked)[1] == 4
    assert Counter(picked)[2] == 3


def test_a_known_worker_needs_no_weight() -> None:
    workers = weighted(100, 1)
    teach(workers[0], 1000, 10)
    teach(workers[1], 1000, 20)
    assert pick(fastest(), workers) is workers[1]


def test_a_worker_that_was_slow_long_ago_is_asked_once_more() -> None:
    made, workers = fastest(), known((1e6, 100), (1e6, 100), (1e6, 10))
    picked: list[int] = []
    for _ in range(2000):
        chosen = pick(made, workers)
        assert chosen is not None
        picked.append(chosen.index)
    asked = [number for number, index in enumerate(picked) if index == 2]
    assert 2 <= len(asked) <= 4
    assert asked[0] > FORGOTTEN * len(workers) * 3
    for _ in range(30):
        teach(workers[2], 1e6, 1000)
    assert pick(made, workers) is workers[2]


def test_a_busy_worker_is_not_asked_out_of_curiosity() -> None:
    made, workers = fastest(), known((1e6, 100), (1e6, 10))
    occupy(workers[1])
    assert all(pick(made, workers) is workers[0] for _ in range(2000))


def test_a_large_pool_gets_to_know_all_of_its_workers() -> None:
    workers, made = pool(*[4] * 50), fastest()
    for _ in range(500):
        chosen = pick(made, workers)
        assert chosen is not None
        teach(chosen, 1000, 10 + chosen.index)
    assert all(w.pace_of(MODEL).speed.reads for w in workers)


def test_the_repr_of_the_fastest_shows_how_many_models_it_knows() -> None:
    made, workers = fastest(), known((1, 1), (1, 1))
    pick(made, workers)
    assert repr(made) == "<Fastest <Shortlist last=<BoundedDict 1 of 1000>>>"
    assert repr(made._picks["qwen"]) == "<1 picks>"
