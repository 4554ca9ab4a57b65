"""What the admin API shows of a hub: plain values, made when they are asked for.

No prompt, no answer and no secret is in any of them.

What was used is shown to operators (`GET /admin/usage`, all subjects) and to each
caller (`GET /v1/usage`, the caller's own).  Usage is kept by day (UTC), so a range
begins and ends at midnight: `since=12h` begins with the day that it was twelve hours
ago.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gollama_proxy.config.settings import Config, settings
from gollama_proxy.config.values import masked
from gollama_proxy.control.calls import Call, answer
from gollama_proxy.control.history import Running, Shown, shown_steps
from gollama_proxy.edge.auth import Authenticator
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.edge.response import Response
from gollama_proxy.edge.router import Routes
from gollama_proxy.fleet.agents import Agents
from gollama_proxy.fleet.breaker import Breaker
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.state import Source
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.proxy.tokens import Fitting
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.policies import Policy
from gollama_proxy.scheduling.queue import Queue
from gollama_proxy.scheduling.turns import TicketState
from gollama_proxy.state import local
from gollama_proxy.state.database import StateError
from gollama_proxy.state.ledger import DAY, GROUPS, Ledger, Question, day_of
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code, HubError, RequestError
from gollama_proxy.wire.schema import ENDPOINTS

if TYPE_CHECKING:
    from aiohttp import web

# Questions about usage that wait at once.  The thread that answers them, one by one,
# also saves usage.
MOST_QUESTIONS = 16
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": DAY}
_ALLOWED = "7d or 12h ago, a date such as 2026-11-30, or Unix seconds"
_KNOWN = ("by", "since", "until")


class Parts(Protocol):
    """The parts of a hub that are shown."""

    @property
    def config(self) -> Config: ...
    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def balancer(self) -> Balancer: ...
    @property
    def queue(self) -> Queue: ...
    @property
    def waker(self) -> Waker: ...
    @property
    def fitting(self) -> Fitting: ...
    @property
    def agents(self) -> Agents: ...
    @property
    def proxy(self) -> Proxy: ...
    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def quotas(self) -> Quotas: ...
    @property
    def state(self) -> local.State: ...
    @property
    def ledger(self) -> Ledger: ...


class Views:
    """Looks at a hub, and changes nothing."""

    def __init__(self, hub: Parts) -> None:
        self._hub = hub

    def __repr__(self) -> str:
        return f"<Views of {self._hub!r}>"

    # --- Workers ------------------------------------------------------------------

    def worker(self, worker: Worker) -> Shown:
        """Show the state of a worker; its models have the breakers that they have."""
        described, error = worker.description, worker.last_error
        agent = self._agent(worker)
        reason = worker.reason
        if agent and (helpers := agent.get("waiting_for")) and worker.is_down:
            reason = f"its server waits for helpers: {', '.join(helpers)}"
        return {
            "name": worker.name,
            "url": worker.url,
            "source": worker.source,
            "state": worker.state.value,
            "since": self._ago(worker.since),
            "reason": reason,
            "hold": worker.held,
            "breaker": self._breaker(worker.breaker),
            "weight": worker.weight,
            "slots": worker.slots,
            "running": worker.in_flight,
            "models": [
                {
                    "name": model.name,
                    "context": worker.context_of(model.name),
                    "loaded": worker.has_loaded(model.name),
                    "progress": worker.progress.get(model.name),
                    "breaker": self._breaker(worker.breakers(model.name)[-1]),
                }
                for model in worker.models
            ],
            "context": worker.config.context or (described and described.context),
            "vram_gib": worker.config.vram_gib,
            "build": (described.build or None) if described else None,
            "speed": self._speed(worker),
            "agent": agent,
            "last_error": None
            if error is None
            else {
                "code": error.code,
                "detail": error.detail,
                "ago": self._ago(error.at),
            },
        }

    def _agent(self, worker: Worker) -> Shown | None:
        """Show what the agent of a worker, if any, has reported of its machine."""
        if worker.source is not Source.AGENT:
            return None
        lease = self._hub.agents.find(worker.name)
        return None if lease is None else lease.report

    def _breaker(self, breaker: Breaker) -> Shown:
        return {
            "state": breaker.state.value,
            "reason": breaker.reason,
            "since": self._ago(breaker.since) if breaker.generation else None,
            "opens_in": round(breaker.opens_in(), 3),
        }

    def _speed(self, worker: Worker) -> Shown:
        """Show how fast a worker is with the model that it had last."""
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

    def models(self) -> list[Shown]:
        """Show each model, what leads to it, and the workers that serve it."""
        registry = self._hub.registry
        waiting = [x.asked for x in self._waiting()]
        leads: dict[str, list[str]] = {}
        for alias, model in registry.aliases().items():
            leads.setdefault(model, []).append(alias)
        return [
            {
                "name": name,
                "aliases": leads.get(name, []),
                "fallbacks": [
                    other.model for other in registry.pools_for(pool, (), None)[1:]
                ],
                "policy": policy_name(self._hub.balancer.policy_of(name)),
                "workers": [
                    {
                        "name": worker.name,
                        "usable": worker in pool.available,
                        "context": worker.context_of(name),
                        "loaded": worker.has_loaded(name),
                    }
                    for worker in pool.workers
                ],
                "waiting": waiting.count(name),
            }
            for name in registry.models()
            for pool in [registry.pool(name)]
        ]

    # --- Requests -----------------------------------------------------------------

    def exchanges(self) -> list[Shown]:
        """Show the requests in flight, the oldest first."""
        return [self.exchange(x) for x in in_flight(self._hub.proxy.running)]

    def exchange(self, x: Exchange) -> Shown:
        """Show a request that has not ended."""
        body = x.body_so_far
        return {
            "id": x.id,
            "subject": x.subject,
            "model": x.model,
            "worker": x.worker,
            "route": x.route,
            "state": x.state.name.lower(),
            "age": self._ago(x.started),
            "tokens": tokens_of(x),
            "attempts": x.attempts,
            "stream": body is not None and body.stream,
            "class": x.priority,
            "trace": "" if x.trace is None else x.trace.trace_id,
            "steps": shown_steps(x.steps),
        }

    def queue(self) -> list[Shown]:
        """Show the requests that wait, by model, in the order of their turns."""
        shown = [self.waiting(x) for x in self._waiting()]
        return sorted(shown, key=lambda each: (each["model"], each["position"] or 0))

    def waiting(self, x: Exchange) -> Shown:
        """Show a request that waits for a slot, or for a worker to come back."""
        ticket, place, since = x.ticket, None, x.started
        if ticket is not None and ticket.state is TicketState.WAITING:
            place, since = self._hub.queue.admission.place(ticket), ticket.joined_at
        eta = None if place is None or place.eta is None else round(place.eta, 3)
        return {
            "id": x.id,
            "subject": x.subject,
            "model": x.plan.pool.model,
            "class": x.priority,
            "position": None if place is None else place.position,
            "waited": self._ago(since),
            "expected": eta,
        }

    def _waiting(self) -> Iterator[Exchange]:
        return (
            x
            for x in in_flight(self._hub.proxy.running)
            # A plan is made before it is queued.
            if x.state is State.QUEUED
        )

    @property
    def fleet(self) -> Sequence[Worker]:
        return self._hub.registry.workers

    def sampled(self) -> tuple[list[Running], int, Sequence[Worker]]:
        """Return what a sample is taken of: requests, how many wait, and workers."""
        hub = self._hub
        running = [
            Running(x.id, x.started, x.route, x.worker, x.first_byte, tokens_of(x))
            for x in in_flight(hub.proxy.running)
        ]
        return running, hub.queue.admission.waiting, self.fleet

    # --- Settings -----------------------------------------------------------------

    def settings(self) -> Shown:
        """Show the settings in force, and where each is from."""
        config = self._hub.config
        rows = []
        for row in settings():
            section, _, name = row.key.partition(".")
            given = config.given.get(row.key, "")
            source = "file" if given else "default"
            if given == row.env:
                source = "environment"
            elif given.startswith("--") or given == "flag":
                source = "flag"
            value = masked(getattr(getattr(config, section), name))
            rows.append(
                {"key": row.key, "value": value, "source": source, "from": given}
            )
        return {"file": config.file, "settings": rows}

    def _ago(self, moment: float) -> float:
        return round(max(0.0, self._hub.clock() - moment), 3)


def in_flight(running: Collection[Exchange]) -> Iterable[Exchange]:
    """Return those of the running requests that are for workers, the oldest first."""
    # A copy: a request may end while they are looked at.
    return [x for x in running if x.route in ENDPOINTS]


def tokens_of(x: Exchange) -> int:
    """Return the tokens that were generated for a request so far.

    Those of earlier attempts are added up; those of the present one are events.
    """
    relay = x.relay if x.state is State.STREAMING else None
    return x.tokens + (0 if relay is None else relay.events)


def policy_name(policy: Policy) -> str:
    """Return the name that a policy has in the settings."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(policy).__name__).lower()


# --- Usage ------------------------------------------------------------------------


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
