"""One attempt to have one request answered by one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from gollama_proxy import __version__
from gollama_proxy.config.settings import Timeouts
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.proxy.client import frame
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.tasks import spawn
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.upstream.pool import ConnectionPool
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.openai import Endpoint

# Seconds between two looks whether somebody should take over.
LOOK = 1.0


class Outgoing(NamedTuple):
    """A request as a worker gets to see it."""

    endpoint: Endpoint
    headers: list[tuple[bytes, bytes]]
    body: bytes  # all of it, or what came before `rest`
    rest: AsyncIterator[bytes] | None = None
    length: int | None = None  # of the whole body, None if it is not known
    content_type: bytes = b"application/json"

    def __repr__(self) -> str:  # without what a client wrote
        return f"<Outgoing to {self.endpoint.path}, {self.length} bytes>"


class Patience(NamedTuple):
    """How long to wait for the first event while others could take over."""

    allowance: float  # seconds
    somebody_else: Callable[[], bool]
    hopeless: Callable[[], bool]  # the worker is known to be out by now
    tell: Callable[[float], Awaitable[None]]  # how many seconds it has been by now


class Attempt:
    """Holds the connection of an attempt and gives it back, whatever happens.

    An async context manager: on exit the connection goes back to its pool if its
    answer has ended, and is hung up otherwise, which cancels the generation.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        lease: Lease,
        timeouts: Timeouts,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._lease = lease
        self._timeouts = timeouts
        self._clock = clock
        self._connection: Connection | None = None
        self._relay: Relay | None = None
        self._upload: asyncio.Task[None] | None = None
        self._sent = True  # the whole request

    def __repr__(self) -> str:
        return f"<Attempt on {self._lease.worker.name} {self._connection!r}>"

    async def __aenter__(self) -> Attempt:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._connection is not None:
            relay = self._relay
            if relay is not None and relay.spares_connection and self._sent:
                streamed = relay.is_event_stream
                self._pool.give_back(self._connection, streamed=streamed)
            else:
                self._connection.close()
        if self._upload is not None:
            self._upload.cancel()
            await asyncio.wait([self._upload])

    @property
    def connected(self) -> bool:
        """Whether a worker may have seen anything of the request."""
        return self._connection is not None

    async def send(self, request: Outgoing, patience: Patience | None = None) -> Relay:
        """Send the request and wait for the first bytes of its answer.

        A used connection that turns out dead before a byte of the answer came costs
        nothing: llama-server closes its connections without notice, so the request is
        sent once more on a fresh one (RFC 9112, 9.3.1).

        Raises:
            WorkerError: not reached, lost, no HTTP, or silent for too long; slow, if
                `patience` has run out and somebody else can take over.
            ProxyError: the client did not deliver the rest of its body.
        """
        # What streams cannot be sent twice.
        connection = self._pool.reuse() if request.rest is None else None
        if connection is not None:
            try:
                return await self._exchange(connection, request, patience)
            except _StaleError:
                self._pool.discard(connection)
        return await self._exchange(await self._pool.dial(), request, patience)

    async def _exchange(
        self, connection: Connection, request: Outgoing, patience: Patience | None
    ) -> Relay:
        self._connection = connection
        stale = connection.used > 0
        self._relay = relay = Relay(
            self._lease.worker.name,
            connection,
            self._lease,
            request.endpoint,
            self._clock,
        )
        connection.start(relay)
        connection.write(self._head(request) + request.body)
        try:
            async with asyncio.timeout(self._timeouts.first_token) as deadline:
                if request.rest is not None:
                    deadline.reschedule(None)  # the body has limits of its own
                    self._start_upload(connection, relay, request, deadline)
                await self._wait(relay, patience)
        except TimeoutError:
            raise WorkerError(
                Code.WORKER_TIMEOUT,
                f"Worker {self._lease.worker.name} sent nothing "
                f"within {self._timeouts.first_token:g} s.",
            ) from None
        except WorkerError as exc:
            if stale and connection.untouched and exc.code is Code.WORKER_LOST:
                raise _StaleError from exc
            raise
        return relay

    async def _wait(self, relay: Relay, patience: Patience | None) -> None:
        """Wait within the allowance, and beyond it only while there is nobody else."""
        if patience is None:
            await relay.opened()
            return
        began = self._clock()
        until = began + patience.allowance
        while True:
            left = until - self._clock()
            try:
                async with asyncio.timeout(min(left, LOOK) if left > 0 else LOOK):
                    await relay.opened()
                return
            except TimeoutError:
                overdue = self._clock() >= until or patience.hopeless()
                if overdue and patience.somebody_else():
                    text = f"Worker {self._lease.worker.name} was too slow to begin."
                    raise WorkerError(Code.WORKER_SLOW, text) from None
                await patience.tell(self._clock() - began)

    def _head(self, request: Outgoing) -> bytes:
        origin = self._pool.worker.origin
        lines = [
            b"POST %b%b HTTP/1.1"
            % (origin.prefix.encode(), request.endpoint.path.encode()),
            b"Host: " + origin.authority.encode(),
            b"User-Agent: gollama-proxy/" + __version__.encode(),
            b"Content-Type: " + request.content_type,
        ]
        if self._pool.worker.api_key:
            lines.append(b"Authorization: Bearer " + self._pool.worker.api_key.encode())
        lines += [name + b": " + value for name, value in request.headers]
        if request.length is None:
            lines.append(b"Transfer-Encoding: chunked")
        else:
            lines.append(b"Content-Length: %d" % request.length)
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if request.length is None and request.body:  # what follows is the first chunk
            head += b"%x\r\n" % len(request.body)
        return head

    # --- Bodies that are larger than the replay window -----------------------------

    def _start_upload(
        self,
        connection: Connection,
        relay: Relay,
        request: Outgoing,
        deadline: asyncio.Timeout,
    ) -> None:
        async def upload() -> None:
            try:
                await self._send_rest(connection, request)
            except ProxyError as exc:
                relay.fail(exc)
                return
            except ConnectionError:
                return  # the client left, and its handler is being cancelled
            limit = asyncio.get_running_loop().time() + self._timeouts.first_token
            if relay.opened_at is None:
                deadline.reschedule(limit)

        self._sent = False
        self._upload = spawn(upload(), "upload to a worker")

    async def _send_rest(self, connection: Connection, request: Outgoing) -> None:
        assert request.rest is not None
        chunked = request.length is None
        if chunked and request.body:
            connection.write(b"\r\n")
        async for piece in request.rest:
            connection.write(frame(piece) if chunked else piece)
            await self._drain(connection)
        if chunked:
            connection.write(b"0\r\n\r\n")
        self._sent = True

    async def _drain(self, connection: Connection) -> None:
        limit = self._timeouts.first_token
        try:
            async with asyncio.timeout(limit):
                await connection.drain()
        except TimeoutError:
            text = f"Worker {self._lease.worker.name} took nothing within {limit:g} s."
            raise WorkerError(Code.WORKER_TIMEOUT, text) from None


class _StaleError(Exception):
    """A used connection was dead already."""
