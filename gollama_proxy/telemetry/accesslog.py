"""The access log: one line for each request, with its sender, worker and outcome.

No prompt, no answer, no token and no header of a client gets into it; names that a
client chose are quoted, so that they cannot forge a line.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.telemetry.logs import BatchHandler, Fields, LineFormatter
from gollama_proxy.wire.headers import TraceContext

if TYPE_CHECKING:
    from gollama_proxy.fleet.lease import Lease

access = logging.getLogger("gollama_proxy.access")
_program, _root = logging.getLogger("gollama_proxy"), logging.getLogger()

MOST_PATH = 200  # characters shown of an unknown path, which may be as long as a head
MOST_DETAIL = 200
SHORTEST = 0.05  # milliseconds that are shown, as 0.1


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    REFUSED = "refused"  # by a worker: the client has the worker's own error
    ERROR = "error"  # the client has an error of the hub, or a broken answer
    CLIENT_GONE = "client_gone"


class Step(NamedTuple):
    """What happened to a request, beyond an attempt that succeeds.

    `at` is in seconds since its start.
    """

    at: float
    step: str  # "queued", "attempt", "failed", "resumed" or "fell_back"
    worker: str = ""
    reason: str = ""


_ERROR = Outcome.ERROR  # before Python 3.12, looking it up in its class takes long


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """The data of a request that telemetry needs, filled in along its path."""

    id: str  # of letters, digits, ".", "_" and "-", which no log has to quote
    method: str
    route: str = "other"  # a route of the table, never a path that a client made up
    path: str = ""  # that path, if it has no route
    remote: str = ""
    subject: str = ""
    model: str = ""  # by the worker's name for it, never by the client's
    worker: str = ""
    attempts: int = 0
    rescued: int = 0  # times that another worker continued the answer
    fell_back: str = ""  # the requested model, if another one answered
    status: int = 0
    outcome: Outcome | None = None
    error: str = ""
    detail: str = ""
    bytes: int = 0
    tokens: int = 0  # generated, in all attempts
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that the worker had read before
    slot_seconds: float = 0.0  # for which its attempts held a slot
    started: float = 0.0  # monotonic seconds, as are all times here
    queued: float = 0.0
    first_byte: float | None = None
    duration: float | None = None  # set at the end
    trace: TraceContext | None = None  # what its spans and lines have in common
    # Whether it went as it does every few seconds, and is not listed.
    routine: bool = False
    steps: tuple[Step, ...] = ()  # empty unless something unusual happens
    lease: Lease | None = None  # of its last attempt

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.method} {self.route}>"

    @property
    def extra(self) -> dict[str, Fields]:
        """What a line of `logging` about it has besides its message: its trace."""
        return {} if self.trace is None else {"fields": {"trace": self.trace.trace_id}}

    def fields(self) -> Fields:
        """Return the fields that the log shows; empty and zero values are left out."""
        measured = (
            round((self.first_byte or 0.0) * 1000, 1),
            round((self.duration or 0.0) * 1000, 1),
            self.prompt_tokens,
            self.cached_tokens,
            self.tokens,
            self.bytes,
            self.id,
            self.trace and self.trace.trace_id,
        )
        last = zip(_MEASURED, measured, strict=True)
        return {**self.common(), **{name: value for name, value in last if value}}

    def common(self) -> Fields:
        """Return the first of them, which many requests have in common."""
        shown = {name: getattr(self, name) for name in _COMMON}
        shown["path"] = self.path[:MOST_PATH]
        shown["detail"] = self.detail[:MOST_DETAIL]
        return {name: value for name, value in shown.items() if value}


_COMMON = (
    *("remote", "subject", "method", "route", "path", "status", "outcome", "error"),
    *("detail", "model", "worker", "attempts", "rescued", "fell_back"),
)
_MEASURED = (
    *("first_byte_ms", "duration_ms", "prompt_tokens", "cached_tokens", "tokens"),
    *("bytes", "id", "trace"),
)


def write(record: Record) -> None:
    """Log the end of a request; a failure on this side is a warning.

    A `BatchHandler` gets the line.  Other handlers of the `gollama_proxy.access` logger
    get a `logging.LogRecord` that has its fields as `fields`.
    """
    if record.routine:
        return
    status, level = record.status, logging.INFO
    if status >= 500 or (status < 400 and record.outcome is _ERROR):
        level = logging.WARNING
    if not access.isEnabledFor(level):
        return
    handlers = _root.handlers
    if access.handlers or _program.handlers or not access.propagate:
        handlers = [*_all_handlers()]
    for handler in handlers:
        if isinstance(handler, BatchHandler):
            handler.add(line(record, handler.form, level, time.time()))
        elif level >= handler.level:
            handler.handle(_log_record(level, record.fields()))


def _all_handlers() -> Iterator[logging.Handler]:
    logger: logging.Logger | None = access
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def line(record: Record, form: LineFormatter, level: int, now: float) -> str:
    """Return the line of a record, at a Unix time.

    Every request pays for this, so what many have in common is written once: all but
    the time, the id and what was measured.
    """
    path, detail, trace = record.path, record.detail, record.trace
    first = (record.first_byte or 0.0) * 1000.0
    took = (record.duration or 0.0) * 1000.0
    prompt, cached = record.prompt_tokens, record.cached_tokens
    tokens, size = record.tokens, record.bytes
    kind = (
        record.remote,
        record.subject,
        record.method,
        record.route,
        path and path[:MOST_PATH],
        record.status,
        record.outcome or "",
        record.error,
        detail and detail[:MOST_DETAIL],
        record.model,
        record.worker,
        record.attempts,
        record.rescued,
        record.fell_back,
        level,
        # What it shows of the rest, in the order of `_MEASURED`
        first >= SHORTEST,
        took >= SHORTEST,
        prompt > 0,
        cached > 0,
        tokens > 0,
        size > 0,
        trace is not None,
    )
    parts = form.openings.get(kind)
    if parts is None:
        opening = form.opening(level, "request", record.common())
        if opening is None:
            return form.line(form.stamp(now), level, "request", record.fields())
        parts = form.openings[kind] = (*opening, *_names(form, kind[-7:]))
    before, after, of_first, of_took, n1, n2, n3, n4, n5, n6, end = parts
    return (
        f"{before}{form.stamp(now)}{after}"
        f"{of_first}{f'{first:.1f}' if of_first else ''}"
        f"{of_took}{f'{took:.1f}' if of_took else ''}"
        f"{n1}{prompt or ''}{n2}{cached or ''}{n3}{tokens or ''}{n4}{size or ''}"
        f"{n5}{record.id}{n6}{'' if trace is None else trace.trace_id}{end}"
    )


def _names(form: LineFormatter, shown: Iterable[object]) -> Iterator[str]:
    """Yield what is before each value of `_MEASURED`, and the end of the line."""
    *numbers, name, trace = (f"{form.before}{each}{form.between}" for each in _MEASURED)
    *measured, traced = shown
    for each, show in zip(numbers, measured, strict=True):
        yield each if show else ""
    mark = form.mark
    yield f"{name}{mark}"
    yield f"{mark}{trace}{mark}" if traced else mark
    yield f"{mark}{form.end}" if traced else form.end


def _log_record(level: int, fields: Fields) -> logging.LogRecord:
    extra = {"fields": fields}
    return access.makeRecord(
        access.name, level, "(unknown file)", 0, "request", (), None, extra=extra
    )
