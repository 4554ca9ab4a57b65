"""The benchmark of open dashboards measures what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import dashboard
from benchmarks.dashboard import Costs, Plan, costs, listening
from benchmarks.measure import paced_workers
from benchmarks.proxies import Hub


async def test_dashboards_listen_while_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "SETTLE", 0.0)
    async with paced_workers(2, 50.0, tmp_path) as ports:
        hub = Hub(ports, tmp_path)
        async with hub.running():
            found = await costs(hub, Plan(rounds=1, seconds=0.1))
            async with listening(hub, 1):
                pass
    assert set(found.share) == {0, 1, 10}
    assert all(share >= 0 for [share] in found.share.values())


def test_figures_are_of_the_same_round() -> None:
    found = Costs({0: [0.1, 0.2], 1: [0.11, 0.23]}, {0: [2.0, 4.0], 1: [3.0, 4.0]})
    assert found.beyond_none(1) == pytest.approx([1.0, 3.0])
    assert found.ratios(1) == [1.5, 1.0]
