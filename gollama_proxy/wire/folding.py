"""An event stream folded into the single JSON answer that its client requested.

llama-server gives up a generation as soon as its client is gone only if it streams: for
an answer in one piece it checks after a second in which no slot had a result, and on a
busy server there is none (`server_response::recv_with_timeout`).  So the hub asks for
a stream, and assembles the answer for a client that did not ask for one.

The client must not be able to notice.  A stream that cannot be folded faithfully raises
`UnfoldableError`, and the request is sent again as its client wrote it.  This module
has the parts that all APIs share, and the choices of OpenAI's chats and completions;
assemble.py has the other APIs, and decides which requests are sent as a stream.
Statements on llama-server are true of build b10068 (in tools/server/server-task.cpp,
`to_json_oaicompat_chat` stands beside `…_chat_stream`); real answers are compared field
by field in tests/real/test_assemble.py.

Nearly all events of a stream differ from the one before in a word alone.  So the bytes
around the word are learnt, and of the events that have the same bytes around theirs
only the words are kept, to be decoded together.
"""

from __future__ import annotations

import abc
import io
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gollama_proxy.wire.schema import (
    IN_STRING,
    UNREADABLE,
    WORD,
    EventError,
    RawChunk,
    raw_chunk,
    raw_fields,
)
from gollama_proxy.wire.sse import CR, LF, Gatherer, data_of

FRAME = 256  # characters that a text counts for beside its own, however short it is
TEXT = msgspec.json.Decoder(str | None)
NUMBER = msgspec.json.Decoder(int | None)
OBJECT = msgspec.json.Decoder(dict[str, Raw] | None)
OBJECTS = msgspec.json.Decoder(list[dict[str, Raw]] | None)
T = TypeVar("T")
# Times that the bytes around a word are learnt; bytes that change too often are not
# worth the cost.
_MOST_LEARNT = 8
_QUOTE, _BACKSLASH = b'"\\'


class AssemblyError(Exception):
    """The events make up no answer; `error` is the worker's own, if it sent one."""

    def __init__(self, reason: str, error: EventError | None = None) -> None:
        super().__init__(reason)
        self.error = error


class UnfoldableError(AssemblyError):
    """The worker may have an answer, but its stream cannot be folded into it."""


class LostTextError(UnfoldableError):
    """This answer has something that a stream leaves out; the next one may not."""


class Requested(msgspec.Struct, frozen=True):
    """What an assembler has to know about the request."""

    stops: bool = False  # it has stop strings
    choices: int = 0  # how many there will be; 0 means unknown
    tokens: bool = False  # the answer has the ids of its tokens


ANY = Requested()


class Texts:
    """Texts by name that grow; after a null alone, a text is null."""

    def __init__(self) -> None:
        self._texts: dict[str, io.StringIO | None] = {}

    def __repr__(self) -> str:
        return f"<Texts {len(self._texts)}>"

    def add(self, name: str, text: str | None) -> int:
        """Append; return by how many characters all of it grew."""
        grown = 0 if name in self._texts else FRAME
        known = self._texts.setdefault(name, None)
        if text is None or (known and name in ("role", "id", "type", "name")):
            return grown  # some servers repeat those in each event
        if known is None:
            known = self._texts[name] = io.StringIO(newline="")
        return grown + known.write(text)

    def get(self, name: str) -> str:
        text = self._texts.get(name)
        return text.getvalue() if text else ""

    @property
    def shown(self) -> bool:
        """Whether there is any beside the role."""
        for name, text in self._texts.items():  # cheaper than `any`
            if text and name != "role" and text.tell():
                return True
        return False

    def all(self) -> dict[str, str | None]:
        texts: dict[str, str | None] = {}
        for name, text in self._texts.items():  # cheaper than a comprehension
            texts[name] = text.getvalue() if text else None
        return texts


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
    """Return whether a value can be left out of the answer."""
    return value is None or bytes(value) in (b"null", b"[]", b"{}", b'""')


class Assembler(abc.ABC):
    """Folds the events of one answer of no more than `limit` characters."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        self._limit = limit
        self._asked = asked
        self._size = 0  # characters that were folded
        self._gatherer = Gatherer()
        self._done = False
        # The text that grows with each event, and the bytes around its words.
        self._growing: tuple[Texts, str] | None = None
        self._head = self._foot = self._end = b""  # `_end` has the blank line as well
        self._words: list[bytes] = []  # as they are in JSON
        self._learnt = 0  # times

    def __repr__(self) -> str:
        state = "done" if self._done else "open"
        return f"<{type(self).__name__} size={self._size} {state}>"

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, wherever they were cut.

        Raises:
            AssemblyError: there can be no answer any more.
        """
        alone = self._head and not self._gatherer.size
        if not (alone and self._take_word(data, self._end)):
            for event in self._gatherer.feed(data):
                if self._head and self._take_word(event, self._foot):
                    continue
                if self._done:
                    continue
                if event.startswith(b"data: ") and LF not in event and CR not in event:
                    self._take(event[6:].strip())  # as nearly all
                elif (found := data_of(event)) is not None:
                    self._take(found.strip())
        if self._size + self._gatherer.size > self._limit:
            self._decode_words()  # which may have counted for too much
            if self._size + self._gatherer.size > self._limit:
                text = f"the answer is longer than {self._limit} characters"
                raise LostTextError(text)

    def _take_word(self, data: bytes, foot: bytes) -> bool:
        """Keep the word of an event with the bytes that were learnt; False if none."""
        head = self._head
        around = len(head) + len(foot)
        if not (data.startswith(head) and data.endswith(foot) and len(data) >= around):
            return False
        word = data[len(head) : -len(foot)]
        if (_QUOTE in word or _BACKSLASH in word) and not IN_STRING.fullmatch(word):
            return False
        self._words.append(word)
        self._size += len(word)
        return True

    def _take(self, data: bytes) -> None:
        if self._words:
            self._decode_words()
        self._head = b""
        if data == b"[DONE]":
            self._done = True
        elif data:
            try:
                data.decode()  # the fields that stay as they are included
                self._fold(data)
            except UNREADABLE as exc:
                raise _unreadable(exc) from None

    def _learn(self, texts: Texts, name: str, head: bytes, foot: bytes) -> None:
        """Keep only the words of the next events that are `head`, a word and `foot`.

        Such an event must do nothing but append its word to a text.
        """
        if self._learnt < _MOST_LEARNT:
            self._learnt += 1
            self._growing = texts, name
            self._head, self._foot = b"data: " + head, foot
            self._end = foot + b"\n\n"

    def _decode_words(self) -> None:
        if self._growing is not None and self._words:
            words, self._words = b"".join(self._words), []
            try:
                text = msgspec.json.decode(b'"%b"' % words, type=str)
            except UNREADABLE as exc:
                raise _unreadable(exc) from None
            texts, name = self._growing
            texts.add(name, text)
            self._size += len(text) - len(words)

    def finish(self) -> bytes:
        """End the stream; return the answer.

        Raises:
            UnfoldableError: it is not complete, or not in the stream.
        """
        if self._words:
            self._decode_words()
        return msgspec.json.encode(self._answer())

    @abc.abstractmethod
    def _fold(self, data: bytes) -> None:
        """Take in one event, which is UTF-8."""

    @abc.abstractmethod
    def _answer(self) -> object:
        """Put the answer together."""


def _unreadable(error: Exception) -> UnfoldableError:
    return UnfoldableError(f"an event cannot be read: {error}")


def fail(error: EventError) -> None:
    """Pass on the error with which a worker ends its answer."""
    raise AssemblyError("the worker ended the answer with an error", error)


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
        function = {name: self.texts.get(name) for name in ("name", "arguments")}
        type_ = self.texts.get("type") or "function"
        return {"function": function, "type": type_, **names}


class _Calls:
    """Calls of tools, distinguished by their ids where servers repeat an `index`."""

    def __init__(self) -> None:
        self.all: list[_Call] = []

    def __repr__(self) -> str:
        return f"<_Calls {len(self.all)}>"

    def fold(self, delta: dict[str, Raw]) -> int:
        """Append to the call that an event continues; return how much it grew."""
        others = dict(delta)
        function = read(others.pop("function", None), OBJECT) or {}
        index = read(others.pop("index", None), NUMBER)
        id_, type_ = (read(others.pop(name, None), TEXT) for name in ("id", "type"))
        name, arguments = (
            read(function.pop(name, None), TEXT) for name in ("name", "arguments")
        )
        if not all(map(means_nothing, [*others.values(), *function.values()])):
            raise UnfoldableError("a call has a field that cannot be folded")
        call = self._find(index, id_ or "", name or "", arguments or "")
        texts = call.texts
        grown = texts.add("id", id_ or None) + texts.add("type", type_)
        return grown + texts.add("name", name) + texts.add("arguments", arguments)

    def _find(self, index: int | None, id_: str, name: str, arguments: str) -> _Call:
        same = [call for call in self.all if index is None or call.index == index]
        if id_:
            named = [call for call in same if call.texts.get("id") == id_]
            same = named or [call for call in same[-1:] if call.lacks(id_, name)]
        elif same and (known := same[-1].texts.get("name")) and name and arguments:
            # Is the name repeated, or is this the next call of that name?
            before = same[-1].texts.get("arguments")
            if name != known or (before and _is_json(before)):
                raise UnfoldableError("two calls of tools cannot be distinguished")
        if not same:
            same = [_Call(index)]
            self.all += same
        return same[-1]

    def answer(self) -> list[dict[str, object]]:
        ordered = sorted(self.all, key=lambda call: call.index or 0)
        return [call.answer() for call in ordered]


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
        self.calls: _Calls | None = None  # until there is one
        self.logprobs: _Logprobs | UnsetType | None = UNSET
        self.finish_reason: str | None = None
        self._others: dict[str, Raw] = {}  # fields that the answer has as well

    def __repr__(self) -> str:
        return f"<_Choice {self.finish_reason or 'open'}>"

    def fold(self, found: dict[str, Raw]) -> int:
        """Append the parts in an event, and return by how much it grew."""
        grown = 0
        ended = self.finish_reason is not None
        for name, value in found.items():
            if name == "delta":
                for part, added in (OBJECT.decode(value) or {}).items():
                    if part == "tool_calls":
                        grown += self._fold_calls(OBJECTS.decode(added))
                    elif bytes(added) not in (b"[]", b"{}"):
                        grown += self.texts.add(part, TEXT.decode(added))
            elif name == "text":
                grown += self.texts.add("text", TEXT.decode(value))
            elif name == "logprobs":
                self._fold_logprobs(_LOGPROBS.decode(value))
            elif name == "finish_reason":
                self.finish_reason = TEXT.decode(value) or self.finish_reason
            elif name != "index":
                grown += self._keep(name, value)
        if ended and grown:
            raise UnfoldableError("a choice went on after its end")
        return grown

    def _fold_calls(self, parts: list[dict[str, Raw]] | None) -> int:
        if not parts:
            return 0
        if self.calls is None:
            self.calls = _Calls()
        return sum(map(self.calls.fold, parts))

    def _keep(self, name: str, value: Raw) -> int:
        """Keep a field of which one event has all; one that grows cannot be folded."""
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

    def text(self, index: int) -> dict[str, object]:
        logprobs = self.logprobs or None
        choice = {"text": self.texts.get("text"), "index": index, "logprobs": logprobs}
        return choice | self._others | {"finish_reason": self.finish_reason}

    def chat(self, index: int) -> dict[str, object]:
        message: dict[str, object] = dict(self.texts.all())
        message.pop("text", None)
        message["role"] = message.get("role") or "assistant"
        # llama-server never has a null here, even in a message with nothing but calls.
        message["content"] = message.get("content") or ""
        if self.calls is not None:
            message["tool_calls"] = self.calls.answer()
        choice = {"finish_reason": self.finish_reason, "index": index}
        logprobs = {} if self.logprobs is UNSET else {"logprobs": self.logprobs}
        return {**choice, "message": message, **self._others, **logprobs}


# --- The events -------------------------------------------------------------------


def _addition(found: dict[str, Raw]) -> tuple[str, bytes] | None:
    """Return the one field that a choice in an event adds to an answer each time.

    None if there are several, or none.
    """
    fields, only = found, None
    if "delta" in found:
        fields = {**found, **(OBJECT.decode(found["delta"]) or {})}
    for name, value in fields.items():
        if name in _SAME or bytes(value) in _NOTHING:
            continue
        if only is not None:
            return None
        only = name, bytes(value)
    return only


_SAME = frozenset({"index", "delta", "role"})
_NOTHING = frozenset({b"null", b"[]", b"{}", b'""'})

_TILDE = ord("~")
_REPEATS = 2  # events, before learning the bytes around their words pays


class TextAssembler(Assembler):
    """Folds the answers of OpenAI's completions."""

    kind = "text_completion"
    fold = _Choice.text

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._choices = dict[int, _Choice]()
        self._latest = 0  # the choice of the last event
        self._last = b"{}"  # the last event of the first choice
        self._repeats = 0  # events that may have nothing but another word
        self._usage: dict[str, Raw] | None = None  # the one that counts
        self._tokens: int | None = None

    def _fold(self, data: bytes) -> None:
        event = raw_chunk.decode(data)
        if event is None:  # llama-server, for a prompt without news
            return
        if event.error is not None:
            fail(event.error)
        if event.verbose is not UNSET:  # a llama-server that runs with `--verbose`
            raise UnfoldableError("the stream lacks the text of `__verbose`")
        for found in event.choices or ():
            index = found.get("index")
            self._latest = 0 if index is None else NUMBER.decode(index) or 0
            choice = self._choices.get(self._latest)
            if choice is None:
                choice = self._choices[self._latest] = _Choice()
                self._size += FRAME
            self._size += choice.fold(found)
            if "logprobs" in found and not means_nothing(found["logprobs"]):
                self._size += len(data)  # they keep the whole event in memory
        if self._latest == 0 and event.choices is not None:
            self._last = data
            if len(event.choices) == 1 and event.usage is None:
                self._repeats += 1
                if self._repeats > _REPEATS and not self._choices[0].finish_reason:
                    self._learn_from(data)
        # llama-server sends the usage of each choice after its last event, and has that
        # of the first one in the answer.  Others send it once, after all choices.
        if event.usage is not None and (self._latest == 0 or self._usage is None):
            tokens = event.usage.get("completion_tokens")
            self._usage, self._tokens = event.usage, read(tokens, NUMBER)

    def _learn_from(self, data: bytes) -> None:
        """Learn the bytes around the word of an event, if it adds nothing else."""
        word = WORD.search(data)
        if word is None or _TILDE in data:
            return
        head, foot = data[: word.start(2)], data[word.end(2) :]
        probe = (raw_chunk.decode(head + b"~" + foot) or RawChunk()).choices or [{}]
        # The only string that differs is this word; is it the text of the choice?
        name = word[1].decode()
        if _addition(probe[0]) == (name, b'"~"'):
            self._learn(self._choices[0].texts, name, head, foot)

    def _answer(self) -> object:
        choices = sorted(self._choices.items())
        if not (choices and (self._done or self._usage is not None)):
            raise unfinished()
        for _, choice in choices:
            if not choice.finish_reason:
                raise unfinished()
        if self._asked.choices not in (0, len(choices)):
            raise UnfoldableError("the stream has another number of choices")
        folded = []
        for index, choice in choices:
            self._check(choice)
            folded.append(type(self).fold(choice, index))
        answer: dict[str, object] = {**raw_fields.decode(self._last)}
        if self._usage is not None:
            answer["usage"] = self._usage
        answer["object"] = self.kind
        answer["choices"] = folded
        return answer

    def _check(self, choice: _Choice) -> None:
        """Raise LostTextError for an answer that has more than its stream."""
        cut = choice.finish_reason == "length"
        # What may become a stop string is held back, and never sent where the answer
        # is cut there.
        if cut and self._asked.stops:
            raise LostTextError("the stream may lack the last text")
        # Of an answer that never left a tag of the template, or a character, the
        # stream has nothing, and the answer has it raw.  One token may be the end.
        several = cut or (self._tokens or 0) > 1
        if several and not (choice.calls or choice.texts.shown):
            raise LostTextError("the stream lacks the text of the answer")


class ChatAssembler(TextAssembler):
    """Folds the answers of OpenAI's chat completions."""

    kind = "chat.completion"
    fold = _Choice.chat
