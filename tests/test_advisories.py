"""Libraries with known holes are neither asked for nor run with."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from aiohttp import http_parser

from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge.server import require_parser
from tests.fakes.process import bare
from tests.fakes.waiting import DEADLINE

ROOT = Path(__file__).parent.parent
# The first version without a hole that is known, and what the last one was.
FIXED = {
    # 3.14.1: pipelining without bounds; 3.14.2: smuggling through an upgrade; 3.14.3:
    # a read beyond the heap in the parser of answers.
    "aiohttp": (3, 14, 3),
    # 2.12: `crit` ignored; 2.13, 2.14: public keys taken for secrets; 2.15: a token
    # nested so deep that the error was no refusal.
    "PyJWT": (2, 15, 0),
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


@pytest.mark.parametrize("name", FIXED)
def test_what_is_installed_has_its_holes_fixed(name: str) -> None:
    assert numbers(version(name)) >= FIXED[name]


@pytest.mark.parametrize("name", FIXED)
def test_nothing_older_may_be_installed(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"]
    floor = re.search(rf"^{name}(?:\[\w+\])?>=([\d.]+),<\d+$", wanted, re.MULTILINE)
    assert floor
    assert (*numbers(floor[1]), 0)[:3] >= FIXED[name]


def test_requests_are_parsed_in_c() -> None:
    assert http_parser.HttpRequestParser is http_parser.HttpRequestParserC
    require_parser()


def test_the_parser_in_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    python = http_parser.HttpRequestParserPy
    monkeypatch.setattr(http_parser, "HttpRequestParser", python)
    with pytest.raises(ConfigError, match=r"^aiohttp: runs without its parser in C"):
        require_parser()


def test_a_hub_without_the_parser_in_c_does_not_start() -> None:
    environ = bare()
    environ |= {"AIOHTTP_NO_EXTENSIONS": "1", "GOLLAMA_JWT_SECRET": "s" * 32}
    done = subprocess.run(
        [sys.executable, "-m", "gollama_proxy", "serve", "--port", "0"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"gollama-proxy: aiohttp: runs without.*\n", done.stderr)
