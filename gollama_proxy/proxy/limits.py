"""The time limits of an attempt, and comments for clients that wait for its answer.

All attempts are checked once a second.  A short limit has a timer, so that it is exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gollama_proxy.fleet.lease import Lease
from gollama_proxy.proxy.failures import DrainedError
from gollama_proxy.proxy.response import Assembly, Stream
from gollama_proxy.proxy.state import Exchange, State
from gollama_proxy.tasks import held_up
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.schema import Ending

# Limits up to this many seconds have a timer.
SOON = 5.0
# Seconds without a byte of an answer, after which its worker's health is checked.
SUSPICIOUS = 5.0
# Seconds of silence before a client is notified that its prompt is being processed, and
# seconds between two such comments.
PROCESSING_AFTER, NOTICE_EVERY = 15.0, 5.0

_ON_WORKER = frozenset({State.WAITING, State.STREAMING})


class Limits:
    """Checks attempts.  `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def begin(self, x: Exchange, lease: Lease) -> asyncio.TimerHandle | None:
        """Set how long the first event may take; returns the timer of a short limit."""
        limit = x.config.timeouts.first_token
        if x.noticed_at or lease.loads:
            x.noticed_at, x.loading = 0.0, lease.loads
        if (x.body.stream or x.delivery is not None) and streams(x):
            worker, model = lease.worker, lease.model
            pace = worker.paces.get(model) or worker.pace_of(model)
            # Loading a model takes time, and would on another worker, too.
            hard = pace.expectations.hard
            allowed = hard if lease.loads else pace.allowance(x.body.size)
            lease.allowance = allowed
            limit = min(limit, allowed)
        if limit > SOON:
            return None

        def check() -> None:
            if not held_up(timer):  # else the next round checks it
                self.check(x, self._clock())

        timer = asyncio.get_running_loop().call_later(limit, check)
        return timer

    def check(self, x: Exchange, now: float) -> None:
        """End an attempt that has exceeded a limit."""
        lease, relay = x.lease, x.relay
        if lease is not None and now >= lease.worker.deadline and lease.result is None:
            if relay is not None and x.state in _ON_WORKER:
                relay.fail(DrainedError(lease.worker.name))
        elif x.state is State.WAITING:
            self._check_waiting(x, now)
        elif x.state is State.STREAMING:
            self._check_streaming(x, now)

    def _check_waiting(self, x: Exchange, now: float) -> None:
        """Check an attempt whose worker has not begun to answer."""
        relay, lease = x.relay, x.lease
        assert relay is not None, x
        assert lease is not None, x
        waited, worker = now - x.waiting_since, lease.worker
        limit = x.config.timeouts.first_token
        if waited >= limit:
            text = f"Worker {worker.name} sent nothing within {limit:g} s."
            relay.fail(WorkerError(Code.WORKER_TIMEOUT, text))
        elif streams(x):
            overdue = waited >= lease.allowance or worker.is_down
            if overdue and x.plan.has_other():
                text = f"Worker {worker.name} was too slow to begin."
                relay.fail(WorkerError(Code.WORKER_SLOW, text))
            else:
                self._notify_progress(x, waited)

    def _check_streaming(self, x: Exchange, now: float) -> None:
        """Check an answer that is being sent."""
        relay, lease = x.relay, x.lease
        assert relay is not None, x
        assert lease is not None, x
        timeouts = x.config.timeouts
        silent = relay.check(now, timeouts.gap, timeouts.silence)
        if silent > SUSPICIOUS:
            lease.worker.suspect()
        if lease.worker.is_down:
            relay.abandon()

    def _notify_progress(self, x: Exchange, waited: float) -> None:
        """Notify a client if its worker takes long to begin.

        It processes the prompt, or loads the model first, which may take longer.
        """
        notice = x.config.queue.notice
        if x.fed or not notice or not takes_comments(x):
            return
        interval = NOTICE_EVERY if x.begun else PROCESSING_AFTER
        if x.loading and not x.noticed_at:
            interval = notice
        if waited >= x.noticed_at + interval:
            x.noticed_at = waited
            try:
                notify_client(x, _progress(x))
            except ConnectionError:
                pass  # the client left, and the handler is being cancelled


def _progress(x: Exchange) -> str:
    """Describe what the worker does before it begins to answer."""
    if not x.loading or x.lease is None:
        return "processing"
    share = x.lease.worker.progress.get(x.lease.model)
    return "loading model" if share is None else f"loading model {share:.0%}"


def streams(x: Exchange) -> bool:
    """Whether a stream is requested from the worker."""
    if x.resume is not None or isinstance(x.delivery, Assembly):
        return True
    return x.body.stream and x.body.replayable


def takes_comments(x: Exchange) -> bool:
    """Whether the client reads events, so that it ignores comments."""
    events = x.endpoint.ending is not Ending.BODY
    return events and x.body.replayable and x.body.stream


def notify_client(x: Exchange, comment: str) -> None:
    """Send a comment to a waiting client.

    Raises:
        ConnectionResetError: the client has left.
    """
    if not isinstance(x.delivery, Stream):
        x.delivery = Stream(x)
    x.delivery.notify(comment)
