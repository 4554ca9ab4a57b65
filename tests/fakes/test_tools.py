"""A program that is missing skips a test, and fails it where it has to be there."""

from __future__ import annotations

import shutil

import pytest

from tests.fakes.tools import require


def test_a_program_is_found() -> None:
    assert require("sh", package="dash") == shutil.which("sh")


def test_without_it_the_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLLAMA_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install nodejs"):
        require("no-such-program", package="nodejs")


def test_in_ci_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLLAMA_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install nodejs"):
        require("no-such-program", package="nodejs")
