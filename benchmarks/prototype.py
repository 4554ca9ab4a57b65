"""A proxy without any feature: the least that a proxy in Python on aiohttp can cost.

    python -m benchmarks.prototype --port 9002 --worker 127.0.0.1:9001

aiohttp's low-level server takes the requests, as in the hub.  A raw asyncio protocol
with httptools talks to the worker, and writes each piece of a chunked answer directly
to the client's transport.  Nothing is checked, counted, limited or retried, and a
broken worker connection breaks the request.  It is measured beside the hub, to show the
cost of the hub's features.
"""

from __future__ import annotations

import argparse
import asyncio

import httptools
import uvloop
from aiohttp import web

_NOT_FORWARDED = {b"connection", b"authorization"}


class WorkerConnection(asyncio.Protocol):
    """One connection to the worker, for one request after another."""

    def __init__(self, idle: list[WorkerConnection]) -> None:
        """Create it; `idle` lists the connections that can be reused."""
        self._idle = idle
        self._client: asyncio.WriteTransport | None = None

    def __repr__(self) -> str:
        return f"<WorkerConnection {'idle' if self in self._idle else 'busy'}>"

    def send(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[bytes, bytes] = {}
        self.head: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[None] = loop.create_future()
        self._client = None
        self._pieces: list[bytes] = []
        self._transport.write(request)

    def take_body(self) -> bytes:
        """Return what has arrived of the body."""
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    def relay_to(self, client: asyncio.WriteTransport) -> None:
        """Write the rest of the body to the client as it arrives."""
        self._client = client

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        elif not self.end.done():
            self.end.set_exception(ConnectionResetError())

    # The names below are httptools'.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.head.set_result(None)

    def on_body(self, body: bytes) -> None:
        if self._client is None:
            self._pieces.append(body)
        else:
            self._client.write(b"%x\r\n%b\r\n" % (len(body), body))

    def on_message_complete(self) -> None:
        self.end.set_result(None)


class Prototype:
    """Forwards each request to one worker."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[WorkerConnection] = []

    def __repr__(self) -> str:
        return f"<Prototype {self._address} idle={len(self._idle)}>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        outgoing = _spell(request, await request.read())
        worker = self._idle.pop() if self._idle else await self._connect()
        worker.send(outgoing)
        await worker.head
        status = worker.parser.get_status_code()
        headers = {"Content-Type": worker.headers[b"content-type"].decode()}
        if b"content-length" in worker.headers:
            await worker.end
            body = worker.take_body()
            self._idle.append(worker)
            return web.Response(status=status, body=body, headers=headers)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if body := worker.take_body():
            await response.write(body)
        assert request.transport
        worker.relay_to(request.transport)
        await worker.end
        worker.close()  # llama-server is about to do so, whatever its headers promise
        await response.write_eof()
        return response

    async def _connect(self) -> WorkerConnection:
        loop = asyncio.get_running_loop()
        _, worker = await loop.create_connection(
            lambda: WorkerConnection(self._idle), *self._address
        )
        return worker


def _spell(request: web.BaseRequest, body: bytes) -> bytes:
    """Return the request as it is sent to the worker."""
    target = request.rel_url.raw_path_qs.encode()
    lines = [b"%b %b HTTP/1.1\r\n" % (request.method.encode(), target)]
    for name, value in request.raw_headers:
        if name.lower() not in _NOT_FORWARDED:
            lines += [name, b": ", value, b"\r\n"]
    return b"".join([*lines, b"\r\n", body])


async def serve(port: int, host: str, worker_port: int) -> None:
    """Listen on a port of the loopback interface until cancelled."""
    prototype = Prototype(host, worker_port)
    server = await asyncio.get_running_loop().create_server(
        web.Server(prototype.handle, access_log=None), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker", required=True, metavar="HOST:PORT")
    options = parser.parse_args()
    host, _, port = options.worker.rpartition(":")
    uvloop.run(serve(options.port, host, int(port)))


if __name__ == "__main__":
    main()
