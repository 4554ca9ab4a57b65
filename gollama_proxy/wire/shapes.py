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
shape for all of its routes, and other servers have others.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gollama_proxy.wire.openai import Api
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
