"""The page of the manual: whole, and without mistakes of its markup."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from gollama_proxy.cli import make_whole_parser
from gollama_proxy.config.settings import VARIABLES, settings
from tests.fakes.tools import require
from tools import manual


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("manual") / "gollama-proxy.1"
    file.write_text(manual.page())
    return file


def mandoc(*arguments: str | Path) -> str:
    program = require("mandoc", package="mandoc")
    command = [program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_its_markup_is_right(page: Path) -> None:
    assert mandoc("-T", "lint", page) == ""


def test_it_has_every_command_flag_and_setting(page: Path) -> None:
    text = re.sub(r".\x08", "", mandoc("-T", "utf8", "-O", "width=500", page))
    words = set(re.findall(r"[\w./-]+", text))
    parsers = [make_whole_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                assert words >= action.choices.keys()
            elif not {"-h", "--version"}.intersection(action.option_strings):
                assert words.issuperset(action.option_strings)
    for row in settings():
        assert {row.key, row.env} <= words
    assert words >= VARIABLES.keys()


def test_it_ends_with_the_exit_status_and_examples(page: Path) -> None:
    text = re.sub(r".\x08", "", mandoc("-T", "utf8", page))
    for status in (0, 1, 2, 130):
        assert re.search(rf"^ +{status} +\w", text, re.MULTILINE)
    assert "gollama-proxy token --sub alice" in text


def test_it_has_the_date_of_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert " 1970-01-02 " in manual.page().splitlines()[0]
