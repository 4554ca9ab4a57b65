"""The order and the times of a scripted llama-server's work."""

from __future__ import annotations

import math

import pytest

from benchmarks.calibrate import BESIDE, Measured
from benchmarks.engine import BATCH, Engine, Pace, Work

PACE = Pace(batch=1.0, written=0.1, read=0.01)


def engine(slots: int = 2, token: float = 1.0) -> Engine:
    return Engine(PACE, slots, kept=9, token=token)


def run(engine: Engine, turns: int = 100) -> list[tuple[float, list[Work]]]:
    """Run the loop until it is idle; return the end and the tokens of each turn."""
    now, ended = 0.0, []
    for _ in range(turns):
        seconds = engine.plan(now)
        if seconds is None:
            break
        now += seconds
        ended.append((now, engine.carry_out(now)))
    return ended


def work(engine: Engine, letter: str, size: int = 100, tokens: int = 2) -> Work:
    made = Work(letter * size, tokens)
    engine.submit(made)
    return made


def test_a_prompt_is_read_and_an_answer_written_token_by_token() -> None:
    server = engine()
    one = work(server, "a", size=100, tokens=3)
    times, spoken = zip(*run(server), strict=True)
    assert times == pytest.approx((2.0, 3.1, 4.2))
    assert spoken == ([one], [one], [one])
    assert (one.began, one.first, one.done) == (0.0, 2.0, True)
    assert repr(server) == "<Engine 0 running, 0 waiting>"


def test_answers_pause_while_a_prompt_is_read() -> None:
    server = engine()
    work(server, "a", size=100, tokens=9)
    run(server, turns=1)
    work(server, "b", size=1000)
    seconds = server.plan(2.0)
    assert seconds == pytest.approx(1.0 + 0.1 + 10.0)
    assert len(server.carry_out(13.1)) == 2


def test_a_prompt_beyond_a_batch_takes_several() -> None:
    server = engine()
    long = work(server, "a", size=BATCH + 100, tokens=1)
    (_, first), (_, second) = run(server)
    assert (first, second) == ([], [long])


def test_requests_beyond_the_slots_wait_in_turn() -> None:
    server = engine(slots=1)
    works = [work(server, letter) for letter in "abc"]
    spoken = [each for _, several in run(server) for each in several]
    assert spoken == [works[0], works[0], works[1], works[1], works[2], works[2]]


def test_the_next_turn_reads_only_what_is_new() -> None:
    server = engine()
    first = work(server, "a", size=100, tokens=2)
    run(server)
    answer = " we" * first.tokens
    second = Work(first.prompt + answer + "more", 1)
    server.submit(second)
    run(server)
    assert (second.cached, second.size) == (106, 110)


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    server = engine()
    for _ in range(2):
        again = work(server, "a", size=100)
        run(server)
    assert again.cached == 99


def test_tokens_are_of_several_characters() -> None:
    server = engine(token=2.5)
    one = work(server, "a", size=101)
    run(server)
    assert one.size == math.ceil(101 / 2.5)


def test_a_client_that_leaves_makes_room_at_once() -> None:
    server = engine(slots=1)
    one, two = work(server, "a", tokens=50), work(server, "b")
    run(server, turns=3)
    server.cancel(one)
    assert [each for _, several in run(server) for each in several] == [two, two]


def test_a_client_that_leaves_in_the_middle_of_a_batch_gets_no_token_of_it() -> None:
    server = engine()
    one, two = work(server, "a"), work(server, "b")
    server.plan(0.0)
    server.cancel(one)
    assert server.carry_out(1.0) == [two]


def test_a_waiting_request_cannot_be_cancelled() -> None:
    server = engine(slots=1)
    work(server, "a")
    two = work(server, "b")
    server.plan(0.0)
    server.cancel(two)
    assert repr(server) == "<Engine 1 running, 1 waiting>"


def test_the_pace_is_that_of_the_measured_server() -> None:
    measured = Measured(reads=1000.0, writes=80.0, writes_beside=30.0, token=3.0)
    pace = measured.pace
    assert pace.tokens_per_second(1) == pytest.approx(80.0)
    assert pace.tokens_per_second(BESIDE) == pytest.approx(30.0)
    assert pace.slowed(4).tokens_per_second(1) == pytest.approx(20.0)
    assert pace.slowed(4).read == pytest.approx(4 / 1000)


def test_a_pace_is_never_negative() -> None:
    """Four answers at once cannot be faster than one, whatever was measured."""
    pace = Measured(reads=1000.0, writes=80.0, writes_beside=90.0, token=3.0).pace
    assert pace.written == 0.0
    assert pace.batch == pytest.approx(1 / 80)
