"""The clients of a measurement, in a separate process.

The first line on standard input is the job, as JSON (see `Job`).  Events are written to
standard output, one JSON object per line:

    {"event": "open"}                       every client has its first bytes
    {"event": "count", "count": 8012, "open": 200, "broken": {}}
                                            the reply to a line `count`
    {"event": "end", "count": 85000, "complete": 200, "peak": 200, "broken": {},
     "first": 0.0041}

`count` is the number of tokens that arrived or, where clients repeat a request, of
complete answers; `open`, the number of clients whose answers have not ended; `first`,
the median time to the first token of a stream, in seconds.  At a line `stop`, clients
that repeat their request end with the answer that they wait for.  The process ends when
its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

import httptools
import uvloop

TOKEN = b'"delta":{"content":"'
DONE = b"data: [DONE]\n\n"
WORD = b" we"  # each token of the worker's answers
# Streams that wait for their first token, so that no accept queue on the way overflows.
OPENING_AT_ONCE = 64

CHAT_PATH = "/v1/chat/completions"
EMBEDDINGS_PATH = "/v1/embeddings"


class Kind(StrEnum):
    """What the clients ask for."""

    EMBEDDING = "embedding"
    STREAM = "stream"
    CHAT = "chat"  # in one piece


@dataclass(frozen=True)
class Job:
    """What the clients do.

    Each client sends one request; with `repeats`, each repeats it on the same
    connection until it is stopped.  With `burst`, clients connect as fast as they can.
    """

    port: int
    clients: int
    kind: str = Kind.STREAM
    max_tokens: int = 0
    repeats: bool = False
    burst: bool = False
    bearers: list[str] = field(default_factory=lambda: ["none"])
    question: str = "Answer yes, at some length."

    def request(self, client: int) -> bytes:
        """Return the request of the client with this number."""
        bearer = self.bearers[client % len(self.bearers)]
        return spell(self.port, bearer, self.document(), self.path)

    @property
    def path(self) -> str:
        return EMBEDDINGS_PATH if self.kind == Kind.EMBEDDING else CHAT_PATH

    def document(self) -> dict[str, Any]:
        """Return the body of each request, before it is encoded."""
        if self.kind == Kind.EMBEDDING:
            return {"model": "paced", "input": self.question}
        document = {
            "model": "paced",
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.max_tokens,
        }
        return document | {"stream": True} if self.kind == Kind.STREAM else document


def spell(
    port: int, bearer: str, document: dict[str, Any], path: str = CHAT_PATH
) -> bytes:
    """Return a POST request with a JSON body."""
    body = json.dumps(document).encode()
    head = (
        f"POST {path} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {bearer}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Tally:
    """What all clients together received."""

    count: int = 0
    open: int = 0
    peak: int = 0
    complete: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)  # seconds


class Client(asyncio.Protocol):
    """One connection; `started` and `ended` are always resolved, never failed."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._parser = httptools.HttpResponseParser(self)
        self._over = False
        self.flaw = ""  # why the answer is incomplete, once it has ended
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over={self._over} {self.flaw!r}>"

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._tally.open += 1
        self._tally.peak = max(self._tally.peak, self._tally.open)
        transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("connection lost")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._end(f"not HTTP: {exc}")

    def refuse(self, why: str) -> None:
        """Record that the connection could not be made."""
        self.flaw = why
        self.ended.set_result(None)

    def give_up(self) -> None:
        self._end("no end in sight")

    def _start(self) -> None:
        if not self.started.done():
            self.started.set_result(None)

    def _end(self, flaw: str = "") -> None:
        if self._over:
            return
        self._over, self.flaw = True, flaw
        self._tally.open -= 1
        if flaw:
            self._tally.broken[flaw] += 1
        else:
            self._tally.complete += 1
        self._transport.close()
        self._start()
        self.ended.set_result(None)


class StreamClient(Client):
    """Reads one stream and checks at its end that every token arrived."""

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job.request(number), tally)
        self._max_tokens = job.max_tokens
        self._tokens = 0
        self._tail = b""
        self.began = time.monotonic()
        self.first: float | None = None  # seconds to the first token

    def on_body(self, body: bytes) -> None:
        if self.first is None and self._parser.get_status_code() == 200:
            self.first = time.monotonic() - self.began
            self._tally.firsts.append(self.first)
        self._start()
        # A proxy may split the stream anywhere.  The tail that is kept is shorter than
        # the pattern, so nothing is counted twice.
        body = self._tail + body
        tokens = body.count(TOKEN)
        self._tail = body[1 - len(TOKEN) :]
        self._tokens += tokens
        self._tally.count += tokens

    def on_message_complete(self) -> None:
        missing = self._max_tokens - self._tokens
        if (status := self._parser.get_status_code()) != 200:
            self._end(f"status {status}")
        elif missing:
            self._end(f"{missing} of {self._max_tokens} tokens missing")
        elif not self._tail.endswith(DONE):
            self._end("no [DONE]")
        else:
            self._end()


class RepeatingClient(Client):
    """Repeats its request on one connection, and checks each answer."""

    stopping = False  # of all clients

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job.request(number), tally)
        self._job = job
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._start()
        if flaw := self._find_flaw():
            self._end(flaw)
            return
        self._tally.count += 1
        if self.stopping:
            self._end()
        else:
            self._body = b""
            self._transport.write(self._request)

    def _find_flaw(self) -> str:
        if (status := self._parser.get_status_code()) != 200:
            return f"status {status}"
        if self._job.kind == Kind.EMBEDDING:
            return "" if b'"embedding"' in self._body else "no embedding"
        tokens = self._body.count(WORD)
        if missing := self._job.max_tokens - tokens:
            return f"{missing} of {self._job.max_tokens} tokens missing"
        if self._job.kind == Kind.STREAM and not self._body.endswith(DONE):
            return "no [DONE]"
        return ""


async def run(job: Job) -> None:
    """Do the job and report the result."""
    tally = Tally()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task

    def on_command() -> None:
        line = os.read(sys.stdin.fileno(), 4096)
        if line == b"stop\n":
            RepeatingClient.stopping = True
            stopped.set()
        elif line:
            broken = dict(tally.broken.most_common(5))
            _report("count", count=tally.count, open=tally.open, broken=broken)
        else:
            loop.remove_reader(sys.stdin)
            task.cancel()

    stopped = asyncio.Event()
    loop.add_reader(sys.stdin, on_command)
    clients = await _open(job, tally)
    await asyncio.gather(*[client.started for client in clients])
    _report("open")
    if job.repeats:
        await stopped.wait()
    await asyncio.gather(*[client.ended for client in clients])
    _report(
        "end",
        count=tally.count,
        complete=tally.complete,
        peak=tally.peak,
        broken=dict(tally.broken.most_common(5)),
        first=median(tally.firsts) if tally.firsts else 0.0,
    )


async def _open(job: Job, tally: Tally) -> list[Client]:
    loop = asyncio.get_running_loop()
    opening = asyncio.Semaphore(job.clients if job.burst else OPENING_AT_ONCE)
    kind = RepeatingClient if job.repeats else StreamClient
    clients: list[Client] = []

    def create() -> Client:
        client = kind(job, len(clients), tally)
        client.started.add_done_callback(lambda _: opening.release())
        clients.append(client)
        return client

    for _ in range(job.clients):
        await opening.acquire()
        await loop.create_connection(create, "127.0.0.1", job.port)
    return clients


def _report(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        uvloop.run(run(job))
    except asyncio.CancelledError:
        sys.exit("benchmarks.load: standard input was closed before the job was done")


if __name__ == "__main__":
    main()
