"""An event stream folded into the one JSON answer that its client asked for.

llama-server gives up a generation as soon as its client is gone only if it streams: for
an answer in one piece it looks after a second in which no slot had a result, and on a
busy server there is none (`server_response::recv_with_timeout`).  So the hub has its
workers stream, and puts the answer together for a client that did not ask for a stream.

The client must not be able to tell the difference.  What cannot be folded faithfully
raises `UnfoldableError`, and the request is sent again as its client wrote it.  This
module has what all APIs share, and the `choices` of OpenAI's; the others are in
assemble_named.py and assemble_native.py, and streaming.py knows which requests can be
asked for as a stream.  What is said of llama-server is so in build b10068
(tools/server/server-task.cpp, where `to_json_oaicompat_chat` stands beside
`…_chat_stream`); real answers are compared field by field in
tests/real/test_assemble.py.
"""

from __future__ import annotations

import abc
import io
import re
from collections import defaultdict
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gollama_proxy.wire.private import Private
from gollama_proxy.wire.sse import EventError

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a CR at the end may be half of a CRLF
FRAME = 256  # what a text counts for, however short it is
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
fields = msgspec.json.Decoder(dict[str, Raw])
TEXT = msgspec.json.Decoder(str | None)
NUMBER = msgspec.json.Decoder(int | None)
OBJECT = msgspec.json.Decoder(dict[str, Raw] | None)
OBJECTS = msgspec.json.Decoder(list[dict[str, Raw]] | None)
T = TypeVar("T")


class AssemblyError(Exception):
    """The events make up no answer; `error` is the worker's own, if it sent one."""

    def __init__(self, reason: str, error: EventError | None = None) -> None:
        super().__init__(reason)
        self.error = error


class UnfoldableError(AssemblyError):
    """The worker may have an answer, but its stream cannot be folded into it."""


class LostTextError(UnfoldableError):
    """This answer has something that a stream leaves out; the next one need not."""


class Asked(NamedTuple):
    """What of a request has to be known to fold its answer."""

    stops: bool = False  # it has stop strings
    choices: int = 0  # how many there will be; 0: not known
    tokens: bool = False  # the answer has the ids of its tokens


ANY = Asked()


class Texts:
    """Texts by name that grow; a null only says that there is one."""

    def __init__(self) -> None:
        self._texts: dict[str, io.StringIO | None] = {}

    def __repr__(self) -> str:
        return f"<Texts {len(self._texts)}>"

    def add(self, name: str, text: str | None) -> int:
        """Append, and return how much it grew."""
        grown = 0 if name in self._texts else FRAME
        known = self._texts.setdefault(name, None)
        if text is None or (known and name in ("role", "id", "type", "name")):
            return grown  # some tell those with each event
        if known is None:
            known = self._texts[name] = io.StringIO(newline="")
        return grown + known.write(text)

    def get(self, name: str) -> str:
        text = self._texts.get(name)
        return text.getvalue() if text else ""

    def all(self) -> dict[str, str | None]:
        return {n: t.getvalue() if t else None for n, t in self._texts.items()}


def read(value: Raw | None, decoder: msgspec.json.Decoder[T | None]) -> T | None:
    """Read a part of an event, which may be missing.

    Raises:
        UnfoldableError: it has another shape.
    """
    try:
        return None if value is None else decoder.decode(value)
    except UNREADABLE:
        raise UnfoldableError("an event has a part that cannot be folded") from None


def means_nothing(value: Raw | None) -> bool:
    """Whether a value can be left out of what is put together."""
    return value is None or bytes(value) in (b"null", b"[]", b"{}", b'""')


class Assembler(abc.ABC):
    """Folds the events of one answer of no more than `limit` characters."""

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
        self._limit = limit
        self._asked = asked
        self._size = 0  # of what was folded
        self._line = bytearray()  # what has no end yet of a line,
        self._data = bytearray()  # and of an event
        self._done = False

    def __repr__(self) -> str:
        state = "done" if self._done else "open"
        return f"<{type(self).__name__} size={self._size} {state}>"

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
            raise LostTextError(f"the answer is longer than {self._limit} characters")

    def _take(self, data: bytes) -> None:
        self._done = self._done or data == b"[DONE]"
        if self._done or not data:
            return
        try:
            data.decode()  # also in the fields that are taken over unread
            self._fold(data)
        except UNREADABLE as exc:
            raise UnfoldableError(f"an event cannot be read: {exc}") from None

    def finish(self) -> bytes:
        """Say that the stream has ended, and return the answer.

        Raises:
            UnfoldableError: it is not complete, or not in the stream.
        """
        if self._line:  # it may be a CR; the half of an event is passed over
            self.feed(b"\n")
        try:
            return msgspec.json.encode(self._answer())
        except UNREADABLE as exc:
            raise UnfoldableError(f"an event cannot be read: {exc}") from None

    @abc.abstractmethod
    def _fold(self, data: bytes) -> None:
        """Take in one event, which is UTF-8."""

    @abc.abstractmethod
    def _answer(self) -> object:
        """Put the answer together."""


def fail(error: EventError) -> None:
    """Pass on the error that a worker ends its answer with."""
    raise AssemblyError("the worker ended the answer by an error", error)


def unfinished() -> UnfoldableError:
    return UnfoldableError("the stream ended before the answer was complete")


# --- One choice -------------------------------------------------------------------

_Logprobs = dict[str, list[Raw] | None]
_LOGPROBS = msgspec.json.Decoder(_Logprobs | None)


class _Call:
    """One call of a tool, as far as it has come."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.texts = Texts()

    def __repr__(self) -> str:
        return f"<_Call {self.index}>"

    def lacks(self, id_: str, name: str) -> bool:
        """Whether this is a call whose id or name has not come before."""
        id_known, name_known = self.texts.get("id"), self.texts.get("name")
        return not (id_ and id_known) and not (name and name_known)

    def answer(self) -> dict[str, object]:
        names = {"id": self.texts.get("id")} if self.texts.get("id") else {}
        told = {name: self.texts.get(name) for name in ("name", "arguments")}
        type_ = self.texts.get("type") or "function"
        return {"function": told, "type": type_, **names}


class _Calls:
    """Calls of tools, told apart by their ids where servers repeat an `index`."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def __repr__(self) -> str:
        return f"<_Calls {len(self._calls)}>"

    def fold(self, delta: dict[str, Raw]) -> int:
        """Append to the call that an event goes on with; return how much it grew."""
        told = dict(delta)
        function = read(told.pop("function", None), OBJECT) or {}
        index = read(told.pop("index", None), NUMBER)
        id_, type_ = (read(told.pop(name, None), TEXT) for name in ("id", "type"))
        name, arguments = (
            read(function.pop(name, None), TEXT) for name in ("name", "arguments")
        )
        if not all(map(means_nothing, [*told.values(), *function.values()])):
            raise UnfoldableError("a call has a field that cannot be folded")
        call = self._find(index, id_ or "", name or "", arguments or "")
        texts = call.texts
        grown = texts.add("id", id_ or None) + texts.add("type", type_)
        return grown + texts.add("name", name) + texts.add("arguments", arguments)

    def _find(self, index: int | None, id_: str, name: str, arguments: str) -> _Call:
        same = [call for call in self._calls if index is None or call.index == index]
        if id_:
            named = [call for call in same if call.texts.get("id") == id_]
            same = named or [call for call in same[-1:] if call.lacks(id_, name)]
        elif same and (known := same[-1].texts.get("name")) and name and arguments:
            # Told once more, or the next one of that name?
            told = same[-1].texts.get("arguments")
            if name != known or (told and _is_json(told)):
                raise UnfoldableError("two calls of tools cannot be told apart")
        if not same:
            same = [_Call(index)]
            self._calls += same
        return same[-1]

    def answer(self) -> list[dict[str, object]]:
        ordered = sorted(self._calls, key=lambda call: call.index or 0)
        return [call.answer() for call in ordered]

    def __bool__(self) -> bool:
        return bool(self._calls)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except UNREADABLE:
        return False
    return True


class _Choice:
    """One choice, as far as it has come."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.calls = _Calls()
        self.logprobs: _Logprobs | UnsetType | None = UNSET
        self.finish_reason: str | None = None
        self._others: dict[str, Raw] = {}  # fields that the answer has as well

    def __repr__(self) -> str:
        return f"<_Choice {self.finish_reason or 'open'}>"

    def fold(self, told: dict[str, Raw]) -> int:
        """Append what an event has of it, and return how much it grew."""
        grown = 0
        ended = self.finish_reason is not None
        for name, value in told.items():
            if name == "delta":
                delta = read(value, OBJECT) or {}
                grown += sum(self._fold_delta(*item) for item in delta.items())
            elif name == "text":
                grown += self.texts.add("text", read(value, TEXT))
            elif name == "logprobs":
                self._fold_logprobs(read(value, _LOGPROBS))
            elif name == "finish_reason":
                self.finish_reason = read(value, TEXT) or self.finish_reason
            elif name != "index":
                grown += self._keep(name, value)
        if ended and grown:
            raise UnfoldableError("a choice went on behind its end")
        return grown

    def _fold_delta(self, name: str, value: Raw) -> int:
        if name == "tool_calls":
            calls = read(value, OBJECTS) or []
            return sum(map(self.calls.fold, calls))
        if bytes(value) in (b"[]", b"{}"):
            return 0
        return self.texts.add(name, read(value, TEXT))

    def _keep(self, name: str, value: Raw) -> int:
        """Keep a field that one event tells for all; what grows cannot be folded."""
        known = self._others.get(name)
        if known is None or means_nothing(known):
            self._others[name] = value.copy()
            return 0 if known is not None else len(bytes(value)) + len(name)
        if not means_nothing(value) and bytes(value) != bytes(known):
            raise UnfoldableError("a choice has a field that cannot be folded")
        return 0

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
        logprobs = self.logprobs or None
        choice = {"text": self.texts.get("text"), "index": index, "logprobs": logprobs}
        return choice | self._others | {"finish_reason": self.finish_reason}

    def chat(self, index: int) -> dict[str, object]:
        message: dict[str, object] = {**self.texts.all()}
        message.pop("text", None)
        message["role"] = message.get("role") or "assistant"
        # llama-server never has a null here, whatever else the message holds.
        message["content"] = message.get("content") or ""
        if self.calls:
            message["tool_calls"] = self.calls.answer()
        choice = {"finish_reason": self.finish_reason, "index": index}
        logprobs = {} if self.logprobs is UNSET else {"logprobs": self.logprobs}
        return {**choice, "message": message, **self._others, **logprobs}


# --- The events -------------------------------------------------------------------


class _Event(Private):
    choices: list[dict[str, Raw]] | None = None
    usage: dict[str, Raw] | None = None
    error: EventError | None = None
    verbose: Raw | UnsetType = msgspec.field(default=UNSET, name="__verbose")


_event = msgspec.json.Decoder(_Event | None)


class TextAssembler(Assembler):
    """Folds the answers of OpenAI's completions."""

    kind = "text_completion"
    fold = _Choice.text

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
        super().__init__(limit, asked)
        self._choices = defaultdict[int, _Choice](_Choice)
        self._latest = 0  # the choice that was told of last
        self._last = b"{}"  # the last event on the first choice
        self._usage = b""  # the event with the usage that counts
        self._tokens: int | None = None

    def _fold(self, data: bytes) -> None:
        event = _event.decode(data)
        if event is None:  # llama-server, for a prompt that has nothing to tell yet
            return
        if event.error is not None:
            fail(event.error)
        if event.verbose is not UNSET:  # a llama-server that runs with `--verbose`
            raise UnfoldableError("the stream did not tell the text of `__verbose`")
        for told in event.choices or ():
            self._latest = read(told.get("index"), NUMBER) or 0
            if self._latest not in self._choices:
                self._size += FRAME
            self._size += self._choices[self._latest].fold(told)
            if not means_nothing(told.get("logprobs")):
                self._size += len(data)  # they hold on to the whole event
        if self._latest == 0 and event.choices is not None:
            self._last = data
        # llama-server tells the usage of each choice behind its last event, and has
        # that of the first one in the answer.  Others tell it once, behind them all.
        if event.usage is not None and (self._latest == 0 or not self._usage):
            tokens = event.usage.get("completion_tokens")
            self._usage, self._tokens = data, read(tokens, NUMBER)

    def _answer(self) -> object:
        choices = sorted(self._choices.items())
        told = choices and all(choice.finish_reason for _, choice in choices)
        if not (told and (self._done or self._usage)):
            raise unfinished()
        if self._asked.choices not in (0, len(choices)):
            raise UnfoldableError("the stream has another number of choices")
        for _, choice in choices:
            self._check(choice)
        answer: dict[str, object] = {**fields.decode(self._last)}
        if self._usage:
            answer["usage"] = fields.decode(self._usage)["usage"]
        answer["object"] = self.kind
        answer["choices"] = [type(self).fold(choice, i) for i, choice in choices]
        return answer

    def _check(self, choice: _Choice) -> None:
        """Raise LostTextError for an answer that has more than its stream."""
        cut = choice.finish_reason == "length"
        # What may become a stop string is held back, and never sent where the answer
        # is cut there.
        if cut and self._asked.stops:
            raise LostTextError("the stream may have held back what it ended with")
        # Of an answer that never left a tag of the template, or a character, the
        # stream has nothing, and the answer has it raw.  One token may be the end.
        if (cut or (self._tokens or 0) > 1) and choice.shows_nothing():
            raise LostTextError("the stream did not tell the text of the answer")


class ChatAssembler(TextAssembler):
    """Folds the answers of OpenAI's chat completions."""

    kind = "chat.completion"
    fold = _Choice.chat
