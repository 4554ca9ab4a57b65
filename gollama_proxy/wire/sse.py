"""Server-sent events, as far as a relay has to understand them.

A relay does not parse a stream.  It looks at the first event (is it an error that
should have been a status?), counts events with one scan of each read, and judges from
the last few kilobytes whether the answer was complete.  The format is that of the HTML
standard, section 9.2.6: events end with a blank line, lines with LF, CR or CRLF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from gollama_proxy.wire.openai import Ending
from gollama_proxy.wire.private import Private

DONE = b"data: [DONE]\n\n"
# The first letters of its lines: data, event, id, retry, and of a comment.
BEGINNINGS = (b"d", b"e", b"i", b"r", b":")
# What a proxy on the way must not do to a stream (nginx buffers unless it is told).
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# How much of a stream's end is kept; llama-server's last events take 1.2 KiB.
TAIL = 1400

# Atomic, lest a CRLF be taken for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
# A JSON string holds no bare quote and no line end, so none of what follows can be
# found in a model's words.
_DONE_LINE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\][\r\n]")
_MARKS = {
    Ending.DONE: re.compile(_DONE_LINE.pattern + rb'|"finish_reason"\s*:\s*"[^"]'),
    Ending.STOP: re.compile(rb'"stop"\s*:\s*true|"stop_type"\s*:\s*"(?!none)'),
    Ending.NAMED: re.compile(
        rb"(?:^|[\r\n])event: ?"
        rb"(?:message_stop|response\.(?:completed|incomplete|failed))[\r\n]"
    ),
    Ending.TRANSCRIPT: re.compile(
        _DONE_LINE.pattern + rb'|"type"\s*:\s*"transcript\.text\.done"'
    ),
    Ending.BODY: re.compile(rb""),
}
_REASONS = re.compile(rb'"finish_reason"\s*:\s*(null|""|"[^"]+")')
_ERROR_EVENT = re.compile(
    rb'(?:^|[\r\n])(?:data: ?\{\s*"error"\s*:|event: ?error[\r\n])'
)
# The same wherever it stands in an event of an API that has no such field otherwise.
_ERROR = re.compile(
    rb"(?:^|[\r\n])data: ?\{[^\r\n]*?"
    rb'(?:"error"\s*:\s*(?:\{|"[^"])|"object"\s*:\s*"error")'
)
_SEVERAL = re.compile(rb'"index"\s*:\s*[1-9]')


class Verdict(NamedTuple):
    """What the end of an event stream says about it."""

    complete: bool  # the mark of a complete answer was seen
    done: bool  # a `[DONE]` was seen
    failed: bool  # the worker itself told an error


def judge(tail: bytes, ending: Ending) -> Verdict:
    """Read the end of a stream, its last `TAIL` bytes at least."""
    done = _DONE_LINE.search(tail) is not None
    if ending is Ending.DONE:
        reasons = _REASONS.findall(tail)
        complete = done or (
            bool(reasons) and len(reasons[-1]) > 2 and reasons[-1] != b"null"
        )
    else:
        complete = _MARKS[ending].search(tail) is not None
    if complete and _SEVERAL.search(tail):
        complete = _all_ended(tail, ending)
    return Verdict(complete, done, has_error(tail, ending))


def has_error(tail: bytes, ending: Ending) -> bool:
    """Say whether one of these events is an error."""
    if b"error" not in tail:
        return False
    if _ERROR_EVENT.search(tail) is not None:
        return True
    named = ending not in (Ending.DONE, Ending.STOP)
    return not named and _ERROR.search(tail) is not None


def _all_ended(tail: bytes, ending: Ending) -> bool:
    """Say whether each choice in the end of a stream has ended, or none says so."""
    ended: dict[int, bool] = {}
    for data in events_in(tail):
        for index, ends in ends_in(data, ending).items():
            ended[index] = ended.get(index, False) or ends
    return all(ended.values()) or not any(ended.values())


class _Choice(Private):
    index: int = 0
    finish_reason: str | None = None


class _Choices(Private):
    choices: list[_Choice] | None = None


class _Native(Private):
    index: int | None = None
    stop: bool = False


_choices = msgspec.json.Decoder(_Choices)
_native = msgspec.json.Decoder(_Native)


def ends_in(data: bytes, ending: Ending) -> dict[int, bool]:
    """Read which choices an event tells of, and whether they end with it."""
    try:
        if ending is Ending.STOP:
            told = _native.decode(data)
            return {} if told.index is None else {told.index: told.stop}
        if ending is Ending.DONE:
            choices = _choices.decode(data).choices or ()
            return {choice.index: bool(choice.finish_reason) for choice in choices}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # `[DONE]`, or half of an event
    return {}


def unfinished(tail: bytes) -> bytes:
    """Give what follows the last blank line: a part of an event."""
    end = 0
    for blank in _BLANK_LINE.finditer(tail):
        end = blank.end()
    return tail[end:]


def events_in(held: bytes) -> Iterator[bytes]:
    """Yield the data of each event that is complete and has some.

    Comments and events without data, such as the pings of llama-server, are passed
    over.
    """
    start = 0
    for blank in _BLANK_LINE.finditer(held):
        lines = _LINE_END.split(held[start : blank.start()])
        data = [line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:")]
        if data:
            yield b"\n".join(data)
        start = blank.end()


def opens(held: bytes, ending: Ending) -> bool:
    """Tell whether a stream has begun in earnest: with an event that carries content.

    One that only says who is going to speak is sent before a token is generated, by
    servers other than llama-server even before the prompt is read.
    """
    return any(_carries(data, ending) for data in events_in(held))


def content_events(held: bytes, ending: Ending) -> int:
    """Count the events that carry content, and are no error."""
    events = [data for data in events_in(held) if _carries(data, ending)]
    return sum(error_in(data) is None for data in events)


class Gatherer:
    """Gathers the pieces of a stream into whole events; a byte is looked at once.

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

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; return the events that are complete by it, if any."""
        self._rest.append(data)
        self.size += len(data)
        edge, whole = self._edge + data, b""
        if _BLANK_LINE.search(edge):
            text = b"".join(self._rest)
            edge = unfinished(text)
            whole = text.removesuffix(edge)
            self._rest, self.size = [edge], len(edge)
        self._edge = edge[-3:]
        return whole


def _carries(data: bytes, ending: Ending) -> bool:
    if ending is Ending.NAMED:
        return _PREAMBLE.search(data) is None
    if ending is not Ending.DONE:
        return True
    try:
        event = _opening.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True  # not ours to judge
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
    # llama-server's event on `/v1/messages`, and that of Responses, have no object
    # around what they tell.
    type: str = ""
    message: str = ""
    code: int | str | None = None


_decoder = msgspec.json.Decoder(_ErrorEvent)
_ERROR_START = re.compile(rb'.{0,63}"(?:error"|message"\s*:\s*")', re.DOTALL)


def error_in(data: bytes) -> EventError | None:
    """Read an event that is an error; None when it is anything else."""
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
