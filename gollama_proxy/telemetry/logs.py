"""The program's log: its form, and its way to standard error.

Lines about requests are collected and written together, at most `DELAY` seconds late.
Every other line is written at once, after those collected before it, so that the log
keeps the order of events.  A reader that stops reading costs lines, never the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import re
import select
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii as _in_quotes
from typing import TextIO

from gollama_proxy.config.settings import Log

DELAY = 0.02  # seconds that a line about a request may wait
BATCH = 1 << 16  # characters that are written without waiting any longer
MOST_UNWRITTEN = 1 << 18  # characters kept for a reader that has stopped reading
PATIENCE = 1.0  # seconds that the end of the process waits for such a reader
MOST_CAUSES = 5  # exceptions shown of a chain

# What follows the message of a line: names that the program chose, and values.
Fields = Mapping[str, str | int | float]
_NO_FIELDS: Fields = {}
_LOST = "{} lines were lost: standard error could not be written"
# The result or exception of a task or future, in its `repr`.
_TASK_RESULT = re.compile(r" (?:exception|result)=.*(?=> took [\d.]+ seconds\Z|>\Z)")
_PLAIN = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)
# Priorities of syslog, each with the least level of Python that it is for.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)


def configure(log: Log) -> None:
    """Send the program's log to standard error, in the configured form."""
    form: Form = JsonForm() if log.format == "json" else TextForm()
    if journal_reads(sys.stderr):
        form = JournalForm(form)
    handler = BatchHandler(sys.stderr, form)
    logging.basicConfig(handlers=[handler], level=log.level.upper(), force=True)
    access = logging.getLogger("gollama_proxy.access")
    access.setLevel(logging.INFO if log.access else logging.CRITICAL)
    # No line shows these, so they need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented: logging HOWTO, "Optimization"
    # aiohttp logs each malformed request with its bytes and a traceback.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def flush() -> None:
    """Write the lines that are still collected, as far as their reader takes them."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def journal_reads(stream: TextIO | None) -> bool:
    """Return whether a stream goes to systemd's journal (systemd.exec(5))."""
    if stream is None:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def prioritised(text: str, level: int) -> str:
    """Start each line with its priority, as the journal reads it (sd-daemon(3))."""
    priority = next(number for least, number in _PRIORITIES if level >= least)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


class Throttle:
    """Limits how often a repeated event is logged.

    `clock` returns monotonic seconds; `every` is the least time between two lines about
    the same kind of event.
    """

    def __init__(self, clock: Callable[[], float], every: float) -> None:
        self._clock = clock
        self._every = every
        self._last: dict[str, float] = {}
        self._unlogged: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Throttle unlogged={self._unlogged.total()}>"

    def count(self, kind: str) -> int:
        """Count an event; return how many to log now, or 0 if it is too early."""
        self._unlogged[kind] += 1
        now = self._clock()
        if now - self._last.get(kind, -math.inf) < self._every:
            return 0
        self._last[kind] = now
        return self._unlogged.pop(kind)


# --- Writing ----------------------------------------------------------------------


class BatchHandler(logging.Handler):
    """Writes log records at once, and lines about requests in batches.

    It never raises, and while an event loop runs it never waits for its stream: lines
    that the stream does not take are kept, up to `MOST_UNWRITTEN`; later ones are lost
    and counted.  `logging` flushes and closes its handlers when the process ends.
    """

    def __init__(self, stream: TextIO | None, form: Form) -> None:
        """Write to `stream`; None is what Python has for one closed at the start."""
        super().__init__()
        self.setFormatter(form)
        self._form = form
        self._sink = _sink_of(stream)
        self._lines: list[str] = []
        self._rest = b""  # of a batch that the stream took in part
        self._size = 0  # of lines and rest
        self._lost = 0  # lines
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<BatchHandler unwritten={self._size} lost={self._lost}>"

    def add(self, level: int, message: str, fields: Fields) -> None:
        """Collect a line; it is written with others, at most `DELAY` later."""
        self._collect(self._form.line(_now(), level, message, fields))
        if self._size >= BATCH:
            self.flush()
        elif self._timer is None:
            self._flush_later()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after the lines that were collected before it."""
        try:
            self._collect(self.format(record))
        except Exception:
            self.handleError(record)
        self.flush()

    def _collect(self, line: str) -> None:
        if self._size > MOST_UNWRITTEN:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._collect(self._form.line(_now(), logging.WARNING, _LOST.format(lost)))
        self._lines.append(line + "\n")
        self._size += len(line) + 1

    def _flush_later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # nothing would ever call it
            self.flush()
        else:
            self._timer = loop.call_later(DELAY, self.flush)

    def flush(self) -> None:
        """Write what the stream takes without waiting; try again later with the rest.

        Outside an event loop there is no later: the rest waits for the next line.
        """
        self._write(0.0)
        if self._rest:
            with contextlib.suppress(RuntimeError):
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(DELAY, self.flush)

    def close(self) -> None:
        """Write what is left, and wait up to `PATIENCE` seconds for the stream."""
        self._write(PATIENCE)
        super().close()

    def _write(self, patience: float) -> None:
        assert self.lock is not None
        with self.lock:
            self._timer = None
            count = len(self._lines)  # another thread may add to them meanwhile
            text = "".join(self._lines[:count])
            del self._lines[:count]
            data = self._rest + text.encode("utf-8", "backslashreplace")
            self._rest = self._sink(data, patience)
            self._size = len(self._rest)


# Writes bytes, waits at most so many seconds, returns the rest.
_Sink = Callable[[bytes, float], bytes]


def _sink_of(stream: TextIO | None) -> _Sink:
    if stream is None:
        return lambda data, patience: b""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file, but kept in memory
        return functools.partial(_write_to_memory, stream)
    return _Descriptor(number).write


def _write_to_memory(stream: TextIO, data: bytes, patience: float) -> bytes:
    with contextlib.suppress(OSError, ValueError):  # it was closed
        stream.write(data.decode())
        stream.flush()
    return b""


class _Descriptor:
    """Writes to a file descriptor without being blocked by it.

    The descriptor is shared with other processes, so it cannot be made non-blocking.
    But a pipe that is ready takes `PIPE_BUF` bytes at once, and as a whole: lines of
    several processes are not mixed up (POSIX, write()).
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._ready = select.poll()
        self._ready.register(number, select.POLLOUT)
        regular = stat.S_ISREG(os.fstat(number).st_mode)
        self._most = sys.maxsize if regular else select.PIPE_BUF

    def __repr__(self) -> str:
        return f"<Descriptor {self._number}>"

    def write(self, data: bytes, patience: float) -> bytes:
        """Write what is taken within `patience` seconds; return the rest."""
        start, deadline = 0, time.monotonic() + patience
        while start < len(data):
            left = max(0.0, deadline - time.monotonic())
            if not self._ready.poll(left * 1000):
                break
            end = start + self._most
            if end < len(data):
                end = data.rfind(b"\n", start, end) + 1 or end
            try:
                start += os.write(self._number, data[start:end])
            except BlockingIOError:
                break
            except OSError:  # closed, or nothing reads it any more
                return b""
        return data[start:]


# --- Forms ------------------------------------------------------------------------


class Form(logging.Formatter):
    """A form of lines, for records of `logging` and for lines without one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and its traceback."""
        when = _timestamp(int(record.created) * 1000 + int(record.msecs))
        fields = getattr(record, "fields", _NO_FIELDS)
        error = record.exc_info[1] if record.exc_info else None
        return self.line(when, record.levelno, _message(record), fields, error)

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        """Return a line without its newline; the message has to be printable."""
        raise NotImplementedError


class TextForm(Form):
    """`time level message key=value …`, for people and grep."""

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        pairs = [
            f" {key}={_quoted(value) if isinstance(value, str) else value}"
            for key, value in fields.items()
        ]
        line = f"{when} {_level_name(level)} {message}{''.join(pairs)}"
        return line if error is None else f"{line}\n{_traceback(error)}"


class JsonForm(Form):
    """One JSON object on a line, for machines."""

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        shown = {
            "time": when,
            "level": _level_name(level),
            "message": message,
            **fields,
        }
        if error is not None:
            shown["exception"] = _traceback(error)
        pairs = [
            f'"{key}":{_in_quotes(value) if isinstance(value, str) else value}'
            for key, value in shown.items()
        ]
        return f"{{{','.join(pairs)}}}"


class JournalForm(Form):
    """Another form, with the priority of each line in front."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        return prioritised(self._form.line(when, level, message, fields, error), level)


def _message(record: logging.LogRecord) -> str:
    """Return the message of a record, on one line."""
    text = record.getMessage()
    if record.name == "asyncio":  # the lines that follow are `repr`s of other objects
        text = _TASK_RESULT.sub("", text.partition("\n")[0])
    return text if text.isprintable() else _in_quotes(text)[1:-1]


def _traceback(error: BaseException) -> str:
    """Return the kind and the place of an exception and of its causes, no messages.

    A message may quote what a user wrote: that of `int("…")` does, and many others.
    """
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < MOST_CAUSES:
        frames = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_kind(cause)}")
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
    return "\n\nwhich led to\n\n".join(reversed(parts))


def _kind(error: BaseException) -> str:
    name = type(error).__qualname__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: {os.strerror(error.errno)}"
    if isinstance(error, BaseExceptionGroup):
        return f"{name} of {', '.join(map(_kind, error.exceptions))}"
    return name


def _now() -> str:
    return _timestamp(time.time_ns() // 1_000_000)


@functools.lru_cache(maxsize=1)  # a busy hub has many lines in one millisecond
def _timestamp(milliseconds: int) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


@functools.cache
def _level_name(level: int) -> str:
    return logging.getLevelName(level).lower()


@functools.lru_cache(maxsize=1024)  # most lines name the same subjects and models
def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else _in_quotes(text)
