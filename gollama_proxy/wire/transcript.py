"""What a client was sent of a stream, kept in a tenth of its size.

The events of one stream are the same but for a word, some 240 bytes around five.  So
what stands before and behind the word is learnt once, from a chunk that has gone by,
and of chunks that are like it only the words are kept.  Nothing is parsed: a token
costs two comparisons of bytes.  A batch with anything else in it is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Between two words; JSON has control characters escaped.
_SEPARATOR = b"\x00"
_WORD = re.compile(rb'"(?:content|text)"\s*:\s*"((?:[^"\\]++|\\.)*+)"')


class Transcript:
    """The chunks of one stream (RFC 9112, 7.1)."""

    __slots__ = ("_batches", "_foot", "_head")

    def __init__(self) -> None:
        # The words of a batch of chunks that are alike, or the chunks themselves.
        self._batches: list[bytes | Sequence[bytes]] = []
        self._head = b""  # what is in front of a word; empty until it is learnt
        self._foot = b""  # what is behind it, with the end of the chunk

    def __repr__(self) -> str:
        return f"<Transcript of {len(self._batches)} batches>"

    def add(self, chunks: Sequence[bytes]) -> None:
        """Take some more chunks, framed and whole."""
        if not chunks:
            return
        if not self._head:
            learnt = self._learn(chunks[-1])
            # The first one is like no other: it says who speaks.
            self._batches.append(chunks[:1] if learnt else chunks)
            chunks = chunks[1:] if learnt else ()
        if not chunks:
            return
        head, foot = self._head, self._foot
        behind, before = len(head), -len(foot)
        least = len(head) + len(foot)  # or the two could overlap
        words = [
            chunk[start + behind : before]
            for chunk in chunks
            if chunk.endswith(foot)
            and chunk.startswith(head, start := chunk.find(b"\n") + 1)
            and len(chunk) - start >= least
        ]
        folded = _SEPARATOR.join(words)
        alike = len(words) == len(chunks)
        if alike and folded.count(_SEPARATOR) == len(words) - 1:
            self._batches.append(folded)
        else:
            self._batches.append(chunks)

    def _learn(self, chunk: bytes) -> bool:
        """Take what surrounds the word of an event, if it has one."""
        word = _WORD.search(chunk)
        if word is not None:
            self._head = chunk[chunk.index(b"\n") + 1 : word.start(1)]
            self._foot = chunk[word.end(1) :]
        return word is not None

    def body(self) -> bytes:
        """Give all of it again, without the frames."""
        return b"".join(map(self._unfold, self._batches))

    def _unfold(self, batch: bytes | Sequence[bytes]) -> bytes:
        if isinstance(batch, bytes):
            head, foot = self._head, self._foot[:-2]
            return b"".join(head + word + foot for word in batch.split(_SEPARATOR))
        return b"".join(chunk[chunk.index(b"\n") + 1 : -2] for chunk in batch)
