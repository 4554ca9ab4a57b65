"""Stand-ins for llama-servers with slots, a queue, two speeds and a prompt cache.

    python -m benchmarks.slotted_worker < pool.json

They keep the time of `engine.py`, whose pace is measured on a real llama-server, and
cost little: a whole pool runs in one process.  Standard input has a list of `Spec`;
the reply on standard output is the list of their ports.  The end of the input ends the
process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import llama_wire
from benchmarks.dialogue import Message
from benchmarks.engine import Engine, Pace, Work
from benchmarks.llama_wire import STREAM_START, TOKEN_CHUNK, pages, stream_end

TICK = 0.001  # seconds between two looks at the clock, at least
MOST_TOKENS = 16  # unless the request sets a limit


@dataclass(frozen=True)
class Spec:
    """One server."""

    pace: Pace
    slots: int
    kept: int  # states of conversations, beside those in the slots
    token: float  # characters of a prompt


def spell(pool: list[Spec]) -> bytes:
    """Return the standard input of the process."""
    return json.dumps([asdict(spec) for spec in pool]).encode() + b"\n"


def _read(line: str) -> list[Spec]:
    return [Spec(**{**each, "pace": Pace(**each["pace"])}) for each in json.loads(line)]


class Server:
    """Runs one engine in real time.

    Work that falls due within the next millisecond is made up for: no error adds up.
    """

    def __init__(self, spec: Spec) -> None:
        self.engine = Engine(spec.pace, spec.slots, spec.kept, spec.token)
        self._callers: dict[Work, Connection] = {}
        self._due: float | None = None  # the end of a turn of the loop

    def __repr__(self) -> str:
        return f"<Server {self.engine!r}>"

    def submit(self, work: Work, caller: Connection) -> None:
        self._callers[work] = caller
        self.engine.submit(work)
        if self._due is None:
            self._plan(time.monotonic())
            self._arm()

    def leave(self, work: Work) -> None:
        if self._callers.pop(work, None):
            self.engine.cancel(work)

    def _plan(self, now: float) -> None:
        seconds = self.engine.plan(now)
        self._due = None if seconds is None else now + seconds

    def _arm(self) -> None:
        if self._due is not None:
            delay = max(self._due - time.monotonic(), TICK)
            asyncio.get_running_loop().call_later(delay, self._wake)

    def _wake(self) -> None:
        while self._due is not None and self._due <= time.monotonic():
            for work in self.engine.carry_out(self._due):
                self._send(work)
            self._plan(self._due)
        self._arm()

    def _send(self, work: Work) -> None:
        caller = self._callers.get(work)
        if caller is None:  # left while it waited
            self.engine.cancel(work)
            return
        caller.send(work)
        if work.done:
            del self._callers[work]


class Connection(llama_wire.Connection):
    """Passes requests to the server, and its tokens back."""

    def __init__(self, server: Server, answers: dict[bytes, bytes]) -> None:
        super().__init__(answers)
        self._server = server
        self._work: Work | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._work:
            self._server.leave(self._work)

    def stream(self, request: dict[str, Any]) -> None:
        tokens = max(1, request.get("max_tokens") or MOST_TOKENS)
        self._work = Work(render(request["messages"]), tokens)
        self._server.submit(self._work, self)

    def send(self, work: Work) -> None:
        """Send the next token, and the end with the last one."""
        self.transport.write(STREAM_START if work.written == 1 else TOKEN_CHUNK)
        if work.done:
            reading = work.first - work.began
            writing = time.monotonic() - work.first
            read = work.size - work.cached
            end = stream_end(work.cached, read, reading, work.tokens, writing)
            self.transport.write(end)
            # Its FIN at once: till then a proxy may take the connection for a kept one.
            self.transport.write_eof()
            self.transport.close()


def render(messages: list[Message]) -> str:
    """Make a prompt of messages, as a chat template does."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


async def serve(pool: list[Spec]) -> None:
    """Run the servers of a pool until standard input ends."""
    loop, ports = asyncio.get_running_loop(), []
    for spec in pool:
        server, answers = Server(spec), pages(spec.slots)
        listening = await loop.create_server(
            lambda s=server, a=answers: Connection(s, a), "127.0.0.1", 0
        )
        ports.append(listening.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin, over.set)
    await over.wait()


def main() -> None:
    # uvloop would send the FIN of a stream a turn of its loop after the last byte.
    asyncio.run(serve(_read(sys.stdin.readline())))


if __name__ == "__main__":
    main()
