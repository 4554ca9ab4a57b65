"""The proxies that are measured: how each is started, and what it has used up."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import jwt
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.children import (
    READY_WITHIN,
    ROOT,
    BenchmarkError,
    fetch,
    free_port,
    inherited,
    spawn,
    until,
    until_answered,
)

# Debian keeps nginx where only root's PATH looks.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


class Proxy:
    """A proxy in front of workers; a subclass says how it is started."""

    name = ""
    checkout = ROOT  # where Python finds its modules

    def __init__(self, workers: Sequence[int], folder: Path) -> None:
        """Prepare it, for the workers at these ports."""
        self.port = free_port()
        self.workers = workers
        self.folder = folder
        self.log = folder / f"{self.name.partition(' ')[0]}.log"
        self.bearers = ["none"]
        self._processes: list[psutil.Process] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} :{self.port} before {self.workers}>"

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the proxy, ready for requests, while the context lasts."""
        command, environment = self.command(), self.environment()
        async with spawn(command, self.log, environment, self.checkout) as child:
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
    """The hub of a checkout, this one or another, as it comes: with authentication."""

    name = "gollama_proxy"

    def __init__(self, workers: Sequence[int], folder: Path) -> None:
        super().__init__(workers, folder)
        self.secret = secrets.token_hex(32)
        self.bearers = [self._mint(f"user-{number}") for number in range(16)]
        self.settings: dict[str, str] = {}  # what is not as it comes

    def _mint(self, subject: str) -> str:
        claims = {"sub": subject, "exp": int(time.time()) + 86_400, "scope": "metrics"}
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def command(self) -> list[str]:
        serve = ["serve", "--port", str(self.port), *self.worker_options()]
        return [sys.executable, "-m", "gollama_proxy", *serve]

    def worker_options(self) -> list[str]:
        return [f"--worker=http://127.0.0.1:{worker}" for worker in self.workers]

    def environment(self) -> dict[str, str]:
        settings = {f"GOLLAMA_{name}": text for name, text in self.settings.items()}
        return {"GOLLAMA_JWT_SECRET": self.secret, **settings}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with super().running():
            # It has answered, so one of them is there.
            for worker in self.workers if len(self.workers) > 1 else ():
                ask = functools.partial(self.sends_to, worker)
                await until("worker of the hub", ask, READY_WITHIN)
            yield

    async def sends_to(self, worker: int) -> bool:
        """Ask whether it would send this worker a request now."""
        return await self._gauge("gollama_worker_up", worker=_name(worker)) == 1

    async def breaker_closed(self, worker: int) -> bool:
        labels = {"worker": _name(worker), "state": "closed"}
        return await self._gauge("gollama_breaker_state", **labels) == 1

    async def _gauge(self, name: str, **labels: str) -> float | None:
        page = await fetch(self.port, "/metrics", self.bearers[0])
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None


def _name(worker: int) -> str:
    """Tell what the hub calls a worker."""
    return f"127.0.0.1:{worker}"


class PassingHub(Hub):
    """The hub, with short requests that cost what passing them on costs.

    From a worker at a fixed pace, an answer that is assembled would take as long as its
    stream.
    """

    def __init__(self, workers: Sequence[int], folder: Path) -> None:
        super().__init__(workers, folder)
        self.settings |= _passing_on(self.checkout)


def before(folder: Path) -> type[PassingHub]:
    """Make the kind of proxy that is the hub of another checkout."""

    class Before(PassingHub):
        name = "before"
        checkout = folder

    return Before


def _passing_on(checkout: Path) -> dict[str, str]:
    """Have no answer assembled; how to say so depends on how old a hub is."""
    name = "UPSTREAM_ASSEMBLE"
    # Its name with the default, the help, what is allowed: a line each.
    row = re.search(rf"GOLLAMA_{name} .*\n.*\n +(.*)", _help(checkout))
    if row is None:
        return {}
    # Else a list of the routes to assemble.
    return {name: "false" if row[1] == "true or false" else ""}


@functools.cache
def _help(checkout: Path) -> str:
    """Have the hub of a checkout tell its settings.

    Raises:
        BenchmarkError: when it is not that checkout's hub that Python finds.
    """
    program = (
        "import gollama_proxy; from gollama_proxy.cli import main;"
        "print(gollama_proxy.__file__); main(['serve', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env=inherited(),
        capture_output=True,
        text=True,
    )
    file, _, told = done.stdout.partition("\n")
    if not told:
        why = done.stderr.strip().rpartition("\n")[2]
        raise BenchmarkError(f"the hub in {checkout} does not start: {why}")
    if Path(file).resolve().parent != checkout.resolve() / "gollama_proxy":
        raise BenchmarkError(f"there is no hub in {checkout}: Python finds {file}")
    return told


class Nginx(Proxy):
    """nginx with one worker process, passing on each piece as it comes."""

    name = "nginx"
    balance = ""  # round-robin
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
                {balance}
                {servers}
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
        servers = (f"server 127.0.0.1:{worker};" for worker in self.workers)
        configuration.write_text(
            self.CONFIGURATION.format(
                folder=self.folder,
                port=self.port,
                balance=self.balance,
                servers=" ".join(servers),
            )
        )
        errors = str(self.folder / "nginx-error.log")
        options = ["-p", str(self.folder), "-c", str(configuration), "-e", errors]
        return [self.path(), *options]


class PlainProxy(Proxy):
    """aiohttp's server and client with a loop between them, before one worker."""

    name = "plain aiohttp"

    def command(self) -> list[str]:
        worker = f"http://127.0.0.1:{self.workers[0]}"
        options = ["--port", str(self.port), "--worker", worker]
        return [sys.executable, "-m", "benchmarks.plain_proxy", *options]
