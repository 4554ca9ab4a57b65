"""Content codings, unpacked in small pieces.

gzip and deflate (RFC 9110, 8.4.1), and zstd (RFC 8878) where Python has it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

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
