"""The only place that starts tasks: each has a name, is kept, and logs its failure.

And the main task of a command, which a signal ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# The event loop keeps only weak references: without another, a task may vanish.
_running: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
    """Start a task; the caller cancels it or waits for it.

    An error that ends the task is logged, even if nothing waits for it.
    """
    task = asyncio.create_task(coroutine, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("task %s failed", task.get_name(), exc_info=error)


async def ended(
    task: asyncio.Task[Any], *events: asyncio.Event, within: float | None = None
) -> bool:
    """Wait for a task; return False if an event comes first, or so many seconds pass.

    The task goes on then; the caller cancels it or waits for it.
    """
    waits = [spawn(each.wait(), f"end of {task.get_name()}") for each in events]
    try:
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait((task, *waits), timeout=within, return_when=first)
    finally:
        for each in waits:
            each.cancel()
    return task.done()


# Seconds by which a timer may be late before the event loop counts as held up.
PUNCTUAL = 0.1


def held_up(timer: asyncio.TimerHandle | asyncio.Timeout) -> float:
    """Return by how many seconds the event loop is late for a timer that is over.

    A loop that was busy for that long has not read its sockets either, and timers come
    before sockets.  So what the timer waited for may be there already.
    """
    due = timer.when()
    late = 0.0 if due is None else asyncio.get_running_loop().time() - due
    return late if late > PUNCTUAL else 0.0


class Periodic:
    """A task that runs a step again and again, whatever the step raises.

    The step returns the seconds to wait before it runs again, or None for the usual
    period.  `wake` ends a wait early; if it is called during a step, the next step
    follows without a wait.  `late` is by how many seconds the current step began late.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[float | None]],
        period: float,
        *,
        delay: float | None = None,
    ) -> None:
        """Prepare the task: nothing runs before `start`.

        `period` is the usual wait, and the one after a failure; `delay` is the wait
        before the first step, `period` by default.  All in seconds.
        """
        self.late = 0.0
        self._name = name
        self._step = step
        self._period = period
        self._delay = period if delay is None else delay
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "stopped" if self._task is None else "running"
        return f"<Periodic {self._name} {state}>"

    def start(self) -> None:
        self._task = spawn(self._run(), self._name)

    async def stop(self) -> None:
        """Cancel the step if it is running, and wait for it; harmless when stopped."""
        task = self._task
        self.cancel()
        if task is not None:
            await asyncio.wait([task])

    def cancel(self) -> None:
        """Cancel the step if it is running; it ends soon."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def wake(self) -> None:
        """Run the step now, or once more as soon as the current run returns."""
        self._woken.set()

    async def _run(self) -> None:
        wait = self._delay
        while True:
            await self._sleep(wait)  # also for no time: others run in between
            self._woken.clear()
            wait = self._period
            try:
                answer = await self._step()
            except Exception:
                logger.exception("%s failed; it runs again in %g s", self._name, wait)
            else:
                wait = self._period if answer is None else answer

    async def _sleep(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
            self.late = 0.0
        except TimeoutError:
            self.late = max(0.0, loop.time() - due)


# --- The main task ----------------------------------------------------------------


CUT = signal.SIGUSR1  # of a parent
# Seconds after a SIGTERM in which another one is the same request.
SAME = 1.0


class Signals:
    """The first SIGINT or SIGTERM requests the end, the second one forces it.

    SIGHUP has the settings read again, as in other services.  In a terminal it means
    that the terminal was closed, and requests the end.  `clock` returns monotonic
    seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self.reload: Callable[[], object] | None = None  # while the hub runs
        self._led = False  # by a parent, see `follow_parent`
        self._clock = clock
        self._terminated_at = -math.inf  # when SIGTERM last counted

    def receive(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
        elif not self._led:
            self.insisted.set()

    def terminate(self) -> None:
        """Receive SIGTERM, which may come twice for one request.

        `timeout` sends it to a command and to the group that the command is in, and
        `make` passes on what its group has got as well.
        """
        now = self._clock()
        if now - self._terminated_at >= SAME:
            self._terminated_at = now
            self.receive()

    def follow_parent(self) -> None:
        """Have the end forced by `CUT` of the parent, and by no second signal.

        A service manager may send SIGTERM to the parent and to this process, to which
        the parent sends another one.
        """
        self._led = True
        asyncio.get_running_loop().add_signal_handler(CUT, self.insisted.set)

    def hang_up(self) -> None:
        if self.reload is None or (sys.stdin is not None and sys.stdin.isatty()):
            self.receive()
        else:
            self.reload()

    def __repr__(self) -> str:
        asked, insisted = self.asked.is_set(), self.insisted.is_set()
        return f"<Signals asked={asked} insisted={insisted}>"


def run(command: Callable[[Signals], Coroutine[Any, Any, int]]) -> int:
    """Run a command on uvloop, with signals; return its exit status."""
    import uvloop

    async def with_signals() -> int:
        loop, signals = asyncio.get_running_loop(), Signals()
        handlers = {
            signal.SIGINT: signals.receive,
            signal.SIGTERM: signals.terminate,
            signal.SIGHUP: signals.hang_up,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            return await command(signals)
        finally:
            for number in handlers:  # closing a uvloop does not remove them
                loop.remove_signal_handler(number)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(with_signals())
