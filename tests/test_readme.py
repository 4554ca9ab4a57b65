"""The README's tables are checked against the code."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest

from gollama_proxy.cli import main, show_default
from gollama_proxy.config.load import load
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import settings
from gollama_proxy.wire.errors import Code
from gollama_proxy.wire.openai import ENDPOINTS
from tests.fakes.hub import SECRET

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_setting_is_in_the_table() -> None:
    """With the default, the limits and the help that the program has."""
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    for row in settings():
        line = f"| `{row.key}` | `{show_default(row)}` | {row.help}; {row.allowed} |"
        assert line in rows


def test_the_rule_for_variables_holds() -> None:
    """A variable that is named by it is read: nonsense in it is an error."""
    for row in settings():
        variable = f"GOLLAMA_{row.key.replace('.', '_').upper()}"
        with pytest.raises(ConfigError, match=re.escape(row.key)):
            load(None, {"GOLLAMA_JWT_SECRET": SECRET, variable: "\x00nonsense"})
    [(key, variable)] = re.findall("The variable of `(.+)` is `(.+)`", README)
    loaded = load(None, {"GOLLAMA_JWT_SECRET": SECRET, variable: "7"})
    assert operator.attrgetter(key)(loaded) == 7


def test_every_error_is_explained() -> None:
    codes = re.findall(r"^\| (\d{3}) \| `(\w+)` \| \S.* \|$", README, re.MULTILINE)
    assert sorted(codes) == sorted((str(code.status), code.value) for code in Code)


def test_the_commands_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """With their flags: what is pasted has to work."""
    pattern = r"^ {4}[^\n]*?gollama-proxy ([a-z]+)((?:[^\n#)]|\\\n)*)"
    used = re.findall(pattern, README, re.MULTILINE)
    assert {"secret", "check", "serve", "token"} <= {command for command, _ in used}
    for command, rest in used:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--help"])
        shown = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in shown, (command, flag)


def test_every_route_is_named() -> None:
    for path in ENDPOINTS:
        assert f"`{path}`" in README
