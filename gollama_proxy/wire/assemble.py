"""An event stream folded into the one JSON answer that its client asked for.

llama-server gives up a generation as soon as its client is gone only if it streams: for
an answer in one piece it looks after a second in which no slot had a result, and on a
busy server there is none (`server_response::recv_with_timeout`).  So the hub has its
workers stream, and puts the answer together for a client that did not ask for a stream.

Nobody should be able to tell.  `streaming_body` knows the requests whose answer a
stream does not hold, and `LostTextError` says so where it turned out later.  What is
said of llama-server is so in build b10068 (tools/server/server-task.cpp, where
`to_json_oaicompat_chat` stands beside `…_chat_stream`); real answers are compared with
it, field by field, in tests/test_real_assemble.py.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gollama_proxy.wire.private import Private
from gollama_proxy.wire.sse import EventError

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a CR at the end may be half of a CRLF
_FRAME = 256  # what a text counts for, however short it is
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_fields = msgspec.json.Decoder(dict[str, Raw])


class AssemblyError(Exception):
    """The events make up no answer; `error` is the worker's own, if it sent one."""

    def __init__(self, reason: str, error: EventError | None = None) -> None:
        super().__init__(reason)
        self.error = error


class LostTextError(AssemblyError):
    """The stream is complete but has no text; the worker tells it without a stream."""


# --- The request ------------------------------------------------------------------

# What a field may be for a stream to tell all that the answer would.
_TOLD = {
    "stream": (b"null", b"false"),
    "stream_options": (b"null",),
    # What may become a stop string is held back, and never sent if `max_tokens` cuts
    # the answer there.
    "stop": (b"null", b'""', b"[]"),
    # The line that ends an answer by its indent is taken back; a stream has sent it.
    "n_indent": (b"null", b"0"),
    # The message that is continued is a part of the answer, but not of the stream.
    "continue_final_message": (b"null", b"false"),
    # The text in `__verbose` is that of a whole answer, as the model has written it.
    "verbose": (b"null", b"false"),
    # "deepseek-legacy" has a switch (`reasoning_in_content`) for streams only.
    "reasoning_format": (b"null", b'"none"', b'"auto"', b'"deepseek"'),
}
# A chat tells the probabilities of a token with its text, and not those of one that has
# none, such as the end of turn.
_TOLD_OF_CHATS = _TOLD | {"logprobs": (b"null", b"false"), "n_probs": (b"null", b"0")}


def streaming_body(body: bytes) -> bytes | None:
    """Ask for a stream with usage, all else as is; None if its answer would differ."""
    try:
        fields = _fields.decode(body)
    except _UNREADABLE:
        return None  # the worker will say what is wrong with it
    told = _TOLD_OF_CHATS if "messages" in fields else _TOLD
    if any(bytes(fields.get(name, b"null")) not in ok for name, ok in told.items()):
        return None
    fields["stream"] = Raw(b"true")
    fields["stream_options"] = Raw(b'{"include_usage":true}')
    return msgspec.json.encode(fields)


# --- One choice -------------------------------------------------------------------


class _Function(Private):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(Private):
    index: int
    id: str | None = None
    type: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


_Logprobs = dict[str, list[Raw] | None]


class _ChoiceDelta(Private):
    index: int = 0
    delta: dict[str, str | list[_CallDelta] | None] | None = None
    text: str | None = None
    logprobs: _Logprobs | UnsetType | None = UNSET
    finish_reason: str | None = None


class _Texts:
    """Texts by name that grow; a null only says that there is one."""

    def __init__(self) -> None:
        self._texts: dict[str, io.StringIO | None] = {}

    def add(self, name: str, text: str | None) -> int:
        """Append, and return how much it grew."""
        grown = 0 if name in self._texts else _FRAME
        known = self._texts.setdefault(name, None)
        if text is None or (known and name in ("role", "id", "type", "name")):
            return grown  # some tell those with each event
        if known is None:
            known = self._texts[name] = io.StringIO(newline="")
        return grown + known.write(text)

    def all(self) -> dict[str, str | None]:
        return {n: t.getvalue() if t else None for n, t in self._texts.items()}


class _Choice:
    """One choice, as far as it has come."""

    def __init__(self) -> None:
        self.texts = _Texts()
        self.calls = defaultdict[int, _Texts](_Texts)
        self.logprobs: _Logprobs | UnsetType | None = UNSET
        self.finish_reason: str | None = None

    def fold(self, delta: _ChoiceDelta) -> int:
        """Append what an event has of it, and return how much it grew."""
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.logprobs is not UNSET:
            self._fold_logprobs(delta.logprobs)
        grown = self.texts.add("text", delta.text)
        for name, value in (delta.delta or {}).items():
            if not isinstance(value, list):
                grown += self.texts.add(name, value)
            elif value and name != "tool_calls":
                raise AssemblyError("a list in a delta cannot be folded")
            else:
                grown += sum(map(self._fold_call, value))
        return grown

    def _fold_call(self, delta: _CallDelta) -> int:
        call = self.calls[delta.index]
        grown = call.add("id", delta.id) + call.add("type", delta.type)
        grown += call.add("name", delta.function.name)
        return grown + call.add("arguments", delta.function.arguments or "")

    def _fold_logprobs(self, logprobs: _Logprobs | None) -> None:
        if not self.logprobs or not logprobs:  # a null after a list does not undo it
            self.logprobs = self.logprobs or logprobs
            return
        for name, values in logprobs.items():
            known = self.logprobs.get(name)
            if known and values:
                known.extend(values)
            else:
                self.logprobs[name] = known or values

    def shows_nothing(self) -> bool:
        return not (self.calls or any((self.texts.all() | {"role": None}).values()))

    def text(self, index: int) -> dict[str, object]:
        text, logprobs = self.texts.all()["text"] or "", self.logprobs or None
        choice = {"text": text, "index": index, "logprobs": logprobs}
        return choice | {"finish_reason": self.finish_reason}

    def chat(self, index: int) -> dict[str, object]:
        message: dict[str, object] = {**self.texts.all()}
        del message["text"]
        message["role"] = message.get("role") or "assistant"
        # llama-server never has a null here, whatever else the message holds.
        message["content"] = message.get("content") or ""
        if self.calls:
            calls = [_call(texts) for _, texts in sorted(self.calls.items())]
            message["tool_calls"] = calls
        choice = {"finish_reason": self.finish_reason, "index": index}
        logprobs = {} if self.logprobs is UNSET else {"logprobs": self.logprobs}
        return {**choice, "message": message, **logprobs}


def _call(told: _Texts) -> dict[str, object]:
    call = told.all()
    function = {name: call.pop(name) for name in ("name", "arguments")}
    return {"function": function, **call}


# --- The events -------------------------------------------------------------------


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(Private):
    choices: list[_ChoiceDelta] | None = None
    usage: _Usage | None = None
    error: EventError | None = None
    verbose: Raw | UnsetType = msgspec.field(default=UNSET, name="__verbose")


_event = msgspec.json.Decoder(_Event | None)


class Assembler:
    """Folds the events of one answer of no more than `limit` characters."""

    def __init__(self, kind: Literal["chat", "text"], limit: int) -> None:
        self._chat = kind == "chat"
        self._limit = limit
        self._size = 0  # of what was folded
        self._line = bytearray()  # what has no end yet of a line,
        self._data = bytearray()  # and of an event
        self._choices = defaultdict[int, _Choice](_Choice)
        self._latest = 0  # the choice that was told of last
        self._last = b"{}"  # the last event on the first choice
        self._usage = b""  # the event with the usage that counts
        self._tokens = 0
        self._done = False

    def __repr__(self) -> str:
        return f"<Assembler size={self._size} {'done' if self._done else 'open'}>"

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, wherever they were cut.

        Raises:
            AssemblyError: there can be no answer any more.
        """
        self._line += data
        if b"\n" in data or b"\r" in data:
            *lines, rest = _LINE_END.split(bytes(self._line))
            self._line = bytearray(rest)
            for line in lines:
                if line.startswith(b"data:"):
                    self._data += line[5:] + b"\n"
                elif not line:
                    event, self._data = bytes(self._data).strip(), bytearray()
                    self._take(event)
        if self._size + len(self._line) + len(self._data) > self._limit:
            raise AssemblyError(f"the answer is longer than {self._limit} characters")

    def _take(self, data: bytes) -> None:
        self._done = self._done or data == b"[DONE]"
        if self._done or not data:
            return
        try:
            event = _event.decode(data)
            data.decode()  # also in the fields that are taken over unread
        except _UNREADABLE as exc:
            raise AssemblyError(f"an event cannot be read: {exc}") from None
        if event is None:  # llama-server, for a prompt that has nothing to tell yet
            return
        if event.error is not None:
            raise AssemblyError("the worker ended the answer by an error", event.error)
        if event.verbose is not UNSET:  # a llama-server that runs with `--verbose`
            raise LostTextError("the stream did not tell the text of `__verbose`")
        for delta in event.choices or ():
            self._latest = delta.index
            self._size += self._choices[delta.index].fold(delta)
            if delta.logprobs:
                self._size += len(data)  # they hold on to the whole event
        if self._latest == 0 and event.choices is not None:
            self._last = data
        # llama-server tells the usage of each choice behind its last event, and has
        # that of the first one in the answer.  Others tell it once, behind them all.
        if event.usage is not None and (self._latest == 0 or not self._usage):
            self._usage, self._tokens = data, event.usage.completion_tokens

    def finish(self) -> bytes:
        """Say that the stream has ended, and return the answer.

        Raises:
            AssemblyError: it is not complete, or not in the stream (LostTextError).
        """
        if self._line:  # it may be a CR; the half of an event is passed over
            self.feed(b"\n")
        choices = sorted(self._choices.items())
        told = choices and all(choice.finish_reason for _, choice in choices)
        if not (told and (self._done or self._usage)):
            raise AssemblyError("the stream ended before the answer was complete")
        for _, choice in choices:
            # Of an answer that never left a tag of the template, or a character, the
            # stream has nothing, and the answer has it raw.  One token may be the end.
            cut = choice.finish_reason == "length" or self._tokens > 1
            if cut and choice.shows_nothing():
                raise LostTextError("the stream did not tell the text of the answer")
        answer: dict[str, object] = {**_fields.decode(self._last)}
        if self._usage:
            answer["usage"] = _fields.decode(self._usage)["usage"]
        answer["object"] = "chat.completion" if self._chat else "text_completion"
        fold = _Choice.chat if self._chat else _Choice.text
        answer["choices"] = [fold(choice, index) for index, choice in choices]
        return msgspec.json.encode(answer)
