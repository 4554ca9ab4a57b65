"""A compressed body is unpacked within the limits, and a worker gets it plain."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable

import pytest

from gollama_proxy.wire import bodies
from gollama_proxy.wire.bodies import CODINGS, PIECE, Unpacker, coding_of
from tests.fakes.asks import CHAT
from tests.fakes.cases import case
from tests.fakes.client import Response, request_head
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import MODEL
from tests.fakes.worker import ScriptedWorker

FIELDS = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
BODY = json.dumps(FIELDS).encode()
BOM = b"\xef\xbb\xbf"


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "GZIP": ("GZIP", gzip.compress(BODY)),
    "x-gzip": ("x-gzip", gzip.compress(BODY)),
    "two members": ("gzip", gzip.compress(BODY[:20]) + gzip.compress(BODY[20:])),
    "zlib": ("deflate", zlib.compress(BODY)),
    "zlib, hardly packed": ("deflate", zlib.compress(BODY, 0)),
    "raw deflate": ("deflate", raw_deflate(BODY)),
    "identity": ("identity, gzip", gzip.compress(BODY)),
    "with a byte order mark": ("gzip", gzip.compress(BOM + BODY)),
}
FRAMINGS = ["length", "chunks", "bytes"]


def framed(data: bytes, framing: str) -> tuple[tuple[str, str], bytes]:
    """Return the header and the bytes of a body."""
    if framing == "length":
        return ("Content-Length", str(len(data))), data
    size = 1 if framing == "bytes" else 50
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return ("Transfer-Encoding", "chunked"), body + b"0\r\n\r\n"


async def post(
    hub: RunningHub,
    data: bytes,
    encoding: str = "gzip",
    framing: str = "length",
    path: str = CHAT,
) -> Response:
    header, sent = framed(data, framing)
    headers = [("Content-Encoding", encoding), header]
    async with await hub.wire() as wire:
        with contextlib.suppress(ConnectionError):  # refused before it was all sent
            await wire.send(request_head("POST", path, hub.token(), headers) + sent)
        return await wire.read_response()


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", PACKED)
async def test_a_worker_gets_the_plain_body(name: str, framing: str) -> None:
    encoding, data = PACKED[name]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for path in (CHAT, "/v1/messages", "/v1/embeddings"):
            response = await post(hub, data, encoding, framing, path)
            assert response.status == 200
    for request in worker.requests:
        assert json.loads(request.body)["messages"] == FIELDS["messages"]
        assert request.header("content-encoding") is None


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_large_one_streams_through(encoding: str) -> None:
    body = json.dumps({**FIELDS, "x": "abc" * (1 << 20)}).encode()
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    async with (
        ScriptedWorker(n_ctx=1 << 30, keep_body=8 << 20) as worker,
        running_hub(worker) as hub,
    ):
        response = await post(hub, packed, encoding)
        assert response.status == 200
        [request] = worker.requests
        assert request.body == body
        assert request.header("transfer-encoding") == "chunked"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_bomb_is_refused(encoding: str, framing: str) -> None:
    """It is larger than the limit by one byte, or by as much as there can be."""
    limit = 64 << 10
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    async with (
        ScriptedWorker(n_ctx=1 << 30) as worker,
        running_hub(worker, limits__body=limit) as hub,
    ):
        good = BODY + b" " * (limit - len(BODY))
        assert (await post(hub, pack(good), encoding, framing)).status == 200
        for bomb in (good + b" ", BODY + b" " * (40 << 20)):
            response = await post(hub, pack(bomb), encoding, framing)
            assert response.status == 413
            assert response.json()["error"]["code"] == "body_too_large"
        assert len(worker.requests) == 1


async def test_compressed_bodies_that_decode_to_nothing_are_refused() -> None:
    empty = b"\x00\x00\x00\xff\xff" * 20_000  # stored blocks without a byte
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, limits__body=64 << 10) as hub,
    ):
        response = await post(hub, empty, "deflate", "chunks")
        assert response.status == 413
        response = await post(hub, gzip.compress(b"") * 100 + gzip.compress(BODY))
        assert response.status == 400
        assert not worker.requests


async def test_damaged_bodies_are_refused() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker) as hub,
    ):
        for framing in FRAMINGS:
            for encoding, data in [
                ("gzip", BODY),
                ("gzip", gzip.compress(BODY, mtime=0)[:-1]),
                ("gzip", gzip.compress(BODY, mtime=0)[:20]),
                ("gzip", gzip.compress(BODY, mtime=0) + b"x"),
                ("gzip", gzip.compress(BODY, mtime=0)[:-8] + b"\0" * 8),
                ("gzip", zlib.compress(BODY)),
                ("deflate", BODY),
                ("deflate", zlib.compress(BODY)[:-1]),
                ("deflate", raw_deflate(BODY)[:-1]),
                ("deflate", gzip.compress(BODY, mtime=0)),
            ]:
                with case((framing, encoding, data)):
                    response = await post(hub, data, encoding, framing)
                    assert response.status == 400
                    assert response.json()["error"]["code"] == "bad_request"
                    assert encoding in response.json()["error"]["message"]
                    assert not worker.requests


@pytest.mark.parametrize(
    "encoding", ["br", "compress", "gzip, gzip", "deflate, gzip", "x", "gzip;q=1", "*"]
)
async def test_an_unsupported_coding_gets_a_list_of_the_supported_ones(
    encoding: str,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await post(hub, gzip.compress(BODY), encoding)
        assert response.status == 415
        assert response.json()["error"]["code"] == "unsupported_encoding"
        assert "gzip, deflate" in response.json()["error"]["message"]
        assert response.header("accept-encoding") == ", ".join(CODINGS)
        assert not worker.requests


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_byte_order_mark_is_left_out(encoding: str, framing: str) -> None:
    data = BOM + BODY
    data = gzip.compress(data) if encoding == "gzip" else data
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        assert (await post(hub, data, encoding, framing)).status == 200
        [request] = worker.requests
        assert not request.body.startswith(BOM)
        assert json.loads(request.body)["messages"] == FIELDS["messages"]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("body", [BOM, BOM[:2], BOM[:2] + BODY, b" " + BOM + BODY])
async def test_an_incomplete_or_misplaced_byte_order_mark_is_invalid_json(
    body: bytes, framing: str
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await post(hub, body, "identity", framing)
        assert response.status == 400
        assert response.json()["error"]["code"] == "invalid_json"


# --- The unpacker alone -----------------------------------------------------------


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
def test_bodies_are_decompressed_in_bounded_pieces(
    pack: Callable[[bytes], bytes], size: int
) -> None:
    unpacker = Unpacker("gzip" if pack is gzip.compress else "deflate")
    pieces = list(unpacker.feed(pack(b"x" * size)))
    unpacker.end()
    assert b"".join(pieces) == b"x" * size
    assert max(map(len, pieces)) <= PIECE


def test_codings_of_several_headers_are_one_list() -> None:
    assert coding_of([]) == coding_of(["", "identity"]) == ""
    assert coding_of(["identity", " GZip "]) == "GZip"
    assert coding_of(["gzip", "gzip"]) == "gzip, gzip"


def test_zstd_is_supported_where_the_standard_library_has_it() -> None:
    assert ("zstd" in CODINGS) == hasattr(bodies, "zstd")
