"""Streams of llama-server's own API, folded: /completion and /infill."""

from __future__ import annotations

from collections import defaultdict

import msgspec
from msgspec import Raw

from gollama_proxy.wire.assemble import (
    ANY,
    OBJECT,
    Asked,
    Assembler,
    LostTextError,
    Texts,
    UnfoldableError,
    fail,
    fields,
    read,
    unfinished,
)
from gollama_proxy.wire.private import Private
from gollama_proxy.wire.sse import EventError


class _Event(Private):
    index: int = 0
    content: str | None = None
    tokens: list[int] | None = None
    stop: bool = False
    stop_type: str | None = None
    tokens_predicted: int = 0
    completion_probabilities: list[Raw] | None = None
    error: EventError | None = None


class _Completion:
    """The answer to one prompt, as far as it has come."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.tokens: list[int] = []
        self.probabilities: list[Raw] = []
        self.last: _Event | None = None
        self.fields: dict[str, Raw] = {}  # of the last event

    def __repr__(self) -> str:
        return f"<_Completion {'open' if self.last is None else 'done'}>"

    def fold(self, event: _Event, data: bytes) -> int:
        """Append what an event has of it, and return how much it grew."""
        if self.last is not None:
            raise UnfoldableError("a completion went on behind its end")
        grown = self.texts.add("content", event.content)
        self.tokens += event.tokens or ()
        grown += 8 * len(event.tokens or ())
        if event.completion_probabilities:
            self.probabilities += event.completion_probabilities
            grown += len(data)  # they hold on to the whole event
        if event.stop:
            self.last, self.fields = event, fields.decode(data)
            grown += len(data)
        return grown


_event = msgspec.json.Decoder(_Event | None)


class NativeAssembler(Assembler):
    """Folds the events of completions: the last one of each has all but the text."""

    def __init__(self, limit: int, asked: Asked = ANY) -> None:
        super().__init__(limit, asked)
        self._completions = defaultdict[int, _Completion](_Completion)

    def _fold(self, data: bytes) -> None:
        event = _event.decode(data)
        if event is None:  # nothing to tell yet
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

    def _whole(self, told: _Completion) -> dict[str, object]:
        assert told.last is not None, told
        text, cut = told.texts.get("content"), told.last.stop_type == "limit"
        if cut and self._asked.stops:
            raise LostTextError("the stream may have held back what it ended with")
        if not text and (cut or told.last.tokens_predicted > 1):
            raise LostTextError("the stream did not tell the text of the answer")
        answer: dict[str, object] = {**told.fields, "content": text}
        if "tokens" in answer:
            answer["tokens"] = told.tokens if self._asked.tokens else []
        if told.probabilities:
            answer["completion_probabilities"] = told.probabilities
        settings = read(told.fields.get("generation_settings"), OBJECT)
        if settings is not None:
            answer["generation_settings"] = {**settings, "stream": False}
        return answer
