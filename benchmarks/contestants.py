"""Who is compared in front of several unequal workers, and how each is set up."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.children import BenchmarkError, free_port
from benchmarks.proxies import Hub, Nginx, Proxy
from gollama_proxy.config.settings import POLICIES

ROUTER_POLICIES = ("cache_aware", "round_robin")


class Pool(NamedTuple):
    """The workers that are to be used: their ports, and what their owner declares."""

    ports: Sequence[int]
    weights: Sequence[float]


class Contestant(NamedTuple):
    name: str
    make: Callable[[Pool, Path], Proxy]


class LeastConn(Nginx):
    balance = "least_conn;"


class VllmRouter(Proxy):
    """The router of the vLLM project; it comes from the Python index."""

    name = "vllm-router"

    def __init__(self, workers: Sequence[int], folder: Path, path: str, policy: str):
        super().__init__(workers, folder)
        self._path = path
        self._policy = policy

    def command(self) -> list[str]:
        urls = [f"http://127.0.0.1:{worker}" for worker in self.workers]
        command = [self._path, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--policy", self._policy, "--worker-urls", *urls]
        # Else it takes one that may be another's.
        command += ["--prometheus-port", str(free_port())]
        return [*command, "--log-level", "error"]


class WeightedHub(Hub):
    """The hub that is told what its workers can carry."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        super().__init__(pool.ports, folder)
        self._weights = pool.weights

    def worker_options(self) -> list[str]:
        tables = [
            f'[[workers]]\nurl = "http://127.0.0.1:{port}"\nweight = {weight:g}\n'
            for port, weight in zip(self.workers, self._weights, strict=True)
        ]
        file = self.folder / "gollama.toml"
        file.write_text("\n".join(tables))
        return ["-c", str(file)]


def contestants(router: str | None) -> list[Contestant]:
    """List all of them; `router` is the path of vllm-router, where it is there."""
    found = [
        Contestant("nginx round-robin", lambda pool, at: Nginx(pool.ports, at)),
        Contestant("nginx least_conn", lambda pool, at: LeastConn(pool.ports, at)),
    ]
    if router is not None:
        found += [_router(router, policy) for policy in ROUTER_POLICIES]
    return found + [_hub(policy) for policy in POLICIES]


def _router(path: str, policy: str) -> Contestant:
    return Contestant(
        f"vllm-router {policy}",
        lambda pool, folder: VllmRouter(pool.ports, folder, path, policy),
    )


def _hub(policy: str) -> Contestant:
    def make(pool: Pool, folder: Path) -> Hub:
        # Only who chooses this one has declared weights.
        weighted = policy == "weighted"
        hub = WeightedHub(pool, folder) if weighted else Hub(pool.ports, folder)
        hub.settings["ROUTING_POLICY"] = policy
        return hub

    return Contestant(f"hub {policy}", make)


def find_router(given: str | None) -> str | None:
    """Find vllm-router: what was given, or on the PATH; None if it is not there.

    Raises:
        BenchmarkError: when what was given cannot be run.
    """
    found = shutil.which(given or "vllm-router")
    if given and not found:
        raise BenchmarkError(f"--vllm-router {given}: cannot be run")
    return found


def router_version(path: str) -> str:
    """Tell the version, which the program itself does not."""
    python = Path(path).resolve().parent / "python"
    program = "import importlib.metadata as m; print(m.version('vllm-router'))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except OSError:
        return "of unknown version"
    return done.stdout.strip() or "of unknown version"
