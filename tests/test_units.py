"""The units, as `make install-service` installs them, and as systemd reads them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gollama_proxy.config.load import load
from gollama_proxy.config.settings import Server
from tests.fakes.tools import require

TOP = Path(__file__).parent.parent
UNITS = ("gollama-proxy.service", "gollama-proxy.socket", "gollama-proxy-agent.service")
SERVICES = ("gollama-proxy.service", "gollama-proxy-agent.service")
# Of 100; systemd calls 10 to 49 "OK", and a service without any restriction has 96.
MOST_EXPOSED = 20

Unit = dict[str, dict[str, list[str]]]


def read(path: Path) -> Unit:
    """Read a unit as systemd does: a name may come twice, a line may go on."""
    sections: Unit = {}
    section: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = sections.setdefault(header[1], {})
            continue
        name, equals, value = line.partition("=")
        assert equals, line
        assert name.isalnum(), line
        section.setdefault(name, []).append(value.strip())
    return sections


def make(*arguments: str, **environ: str) -> str:
    """Run `make`, with more variables, and return what it prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "DESTDIR")}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=TOP,
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install into a folder, with a program that stands for the real one."""
    folder = tmp_path_factory.mktemp("root")
    program = folder / "opt/gollama-proxy/.venv/bin/gollama-proxy"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    install(folder)
    return folder


def install(folder: Path) -> str:
    secret = f"{sys.executable} -m gollama_proxy secret"
    return make("install-units", f"DESTDIR={folder}", f"NEW_SECRET={secret}")


# --- make install-service ---------------------------------------------------------


def test_what_is_installed(root: Path) -> None:
    etc = root / "etc/gollama-proxy"
    assert {each.name for each in (root / "etc/systemd/system").iterdir()} == {*UNITS}
    assert (etc / "gollama.secret").stat().st_mode & 0o777 == 0o600
    assert (etc / "gollama.toml").stat().st_mode & 0o777 == 0o644
    assert (root / "opt/gollama-proxy/share/doc/service.md").exists()


def test_the_installed_settings_and_secret_can_be_used(root: Path) -> None:
    etc = root / "etc/gollama-proxy"
    environ = {"CREDENTIALS_DIRECTORY": str(etc)}
    assert len(load(etc / "gollama.toml", environ).secrets) == 1


def test_a_second_run_changes_no_settings_and_no_secret(root: Path) -> None:
    etc = root / "etc/gollama-proxy"
    (etc / "gollama.toml").write_text("# mine\n")
    secret = (etc / "gollama.secret").read_text()
    unit = root / "etc/systemd/system/gollama-proxy.service"
    unit.write_text("# old\n")
    install(root)
    assert (etc / "gollama.toml").read_text() == "# mine\n"
    assert (etc / "gollama.secret").read_text() == secret
    assert "ExecStart" in unit.read_text()


def test_another_prefix_is_used_everywhere(tmp_path: Path) -> None:
    make("install-units", f"DESTDIR={tmp_path}", "PREFIX=/srv/hub", "NEW_SECRET=true")
    units = tmp_path / "etc/systemd/system"
    assert not any("/opt/" in (units / each).read_text() for each in UNITS)
    assert "/srv/hub/.venv/bin/" in (units / SERVICES[0]).read_text()


def test_uninstalling_leaves_settings_and_secret(tmp_path: Path) -> None:
    install(tmp_path)
    make("uninstall-service", f"DESTDIR={tmp_path}")
    left = {each.name for each in tmp_path.rglob("*") if each.is_file()}
    assert left == {"gollama.toml", "gollama.secret"}


def test_only_units_that_are_there_are_stopped(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    for name, line in {
        "id": "echo 0",
        "systemctl": f'echo "$@" >> {calls}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / UNITS[0]).write_text("")
    places = [f"{name}={tmp_path}" for name in ("PREFIX", "UNITS", "BINDIR")]
    uninstall = ("uninstall-service", *places)
    path = f"{tmp_path}:{os.environ['PATH']}"
    make(*uninstall, PATH=path)
    make(*uninstall, PATH=path)
    stopped, *reloads = calls.read_text().splitlines()
    assert stopped == f"disable --now {UNITS[0]}"
    assert reloads == ["daemon-reload"] * 2


def test_a_dry_run_changes_nothing_and_shows_all(tmp_path: Path) -> None:
    shown = make("-n", "install-service", f"DESTDIR={tmp_path}")
    assert not list(tmp_path.iterdir())
    for word in ("--require-hashes", *UNITS, "gollama.toml", "gollama.secret"):
        assert word in shown, word


@pytest.mark.parametrize("folder", ["root", "root/", "./root"])
def test_a_program_in_a_package_starts_the_python_beside_it(
    folder: str, tmp_path: Path
) -> None:
    """What `pip` has written is the path at the time of packaging."""
    program = tmp_path / "root/srv/hub/.venv/bin/gollama-proxy"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{program.parent}/python\nimport sys\n")
    shown = make("-n", "install-program", f"DESTDIR={folder}", "PREFIX=/srv/hub")
    (edit,) = (line for line in shown.splitlines() if line.startswith("sed "))
    subprocess.run(shlex.split(edit), cwd=tmp_path, check=True, timeout=60)
    expected = "#!/srv/hub/.venv/bin/python\nimport sys\n"
    assert program.read_text() == expected


def test_help_lists_both() -> None:
    shown = make("help")
    assert "make install-service" in shown
    assert "make uninstall-service" in shown


# --- systemd's own checks ---------------------------------------------------------


def analyze(*arguments: str | Path) -> None:
    command = (require("systemd-analyze", package="systemd"), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gollama" not in done.stderr  # it may warn of other units of the machine


def test_systemd_finds_no_fault_in_the_units(root: Path, tmp_path: Path) -> None:
    for each in UNITS:
        text = (root / "etc/systemd/system" / each).read_text()
        (tmp_path / each).write_text(text.replace("/opt/", f"{root}/opt/"))
    analyze("verify", "--recursive-errors=no", *(tmp_path / each for each in UNITS))


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_little_exposed(name: str, root: Path, tmp_path: Path) -> None:
    unit = shutil.copy(root / "etc/systemd/system" / name, tmp_path)
    analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", unit)


# --- What the units promise -------------------------------------------------------


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, root: Path) -> dict[str, list[str]]:
    return read(root / "etc/systemd/system" / request.param)["Service"]


def test_a_service_speaks_the_notify_protocol(service: dict[str, list[str]]) -> None:
    assert service["Type"] == ["notify"]
    assert service["NotifyAccess"] == ["main"]
    assert float(service["WatchdogSec"][0]) >= 10
    assert service["Restart"] == ["on-failure"]


def test_a_drain_has_its_time(service: dict[str, list[str]]) -> None:
    assert float(service["TimeoutStopSec"][0]) > Server().drain
    assert service["KillSignal"] == ["SIGTERM"]


def test_a_service_has_no_privileges(service: dict[str, list[str]]) -> None:
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome"):
        assert service[name] == ["yes"], name
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["SystemCallFilter"][0] == "@system-service"


def test_the_hub_starts_with_what_is_installed(root: Path) -> None:
    hub = read(root / "etc/systemd/system/gollama-proxy.service")["Service"]
    program, *arguments = hub["ExecStart"][0].split()
    assert (root / program[1:]).exists()
    assert arguments == ["serve", "-c", "/etc/gollama-proxy/gollama.toml"]
    name, _, file = hub["LoadCredential"][0].partition(":")
    assert name == "gollama.secret"
    assert (root / file[1:]).exists()
    assert hub["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert hub["StateDirectory"] == ["gollama-proxy"]


def test_the_socket_has_the_hubs_address(root: Path) -> None:
    socket = read(root / "etc/systemd/system/gollama-proxy.socket")["Socket"]
    assert socket["ListenStream"] == [f"{Server().host}:{Server().port}"]
