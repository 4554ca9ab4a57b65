"""The reference pages describe the program as it is."""

from __future__ import annotations

import json
import operator
import re
from importlib import resources
from pathlib import Path

import pytest

from gollama_proxy.cli import main, show_default
from gollama_proxy.config.load import load
from gollama_proxy.config.settings import Config, settings
from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge.auth import LIMITS
from gollama_proxy.hub import Hub
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire.errors import Code
from gollama_proxy.wire.headers import TraceContext
from gollama_proxy.wire.schema import ENDPOINTS
from tests.docs.blocks import SHOWN, blocks
from tests.docs.parts import PAGES, ROOT, fill, name_of, parts
from tests.fakes.hub import SECRET

API = (ROOT / "docs" / "api.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()

EXAMPLES = [
    file
    for file in (ROOT / "examples").rglob("*")
    if file.is_file() and file.suffix not in (".md", ".pyc", ".json")
]
COMMANDS = ("serve", "secret", "token", "check", "demo", "agent", "workers", "top")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_generated_parts_are_current(page: Path) -> None:
    text = page.read_text()
    assert fill(text) == text, "run `make docs`"


def test_every_generated_part_has_a_place() -> None:
    text = "".join(page.read_text() for page in PAGES)
    places = re.findall("^<!-- generated: (.+) -->$", text, re.MULTILINE)
    assert set(places) == set(parts())


def test_every_setting_is_in_the_table() -> None:
    """With the default, the limits and the help that the program has."""
    rows = [line for line in CONFIGURATION.splitlines() if line.startswith("| `")]
    for row in settings():
        line = f"| `{row.key}` | `{show_default(row)}` | {row.help}; {row.allowed} |"
        assert line in rows


def test_time_limits_are_shown_with_their_defaults() -> None:
    defaults = {row.key: row.default for row in settings()}
    shown = (ROOT / "docs" / "failures.md").read_text().partition("## Time limits")[2]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", shown, re.MULTILINE)
    assert len(rows) > 5
    for keys, times in rows:
        for key, time in zip(keys.split(", "), times.split(", "), strict=True):
            default = defaults[key.strip("`")]
            assert time == (f"{default:g} s" if default else "no limit"), key


def test_the_rule_for_variables_holds() -> None:
    """A variable that is named by it is read: nonsense in it is an error."""
    for row in settings():
        variable = f"GOLLAMA_{row.key.replace('.', '_').upper()}"
        with pytest.raises(ConfigError, match=re.escape(row.key)):
            load(None, {"GOLLAMA_JWT_SECRET": SECRET, variable: "\x00nonsense"})
    [(key, variable)] = re.findall("The variable of `(.+)` is `(.+)`", CONFIGURATION)
    loaded = load(None, {"GOLLAMA_JWT_SECRET": SECRET, variable: "7"})
    assert operator.attrgetter(key)(loaded) == 7


def test_every_error_is_explained() -> None:
    codes = re.findall(r"^\| (\d{3}) \| `(\w+)` \| \S.* \|$", API, re.MULTILINE)
    assert sorted(codes) == sorted((str(code.status), code.value) for code in Code)


def test_the_commands_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """With their actions and flags: what is pasted has to work."""
    used = [command for page in SHOWN for command in commands_in(page)]
    described = {"secret", "check", "serve", "token", "workers", "agent", "reload"}
    assert described <= {command for command, _ in used}
    used += [command for file in EXAMPLES for command in commands_in(file)]
    helps: dict[tuple[str, ...], str] = {}
    for command, rest in used:
        action = re.match(r" ([a-z-]+)\b", rest) if command == "workers" else None
        argv = (command, action[1]) if action else (command,)
        if argv not in helps:
            with pytest.raises(SystemExit, match=r"^0$"):
                main([*argv, "--help"])
            helps[argv] = capsys.readouterr().out
        shown = helps[argv]
        for flag in re.findall(r"--[a-z-]+", rest.partition(" -- ")[0]):
            assert flag in shown, (argv, flag)


def commands_in(page: Path) -> list[tuple[str, str]]:
    """Return each command and the rest of it, from blocks and from quoted words.

    In a file that is no page, they are in comments, or are what the file is for.
    """
    typed = r"gollama-proxy ([a-z]+)((?:[^\n#)\\]|\\\n)*)"
    if page.suffix != ".md":
        found = re.findall(typed, page.read_text())
        return [(command, rest) for command, rest in found if command in COMMANDS]
    quoted = r"`gollama-proxy\s([a-z]+)((?:[^`])*)`"
    return [
        found
        for block in blocks(page)
        if block.language in ("shell", "console")
        for found in re.findall(typed, block.code)
    ] + re.findall(quoted, page.read_text())


def test_every_call_of_the_admin_api_is_described() -> None:
    described = API.partition("## The admin API")[2]
    file = resources.files("gollama_proxy") / "control" / "openapi.json"
    for path, methods in json.loads(file.read_text())["paths"].items():
        for method in methods.keys() & {"get", "post", "patch", "delete"}:
            assert f"\n#### {method.upper()} {path}\n" in described


def test_every_route_is_named() -> None:
    for path in ENDPOINTS:
        assert f"| `{path}` |" in API


def test_every_route_of_the_hub_itself_is_named() -> None:
    described = API.partition("These are answered by the hub itself")[2]
    for path, methods in Hub(Config()).routes().items():
        if path.startswith(("/admin/", "/agent/", "/dashboard", "/models")):
            continue
        name = path + "{id}" if path == "/v1/models/" else path
        row = re.search(rf"^\| `(.+?)` \|.*`{name}`.* \|$", described, re.MULTILINE)
        assert row, path
        assert row[1] in methods


def test_every_claim_of_a_token_is_described() -> None:
    for claim in LIMITS:
        flag = "--" + claim.replace("_", "-")
        assert f"| `{claim}` | `{flag}` |" in API


def test_the_fields_of_a_log_line_are_those_of_the_table() -> None:
    record = Record(
        *("1", "GET"),
        path="/x",
        remote="10.0.0.1",
        subject="alice",
        model="tiny",
        worker="gpu1",
        attempts=1,
        rescued=1,
        fell_back="other",
        status=200,
        outcome=Outcome.COMPLETE,
        error="no_worker_available",
        detail="x",
        bytes=1,
        tokens=1,
        prompt_tokens=1,
        cached_tokens=1,
        first_byte=1.0,
        duration=1.0,
        trace=TraceContext("1" * 32, "1" * 16, True, ""),
    )
    page = (ROOT / "docs" / "monitoring.md").read_text()
    _, _, table = page.partition("### Fields of a request")
    rows = re.findall(r"^\| (`.+?) \|", table.partition("\n### ")[0], re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(record.fields())
