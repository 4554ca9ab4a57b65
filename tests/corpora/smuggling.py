"""Requests that two programs may read in two ways (RFC 9112, 11.2), as raw bytes.

Each payload is a request that its sender may make, with something odd about it, and
behind it `POISON`: a request without token, which has to be answered itself (401) or
not at all.  Where the odd request is good, it is `GOOD`: its body must be all that a
worker gets to see.

Sources: RFC 9112 (HTTP/1.1), RFC 9110 (semantics), the change logs of aiohttp, h11,
llhttp and Go's net/http, the mutations of the HTTP Garden, the tests of HAProxy.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tests.fakes.hub import mint

CHAT = b"/v1/chat/completions"
MODEL = "qwen"
BODY = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "good"}]}
).encode()

_LINE = b"POST %b HTTP/1.1" % CHAT
_BEARER = b"Authorization: Bearer " + mint(sub="alice").encode()
_LENGTH = b"Content-Length: %d" % len(BODY)
_CHUNKED = b"Transfer-Encoding: chunked"
_HALF = len(BODY) // 2


# The statuses on one connection, until the hub closes it.  Any of these will do: where
# bytes are cut may change how early it is known that nothing good comes.
Answers = tuple[tuple[int, ...], ...]


class Payload(NamedTuple):
    """One thing to send on a new connection."""

    name: str
    why: str  # what a reader may make of it, and the source that forbids it
    raw: bytes  # with POISON behind it
    answers: Answers
    served: bool  # by a worker, which sees GOOD and nothing else
    strict: bool  # to be read by parsers that allow nothing but what the grammar has

    def __repr__(self) -> str:
        return f"<Payload {self.name}: {self.why}>"


def _post(*lines: bytes, body: bytes = b"", line: bytes = _LINE) -> bytes:
    head = (line, b"Host: hub", _BEARER, *lines)
    return b"".join(line + b"\r\n" for line in head) + b"\r\n" + body


def _chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


_LAST = b"0\r\n\r\n"
_CHUNKS = _chunk(BODY[:_HALF]) + _chunk(BODY[_HALF:]) + _LAST

_EVIL = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "poison"}]}
).encode()
POISON = b"\r\n".join(
    [
        _LINE,
        b"Host: hub",
        b"Connection: close",
        b"Content-Length: %d" % len(_EVIL),
        b"",
        _EVIL,
    ]
)
GOOD = _post(_LENGTH, body=BODY)

PAYLOADS: list[Payload] = []


# Framed in another way than the one: the sender may mean anything by the rest.
_REFUSED: Answers = ((400,),)
# A length: what follows is another request.
_SERVED: Answers = ((200, 401),)
# Chunks: what follows is not read (see `Dispatcher`).
_LAST_SERVED: Answers = ((200,),)
# The same, and a read that holds more than that is refused as a whole.
_CLOSING: Answers = ((200,), (400,))


def _known(status: int) -> Answers:
    """Refused for another reason than its framing; what follows may be read."""
    return (status,), (status, 401)


def _add(
    name: str,
    why: str,
    raw: bytes,
    answers: Answers = _REFUSED,
    *,
    strict: bool = True,
) -> None:
    assert name not in {payload.name for payload in PAYLOADS}, name
    served = answers in (_SERVED, _LAST_SERVED, _CLOSING) or answers[0][0] == 100
    PAYLOADS.append(Payload(name, why, raw + POISON, answers, served, strict))


# --- What is good: one request, and the poison is another one ----------------------

_add("a length", "the plain case (6.2)", GOOD, _SERVED)
_add("chunks", "the plain case (7.1)", _post(_CHUNKED, body=_CHUNKS), _LAST_SERVED)
_add(
    "a length in leading zeros",
    "1*DIGIT is decimal, whatever C makes of a leading zero (RFC 9110, 8.6)",
    _post(b"Content-Length: 000%d" % len(BODY), body=BODY),
    _SERVED,
)
_add(
    "spaces around a length",
    "optional whitespace is no part of the value (RFC 9110, 5.6.3)",
    _post(b"Content-Length: \t %d \t" % len(BODY), body=BODY),
    _SERVED,
)
_add(
    "no space before a length",
    "optional whitespace may be left out (5)",
    _post(b"content-length:%d" % len(BODY), body=BODY),
    _SERVED,
)
_add(
    "spaces before chunked",
    "optional whitespace is no part of the value (RFC 9110, 5.6.3)",
    _post(b"Transfer-Encoding:\t chunked", body=_CHUNKS),
    _LAST_SERVED,
)
_add(
    "chunked in capitals",
    "transfer codings are case-insensitive (7)",
    _post(b"TRANSFER-ENCODING: ChunkeD", body=_CHUNKS),
    _LAST_SERVED,
)
_add(
    "an empty line first",
    "a server should ignore at least one (2.2)",
    b"\r\n" + GOOD,
    _SERVED,
    strict=False,
)
_add(
    "sizes in capitals and zeros",
    "1*HEXDIG (7.1)",
    _post(_CHUNKED, body=b"00%X\r\n%b\r\n000\r\n\r\n" % (len(BODY), BODY)),
    _LAST_SERVED,
)
_add(
    "every byte a chunk",
    "a chunk may have any size but none (7.1)",
    _post(_CHUNKED, body=b"".join(_chunk(b"%c" % byte) for byte in BODY) + _LAST),
    _LAST_SERVED,
)
_add(
    "a trailer",
    "may be discarded (7.1.2)",
    _post(_CHUNKED, body=_chunk(BODY) + b"0\r\nX-Digest: abc\r\n\r\n"),
    _LAST_SERVED,
)
for _line, _answers in {
    b"Content-Length: 5": _REFUSED,
    b"Transfer-Encoding: gzip": _REFUSED,
    # Parsers have taken the last trailer for a field of the next request, which here
    # would be one of the poison's: it would speak for alice.
    _BEARER: _LAST_SERVED,
    b"X: y\r\n" + _BEARER: _LAST_SERVED,
    b"Host: evil": _CLOSING,
    b"Connection: keep-alive": _LAST_SERVED,
}.items():
    _add(
        f"{_line[:24].decode()} as a trailer",
        "framing, routing and credentials are not taken from there (RFC 9110, 6.5.1)",
        _post(_CHUNKED, body=_chunk(BODY) + b"0\r\n%b\r\n\r\n" % _line),
        _answers,
    )
for _ext in (b";a=b", b";a", b';a="b;c"', b";a=" + b"x" * 500):
    _add(
        f"chunk extension {_ext[:12].decode()} ({len(_ext)})",
        "to be ignored (7.1.1)",
        _post(_CHUNKED, body=_chunk(BODY, _ext) + b"0%b\r\n\r\n" % _ext),
        _LAST_SERVED,
    )
for _named in (b"content-length", b"Transfer-Encoding, Authorization", b"upgrade"):
    _add(
        f"Connection: {_named.decode()}",
        "who drops what it names before reading the body reads no body (golang/go#"
        "50580; RFC 9110, 7.6.1)",
        _post(b"Connection: " + _named, _LENGTH, body=BODY),
        _SERVED,
    )
_add(
    "Connection: transfer-encoding on chunks",
    "who drops what it names reads no body (RFC 9110, 7.6.1)",
    _post(b"Connection: Transfer-Encoding", _CHUNKED, body=_CHUNKS),
    _LAST_SERVED,
)
_add(
    "Connection: close",
    "what follows is not to be read (9.6)",
    _post(b"Connection: close", _LENGTH, body=BODY),
    _CLOSING,
)
_add(
    "Connection: keep-alive, close",
    "close wins (9.3)",
    _post(b"Connection: keep-alive, close", _LENGTH, body=BODY),
    _CLOSING,
)
_add(
    "HTTP/1.0",
    "ends with its connection (9.3)",
    _post(_LENGTH, body=BODY, line=b"POST %b HTTP/1.0" % CHAT),
    _CLOSING,
)
_add(
    "Proxy-Connection and Keep-Alive",
    "mean nothing but to a parser that takes the first for Connection",
    _post(b"Proxy-Connection: close", b"Keep-Alive: max=1", _LENGTH, body=BODY),
    _CLOSING,
)
_add(
    "Expect: 100-continue, and the body is there",
    "its client need not wait (RFC 9110, 10.1.1)",
    _post(b"Expect: 100-continue", _LENGTH, body=BODY),
    ((100, 200, 401),),
)
for _line in (
    b"X-HTTP-Method-Override: GET",
    b"X-Original-URL: /props",
    b"X-Rewrite-URL: /props",
    b"X-Forwarded-Host: evil",
    b"X-Forwarded-Prefix: /props?",
    b"Forwarded: host=evil;proto=https",
    b"Content_Type: text/plain",
    b"Trailer: Content-Length",
    b"TE: trailers, chunked",
    b"Max-Forwards: 0",
    b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    b"X-Transfer-Encoding: chunked",
    b"Accept: */*\xff\xfe",
    b"X-Empty:",
):
    _add(
        _line.decode("latin-1"),
        "some programs read it as something else; a worker does not get to see it",
        _post(_line, _LENGTH, body=BODY),
        _SERVED,
    )

# --- A length and chunks, and two of each -----------------------------------------

_add(
    "CL.TE",
    "both: one reads the length, the other the chunks (6.1)",
    _post(b"Content-Length: %d" % len(_LAST + POISON), _CHUNKED, body=_LAST),
)
_add(
    "TE.CL",
    "the other way round (6.1)",
    _post(_CHUNKED, b"Content-Length: 4", body=_chunk(POISON) + _LAST),
)
_add("TE.CL.0", "a length of none (6.1)", _post(b"Content-Length: 0", _CHUNKED))
_add(
    "CL.TE apart",
    "with other fields between",
    _post(_LENGTH, b"X: y", b"Accept: */*", _CHUNKED, body=_CHUNKS),
)
_add(
    "CL.CL",
    "two that differ (6.3)",
    _post(b"Content-Length: 0", _LENGTH, body=BODY),
)
_add("CL.CL, the same", "a list of two (6.3)", _post(_LENGTH, _LENGTH, body=BODY))
_add(
    "CL.CL in other letters",
    "names are case-insensitive (5)",
    _post(_LENGTH, b"CONTENT-length: 0", body=BODY),
)
_add("TE.TE", "chunked twice (6.1)", _post(_CHUNKED, _CHUNKED, body=_CHUNKS))
_add(
    "TE.TE, the second unknown",
    "who takes the last one reads no chunks (6.1)",
    _post(_CHUNKED, b"Transfer-Encoding: cow", body=_CHUNKS),
)
_add(
    "TE.TE, the first unknown",
    "who takes the first one reads no chunks (6.1)",
    _post(b"Transfer-Encoding: cow", _CHUNKED, body=_CHUNKS),
    _REFUSED,
)
_add(
    "chunks on HTTP/1.0",
    "faulty framing (6.1)",
    _post(_CHUNKED, body=_CHUNKS, line=b"POST %b HTTP/1.0" % CHAT),
)

# --- Lengths ----------------------------------------------------------------------

_N = b"%d" % len(BODY)
for _value, _why in {
    b"": "none",
    b"+" + _N: "signed, as strtol and int() read it",
    b"-1": "signed",
    b"-0": "signed",
    b"0x%x" % len(BODY): "hexadecimal, as strtol reads it",
    b"0b1": "binary, as int(…, 0) reads it",
    _N[:1] + b"_" + _N[1:]: "as int() reads it",
    _N + b".0": "a fraction",
    _N + b"e0": "as float() reads it",
    _N + b"," + _N: "a list (6.3)",
    _N + b", 0": "a list of two that differ (6.3)",
    _N + b" 0": "two, for who reads on behind a space",
    _N + b";q=1": "with a parameter",
    b'"' + _N + b'"': "quoted",
    _N + b"\x0b": "a vertical tab, which strip() and isspace() take",
    b"\x0c" + _N: "a form feed, which strip() and isspace() take",
    _N + b"\xa0": "a no-break space, which str.strip() takes",
    b"\xb2\xb3": "superscript digits, for which isdigit() is true (CVE-2025-69224)",
    "\u0661\u0662".encode(): "Arabic digits, which int() takes (CVE-2025-69224)",
    _N + b"\x00": "NUL, where C ends",
    b"%d" % (2**64 + len(BODY)): "the right one beyond 64 bits",
    b"%d" % (2**128): "0 beyond 128 bits",
    b"9" * 400: "longer than any counter",
    b"deadbeef": "no number",
}.items():
    _add(
        f"Content-Length: {_value[:30]!r}",
        f"{_why}; 1*DIGIT is all there is (RFC 9110, 8.6)",
        _post(b"Content-Length: " + _value, body=BODY),
    )

# --- Codings ----------------------------------------------------------------------

for _value in (
    b"",
    b"identity",
    b"cow",
    b"xchunked",
    b"chunkedx",
    b"chunk",
    b"identity, chunked",
    b"gzip, chunked",
    b"chunked, identity",
    b"chunked, gzip",
    b"chunked, chunked",
    b", chunked",
    b"chunked,",
    b"chunked;q=1",
    b"chunked;",
    b'"chunked"',
    b"'chunked'",
    b"chunked chunked",
    b"\x0bchunked",
    b"chunked\x0c",
    b"chunked\xa0",
    b"\x00chunked",
    b"ch\x00unked",
    "chun\u212aed".encode(),  # the Kelvin sign is a k to str.lower()
    b"chunked\r",
    b"=?utf-8?q?chunked?=",
):
    _add(
        f"Transfer-Encoding: {_value!r}",
        "a server that reads it as chunked sees chunks, another one none (6.1)",
        _post(b"Transfer-Encoding: " + _value, body=_CHUNKS),
        ((400,), (501,)),
    )
    if not _value.endswith((b", chunked", b"\r")):
        _add(
            f"a length and Transfer-Encoding: {_value!r}",
            "a server that does not know the coding may use the length (6.1)",
            _post(_LENGTH, b"Transfer-Encoding: " + _value, body=BODY),
        )

# --- Names and lines of the head --------------------------------------------------

for _line, _why in {
    b"Transfer-Encoding : chunked": "a space before the colon (5.1)",
    b"Transfer-Encoding\t: chunked": "a tab before the colon (5.1)",
    b"Transfer-Encoding\x0b: chunked": "a vertical tab in the name (5.1)",
    b"Transfer Encoding: chunked": "a space in the name (5.1)",
    b"Transfer_Encoding: chunked": "an underscore, as CGI reads it (Envoy refuses it)",
    b"Content_Length: 0": "an underscore, as CGI reads it (Envoy refuses it)",
    b"\x00Transfer-Encoding: chunked": "NUL in front of the name",
    b"\xefTransfer-Encoding: chunked": "a byte beyond ASCII in the name",
    "Tran\u017ffer-Encoding: chunked".encode(): "a long s, which is an s to casefold()",
    "Transfer\u2010Encoding: chunked".encode(): "a hyphen beyond ASCII",
    b" Transfer-Encoding: chunked": "folded onto the line before (5.2)",
    b"\tTransfer-Encoding: chunked": "folded onto the line before (5.2)",
    b"Transfer-Encoding:\r\n chunked": "folded (5.2)",
    b"X: y\r\n Transfer-Encoding: chunked": "folded (5.2)",
    b"Content-Length: 0\r\n 0": "folded (5.2)",
    b"X: y\nTransfer-Encoding: chunked": "LF as an end of line (2.2)",
    b"X: y\rTransfer-Encoding: chunked": "CR as an end of line (2.2)",
    b"X: y\n\nTransfer-Encoding: chunked": "two LF as the end of the head (2.2)",
    b"X: y\n\rTransfer-Encoding: chunked": "LF and CR changed round",
    b"X: y\r\r\nTransfer-Encoding: chunked": "CR, and an end of line",
    b"X: \x00": "NUL in a value (RFC 9110, 5.5)",
    b"X: a\x01b": "a control in a value (RFC 9110, 5.5)",
    b"X: a\x7fb": "DEL in a value (RFC 9110, 5.5)",
    b": chunked": "no name",
    b"chunked": "no colon",
    b"Transfer-Encoding; chunked": "no colon",
    b"(X): y": "no token (RFC 9110, 5.6.2)",
    b'"X": y': "no token (RFC 9110, 5.6.2)",
    b"X@y: z": "no token (RFC 9110, 5.6.2)",
    _LINE: "a request line among the fields",
    b"X: y\x85Transfer-Encoding: chunked\x00": "NEL, an end of line to splitlines()",
}.items():
    _add(f"{_line!r}", _why, _post(_LENGTH, _line, body=BODY))

_add("only LF", "ends of line (2.2)", _post(_LENGTH).replace(b"\r\n", b"\n") + BODY)
_add("only CR", "ends of line (2.2)", _post(_LENGTH).replace(b"\r\n", b"\r") + BODY)
_add(
    "a head that ends with LF",
    "CRLF is wanted (2.2)",
    _post(_LENGTH)[:-2] + b"\n" + BODY,
)
_add(
    "a head that ends with CR",
    "CRLF is wanted (2.2)",
    _post(_LENGTH)[:-2] + b"\r" + BODY,
)
_add(
    "a space before the first field",
    "to be refused, or skipped by some (2.2)",
    GOOD.replace(b"\r\nHost", b"\r\n Host", 1),
)
_add(
    "a host twice",
    "whose is it? (3.2; CVE-2026-34525)",
    _post(b"Host: evil", _LENGTH, body=BODY),
)
_add("no host", "wanted by HTTP/1.1 (3.2)", GOOD.replace(b"Host: hub\r\n", b"", 1))
for _host in (
    b"hub evil",
    b"hub@evil",
    b"user:pass@hub",
    b"hub/props",
    b"hub?x",
    b"hub#x",
    b"http://hub",
    b"hub,evil",
    b"hub:80:80",
    b"hub:http",
    b"hub:-1",
    b"[::1",
    b"::1",
    b"h\xffb",
    b"hub\\evil",
    b"<hub>",
    b'"hub"',
):
    _add(
        f"Host: {_host!r}",
        "no name of a host with a port, so read by everyone in his own way (3.2)",
        GOOD.replace(b"Host: hub", b"Host: " + _host, 1),
    )

# --- The request line -------------------------------------------------------------

for _line, _answers in {
    b"POST  %b HTTP/1.1": _SERVED,
    b"POST\t%b HTTP/1.1": _REFUSED,
    b"POST %b\tHTTP/1.1": _REFUSED,
    b"POST %b  HTTP/1.1": _SERVED,
    b"POST %b HTTP/1.1 ": _REFUSED,
    b"POST %b HTTP/1.1\t": _REFUSED,
    b"POST %b HTTP/1.1 HTTP/1.1": _REFUSED,
    b"POST %b x HTTP/1.1": _REFUSED,
    b" POST %b HTTP/1.1": _REFUSED,
    b"\x00POST %b HTTP/1.1": _REFUSED,
    b"\xef\xbb\xbfPOST %b HTTP/1.1": _REFUSED,
    b"post %b HTTP/1.1": _REFUSED,
    b"POST\x0b%b HTTP/1.1": _REFUSED,
    b"PO\x00ST %b HTTP/1.1": _REFUSED,
    b"POST:%b HTTP/1.1": _REFUSED,
    b"POST %b\x00 HTTP/1.1": _REFUSED,
    b"POST %b\x0b HTTP/1.1": _REFUSED,
    b"POST %b\r HTTP/1.1": _REFUSED,
    b"POST %b\n HTTP/1.1": _REFUSED,
    b"POST %b\xc3\xa9 HTTP/1.1": _REFUSED,
    b"POST %b HTTP/1.2": _REFUSED,
    b"POST %b HTTP/01.1": _REFUSED,
    b"POST %b HTTP/1.10": _REFUSED,
    b"POST %b HTTP/1,1": _REFUSED,
    b"POST %b HTTP/1.1x": _REFUSED,
    b"POST %b HTTP /1.1": _REFUSED,
    b"POST %b HTTP/ 1.1": _REFUSED,
    b"POST %b http/1.1": _REFUSED,
    b"POST %b ICE/1.0": _REFUSED,
    b"POST %b RTSP/1.0": _CLOSING,
    b"POST %b HTTP/2.0": ((505,), (400,)),
    b"POST %b HTTP/0.9": ((505,), (400,)),
    b"POST %b": ((505,), (400,)),
    b"POST %b?x=\r\nX: y HTTP/1.1": ((505,), (400,)),
    b"POST http://hub%b HTTP/1.1": _known(404),
    b"POST http://evil%b HTTP/1.1": _known(404),
    b"POST hub%b HTTP/1.1": _REFUSED,
    b"POST /..%b HTTP/1.1": _known(404),
    b"POST %b%%20HTTP/1.1%%0d%%0aX:y HTTP/1.1": _known(404),
    b"POST %b%%00 HTTP/1.1": _known(404),
    b"POST %b#x HTTP/1.1": _known(404),
}.items():
    _text = _line % CHAT
    _add(
        f"{_text!r}",
        "a method, a target and a version, each behind one space (3); a lenient parser"
        " takes more spaces for one",
        _post(_LENGTH, body=BODY, line=_text),
        _answers,
        strict=b"  " not in _line and b"RTSP" not in _line,
    )
for _name, _before in {
    "two line feeds first": b"\n\n",
    "a carriage return first": b"\r",
}.items():
    _add(
        _name,
        "some skip it as an empty line (2.2)",
        _before + GOOD,
        _SERVED,
        strict=False,
    )
_add(
    "the preface of HTTP/2",
    "prior knowledge (RFC 9113, 3.4)",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + GOOD,
)

# --- Chunks -----------------------------------------------------------------------

_SIZE = b"%x" % len(BODY)
for _name, _framed in {
    "0x": b"0x%b\r\n%b\r\n" % (_SIZE, BODY),
    "a sign": b"+%b\r\n%b\r\n" % (_SIZE, BODY),
    "a minus": b"-%b\r\n%b\r\n" % (_SIZE, BODY),
    "a space before": b" %b\r\n%b\r\n" % (_SIZE, BODY),
    "a space behind": b"%b \r\n%b\r\n" % (_SIZE, BODY),
    "a tab behind": b"%b\t\r\n%b\r\n" % (_SIZE, BODY),
    "an underscore": b"%b_%b\r\n%b\r\n" % (_SIZE[:1], _SIZE[1:], BODY),
    "a letter behind f": b"%bg\r\n%b\r\n" % (_SIZE, BODY),
    "no digit": b"\r\n%b\r\n" % BODY,
    "only an extension": b";a=b\r\n%b\r\n" % BODY,
    "NUL": b"%b\x00\r\n%b\r\n" % (_SIZE, BODY),
    "superscript digits": b"\xb2\xb3\r\n%b\r\n" % BODY,
    "beyond 64 bits": b"1%016x\r\n%b\r\n" % (len(BODY), BODY),
    "2,000 digits": b"0" * 2000 + b"g\r\n%b\r\n" % BODY,
    "LF": b"%b\n%b\r\n" % (_SIZE, BODY),
    "CR": b"%b\r%b\r\n" % (_SIZE, BODY),
    "CR CR LF": b"%b\r\r\n%b\r\n" % (_SIZE, BODY),
}.items():
    _add(
        f"a chunk size with {_name}",
        "1*HEXDIG and CRLF are all there is (7.1)",
        _post(_CHUNKED, body=_framed + _LAST),
    )
for _ext in (
    b";\x00",
    b";a=\nb",
    b";\n",
    b";a\rb",
    b';a="\r\n"',
    b";a=b\x0b",
    b"\x0b;a",
):
    _add(
        f"chunk extension {_ext!r}",
        "one line, of tokens (7.1.1; CVE-2024-52304)",
        _post(_CHUNKED, body=_chunk(BODY, _ext) + _LAST),
    )
for _name, _end in {
    "nothing": b"",
    "LF": b"\n",
    "CR": b"\r",
    "LF CR": b"\n\r",
    "CR CR": b"\r\r",
    "any two bytes": b"xy",
    "a byte too many": b"x\r\n",
    "two line ends": b"\r\n\r\n",
}.items():
    _add(
        f"{_name} behind a chunk",
        "CRLF, and not any two bytes (7.1; GHSA-vqfr-h8mv-ghfj)",
        _post(_CHUNKED, body=_SIZE + b"\r\n" + BODY + _end + _LAST),
    )
for _last in (
    b"0\n\n",
    b"0\n\r\n",
    b"0\r\n\n",
    b"0\r\r\n\r\n",
    b"0\r\n\r\r\n",
    b"0\r\n",
    b"0x0\r\n\r\n",
    b"-0\r\n\r\n",
    b"0 \r\n\r\n",
    b"0\r\nX: y\n\r\n",
    b"0\r\nX : y\r\n\r\n",
    b"0\r\n X: y\r\n\r\n",
    b"0\r\nX: \x00\r\n\r\n",
    b"0\r\nX: a\rb\r\n\r\n",
    b"0\r\nX\r\n\r\n",
    b"0\r\n: y\r\n\r\n",
):
    _add(
        f"last chunk {_last!r}",
        "0, CRLF, fields as in a head, CRLF (7.1, 7.1.2; CVE-2025-53643)",
        _post(_CHUNKED, body=_chunk(BODY) + _last),
    )
_add(
    "a chunk shorter than its size",
    "what follows is taken into it",
    _post(_CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) + 1, BODY)),
)
_add(
    "a chunk longer than its size",
    "the rest is no CRLF",
    _post(_CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) - 1, BODY)),
)

# --- Bodies where some expect none ------------------------------------------------

for _method in (b"GET", b"DELETE", b"OPTIONS", b"TRACE", b"PUT", b"PROPFIND"):
    _line = _method + b" %b HTTP/1.1" % CHAT
    _name = _method.decode()
    _add(
        f"{_name} with a length",
        "a body is framed as any other, even if some see none in it (6)",
        _post(b"Content-Length: %d" % len(GOOD), body=GOOD, line=_line),
        _known(405),
    )
    _add(
        f"{_name} with chunks",
        "a body is framed as any other, even if some see none in it (6)",
        _post(_CHUNKED, body=_chunk(GOOD) + _LAST, line=_line),
        _known(405),
    )
_add(
    "GET of a probe with a request as its body",
    "a body that is not read is no request",
    _post(b"Content-Length: %d" % len(GOOD), body=GOOD, line=b"GET /livez HTTP/1.1"),
    ((200,), (200, 401)),
)
_add(
    "HEAD with a request as its body",
    "a body that is not read is no request",
    _post(b"Content-Length: %d" % len(GOOD), body=GOOD, line=b"HEAD /livez HTTP/1.1"),
    ((200,), (200, 401)),
)
_add(
    "CONNECT with a length",
    "what follows is a tunnel to some, a body to others (RFC 9110, 9.3.6)",
    _post(
        b"Content-Length: %d" % len(GOOD), body=GOOD, line=b"CONNECT hub:80 HTTP/1.1"
    ),
    ((405,),),
)
_add(
    "CONNECT",
    "what follows is a tunnel to some, a request to others (RFC 9110, 9.3.6)",
    _post(line=b"CONNECT hub:80 HTTP/1.1"),
    ((405,),),
)
for _protocol in (b"websocket", b"h2c", b"TLS/1.0", b"chunked", b""):
    _upgrade = (b"Connection: Upgrade", b"Upgrade: " + _protocol)
    _add(
        f"Upgrade: {_protocol.decode()} with a request as its body",
        "what follows is another protocol to some, a body to others (golang/go#80416; "
        "CVE-2026-69243)",
        _post(*_upgrade, b"Content-Length: %d" % len(GOOD), body=GOOD),
    )
    _add(
        f"GET with Upgrade: {_protocol.decode()}",
        "what follows is another protocol to some, a request to others",
        _post(*_upgrade, line=b"GET /livez HTTP/1.1"),
        ((200,), (200,)),
    )
    _add(
        f"Upgrade: {_protocol.decode()} with a body",
        "is ignored (RFC 9110, 7.8), and nothing behind the request is read",
        _post(*_upgrade, _LENGTH, body=BODY),
        _LAST_SERVED,
        strict=False,
    )
    _add(
        f"Upgrade: {_protocol.decode()} with a body in chunks",
        "is ignored (RFC 9110, 7.8), and nothing behind the request is read",
        _post(*_upgrade, _CHUNKED, body=_CHUNKS),
        _LAST_SERVED,
        strict=False,
    )
_add(
    "Upgrade without Connection",
    "means nothing to some (RFC 9110, 7.8)",
    _post(b"Upgrade: h2c", _LENGTH, body=BODY),
    _LAST_SERVED,
)

# --- Refused for other reasons: the body is no request ----------------------------

_CARRIED = b"Content-Length: %d" % len(GOOD)
_add(
    "a request as a body",
    "is no JSON",
    _post(_CARRIED, body=GOOD),
    _known(400),
)
_add(
    "a request as chunks",
    "is no JSON",
    _post(
        _CHUNKED, body=b"".join(_chunk(line) for line in GOOD.splitlines(True)) + _LAST
    ),
    _known(400),
)
_add(
    "a request in a body without a token",
    "401, and its body is not read as a request",
    _post(_CARRIED, body=GOOD).replace(_BEARER + b"\r\n", b"", 1),
    _known(401),
)
_add(
    "a request in a body on no path",
    "404, and its body is not read as a request",
    _post(_CARRIED, body=GOOD, line=b"POST /props HTTP/1.1"),
    _known(404),
)
_add(
    "a request in a compressed body",
    "400 or 415, and its body is not read as a request",
    _post(b"Content-Encoding: gzip", _CARRIED, body=GOOD),
    _known(400),
)
_add(
    "a request in a body with another expectation",
    "417, and its body is not read as a request",
    _post(b"Expect: 200-ok", _CARRIED, body=GOOD),
    _known(417),
)
_add(
    "no length, and a body",
    "a request without framing has none (6.3, 7): the body is what comes next",
    _post(body=BODY),
    ((400,), (400, 400)),
)
for _name, _line in {
    "twice": _BEARER,
    "folded": b"X: y\r\n " + _BEARER,
    "in another scheme": b"Authorization: Basic YTpi",
    "empty": b"Authorization:",
}.items():
    _add(
        f"Authorization {_name}",
        "one agrees, and the other? (fails closed)",
        _post(_line, _LENGTH, body=BODY),
        _REFUSED if b"\r\n" in _line else _known(401),
    )
