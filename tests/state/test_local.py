"""What a hub keeps over a restart, and what becomes of a database that is not sound."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gollama_proxy.config.settings import Revoked
from gollama_proxy.state import local
from gollama_proxy.state.facts import TOMBSTONES, Fact, Stamp, StoredWorker, texts_of
from gollama_proxy.state.folder import StateError
from gollama_proxy.state.local import LocalState
from tests.fakes.clock import Clock

ONE = StoredWorker("one", "admin", {"url": "http://10.0.0.1:1", "slots": 4}, "paused")
TWO = StoredWorker("two", "agent", {"url": "http://10.0.0.2:1"}, agent={"mac": "00:01"})


async def opened(folder: Path) -> LocalState:
    return await asyncio.to_thread(LocalState, folder)


def moved_aside(folder: Path) -> list[Path]:
    return sorted(folder.glob("state.db.damaged-*"))


async def test_workers_and_revocations_survive_a_restart(tmp_path: Path) -> None:
    state = await opened(tmp_path / "new" / "folder")
    await state.put(ONE)
    await state.put(TWO)
    await state.revoke("jti", "f00d")
    await state.revoke("sub", "alice")
    await state.close()

    again = await opened(tmp_path / "new" / "folder")
    assert again.workers == [ONE, TWO]
    assert again.find("two") == TWO
    assert again.find("three") is None
    assert again.revoked == Revoked(frozenset({"f00d"}), frozenset({"alice"}))
    await again.forget("one")
    await again.forget("one")
    await again.close()
    last = await opened(tmp_path / "new" / "folder")
    assert last.workers == [TWO]
    await last.close()
    await last.close()


async def test_a_worker_replaces_the_one_of_its_name(tmp_path: Path) -> None:
    state = await opened(tmp_path)
    await state.put(ONE)
    changed = StoredWorker("one", "admin", {"url": "http://10.0.0.1:1"}, "draining")
    await state.put(changed)
    await state.close()
    again = await opened(tmp_path)
    assert again.workers == [changed]
    await again.close()


async def test_changes_are_written_in_their_order(tmp_path: Path) -> None:
    state = await opened(tmp_path)
    versions = [StoredWorker("one", "admin", {"slots": n}) for n in range(1, 11)]
    async with asyncio.TaskGroup() as group:
        for each in versions:
            group.create_task(state.put(each))
    await state.close()
    again = await opened(tmp_path)
    assert again.workers == [versions[-1]]
    await again.close()


async def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    state = LocalState()
    await state.put(ONE)
    await state.revoke("sub", "alice")
    assert state.workers == [ONE]
    assert repr(state) == "<LocalState in memory workers=1 revocations=1>"
    await state.close()
    assert LocalState().workers == []


async def test_only_the_owner_can_read_the_folder(tmp_path: Path) -> None:
    state = await opened(tmp_path / "state")
    await state.close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "state.db").stat().st_mode & 0o077 == 0


async def test_a_second_hub_cannot_use_the_same_folder(tmp_path: Path) -> None:
    state = await opened(tmp_path)
    with pytest.raises(StateError, match=rf"another hub \(process {os.getpid()}\)"):
        await opened(tmp_path)
    await state.put(ONE)
    await state.close()
    again = await opened(tmp_path)  # the lock is free again
    assert again.workers == [ONE]
    await again.close()


async def test_a_killed_hub_leaves_all_that_was_written(tmp_path: Path) -> None:
    program = f"""
import asyncio, os, signal
from dataclasses import replace
from pathlib import Path
from gollama_proxy.state.facts import TOMBSTONES, Fact, Stamp, StoredWorker, texts_of
from gollama_proxy.state.local import LocalState
async def main():
    state = LocalState(Path({str(tmp_path)!r}))
    await state.put(StoredWorker("one", "admin", {{"slots": 1}}))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True)
    assert done.returncode == -9, done.stderr
    state = await opened(tmp_path)
    assert state.workers == [StoredWorker("one", "admin", {"slots": 1})]
    await state.close()


# --- A database that is not sound -------------------------------------------------


KINDS = ["text", "torn", "no tables", "no JSON", "a list", "no source", "no hold"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_damaged_database_is_moved_aside(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = await opened(tmp_path)
    for number in range(10):  # more than one page
        await state.put(StoredWorker(f"w{number}", "admin", {"url": "x" * 2000}))
    await state.close()
    file = tmp_path / "state.db"
    _damage(file, kind)
    before = file.read_bytes()

    again = await opened(tmp_path)
    assert again.workers == []
    assert "damaged" in caplog.text
    aside = moved_aside(tmp_path)[0]
    assert aside.read_bytes() == before
    await again.put(ONE)
    await again.close()
    last = await opened(tmp_path)
    assert last.workers == [ONE]
    await last.close()


def _damage(file: Path, kind: str) -> None:
    if kind == "text":
        file.write_text("not a database, and longer than a header " * 200)
        return
    if kind == "torn":
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        return
    statement = {
        "no tables": "DROP TABLE workers",
        "no JSON": "UPDATE workers SET settings = '{' WHERE name = 'w7'",
        "a list": "UPDATE workers SET settings = '[]' WHERE name = 'w7'",
        "no source": "UPDATE workers SET source = 'elsewhere' WHERE name = 'w7'",
        "no hold": "UPDATE workers SET hold = 'stuck' WHERE name = 'w7'",
    }[kind]
    database = sqlite3.connect(file)
    with database:
        database.execute(statement)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


async def test_a_newer_database_is_refused_and_untouched(tmp_path: Path) -> None:
    await (await opened(tmp_path)).close()
    file = tmp_path / "state.db"
    database = sqlite3.connect(file)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = file.read_bytes()
    for _ in range(2):  # and the lock is free again
        with pytest.raises(StateError, match="written by a newer version") as refusal:
            await opened(tmp_path)
        assert "\n" not in str(refusal.value)
    assert file.read_bytes() == before
    assert not moved_aside(tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be used: File exists"):
        LocalState(tmp_path / "file")


async def test_a_disk_that_takes_no_change_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = await opened(tmp_path)
    other = sqlite3.connect(tmp_path / "state.db", timeout=0)
    other.execute("DROP TABLE workers")
    other.commit()
    other.close()
    await state.put(ONE)
    await state.put(TWO)
    assert caplog.text.count("cannot be written") == 1
    assert state.workers == [ONE, TWO]  # the hub goes on
    await state.close()


async def test_what_is_stored_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_WORKERS", 1)
    monkeypatch.setattr(local, "MAX_REVOCATIONS", 1)
    state = LocalState()
    await state.put(ONE)
    await state.put(ONE)
    with pytest.raises(StateError, match="1 workers are stored"):
        await state.put(TWO)
    await state.revoke("sub", "alice")
    await state.revoke("sub", "alice")
    with pytest.raises(StateError, match="1 revocations are stored"):
        await state.revoke("sub", "bob")


async def test_the_settings_are_stored_as_json(tmp_path: Path) -> None:
    state = await opened(tmp_path)
    await state.put(ONE)
    database = sqlite3.connect(tmp_path / "state.db")
    ((settings,),) = database.execute("SELECT settings FROM workers")
    database.close()
    assert json.loads(settings) == ONE.settings
    await state.close()


# --- What others do not know yet --------------------------------------------------


async def test_changes_are_marked_as_not_sent_also_after_a_restart(
    tmp_path: Path,
) -> None:
    wall = Clock(1000.0)
    state = await asyncio.to_thread(LocalState, tmp_path, wall)
    await state.put(ONE)
    await state.revoke("jti", "f00d")
    keys = [("worker", "one"), ("hold", "one"), ("jti", "f00d")]
    assert [*state.unsent] == keys
    await state.note_sent({key: (state.stamp(key), 7) for key in keys})
    assert not state.unsent
    wall.advance(5)
    await state.put(replace(ONE, hold="draining"))
    assert [*state.unsent] == [("hold", "one")]  # its settings are the same
    await state.note_store("life 1")
    await state.close()

    again = await asyncio.to_thread(LocalState, tmp_path, wall)
    assert again.stamp(("worker", "one")) == Stamp(7, 1000.0, sent=True)
    assert again.stamp(("hold", "one")) == Stamp(7, 1005.0, sent=False)
    # A revocation has no version: whether the store has it is found out there.
    assert [*again.unsent] == [("hold", "one"), ("jti", "f00d")]
    assert again.store_id == "life 1"
    await again.close()


async def test_a_change_during_a_change_is_sent_as_well() -> None:
    state = LocalState()
    await state.put(ONE)
    key = "hold", "one"
    sent = state.stamp(key)
    await state.put(replace(ONE, hold=""))
    await state.note_sent({key: (sent, 7)})
    stamp = state.stamp(key)
    assert key in state.unsent
    assert stamp is not None
    assert (stamp.version, stamp.sent) == (7, False)


async def test_facts_of_the_store_are_followed(tmp_path: Path) -> None:
    wall = Clock(1000.0)
    state = await asyncio.to_thread(LocalState, tmp_path, wall)
    await state.put(ONE)
    second = 1_000_000
    facts = [
        Fact("hold", "one", "", 60 * second),
        *(Fact(kind, "two", text, 61 * second) for kind, text in texts_of(TWO).items()),
        Fact("sub", "alice", "1", 62 * second),
    ]
    await state.take(facts, 65 * second)
    expected = [replace(ONE, hold=""), TWO]
    assert state.workers == expected
    assert state.revoked.subjects == {"alice"}
    # As long ago as it is for the store, whatever the time is there.
    assert state.stamp(("worker", "two")) == Stamp(61 * second, 996.0, sent=True)
    await state.take([Fact("worker", "two", "", 66 * second)], 66 * second)
    await state.drop([("worker", "one")])
    await state.close()
    again = await asyncio.to_thread(LocalState, tmp_path, wall)
    assert again.workers == []
    assert again.stamp(("worker", "one")) is None
    stamp = again.stamp(("worker", "two"))  # so that no hub brings it back
    assert stamp is not None
    assert stamp.version == 66 * second
    await again.close()
    wall.advance(TOMBSTONES + 1)
    last = await asyncio.to_thread(LocalState, tmp_path, wall)
    assert last.stamp(("worker", "two")) is None
    await last.close()


async def test_removals_are_remembered_within_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "MAX_TOMBSTONES", 10)
    state = LocalState()
    for number in range(500):
        worker = StoredWorker(f"w{number}", "admin", {"slots": 1})
        await state.put(worker)
        await state.forget(worker.name)
    assert len(state.keys) <= 12
    assert len(state.unsent) <= 12
    assert ("worker", "w499") in state.unsent


async def test_what_an_older_hub_has_left_is_older_than_anything(
    tmp_path: Path,
) -> None:
    state = await opened(tmp_path)
    await state.put(ONE)
    await state.close()
    database = sqlite3.connect(tmp_path / "state.db")
    with database:
        database.execute("DROP TABLE stamps")
    database.close()
    again = await opened(tmp_path)
    assert [*again.unsent] == [("worker", "one"), ("hold", "one")]
    assert again.stamp(("worker", "one")) == Stamp(0, 0.0, sent=False)
    await again.close()
