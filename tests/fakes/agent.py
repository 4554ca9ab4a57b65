"""Agents: the command in a process of its own, and one that a test acts for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from gollama_proxy.fleet.agents import answer_to
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub
from tests.fakes.process import bare
from tests.fakes.waiting import DEADLINE

SECRET = "5ec7e7" * 8


class AgentProcess:
    """`gollama-proxy agent …`, watched through what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    def __repr__(self) -> str:
        return f"<AgentProcess pid={self.process.pid}>"

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, *arguments: str, token: str = "", environ: Mapping[str, str] | None = None
    ) -> AsyncIterator[AgentProcess]:
        variables = bare() | {"GOLLAMA_TOKEN": token} | dict(environ or {})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gollama_proxy", "agent", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=variables,
            cwd=Path(__file__).parent.parent.parent,
        )
        try:
            yield cls(process)
        finally:
            if process.returncode is None:
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

    async def started(self, times: int = 1) -> int:
        """Wait until it has started its server so many times; return the process.

        The server's own output may come before that line, which is written later.
        """
        line = r"started \S+, process (\d+)"
        return int((await self.until(rf"(?s)(?:{line}.*){{{times - 1}}}{line}"))[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end; `output` is whole then."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            self.output += (await self.process.stdout.read()).decode()
            return await self.process.wait()


class HandAgent:
    """An agent whose every call a test makes; it answers nonces meanwhile."""

    def __init__(self, hub: RunningHub, url: str, name: str = "desk") -> None:
        self.hub = hub
        self.url = url
        self.name = name
        self.secret = SECRET
        self.port = 0
        self.proofs = 0
        self.answers = True
        self.on_proof: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return f"<HandAgent {self.name} {self.url} proofs={self.proofs}>"

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[HandAgent]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        nonce = head.split()[1].rpartition("/")[2]
        self.proofs += 1
        if self.on_proof is not None:
            self.on_proof()
        body = answer_to(nonce, self.secret.encode(), self.name)
        if not self.answers:
            body = body[::-1]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
        writer.close()

    async def put(self, **changes: Any) -> Response:
        """Register or renew; `changes` replace parts of the body."""
        body = {"worker": {"url": self.url}, "proof_port": self.port, **changes}
        return await self.call("PUT", body)

    async def delete(self) -> Response:
        return await self.call("DELETE", {})

    async def call(
        self, method: str, body: Any, token: str | None = "", secret: str | None = None
    ) -> Response:
        """Make a call; the token has the scope worker unless another one is given."""
        token = self.hub.token("desk", scope="worker") if token == "" else token
        headers = [("X-Gollama-Agent", self.secret if secret is None else secret)]
        path = f"/agent/workers/{self.name}"
        async with await self.hub.wire() as wire:
            await wire.post(path, body, token, headers=headers, method=method)
            return await wire.read_response()
