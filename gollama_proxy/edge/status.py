"""What the hub answers itself: liveness, readiness, metrics, and the list of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.response import Response
from gollama_proxy.fleet.registry import Registry, may_use
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
        authenticator: Authenticator,
        is_open: Callable[[], bool],
    ) -> None:
        """Make the handlers; if `is_open()`, metrics need no token."""
        self._is_ready = is_ready
        self._telemetry = telemetry
        self._authenticator = authenticator
        self._is_open = is_open

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
        if not self._is_open():
            principal = self._authenticator.identify(request, record)
            if principal.scopes.isdisjoint(_MAY_SCRAPE):
                text = "Your token does not allow this: it needs the scope metrics."
                raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        page = self._telemetry.exposition()
        return Response(page, fields=f"Content-Type: {CONTENT_TYPE}\r\n")


# --- Models -----------------------------------------------------------------------


class ModelList:
    """Answers from the registry alone, without a request to a worker."""

    def __init__(self, authenticator: Authenticator, registry: Registry) -> None:
        self._authenticator = authenticator
        self._registry = registry
        # llama-server returns the current time at every call; clients compare it, so it
        # is constant here.
        self._created = int(time.time())

    def __repr__(self) -> str:
        return f"<ModelList of {self._registry!r}>"

    async def list_models(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /v1/models`."""
        principal = self._authenticator.identify(request, record)
        data = [self._entry(name) for name in self._names(principal)]
        return Response(msgspec.json.encode({"object": "list", "data": data}))

    async def show_model(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /v1/models/{id}`; an id may contain slashes."""
        principal = self._authenticator.identify(request, record)
        path = request.raw_path.partition("?")[0]
        name = unquote(path.removeprefix(record.route))
        if not (name in self._names(principal) or self._is_caught(principal, name)):
            text = f"The model {name!r} does not exist."
            raise RequestError(Code.MODEL_NOT_FOUND, text, param="model")
        return Response(msgspec.json.encode(self._entry(name)))

    def _names(self, principal: Principal) -> list[str]:
        models, aliases = self._registry.models(), self._registry.aliases()
        names = models + [name for name in aliases if name not in models]
        return [
            name
            for name in names
            if may_use(principal.models, name)
            or may_use(principal.models, aliases.get(name, name))
        ]

    def _is_caught(self, principal: Principal, name: str) -> bool:
        """Whether a name that is not in the list is an alias, by a wildcard.

        Some clients look a model up before they use it.
        """
        if not self._registry.alias_of(name):
            return False
        model = self._registry.model_of(name)
        return self._registry.allows(principal.models, name, model)

    def _entry(self, name: str) -> dict[str, Any]:
        model = self._registry.model_of(name)
        workers = self._registry.pool(model).workers
        contexts = [c for w in workers if (c := w.context_of(model)) is not None]
        states = {worker.state.value for worker in workers}
        extra: dict[str, Any] = {
            "state": "ready" if "ready" in states else min(states, default="down"),
            "context": max(contexts, default=None),
            "loaded": _any_of(worker.has_loaded(model) for worker in workers),
            "workers": [
                {
                    "name": worker.name,
                    "state": worker.state.value,
                    "context": worker.context_of(model),
                    "slots": worker.description and worker.description.slots,
                    "loaded": worker.has_loaded(model),
                }
                for worker in workers
            ],
        }
        if model != name:
            extra["alias_of"] = model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gollama",
            "gollama": extra,
        }


def _any_of(values: Iterable[bool | None]) -> bool | None:
    """Return whether any value is True; None if all of them are None."""
    return max((each for each in values if each is not None), default=None)
