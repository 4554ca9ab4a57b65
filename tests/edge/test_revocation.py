"""The list of revoked tokens follows its file, and outlives whatever befalls it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from gollama_proxy.config.settings import Revoked
from gollama_proxy.edge import revocation
from gollama_proxy.edge.revocation import Revocation
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE

HOUR = 3_600


class List:
    """A file, what watches it, and what that told."""

    def __init__(self, folder: Path, content: str | None = "") -> None:
        self.file = folder / "revoked"
        if content is not None:
            self.write(content)
        self.told: list[Revoked] = []
        self.clock = Clock(time.time() + HOUR)  # long after all changes
        self.watch = Revocation(
            str(self.file), Revoked(), self.told.append, lambda: int(self.clock() * 1e9)
        )

    def __repr__(self) -> str:
        return f"<List {self.file} told={len(self.told)}>"

    def write(self, content: str) -> None:
        self.file.write_text(content)

    def replace(self, content: str) -> None:
        """Put another file in its place, as a careful program does."""
        beside = self.file.with_name("beside")
        beside.write_text(content)
        beside.replace(self.file)


def of(*tokens: str, sub: tuple[str, ...] = ()) -> Revoked:
    return Revoked(frozenset(tokens), frozenset(sub))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect each time that the file is read."""
    done: list[str] = []
    read = revocation.read_revoked

    def spy(file: str) -> Revoked:
        done.append(file)
        return read(file)

    monkeypatch.setattr(revocation, "read_revoked", spy)
    return done


async def test_a_change_is_told_once(tmp_path: Path, reads: list[str]) -> None:
    it = List(tmp_path, "jti:a\n")
    for _ in range(3):
        await it.watch.check()
    assert it.told == [of("a")]
    assert repr(it.watch) == "<Revocation tokens=1 subjects=0>"
    it.write("jti:a\nsub:bob\n")
    for _ in range(3):
        await it.watch.check()
    assert it.told == [of("a"), of("a", sub=("bob",))]
    it.write("# nobody any more\n")
    await it.watch.check()
    assert it.told[2:] == [Revoked()]
    assert len(reads) == 3, "a file that stays as it is is not read"


async def test_another_file_in_its_place_is_a_change(tmp_path: Path) -> None:
    """Even of the same size and the same age."""
    it = List(tmp_path, "jti:a\n")
    await it.watch.check()
    it.replace("jti:b\n")
    os.utime(it.file, (1, 1))
    await it.watch.check()
    assert it.told == [of("a"), of("b")]


async def test_other_words_for_the_same_are_no_change(tmp_path: Path) -> None:
    it = List(tmp_path, "jti:a\njti:b\n")
    await it.watch.check()
    it.write("# two\njti:b\n\njti: a\njti:a")
    await it.watch.check()
    assert it.told == [of("a", "b")]


async def test_what_was_changed_a_moment_ago_may_change_again(
    tmp_path: Path, reads: list[str]
) -> None:
    """Two changes within a tick of the file system's clock look the same."""
    it = List(tmp_path, "jti:a\n")
    it.clock.now = it.file.stat().st_mtime + 0.5
    await it.watch.check()
    before = it.file.stat()
    it.write("jti:b\n")
    os.utime(it.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    await it.watch.check()
    assert it.told == [of("a"), of("b")]
    it.clock.advance(HOUR)
    for _ in range(3):
        await it.watch.check()
    assert len(reads) == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe", "cannot be read: not UTF-8 text"),
        (b"jti:a\neyJhbGciOiJIUzI1NiJ9.secret\n", "line 2 must be jti: or sub:"),
        (b"jti:\n", "line 1 must be jti: or sub:"),
        (b"x" * (16 << 20) + b"x", "must not be larger than 16777216 bytes"),
    ],
)
async def test_a_list_that_is_no_list_changes_nothing(
    content: bytes | None, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = List(tmp_path, "jti:good\n")
    await it.watch.check()
    if content is None:
        it.file.unlink()
    else:
        it.file.write_bytes(content)
    for _ in range(3):
        await it.watch.check()
    assert it.told == [of("good")]
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line.startswith(f"auth.revoked = '{it.file}': {why}")
    assert line.endswith("; the last good list stays")
    assert "secret" not in line
    # It is looked at again, and one that is good again counts.
    it.write("jti:good\njti:more\n")
    await it.watch.check()
    assert it.told == [of("good"), of("good", "more")]
    # The same trouble, once more: that is news.
    it.file.unlink()
    await it.watch.check()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2


async def test_a_file_that_changes_while_it_is_read_is_left_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = List(tmp_path, "jti:a\n")
    read = revocation.read_revoked

    def read_half(file: str) -> Revoked:
        found = read(file)
        it.write("jti:a\njti:b\n")
        return found

    monkeypatch.setattr(revocation, "read_revoked", read_half)
    await it.watch.check()
    assert it.told == []
    monkeypatch.setattr(revocation, "read_revoked", read)
    await it.watch.check()
    assert it.told == [of("a", "b")]


# --- The task ---------------------------------------------------------------------


async def test_it_looks_by_itself_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that failed is not the last one."""
    assert revocation.PERIOD == 1.0
    monkeypatch.setattr(revocation, "PERIOD", 0.001)
    heard = asyncio.Event()

    def changed(revoked: Revoked) -> None:
        if revoked == of("a"):
            raise RuntimeError("one that fails")
        heard.set()

    it = List(tmp_path, "jti:a\n")
    watch = Revocation(str(it.file), Revoked(), changed)
    watch.start()
    async with asyncio.timeout(DEADLINE):
        while "the next comes" not in caplog.text:
            await asyncio.sleep(0.001)
        it.write("jti:b\n")
        await heard.wait()
    await watch.stop()
    await watch.stop()
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "revocation"]


async def test_without_a_file_nothing_runs() -> None:
    watch = Revocation("", Revoked(), [].append)
    watch.start()
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "revocation"]
    await watch.stop()


async def test_whoever_asks_hears_what_is_in_it(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    it = List(tmp_path, "sub:alice\n")
    await it.watch.check()
    for _ in range(2):
        await it.watch.check(always=True)
    assert caplog.messages == ["revoked are 0 tokens and 1 subjects"] * 3
    assert it.told == [of(sub=("alice",))]
    assert len(reads) == 3
    caplog.clear()
    it.write("nonsense\n")
    await it.watch.check()
    await it.watch.check(always=True)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
