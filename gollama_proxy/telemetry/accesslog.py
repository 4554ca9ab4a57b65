"""One line for each request: who, what, where, how it ended.

No prompt, no answer, no token and no header of a client ever gets into it; names that a
client chose are quoted, so that they cannot forge a line.
"""

from __future__ import annotations

import enum
import functools
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from gollama_proxy.config.settings import Log

access = logging.getLogger("gollama_proxy.access")

# What a task or future has come to, in its `repr`.
_OF_A_TASK = re.compile(r" (?:exception|result)=.*(?=> took [\d.]+ seconds\Z|>\Z)")
MOST_PATH = 200  # characters of a path that is none, which may be as long as a head
MOST_CAUSES = 5  # of an exception, that are told
_PLAIN = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    REFUSED = "refused"  # by a worker: the client has the worker's own error
    ERROR = "error"  # the client has an error of the hub, or a broken answer
    CLIENT_GONE = "client_gone"


@dataclass(slots=True)
class Record:
    """What is known of one request; filled in along its path, told once at its end."""

    id: str
    method: str
    route: str = "other"  # a route of the table, never the path that a client made up
    path: str = ""  # that path, if there is no route for it
    remote: str = ""
    subject: str = ""
    model: str = ""  # as a worker calls it, never as the client did
    worker: str = ""
    attempts: int = 0
    rescued: int = 0  # how often the answer went on elsewhere
    fell_back: str = ""  # the model that was asked for, if another one answered
    status: int = 0
    outcome: Outcome | None = None
    error: str = ""
    detail: str = ""
    bytes: int = 0
    tokens: int = 0  # generated, in all attempts
    prompt_tokens: int = 0
    started: float = 0.0  # monotonic seconds, as all times here
    queued: float = 0.0
    first_byte: float | None = None
    duration: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)  # that every reply carries

    def line(self) -> dict[str, Any]:
        """Choose what the log shows."""
        shown: dict[str, Any] = {
            "remote": self.remote,
            "subject": self.subject,
            "method": self.method,
            "route": self.route,
            "path": self.path[:MOST_PATH],
            "status": self.status,
            "outcome": self.outcome,
            "error": self.error,
            "detail": self.detail[:200],
            "model": self.model,
            "worker": self.worker,
            "attempts": self.attempts,
            "rescued": self.rescued,
            "fell_back": self.fell_back,
            "first_byte_ms": None
            if self.first_byte is None
            else round(self.first_byte * 1000, 1),
            "duration_ms": round(self.duration * 1000, 1),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "id": self.id,
        }
        return {
            key: value for key, value in shown.items() if value not in ("", None, 0)
        }


def write(record: Record) -> None:
    """Log the end of a request; one that went wrong on this side is a warning."""
    broken = record.outcome is Outcome.ERROR and record.status < 400
    level = logging.WARNING if broken or record.status >= 500 else logging.INFO
    access.log(level, "request", extra={"fields": record.line()})


class Sparse:
    """Counts what may happen often, and lets a line about it be written now and then.

    `clock` gives monotonic seconds, and `every` is between two lines of one kind.
    """

    def __init__(self, clock: Callable[[], float], every: float) -> None:
        self._clock = clock
        self._every = every
        self._last: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Sparse untold={self._untold.total()}>"

    def count(self, kind: str) -> int:
        """Count one; return how many there were since the last line, 0 for no line."""
        self._untold[kind] += 1
        now = self._clock()
        if now - self._last.get(kind, -math.inf) < self._every:
            return 0
        self._last[kind] = now
        return self._untold.pop(kind)


# --- Setting up -------------------------------------------------------------------


def configure(log: Log) -> None:
    """Send the program's log to standard error, in the configured form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(log))
    logging.basicConfig(handlers=[handler], level=log.level.upper(), force=True)
    access.setLevel(logging.INFO if log.access else logging.CRITICAL)
    # What no line shows need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented: logging HOWTO, "Optimization"
    # aiohttp logs each malformed request with its bytes and a traceback.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def _formatter(log: Log) -> logging.Formatter:
    chosen = JsonFormatter() if log.format == "json" else TextFormatter()
    return JournalFormatter(chosen) if journal_reads(sys.stderr) else chosen


def journal_reads(stream: TextIO) -> bool:
    """Tell whether a stream goes to systemd's journal (systemd.exec(5))."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):  # one that is no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def prioritised(text: str, level: int) -> str:
    """Begin each line with its priority, as the journal reads it (sd-daemon(3))."""
    priority = next(number for least, number in _PRIORITIES if level >= least)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


# syslog's, by the least level of Python that they are for.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)


class JournalFormatter(logging.Formatter):
    """Another form, with the priority of each line in front."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        return prioritised(self._form.format(record), record.levelno)


class TextFormatter(logging.Formatter):
    """`time level message key=value …`, for people and grep."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname.lower()} {_message(record)}"
        for key, value in getattr(record, "fields", {}).items():
            line += f" {key}={_quoted(value)}"
        if record.exc_info:
            line += "\n" + _traceback(record.exc_info[1])
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object on a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "message": _message(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = _traceback(record.exc_info[1])
        return _encode(line)


def _message(record: logging.LogRecord) -> str:
    """Give the text of a record, on one line."""
    text = record.getMessage()
    if record.name == "asyncio":  # what follows are the `repr`s of what was involved
        text = _OF_A_TASK.sub("", text.partition("\n")[0])
    return text if text.isprintable() else _encode(text)[1:-1]


def _traceback(error: BaseException | None) -> str:
    """Tell what kind of exception it was, and where; not what it says.

    Its words may quote what a user wrote: `int("…")` and many others do.
    """
    told: list[str] = []
    while error is not None and len(told) < MOST_CAUSES:
        frames = "".join(traceback.format_tb(error.__traceback__))
        told.append(f"Traceback (most recent call last):\n{frames}{_kind(error)}")
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return "\n\nwhich led to\n\n".join(reversed(told))


def _kind(error: BaseException) -> str:
    name = type(error).__qualname__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: {os.strerror(error.errno)}"
    if isinstance(error, BaseExceptionGroup):
        return f"{name} of {', '.join(map(_kind, error.exceptions))}"
    return name


def _timestamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _quoted(value: object) -> str:
    if type(value) is int or type(value) is float:
        return str(value)
    return _quoted_text(str(value))


@functools.lru_cache(maxsize=1024)  # few subjects, models and workers fill the log
def _quoted_text(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else _encode(text)


def _encode(value: Any) -> str:
    """Encode as JSON, whatever it holds: half a surrogate must not cost a line."""
    return json.dumps(value, separators=(",", ":"))
