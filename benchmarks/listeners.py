"""Two ways for processes to accept connections at one address, compared.

`reuseport`: each process has a separate socket, and the kernel chooses one by a hash
of the client's address and port.  `shared`: all accept from one socket.  The processes
run aiohttp's server on uvloop, as hubs do, and answer with their process number.

Printed are: how many of some connections each process got, the CPU time of a connection
with a request, and what clients lost while one process was restarted again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import psutil
import uvloop
from aiohttp import web
from aiohttp.web_request import BaseRequest

from benchmarks import command
from benchmarks.proxies import cpu_seconds
from benchmarks.report import markdown

MODES = ("reuseport", "shared")
STREAMS = (8, 16, 100)
CLIENTS = 32
RESTARTS = 5
BACKLOG = 1024


# --- A process that serves ----------------------------------------------------------


async def serve(mode: str, value: int) -> None:
    """Accept connections until SIGTERM; `value` is the port, or the descriptor."""
    sock = _bound(value) if mode == "reuseport" else socket.socket(fileno=value)
    sock.setblocking(False)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = web.Server(_answer)
    listening = await loop.create_server(server, sock=sock, backlog=BACKLOG)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    print("up", flush=True)
    await ended.wait()
    listening.close()
    await asyncio.sleep(0)
    await server.shutdown(1.0)


async def _answer(request: BaseRequest) -> web.Response:
    return web.Response(text=str(os.getpid()))


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


# --- Measuring ----------------------------------------------------------------------


class Pair:
    """Two processes at one address."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        # It keeps the port, or the socket, whatever the processes do.
        self.base = _bound(0)
        self.port = self.base.getsockname()[1]
        if mode == "shared":
            self.base.listen(BACKLOG)
        self.processes: list[asyncio.subprocess.Process] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Pair]:
        try:
            self.processes = [await self._start() for _ in range(2)]
            yield self
        finally:
            for each in self.processes:
                each.kill()
                await each.wait()
            self.base.close()

    async def _start(self) -> asyncio.subprocess.Process:
        shared = self.mode == "shared"
        value = self.base.fileno() if shared else self.port
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.listeners", self.mode, str(value)),
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[value] if shared else [],
        )
        assert process.stdout is not None
        await process.stdout.readline()
        return process

    async def ask(self) -> tuple[int, asyncio.StreamWriter]:
        """Open a connection and send a request; return which process answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split()[0])
        return int(await reader.readexactly(size)), writer

    async def balance(self, number: int, pause: float) -> str:
        """Return how many of some connections the processes got, the larger first."""
        asks = []
        for _ in range(number):
            asks.append(asyncio.ensure_future(self.ask()))
            if pause:
                await asyncio.sleep(pause)
        answers = await asyncio.gather(*asks)
        for _, writer in answers:
            writer.close()
        most = max(Counter(pid for pid, _ in answers).values())
        await asyncio.sleep(0.05)  # for the processes to notice that they are closed
        return f"{most}:{number - most}"

    async def cost(self, seconds: float) -> float:
        """Return the CPU microseconds of a connection with one request."""
        ends, count = time.monotonic() + seconds, 0

        async def repeat() -> None:
            nonlocal count
            while time.monotonic() < ends:
                _, writer = await self.ask()
                writer.close()
                count += 1

        before = self._cpu()
        await asyncio.gather(*(repeat() for _ in range(CLIENTS)))
        return (self._cpu() - before) / count * 1e6

    def _cpu(self) -> float:
        return sum(cpu_seconds(psutil.Process(each.pid)) for each in self.processes)

    async def losses(self, number: signal.Signals) -> str:
        """Restart a process again and again; return what clients lost, and of what."""
        over, found = asyncio.Event(), Counter[str]()

        async def once() -> None:
            try:
                _, writer = await self.ask()
                writer.close()
                found["answered"] += 1
            except (OSError, asyncio.IncompleteReadError):
                found["lost"] += 1

        async def load() -> None:
            asking = set()
            while not over.is_set():
                asking |= {asyncio.ensure_future(once()) for _ in range(5)}
                await asyncio.sleep(0.02)
            await asyncio.gather(*asking)

        loading = asyncio.ensure_future(load())
        for _ in range(RESTARTS):
            await asyncio.sleep(0.3)
            self.processes[0].send_signal(number)
            await self.processes[0].wait()
            self.processes[0] = await self._start()
        over.set()
        await loading
        return f"{found['lost']} of {found.total():,}"


async def compare(rounds: int, seconds: float) -> None:
    rows: dict[str, list[str]] = {}
    for mode in MODES:
        async with AsyncExitStack() as stack:
            pair = await stack.enter_async_context(Pair(mode).running())
            for number in STREAMS:
                for pause, how in ((0.0, "at once"), (0.005, "one by one")):
                    found = [await pair.balance(number, pause) for _ in range(rounds)]
                    title = f"{number} connections, {how}"
                    rows.setdefault(title, []).append(", ".join(found))
            cost = f"{await pair.cost(seconds):.0f}"
            rows.setdefault("CPU time of a connection, µs", []).append(cost)
            for each in (signal.SIGTERM, signal.SIGKILL):
                title = f"lost in {RESTARTS} restarts by {each.name}"
                rows.setdefault(title, []).append(await pair.losses(each))
    print(markdown(["", *MODES], [[title, *found] for title, found in rows.items()]))


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] and words[0] in MODES:
        uvloop.run(serve(words[0], int(words[1])))
        return 0
    parser: argparse.ArgumentParser = command.parser("listeners", __doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S")
    args = parser.parse_args(words)
    command.require_positive(parser, rounds=args.rounds, seconds=args.seconds)
    return command.run(lambda: compare(args.rounds, args.seconds))


if __name__ == "__main__":
    sys.exit(main())
