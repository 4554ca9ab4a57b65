r"""A worker's name for its model, replaced by the one that the client knows.

An alias is known to the client alone, and an answer names its model in every event:

    data: {"choices":[…],"model":"qwen2.5-7b","object":"chat.completion.chunk"}

Decoding each of them for it would cost more than relaying does.  So the name is found
by its key, and every other byte stays as it is, spaces included.

No words of a model can be hit.  A JSON string holds no bare quote (RFC 8259, 7), so in
a text the key would read `\"model\"`, and what looks like the key and ends a longer
string has a backslash in front.  The name may stand at any depth (`/v1/responses` has
it in an object of its own); a value that is not the worker's name is left alone.
"""

from __future__ import annotations

import re

import msgspec

from gollama_proxy.wire import fields

_KEY = b'"model"'
# Others than llama-server put spaces around the colon, or indent what they send; more
# than so many have another purpose.
MOST_SPACES = 64


class Renamer:
    """Replaces `old` by `new` in a body that comes in any pieces.

    What may become the name is held back until that is decided; `finish()` gives what
    is left.  It is a part of one line, with a bound: no spelling of a name takes more
    than six bytes for each half of a UTF-16 character.
    """

    __slots__ = ("_full", "_held", "_longest", "_new", "_old", "_rest")

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, fields.encode(new)
        self._held = b""
        most = 6 * len(old.encode("utf-16-le", "surrogatepass")) // 2
        spaces = rb"[ \t\r\n]{0,%d}+" % MOST_SPACES
        text = rb'"(?:[^"\\]|\\.){0,%d}+' % most
        self._longest = len(_KEY) + 2 * MOST_SPACES + len(b':"') + most
        # The key first, and then what is not to be in front: so it is found quickly.
        self._full = re.compile(
            rb'"model"(?<!\\"model")%b:%b(%b")' % (spaces, spaces, text), re.DOTALL
        )
        self._rest = re.compile(
            rb"%b(?::%b(?:%b\\?)?)?" % (spaces, spaces, text), re.DOTALL
        )

    def __repr__(self) -> str:
        return f"<Renamer of {self._old!r} held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the body; return what is decided by now."""
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
        """Say that the body has ended; return what was held back."""
        held, self._held = self._held, b""
        return held

    def _decided(self, data: bytes, done: int) -> int:
        """Tell up to where nothing can become the name, whatever follows."""
        end = len(data)
        at = data.rfind(_KEY, max(done, end - self._longest))
        if at < 0 or self._rest.fullmatch(data, at + len(_KEY)) is None:
            at = data.rfind(b'"', max(done, end - len(_KEY)))
            if at < 0 or not _KEY.startswith(data[at:]):
                at = end
        # A backslash decides about the quote behind it, so both stay together.
        return at - 1 if data[at - 1 : at] == b"\\" else at


def _text(value: bytes) -> str | None:
    try:
        return msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def renamed(body: bytes, old: str, new: str) -> bytes:
    """Replace `old` by `new` in a whole body."""
    renamer = Renamer(old, new)
    return renamer.feed(body) + renamer.finish()
