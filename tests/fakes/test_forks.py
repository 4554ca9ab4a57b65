"""A fork is like a process that Python has just started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from tests.fakes import forks

_SHOW = """
import gc, json, os, signal, sys, threading
handlers = [str(signal.getsignal(n)) for n in (2, 13, 15, 17)]
found = {
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(),
    "environ": {**os.environ},
    "name": __name__, "gc": [gc.isenabled(), gc.get_freeze_count()],
    "threads": threading.active_count(), "input": sys.stdin.read(),
    "handlers": handlers, "mask": str(signal.pthread_sigmask(0, [])),
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "stdout": [sys.stdout.line_buffering, sys.stderr.line_buffering],
}
print(json.dumps(found), file=sys.stderr)
sys.exit(3)
"""


async def test_a_fork_is_like_a_start(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(_SHOW)
    environ = os.environ | {"A": "b"}
    fork = await forks.start("shown", "x", "-y", environ=environ, cwd=tmp_path)
    assert fork.stderr is not None
    forked = json.loads(await fork.stderr.read())
    assert forked.pop("files") == [0, 1, 2]
    assert await fork.wait() == 3
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shown", "x", "-y"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
        cwd=tmp_path,
    )
    _, output = await process.communicate()
    started = json.loads(output)
    del started["files"]  # may have some of the tests' own
    assert forked == started


async def test_a_fork_that_is_killed_has_the_status_of_that(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import time\nprint(1, flush=True)\ntime.sleep(99)"
    )
    for number in (signal.SIGKILL, signal.SIGTERM):
        fork = await forks.start("waits", environ={}, cwd=tmp_path, both=True)
        assert fork.stdout is not None
        assert await fork.stdout.readline() == b"1\n"
        assert fork.returncode is None
        fork.send_signal(number)
        assert await fork.wait() == -number
        assert repr(fork) == f"<Process {fork.pid} status={-number}>"
