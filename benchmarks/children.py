"""The child processes of a benchmark, and what is asked of them over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from gollama_proxy.children import Child

ROOT = Path(__file__).parent.parent
READY_WITHIN = 15.0
LOOK_EVERY = 0.1


class BenchmarkError(Exception):
    """Why there is no result; the text is for the person who ran the benchmark."""


@contextlib.asynccontextmanager
async def spawn(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    *,
    tethered: bool = True,
) -> AsyncIterator[Child]:
    """Run a child while the context lasts; the log has its standard error."""
    child = await Child.start(
        log.stem,
        command,
        log,
        {**inherited(), **(environment or {})},
        piped=True,
        tethered=tethered,
        folder=folder,
    )
    try:
        yield child
    finally:
        await child.end()


def inherited() -> dict[str, str]:
    """Return the environment without the user's own settings of the hub.

    Programs in Python may write their bytecode, as pip does when it installs them.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    clean.pop("PYTHONDONTWRITEBYTECODE", None)
    return clean | {"GOLLAMA_CONFIG": os.devnull, "GOLLAMA_STATE_DIR": ""}


async def until_answered(port: int, bearer: str, child: Child) -> None:
    """Wait until a chat completion is answered with 200.

    Raises:
        ChildError: the child has ended.
        BenchmarkError: it was not ready in time.
    """
    body = (
        '{"model": "paced", "max_tokens": 1,'
        ' "messages": [{"role": "user", "content": "Ready?"}]}'
    )
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {bearer}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    status = b"no answer"

    async def is_answered() -> bool:
        nonlocal status
        child.check()
        with contextlib.suppress(OSError):
            status = await _status(port, request.encode())
        return status.startswith(b"HTTP/1.1 200 ")

    try:
        await until(f"answer of {child.name}", is_answered, READY_WITHIN)
    except BenchmarkError as exc:
        text = f"{exc}: {status.decode()}; {last_words(child.log)}"
        raise BenchmarkError(text) from None


async def until(what: str, ask: Callable[[], Awaitable[bool]], limit: float) -> None:
    """Ask repeatedly until the reply is true.

    Raises:
        BenchmarkError: asking failed, or this took longer than `limit` seconds.
    """
    try:
        async with asyncio.timeout(limit):
            while not await ask():
                await asyncio.sleep(LOOK_EVERY)
    except TimeoutError:
        raise BenchmarkError(f"no {what} in {limit:.0f} s") from None
    except OSError as exc:
        raise BenchmarkError(f"no {what}: {exc}") from None


async def _status(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return (await reader.readline()).strip()
    finally:
        writer.close()


async def fetch(port: int, path: str, bearer: str) -> str:
    """Return the body of a page, whatever its status."""
    request = (
        f"GET {path} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {bearer}\r\n"
        "Connection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        return (await reader.read()).decode().partition("\r\n\r\n")[2]
    finally:
        writer.close()


def last_words(log: Path) -> str:
    """Return the last lines of a log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-5:]) or "nothing on standard error"
