"""What was used: `GET /admin/usage` of all subjects, `GET /v1/usage` of the caller.

Usage is kept by day (UTC), so a range begins and ends at midnight: `since=12h` begins
with the day that it was twelve hours ago.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from aiohttp import web

from gollama_proxy.control.calls import Call, answer
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.edge.response import Response
from gollama_proxy.edge.router import Routes
from gollama_proxy.state.database import StateError
from gollama_proxy.state.ledger import DAY, GROUPS, Ledger, Question, day_of
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, HubError, RequestError

# That wait at once.  The thread that answers them, one by one, also saves usage.
MOST_QUESTIONS = 16
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": DAY}
_ALLOWED = "7d or 12h ago, a date such as 2026-11-30, or Unix seconds"
_KNOWN = ("by", "since", "until")


class Parts(Protocol):
    """The parts of a hub that know about usage."""

    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def quotas(self) -> Quotas: ...
    @property
    def ledger(self) -> Ledger: ...


class Usage:
    """Answers questions about usage."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub
        self._asked = 0  # questions without an answer yet

    def __repr__(self) -> str:
        return f"<Usage of {self._hub!r} asked={self._asked}>"

    def routes(self) -> Routes:
        """Return the handlers for callers of any scope."""
        return {"/v1/usage": {"GET": self._show_own}}

    async def show(self, call: Call) -> Response:
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

    async def _read(self, question: Question) -> dict[str, Any]:
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
        return {
            "by": question.by,
            "since": question.first * DAY,
            "until": question.end * DAY,
            "rows": found.rows,
            "total": found.total,
            "complete": found.complete,
        }


def read_question(query: Mapping[str, str], by: str, now: float) -> Question:
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
    return Question(groups, first, end)


def _days(query: Mapping[str, str], name: str, default: str, now: float) -> float:
    """Return a moment in days since 1970; a date as `until` includes its day."""
    text = query.get(name, default)
    if match := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
        moment = (now - int(match[1]) * _UNITS[match[2]]) / DAY
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
