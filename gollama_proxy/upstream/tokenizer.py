"""Counts the tokens of a prompt, by asking a worker that could answer it.

These routes of llama-server run beside its slots (tools/server/README.md of llama.cpp).
The count is the one that it compares with its context; only pictures are left out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gollama_proxy.upstream.client import FetchError, fetch
from gollama_proxy.upstream.dial import Target

# Seconds; llama-server takes 0.2 s for a prompt of a megabyte.
LIMIT = 2.0
MAX_ANSWER = 16 << 20  # bytes: the tokens of the largest prompt that can be sent twice

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


async def count(target: Target, path: str, model: str, body: bytes) -> int | None:
    """Have a worker count the tokens of a request for this path and model.

    Returns None if they cannot be counted, or not within `LIMIT` for each question.
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
    reply = await fetch(target, path, body, limit=MAX_ANSWER, timeout=LIMIT)
    if reply.status != 200 or reply.flaw:
        raise _NoAnswer
    return msgspec.json.decode(reply.body, type=_Answer)


class _NoAnswer(Exception):
    """The worker's answer has no count."""
