"""Resuming an answer that broke off, with the stream of another worker.

While an answer runs, a `Transcript` keeps the bytes that the client was sent.  When its
worker is lost, they are read, another worker is asked for the rest (both in
`partial.py`), and a `Resumer` makes its stream the rest of the client's.

    sent bytes ──▶ Transcript ──▶ Partial ──▶ request ──▶ another worker
                                     │                          │
                                     ╰────────▶ Resumer ◀───────╯ ──▶ client

The one rule: the new stream has to begin with all that the client has, span by span,
and only the rest is passed on.  That is a proof, whatever the worker has made of the
request: if it was asked for the whole answer again and gives the same one, byte for
byte, its rest is the rest; and if it was asked to go on and repeats the text that it
goes on from, it has read that text.  Anything else raises `DivergedError` before a byte
of it is passed on.

A continuation is asked to repeat (`echo`), and servers do it as their templates and
parsers will.  So the repetition may lack the white space in front, have a wrapper in
front of it (`<think></think>`), and be without the reasoning.  In return it has to be
*one* event, the first one with text: no server generates several tokens as one event.
A repetition in pieces has been generated anew, by a worker that did not see the text
that it should go on from, or is the rest of an answer that repeats itself, from a
worker that does not echo.  The two look the same, and both are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from gollama_proxy.wire.answer import TAIL, has_error, is_complete
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.partial import (
    END,
    DivergedError,
    Event,
    Leaf,
    Partial,
    Span,
    UnreadableError,
    holds_text,
    joined,
    read_event,
)
from gollama_proxy.wire.schema import WORD, ChunkUsage, Ending
from gollama_proxy.wire.sse import CR, DONE, Gatherer

# --- What the client was sent -----------------------------------------------------

# Between two words; JSON has control characters escaped.
_SEPARATOR = b"\x00"
_COLON = ord(":")
_MOST_LEARNT = 8  # times; events that keep changing are not worth it
MOST_WORDS = 16  # that are kept one by one
_MOST_CHUNKS = 4  # that are kept as they are until they are looked at
_MOST_BATCHES = 8  # of a stream of which only the end is kept
_END = 2 * TAIL  # bytes of it


class _Frame(NamedTuple):
    """The bytes around a word: before it, and after it to the end of its chunk."""

    head: bytes
    foot: bytes

    def fold(self, chunks: list[bytes]) -> bytes | None:
        """Join the words of chunks that are alike; None if one is not."""
        head, foot = self
        before, after = len(head), -len(foot)
        least = len(head) + len(foot)  # or the two could overlap
        words = [
            chunk[start + before : after]
            for chunk in chunks
            if chunk.endswith(foot)
            and chunk.startswith(head, start := chunk.find(b"\n") + 1)
            and len(chunk) - start >= least
        ]
        folded = _SEPARATOR.join(words)
        alike = len(words) == len(chunks)
        return folded if alike and folded.count(_SEPARATOR) == len(words) - 1 else None

    def unfold(self, folded: bytes) -> bytes:
        """Return the events, without the ends of their chunks."""
        head, foot = self.head, self.foot[:-2]
        return b"".join(head + word + foot for word in folded.split(_SEPARATOR))


class Transcript:
    """The chunks of one stream (RFC 9112, 7.1), kept in a tenth of their size.

    The events of one stream are the same but for a word, some 240 bytes around five.
    So the bytes around the word are learnt from a chunk, and of chunks that are like it
    only the words are kept.  They are learnt anew when the events change, from
    reasoning to text, and from that to a call.  Nothing is parsed: a token costs two
    comparisons of bytes.  Other chunks are kept as they are.

        batches │ words, between `head` and `foot` │ chunks │      what comes next
                                one of the two is empty

    The relay appends to `words`, as that is the path of every token.
    """

    __slots__ = (
        "_batches",
        "_ending",
        "_frame",
        "_learnt",
        "_size",
        "before",
        "behind",
        "chunks",
        "failed",
        "foot",
        "head",
        "limit",
        "marked",
        "words",
    )

    def __init__(self, ending: Ending = Ending.DONE, limit: int = 0) -> None:
        """Make one of at most `limit` bytes; of a longer stream the end is kept."""
        self.limit = limit
        self.marked = False  # the mark of the end has come, long before the end
        self.failed = False  # an error has come, the same way
        # Around the word of an event that is like the last ones, and their lengths.
        # Until they are known, what is left out for a word is longer than these.
        self.head = self.foot = b""
        self.before, self.behind = 1, -1
        self.words: list[bytes] = []
        self.chunks: list[bytes] = []  # framed
        # The words of a batch of chunks that are alike, or the chunks themselves.  A
        # frame stands before the first words that are to be put into it.
        self._batches: list[_Frame | bytes | list[bytes]] = []
        self._ending = ending
        self._frame: _Frame | None = None
        self._learnt = 0  # frames
        self._size = 0  # bytes in the batches, about

    def __repr__(self) -> str:
        return f"<Transcript of {len(self._batches)} batches>"

    def add(self, chunk: bytes) -> None:
        """Add a chunk that is not only another word, or may not be."""
        if self.words:
            self.fold()
        self.chunks.append(chunk)
        if len(self.chunks) > _MOST_CHUNKS:
            self.cut()

    def fold(self) -> None:
        """Put the words into a batch."""
        words, self.words = self.words, []
        folded = _SEPARATOR.join(words)
        if folded.count(_SEPARATOR) == len(words) - 1 and CR not in folded:
            self._batches.append(folded)
            self._size += len(folded) + len(words) * (self.before - self.behind)
            self._trim()
        elif words:  # a line may end in one of them
            around = self.head, self.foot[:-2]
            self.chunks = [_framed(word.join(around)) for word in words]
            self.cut()

    def cut(self) -> None:
        """Put the words or chunks into batches, and learn from the chunks."""
        tail = self.tail()  # which folds the words
        if self._ending is not Ending.DONE:  # a long event may follow a mark
            self.marked = self.marked or is_complete(tail, self._ending)
        self.failed = self.failed or has_error(tail, self._ending)
        chunks, self.chunks = self.chunks, []
        if chunks:
            self._size += sum(map(len, chunks))
            self._add([event for chunk in chunks for event in _split(chunk)])
            self._trim()

    def _add(self, chunks: list[bytes]) -> None:
        folded = self._fold(chunks)
        if folded is not None:
            self._batches.append(folded)
            return
        if self._fold(chunks[-1:]) is None:
            self._learn(chunks[-1])
        # Earlier ones may be of another kind, such as the one with the role.
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
        """Learn the bytes around the word of an event, if it has one."""
        word = WORD.search(chunk) if self._learnt < _MOST_LEARNT else None
        start = chunk.index(b"\n") + 1
        if word is not None and chunk[start] != _COLON:  # a comment is not an event
            self._frame = _Frame(chunk[start : word.start(2)], chunk[word.end(2) :])
            self.head, self.foot = head, foot = self._frame
            self.before, self.behind = len(head), -len(foot)
            self._learnt += 1
            self._batches.append(self._frame)

    def _trim(self) -> None:
        """Drop what is not needed any more."""
        if self._size > self.limit and len(self._batches) > _MOST_BATCHES:
            end = _framed(self._last(_END))
            self._batches = [[end]] if self._frame is None else [[end], self._frame]

    def tail(self) -> bytes:
        """Return the last bytes, at least `TAIL` of a longer stream."""
        if self.words:
            self.fold()
        pieces = []
        for chunk in self.chunks:  # cheaper than a comprehension
            pieces.append(chunk[chunk.index(b"\n") + 1 : -2])  # noqa: PERF401
        tail = b"".join(pieces)
        return self._last(TAIL - len(tail)) + tail if self._batches else tail

    def _last(self, least: int) -> bytes:
        """Return the last bytes in the batches, at least these if there are so many."""
        size, pieces = 0, list[bytes]()
        for at in range(len(self._batches) - 1, -1, -1):
            if size >= least:
                break
            batch = self._batches[at]
            if isinstance(batch, bytes):
                before = reversed(self._batches[:at])
                around = next(each for each in before if isinstance(each, _Frame))
                pieces.append(around.unfold(batch))
            elif not isinstance(batch, _Frame):
                pieces.append(b"".join(map(_unframed, batch)))
            else:
                continue
            size += len(pieces[-1])
        return b"".join(reversed(pieces))

    def body(self) -> bytes:
        """Return all of it, without the framing of the chunks."""
        self.cut()
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
                yield from map(_unframed, batch)


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _unframed(chunk: bytes) -> bytes:
    return chunk[chunk.index(b"\n") + 1 : -2]


def _split(chunk: bytes) -> list[bytes]:
    """Split a chunk with several events, which came in one read, into one for each."""
    if chunk.count(b"\n\n") < 2:
        return [chunk]
    *events, rest = _unframed(chunk).split(b"\n\n")
    chunks = [_framed(event + b"\n\n") for event in events]
    return [*chunks, _framed(rest)] if rest else chunks


# --- The rest of the answer -------------------------------------------------------

# Of one event, which is held until it is complete; llama-server's have 240 bytes.
MAX_EVENT = 1 << 20  # bytes
# Characters of a text that do not occur by accident at the beginning of another one, so
# that a wrapper may stand in front of them.
_SURE = 16
_WRAPPER = 128  # characters, beside the reasoning that it may wrap


class Resumer:
    """Turns the stream of another worker into the rest of the client's.

    With `regenerate` the worker was sent the original body, and has to repeat all that
    the client has.  `model` replaces the name of the one that began, if another model
    continues.
    """

    def __init__(
        self,
        partial: Partial,
        chat: bool,
        *,
        regenerate: bool = False,
        model: str | None = None,
    ) -> None:
        self._partial = partial
        self._names = {"id": partial.id, "created": partial.created}
        self._names["model"] = model or partial.model
        self._chat = chat
        self._regenerate = regenerate
        # What has to come again.  Not so for a text, which is a part of the prompt.
        self._missing = list(partial.spans) if chat or regenerate else []
        self._calls = {span.call for span in partial.spans if span.kind == "name"}
        self._gatherer = Gatherer()
        self._passed: list[Span] = []  # that the client did not have
        self._tokens = 0  # events with those
        self._pieces = 0  # events with text among those
        self._role_seen = partial.role_seen
        self._finished = False
        self._done = False

    def __repr__(self) -> str:
        state = "held" if self._missing else "aligned"
        state = "complete" if self._finished else state
        return f"<Resumer of {self._partial!r}, {state}>"

    @property
    def partial(self) -> Partial:
        """What the client has by now, in case this worker is lost as well."""
        return msgspec.structs.replace(
            self._partial,
            spans=joined([*self._partial.spans, *self._passed]),
            tokens=self._partial.tokens + self._tokens,
            pieces=self._partial.pieces + self._pieces,
            role_seen=self._role_seen,
            finished=self._finished,
            done=self._done,
            mend=b"",
            halved=self._partial.halved and not self._passed,
        )

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes of the worker's body; yield whole events for the client.

        Raises:
            DivergedError: this is not the rest of the answer.
            WorkerError: the worker sent an error.
        """
        events = self._gatherer.feed(data)
        if self._gatherer.size > MAX_EVENT:
            raise DivergedError(f"an event of more than {MAX_EVENT} bytes")
        for event in events:
            if news := self._pass(event.lstrip(b"\r\n")):
                yield news

    def finish(self) -> bytes:
        """End the worker's body; return the end that the client still lacks.

        Raises:
            WorkerError: it ended too early.
        """
        if not self._finished:
            text = "The worker ended the answer before it was complete."
            raise WorkerError(Code.WORKER_INCOMPLETE, text)
        return self._end()

    # --- One event ----------------------------------------------------------------

    def _pass(self, raw: bytes) -> bytes:
        try:
            event = read_event(raw)
        except UnreadableError:
            if self._missing:
                raise
            # It is relayed as it would be without a rescue.
            return b"" if self._done else raw + b"\n\n"
        if event is None:
            return raw + b"\n\n" if raw.startswith(b":") else b""
        if event is END:
            return self._end() if self._finished else b""
        return self._pass_chunk(event)

    def _end(self) -> bytes:
        done, self._done = self._done, True
        return b"" if done else DONE

    def _pass_chunk(self, event: Event) -> bytes:
        """Pass on what is new; after a finish_reason, only usage is."""
        news: list[Span] = []
        finish, opens = False, False
        if not self._finished:
            news, finish = self._take(event.leaves), event.finish
            opens = event.role and not self._role_seen
            if finish and self._missing:
                raise DivergedError("it ends before the part that the client has")
        usage = event.chunk.usage is not None and not self._done
        if not (news or finish or opens or usage):
            return b""
        chunk = self._rewrite(event)
        self._role_seen |= opens
        self._finished |= finish
        if news:
            self._passed += news
            self._tokens += 1
            self._pieces += holds_text(news)
        return b"data: %b\n\n" % msgspec.json.encode(chunk)

    # --- What the client has, and what is new -------------------------------------

    def _take(self, leaves: tuple[Leaf, ...]) -> list[Span]:
        """Compare the texts of an event; leave what is new in it, and return that."""
        news = []
        for leaf in leaves:
            span = leaf.span
            rest = self._rest_after_known(span) if self._missing else span.text
            if rest != span.text:
                leaf.put(rest)
            if rest:
                news.append(span._replace(text=rest))
        return news

    def _rest_after_known(self, span: Span) -> str:
        """Take off a span what has to come next; return the rest of it."""
        if not self._regenerate:
            span = self._read_echo(span)
        known = self._missing.pop(0)
        if (span.kind, span.call) == (known.kind, known.call):
            if known.text.startswith(span.text):  # more of it has to come
                if known.text != span.text:
                    rest = known.text[len(span.text) :]
                    self._missing.insert(0, known._replace(text=rest))
                return ""
            if span.text.startswith(known.text) and not self._missing:
                return span.text[len(known.text) :]
        raise DivergedError(f"another {span.kind}")

    def _read_echo(self, span: Span) -> Span:
        """Read a repetition in another form as the span that it repeats."""
        known, *later = self._missing
        if span.kind == known.kind == "reasoning":
            if span.text.strip() == known.text.strip():
                return known
        elif span.kind == "text":
            wrapper = _WRAPPER
            if known.kind == "reasoning":  # it is left out, or in the text
                wrapper += len(known.text)
                known, *_ = self._missing = later
            for text in (known.text, known.text.lstrip()):
                at = span.text.find(text, 0, wrapper + len(text))
                if at == 0 or (at > 0 and len(text) >= _SURE):
                    rest = span.text[at + len(text) :]
                    return span._replace(text=known.text + rest)
        raise DivergedError(f"{span.kind} that repeats nothing")

    def _rewrite(self, event: Event) -> dict[str, Any]:
        chunk = event.fields | self._names
        if self._finished:
            chunk["choices"] = []  # nothing but usage is passed on
        for choice in chunk.get("choices") or ():
            if not self._chat:
                choice["text"] = choice.get("text") or ""
                continue
            delta = choice["delta"] = choice.get("delta") or {}
            if self._role_seen:
                delta.pop("role", None)
            calls = delta.pop("tool_calls", None) or ()
            if left := list(filter(self._goes_on, calls)):
                delta["tool_calls"] = left
        if event.chunk.usage:
            before = 0 if self._regenerate else self._partial.tokens
            chunk["usage"] |= _merge(event.chunk.usage, before)
        return chunk

    def _goes_on(self, call: dict[str, Any]) -> bool:
        """Whether anything of a call is left.

        A call that the client knows keeps its id: servers make up new ones for each
        answer.
        """
        function = call.get("function") or {}
        if "name" in function or (call.get("index") or 0) not in self._calls:
            return True
        call.pop("id", None)
        call.pop("type", None)
        return bool(function)


def _merge(usage: ChunkUsage, before: int) -> dict[str, Any]:
    """Count as one answer: for the second worker the first part was prompt."""
    prompt = max(usage.prompt_tokens - before, 0)
    completion = usage.completion_tokens + before
    merged: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    details = usage.prompt_tokens_details
    if details is not None and details.cached_tokens is not None:
        cached = min(details.cached_tokens, prompt)
        merged["prompt_tokens_details"] = {"cached_tokens": cached}
    return merged
