"""The hub with its Python frames counted: `python -m tests.fakes.frames serve …`.

A frame is one call of a Python function, or one resumption of a coroutine or generator.
It measures cost in the same way on every machine, busy or not.  Only the thread of the
event loop is counted.  `FRAMES_SOCKET` names a Unix socket on which another process
reads the counts; `count_frames` does that around a request.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import uvloop

_VARIABLE = "FRAMES_SOCKET"
_QUIET_ROUNDS = 10  # iterations of the event loop behind a request, 1 ms apart


class Cost(NamedTuple):
    """The frames of one request, by function."""

    calls: Counter[str]

    @property
    def frames(self) -> int:
        return self.calls.total()

    @property
    def ours(self) -> int:
        """Count the frames of this program alone."""
        return sum(n for name, n in self.calls.items() if "gollama_proxy/" in name)

    def table(self) -> str:
        """List the functions, the most frequent first."""
        lines = [f"{n:5} {name}" for name, n in self.calls.most_common()]
        return "\n".join(
            [f"{self.frames} frames, {self.ours} of gollama_proxy", *lines]
        )


def listening_at(path: Path) -> dict[str, str]:
    """Return the environment of a hub whose counts are read at this path."""
    return {_VARIABLE: str(path)}


async def count_frames(
    path: Path, request: Callable[[], Awaitable[object]], *, times: int = 15
) -> Cost:
    """Make a request `times` times, and return the least of their costs.

    Make a few before, so that caches are filled.  What the hub does in the background
    falls into some of the requests, and into more of them on a slow machine.
    """
    costs = []
    before = await _read(path)
    for _ in range(times):
        await request()
        after = await _read(path)
        costs.append(Cost(after - before))
        before = after
    return min(costs, key=lambda cost: cost.frames)


async def _read(path: Path) -> Counter[str]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    counts = Counter(json.loads(await reader.read()))
    writer.close()
    return counts


# --- In the hub's process ---------------------------------------------------------


class _Frames:
    """Counts the frames of the thread that starts it."""

    def __init__(self) -> None:
        self._calls: Counter[CodeType] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._new_loop = uvloop.new_event_loop

    def __repr__(self) -> str:
        return f"<_Frames of {len(self._calls)} functions>"

    def start(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        uvloop.new_event_loop = self._make_loop  # type: ignore[assignment]

    def _count(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._calls[frame.f_code] += 1

    def _make_loop(self) -> asyncio.AbstractEventLoop:
        self._loop = self._new_loop()
        sys.setprofile(self._count)  # not before: imports would take four times as long
        return self._loop

    def _serve(self, listener: socket.socket) -> None:
        while True:
            peer, _ = listener.accept()
            with peer:
                self._wait_until_quiet()
                named: Counter[str] = Counter()
                for code, calls in self._calls.copy().items():
                    named[_name(code)] += calls
                peer.sendall(json.dumps(named).encode())

    def _wait_until_quiet(self) -> None:
        """Let the event loop finish what it has; this leaves no frame there."""
        assert self._loop is not None
        turn = threading.Lock()
        turn.acquire()
        for _ in range(_QUIET_ROUNDS):
            self._loop.call_soon_threadsafe(turn.release)
            turn.acquire()
            time.sleep(0.001)


def _name(code: CodeType) -> str:
    place = Path(code.co_filename)
    folders = (
        place.parts[-3:] if "gollama_proxy" in place.parts[-3:] else place.parts[-2:]
    )
    return f"{'/'.join(folders)}:{code.co_qualname}"


if __name__ == "__main__":
    _Frames().start(os.environ[_VARIABLE])
    from gollama_proxy.cli import main
    from gollama_proxy.control import events
    from gollama_proxy.fleet import health
    from gollama_proxy.scheduling import reports
    from gollama_proxy.state import shared
    from gollama_proxy.telemetry import logs

    # On a busy machine, what is done once a second would be a part of each request, and
    # so would be the writing of lines, which many requests share.
    health.PERIOD = events.EVERY = logs.DELAY = 3600.0
    reports.PERIOD = shared.PERIOD = 3600.0
    sys.exit(main(sys.argv[1:]))
