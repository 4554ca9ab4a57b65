"""The proxy one writes first: aiohttp's server, aiohttp's client and a loop between.

    python -m benchmarks.plain_proxy --port 9002 --worker http://127.0.0.1:9001

It checks nothing and counts nothing; it is here to be measured beside the hub.
"""

from __future__ import annotations

import argparse
import asyncio

import aiohttp
import uvloop
from aiohttp import web

SENT_ON = ("Authorization", "Content-Type", "Accept")
SENT_BACK = ("Content-Type", "Content-Length")


class PlainProxy:
    """Passes each request on, and each piece of its answer back as it comes."""

    def __init__(self, worker: str, session: aiohttp.ClientSession) -> None:
        self._worker = worker
        self._session = session

    async def relay(self, request: web.Request) -> web.StreamResponse:
        async with self._session.request(
            request.method,
            self._worker + request.path_qs,
            headers={k: request.headers[k] for k in SENT_ON if k in request.headers},
            data=await request.read(),
        ) as answer:
            response = web.StreamResponse(
                status=answer.status,
                headers={
                    k: answer.headers[k] for k in SENT_BACK if k in answer.headers
                },
            )
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response


async def serve(port: int, worker: str) -> None:
    """Listen on a port of the loopback interface until cancelled."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    ) as session:
        proxy = PlainProxy(worker, session)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", proxy.relay)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker", required=True, help="base URL")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.worker))


if __name__ == "__main__":
    main()
