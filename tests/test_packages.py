"""The wheel, and the one file with everything, which needs only a Python."""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import msgspec
import pytest

from gollama_proxy import __version__
from tests.fakes.client import DEADLINE, Wire
from tests.fakes.hub import mint
from tests.fakes.process import Program
from tests.fakes.replies import chunk, done, finish, last_chunk, sse_head, token
from tests.fakes.script import send, wait
from tests.fakes.tools import missing
from tests.fakes.worker import ScriptedWorker
from tools import launch

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
SECRET = "0123456789abcdef" * 2


def make(target: str) -> None:
    """Have make build a package, if it is older than the program.

    Processes that test side by side wait for each other here.
    """
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    DIST.mkdir(exist_ok=True)
    with (DIST / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["make", "--silent", "--old-file", ".venv/.installed", target],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        missing(f"make {target} failed: {done.stdout[-2000:]}")


# --- Wheel and source archive -----------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> zipfile.Path:
    make("wheel")
    [file] = DIST.glob("*.whl")
    assert file.name == f"gollama_proxy-{__version__}-py3-none-any.whl"
    return zipfile.Path(file)


def test_the_wheel_has_every_file_of_the_program(wheel: zipfile.Path) -> None:
    package = ROOT / "gollama_proxy"
    files = {path for path in package.rglob("*") if path.is_file()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix != ".pyc" and not path.name.startswith(".")
    }
    packed = {
        name
        for name in wheel.root.namelist()
        if name.startswith("gollama_proxy/") and not name.endswith("/")
    }
    assert packed == wanted
    for name in ("py.typed", "control/openapi.json", "control/dashboard/app.js"):
        assert f"gollama_proxy/{name}" in packed


def test_the_wheel_is_small(wheel: zipfile.Path) -> None:
    [file] = DIST.glob("*.whl")
    assert file.stat().st_size < 700_000


def test_the_wheel_states_its_command_and_licence(wheel: zipfile.Path) -> None:
    about = wheel / f"gollama_proxy-{__version__}.dist-info"
    command = "gollama-proxy = gollama_proxy.cli:main"
    assert command in (about / "entry_points.txt").read_text()
    metadata = (about / "METADATA").read_text()
    assert "\nLicense-File: LICENSE\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_the_wheel_installs_a_manual_and_completions(wheel: zipfile.Path) -> None:
    share = wheel / f"gollama_proxy-{__version__}.data" / "data" / "share"
    assert (share / "man/man1/gollama-proxy.1").read_text().startswith(".TH ")
    shells = {
        "bash-completion/completions/gollama-proxy": "-F _shtab_gollama_proxy",
        "zsh/site-functions/_gollama-proxy": "#compdef gollama-proxy",
        "fish/vendor_completions.d/gollama-proxy.fish": "complete -c gollama-proxy",
    }
    for name, text in shells.items():
        assert text in (share / name).read_text()


def test_the_source_archive_can_build_the_wheel(wheel: zipfile.Path) -> None:
    with tarfile.open(DIST / f"gollama_proxy-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "setup.py", "README.md", "LICENSE"} <= names
    assert "gollama_proxy/control/openapi.json" in names
    assert not any(name.startswith(("tests/", ".venv")) for name in names)


# --- One file ---------------------------------------------------------------------


class Machine:
    """A folder with the file alone, and a Python without any package."""

    def __init__(self, folder: Path) -> None:
        make("pyz")
        self.folder = folder / "empty"
        self.folder.mkdir()
        self.file = shutil.copy(DIST / "gollama-proxy.pyz", self.folder)
        self.home = folder / "home"
        self.home.write_text("no folder")  # not even root can write there
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        venv.create(folder / "python", symlinks=True)
        self.python = folder / "python" / "bin" / "python"
        self.first = self.run("--version")  # it is unpacked, which takes a while

    def __repr__(self) -> str:
        return f"<Machine {self.folder}>"

    @property
    def environ(self) -> dict[str, str]:
        return {"HOME": str(self.home), "TMPDIR": str(self.temporary)}

    def run(
        self,
        *arguments: str,
        python: str | Path = "",
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python or self.python, self.file, *arguments],
            cwd=self.folder,
            env=self.environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def running(
        self, *arguments: str, environ: Mapping[str, str]
    ) -> AbstractAsyncContextManager[Program]:
        return Program.running(
            *arguments,
            environ=environ,
            program=(self.file,),
            python=self.python,
            cwd=self.folder,
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def test_one_file_is_all_that_is_needed(machine: Machine) -> None:
    done = machine.first
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"gollama-proxy {__version__}\n"
    assert [*machine.folder.iterdir()] == [Path(machine.file)]
    assert os.access(machine.file, os.X_OK)


def test_one_file_is_small(machine: Machine) -> None:
    assert Path(machine.file).stat().st_size < 25_000_000


def test_it_is_unpacked_for_its_user_only(machine: Machine) -> None:
    [place] = machine.temporary.glob("gollama-proxy-*")
    assert place.name == f"gollama-proxy-{os.geteuid()}"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_the_server_for_several_processes_can_be_started(machine: Machine) -> None:
    [place] = machine.temporary.glob("gollama-proxy-*")
    servers = [*place.rglob("valkey-server")]
    if sys.platform == "linux" and platform.machine() == "x86_64":
        done = subprocess.run(
            [servers[0], "--version"], check=True, capture_output=True, text=True
        )
        assert done.stdout.startswith("Valkey server ")
    else:
        assert servers == []  # there is no wheel for this machine


def test_a_token_is_made_without_any_other_file(machine: Machine) -> None:
    done = machine.run(
        "token", "--sub", "alice", environ={"GOLLAMA_JWT_SECRET": SECRET}
    )
    assert done.returncode == 0
    assert done.stdout.count(".") == 2


async def test_it_serves_with_an_agent_from_the_same_file(machine: Machine) -> None:
    variables = machine.environ | {"GOLLAMA_JWT_SECRET": SECRET}
    async with (
        ScriptedWorker() as worker,
        machine.running("serve", "--port", "0", environ=variables) as hub,
    ):
        match = await hub.until(r"listening on (http://127\.0\.0\.1:(\d+))")
        arguments = ("--hub", match[1], "--worker", worker.url)
        variables["GOLLAMA_TOKEN"] = mint(SECRET, sub="desk", scope="worker")
        async with machine.running("agent", *arguments, environ=variables) as agent:
            await agent.until("registered")
            await until_ready(int(match[2]))
            worker.script(
                send(sse_head() + chunk(token("a"))),
                wait("seen"),
                send(chunk(finish() + done()) + last_chunk()),
            )
            async with await Wire.connect("127.0.0.1", int(match[2])) as wire:
                question = {"model": "tiny", "stream": True, "messages": []}
                alice = mint(SECRET, sub="alice")
                await wire.post("/v1/chat/completions", question, alice)
                assert token("a") == await wire.read_event()
                worker.release("seen")
                assert (await wire.read_events())[-1] == done()
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0
        hub.signal(signal.SIGTERM)
        assert await hub.ended() == 0
    assert "Traceback" not in hub.output + agent.output


async def until_ready(port: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            async with await Wire.connect("127.0.0.1", port) as wire:
                await wire.get("/readyz")
                if (await wire.read_response()).status == 200:
                    return
            await asyncio.sleep(0.02)


def test_the_demo_names_what_it_lacks(machine: Machine) -> None:
    done = machine.run("demo", "--port", "0", environ={"PATH": "/nonexistent"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert "found no llama-server and no model: give --llama-server PATH" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


async def test_the_demo_prints_commands_that_run_the_same_file(
    machine: Machine,
) -> None:
    async with ScriptedWorker() as worker:
        arguments = ("demo", "--port", "0", "--worker", worker.url)
        async with machine.running(*arguments, environ=machine.environ) as hub:
            await hub.until(rf" {machine.python} {machine.file} top\n")


def other_pythons() -> Iterator[Path]:
    """Yield an interpreter of each other version that is on this machine."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    folders = [Path("/usr/bin"), *Path("~/.pyenv/versions").expanduser().glob("*/bin")]
    for version in {"3.11", "3.12", "3.13"} - {here}:
        programs = (folder / f"python{version}" for folder in folders)
        if program := next(filter(Path.exists, programs), None):
            yield program


def test_it_starts_with_every_python_that_it_is_for(machine: Machine) -> None:
    """As it does with this one, in the tests above."""
    for python in other_pythons():
        # An event loop, parsers and all other compiled modules are loaded on the way.
        done = machine.run("demo", python=python, environ={"PATH": "/nonexistent"})
        assert done.returncode == 2, python
        assert "found no llama-server" in done.stderr


def test_the_same_contents_make_the_same_file(machine: Machine, tmp_path: Path) -> None:
    library = Path(msgspec._core.__file__)
    python = ROOT / ".venv" / "tools" / "bin" / "python"
    made = []
    for number in (1, 2):
        folder = tmp_path / f"site-{number}"
        (folder / "package").mkdir(parents=True)
        shutil.copy(library, folder / "package")
        for name in ("a.py", "b.py")[:: 1 if number == 1 else -1]:
            (folder / "package" / name).write_text(name)
            os.utime(folder / "package" / name, (number * 1e9, number * 1e9))
            (folder / "package" / name).chmod(0o600 if number == 1 else 0o664)
        output = tmp_path / f"{number}.pyz"
        subprocess.run(
            [python, ROOT / "tools" / "pyz.py", output, folder],
            env={"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": "1700000000"},
            check=True,
        )
        made.append(output.read_bytes())
    assert made[0] == made[1]


# --- Where it is unpacked ---------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders that are tried, in their order; each is named in the environment."""
    found = {
        "CACHE_DIRECTORY": tmp_path / "systemd",
        "XDG_CACHE_HOME": tmp_path / "cache",
        "TMPDIR": tmp_path / "tmp",
    }
    for name, place in found.items():
        monkeypatch.setenv(name, str(place))
        place.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", None)  # which is read once otherwise
    return found


def test_a_service_unpacks_in_the_cache_that_systemd_gives_it(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.find_folder() == str(places["CACHE_DIRECTORY"])
    monkeypatch.setenv("CACHE_DIRECTORY", f"{places['CACHE_DIRECTORY']}:/second")
    assert launch.find_folder() == str(places["CACHE_DIRECTORY"])


def test_a_user_unpacks_in_the_own_cache(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CACHE_DIRECTORY")
    assert launch.find_folder() == str(places["XDG_CACHE_HOME"] / "gollama-proxy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(places["TMPDIR"]))
    assert launch.find_folder() == str(places["TMPDIR"] / ".cache" / "gollama-proxy")


def test_a_user_without_home_and_name_unpacks_in_the_folder_for_temporary_files(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def has_no_name(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", has_no_name)
    expected = places["TMPDIR"] / f"gollama-proxy-{os.geteuid()}"
    assert launch.find_folder() == str(expected)


@pytest.mark.parametrize(
    "danger", ["file", "link", "open to others", "of another user"]
)
def test_a_folder_that_others_can_write_to_is_not_used(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, danger: str
) -> None:
    monkeypatch.delenv("CACHE_DIRECTORY")
    usual = places["XDG_CACHE_HOME"] / "gollama-proxy"
    shared = places["TMPDIR"] / f"gollama-proxy-{os.geteuid()}"
    for place in (usual, shared):
        match danger:
            case "file":
                place.write_text("")
            case "link":
                place.symlink_to(places["CACHE_DIRECTORY"])
            case "open to others":
                place.mkdir()
                place.chmod(0o777)
            case "of another user":
                place.mkdir()
    if danger == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    folder = Path(launch.find_folder())
    assert folder.parent == places["TMPDIR"]
    assert folder != shared
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_python_is_an_error_that_names_the_right_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = ["cpython-37-sparc-linux-gnu", "cpython-38-sparc-linux-gnu"]
    monkeypatch.setitem(sys.modules, "built_for", SimpleNamespace(TAGS=tags))
    with pytest.raises(SystemExit) as ended:
        launch.start()
    assert ended.value.code == 2
    text = f"gollama-proxy: this file is for {tags[0]}, {tags[1]}; this Python is "
    assert capsys.readouterr().err.startswith(text)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    tags = [EXTENSION_SUFFIXES[0].split(".")[1]]
    monkeypatch.setitem(sys.modules, "built_for", SimpleNamespace(TAGS=tags))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIV_ROOT", str(tmp_path / "file" / "folder"))
    with pytest.raises(SystemExit) as ended:
        launch.start()
    assert ended.value.code == 2
    text = f"gollama-proxy: SHIV_ROOT = '{tmp_path}/file/folder': must be a folder"
    assert capsys.readouterr().err.startswith(text)
