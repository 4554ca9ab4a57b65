"""The hub's own status: liveness, readiness and metrics."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.response import Response
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.telemetry.metrics import CONTENT_TYPE, Telemetry
from gollama_proxy.wire.errors import Code, RequestError

# Metrics name every worker and model, which is more than users should see.
_MAY_SCRAPE = frozenset({"metrics", "admin"})


class Status:
    """Probes are open and give no details; metrics require a token with a scope."""

    def __init__(
        self,
        is_ready: Callable[[], bool],
        telemetry: Telemetry,
        authenticator: Authenticator | None,
    ) -> None:
        self._is_ready = is_ready
        self._telemetry = telemetry
        self._authenticator = authenticator  # None: metrics are open

    def __repr__(self) -> str:
        return f"<Status ready={self._is_ready()}>"

    async def live(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /livez`: the process runs, whatever the state of the workers."""
        return Response(b'{"status":"ok"}')

    async def ready(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /readyz` and `/health`: 200 if a worker is usable."""
        if self._is_ready():
            return Response(b'{"status":"ok"}')
        return Response(b'{"status":"no worker is ready"}', status=503)

    async def metrics(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /metrics`."""
        if self._authenticator is not None:
            principal = self._authenticator.identify(request, record)
            if principal.scopes.isdisjoint(_MAY_SCRAPE):
                text = "Your token does not allow this: it needs the scope metrics."
                raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        page = self._telemetry.exposition()
        return Response(page, fields=f"Content-Type: {CONTENT_TYPE}\r\n")
