"""An event stream folded into the single JSON answer that its client requested.

llama-server gives up a generation as soon as its client is gone only if it streams: for
an answer in one piece it checks after a second in which no slot had a result, and on a
busy server there is none (`server_response::recv_with_timeout`).  So the hub asks for
a stream, and assembles the answer for a client that did not ask for one.

The client must not be able to notice.  A stream that cannot be folded faithfully raises
`UnfoldableError`, and the request is sent again as its client wrote it.  This module
has the parts that all APIs share, Anthropic's messages and llama-server's own API;
assemble_openai.py has the rest, and requests.py decides which requests are sent as a
stream.  Statements on llama-server are true of build b10068 (in
tools/server/server-task.cpp, `to_json_oaicompat_chat` stands beside `…_chat_stream`);
real answers are compared field by field in tests/real/test_assemble.py.

Nearly all events of a stream differ from the one before in a word alone.  So the bytes
around the word are learnt, and of the events that have the same bytes around theirs
only the words are kept, to be decoded together.
"""

from __future__ import annotations

import abc
import io
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec import Raw

from gollama_proxy.wire.schema import (
    IN_STRING,
    UNREADABLE,
    EventError,
    NativeEvent,
    message_event,
    native_event,
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


# --- Messages ---------------------------------------------------------------------

# What an event appends to which field of a block.
_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("partial_json", "input"),
}


class _Block:
    """One block of content, as far as it has come."""

    def __init__(self, begun: Mapping[str, Raw]) -> None:
        self._begun = {name: value.copy() for name, value in begun.items()}
        self._texts = Texts()

    def __repr__(self) -> str:
        return f"<_Block {len(self._begun)}>"

    def fold(self, delta: Mapping[str, Raw]) -> int:
        """Append the parts in an event, and return by how much it grew."""
        kind = read(delta.get("type"), TEXT) or ""
        if kind not in _DELTAS:
            raise UnfoldableError("a delta of a block cannot be folded")
        source, name = _DELTAS[kind]
        return self._texts.add(name, read(delta.get(source), TEXT))

    def answer(self) -> dict[str, object]:
        block: dict[str, object] = {**self._begun}
        for name, text in self._texts.all().items():
            if name == "input":
                block[name] = _input(text or "")
            else:
                begun = read(self._begun.get(name), TEXT)
                block[name] = (begun or "") + (text or "")
        return block


def _input(text: str) -> object:
    if not text:
        return {}
    try:
        return Raw(msgspec.json.encode(raw_fields.decode(text)))
    except UNREADABLE:
        raise LostTextError("the input of a tool has no end") from None


class MessageAssembler(Assembler):
    """Folds the events of Anthropic's messages."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._message: dict[str, Raw] = {}
        self._usage: dict[str, Raw] = {}
        self._blocks: dict[int, _Block] = {}

    def _fold(self, data: bytes) -> None:
        event = message_event.decode(data)
        if event.error is not None:
            fail(event.error)
        match event.type:
            case "message_start":
                self._merge(event.message or {})
            case "content_block_start":
                if event.index in self._blocks:
                    raise UnfoldableError("two blocks share an index")
                self._blocks[event.index] = _Block(event.content_block or {})
                self._size += len(data) + FRAME
            case "content_block_delta":
                if event.index not in self._blocks:
                    raise UnfoldableError("a block has no beginning")
                self._size += self._blocks[event.index].fold(event.delta or {})
            case "message_delta":
                self._merge(event.delta or {})
                self._usage |= _kept(event.usage or {})
            case "message_stop":
                self._done = True
            case "content_block_stop" | "ping":
                pass
            case _:
                raise UnfoldableError("an event of a message cannot be folded")

    def _merge(self, found: Mapping[str, Raw]) -> None:
        kept = _kept(found)
        self._message |= kept
        usage = read(kept.get("usage"), OBJECT)
        self._usage |= usage or {}

    def _answer(self) -> object:
        if not (self._done and self._message):
            raise unfinished()
        blocks = [block.answer() for _, block in sorted(self._blocks.items())]
        reason = read(self._message.get("stop_reason"), TEXT)
        if reason == "max_tokens" and self._asked.stops:
            raise LostTextError("the stream may lack the last text")
        tokens = read(self._usage.get("output_tokens"), NUMBER) or 0
        if (reason == "max_tokens" or tokens > 1) and not blocks:
            raise LostTextError("the stream lacks the text of the answer")
        return {**self._message, "content": blocks, "usage": self._usage}


def _kept(found: Mapping[str, Raw]) -> dict[str, Raw]:
    """Copy values, which would otherwise keep their whole event."""
    return {name: value.copy() for name, value in found.items()}


# --- Completions of llama-server --------------------------------------------------


class _Completion:
    """The answer to one prompt, as far as it has come."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.tokens: list[int] = []
        self.probabilities: list[Raw] = []
        self.last: NativeEvent | None = None
        self.fields: dict[str, Raw] = {}  # of the last event

    def __repr__(self) -> str:
        return f"<_Completion {'open' if self.last is None else 'done'}>"

    def fold(self, event: NativeEvent, data: bytes) -> int:
        """Append the parts in an event, and return by how much it grew."""
        if self.last is not None:
            raise UnfoldableError("a completion went on after its end")
        grown = self.texts.add("content", event.content)
        self.tokens += event.tokens or ()
        grown += 8 * len(event.tokens or ())
        if event.completion_probabilities:
            self.probabilities += event.completion_probabilities
            grown += len(data)  # they keep the whole event in memory
        if event.stop:
            self.last, self.fields = event, raw_fields.decode(data)
            grown += len(data)
        return grown


class NativeAssembler(Assembler):
    """Folds the events of completions: the last one of each has all but the text."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._completions = defaultdict[int, _Completion](_Completion)

    def _fold(self, data: bytes) -> None:
        event = native_event.decode(data)
        if event is None:  # no news
            return
        if event.error is not None:
            fail(event.error)
        self._size += self._completions[event.index].fold(event, data)

    def _answer(self) -> object:
        completions = [each for _, each in sorted(self._completions.items())]
        if not completions or any(each.last is None for each in completions):
            raise unfinished()
        if self._asked.choices not in (0, len(completions)):
            raise UnfoldableError("the stream has another number of completions")
        answers = [self._whole(each) for each in completions]
        return answers if len(answers) > 1 else answers[0]

    def _whole(self, found: _Completion) -> dict[str, object]:
        assert found.last is not None, found
        text, cut = found.texts.get("content"), found.last.stop_type == "limit"
        if cut and self._asked.stops:
            raise LostTextError("the stream may lack the last text")
        if not text and (cut or found.last.tokens_predicted > 1):
            raise LostTextError("the stream lacks the text of the answer")
        answer: dict[str, object] = {**found.fields, "content": text}
        if "tokens" in answer:
            answer["tokens"] = found.tokens if self._asked.tokens else []
        if found.probabilities:
            answer["completion_probabilities"] = found.probabilities
        settings = read(found.fields.get("generation_settings"), OBJECT)
        if settings is not None:
            answer["generation_settings"] = {**settings, "stream": False}
        return answer
