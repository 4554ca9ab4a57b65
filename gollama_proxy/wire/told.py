"""What a client has of an answer that broke off.

A cut in mid-event.  A client that has `data: {"choices":[…"content":" wor` cannot be
made to forget it: any line end would have it parse half a JSON object.  So the event is
completed.  Events of one stream differ in their text only, so one of the last whole
ones supplies whatever the half one lacks (`mend`), and the text counts as far as it
came.  Where that cannot be done, because half a character, an escape, or an event
without text was cut, there is no rescue.  llama-server sends whole events in a chunk,
and a relay that passes on whole chunks sees nothing of this.
"""

from __future__ import annotations

import re
from itertools import chain, islice
from typing import Any, Self

import msgspec

from gollama_proxy.wire.chunks import (
    BLANK_LINE,
    END,
    DivergedError,
    Kind,
    Span,
    joined,
    read_event,
)
from gollama_proxy.wire.errors import WorkerError
from gollama_proxy.wire.sse import DONE

# A text in an event.  JSON strings hold no bare quote, so no words can look like it.
WORD = re.compile(
    rb'"(?:content|text|reasoning_content|reasoning|arguments)"\s*:\s*'
    rb'"((?:[^"\\]++|\\.)*+)"'
)
_MODELS = 4  # so many texts of the last events are tried for one that was cut
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+')


class Told(msgspec.Struct, frozen=True):
    """What the client has of an answer."""

    id: str
    created: int
    model: str
    spans: tuple[Span, ...]  # no two neighbours are pieces of the same
    tokens: int  # at least; events with a span where the worker did not count
    pieces: int = 0  # events that the text came in
    role_seen: bool = True
    finished: bool = False  # with a finish_reason: no rescue is needed
    done: bool = False  # with `[DONE]`, too
    mend: bytes = b""  # completes the event that was cut; counted in all of the above
    halved: bool = False  # the last token may be only half of one

    def __repr__(self) -> str:  # without what was told
        size = sum(len(span.text) for span in self.spans)
        state = "finished" if self.finished else "open"
        return f"<Told {size} characters, {self.tokens} tokens, {state}>"

    @classmethod
    def parse(cls, relayed: bytes) -> Self | None:
        """Read the body that was relayed; None when it cannot be continued."""
        *whole, half = BLANK_LINE.split(relayed)
        half, halved = half.lstrip(b"\r\n"), False
        mend = b"\n" if relayed.endswith(b"\r") else b""  # it may have been a CRLF
        try:
            events = [event for event in map(read_event, whole) if event is not None]
            if half:
                finished = any(event.finish for event in events)
                mended = _complete(half, whole, finished)
                mend = mended[len(half) :]
                if (event := read_event(mended)) is not None:
                    events.append(event)
                    halved = bool(event.leaves) and mend.startswith(b'"')
        except WorkerError:
            return None
        first = next((event.chunk for event in events if event.chunk.id), None)
        if first is None:
            return None
        return cls(
            id=first.id,
            created=first.created,
            model=first.model,
            spans=joined(chain.from_iterable(event.spans for event in events)),
            tokens=max(
                sum(1 for event in events if event.leaves),
                max(event.tokens for event in events),
            ),
            pieces=sum(holds_text(event.spans) for event in events),
            role_seen=any(event.role for event in events),
            finished=any(event.finish for event in events),
            done=END in events,
            mend=mend,
            halved=halved,
        )

    @property
    def text(self) -> str:
        return self._all("text")

    @property
    def reasoning(self) -> str:
        return self._all("reasoning")

    def _all(self, kind: Kind) -> str:
        return "".join(span.text for span in self.spans if span.kind == kind)

    @property
    def is_plain(self) -> bool:
        """Whether it is a text, perhaps behind thoughts, and nothing else."""
        return [span.kind for span in self.spans] in (["text"], ["reasoning", "text"])


def holds_text(spans: list[Span]) -> bool:
    return any(span.kind == "text" for span in spans)


def _complete(half: bytes, whole: list[bytes], finished: bool) -> bytes:
    """Complete an event that was cut.

    Raises:
        WorkerError: that cannot be done.
    """
    if half.startswith(b":") and b"data" not in half:
        return half + b"\n\n"
    if finished and DONE.startswith(half):
        return DONE
    words = chain.from_iterable(map(WORD.finditer, reversed(whole)))
    for word in islice(words, _MODELS):
        head = word.string[: word.start(1)].lstrip(b"\r\n")
        foot = word.string[word.end(1) :] + b"\n\n"
        if not _is_empty(head + foot):
            continue
        if head.startswith(half):
            return head + foot
        in_text = _IN_STRING.match(half, len(head))
        if in_text is not None and half.startswith(head):
            behind = half[in_text.end() :]
            if foot.startswith(behind):
                return half + foot[len(behind) :]
    line = re.split(rb"[\r\n]", half)[-1]
    if read_event(half) is None and b"data:".startswith(line[:5]):
        raise DivergedError("half a line")
    # It lacks nothing but its blank line, or is no event: the router of llama-server
    # writes "proxy error: …" behind a stream whose child has died.
    return half + b"\n\n"


def _is_empty(event: bytes) -> bool:
    """Whether an event adds nothing to an answer, not even the name of a call."""
    read = read_event(event)
    return read is not None and not (read.leaves or read.finish)


def closing(told: Told, chat: bool) -> bytes:
    """End an answer of which nothing is left to generate, behind `told.mend`."""
    if told.done:
        return b""
    if told.finished:
        return DONE
    nothing: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    last = {
        "id": told.id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": told.created,
        "model": told.model,
        "choices": [{"index": 0, **nothing, "finish_reason": "length"}],
    }
    return b"data: %b\n\n%b" % (msgspec.json.encode(last), DONE)
