"""`gollama-proxy`, with each callback timed: `python -m tests.fakes.probed serve …`.

Processor time of the thread and not the clock on the wall: what a busy machine does
meanwhile is nothing that the hub could help.  uvloop does not show its callbacks,
so the hub runs on the event loop of the standard library.  How many there were and the
longest one are written to the file that `PROBE_FILE` names when the hub has ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from gollama_proxy import serve as lifecycle
from gollama_proxy.cli import main


class Probe:
    """Times every callback from `start` on."""

    def __init__(self) -> None:
        self.longest = 0.0  # seconds
        self.culprit = ""
        self.calls = 0
        self._run = asyncio.Handle._run  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<Probe longest={self.longest:.4f} s of {self.calls}>"

    def start(self) -> None:
        run = self._run

        def timed(handle: asyncio.Handle) -> None:
            before = time.thread_time()
            run(handle)
            taken = time.thread_time() - before
            self.calls += 1
            if taken > self.longest:
                self.longest, self.culprit = taken, repr(handle)

        asyncio.Handle._run = timed  # type: ignore[attr-defined]


def run() -> int:
    probe, front = Probe(), lifecycle.front

    async def probed(signals: Any, config: Any, announce: Any, *more: Any) -> int:
        async def announced(hub: Any) -> None:
            await announce(hub)
            probe.start()  # behind the start, which reads files and may take its time

        return await front(signals, config, announced, *more)

    lifecycle.front = probed
    uvloop.new_event_loop = asyncio.SelectorEventLoop  # type: ignore
    status = main(sys.argv[1:])
    text = f"{probe.calls} {probe.longest} {probe.culprit}"
    Path(os.environ["PROBE_FILE"]).write_text(text)
    return status


if __name__ == "__main__":
    sys.exit(run())
