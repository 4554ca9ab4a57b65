"""Runs a hub in this process, from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import socket
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from msgspec import structs

from gollama_proxy import tasks
from gollama_proxy.config import addresses
from gollama_proxy.config.load import check_exposure
from gollama_proxy.config.settings import Config, Server
from gollama_proxy.config.values import ConfigError
from gollama_proxy.edge.server import require_parser
from gollama_proxy.hub import Hub
from gollama_proxy.service import Service, count
from gollama_proxy.state.database import StateError
from gollama_proxy.state.local import LocalState, folder_of
from gollama_proxy.tasks import Signals, spawn
from gollama_proxy.telemetry import logs

logger = logging.getLogger(__name__)

# Open files in addition to clients and their requests: logs, health checks, canaries
# and idle connections.
_SPARE_FILES = 256
# Enough for any hub; taken where the hard limit is infinite.
_MANY_FILES = 1 << 20

# Seconds after which the hub is ready, even if some workers have not answered a check.
_READY_WITHIN = 3.0
# Seconds after which models without a worker are reported, even if some workers have
# not been reached yet.
_KNOWN_WITHIN = 60.0

Announce = Callable[[Hub], Coroutine[Any, Any, None]]


def run(command: Callable[[Signals], Coroutine[Any, Any, int]]) -> int:
    """Run a command on uvloop, with signals; return its exit status."""
    try:
        return tasks.run(command)
    finally:
        logs.flush()  # before the traceback of a crash


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
    logs.configure(config.log)
    # Streams live long and are rarely garbage.  With the default, a collection at every
    # 700 new objects, collecting takes a tenth of the time of a short request.
    gc.set_threshold(5_000, 10, 10)
    state = await asyncio.to_thread(_open_state, config.state.dir)
    try:
        files = _raise_file_limit()

        def prepare(config: Config) -> Config:
            _check_listeners(service, config)
            return _fit(config, files)

        again = load and (lambda: prepare(load()))
        hub = Hub(prepare(config), state=state, load=again)
        await hub.start(service.listeners.clients, service.listeners.metrics)
    except ConfigError:
        await state.close()
        raise
    except OSError as exc:
        await state.close()
        raise _refuse_address(config.server, exc) from exc
    logger.info("%s", config.source)
    _warn_of_plain_text(config.server, _hosts(service, config))
    # Everything so far stays: searching all modules for garbage would block the event
    # loop for 30 ms each time, and for another 20 ms now.
    gc.freeze()
    gc.enable()
    service.start()
    try:
        signals.reload = lambda: service.reload(hub.reload_soon)
        async with asyncio.TaskGroup() as group:
            announcing = group.create_task(announce(hub), name="announce")
            readying = group.create_task(_become_ready(hub, service), name="readiness")
            if config.server.advertise:
                group.create_task(_advertise(hub, signals), name="advertise")
            await signals.asked.wait()
            announcing.cancel()
            readying.cancel()
        grace = hub.config.server.drain  # it may have changed
        logger.info("draining for %g s at most; a second signal cuts answers", grace)
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
        return
    service.describe(lambda: _describe(hub))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_WITHIN):
            await hub.ready()
    service.ready()


def _describe(hub: Hub) -> str:
    """Return the line that `systemctl status` shows."""
    workers = hub.registry.workers
    usable = sum(each.admits for each in workers)
    waiting = hub.queue.admission.waiting
    running = count(_running(hub) - waiting, "request")
    of = count(len(workers), "worker")
    refused = "; the last reload was refused" if hub.reload_refused else ""
    return f"{usable} of {of} ready; {running} running, {waiting} waiting{refused}"


def _describe_stop(hub: Hub) -> str:
    running = count(_running(hub), "running request")
    return f"stopping; {running} may end within {hub.config.server.drain:g} s"


def _running(hub: Hub) -> int:
    """Return the number of requests for models; others are not worth a wait."""
    return sum(bool(each.model) for each in hub.proxy.running)


async def _advertise(hub: Hub, signals: Signals) -> None:
    """Announce the hub on the local network until a signal ends it."""
    from gollama_proxy import discovery  # zeroconf is optional

    try:
        host = hub.config.server.host
        if not hub.url.startswith("http"):
            logger.warning("server.advertise: the hub serves on Unix sockets only")
            return
        addresses = await asyncio.to_thread(discovery.addresses_of, host)
        async with discovery.advertise(hub.url, addresses):
            logger.info("agents can find this hub: %s", ", ".join(addresses))
            await signals.asked.wait()
    except OSError as exc:
        logger.warning("server.advertise: %s", exc.strerror or exc)


def _ignore() -> None:
    """A hub that drains reads nothing again, and SIGHUP does not force its end."""


def _raise_file_limit() -> int:
    """Raise the limit of open files as far as is allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS has a lower one that it does not report
        return soft
    logger.info("raised the limit of open files from %d to %d", soft, wanted)
    return wanted


def _fit(config: Config, files: int) -> Config:
    """Limit the clients to those for which there are files, and for their workers.

    A hub without free files could not reach its workers, and would blame them.
    """
    limits = config.limits
    room = max(1, (files - _SPARE_FILES) // 2)
    if limits.connections <= room:
        return config
    logger.warning(
        "limits.connections = %d: %d open files (LimitNOFILE) are enough for %d",
        limits.connections,
        files,
        room,
    )
    return replace(config, limits=structs.replace(limits, connections=room))


def _open_state(setting: str) -> LocalState:
    """Open the folder for what outlives the hub; without one it serves all the same.

    Raises:
        ConfigError: a folder that was set cannot be used.
    """
    try:
        return LocalState(folder_of(setting, os.environ))
    except StateError as exc:
        if setting != "auto":
            raise ConfigError(f"state.dir = {setting!r}: {exc}") from exc
        logger.warning(
            "%s; workers added at run time and revocations will not survive a restart",
            exc,
        )
        return LocalState()


def _hosts(service: Service, config: Config) -> list[str]:
    """Return the addresses to listen on, as far as other machines may reach them."""
    inherited = service.listeners.clients
    if not inherited:
        return [config.server.host]
    return [x.getsockname()[0] for x in inherited if x.family != socket.AF_UNIX]


def _check_listeners(service: Service, config: Config) -> None:
    """Reject an inherited address that would be open to all, as a configured one is.

    Raises:
        ConfigError: clients would need no credentials.
    """
    for host in _hosts(service, config):
        check_exposure(
            replace(config, server=structs.replace(config.server, host=host))
        )


def _warn_of_plain_text(server: Server, hosts: Iterable[str]) -> None:
    for host in hosts:
        if not server.tls_certificate and not addresses.is_loopback(host):
            logger.warning(
                "server.host = %r without TLS: tokens and prompts can be read on the "
                "network; set server.tls_certificate, or put a proxy with TLS in front",
                host,
            )


def _refuse_address(server: Server, exc: OSError) -> ConfigError:
    host = f"server.host = {server.host!r}"
    port = f"server.port = {server.port}"
    if isinstance(exc, socket.gaierror) or exc.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{host}: must be an address of this machine")
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(f"{port}: already in use; must be a free port, or 0 for any")
    if exc.errno == errno.EACCES:
        return ConfigError(f"{port}: not permitted; must be 1024 or above")
    return ConfigError(f"{host}, {port}: cannot be listened on: {exc.strerror or exc}")


async def _drain(hub: Hub, signals: Signals) -> bool:
    draining = spawn(hub.drain(), "drain")
    insisting = spawn(signals.insisted.wait(), "second signal")
    await asyncio.wait((draining, insisting), return_when=asyncio.FIRST_COMPLETED)
    clean = draining.done()
    if not clean:
        logger.warning("second signal: cutting running answers")
        await hub.abort()
    insisting.cancel()
    await draining
    return clean
