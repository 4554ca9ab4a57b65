"""One measurement: a load on a proxy, and what it costs while all clients are open."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from benchmarks.children import BenchmarkError, last_words, spawn
from benchmarks.load import Job
from benchmarks.proxies import Proxy

WARM_UP = 2.0
REQUEST_CLIENTS = 32
REQUEST_SECONDS = 3.0
REQUEST_WARM_UP = 0.5
# Streams that any proxy here can open in a second; they last that much longer.
OPENED_PER_SECOND = 400


@dataclass(frozen=True)
class Sample:
    """One proxy's cost in one round."""

    microseconds: float  # of CPU time, per token or per short request
    rate: float  # of those, per second
    memory: int
    peak: int  # clients at once


async def measure(proxy: Proxy, job: Job, warm_up: float, seconds: float) -> Sample:
    """Put the job's load on a proxy and take what it costs while all clients are open.

    Raises:
        BenchmarkError: when an answer was broken or a token did not arrive.
    """
    try:
        async with (
            asyncio.timeout(warm_up + seconds + 90),
            Load.running(job, proxy.folder) as load,
        ):
            await load.hear("open")
            await asyncio.sleep(warm_up)
            clock = asyncio.get_running_loop().time
            started, cpu, count = clock(), proxy.cpu_seconds(), await load.count()
            await asyncio.sleep(seconds)
            cpu, count = proxy.cpu_seconds() - cpu, await load.count() - count
            seconds, memory = clock() - started, proxy.memory()
            end = await load.hear("end")
    except TimeoutError:
        raise BenchmarkError(f"{proxy.name}: no end of the load in sight") from None
    except psutil.NoSuchProcess:
        raise BenchmarkError(f"{proxy.name} ended: {last_words(proxy.log)}") from None
    expected = job.clients * job.max_tokens
    if end["broken"] or (expected and end["count"] != expected):
        tokens = f", {end['count']:,} of {expected:,} tokens" if expected else ""
        raise BenchmarkError(
            f"{proxy.name} lost answers: {end['complete']:,} of {job.clients:,}"
            f" complete{tokens}; {end['broken']}"
        )
    if not count:
        raise BenchmarkError(f"{proxy.name}: nothing arrived in {seconds:.0f} s")
    return Sample(cpu / count * 1e6, count / seconds, memory, end["peak"])


def stream_job(proxy: Proxy, streams: int, rate: float, seconds: float) -> Job:
    """Ask for streams that all last until the measuring is over."""
    lasting = streams / OPENED_PER_SECOND + WARM_UP + seconds + 0.5
    tokens = ceil(rate * lasting)
    return Job(proxy.port, streams, max_tokens=tokens, bearers=proxy.bearers)


def request_job(proxy: Proxy) -> Job:
    seconds = REQUEST_WARM_UP + REQUEST_SECONDS + 0.2
    return Job(proxy.port, REQUEST_CLIENTS, seconds=seconds, bearers=proxy.bearers)


class Load:
    """The client process: what is asked of it and what it says."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path) -> None:
        self._child = child
        self._log = log

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, job: Job, folder: Path) -> AsyncIterator[Load]:
        log = folder / "load.log"
        async with spawn([sys.executable, "-m", "benchmarks.load"], log) as child:
            load = cls(child, log)
            await load._tell(json.dumps(dataclasses.asdict(job)))
            yield load

    async def hear(self, event: str) -> dict[str, Any]:
        """Wait for the next thing the clients say.

        Raises:
            BenchmarkError: when it is not this event.
        """
        assert self._child.stdout
        line = await self._child.stdout.readline()
        said = json.loads(line) if line else {"event": last_words(self._log)}
        if said["event"] != event:
            raise BenchmarkError(f"no {event!r} from the clients, but {said}")
        return said

    async def count(self) -> int:
        await self._tell("count")
        return (await self.hear("count"))["count"]

    async def _tell(self, line: str) -> None:
        assert self._child.stdin
        self._child.stdin.write(line.encode() + b"\n")
        # Should the clients be gone: `hear` finds out, and knows their last words.
        with contextlib.suppress(ConnectionError):
            await self._child.stdin.drain()
