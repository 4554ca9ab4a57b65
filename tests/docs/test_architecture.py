"""ARCHITECTURE.md describes the program as it is."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from tests.docs.parts import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def test_every_path_in_it_exists() -> None:
    paths = re.findall(r"`([\w/.-]+(?:/|\.py|\.md|\.cfg))`", TEXT)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "gollama_proxy" / path).exists(), path


def test_every_function_in_it_exists() -> None:
    """A name with parentheses, such as `Queue.acquire()`, is defined in the package."""
    modules = [path.read_text() for path in (ROOT / "gollama_proxy").rglob("*.py")]
    names = re.findall(r"`(?:(\w+)\.)?(\w+)\(\)`", TEXT)
    assert len(names) > 20
    for owner, name in names:
        homes = [each for each in modules if f"\nclass {owner}" in each or not owner]
        pattern = rf"^ *(async )?def {name}\b"
        assert any(re.search(pattern, each, re.MULTILINE) for each in homes), name


def test_the_packages_are_listed_in_the_order_of_the_import_contract() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    layers = setup["importlinter:contract:layers"]["layers"]
    contract = re.findall(r"gollama_proxy\.(\w+)", layers)
    packages = [
        name for name in contract if Path(ROOT / "gollama_proxy" / name).is_dir()
    ]
    rows = re.findall(r"^\| `(\w+)/` \|", TEXT, re.MULTILINE)
    assert rows == packages
