"""What has happened: the requests that have ended, and a sample of each second.

The last `KEPT` requests are kept, without content, as plain tuples: a request costs
half a microsecond for that.  Once a second, `History` makes a sample of those that have
ended since, of those that run, and of the workers; the samples of the last quarter of
an hour are kept.  So a page that is opened after the trouble still shows it.
"""

from __future__ import annotations

import enum
import math
import time
from array import array
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

from gollama_proxy.fleet.breaker import BreakerState
from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.telemetry.accesslog import Outcome, Record, Step
from gollama_proxy.wire.schema import ENDPOINTS

Shown = dict[str, Any]

KEPT = 1000  # requests
SAMPLES = 900  # that are kept
EVERY = 1.0  # seconds between two samples

# --- Requests that have ended -----------------------------------------------------

_FIELDS = (
    *("id", "ended", "subject", "remote", "method", "route", "model", "worker"),
    *("status", "outcome", "error", "attempts", "rescued", "fell_back", "queued"),
    *("first_byte", "duration", "tokens", "prompt_tokens", "cached_tokens"),
    *("bytes", "trace"),
    # Not shown as they are.
    *("started", "detail", "steps"),
)
_ENDED, _DURATION, _OUTCOME, _ERROR, _STATUS = map(
    _FIELDS.index, ("ended", "duration", "outcome", "error", "status")
)


class Recent:
    """The last requests."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ended: deque[tuple[Any, ...]] = deque(maxlen=kept)
        self.count = 0  # of all, since the start

    def __repr__(self) -> str:
        return f"<Recent requests={len(self._ended)}>"

    def add(self, x: Record) -> None:
        """Keep what is known of a request for workers that has ended."""
        if x.route not in ENDPOINTS:
            return
        self.count += 1
        # In the order of `_FIELDS`; a tuple costs less than any object with names.
        self._ended.append(
            (
                x.id,
                time.time(),
                x.subject,
                x.remote,
                x.method,
                x.route,
                x.model,
                x.worker,
                x.status,
                x.outcome,
                x.error,
                x.attempts,
                x.rescued,
                x.fell_back,
                x.queued,
                x.first_byte,
                x.duration,
                x.tokens,
                x.prompt_tokens,
                x.cached_tokens,
                x.bytes,
                "" if x.trace is None else x.trace.trace_id,
                x.started,
                x.detail,
                x.steps,
            )
        )

    def find(
        self,
        limit: int = KEPT,
        since: float = 0.0,
        until: float = math.inf,
        **wanted: str,
    ) -> list[Shown]:
        """Return the last requests with these values, the newest first.

        Of those that ran at some time between `since` and `until`, in Unix seconds.  An
        `outcome` may also be the code of an error, and a `worker` one that failed.
        """
        found: list[Shown] = []
        for entry in reversed(self._ended):
            ended, duration = entry[_ENDED], entry[_DURATION] or 0.0
            if (
                ended >= since
                and ended - duration <= until
                and all(_has(entry, name, value) for name, value in wanted.items())
            ):
                found.append(_shown(entry))
                if len(found) >= limit:
                    break
        return found

    def since(self, count: int) -> Iterator[tuple[Any, ...]]:
        """Return the requests that have ended since the count was this one.

        Of more than are kept, the last ones.
        """
        return islice(reversed(self._ended), self.count - count)


def _has(entry: tuple[Any, ...], name: str, value: str) -> bool:
    if name == "outcome":
        return value in (entry[_OUTCOME], entry[_ERROR])
    if name == "worker" and any(step.worker == value for step in entry[-1]):
        return True
    return bool(entry[_FIELDS.index(name)] == value)


def _shown(entry: tuple[Any, ...]) -> Shown:
    request = dict(zip(_FIELDS, entry, strict=True))
    request |= {
        "ended": round(request["ended"], 3),
        "outcome": request["outcome"] or "",
        "steps": shown_steps(_steps_of(request)),
    }
    for name in ("queued", "first_byte", "duration"):
        if request[name] is not None:
            request[name] = round(request[name], 6)
    del request["started"], request["detail"]
    return request


def shown_steps(steps: Iterable[Step]) -> list[Shown]:
    return [each._asdict() | {"at": round(each.at, 6)} for each in steps]


def _steps_of(request: Shown) -> list[Step]:
    """Return what happened to a request; most have only an attempt and an end."""
    steps, worker = [*request["steps"]], request["worker"]
    if not steps and request["attempts"]:
        steps = [Step(request["queued"], "attempt", worker)]
    outcome, reason = request["outcome"], request["error"]
    if outcome in _ENDINGS:
        reason = _ENDINGS[outcome]
    elif request["detail"]:
        reason += f": {request['detail']}"
    return [*steps, Step(request["duration"] or 0.0, "ended", worker, reason)]


_ENDINGS = {
    Outcome.COMPLETE: "the answer is complete",
    Outcome.REFUSED: "the client got the error of the worker",
    Outcome.CLIENT_GONE: "the client left",
}


# --- A sample of each second ------------------------------------------------------


class RunningSample(NamedTuple):
    """A request for workers that has no outcome yet, as a sample needs it."""

    id: str
    started: float
    route: str
    worker: str
    first_byte: float | None
    tokens: int


# The figures that are kept of the hub, and those of each worker besides its states.
OF_HUB = (
    *("requests", "errors", "running", "waiting", "tokens_per_second"),
    *("first_token_p50", "first_token_p95"),
)
_STATES = (
    WorkerState.READY,
    *(state for state in WorkerState if state is not WorkerState.READY),
)
_BREAKERS = (
    BreakerState.CLOSED,
    *(state for state in BreakerState if state is not BreakerState.CLOSED),
)
OF_WORKER = ("running", "tokens_per_second", "first_token_p50", "first_token_p95")
_KINDS = {"state": _STATES, "breaker": _BREAKERS, **dict.fromkeys(OF_WORKER)}
_PICK = itemgetter(
    *map(
        _FIELDS.index,
        ("id", "started", "route", "worker", "first_byte", "tokens"),
    )
)


class History:
    """The samples of the last quarter of an hour, of the hub and of each worker.

    `requests` and `errors` are of those that have ended in the second; an error is one
    that its client cannot avoid, so neither a mistake in the request (4xx) nor a client
    that left.  `first_token_p50` and `first_token_p95` are in milliseconds, of the
    answers that have begun in the second.  None: not known.  `clock` gives monotonic
    seconds.
    """

    def __init__(self, recent: Recent, clock: Callable[[], float]) -> None:
        self._recent = recent
        self._clock = clock
        self._taken = 0  # samples, those that were missed included
        self._at = clock()  # when the last one was taken
        self._counted = recent.count
        # The tokens of each answer that had begun, and of failed attempts before one.
        self._seen: dict[tuple[str, float], int] = {}
        self._failed: dict[tuple[str, float], int] = {}
        self._hub = _Track(dict.fromkeys(OF_HUB), 1)
        self._workers: dict[str, _Track] = {}
        self.time = round(time.time(), 3)  # of the last sample, in Unix seconds
        self.latest: Shown = dict.fromkeys(OF_HUB)
        self._shown: dict[str, Shown] = {}  # the latest figures of each worker

    def __repr__(self) -> str:
        return f"<History samples={self._taken} workers={len(self._workers)}>"

    # --- Taking one ---------------------------------------------------------------

    def take(
        self,
        running: Collection[RunningSample],
        waiting: int,
        workers: Sequence[Worker],
    ) -> list[Shown]:
        """Take a sample; return the figures of the workers that have changed."""
        now = self._clock()
        seconds = now - self._at
        # A machine that slept, or an event loop that was held up, has missed some.
        for _ in range(min(int(seconds / EVERY - 0.5), SAMPLES)):
            self._skip()
        self._taken += 1
        self._at, self.time = now, round(time.time(), 3)
        ended = self._recent.count - self._counted
        errors, tokens, begun = self._compare(running)
        rate = 1.0 / (seconds if seconds > 0.0 else EVERY)
        changed = [
            self._shown[worker.name]
            for worker in workers
            if self._note(
                worker,
                round(tokens.get(worker.name, 0) * rate, 1),
                begun.get(worker.name, ()),
            )
        ]
        if len(self._workers) > len(workers):
            self._forget({worker.name for worker in workers})
        firsts = [first for each in begun.values() for first in each]
        speed = round(sum(tokens.values()) * rate, 1)
        figures = (
            *(ended, errors, len(running), waiting, speed),
            *percentiles(firsts),
        )
        self._hub.put(self._taken, figures)
        self.latest = dict(zip(OF_HUB, figures, strict=True))
        return changed

    def _skip(self) -> None:
        self._taken += 1
        for track in (self._hub, *self._workers.values()):
            track.put(self._taken, _NOTHING)

    def _compare(
        self, running: Iterable[RunningSample]
    ) -> tuple[int, dict[str, int], dict[str, list[float]]]:
        """Compare the requests with those of the last sample.

        Returns the number of errors, and for each worker the tokens that it has
        generated since, and the seconds after which its answers have begun.
        """
        before, self._seen = self._seen, {}
        failed_before, self._failed = self._failed, {}
        tokens: dict[str, int] = {}
        begun: dict[str, list[float]] = {}

        def count(x: RunningSample) -> None:
            key = x.id, x.started
            known = before.get(key)
            counted = failed_before.get(key, 0) if known is None else known
            if x.tokens > counted:
                tokens[x.worker] = tokens.get(x.worker, 0) + x.tokens - counted
            begins = x.first_byte is not None and known is None
            if begins and ENDPOINTS[x.route].generates:
                begun.setdefault(x.worker, []).append(x.first_byte or 0.0)

        errors = 0
        for entry in self._recent.since(self._counted):
            count(RunningSample(*_PICK(entry)))
            failed = entry[_OUTCOME] is Outcome.ERROR
            errors += failed and not 400 <= entry[_STATUS] < 500
        self._counted = self._recent.count
        for x in running:
            count(x)
            if x.first_byte is not None:
                self._seen[x.id, x.started] = x.tokens
            elif x.tokens:
                self._failed[x.id, x.started] = x.tokens
        return errors, tokens, begun

    def _note(self, worker: Worker, speed: float, firsts: Collection[float]) -> bool:
        """Note the figures of a worker; return whether one of them has changed."""
        name = worker.name
        figures = (worker.in_flight, speed, *percentiles(firsts))
        track = self._workers.get(name)
        if track is None:
            track = self._workers[name] = _Track(_KINDS, self._taken)
        state, breaker = worker.state, worker.breaker.state
        if not track.put(
            self._taken, (state, breaker, *figures, worker.held, worker.slots)
        ):
            return False
        self._shown[name] = _present(worker) | dict(
            zip(OF_WORKER, figures, strict=True)
        )
        return True

    def _forget(self, names: set[str]) -> None:
        """Forget all workers but these."""
        for name in self._workers.keys() - names:
            del self._workers[name]
            self._shown.pop(name, None)

    # --- Reading ------------------------------------------------------------------

    def present(self, workers: Iterable[Worker]) -> list[Shown]:
        """Return what is known of workers now, with the figures of the last sample."""
        idle = {**dict.fromkeys(OF_WORKER), "tokens_per_second": 0.0}
        return [self._shown.get(each.name, idle) | _present(each) for each in workers]

    @property
    def names(self) -> list[str]:
        """The workers that have samples."""
        return [*self._workers]

    def of_hub(self, seconds: int, step: int) -> Shown:
        """Return the columns of the hub, the oldest first: a value for `step` seconds.

        That is the mean of the samples of these seconds, and of the 95th percentiles
        the highest one.
        """
        return self._hub.columns(self._taken, self._within(seconds), step)

    def of_worker(self, name: str, seconds: int, step: int) -> Shown | None:
        """Return the columns of a worker, as `of_hub`; None if there is none.

        Of its states, one that is not as it should be counts for all `step` seconds.
        """
        track = self._workers.get(name)
        if track is None:
            return None
        return track.columns(self._taken, self._within(seconds), step)

    def _within(self, seconds: int) -> int:
        """Return how many samples are shown."""
        return min(seconds, self._taken, SAMPLES)


def _present(worker: Worker) -> Shown:
    return {
        "name": worker.name,
        "state": worker.state.value,
        "hold": worker.held.value,
        "breaker": worker.breaker.state.value,
        "slots": worker.slots,
        "running": worker.in_flight,
    }


class _Track:
    """The values of a quarter of an hour, in rings of a few bytes each.

    Numbers have four bytes, where NaN is none, and members of an enum have one.  A
    value that stays is written when it is needed: most workers are idle for most of the
    time.
    """

    def __init__(
        self, kinds: Mapping[str, Sequence[enum.Enum] | None], at: int
    ) -> None:
        """Make one for columns of these names, whose first sample has the number `at`.

        Each is of numbers (None), or of members of an enum, the usual one first.
        """
        self._kinds = kinds
        self._columns = [
            array("f", [math.nan]) * SAMPLES
            if members is None
            else array("B", [0]) * SAMPLES
            for members in kinds.values()
        ]
        self._last: tuple[Any, ...] = _NOTHING
        self._written = at - 1

    def __repr__(self) -> str:
        return f"<Track of {', '.join(self._kinds)}>"

    def put(self, at: int, values: tuple[Any, ...]) -> bool:
        """Note the values of a sample; return whether they differ from the last ones.

        There may be more values than columns.
        """
        if values == self._last:
            return False
        self._write(at - 1)
        self._last = values
        return True

    def _write(self, at: int) -> None:
        """Write the last values up to the sample with this number."""
        count = min(at - self._written, SAMPLES)
        begin = (at - count + 1) % SAMPLES
        behind = max(begin + count - SAMPLES, 0)  # these are at the front of the ring
        for members, column, value in zip(
            self._kinds.values(), self._columns, self._last, strict=False
        ):
            if members is not None:
                value = 0 if value is None else members.index(value) + 1
            elif value is None:
                value = math.nan
            values = array(column.typecode, [value])
            column[begin : begin + count - behind] = values * (count - behind)
            column[:behind] = values * behind
        self._written = at

    def columns(self, at: int, count: int, step: int) -> Shown:
        """Return the last values up to a sample, by name: one for each `step`."""
        self._write(at)
        columns: Shown = {}
        for (name, members), ring in zip(
            self._kinds.items(), self._columns, strict=True
        ):
            values = _newest(ring, count, at % SAMPLES + 1)
            if members is None:
                columns[name] = _summed(values, step, highest="p95" in name)
            else:
                columns[name] = _words(values, step, members)
        return columns


_NOTHING = (None,) * 9


def _newest(ring: array[Any], count: int, end: int) -> array[Any]:
    """Return the last entries of a ring before `end`, the oldest first."""
    if count <= end:
        return ring[end - count : end]
    return ring[end - count :] + ring[:end]


def _summed(values: array[float], step: int, *, highest: bool) -> list[float | None]:
    """Return a value for every `step` of them; the last group is complete."""
    if step == 1:
        return [None if each != each else _short(each) for each in values]
    summed: list[float | None] = []
    for group in _groups(values, step):
        known = [each for each in group if each == each]
        value = None
        if known:
            value = max(known) if highest else sum(known) / len(known)
        summed.append(None if value is None else _short(value))
    return summed


def _short(value: float) -> float:
    whole = int(value)
    return whole if value == whole else round(value, 1)


def _words(
    codes: array[int], step: int, members: Sequence[enum.Enum]
) -> list[str | None]:
    words = [None, *(member.value for member in members)]
    return [
        words[next((code for code in group if code > 1), group[-1])]
        for group in _groups(codes, step)
    ]


def _groups(values: array[Any], step: int) -> Iterator[array[Any]]:
    """Yield groups of `step` values; the first one may have fewer."""
    begin = -(-len(values) // step) * step - len(values)
    for end in range(step - begin, len(values) + 1, step):
        yield values[max(end - step, 0) : end]


def percentiles(seconds: Collection[float]) -> tuple[float | None, float | None]:
    """Return the 50th and the 95th percentile, in milliseconds (nearest rank)."""
    if not seconds:
        return None, None
    ordered = sorted(seconds)
    middle = ordered[(len(ordered) - 1) // 2]
    high = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return round(middle * 1000, 1), round(high * 1000, 1)
