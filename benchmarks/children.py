"""How any child process of a benchmark is started, waited for and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRACE = 5.0
READY_WITHIN = 15.0
LOOK_EVERY = 0.1


class BenchmarkError(Exception):
    """Why there is no result; the text is for the person who ran the benchmark."""


_prctl = getattr(ctypes.CDLL(None), "prctl", None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent(number: signal.Signals) -> None:
    """Have the kernel end this child should its parent be killed (Linux only)."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number)


@contextlib.asynccontextmanager
async def spawn(
    command: list[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    tether: signal.Signals = signal.SIGTERM,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a child while the context lasts; what it writes to stderr goes to the log.

    `tether` is the signal that it gets should this process be killed.
    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=_opened(log),
        cwd=folder,
        env={**inherited(), **(environment or {})},
        start_new_session=True,
        preexec_fn=functools.partial(_end_with_parent, tether),
    )
    try:
        yield child
    finally:
        await _end(child)


def inherited() -> dict[str, str]:
    """Leave out the reader's own settings: they must not change what is measured."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GOLLAMA_")}
    return clean | {"GOLLAMA_CONFIG": os.devnull}


def _opened(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


async def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(GRACE):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()


async def until_answered(
    port: int, bearer: str, child: asyncio.subprocess.Process, log: Path
) -> None:
    """Wait until a chat completion is answered with 200.

    Raises:
        BenchmarkError: when it ended, or was not ready in time.
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
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_WITHIN):
            while child.returncode is None:
                with contextlib.suppress(OSError):
                    status = await _status(port, request.encode())
                if status.startswith(b"HTTP/1.1 200 "):
                    return
                await asyncio.sleep(LOOK_EVERY)
    what = "is not ready" if child.returncode is None else "ended"
    raise BenchmarkError(f"{log.stem} {what}: {status.decode()}; {last_words(log)}")


async def until(what: str, ask: Callable[[], Awaitable[bool]], limit: float) -> None:
    """Ask a child again and again until it says yes.

    Raises:
        BenchmarkError: when it is gone, or did not in so many seconds.
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
    """Get a page in one piece, whatever its status."""
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
    """Return the end of what a child wrote to stderr."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-5:]) or "no word on stderr"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
