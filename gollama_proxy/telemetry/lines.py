"""Lines of the log: as text, as JSON, in columns for a terminal, for the journal."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from json.encoder import encode_basestring_ascii as _in_quotes
from math import floor
from typing import TextIO

from gollama_proxy.config.settings import Log

MOST_CAUSES = 5  # exceptions shown of a chain of causes

# The part of a line after its message; the names are those of the program.
Fields = Mapping[str, str | int | float]
_NO_FIELDS: Fields = {}
Opening = tuple[str, str]  # of a line: what is before and after its time
# The result or exception of a task or future, in its `repr`.
_TASK_RESULT = re.compile(r" (?:exception|result)=.*(?=> took [\d.]+ seconds\Z|>\Z)")
_LONGEST = 128  # characters of a value without quotes
_PLAIN = re.compile(rf"[\w./:@+-]{{1,{_LONGEST}}}", re.ASCII)
# The priorities of syslog, from the level of Python where each begins.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
# A format with a width takes longer than all else of a time.
_FRACTIONS = tuple(f".{milliseconds:03d}Z" for milliseconds in range(1000))


def formatter_for(log: Log, stream: TextIO | None, process: int) -> LineFormatter:
    """Return the configured format, or the one that suits a stream."""
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


# --- The formats ------------------------------------------------------------------


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
        return self.line(when, record.levelno, message_of(record), fields, error)

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


# --- Parts of a line --------------------------------------------------------------


def message_of(record: logging.LogRecord) -> str:
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
