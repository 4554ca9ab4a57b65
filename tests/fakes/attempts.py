"""Attempts on a worker without a client: a connection pool, and one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from gollama_proxy.config import load as config
from gollama_proxy.config.settings import Config, WorkerConfig
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.attempt import release, request_of, send
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes import requests
from tests.fakes.clock import Clock
from tests.fakes.pool import worker as a_worker
from tests.fakes.waiting import DEADLINE

BODY = b'{"messages":[]}'


class Bench:
    """A connection pool of one worker, to make attempts with."""

    def __init__(
        self,
        loaded: Config,
        pool: ConnectionPool | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.clock: Any = clock or Clock()
        self.config: WorkerConfig = loaded.workers[0]
        self.pool = pool or ConnectionPool(self.config, loaded, self.clock)
        self.worker: Worker = a_worker(name="w", clock=self.clock)
        self.loaded = loaded

    @asynccontextmanager
    async def attempt(
        self,
        path: str = "/v1/chat/completions",
        rest: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Exchange]:
        """Begin an attempt; the `rest` of a body follows what is sent first."""
        x = Exchange(requests.request("POST", path), 0.0)
        x.endpoint, x.worker = ENDPOINTS[path], "w"
        x.body = SimpleNamespace(replayable=rest is None, rest=lambda: rest)  # type: ignore[assignment]
        x.lease = self.worker.lease()
        x.config = self.loaded
        try:
            yield x
        finally:
            upload = release(x, self.pool)
            if upload is not None:
                await upload.cancel()

    async def send(
        self,
        x: Exchange,
        body: bytes = BODY,
        *,
        path: str = "/v1/chat/completions",
        headers: Sequence[tuple[bytes, bytes]] = (),
        length: int | None = -1,
    ) -> Relay:
        """Send a request as the path of a request does; a length of None is unknown."""
        if length == -1:
            length = len(body)
        lines = b"".join(b"%b: %b\r\n" % field for field in headers)
        data = request_of(self.config, path, lines, b"application/json", length, body)
        return await send(x, self.pool, data, self.clock, chunked=length is None)

    async def exchange(
        self,
        body: bytes = BODY,
        *,
        path: str = "/v1/chat/completions",
        rest: AsyncIterator[bytes] | None = None,
        **more: Any,
    ) -> Relay:
        """Send a request, wait for its whole answer, and end the attempt."""
        async with asyncio.timeout(DEADLINE), self.attempt(path, rest) as x:
            relay = await self.send(x, body, path=path, **more)
            await relay.whole()
            return relay


@asynccontextmanager
async def bench(url: str, **settings: Any) -> AsyncIterator[Bench]:
    """Make one for the worker at this address."""
    environ = {
        f"GOLLAMA_{name.replace('__', '_').upper()}": str(value)
        for name, value in settings.items()
    }
    made = Bench(config.load(None, environ, {}, [url]))
    yield made
    made.pool.close()
