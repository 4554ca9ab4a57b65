"""When sleeping machines are woken, and for how long requests wait for them.

Theory of operation
===================

A machine is woken with a Wake-on-LAN packet, for one of two reasons:

* a request needs a model for which no worker is available, and a sleeping one has it
  (a worker that sleeps keeps the list of its models);
* requests wait for slots, and the expected wait is longer than the machine takes to
  wake.  That time is learnt; until then it is taken to be `UNKNOWN` seconds.

One machine is woken at a time for a model: the one that is up first.  The packet may
get lost, so it is repeated while the worker is WAKING.  After `wake.timeout` seconds
without a good health check it is given up, and not tried again for `wake.pause`
seconds, twice as long after each further failure.  A machine that wakes without help
is not affected by any of this: its health checks succeed.

There are no sockets here: `send` sends the packet of a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gollama_proxy.config.settings import Wake
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker

logger = logging.getLogger(__name__)

UNKNOWN = 60.0  # seconds that a machine takes to wake, until it has done so once
REPEAT = 5.0  # seconds between two packets
LONGEST_PAUSE = 3600.0
GAIN = 0.5  # with which a new time to wake counts

_PENDING = (WorkerState.WAKING, WorkerState.LOADING)


@dataclass(slots=True)
class _Sleeper:
    """What is known of a machine that can be woken; moments in monotonic seconds."""

    seconds: float | None = None  # that it takes to wake
    woken_at: float | None = None  # while it is being woken, or loads its model
    sent_at: float = 0.0
    failures: int = 0  # in a row
    rests_until: float = 0.0


class Waker(Listener):
    """Decides which machines are woken.  `clock` returns monotonic seconds."""

    def __init__(
        self, settings: Wake, send: Callable[[Worker], None], clock: Callable[[], float]
    ) -> None:
        """`send` sends a packet to the machine of a worker; it may raise OSError."""
        self._settings = settings
        self._send = send
        self._clock = clock
        self._sleepers: dict[Worker, _Sleeper] = {}

    def __repr__(self) -> str:
        waking = sum(each.woken_at is not None for each in self._sleepers.values())
        return f"<Waker waking={waking}>"

    def reconfigure(self, settings: Wake) -> None:
        """Take other settings, also for machines that are being woken."""
        self._settings = settings

    # --- The fleet ----------------------------------------------------------------

    def changed(self, worker: Worker) -> None:
        """Learn from a machine that was woken and now serves requests."""
        sleeper = self._sleepers.get(worker)
        if sleeper is None or sleeper.woken_at is None:
            return
        if worker.state is WorkerState.READY:
            took = self._clock() - sleeper.woken_at
            before = took if sleeper.seconds is None else sleeper.seconds
            sleeper.seconds = before + GAIN * (took - before)
            sleeper.woken_at, sleeper.failures, sleeper.rests_until = None, 0, 0.0
            logger.info("worker %s: woke within %.0f s", worker.name, took)
        elif worker.state not in _PENDING:
            sleeper.woken_at = None

    def gone(self, worker: Worker) -> None:
        self._sleepers.pop(worker, None)

    # --- What requests need -------------------------------------------------------

    def expected(
        self, pool: Pool, suits: Callable[[Worker], bool] = bool
    ) -> Worker | None:
        """Return a worker of a pool that is being woken and suits, if there is one."""
        now, limit = self._clock(), self._settings.timeout
        for worker in pool.workers:
            sleeper = self._sleepers.get(worker)
            if sleeper is None or sleeper.woken_at is None:
                continue
            if worker.state not in _PENDING or now >= sleeper.woken_at + limit:
                continue
            if suits(worker):
                return worker
        return None

    def wake_for(
        self, pool: Pool, suits: Callable[[Worker], bool] = bool
    ) -> Worker | None:
        """Wake a machine for a model, unless one is on its way; None if none can be.

        Only workers that suit the request are considered.
        """
        worker = self.expected(pool, suits)
        if worker is not None:
            return worker
        for worker in self._wakeable(pool, suits):
            if self.wake(worker):
                return worker
        return None

    def would_wake(
        self, pool: Pool, suits: Callable[[Worker], bool] = bool
    ) -> Worker | None:
        """Return what `wake_for` would, if packets can be sent; wake nothing."""
        able = self._wakeable(pool, suits)
        return self.expected(pool, suits) or next(iter(able), None)

    def _wakeable(self, pool: Pool, suits: Callable[[Worker], bool]) -> list[Worker]:
        """Return the workers of a pool that may be woken, the quickest first."""
        now = self._clock()
        able = [
            worker
            for worker in pool.workers
            if worker.state is WorkerState.ASLEEP
            and worker.sleeps
            and self._sleeper(worker).rests_until <= now
            and suits(worker)
        ]
        return sorted(able, key=self._seconds)

    def refusal(self, workers: Iterable[Worker]) -> str:
        """Return why sleeping machines are not woken for a request; "" if none is."""
        now = self._clock()
        names = [
            worker.name
            for worker in workers
            if worker.state is WorkerState.ASLEEP
            and self._sleeper(worker).rests_until > now
        ]
        if not names:
            return ""
        return f" {', '.join(names)} did not wake within {self._settings.timeout:g} s."

    def wake(self, worker: Worker) -> bool:
        """Wake the machine of a worker that is asleep; return whether a packet left."""
        sleeper = self._sleeper(worker)
        sleeper.woken_at = self._clock()
        if not self._send_to(worker, sleeper):
            sleeper.woken_at = None
            self._rest(sleeper)
            return False
        worker.woken()
        return True

    # --- Once a second ------------------------------------------------------------

    def check(
        self, waiting: Iterable[tuple[Pool, float | None]], workers: Iterable[Worker]
    ) -> None:
        """Give up what did not wake, and wake what would shorten a wait.

        `waiting` are the pools for which requests wait, and for how many seconds a new
        one would (None: not known).
        """
        now = self._clock()
        for worker in workers:
            if worker.state is WorkerState.ASLEEP:
                for pool in list(worker.pools):
                    if pool.missed and not pool.able:
                        self.wake_for(pool)
                    pool.missed = False
        for worker, sleeper in self._sleepers.items():
            if sleeper.woken_at is None:
                continue
            if now - sleeper.woken_at >= self._settings.timeout:
                self._give_up(worker, sleeper)
            elif now - sleeper.sent_at >= REPEAT and (
                worker.state is WorkerState.WAKING
            ):
                self._send_to(worker, sleeper)
        for pool, wait in waiting:
            asleep = [w for w in pool.workers if w.state is WorkerState.ASLEEP]
            if wait is not None and asleep and wait > min(map(self._seconds, asleep)):
                self.wake_for(pool)

    def _give_up(self, worker: Worker, sleeper: _Sleeper) -> None:
        sleeper.woken_at = None
        if worker.state is not WorkerState.WAKING:
            return  # it is awake, and still loads its model
        self._rest(sleeper)
        worker.given_up(f"did not wake within {self._settings.timeout:g} s")

    def _rest(self, sleeper: _Sleeper) -> None:
        pause = self._settings.pause * 2.0 ** min(sleeper.failures, 20)
        sleeper.failures += 1
        longest = max(LONGEST_PAUSE, self._settings.pause)
        sleeper.rests_until = self._clock() + min(pause, longest)

    def _send_to(self, worker: Worker, sleeper: _Sleeper) -> bool:
        sleeper.sent_at = self._clock()
        try:
            self._send(worker)
        except OSError as exc:
            why = exc.strerror or exc
            logger.warning("worker %s: cannot be woken: %s", worker.name, why)
            return False
        return True

    def _seconds(self, worker: Worker) -> float:
        known = self._sleeper(worker).seconds
        return UNKNOWN if known is None else known

    def _sleeper(self, worker: Worker) -> _Sleeper:
        return self._sleepers.setdefault(worker, _Sleeper())
