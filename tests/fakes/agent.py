"""Agents: the command in a separate process, and one that a test drives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from gollama_proxy.fleet.agents import answer_to
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub
from tests.fakes.process import Program, bare

SECRET = "5ec7e7" * 8


class AgentProcess(Program):
    """`gollama-proxy agent …`, watched through what it logs."""

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(
        cls,
        *arguments: str,
        token: str = "",
        environ: Mapping[str, str] | None = None,
        module: str = "gollama_proxy",
    ) -> AsyncIterator[AgentProcess]:
        variables = bare() | {"GOLLAMA_TOKEN": token} | dict(environ or {})
        command = ("agent", *arguments)
        async with cls.running(*command, environ=variables, module=module) as agent:
            yield agent

    async def started(self, times: int = 1) -> int:
        """Wait until it has started its server so many times; return the process.

        The server's own output may come before that line, which is written later.
        """
        line = r"started \S+, process (\d+)"
        return int((await self.until(rf"(?s)(?:{line}.*){{{times - 1}}}{line}"))[2])


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
