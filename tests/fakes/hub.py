"""A hub in this process, with real sockets on both sides, that may leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import jwt

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Config
from gollama_proxy.hub import Hub
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.state.local import LocalState
from tests.fakes.client import Response, TlsWire, Wire
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE

SECRET = "0123456789abcdef" * 4
MINT = "mint a token"  # instead of a token: one is made, with the default claims

# Settings under which a client sees what one attempt came to.
ONE_TRY = {"retry__attempts": 1}
NO_RESCUE = {"rescue__enabled": False}
# A worker gets the next case, however often it has failed.
NO_BREAKER = {"breaker__consecutive": 1000, "breaker__minimum_calls": 10_000}

_SCOPES = {"/metrics": {"scope": "metrics"}}  # what a GET takes beside a token


class HasUrl(Protocol):
    """A worker, fake or real."""

    @property
    def url(self) -> str: ...


class RunningHub:
    """What a test holds of a hub that runs."""

    def __init__(
        self, hub: Hub, claims: Mapping[str, Any], trust: ssl.SSLContext | None = None
    ) -> None:
        self.hub = hub
        self.trust = trust  # what clients have, where it speaks https
        self.url: str = hub.url
        address = urlsplit(hub.url)
        assert address.hostname is not None
        assert address.port is not None
        self.host = address.hostname
        self.port = address.port
        self._claims = claims
        self._wires: list[Wire] = []

    def __repr__(self) -> str:
        return f"<RunningHub {self.url}>"

    def token(self, sub: str = "alice", **claims: Any) -> str:
        """Mint a token; a claim that is None is left out."""
        return mint(**{"sub": sub, **self._claims, **claims})

    async def wire(self, *, receive_buffer: int | None = None) -> Wire:
        """Connect a client; it is closed with the hub at the latest."""
        address = self.host, self.port
        if self.trust is None:
            wire = await Wire.connect(*address, receive_buffer=receive_buffer)
        else:
            plain = await TlsWire.connect(*address, receive_buffer=receive_buffer)
            wire = await plain.shake_hands(self.trust, self.host)
        self._wires.append(wire)
        return wire

    async def open(
        self,
        path: str,
        payload: Any,
        token: str | None = MINT,
        *,
        headers: Iterable[tuple[str, str]] = (),
        receive_buffer: int | None = None,
    ) -> Wire:
        """Send a request on a new connection and return that, unread."""
        wire = await self.wire(receive_buffer=receive_buffer)
        token = self.token() if token is MINT else token
        await wire.post(path, payload, token, headers=headers)
        return wire

    async def post(
        self,
        path: str,
        payload: Any,
        token: str | None = MINT,
        *,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Response:
        """Send a request and return the whole answer."""
        async with await self.open(path, payload, token, headers=headers) as wire:
            return await wire.read_response()

    async def get(
        self,
        path: str,
        token: str | None = MINT,
        *,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Response:
        """Send a request without a body and return the whole answer."""
        async with await self.wire() as wire:
            if token is MINT:
                token = self.token(**_SCOPES.get(path, {}))
            await wire.get(path, token, headers=headers)
            return await wire.read_response()

    def advance(self, seconds: float) -> None:
        """Advance the clock that the hub was given."""
        clock = self.hub.clock
        assert isinstance(clock, Clock), f"{self!r} runs on real time"
        clock.advance(seconds)

    def pass_time(self, seconds: float) -> None:
        """Advance the clock, and have the limits of all requests checked."""
        self.advance(seconds)
        self.hub.watchdog.round()

    def close_clients(self) -> None:
        for wire in self._wires:
            wire.close()


_inside: list[None] = []  # one for each hub that runs in this process


@contextlib.asynccontextmanager
async def running_hub(
    *workers: HasUrl | str,
    claims: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    port: int = 0,
    ready: bool = True,
    trust: ssl.SSLContext | None = None,
    **settings: Any,
) -> AsyncIterator[RunningHub]:
    """Run a hub on a free port, or on `port`, and check that it leaves nothing behind.

    Settings are given as `health__interval=0.05`; without `state__dir`, the hub keeps
    nothing.  With `ready`, the block begins when each worker has been pinged once.
    `claims` go into every token that is minted, and `trust` is what the clients of an
    https hub have.  With a test's `clock`, an attempt exceeds no limit before the test
    lets time pass, however slow the machine is.  All else is as in production.
    """
    before = asyncio.all_tasks()
    urls = [worker if isinstance(worker, str) else worker.url for worker in workers]
    # A drain that does not end by itself makes a test fail.  In a test that takes long,
    # no health check comes unexpectedly, and no client is given up.
    variables = {
        "GOLLAMA_JWT_SECRET": SECRET,
        "GOLLAMA_SERVER_DRAIN": "3600",
        "GOLLAMA_HEALTH_INTERVAL": "3600",
        "GOLLAMA_TIMEOUTS_WRITE": "3600",
    }
    for name, value in settings.items():
        variables[f"GOLLAMA_{name.replace('__', '_').upper()}"] = _spelled(value)
    variables |= environ or {}

    def load() -> Config:
        return config.load(file, variables, {"server.port": port}, urls)

    loaded = load()
    state = LocalState()  # in memory, which needs no thread
    if loaded.state.dir != "auto":
        state = await asyncio.to_thread(LocalState, Path(loaded.state.dir))
    if loaded.state.url:  # it reads the script, and a hub may block at its start
        await asyncio.to_thread(importlib.import_module, "gollama_proxy.cluster")
    hub = Hub(loaded, clock, state=state, load=load)
    running = None
    _inside.append(None)
    try:
        await hub.start()
        running = RunningHub(hub, claims or {}, trust)
        if ready:
            async with asyncio.timeout(DEADLINE):
                await hub.ready()
        yield running
    finally:
        if running is not None:
            running.close_clients()
        await hub.abort()
        await state.close()
        _inside.pop()
    # Not reached when the block failed: its own error is more useful.  Within another
    # hub, which may have begun tasks in the meantime, that one checks it at its end.
    if not _inside:
        await _assert_no_tasks(before)
    held = {str(worker): worker.in_flight for worker in hub.registry.workers}
    assert not any(held.values()), f"still in flight after the end: {held}"


def shown(thing: object, name: str) -> int:
    """Read a number from a `repr`, in which it is shown as `name=3`."""
    match = re.search(rf"\b{name}=(\d+)", repr(thing))
    assert match is not None, f"{thing!r} shows no {name}"
    return int(match[1])


def mint(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Sign a token, valid for an hour; a claim that is None is left out."""
    now = int(time.time())
    claims = {"iat": now, "exp": now + 3600, **claims}
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, secret, algorithm)


def _spelled(value: Any) -> str:
    """Spell a setting as an environment variable does."""
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping():
            return ",".join(f"{name}={target}" for name, target in value.items())
        case list() | tuple():
            return " ".join(map(str, value))
        case _:
            return str(value)


async def _assert_no_tasks(before: set[asyncio.Task[Any]]) -> None:
    left = {
        task
        for task in asyncio.all_tasks() - before
        # The fakes' own tasks end with the fakes; a fixture is left by another task
        # than it was entered by.
        if not task.get_name().startswith("fake ")
        and task is not asyncio.current_task()
    }
    if left:
        _, left = await asyncio.wait(left, timeout=DEADLINE)
    assert not left, f"the hub left tasks: {left}"


def relays(hub: RunningHub) -> list[Relay]:
    """List the answers that are on their way."""
    return [x.relay for x in hub.hub.proxy.running if x.relay is not None]
