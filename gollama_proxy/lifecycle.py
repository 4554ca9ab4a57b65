"""A hub's life in a process: from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from gollama_proxy.config import ConfigError
from gollama_proxy.edge.app import Hub
from gollama_proxy.edge.server import require_parser
from gollama_proxy.ops import accesslog
from gollama_proxy.settings import Config, Server

logger = logging.getLogger(__name__)

Announce = Callable[[Hub], Coroutine[Any, Any, None]]


def run(command: Callable[[Signals], Coroutine[Any, Any, int]]) -> int:
    """Run a command on uvloop, with signals; return its exit status."""

    async def hearing_signals() -> int:
        loop, signals = asyncio.get_running_loop(), Signals()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, signals.receive)
        try:
            return await command(signals)
        finally:
            for number in numbers:  # a uvloop that is closed still has them
                loop.remove_signal_handler(number)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(hearing_signals())


class Signals:
    """The first SIGINT or SIGTERM asks for the end, the second one insists."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def receive(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()

    def __repr__(self) -> str:
        asked, insisted = self.asked.is_set(), self.insisted.is_set()
        return f"<Signals asked={asked} insisted={insisted}>"


async def front(
    signals: Signals,
    config: Config,
    announce: Announce,
) -> int:
    """Run a hub until a signal; return 1 when a second one cut answers."""
    require_parser()
    accesslog.configure(config.log)
    # Thousands of streams are long-lived and hardly ever garbage: collecting by the
    # default, at every 700 new objects, costs a tenth of a short request.
    gc.set_threshold(5_000, 10, 10)
    hub = Hub(config)
    try:
        await hub.start()
    except OSError as exc:
        raise _refuse_address(config.server, exc) from exc
    try:
        async with asyncio.TaskGroup() as group:
            announcing = group.create_task(announce(hub), name="announce")
            await signals.asked.wait()
            announcing.cancel()
        grace = config.server.drain
        logger.info("draining for %g s at most; a second signal cuts answers", grace)
    finally:
        clean = await _drain(hub, signals)
    return 0 if clean else 1


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
    draining = asyncio.create_task(hub.drain(), name="drain")
    insisting = asyncio.create_task(signals.insisted.wait(), name="second-signal")
    await asyncio.wait((draining, insisting), return_when=asyncio.FIRST_COMPLETED)
    clean = draining.done()
    if not clean:
        logger.warning("second signal: cutting what still runs")
        await hub.abort()
    insisting.cancel()
    await draining
    return clean
