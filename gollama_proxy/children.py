"""Child processes that end with this one, whatever way it ends.

While this process can act, it sends them SIGTERM, and SIGKILL 3 s later.  When it was
killed itself, Linux does it: each child asked for SIGKILL at its parent's death.  Other
systems have no such request: there the children stay after a `kill -9` of this process,
or the end of its terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

GRACE = 3.0  # llama-server has no drain: it may wait for its clients forever

# A program of its own that turns into the child's: a preexec_fn would run Python in a
# fork of a process with threads, where a lock that another thread held stays locked.
# The request is bound to the thread that forks: the main one, which runs the event loop
# and lives as long as the process.  A parent that died before the request was made
# sends no signal any more, hence `getppid`.
_TETHER = """
import os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


class ChildError(Exception):
    """Why a child does not run; the text is for the person in front of the parent."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Child:
    """One process, with its output in a file; `name` is what it is called there."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log: Path
    ) -> None:
        self.name = name
        self.process = process
        self.log = log

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.process.pid} log={str(self.log)!r}>"

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str]
    ) -> Self:
        """Start a program, whose path comes first; call this from the main thread."""
        tether = [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid())]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *tether,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environ),  # uvloop takes nothing else
                start_new_session=True,  # Ctrl-C is for us, who end them in order
            )
        return cls(name, process, log)

    def check(self) -> None:
        """Raise what there is to know once the process has ended."""
        status = self.process.returncode
        if status is None:
            return
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        lines = self.log.read_text(errors="replace").splitlines()[-10:]
        text = f"{self.name} ended with {how}; from {self.log}:"
        raise ChildError("\n  ".join([text, *lines]), 1)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self) -> None:
        """Ask the process to end, and insist after `GRACE`."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), GRACE)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
