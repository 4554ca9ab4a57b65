"""Requests that a worker gets in another form than their clients wrote.

The hub asks for a stream where a client wants one piece, so that the worker notices
when the client leaves; for usage, where a client streams without it; and for the rest
of an answer that broke off on another worker.  Every other field stays to the byte as
it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    Asked,
    Assembler,
    MessageAssembler,
    NativeAssembler,
)
from gollama_proxy.wire.assemble_openai import (
    ChatAssembler,
    ResponseAssembler,
    TextAssembler,
)
from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.partial import Partial
from gollama_proxy.wire.schema import UNREADABLE, Api, Endpoint, Private, raw_fields

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


class Streaming(NamedTuple):
    """A request for a stream, and what folds its answer."""

    body: bytes
    assembler: Callable[[int], Assembler]  # of a limit of characters

    def __repr__(self) -> str:  # without the text of a user
        return f"<Streaming {len(self.body)} bytes>"


def ask_for_stream(body: bytes, endpoint: Endpoint) -> Streaming | None:
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
    asked = Asked(
        stops=stops,
        choices=_choices_of(given),
        tokens=bytes(given.get("return_tokens", b"null")) == b"true",
    )
    given["stream"] = Raw(b"true")
    if endpoint.api is Api.OPENAI:  # the others report it unasked
        given["stream_options"] = Raw(_ASKED)
    make = ChatAssembler if endpoint.chat else _ASSEMBLERS[endpoint.api]
    return Streaming(msgspec.json.encode(given), partial(make, asked=asked))


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


# --- The rest of an answer --------------------------------------------------------

# There are two requests for the rest of an answer.  The *continuation* has the text so
# far, and the reasoning before it, as an assistant's message that is not finished, and
# wants it repeated (`echo`), which proves that the worker goes on from there.
# llama-server and vLLM repeat it, and so do builds of the former that do not know the
# word.  Nothing else would prove as much: a worker that repeats nothing may have begun
# a new turn, in words that fit by chance, and the prompt that `/apply-template` shows
# belongs to llama-server alone, and costs one request more.
#
# The other one is the *original request*, for an answer that no message could begin: in
# its reasoning, in a call of a tool, under a grammar, or too short for its repetition
# to prove anything.  It costs the worker the whole answer once more, and it has to be
# the same one, so it is of use with a `seed` or at temperature 0.  It also comes
# second, where a continuation was refused or proved nothing.
#
# A text completion needs no proof: its prompt goes on.

# Fields that rule a rescue out, and the values (beside null) that switch them off.
_BARRED: dict[str, tuple[bytes, ...]] = {
    "n": (b"1",),  # several answers, interleaved
    "n_cmpl": (b"1",),  # llama-server's name for the same
    "best_of": (b"1",),  # which one is the best is open until all are complete
    "logprobs": (b"false",),  # those of the repeated text would be missing or doubled
    "top_logprobs": (b"0",),
    "n_probs": (b"0",),  # llama-server's name for the same
    "audio": (),  # sound cannot be compared
    "modalities": (b'["text"]',),
}
# The same for fields that rule a continuation out, so that the whole is asked for.
_WHOLE: dict[str, tuple[bytes, ...]] = {
    "tool_choice": (b'"auto"', b'"none"'),  # a call has to come first
    "function_call": (b'"auto"', b'"none"'),  # the older name
    "response_format": (b'{"type":"text"}',),  # its grammar would begin in mid-text
    "json_schema": (),  # llama-server's name for the same
    "grammar": (b'""',),  # the same
    "structured_outputs": (),  # vLLM's names for the same, this one and the next five
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "echo": (b"false",),  # the text begins with the prompt
    "suffix": (b'""',),  # the text so far belongs in the middle, not at the end
    "continue_final_message": (b"false",),  # the client itself has begun the answer
    "add_generation_prompt": (b"true",),
}
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


class _Message(Private):
    role: str


def can_rescue(body: bytes, chat: bool) -> bool:
    """Return whether the answer to this request can be resumed, in either way."""
    try:
        fields = raw_fields.decode(body)
        for name in _LIMITS:
            _limit(fields, name)
        if chat:
            return bool(_messages(fields)) and not _sets(fields, _BARRED)
        prompt = msgspec.json.decode(fields["prompt"])
    except (ValueError, KeyError, RecursionError):
        return False
    tokens = isinstance(prompt, list) and all(isinstance(n, int) for n in prompt)
    one = isinstance(prompt, str) or tokens
    return one and not _sets(fields, _BARRED)


def can_continue(body: bytes, partial: Partial, chat: bool) -> bool:
    """Return whether a continuation can be asked for, and proved.

    `can_rescue` must be true of `body`, here and below.
    """
    fields = raw_fields.decode(body)
    if not partial.is_plain or _sets(fields, _WHOLE):
        return False
    if not chat:  # a prompt of tokens cannot take the text
        return isinstance(msgspec.json.decode(fields["prompt"]), str)
    # One token, or a line of dashes, may come again without being a repetition.
    proof = partial.pieces > 1 and len(set(partial.text) - set(" \t\r\n")) > 1
    return proof and _messages(fields)[-1].role != "assistant"


def _sets(fields: dict[str, Raw], barred: dict[str, tuple[bytes, ...]]) -> bool:
    """Return whether any of these fields is present and not switched off."""
    return any(
        msgspec.json.encode(msgspec.json.decode(fields[name])) not in (b"null", *off)
        for name, off in barred.items()
        if name in fields
    )


def _messages(fields: dict[str, Raw]) -> list[_Message]:
    return msgspec.json.decode(fields["messages"], type=list[_Message])


def exhausted(body: bytes, partial: Partial) -> bool:
    """Return whether nothing is left to generate: the client has its `max_tokens`."""
    fields = raw_fields.decode(body)
    limits = [limit for name in _LIMITS if (limit := _limit(fields, name)) > 0]
    whole = partial.tokens - partial.halved
    return bool(partial.spans) and any(limit <= whole for limit in limits)


def for_model(body: bytes, model: str) -> bytes:
    """Write the same request for another model."""
    fields = raw_fields.decode(body)
    fields["model"] = Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def ask_for_rest(body: bytes, partial: Partial, chat: bool) -> bytes:
    """Write the request for the rest of an answer.

    `can_continue` must be true of it, and `exhausted` false.
    """
    fields = raw_fields.decode(body)
    for name in _LIMITS:
        limit = _limit(fields, name)
        if limit > 0:  # zero and below mean no limit
            fields[name] = Raw(b"%d" % max(limit - partial.tokens, 1))
    if chat:
        messages = msgspec.json.decode(fields["messages"], type=list[Raw])
        message: dict[str, Any] = {"role": "assistant", "content": partial.text}
        if partial.reasoning.strip():
            message["reasoning_content"] = partial.reasoning
        messages.append(Raw(msgspec.json.encode(message)))
        fields["messages"] = Raw(msgspec.json.encode(messages))
        fields["continue_final_message"] = Raw(b"true")
        fields["add_generation_prompt"] = Raw(b"false")
        fields["echo"] = Raw(b"true")
    else:
        prompt = msgspec.json.decode(fields["prompt"], type=str)
        fields["prompt"] = Raw(msgspec.json.encode(prompt + partial.text))
    return msgspec.json.encode(fields)


def _limit(fields: dict[str, Raw], name: str) -> int:
    limit = msgspec.json.decode(fields.get(name, b"null"), type=int | None)
    return limit or 0
