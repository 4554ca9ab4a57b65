r"""Server-sent events, as far as a relay has to understand and change them.

A relay does not parse a stream.  It reads the first events, in which an error should
have been a status, and the last bytes (answer.py).  The format is that of the HTML
standard, section 9.2.6: events end with a blank line, lines with LF, CR or CRLF.

Three things change in a body on its way: usage is hidden from a client, an error gets
the shape of the API, and a model is renamed.  Each works on a body that comes in
pieces, and decodes nothing in the common case.

A stream reports its usage in an event before `[DONE]`, if asked to (OpenAI's API
reference, chat completions, `stream_options.include_usage`):

    data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":3},…}

The hub asks for it in the client's place.  A client that has not asked may fail on that
event: code that takes `choices[0]` of each event is common.  So the event is left out.

An alias is known to the client alone, and an answer names its model in every event:

    data: {"choices":[…],"model":"qwen2.5-7b","object":"chat.completion.chunk"}

Decoding each of them would cost more than relaying does, so the name is found by its
key.  It may stand at any depth (`/v1/responses` has it in a separate object); a
value that is not the worker's name is left alone.

Every other byte stays as it is, spaces included, and generated text cannot be mistaken
for either: a JSON string holds no bare quote (RFC 8259, 7), so in a text the key would
read `\"model\"`, and a longer string that ends like the key has a backslash in front.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Sequence

import msgspec

from gollama_proxy.wire.errors import status_of, write_error_event
from gollama_proxy.wire.fields import encode
from gollama_proxy.wire.schema import (
    UNREADABLE,
    Api,
    Ending,
    EventError,
    chunk_head,
    error_event,
    usage_chunk,
)

DONE = b"data: [DONE]\n\n"
# As numbers, which `in` finds at a tenth of the cost (benchmarks/RESULTS.md).
CR, LF = b"\r\n"
# The first letters of its lines: data, event, id, retry, and of a comment.
BEGINNINGS = (b"d", b"e", b"i", b"r", b":")
_COLON = ord(":")
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
    if CR in held:
        *events, rest = _BLANK_LINE.split(held)
    else:  # the common case, at a tenth of the cost
        *events, rest = held.split(b"\n\n")
    return events, rest


def data_of(event: bytes) -> bytes | None:
    """Return the data of one event; None for a comment, a ping or a name alone."""
    if event.startswith(b"data:") and LF not in event and CR not in event:
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
            if not (b"\n\n" in edge or (CR in edge and _BLANK_LINE.search(edge))):
                self._edge = edge[-3:]
                return []
            data = b"".join(self._rest)
        # As `split_events`, without a call for each event of an assembled answer.
        events = _BLANK_LINE.split(data) if CR in data else data.split(b"\n\n")
        rest = events.pop()
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


# Generated text cannot be mistaken for it: its quotes are escaped.
_TEXT = b'"delta":{"content":"'
_NO_TEXT = (b'"', b"")


def opens(events: Sequence[bytes], ending: Ending) -> bool:
    """Return whether one of these events carries content.

    An event with nothing but a role comes before a token is generated, from servers
    other than llama-server even before the prompt is read.
    """
    for event in reversed(events):  # the first one often has just the role
        # As nearly all, without parsing: its text begins, and does not end at once.
        at = event.find(_TEXT) + len(_TEXT)
        if at >= len(_TEXT) and event[at : at + 1] not in _NO_TEXT:
            return True
        if event.startswith(b"data: {") and LF not in event and CR not in event:
            data: bytes | None = event[6:]  # without a call
        else:
            data = data_of(event)
        if data is not None and _carries(data, ending):
            return True
    return False


def content_events(held: bytes, ending: Ending) -> int:
    """Count the events that carry content, and are neither errors nor `[DONE]`."""
    events = [data for data in events_in(held) if _carries(data, ending)]
    return sum(data != b"[DONE]" and error_in(data) is None for data in events)


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


# Bytes in front of the key by which an error is known.
_BEFORE_ERROR = 63
_ERROR_START = re.compile(
    rb'.{0,%d}"(?:error"|message"\s*:\s*")' % _BEFORE_ERROR, re.DOTALL
)
# Of Responses; its error is a field of the response.
_FAILED = b'"response.failed"'
# Codes of such an error that another worker would report, too.
_FAULT_OF_REQUEST = re.compile("invalid|image")


def error_in(data: bytes) -> EventError | None:
    """Read an event that is an error; None when it is anything else."""
    if b'"error"' not in data and b'"message"' not in data:
        return None
    if _ERROR_START.match(data) is None and _FAILED not in data:
        return None
    try:
        event = error_event.decode(data)
    except UNREADABLE:
        return None
    if event.type == "response.failed":
        return error_of_response(event.response)
    found = event.error
    if isinstance(found, dict):
        fields = (found.get(name) for name in ("message", "type", "code"))
        return _event_error(*fields)
    if found is not None:
        return _event_error(found, None, None)
    if event.type == "error" or (event.message and isinstance(event.code, int)):
        return _event_error(event.message, event.type, event.code)
    return None


def error_of_response(response: object) -> EventError:
    """Read why a response failed (Responses API, `response.failed`).

    Its code is a word, which becomes the status that it stands for.
    """
    found = response.get("error") if isinstance(response, dict) else None
    if not isinstance(found, dict):
        return EventError()
    error = _event_error(found.get("message"), None, found.get("code"))
    if error.code == "rate_limit_exceeded":
        error.type, error.code = "rate_limit_error", 429
    elif isinstance(error.code, str) and _FAULT_OF_REQUEST.search(error.code):
        error.type, error.code = "invalid_request_error", 400
    return error


def may_become_error(begun: bytes) -> bool:
    """Return whether an event of which the beginning has come may be an error.

    One that has ended, and a comment, may not.
    """
    if begun[:1] not in BEGINNINGS or begun[0] == _COLON or len(begun) > MOST_ERROR:
        return False
    data = data_of(begun) or b""
    if data[:1] not in (b"", b"{"):
        return False
    return len(data) <= _BEFORE_ERROR or _ERROR_START.match(data) is not None


def _event_error(message: object, kind: object, code: object) -> EventError:
    """Take what an event has; some servers write numbers as text."""
    found = EventError(message if isinstance(message, str) else "")
    if isinstance(kind, str) and kind:
        found.type = kind
    if isinstance(code, str) and re.fullmatch(r"[1-5]\d\d", code, re.ASCII):
        code = int(code)
    if isinstance(code, (int, str)) and not isinstance(code, bool):
        found.code = code
    return found


# --- Usage, hidden from a client --------------------------------------------------

# A longer event is passed on before it is complete; real ones take 600 bytes at most.
HELD = 8 << 10

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*[^\s\]]')


class UsageHider(EventFilter):
    """Leaves the events with nothing but usage out of a stream."""

    __slots__ = ()

    def _concerns(self, data: bytes) -> bool:
        # Some servers put a null into every event.
        return b'"usage"' in data and _USAGE.search(data) is not None

    def _may_concern(self, begun: bytes) -> bool:
        return len(begun) <= HELD and _CHOICE.search(begun) is None

    def _change(self, event: bytes) -> bytes:
        return b"" if self._is_usage(event) else event

    def _is_usage(self, event: bytes) -> bool:
        if not (self._concerns(event) and self._may_concern(event)):
            return False
        try:
            chunk = usage_chunk.decode(data_of(event) or b"")
        except UNREADABLE:
            return False
        return not chunk.choices and chunk.error is None

    def finish(self) -> bytes:
        """End the stream; return the bytes that were held back.

        Usage that lacks nothing but its blank line is left out.
        """
        begun = not self._passing
        held = self.withdraw()
        return b"" if begun and self._is_usage(held) else held

    def withdraw(self) -> bytes:
        """End a stream that was cut: return the bytes that the client does not have."""
        held, self._held = self._held, b""
        self._passing = False
        return held


# --- Errors, in the shape of the API ----------------------------------------------

# Bytes of the longest event that is held; an error has a few hundred.
MOST_ERROR = 64 << 10
# Beginnings of an event that is an error, from llama-server and from the APIs.
_ERROR_BEGINNINGS = (
    b"event: error",
    b"event:error",
    b'data: {"error"',
    b'data:{"error"',
    b'data: {"type":"error"',
    b'data: {"type": "error"',
)


class ErrorReshaper(EventFilter):
    """Gives the error events of a worker's stream the shape of the API.

    It is for the APIs whose events have names: there, llama-server writes an error
    that the clients of these APIs do not expect.
    """

    __slots__ = ("_api", "_last")

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api
        self._last = b""  # what was passed on last

    def __repr__(self) -> str:
        return f"<ErrorReshaper {self._api.value} held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        passed = super().feed(data)
        self._last = passed or self._last
        return passed

    def _concerns(self, data: bytes) -> bool:
        return data.find(b"error") >= 0  # cheaper than `in`

    def _may_concern(self, begun: bytes) -> bool:
        return len(begun) <= MOST_ERROR and any(
            begun.startswith(beginning) or beginning.startswith(begun)
            for beginning in _ERROR_BEGINNINGS
        )

    def _change(self, event: bytes) -> bytes:
        if not event.startswith(_ERROR_BEGINNINGS):
            return event
        body = data_of(event) or b""
        return write_error_event(self._api, status_of(body), body, self._last)


# --- A model, renamed -------------------------------------------------------------

_KEY = b'"model"'
# Spaces around the colon, which servers other than llama-server may send.  Longer runs
# are not looked through.
MOST_SPACES = 64


class Renamer:
    """Replaces `old` by `new` in a body that comes in any pieces.

    Bytes that may become the name are held back until that is decided, and `finish()`
    returns the rest.  What is held is bounded: no spelling of a name takes more than
    six bytes for each half of a UTF-16 character.
    """

    __slots__ = ("_full", "_held", "_longest", "_new", "_old", "_rest")

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, encode(new)
        self._held = b""
        most = 6 * len(old.encode("utf-16-le", "surrogatepass")) // 2
        spaces = rb"[ \t\r\n]{0,%d}+" % MOST_SPACES
        text = rb'"(?:[^"\\]|\\.){0,%d}+' % most
        self._longest = len(_KEY) + 2 * MOST_SPACES + len(b':"') + most
        # The key comes before the check of what is in front of it, to be found quickly.
        self._full = re.compile(
            rb'"model"(?<!\\"model")%b:%b(%b")' % (spaces, spaces, text), re.DOTALL
        )
        self._rest = re.compile(
            rb"%b(?::%b(?:%b\\?)?)?" % (spaces, spaces, text), re.DOTALL
        )

    def __repr__(self) -> str:
        return f"<Renamer of {self._old!r} held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the body; return the bytes that are decided."""
        if self._held:
            data = self._held + data
        pieces: list[bytes] = []
        done = 0
        if _KEY in data:
            for match in self._full.finditer(data):
                if _text(match[1]) == self._old:
                    pieces += data[done : match.start(1)], self._new
                    done = match.end()
        decided = self._decided(data, done)
        self._held = data[decided:]
        if not pieces:
            return data[:decided]
        return b"".join((*pieces, data[done:decided]))

    def finish(self) -> bytes:
        """End the body; return the bytes that were held back."""
        held, self._held = self._held, b""
        return held

    def _decided(self, data: bytes, done: int) -> int:
        """Return the end of the bytes that cannot become a part of the name."""
        end = len(data)
        at = data.rfind(_KEY, max(done, end - self._longest))
        if at < 0 or self._rest.fullmatch(data, at + len(_KEY)) is None:
            at = data.rfind(b'"', max(done, end - len(_KEY)))
            if at < 0 or not _KEY.startswith(data[at:]):
                at = end
        # A backslash changes the quote behind it, so both stay together.
        return at - 1 if data[at - 1 : at] == b"\\" else at


def _text(value: bytes) -> str | None:
    try:
        return msgspec.json.decode(value, type=str)
    except UNREADABLE:
        return None


def renamed(body: bytes, old: str, new: str) -> bytes:
    """Replace `old` by `new` in a whole body."""
    renamer = Renamer(old, new)
    return renamer.feed(body) + renamer.finish()
