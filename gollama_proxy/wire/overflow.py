"""A worker's refusal of a prompt that is too long for its context.

Every server words it differently, and most messages have the length of the prompt and
of the context (`tests/wire/test_overflow.py` quotes them).  Numbers that are missing
are 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import msgspec

from gollama_proxy.wire.schema import UNREADABLE, Private

MOST_TOKENS = 10**8  # more cannot be true
OVERFLOW_TYPE = "exceed_context_size_error"  # llama-server's own
_NAMES = frozenset(
    {OVERFLOW_TYPE, "context_length_exceeded", "context_window_exceeded"}
)

_CONTEXT = r"context[ _](?:length|size|window|limit)"
_WORDS = re.compile(
    rf"maximum {_CONTEXT}"
    rf"|(?:exceed(?:s|ed|ing)?|(?:long|great|larg)er than) (?:[\w']+ ){{0,4}}{_CONTEXT}"
    rf"|{_CONTEXT} (?:is |was |has been )?exceeded"
    rf"|{_CONTEXT} (?:is|of) only \d"
    r"|(?:prompt|input) is too long"
    r"|maximum (?:prompt|input) length (?:is|of) \d"
    r"|exceeds the maximum number of tokens"
    r"|`inputs` (?:tokens \+ `max_new_tokens` must be <=|must have less than) \d",
    re.IGNORECASE,
)
# A message with another beginning may quote the client, numbers included.
_BEGINNINGS = re.compile(
    r"this model's|the (?:model|input|request|prompt|number)|you passed|requested tok"
    r"|(?:context|prompt|request)\b|input (?:validation|length|token)"
    r"|'?max_(?:completion_)?tokens|trying to keep",
    re.IGNORECASE,
)
_N = r"(\d[\d,]{0,11})"
_CONTEXTS = re.compile(
    rf"{_CONTEXT}(?: \(| (?:is|of)(?: only)? ){_N}"
    rf"|must be <= {_N}|less than {_N} tokens|> {_N} maximum|prompt length is {_N}"
    rf"|tokens allowed \({_N}",
    re.IGNORECASE,
)
# The prompt alone before the prompt with the answer that was asked for.
_TOKENS = (
    re.compile(
        rf"{_N} in (?:the|your) (?:messages|prompt)|{_N} tokens from the input"
        rf"|{_N} input tokens|resulted in {_N} tokens|Given: {_N}"
        rf"|(?:input|request|prompt) \({_N} tokens|keep the first {_N} tokens"
        rf"|too long: {_N} tokens|token count \({_N}|request contains {_N}",
        re.IGNORECASE,
    ),
    re.compile(rf"requested (?:tokens \()?{_N}", re.IGNORECASE),
)


class Overflow(NamedTuple):
    """The contents of such a refusal."""

    message: str
    tokens: int = 0  # of the prompt
    context: int = 0  # of the worker

    def __repr__(self) -> str:  # the message may quote a user
        return f"<Overflow of {self.tokens} tokens in {self.context}>"

    @classmethod
    def read(cls, body: bytes) -> Self | None:
        """Read the body of an error; None if it is about something else."""
        try:
            refusal = _refusal.decode(body)
        except UNREADABLE:
            return None
        error = refusal.error if isinstance(refusal.error, dict) else {}
        texts = (error.get("message"), refusal.error, refusal.message, refusal.detail)
        message = next((text for text in texts if isinstance(text, str)), "")
        names = (error.get("type"), error.get("code"), refusal.type, refusal.code)
        counts = (error.get("n_prompt_tokens"), error.get("n_ctx"))
        return cls.of(message, names, *map(_tokens, counts))

    @classmethod
    def of(
        cls, message: str, names: Iterable[object], tokens: int = 0, context: int = 0
    ) -> Self | None:
        """Recognise an error by its message, and its type and code in `names`."""
        named = any(isinstance(name, str) and name in _NAMES for name in names)
        if not (named or _WORDS.search(message)):
            return None
        if _BEGINNINGS.match(message):
            tokens = tokens or _number(message, *_TOKENS)
            context = context or _number(message, _CONTEXTS)
        return cls(message, tokens, context)


def _tokens(count: object) -> int:
    """Return a number of tokens that can be true, else 0."""
    return count if type(count) is int and 0 < count < MOST_TOKENS else 0


def _number(message: str, *patterns: re.Pattern[str]) -> int:
    for pattern in patterns:
        if (found := pattern.search(message)) is not None:
            return _tokens(int(next(filter(None, found.groups())).replace(",", "")))
    return 0


class _Refusal(Private):
    error: Any = None
    message: Any = None
    detail: Any = None
    type: Any = None
    code: Any = None


_refusal = msgspec.json.Decoder(_Refusal)
