"""Server-sent events, as far as a relay has to understand them.

A relay does not parse a stream.  It reads the first events, in which an error should
have been a status, and the last bytes (ending.py).  The format is that of the HTML
standard, section 9.2.6: events end with a blank line, lines with LF, CR or CRLF.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from gollama_proxy.wire.openai import Ending
from gollama_proxy.wire.private import Private

DONE = b"data: [DONE]\n\n"
# The first letters of its lines: data, event, id, retry, and of a comment.
BEGINNINGS = (b"d", b"e", b"i", b"r", b":")
# Headers that keep proxies from buffering or caching a stream (nginx does by default).
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# The group is atomic so that a CRLF is not taken for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
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


# --- The beginning of a stream ----------------------------------------------------


def opens(events: Iterable[bytes], ending: Ending) -> bool:
    """Return whether one of these events carries content.

    An event with nothing but a role comes before a token is generated, from servers
    other than llama-server even before the prompt is read.
    """
    found = map(data_of, events)
    return any(data is not None and _carries(data, ending) for data in found)


def content_events(held: bytes, ending: Ending) -> int:
    """Count the events that carry content, and are no error."""
    events = [data for data in events_in(held) if _carries(data, ending)]
    return sum(error_in(data) is None for data in events)


def _carries(data: bytes, ending: Ending) -> bool:
    if ending is Ending.NAMED:
        return _PREAMBLE.search(data) is None
    if ending is not Ending.DONE:
        return True
    try:
        event = _opening.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True  # it is relayed as it is
    if not event.choices or event.prompt_progress is not None:
        return True  # an error, usage; or progress that the client has asked for
    return any(
        choice.finish_reason
        or choice.text
        or any(v for name, v in (choice.delta or {}).items() if name != "role")
        for choice in event.choices
    )


class _OpeningChoice(Private):
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Opening(Private):
    choices: list[_OpeningChoice] | None = None
    prompt_progress: Any = None


_opening = msgspec.json.Decoder(_Opening)
# The events of Anthropic's and OpenAI's newer API that come before the first word.
_PREAMBLE = re.compile(
    rb'"type"\s*:\s*"(?:message_start|content_block_start|ping|response\.(?:created|'
    rb'queued|in_progress|output_item\.added|content_part\.added))"'
)


class EventError(Private):
    """The `error` object of an event, as llama-server and OpenAI write it."""

    message: str = ""
    type: str = "server_error"
    code: int | str | None = None


class _ErrorEvent(Private):
    error: EventError | None = None
    # llama-server's event on `/v1/messages`, and that of Responses, have these fields
    # without an object around them.
    type: str = ""
    message: str = ""
    code: int | str | None = None


_decoder = msgspec.json.Decoder(_ErrorEvent)
_ERROR_START = re.compile(rb'.{0,63}"(?:error"|message"\s*:\s*")', re.DOTALL)


def error_in(data: bytes) -> EventError | None:
    """Read an event that is an error; None when it is anything else."""
    if b'"error"' not in data and b'"message"' not in data:
        return None
    if _ERROR_START.match(data) is None:
        return None
    try:
        event = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if event.error is not None:
        return event.error
    if event.type == "error" or (event.message and isinstance(event.code, int)):
        return EventError(event.message, event.type, event.code)
    return None
