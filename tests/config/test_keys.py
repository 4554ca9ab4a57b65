"""The list of revoked tokens follows its file, and survives a file that is broken."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from gollama_proxy.config import keys, watch
from gollama_proxy.config.keys import RevocationList, read_token
from gollama_proxy.config.load import load
from gollama_proxy.config.settings import Revoked
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Watcher
from tests.fakes.clock import Clock
from tests.fakes.files import replace
from tests.fakes.waiting import until

HOUR = 3_600


class List:
    """A file, the list that follows it, and the changes that it made."""

    def __init__(self, folder: Path, content: str | None = "") -> None:
        self.file = folder / "revoked"
        if content is not None:
            self.write(content)
        self.applied: list[Revoked] = []
        self.clock = Clock(time.time() + HOUR)  # long after all changes
        self.revoked = RevocationList(
            str(self.file),
            Revoked(),
            self.applied.append,
            lambda: int(self.clock() * 1e9),
        )

    def __repr__(self) -> str:
        return f"<List {self.file} applied={len(self.applied)}>"

    def check(self, *, always: bool = False) -> None:
        change = self.revoked.refresh(always=always)
        if change is not None:
            change()

    def write(self, content: str) -> None:
        self.file.write_text(content)


def of(*tokens: str, sub: tuple[str, ...] = ()) -> Revoked:
    return Revoked(frozenset(tokens), frozenset(sub))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every time that the file is read."""
    done: list[str] = []
    read = keys.read_revoked

    def spy(file: str) -> Revoked:
        done.append(file)
        return read(file)

    monkeypatch.setattr(keys, "read_revoked", spy)
    return done


def test_a_change_is_applied_once(tmp_path: Path, reads: list[str]) -> None:
    it = List(tmp_path, "jti:a\n")
    for _ in range(3):
        it.check()
    assert it.applied == [of("a")]
    assert repr(it.revoked) == "<RevocationList tokens=1 subjects=0>"
    it.write("jti:a\nsub:bob\n")
    for _ in range(3):
        it.check()
    assert it.applied == [of("a"), of("a", sub=("bob",))]
    it.write("# nothing any more\n")
    for _ in range(4):
        it.check()
    assert it.applied[2:] == [Revoked()]
    assert len(reads) == 4, "an unchanged file is not read"


def test_a_list_that_is_being_written_takes_nothing_back(tmp_path: Path) -> None:
    """It is empty for a moment, and then has only its beginning."""
    it = List(tmp_path, "jti:a\njti:b\nsub:eve\n")
    it.check()
    for content in ("", "jti:a\njti:c\n", "jti:a\njti:c\nsub:eve\n"):
        it.write(content)
        it.check()
    both = of("a", "b", "c", sub=("eve",))
    assert it.applied == [of("a", "b", sub=("eve",)), both]
    it.check()
    assert it.applied[2:] == [of("a", "c", sub=("eve",))]
    it.write("")
    it.check(always=True)
    assert len(it.applied) == 3
    it.check()
    assert it.applied[3:] == [Revoked()]


def test_a_replaced_file_is_a_change(tmp_path: Path) -> None:
    """Even with the same size and time."""
    it = List(tmp_path, "jti:a\n")
    it.check()
    replace(it.file, "jti:b\n")
    os.utime(it.file, (1, 1))
    for _ in range(2):
        it.check()
    assert it.applied == [of("a"), of("a", "b"), of("b")]


def test_another_spelling_of_the_same_list_is_not_a_change(tmp_path: Path) -> None:
    it = List(tmp_path, "jti:a\njti:b\n")
    it.check()
    it.write("# two\njti:b\n\njti: a\njti:a")
    it.check()
    assert it.applied == [of("a", "b")]


def test_a_file_that_has_just_changed_is_read_again(
    tmp_path: Path, reads: list[str]
) -> None:
    """Two changes within a tick of the file system's clock look the same."""
    it = List(tmp_path, "jti:a\n")
    it.clock.now = it.file.stat().st_mtime + 0.5
    it.check()
    before = it.file.stat()
    it.write("jti:b\n")
    os.utime(it.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        it.check()
    assert it.applied == [of("a"), of("a", "b"), of("b")]
    it.clock.advance(HOUR)
    for _ in range(3):
        it.check()
    assert len(reads) == 4


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
def test_a_malformed_list_changes_nothing(
    content: bytes | None, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = List(tmp_path, "jti:good\n")
    it.check()
    if content is None:
        it.file.unlink()
    else:
        it.file.write_bytes(content)
    for _ in range(3):
        it.check()
    assert it.applied == [of("good")]
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line.startswith(f"auth.revoked = '{it.file}': {why}")
    assert line.endswith("; the last good list stays in force")
    assert "secret" not in line
    # It is read again, and takes effect once it is valid.
    it.write("jti:good\njti:more\n")
    it.check()
    assert it.applied == [of("good"), of("good", "more")]
    # The same mistake after a valid list is reported again.
    it.file.unlink()
    it.check()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2


def test_a_file_that_changes_while_it_is_read_is_read_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = List(tmp_path, "jti:a\n")
    read = keys.read_revoked

    def read_half(file: str) -> Revoked:
        found = read(file)
        it.write("jti:a\njti:b\n")
        return found

    monkeypatch.setattr(keys, "read_revoked", read_half)
    it.check()
    assert it.applied == []
    monkeypatch.setattr(keys, "read_revoked", read)
    it.check()
    assert it.applied == [of("a", "b")]


def test_a_reload_logs_the_size_of_the_list(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    it = List(tmp_path, "sub:alice\n")
    it.check()
    for _ in range(2):
        it.check(always=True)
    assert caplog.messages == ["0 tokens and 1 subjects are revoked"] * 3
    assert it.applied == [of(sub=("alice",))]
    assert len(reads) == 3
    caplog.clear()
    it.write("nonsense\n")
    it.check()
    it.check(always=True)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2


# --- With a watcher ---------------------------------------------------------------


async def test_a_failure_to_apply_a_list_does_not_stop_the_watcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.001)
    applied: list[Revoked] = []

    def apply(revoked: Revoked) -> None:
        if revoked == of("a"):
            raise RuntimeError("canary")
        applied.append(revoked)

    it = List(tmp_path, "jti:a\n")
    watcher = Watcher([RevocationList(str(it.file), Revoked(), apply)])
    watcher.start()
    await until(lambda: "it runs again" in caplog.text)
    replace(it.file, "jti:b\n")
    await until(lambda: of("b") in applied)
    await watcher.stop()
    assert applied == [of("a", "b"), of("b")]


# --- Credentials of systemd -------------------------------------------------------

KEY = "k" * 40


def passed(folder: Path, content: str, name: str = "gollama.secret") -> dict[str, str]:
    """Pass a credential as systemd does, and return the environment."""
    file = folder / name
    file.write_text(content)
    file.chmod(0o400)
    return {"CREDENTIALS_DIRECTORY": str(folder)}


def test_the_secret_is_found_among_the_credentials(tmp_path: Path) -> None:
    assert load(environ=passed(tmp_path, f"{KEY}\n")).secrets == (KEY.encode(),)


def test_a_credential_may_hold_the_previous_secret_too(tmp_path: Path) -> None:
    assert len(load(environ=passed(tmp_path, f"{KEY}\n{KEY}2\n")).secrets) == 2


def test_a_configured_secret_file_takes_precedence(tmp_path: Path) -> None:
    file = tmp_path / "other"
    file.write_text("o" * 32)
    file.chmod(0o600)
    environ = passed(tmp_path, KEY) | {"GOLLAMA_AUTH_SECRET_FILE": str(file)}
    assert load(environ=environ).secrets == (b"o" * 32,)


def test_credentials_without_a_secret_change_nothing(tmp_path: Path) -> None:
    environ = passed(tmp_path, "x", "desk") | {"GOLLAMA_JWT_SECRET": KEY}
    assert load(environ=environ).secrets == (KEY.encode(),)


@pytest.mark.parametrize(
    ("content", "more", "line"),
    [
        ("short", {}, "credential '{}': has 5 bytes; HS256 needs at least 32 (try: "),
        ("", {}, "credential '{}': has 0 words; must hold the secret, and "),
        (
            KEY,
            {"GOLLAMA_JWT_SECRET": "e" * 40},
            "GOLLAMA_JWT_SECRET: must not be set beside the credential '{}'",
        ),
    ],
)
def test_a_credential_that_is_wrong_is_named_and_not_quoted(
    content: str, more: dict[str, str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as info:
        load(environ=passed(tmp_path, content) | more)
    assert info.value.args[0].startswith(line.format(tmp_path / "gollama.secret"))
    assert not content or content not in info.value.args[0]


def test_an_agent_finds_its_token_among_the_credentials(tmp_path: Path) -> None:
    environ = passed(tmp_path, "abc\n", "gollama.token")
    assert read_token("", environ) == "abc"
    assert read_token("", environ | {"GOLLAMA_TOKEN": "def"}) == "def"
    assert read_token("", {"CREDENTIALS_DIRECTORY": str(tmp_path / "no")}) == ""


def test_a_credential_that_is_no_token_is_named(tmp_path: Path) -> None:
    environ = passed(tmp_path, "a b", "gollama.token")
    with pytest.raises(ConfigError, match=r"credential '.*gollama\.token': holds no"):
        read_token("", environ)
