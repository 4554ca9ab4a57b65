"""Single measurements: a load on a proxy, and what it costs the proxy."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.children import (
    BenchmarkError,
    last_words,
    spawn,
    until_answered,
)
from benchmarks.load import Job, Kind
from benchmarks.proxies import Proxy
from gollama_proxy.children import Child
from gollama_proxy.machine import find_free_ports

CLIENTS = 32  # that repeat a request
WARM_UP = 0.5
PATIENCE = 90.0  # seconds for a load to end, beyond those that it should take
# Streams that any proxy here can open in a second.
OPENED_PER_SECOND = 400
SLACK = 1.5  # seconds that streams last longer than planned, on a busy machine
SETTLE = 1.0  # seconds from the opening of the last stream to the reading of memory
ENDLESS = 1_000_000  # tokens
POLL = 0.002


@dataclass(frozen=True)
class Sample:
    """The cost of one load."""

    microseconds: float  # of CPU time, per token or per answer
    rate: float  # tokens or answers per second


# --- CPU time ---------------------------------------------------------------------


async def measure_answers(
    proxy: Proxy, kind: Kind, tokens: int, seconds: float, clients: int = CLIENTS
) -> Sample:
    """Measure the CPU time of an answer, with clients that repeat their request."""
    job = Job(proxy.port, clients, kind, tokens, repeats=True, bearers=proxy.bearers)
    return await _measure(proxy, job, WARM_UP, seconds)


async def measure_tokens(
    proxy: Proxy, streams: int, rate: float, seconds: float
) -> Sample:
    """Measure the CPU time of a relayed token while all streams are open.

    The opening and the end of the streams are not part of it.
    """
    lasting = streams / OPENED_PER_SECOND + WARM_UP + seconds + SLACK
    tokens = ceil(rate * lasting)
    job = Job(proxy.port, streams, Kind.STREAM, tokens, bearers=proxy.bearers)
    return await _measure(proxy, job, WARM_UP, seconds)


async def _measure(proxy: Proxy, job: Job, warm_up: float, seconds: float) -> Sample:
    async with _running(proxy, job, warm_up + seconds) as load:
        await load.expect("open")
        await asyncio.sleep(warm_up)
        started, cpu, count = time.monotonic(), proxy.cpu_seconds(), await load.count()
        await asyncio.sleep(seconds)
        cpu, count = proxy.cpu_seconds() - cpu, await load.count() - count
        seconds = time.monotonic() - started
        await load.stop()
        await _finish(proxy, job, load)
    if not count:
        raise BenchmarkError(f"{proxy.name}: nothing arrived in {seconds:.0f} s")
    return Sample(cpu / count * 1e6, count / seconds)


# --- Time and memory --------------------------------------------------------------


async def measure_burst(proxy: Proxy, streams: int, tokens: int) -> float:
    """Open streams as fast as one client can; return the median wait, in seconds.

    The wait is from the start of the connection to the first token.
    """
    job = Job(
        proxy.port, streams, Kind.STREAM, tokens, burst=True, bearers=proxy.bearers
    )
    async with _running(proxy, job, 0) as load:
        await load.expect("open")
        return (await _finish(proxy, job, load))["first"]


async def measure_memory(proxy: Proxy, streams: int) -> float:
    """Return the bytes of resident memory that one more stream takes.

    It is the slope between a quarter of the streams and all of them, so that what is
    allocated once does not count.  The clients leave before the end of their streams.
    """
    few = streams // 4
    first, rest = (
        Job(proxy.port, count, Kind.STREAM, ENDLESS, bearers=proxy.bearers)
        for count in (few, streams - few)
    )
    async with _running(proxy, first, PATIENCE) as one:
        await one.expect("open")
        await asyncio.sleep(SETTLE)
        memory = proxy.memory()
        async with _running(proxy, rest, PATIENCE) as other:
            await other.expect("open")
            await asyncio.sleep(SETTLE)
            memory = proxy.memory() - memory
            held, broken = 0, Counter[str]()
            for load in (one, other):
                state = await load.state()
                held += state["open"]
                broken.update(state["broken"])
    if held < streams:
        raise BenchmarkError(
            f"{proxy.name}: only {held:,} of {streams:,} streams were open at once;"
            f" {dict(broken)}"
        )
    return memory / (streams - few)


async def measure_start(proxy: Proxy) -> float:
    """Start the proxy and stop it; return the seconds until its first answer."""
    request = Job(proxy.port, 1, Kind.EMBEDDING, bearers=proxy.bearers).request(0)
    request = request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    started = time.monotonic()
    async with proxy.started(tethered=False):
        while time.monotonic() < started + PATIENCE:
            if await asyncio.to_thread(_is_answered, proxy.port, request):
                return time.monotonic() - started
            await asyncio.sleep(POLL)
    raise BenchmarkError(f"{proxy.name}: no answer; {last_words(proxy.log)}")


def _is_answered(port: int, request: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.sendall(request)
            return connection.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


# --- The process of the worker ----------------------------------------------------


@contextlib.asynccontextmanager
async def paced_worker(rate: float, folder: Path) -> AsyncIterator[int]:
    """Run a worker that streams at this rate; yields its port."""
    async with paced_workers(1, rate, folder) as [port]:
        yield port


@contextlib.asynccontextmanager
async def paced_workers(
    count: int, rate: float, folder: Path
) -> AsyncIterator[list[int]]:
    """Run one process that stands in for so many workers; yields their ports."""
    ports = find_free_ports(count)
    command = [sys.executable, "-m", "benchmarks.paced_worker", "--rate", str(rate)]
    command += ["--port", *map(str, ports)]
    async with spawn(command, folder / "worker.log") as child:
        await until_answered(ports[-1], "none", child)
        yield ports


# --- The process of the clients ---------------------------------------------------


@contextlib.asynccontextmanager
async def _running(proxy: Proxy, job: Job, seconds: float) -> AsyncIterator[Load]:
    """Run a load while the context lasts, for a limited time."""
    try:
        async with (
            asyncio.timeout(seconds + PATIENCE),
            Load.running(job, proxy.folder) as load,
        ):
            yield load
    except TimeoutError:
        raise BenchmarkError(f"{proxy.name}: the load did not end") from None


async def _finish(proxy: Proxy, job: Job, load: Load) -> dict[str, Any]:
    """Wait for the end of a load and check that nothing was lost."""
    end = await load.expect("end")
    expected = 0 if job.repeats else job.clients * job.max_tokens
    if end["broken"] or (expected and end["count"] != expected):
        tokens = f", {end['count']:,} of {expected:,} tokens" if expected else ""
        raise BenchmarkError(
            f"{proxy.name} lost answers: {end['complete']:,} of {job.clients:,}"
            f" clients have theirs{tokens}; {end['broken']}"
        )
    if end["peak"] < job.clients:
        raise BenchmarkError(f"{proxy.name}: only {end['peak']:,} were open at once")
    return end


class Load:
    """The process of the clients: its commands and its events."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def __repr__(self) -> str:
        return f"<Load {self._child!r}>"

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, job: Job, folder: Path) -> AsyncIterator[Load]:
        command = [sys.executable, "-m", "benchmarks.load"]
        async with spawn(command, folder / "load.log") as child:
            load = cls(child)
            await load._send(json.dumps(dataclasses.asdict(job)))
            yield load

    async def expect(self, event: str) -> dict[str, Any]:
        """Wait for the next event and return it.

        Raises:
            BenchmarkError: it is another event.
        """
        assert self._child.process.stdout
        line = await self._child.process.stdout.readline()
        found = json.loads(line) if line else {"event": last_words(self._child.log)}
        if found["event"] != event:
            raise BenchmarkError(f"the clients reported {found}, not {event!r}")
        return found

    async def count(self) -> int:
        """Return the number of tokens, or of answers, so far."""
        return (await self.state())["count"]

    async def state(self) -> dict[str, Any]:
        """Return the clients' counts so far."""
        await self._send("count")
        return await self.expect("count")

    async def stop(self) -> None:
        """Have clients that repeat their request end."""
        await self._send("stop")

    async def _send(self, line: str) -> None:
        assert self._child.process.stdin
        # If the clients have ended, `expect` notices it and reports why.
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._child.process.stdin.write(line.encode() + b"\n")
            await self._child.process.stdin.drain()
