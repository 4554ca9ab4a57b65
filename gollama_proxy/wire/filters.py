r"""Bodies that change on their way: usage hidden from a client, a model renamed.

Both work on a body that comes in pieces, and decode nothing in the common case.

A stream reports its usage in an event before `[DONE]`, if asked to (OpenAI's API
reference, chat completions, `stream_options.include_usage`):

    data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":3},…}

The hub asks for it in the client's place.  A client that has not asked may fail on that
event: code that takes `choices[0]` of each event is common.  So the event is left out.

An alias is known to the client alone, and an answer names its model in every event:

    data: {"choices":[…],"model":"qwen2.5-7b","object":"chat.completion.chunk"}

Decoding each of them would cost more than relaying does, so the name is found by its
key.  It may stand at any depth (`/v1/responses` has it in an object of its own); a
value that is not the worker's name is left alone.

Every other byte stays as it is, spaces included, and generated text cannot be mistaken
for either: a JSON string holds no bare quote (RFC 8259, 7), so in a text the key would
read `\"model\"`, and a longer string that ends like the key has a backslash in front.
"""

from __future__ import annotations

import re

import msgspec

from gollama_proxy.wire.fields import encode
from gollama_proxy.wire.schema import UNREADABLE, usage_chunk
from gollama_proxy.wire.sse import EventFilter, data_of

# --- Usage ------------------------------------------------------------------------

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


# --- The name of the model --------------------------------------------------------

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
