"""Streams whose events have names, folded: Anthropic's messages, OpenAI's responses."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    ANY,
    FRAME,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    UNREADABLE,
    Asked,
    Assembler,
    LostTextError,
    Texts,
    UnfoldableError,
    fail,
    fields,
    means_nothing,
    read,
    unfinished,
)
from gollama_proxy.wire.private import Private
from gollama_proxy.wire.sse import EventError

# --- Messages ---------------------------------------------------------------------

# What an event appends to which field of a block.
_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("partial_json", "input"),
}


class _MessageEvent(Private):
    type: str = ""
    message: dict[str, Raw] | None = None
    index: int = 0
    content_block: dict[str, Raw] | None = None
    delta: dict[str, Raw] | None = None
    usage: dict[str, Raw] | None = None
    error: EventError | None = None


class _Block:
    """One block of content, as far as it has come."""

    def __init__(self, begun: Mapping[str, Raw]) -> None:
        self._begun = {name: value.copy() for name, value in begun.items()}
        self._texts = Texts()

    def __repr__(self) -> str:
        return f"<_Block {len(self._begun)}>"

    def fold(self, delta: Mapping[str, Raw]) -> int:
        """Append what an event has of it, and return how much it grew."""
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
        return Raw(msgspec.json.encode(fields.decode(text)))
    except UNREADABLE:
        raise LostTextError("the input of a tool has no end") from None


class MessageAssembler(Assembler):
    """Folds the events of Anthropic's messages."""

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
        super().__init__(limit, asked)
        self._message: dict[str, Raw] = {}
        self._usage: dict[str, Raw] = {}
        self._blocks: dict[int, _Block] = {}
        self._decoder = msgspec.json.Decoder(_MessageEvent)

    def _fold(self, data: bytes) -> None:
        event = self._decoder.decode(data)
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

    def _merge(self, told: Mapping[str, Raw]) -> None:
        kept = _kept(told)
        self._message |= kept
        usage = read(kept.get("usage"), OBJECT)
        self._usage |= usage or {}

    def _answer(self) -> object:
        if not (self._done and self._message):
            raise unfinished()
        blocks = [block.answer() for _, block in sorted(self._blocks.items())]
        reason = read(self._message.get("stop_reason"), TEXT)
        if reason == "max_tokens" and self._asked.stops:
            raise LostTextError("the stream may have held back what it ended with")
        tokens = read(self._usage.get("output_tokens"), NUMBER) or 0
        if (reason == "max_tokens" or tokens > 1) and not blocks:
            raise LostTextError("the stream did not tell the text of the answer")
        return {**self._message, "content": blocks, "usage": self._usage}


def _kept(told: Mapping[str, Raw]) -> dict[str, Raw]:
    """Copy values, which would else hold on to their whole event."""
    return {name: value.copy() for name, value in told.items()}


# --- Responses --------------------------------------------------------------------


class _ResponseEvent(Private):
    type: str = ""
    response: dict[str, Raw] | None = None
    error: EventError | None = None


class ResponseAssembler(Assembler):
    """Takes the answer out of the last event of a response, which has all of it."""

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
        super().__init__(limit, asked)
        self._response: dict[str, Raw] | None = None
        self._decoder = msgspec.json.Decoder(_ResponseEvent)

    def _fold(self, data: bytes) -> None:
        event = self._decoder.decode(data)
        if event.error is not None:
            fail(event.error)
        if event.type in _LAST and event.response is not None:
            self._size += len(data)
            self._response, self._done = event.response, True

    def _answer(self) -> object:
        response = self._response
        if response is None:
            raise unfinished()
        if means_nothing(response.get("output")):
            raise LostTextError("the stream did not tell the text of the answer")
        return response if "completed_at" in response else _completed(response)


def _completed(response: dict[str, Raw]) -> dict[str, object]:
    """Add what llama-server has in an answer in one piece, and not in its stream.

    Both times are the same, and thoughts have a `status` as words have.
    """
    answer: dict[str, object] = {**response}
    if "created_at" in response:
        answer["completed_at"] = response["created_at"]
    items = read(response.get("output"), OBJECTS) or []
    status = response.get("status", Raw(b'"completed"'))
    answer["output"] = [{"status": status, **item} for item in items]
    return answer


_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})
