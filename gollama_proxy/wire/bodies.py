"""Bodies that are compressed, and bodies that are multipart forms, read piece by piece.

Content codings are gzip and deflate (RFC 9110, 8.4.1), and zstd (RFC 8878) where Python
has it.

A form carries a file, such as the sound of `/v1/audio/transcriptions`, so it is read
once, in the pieces in which it arrives, and nothing but the wanted values is kept:

    --boundary CRLF head CRLF CRLF content CRLF --boundary CRLF … --boundary--

It is read more strictly than RFC 2046 asks for: no text before the first boundary or
after the last, no spaces after one, no field without a plain name.  Two parsers that
read a form in two ways could see two models in it.
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, assert_never

from gollama_proxy.wire import fields
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.fields import MAX_TOKEN, Field

# --- Content codings --------------------------------------------------------------

CODINGS: tuple[str, ...] = ("gzip", "deflate")
_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
try:
    from compression import zstd
except ImportError:  # before Python 3.14
    pass
else:
    CODINGS += ("zstd",)
    _ERRORS += (zstd.ZstdError,)

# Largest piece that one step yields: a kilobyte can stand for a megabyte of zeros.
PIECE = 64 << 10
# Parts of a body that were packed one by one; each costs more than its bytes.
MOST_MEMBERS = 64
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's `wbits`
_ZSTD_WINDOW = 23  # RFC 9659: no decoder has to have a window of more than 8 MiB


class CodingError(Exception):
    """A coding that is not known, or data that is not in it."""


class Unpacker:
    """Unpacks one body.  It keeps no output, so the limit is up to the caller."""

    def __init__(self, coding: str) -> None:
        """Create one for the value of a `Content-Encoding` header, or for "".

        Raises:
            CodingError: the coding is neither identity nor one of `CODINGS`.
        """
        coding = coding.strip().lower()
        self.coding = "" if coding == "identity" else coding.removeprefix("x-")
        if self.coding and self.coding not in CODINGS:
            raise CodingError("an unknown content coding")
        self._stream: Any = None  # a decompressor of the standard library
        self._members = 0

    def __repr__(self) -> str:
        return f"<Unpacker of {self.coding or 'identity'}>"

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Unpack some more; the iterator must be exhausted before the next call.

        Raises:
            CodingError: the data are not in the coding.
        """
        if not self.coding:
            if data:
                yield data
            return
        full = False  # the last piece was, so there may be more without more data
        while data or full:
            if self._stream is None:
                self._stream = self._next_member(data)
            try:
                piece: bytes = self._stream.decompress(data, PIECE)
            except _ERRORS:
                raise CodingError("data that are not in their content coding") from None
            if piece:
                yield piece
            if self._stream.eof:
                # RFC 1952, 2.2: another member may follow.
                data, self._stream = self._stream.unused_data, None
                full = False
            else:  # zstd keeps the bytes that it has not read
                data = getattr(self._stream, "unconsumed_tail", b"")
                full = len(piece) == PIECE

    def _next_member(self, data: bytes) -> Any:
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise CodingError("too many members")
        if self.coding == "zstd":
            limit = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
            return zstd.ZstdDecompressor(options=limit)
        deflate = self.coding == "deflate"
        return zlib.decompressobj(_wbits_of(data[0]) if deflate else _GZIP)

    def end(self) -> None:
        """Check that the data were complete.

        Raises:
            CodingError: they end in the middle.
        """
        if self._stream is not None:
            raise CodingError("data that end in the middle of their content coding")


def coding_of(values: Iterable[str]) -> str:
    """Join the values of `Content-Encoding` headers, without empty and identity."""
    names = []
    for value in values:
        for name in map(str.strip, value.split(",")):
            if name.lower() not in ("", "identity"):
                names.append(name)  # noqa: PERF401 (a comprehension would be a call)
    return ", ".join(names)


def _wbits_of(first: int) -> int:
    """Distinguish RFC 1950 from bare RFC 1951, which some also call deflate."""
    return _ZLIB if first & 0x0F == 8 else _RAW


# --- Multipart forms --------------------------------------------------------------

# Bytes that the head of one part may have, and parts that a form may have.
MAX_HEAD = 4096
MAX_PARTS = 128
WANTED = frozenset({"max_tokens", "model", "stream"})

# RFC 2046, 5.1.1, without the space; outside of quotes only characters of a token.
_BOUNDARY = re.compile(
    r'multipart/form-data\s*;\s*boundary=(?:"([0-9A-Za-z\'()+_,./:=?-]{1,70})"'
    r"|([0-9A-Za-z'+_.-]{1,70}))",
    re.IGNORECASE,
)
# A semicolon in quotes ends a parameter for llama-server, so that a part of a file name
# could become the name of a field.
_NAME = re.compile(
    rb'form-data((?:; ?(?:[a-z]+="[^"\\;\r\n]*"|filename\*=[^"\\; ]+))+)', re.IGNORECASE
)
_PARAMETER = re.compile(rb'; ?([a-z]+)="([^"]*)"', re.IGNORECASE)
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


class _State(enum.Enum):
    OPENING = "before the first boundary"
    HEAD = "in the head of a part"
    CONTENT = "in the content of a part"
    END = "after the last boundary"


def boundary_of(content_type: str) -> str:
    """Return the boundary that a Content-Type header names.

    Raises:
        RequestError: 400, it is not a form, or its boundary is not valid.
    """
    match = _BOUNDARY.fullmatch(content_type)
    if match is None:
        text = "The body must be multipart/form-data, with its boundary."
        raise RequestError(Code.BAD_REQUEST, text)
    return match[1] or match[2]


def content_type_of(boundary: str) -> bytes:
    """Write the Content-Type of a form."""
    return f'multipart/form-data; boundary="{boundary}"'.encode()


class FormScanner:
    """Find the wanted fields of a form that is fed in pieces."""

    def __init__(self, boundary: str) -> None:
        self.found: dict[str, Field] = {}
        self._delimiter = b"\r\n--" + boundary.encode()
        self._state = _State.OPENING
        self._rest = b"\r\n"  # as if a line had ended before the body
        self._offset = -2  # of `_rest` in the body
        self._name = ""  # of the part, if it is wanted
        self._value: list[bytes] = []  # of that
        self._began = 0  # offset of its content
        self._parts = 0

    def __repr__(self) -> str:
        return f"<FormScanner {self._state.name} found={sorted(self.found)}>"

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            RequestError: it is not a form, or not one that is accepted.
        """
        self._rest += piece
        while (taken := self._step()) > 0:
            self._rest = self._rest[taken:]
            self._offset += taken

    def finish(self) -> None:
        """End the body.

        Raises:
            RequestError: it ended too early.
        """
        if self._state is not _State.END or self._rest not in (b"", b"\r\n"):
            raise _invalid("it does not end with its last boundary")

    def with_model(self, body: bytes, found: Field | None, model: str) -> bytes:
        """Write another model into a body; `found` is the one that it has."""
        if found is not None:
            return body[: found.start] + model.encode() + body[found.end :]
        delimiter = self._delimiter.removeprefix(b"\r\n")
        head = b'Content-Disposition: form-data; name="model"'
        return b"%b\r\n%b\r\n\r\n%b\r\n%b" % (delimiter, head, model.encode(), body)

    # --- One step for each state --------------------------------------------------

    def _step(self) -> int:
        """Consume bytes; return how many, 0 if more have to come."""
        match self._state:
            case _State.OPENING:
                return self._open()
            case _State.HEAD:
                return self._read_head()
            case _State.CONTENT:
                return self._read_content()
            case _State.END:
                if not b"\r\n".startswith(self._rest):
                    raise _invalid("something follows its last boundary")
                return 0
            case _:
                assert_never(self._state)

    def _open(self) -> int:
        if not self._rest.startswith(self._delimiter):
            if self._delimiter.startswith(self._rest):
                return 0
            raise _invalid("it does not begin with its boundary")
        return self._pass_delimiter()

    def _pass_delimiter(self) -> int:
        """Pass the delimiter with which the rest begins."""
        end = len(self._delimiter)
        after = self._rest[end : end + 2]
        if len(after) < 2:
            return 0
        if after == b"\r\n":
            self._state = _State.HEAD
        elif after == b"--":
            self._state = _State.END
        else:
            raise _invalid("something follows a boundary")
        return end + 2

    def _read_head(self) -> int:
        end = self._rest.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD:
            if len(self._rest) > MAX_HEAD:
                raise _invalid(f"the head of a part is larger than {MAX_HEAD} bytes")
            return 0
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _invalid(f"it has more than {MAX_PARTS} parts")
        self._name = self._wanted_name(self._rest[:end])
        self._value = []
        self._began = self._offset + end + 4
        self._state = _State.CONTENT
        return end + 4

    def _wanted_name(self, head: bytes) -> str:
        """Read the name of a part; empty if it is not needed."""
        dispositions = []
        for line in head.split(b"\r\n"):
            field, colon, value = line.partition(b":")
            if not colon or not _TOKEN.fullmatch(field) or not _TEXT.fullmatch(value):
                raise _invalid("the head of a part is malformed")
            if field.lower() == b"content-disposition":
                dispositions.append(value.strip(b" \t"))
        if len(dispositions) != 1 or not (match := _NAME.fullmatch(dispositions[0])):
            raise _invalid("a part is not a form field with a plain name")
        parameters: list[tuple[bytes, bytes]] = _PARAMETER.findall(match[1])
        names = [value for key, value in parameters if key.lower() == b"name"]
        if len(names) != 1:
            raise _invalid("a part does not have exactly one name")
        name = names[0].decode("latin-1").lower()
        if name not in WANTED:
            return ""
        if name.encode() != names[0] or len(parameters) != 1:
            raise _invalid(f"`{name}` is not a plain field")
        if name in self.found:
            raise _invalid(f"the field `{name}` occurs twice")
        return name

    def _read_content(self) -> int:
        end = self._rest.find(self._delimiter)
        if end > 0:
            self._keep(self._rest[:end])
            return end
        if end == 0:
            taken = self._pass_delimiter()
            if taken and self._name:
                self._found_field()
            return taken
        # Bytes that may be a part of a delimiter stay until that is decided.
        safe = len(self._rest) - len(self._delimiter) + 1
        if safe <= 0:
            return 0
        self._keep(self._rest[:safe])
        return safe

    def _keep(self, content: bytes) -> None:
        if self._name:
            self._value.append(content)
            if sum(map(len, self._value)) > MAX_TOKEN:
                raise _invalid(f"`{self._name}` is longer than {MAX_TOKEN} bytes")

    def _found_field(self) -> None:
        raw = b"".join(self._value)
        start, end = self._began, self._began + len(raw)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise _invalid(f"`{self._name}` is not UTF-8") from None
        if self._name == "model":
            field = Field('"', fields.encode(text), start, end)
        elif self._name == "stream":  # llama-server reads anything else as false
            value = b"true" if text == "true" else b"false"
            field = Field(chr(value[0]), value, start, end)
        else:
            field = fields.classify(raw or b"?", start)
        self.found[self._name] = field


def _invalid(why: str) -> RequestError:
    return RequestError(Code.BAD_REQUEST, f"The body is not a valid form: {why}.")
