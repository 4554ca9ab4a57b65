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
import logging
import os
import random
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from importlib import resources
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gollama_proxy.config import addresses
from gollama_proxy.config.load import load_worker
from gollama_proxy.config.mistakes import ConfigError
from gollama_proxy.config.settings import API_KEYS, WORKER_KEYS, WorkerConfig
from gollama_proxy.control import views
from gollama_proxy.control.events import STREAM, Events, Recent
from gollama_proxy.control.explain import Case, decide, other_workers
from gollama_proxy.control.views import Shown, Views
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import Handler, Routes, name_in
from gollama_proxy.fleet.worker import Hold, Source, Worker
from gollama_proxy.proxy.body import Body, answer_expectation
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.scheduling.balancer import RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.state.local import LocalState, StateError, StoredWorker
from gollama_proxy.wire.errors import Code, HubError, ProxyError, RequestError
from gollama_proxy.wire.openai import ENDPOINTS

audit = logging.getLogger("gollama_proxy.audit")

MOST_BODY = 1 << 20  # bytes of a call; a request to explain may be long
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


# These lead to files or variables of the hub's machine, whose content would be sent to
# an address that the caller chooses.  Whoever manages workers need not own the machine.
_FILES = ("api_key_file", "ca_file", "client_certificate", "client_key")
_KEY_PREFIX = "GOLLAMA_KEY_"
_FILTERS = ("id", "subject", "model", "worker", "outcome")


class Parts(views.Parts, Protocol):
    """The parts of a hub that operators see and change."""

    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def state(self) -> LocalState: ...
    @property
    def recent(self) -> Recent: ...
    @property
    def events(self) -> Events: ...
    @property
    def changing(self) -> asyncio.Lock:
        """Held while the fleet or the settings change."""

    async def prepare(self, config: WorkerConfig) -> None:
        """Read the certificates of a worker that will be added."""

    async def revoke(self, kind: str, value: str) -> None:
        """Revoke a token ("jti") or a subject ("sub")."""


class Call(NamedTuple):
    """One call of the API by an operator who may make it."""

    request: web.BaseRequest
    x: Exchange
    caller: Principal

    @property
    def name(self) -> str:
        """The name or id in the path."""
        return name_in(self.request, self.x)


_Handler = Callable[[Call], Awaitable[Response | Sent]]


class Admin:
    """Answers for the admin API."""

    def __init__(self, hub: Parts, views: Views) -> None:
        self._hub = hub
        self._views = views
        self._description = b""  # of the API, once it was read

    def __repr__(self) -> str:
        return f"<Admin of {self._hub!r}>"

    def routes(self) -> Routes:
        """Return the handlers of all paths."""
        registry = self._hub.registry
        routes: dict[str, dict[str, _Handler]] = {
            "/admin/workers": {"GET": self._list_workers, "POST": self._add_worker},
            "/admin/workers/{name}": {
                "GET": self._show_worker,
                "PATCH": self._change_worker,
                "DELETE": self._remove_worker,
            },
            "/admin/workers/{name}/drain": {"POST": self._holding(registry.drain)},
            "/admin/workers/{name}/undrain": {"POST": self._holding(registry.undrain)},
            "/admin/workers/{name}/pause": {"POST": self._holding(registry.pause)},
            "/admin/workers/{name}/unpause": {"POST": self._holding(registry.unpause)},
            "/admin/workers/{name}/reset-breaker": {"POST": self._reset_breaker},
            "/admin/models": {"GET": self._list_models},
            "/admin/queue": {"GET": self._list_queue},
            "/admin/queue/{id}": {"DELETE": self._remove_from_queue},
            "/admin/exchanges": {"GET": self._list_exchanges},
            "/admin/exchanges/{id}": {"DELETE": self._cancel},
            "/admin/requests": {"GET": self._list_requests},
            "/admin/config": {"GET": self._show_config},
            "/admin/explain": {"POST": self._explain},
            "/admin/revoke": {"POST": self._revoke},
            "/admin/events": {"GET": self._follow},
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
        async def guard(request: web.BaseRequest, x: Exchange) -> Response | Sent:
            return await handler(Call(request, x, self._admit(request, x)))

        return guard

    def _admit(self, request: web.BaseRequest, x: Exchange) -> Principal:
        """Return the caller if it may use the API.

        Raises:
            RequestError: 401 or 403.
        """
        caller = self._hub.authenticator.identify(request, x)
        if SCOPE not in caller.scopes:
            text = f"Your token does not allow this: it needs the scope {SCOPE}."
            raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        if self._hub.config.auth.mode == "off":
            check_local(request)
        return caller

    def _audit(
        self, call: Call, action: str, target: str, old: object = "", new: object = ""
    ) -> None:
        """Log a change with its author, the old value and the new one."""
        fields = {
            "subject": call.x.subject,
            "remote": call.x.remote,
            "action": action,
            "target": target,
            **{
                name: str(value)
                for name, value in (("old", old), ("new", new))
                if value
            },
            "id": call.x.id,
        }
        audit.info("admin", extra={"fields": fields})
        self._hub.events.publish("change", fields)

    # --- Workers ------------------------------------------------------------------

    async def _list_workers(self, call: Call) -> Response:
        workers = [self._views.worker(each) for each in self._hub.registry.workers]
        return _answer({"workers": workers})

    async def _show_worker(self, call: Call) -> Response:
        return _answer(self._views.worker(self._worker(call.name)))

    def _worker(self, name: str) -> Worker:
        """Return the worker that a path names.

        Raises:
            RequestError: 404, there is none.
        """
        try:
            return self._hub.registry.find(name)
        except LookupError:
            text = f"No worker is named {name[:200]!r}."
            raise RequestError(Code.NOT_FOUND, text, param="name") from None

    async def _add_worker(self, call: Call) -> Response:
        row = await self._read(call)
        config = _load(row)
        async with self._hub.changing:
            await self._prepare(config)
            try:
                worker = self._hub.registry.add(config, Source.ADMIN)
            except ConfigError as exc:
                raise _refusal(exc, Code.CONFLICT) from None
            await self._store(worker, row)
        self._audit(call, "add worker", worker.name, new=config.url)
        return _answer(self._views.worker(worker), status=201)

    async def _change_worker(self, call: Call) -> Response:
        patch = await self._read(call)
        async with self._hub.changing:
            worker = self._worker(call.name)
            before, row = worker.config, self._row_of(worker)
            row = {k: v for k, v in (row | patch).items() if v is not None}
            config = _load(row, ours=patch.keys())
            if "api_key_env" not in row and "api_key_env" not in patch:
                config = replace(config, api_key=before.api_key)
            await self._prepare(config)
            try:
                worker = self._hub.registry.replace(config, before.name)
            except ConfigError as exc:
                raise _refusal(exc, Code.CONFLICT) from None
            if worker.source is Source.ADMIN:
                if worker.name != before.name:
                    await self._hub.state.forget(before.name)
                await self._store(worker, row)
        changes = {key: _changed(before, config, key) for key in patch}
        old = {key: pair[0] for key, pair in changes.items()}
        new = {key: pair[1] for key, pair in changes.items()}
        self._audit(call, "change worker", before.name, old, new)
        return self._show_changed(worker)

    async def _remove_worker(self, call: Call) -> Response:
        async with self._hub.changing:
            worker = self._worker(call.name)
            self._hub.registry.remove(worker.name)
            await self._hub.state.forget(worker.name)
        self._audit(call, "remove worker", worker.name, old=worker.config.url)
        state = "draining" if worker.in_flight else "removed"
        note = _NOTES.get(worker.source)
        return _answer({"name": worker.name, "state": state, "note": note})

    def _holding(self, change: Callable[[str], Worker]) -> _Handler:
        """Make the handler that holds a worker back, or no longer; harmless twice."""

        async def hold(call: Call) -> Response:
            async with self._hub.changing:
                worker = self._worker(call.name)
                before = worker.held
                change(worker.name)
                if worker.held is not before:
                    await self._store(worker)
            if worker.held is not before:
                self._audit(call, "hold worker", worker.name, before, worker.held)
            return self._show_changed(worker, note=False)

        return hold

    async def _reset_breaker(self, call: Call) -> Response:
        worker = self._worker(call.name)
        before = worker.breaker.state.value
        worker.reset_breakers()
        self._audit(call, "reset breaker", worker.name, before, "closed")
        return self._show_changed(worker, note=False)

    def _show_changed(self, worker: Worker, *, note: bool = True) -> Response:
        text = _NOTES.get(worker.source) if note else None
        return _answer({"worker": self._views.worker(worker), "note": text})

    async def _prepare(self, config: WorkerConfig) -> None:
        try:
            await self._hub.prepare(config)
        except ConfigError as exc:
            raise _refusal(exc) from None

    def _row_of(self, worker: Worker) -> dict[str, Any]:
        """Return the `[[workers]]` table of a worker, without its API key."""
        stored = self._hub.state.find(worker.name)
        if stored is not None and stored.settings:
            return {**stored.settings, "name": worker.name}
        values = {
            key: getattr(worker.config, key)
            for key in WORKER_KEYS
            if key not in API_KEYS
        }
        return {key: value for key, value in values.items() if value}

    async def _store(
        self, worker: Worker, row: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a worker and its hold over a restart; for one of the file, its hold.

        Raises:
            HubError: 503, there is no more room.
        """
        name, state = worker.name, self._hub.state
        stored = state.find(name) or StoredWorker(name, worker.source)
        if row is not None:
            settings = {key: value for key, value in row.items() if key != "name"}
            stored = replace(stored, source=worker.source, settings=settings)
        hold = "" if worker.held is Hold.NONE else worker.held.value
        stored = replace(stored, hold=hold)
        try:
            if stored.settings or stored.hold:
                await state.put(stored)
            else:
                await state.forget(name)
        except StateError as exc:
            raise HubError(Code.INTERNAL, f"{exc}.") from None

    # --- Requests -----------------------------------------------------------------

    async def _list_models(self, call: Call) -> Response:
        return _answer({"models": self._views.models()})

    async def _list_queue(self, call: Call) -> Response:
        return _answer({"queue": self._views.queue()})

    async def _list_exchanges(self, call: Call) -> Response:
        return _answer({"exchanges": self._views.exchanges()})

    async def _cancel(self, call: Call) -> Response:
        return self._end_request(call, "cancel request", "is in flight", waiting=False)

    async def _remove_from_queue(self, call: Call) -> Response:
        return self._end_request(call, "remove from queue", "waits", waiting=True)

    def _end_request(
        self, call: Call, action: str, what: str, *, waiting: bool
    ) -> Response:
        """Cancel the requests with the id in the path; clients may repeat an id.

        Raises:
            RequestError: 404, there is none.
        """
        found = [
            x
            for x in views.in_flight(self._hub.proxy.running)
            if x.id == call.name and (x.state is State.QUEUED or not waiting)
        ]
        if not found:
            text = f"No request with the id {call.name[:64]!r} {what}."
            raise RequestError(Code.NOT_FOUND, text, param="id")
        for x in found:
            state = x.state.name.lower()
            self._hub.proxy.cancel(x)
            self._audit(call, action, x.id, f"{state} request of {x.subject}")
        return _answer({"id": call.name, "state": "cancelled"})

    async def _list_requests(self, call: Call) -> Response:
        query = dict(call.request.query)
        limit = query.pop("limit", "100")
        if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= 1000:
            text = f"limit = {limit[:40]!r}: must be a whole number from 1 to 1,000."
            raise RequestError(Code.INVALID_VALUE, text, param="limit")
        for name in query:
            if name not in _FILTERS:
                text = f"{name[:40]}: no such filter; known: {', '.join(_FILTERS)}."
                raise RequestError(Code.INVALID_VALUE, text, param=name[:40])
        return _answer({"requests": self._hub.recent.find(int(limit), **query)})

    async def _explain(self, call: Call) -> Response:
        """Answer what a request would get; a worker may count a long prompt for it."""
        asked = _decode(await self._receive(call.request), _Ask)
        x = Exchange(call.request, self._hub.clock())
        endpoint = ENDPOINTS.get(asked.path)
        if endpoint is None or endpoint.form:
            text = f"path = {asked.path[:60]!r}: must be a path that takes JSON."
            raise RequestError(Code.INVALID_VALUE, text, param="path")
        x.endpoint, x.needs_slot = endpoint, endpoint.slot
        x.subject = asked.subject or call.x.subject
        x.priority = asked.priority
        x.body = Body(cast(web.BaseRequest, _Given(asked)), endpoint, self._hub.config)
        try:
            shown = await self._foresee(x, asked)
        except ProxyError as error:
            return _answer(_without_worker(error))
        return _answer(shown)

    async def _foresee(self, x: Exchange, asked: _Ask) -> Shown:
        """Do with a request what is done with a real one, up to the choice.

        Raises:
            ProxyError: the request would be refused.
        """
        hub, config, body = self._hub, self._hub.config, x.body
        registry, balancer = hub.registry, hub.balancer
        await body.read(config.limits.replay_window)
        pool = registry.resolve(body.model, asked.models)
        x.model = x.asked = pool.model
        pools = registry.pools_for(pool, body.fallbacks, asked.models)
        budget = RetryBudget(config.retry.ratio, config.retry.floor, clock=hub.clock)
        x.plan = Plan.of(pools, x.endpoint.path, config, budget, random.Random())
        follows = x.endpoint.slot and balancer.follows(pool)
        prefixes = body.prefixes() if follows else ()
        x.plan.ask = Ask(pool.model, body.size, body.max_tokens, x.subject, prefixes)
        if not hub.fitting.is_certain(x):
            await hub.fitting.check(x)
        limit = asked.max_concurrency or config.queue.max_concurrency
        case = Case(x.plan, pools, x.subject, x.priority, limit, x.needs_slot)
        admission = hub.queue.admission
        decision = decide(case, balancer, admission, config.retry.patience)
        model, place = x.plan.pool.model, decision.place
        policy = views.policy_name(balancer.policy_of(model))
        tokens, counted = hub.fitting.estimate(x), bool(x.plan.needs.get(model))
        contexts = [w.context_of(model) for w in x.plan.pool.workers]
        largest = max((each for each in contexts if each is not None), default=None)
        answer = body.max_tokens * body.answers * body.prompts
        generates = x.endpoint.generates
        return {
            "model": model,
            "worker": decision.worker.name if decision.worker is not None else None,
            "code": decision.code,
            "reason": decision.reason,
            "policy": policy,
            "others": [
                {"worker": worker.name, "code": code, "reason": text}
                for worker, code, text in other_workers(
                    case, decision, registry, policy
                )
            ],
            "context": {
                "fits": None if largest is None else bool(x.plan.fitting(x.plan.pool)),
                "prompt_tokens": tokens,
                "counted": counted,
                "largest": largest,
            },
            "queue": place
            and {
                "position": place.position,
                "waiting": place.waiting,
                "expected": place.eta,
            },
            "charge": {
                "requests": 1,
                "prompt_tokens": tokens if generates else 0,
                "most_tokens": tokens + answer if answer and generates else None,
            },
        }

    # --- The hub ------------------------------------------------------------------

    async def _show_config(self, call: Call) -> Response:
        return _answer(self._views.settings())

    async def _revoke(self, call: Call) -> Response:
        """Revoke a token or a subject; requests that run are cancelled on demand.

        As when a token expires, an answer that has begun goes on: only its client has
        it, and a token that has leaked can begin no other one.
        """
        given = await self._read(call)
        kind, value, cancel = _read_revocation(given)
        try:
            await self._hub.revoke("sub" if kind == "subject" else kind, value)
        except StateError as exc:
            raise HubError(Code.INTERNAL, f"{exc}.") from None
        self._audit(call, "revoke", f"{kind}:{value}")
        running = []
        if kind == "subject":
            everything = views.in_flight(self._hub.proxy.running)
            running = [x for x in everything if x.subject == value]
        for x in running if cancel else ():
            self._hub.proxy.cancel(x)
        return _answer(
            {
                "revoked": kind,
                "value": value,
                "persistent": self._hub.state.folder is not None,
                "running": [x.id for x in running],
                "cancelled": cancel,
            }
        )

    async def _follow(self, call: Call) -> Response | Sent:
        if call.request.method == "HEAD":
            return Response(b"", fields=STREAM)

        def check() -> None:
            self._admit(call.request, call.x)

        return await self._hub.events.follow(call.request, call.x, check)

    async def _show_api(self, call: Call) -> Response:
        if not self._description:
            self._description = await asyncio.to_thread(_read_description)
        return Response(self._description)

    # --- Bodies -------------------------------------------------------------------

    async def _read(self, call: Call) -> dict[str, Any]:
        """Read the JSON object that a call sends.

        Raises:
            RequestError: 400, 408, 413 or 415.
        """
        value = _decode(await self._receive(call.request), object)
        if not isinstance(value, dict):
            text = "The request body must be a JSON object."
            raise RequestError(Code.INVALID_JSON, text)
        return value

    async def _receive(self, request: web.BaseRequest) -> bytes:
        # A page of another site can send a body of other types without asking first.
        if request.content_type != "application/json":
            text = "Content-Type must be application/json."
            raise RequestError(Code.UNSUPPORTED_MEDIA_TYPE, text)
        if request.headers.get("Content-Encoding", "identity") != "identity":
            text = "The request body must not be compressed here."
            raise RequestError(Code.UNSUPPORTED_ENCODING, text)
        answer_expectation(request)
        body, limit = b"", self._hub.config.timeouts.body
        try:
            async with asyncio.timeout(limit):
                while not request.content.at_eof():
                    body += await request.content.readany()
                    if len(body) > MOST_BODY:
                        text = f"The request body is larger than {MOST_BODY} bytes."
                        raise RequestError(Code.BODY_TOO_LARGE, text)
        except TimeoutError:
            text = "The request body arrived too slowly."
            raise RequestError(Code.BODY_TIMEOUT, text) from None
        except (web.RequestPayloadError, HttpProcessingError):
            text = "The framing of the request body is not valid HTTP."
            raise RequestError(Code.BAD_REQUEST, text) from None
        return body


_NOTES = {
    Source.FILE: "This worker is declared in the settings, which win at the next "
    "reload or start.",
    Source.AGENT: "This worker has an agent, which may register it again.",
}


class _Ask(msgspec.Struct, forbid_unknown_fields=True):
    """A request to explain."""

    model: str = ""
    subject: str = ""
    path: str = "/v1/chat/completions"
    prompt: str = ""
    request: dict[str, msgspec.Raw] | None = None
    priority: Priority = Priority.INTERACTIVE
    models: tuple[str, ...] | None = None
    max_concurrency: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0

    def body(self) -> bytes:
        """Return the body of the request; of a given one, no byte inside changes."""
        fields: dict[str, Any] = {"model": self.model} if self.model else {}
        if self.request is None:
            message = {"role": "user", "content": self.prompt}
            chat = self.path.endswith(("/chat/completions", "/messages"))
            fields |= {"messages": [message]} if chat else {"prompt": self.prompt}
        else:
            fields |= self.request
        return msgspec.json.encode(fields)


class _Given:
    """A request that was never sent, as far as `Body` reads one."""

    def __init__(self, asked: _Ask) -> None:
        self._body = asked.body()
        self.content_length = len(self._body)
        self.headers: Mapping[str, str] = {}
        self.content = self

    def __repr__(self) -> str:
        return f"<Given {self.content_length} bytes>"

    def is_eof(self) -> bool:
        return True

    def at_eof(self) -> bool:
        return True

    def read_nowait(self) -> bytes:
        return self._body


_T = TypeVar("_T")


def _decode(body: bytes, kind: type[_T]) -> _T:
    """Read a JSON object of a declared kind.

    Raises:
        RequestError: 400; it names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        match = re.search(r"`\$\.(\w+)|unknown field `([^`]*)`", str(exc))
        param = (match[1] or match[2])[:40] if match else None
        raise RequestError(Code.INVALID_VALUE, f"{exc}.", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = "The request body is not valid JSON."
        raise RequestError(Code.INVALID_JSON, text) from None


def _without_worker(error: ProxyError) -> Shown:
    """Explain a request that would be refused before any worker is looked at."""
    return {
        "model": "",
        "worker": None,
        "code": error.code,
        "reason": error.message,
        "policy": "",
        "others": [],
        "context": {
            "fits": False if error.code is Code.CONTEXT_LENGTH else None,
            "prompt_tokens": error.fields.get("n_prompt_tokens", 0),
            "counted": "n_prompt_tokens" in error.fields,
            "largest": error.fields.get("n_ctx"),
        },
        "queue": None,
        "charge": {"requests": 1, "prompt_tokens": 0, "most_tokens": None},
    }


def _load(row: Mapping[str, Any], ours: Collection[str] | None = None) -> WorkerConfig:
    """Make a worker of a `[[workers]]` table; `ours` are the keys of the call.

    Raises:
        RequestError: 400.
    """
    _refuse_files(row if ours is None else {key: row.get(key) for key in ours})
    try:
        config = load_worker("workers", row, os.environ)
    except ConfigError as exc:
        raise _refusal(exc) from None
    if config.is_group:
        text = f"workers.url = {config.url[:80]!r}: a group is for the settings file."
        raise RequestError(Code.INVALID_VALUE, text, param="url")
    return config


def _refuse_files(row: Mapping[str, Any]) -> None:
    for key in _FILES:
        if row.get(key) is not None:
            text = f"workers.{key}: names a file of the hub's machine; set it in the "
            raise RequestError(
                Code.INVALID_VALUE, f"{text}settings file instead.", param=key
            )
    variable = row.get("api_key_env")
    if variable is not None and not str(variable).startswith(_KEY_PREFIX):
        text = (
            f"workers.api_key_env: must be a variable whose name begins with "
            f"{_KEY_PREFIX}; others may hold secrets that are not for workers."
        )
        raise RequestError(Code.INVALID_VALUE, text, param="api_key_env")


def _refusal(exc: ConfigError, code: Code = Code.INVALID_VALUE) -> RequestError:
    """Make the error of a worker that cannot be used; it names the first key."""
    text = str(exc)
    match = re.match(r"workers\.(\w+)", text)
    return RequestError(code, text, param=match[1] if match else None)


def _changed(before: WorkerConfig, after: WorkerConfig, key: str) -> tuple[Any, Any]:
    """Return the old and the new value of a key, without secrets."""
    if key in API_KEYS:
        return "hidden", "hidden"
    return getattr(before, key), getattr(after, key)


def _read_revocation(given: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Return what is revoked, its name, and whether running requests are cancelled.

    Raises:
        RequestError: 400.
    """
    for key in given:
        if key not in ("jti", "subject", "cancel"):
            text = f"{key[:40]}: no such field; known: jti, subject, cancel."
            raise RequestError(Code.INVALID_VALUE, text, param=key[:40])
    kinds = [kind for kind in ("jti", "subject") if kind in given]
    if len(kinds) != 1:
        text = "Either `jti` or `subject` is needed."
        raise RequestError(Code.INVALID_VALUE, text, param="subject")
    [kind] = kinds
    value, cancel = given[kind], given.get("cancel", False)
    if not (isinstance(value, str) and value.strip() and value.isprintable()):
        text = f"`{kind}` must be text on one line."
        raise RequestError(Code.INVALID_VALUE, text, param=kind)
    if len(value) > 200:
        text = f"`{kind}` must not be longer than 200 characters."
        raise RequestError(Code.INVALID_VALUE, text, param=kind)
    if not isinstance(cancel, bool) or (cancel and kind == "jti"):
        text = "`cancel` must be true or false, and is for a subject."
        raise RequestError(Code.INVALID_VALUE, text, param="cancel")
    return kind, value.strip(), cancel


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
