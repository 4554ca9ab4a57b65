"""Give processes turns on a small machine, as if each had a slower one to itself.

    python -m benchmarks.throttle PID PID PID

Three llama-servers that are busy on two cores take them from each other, from the proxy
in front of them and from its clients: a server that gets less to do makes the others
faster, and whoever reacts to the end of an answer comes late.  Nothing of that happens
where each has a machine of its own.  So they run in turns, two at a time, and stand
still in between: `TURN` seconds each, with a pause after all turns, by SIGSTOP and
SIGCONT.  Of three, each has 45 % of a core, whatever the others do.

The end of standard input ends it, and lets all of them run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

AT_ONCE = 2
TURN = 0.0045
PAUSE = 0.001


def turns(pids: list[int]) -> list[list[int]]:
    """Divide processes into those that run at once."""
    count = -(-len(pids) // AT_ONCE)
    return [pids[turn::count] for turn in range(count)]


def run(pids: list[int]) -> None:
    """Give the turns until standard input ends."""
    try:
        _tell(pids, signal.SIGSTOP)
        due = time.monotonic()
        while not select.select([sys.stdin], [], [], 0)[0]:
            for together in turns(pids):
                _tell(together, signal.SIGCONT)
                due += TURN
                _sleep_until(due)
                _tell(together, signal.SIGSTOP)
            due = max(due + PAUSE, time.monotonic())
            _sleep_until(due)
    finally:
        _tell(pids, signal.SIGCONT)


def _sleep_until(due: float) -> None:
    time.sleep(max(0.0, due - time.monotonic()))


def _tell(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    run([int(pid) for pid in sys.argv[1:]])
