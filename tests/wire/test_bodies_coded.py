"""Content codings are unpacked piece by piece, whatever the cut of the input."""

from __future__ import annotations

import gzip
import zlib

import pytest

from gollama_proxy.wire.bodies import PIECE, CodingError, Unpacker

TEXT = b'{"data": [{"id": "tiny"}]}' * 50


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


PACKED = gzip.compress(TEXT, mtime=0)  # the same in every process of the tests
CODED = {
    "": TEXT,
    "identity": TEXT,
    "gzip": PACKED,
    " GZip ": PACKED,
    "x-gzip": PACKED,
    "deflate": zlib.compress(TEXT),
}


def unpacked(coding: str, *parts: bytes) -> bytes:
    unpacker = Unpacker(coding)
    text = b"".join(piece for part in parts for piece in unpacker.feed(part))
    unpacker.end()
    return text


@pytest.mark.parametrize("coding", CODED)
def test_a_body_is_unpacked_whole_or_byte_by_byte(coding: str) -> None:
    data = CODED[coding]
    assert unpacked(coding, data) == TEXT
    assert unpacked(coding, *(bytes([byte]) for byte in data)) == TEXT
    assert unpacked(coding, b"", data, b"") == TEXT


def test_deflate_without_the_wrapper_of_zlib_is_understood() -> None:
    data = raw_deflate(TEXT)
    assert unpacked("deflate", data) == TEXT
    assert unpacked("deflate", data[:1], data[1:]) == TEXT


def test_gzip_may_have_several_members() -> None:
    halves = gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:])
    assert unpacked("gzip", halves) == TEXT
    assert unpacked("gzip", *(bytes([byte]) for byte in halves)) == TEXT


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_comes_in_small_pieces(coding: str) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    bomb = pack(bytes(8 << 20))
    unpacker = Unpacker(coding)
    sizes = [len(piece) for piece in unpacker.feed(bomb)]
    assert max(sizes) <= PIECE
    assert sum(sizes) == 8 << 20


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "\x00"])
def test_other_codings_are_refused(coding: str) -> None:
    with pytest.raises(CodingError, match="unknown"):
        Unpacker(coding)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "data", [b"{}", TEXT, PACKED[:10] + b"\xff" * 50], ids=["json", "text", "head"]
)
def test_data_in_another_coding_are_refused(coding: str, data: bytes) -> None:
    with pytest.raises(CodingError):
        unpacked(coding, data)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_that_was_cut_is_refused(coding: str) -> None:
    with pytest.raises(CodingError, match="middle"):
        unpacked(coding, CODED[coding][:-1])


def test_an_empty_body_is_empty_in_every_coding() -> None:
    assert unpacked("gzip") == b""


def test_the_repr_shows_no_data() -> None:
    unpacker = Unpacker("gzip")
    list(unpacker.feed(CODED["gzip"][:-1]))
    assert repr(unpacker) == "<Unpacker of gzip>"
