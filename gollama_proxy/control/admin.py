"""The admin API: `/admin/*`, JSON, for tokens with the scope `admin`.

`openapi.json` beside this file describes it, and is served with it.

**Without authentication** anything that reaches the address of the hub may use its
models.  That is no reason to let it change the fleet, and a browser on the same machine
reaches the address as well.  So with `auth.mode = "off"` the API is only for programs
on the hub's own machine, and for no web page of another site (`check_local`):

* the peer has a loopback address, and no header of a proxy hides another one;
* `Host` is a loopback address or `localhost`, as a page whose name was made to lead
  here (DNS rebinding) would send its own;
* `Origin` and `Sec-Fetch-Site` are absent or of this hub's own pages.

With authentication a token is needed, which no browser adds by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from gollama_proxy.config import addresses
from gollama_proxy.config.settings import Config
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import Handler, Routes, name_in
from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.tokens import Fitting
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, RequestError

SCOPE = "admin"
# Each of them shows that the peer speaks for another one (RFC 9110, 7.6.3; RFC 7239).
_OF_PROXIES = (
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-IP",
)
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]*)?")


class Parts(Protocol):
    """The parts of a hub that operators see and change."""

    @property
    def config(self) -> Config: ...
    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def fitting(self) -> Fitting: ...


class Call(NamedTuple):
    """One call of the API by an operator who may make it."""

    request: web.BaseRequest
    record: Record
    caller: Principal

    @property
    def name(self) -> str:
        """The name or id in the path."""
        return name_in(self.request, self.record)


_Handler = Callable[[Call], Awaitable[Response | Sent]]


class Admin:
    """Answers for the admin API."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._description = b""  # of the API, once it was read

    def __repr__(self) -> str:
        return f"<Admin of {self._hub!r}>"

    def routes(self) -> Routes:
        """Return the handlers of all paths."""
        routes: dict[str, dict[str, _Handler]] = {
            "/admin/workers": {"GET": self._list_workers},
            "/admin/workers/{name}": {"GET": self._show_worker},
            "/admin/openapi.json": {"GET": self._show_api},
        }
        return {
            path: {
                method: self._guarded(handler) for method, handler in methods.items()
            }
            for path, methods in routes.items()
        }

    # --- Permission ---------------------------------------------------------------

    def _guarded(self, handler: _Handler) -> Handler:
        async def guard(request: web.BaseRequest, record: Record) -> Response | Sent:
            return await handler(Call(request, record, self._admit(request, record)))

        return guard

    def _admit(self, request: web.BaseRequest, record: Record) -> Principal:
        """Return the caller if it may use the API.

        Raises:
            RequestError: 401 or 403.
        """
        caller = self._hub.authenticator.identify(request, record)
        if SCOPE not in caller.scopes:
            text = f"Your token does not allow this: it needs the scope {SCOPE}."
            raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        if self._hub.config.auth.mode == "off":
            check_local(request)
        return caller

    # --- Workers ------------------------------------------------------------------

    async def _list_workers(self, call: Call) -> Response:
        workers = [self._shown(worker) for worker in self._hub.registry.workers]
        return _answer({"workers": workers})

    async def _show_worker(self, call: Call) -> Response:
        return _answer(self._shown(self._worker(call)))

    def _worker(self, call: Call) -> Worker:
        """Return the worker that a path names.

        Raises:
            RequestError: 404, there is none.
        """
        try:
            return self._hub.registry.find(call.name)
        except LookupError:
            text = f"No worker is named {call.name[:200]!r}."
            raise RequestError(Code.NOT_FOUND, text, param="name") from None

    def _shown(self, worker: Worker) -> dict[str, Any]:
        """Return the state of a worker, as the API shows it."""
        described = worker.description
        return {
            "name": worker.name,
            "url": worker.url,
            "source": worker.source,
            "state": worker.state.value,
            "since": self._ago(worker.since),
            "reason": worker.reason,
            "hold": worker.held,
            "breaker": self._shown_breaker(worker.breaker),
            "weight": worker.weight,
            "slots": worker.slots,
            "running": worker.in_flight,
            "models": [
                {
                    "name": model.name,
                    "context": worker.context_of(model.name),
                    "loaded": worker.has_loaded(model.name),
                    "progress": worker.progress.get(model.name),
                    "breaker": self._shown_breaker(worker.breakers(model.name)[-1]),
                }
                for model in worker.models
            ],
            "context": described.context if described else None,
            "vram_gib": worker.config.vram_gib,
            "build": (described.build or None) if described else None,
            "speed": self._shown_speed(worker),
            "agent": None,
            "last_error": None,
        }

    def _shown_breaker(self, breaker: Breaker) -> dict[str, Any]:
        return {
            "state": breaker.state.value,
            "reason": breaker.reason,
            "since": self._ago(breaker.since) if breaker.generation else None,
            "opens_in": round(breaker.opens_in(), 3),
        }

    def _shown_speed(self, worker: Worker) -> dict[str, float | None]:
        """Return how fast a worker is with the model that it had last."""
        model, pace = next(reversed(worker.paces.items()), ("", None))
        speed = None if pace is None else pace.speed
        writes = None if speed is None else speed.writes(max(worker.in_flight, 1))
        reads = None
        if speed is not None and speed.reads is not None:
            reads = self._hub.fitting.likely_tokens(model, int(speed.reads))
        first = pace.first_token if pace is not None else 0.0
        return {
            "tokens_per_second": writes and round(writes, 2),
            "prompt_tokens_per_second": reads,
            "first_token": round(first, 3) if first else None,
        }

    def _ago(self, moment: float) -> float:
        return round(max(0.0, self._hub.clock() - moment), 3)

    # --- The hub ------------------------------------------------------------------

    async def _show_api(self, call: Call) -> Response:
        if not self._description:
            self._description = await asyncio.to_thread(_read_description)
        return Response(self._description)


def _read_description() -> bytes:
    return resources.files(__package__).joinpath("openapi.json").read_bytes()


def _answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status)


def check_local(request: web.BaseRequest) -> None:
    """Check that a request is from a program on this machine, or a page of the hub.

    Raises:
        RequestError: 403, it is not.
    """
    headers = request.headers
    host, why = headers.get("Host", ""), ""
    own = f"http://{host}", f"https://{host}"
    if not addresses.is_loopback(request.remote or ""):
        why = "its address is not a loopback address"
    elif proxies := [name for name in _OF_PROXIES if name in headers]:
        why = f"it came through a proxy ({proxies[0]})"
    elif not _is_local_name(host):
        why = "its Host is not localhost or a loopback address"
    elif any(origin not in own for origin in headers.getall("Origin", ())):
        why = "it is from a web page of another site (Origin)"
    elif headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        why = "it is from a web page of another site (Sec-Fetch-Site)"
    if why:
        text = (
            "Without authentication, /admin is only for programs on the hub's own "
            f"machine, and this request is refused: {why}."
        )
        raise RequestError(Code.LOCAL_ONLY, text)


def _is_local_name(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and addresses.is_loopback((match[1] or match[2]).lower())
