"""Hubs that share workers in simulated time: slots are idle for messages only."""

from __future__ import annotations

import pytest

from benchmarks.hubs import Case, simulate

LATENCY = 0.001


@pytest.mark.parametrize(
    ("hubs", "load", "uneven"), [(2, 0.8, 0.0), (4, 1.2, 0.0), (4, 0.9, 0.9)]
)
def test_slots_are_idle_for_messages_only(
    hubs: int, load: float, uneven: float
) -> None:
    case = Case(hubs, LATENCY, load, workers=2, slots=4, duration=40, uneven=uneven)
    result = simulate(case)
    assert result.most <= 8
    assert result.idle < 0.01
    assert result.gaps[1] < 30 * LATENCY
    assert result.calls < 15


def test_a_hub_alone_lets_no_slot_idle() -> None:
    result = simulate(Case(0, 0.0, 1.2, workers=2, slots=4, duration=40))
    assert (result.idle, result.gaps, result.calls) == (0.0, (0.0, 0.0), 0.0)
    assert result.most == 8
