"""The access log: one line for each request, with its sender, worker and outcome.

No prompt, no answer, no token and no header of a client gets into it; names that a
client chose are quoted, so that they cannot forge a line.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gollama_proxy.telemetry.logs import BatchHandler, Fields, LineFormatter
from gollama_proxy.wire.headers import TraceContext

if TYPE_CHECKING:
    from gollama_proxy.fleet.lease import Lease

access = logging.getLogger("gollama_proxy.access")

MOST_PATH = 200  # characters shown of an unknown path, which may be as long as a head
MOST_DETAIL = 200


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    REFUSED = "refused"  # by a worker: the client has the worker's own error
    ERROR = "error"  # the client has an error of the hub, or a broken answer
    CLIENT_GONE = "client_gone"

    __hash__ = str.__hash__  # that of `Enum` is written in Python, and so slow


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

    id: str
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
        shown: dict[str, str | int | float] = {}
        shown |= _nonzero(_COMMON, self.common())
        if tenths := _tenths(self.first_byte):
            shown["first_byte_ms"] = tenths / 10
        if tenths := _tenths(self.duration):
            shown["duration_ms"] = tenths / 10
        shown |= _nonzero(_COUNTS, (getattr(self, name) for name in _COUNTS))
        shown["id"] = self.id
        if self.trace is not None:
            shown["trace"] = self.trace.trace_id
        return shown

    def common(self) -> tuple[str | int, ...]:
        """Return the values of the first fields, which many requests have in common."""
        return (
            self.remote,
            self.subject,
            self.method,
            self.route,
            self.path and self.path[:MOST_PATH],
            self.status,
            self.outcome or "",
            self.error,
            self.detail and self.detail[:MOST_DETAIL],
            self.model,
            self.worker,
            self.attempts,
            self.rescued,
            self.fell_back,
        )


_COMMON = (
    *("remote", "subject", "method", "route", "path", "status", "outcome", "error"),
    *("detail", "model", "worker", "attempts", "rescued", "fell_back"),
)
_COUNTS = ("prompt_tokens", "cached_tokens", "tokens", "bytes")


def _nonzero(names: Iterable[str], values: Iterable[str | int]) -> dict[str, str | int]:
    return {name: value for name, value in zip(names, values, strict=True) if value}


def _tenths(seconds: float | None) -> int:
    """Return the tenths of a millisecond in some seconds."""
    return int(seconds * 10_000 + 0.5) if seconds else 0


def write(record: Record) -> None:
    """Log the end of a request; a failure on this side is a warning.

    A `BatchHandler` gets the line.  Other handlers of the `gollama_proxy.access` logger
    get a `logging.LogRecord` that has its fields as `fields`.
    """
    if record.routine:
        return
    broken = record.outcome is _ERROR and record.status < 400
    level = logging.WARNING if broken or record.status >= 500 else logging.INFO
    if not access.isEnabledFor(level):
        return
    logger: logging.Logger | None = access
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, BatchHandler):
                form = handler.form
                when = form.stamp(time.time_ns() // 1_000_000)
                handler.add(line(record, form, when, level))
            elif level >= handler.level:
                handler.handle(_log_record(level, record.fields()))
        logger = logger.parent if logger.propagate else None


def line(record: Record, form: LineFormatter, when: str, level: int) -> str:
    """Return what `form` makes of the fields of a record, without collecting them.

    Every request pays for this.
    """
    common = record.common()
    opening = form.openings.get((level, common))
    if opening is None:
        opening = form.opening(level, "request", _nonzero(_COMMON, common))
        if opening is None:
            return form.line(when, level, "request", record.fields())
        form.openings[level, common] = opening
    before, between = form.before, form.between
    shown = ""
    # In whole numbers, as a decimal takes ten times as long to write.
    if record.first_byte and (tenths := int(record.first_byte * 10_000 + 0.5)):
        shown = f"{before}first_byte_ms{between}{tenths // 10}.{tenths % 10}"
    if record.duration and (tenths := int(record.duration * 10_000 + 0.5)):
        shown = f"{shown}{before}duration_ms{between}{tenths // 10}.{tenths % 10}"
    if record.prompt_tokens:
        shown = f"{shown}{before}prompt_tokens{between}{record.prompt_tokens}"
    if record.cached_tokens:
        shown = f"{shown}{before}cached_tokens{between}{record.cached_tokens}"
    if record.tokens:
        shown = f"{shown}{before}tokens{between}{record.tokens}"
    if record.bytes:
        shown = f"{shown}{before}bytes{between}{record.bytes}"
    if record.trace is None:
        trace = ""
    else:
        trace = f"{before}trace{between}{form.quote(record.trace.trace_id)}"
    start, rest = opening
    return (
        f"{start}{when}{rest}{shown}{before}id{between}{form.quote(record.id)}"
        f"{trace}{form.end}"
    )


def _log_record(level: int, fields: Fields) -> logging.LogRecord:
    extra = {"fields": fields}
    return access.makeRecord(
        access.name, level, "(unknown file)", 0, "request", (), None, extra=extra
    )
