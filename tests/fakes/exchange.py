"""One connection of a `ScriptedWorker`: requests in, scripts out."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import h11

from tests.fakes import replies

if TYPE_CHECKING:
    from tests.fakes.worker import ScriptedWorker

READ_LIMIT = 64 << 10  # unread bytes: beyond this, reading is paused

_LINGER_ZERO = struct.pack("ii", 1, 0)


class HungUp(Exception):
    """The peer has closed, or this side has: the script is over."""


@dataclass(eq=False)
class Request:
    """What one request looked like, and what became of it."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]  # names in lower case, in the order of arrival
    head: bytes  # as it came, up to and with the empty line
    connection: int  # number of the worker's connection that carried it, from 1
    reused: bool  # it was not the first on that connection
    body: bytes = b""  # empty when it was larger than the worker keeps
    body_length: int = 0
    complete: bool = False  # the whole body has arrived
    sent: int = 0  # bytes of the answer that the kernel has taken
    closed_by_peer_at: float | None = None  # time of the event loop
    closed_by_peer: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # script is over

    def __repr__(self) -> str:
        state = "finished" if self.finished.is_set() else "open"
        if self.closed_by_peer.is_set():
            state += ", closed by peer"
        return (
            f"<Request {self.method} {self.target} on connection {self.connection}, "
            f"body {self.body_length}, sent {self.sent}, {state}>"
        )

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def values(self, name: str) -> list[str]:
        """Return every value of a header, in the order of arrival."""
        return [value for key, value in self.headers if key == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the one value of a header; a repeated header is an error."""
        values = self.values(name)
        assert len(values) <= 1, f"{name} came {len(values)} times: {values}"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange(asyncio.Protocol):
    """One connection of a worker, and the stage on which its scripts are played."""

    transport: asyncio.Transport
    request: Request

    def __init__(self, worker: ScriptedWorker) -> None:
        self.worker = worker
        self.number = 0
        self.hung_up = asyncio.Event()  # FIN or RST of the peer, or our own end
        self._inbox = bytearray()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._last: Request | None = None
        self._parser = h11.Connection(h11.SERVER)
        self._head = bytearray()  # bytes of the request that is being parsed
        self._left = b""  # behind the end of the request before
        self._continued = False  # 100 Continue was sent
        self._stopped = False  # reading, for good
        self._ended_here = False

    def __repr__(self) -> str:
        return f"<Exchange {self.number} of {self.worker!r}>"

    # --- Called by the event loop -------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self.transport = cast(asyncio.Transport, transport)
        # `send()` returns when the kernel has everything: that is what back-pressure
        # is measured with.  (That of TLS is over a limit of 0 with nothing in it.)
        transport.set_write_buffer_limits(high=0 if self.worker.tls is None else 1)
        self.worker._open.add(self)
        self.worker.connections += 1
        self.number = self.worker.connections
        name = f"fake worker {self.worker.name} connection {self.number}"
        task = asyncio.get_running_loop().create_task(self._serve(), name=name)
        self.worker._tasks.add(task)
        task.add_done_callback(self.worker._tasks.discard)

    def data_received(self, data: bytes) -> None:
        self._inbox += data
        self._arrived.set()
        if len(self._inbox) > READ_LIMIT:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._note_hang_up()
        return self.worker.tls is None  # the script decides when our side ends

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_hang_up()
        self._writable.set()
        self.worker._open.discard(self)
        self.worker._changed()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _note_hang_up(self) -> None:
        request = self._last
        if (
            request is not None
            and not self._ended_here
            and not request.closed_by_peer.is_set()
        ):
            request.closed_by_peer_at = asyncio.get_running_loop().time()
            request.closed_by_peer.set()
        self.hung_up.set()
        self._arrived.set()

    # --- Called by steps ----------------------------------------------------------

    async def write(self, data: bytes) -> None:
        if self.transport.is_closing():
            raise HungUp
        self.transport.write(data)
        await self._writable.wait()
        if self.transport.is_closing():
            raise HungUp
        self.request.sent += len(data)

    async def unless_hung_up(self, awaitable: Awaitable[Any]) -> None:
        """Wait for something; the peer's hang-up ends the script instead."""
        name = f"fake worker {self.worker.name} waiting"
        awaited = asyncio.ensure_future(awaitable)
        if isinstance(awaited, asyncio.Task):
            awaited.set_name(name)
        hung_up = asyncio.create_task(self.hung_up.wait(), name=name)
        try:
            await asyncio.wait({awaited, hung_up}, return_when="FIRST_COMPLETED")
            if not awaited.done():
                raise HungUp
            await awaited
        finally:
            for future in (awaited, hung_up):
                future.cancel()
            await asyncio.wait({awaited, hung_up})

    async def read_body(self, limit: int | None = None) -> None:
        """Read on until the body is complete, or `limit` bytes of it have come."""
        request = self.request
        kept = bytearray(request.body)
        goal = math.inf if limit is None else limit
        try:
            while not request.complete and request.body_length < goal:
                event = await self._next_event()
                if isinstance(event, h11.EndOfMessage):
                    request.complete = True
                    self._left = self._parser.trailing_data[0]
                    break
                request.body_length += len(event.data)
                if request.body_length <= self.worker.keep_body:
                    kept += event.data
                else:
                    kept.clear()
        finally:
            request.body = bytes(kept)

    def stop_reading(self) -> None:
        self._stopped = True
        self.transport.pause_reading()

    def close(self) -> None:
        self._ended_here = True
        self.transport.close()

    def kill(self) -> None:
        self._ended_here = True
        self.transport.abort()

    def reset(self) -> None:
        self._ended_here = True
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self.transport.abort()

    # --- One request after the other ----------------------------------------------

    async def _serve(self) -> None:
        try:
            while await self._serve_request():
                pass
        except HungUp:
            pass
        except h11.RemoteProtocolError as exc:
            self.worker.violations.append(f"connection {self.number}: {exc}")
            self.transport.write(replies.head(400, [("Connection", "close")]))
        except Exception as exc:  # raised when the worker exits
            self.worker.failures.append(exc)
        finally:
            if self._last is not None:
                self._last.finished.set()
            if not self.transport.is_closing():
                self.close()

    async def _serve_request(self) -> bool:
        request = await self._read_head()
        if request is None:
            return False
        script = self.worker._record(request)
        if not any(
            step.name in ("read_body", "not_read_body") for step in script or ()
        ):
            await self.read_body()
            if self._left or self._inbox:
                text = f"connection {self.number}: pipelined: {self._left[:80]!r}"
                self.worker.violations.append(text)
        for step in self.worker.answer(request) if script is None else script:
            await step.play(self)
            if self.transport.is_closing():
                return False
        request.finished.set()
        self.worker._changed()
        # An unread body could be taken for the next request.
        return request.complete and not self._stopped

    async def _read_head(self) -> Request | None:
        """Read the next head; None when the peer closes between two requests."""
        # h11 wants to see the answer before it goes on: a new parser has seen nothing.
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=64 << 10)
        if self._left:  # to h11, no bytes are EOF
            self._parser.receive_data(self._left)
        self._head[:] = self._left
        self._left = b""
        self._continued = False
        event = await self._next_event(idle=True)
        if event is None:
            return None
        request = Request(
            method=event.method.decode(),
            target=event.target.decode("latin-1"),
            version=event.http_version.decode(),
            headers=[(k.decode(), v.decode("latin-1")) for k, v in event.headers],
            head=bytes(self._head[: self._head.find(b"\r\n\r\n") + 4]),
            connection=self.number,
            reused=self._last is not None,
        )
        if request.values("content-length") and request.values("transfer-encoding"):
            # h11 allows it, as RFC 9112 does to a server; no real client sends it.
            raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        self.request = self._last = request
        return request

    async def _next_event(self, *, idle: bool = False) -> Any:
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            if self._parser.they_are_waiting_for_100_continue and not self._continued:
                self._continued = True
                self.transport.write(replies.head(100))
            data = await self._receive()
            if idle:
                self._head += data
                if not self._head:
                    return None
            if not data:
                raise HungUp  # in the middle of a request: the client has closed
            self._parser.receive_data(data)
        return event

    async def _receive(self) -> bytes:
        while not self._inbox and not self.hung_up.is_set():
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._inbox)
        self._inbox.clear()
        if not self._stopped and not self.transport.is_closing():
            self.transport.resume_reading()
        return data
