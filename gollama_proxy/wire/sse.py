"""Server-sent events, as far as a relay has to understand them.

A relay does not parse a stream.  It reads the first events, in which an error should
have been a status, and the last bytes (ending.py).  The format is that of the HTML
standard, section 9.2.6: events end with a blank line, lines with LF, CR or CRLF.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Iterator

from gollama_proxy.wire.openai import Ending
from gollama_proxy.wire.schema import (
    UNREADABLE,
    EventError,
    chunk_head,
    error_event,
)

DONE = b"data: [DONE]\n\n"
# The first letters of its lines: data, event, id, retry, and of a comment.
BEGINNINGS = (b"d", b"e", b"i", b"r", b":")
# Headers that keep proxies from buffering or caching a stream (nginx does by default).
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# The group is atomic so that a CRLF is not taken for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
# A CR at the end may be half of a CRLF.
_CERTAIN_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r(?!\Z)){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")


# --- Events -----------------------------------------------------------------------


def split_events(held: bytes) -> tuple[list[bytes], bytes]:
    """Split a stream at its blank lines: complete events, and what follows them."""
    if b"\r" in held:
        *events, rest = _BLANK_LINE.split(held)
    else:  # the common case, at a tenth of the cost
        *events, rest = held.split(b"\n\n")
    return events, rest


def data_of(event: bytes) -> bytes | None:
    """Return the data of one event; None for a comment, a ping or a name alone."""
    if event.startswith(b"data:") and b"\n" not in event and b"\r" not in event:
        return event[5:].lstrip(b" ")
    lines = _LINE_END.split(event)
    data = [line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:")]
    return b"\n".join(data) if data else None


def events_in(held: bytes) -> Iterator[bytes]:
    """Yield the data of each event that is complete and has data."""
    for event in split_events(held)[0]:
        data = data_of(event)
        if data is not None:
            yield data


class Gatherer:
    """Joins the pieces of a stream into whole events; reads each byte once.

    A worker may send comments for as long as it likes, one in a read, or an event that
    never ends.
    """

    __slots__ = ("_edge", "_rest", "size")

    def __init__(self) -> None:
        self.size = 0  # bytes of an unfinished event
        self._rest: list[bytes] = []
        self._edge = b""  # its last bytes, where a blank line may have begun

    def __repr__(self) -> str:
        return f"<Gatherer, {self.size} bytes of an event>"

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next piece; return the events that it completes, if any."""
        if self.size:
            self._rest.append(data)
            self.size += len(data)
            edge = self._edge + data
            if not (b"\n\n" in edge or (b"\r" in edge and _BLANK_LINE.search(edge))):
                self._edge = edge[-3:]
                return []
            data = b"".join(self._rest)
        if b"\r" in data:
            *events, rest = _BLANK_LINE.split(data)
        else:  # inline: this is done for each event of an assembled answer
            *events, rest = data.split(b"\n\n")
        self._rest, self.size, self._edge = [rest], len(rest), rest[-3:]
        return events


class EventFilter(abc.ABC):
    """Changes some events of a stream that comes in pieces; others pass untouched.

    An event that may have to be changed is held back until that is decided, and
    `finish()` returns the rest.
    """

    __slots__ = ("_held", "_passing")

    def __init__(self) -> None:
        self._held = b""
        self._passing = False  # the beginning of this event is out

    def __repr__(self) -> str:
        return f"<{type(self).__name__} held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream; return the bytes that are decided."""
        if not (self._held or self._passing):
            # Nearly every token comes as a whole event.
            if data.endswith(b"\n\n") and not self._concerns(data):
                return data
        else:
            data = self._held + data
        pieces: list[bytes] = []
        start = 0
        for blank in _CERTAIN_BLANK_LINE.finditer(data):
            event = data[start : blank.end()]
            pieces.append(event if self._passing else self._change(event))
            self._passing = False
            start = blank.end()
        rest = data[start:]
        if rest and (self._passing or not self._may_concern(rest)):
            # Line ends stay, or the blank line that they are a part of would be missed.
            out = rest.rstrip(b"\r\n")
            self._passing = True
            pieces.append(out)
            rest = rest[len(out) :]
        self._held = rest
        return b"".join(pieces)

    def finish(self) -> bytes:
        """End the stream; return the bytes that were held back."""
        held, self._held = self._held, b""
        return held

    @abc.abstractmethod
    def _concerns(self, data: bytes) -> bool:
        """Return False where no event in these bytes can be one to be changed."""

    @abc.abstractmethod
    def _may_concern(self, begun: bytes) -> bool:
        """Return False where an event that begins so need not be changed."""

    @abc.abstractmethod
    def _change(self, event: bytes) -> bytes:
        """Return what is passed on for a whole event, its blank line included."""


# --- The beginning of a stream ----------------------------------------------------


def opens(events: Iterable[bytes], ending: Ending) -> bool:
    """Return whether one of these events carries content.

    An event with nothing but a role comes before a token is generated, from servers
    other than llama-server even before the prompt is read.
    """
    for event in events:
        alone = b"\n" not in event and b"\r" not in event
        if alone and event.startswith(b"data: {"):  # as nearly all, without a call
            data: bytes | None = event[6:]
        else:
            data = data_of(event)
        if data is not None and _carries(data, ending):
            return True
    return False


def content_events(held: bytes, ending: Ending) -> int:
    """Count the events that carry content and are not errors."""
    events = [data for data in events_in(held) if _carries(data, ending)]
    return sum(error_in(data) is None for data in events)


def _carries(data: bytes, ending: Ending) -> bool:
    if ending is Ending.NAMED:
        return _PREAMBLE.search(data) is None
    if ending is not Ending.DONE:
        return True
    try:
        event = chunk_head.decode(data)
    except UNREADABLE:
        return True  # it is relayed as it is
    if not event.choices or event.prompt_progress is not None:
        return True  # an error, usage; or progress that the client has asked for
    for choice in event.choices:
        if choice.finish_reason or choice.text:
            return True
        for name, value in (choice.delta or {}).items():
            if value and name != "role":
                return True
    return False


# The events of Anthropic's and OpenAI's newer API that come before the first word.
_PREAMBLE = re.compile(
    rb'"type"\s*:\s*"(?:message_start|content_block_start|ping|response\.(?:created|'
    rb'queued|in_progress|output_item\.added|content_part\.added))"'
)


_ERROR_START = re.compile(rb'.{0,63}"(?:error"|message"\s*:\s*")', re.DOTALL)


def error_in(data: bytes) -> EventError | None:
    """Read an event that is an error; None when it is anything else."""
    if b'"error"' not in data and b'"message"' not in data:
        return None
    if _ERROR_START.match(data) is None:
        return None
    try:
        event = error_event.decode(data)
    except UNREADABLE:
        return None
    if event.error is not None:
        return event.error
    if event.type == "error" or (event.message and isinstance(event.code, int)):
        return EventError(event.message, event.type, event.code)
    return None
