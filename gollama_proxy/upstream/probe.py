"""The hub's own requests to workers: health checks, canaries, and counts of tokens.

A health check requests only what llama-server answers from its HTTP threads: `/health`,
`/v1/models` and `/props`.  `/slots` and `/metrics` wait for the running batch, which
can take more than 20 s, and wake a sleeping server.  A server with another idea of
`/health`, or without `/props`, is a good worker all the same.

The routes that count tokens run beside its slots as well (tools/server/README.md of
llama.cpp).  The count is the one that it compares with its context; only pictures are
left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from gollama_proxy.config.settings import Health, WorkerConfig
from gollama_proxy.config.tls import for_workers
from gollama_proxy.upstream.client import FetchError, Reply, fetch, follow
from gollama_proxy.upstream.dial import Target
from gollama_proxy.wire.description import (
    Check,
    Description,
    DescriptionError,
    describe,
    read_models,
    read_progress,
)

# Bytes: a worker's lists are small; more is a mistake or an attack.
MAX_ANSWER = 1 << 20


class Finding(NamedTuple):
    """The result of one health check."""

    check: Check
    reason: str
    description: Description | None = None
    note: str = ""  # what is odd about a good worker; quotes nothing that it sent
    port: int = 0  # at which it answered, if its URL has none

    @property
    def answered(self) -> bool:
        """Whether a llama-server is there, even if it still loads its model."""
        return self.check in (Check.OK, Check.LOADING)


async def examine(worker: WorkerConfig, health: Health) -> Finding:
    """Check a worker once, outside a hub; never raises for a bad worker."""
    tls = for_workers([worker]).get(worker.name)
    return await ping(Target(worker, tls), health)


async def ping(target: Target, health: Health) -> Finding:
    """Check that a worker lives, and learn what it serves.

    The time limit is for each of the three requests.  A worker without a port in its
    URL is looked for at each of `PORTS` until it answers, and again when it stops; the
    target keeps the port.
    """
    ports = target.worker.origin.ports
    if len(ports) == 1:
        return await _ping(target, health)
    if target.found:
        finding = await _ping(target, health)
        if finding.answered:
            return finding._replace(port=target.port)
        others = [port for port in ports if port != target.port]
        return await _look_at(others, target, health, {target.port: finding})
    return await _look_at(ports, target, health, {})


async def _look_at(
    ports: Sequence[int], target: Target, health: Health, known: dict[int, Finding]
) -> Finding:
    """Look for a worker at these ports at once; the first one that answers counts."""
    found = await asyncio.gather(*(_ping(target.at(port), health) for port in ports))
    findings = known | dict(zip(ports, found, strict=True))
    for port, finding in findings.items():
        if finding.answered:
            target.port, target.found = port, True
            return finding._replace(port=port)
    reasons = {each.reason for each in findings.values()}
    if len(reasons) > 1:  # then one port has a server that is not as it should be
        for port, finding in findings.items():
            if finding.check is Check.FAILED:
                return finding._replace(reason=f"port {port}: {finding.reason}")
    [finding, *_] = findings.values()
    if finding.check is Check.FAILED:
        return finding
    where = ", ".join(map(str, findings))
    return finding._replace(reason=f"{finding.reason} (ports {where})")


async def _ping(target: Target, health: Health) -> Finding:
    try:
        status, body, _ = await _get(target, "/health", health)
        if status == 503 and b"oading" in body:
            return Finding(Check.LOADING, "loading model")
        if status in (401, 403):
            return Finding(Check.FAILED, f"/health answered {status}: needs a key")
        if status >= 500 and status != 501:
            return Finding(Check.FAILED, f"/health answered {status}")
        listing = read_models(_body_of(await _get(target, "/v1/models", health)))
        props = await _get(target, "/props", health)
    except FetchError as exc:
        return Finding(Check.REFUSED if exc.refused else Check.FAILED, str(exc))
    except DescriptionError as exc:
        return Finding(Check.FAILED, str(exc))
    description = describe(listing, props.body if props.status == 200 else b"")
    return Finding(Check.OK, "ok", description, listing.note)


async def _get(target: Target, path: str, health: Health) -> Reply:
    return await fetch(target, path, limit=MAX_ANSWER, timeout=health.timeout)


def _body_of(models: Reply) -> bytes:
    """Return the body of a good answer to `/v1/models`; else raise DescriptionError."""
    answered = f"/v1/models answered {models.status}"
    if models.status in (401, 403):
        raise DescriptionError(f"{answered}: a wrong or missing API key")
    if models.status != 200:
        raise DescriptionError(answered)
    if models.flaw:
        raise DescriptionError(f"/v1/models answered {models.flaw}")
    return models.body


async def follow_loading(
    target: Target, note: Callable[[str, float | None], None], health: Health
) -> bool:
    """Follow what a router loads until it ends the stream (see `read_progress`).

    Returns False if it has no such stream, as versions before 2026 have not.

    Raises:
        FetchError: it cannot be reached, or the stream breaks off.
    """

    def notice(event: bytes) -> None:
        if (found := read_progress(event)) is not None:
            note(*found)

    return await follow(target, "/models/sse", notice, timeout=health.timeout)


async def prove(target: Target, model: str, limit: float) -> bool | None:
    """Have a worker generate one token: the canary of a half-open breaker.

    Any answer proves it that is not a failure of the server; an embedding server has no
    chat.  None if the worker is busy or loading its model, which proves nothing.  The
    `limit` is in seconds.
    """
    message = {"role": "user", "content": "hi"}
    body = {"model": model, "messages": [message], "max_tokens": 1}
    try:
        reply = await fetch(
            target,
            "/v1/chat/completions",
            msgspec.json.encode(body),
            limit=MAX_ANSWER,
            timeout=limit,
        )
    except FetchError:
        return False
    if reply.status in (429, 503):
        return None
    return reply.status < 500 or reply.status == 501


# --- Counting the tokens of a prompt ----------------------------------------------


# Seconds; llama-server takes 0.2 s for a prompt of a megabyte.
COUNT_LIMIT = 2.0
MAX_COUNT = 16 << 20  # bytes: the tokens of the largest prompt that can be sent twice

# Routes with a counting route of their own.
_COUNTED_BY = {
    "/v1/messages": "/v1/messages/count_tokens",
    "/v1/responses": "/v1/responses/input_tokens",
    "/responses": "/v1/responses/input_tokens",
}


class _Completion(msgspec.Struct):
    prompt: Any = None


class _Answer(msgspec.Struct):
    prompt: str = ""  # of /apply-template
    tokens: list[int] = []  # of /tokenize
    input_tokens: int = 0  # of the routes above


async def count_tokens(
    target: Target, path: str, model: str, body: bytes
) -> int | None:
    """Have a worker count the tokens of a request for this path and model.

    Returns None if they cannot be counted, or not within `COUNT_LIMIT` per question.
    """
    try:
        if path in _COUNTED_BY:
            answer = await _ask(target, _COUNTED_BY[path], body)
            return answer.input_tokens or None
        prompt: object
        if path.endswith("chat/completions"):
            prompt = (await _ask(target, "/apply-template", body)).prompt
        else:
            prompt = msgspec.json.decode(body, type=_Completion).prompt
        if not isinstance(prompt, str) or not prompt:  # a list, of tokens or of prompts
            return None
        question = {
            "model": model,  # for a router
            "content": prompt,
            "add_special": True,
            "parse_special": True,
        }
        answer = await _ask(target, "/tokenize", msgspec.json.encode(question))
    except (
        FetchError,
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
        _NoAnswer,
    ):
        return None
    return len(answer.tokens) or None


async def _ask(target: Target, path: str, body: bytes) -> _Answer:
    reply = await fetch(target, path, body, limit=MAX_COUNT, timeout=COUNT_LIMIT)
    if reply.status != 200 or reply.flaw:
        raise _NoAnswer
    return msgspec.json.decode(reply.body, type=_Answer)


class _NoAnswer(Exception):
    """The worker's answer has no count_tokens."""
