"""One event of a chat or text stream, read: what a rescue has to know of it.

An answer is a sequence of spans: thoughts, text, a refusal, and the name and the
arguments of each call.  Two streams give the same answer if their spans do, however
each of them was cut into events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple

import msgspec

from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.private import Private

# Atomic, lest a CRLF be taken for two line ends.
BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class DivergedError(WorkerError):
    """What another worker sent cannot be the rest of the answer."""

    def __init__(self, detail: str) -> None:
        text = "The answer broke off, and another worker could not continue it."
        super().__init__(Code.WORKER_PROTOCOL, text, detail=detail)


class UnreadableError(DivergedError):
    """An event that is no JSON, or not of the shape that it should have."""


# --- What an answer is made of ----------------------------------------------------

Kind = Literal["reasoning", "text", "refusal", "name", "arguments"]
NO_CALL: Final = -1


class Span(NamedTuple):
    """A piece of an answer: of its thoughts, its text, or one of its calls."""

    kind: Kind
    text: str
    call: int = NO_CALL  # the index of the call; NO_CALL for what belongs to none

    def __repr__(self) -> str:  # without what it says
        return f"<Span of {len(self.text)} characters, {self.kind}>"


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join neighbours that are pieces of the same."""
    groups = groupby(spans, key=lambda span: (span.kind, span.call))
    return tuple(
        Span(kind, "".join(span.text for span in group), call)
        for (kind, call), group in groups
    )


class Leaf(NamedTuple):
    """Where a span stands in the JSON of an event."""

    span: Span
    holder: dict[str, Any]
    keys: tuple[str, ...]  # all of which hold the same text

    def __repr__(self) -> str:
        return f"<Leaf of {self.span!r}>"

    def put(self, text: str) -> None:
        """Have another text stand there, or none."""
        for key in self.keys:
            if text:
                self.holder[key] = text
            else:
                del self.holder[key]


def _leaves(choice: dict[str, Any]) -> Iterator[Leaf]:
    delta = choice.get("delta") or {}
    named: tuple[tuple[Kind, dict[str, Any], tuple[str, ...]], ...] = (
        ("reasoning", delta, ("reasoning_content", "reasoning")),  # llama-server, vLLM
        ("text", delta, ("content",)),
        ("text", choice, ("text",)),
        ("refusal", delta, ("refusal",)),
    )
    for kind, holder, names in named:
        if keys := tuple(name for name in names if holder.get(name)):
            yield Leaf(Span(kind, holder[keys[0]]), holder, keys)
    calls = [
        (call.get("index") or 0, call.get("function"))
        for call in delta.get("tool_calls") or ()
    ]
    # As it was called before there were several.
    for index, function in [(NO_CALL, delta.get("function_call")), *calls]:
        for part in ("name", "arguments"):
            if function and function.get(part):
                yield Leaf(Span(part, function[part], index), function, (part,))


# --- One event --------------------------------------------------------------------


class _Function(Private):
    name: str | None = None
    arguments: str | None = None


class _Call(Private):
    index: int | None = None
    function: _Function | None = None


class _Delta(Private):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None
    function_call: _Function | None = None
    refusal: str | None = None


class _Choice(Private):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Timings(msgspec.Struct):
    predicted_n: int = 0


class _Chunk(Private):
    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class Event(NamedTuple):
    """One event, read: its JSON, the part of it that matters, and where its texts are.

    `fields` may be changed through its `leaves`.
    """

    fields: dict[str, Any]
    chunk: _Chunk
    leaves: tuple[Leaf, ...] = ()
    role: bool = False
    finish: bool = False

    def __repr__(self) -> str:  # without what it says
        return f"<Event of {len(self.leaves)} spans>"

    @property
    def spans(self) -> list[Span]:
        return [leaf.span for leaf in self.leaves]

    @property
    def tokens(self) -> int:
        """How many tokens the worker says it has generated; 0 where it does not say."""
        usage, timings = self.chunk.usage, self.chunk.timings
        counted = usage.completion_tokens if usage else 0
        return max(counted, timings.predicted_n if timings else 0)


END = Event({}, _Chunk())
_MARK = b"[DONE]"


def read_event(event: bytes) -> Event | None:
    """Read one event; None for comments and others without data.

    Raises:
        WorkerError: it tells an error.
        UnreadableError: it is no JSON of a chat or a text.
        DivergedError: it is of an answer with several choices.
    """
    lines = [line for line in _LINE_END.split(event) if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(line[5:].lstrip(b" ") for line in lines)
    if data == _MARK:
        return END
    try:
        fields = msgspec.json.decode(data)
        chunk = msgspec.convert(fields, _Chunk)
    except (ValueError, RecursionError) as exc:
        raise UnreadableError(f"an event that cannot be read: {exc}") from None
    if chunk.error is not None:
        text = "The worker ended the answer with an error."
        raise WorkerError(Code.WORKER_INCOMPLETE, text)  # its words may quote a prompt
    if not chunk.choices:
        return Event(fields, chunk)
    choice = chunk.choices[0]
    if len(chunk.choices) > 1 or choice.index:
        raise DivergedError("more than one choice")
    return Event(
        fields,
        chunk,
        tuple(_leaves(fields["choices"][0])),
        choice.delta is not None and choice.delta.role is not None,
        bool(choice.finish_reason),
    )
