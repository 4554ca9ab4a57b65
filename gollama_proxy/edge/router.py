"""Finds the handler of a request, and has those for what the hub answers itself.

Those are preflights, liveness, readiness, metrics, and the list of models."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp.web_request import BaseRequest

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Config
from gollama_proxy.config.tls import Credentials
from gollama_proxy.config.values import host_and_port
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.response import (
    CLOSE,
    KEEP,
    SERVER,
    Response,
    Sent,
    error_response,
    write_whole,
)
from gollama_proxy.edge.server import Server
from gollama_proxy.fleet.pool import may_use
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.telemetry.exposition import (
    OPEN_METRICS,
    TEXT,
    prefers_open_metrics,
)
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.wire.description import INPUTS
from gollama_proxy.wire.errors import Code, ProxyError, RequestError

# Takes a request and its record, of the type that the handler needs.
Handler = Callable[[BaseRequest, Any], Awaitable[Response | Sent]]
# Path → method → handler.  A path that ends with a slash is followed by a name, which
# may contain slashes, except for the root; `{name}` in a path stands for one segment,
# see `name_in`.
Routes = Mapping[str, Mapping[str, Handler]]

# Metrics name every worker and model, which is more than users should see.
_MAY_SCRAPE = frozenset({"metrics", "admin"})
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
        self._parents = tuple(path for path in routes if path[1:].endswith("/"))
        self._patterns = [
            (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path)
            for path in routes
            if "{" in path
        ]
        self._origins = frozenset(origins)
        self.has_origins = bool(origins)  # whether any page may read the answers

    def __repr__(self) -> str:
        return f"<Router of {len(self._routes)} paths>"

    def find(self, request: BaseRequest, record: Record) -> Handler:
        """Find the handler of a request; its record gets the route.

        Raises:
            RequestError: 404 or 405.
        """
        path = request.raw_path
        methods = self._routes.get(path)
        if methods is None:
            path = path.partition("?")[0]
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
        names = {*methods, "HEAD"} if "GET" in methods else methods
        allowed = ", ".join(sorted(names))
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

    def origin_lines(self, request: BaseRequest) -> str:
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

    def admits_origin(self, request: BaseRequest) -> bool:
        """Whether a request comes from a configured page; repeated origins do not."""
        origins = request.headers.getall("Origin", ())
        return len(origins) == 1 and origins[0] in self._origins


def name_in(request: BaseRequest, record: Record) -> str:
    """Return the name in a path, decoded, where its route has braces."""
    path = request.raw_path.partition("?")[0]
    segments = zip(record.route.split("/"), path.split("/"), strict=True)
    return next(unquote(given) for part, given in segments if part.startswith("{"))


async def _answer_preflight(request: BaseRequest, record: Record) -> Response:
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


# --- What the hub itself answers --------------------------------------------------


class Status:
    """Probes are open and give no details; metrics require a token with a scope."""

    def __init__(
        self,
        is_ready: Callable[[], bool],
        telemetry: Telemetry,
        authenticator: Authenticator,
        is_open: Callable[[], bool],
        are_elsewhere: Callable[[], bool] = bool,
    ) -> None:
        """Make the handlers.

        If `is_open()`, metrics need no token; if they `are_elsewhere()`, `metrics` has
        none.
        """
        self._is_ready = is_ready
        self._telemetry = telemetry
        self._authenticator = authenticator
        self._is_open = is_open
        self._are_elsewhere = are_elsewhere

    def __repr__(self) -> str:
        return f"<Status ready={self._is_ready()}>"

    async def live(self, request: BaseRequest, record: Record) -> Response:
        """Answer `GET /livez`: the process runs, whatever the state of the workers."""
        return Response(b'{"status":"ok"}')

    async def ready(self, request: BaseRequest, record: Record) -> Response:
        """Answer `GET /readyz` and `/health`: 200 if a worker is usable."""
        if self._is_ready():
            return Response(b'{"status":"ok"}')
        return Response(b'{"status":"no worker is ready"}', status=503)

    async def metrics(self, request: BaseRequest, record: Record) -> Response:
        """Answer `GET /metrics` on the main address."""
        if self._are_elsewhere():
            text = "This hub serves its metrics on another address (metrics.listen)."
            raise RequestError(Code.UNKNOWN_URL, text)
        return await self.scrape(request, record)

    async def scrape(self, request: BaseRequest, record: Record) -> Response:
        """Answer with the page of metrics."""
        if not self._is_open():
            principal = self._authenticator.identify(request, record)
            if principal.scopes.isdisjoint(_MAY_SCRAPE):
                text = "Your token does not allow this: it needs the scope metrics."
                raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        open_metrics = prefers_open_metrics(request.headers.get("Accept", ""))
        page = await self._telemetry.page(open_metrics=open_metrics)
        kind = OPEN_METRICS if open_metrics else TEXT
        return Response(page, fields=f"Content-Type: {kind}\r\n")


class MetricsServer:
    """Serves `/metrics` on its own addresses, if it has any.

    They share nothing with the address for clients but its certificate: a hub without
    free connections can still be scraped, and one that drains, too.
    """

    def __init__(
        self,
        status: Status,
        ended: Callable[[Record], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one that does not listen yet; `ended` is called for each request."""
        self._status = status
        self._ended = ended
        self._clock = clock
        self._servers: dict[str, Server] = {}  # by address, as it was set

    def __repr__(self) -> str:
        return f"<MetricsServer of {len(self._servers)} addresses>"

    def __bool__(self) -> bool:
        return bool(self._servers)

    @property
    def urls(self) -> list[str]:
        """Where the metrics are, with the actual ports."""
        servers = self._servers.values()
        return [f"{url}/metrics" for server in servers for url in server.urls]

    async def open(
        self,
        config: Config,
        tls: Credentials | None,
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        """Listen on the addresses of `metrics.listen` that are new.

        Those that are no longer set, but have a port that a new one needs, are left
        before: 127.0.0.1:9464 is a part of 0.0.0.0:9464.

        Raises:
            ConfigError: one cannot be listened on.  Nothing has changed then.
        """
        opened: dict[str, Server] = {}
        left = self._leave(config.metrics.listen)
        address = ""
        try:
            if inherited:
                opened[_INHERITED] = server = self._server(config, tls)
                await server.listen("", 0, inherited)
            for address in config.metrics.listen:
                if address not in self._servers:
                    opened[address] = server = self._server(config, tls)
                    await server.listen(*host_and_port(address))
        except OSError as exc:
            for each in opened.values():
                each.stop_listening()
            for server, (host, port) in left:
                with contextlib.suppress(OSError):  # another program was faster
                    await server.listen(host, port)
            raise addresses.refuse_metrics(address, exc) from exc
        self._servers |= opened

    def _leave(self, wanted: Sequence[str]) -> list[tuple[Server, tuple[str, int]]]:
        """Free the ports that are wanted; return what has to be listened on again."""
        ports = {host_and_port(each)[1] for each in wanted if each not in self._servers}
        left = []
        for address, server in self._servers.items():
            if address == _INHERITED or address in wanted:
                continue
            places = [(place[0], place[1]) for place in server.addresses]
            if any(port in ports for _, port in places):
                server.stop_listening()
                left += [(server, place) for place in places]
        return left

    async def reconfigure(self, config: Config, tls: Credentials | None) -> None:
        """Take other settings, and leave the addresses that are no longer set."""
        for address in [*self._servers]:
            if address in config.metrics.listen or address == _INHERITED:
                self._servers[address].reconfigure(config, tls)
            else:
                await self._servers.pop(address).close()

    async def close(self) -> None:
        """Leave all addresses."""
        while self._servers:
            await self._servers.popitem()[1].close()

    def _server(self, config: Config, tls: Credentials | None) -> Server:
        return Server(self._serve, config, self._refuse, tls=tls)

    async def _serve(self, request: BaseRequest) -> Sent:
        record = Record("-", request.method, "/metrics", remote=request.remote or "")
        record.started = self._clock()
        try:
            if request.raw_path.partition("?")[0] != record.route:
                record.route = "other"
                text = "This address serves /metrics, and nothing else."
                raise RequestError(Code.UNKNOWN_URL, text)
            if request.method not in ("GET", "HEAD"):
                text = f"{request.method} is not allowed on /metrics; allowed: GET."
                raise RequestError(Code.METHOD_NOT_ALLOWED, text, allow="GET")
            response = await self._status.scrape(request, record)
            record.outcome = Outcome.COMPLETE
        except ProxyError as error:
            record.outcome, record.error = Outcome.ERROR, error.code
            response = error_response(error)
        record.status = response.status
        self._ended(record)
        keep = request.keep_alive and request.content.is_eof()
        try:
            fields = f"Server: {SERVER}\r\n"
            if write_whole(request, response, fields, keep_alive=keep):
                await request.writer.drain()
        except ConnectionError:
            return CLOSE
        return KEEP if keep else CLOSE

    def _refuse(self, request: BaseRequest, error: ProxyError) -> None:
        record = Record("-", "-", outcome=Outcome.ERROR, error=error.code)
        record.started, record.status = self._clock(), error.code.status
        self._ended(record)


_INHERITED = "inherited"  # the key of sockets that systemd has opened

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

    async def list_models(self, request: BaseRequest, record: Record) -> Response:
        """Answer `GET /v1/models`."""
        principal = self._authenticator.identify(request, record)
        data = [self._entry(name) for name in self._names(principal)]
        return Response(msgspec.json.encode({"object": "list", "data": data}))

    async def show_model(self, request: BaseRequest, record: Record) -> Response:
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
                    "slots": worker.slots,
                    "loaded": worker.has_loaded(model),
                }
                for worker in workers
            ],
        }
        if model != name:
            extra["alias_of"] = model
        entry = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gollama",
            "gollama": extra,
        }
        if inputs := _inputs(workers, model):
            entry["architecture"] = {  # as llama-server lists it
                "input_modalities": ["text", *inputs],
                "output_modalities": ["text"],
            }
        return entry


def _inputs(workers: Iterable[Worker], model: str) -> list[str]:
    """Return what a model takes besides text on every worker that may answer."""
    of_each = [worker.inputs_of(model) for worker in workers if worker.description]
    return [
        kind
        for kind in INPUTS.values()
        if of_each and all(kind in each for each in of_each)
    ]


def _any_of(values: Iterable[bool | None]) -> bool | None:
    """Return whether any value is True; None if all of them are None."""
    return max((each for each in values if each is not None), default=None)
