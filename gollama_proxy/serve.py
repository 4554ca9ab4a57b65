"""Runs a hub in this process, from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from msgspec import structs

from gollama_proxy.config import addresses
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import Config, Server
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Changes
from gollama_proxy.edge.server import require_parser
from gollama_proxy.hub import Hub
from gollama_proxy.service import REFUSED, Load, Service, count, raise_file_limit
from gollama_proxy.state.folder import folder_of, optional
from gollama_proxy.state.local import LocalState
from gollama_proxy.tasks import Signals, ended, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

# Open files in addition to clients and their requests: logs, health checks, canaries
# and idle connections.
_SPARE_FILES = 256

# Seconds after which the hub is ready, even if some workers have not answered a check.
_READY_WITHIN = 3.0
# Seconds after which models without a worker are reported, even if some workers have
# not been reached yet.
_KNOWN_WITHIN = 60.0

Announce = Callable[[Hub], Coroutine[Any, Any, None]]


async def front(
    signals: Signals,
    config: Config,
    announce: Announce,
    load: Callable[[], Config] | None = None,
    service: Service | None = None,
) -> int:
    """Run a hub until a signal; return 1 when a second one cut answers.

    `load` reads the settings again, when SIGHUP asks for that.  The hub serves on the
    sockets that `service` has inherited, if there are any.
    """
    service = service or Service()
    require_parser()
    config = _for_process(config)
    logs.configure(config.log, config.process.number)
    # Streams live long and are rarely garbage.  With the default, a collection at every
    # 700 new objects, collecting takes a tenth of the time of a short request.
    gc.set_threshold(5_000, 10, 10)
    state = await asyncio.to_thread(_open_state, config.state.dir)
    try:
        files = raise_file_limit()

        def prepare(config: Config) -> Config:
            for host in _hosts(service, config):  # also one of an inherited socket
                check_exposure(config, host)
            return _fit(_for_process(config), files)

        again = load and (lambda: prepare(load()))
        hub = Hub(prepare(config), state=state, load=again)
        await hub.start(
            service.listeners.clients,
            service.listeners.metrics,
            # Beside other processes, one that knows no worker yet takes no clients.
            accept=not config.process.number,
        )
    except ConfigError:
        await state.close()
        raise
    except OSError as exc:
        await state.close()
        raise addresses.refuse(config.server, exc) from exc
    process = config.process
    if process.first:
        logger.info("%s", config.source)
        _warn_of_plain_text(config.server, _hosts(service, config))
    # Everything so far stays: searching all modules for garbage would block the event
    # loop for 30 ms each time, and for another 20 ms now.
    gc.freeze()
    gc.enable()
    service.start()
    try:
        if process.number:
            signals.follow_parent()
            signals.reload = lambda: service.reload(
                lambda: hub.reload_soon(log=False), _outcome
            )
        else:
            signals.reload = lambda: service.reload(hub.reload_soon)
        async with asyncio.TaskGroup() as group:
            announcing = group.create_task(
                announce(hub) if process.first else _quiet(), name="announce"
            )
            readying = group.create_task(_become_ready(hub, service), name="readiness")
            if config.server.advertise:
                group.create_task(_advertise(hub, signals), name="advertise")
            await signals.asked.wait()
            announcing.cancel()
            readying.cancel()
        if not process.number:  # else its parent has
            grace = hub.config.server.drain  # it may have changed
            text = "draining for %g s at most; a second signal cuts answers"
            logger.info(text, grace)
    finally:
        signals.reload = _ignore
        service.stopping(lambda: _describe_stop(hub))
        clean = await _drain(hub, signals)
        await state.close()
        await service.stop()
        gc.unfreeze()
    return 0 if clean else 1


async def log_address(hub: Hub) -> None:
    """Log where the hub listens, and what it cannot serve once it knows its workers."""
    logger.info("listening on %s; dashboard: %s/", ", ".join(hub.urls), hub.url)
    if hub.scrapes:
        logger.info("metrics: %s", ", ".join(hub.scrapes.urls))
    await hub.ready()
    if not hub.registry.workers:
        logger.warning(
            "no worker is configured, and none has registered: requests are refused"
        )
    elif not hub.registry.ready:
        logger.warning("no worker can be used: requests are refused until one can")
    # A worker may take longer to load its model, which is then reported as well.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KNOWN_WITHIN):
            await hub.known()
    for text in hub.registry.unserved() if hub.registry.workers else ():
        logger.warning("%s", text)


async def _become_ready(hub: Hub, service: Service) -> None:
    """Report that the hub is ready, once it knows its workers.

    One that cannot be reached does not delay that: the others can serve meanwhile.
    """
    if not service.notifies:
        await hub.accept()
        return
    service.describe(lambda: _describe(hub))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_WITHIN):
            await hub.ready()
    await hub.accept()
    service.ready()


def _outcome(result: Changes | ConfigError) -> str:
    """Describe the result of a reload for a parent, which logs it."""
    if isinstance(result, ConfigError):
        return REFUSED + " ".join("; ".join(result.args).splitlines())
    return str(result)


def _describe(hub: Hub) -> str:
    """Return the line that `systemctl status` shows, or the words for a parent."""
    workers = hub.registry.workers
    usable = sum(each.admits for each in workers)
    waiting = hub.queue.admission.waiting
    load = Load(usable, len(workers), _running(hub) - waiting, waiting)
    if hub.config.process.number:
        return load.words
    refused = "; the last reload was refused" if hub.reload_refused else ""
    return f"{load}{refused}"


def _describe_stop(hub: Hub) -> str:
    if hub.config.process.number:
        return Load(running=_running(hub)).words
    running = count(_running(hub), "running request")
    return f"stopping; {running} may end within {hub.config.server.drain:g} s"


def _running(hub: Hub) -> int:
    """Return the number of requests for models; others are not worth a wait."""
    return sum(bool(each.model) for each in hub.proxy.running)


async def _advertise(hub: Hub, signals: Signals) -> None:
    """Announce the hub on the local network until a signal ends it."""
    from gollama_proxy import registration  # its client is of use to few hubs

    try:
        host = hub.config.server.host
        if not hub.url.startswith("http"):
            logger.warning("server.advertise: the hub serves on Unix sockets only")
            return
        addresses = await asyncio.to_thread(registration.addresses_of, host)
        async with registration.advertise(hub.url, addresses):
            logger.info("agents can find this hub: %s", ", ".join(addresses))
            await signals.asked.wait()
    except OSError as exc:
        logger.warning("server.advertise: %s", exc.strerror or exc)


async def _quiet() -> None:
    """Leave it to the first process to report what is the same for all."""


def _ignore() -> None:
    """A hub that drains reads nothing again, and SIGHUP does not force its end."""


def _for_process(config: Config) -> Config:
    """Leave to one process, or to the parent, what only one of them can do."""
    process = config.process
    if not process.number:
        return config
    server = structs.replace(
        config.server,
        watch_config=False,  # the parent does
        advertise=config.server.advertise and process.first,
    )
    # The parent has made these sockets, and passes them.
    return replace(
        config, server=server, metrics=structs.replace(config.metrics, listen=())
    )


def _fit(config: Config, files: int) -> Config:
    """Limit the clients to those for which there are files, and for their workers.

    A hub without free files could not reach its workers, and would blame them.  Of
    several processes, one may get all clients.
    """
    limits = config.limits
    room = max(1, (files - _SPARE_FILES) // 2)
    if limits.connections <= room:
        return config
    if config.process.first:
        text = "limits.connections = %d: %d open files (LimitNOFILE) are enough for %d"
        logger.warning(text, limits.connections, files, room)
    return replace(config, limits=structs.replace(limits, connections=room))


def _open_state(setting: str) -> LocalState:
    with optional(setting):
        return LocalState(folder_of(setting, os.environ))
    return LocalState()


def _hosts(service: Service, config: Config) -> list[str]:
    """Return the addresses to listen on, as far as other machines may reach them."""
    inherited = service.listeners.clients
    if not inherited:
        return [config.server.host]
    return [x.getsockname()[0] for x in inherited if x.family != socket.AF_UNIX]


def _warn_of_plain_text(server: Server, hosts: Iterable[str]) -> None:
    for host in hosts:
        if not server.tls_certificate and not addresses.is_loopback(host):
            logger.warning(
                "server.host = %r without TLS: tokens and prompts can be read on the "
                "network; set server.tls_certificate, or put a proxy with TLS in front",
                host,
            )


async def _drain(hub: Hub, signals: Signals) -> bool:
    draining = spawn(hub.drain(), "drain")
    clean = await ended(draining, signals.insisted)
    if not clean:
        logger.warning("second signal: cutting running answers")
        await hub.abort()
    await draining
    return clean
