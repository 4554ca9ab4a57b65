"""The program's log: how its lines are written to standard error (`lines.py`).

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
import select
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from gollama_proxy.config.settings import Log
from gollama_proxy.telemetry.lines import LineFormatter, formatter_for, message_of

if TYPE_CHECKING:
    import asyncio

DELAY = 0.02  # seconds that a line about a request may wait
BATCH = 1 << 16  # characters that are written without waiting any longer
MOST_UNWRITTEN = 1 << 18  # characters kept while standard error is not read
PATIENCE = 1.0  # seconds to wait for its reader when the process ends
QUIET = 10.0  # seconds without a repetition, after which a warning is written again
SUMMARY = 60.0  # seconds after which the repetitions so far are counted in a line
MOST_KINDS = 200  # of warnings whose repetitions are counted
MOST_MESSAGE = 500  # characters of a warning that are repeated with their number

_LOST = "{} lines were lost: standard error could not be written"
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, on which there may be room later


def configure(log: Log, process: int = 0) -> None:
    """Send the program's log to standard error, in the configured format.

    Each line has the number of the process, unless that is 0.
    """
    handler = BatchHandler(
        sys.stderr, formatter_for(log, sys.stderr, process), Bursts()
    )
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
            handler.write_as(formatter_for(log, sys.stderr, handler.form.process))


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
        message = message_of(record)[:MOST_MESSAGE]
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
