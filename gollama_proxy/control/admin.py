"""The admin API: `/admin/*`, JSON, for tokens with the scope `admin`.

`openapi.json` beside this file describes it, and is served with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from importlib import resources
from typing import Any, Protocol

from aiohttp import web

from gollama_proxy.config.load import load_worker
from gollama_proxy.config.settings import API_KEYS, WORKER_KEYS, WorkerConfig
from gollama_proxy.config.values import ConfigError
from gollama_proxy.config.watch import Changes
from gollama_proxy.control import views
from gollama_proxy.control.calls import Call, answer, check_local, decode, receive
from gollama_proxy.control.events import STREAM, Events, Recent
from gollama_proxy.control.questions import Question, explain
from gollama_proxy.control.views import Views
from gollama_proxy.edge.auth import Authenticator, Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import Handler, Routes
from gollama_proxy.fleet.worker import Hold, Source, Worker
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.state.local import LocalState, StateError, StoredWorker
from gollama_proxy.wire.errors import Code, RequestError

audit = logging.getLogger("gollama_proxy.audit")

SCOPE = "admin"
# These lead to files or variables of the hub's machine, whose content would be sent to
# an address that the caller chooses.  The scope `admin` does not include the machine.
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

    def wake(self, name: str) -> Worker:
        """Wake the machine of a worker; harmless if it does not sleep."""

    async def revoke(self, kind: str, value: str) -> None:
        """Revoke a token ("jti") or a subject ("sub")."""

    async def reload(self) -> Changes:
        """Read the settings again, and apply what has changed."""


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
            "/admin/workers/{name}/wake": {"POST": self._wake},
            "/admin/models": {"GET": self._list_models},
            "/admin/queue": {"GET": self._list_queue},
            "/admin/queue/{id}": {"DELETE": self._remove_from_queue},
            "/admin/exchanges": {"GET": self._list_exchanges},
            "/admin/exchanges/{id}": {"DELETE": self._cancel},
            "/admin/requests": {"GET": self._list_requests},
            "/admin/config": {"GET": self._show_config},
            "/admin/explain": {"POST": self._explain},
            "/admin/reload": {"POST": self._reload},
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
        return answer({"workers": workers})

    async def _show_worker(self, call: Call) -> Response:
        return answer(self._views.worker(self._worker(call.name)))

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
            try:
                await self._store(worker, row)
            except RequestError:
                self._hub.registry.remove(worker.name)
                raise
        self._audit(call, "add worker", worker.name, new=config.url)
        return answer(self._views.worker(worker), status=201)

    async def _change_worker(self, call: Call) -> Response:
        patch = await self._read(call)
        async with self._hub.changing:
            worker = self._worker(call.name)
            _refuse_member(worker)
            before, row = worker.config, self._row_of(worker)
            if worker.source is Source.AGENT and not {"name", "url"}.isdisjoint(patch):
                key = "name" if "name" in patch else "url"
                text = f"workers.{key}: is set by the agent of this worker."
                raise RequestError(Code.INVALID_VALUE, text, param=key)
            row = {k: v for k, v in (row | patch).items() if v is not None}
            config = _load(row, ours=patch.keys())
            keyless = "api_key_env" not in row and "api_key_env" not in patch
            if keyless and config.origin == before.origin:
                # From the settings.  It is not sent to any other address.
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
        if config == before:
            return self._show_changed(worker, note=False)
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
        return answer({"name": worker.name, "state": state, "note": note})

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

    async def _wake(self, call: Call) -> Response:
        worker = self._worker(call.name)
        before = worker.state
        try:
            self._hub.wake(worker.name)
        except ConfigError as exc:
            text = f"{exc}, so its machine cannot be woken."
            raise RequestError(Code.INVALID_VALUE, text, param="mac") from None
        if worker.state is not before:
            self._audit(
                call, "wake worker", worker.name, before.value, worker.state.value
            )
        return self._show_changed(worker, note=False)

    def _show_changed(self, worker: Worker, *, note: bool = True) -> Response:
        text = _NOTES.get(worker.source) if note else None
        return answer({"worker": self._views.worker(worker), "note": text})

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
            RequestError: 409, there is no more room.
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
            raise RequestError(Code.CONFLICT, f"{exc}.") from None

    # --- Requests -----------------------------------------------------------------

    async def _list_models(self, call: Call) -> Response:
        return answer({"models": self._views.models()})

    async def _list_queue(self, call: Call) -> Response:
        return answer({"queue": self._views.queue()})

    async def _list_exchanges(self, call: Call) -> Response:
        return answer({"exchanges": self._views.exchanges()})

    async def _cancel(self, call: Call) -> Response:
        return self._end_request(call, "cancel request", "runs or waits", waiting=False)

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
        return answer({"id": call.name, "state": "cancelled"})

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
        return answer({"requests": self._hub.recent.find(int(limit), **query)})

    async def _explain(self, call: Call) -> Response:
        question = decode(await self._receive(call), Question)
        hub, subject = self._hub, call.x.subject
        return answer(await explain(question, hub, call.request, subject))

    # --- The hub ------------------------------------------------------------------

    async def _show_config(self, call: Call) -> Response:
        return answer(self._views.settings())

    async def _reload(self, call: Call) -> Response:
        """Have the settings read again; a mistake in them changes nothing."""
        try:
            changes = await self._hub.reload()
        except ConfigError as exc:
            text = "The settings are not valid, so nothing has changed: "
            raise RequestError(Code.BAD_REQUEST, text + "; ".join(exc.args)) from None
        self._audit(call, "reload", "settings", new=changes)
        workers = {
            kind: getattr(changes, kind) for kind in ("added", "replaced", "removed")
        }
        changed = [
            f"worker {name} {kind}" for kind, names in workers.items() for name in names
        ]
        return answer(
            {
                "changed": [*map(str, changes.settings), *changed],
                "restart": [*map(str, changes.restart)],
                "settings": [each._asdict() for each in changes.settings],
                "workers": workers,
            }
        )

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
            raise RequestError(Code.CONFLICT, f"{exc}.") from None
        self._audit(call, "revoke", f"{kind}:{value}")
        running = []
        if kind == "subject":
            everything = views.in_flight(self._hub.proxy.running)
            running = [x for x in everything if x.subject == value]
        for x in running if cancel else ():
            self._hub.proxy.cancel(x)
        return answer(
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
        value = decode(await self._receive(call), object)
        if not isinstance(value, dict):
            text = "The request body must be a JSON object."
            raise RequestError(Code.INVALID_JSON, text)
        return value

    async def _receive(self, call: Call) -> bytes:
        return await receive(call.request, self._hub.config.timeouts.body)


_NOTES = {
    Source.FILE: "This worker is declared in the settings, which win at the next "
    "reload or start.",
    Source.AGENT: "The agent of this worker registers it again, with the settings that "
    "the agent has.",
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


def _refuse_member(worker: Worker) -> None:
    """Refuse to change one worker of a group: all of them have the same settings."""
    if worker.config.parent:
        text = (
            f"The worker {worker.name!r} belongs to the group "
            f"{worker.config.parent!r}; change that in the settings file."
        )
        raise RequestError(Code.INVALID_VALUE, text, param="name")


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
