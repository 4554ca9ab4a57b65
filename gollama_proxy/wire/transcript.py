"""What a client was sent of a stream, kept in a tenth of its size.

The events of one stream are the same but for a word, some 240 bytes around five.  So
what stands before and behind the word is learnt from a chunk that has gone by, and of
chunks that are like it only the words are kept.  It is learnt anew when the events
change, from thoughts to text, and from that to a call.  Nothing is parsed: a token
costs two comparisons of bytes.  A batch with anything else in it is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gollama_proxy.wire.told import WORD

# Between two words; JSON has control characters escaped.
_SEPARATOR = b"\x00"
_MOST_LEARNT = 8  # times; what changes with each event is not worth it


class _Frame(NamedTuple):
    """What is around a word: in front of it, and behind it to the end of its chunk."""

    head: bytes
    foot: bytes

    def fold(self, chunks: list[bytes]) -> bytes | None:
        """Join the words of chunks that are alike; None if any is not."""
        head, foot = self
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
        return folded if alike and folded.count(_SEPARATOR) == len(words) - 1 else None

    def unfold(self, folded: bytes) -> bytes:
        """Give the events again, without the ends of their chunks."""
        head, foot = self.head, self.foot[:-2]
        return b"".join(head + word + foot for word in folded.split(_SEPARATOR))


class Transcript:
    """The chunks of one stream (RFC 9112, 7.1)."""

    __slots__ = ("_batches", "_frame", "_learnt")

    def __init__(self) -> None:
        # The words of a batch of chunks that are alike, or the chunks themselves; and
        # in front of the first words that it is for, a frame.
        self._batches: list[_Frame | bytes | list[bytes]] = []
        self._frame: _Frame | None = None
        self._learnt = 0  # frames

    def __repr__(self) -> str:
        return f"<Transcript of {len(self._batches)} batches>"

    def add(self, chunks: list[bytes]) -> None:
        """Take some more chunks, framed and whole."""
        if not chunks:
            return
        folded = self._fold(chunks)
        if folded is not None:
            self._batches.append(folded)
            return
        if self._fold(chunks[-1:]) is None:
            self._learn(chunks[-1])
        # The ones in front may be of another kind, as the one that says who speaks.
        backwards = enumerate(reversed(chunks))
        others = (at for at, chunk in backwards if self._fold([chunk]) is None)
        first = len(chunks) - next(others, len(chunks))
        if first:
            self._batches.append(chunks[:first])
        folded = self._fold(chunks[first:])
        if folded is not None:
            self._batches.append(folded)

    def _fold(self, chunks: list[bytes]) -> bytes | None:
        return None if self._frame is None else self._frame.fold(chunks)

    def _learn(self, chunk: bytes) -> None:
        """Take what surrounds the word of an event, if it has one."""
        word = WORD.search(chunk) if self._learnt < _MOST_LEARNT else None
        if word is not None:
            start = chunk.index(b"\n") + 1
            self._frame = _Frame(chunk[start : word.start(1)], chunk[word.end(1) :])
            self._learnt += 1
            self._batches.append(self._frame)

    def body(self) -> bytes:
        """Give all of it again, without the frames of the chunks."""
        return b"".join(self._unfold())

    def _unfold(self) -> Iterator[bytes]:
        frame = None
        for batch in self._batches:
            if isinstance(batch, _Frame):
                frame = batch
            elif isinstance(batch, bytes):
                assert frame is not None, self
                yield frame.unfold(batch)
            else:
                yield from (chunk[chunk.index(b"\n") + 1 : -2] for chunk in batch)
