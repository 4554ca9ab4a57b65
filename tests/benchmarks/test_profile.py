"""The profile of a request: functions by their own time."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

import pytest

from benchmarks import profile
from benchmarks.load import Kind
from benchmarks.measure import paced_worker


def test_functions_are_listed_by_their_own_time_per_request() -> None:
    def inner() -> int:
        return sum(range(20_000))

    def outer() -> None:
        for _ in range(4):
            inner()

    profiler = cProfile.Profile()
    profiler.runcall(outer)
    lines = profile.table(pstats.Stats(profiler), 2, 2).splitlines()
    assert lines[0].endswith("µs per request under cProfile, 2 requests")
    assert lines[2].endswith("<built-in method builtins.sum>")
    assert len(lines) == 4
    assert lines[2].split()[2] == "2.0"  # calls per request


def test_answers_beyond_the_fast_pace_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        profile._parse(["stream", "--tokens", "21"])
    assert "--tokens 21: must be from 1 to 20" in capsys.readouterr().err


async def test_the_frames_of_the_hub_are_counted(tmp_path: Path) -> None:
    async with paced_worker(50.0, tmp_path) as port:
        cost = await profile.count(port, Kind.EMBEDDING, 0, tmp_path)
    assert cost.frames > cost.ours > 0
