"""The processes of `chaos.py`: llama-servers that die and come back, and a hub.

All of them end with this process, even if it is killed.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from gollama_proxy import machine
from gollama_proxy.children import Child

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}

# Starts a llama-server on the given port.
Start = Callable[[int], Awaitable[Child]]


class State(enum.Enum):
    """The state of a worker, as far as known here."""

    LOADING = enum.auto()
    UP = enum.auto()
    DOWN = enum.auto()  # killed or stopped by this program


class Worker:
    """A llama-server that keeps its port when it is restarted."""

    def __init__(self, port: int, start: Start) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.state = State.LOADING
        self._port = port
        self._start = start
        self._child: Child | None = None

    def __repr__(self) -> str:
        return f"<Worker {self.url} {self.state.name}>"

    async def start(self, session: aiohttp.ClientSession) -> None:
        """Start it, and wait until it answers."""
        self._child = await self._start(self._port)
        self.state = State.LOADING
        await _until_ok(session, f"{self.url}/health")
        self.state = State.UP

    async def hit(self, how: str, down: float, session: aiohttp.ClientSession) -> None:
        """Take it down by a signal for some seconds, and bring it back."""
        assert self._child is not None
        self.state = State.DOWN
        self._child.signal(SIGNALS[how])
        if how == "stop":
            await self._hold_still(self._child, down)
            return
        await self._child.end()  # after SIGTERM it may wait for its clients
        await asyncio.sleep(down)
        await self.start(session)

    async def _hold_still(self, child: Child, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:  # a stopped process cannot react to SIGTERM
            child.signal(signal.SIGCONT)
        self.state = State.UP

    def check(self) -> None:
        """Raise `ChildError` if it has ended by itself."""
        if self._child is not None and self.state is not State.DOWN:
            self._child.check()

    async def end(self) -> None:
        if self._child is not None:
            await self._child.end()


class Pool:
    """All workers, and the hub in front of them."""

    def __init__(
        self, session: aiohttp.ClientSession, workers: int, start: Start, folder: Path
    ) -> None:
        self._session = session
        self._folder = folder
        *ports, self._port = machine.find_free_ports(workers + 1)
        self.workers = [Worker(port, start) for port in ports]
        self.url = f"http://127.0.0.1:{self._port}"
        self._hub: Child | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.url} before {self.workers}>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all processes while the context lasts."""
        try:
            await first_of(self._start(), self.watch())
            yield
        finally:
            ending = [worker.end() for worker in self.workers]
            if self._hub is not None:
                ending.append(self._hub.end())
            await asyncio.gather(*ending)

    async def watch(self, look: Callable[[], None] = lambda: None) -> None:
        """Raise `ChildError` once a process has ended by itself."""
        while True:
            for worker in self.workers:
                worker.check()
            if self._hub is not None:
                self._hub.check()
            look()
            await asyncio.sleep(0.1)

    async def _start(self) -> None:
        await asyncio.gather(*(worker.start(self._session) for worker in self.workers))
        self._hub = await self._start_hub()
        await _until_ok(self._session, f"{self.url}/readyz")

    async def _start_hub(self) -> Child:
        command = [sys.executable, "-m", "gollama_proxy", "serve", "--auth", "off"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        for worker in self.workers:
            command += ["--worker", worker.url]
        log = self._folder / "hub.log"
        environ = dict(os.environ) | {"GOLLAMA_STATE_DIR": ""}
        return await Child.start("the hub", command, log, environ)

    def choose_victim(self, rng: random.Random) -> Worker | None:
        """Choose a worker to hit; never the last of several."""
        up = [worker for worker in self.workers if worker.state is State.UP]
        spared = min(1, len(self.workers) - 1)
        return rng.choice(up) if len(up) > spared else None

    async def hit(self, worker: Worker, how: str, down: float) -> None:
        """Take a worker down by a signal for some seconds, and bring it back."""
        await worker.hit(how, down, self._session)


async def _until_ok(session: aiohttp.ClientSession, url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=1)
    while True:
        try:
            async with session.get(url, timeout=timeout) as response:
                if response.status == 200:
                    return
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.05)


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Wait until one has ended, end the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
