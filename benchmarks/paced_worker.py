"""A stand-in for llama-server that streams tokens at a fixed pace and costs little.

    python -m benchmarks.paced_worker --port 9001 --rate 50

With several ports it stands in for as many workers.  It speaks the part of llama-server
that a proxy meets (`llama_wire.py`).  Every stream gets the same bytes, encoded once at
the start.  Short answers come at 1,000 tokens a second, so that many of them fit into a
measurement; each token is still sent alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import uvloop

from benchmarks import llama_wire
from benchmarks.llama_wire import STREAM_START, TOKEN_CHUNK, pages, stream_end

SLOTS = 4096
# libuv's timers count in milliseconds: a finer tick would not be kept.
TICK = 0.001
SHORT = 20  # tokens
SHORT_RATE = 1000.0


# --- Pace -------------------------------------------------------------------------


class Stream:
    """One answer in progress: the rest of it, and its client."""

    __slots__ = ("left", "slot", "started", "tokens", "transport")

    def __init__(self, transport: asyncio.WriteTransport, tokens: int) -> None:
        self.transport = transport
        self.tokens = tokens
        self.left = tokens - 1  # the first token goes out with the head
        self.started = time.monotonic()
        self.slot: set[Stream] = set()

    def __repr__(self) -> str:
        return f"<Stream {self.tokens - self.left}/{self.tokens}>"

    def advance(self) -> bool:
        """Send the next token or the end; return False after the end."""
        if self.left > 0:
            self.left -= 1
            self.transport.write(TOKEN_CHUNK)
            return True
        seconds = time.monotonic() - self.started
        self.transport.write(stream_end(0, 12, 0.001, self.tokens, seconds))
        self.transport.close()
        return False


class Wheel:
    """Gives each stream one token per turn; the streams are spread over the turn.

    Its deadlines are absolute, so a late tick is made up for and no error adds up.
    """

    def __init__(self, rate: float) -> None:
        turn = 1 / rate
        self._slots: list[set[Stream]] = [
            set() for _ in range(max(1, round(turn / TICK)))
        ]
        self._tick = turn / len(self._slots)
        self._position = 0
        self._due = 0.0
        self._streams = 0

    def __repr__(self) -> str:
        return f"<Wheel {self._streams} streams in {len(self._slots)} slots>"

    def add(self, stream: Stream) -> None:
        stream.slot = min(self._slots, key=len)
        stream.slot.add(stream)
        self._streams += 1
        if self._streams == 1:
            self._due = time.monotonic() + self._tick
            self._arm()

    def remove(self, stream: Stream) -> None:
        if stream in stream.slot:
            stream.slot.remove(stream)
            self._streams -= 1

    def _arm(self) -> None:
        # Never zero: tokens that fall due within the next millisecond are made up for.
        delay = max(self._due - time.monotonic(), TICK)
        asyncio.get_running_loop().call_later(delay, self._turn)

    def _turn(self) -> None:
        now = time.monotonic()
        while self._due <= now:
            for stream in list(self._slots[self._position]):
                if not stream.advance():
                    self.remove(stream)
            self._position = (self._position + 1) % len(self._slots)
            self._due += self._tick
        if self._streams:
            self._arm()


# --- Connections ------------------------------------------------------------------


class Connection(llama_wire.Connection):
    """Begins a stream with each request for one."""

    def __init__(self, wheel: Wheel, short: Wheel, answers: dict[bytes, bytes]) -> None:
        """Create it; `short` is the wheel of short answers."""
        super().__init__(answers)
        self._wheel = wheel
        self._short = short
        self._stream: Stream | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream:
            self._wheel.remove(self._stream)

    def stream(self, request: dict[str, Any]) -> None:
        tokens = max(1, request.get("max_tokens") or 16)
        if tokens <= SHORT:
            self._wheel = self._short  # the connection is closed after the stream
        self._stream = Stream(self.transport, tokens)
        self.transport.write(STREAM_START)
        self._wheel.add(self._stream)


async def serve(ports: Sequence[int], rate: float) -> None:
    """Listen on these ports of the loopback interface until cancelled."""
    wheel, short, answers = Wheel(rate), Wheel(SHORT_RATE), pages(SLOTS)
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(
            lambda: Connection(wheel, short, answers), "127.0.0.1", port, backlog=SLOTS
        )
        for port in ports
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, nargs="+", required=True)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens/s of a stream")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.rate))


if __name__ == "__main__":
    main()
