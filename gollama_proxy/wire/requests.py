"""Requests that a worker gets in another form than their clients wrote.

The hub asks for a stream where a client wants one piece (`assemble.py`), and for usage
where a client streams without it.  Every other field stays to the byte as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    Assembler,
    MessageAssembler,
    NativeAssembler,
    Requested,
)
from gollama_proxy.wire.assemble_openai import (
    ChatAssembler,
    ResponseAssembler,
    TextAssembler,
)
from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.schema import UNREADABLE, Api, Endpoint, raw_fields

# --- A stream ---------------------------------------------------------------------

# Values of fields with which a stream has all that the answer in one piece would have.
_FOLDABLE = {
    "stream": (b"null", b"false"),
    "stream_options": (b"null",),
    # An answer that ends by its indent loses its last line; a stream has sent it.
    "n_indent": (b"null", b"0"),
    # The message that is continued is a part of the answer, and not of the stream.
    "continue_final_message": (b"null", b"false"),
    # The text in `__verbose` is that of a whole answer, as the model wrote it.
    "verbose": (b"null", b"false"),
    # "deepseek-legacy" has a switch (`reasoning_in_content`) for streams only.
    "reasoning_format": (b"null", b'"none"', b'"auto"', b'"deepseek"'),
    # These select fields of a native answer, and not those of its events.
    "response_fields": (b"null", b"[]"),
    # The server keeps working on such an answer when its client has left.
    "background": (b"null", b"false"),
}
# The stream of a chat has probabilities beside text, and lacks those of a token without
# text, such as the end of turn.
_PROBABILITIES = {"logprobs": (b"null", b"false"), "n_probs": (b"null", b"0")}
# Of a response, llama-server reports neither where it was cut, nor the text that was
# held back there because a stop string might have begun.
_CUTS = {"stop": (b"null", b'""', b"[]")}
_FOLDABLE_CHAT = _FOLDABLE | _PROBABILITIES
_PROMPTS = re.compile(rb'"prompt"\s*:\s*\[')
_UNSET = (b"null", b'""', b"[]")
_SEVERAL = frozenset({"n", "n_cmpl", "prompt"})
_STOPS = frozenset({"stop", "stop_sequences"})
_ASSEMBLERS: dict[Api, type[Assembler]] = {
    Api.OPENAI: TextAssembler,
    Api.ANTHROPIC: MessageAssembler,
    Api.RESPONSES: ResponseAssembler,
    Api.NATIVE: NativeAssembler,
}


class StreamRequest(msgspec.Struct, frozen=True):
    """A request for a stream, and what folds its answer."""

    body: bytes
    assembler: Callable[[int], Assembler]  # of a limit of characters

    def __repr__(self) -> str:  # without the text of a user
        return f"<StreamRequest {len(self.body)} bytes>"


def ask_for_stream(body: bytes, endpoint: Endpoint) -> StreamRequest | None:
    """Ask for a stream with usage, all else as is; None if its answer would differ."""
    try:
        given = raw_fields.decode(body)
    except UNREADABLE:
        return None  # the worker answers with the reason
    foldable = _FOLDABLE
    if "messages" in given:
        foldable = _FOLDABLE_CHAT
    if endpoint.api is Api.RESPONSES:
        foldable = foldable | _CUTS
    for name in foldable.keys() & given.keys():
        if bytes(given[name]) not in foldable[name]:
            return None
    stops = False
    for name in _STOPS & given.keys():
        stops = stops or bytes(given[name]) not in _UNSET
    asked = Requested(
        stops=stops,
        choices=_choices_of(given),
        tokens=bytes(given.get("return_tokens", b"null")) == b"true",
    )
    given["stream"] = Raw(b"true")
    if endpoint.api is Api.OPENAI:  # the others report it unasked
        given["stream_options"] = Raw(_ASKED)
    make = ChatAssembler if endpoint.chat else _ASSEMBLERS[endpoint.api]
    return StreamRequest(msgspec.json.encode(given), partial(make, asked=asked))


def has_prompts(body: bytes) -> bool:
    """Return whether a request may have several prompts, at the cost of one search."""
    return _PROMPTS.search(body) is not None


def choices_of(body: bytes) -> int:
    """Return how many choices a request asks for; 0 means unknown."""
    try:
        return _choices_of(raw_fields.decode(body))
    except UNREADABLE:
        return 0


def _choices_of(given: dict[str, Raw]) -> int:
    if not _SEVERAL & given.keys():
        return 1
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


# --- Usage ------------------------------------------------------------------------

_ASKED = b'{"include_usage":true}'
_ESCAPED = re.compile(rb"\\u00[5-7]")  # may be a letter of the key
# Values that ask for nothing.  Other options are left alone: vLLM's
# `continuous_usage_stats` would put usage into each event.
_NOTHING = re.compile(rb'null|\{\s*(?:"include_usage"\s*:\s*(?:false|null)\s*)?\}')


def ask_for_usage(body: bytes) -> bytes | None:
    """Request usage, and change nothing else; None if the client has set options.

    `body` is a JSON object that is accepted and not empty.
    """
    if b'"stream_options"' in body or _ESCAPED.search(body):
        scanner = FieldScanner()
        scanner.feed(body)
        field = scanner.found.get("stream_options")
        if field is not None:
            match = _NOTHING.match(body, field.start)
            if match is None:
                return None
            return b"%b%b%b" % (body[: match.start()], _ASKED, body[match.end() :])
    brace = body.index(b"{") + 1
    return b'%b"stream_options":%b,%b' % (body[:brace], _ASKED, body[brace:])
