"""Real shells complete commands, flags, values and files."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gollama_proxy.cli import main, make_whole_parser
from tests.fakes.tools import require

DEADLINE = 60.0

# What is typed, words that complete it, and some that do not.
CASES = [
    ("gollama-proxy ser", {"serve"}, {"secret"}),
    ("gollama-proxy wor", {"workers"}, {"serve"}),
    ("gollama-proxy workers re", {"remove", "reset-breaker"}, {"reload"}),
    ("gollama-proxy serve --au", {"--auth"}, {"--hub"}),
    ("gollama-proxy serve --auth ", {"jwt", "off"}, {"--auth"}),
    ("gollama-proxy agent --log-level ", {"debug", "warning"}, {"jwt"}),
    ("gollama-proxy token --scope ", {"metrics", "worker", "admin"}, {"jwt"}),
    ("gollama-proxy explain --priority ", {"interactive", "batch"}, set()),
    ("gollama-proxy completion ", {"bash", "zsh", "fish"}, set()),
    ("gollama-proxy check -c set", {"settings.toml"}, {"other.toml"}),
    ("gollama-proxy usage --token-file ot", {"other.toml"}, {"settings.toml"}),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "settings.toml").touch()
    (tmp_path / "other.toml").touch()
    return tmp_path


@pytest.fixture
def script(
    request: pytest.FixtureRequest, folder: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The file that a user would install for the shell of the test's name."""
    shell = re.split(r"[_\[]", request.node.name)[1]
    assert main(["completion", shell]) == 0
    file = folder / "_gollama-proxy"
    file.write_text(capsys.readouterr().out)
    return file


def run(folder: Path, *command: str) -> list[str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# --- bash -------------------------------------------------------------------------


def in_bash(script: Path, line: str) -> set[str]:
    """Return what bash offers where the line ends."""
    words = line.split(" ")
    commands = f"""
        source {script}
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
        read -ra how <<<"$(complete -p gollama-proxy)"
        for i in "${{!how[@]}}"; do
            [ "${{how[i]}}" = -F ] && function="${{how[i + 1]}}"
        done
        "$function" gollama-proxy "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    found = run(script.parent, "bash", "--norc", "-c", commands)
    return {word.strip() for word in found}


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_bash_completes(
    script: Path, line: str, offered: set[str], absent: set[str]
) -> None:
    found = in_bash(script, line)
    assert offered <= found
    assert not absent & found


def test_bash_knows_every_flag(script: Path) -> None:
    [commands] = [
        action.choices
        for action in make_whole_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    assert in_bash(script, "gollama-proxy ") >= commands.keys()
    text = script.read_text()
    for name, parser in commands.items():
        match = re.search(rf"_{name}_option_strings=\((.*)\)", text)
        assert match
        flags = {f for action in parser._actions for f in action.option_strings}
        assert {word.strip("'") for word in match[1].split()} == flags


# --- fish -------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_fish_completes(
    script: Path, line: str, offered: set[str], absent: set[str]
) -> None:
    fish = require("fish", package="fish")
    commands = f"source {script}; complete --do-complete {shlex.quote(line)}"
    lines = run(script.parent, fish, "--no-config", "--command", commands)
    found = {line.partition("\t")[0] for line in lines}
    assert offered <= found
    assert not absent & found


# --- zsh --------------------------------------------------------------------------


class Zsh:
    """A shell at a terminal, as its completion works nowhere else."""

    def __init__(self, zsh: str, folder: Path) -> None:
        self.output = ""
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb"}
        self._terminal, inside = pty.openpty()
        self._process = subprocess.Popen(
            [zsh, "-f", "-i"],
            cwd=folder,
            env=environ,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)

    def __repr__(self) -> str:
        return f"<Zsh {self._process.pid}: {self.output[-200:]!r}>"

    def type(self, text: str) -> None:
        self.output = ""
        os.write(self._terminal, text.encode())

    def until(self, pattern: str) -> None:
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, self.output):
            ready, _, _ = select.select(
                [self._terminal], [], [], end - time.monotonic()
            )
            assert ready, f"{self!r}: no {pattern!r}"
            self.output += os.read(self._terminal, 65536).decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture
def zsh(script: Path) -> Iterator[Zsh]:
    shell = Zsh(require("zsh", package="zsh"), script.parent)
    try:
        shell.type(
            f"PS1='> ' fpath=({script.parent} $fpath); autoload -U compinit; "
            "compinit -u -D; setopt no_list_beep; echo rea''dy\n"
        )
        shell.until("ready\r?\n")
        yield shell
    finally:
        shell.close()


def test_zsh_completes(zsh: Zsh) -> None:
    for line, offered, _ in CASES:
        zsh.type(f"{line}\t\t")
        for word in offered:
            zsh.until(re.escape(word))
        zsh.type("\x15")  # Ctrl-U


# --- Mistakes ---------------------------------------------------------------------


def test_another_shell_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "nushell"]) == 2
    assert "invalid choice: 'nushell'" in capsys.readouterr().err
