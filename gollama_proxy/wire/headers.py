"""Headers: which are accepted, sent on to a worker, and sent back to the client.

Only the listed headers are sent to a worker.  A hub with a dozen JSON routes needs few,
and a header that is not listed cannot smuggle a request, leak a credential, or switch
on a feature of the worker (`X-Conversation-Id` keeps a generation alive after its
client has left).

All headers are sent back to the client but those of a single hop (RFC 9110, 7.6.1),
those in which a worker would speak for the hub, and those named in `Connection`.  The
hub adds its own last, so that no `Connection: x-request-id` removes them again
(golang/go#50580).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from gollama_proxy.wire.errors import Code, RequestError

Headers = Sequence[tuple[bytes, bytes]]

# Client → worker.  Everything else that a worker gets is written by the hub.
FORWARDED = frozenset({b"accept", b"accept-language", b"traceparent", b"tracestate"})
_TRACES = frozenset({b"traceparent", b"tracestate"})

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
# Worker → client: the hub writes its own, or a browser would apply them to everything
# at the hub's address.
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
_DROPPED = HOP_BY_HOP | OWNED
OWNED_PREFIXES = (b"access-control-", b"x-gollama-", b"x-ratelimit-")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# RFC 3986, 3.2: a name or an address, and a port.  Characters are left out that the
# grammar allows in a name and no name has: a list could be cut at a comma, for example.
_HOST = re.compile(rb"(?:(?:[A-Za-z0-9._~%-]+|\[[A-Za-z0-9:.%]+\])(?::[0-9]*)?)?")
# RFC 9110, 5.5: visible characters, spaces and tabs.  obs-text (0x80 and up) is left
# out: two programs rarely agree on what it means.
_FIELD_VALUE = re.compile(rb"[\t\x20-\x7e]*")


# Headers that few requests have; the others cost one look-up.
_SUSPECT = frozenset(
    {
        b"content_length",
        b"transfer-encoding",
        b"transfer_encoding",
        b"upgrade",
    }
)
_LAST = frozenset({b"transfer-encoding", b"upgrade"})
_NOTED = frozenset({b"expect", b"x-gollama-priority"})
_READ = FORWARDED.union(_SUSPECT, _NOTED, {b"host", b"connection", b"x-request-id"})
_VERSIONS = ((1, 0), (1, 1))
# Bytes of a head that an idle connection may hold in memory; few are larger.
MOST_KEPT = 4 << 10


class Head(msgspec.Struct, gc=False):
    """What the hub reads of a request's head.

    A client repeats nearly all of it on its connection.
    """

    last: bool  # the connection has to end with this request
    id: str  # the client's `X-Request-Id`, or empty
    forwarded: bytes  # the header lines that a worker gets, each ended by CRLF
    trace: TraceContext | None  # the client's, if it has a valid one
    expects: bool  # it has an `Expect`
    prioritised: bool  # it has an `X-Gollama-Priority`
    version: tuple[int, int]
    headers: Headers
    size: int  # of all headers, in bytes
    # The hash of its token, once that was accepted (`edge/auth.py`)
    token: bytes = b""

    def __repr__(self) -> str:  # without the headers, one of which has the token
        return f"<Head of {len(self.headers)} headers>"


class TraceContext(NamedTuple):
    """The place of a request in a trace that its client has begun."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16, of the client's span
    sampled: bool  # whether the client records the trace
    state: str  # what other tracing systems pass on; empty if there is nothing

    def __repr__(self) -> str:  # without the state, which a client may choose
        return f"<TraceContext {self.trace_id} {self.span_id}>"


def read_head(
    method: str,
    version: tuple[int, int],
    headers: Headers,
    limit: int,
    before: Head | None = None,
) -> Head:
    """Read a request head; reject one that is ambiguous or too large.

    `before` is that of the previous request on the connection, which is returned for a
    head that reads alike.

    The parser has rejected most malformed heads; this rejects those that it accepts and
    a proxy must not.  The connection has to be closed after a request if the next one
    could be read in two ways:

    * after a body in chunks: aiohttp (3.14.5) takes the last trailer for a field of the
      next request, and a trailer can be an `Authorization`;
    * after an `Upgrade`, which is ignored (RFC 9110, 7.8): aiohttp's parser stops after
      such a request and drops the bytes that came with it.

    Raises:
        RequestError: 400, 405, 431, 501 or 505, naming the header.
    """
    if (
        before is not None
        and method != "CONNECT"
        and version == before.version
        and before.size <= limit
        and (headers == before.headers or _read_alike(headers, before.headers))
    ):
        return before
    if version not in _VERSIONS:
        text = f"HTTP/{version[0]}.{version[1]} is not supported; use HTTP/1.1."
        raise RequestError(Code.UNSUPPORTED_HTTP_VERSION, text)
    if method == "CONNECT":
        text = "CONNECT is not supported: this is not a tunnel."
        raise RequestError(Code.METHOD_NOT_ALLOWED, text, allow="GET, POST")
    size = 4 * len(headers)  # with ": " and CRLF
    last, ids = False, []
    noted = set()
    forwarded: list[tuple[bytes, bytes]] = []
    named = b""  # in `Connection`: of one hop only (RFC 9110, 7.6.1)
    for name, value in headers:
        size += len(name) + len(value)
        lowered = name.lower()
        if lowered not in _READ:
            continue
        if lowered in FORWARDED:
            forwarded.append((name, value))
        elif lowered == b"host":
            if not _is_host(value):  # RFC 9112, 3.2
                text = "Host is not a name or an address, with or without a port."
                raise RequestError(Code.BAD_REQUEST, text)
        elif lowered in _NOTED:
            noted.add(lowered)
        elif lowered == b"connection":
            named += b"," + value
        elif lowered == b"x-request-id":
            ids.append(value)
        else:
            _check_field(name, value, version)
            last = last or lowered in _LAST
    if size > limit:
        text = f"The request head is larger than {limit} bytes."
        raise RequestError(Code.HEAD_TOO_LARGE, text)
    lines = b""
    traces: list[tuple[bytes, bytes]] = []
    for name, value in forwarded:
        line = _line(name, value)
        if line and not (named and _names(named, name)):
            lines += line
            if name.lower() in _TRACES:
                traces.append((name.lower(), value))
    trace = _trace_context(traces) if traces else None
    return Head(
        last,
        _harmless_id(ids) if ids else "",
        lines,
        trace,
        b"expect" in noted,
        b"x-gollama-priority" in noted,
        version,
        headers,
        size,
    )


# Differ from one message to the next on a connection; neither is read here.
_VARYING = frozenset({b"content-length", b"date"})


def _read_alike(headers: Headers, before: Headers) -> bool:
    """Whether headers equal those before, but for varying ones of the same length."""
    if len(headers) != len(before):
        return False
    for (name, value), (other, known) in zip(headers, before, strict=True):
        if name != other or (
            value != known
            and not (len(value) == len(known) and name.lower() in _VARYING)
        ):
            return False
    return True


# The same clients send the same few values again and again.


@functools.lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


@functools.lru_cache(maxsize=64)
def _line(name: bytes, value: bytes) -> bytes:
    """Write a header line for a worker; empty if no worker should get the value."""
    return b"%b: %b\r\n" % (name, value) if _FIELD_VALUE.fullmatch(value) else b""


def _names(named: bytes, name: bytes) -> bool:
    """Whether a list of connection options has a header's name."""
    return name.lower() in [each.strip().lower() for each in named.split(b",")]


def _harmless_id(ids: list[bytes]) -> str:
    """Return the one request id that a client has sent, unless it could do harm."""
    text = ids[0].decode("latin-1") if len(ids) == 1 else ""
    return text if _REQUEST_ID.fullmatch(text) else ""


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


# --- Traces (W3C Trace Context) ---------------------------------------------------

# 3.2.2: version, trace, span and flags; a later version may add more behind a dash.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})"
    r"-([0-9a-f]{2})(-.*)?"
)
_SAMPLED = 0x01
# 3.3.1.3, and as in level 2, a key that begins with a digit.
_TRACESTATE_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}"
    r"[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
MOST_MEMBERS = 32  # of a `tracestate`
MOST_STATE = 512  # characters of it that are passed on; what is longer is shortened
_LONG_MEMBER = 128  # characters; such members are left out first
_TRACE_LINES = re.compile(
    rb"^trace(?:parent|state):.*\r\n", re.IGNORECASE | re.MULTILINE
)


def _trace_context(fields: Headers) -> TraceContext | None:
    """Read the trace of a request; None if it is not valid, or there are two.

    A `tracestate` that is not valid is left out, and one without a valid `traceparent`
    is never read (4.3).
    """
    parents = [value for name, value in fields if name == b"traceparent"]
    found = _TRACEPARENT.fullmatch(parents[0].decode()) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "00" and more is not None:
        return None
    states = [value.decode() for name, value in fields if name == b"tracestate"]
    sampled = bool(int(flags, 16) & _SAMPLED)
    return TraceContext(trace_id, span_id, sampled, _trace_state(",".join(states)))


def _trace_state(text: str) -> str:
    """Return a list of members as it may be passed on, or nothing if it is not valid.

    The first member is the most recent one, so the last ones are left out of a list
    that is too long (3.3.1.5).
    """
    members = [each.strip(" \t") for each in text.split(",")]
    members = [each for each in members if each]
    keys = {each.partition("=")[0] for each in members}
    if (
        len(members) > MOST_MEMBERS
        or len(keys) < len(members)
        or not all(map(_TRACESTATE_MEMBER.fullmatch, members))
    ):
        return ""
    if len(",".join(members)) > MOST_STATE:
        members = [each for each in members if len(each) <= _LONG_MEMBER]
    while len(",".join(members)) > MOST_STATE:
        members.pop()
    return ",".join(members)


def trace_lines(context: TraceContext) -> bytes:
    """Return the header lines with which a request takes its place in a trace."""
    trace_id, span_id, sampled, state = context
    lines = f"traceparent: 00-{trace_id}-{span_id}-{sampled:02x}\r\n"
    if state:
        lines += f"tracestate: {state}\r\n"
    return lines.encode()


def without_trace(lines: bytes) -> bytes:
    """Return header lines without those of a trace."""
    return _TRACE_LINES.sub(b"", lines)


# --- Worker → client --------------------------------------------------------------


def to_client(headers: Headers) -> list[tuple[str, str]]:
    """Return the headers of a worker that are sent to the client."""
    dropped = _DROPPED | _named_in_connection(headers)
    return [
        (name.decode("ascii"), value.decode("ascii"))
        for name, value in headers
        if (lowered := name.lower()) not in dropped
        and not lowered.startswith(OWNED_PREFIXES)
        and name.isascii()
        and _FIELD_VALUE.fullmatch(value)
    ]


class AnswerHead(msgspec.Struct, gc=False):
    """What the hub reads of the head of an answer, from a worker."""

    content_type: bytes  # in lower case; empty if there is none
    lines: str  # that the client gets, each ended by CRLF
    headers: Headers

    def __repr__(self) -> str:
        return f"<AnswerHead of {len(self.headers)} headers>"


def read_answer_head(headers: Headers, before: AnswerHead | None = None) -> AnswerHead:
    """Read the head of an answer.

    `before` is that of another answer from the worker, which is returned for one that
    reads alike.
    """
    if before is not None and (
        headers == before.headers or _read_alike(headers, before.headers)
    ):
        return before
    # Workers send the same ones again and again, but for the varying ones.
    lasting = []
    for field in headers:  # cheaper than a comprehension
        if field[0].lower() not in _VARYING:
            lasting.append(field)  # noqa: PERF401
    return AnswerHead(*_read_answer_head(tuple(lasting)), headers)


@functools.lru_cache(maxsize=256)
def _read_answer_head(headers: tuple[tuple[bytes, bytes], ...]) -> tuple[bytes, str]:
    types = [value for name, value in headers if name.lower() == b"content-type"]
    lines = [f"{name}: {value}\r\n" for name, value in to_client(headers)]
    return types[-1].lower() if types else b"", "".join(lines)


def _named_in_connection(headers: Headers) -> set[bytes]:
    """Collect the names in all `Connection` headers; one may be empty (go#46313)."""
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    return named
