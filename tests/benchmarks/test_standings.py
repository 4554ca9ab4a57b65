"""The evaluation of the routing benchmark's rounds."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.chat import Exchange, Timings
from benchmarks.children import BenchmarkError
from benchmarks.standings import BASE, FEWEST, Bout, judge, remarks, table


@pytest.fixture(autouse=True)
async def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()  # an exchange has futures


def exchange(
    began: float,
    *arrivals: float,
    previous: Exchange | None = None,
    cached: int = 0,
    read: int = 100,
    flaw: str = "",
) -> Exchange:
    made = Exchange(80, "none", [], 9, previous)
    made.began, made.arrivals, made.flaw = began, list(arrivals), flaw
    made.words = ["w"] * len(arrivals)
    made.timings = Timings(cached, read, 1.0, len(arrivals), 1.0)
    return made


def bout(p95: float, rate: float = 100.0, cached: float = 0.5) -> Bout:
    return Bout([p95] * FEWEST, rate, cached, 0.95, FEWEST, [], 0.5)


async def test_requests_that_began_in_the_period_are_measured() -> None:
    exchanges = [exchange(9.0, 9.5, 10.5), exchange(20.0, 20.5)]
    exchanges += [exchange(11.0, 11.25, 19.0, 20.5) for _ in range(FEWEST)]
    found = judge(exchanges, 10.0, 20.0, 0.5)
    assert found.waits == [0.25] * FEWEST
    assert found.rate == (1 + 2 * FEWEST) / 10
    assert found.asked == FEWEST + 2


async def test_only_later_turns_can_be_cached() -> None:
    first = exchange(11.0, 11.5, read=99)
    later = exchange(12.0, 12.5, previous=first, cached=80, read=45)
    others = [exchange(11.0, 11.5, cached=1000, read=1) for _ in range(FEWEST)]
    found = judge([first, later, *others], 10.0, 20.0, 0.5)
    assert later.turn == 2
    assert found.cached == 80 / 125
    assert found.repeated == (99 + 1) / 125


async def test_failures_count_at_any_time() -> None:
    exchanges = [exchange(11.0, 11.5) for _ in range(FEWEST)]
    exchanges += [exchange(1.0, flaw="status 502"), exchange(11.0, flaw="no [DONE]")]
    found = judge(exchanges, 10.0, 20.0, 0.5)
    assert found.flaws == ["status 502", "no [DONE]"]
    assert len(found.waits) == FEWEST


async def test_too_few_answers_are_an_error() -> None:
    with pytest.raises(BenchmarkError, match=r"^9 answers are too few"):
        judge([exchange(11.0, 11.5)] * (FEWEST - 1), 10.0, 20.0, 0.5)


def test_a_ratio_is_of_two_figures_of_one_round() -> None:
    bouts = {
        BASE: [bout(1.0), bout(2.0), bout(4.0)],
        "hub best": [bout(0.5), bout(0.8), bout(1.2)],
    }
    head, rule, base, hub = table(bouts).splitlines()
    assert head.count("|") == rule.count("|") == base.count("|") == hub.count("|")
    assert "| 1.00 (1.00 - 1.00) |" in base
    assert "| 800 ms | 800 ms | 0.40 (0.30 - 0.50) |" in hub
    assert f"| 0 of {3 * FEWEST} |" in hub


def test_the_goals_are_compared_with_the_best_policy_of_the_hub() -> None:
    bouts = {
        BASE: [bout(1.0)],
        "hub good": [bout(0.4, rate=101.0, cached=0.6)],
        "hub warm": [bout(0.7, cached=0.91)],
    }
    p95, cached, *_ = remarks(bouts)
    assert p95 == (
        "best p95: hub good, 0.40 of nginx least_conn's (meets the goal of 0.5),"
        " with 1.01 of its tokens/s (meets the goal of 1)"
    )
    assert cached.startswith("best cached: hub warm, 91.0% (meets the goal of 90%)")
    bouts["hub good"] = [bout(0.6, rate=99.0)]
    bouts["hub warm"] = [bout(0.7, cached=0.89)]
    p95, cached, *_ = remarks(bouts)
    assert p95.count("MISSES") == 2
    assert "MISSES" in cached
