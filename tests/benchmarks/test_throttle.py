"""The servers that run at the same time."""

from __future__ import annotations

import pytest

from benchmarks.throttle import AT_ONCE, turns


@pytest.mark.parametrize("count", range(1, 8))
def test_each_has_one_turn_and_at_most_two_run_at_once(count: int) -> None:
    pids = list(range(count))
    made = turns(pids)
    assert sorted(pid for together in made for pid in together) == pids
    assert all(1 <= len(together) <= AT_ONCE for together in made)
    assert len(made) == (count + 1) // 2
