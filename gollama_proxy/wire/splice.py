"""The stream of another worker, turned into the rest of a client's.

What comes is compared with what the client has, and never assumed: a worker repeats the
text so far as its first piece, or in pieces, or with a space more or less in front, or
not at all.  Whatever cannot be the rest of the answer raises `DivergedError` before a
byte of it is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from gollama_proxy.wire.chunks import (
    BLANK_LINE,
    END,
    DivergedError,
    Event,
    UnreadableError,
    Usage,
    read_event,
)
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.sse import DONE, Gatherer
from gollama_proxy.wire.told import Told

# Of one event, which is held until it is complete; those of llama-server have 240.
MAX_EVENT = 1 << 20  # bytes
# So much of the text so far does not come again by accident.
_SURE = 16


class Splice:
    """Turns the stream of another worker into the rest of the client's.

    With `regenerate` the worker was sent the original body, and has to repeat what was
    told.  With `must_echo` one that does not repeat it is not believed.  A `model` is
    named in place of the one that began, where another one goes on.
    """

    def __init__(
        self,
        told: Told,
        chat: bool,
        *,
        regenerate: bool = False,
        must_echo: bool = False,
        model: str | None = None,
    ) -> None:
        text = told.text
        self._told = told
        self._names = {"id": told.id, "created": told.created}
        self._names["model"] = model or told.model
        self._chat = chat
        self._regenerate = regenerate
        self._strict = regenerate or must_echo
        self._known = [text]  # what a repetition may look like
        if len(text) >= _SURE and not regenerate:
            self._known += [" " + text, text.lstrip() or text]
        self._sure = min(_SURE, len(text.rstrip()) or len(text))
        # Nobody repeats a prompt, unless asked.
        self._aligned = not text or not (chat or regenerate)
        self._held = ""  # may be a repetition
        self._gatherer = Gatherer()
        self._passed: list[str] = []  # the pieces of text that were news
        self._role_seen = told.role_seen
        self._thinking = False  # the last that the client got is a thought
        self._finished = False
        self._done = False

    def __repr__(self) -> str:
        state = "complete" if self._finished else "aligned" if self._aligned else "held"
        return f"<Splice behind {len(self._told.text)} characters, {state}>"

    @property
    def told(self) -> Told:
        """What the client has by now, should this worker break off as well."""
        return msgspec.structs.replace(
            self._told,
            text=self._told.text + "".join(self._passed),
            tokens=self._told.tokens + len(self._passed),
            role_seen=self._role_seen,
            reasoning_open=self._thinking,
            finished=self._finished,
            done=self._done,
            mend=b"",
            halved=self._told.halved and not self._passed,
        )

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes of the worker's body; yield whole events for the client.

        Raises:
            DivergedError: this is not the rest of the answer.
            WorkerError: the worker tells an error.
        """
        events = self._gatherer.feed(data)
        if self._gatherer.size > MAX_EVENT:
            raise DivergedError(f"an event of more than {MAX_EVENT} bytes")
        for event in BLANK_LINE.split(events) if events else ():
            if news := self._pass(event.lstrip(b"\r\n")):
                yield news

    def finish(self) -> bytes:
        """Say that the worker's body has ended; return what the client still lacks.

        Raises:
            WorkerError: it ended too early.
        """
        if not self._finished:
            text = "The worker ended the answer before it was complete."
            raise WorkerError(Code.WORKER_INCOMPLETE, text)
        return self._end()

    def _pass(self, raw: bytes) -> bytes:
        try:
            event = read_event(raw)
        except UnreadableError:
            if not self._aligned:
                raise
            # Whoever it is for can make of it what he will.
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
        """Pass on what is news; behind a finish_reason, only usage is."""
        text, finish, opens, thinks = "", False, False, False
        if not self._finished:
            thinks = self._thinks(event)
            text, finish = self._align(event.text, event.finish), event.finish
            opens = event.role and not self._role_seen
        usage = event.chunk.usage is not None and not self._done
        if not (text or finish or opens or thinks or usage):
            return b""
        chunk = self._rewrite(event, text)
        self._role_seen |= opens
        self._finished |= finish
        if text:
            self._passed.append(text)
        self._thinking = not text and (thinks or self._thinking)
        return b"data: %b\n\n" % msgspec.json.encode(chunk)

    def _thinks(self, event: Event) -> bool:
        """Say whether there are thoughts to be passed on: not behind any text."""
        if not event.reasoning or not self._told.text:
            return event.reasoning
        if self._regenerate and not self._aligned:
            return False  # the same as the client has seen
        raise DivergedError("it is thinking again")

    def _align(self, text: str, last: bool) -> str:
        """Return as much of the text as the client does not have."""
        if self._aligned:
            return text
        held = self._held = self._held + text
        for known in self._known:
            if held.startswith(known):
                self._aligned = True
                return held[len(known) :]
        if not last and any(known.startswith(held) for known in self._known):
            return ""  # not yet to be told
        agreed = max(_agreeing(known, held) for known in self._known)
        if self._strict or agreed >= self._sure:
            raise DivergedError(f"another text after {agreed} characters")
        self._aligned = True
        return held

    def _rewrite(self, event: Event, text: str) -> dict[str, Any]:
        told = self._told
        try:
            chunk: dict[str, Any] = msgspec.json.decode(event.data)
        except (ValueError, RecursionError) as exc:  # in fields that nobody has read
            raise UnreadableError(f"an event that cannot be read: {exc}") from None
        chunk |= self._names
        if self._finished:
            chunk["choices"] = []  # nothing but usage is wanted any more
        for choice in chunk.get("choices") or ():
            if not self._chat:
                choice["text"] = text
                continue
            barred = {"content"}
            if self._role_seen:
                barred.add("role")
            if told.text:
                barred |= {"reasoning_content", "reasoning"}
            delta = choice.get("delta") or {}
            choice["delta"] = {k: v for k, v in delta.items() if k not in barred}
            if text:
                choice["delta"]["content"] = text
        if event.chunk.usage:
            before = 0 if self._regenerate else told.tokens
            chunk["usage"] |= _merge(event.chunk.usage, before)
        return chunk


def _agreeing(one: str, other: str) -> int:
    """Count the characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    shorter = min(len(one), len(other))
    return next((at for at, (a, b) in pairs if a != b), shorter)


def _merge(usage: Usage, before: int) -> dict[str, Any]:
    """Count as one answer: to the second worker the first part was prompt."""
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
