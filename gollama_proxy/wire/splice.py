"""The stream of another worker, turned into the rest of a client's.

The one rule: what comes has to begin with all that the client has, span by span, and
only what is behind it is passed on.  That is a proof, whatever the worker has made of
the request: if it was asked for the whole answer again and gives the same one, byte for
byte, its rest is the rest; and if it was asked to go on and repeats what it goes on
from, it has read that.  Anything else raises `DivergedError` before a byte of it is
passed on.

A continuation is asked to repeat (`echo`), and servers do it as their templates and
parsers will.  So the repetition may lack the white space in front, have a wrapper in
front of it (`<think></think>`), and be without the thoughts.  In return it has to be
*one* event, the first one with text: no server generates several tokens as one event.
One that comes in pieces has been generated anew, by a worker that did not see what it
should go on from, or is the rest of an answer that repeats itself, from a worker that
does not echo.  Neither can be told from the other, and both are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from gollama_proxy.wire.chunks import (
    END,
    DivergedError,
    Event,
    Leaf,
    Span,
    UnreadableError,
    Usage,
    joined,
    read_event,
)
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.sse import DONE, Gatherer
from gollama_proxy.wire.told import Told, holds_text

# Of one event, which is held until it is complete; those of llama-server have 240.
MAX_EVENT = 1 << 20  # bytes
# So much of a text does not occur by accident in the words that another one begins
# with, so a wrapper may stand in front of it.
_SURE = 16
_WRAPPER = 128  # characters, beside the thoughts that it may wrap


class Splice:
    """Turns the stream of another worker into the rest of the client's.

    With `regenerate` the worker was sent the original body, and has to repeat what was
    told.  A `model` is named in place of the one that began, where another one goes on.
    """

    def __init__(
        self,
        told: Told,
        chat: bool,
        *,
        regenerate: bool = False,
        model: str | None = None,
    ) -> None:
        self._told = told
        self._names = {"id": told.id, "created": told.created}
        self._names["model"] = model or told.model
        self._chat = chat
        self._regenerate = regenerate
        # What has to come again.  A prompt does not: the text goes on behind it.
        self._missing = list(told.spans) if chat or regenerate else []
        self._calls = {span.call for span in told.spans if span.kind == "name"}
        self._gatherer = Gatherer()
        self._passed: list[Span] = []  # what was news
        self._tokens = 0  # events with news
        self._pieces = 0  # those with text
        self._role_seen = told.role_seen
        self._finished = False
        self._done = False

    def __repr__(self) -> str:
        state = "held" if self._missing else "aligned"
        state = "complete" if self._finished else state
        return f"<Splice behind {self._told!r}, {state}>"

    @property
    def told(self) -> Told:
        """What the client has by now, should this worker break off as well."""
        return msgspec.structs.replace(
            self._told,
            spans=joined([*self._told.spans, *self._passed]),
            tokens=self._told.tokens + self._tokens,
            pieces=self._told.pieces + self._pieces,
            role_seen=self._role_seen,
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
        for event in events:
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

    # --- One event ----------------------------------------------------------------

    def _pass(self, raw: bytes) -> bytes:
        try:
            event = read_event(raw)
        except UnreadableError:
            if self._missing:
                raise
            # The client would have got it without a rescue, too.
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
        news: list[Span] = []
        finish, opens = False, False
        if not self._finished:
            news, finish = self._take(event.leaves), event.finish
            opens = event.role and not self._role_seen
            if finish and self._missing:
                raise DivergedError("it ends before it has come so far")
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

    # --- What the client has, and what is news ------------------------------------

    def _take(self, leaves: tuple[Leaf, ...]) -> list[Span]:
        """Compare what an event holds; leave in it what is news, and return that."""
        news = []
        for leaf in leaves:
            span = leaf.span
            rest = self._behind_known(span) if self._missing else span.text
            if rest != span.text:
                leaf.put(rest)
            if rest:
                news.append(span._replace(text=rest))
        return news

    def _behind_known(self, span: Span) -> str:
        """Take what has to come next from a span; return what is behind that."""
        if not self._regenerate:
            span = self._read_echo(span)
        known = self._missing.pop(0)
        if (span.kind, span.call) == (known.kind, known.call):
            if known.text.startswith(span.text):  # there is more to come
                if known.text != span.text:
                    rest = known.text[len(span.text) :]
                    self._missing.insert(0, known._replace(text=rest))
                return ""
            if span.text.startswith(known.text) and not self._missing:
                return span.text[len(known.text) :]
        raise DivergedError(f"another {span.kind}")

    def _read_echo(self, span: Span) -> Span:
        """Read a repetition, which is told in another form, as what it repeats."""
        known, *behind = self._missing
        if span.kind == known.kind == "reasoning":
            if span.text.strip() == known.text.strip():
                return known
        elif span.kind == "text":
            wrapper = _WRAPPER
            if known.kind == "reasoning":  # they are not told, or in the text
                wrapper += len(known.text)
                known, *_ = self._missing = behind
            for text in (known.text, known.text.lstrip()):
                at = span.text.find(text, 0, wrapper + len(text))
                if at == 0 or (at > 0 and len(text) >= _SURE):
                    rest = span.text[at + len(text) :]
                    return span._replace(text=known.text + rest)
        raise DivergedError(f"{span.kind} that repeats nothing")

    def _rewrite(self, event: Event) -> dict[str, Any]:
        chunk = event.fields | self._names
        if self._finished:
            chunk["choices"] = []  # nothing but usage is wanted any more
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
            before = 0 if self._regenerate else self._told.tokens
            chunk["usage"] |= _merge(event.chunk.usage, before)
        return chunk

    def _goes_on(self, call: dict[str, Any]) -> bool:
        """Whether anything of a call is left; one that the client knows keeps its id.

        Servers make up ids anew for each answer.
        """
        function = call.get("function") or {}
        if "name" in function or (call.get("index") or 0) not in self._calls:
            return True
        call.pop("id", None)
        call.pop("type", None)
        return bool(function)


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
