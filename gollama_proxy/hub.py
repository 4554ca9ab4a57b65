"""The hub: its parts, its routes, its start and drain, and a fleet that can change."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gollama_proxy.config import tls
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import Config, Revoked, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Changes, Files, compare_configs
from gollama_proxy.control.admin import Admin, UsageApi
from gollama_proxy.control.agents import AgentApi
from gollama_proxy.control.events import Events
from gollama_proxy.control.history import History, Recent
from gollama_proxy.control.page import Dashboard, Links
from gollama_proxy.control.replies import Replies
from gollama_proxy.control.views import Views
from gollama_proxy.control.workers import Follower
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.connections import ConnectionLimiter, SharedCounts
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.edge.router import MetricsServer, ModelList, Routes, Status
from gollama_proxy.edge.server import Server
from gollama_proxy.fleet.agents import Agents
from gollama_proxy.fleet.health import HealthChecker, LoadingFeeds, Watchdog
from gollama_proxy.fleet.registry import Listener, Registry
from gollama_proxy.fleet.state import Source, WorkerState
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.proxy.tokens import Fitting
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.state.local import LocalState
from gollama_proxy.tasks import spawn
from gollama_proxy.telemetry import logs
from gollama_proxy.telemetry.accesslog import Outcome
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.upstream import probe
from gollama_proxy.upstream.names import Groups, look_up
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.upstream.probe import send_magic

if TYPE_CHECKING:
    from gollama_proxy.cluster import Cluster
    from gollama_proxy.control.peers import Peers
    from gollama_proxy.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)

BATCH = 100  # workers that are added between two turns of the event loop

_FAILED = (Outcome.ERROR, Outcome.REFUSED)


class Hub(Listener):
    """Puts the parts together; only this class knows all of them."""

    proxy: Proxy

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        state: LocalState | None = None,
        load: Callable[[], Config] | None = None,
    ) -> None:
        """Put the parts together; without `state`, nothing outlives this hub.

        `load` reads the settings again, and may block; it raises ConfigError.  Without
        it, only certificates and revoked tokens are read again.  Certificates are read,
        so this blocks.
        """
        self.config = config
        self._load = load
        self.state = LocalState() if state is None else state
        self.ledger = self.state.ledger
        self.ledger.reconfigure(config.usage.days)
        self.draining = False
        self.registry = Registry(config, clock)
        self.balancer = Balancer(self.registry, config, clock)
        self.files = Files(config, load and self.reload_soon, self._follow_list)
        # Also those of removed workers, until their last answer has ended.
        self.connections: dict[Worker, ConnectionPool] = {}
        self.clock = clock
        self.waker = Waker(config.wake, self._send_magic, clock)
        self.queue = Queue(self.balancer, config.queue, clock, waker=self.waker)
        shared = SharedCounts(config.process) if config.process.number else None
        self.clients = ConnectionLimiter(config.limits, clock, shared)
        self.fitting = Fitting(self.registry, self._count)
        self.telemetry = Telemetry(
            self.registry,
            self.queue.admission,
            self.clients,
            clock,
            self.connections,
            self.fitting.prompts.likely_tokens,
            self._certificate_expires,
        )
        self.telemetry.reconfigure(config.metrics)
        self.authenticator = Authenticator(config)
        self.status = Status(
            self._is_ready,
            self.telemetry,
            self.authenticator,
            lambda: self.config.metrics.open,
            lambda: bool(self.scrapes),
        )
        self.scrapes = MetricsServer(self.status, self.telemetry.ended, clock)
        self.health = HealthChecker(config.health, self._ping)
        self.loading = LoadingFeeds(self._follow_loading)
        self.watchdog = Watchdog(self.registry, self._prove, self._each_second)
        self.quotas = Quotas(clock, self.ledger)
        self.agents = Agents(config.agents, clock)
        self._agent_api = AgentApi(self)
        self.links = Links(clock)
        self.views = Views(self)
        self.recent = Recent()
        self.history = History(self.recent, clock)
        self.events = Events(self.views, self.history, lambda: self.proxy)
        self.replies = Replies(self, self.views)
        self.peers: Peers | None = None  # the other hubs, with `state.url`
        self.changing = asyncio.Lock()
        self.follower = Follower(self)
        self.proxy = Proxy(
            config,
            self.routes(),
            self.authenticator,
            self.quotas,
            self.registry,
            self.balancer,
            self.queue,
            self.connections,
            self.fitting,
            self.health.look,
            self._ended,
            clock,
        )
        self._server: Server | None = None
        self._reloading = asyncio.Lock()
        self._reload: asyncio.Task[Changes | ConfigError] | None = None  # the last one
        self.groups = Groups(config.health, look_up, self._follow_groups, clock)
        self.groups.follow(config.workers)
        for part in (
            self,
            self.health,
            self.loading,
            self.waker,
            self.events,
        ):
            self.registry.subscribe(part)
        self.follower.restore()
        self.cluster = self._make_cluster() if config.state.url else None

    def __repr__(self) -> str:
        state = "draining" if self.draining else "running" if self._server else "new"
        return f"<Hub {state} workers={len(self.registry.workers)}>"

    def routes(self) -> Routes:
        """Return the handlers of what the hub answers itself, by path and method."""
        model_list = ModelList(self.authenticator, self.registry)
        return {
            "/livez": {"GET": self.status.live},
            "/readyz": {"GET": self.status.ready},
            "/health": {"GET": self.status.ready},
            "/v1/health": {"GET": self.status.ready},
            "/metrics": {"GET": self.status.metrics},
            "/v1/models": {"GET": model_list.list_models},
            "/models": {"GET": model_list.list_models},
            "/v1/models/": {"GET": model_list.show_model},
            "/models/": {"GET": model_list.show_model},
            **Admin(self, self.views).routes(),
            **UsageApi(self).routes(),
            **self._agent_api.routes(),
            **Dashboard(self).routes(),
        }

    def _make_cluster(self) -> Cluster:
        from gollama_proxy.cluster import Cluster  # its client library is optional

        return Cluster(self)

    def _ended(self, x: Exchange) -> None:
        self.telemetry.ended(x)
        if x.spans is not None:
            x.spans.end(x, _asked(x))
        if x.model:  # else it was refused before anything was used
            self.ledger.add(x, failed=x.outcome in _FAILED)
        if not x.routine:
            self.recent.add(x)
        if self.events.active:
            self.events.observe("ended", x)

    def _is_ready(self) -> bool:
        usable = not (self.draining or self.authenticator.suspended)
        return usable and self.registry.ready

    def _certificate_expires(self) -> float | None:
        credentials = self.files.for_clients
        return None if credentials is None else credentials.expires()

    async def _ping(self, worker: Worker) -> probe.Finding:
        target = self.connections[worker].target
        return await probe.ping(target, self.config.health)

    async def _follow_loading(
        self, worker: Worker, note: Callable[[str, float | None], None]
    ) -> bool:
        target = self.connections[worker].target
        return await probe.follow_loading(target, note, self.config.health)

    async def _prove(self, worker: Worker, model: str) -> bool | None:
        target = self.connections[worker].target
        return await probe.prove(target, model, self.config.timeouts.allowance)

    async def _count(
        self, worker: Worker, path: str, model: str, body: bytes
    ) -> int | None:
        connections = self.connections.get(worker)
        if connections is None:
            return None  # it was removed in the meantime
        return await probe.count_tokens(connections.target, path, model, body)

    def _each_second(self, late: float) -> None:
        self.telemetry.note_lag(late)
        # What arrived while the event loop was held up is read after this, and no
        # worker is to blame for it.
        self.proxy.check(self.clock() - late)
        self._check_sleepers()
        self.queue.look_again()
        for lease in self.agents.expire():
            ending = self._agent_api.remove(lease, "its agent is silent")
            _ = spawn(ending, f"end of the lease of {lease.name}")
        self.loading.check()
        self.ledger.save_soon()
        for connections in self.connections.values():
            connections.close_stale()

    # --- What outlives the hub ----------------------------------------------------

    def _follow_list(self, listed: Revoked) -> None:
        self.follower.follow_list(listed)

    async def revoke(self, kind: str, value: str) -> None:
        """Revoke a token ("jti") or a subject ("sub"), also for later hubs.

        Raises:
            StateError: too many are revoked.
        """
        await self.state.revoke(kind, value)
        self.follower.put_revocations_in_force()

    # --- Machines that sleep ------------------------------------------------------

    def wake(self, name: str) -> Worker:
        """Wake the machine of a worker; harmless if it does not sleep.

        Raises:
            LookupError: there is no such worker.
            ConfigError: its hardware address is not known.
        """
        worker = self.registry.find(name)
        if not worker.config.mac:
            raise ConfigError(f"workers.mac: the worker {name!r} has none")
        if worker.state is WorkerState.ASLEEP:
            self.waker.wake(worker)
        return worker

    def _send_magic(self, worker: Worker) -> None:
        send_magic(worker.config.mac, self.config.wake.broadcast)

    def _check_sleepers(self) -> None:
        if not any(each.config.mac for each in self.registry.workers):
            return
        admission = self.queue.admission
        waits = [
            (self.registry.pool(model), admission.expected_wait(model))
            for model in admission.wanted()
        ]
        self.waker.check(waits, self.registry.workers)

    # --- Settings that change -----------------------------------------------------

    async def reload(self) -> Changes:
        """Read the settings and all files of theirs again, and apply what has changed.

        The result is logged in one line.  A caller that is cancelled leaves it running.

        Raises:
            ConfigError: they are not valid.  Nothing has changed then.
        """
        result = await asyncio.shield(self.reload_soon())
        if isinstance(result, ConfigError):
            raise result
        return result

    def reload_soon(self, *, log: bool = True) -> asyncio.Task[Changes | ConfigError]:
        """Begin to reload; the task returns the result, which is logged with `log`."""
        self._reload = spawn(self._reload_all(log), "reload")
        return self._reload

    @property
    def reload_refused(self) -> bool:
        """Whether the last reload found settings that are not valid."""
        last = self._reload
        done = last is not None and last.done() and not last.cancelled()
        return last is not None and done and isinstance(last.result(), ConfigError)

    async def _reload_all(self, log: bool) -> Changes | ConfigError:
        async with self._reloading:
            try:
                changes = await self.apply(await asyncio.to_thread(self._read))
            except ConfigError as exc:
                if log:
                    text = "the settings are not valid, so the old ones stay in force: "
                    logger.error("%s%s", text, "; ".join(exc.args))
                self.telemetry.note_reload(valid=False)
                return exc
            self.telemetry.note_reload(valid=True)
            await self.files.reload()
            if log:
                logger.info("settings were read again: %s", changes)
            return changes

    def _read(self) -> Config:
        self.files.note()
        return self.config if self._load is None else self._load()

    async def apply(self, config: Config) -> Changes:
        """Let new requests have these settings and workers; running ones keep theirs.

        Workers that did not come from settings stay.

        Raises:
            ConfigError: the workers are not consistent, a file cannot be used, or the
                hub would be open to all.  Nothing has changed then.
        """
        async with self.changing:
            changes, config = compare_configs(
                replace(self.config, workers=self._declared()), config
            )
            check_exposure(config)
            self.registry.check(self._expanded(config.workers))
            await self.files.drop_unused()
            credentials = await self.files.read(self.config, config)
            await asyncio.to_thread(Authenticator, config)  # checks the keys for tokens
            self.registry.check(self._expanded(config.workers))
            if self._server is not None:
                tls_now = credentials or self.files.for_clients
                await self.scrapes.open(config, tls_now)
            self.authenticator.reconfigure(config)
            before, self.config = self.config, config
            self._reconfigure(before, credentials)
            self.groups.follow(config.workers)
            # A thousand workers would hold up the event loop, and with it all answers.
            while not self.registry.apply(self._expanded(config.workers), most=BATCH):
                self.follower.restore_holds()
                await asyncio.sleep(0)
            self.follower.retry()
            self.follower.restore_holds()
            await self.files.follow(before, config, credentials)
            await self.scrapes.reconfigure(config, credentials)
            return changes

    def _reconfigure(self, before: Config, credentials: tls.Credentials | None) -> None:
        config = self.config
        self.registry.reconfigure(config)
        self.balancer.reconfigure(config)
        self.waker.reconfigure(config.wake)
        self.queue.reconfigure(config.queue)
        self.clients.reconfigure(config.limits)
        if config.health != before.health:
            self.health.reconfigure(config.health)
            self.groups.reconfigure(config.health)
        self.agents.reconfigure(config.agents)
        self.ledger.reconfigure(config.usage.days)
        self.telemetry.reconfigure(config.metrics)
        for worker, connections in self.connections.items():
            connections.reconfigure(worker.config, config)
        self.proxy.reconfigure(config)
        if self._server is not None:
            self._server.reconfigure(config, credentials)
        if config.log != before.log:
            logs.reconfigure(config.log)

    def _expanded(self, configs: Sequence[WorkerConfig]) -> list[WorkerConfig]:
        """Return the workers of the file with the members of groups in their place."""
        others = (w for w in self.registry.workers if w.source is not Source.FILE)
        return self.groups.expand(configs, (worker.config for worker in others))

    def _follow_groups(self) -> None:
        """Take up other members of the groups; all other workers stay as they are."""
        self.registry.apply(self._expanded(self._declared()))

    def _declared(self) -> tuple[WorkerConfig, ...]:
        """Return the workers and groups of the file, as operators have changed them."""
        fixed = [
            worker.config
            for worker in self.registry.workers
            if worker.source is Source.FILE and not worker.config.parent
        ]
        groups = [each for each in self.config.workers if each.is_group]
        return (*fixed, *groups)

    def added(self, worker: Worker) -> None:
        if worker in self.connections:
            return  # it was removed, and is back before it was gone
        known = self.files.take(worker, worker.config)
        self.connections[worker] = ConnectionPool(
            worker.config, self.config, self.clock, known, worker.surplus
        )

    def replaced(self, worker: Worker, before: WorkerConfig) -> None:
        self.connections[worker].reconfigure(worker.config, self.config)

    def removed(self, worker: Worker) -> None:
        lease = self.agents.find(worker.name)
        if lease is not None and lease.worker.origin == worker.config.origin:
            self.agents.release(worker.name)  # an operator has removed it

    def gone(self, worker: Worker) -> None:
        self.connections.pop(worker).close()
        self.files.give_back(worker)

    # --- Life ---------------------------------------------------------------------

    async def start(
        self,
        listeners: Sequence[socket.socket] = (),
        for_metrics: Sequence[socket.socket] = (),
        *,
        accept: bool = True,
    ) -> None:
        """Listen for clients and start the health checks; no worker has to be up.

        With `listeners`, which listen already, the hub serves on these instead of
        `server.host` and `server.port`, and closes them when it drains; `for_metrics`
        are in addition to `metrics.listen`.  Unless it is to `accept` connections, they
        wait until `accept()`, or for another process.

        Raises:
            OSError: the address is in use, or not one of this machine.
            ConfigError: the same, of one for metrics; or traces cannot be sent, or the
                store cannot be used.
        """
        if self.cluster is not None:
            await self.cluster.open()
        try:
            self._server = await self._listen(listeners, for_metrics, accept)
        except BaseException:
            if self.cluster is not None:
                await self.cluster.close()
            raise
        if self.cluster is not None:
            await self.cluster.start(self.url)
        self.groups.start()
        self.health.start()
        self.watchdog.start()
        self.events.start()
        self.files.start()
        # In a thread, or the first token would hold up the event loop.
        if not self.authenticator.preloaded:
            await asyncio.to_thread(self.authenticator.preload)

    async def _listen(
        self,
        listeners: Sequence[socket.socket],
        for_metrics: Sequence[socket.socket],
        accept: bool,
    ) -> Server:
        server = self.config.server
        found = Server(
            self.proxy,
            self.config,
            self.proxy.refused,
            self.clients,
            self.files.for_clients,
        )
        await found.listen(server.host, server.port, listeners, accept=accept)
        try:
            await self.scrapes.open(self.config, self.files.for_clients, for_metrics)
            if self.config.tracing.enabled:
                self.proxy.tracer = await asyncio.to_thread(self._make_tracer)
        except ConfigError:
            found.stop_listening()
            await self.scrapes.close()
            raise
        return found

    def _make_tracer(self) -> Tracer | None:
        from gollama_proxy.telemetry.tracing import Tracer  # OpenTelemetry is optional

        return Tracer.configured(self.config.tracing)

    @property
    def url(self) -> str:
        """The URL for clients, with the actual port."""
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """The URLs for clients; one that begins with unix: is the path of a socket."""
        assert self._server is not None, self
        return self._server.urls

    async def accept(self) -> None:
        """Take the connections that wait; harmless when it does, or drains."""
        if self._server is not None:
            await self._server.accept()

    async def ready(self) -> None:
        """Wait until every worker has been checked once."""
        await self.groups.looked_up()
        await self.health.first_round()

    async def known(self) -> None:
        """Wait until every worker has listed its models, or was down."""
        await self.health.described()

    async def drain(self) -> None:
        """Stop listening, let answers end (`server.drain`), and close everything."""
        if self._server is None:
            return
        self.draining = True
        self.events.close()
        server, self._server = self._server, None
        server.stop_listening()
        await self.proxy.drain(self.config.server.drain)
        await server.close()
        if self._reload is not None:
            await asyncio.wait([self._reload])
        await self.follower.stop()  # before the checks of workers that it may add
        await self.files.stop()
        await self.events.stop()
        await self.watchdog.stop()
        await self.loading.stop()
        await self.groups.stop()
        await self.health.stop()
        await self.scrapes.close()
        if self.cluster is not None:
            await self.cluster.close()
        for connections in self.connections.values():
            connections.close()
        if self.proxy.tracer is not None:
            await self.proxy.tracer.close()

    async def abort(self) -> None:
        """Cut running answers; a `drain` in progress then returns at once."""
        self.events.close()
        self.proxy.cut()
        await self.drain()


def _asked(x: Exchange) -> dict[str, str | int | float | bool]:
    """Return what a client has requested, as attributes of a span."""
    asked: dict[str, str | int | float | bool] = {"gollama.class": x.priority.value}
    body = x.body_so_far
    if body is not None and x.endpoint.generates:
        asked["gen_ai.request.stream"] = body.stream
        if body.max_tokens:
            asked["gen_ai.request.max_tokens"] = body.max_tokens
    return asked
