"""The proxies that are measured, and how any child process is started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import jwt
import psutil

ROOT = Path(__file__).parent.parent
# Debian keeps nginx where only root's PATH looks.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
GRACE = 5.0
READY_WITHIN = 15.0


class BenchmarkError(Exception):
    """Why there is no result; the text is for the person who ran the benchmark."""


# --- The proxies ------------------------------------------------------------------


class Proxy:
    """A proxy in front of one worker; a subclass says how it is started."""

    name = ""

    def __init__(self, worker_port: int, folder: Path) -> None:
        self.port = free_port()
        self.worker_port = worker_port
        self.folder = folder
        self.log = folder / f"{self.name.partition(' ')[0]}.log"
        self.bearers = ["none"]
        self._processes: list[psutil.Process] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} :{self.port} before :{self.worker_port}>"

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the proxy, ready for requests, while the context lasts."""
        async with spawn(self.command(), self.log, self.environment()) as child:
            await until_answered(self.port, self.bearers[0], child, self.log)
            process = psutil.Process(child.pid)
            self._processes = [process, *process.children(recursive=True)]
            yield

    def cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)

    def memory(self) -> int:
        """Return the resident bytes of the process that does the work."""
        return max(process.memory_info().rss for process in self._processes)


class Hub(Proxy):
    """This repository's hub as it comes, with authentication."""

    name = "gollama_proxy"

    def __init__(self, worker_port: int, folder: Path) -> None:
        super().__init__(worker_port, folder)
        self._secret = secrets.token_hex(32)
        self.bearers = [self._mint(f"user-{number}") for number in range(16)]

    def _mint(self, subject: str) -> str:
        claims = {"sub": subject, "exp": int(time.time()) + 86_400}
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def command(self) -> list[str]:
        worker = f"http://127.0.0.1:{self.worker_port}"
        serve = ["serve", "--port", str(self.port), "--worker", worker]
        return [sys.executable, "-m", "gollama_proxy", *serve]

    def environment(self) -> dict[str, str]:
        # A short request is to cost what passing it on costs: from a worker at a fixed
        # pace, an answer that is assembled would take as long as its stream.
        return {
            "GOLLAMA_JWT_SECRET": self._secret,
            "GOLLAMA_UPSTREAM_ASSEMBLE": "false",
        }


class Nginx(Proxy):
    """nginx with one worker process, passing on each piece as it comes."""

    name = "nginx"
    CONFIGURATION = """
        daemon off;
        worker_processes 1;
        pid {folder}/nginx.pid;
        error_log {folder}/nginx-error.log warn;
        events {{ worker_connections 16384; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            scgi_temp_path {folder}/scgi;
            uwsgi_temp_path {folder}/uwsgi;
            upstream worker {{
                server 127.0.0.1:{worker_port};
                keepalive 64;
                keepalive_requests 1000000;
            }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                keepalive_requests 1000000;
                location / {{
                    proxy_pass http://worker;
                    proxy_http_version 1.1;
                    proxy_set_header Connection "";
                    proxy_buffering off;
                }}
            }}
        }}
    """

    @staticmethod
    def path() -> str:
        """Find the program.

        Raises:
            BenchmarkError: when it is not installed, with the way to get it.
        """
        path = shutil.which("nginx", path=SEARCH_PATH)
        if path is None:
            raise BenchmarkError(
                "nginx is not installed, and the figures are ratios to it;"
                " on Debian or Ubuntu: apt-get install nginx-light"
            )
        return path

    @classmethod
    def version(cls) -> str:
        done = subprocess.run([cls.path(), "-v"], capture_output=True, text=True)
        return done.stderr.partition("/")[2].strip() or "of unknown version"

    def command(self) -> list[str]:
        configuration = self.folder / "nginx.conf"
        configuration.write_text(
            self.CONFIGURATION.format(
                folder=self.folder, port=self.port, worker_port=self.worker_port
            )
        )
        errors = str(self.folder / "nginx-error.log")
        options = ["-p", str(self.folder), "-c", str(configuration), "-e", errors]
        return [self.path(), *options]


class PlainProxy(Proxy):
    """aiohttp's server and client with a loop between them."""

    name = "plain aiohttp"

    def command(self) -> list[str]:
        worker = f"http://127.0.0.1:{self.worker_port}"
        options = ["--port", str(self.port), "--worker", worker]
        return [sys.executable, "-m", "benchmarks.plain_proxy", *options]


# --- Children ---------------------------------------------------------------------

_prctl = getattr(ctypes.CDLL(None), "prctl", None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Have the kernel end this child should its parent be killed (Linux only)."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.asynccontextmanager
async def spawn(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a child while the context lasts; what it writes to stderr goes to the log."""
    # The reader's own settings of the hub must not change what is measured.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=_opened(log),
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield child
    finally:
        await _end(child)


def _opened(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


async def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(GRACE):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()


async def until_answered(
    port: int, bearer: str, child: asyncio.subprocess.Process, log: Path
) -> None:
    """Wait until a chat completion is answered with 200.

    Raises:
        BenchmarkError: when it ended, or was not ready in time.
    """
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {bearer}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        "Content-Length: 71\r\n\r\n"
        '{"model": "paced", "messages": [{"role": "user", "content": "Ready?"}]}'
    )
    status = b"no answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_WITHIN):
            while child.returncode is None:
                with contextlib.suppress(OSError):
                    status = await _status(port, request.encode())
                if status.startswith(b"HTTP/1.1 200 "):
                    return
                await asyncio.sleep(0.1)
    what = "is not ready" if child.returncode is None else "ended"
    raise BenchmarkError(f"{log.stem} {what}: {status.decode()}; {last_words(log)}")


async def _status(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return (await reader.readline()).strip()
    finally:
        writer.close()


def last_words(log: Path) -> str:
    """Return the end of what a child wrote to stderr."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-5:]) or "no word on stderr"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
