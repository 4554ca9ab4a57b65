r"""Asking a worker for usage, and hiding it from a client that has not asked.

A stream reports how many tokens it took only on request (OpenAI's API reference, chat
completions, `stream_options.include_usage`), in an event before `[DONE]`:

    data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":3},…}

So the hub asks in the client's place.  A client that has not asked may fail on that
event: code that takes `choices[0]` of each event is common.  So the event is left out,
and every other byte stays as it is.

Generated text cannot be mistaken for it: a JSON string holds no bare quote (RFC 8259,
7).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gollama_proxy.wire import sse
from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.private import Private

# --- The request ------------------------------------------------------------------

_ASKED = b'{"include_usage":true}'
_ESCAPED = re.compile(rb"\\u00[5-7]")  # a letter of the key, as nobody writes it
# What says as little as saying nothing.  Other options are left alone: vLLM's
# `continuous_usage_stats` would put usage into each event.
_SILENT = re.compile(rb'null|\{\s*(?:"include_usage"\s*:\s*(?:false|null)\s*)?\}')


def asking(body: bytes) -> bytes | None:
    """Ask for usage, all else to the byte as it is; None if the client says how.

    `body` is a JSON object that is accepted and not empty.
    """
    if b'"stream_options"' in body or _ESCAPED.search(body):
        scanner = FieldScanner()
        scanner.feed(body)
        field = scanner.found.get("stream_options")
        if field is not None:
            match = _SILENT.match(body, field.start)
            if match is None:
                return None
            return b"%b%b%b" % (body[: match.start()], _ASKED, body[match.end() :])
    brace = body.index(b"{") + 1
    return b'%b"stream_options":%b,%b' % (body[:brace], _ASKED, body[brace:])


# --- The answer -------------------------------------------------------------------

# Half an event that is longer is passed on; real ones take 600 bytes at most.
HELD = 8 << 10

# As in sse.py, but a CR at the end may be half of a CRLF.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r(?!\Z)){2}")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*[^\s\]]')


class _Event(Private):
    choices: list[Any]
    usage: dict[str, Any]
    error: Any = None


_event = msgspec.json.Decoder(_Event)


class UsageHider:
    """Leaves the events with nothing but usage out of a stream that comes in pieces.

    What may become one is held back until that is decided, at most `HELD` bytes;
    `finish()` gives what is left.
    """

    __slots__ = ("_held", "_passing")

    def __init__(self) -> None:
        self._held = b""
        self._passing = False  # the beginning of this event is out

    def __repr__(self) -> str:
        return f"<UsageHider held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream; return what is decided by now."""
        if not (self._held or self._passing):
            # Nearly every token comes as a whole event; some servers put a null in it.
            if data.endswith(b"\n\n") and not _tells_usage(data):
                return data
        else:
            data = self._held + data
        told: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(data):
            event = data[start : blank.end()]
            if self._passing or not _is_usage(event):
                told.append(event)
            self._passing = False
            start = blank.end()
        rest = data[start:]
        if self._passing or not _may_be_usage(rest):
            # Without the line ends, lest a blank line is not seen.
            out = rest.rstrip(b"\r\n")
            self._passing = True
            told.append(out)
            rest = rest[len(out) :]
        self._held = rest
        return b"".join(told)

    def finish(self) -> bytes:
        """Say that nothing more will come; return what was held back.

        Usage that lacks nothing but its blank line is left out.
        """
        begun = not self._passing
        held = self.withdraw()
        return b"" if begun and _is_usage(held + b"\n\n") else held

    def withdraw(self) -> bytes:
        """Say the same of a stream that was cut: return what nobody has seen of it."""
        held, self._held = self._held, b""
        self._passing = False
        return held


def _tells_usage(data: bytes) -> bool:
    return b'"usage"' in data and _USAGE.search(data) is not None


def _may_be_usage(begun: bytes) -> bool:
    """Say whether it can still be one, whatever follows."""
    return len(begun) <= HELD and _CHOICE.search(begun) is None


def _is_usage(event: bytes) -> bool:
    if not (_tells_usage(event) and _may_be_usage(event)):
        return False
    try:
        read = _event.decode(next(sse.events_in(event), b""))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return not read.choices and read.error is None
