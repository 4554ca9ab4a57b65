"""Everything that can go wrong, listed once: code, status, type and cause.

    ProxyError
    ├── RequestError      the client's request cannot be served as it is
    ├── NoWorkerError     no worker can serve it now; a later try may succeed
    ├── WorkerError       a worker was tried and failed
    └── HubError          the hub itself: draining, or a bug

Every error that a client sees is one of these codes, in the shape of the OpenAI API:

    {"error": {"message": "…", "type": "…", "param": null, "code": "…"}}

It is converted to the shape of the API that was called, so that its SDKs show the
reason:

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

import enum
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import msgspec

from gollama_proxy.wire.schema import UNREADABLE, Api, Private

NO_FIELDS: Mapping[str, object] = MappingProxyType({})
_NO_REASON = "A worker refused the request without a reason that could be read."
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,8})(?![\d.eE])')


class Code(enum.StrEnum):
    """The `code` of an error body: stable, for programs.

    `status` is that of HTTP, which the official SDKs map to their exceptions.
    """

    _value_: str
    status: int

    def __new__(cls, code: str, status: int) -> Self:
        member = str.__new__(cls, code)
        member._value_, member.status = code, status
        return member

    # The request
    BAD_REQUEST = "bad_request", 400
    INVALID_JSON = "invalid_json", 400
    INVALID_VALUE = "invalid_value", 400
    MODEL_MISSING = "model_missing", 400
    CONTEXT_LENGTH = "context_length_exceeded", 400
    INVALID_API_KEY = "invalid_api_key", 401
    MODEL_NOT_ALLOWED = "model_not_allowed", 403
    PRIORITY_NOT_ALLOWED = "priority_not_allowed", 403
    CANCELLED = "request_cancelled", 403
    INSUFFICIENT_SCOPE = "insufficient_scope", 403
    LOCAL_ONLY = "local_only", 403
    ADDRESS_REFUSED = "address_refused", 403
    MODEL_NOT_FOUND = "model_not_found", 404
    UNKNOWN_URL = "unknown_url", 404
    NOT_FOUND = "not_found", 404
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    BODY_TIMEOUT = "body_timeout", 408
    CONFLICT = "conflict", 409
    BODY_TOO_LARGE = "body_too_large", 413
    UNSUPPORTED_ENCODING = "unsupported_encoding", 415
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type", 415
    EXPECTATION_FAILED = "expectation_failed", 417
    RATE_LIMITED = "rate_limit_exceeded", 429
    HEAD_TOO_LARGE = "head_too_large", 431
    UNSUPPORTED_TRANSFER_ENCODING = "unsupported_transfer_encoding", 501
    UNSUPPORTED_HTTP_VERSION = "unsupported_http_version", 505
    # The queue
    QUEUE_FULL = "queue_full", 429
    QUEUE_TIMEOUT = "queue_timeout", 503
    # The workers
    NO_WORKER = "no_worker_available", 503
    WORKER_UNREACHABLE = "worker_unreachable", 502
    WORKER_LOST = "worker_connection_lost", 502
    WORKER_PROTOCOL = "worker_bad_response", 502
    WORKER_INCOMPLETE = "worker_incomplete_answer", 502
    WORKER_REFUSED_KEY = "worker_refused_key", 502
    WORKER_TIMEOUT = "worker_timeout", 504
    WORKER_SLOW = "worker_slow", 504
    # The hub
    REQUEST_TIMEOUT = "request_timeout", 504
    DRAINING = "hub_draining", 503
    STORE_DOWN = "store_unavailable", 503
    INTERNAL = "internal_error", 500

    @property
    def type(self) -> str:
        """The `type` of an error body, as the OpenAI API groups them."""
        if self is Code.INVALID_API_KEY:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            # OpenAI itself names the exhausted resource here ("requests", "tokens");
            # its SDKs look at the status, Anthropic's at this word.
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


class ProxyError(Exception):
    """A request that ends with an error response.

    `retry_after` is in seconds; `allow` lists the methods of a path; `detail` is for
    the log only, and may name things that clients must not see.  `fields` are added to
    the error's object, or replace the usual ones.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str = "",
        detail: str = "",
        fields: Mapping[str, object] = NO_FIELDS,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow
        self.detail = detail
        self.fields = fields

    def __repr__(self) -> str:  # the message may quote the client
        return f"<{type(self).__name__} {self.code}>"

    def body(self) -> bytes:
        """Encode the JSON body of the response."""
        return error_body(
            self.message, self.code.type, self.code, self.param, self.fields
        )


class RequestError(ProxyError):
    """The client's request cannot be served as it is; no worker was touched."""


class NoWorkerError(ProxyError):
    """No worker can serve the request now."""


class WorkerError(ProxyError):
    """A worker was tried and failed."""


class HubError(ProxyError):
    """The hub itself cannot serve the request."""


def error_body(
    message: str,
    type: str,
    code: str | None,
    param: str | None = None,
    fields: Mapping[str, object] = NO_FIELDS,
) -> bytes:
    """Encode an error as the OpenAI API does."""
    error = {"message": message, "type": type, "param": param, "code": code, **fields}
    return msgspec.json.encode({"error": error})


# --- In the shape of an API: as a status ------------------------------------------


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
    other = "invalid_request_error" if status < 500 else "api_error"
    return _ANTHROPIC_TYPES.get(status, other)


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


# --- In the shape of an API: in a stream ------------------------------------------


def write_error_event(api: Api, status: int, body: bytes, before: bytes = b"") -> bytes:
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


def status_of(body: bytes) -> int:
    """Return the status of an error event; llama-server has it as the code."""
    code = _read(body).get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


# --- A prompt that is too long for a worker ---------------------------------------

# Every server words this differently, and most messages have the length of the prompt
# and of the context (quoted in `tests/wire/test_errors_shapes.py`).  0: missing.

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
