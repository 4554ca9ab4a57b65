"""Content codings: gzip and deflate (RFC 9110, 8.4.1), unpacked in small pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

# Largest piece that one step yields: a kilobyte can stand for a megabyte of zeros.
PIECE = 64 << 10
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's `wbits`


class CodingError(Exception):
    """A coding that is not known, or data that is not in it."""


class Unpacker:
    """Unpacks one body.  It keeps no output, so the limit is up to the caller."""

    def __init__(self, coding: str) -> None:
        """Make one for the value of a `Content-Encoding` header, or for "".

        Raises:
            CodingError: the coding is none of identity, gzip and deflate.
        """
        coding = coding.strip().lower()
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise CodingError("an unknown content coding")
        self._packed = coding not in ("", "identity")
        self._wbits = 0 if coding == "deflate" else _GZIP  # 0: seen from the first byte
        self._stream: zlib._Decompress | None = None

    def __repr__(self) -> str:
        return f"<Unpacker packed={self._packed} wbits={self._wbits}>"

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Unpack some more; the iterator has to be exhausted, or the body given up.

        Raises:
            CodingError: the data are not in the coding.
        """
        if not self._packed:
            if data:
                yield data
            return
        while data:
            if self._stream is None:
                self._stream = zlib.decompressobj(self._wbits or _wbits_of(data[0]))
            try:
                piece = self._stream.decompress(data, PIECE)
            except zlib.error:
                raise CodingError("data that are not in their content coding") from None
            if piece:
                yield piece
            data = self._stream.unconsumed_tail
            if self._stream.eof:
                # RFC 1952, 2.2: another member may follow.
                data, self._stream = self._stream.unused_data, None

    def end(self) -> None:
        """Check that the data were complete.

        Raises:
            CodingError: they end in the middle.
        """
        if self._stream is not None:
            raise CodingError("data that end in the middle of their content coding")


def _wbits_of(first: int) -> int:
    """Tell RFC 1950 from bare RFC 1951, which some servers call deflate, too."""
    return _ZLIB if first & 0x0F == 8 else _RAW
