"""An answer that broke in the middle goes on, on another worker: the pure part.

    relayed bytes ──▶ Told ──▶ continuation() ──▶ another worker ──▶ Splice ──▶ client
                       └─ finished, or nothing left to generate ──▶ closing() ──▶ client

The other worker is asked to go on behind the text so far, as an assistant's message
that is not over, and to repeat that text (`echo`).  The repetition proves that it goes
on instead of starting anew.  llama-server and vLLM repeat it, older builds of the
former without being asked; some servers never do.  So what comes is compared with what
the client has.  A worker that refuses such a message can be asked the whole question
again: see `regenerate`.

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
from typing import Any, NamedTuple, Self

import msgspec

from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.sse import DONE

# Fields that rule a rescue out, and which values (beside null) switch them off.
_BARRED: dict[str, tuple[bytes, ...]] = {
    "tools": (b"[]",),  # half a call is no message that could go on
    "functions": (b"[]",),  # the same, as it was called before
    "response_format": (
        b'{"type":"text"}',
    ),  # its grammar would begin anew in mid-text
    "json_schema": (),  # llama-server's word for the same
    "grammar": (b'""',),  # the same
    "structured_outputs": (),  # vLLM's word for the same, like the next four
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "n": (b"1",),  # several answers, interleaved
    "n_cmpl": (b"1",),  # llama-server's word for the same
    "best_of": (b"1",),  # the best of what, once one is half told?
    "logprobs": (b"false",),  # those of the repeated text would be missing or doubled
    "top_logprobs": (b"0",),
    "n_probs": (b"0",),  # llama-server's word for the same
    "echo": (b"false",),  # the text would begin with the prompt
    "suffix": (b'""',),  # the text so far belongs in the middle, not at the end
    "audio": (),  # sound cannot be continued
    "modalities": (b'["text"]',),
    "continue_final_message": (b"false",),  # the client itself has begun the answer
    "add_generation_prompt": (b"true",),
}
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
# So much of the text so far does not come again by accident.
_SURE = 16

_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
# A text in an event.  JSON strings hold no bare quote, so no words can look like it.
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
_TEXT = re.compile(rb'"text"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+')


class DivergedError(WorkerError):
    """What another worker sent cannot be the rest of the answer."""

    def __init__(self, detail: str) -> None:
        text = "The answer broke off, and another worker could not continue it."
        super().__init__(Code.WORKER_PROTOCOL, text, detail=detail)


# --- Events -----------------------------------------------------------------------


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None  # llama-server
    reasoning: str | None = None  # vLLM
    tool_calls: Any = None
    function_call: Any = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Timings(msgspec.Struct):
    predicted_n: int = 0


class _Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class _Event(NamedTuple):
    """One event, read; `data` is the JSON it was read from."""

    data: bytes
    chunk: _Chunk
    text: str = ""
    role: bool = False
    reasoning: bool = False
    finish: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the worker says it has generated; 0 where it does not say."""
        usage, timings = self.chunk.usage, self.chunk.timings
        counted = usage.completion_tokens if usage else 0
        return max(counted, timings.predicted_n if timings else 0)


_END = _Event(b"[DONE]", _Chunk())
_chunk_decoder = msgspec.json.Decoder(_Chunk)


def _read(event: bytes) -> _Event | None:
    """Read one event; None for comments and others without data.

    Raises:
        WorkerError: it tells an error.
        DivergedError: it is none of a chat or a text that can be continued.
    """
    lines = [line for line in _LINE_END.split(event) if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(line[5:].lstrip(b" ") for line in lines)
    if data == _END.data:
        return _END
    try:
        chunk = _chunk_decoder.decode(data)
    except (ValueError, RecursionError) as exc:
        raise DivergedError(f"an event that cannot be read: {exc}") from None
    if chunk.error is not None:
        text = "The worker ended the answer with an error."
        raise WorkerError(Code.WORKER_INCOMPLETE, text, detail=str(chunk.error))
    if not chunk.choices:
        return _Event(data, chunk)
    choice = chunk.choices[0]
    delta = choice.delta or _Delta()
    if len(chunk.choices) > 1 or choice.index:
        raise DivergedError("more than one choice")
    if delta.tool_calls or delta.function_call or delta.refusal:
        raise DivergedError("a tool call or a refusal")
    return _Event(
        data,
        chunk,
        delta.content or choice.text or "",
        delta.role is not None,
        bool(delta.reasoning_content or delta.reasoning),
        bool(choice.finish_reason),
    )


# --- The broken answer ------------------------------------------------------------


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

    @classmethod
    def parse(cls, relayed: bytes, chat: bool) -> Self | None:
        """Read the body that was relayed; None when it cannot be continued."""
        *whole, half = _BLANK_LINE.split(relayed)
        half = half.lstrip(b"\r\n")
        mend = b"\n" if relayed.endswith(b"\r") else b""  # it may have been a CRLF
        try:
            events = [event for event in map(_read, whole) if event is not None]
            if half:
                finished = any(event.finish for event in events)
                mended = _complete(half, whole, chat, finished)
                mend = mended[len(half) :]
                events += [event for event in (_read(mended),) if event is not None]
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
            done=_END in events,
            mend=mend,
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
    if _read(half) is None:
        raise DivergedError("half a line")
    return half + b"\n\n"  # it lacks nothing but its blank line


# --- What to ask ------------------------------------------------------------------


class _Message(msgspec.Struct):
    role: str


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def can_rescue(body: bytes, chat: bool) -> bool:
    """Say whether the answer to this request could be continued elsewhere."""
    try:
        fields = _fields_decoder.decode(body)
        for name in _BARRED.keys() & fields.keys():
            value = msgspec.json.encode(msgspec.json.decode(fields[name]))
            if value != b"null" and value not in _BARRED[name]:
                return False
        for name in _LIMITS:
            _limit(fields, name)
        if not chat:  # tokens or several prompts: there is no place for the text
            return isinstance(msgspec.json.decode(fields["prompt"]), str)
        messages = msgspec.json.decode(fields["messages"], type=list[_Message])
    except (ValueError, KeyError, RecursionError):
        return False
    return bool(messages) and messages[-1].role != "assistant"  # begun by the client


def continuation(body: bytes, told: Told, chat: bool) -> bytes | None:
    """Write the request for the rest of an answer; None when `max_tokens` are told.

    `body` must be one that `can_rescue`.
    """
    if not told.text:
        return body
    fields = _fields_decoder.decode(body)
    for name in _LIMITS:
        limit = _limit(fields, name)
        if limit > 0:  # others mean: no limit
            if limit <= told.tokens:
                return None
            fields[name] = msgspec.Raw(b"%d" % (limit - told.tokens))
    if chat:
        messages = msgspec.json.decode(fields["messages"], type=list[msgspec.Raw])
        message = {"role": "assistant", "content": told.text}
        messages.append(msgspec.Raw(msgspec.json.encode(message)))
        fields["messages"] = msgspec.Raw(msgspec.json.encode(messages))
        fields["continue_final_message"] = msgspec.Raw(b"true")
        fields["add_generation_prompt"] = msgspec.Raw(b"false")
        fields["echo"] = msgspec.Raw(b"true")
    else:
        prompt = msgspec.json.decode(fields["prompt"], type=str)
        fields["prompt"] = msgspec.Raw(msgspec.json.encode(prompt + told.text))
    return msgspec.json.encode(fields)


def closing(told: Told, chat: bool) -> bytes:
    """End an answer of which nothing is left to generate."""
    if told.done:
        return told.mend
    if told.finished:
        return told.mend + DONE
    nothing: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
    last = {
        "id": told.id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": told.created,
        "model": told.model,
        "choices": [{"index": 0, **nothing, "finish_reason": "length"}],
    }
    return b"%bdata: %b\n\n%b" % (told.mend, msgspec.json.encode(last), DONE)


def _limit(fields: dict[str, msgspec.Raw], name: str) -> int:
    limit = msgspec.json.decode(fields.get(name, b"null"), type=int | None)
    return limit or 0


# --- What comes -------------------------------------------------------------------


class Splice:
    """Turns the stream of another worker into the rest of the client's.

    With `regenerate` the worker was sent the original body, and has to repeat what was
    told.  With `must_echo` one that does not repeat it is not believed.
    """

    def __init__(
        self,
        told: Told,
        chat: bool,
        *,
        regenerate: bool = False,
        must_echo: bool = False,
    ) -> None:
        text = told.text
        self._told = told
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
        self._rest = b""  # an unfinished event
        self._mend = told.mend
        self._role_seen = told.role_seen
        self._finished = False
        self._done = False

    def __repr__(self) -> str:
        state = "complete" if self._finished else "aligned" if self._aligned else "held"
        return f"<Splice behind {len(self._told.text)} characters, {state}>"

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its end; `finish` adds what it may lack."""
        return self._finished

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the worker's body; return those for the client, whole events.

        Raises:
            DivergedError: this is not the rest of the answer.
            WorkerError: the worker tells an error.
        """
        *events, self._rest = _BLANK_LINE.split(self._rest + data)
        return self._mended(b"".join(map(self._pass, events)))

    def finish(self) -> bytes:
        """Say that the worker's body has ended; return what the client still lacks.

        Raises:
            WorkerError: it ended too early.
        """
        if not self._finished:
            text = "The worker ended the answer before it was complete."
            raise WorkerError(Code.WORKER_INCOMPLETE, text)
        return self._mended(self._end())

    def _mended(self, data: bytes) -> bytes:
        if data and self._mend:
            data, self._mend = self._mend + data, b""
        return data

    def _pass(self, raw: bytes) -> bytes:
        raw = raw.lstrip(b"\r\n")
        event = _read(raw)
        if event is None:
            return raw + b"\n\n" if raw.startswith(b":") else b""
        if event is _END:
            return self._end() if self._finished else b""
        return self._pass_chunk(event)

    def _end(self) -> bytes:
        done, self._done = self._done, True
        return b"" if done else DONE

    def _pass_chunk(self, event: _Event) -> bytes:
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
        return b"data: %b\n\n" % msgspec.json.encode(chunk)

    def _thinks(self, event: _Event) -> bool:
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

    def _rewrite(self, event: _Event, text: str) -> dict[str, Any]:
        told = self._told
        chunk: dict[str, Any] = msgspec.json.decode(event.data)
        chunk |= {"id": told.id, "created": told.created, "model": told.model}
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


def _merge(usage: _Usage, before: int) -> dict[str, Any]:
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
