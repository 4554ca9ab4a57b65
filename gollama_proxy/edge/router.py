"""What every request passes on its way in, and every reply on its way out.

In: the head is checked, the request gets its id, its path is looked up.  Out: an error
becomes a reply, the hub's headers are added, and the one outcome is recorded, once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from gollama_proxy.config.settings import Config
from gollama_proxy.edge.server import SERVER, answer_in_http_1_1, error_response
from gollama_proxy.fleet.registry import RETRY_AFTER
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.wire import headers
from gollama_proxy.wire.errors import Code, HubError, ProxyError, RequestError
from gollama_proxy.wire.openai import api_of

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest, Record], Awaitable[web.StreamResponse]]
# Path → method → handler.  A path that ends with a slash takes a name behind it.
Routes = Mapping[str, Mapping[str, Handler]]


# nginx's status for a client that left before it was answered; only logs show it.
GONE = 499


class Dispatcher:
    """Finds the handler of a request, and sees its outcome."""

    def __init__(
        self,
        routes: Routes,
        config: Config,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes = routes
        self._parents = [path for path in routes if path.endswith("/")]
        self._telemetry = telemetry
        self._clock = clock
        self._head_limit = config.limits.head
        self._origins = frozenset(config.server.cors_origins)
        self._running: set[asyncio.Task[object]] = set()
        self._draining = False
        self._cutting = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Dispatcher running={len(self._running)}>"

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle one request; every request ends here, in exactly one outcome."""
        record = Record(
            id=headers.request_id(request.raw_headers, secrets.token_hex(8)),
            method=request.method,
            remote=request.remote or "",
            started=self._clock(),
        )
        record.headers = {"Server": SERVER, "X-Request-Id": record.id}
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        try:
            return await self._answer(request, record)
        except asyncio.CancelledError:
            if self._cutting and not request.writer.output_size:
                task.uncancel()  # the client is still there, and was told nothing yet
                return self._close_down(request, record)
            record.outcome = record.outcome or Outcome.CLIENT_GONE
            record.status = record.status or GONE
            raise
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()
            self._telemetry.ended(record)

    def refused(self, request: web.BaseRequest, error: ProxyError) -> None:
        """Record a request that was no HTTP, and so never came to be handled."""
        remote, now = request.remote or "", self._clock()
        record = Record(id="-", method="-", remote=remote, started=now)
        record.status = self._refuse(error, request, record).status
        self._telemetry.ended(record)

    async def _answer(
        self, request: web.BaseRequest, record: Record
    ) -> web.StreamResponse:
        # Whether the connection ends with this request: whoever sends a head that could
        # be read in two ways may mean anything by what follows.
        last = True
        try:
            self._admit_origin(request, record)
            last = headers.check_head(
                request.method, request.version, request.raw_headers, self._head_limit
            )
            if last:
                record.headers["Connection"] = "close"
            handler = self._route(request, record)
            if self._draining and request.method == "POST":
                raise draining()
            response = await handler(request, record)
        except ProxyError as exc:
            if exc.code is Code.UNSUPPORTED_HTTP_VERSION:
                answer_in_http_1_1(request)
            response = self._refuse(exc, request, record)
            if isinstance(exc, RequestError) and not request.content.is_eof():
                response.force_close()  # the body that nobody read is in the way
        except ConnectionError:  # the client left between two steps
            record.outcome, record.status = Outcome.CLIENT_GONE, GONE
            return web.Response(status=GONE)
        except Exception as exc:
            logger.exception("request %s failed", record.id)
            detail = type(exc).__name__
            internal = HubError(Code.INTERNAL, "The hub failed.", detail=detail)
            response = self._refuse(internal, request, record)
        if last or self._draining:
            response.force_close()
        if not response.prepared:
            response.headers.update(record.headers)
        record.status = response.status
        record.outcome = record.outcome or Outcome.COMPLETE
        return response

    def _refuse(
        self, error: ProxyError, request: web.BaseRequest, record: Record
    ) -> web.Response:
        record.outcome = Outcome.ERROR
        record.error = error.code
        record.detail = error.detail
        return error_response(error, api_of(request.raw_path))

    # --- Finding the handler ------------------------------------------------------

    def _route(self, request: web.BaseRequest, record: Record) -> Handler:
        """Look the path up, as it was sent: nothing is decoded or normalised first.

        Raises:
            RequestError: 404 or 405.
        """
        path = request.raw_path.partition("?")[0]
        methods = None if path in self._parents else self._routes.get(path)
        for parent in self._parents if methods is None else ():
            if path.startswith(parent) and path != parent:
                methods, path = self._routes[parent], parent
        if methods is None:
            # Without a query or `user:password@`: they are in enough logs already.
            if path.startswith("/"):
                record.path = path
            what = repr(path[:200]) if record.path else "such a target"
            text = f"There is no {request.method} {what} here."
            raise RequestError(Code.UNKNOWN_URL, text)
        record.route = path
        method = "GET" if request.method == "HEAD" else request.method
        if (
            method == "OPTIONS"
            and "Access-Control-Allow-Origin" in record.headers
            and "Access-Control-Request-Method" in request.headers
        ):
            return _answer_preflight
        handler = methods.get(method)
        if handler is None:
            allowed = ", ".join(sorted(methods))
            text = f"{request.method} is not allowed on {path}; allowed: {allowed}."
            raise RequestError(Code.METHOD_NOT_ALLOWED, text, allow=allowed)
        return handler

    def _admit_origin(self, request: web.BaseRequest, record: Record) -> None:
        """Let the pages that are configured read the replies (Fetch standard, 3.2).

        Who is not let in hears nothing of it; the browser then keeps the reply to
        itself.  Whoever has more than one origin, has none.
        """
        if not self._origins:
            return
        # For caches, of every reply: it would be another one for another page.
        record.headers["Vary"] = "Origin"
        origins = request.headers.getall("Origin", ())
        if len(origins) == 1 and origins[0] in self._origins:
            record.headers |= {
                "Access-Control-Allow-Origin": origins[0],
                "Access-Control-Expose-Headers": "Retry-After, X-Gollama-Worker, "
                "X-Gollama-Attempts, X-Gollama-Queue-Ms, X-Request-Id, "
                "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, "
                "X-RateLimit-Reset-Requests, X-RateLimit-Limit-Tokens, "
                "X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens",
            }

    # --- Ending -------------------------------------------------------------------

    async def finish(self, limit: float) -> None:
        """Wait for running requests, at most `limit` seconds; then cut the rest.

        What comes on a connection that is open already is refused from now on.
        """
        self._draining = True
        try:
            async with asyncio.timeout(limit):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("cutting %d running requests", len(self._running))
        self.cut()
        await self._idle.wait()

    def cut(self) -> None:
        """Cancel every running request; its client is told if that is possible."""
        self._cutting = True
        for task in self._running:
            task.cancel()

    def _close_down(self, request: web.BaseRequest, record: Record) -> web.Response:
        response = self._refuse(draining(), request, record)
        response.headers.update(record.headers)
        response.force_close()
        record.status = response.status
        return response


def draining() -> HubError:
    """Say that the hub is about to end."""
    return HubError(Code.DRAINING, "The hub is shutting down.", retry_after=RETRY_AFTER)


async def _answer_preflight(request: web.BaseRequest, record: Record) -> web.Response:
    """Answer a browser that asks whether it may ask; no worker is touched."""
    headers = {
        "Access-Control-Allow-Methods": "GET, POST",
        # SDKs send headers of their own; the asterisk does not cover the first one,
        # and older browsers do not know it.
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, *",
        "Access-Control-Max-Age": "600",
    }
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        # A public page asks for a hub in a private network (WICG, Private Network
        # Access); it is as much as its origin was let in for.
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)
