"""Finds the handler of a request by path and method, and answers preflights."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, RequestError

# Takes a request and its record, of the type that the handler needs.
Handler = Callable[[web.BaseRequest, Any], Awaitable[Response | Sent]]
# Path → method → handler.  A path that ends with a slash is followed by a name, which
# may contain slashes; `{name}` in a path stands for one segment, see `name_in`.
Routes = Mapping[str, Mapping[str, Handler]]

# In every answer to an allowed page; the asterisk would not cover all of them.
_EXPOSED = (
    "Access-Control-Expose-Headers: Retry-After, X-Gollama-Worker, "
    "X-Gollama-Attempts, X-Gollama-Queue-Ms, X-Request-Id, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, "
    "X-RateLimit-Reset-Requests, X-RateLimit-Limit-Tokens, "
    "X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens\r\n"
)


class Router:
    """Finds handlers; a path is looked up as it was sent, neither decoded nor changed.

    `origins` are the web pages that may read the answers (CORS).
    """

    def __init__(self, routes: Routes, origins: Sequence[str] = ()) -> None:
        self._routes = routes
        self._parents = tuple(path for path in routes if path.endswith("/"))
        self._patterns = [
            (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path)
            for path in routes
            if "{" in path
        ]
        self._origins = frozenset(origins)
        self.has_origins = bool(origins)  # whether any page may read the answers

    def __repr__(self) -> str:
        return f"<Router of {len(self._routes)} paths>"

    def find(self, request: web.BaseRequest, record: Record) -> Handler:
        """Find the handler of a request; its record gets the route.

        Raises:
            RequestError: 404 or 405.
        """
        path = request.raw_path.partition("?")[0]
        methods = self._routes.get(path)
        if methods is None or path in self._parents:
            path, methods = self._find_parent(path, request.method, record)
        record.route = path
        method = request.method
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is not None:
            return handler
        if (
            method == "OPTIONS"
            and self.admits_origin(request)
            and "Access-Control-Request-Method" in request.headers
        ):
            return _answer_preflight
        allowed = ", ".join(sorted(methods))
        text = f"{method} is not allowed on {path}; allowed: {allowed}."
        raise RequestError(Code.METHOD_NOT_ALLOWED, text, allow=allowed)

    def _find_parent(
        self, path: str, method: str, record: Record
    ) -> tuple[str, Mapping[str, Handler]]:
        """Find the route of a path that is followed by a name.

        Raises:
            RequestError: 404, there is none.
        """
        for parent in self._parents:
            if path.startswith(parent) and path != parent:
                return parent, self._routes[parent]
        for pattern, route in self._patterns:
            if pattern.fullmatch(path):
                return route, self._routes[route]
        # The log shows it without a query or `user:password@`: enough logs have them.
        if path.startswith("/"):
            record.path = path
        what = repr(path[:200]) if record.path else "such a target"
        raise RequestError(Code.UNKNOWN_URL, f"There is no {method} {what} here.")

    # --- Web pages ----------------------------------------------------------------

    def origin_lines(self, request: web.BaseRequest) -> str:
        """Return the header lines that let a configured page read an answer.

        (Fetch standard, 3.2.)  Without them the browser withholds the answer from the
        page.
        """
        # For caches: the answer depends on the origin.
        fields = "Vary: Origin\r\n"
        if self.admits_origin(request):
            origin = request.headers["Origin"]
            fields += f"Access-Control-Allow-Origin: {origin}\r\n{_EXPOSED}"
        return fields

    def admits_origin(self, request: web.BaseRequest) -> bool:
        """Whether a request comes from a configured page; repeated origins do not."""
        origins = request.headers.getall("Origin", ())
        return len(origins) == 1 and origins[0] in self._origins


def name_in(request: web.BaseRequest, record: Record) -> str:
    """Return the name in a path, decoded, where its route has braces."""
    path = request.raw_path.partition("?")[0]
    segments = zip(record.route.split("/"), path.split("/"), strict=True)
    return next(unquote(given) for part, given in segments if part.startswith("{"))


async def _answer_preflight(request: web.BaseRequest, record: Record) -> Response:
    """Answer a preflight request of a browser; no worker is involved."""
    fields = (
        "Access-Control-Allow-Methods: GET, POST\r\n"
        # SDKs send further headers; the asterisk does not cover the first one, and
        # older browsers do not support it.
        "Access-Control-Allow-Headers: Authorization, Content-Type, X-Api-Key, *\r\n"
        "Access-Control-Max-Age: 600\r\n"
    )
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        # A public page may use a hub in a private network (WICG, Private Network
        # Access) if its origin is configured.
        fields += "Access-Control-Allow-Private-Network: true\r\n"
    return Response(status=204, fields=fields)
