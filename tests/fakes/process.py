"""A hub in a separate process, so that its memory and its files can be counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from tests.fakes import forks
from tests.fakes.client import DEADLINE, Wire, request_head
from tests.fakes.hub import SECRET, mint

_MERE_NEWS = re.compile(rb"\S+Z (?:debug|info|warning) ")


class HubProcess:
    """What a test holds of such a hub."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self.port = port
        self.complaints: deque[str] = deque(maxlen=1000)  # what it logs beyond warnings
        self._process = psutil.Process(pid)

    def __repr__(self) -> str:
        return f"<HubProcess {self._process.pid} on port {self.port}>"

    def resident(self) -> int:
        """Return the bytes of memory that it has now."""
        return int(self._process.memory_info().rss)

    def descriptors(self) -> int:
        """Return the number of files and sockets that it has open now."""
        return int(self._process.num_fds())

    async def metrics(self) -> str:
        async with await Wire.connect("127.0.0.1", self.port) as wire:
            await wire.get("/metrics", mint(sub="alice", scope="metrics"))
            return (await wire.read_response()).body.decode()

    async def listen_to(self, stderr: asyncio.StreamReader) -> None:
        """Read its log, or it would wait for a reader in the end."""
        async for line in stderr:
            if not _MERE_NEWS.match(line):
                self.complaints.append(line.decode().rstrip())

    async def open(
        self,
        path: str,
        payload: Any,
        *,
        headers: Iterable[tuple[str, str]] = (),
        receive_buffer: int | None = None,
    ) -> Wire:
        """Send a request on a new connection and return that, unread."""
        wire = await Wire.connect("127.0.0.1", self.port, receive_buffer=receive_buffer)
        await wire.post(path, payload, mint(sub="alice"), headers=headers)
        return wire

    async def open_head(self, path: str, headers: Iterable[tuple[str, str]]) -> Wire:
        """Send the head of a request; its body is left to the test."""
        wire = await Wire.connect("127.0.0.1", self.port)
        await wire.send(request_head("POST", path, mint(sub="alice"), headers))
        return wire

    @contextlib.asynccontextmanager
    async def growing_less_than(self, limit: int) -> AsyncIterator[None]:
        """Check that its memory never grows by more in this block than the limit."""
        before = peak = self.resident()

        async def watch() -> None:
            nonlocal peak
            while True:
                await asyncio.sleep(0.01)
                peak = max(peak, self.resident())

        watching = asyncio.create_task(watch(), name="fake watch on memory")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        grown = max(peak, self.resident()) - before
        assert grown < limit, f"{self!r} grew by {grown} bytes"


@contextlib.asynccontextmanager
async def hub_process(
    *urls: str,
    environ: Mapping[str, str] | None = None,
    module: str = "gollama_proxy",
    ready: bool = True,
    forked: bool = True,
    **settings: Any,
) -> AsyncIterator[HubProcess]:
    """Run `gollama-proxy serve` with these workers, and wait until it is ready.

    Without `ready`, it need not have a worker yet, and without `forked` Python itself
    is started.  Another `module` is one that runs the same command and does more.
    """
    variables = bare()
    variables |= {"GOLLAMA_JWT_SECRET": SECRET, "GOLLAMA_SERVER_DRAIN": "0"}
    for name, value in settings.items():
        variables[f"GOLLAMA_{name.replace('__', '_').upper()}"] = str(value)
    workers = [argument for url in urls for argument in ("--worker", url)]
    process: asyncio.subprocess.Process | forks.Process
    process = await (forks.start if forked else _start)(
        *(module, "serve", "--port", "0", *workers),
        environ=variables | dict(environ or {}),
    )
    listening: asyncio.Task[None] | None = None
    try:
        assert process.stderr is not None
        output = b""
        async with asyncio.timeout(2 * DEADLINE):
            while not (match := re.search(rb"listening on \S+:(\d+)", output)):
                line = await process.stderr.readline()
                assert line, f"the hub did not start:\n{output.decode()}"
                output += line
            hub = HubProcess(process.pid, int(match[1]))
            listening = asyncio.create_task(
                hub.listen_to(process.stderr), name="fake reader of a log"
            )
            if ready:
                await _ready(hub)
        yield hub
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(DEADLINE):
                if listening is not None:
                    await listening  # to the end of the log
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _start(
    module: str, *arguments: str, environ: Mapping[str, str]
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
        cwd=forks.ROOT,
    )


async def _ready(hub: HubProcess) -> None:
    while True:
        async with await Wire.connect("127.0.0.1", hub.port) as wire:
            await wire.get("/readyz")
            if (await wire.read_response()).status == 200:
                return
        await asyncio.sleep(0.02)


class Program:
    """`gollama-proxy …`, or a script, as a process watched through what it writes."""

    def __init__(self, process: asyncio.subprocess.Process | forks.Process) -> None:
        self.process = process
        self.output = ""

    def __repr__(self) -> str:
        return f"<Program pid={self.process.pid} status={self.process.returncode}>"

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        *arguments: str,
        environ: Mapping[str, str],
        module: str = "gollama_proxy",
        program: Sequence[str] = (),
        python: str | Path = sys.executable,
        cwd: Path = forks.ROOT,
        descriptors: Sequence[int] = (),
    ) -> AsyncIterator[Self]:
        """Run a program of Python, or else a fork with descriptors as of systemd.

        Another `module` is one that runs the same command and does more.
        """
        process: asyncio.subprocess.Process | forks.Process
        if program:
            process = await asyncio.create_subprocess_exec(
                *(python, *program, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environ,
                cwd=cwd,
            )
        else:
            process = await forks.start(
                *(module, *arguments),
                environ=environ,
                cwd=cwd,
                descriptors=descriptors,
                both=True,
            )
        try:
            yield cls(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def until(self, pattern: str) -> re.Match[str]:
        """Read on until the output matches."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(DEADLINE):
                while not (match := re.search(pattern, self.output)):
                    line = await self.process.stdout.readline()
                    assert line, f"{self!r} never wrote {pattern!r}:\n{self.output}"
                    self.output += line.decode()
        except TimeoutError:
            raise AssertionError(f"{self!r}: no {pattern!r}:\n{self.output}") from None
        return match

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end; `output` is whole then."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            self.output += (await self.process.stdout.read()).decode()
            return await self.process.wait()


def bare() -> dict[str, str]:
    """Copy the environment without our settings, and let no settings file be found."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    return clean | {"GOLLAMA_CONFIG": os.devnull, "GOLLAMA_STATE_DIR": ""}
