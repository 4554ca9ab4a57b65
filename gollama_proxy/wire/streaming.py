"""Which requests for one piece are made for a stream, and who folds that.

A stream is asked for where it tells all that the answer would.  Where that turns out
later, the assembler says so (assemble.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    UNREADABLE,
    Asked,
    Assembler,
    fields,
)
from gollama_proxy.wire.assemble_openai import (
    ChatAssembler,
    ResponseAssembler,
    TextAssembler,
)
from gollama_proxy.wire.assemble_others import MessageAssembler, NativeAssembler
from gollama_proxy.wire.openai import Api, Endpoint

# What a field may be for a stream to tell all that the answer would.
_TOLD = {
    "stream": (b"null", b"false"),
    "stream_options": (b"null",),
    # The line that ends an answer by its indent is taken back; a stream has sent it.
    "n_indent": (b"null", b"0"),
    # The message that is continued is a part of the answer, but not of the stream.
    "continue_final_message": (b"null", b"false"),
    # The text in `__verbose` is that of a whole answer, as the model has written it.
    "verbose": (b"null", b"false"),
    # "deepseek-legacy" has a switch (`reasoning_in_content`) for streams only.
    "reasoning_format": (b"null", b'"none"', b'"auto"', b'"deepseek"'),
    # The fields that are chosen of a native answer, and not of its events.
    "response_fields": (b"null", b"[]"),
    # An answer that the server keeps working on when its client has left.
    "background": (b"null", b"false"),
}
# A chat tells the probabilities of a token with its text, and not those of one that has
# none, such as the end of turn.
_PROBABILITIES = {"logprobs": (b"null", b"false"), "n_probs": (b"null", b"0")}
# llama-server does not say of a response where it was cut, nor what was held back there
# because a stop string might have begun.
_CUTS = {"stop": (b"null", b'""', b"[]")}
_PROMPTS = re.compile(rb'"prompt"\s*:\s*\[')
_SILENT = (b"null", b'""', b"[]")
_STOPS = ("stop", "stop_sequences")
_USAGE = Raw(b'{"include_usage":true}')
_ASSEMBLERS: dict[Api, type[Assembler]] = {
    Api.OPENAI: TextAssembler,
    Api.ANTHROPIC: MessageAssembler,
    Api.RESPONSES: ResponseAssembler,
    Api.NATIVE: NativeAssembler,
}


class Streaming(NamedTuple):
    """A request for a stream, and who folds what it brings."""

    body: bytes
    assembler: Callable[[int], Assembler]  # of a limit of characters

    def __repr__(self) -> str:  # without what a client wrote
        return f"<Streaming {len(self.body)} bytes>"


def streaming(body: bytes, endpoint: Endpoint) -> Streaming | None:
    """Ask for a stream with usage, all else as is; None if its answer would differ."""
    try:
        given = fields.decode(body)
    except UNREADABLE:
        return None  # the worker will say what is wrong with it
    told = _TOLD
    if "messages" in given:
        told = told | _PROBABILITIES
    if endpoint.api is Api.RESPONSES:
        told = told | _CUTS
    if any(bytes(given.get(name, b"null")) not in ok for name, ok in told.items()):
        return None
    asked = Asked(
        stops=any(bytes(given.get(name, b"null")) not in _SILENT for name in _STOPS),
        choices=_choices_of(given),
        tokens=bytes(given.get("return_tokens", b"null")) == b"true",
    )
    given["stream"] = Raw(b"true")
    if endpoint.api is Api.OPENAI:  # others tell it anyway
        given["stream_options"] = _USAGE
    make = ChatAssembler if endpoint.chat else _ASSEMBLERS[endpoint.api]
    return Streaming(msgspec.json.encode(given), lambda limit: make(limit, asked))


def has_prompts(body: bytes) -> bool:
    """Whether there may be several prompts in a request, at the cost of one search."""
    return _PROMPTS.search(body) is not None


def choices_of(body: bytes) -> int:
    """Read how many choices a request asks for; 0 where that cannot be told."""
    try:
        return _choices_of(fields.decode(body))
    except UNREADABLE:
        return 0


def _choices_of(given: dict[str, Raw]) -> int:
    try:
        counts = [
            msgspec.json.decode(given.get(name, b"null"), type=int | None) or 1
            for name in ("n", "n_cmpl")
        ]
        return max(counts) * _prompts(given)
    except UNREADABLE:
        return 0


def _prompts(given: dict[str, Raw]) -> int:
    prompt = bytes(given.get("prompt", b"null"))
    if not prompt.startswith(b"["):
        return 1
    parts = msgspec.json.decode(prompt, type=list[Raw])
    # A list with numbers in it is one prompt, of tokens.
    numbers = any(bytes(part)[:1] in b"-0123456789" for part in parts)
    return 1 if numbers else max(len(parts), 1)
