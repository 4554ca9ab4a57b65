"""The proxies that are measured: how each is started, and what it has used."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
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
    inherited,
    spawn,
    until,
    until_answered,
)
from gollama_proxy.children import Child
from gollama_proxy.machine import find_free_ports

# Debian keeps nginx where only root's PATH looks.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


class Proxy:
    """A proxy in front of workers; subclasses return the command that starts it."""

    name = ""
    checkout = ROOT  # where Python finds its modules

    def __init__(self, workers: Sequence[int], folder: Path) -> None:
        """Prepare it, for the workers at these ports."""
        [self.port] = find_free_ports(1)
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
        async with self.started() as child:
            await until_answered(self.port, self.bearers[0], child)
            process = psutil.Process(child.process.pid)
            self._processes = [process, *process.children(recursive=True)]
            yield

    @contextlib.asynccontextmanager
    async def started(self, *, tethered: bool = True) -> AsyncIterator[Child]:
        """Start the proxy, which ends with the context; it may not be ready yet."""
        async with spawn(
            self.command(),
            self.log,
            self.environment(),
            self.checkout,
            tethered=tethered,
        ) as child:
            yield child

    def signal(self, number: signal.Signals) -> None:
        self._processes[0].send_signal(number)

    def cpu_seconds(self) -> float:
        """Return the CPU time that all its processes and threads have used."""
        return sum(map(cpu_seconds, self._processes))

    def memory(self) -> int:
        """Return the resident bytes of the process that does the work."""
        return max(process.memory_info().rss for process in self._processes)


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time that a process and its threads have used."""
    if sys.platform == "linux":
        # What clock_getcpuclockid(3) returns: nanoseconds, where psutil has ticks.
        return time.clock_gettime((~process.pid << 3) | 2)
    times = process.cpu_times()
    return times.user + times.system


class Hub(Proxy):
    """The hub of a checkout, with its defaults: authentication, metrics, access log."""

    name = "gollama_proxy"

    def __init__(self, workers: Sequence[int], folder: Path) -> None:
        super().__init__(workers, folder)
        self.secret = secrets.token_hex(32)
        self.bearers = [self._mint(f"user-{number}") for number in range(16)]
        self.settings: dict[str, str] = {}  # those that differ from the defaults

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
        """Return whether it would send this worker a request now."""
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
    """Return the name that the hub gives a worker."""
    return f"127.0.0.1:{worker}"


def before(folder: Path) -> type[Hub]:
    """Return the class of the hub of another checkout.

    Raises:
        BenchmarkError: Python finds no hub there, or another one.
    """
    _check(folder)

    class Before(Hub):
        name = "before"
        checkout = folder

    return Before


def _check(checkout: Path) -> None:
    program = "import gollama_proxy.cli; print(gollama_proxy.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env=inherited(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise BenchmarkError(f"the hub in {checkout} does not start: {why}")
    file = done.stdout.strip()
    if Path(file).resolve().parent != checkout.resolve() / "gollama_proxy":
        raise BenchmarkError(f"there is no hub in {checkout}: Python finds {file}")


# --- Other programs ---------------------------------------------------------------


class Nginx(Proxy):
    """nginx in one process, passing on each piece as it comes.

    After a stream llama-server closes its connection, although its headers promise to
    keep it.  nginx would send the next request on it and answer 502; so it is not to
    reuse these.
    """

    name = "nginx"
    balance = ""  # round-robin
    CONFIGURATION = """
        daemon off;
        master_process off;  # one process, which a signal to it ends
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
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            upstream reused {{
                {balance}
                {servers}
                keepalive 64;
                keepalive_requests 1000000;
            }}
            upstream streaming {{
                {balance}
                {servers}
            }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                keepalive_requests 1000000;
                location / {{ proxy_pass http://reused; }}
                location /v1/chat/ {{ proxy_pass http://streaming; }}
            }}
        }}
    """

    @classmethod
    def find(cls) -> str | None:
        """Return the path of the program, or None where it is not installed."""
        return shutil.which("nginx", path=SEARCH_PATH)

    @classmethod
    def path(cls) -> str:
        """Return the path of the program.

        Raises:
            BenchmarkError: it is not installed; the text describes how to install it.
        """
        path = cls.find()
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


class HAProxy(Proxy):
    """HAProxy with one thread; like nginx, it reuses no connection of a stream."""

    name = "HAProxy"
    CONFIGURATION = """
global
    nbthread 1
    maxconn 4500
defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend clients
    bind 127.0.0.1:{port} backlog 4096
    use_backend streaming if {{ path_beg /v1/chat/ }}
    default_backend reused
backend reused
    http-reuse always
    {servers}
backend streaming
    http-reuse never
    option http-server-close
    {servers}
"""

    @classmethod
    def find(cls) -> str | None:
        """Return the path of the program, or None where it is not installed."""
        return shutil.which("haproxy", path=SEARCH_PATH)

    @classmethod
    def version(cls) -> str:
        path = cls.find()
        assert path
        done = subprocess.run([path, "-v"], capture_output=True, text=True)
        found = re.search(r"version ([\d.]+)", done.stdout)
        return found[1] if found else "of unknown version"

    def command(self) -> list[str]:
        configuration = self.folder / "haproxy.cfg"
        servers = (f"server w{port} 127.0.0.1:{port}" for port in self.workers)
        configuration.write_text(
            self.CONFIGURATION.format(port=self.port, servers="\n    ".join(servers))
        )
        path = self.find()
        assert path
        return [path, "-db", "-f", str(configuration)]


class Prototype(Proxy):
    """The proxy without features, before one worker."""

    name = "prototype"

    def command(self) -> list[str]:
        worker = f"127.0.0.1:{self.workers[0]}"
        options = ["--port", str(self.port), "--worker", worker]
        return [sys.executable, "-m", "benchmarks.prototype", *options]


class Router(Proxy):
    """A router in Rust that is distributed as a Python package, with its defaults."""

    policy = ""  # the program's default

    def __init__(self, path: str, workers: Sequence[int], folder: Path) -> None:
        """Prepare it; `path` is that of the program."""
        super().__init__(workers, folder)
        self.path = path

    @classmethod
    def find(cls, given: str | None) -> str | None:
        """Return the path given, or of the program on the PATH; None without one.

        Raises:
            BenchmarkError: the path given is not that of a program.
        """
        found = shutil.which(given or cls.name)
        if given and not found:
            raise BenchmarkError(f"--{cls.name} {given}: not an executable file")
        return found

    @classmethod
    def version(cls, path: str) -> str:
        """Return the version of the package, which the program does not print."""
        python = Path(path).resolve().parent / "python"
        program = f"import importlib.metadata as m; print(m.version({cls.name!r}))"
        try:
            done = subprocess.run(
                [python, "-c", program], capture_output=True, text=True
            )
        except OSError:
            return "of unknown version"
        return done.stdout.strip() or "of unknown version"

    def command(self) -> list[str]:
        urls = [f"http://127.0.0.1:{worker}" for worker in self.workers]
        command = [self.path, *self.subcommand()]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--policy", self.policy] if self.policy else []
        [port] = find_free_ports(1)  # the default one may be in use
        command += ["--prometheus-port", str(port)]
        return [*command, "--log-level", "error", "--worker-urls", *urls]

    def subcommand(self) -> list[str]:
        return []


class VllmRouter(Router):
    """The router of the vLLM project."""

    name = "vllm-router"


class Smg(Router):
    """The Shepherd Model Gateway, once SGLang's router."""

    name = "smg"

    def subcommand(self) -> list[str]:
        return ["launch"]
