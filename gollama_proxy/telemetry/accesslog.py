"""The access log: one line for each request, with its sender, worker and outcome.

No prompt, no answer, no token and no header of a client gets into it; names that a
client chose are quoted, so that they cannot forge a line.
"""

from __future__ import annotations

import enum
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.telemetry.lines import Fields, LineFormatter
from gollama_proxy.telemetry.logs import BatchHandler
from gollama_proxy.wire.headers import Head, TraceContext

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


_ERROR = Outcome.ERROR  # looked up once (benchmarks/RESULTS.md)


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
    head: Head | None = None  # once it was read

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


class LineTemplate:
    """What the lines of similar requests share: all but the time, id and numbers."""

    __slots__ = ("_form", "_parts", "level")

    def __init__(self, record: Record) -> None:
        """Make the template for requests like this one, which has ended."""
        # A failure on this side is a warning.
        broken = record.outcome is _ERROR and record.status < 400
        self.level = logging.WARNING if broken or record.status >= 500 else logging.INFO
        self._form: LineFormatter | None = None
        self._parts: tuple[str, ...] = ()  # in that format; empty: it shares nothing

    def __repr__(self) -> str:
        return f"<LineTemplate {logging.getLevelName(self.level)}>"

    def line(self, record: Record, form: LineFormatter, now: float) -> str:
        """Return the line of a request, at a Unix time."""
        if form is not self._form:
            self._form, self._parts = form, _parts(record, form, self.level)
        first = record.first_byte
        milliseconds = 0.0 if first is None else first * 1000.0
        took = (record.duration or 0.0) * 1000.0
        if (
            not self._parts
            or took < SHORTEST
            or (milliseconds < SHORTEST and first is not None)
        ):
            stamp = form.stamp(now)
            return form.line(stamp, self.level, "request", record.fields())
        before, after, n1, n2, n3, n4, n5, n6, n7, n8, end = self._parts
        trace = record.trace
        return (
            f"{before}{form.stamp(now)}{after}"
            f"{n1}{'' if first is None else f'{milliseconds:.1f}'}{n2}{took:.1f}"
            f"{n3}{record.prompt_tokens or ''}{n4}{record.cached_tokens or ''}"
            f"{n5}{record.tokens or ''}{n6}{record.bytes or ''}"
            f"{n7}{record.id}{n8}{'' if trace is None else trace.trace_id}{end}"
        )


def _parts(record: Record, form: LineFormatter, level: int) -> tuple[str, ...]:
    """Return what such lines have around their time, and before each number."""
    opening = form.opening(level, "request", record.common())
    if opening is None:
        return ()
    *numbers, name, trace = _names(form.before, form.between)
    shown = (
        *(record.first_byte is not None, True, record.prompt_tokens),
        *(record.cached_tokens, record.tokens, record.bytes),
    )
    mark, traced = form.mark, record.trace is not None
    return (
        *opening,
        *(each if show else "" for each, show in zip(numbers, shown, strict=True)),
        f"{name}{mark}",
        f"{mark}{trace}{mark}" if traced else mark,
        f"{mark}{form.end}" if traced else form.end,
    )


@functools.lru_cache(maxsize=4)  # formats of the log
def _names(before: str, between: str) -> tuple[str, ...]:
    return tuple(f"{before}{name}{between}" for name in _MEASURED)


def write(record: Record, template: LineTemplate) -> None:
    """Log the end of a request.

    A `BatchHandler` gets the line.  Other handlers of the `gollama_proxy.access` logger
    get a `logging.LogRecord` that has its fields as `fields`.
    """
    level = template.level
    if record.routine or not access.isEnabledFor(level):
        return
    handlers = _root.handlers
    if access.handlers or _program.handlers or not access.propagate:
        handlers = [*_all_handlers()]
    for handler in handlers:
        if isinstance(handler, BatchHandler):
            handler.add(template.line(record, handler.form, time.time()))
        elif level >= handler.level:
            handler.handle(_log_record(level, record.fields()))


def _all_handlers() -> Iterator[logging.Handler]:
    logger: logging.Logger | None = access
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _log_record(level: int, fields: Fields) -> logging.LogRecord:
    extra = {"fields": fields}
    return access.makeRecord(
        access.name, level, "(unknown file)", 0, "request", (), None, extra=extra
    )
