"""Headers: what is accepted, what crosses to a worker, what comes back.

Towards a worker only what is listed goes: a hub with a dozen JSON routes needs few
headers, and what nobody listed cannot smuggle, cannot leak a credential, and cannot
switch on a feature of the worker (`X-Conversation-Id` keeps a generation alive after
its client left).

Back to the client everything goes but what belongs to one hop (RFC 9110, 7.6.1), what
speaks for the worker instead of the hub, and what is named in `Connection`.  What the
hub adds is added last, so that no `Connection: x-request-id` can take it away again
(golang/go#50580).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gollama_proxy.wire.errors import Code, RequestError

Headers = Sequence[tuple[bytes, bytes]]

# Client → worker.  Everything else that a worker gets is written by the hub.
FORWARDED = frozenset({b"accept", b"accept-language", b"traceparent", b"tracestate"})

HOP_BY_HOP = frozenset(
    {
        b"alt-svc",
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Worker → client: the hub writes its own, or the worker has no say in it, because to a
# browser it would speak for all that is at the hub's address.
OWNED = frozenset(
    {
        b"cache-control",
        b"clear-site-data",
        b"content-length",
        b"date",
        b"refresh",
        b"server",
        b"set-cookie",
        b"set-cookie2",
        b"strict-transport-security",
        b"www-authenticate",
        b"x-accel-buffering",
        b"x-request-id",
    }
)
OWNED_PREFIXES = (b"access-control-", b"x-gollama-", b"x-ratelimit-")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# RFC 3986, 3.2: a name or an address, and a port.  Left out is what the grammar allows
# in a name and nobody has in one: the comma and its like, at which a list could be cut.
_HOST = re.compile(rb"(?:(?:[A-Za-z0-9._~%-]+|\[[A-Za-z0-9:.%]+\])(?::[0-9]*)?)?")
# RFC 9110, 5.5: visible characters, spaces and tabs.  obs-text (0x80 and up) is left
# out: two programs rarely agree on what it means.
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e]*")


# What few requests have; all others are passed over at the cost of one look-up.
_SUSPECT = frozenset(
    {
        b"content_length",
        b"transfer-encoding",
        b"transfer_encoding",
        b"upgrade",
    }
)
_LAST = frozenset({b"transfer-encoding", b"upgrade"})


def check_head(
    method: str, version: tuple[int, int], headers: Headers, limit: int
) -> bool:
    """Refuse a request head that could be read in two ways, or is too large.

    The parser in front has refused most of what is malformed already; this is what it
    lets through and a proxy must not.  Returns whether the connection has to end with
    this request, as what follows could be read in two ways:

    * behind a body in chunks: aiohttp (3.14.5) takes the last trailer for a field of
      the next request, and a trailer can say `Authorization`;
    * behind an `Upgrade`, which is ignored (RFC 9110, 7.8): aiohttp's parser stops
      behind such a request and drops what came with it.

    Raises:
        RequestError: 400, 405, 431, 501 or 505, naming the header.
    """
    if version not in ((1, 0), (1, 1)):
        text = f"HTTP/{version[0]}.{version[1]} is not supported; use HTTP/1.1."
        raise RequestError(Code.UNSUPPORTED_HTTP_VERSION, text)
    if method == "CONNECT":
        text = "CONNECT is not supported: this is no tunnel."
        raise RequestError(Code.METHOD_NOT_ALLOWED, text, allow="GET, POST")
    total = 0
    last = False
    for name, value in headers:
        total += len(name) + len(value) + 4  # ": " and CRLF
        lowered = name.lower()
        if lowered == b"host":
            if not _HOST.fullmatch(value):  # RFC 9112, 3.2
                text = "Host is no name or address, with or without a port."
                raise RequestError(Code.BAD_REQUEST, text)
        elif lowered in _SUSPECT:
            _check_field(name, value, version)
            last = last or lowered in _LAST
    if total > limit:
        text = f"The request head is larger than {limit} bytes."
        raise RequestError(Code.HEAD_TOO_LARGE, text)
    return last


def _check_field(name: bytes, value: bytes, version: tuple[int, int]) -> None:
    lowered = name.lower()
    if lowered == b"transfer-encoding":
        if version == (1, 0):
            # RFC 9112, 6.1: such framing is faulty, even if it can be guessed at.
            text = "Transfer-Encoding needs HTTP/1.1."
            raise RequestError(Code.BAD_REQUEST, text)
        if value.lower() != b"chunked":
            # RFC 9112, 6.1: a server that does not understand a coding answers 501.
            text = "Transfer-Encoding must be exactly 'chunked'."
            raise RequestError(Code.UNSUPPORTED_TRANSFER_ENCODING, text)
    elif lowered != b"upgrade":
        # Some servers read Content_Length as Content-Length (Envoy refuses it, too).
        text = f"Header {name.decode()!r} is ambiguous."
        raise RequestError(Code.BAD_REQUEST, text)


def request_id(headers: Iterable[tuple[bytes, bytes]], fallback: str) -> str:
    """Take the client's `X-Request-Id` where it is harmless, else `fallback`."""
    given = [value for name, value in headers if name.lower() == b"x-request-id"]
    if len(given) == 1:
        text = given[0].decode("latin-1")
        if _REQUEST_ID.fullmatch(text):
            return text
    return fallback


def to_worker(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Choose which of a client's headers a worker gets to see."""
    dropped = _named_in_connection(headers)
    return [
        (name, value)
        for name, value in headers
        if (lowered := name.lower()) in FORWARDED
        and lowered not in dropped
        and _FIELD_VALUE.fullmatch(value)
    ]


def to_client(headers: Headers) -> list[tuple[str, str]]:
    """Choose which of a worker's headers a client gets to see."""
    dropped = HOP_BY_HOP | OWNED | _named_in_connection(headers)
    return [
        (name.decode("ascii"), value.decode("ascii"))
        for name, value in headers
        if (lowered := name.lower()) not in dropped
        and not lowered.startswith(OWNED_PREFIXES)
        and name.isascii()
        and _FIELD_VALUE.fullmatch(value)
    ]


def _named_in_connection(headers: Headers) -> set[bytes]:
    """Collect what any `Connection` header names; the first may be empty (go#46313)."""
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    return named
