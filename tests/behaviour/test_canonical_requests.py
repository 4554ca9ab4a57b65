"""Whatever a client sends, a worker gets what the hub writes, and that in one way."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.asks import CHAT
from tests.fakes.client import Wire, request_head
from tests.fakes.exchange import Request
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.worker import ScriptedWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "qwen"
WINDOW = 4096  # what is larger streams through

# What the hub writes, and what may be the client's.
OURS = {"host", "user-agent", "content-type"}
THEIRS = {"accept", "accept-language", "traceparent", "tracestate"}
FRAMING = {"content-length", "transfer-encoding"}

# Names that mean something to a program on the way.
NAMES = [
    *sorted(THEIRS),
    "accept-encoding",
    "alt-svc",
    "authorization2",
    "cache-control",
    "connection",
    "content-disposition",
    "content-location",
    "content-range",
    "content-type",
    "content_type",
    "cookie",
    "date",
    "forwarded",
    "from",
    "http2-settings",
    "if-none-match",
    "keep-alive",
    "max-forwards",
    "origin",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "referer",
    "te",
    "trailer",
    "transfer_encoding2",
    "user-agent",
    "via",
    "api-key",
    "x-conversation-id",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-http-method-override",
    "x-request-id",
]
_TOKEN = "!#$%&'*+-.^_`|~" + "0123456789" + "abcXYZ"
_VALUE = "".join(map(chr, [0x09, *range(0x20, 0x7F), *range(0x80, 0x100)]))

names = st.sampled_from(NAMES).flatmap(
    lambda name: st.sampled_from([name, name.title(), name.upper()])
) | st.text(_TOKEN, min_size=1, max_size=12).map(lambda text: f"x{text}")
values = (
    st.text(_VALUE, max_size=40)
    | st.sampled_from(["close", "keep-alive, Accept", "host, content-length", "gzip"])
    | st.sampled_from(["chunked", "0", "*/*", "traceparent, te", "100-continue"])
)
headers = st.lists(st.tuples(names, values), max_size=12)
bodies = st.builds(
    lambda fields, padding: json.dumps({"model": MODEL, **fields}).encode() + padding,
    st.dictionaries(st.text(max_size=8).map("x{}".format), st.text(), max_size=5),
    st.integers(0, 3 * WINDOW).map(lambda size: b" " * size) | st.just(b""),
)
extensions = st.sampled_from([b"", b"", b";a=b", b';a="b;c"'])
trailers = st.sampled_from(
    [b"", b"", b"X-Digest: a\r\n", b"Host: b\r\nAuthorization: c\r\n"]
)


@st.composite
def framed(draw: st.DrawFn) -> tuple[tuple[str, str], bytes, bytes]:
    """Draw a framing: its header, the body, and the bytes that stand for that."""
    body = draw(bodies)
    if draw(st.booleans()):
        return ("Content-Length", str(len(body))), body, body
    places = draw(st.lists(st.integers(0, len(body)), max_size=5))
    pieces = _cut(body, sorted({0, *places, len(body)}))
    chunks = b"".join(
        b"%x%b\r\n%b\r\n" % (len(piece), draw(extensions), piece) for piece in pieces
    )
    return (
        ("Transfer-Encoding", "chunked"),
        body,
        b"%b0\r\n%b\r\n" % (chunks, draw(trailers)),
    )


def _cut(body: bytes, places: list[int]) -> Iterator[bytes]:
    for start, end in itertools.pairwise(places):
        yield body[start:end]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(MODEL, n_ctx=1 << 20) as worker:
        yield worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hub(worker: ScriptedWorker) -> AsyncIterator[RunningHub]:
    async with running_hub(
        # A body is compared byte by byte: no answer is assembled.
        worker,
        limits__replay_window=WINDOW,
        upstream__assemble="",
    ) as hub:
        yield hub


def assert_canonical(request: Request, host: str) -> None:
    """Check every byte of a head against the one way to write it."""
    start, *lines = request.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert start == b"POST /v1/chat/completions HTTP/1.1"
    found: list[str] = []
    for line in lines:
        match = re.fullmatch(rb"([A-Za-z-]+): ([!-~](?:[\t -~]*[!-~])?)?", line)
        assert match, line
        found.append(match[1].decode().lower())
    assert set(found) <= OURS | THEIRS | FRAMING
    for name in OURS:
        assert found.count(name) == 1, name
    assert request.header("host") == host
    assert request.header("content-type") == "application/json"
    [framing] = [name for name in found if name in FRAMING]
    if framing == "transfer-encoding":
        assert request.header(framing) == "chunked"
    else:
        assert request.header(framing) == str(request.body_length)


@settings(max_examples=40, deadline=None, database=None)
@given(headers=headers, framing=framed())
async def test_requests_to_workers_have_a_canonical_form(
    headers: list[tuple[str, str]],
    framing: tuple[tuple[str, str], bytes, bytes],
    hub: RunningHub,
    worker: ScriptedWorker,
) -> None:
    worker.requests.clear()
    (header, body, sent), token = framing, hub.token()
    async with await Wire.connect(hub.host, hub.port) as wire:
        head = request_head("POST", CHAT, token, [*headers, header])
        half = len(sent) // 2
        for piece in (head + sent[:half], sent[half:]):
            await wire.send(piece)
            await asyncio.sleep(0)
        response = await wire.read_response()
    assert not worker.violations  # it is read by h11
    if response.status == 200:
        [request] = worker.requests
        assert_canonical(request, worker.name)
        assert request.body == body
        assert token.encode() not in request.head
    else:  # what aiohttp knows only once, came twice
        assert response.status == 400
        # Of a body that streams through, the worker may have got all but the end.
        assert [each.sent for each in worker.requests] in ([], [0])


@pytest.mark.parametrize("chunked", [True, False])
async def test_streamed_bodies_have_canonical_framing(
    chunked: bool, hub: RunningHub, worker: ScriptedWorker
) -> None:
    """As it came: with both, its length would be ambiguous."""
    worker.requests.clear()
    body = json.dumps({"model": MODEL, "padding": "x" * 3 * WINDOW}).encode()
    header, sent = ("Content-Length", str(len(body))), body
    if chunked:
        header = ("Transfer-Encoding", "chunked")
        sent = b"%x\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
    async with await hub.wire() as wire:
        head = request_head("POST", CHAT, hub.token(), [header])
        await wire.send(head + sent[: 2 * WINDOW])
        await worker.received()  # before the end of it is known
        await wire.send(sent[2 * WINDOW :])
        assert (await wire.read_response()).status == 200
    [request] = worker.requests
    assert_canonical(request, worker.name)
    assert request.header(header[0]) == header[1]
    assert request.body == body
