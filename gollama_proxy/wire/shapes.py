"""Errors in the shape of the API that was called, so that its SDKs show the reason.

    as a status
      OpenAI, Responses, llama-server   {"error": {"message", "type", …}}
      Anthropic                         {"type": "error", "error": {"type", "message"}}
    in a stream
      OpenAI, llama-server              the same, as data
      Anthropic                         the same, as an event of the name `error`
      Responses                         {"type": "error", "code", "message", "param",
                                        "sequence_number"}, as an event of that name

Errors come in OpenAI's shape, or as their worker writes them: llama-server has one
shape for all of its routes, and other servers have others.  One of them is recognised
in all wordings, `Overflow`: a prompt that is too long for the context of its worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import msgspec

from gollama_proxy.wire.schema import UNREADABLE, Api, Private
from gollama_proxy.wire.sse import EventFilter, data_of

# Bytes of the longest event that is held; an error has a few hundred.
MOST_HELD = 64 << 10
_NO_REASON = "A worker refused the request without a reason that could be read."

_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,8})(?![\d.eE])')
# Beginnings of an event that is an error, from llama-server and from the APIs.
_BEGINNINGS = (
    b"event: error",
    b"event:error",
    b'data: {"error"',
    b'data:{"error"',
    b'data: {"type":"error"',
    b'data: {"type": "error"',
)


# --- As a status ------------------------------------------------------------------


def status_body(api: Api, status: int, body: bytes) -> bytes:
    """Convert the body of an error response to the shape of its API."""
    if api is not Api.ANTHROPIC or _is_anthropic(body):
        return body
    error = {**_read(body), "type": _anthropic_type(status)}
    return msgspec.json.encode({"type": "error", "error": error})


def _is_anthropic(body: bytes) -> bool:
    error = _decoded(body)
    return isinstance(error, dict) and error.get("type") == "error" and "error" in error


def _anthropic_type(status: int) -> str:
    """Return the `type` that Anthropic's API has for an error of this status."""
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404:
            return "not_found_error"
        case 413:
            return "request_too_large"
        case 429:
            return "rate_limit_error"
        case 503 | 529:
            return "overloaded_error"
        case 504:
            return "timeout_error"
        case _:
            return "invalid_request_error" if status < 500 else "api_error"


# --- In a stream ------------------------------------------------------------------


def error_event(api: Api, status: int, body: bytes, before: bytes = b"") -> bytes:
    """Write an error as the last event of a stream.

    `status` is the one that it would have without a stream, and `before` the last bytes
    that the client was sent.
    """
    match api:
        case Api.ANTHROPIC:
            body = _one_line(status_body(api, status, body))
            return b"event: error\ndata: %b\n\n" % body
        case Api.RESPONSES:
            error = _read(body)
            event = {"type": "error", **_responses(error, before)}
            return b"event: error\ndata: %b\n\n" % msgspec.json.encode(event)
        case _:  # OpenAI, and llama-server
            return b"data: %b\n\n" % _one_line(body)


def _responses(error: dict[str, Any], before: bytes) -> dict[str, Any]:
    """Return the fields of the `error` event of Responses (OpenAI's reference)."""
    code, kind = error.get("code"), error.pop("type", None)
    if not isinstance(code, str):  # llama-server has the status there
        code = kind if isinstance(kind, str) else None
    numbers = _SEQUENCE.findall(before)
    number = int(numbers[-1]) + 1 if numbers else 0
    return {"param": None, "sequence_number": number, **error, "code": code}


def _one_line(body: bytes) -> bytes:
    """Write an error body on one line, as the data of an event."""
    decoded = _decoded(body)
    if decoded is None:
        error = {"message": _NO_REASON, "type": "server_error"}
        decoded = {"error": {**error, "param": None, "code": None}}
    return msgspec.json.encode(decoded)


def _read(body: bytes) -> dict[str, Any]:
    """Read the fields of an error of any shape; `message` is a string."""
    found = _decoded(body)
    if isinstance(found, dict) and isinstance(found.get("error"), dict | str):
        found = found["error"]
    if isinstance(found, str):
        return {"message": found}
    error: dict[str, Any] = {"message": _NO_REASON}
    if isinstance(found, dict):
        error |= found
        if not isinstance(error["message"], str):
            error["message"] = _NO_REASON
        if "message" not in found and isinstance(found.get("detail"), str):  # FastAPI
            error["message"] = found["detail"]
    return error


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None


class ErrorReshaper(EventFilter):
    """Gives the error events of a worker's stream the shape of the API.

    It is for the APIs whose events have names: there, llama-server writes an error
    that the clients of these APIs do not expect.
    """

    __slots__ = ("_api", "_last")

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api
        self._last = b""  # what was passed on last

    def __repr__(self) -> str:
        return f"<ErrorReshaper {self._api.value} held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        passed = super().feed(data)
        self._last = passed or self._last
        return passed

    def _concerns(self, data: bytes) -> bool:
        return b"error" in data

    def _may_concern(self, begun: bytes) -> bool:
        return len(begun) <= MOST_HELD and any(
            begun.startswith(beginning) or beginning.startswith(begun)
            for beginning in _BEGINNINGS
        )

    def _change(self, event: bytes) -> bytes:
        if not event.startswith(_BEGINNINGS):
            return event
        body = data_of(event) or b""
        return error_event(self._api, _status_of(body), body, self._last)


def _status_of(body: bytes) -> int:
    """Return the status of an error event; llama-server has it as the code."""
    code = _read(body).get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


# --- A prompt that is too long for a worker ---------------------------------------

# Every server words this differently, and most messages have the length of the prompt
# and of the context (`tests/wire/test_shapes.py` quotes them).  Missing numbers are 0.

MOST_TOKENS = 10**8  # more cannot be true
OVERFLOW_TYPE = "exceed_context_size_error"  # llama-server's own
_NAMES = frozenset(
    {OVERFLOW_TYPE, "context_length_exceeded", "context_window_exceeded"}
)

# Not compiled before there is such a refusal: that takes 7 ms of a start.
_CONTEXT = r"context[ _](?:length|size|window|limit)"
_WORDS = (
    rf"maximum {_CONTEXT}"
    rf"|(?:exceed(?:s|ed|ing)?|(?:long|great|larg)er than) (?:[\w']+ ){{0,4}}{_CONTEXT}"
    rf"|{_CONTEXT} (?:is |was |has been )?exceeded"
    rf"|{_CONTEXT} (?:is|of) only \d"
    r"|(?:prompt|input) is too long"
    r"|maximum (?:prompt|input) length (?:is|of) \d"
    r"|exceeds the maximum number of tokens"
    r"|`inputs` (?:tokens \+ `max_new_tokens` must be <=|must have less than) \d"
)
# A message with another beginning may quote the client, numbers included.
_OVERFLOWS = (
    r"this model's|the (?:model|input|request|prompt|number)|you passed|requested tok"
    r"|(?:context|prompt|request)\b|input (?:validation|length|token)"
    r"|'?max_(?:completion_)?tokens|trying to keep"
)
_N = r"(\d[\d,]{0,11})"
_CONTEXTS = (
    rf"{_CONTEXT}(?: \(| (?:is|of)(?: only)? ){_N}"
    rf"|must be <= {_N}|less than {_N} tokens|> {_N} maximum|prompt length is {_N}"
    rf"|tokens allowed \({_N}"
)
# The prompt alone before the prompt with the answer that was asked for.
_TOKENS = (
    (
        rf"{_N} in (?:the|your) (?:messages|prompt)|{_N} tokens from the input"
        rf"|{_N} input tokens|resulted in {_N} tokens|Given: {_N}"
        rf"|(?:input|request|prompt) \({_N} tokens|keep the first {_N} tokens"
        rf"|too long: {_N} tokens|token count \({_N}|request contains {_N}"
    ),
    rf"requested (?:tokens \()?{_N}",
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
        if not (named or re.search(_WORDS, message, re.IGNORECASE)):
            return None
        if re.match(_OVERFLOWS, message, re.IGNORECASE):
            tokens = tokens or _number(message, *_TOKENS)
            context = context or _number(message, _CONTEXTS)
        return cls(message, tokens, context)


def _tokens(count: object) -> int:
    """Return a number of tokens that can be true, else 0."""
    return count if type(count) is int and 0 < count < MOST_TOKENS else 0


def _number(message: str, *patterns: str) -> int:
    for pattern in patterns:
        if (found := re.search(pattern, message, re.IGNORECASE)) is not None:
            return _tokens(int(next(filter(None, found.groups())).replace(",", "")))
    return 0


class _Refusal(Private):
    error: Any = None
    message: Any = None
    detail: Any = None
    type: Any = None
    code: Any = None


_refusal = msgspec.json.Decoder(_Refusal)
