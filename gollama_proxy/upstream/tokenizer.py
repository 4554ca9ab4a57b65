"""How many tokens a prompt has: counted by a worker that is to answer it.

These routes of llama-server run beside its slots (tools/server/README.md of llama.cpp).
The count is the one that it would refuse the prompt by; only pictures are left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from gollama_proxy.config.settings import WorkerConfig
from gollama_proxy.config.tls import Credentials
from gollama_proxy.upstream.probe import (
    Target,
    TooLargeError,
    key_of,
    read_body,
    target_of,
    url_of,
)
from gollama_proxy.wire.coding import CodingError

# Seconds; llama-server takes 0.2 s for a prompt of a megabyte.
LIMIT = 2.0
PIECE = 64 << 10
MAX_ANSWER = 16 << 20  # the tokens of the largest prompt that can be sent twice

# Routes that count what another one would be asked.
_COUNTED_BY = {
    "/v1/messages": "/v1/messages/count_tokens",
    "/v1/responses": "/v1/responses/input_tokens",
    "/responses": "/v1/responses/input_tokens",
}


class _Asked(msgspec.Struct):
    prompt: Any = None


class _Answer(msgspec.Struct):
    prompt: str = ""  # of /apply-template
    tokens: list[int] = []  # of /tokenize
    input_tokens: int = 0  # of the routes above


async def count(
    session: aiohttp.ClientSession,
    worker: WorkerConfig,
    path: str,
    model: str,
    body: bytes,
    tls: Credentials | None = None,
) -> int | None:
    """Have a worker count the tokens of a request for this path and model.

    None if that cannot be said, or not soon enough.
    """
    target = target_of(session, worker, tls)
    try:
        if path in _COUNTED_BY:
            answer = await _ask(target, _COUNTED_BY[path], body)
            return answer.input_tokens or None
        prompt: object
        if path.endswith("chat/completions"):
            prompt = (await _ask(target, "/apply-template", body)).prompt
        else:
            prompt = msgspec.json.decode(body, type=_Asked).prompt
        if not isinstance(prompt, str) or not prompt:  # a list, of tokens or of prompts
            return None
        question = {
            "model": model,  # a router wants to know
            "content": prompt,
            "add_special": True,
            "parse_special": True,
        }
        answer = await _ask(target, "/tokenize", msgspec.json.encode(question))
    except (
        TimeoutError,
        aiohttp.ClientError,
        OSError,
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
        CodingError,
        TooLargeError,
        _NoAnswer,
    ):
        return None
    return len(answer.tokens) or None


async def _ask(target: Target, path: str, body: bytes) -> _Answer:
    async with target.session.post(
        url_of(target.worker, path),
        data=_pieces(body),
        headers={
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **key_of(target.worker),
        },
        timeout=aiohttp.ClientTimeout(total=LIMIT),
        allow_redirects=False,
        ssl=target.tls,
    ) as response:
        if response.status != 200:
            raise _NoAnswer
        data = await read_body(response, MAX_ANSWER)
    return msgspec.json.decode(data, type=_Answer)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """Send a body bit by bit, so that a large one lets others have their turn."""
    for start in range(0, len(body), PIECE):
        yield body[start : start + PIECE]


class _NoAnswer(Exception):
    """What came tells nothing."""
