"""Let processes take turns on a small machine, as if each had a slower one to itself.

    python -m benchmarks.throttle PID PID PID

Three busy llama-servers on two cores compete with each other, with the proxy and with
its clients: when one server has less to do, the others get faster, and the proxy reacts
late to the end of an answer.  None of that happens where each server has its own
machine.  So they run in turns, two at a time, for `TURN` seconds each, with a pause
after all turns, by SIGSTOP and SIGCONT.  Each of three has 45 % of a core, whatever the
others do.

When standard input is closed, all of them run again.
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
    """Divide processes into groups that run at once."""
    count = -(-len(pids) // AT_ONCE)
    return [pids[turn::count] for turn in range(count)]


def run(pids: list[int]) -> None:
    """Let them take turns until standard input is closed."""
    try:
        _signal(pids, signal.SIGSTOP)
        due = time.monotonic()
        while not select.select([sys.stdin], [], [], 0)[0]:
            for together in turns(pids):
                _signal(together, signal.SIGCONT)
                due += TURN
                _sleep_until(due)
                _signal(together, signal.SIGSTOP)
            due = max(due + PAUSE, time.monotonic())
            _sleep_until(due)
    finally:
        _signal(pids, signal.SIGCONT)


def _sleep_until(due: float) -> None:
    time.sleep(max(0.0, due - time.monotonic()))


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    run([int(pid) for pid in sys.argv[1:]])
