"""The connections to one worker: dialled, kept for a moment, handed out again.

llama-server says `Keep-Alive: timeout=5, max=100` and means it for plain answers only:
it closes after every event stream, and 5.0 s after the last request.  So a connection
is kept for less than that, and whoever gets a used one must be ready to find it dead.

A llama-server has four threads more than slots, and a burst of more connections than
that can leave it without one for any other, `/health` included, for as long as the
answers take (cpp-httplib, `ThreadPool::enqueue`).  The hub sends no more requests than
there are slots; whatever comes on top of that, be it without a slot, is spaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gollama_proxy.config.settings import Config, WorkerConfig
from gollama_proxy.config.tls import Credentials, explain
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.resolver import resolve
from gollama_proxy.wire.errors import Code, WorkerError

# Seconds between two connections that come on top; at 50 ms none was seen to hang.
SPACING = 0.05


class ConnectionPool:
    """Idle connections to one worker, the freshest on top."""

    def __init__(
        self,
        worker: WorkerConfig,
        config: Config,
        clock: Callable[[], float],
        tls: Credentials | None = None,
        surplus: Callable[[], int] = int,
    ) -> None:
        """Make a pool; an https worker needs credentials to be met with.

        `surplus` tells how many more requests than threads the worker has, if above 0.
        """
        assert (worker.origin.scheme == "https") == (tls is not None), worker
        self.worker = worker
        self._connect_timeout = config.timeouts.connect
        self._keepalive = config.upstream.keepalive
        self._capacity = config.upstream.idle
        self._clock = clock
        self._idle: list[Connection] = []
        self._tls = tls
        self._surplus = surplus
        self._next_at = 0.0  # when one more may be dialled on top

    def __repr__(self) -> str:
        return f"<ConnectionPool {self.worker.name} idle={len(self._idle)}>"

    def reuse(self) -> Connection | None:
        """Hand out an idle connection; None where there is none fit for use."""
        oldest = self._clock() - self._keepalive
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def dial(self) -> Connection:
        """Connect.

        Raises:
            WorkerError: 502, it cannot be reached; 504, not within the connect timeout.
        """
        if self._surplus() > 0:
            await asyncio.sleep(self._spacing())
        try:
            async with asyncio.timeout(self._connect_timeout):
                return await self._connect()
        except TimeoutError as exc:
            text = (
                f"Worker {self.worker.name} did not accept a connection "
                f"within {self._connect_timeout:g} s."
            )
            raise WorkerError(Code.WORKER_TIMEOUT, text) from exc
        except OSError as exc:  # also name resolution and TLS
            why = explain(exc)
            text = f"Worker {self.worker.name} cannot be reached{why and ': '}{why}."
            detail = why or str(exc)
            raise WorkerError(Code.WORKER_UNREACHABLE, text, detail=detail) from exc

    def _spacing(self) -> float:
        """Take the next place in a row of connections; tell the seconds until then."""
        now = self._clock()
        at = max(now, self._next_at)
        self._next_at = at + SPACING
        return at - now

    async def _connect(self) -> Connection:
        """Try the addresses of a worker one by one; raises the last one's OSError."""
        origin = self.worker.origin
        context = None if self._tls is None else self._tls.context
        loop = asyncio.get_running_loop()
        failure = OSError()
        for address in await resolve(origin.host, origin.port):
            try:
                _, connection = await loop.create_connection(
                    Connection,
                    address,
                    origin.port,
                    ssl=context,
                    server_hostname=origin.host if context else None,
                )
            except OSError as exc:
                failure = exc
            else:
                return connection
        raise failure

    def give_back(self, connection: Connection) -> None:
        """Take a connection whose answer has ended; keep it only if it can go on."""
        if connection.reusable and len(self._idle) < self._capacity:
            connection.idle_since = self._clock()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Hang up every idle connection."""
        while self._idle:
            self._idle.pop().close()
