"""The program's log: its format, and how it is written to standard error.

Lines about requests are collected and written together, at most `DELAY` seconds late.
All other lines are written at once, after the lines collected before them, so that the
log keeps the order of events.  When standard error is not read, lines are lost; the hub
does not wait.

A warning or an error that is repeated is written once; a line like it counts the rest,
at the latest a minute later.
"""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _in_quotes
from math import floor
from typing import TYPE_CHECKING, TextIO

from gollama_proxy.config.settings import Log

if TYPE_CHECKING:
    import asyncio

DELAY = 0.02  # seconds that a line about a request may wait
BATCH = 1 << 16  # characters that are written without waiting any longer
MOST_UNWRITTEN = 1 << 18  # characters kept while standard error is not read
PATIENCE = 1.0  # seconds to wait for its reader when the process ends
MOST_CAUSES = 5  # exceptions shown of a chain of causes
QUIET = 10.0  # seconds without a repetition, after which a warning is written again
SUMMARY = 60.0  # seconds after which the repetitions so far are counted in a line
MOST_KINDS = 200  # of warnings whose repetitions are counted
MOST_MESSAGE = 500  # characters of a warning that are repeated with their number

# The part of a line after its message; the names are those of the program.
Fields = Mapping[str, str | int | float]
_NO_FIELDS: Fields = {}
Opening = tuple[str, str]  # of a line: what is before and after its time
_LOST = "{} lines were lost: standard error could not be written"
# The result or exception of a task or future, in its `repr`.
_TASK_RESULT = re.compile(r" (?:exception|result)=.*(?=> took [\d.]+ seconds\Z|>\Z)")
_LONGEST = 128  # characters of a value without quotes
_PLAIN = re.compile(rf"[\w./:@+-]{{1,{_LONGEST}}}", re.ASCII)
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, on which there may be room later
# The priorities of syslog, from the level of Python where each begins.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)


def configure(log: Log, process: int = 0) -> None:
    """Send the program's log to standard error, in the configured format.

    Each line has the number of the process, unless that is 0.
    """
    handler = BatchHandler(sys.stderr, _formatter(log, sys.stderr, process), Bursts())
    logging.basicConfig(handlers=[handler], force=True)
    _set_levels(log)
    # No line shows these, so they need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented: logging HOWTO, "Optimization"
    # aiohttp logs each malformed request with its bytes and a traceback.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    # The exporter of traces logs each connection at level debug.
    logging.getLogger("urllib3").setLevel(logging.INFO)


def reconfigure(log: Log) -> None:
    """Take other settings; handlers of another program stay as they are."""
    _set_levels(log)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, BatchHandler):
            handler.flush()
            handler.write_as(_formatter(log, sys.stderr, handler.form.process))


def _formatter(log: Log, stream: TextIO | None, process: int) -> LineFormatter:
    kind = JsonFormatter if log.format == "json" else TextFormatter
    made: LineFormatter = kind(process)
    if journal_reads(stream):
        return JournalFormatter(made)
    if log.format == "auto" and stream is not None:
        return _for_people(stream, os.environ, process) or made
    return made


def _for_people(
    stream: TextIO, environ: Mapping[str, str], process: int
) -> LineFormatter | None:
    """Return the format for a terminal; None if this is none (no-color.org)."""
    forced, refused = environ.get("FORCE_COLOR", ""), environ.get("NO_COLOR", "")
    terminal = stream.isatty()
    if not terminal and forced in ("", "0"):
        return None
    plain = refused or forced == "0" or (environ.get("TERM") == "dumb" and not forced)
    return TerminalFormatter(process, colours=not plain)


def _set_levels(log: Log) -> None:
    logging.getLogger().setLevel(log.level.upper())
    access = logging.getLogger("gollama_proxy.access")
    access.setLevel(logging.INFO if log.access else logging.CRITICAL)
    # What operators change is recorded at any level.
    logging.getLogger("gollama_proxy.audit").setLevel(logging.INFO)


def flush() -> None:
    """Write the collected lines now, as far as standard error accepts them."""
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

    def count(self, kind: str, events: int = 1) -> int:
        """Count events; return how many to log now, or 0 if it is too early."""
        self._unlogged[kind] += events
        now = self._clock()
        if now - self._last.get(kind, -math.inf) < self._every:
            return 0
        self._last[kind] = now
        return self._unlogged.pop(kind)


# --- Repeated warnings ------------------------------------------------------------


@dataclass
class _Burst:
    """A warning that was written, and those like it that were not."""

    name: str  # of its logger
    level: int
    message: str
    since: float  # when it was written, or counted for the last time
    last: float  # when the last one of its kind arrived
    count: int = 0

    def summary(self, now: float) -> logging.LogRecord:
        """Return a line about what was not written, and count from there."""
        seconds = max(1, round(now - self.since))
        text = f"{self.message} (and {self.count} more in {seconds} s)"
        self.count, self.since = 0, now
        return logging.LogRecord(self.name, self.level, "", 0, text, None, None)


class Bursts:
    """Decides which warnings are repetitions, and counts those.

    Two are of the same kind if they have the same text and the same first value in it,
    which is the name of a worker where there is one; exceptions, if they are of the
    same type and from the same line.  `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, _Burst] = {}

    def __repr__(self) -> str:
        return f"<Bursts kinds={len(self._kinds)} counting={self.counting}>"

    @property
    def counting(self) -> bool:
        """Whether there is anything that no summary has yet."""
        return any(burst.count for burst in self._kinds.values())

    def repeats(self, record: logging.LogRecord) -> bool:
        """Count a record if it repeats an earlier one; else it is to be written."""
        if record.levelno < logging.WARNING:
            return False
        now, kind = self._clock(), _kind_of_record(record)
        burst = self._kinds.get(kind)
        if burst is not None and now - burst.last < QUIET:
            burst.count += 1
            burst.last = now
            return True
        message = _message(record)[:MOST_MESSAGE]
        self._kinds[kind] = _Burst(record.name, record.levelno, message, now, now)
        return False

    def summaries(self, *, all: bool = False) -> Iterator[logging.LogRecord]:
        """Yield lines about the bursts that are over, or last long, or about all."""
        now = self._clock()
        for kind, burst in [*self._kinds.items()]:
            over = now - burst.last >= QUIET or len(self._kinds) > MOST_KINDS
            if burst.count and (all or over or now - burst.since >= SUMMARY):
                yield burst.summary(now)
            if over and not burst.count:
                del self._kinds[kind]


def _kind_of_record(record: logging.LogRecord) -> Hashable:
    if record.exc_info and (error := record.exc_info[1]) is not None:
        place = None
        for frame, number in traceback.walk_tb(error.__traceback__):
            place = frame.f_code.co_filename, number
        return record.name, record.levelno, record.msg, type(error), place
    args = record.args
    first = args[0] if isinstance(args, tuple) and args else None
    return record.name, record.levelno, record.msg, str(first)


# --- Writing ----------------------------------------------------------------------


class BatchHandler(logging.Handler):
    """Writes log records at once, and lines about requests in batches.

    It never raises, and until it is closed it never waits for its stream.  Lines that
    the stream does not accept are kept up to `MOST_UNWRITTEN`; further lines are lost
    and counted.  `logging` closes its handlers when the process ends.
    """

    def __init__(
        self,
        stream: TextIO | None,
        formatter: LineFormatter,
        bursts: Bursts | None = None,
    ) -> None:
        """Write to `stream`, if any: Python has None for a closed standard error.

        Without `bursts`, repeated warnings are all written.
        """
        super().__init__()
        self._bursts = bursts
        # With a timer for their summaries
        self._watching: asyncio.AbstractEventLoop | None = None
        self.write_as(formatter)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._sink = _sink_of(stream)
        self._lines: list[str] = []
        self._rest = b""  # of a batch that the stream took in part
        self._size = 0  # of lines and rest
        self._lost = 0  # lines
        self._loop: asyncio.AbstractEventLoop | None = None  # with a timer for them

    def __repr__(self) -> str:
        return f"<BatchHandler unwritten={self._size} lost={self._lost}>"

    def write_as(self, formatter: LineFormatter) -> None:
        """Write the lines to come in this format."""
        self.setFormatter(formatter)
        self.form = formatter

    def add(self, line: str) -> None:
        """Collect a line; it is written with others, at most `DELAY` later."""
        size = self._size
        if size > MOST_UNWRITTEN:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            when = self.form.stamp(time.time())
            self.add(self.form.line(when, logging.WARNING, _LOST.format(lost)))
            size = self._size
        self._lines.append(line)
        self._size = size = size + len(line) + 1
        if size >= BATCH or (self._loop is None and not self._flush_later()):
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after the lines that were collected before it.

        Not if it repeats a warning.
        """
        try:
            if self._bursts is not None and self._bursts.repeats(record):
                self._summarise_later()
                return
            self._summarise()
            self.add(self.format(record))
        except Exception:
            self.handleError(record)
        self.flush()

    def _summarise(self, *, all: bool = False) -> None:
        if self._bursts is not None:
            for summary in self._bursts.summaries(all=all):
                self.add(self.format(summary))

    def _summarise_later(self) -> None:
        """Set a timer; without an event loop, the next line has the summaries."""
        if self._watching is not None and not self._watching.is_closed():
            return
        if "asyncio" not in sys.modules:
            return
        import asyncio

        with contextlib.suppress(RuntimeError):  # none is running
            self._watching = asyncio.get_running_loop()
            self._watching.call_later(QUIET, self._summary_due)

    def _summary_due(self) -> None:
        assert self.lock is not None
        self._watching = None
        with self.lock:
            self._summarise()
            if self._bursts is not None and self._bursts.counting:
                self._summarise_later()
        self.flush()

    def flush(self) -> None:
        """Write as much as the stream takes without waiting; retry the rest later.

        Outside an event loop, the rest waits for the next line or the end.
        """
        self._write(0.0)
        if self._loop is not None and self._loop.is_closed():
            self._loop = None  # before the timer was due
        if self._rest and self._loop is None:
            self._flush_later()

    def _flush_later(self) -> bool:
        """Set a timer; return False if no event loop is running."""
        if "asyncio" not in sys.modules:  # a command without one need not wait for it
            return False
        import asyncio

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        self._loop = loop
        loop.call_later(DELAY, self._due)
        return True

    def _due(self) -> None:
        self._loop = None
        self.flush()

    def close(self) -> None:
        """Write the remaining lines; wait up to `PATIENCE` seconds for the stream."""
        self._summarise(all=True)
        self._write(PATIENCE)
        super().close()

    def _write(self, patience: float) -> None:
        assert self.lock is not None
        with self.lock:
            count = len(self._lines)  # another thread may add to them in the meantime
            text = "\n".join((*self._lines[:count], ""))
            del self._lines[:count]
            data = self._rest + text.encode(self._encoding, "backslashreplace")
            self._rest = self._sink(data, patience)
            self._size = len(self._rest)


# Writes bytes, waiting at most the given seconds; returns the rest.
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
        stream.write(data.decode(stream.encoding or "utf-8"))
        stream.flush()
    return b""


class _Descriptor:
    """Writes to a file descriptor without blocking.

    Other processes may share the descriptor, so it is not made non-blocking.  A pipe
    that is ready accepts `PIPE_BUF` bytes at once and as a whole (POSIX, `write`), so
    that the lines of several processes are not mixed.
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
        """Write as much as is accepted within `patience` seconds; return the rest."""
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
            except OSError as exc:
                if exc.errno in _FULL:
                    break
                return b""  # closed, or nothing reads it any more
        return data[start:]


# --- Format -----------------------------------------------------------------------


# A format with a width takes longer than all else of a time.
_FRACTIONS = tuple(f".{milliseconds:03d}Z" for milliseconds in range(1000))


class LineFormatter(logging.Formatter):
    """Formats records of `logging`, and lines that need no record.

    A line is an opening, around its time, then its fields, then `end`.  What many lines
    have in common can so be formatted once (`accesslog.py`).
    """

    before = between = end = ""  # the name of a field; it and its value; the line's end
    quote: Callable[[str], str]  # writes a text value
    mark = ""  # around one that is a plain word

    def __init__(self, process: int = 0) -> None:
        """Make one; a `process` of several is a field of each line."""
        super().__init__()
        self.process = process
        self._source: Fields = {"process": process} if process else _NO_FIELDS
        self._second, self._written = 0.0, ""  # the last one, and how it is written

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and its traceback."""
        when = self.stamp(record.created)
        fields = getattr(record, "fields", _NO_FIELDS)
        error = record.exc_info[1] if record.exc_info else None
        return self.line(when, record.levelno, _message(record), fields, error)

    def stamp(self, now: float) -> str:
        """Write a Unix time."""
        passed = now - self._second
        if passed >= 1.0 or passed < 0.0:
            self._second = now // 1.0
            utc = time.gmtime(self._second)
            self._written = time.strftime("%Y-%m-%dT%H:%M:%S", utc)
            passed = now - self._second
        return self._written + _FRACTIONS[floor(passed * 1000.0)]

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        """Return a line without its newline; `message` is printable."""
        start, rest = self.opening(level, message, fields) or ("", "")
        line = f"{start}{when}{rest}{self.end}"
        return line if error is None else self._with_error(line, error)

    def opening(self, level: int, message: str, fields: Fields) -> Opening | None:
        """Return what is before and after the time, with the first fields.

        None: the fields of this line have to be arranged all together.
        """
        raise NotImplementedError

    def _write(self, fields: Fields) -> str:
        shown, before, between = "", self.before, self.between
        for name, value in fields.items():
            written = self.quote(value) if isinstance(value, str) else value
            shown = f"{shown}{before}{name}{between}{written}"
        return shown

    def _with_error(self, line: str, error: BaseException) -> str:
        return f"{line}\n{_traceback(error)}"


def _quote(text: str) -> str:
    # Most are ids, and the pattern takes longer.
    if text.isalnum() and text.isascii() and len(text) <= _LONGEST:
        return text
    return text if _PLAIN.fullmatch(text) else _in_quotes(text)


class TextFormatter(LineFormatter):
    """`time level message key=value …`, for people and grep."""

    before, between = " ", "="
    quote = staticmethod(_quote)

    def opening(self, level: int, message: str, fields: Fields) -> Opening:
        source = self._write(self._source)
        return "", f" {_level_name(level)} {message}{source}{self._write(fields)}"


class JsonFormatter(LineFormatter):
    """One JSON object on a line, for machines."""

    before, between, end, mark = ',"', '":', "}", '"'
    quote = staticmethod(_in_quotes)

    def opening(self, level: int, message: str, fields: Fields) -> Opening:
        begun = f'"level":"{_level_name(level)}","message":{_in_quotes(message)}'
        source = self._write(self._source)
        return '{"time":"', f'",{begun}{source}{self._write(fields)}'

    def _with_error(self, line: str, error: BaseException) -> str:
        return f'{line[:-1]},"exception":{_in_quotes(_traceback(error))}}}'


class TerminalFormatter(LineFormatter):
    """Columns, for the eyes of people: `time level message key=value …`.

    The line of a request begins with its status, its time, and where it went.
    """

    def __init__(self, process: int = 0, *, colours: bool) -> None:
        super().__init__(process)
        self._colours = colours

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        name = _level_name(level)
        parts = [self._paint(when, _DIM), self._paint(f"{name:7}", _COLOURS.get(name))]
        rest = {**fields, **self._source}
        if message == "request" and "route" in rest:
            parts += self._request(rest)
        else:
            parts.append(message)
        for key, value in rest.items():
            colour = _COLOURS["error"] if key in ("error", "detail") else None
            shown = self._paint(_shown(value), colour)
            parts.append(self._paint(f"{key}=", _DIM) + shown)
        line = "  ".join(parts)
        return line if error is None else f"{line}\n{_traceback(error)}"

    def stamp(self, now: float) -> str:
        """Write a time without its day, in the time zone of this machine."""
        seconds = int(now)
        of_day = time.strftime("%H:%M:%S", time.localtime(seconds))
        return f"{of_day}.{int((now - seconds) * 1000):03d}"

    def opening(self, level: int, message: str, fields: Fields) -> None:
        """Return None: the columns of a request come first."""

    def _request(self, fields: dict[str, str | int | float]) -> Iterator[str]:
        """Take the columns of a request from its fields."""
        if fields.get("outcome") == "complete":
            del fields["outcome"]
        if fields.get("attempts") == 1:
            del fields["attempts"]
        status = int(fields.pop("status", 0))
        took = float(fields.pop("duration_ms", 0.0))
        yield self._paint(str(status or "-"), _STATUS.get(status // 100))
        yield f"{took / 1000:6.2f} s" if took >= 1000 else f"{took:5.0f} ms"
        path = fields.pop("path", "") or fields["route"]
        fields.pop("route")
        for name, width in (
            (f"{fields.pop('method')} {_shown(path)}", 25),
            *(
                (_shown(fields.pop(each, "-")), width)
                for each, width in (("model", 16), ("worker", 16), ("subject", 10))
            ),
        ):
            yield f"{name:{width}}"

    def _paint(self, text: str, colour: str | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours and colour else text


# "Select graphic rendition" (ECMA-48, 8.3.117)
_DIM = "2"
_COLOURS = {"debug": _DIM, "warning": "33", "error": "31", "critical": "1;31"}
_STATUS = {2: "32", 4: "33", 5: "31"}  # by the first digit


def _shown(value: str | float) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else _in_quotes(value)
    return str(value)


class JournalFormatter(LineFormatter):
    """Puts the priority in front of each line of another formatter."""

    def __init__(self, formatter: LineFormatter) -> None:
        super().__init__(formatter.process)
        self._formatter = formatter
        self.before, self.between = formatter.before, formatter.between
        self.end, self.mark = formatter.end, formatter.mark
        self.quote = formatter.quote

    def line(
        self,
        when: str,
        level: int,
        message: str,
        fields: Fields = _NO_FIELDS,
        error: BaseException | None = None,
    ) -> str:
        line = self._formatter.line(when, level, message, fields, error)
        return prioritised(line, level)

    def opening(self, level: int, message: str, fields: Fields) -> Opening | None:
        found = self._formatter.opening(level, message, fields)
        return found and (prioritised(found[0], level), found[1])


def _message(record: logging.LogRecord) -> str:
    """Return the message of a record, on one line."""
    text = record.getMessage()
    if record.name == "asyncio":  # the lines that follow are `repr`s of other objects
        text = _TASK_RESULT.sub("", text.partition("\n")[0])
    return text if text.isprintable() else _in_quotes(text)[1:-1]


def _traceback(error: BaseException) -> str:
    """Return the types and frames of an exception and its causes, but no messages.

    Messages may quote text of a user: that of `int("…")` does, and many others.
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


@functools.cache
def _level_name(level: int) -> str:
    return logging.getLevelName(level).lower()
