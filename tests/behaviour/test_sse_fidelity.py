"""Events arrive as they were sent, byte by byte, each before the next one is sent.

The streams are as odd as the format allows (HTML standard, 9.2.6), and cut wherever a
packet or a chunk can end.  Whole streams, cut at random, are in test_streaming.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.asks import CHAT, STREAM
from tests.fakes.client import Wire, request_head
from tests.fakes.hub import RunningHub, mint, running_hub
from tests.fakes.process import hub_process
from tests.fakes.replies import (
    chunk,
    done,
    finish,
    json_reply,
    last_chunk,
    role,
    sse_head,
    token,
)
from tests.fakes.script import close, send, wait
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker

BOM = b"\xef\xbb\xbf"
# What a client gets with the first event; what follows it comes as it is sent.
OPENING = role() + token("a")
ENDING = finish() + done()

# --- Streams ----------------------------------------------------------------------

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
_fields = st.one_of(
    _texts.map(lambda text: b"data: " + json.dumps({"content": text}).encode()),
    _texts.map(lambda text: b"data:" + re.sub(r"[\r\n]", "", text).encode()),
    st.sampled_from(
        [
            b": comment",
            b":",
            b"event: delta",
            b"id: 7",
            b"retry: 3000",
            b"data",
            b"unknown: field",
            "data: é 漢字 \N{BANANA} \N{COMBINING ACUTE ACCENT}".encode(),
            BOM + b"data: no bom, not at the start",
            b"data: \x00\x1b[31m",
        ]
    ),
)


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """One event, of any fields and any line ends, those of one event included."""
    lines = draw(st.lists(_fields, min_size=1, max_size=4))
    return b"".join(line + draw(_ends) for line in [*lines, b""])


class Tap:
    """A client that counts the bytes of a body as they come."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.body = b""

    async def has(self, expected: bytes) -> None:
        """Wait until the body has come to just this, and to no more."""
        async with asyncio.timeout(DEADLINE):
            while len(self.body) < len(expected):
                await self.wire._advance()
                self.body += bytes(self.wire._body)
                self.wire._body.clear()
        assert self.body == expected


@contextlib.asynccontextmanager
async def stream_of(
    hub: RunningHub, worker: ScriptedWorker, first: bytes, pieces: Iterable[bytes]
) -> AsyncIterator[tuple[Tap, asyncio.Semaphore]]:
    """Ask for a stream of which each piece, as it is on the wire, awaits a permit."""
    gate = asyncio.Semaphore(0)
    steps = [step for piece in pieces for step in (wait(gate), send(piece))]
    worker.script(send(sse_head() + first), *steps, wait(gate), close())
    async with await hub.open(CHAT, STREAM) as wire:
        yield Tap(wire), gate


@settings(max_examples=25, deadline=None, database=None)
@given(middle=st.lists(events(), min_size=1, max_size=8), bom=st.booleans())
async def test_each_event_is_seen_before_the_next_one_is_sent(
    middle: list[bytes], bom: bool
) -> None:
    opening = (BOM if bom else b"") + OPENING
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        pieces = [*map(chunk, middle), chunk(ENDING) + last_chunk()]
        async with stream_of(hub, worker, chunk(opening), pieces) as (tap, gate):
            sent = opening
            await tap.has(sent)
            for event in [*middle, ENDING]:
                gate.release()
                sent += event
                await tap.has(sent)
            gate.release()


@settings(max_examples=25, deadline=None, database=None)
@given(
    middle=st.lists(events(), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 600), min_size=1, max_size=12),
)
async def test_every_byte_is_seen_before_the_next_one_is_sent(
    middle: list[bytes], cuts: set[int]
) -> None:
    """Half an event, half a character, half of a CRLF: nothing waits for its rest."""
    body = b"".join(middle) + ENDING
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    parts = [body[start:end] for start, end in pairwise(places)]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        pieces = [*map(chunk, parts)]
        async with stream_of(hub, worker, chunk(OPENING), pieces) as (tap, gate):
            sent = OPENING
            await tap.has(sent)
            for part in parts:
                gate.release()
                sent += part
                await tap.has(sent)


@settings(max_examples=25, deadline=None, database=None)
@given(
    middle=st.lists(events(), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 900), min_size=1, max_size=12),
)
async def test_a_cut_chunk_is_passed_on_as_far_as_it_came(
    middle: list[bytes], cuts: set[int]
) -> None:
    """The packets end anywhere, in the framing as well."""
    wire = b"".join(chunk(event) for event in middle)
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    parts = [wire[start:end] for start, end in pairwise(places)]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        async with stream_of(hub, worker, chunk(OPENING), parts) as (tap, gate):
            await tap.has(OPENING)
            for number in range(1, len(parts) + 1):
                gate.release()
                came = b"".join(parts[:number])
                await tap.has(OPENING + as_far_as_it_came(came))


def as_far_as_it_came(wire: bytes) -> bytes:
    """Read the body out of chunks of which the last one is cut."""
    body = b""
    while b"\r\n" in wire:
        size, _, wire = wire.partition(b"\r\n")
        body += wire[: int(size, 16)]
        wire = wire[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
async def test_a_line_of_a_megabyte_is_passed_on(eol: bytes) -> None:
    """In pieces that are no chunks, with characters of four bytes across their ends."""
    line = b"data: " + "\N{BANANA}".encode() * (1 << 18) + eol + eol
    wire = chunk(OPENING) + chunk(line) + chunk(ENDING) + last_chunk()
    parts = [wire[at : at + 65_537] for at in range(0, len(wire), 65_537)]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(sse_head()), *map(send, parts), close())
        response = await hub.post(CHAT, STREAM)
    assert response.body == OPENING + line + ENDING


# --- How long it takes ------------------------------------------------------------

STREAMS = 50
TOKENS = 20
PACE = 0.02  # seconds
# Seconds that may be added to the quickest event.  A hub that collects events delays
# that one, too; how long the others take is up to the machine.
MOST_ADDED = 0.005
ROUNDS = 5  # of which one has to find the machine in a good moment


class Stopwatch(asyncio.Protocol):
    """A client that notes how old each event is when it comes."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.ages: list[float] = []
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.ages += [now - float(sent) for sent in re.findall(rb"@([\d.]+)@", data)]
        if b"[DONE]" in data and not self.over.done():
            self.over.set_result(None)


class Clockwork(asyncio.Protocol):
    """A worker that streams the time of day."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.left = TOKENS

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET"):
            self.transport.write(json_reply({"data": [{"id": "clock"}]}))
            return
        self.transport.write(sse_head() + chunk(role()))
        self.tick()

    def tick(self) -> None:
        loop = asyncio.get_running_loop()
        if not self.left:
            self.transport.write(chunk(ENDING) + last_chunk())
            self.transport.close()
            return
        self.left -= 1
        self.transport.write(chunk(token(f"@{time.monotonic():.6f}@")))
        loop.call_later(PACE, self.tick)


async def ages_of_events(port: int, request: bytes) -> list[float]:
    """Run all streams at once, out of step; return the age of each event."""
    loop = asyncio.get_running_loop()
    clients: list[Stopwatch] = []
    for _ in range(STREAMS):
        _, client = await loop.create_connection(
            lambda: Stopwatch(request), "127.0.0.1", port
        )
        clients.append(client)
        await asyncio.sleep(PACE / STREAMS)
    await asyncio.gather(*(client.over for client in clients))
    for client in clients:
        client.transport.abort()
    return [age for client in clients for age in client.ages[1:]]


async def test_events_are_hardly_delayed() -> None:
    """What the hub adds to the age of an event, against asking the worker directly."""
    server = await asyncio.get_running_loop().create_server(
        Clockwork, "127.0.0.1", 0, backlog=STREAMS * 2
    )
    port: int = server.sockets[0].getsockname()[1]
    body = json.dumps({"model": "clock", **STREAM}).encode()
    given = [("Content-Length", str(len(body))), ("Content-Type", "application/json")]
    request = request_head("POST", CHAT, mint(sub="alice"), given) + body
    added: list[float] = []
    try:
        async with hub_process(f"http://127.0.0.1:{port}") as hub:
            while len(added) < ROUNDS and min(added, default=1.0) >= MOST_ADDED:
                direct = await ages_of_events(port, request)
                through = await ages_of_events(hub.port, request)
                assert len(through) == STREAMS * (TOKENS - 1)
                added.append(min(through) - min(direct))
    finally:
        server.close()
    print("added by the hub, in s:", added)
    assert min(added) < MOST_ADDED, added
