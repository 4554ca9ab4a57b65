"""No request is read in two ways: a worker sees none, or exactly the one that was sent.

What is accepted, h11 reads in the same way; what is not, ends its connection, so that
nothing after it is taken for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable

import h11
import pytest
import pytest_asyncio

from gollama_proxy.edge import server
from tests.corpora.smuggling import BODY, CHAT, GOOD, MODEL, PAYLOADS, POISON
from tests.fakes.client import Wire
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

# One hub for all of them: a connection each is what they are about.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(MODEL) as worker:
        yield worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hub(worker: ScriptedWorker) -> AsyncIterator[RunningHub]:
    # Bodies are compared byte by byte: none is asked for as a stream.
    async with running_hub(worker, upstream__assemble="") as hub:
        yield hub


async def answers_to(pieces: Iterable[bytes], port: int) -> tuple[int, ...]:
    """Send pieces, each to be read by itself; return the statuses that come back."""
    async with await Wire.connect("127.0.0.1", port) as wire:
        with contextlib.suppress(ConnectionError):  # closed, which is an answer
            for piece in pieces:
                await wire.send(piece)
                await asyncio.sleep(0)
        lines = re.findall(rb"HTTP/1\.[01] (\d{3}) [A-Z]", await wire.read_eof())
    return tuple(map(int, lines))


def whole(raw: bytes) -> list[bytes]:
    return [raw]


def by_lines(raw: bytes) -> list[bytes]:
    """Cut where a line ends, of a head or of a chunk, and where a body does."""
    before = raw.removesuffix(POISON)
    return re.findall(rb"[^\n]*\n|[^\n]+", before) + re.findall(
        rb"[^\n]*\n|[^\n]+", POISON
    )


def by_bytes(raw: bytes) -> list[bytes]:
    """Cut everywhere from the first line on that is not as in any request."""
    differing = (at for at, byte in enumerate(GOOD) if raw[at] != byte)
    same = raw.rfind(b"\n", 0, next(differing, len(GOOD))) + 1
    return [raw[:same], *(raw[at : at + 1] for at in range(same, len(raw)))]


def read_strictly(raw: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Have h11 read the first request: method, target and body; None: it is none."""
    parser = h11.Connection(h11.SERVER, 64 << 10)
    parser.receive_data(raw)
    request, body = None, b""
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                return None
    except h11.RemoteProtocolError:
        return None
    assert request is not None
    return request.method, request.target, body


CUTS = [whole, by_lines, by_bytes]


@pytest.mark.parametrize("cut", CUTS)
async def test_a_worker_receives_one_request_or_none(
    cut: Callable[[bytes], list[bytes]],
    hub: RunningHub,
    worker: ScriptedWorker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for payload in PAYLOADS:
        worker.requests.clear()
        caplog.clear()
        answers = await answers_to(cut(payload.raw), hub.port)
        assert answers in payload.answers, payload
        served = payload.served and 200 in answers
        bodies = [request.body for request in worker.requests]
        assert bodies == [BODY] * served, payload
        assert not worker.violations, payload  # what it is sent is well-formed
        for request in worker.requests:
            assert (request.method, request.target) == ("POST", CHAT.decode()), payload
            if payload.strict:
                assert read_strictly(payload.raw) == (b"POST", CHAT, BODY), payload
        # No traceback is logged for it either.
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        names = {record.name for record in warnings}
        assert names <= {"gollama_proxy.access"}, payload


async def test_requests_sent_in_pieces_are_read_in_pieces(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the cuts above would not be cuts."""
    reads: list[int] = []
    read = server._Protocol.data_received

    def counting(protocol: server._Protocol, data: bytes) -> None:
        reads.append(len(data))
        read(protocol, data)

    monkeypatch.setattr(server._Protocol, "data_received", counting)
    for cut in (by_lines, by_bytes):
        pieces = cut(b"\r\n" + GOOD + POISON)
        assert await answers_to(pieces, hub.port) == (200, 401)
        assert len(reads) > 0.8 * len(pieces)  # the kernel may join some
        reads.clear()


@pytest.mark.parametrize("cut", CUTS)
async def test_a_second_request_with_its_own_token_is_served(
    cut: Callable[[bytes], list[bytes]], hub: RunningHub, worker: ScriptedWorker
) -> None:
    """Pipelining is no crime (RFC 9112, 9.3.2)."""
    worker.requests.clear()
    assert await answers_to(cut(GOOD + GOOD + POISON), hub.port) == (200, 200, 401)
    assert [request.body for request in worker.requests] == [BODY, BODY]
