"""The proxies compared in front of several unequal workers, and how each is set up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.proxies import Hub, Nginx, Proxy, VllmRouter
from gollama_proxy.config.settings import POLICIES

ROUTER_POLICIES = ("cache_aware", "round_robin")


class Pool(NamedTuple):
    """The workers: their ports, and the weights that their owner declares."""

    ports: Sequence[int]
    weights: Sequence[float]


class Contestant(NamedTuple):
    name: str
    make: Callable[[Pool, Path], Proxy]


class LeastConn(Nginx):
    balance = "least_conn;"


class WeightedHub(Hub):
    """The hub with the workers' weights in its configuration."""

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
    """Return all of them; `router` is the path of vllm-router, if it is installed."""
    found = [
        Contestant("nginx round-robin", lambda pool, at: Nginx(pool.ports, at)),
        Contestant("nginx least_conn", lambda pool, at: LeastConn(pool.ports, at)),
    ]
    if router is not None:
        found += [_router(router, policy) for policy in ROUTER_POLICIES]
    return found + [_hub(policy) for policy in POLICIES]


def _router(path: str, policy: str) -> Contestant:
    def make(pool: Pool, folder: Path) -> VllmRouter:
        router = VllmRouter(path, pool.ports, folder)
        router.policy = policy
        return router

    return Contestant(f"vllm-router {policy}", make)


def _hub(policy: str) -> Contestant:
    def make(pool: Pool, folder: Path) -> Hub:
        # Weights are declared only for the policy that needs them.
        weighted = policy == "weighted"
        hub = WeightedHub(pool, folder) if weighted else Hub(pool.ports, folder)
        hub.settings["ROUTING_POLICY"] = policy
        return hub

    return Contestant(f"hub {policy}", make)
