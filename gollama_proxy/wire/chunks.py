"""One event of a chat or text stream, read: what a rescue has to know of it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

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


class _Delta(Private):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None  # llama-server
    reasoning: str | None = None  # vLLM
    tool_calls: Any = None
    function_call: Any = None
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
    """One event, read; `data` is the JSON it was read from."""

    data: bytes
    chunk: _Chunk
    text: str = ""
    role: bool = False
    reasoning: bool = False
    finish: bool = False

    def __repr__(self) -> str:  # without what it says
        return f"<Event of {len(self.data)} bytes>"

    @property
    def tokens(self) -> int:
        """How many tokens the worker says it has generated; 0 where it does not say."""
        usage, timings = self.chunk.usage, self.chunk.timings
        counted = usage.completion_tokens if usage else 0
        return max(counted, timings.predicted_n if timings else 0)


END = Event(b"[DONE]", _Chunk())
_chunk_decoder = msgspec.json.Decoder(_Chunk)


def read_event(event: bytes) -> Event | None:
    """Read one event; None for comments and others without data.

    Raises:
        WorkerError: it tells an error.
        UnreadableError: it is no JSON of a chat or a text.
        DivergedError: it is of one that cannot be continued.
    """
    lines = [line for line in _LINE_END.split(event) if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(line[5:].lstrip(b" ") for line in lines)
    if data == END.data:
        return END
    try:
        chunk = _chunk_decoder.decode(data)
    except (ValueError, RecursionError) as exc:
        raise UnreadableError(f"an event that cannot be read: {exc}") from None
    if chunk.error is not None:
        text = "The worker ended the answer with an error."
        raise WorkerError(Code.WORKER_INCOMPLETE, text)  # its words may quote a prompt
    if not chunk.choices:
        return Event(data, chunk)
    choice = chunk.choices[0]
    delta = choice.delta or _Delta()
    if len(chunk.choices) > 1 or choice.index:
        raise DivergedError("more than one choice")
    if delta.tool_calls or delta.function_call or delta.refusal:
        raise DivergedError("a tool call or a refusal")
    return Event(
        data,
        chunk,
        delta.content or choice.text or "",
        delta.role is not None,
        bool(delta.reasoning_content or delta.reasoning),
        bool(choice.finish_reason),
    )
