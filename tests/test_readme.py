"""The README's tables are checked against the code."""

from __future__ import annotations

import json
import operator
import re
from importlib import resources
from pathlib import Path

import pytest

from gollama_proxy.cli import main, show_default
from gollama_proxy.config.load import load
from gollama_proxy.config.settings import settings
from gollama_proxy.config.values import ConfigError
from gollama_proxy.wire.errors import Code
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes.hub import SECRET

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


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
    """With their actions and flags: what is pasted has to work."""
    used = commands_in(README) + commands_in(OPERATIONS)
    described = {"secret", "check", "serve", "token", "workers", "agent", "reload"}
    assert described <= {command for command, _ in used}
    for command, rest in used:
        action = re.match(r" ([a-z-]+)\b", rest) if command == "workers" else None
        argv = [command, action[1]] if action else [command]
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*argv, "--help"])
        shown = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", rest.partition(" -- ")[0]):
            assert flag in shown, (argv, flag)


def commands_in(text: str) -> list[tuple[str, str]]:
    """Return each command and the rest of it, from blocks and from quoted words."""
    block = r"^ {4}[^\n]*?gollama-proxy ([a-z]+)((?:[^\n#)\\]|\\\n)*)"
    quoted = r"`gollama-proxy\s([a-z]+)((?:[^`])*)`"
    return re.findall(block, text, re.MULTILINE) + re.findall(quoted, text)


def test_every_call_of_the_admin_api_is_described() -> None:
    described = OPERATIONS.partition("## The admin API")[2]
    file = resources.files("gollama_proxy") / "control" / "openapi.json"
    for path, methods in json.loads(file.read_text())["paths"].items():
        called = path.rpartition("/")[2] if path.count("/") == 4 else path
        assert re.search(rf"[`/ ]{re.escape(called)}`", described), path
        for method in methods.keys() & {"get", "post", "patch", "delete"}:
            assert f"`{method.upper()}`" in described


def test_every_route_is_named() -> None:
    for path in ENDPOINTS:
        assert f"`{path}`" in README
