"""The lock files agree with what setup.cfg and requirements-build.in ask for."""

from __future__ import annotations

import configparser
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_advisories import FIXED, numbers

ROOT = Path(__file__).parent.parent


@dataclass
class Pin:
    """One package of a lock file, the packages that need it, and its hashes."""

    version: str
    marker: str
    hashes: list[str]
    needed_by: list[str] = field(default_factory=list)


def read_lock(file: Path) -> dict[str, Pin]:
    pins: dict[str, Pin] = {}
    for block in re.split(r"\n(?=[a-z0-9])", file.read_text()):
        head = re.match(r"([\w.-]+)==(\S+)(?: ; (.+?))? \\$", block, re.MULTILINE)
        if head:
            comment = " ".join(re.findall(r"^ +#(?: +via)?(.*)", block, re.MULTILINE))
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
            pins[head[1]] = Pin(head[2], head[3] or "", hashes, comment.split())
        else:
            assert re.fullmatch(r"(#.*\n?)+", block), f"no pin: {block}"
    return pins


def locked_extras() -> list[str]:
    """Return the extras that `make lock` includes."""
    command = ["make", "--dry-run", "--always-make", "lock"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"--extra (\w+)", done.stdout)


def wanted_of_program() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"]]
    lists += [setup["options.extras_require"][extra] for extra in locked_extras()]
    return requirements("\n".join(lists))


def wanted_of_builds() -> list[Requirement]:
    return requirements((ROOT / "requirements-build.in").read_text())


def requirements(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


LOCKS = {
    "requirements.lock": wanted_of_program,
    "requirements-build.lock": wanted_of_builds,
}


@pytest.mark.parametrize("file", LOCKS)
def test_each_requirement_is_locked_at_a_version_that_satisfies_it(file: str) -> None:
    pins = read_lock(ROOT / file)
    for wanted in LOCKS[file]():
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin, f"{file} lacks {wanted}: `make lock`"
        assert wanted.specifier.contains(pin.version), f"{wanted}: `make lock`"


@pytest.mark.parametrize("file", LOCKS)
def test_nothing_is_locked_without_a_reason(file: str) -> None:
    pins = read_lock(ROOT / file)
    wanted = {canonicalize_name(requirement.name) for requirement in LOCKS[file]()}
    sources = {"gollama-proxy", "(setup.cfg)", "-r", "requirements-build.in"}
    for name, pin in pins.items():
        assert pin.needed_by, f"{file} does not state what needs {name}"
        assert (name in wanted) == bool(sources.intersection(pin.needed_by)), (
            f"{file}: nothing needs {name}: `make lock`"
        )
        assert sources | pins.keys() >= set(pin.needed_by)


@pytest.mark.parametrize("file", LOCKS)
def test_each_package_has_hashes(file: str) -> None:
    for name, pin in read_lock(ROOT / file).items():
        assert pin.hashes, f"{file} has no hash of {name}"
        assert len(set(pin.hashes)) == len(pin.hashes)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_each_requirement_is_locked_for_each_platform(python: str, system: str) -> None:
    pins = read_lock(ROOT / "requirements.lock")
    platform = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for wanted in wanted_of_program():
        if wanted.marker is not None and not wanted.marker.evaluate(platform):
            continue  # an extra that is not for this platform
        marker = pins[canonicalize_name(wanted.name)].marker
        assert not marker or Marker(marker).evaluate(platform)


@pytest.mark.parametrize("name", FIXED)
def test_no_version_with_a_known_hole_is_locked(name: str) -> None:
    pins = read_lock(ROOT / "requirements.lock")
    assert numbers(pins[canonicalize_name(name)].version) >= FIXED[name]
