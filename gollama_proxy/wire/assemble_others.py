"""Streams of Anthropic's messages and of llama-server's own API, folded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    ANY,
    FRAME,
    NUMBER,
    OBJECT,
    TEXT,
    Asked,
    Assembler,
    LostTextError,
    Texts,
    UnfoldableError,
    fail,
    read,
    unfinished,
)
from gollama_proxy.wire.schema import (
    UNREADABLE,
    NativeEvent,
    message_event,
    native_event,
    raw_fields,
)

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

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
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
    """Copy values, which would else hold on to their whole event."""
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
            grown += len(data)  # they hold on to the whole event
        if event.stop:
            self.last, self.fields = event, raw_fields.decode(data)
            grown += len(data)
        return grown


class NativeAssembler(Assembler):
    """Folds the events of completions: the last one of each has all but the text."""

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
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
