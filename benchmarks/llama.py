"""Real llama-servers with a tiny model, as the workers of a benchmark."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import spawn, until_answered
from gollama_proxy.children import Child
from gollama_proxy.commands import demo
from gollama_proxy.machine import find_free_ports


@dataclass(frozen=True)
class Build:
    """What a server runs: a model of random weights, and slots for it."""

    layers: int = 2  # twice as many make it half as fast
    width: int = 64  # the wider, the slower a prompt compared with an answer
    slots: int = 4
    context: int = 256  # of a slot

    def model(self, folder: Path) -> Path:
        """Return the path of the model, which is written once.

        All models have the same file name, so that the servers serve one model.
        """
        path = folder / f"{self.layers}-{self.width}" / "tiny.gguf"
        if not path.exists():
            # Imported here because numpy is slow to import.
            from tests.real.gguf_tiny import write_tiny_gguf

            path.parent.mkdir()
            write_tiny_gguf(path, layers=self.layers, dim=self.width)
        return path


class LlamaServer:
    """A running llama-server, which can be stopped at any moment."""

    def __init__(self, child: Child, port: int) -> None:
        self.port = port
        self._child = child

    def __repr__(self) -> str:
        return f"<LlamaServer :{self.port} pid={self.pid}>"

    @property
    def name(self) -> str:
        """The name that the hub gives it."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._child.process.pid

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it while the context lasts: its port accepts, but nothing answers."""
        self._child.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._child.signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def llama_servers(
    builds: Sequence[Build], folder: Path
) -> AsyncIterator[list[LlamaServer]]:
    """Run llama-servers, ready for requests, while the context lasts.

    Raises:
        ChildError: llama-server is not installed, or ended.
    """
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for build in builds:
            binary, model = demo.find_files(None, str(build.model(folder)))
            [port] = find_free_ports(1)
            child = await demo.start_server(
                binary, model, port, folder, slots=build.slots, context=build.context
            )
            stack.push_async_callback(child.end)
            await until_answered(port, "none", child)
            servers.append(LlamaServer(child, port))
        yield servers


@contextlib.asynccontextmanager
async def taking_turns(
    servers: Sequence[LlamaServer], folder: Path
) -> AsyncIterator[None]:
    """Let servers share the cores in turns while the context lasts."""
    pids = [str(server.pid) for server in servers]
    command = [sys.executable, "-m", "benchmarks.throttle", *pids]
    async with spawn(command, folder / "throttle.log") as child:
        yield
        assert child.process.stdin
        child.process.stdin.close()
        await child.process.wait()
