"""What a client has of an answer that broke off.

A cut in mid-event.  A client that has `data: {"choices":[…"content":" wor` cannot be
made to forget it: any line end would have it parse half a JSON object.  So the event is
completed.  Events of one stream differ in their text only, so the last whole one
supplies whatever the half one lacks (`mend`), and the text counts as far as it came.
Where that cannot be done, because half a character, an escape, or an event without text
was cut, there is no rescue.  llama-server sends whole events in a chunk, so nothing of
this happens to who relays whole chunks.
"""

from __future__ import annotations

import re
from typing import Any, Self

import msgspec

from gollama_proxy.wire.chunks import BLANK_LINE, END, DivergedError, read_event
from gollama_proxy.wire.errors import WorkerError
from gollama_proxy.wire.sse import DONE

# A text in an event.  JSON strings hold no bare quote, so no words can look like it.
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
_TEXT = re.compile(rb'"text"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+')


class Told(msgspec.Struct, frozen=True):
    """What the client has of an answer."""

    id: str
    created: int
    model: str
    text: str
    tokens: int  # at least; events with text where the worker did not count
    role_seen: bool = True
    reasoning_open: bool = False  # it was thinking when it broke: no rescue
    finished: bool = False  # with a finish_reason: no rescue is needed
    done: bool = False  # with `[DONE]`, too
    mend: bytes = b""  # completes the event that was cut; counted in all of the above
    halved: bool = False  # the last token may be only half of one

    def __repr__(self) -> str:  # without what was told
        state = "finished" if self.finished else "open"
        return f"<Told {len(self.text)} characters, {self.tokens} tokens, {state}>"

    @classmethod
    def parse(cls, relayed: bytes, chat: bool) -> Self | None:
        """Read the body that was relayed; None when it cannot be continued."""
        *whole, half = BLANK_LINE.split(relayed)
        half, halved = half.lstrip(b"\r\n"), False
        mend = b"\n" if relayed.endswith(b"\r") else b""  # it may have been a CRLF
        try:
            events = [event for event in map(read_event, whole) if event is not None]
            if half:
                finished = any(event.finish for event in events)
                mended = _complete(half, whole, chat, finished)
                mend = mended[len(half) :]
                if (event := read_event(mended)) is not None:
                    events.append(event)
                    halved = bool(event.text) and mend.startswith(b'"')
        except WorkerError:
            return None
        first = next((event.chunk for event in events if event.chunk.id), None)
        if first is None:
            return None
        text = "".join(event.text for event in events)
        return cls(
            id=first.id,
            created=first.created,
            model=first.model,
            text=text,
            tokens=max(
                sum(1 for event in events if event.text),
                max(event.tokens for event in events),
            ),
            role_seen=any(event.role for event in events),
            reasoning_open=not text and any(event.reasoning for event in events),
            finished=any(event.finish for event in events),
            done=END in events,
            mend=mend,
            halved=halved,
        )


def _complete(half: bytes, whole: list[bytes], chat: bool, finished: bool) -> bytes:
    """Complete an event that was cut.

    Raises:
        WorkerError: that cannot be done.
    """
    if half.startswith(b":") and b"data" not in half:
        return half + b"\n\n"
    if finished and DONE.startswith(half):
        return DONE
    search = (_CONTENT if chat else _TEXT).search
    match = next(filter(None, map(search, reversed(whole))), None)
    if match is not None:
        head = match.string[: match.start(1)].lstrip(b"\r\n")
        foot = match.string[match.end(1) :] + b"\n\n"
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
