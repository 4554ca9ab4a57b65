"""OpenAI's client for Node, in a separate process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.fakes.client import DEADLINE
from tests.fakes.hub import RunningHub
from tests.fakes.tools import NODE_MODULES, require, require_node_module

_PROGRAM = Path(__file__).with_suffix(".cjs")


class NodeSdk:
    """A chat that streams; what the client has seen of it comes line by line."""

    def __init__(self, output: asyncio.StreamReader) -> None:
        self._output = output

    def __repr__(self) -> str:
        return "<NodeSdk>"

    async def seen(self) -> dict[str, Any]:
        """Read the next thing that it has seen."""
        async with asyncio.timeout(DEADLINE):
            line = await self._output.readline()
        assert line, "the client has ended"
        seen: dict[str, Any] = json.loads(line)
        return seen

    async def rest(self) -> list[dict[str, Any]]:
        """Read all that it sees, to its end."""
        async with asyncio.timeout(DEADLINE):
            lines = await self._output.read()
        return [json.loads(line) for line in lines.splitlines()]


def find_node() -> str:
    """Give the path of Node; without it or the client the test is skipped."""
    node = require("node", package="nodejs")
    require_node_module("openai")
    return node


@contextlib.asynccontextmanager
async def node_sdk(node: str, hub: RunningHub, text: str) -> AsyncIterator[NodeSdk]:
    """Have it ask a hub."""
    process = await asyncio.create_subprocess_exec(
        *(node, str(_PROGRAM), f"{hub.url}/v1", hub.token(), text),
        stdin=DEVNULL,
        stdout=PIPE,
        env=os.environ | {"NODE_PATH": str(NODE_MODULES)},
    )
    try:
        assert process.stdout is not None
        yield NodeSdk(process.stdout)
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
