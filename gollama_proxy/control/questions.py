"""Questions about a request: it is read as a real one would be, and explained.

`explain.py` decides; here the request is made of what an operator asks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any, cast

import msgspec
from aiohttp import web

from gollama_proxy.control.explain import Case, decide, other_workers
from gollama_proxy.control.history import Shown
from gollama_proxy.control.views import Parts, policy_name
from gollama_proxy.proxy.body import Body
from gollama_proxy.proxy.plan import Plan
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.scheduling.balancer import RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.scheduling.turns import Priority
from gollama_proxy.wire.errors import Code, ProxyError, RequestError
from gollama_proxy.wire.schema import ENDPOINTS


class Question(msgspec.Struct, forbid_unknown_fields=True):
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

    def __init__(self, question: Question) -> None:
        self._body = question.body()
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


async def explain(
    question: Question, hub: Parts, request: web.BaseRequest, subject: str
) -> Shown:
    """Return what a request would get; a worker may count a long prompt for it.

    `subject` asks, and is that of the request if the question names none.

    Raises:
        RequestError: 400, the question has no answer.
    """
    x = Exchange(request, hub.clock())
    endpoint = ENDPOINTS.get(question.path)
    if endpoint is None or endpoint.form:
        text = f"path = {question.path[:60]!r}: must be a path that takes JSON."
        raise RequestError(Code.INVALID_VALUE, text, param="path")
    x.endpoint, x.needs_slot = endpoint, endpoint.slot
    x.subject = question.subject or subject
    x.priority = question.priority
    x.body = Body(cast(web.BaseRequest, _Given(question)), endpoint, hub.config)
    try:
        return await _foresee(x, question, hub)
    except ProxyError as error:
        return _without_worker(error)


async def _foresee(x: Exchange, question: Question, hub: Parts) -> Shown:
    """Treat a request as a real one, up to the choice of a worker.

    Raises:
        ProxyError: the request would be refused.
    """
    config, body = hub.config, x.body
    registry, balancer = hub.registry, hub.balancer
    await body.read(config.limits.replay_window)
    pool = registry.resolve(body.model, question.models)
    x.model = x.asked = pool.model
    pools = registry.pools_for(pool, body.fallbacks, question.models)
    budget = RetryBudget(config.retry.ratio, config.retry.floor, clock=hub.clock)
    follows = x.endpoint.slot and balancer.follows(pool)
    prefixes = body.prefixes() if follows else ()
    ask = Ask(pool.model, body.size, body.max_tokens, x.subject, prefixes)
    x.plan = Plan(pools, x.endpoint.path, config, budget, random.Random(), ask)
    if not hub.fitting.is_certain(x):
        await hub.fitting.check(x)
    limit = question.max_concurrency or config.queue.max_concurrency
    case = Case(x.plan, pools, x.subject, x.priority, limit, x.needs_slot)
    admission = hub.queue.admission
    decision = decide(case, balancer, admission, hub.waker, config.retry.patience)
    model, place = x.plan.pool.model, decision.place
    policy = policy_name(balancer.policy_of(model))
    tokens, counted = hub.fitting.estimate(x), bool(x.plan.needs.get(model))
    largest = x.plan.pool.largest_context or None
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
            for worker, code, text in other_workers(case, decision, registry, policy)
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
