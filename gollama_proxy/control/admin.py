"""The admin API: `/admin/*`, JSON, for tokens with the scope `admin`.

The scope `monitor` is enough for what changes nothing: all that is read, and questions.
`openapi.json` beside this file describes it, and is served with it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gollama_proxy.config.values import ConfigError, parse_span
from gollama_proxy.control import Parts, merging
from gollama_proxy.control.events import STREAM
from gollama_proxy.control.history import SAMPLES, Shown
from gollama_proxy.control.merging import Answers
from gollama_proxy.control.page import LINK_LIFETIME, compress
from gollama_proxy.control.replies import (
    AdminCall,
    CallHandler,
    answer,
    check_local,
    decode_body,
)
from gollama_proxy.control.views import ExplainRequest, Views, explain
from gollama_proxy.control.workers import Workers
from gollama_proxy.edge.auth import Principal
from gollama_proxy.edge.response import Response, Sent
from gollama_proxy.edge.router import Handler, Routes
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.state import ledger
from gollama_proxy.state.folder import StateError
from gollama_proxy.state.ledger import DAY, GROUPS, day_of
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, HubError, RequestError

if TYPE_CHECKING:
    from aiohttp import web

# The scope of operators, and the one that only reads.
SCOPE, LOOKING = "admin", "monitor"
# Open to that one as well: an explanation changes nothing, and a link signs in with the
# caller's token.
_HARMLESS = frozenset({"/admin/explain", "/admin/links"})
# Samples of workers in one answer: a quarter of an hour of a hundred of them.
_MOST_VALUES = 100_000
_FILTERS = ("id", "trace", "subject", "model", "worker", "outcome")


class Admin:
    """Answers for the admin API."""

    def __init__(self, hub: Parts, views: Views) -> None:
        self._hub = hub
        self._views = views
        self._record = hub.events.record_change
        self._workers = Workers(hub, views)
        self._usage = UsageApi(hub)
        self._description = b""  # of the API, once it was read

    def __repr__(self) -> str:
        return f"<Admin of {self._hub!r}>"

    def routes(self) -> Routes:
        """Return the handlers of all paths."""
        listing = self._hub.replies.listing
        routes: dict[str, dict[str, CallHandler]] = {
            **self._workers.routes(),
            "/admin/hubs": {"GET": self._list_hubs},
            "/admin/models": {"GET": listing("models")},
            "/admin/queue": {"GET": listing("queue")},
            "/admin/queue/{id}": {"DELETE": self._remove_from_queue},
            "/admin/exchanges": {"GET": listing("exchanges")},
            "/admin/exchanges/{id}": {"DELETE": self._cancel},
            "/admin/requests": {"GET": self._list_requests},
            "/admin/history": {"GET": self._show_history},
            "/admin/usage": {"GET": self._usage.show},
            "/admin/config": {"GET": self._show_config},
            "/admin/explain": {"POST": self._explain},
            "/admin/links": {"POST": self._make_link},
            "/admin/reload": {"POST": self._reload},
            "/admin/revoke": {"POST": self._revoke},
            "/admin/events": {"GET": self._follow},
            "/admin/openapi.json": {"GET": self._show_api},
        }
        return {
            path: {
                method: self._guarded(
                    handler, looks=method == "GET" or path in _HARMLESS
                )
                for method, handler in methods.items()
            }
            for path, methods in routes.items()
        }

    # --- Permission ---------------------------------------------------------------

    def _guarded(self, handler: CallHandler, *, looks: bool) -> Handler:
        async def guard(request: web.BaseRequest, x: Exchange) -> Response | Sent:
            caller = self._admit(request, x, looks=looks)
            return await handler(AdminCall(request, x, caller, self._hub.config))

        return guard

    def _admit(
        self, request: web.BaseRequest, x: Exchange, *, looks: bool
    ) -> Principal:
        """Return the caller if it may use the API; `looks`: it changes nothing.

        Raises:
            RequestError: 401 or 403.
        """
        caller = self._hub.authenticator.identify(request, x)
        if SCOPE not in caller.scopes and not (looks and LOOKING in caller.scopes):
            scope = f"{SCOPE} or {LOOKING}" if looks else SCOPE
            text = f"Your token does not allow this: it needs the scope {scope}."
            raise RequestError(Code.INSUFFICIENT_SCOPE, text)
        if self._hub.config.auth.mode == "off":
            check_local(request)
        return caller

    # --- Requests -----------------------------------------------------------------

    async def _cancel(self, call: AdminCall) -> Response:
        return await self._end_request(call, "cancel request", "runs or waits")

    async def _remove_from_queue(self, call: AdminCall) -> Response:
        return await self._end_request(call, "remove from queue", "waits", waiting=True)

    async def _end_request(
        self, call: AdminCall, action: str, what: str, *, waiting: bool = False
    ) -> Response:
        """Cancel the requests with the id in the path, on any hub.

        Raises:
            RequestError: 404, there is none.
        """
        name = call.name
        gathered = await self._hub.replies.gather("cancel", id=name, waiting=waiting)
        if not any(gathered.found.values()):
            text = f"No request with the id {name[:64]!r} {what}{_but(gathered)}."
            raise RequestError(Code.NOT_FOUND, text, param="id")
        for hub, found in gathered.found.items():
            place = f" at {hub}" if hub else ""
            for state, subject in found:
                old = f"{state} request of {subject}{place}"
                self._record(call.x, action, name, old)
        return answer({"id": name, "state": "cancelled"} | gathered.note)

    async def _list_requests(self, call: AdminCall) -> Response:
        query = dict(call.request.query)
        limit = _number(query, "limit", 100, 1000)
        since = _moment(query, "since", 0.0)
        until = _moment(query, "until", None)
        _refuse_others(query, (*_FILTERS, "since", "until", "limit"))
        gathered = await self._hub.replies.gather(
            "requests", limit=limit, since=since, until=until, wanted=query
        )
        if self._hub.peers is None:
            return answer({"requests": gathered.found[""]})
        found = gathered.merge(partial(merging.merge_requests, limit=limit))
        return answer({"requests": found} | gathered.note)

    async def _show_history(self, call: AdminCall) -> Response:
        query = dict(call.request.query)
        names = call.request.query.getall("worker", [])
        query.pop("worker", None)
        seconds = _number(query, "seconds", SAMPLES, SAMPLES)
        step = _number(query, "step", 1, 60)
        _refuse_others(query, ("worker", "seconds", "step"))
        known = self._hub.history.names
        if "*" in names:
            names = ["*"]
        values = len(known if names == ["*"] else names) * -(-seconds // step)
        if values > _MOST_VALUES:
            text = (
                f"step = {step}: the answer would have {values:,} samples of workers, "
                f"and {_MOST_VALUES:,} is the limit; a larger step makes it smaller."
            )
            raise RequestError(Code.INVALID_VALUE, text, param="step")
        gathered = await self._hub.replies.gather(
            "history", seconds=seconds, step=step, workers=names
        )
        history = gathered.found[next(iter(gathered.found))]
        if len(gathered.found) > 1:
            merge = merging.merge_histories
            history = await asyncio.to_thread(gathered.merge, merge)
        for name in names:
            if name not in (*history["workers"], "*"):
                text = f"No worker is named {name[:200]!r}."
                raise RequestError(Code.NOT_FOUND, text, param="worker")
        return await compress(await _encode(history | gathered.note), call.request)

    async def _explain(self, call: AdminCall) -> Response:
        question = decode_body(await call.receive(), ExplainRequest)
        hub, subject = self._hub, call.x.subject
        shown = await explain(question, hub, call.request, subject)
        if hub.peers is not None:
            shown["hub"] = hub.peers.name  # another one has another queue
        return answer(shown)

    # --- The hub, and others ------------------------------------------------------

    async def _list_hubs(self, call: AdminCall) -> Response:
        return answer(await self._hub.replies.list_hubs())

    async def _show_config(self, call: AdminCall) -> Response:
        return answer(self._views.settings())

    async def _reload(self, call: AdminCall) -> Response:
        """Have the settings read again; a mistake in them changes nothing."""
        try:
            changes = await self._hub.reload()
        except ConfigError as exc:
            text = "The settings are not valid, so nothing has changed: "
            raise RequestError(Code.BAD_REQUEST, text + "; ".join(exc.args)) from None
        self._record(call.x, "reload", "settings", new=changes)
        gathered = await self._hub.replies.gather_others("reload", "", {}, group=True)
        for hub, problem in gathered.found.items():
            if problem:  # it is found in the log of that process, too
                gathered.missing.append(hub)
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
            | gathered.note
        )

    async def _revoke(self, call: AdminCall) -> Response:
        """Revoke a token or a subject; requests that run are cancelled on demand.

        As when a token expires, an answer that has begun goes on: only its client has
        it, and a token that has leaked can begin no other one.
        """
        given = await call.read()
        kind, value, cancel = _read_revocation(given)
        try:
            await self._hub.revoke("sub" if kind == "subject" else kind, value)
        except StateError as exc:
            raise RequestError(Code.CONFLICT, f"{exc}.") from None
        self._record(call.x, "revoke", f"{kind}:{value}")
        gathered = Answers({}, [])
        if kind == "subject":
            gathered = await self._hub.replies.gather(
                "running", subject=value, cancel=cancel
            )
        return answer(
            {
                "revoked": kind,
                "value": value,
                "persistent": self._hub.state.folder is not None,
                "running": [*chain.from_iterable(gathered.found.values())],
                "cancelled": cancel,
            }
            | gathered.note
        )

    async def _follow(self, call: AdminCall) -> Response | Sent:
        if call.request.method == "HEAD":
            return Response(b"", fields=STREAM)

        def check() -> None:
            self._admit(call.request, call.x, looks=True)

        return await self._hub.events.follow(call.request, call.x, check)

    async def _make_link(self, call: AdminCall) -> Response:
        """Make a link that opens the dashboard once, with the token of the caller."""
        token = self._hub.authenticator.token_in(call.request)
        if not token:  # authentication is off
            return answer({"code": None, "path": "/", "expires_in": None})
        code = await self._hub.links.issue(token)
        self._record(call.x, "make link", call.x.subject)
        link = {"code": code, "path": f"/#sign-in={code}"}
        return answer(link | {"expires_in": LINK_LIFETIME}, status=201)

    async def _show_api(self, call: AdminCall) -> Response:
        if not self._description:
            self._description = await asyncio.to_thread(_read_description)
        return Response(self._description)


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


async def _encode(history: Shown) -> bytes:
    """Write a history: a thousand workers at once would hold up the event loop."""
    head = {name: value for name, value in history.items() if name != "workers"}
    workers = []
    for name, columns in history["workers"].items():
        workers.append(
            b"%b:%b" % (msgspec.json.encode(name), msgspec.json.encode(columns))
        )
        await asyncio.sleep(0)  # a millisecond each
    parts = (msgspec.json.encode(head)[:-1], b',"workers":{', b",".join(workers), b"}}")
    return b"".join(parts)


def _but(gathered: Answers) -> str:
    """Return what follows if not all hubs have answered."""
    missing = ", ".join(gathered.missing)
    return f"; {missing} did not answer" if missing else ""


def _read_description() -> bytes:
    return resources.files(__package__).joinpath("openapi.json").read_bytes()


def _number(query: dict[str, str], name: str, default: int, most: int) -> int:
    """Take a whole number from 1 out of a query.

    Raises:
        RequestError: 400.
    """
    given = query.pop(name, str(default))
    if not re.fullmatch("[0-9]{1,4}", given) or not 1 <= int(given) <= most:
        text = f"{name} = {given[:40]!r}: must be a whole number from 1 to {most:,}."
        raise RequestError(Code.INVALID_VALUE, text, param=name)
    return int(given)


_T = TypeVar("_T", float, None)


def _moment(query: dict[str, str], name: str, default: _T) -> float | _T:
    """Take a time out of a query, in Unix seconds.

    Raises:
        RequestError: 400.
    """
    given = query.pop(name, None)
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", given):
        text = f"{name} = {given[:40]!r}: must be a time in Unix seconds."
        raise RequestError(Code.INVALID_VALUE, text, param=name)
    return float(given)


def _refuse_others(query: Collection[str], known: Sequence[str]) -> None:
    for name in query:
        if name not in known:
            text = f"{name[:40]}: no such filter; known: {', '.join(known)}."
            raise RequestError(Code.INVALID_VALUE, text, param=name[:40])


# --- Usage ------------------------------------------------------------------------

# Questions about usage that wait at once.  The thread that answers them, one by one,
# also saves usage.
MOST_QUESTIONS = 16
_ALLOWED = "7d or 12h ago, a date such as 2026-11-30, or Unix seconds"
_KNOWN = ("by", "since", "until")


class UsageApi:
    """Answers questions about usage.

    It is shown to operators (`GET /admin/usage`, all subjects) and to each caller
    (`GET /v1/usage`, the caller's own).  Usage is kept by day (UTC), so a range begins
    and ends at midnight: `since=12h` begins with the day that it was twelve hours ago.
    """

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._asked = 0  # questions without an answer yet

    def __repr__(self) -> str:
        return f"<UsageApi of {self._hub!r} asked={self._asked}>"

    def routes(self) -> Routes:
        """Return the handlers for callers of any scope."""
        return {"/v1/usage": {"GET": self._show_own}}

    async def show(self, call: AdminCall) -> Response:
        """Answer an operator: the usage of all subjects."""
        query = call.request.query
        question = read_question(query, "subject", self._hub.ledger.clock())
        return answer(await self._read(question))

    async def _show_own(self, request: web.BaseRequest, record: Record) -> Response:
        """Answer `GET /v1/usage`: the caller's usage, and what its limits leave."""
        caller = self._hub.authenticator.identify(request, record)
        question = read_question(request.query, "model", self._hub.ledger.clock())
        shown = await self._read(question._replace(subject=caller.subject))
        standing = self._hub.quotas.look(
            caller.subject,
            caller.rpm,
            caller.tpm,
            caller.tokens_per_day,
            caller.tokens_per_month,
        )
        limits = {
            claim: {
                "limit": gauge.limit,
                "remaining": gauge.remaining,
                "resets_in": round(gauge.reset, 3),
            }
            for claim, _, gauge in standing.gauges()
        }
        return answer({"subject": caller.subject, **shown, "limits": limits})

    async def _read(self, question: ledger.UsageQuestion) -> dict[str, Any]:
        if self._asked >= MOST_QUESTIONS:
            text = "Too many questions about usage wait for their answers."
            raise RequestError(Code.RATE_LIMITED, text, retry_after=1)
        self._asked += 1
        try:
            found = await self._hub.ledger.read(question)
        except StateError as exc:
            raise HubError(Code.INTERNAL, f"{exc}.") from exc
        finally:
            self._asked -= 1
        gap = self._hub.state.gap()
        missing = {"missing": gap.hubs, "missing_since": gap.since} if gap else {}
        return {
            "by": question.by,
            "since": question.first * DAY,
            "until": question.end * DAY,
            "rows": found.rows,
            "total": found.total,
            "complete": found.complete,
            **missing,
        }


def read_question(
    query: Mapping[str, str], by: str, now: float
) -> ledger.UsageQuestion:
    """Read the parameters of a call; `by` is the default, `now` is Unix time.

    Raises:
        RequestError: 400; it names the parameter.
    """
    for name in query:
        if name not in _KNOWN:
            text = f"{name[:40]}: no such parameter; known: {', '.join(_KNOWN)}."
            raise RequestError(Code.INVALID_VALUE, text, param=name[:40])
    by = query.get("by", by)
    groups = tuple(by.split(","))
    if not set(groups) <= set(GROUPS) or len(set(groups)) < len(groups):
        text = f"by = {by[:40]!r}: must be some of {', '.join(GROUPS)}, each once."
        raise RequestError(Code.INVALID_VALUE, text, param="by")
    first = math.floor(_days(query, "since", "7d", now))
    end = math.ceil(_days(query, "until", "0s", now))
    if first >= end:
        text = f"since = {query.get('since', '7d')[:40]!r}: must be before until."
        raise RequestError(Code.INVALID_VALUE, text, param="since")
    return ledger.UsageQuestion(groups, first, end)


def _days(query: Mapping[str, str], name: str, default: str, now: float) -> float:
    """Return a moment in days since 1970; a date as `until` includes its day."""
    text = query.get(name, default)
    if (span := parse_span(text)) is not None:
        moment = (now - span) / DAY
    elif re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,9})?", text):
        moment = float(text) / DAY
    elif re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        moment = _day_of(name, text) + (name == "until")
    else:
        raise _refusal(name, text)
    return max(moment, 0.0)


def _day_of(name: str, text: str) -> int:
    try:
        return day_of(text)
    except ValueError:
        raise _refusal(name, text) from None


def _refusal(name: str, text: str) -> RequestError:
    message = f"{name} = {text[:40]!r}: must be {_ALLOWED}."
    return RequestError(Code.INVALID_VALUE, message, param=name)
