"""Everything that can go wrong, listed once: code, status, type and cause.

    ProxyError
    ├── RequestError      the client's request cannot be served as it is
    ├── NoWorkerError     no worker can serve it now; a later try may succeed
    ├── WorkerError       a worker was tried and failed
    └── HubError          the hub itself: draining, or a bug

Every error that a client sees is one of these codes, in the shape of the OpenAI API:

    {"error": {"message": "…", "type": "…", "param": null, "code": "…"}}
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

import msgspec

NO_FIELDS: Mapping[str, object] = MappingProxyType({})


class Code(enum.StrEnum):
    """The `code` of an error body: stable, for programs."""

    # The request
    BAD_REQUEST = "bad_request"
    INVALID_JSON = "invalid_json"
    INVALID_VALUE = "invalid_value"
    MODEL_MISSING = "model_missing"
    CONTEXT_LENGTH = "context_length_exceeded"
    INVALID_API_KEY = "invalid_api_key"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    PRIORITY_NOT_ALLOWED = "priority_not_allowed"
    CANCELLED = "request_cancelled"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    LOCAL_ONLY = "local_only"
    ADDRESS_REFUSED = "address_refused"
    MODEL_NOT_FOUND = "model_not_found"
    UNKNOWN_URL = "unknown_url"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TIMEOUT = "body_timeout"
    CONFLICT = "conflict"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    EXPECTATION_FAILED = "expectation_failed"
    RATE_LIMITED = "rate_limit_exceeded"
    HEAD_TOO_LARGE = "head_too_large"
    UNSUPPORTED_TRANSFER_ENCODING = "unsupported_transfer_encoding"
    UNSUPPORTED_HTTP_VERSION = "unsupported_http_version"
    # The queue
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    # The workers
    NO_WORKER = "no_worker_available"
    WORKER_UNREACHABLE = "worker_unreachable"
    WORKER_LOST = "worker_connection_lost"
    WORKER_PROTOCOL = "worker_bad_response"
    WORKER_INCOMPLETE = "worker_incomplete_answer"
    WORKER_REFUSED_KEY = "worker_refused_key"
    WORKER_TIMEOUT = "worker_timeout"
    WORKER_SLOW = "worker_slow"
    # The hub
    REQUEST_TIMEOUT = "request_timeout"
    DRAINING = "hub_draining"
    INTERNAL = "internal_error"

    @property
    def status(self) -> int:
        """The HTTP status, which the official SDKs map to their exceptions."""
        match self:
            case (
                Code.BAD_REQUEST
                | Code.INVALID_JSON
                | Code.INVALID_VALUE
                | Code.MODEL_MISSING
                | Code.CONTEXT_LENGTH
            ):
                return 400
            case Code.INVALID_API_KEY:
                return 401
            case (
                Code.MODEL_NOT_ALLOWED
                | Code.PRIORITY_NOT_ALLOWED
                | Code.CANCELLED
                | Code.INSUFFICIENT_SCOPE
                | Code.LOCAL_ONLY
                | Code.ADDRESS_REFUSED
            ):
                return 403
            case Code.MODEL_NOT_FOUND | Code.UNKNOWN_URL | Code.NOT_FOUND:
                return 404
            case Code.METHOD_NOT_ALLOWED:
                return 405
            case Code.BODY_TIMEOUT:
                return 408
            case Code.CONFLICT:
                return 409
            case Code.BODY_TOO_LARGE:
                return 413
            case Code.UNSUPPORTED_ENCODING | Code.UNSUPPORTED_MEDIA_TYPE:
                return 415
            case Code.EXPECTATION_FAILED:
                return 417
            case Code.RATE_LIMITED | Code.QUEUE_FULL:
                return 429
            case Code.HEAD_TOO_LARGE:
                return 431
            case Code.INTERNAL:
                return 500
            case Code.UNSUPPORTED_TRANSFER_ENCODING:
                return 501
            case (
                Code.WORKER_UNREACHABLE
                | Code.WORKER_LOST
                | Code.WORKER_PROTOCOL
                | Code.WORKER_INCOMPLETE
                | Code.WORKER_REFUSED_KEY
            ):
                return 502
            case Code.NO_WORKER | Code.QUEUE_TIMEOUT | Code.DRAINING:
                return 503
            case Code.WORKER_TIMEOUT | Code.WORKER_SLOW | Code.REQUEST_TIMEOUT:
                return 504
            case Code.UNSUPPORTED_HTTP_VERSION:
                return 505
            case _:
                assert_never(self)

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
