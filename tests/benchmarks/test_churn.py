"""The benchmark of a changing fleet measures what it names."""

from __future__ import annotations

import pytest

from benchmarks import churn


def test_every_step_takes_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(churn, "MANY", 20)
    monkeypatch.setattr(churn, "PICKS", 10)
    found = churn.measure()
    assert len(found) == 6
    assert all(each > 0 for each in found.values())
    churn.main()
    assert capsys.readouterr().out.count("µs") == len(found)
