"""The clients of a measurement, in a process of their own.

Its job is the first line on standard input, as JSON (see `Job`).  What it has to say
is one JSON object per line on standard output:

    {"event": "open"}                       every client is at work
    {"event": "count", "count": 8012}       the answer to each further line of input
    {"event": "end", "count": 85000, "complete": 200, "peak": 200, "broken": {}}

`count` is of tokens that arrived, or of short requests that were answered.  The end of
standard input ends the process: nobody is listening any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop

TOKEN = b'"delta":{"content":"'
DONE = b"data: [DONE]\n\n"
# Opened one by one up to here, so that no accept queue on the way overflows.
OPENING_AT_ONCE = 64


@dataclass(frozen=True)
class Job:
    """Streams of `max_tokens` tokens each; with none, short requests for `seconds`."""

    port: int
    clients: int
    max_tokens: int = 0
    seconds: float = 0.0
    bearers: list[str] = field(default_factory=lambda: ["none"])

    def request(self, client: int) -> bytes:
        """Spell the request that the client of this number sends."""
        document: dict[str, Any] = {
            "model": "paced",
            "messages": [{"role": "user", "content": "Say yes, at some length."}],
        }
        if self.max_tokens:
            document |= {"stream": True, "max_tokens": self.max_tokens}
        return spell(self.port, self.bearers[client % len(self.bearers)], document)


def spell(port: int, bearer: str, document: dict[str, Any]) -> bytes:
    """Spell the request for a chat completion."""
    body = json.dumps(document).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {bearer}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Tally:
    """What the clients saw."""

    count: int = 0
    open: int = 0
    peak: int = 0
    complete: int = 0
    broken: Counter[str] = field(default_factory=Counter)


class Client(asyncio.Protocol):
    """One connection; `started` and `ended` are always resolved, never failed."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._parser = httptools.HttpResponseParser(self)
        self._over = False
        self.flaw = ""  # why it is not complete, once it has ended
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

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
        """End what never came to be connected."""
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
    """Reads one stream and judges at its end whether all of it came."""

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job.request(number), tally)
        self._max_tokens = job.max_tokens
        self._tokens = 0
        self._tail = b""

    def on_body(self, body: bytes) -> None:
        self._start()
        # A proxy may cut anywhere.  The tail is shorter than what is counted, so
        # nothing is counted twice.
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


class RequestClient(Client):
    """Asks again as soon as it is answered, until it is told to stop."""

    stopping = False

    def __init__(self, job: Job, number: int, tally: Tally) -> None:
        super().__init__(job.request(number), tally)

    def on_message_complete(self) -> None:
        self._start()
        if (status := self._parser.get_status_code()) != 200:
            self._end(f"status {status}")
            return
        self._tally.count += 1
        if self.stopping:
            self._end()
        else:
            self._transport.write(self._request)


async def run(job: Job) -> None:
    """Do the job and tell how it went."""
    tally = Tally()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task

    def on_command() -> None:
        if os.read(sys.stdin.fileno(), 4096):
            _say("count", count=tally.count)
        else:
            loop.remove_reader(sys.stdin)
            task.cancel()

    loop.add_reader(sys.stdin, on_command)
    clients = await _open(job, tally)
    await asyncio.gather(*[client.started for client in clients])
    _say("open")
    if not job.max_tokens:
        await asyncio.sleep(job.seconds)
        RequestClient.stopping = True
    await asyncio.gather(*[client.ended for client in clients])
    _say(
        "end",
        count=tally.count,
        complete=tally.complete,
        peak=tally.peak,
        broken=dict(tally.broken.most_common(5)),
    )


async def _open(job: Job, tally: Tally) -> list[Client]:
    loop = asyncio.get_running_loop()
    opening = asyncio.Semaphore(OPENING_AT_ONCE)
    kind = StreamClient if job.max_tokens else RequestClient
    clients: list[Client] = []
    for number in range(job.clients):
        await opening.acquire()
        client = kind(job, number, tally)
        client.started.add_done_callback(lambda _: opening.release())
        await loop.create_connection(lambda c=client: c, "127.0.0.1", job.port)
        clients.append(client)
    return clients


def _say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        uvloop.run(run(job))
    except asyncio.CancelledError:
        sys.exit("benchmarks.load: standard input ended before the job did")


if __name__ == "__main__":
    main()
