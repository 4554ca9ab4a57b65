"""What subjects use is added up by model and day, and survives a restart."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.state import ledger as ledgers
from gollama_proxy.state.folder import StateError
from gollama_proxy.state.ledger import (
    DAY,
    OTHER,
    SUMS,
    Ledger,
    Spent,
    UsageQuestion,
    UsageSums,
    day_of,
    open_ledger,
)
from tests.fakes.clock import Clock

TODAY = day_of("2026-11-29")
NOON = TODAY * DAY + DAY / 2
DECEMBER = day_of("2026-12-01")


def used(*sums: float) -> dict[str, Any]:
    """Return sums by their names, in the order of `SUMS`."""
    return dict(zip(SUMS, sums, strict=True))


NOTHING = used(0, 0, 0, 0, 0, 0)


@dataclass
class Ended:
    """A request that has ended."""

    subject: str = "alice"
    model: str = "tiny"
    prompt_tokens: int = 20
    tokens: int = 5
    cached_tokens: int = 8
    slot_seconds: float = 0.5


async def opened(
    folder: Path, clock: Callable[[], float] | None = None, days: int = 400
) -> Ledger:
    clock = clock or Clock(NOON)
    ledger = await asyncio.to_thread(Ledger, folder / "usage.db", clock)
    ledger.reconfigure(days)
    return ledger


async def read(
    ledger: Ledger, *by: str, first: int = 0, end: int = 1 << 20, **only: str
) -> UsageSums:
    return await ledger.read(UsageQuestion(by or ("subject",), first, end, **only))


def stored(folder: Path) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(folder / "usage.db")
    try:
        return database.execute("SELECT * FROM usage").fetchall()
    finally:
        database.close()


def moved_aside(folder: Path) -> list[Path]:
    return sorted(folder.glob("usage.db.damaged-*"))


# --- Adding up --------------------------------------------------------------------


async def test_usage_is_added_up_by_subject_model_and_day(tmp_path: Path) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    ledger.add(Ended(), failed=True)
    ledger.add(Ended("bob", "large", 1000, 100, 0, 9.25))
    clock.advance(DAY)
    ledger.add(Ended(model="large", prompt_tokens=1, tokens=0, cached_tokens=0))

    answer = await read(ledger, "day", "subject", "model")
    first = {"day": "2026-11-29", "subject": "bob", "model": "large"}
    second = {"day": "2026-11-29", "subject": "alice", "model": "tiny"}
    third = {"day": "2026-11-30", "subject": "alice", "model": "large"}
    first |= used(1, 0, 1000, 100, 0, 9.25)
    second |= used(2, 1, 40, 10, 16, 1.0)
    third |= used(1, 0, 1, 0, 0, 0.5)
    assert answer.rows == [first, second, third]
    assert [*answer.rows[0]] == ["day", "subject", "model", *NOTHING]
    assert answer.complete
    assert answer.total == used(4, 1, 1041, 110, 16, 10.75)
    await ledger.close()


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (("subject",), [("bob", 3), ("alice", 2)]),
        (("model",), [("large", 2), ("tiny", 3)]),
        (("day",), [("2026-11-29", 4), ("2026-11-30", 1)]),
    ],
)
async def test_the_largest_group_comes_first_and_days_in_their_order(
    by: Sequence[str], expected: list[tuple[str, int]]
) -> None:
    clock = Clock(NOON)
    ledger = Ledger(clock=clock)
    for subject, model in (("alice", "tiny"), ("bob", "tiny"), ("alice", "tiny")):
        ledger.add(Ended(subject, model))
    ledger.add(Ended("bob", "large", 1000))
    clock.advance(DAY)
    ledger.add(Ended("bob", "large", 1000))
    answer = await read(ledger, *by)
    assert [(row[by[0]], row["requests"]) for row in answer.rows] == expected
    await ledger.close()


async def test_a_question_may_be_about_some_days_and_one_subject() -> None:
    clock = Clock(NOON)
    ledger = Ledger(clock=clock)
    for _ in range(4):
        ledger.add(Ended("alice"))
        ledger.add(Ended("bob"))
        clock.advance(DAY)
    answer = await read(ledger, "day", first=TODAY + 1, end=TODAY + 3, subject="alice")
    assert [row["day"] for row in answer.rows] == ["2026-11-30", "2026-12-01"]
    assert answer.total["requests"] == 2
    nothing = await read(ledger, first=TODAY + 9, subject="alice")
    assert nothing == UsageSums([], NOTHING, complete=True)
    await ledger.close()


async def test_a_long_answer_is_cut_and_its_total_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledgers, "MOST_ROWS", 3)
    ledger = Ledger(clock=Clock(NOON))
    for number in range(5):
        ledger.add(Ended(f"user {number}", tokens=number))
    answer = await read(ledger)
    assert [row["subject"] for row in answer.rows] == ["user 4", "user 3", "user 2"]
    assert not answer.complete
    assert answer.total["requests"] == 5
    await ledger.close()


_USES = st.lists(
    st.tuples(
        st.sampled_from(["alice", "bob", "=cmd", "\ud800", ""]),
        st.sampled_from(["tiny", "large"]),
        *[st.integers(0, 1000)] * 3,
        st.booleans(),
        st.sampled_from([0, 0, 0, DAY, 20 * DAY, -DAY]),  # by which the clock is set
        st.booleans(),  # whether it is saved then
    ),
    max_size=20,
)


@given(_USES)
async def test_nothing_is_lost_or_counted_twice(uses: list[Any]) -> None:
    """However often it is saved, and wherever the clock is set."""
    moments = [NOON]
    ledger = Ledger(clock=lambda: moments[-1])
    expected = dict(NOTHING)
    for subject, model, prompt, tokens, cached, failed, step, saved in uses:
        moments.append(moments[-1] + step)
        ended = Ended(subject, model, prompt, tokens, cached, 0.0)
        ledger.add(ended, failed=failed)
        for name, amount in (
            *(("requests", 1), ("errors", int(failed)), ("prompt_tokens", prompt)),
            *(("completion_tokens", tokens),),
            # An answer without tokens has none that are cached.
            *(("cached_tokens", cached if prompt + tokens else 0),),
        ):
            expected[name] += amount
        if saved:
            await ledger.save()
    answer = await read(ledger, "subject", "model", "day")
    assert answer.total == expected
    for name, amount in expected.items():
        assert sum(row[name] for row in answer.rows) == amount
    await ledger.close()


# --- Over a restart ---------------------------------------------------------------


async def test_usage_survives_a_restart(tmp_path: Path) -> None:
    ledger = await opened(tmp_path)
    ledger.add(Ended())
    await ledger.save()
    ledger.add(Ended("Zoë\ud800"))
    await ledger.close()
    await ledger.close()
    assert [row[:4] for row in stored(tmp_path)] == [
        (TODAY, "Zoë?", "tiny", 1),
        (TODAY, "alice", "tiny", 1),
    ]

    again = await opened(tmp_path)
    again.add(Ended())
    answer = await read(again)
    assert [row["requests"] for row in answer.rows] == [2, 1]
    await again.close()


async def test_what_a_subject_has_spent_survives_a_restart(tmp_path: Path) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    assert ledger.spent("alice") == Spent()
    ledger.add(Ended())
    ledger.add(Ended(model="large"))
    assert ledger.spent("alice") == Spent(50, 50)
    await ledger.close()
    clock.advance(DAY)
    again = await opened(tmp_path, clock)
    assert again.spent("alice") == Spent(0, 50)
    again.add(Ended())
    assert again.spent("alice") == Spent(25, 75)
    await again.save()
    again.add(Ended())
    await again.save()
    assert again.spent("alice") == Spent(50, 100)
    clock.now = DECEMBER * DAY
    assert again.spent("alice") == Spent()
    await again.save()
    again.add(Ended())
    assert again.spent("alice") == Spent(25, 25)
    assert again.spent("bob") == Spent()
    await again.close()


async def test_a_clock_that_is_set_finds_the_usage_of_its_day(tmp_path: Path) -> None:
    """A small machine has the time of 1970 until it reaches a time server."""
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    await ledger.close()
    clock.now = 60.0
    again = await opened(tmp_path, clock)
    assert again.spent("alice") == Spent()
    clock.now = NOON
    again.add(Ended())
    await again.save()
    assert again.spent("alice") == Spent(50, 50)
    await again.close()


async def test_a_clock_that_leaps_ahead_deletes_nothing(tmp_path: Path) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    await ledger.save()
    clock.advance(9999 * DAY)
    ledger.add(Ended())
    await ledger.save()
    clock.now = NOON
    assert (await read(ledger)).total["requests"] == 2
    assert ledger.spent("alice") == Spent(25, 25)
    await ledger.close()


async def test_usage_during_a_look_back_counts_once(tmp_path: Path) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    saving = asyncio.create_task(ledger.save())
    while not saving.done():
        await asyncio.sleep(0)
        ledger.add(Ended(prompt_tokens=1, tokens=0))
    added = (await read(ledger)).total["prompt_tokens"]
    assert ledger.spent("alice") == Spent(added + 5, added + 5)
    await ledger.close()


def test_days_and_months_end_at_midnight_utc() -> None:
    clock = Clock(NOON)
    ledger = Ledger(clock=clock)
    assert ledger.day_ends == (TODAY + 1) * DAY
    assert ledger.month_ends == DECEMBER * DAY
    clock.now = DECEMBER * DAY
    assert ledger.day_ends == (DECEMBER + 1) * DAY
    assert ledger.month_ends == day_of("2027-01-01") * DAY


# --- Limits -----------------------------------------------------------------------


async def test_old_days_are_deleted_and_the_current_month_is_not(
    tmp_path: Path,
) -> None:
    clock = Clock(NOON - 40 * DAY)
    ledger = await opened(tmp_path, clock, days=50)
    while clock.now <= NOON:
        ledger.add(Ended())
        clock.advance(10 * DAY)
    clock.now = NOON
    await ledger.save()
    assert len(stored(tmp_path)) == 5
    ledger.reconfigure(15)
    await ledger.save()
    first = day_of("2026-11-01")
    assert [row[0] for row in stored(tmp_path)] == [
        day for day in range(TODAY - 40, TODAY + 1, 10) if day >= min(first, TODAY - 15)
    ]
    ledger.reconfigure(0)
    clock.advance(DAY)
    await ledger.save()
    assert len(stored(tmp_path)) == 3  # those of this month
    clock.now = DECEMBER * DAY
    ledger.add(Ended())
    await ledger.save()
    assert [row[0] for row in stored(tmp_path)] == [DECEMBER]
    await ledger.close()


async def test_invented_models_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each subject at first, so that its quota holds, and then of all."""
    monkeypatch.setattr(ledgers, "MOST_PAIRS", 3)
    ledger = Ledger(clock=Clock(NOON))
    for number in range(5):
        ledger.add(Ended("mallory", f"qwen-{number}"))
    ledger.add(Ended("bob", "long " * 100))
    for number in range(5):
        ledger.add(Ended(f"user {number}", "tiny", 0, 1))
    ledger.add(Ended("mallory", "qwen-0"))
    answer = await read(ledger, "subject", "model")
    assert {(row["subject"], row["model"]): row["requests"] for row in answer.rows} == {
        ("mallory", "qwen-0"): 2,
        ("mallory", "qwen-1"): 1,
        ("mallory", "qwen-2"): 1,
        ("mallory", OTHER): 2,
        ("bob", OTHER): 1,
        ("user 0", OTHER): 1,
        (OTHER, OTHER): 4,
    }
    assert ledger.spent("mallory").today == 6 * 25
    await ledger.close()


# --- A disk that fails ------------------------------------------------------------


async def test_a_full_disk_is_one_warning_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    await ledger.save()
    other = sqlite3.connect(tmp_path / "usage.db", timeout=0)
    fill = (
        "CREATE TRIGGER full BEFORE INSERT ON usage BEGIN SELECT raise(ABORT, 'x'); END"
    )
    other.execute(fill)
    for _ in range(3):
        ledger.add(Ended())
        await ledger.save()
    assert caplog.text.count("cannot be written") == 1
    assert len(stored(tmp_path)) == 1
    clock.advance(DAY)
    ledger.add(Ended())
    assert (await read(ledger, "day")).total["requests"] == 5
    other.execute("DROP TRIGGER full")
    other.close()
    await ledger.save()
    assert [row[3] for row in stored(tmp_path)] == [4, 1]
    assert caplog.text.count("is written again") == 1
    assert "0 rows were lost" in caplog.text
    assert ledger.spent("alice") == Spent(25, 125)
    await ledger.close()


async def test_a_disk_that_cannot_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(NOON)
    ledger = await opened(tmp_path, clock)
    ledger.add(Ended())
    await ledger.save()
    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "_SPENT", "SELECT * FROM nowhere")
        clock.advance(DAY)
        ledger.add(Ended())
        await ledger.save()
        await ledger.save()
        assert caplog.text.count("no such table: nowhere") == 1
    assert ledger.spent("alice") == Spent(25, 50)
    await ledger.save()
    assert ledger.spent("alice") == Spent(25, 50)
    assert [row[3] for row in stored(tmp_path)] == [1, 1]
    assert "is written again" in caplog.text
    await ledger.close()


async def test_what_waits_for_a_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "MOST_UNSAVED", 2)
    ledger = await opened(tmp_path)
    other = sqlite3.connect(tmp_path / "usage.db", timeout=0)
    other.execute("ALTER TABLE usage RENAME TO hidden")
    for number in range(5):
        ledger.add(Ended(f"user {number}"))
        await ledger.save()
    assert repr(ledger).endswith("usage.db rows=2 to save>")
    with pytest.raises(StateError, match="usage cannot be read: no such table"):
        await read(ledger)
    other.execute("ALTER TABLE hidden RENAME TO usage")
    other.close()
    await ledger.close()
    assert [row[1] for row in stored(tmp_path)] == ["user 3", "user 4"]
    assert "3 rows were lost" in caplog.text


async def test_a_ledger_that_cannot_be_used_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage.db").mkdir()
    ledger = await asyncio.to_thread(open_ledger, tmp_path)
    assert "usage will not survive a restart" in caplog.text
    assert repr(ledger) == "<Ledger in memory rows=0 to save>"
    ledger.add(Ended())
    assert (await read(ledger)).total["requests"] == 1
    await ledger.close()


async def test_a_damaged_ledger_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage.db").write_text("not a database, and longer than a header" * 9)
    ledger = await opened(tmp_path)
    assert "damaged" in caplog.text
    assert len(moved_aside(tmp_path)) == 1
    ledger.add(Ended())
    await ledger.close()
    assert len(stored(tmp_path)) == 1


async def test_questions_after_the_end_find_nothing() -> None:
    ledger = Ledger(clock=Clock(NOON))
    await ledger.close()
    assert await read(ledger) == UsageSums([], NOTHING, complete=True)
