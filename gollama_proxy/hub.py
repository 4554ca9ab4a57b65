"""The hub: its parts, its routes, its life from start to drain."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from gollama_proxy.config import tls
from gollama_proxy.config.keys import RevocationList
from gollama_proxy.config.settings import Config
from gollama_proxy.config.watch import Watched, Watcher
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.connections import Connections
from gollama_proxy.edge.models import Catalogue
from gollama_proxy.edge.router import Dispatcher, Routes
from gollama_proxy.edge.server import Server
from gollama_proxy.edge.status import Status
from gollama_proxy.fleet.health import HealthChecker
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.watchdog import Watchdog
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Inference
from gollama_proxy.proxy.fitting import Fitting
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.upstream import probe, tokenizer
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire.openai import ENDPOINTS


class Hub:
    """Puts the parts together; nothing else knows all of them."""

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.draining = False
        self.registry = Registry(config, clock)
        self.balancer = Balancer(self.registry, config, clock)
        self._tls = tls.for_server(config.server)
        self._worker_tls = tls.for_workers(config.workers)
        self.connections = {
            worker.name: ConnectionPool(
                worker.config,
                config,
                clock,
                self._worker_tls.get(worker.name),
                worker.surplus,
            )
            for worker in self.registry.workers
        }
        self.queue = Queue(self.balancer, config.queue, clock)
        self.clients = Connections(config.limits, clock)
        self.telemetry = Telemetry(
            self.registry, self.queue.admission, self.clients, clock
        )
        self.authenticator = Authenticator(config)
        self.health = HealthChecker(self.registry.workers, config.health, self._ping)
        self.watchdog = Watchdog(
            self.registry.workers,
            config.timeouts,
            self._prove,
            clock,
            then=self._each_second,
        )
        self.dispatcher = Dispatcher(self._routes(clock), config, self.telemetry, clock)
        credentials = {*self._worker_tls.values(), *([self._tls] if self._tls else [])}
        watched: list[Watched] = [each for each in credentials if each.renewable]
        if config.auth.revoked:
            apply = self.authenticator.revoke
            revoked = RevocationList(config.auth.revoked, config.revoked, apply)
            watched.append(revoked)
        self._watcher = Watcher(watched)
        self._runner: web.ServerRunner | None = None

    def __repr__(self) -> str:
        state = "draining" if self.draining else "running" if self._runner else "new"
        return f"<Hub {state} workers={len(self.registry.workers)}>"

    def _routes(self, clock: Callable[[], float]) -> Routes:
        status = Status(
            lambda: self.registry.ready and not self.draining,
            self.telemetry,
            None if self.config.metrics.open else self.authenticator,
        )
        catalogue = Catalogue(self.authenticator, self.registry)
        inference = Inference(
            self.config,
            self.authenticator,
            self.registry,
            self.balancer,
            self.connections,
            self.watchdog,
            self.queue,
            Fitting(self.registry, self._count),
            self.health.look,
            clock,
        )
        return {
            "/livez": {"GET": status.live},
            "/readyz": {"GET": status.ready},
            "/health": {"GET": status.ready},
            "/v1/health": {"GET": status.ready},
            "/metrics": {"GET": status.metrics},
            "/v1/models": {"GET": catalogue.list_models},
            "/models": {"GET": catalogue.list_models},
            "/v1/models/": {"GET": catalogue.show_model},
            "/models/": {"GET": catalogue.show_model},
            **{path: {"POST": inference.handle} for path in ENDPOINTS},
        }

    async def _ping(self, worker: Worker) -> probe.Finding:
        target = self.connections[worker.name].target
        return await probe.ping(target, self.config.health)

    async def _prove(self, worker: Worker, model: str) -> bool | None:
        target = self.connections[worker.name].target
        return await probe.prove(target, model, self.config.timeouts.allowance)

    async def _count(
        self, worker: Worker, path: str, model: str, body: bytes
    ) -> int | None:
        target = self.connections[worker.name].target
        return await tokenizer.count(target, path, model, body)

    def _each_second(self) -> None:
        self.queue.look_again()
        for connections in self.connections.values():
            connections.close_stale()

    # --- Life ---------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and start to look after the workers; none of them has to be there.

        Raises:
            OSError: the address is taken or not ours.
        """
        server = self.config.server
        runner = web.ServerRunner(
            Server(
                self.dispatcher,
                self.config,
                self.dispatcher.refused,
                self.clients,
                self._tls,
            ),
            shutdown_timeout=1.0,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, server.host, server.port, backlog=1024).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.health.start()
        self.watchdog.start()
        self._watcher.start()

    def reload(self) -> None:
        """Reread certificates and revocations soon; running answers are unaffected."""
        self._watcher.reload()

    @property
    def url(self) -> str:
        """The address that clients use, with the port that was really taken."""
        assert self._runner is not None, self
        host, port = self._runner.addresses[0][:2]
        scheme = "http" if self._tls is None else "https"
        return (
            f"{scheme}://[{host}]:{port}"
            if ":" in host
            else f"{scheme}://{host}:{port}"
        )

    async def ready(self) -> None:
        """Wait until every worker has been asked once how it is."""
        await self.health.first_round()

    async def known(self) -> None:
        """Wait until every worker has said what it serves, or was down."""
        await self.health.described()

    async def drain(self) -> None:
        """Stop accepting, let running answers end within the limit, release all."""
        if self._runner is None:
            return
        self.draining = True
        runner, self._runner = self._runner, None
        for site in runner.sites:
            await site.stop()
        await self.dispatcher.finish(self.config.server.drain)
        await runner.cleanup()
        await self._watcher.stop()
        await self.watchdog.stop()
        await self.health.stop()
        for connections in self.connections.values():
            connections.close()

    async def abort(self) -> None:
        """Cut everything now; a `drain` that is under way then returns at once."""
        self.dispatcher.cut()
        await self.drain()
