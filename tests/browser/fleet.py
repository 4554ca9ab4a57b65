"""Workers for pages that show many of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from benchmarks.llama_wire import Connection, pages
from tests.fakes.hub import HasUrl


@contextlib.asynccontextmanager
async def many_workers(count: int, slots: int = 4) -> AsyncIterator[list[str]]:
    """Serve as so many idle workers; yields their URLs.

    All of them are one server: each has its own address of the loopback network.
    """
    answers = pages(slots)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(answers), "0.0.0.0", 0, backlog=4096
    )
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield [f"http://127.1.{n // 250}.{1 + n % 250}:{port}" for n in range(count)]


def settings_file(folder: Path, workers: Mapping[str, HasUrl | str]) -> Path:
    """Write a settings file with these workers, by name; returns its path."""
    tables = [
        # What JSON escapes in a string, TOML escapes in the same way.
        f"[[workers]]\nname = {json.dumps(name)}\n"
        f"url = {json.dumps(worker if isinstance(worker, str) else worker.url)}\n"
        for name, worker in workers.items()
    ]
    path = folder / "gollama.toml"
    path.write_text("\n".join(tables))
    return path
