"""What the events and answers of each API look like: the fields that the hub reads.

A worker may send more fields than these, and they pass unread.  Where all of an answer
has to be kept, as when a stream is assembled, the fields stay `Raw`, which is JSON as
the worker wrote it.  A schema is as strict as its reader has to be: with one more field
named, an event with another type there could not be read at all.

    OpenAI chat, completions   data: {"id", "created", "model", "choices": [{"index",
                                 "delta" | "text", "finish_reason"}], "usage"}
    Responses                  event: response.…, data: {"type", "response"}
    Anthropic messages         event: …, data: {"type", "message" | "content_block" |
                                 "delta", "index", "usage"}
    llama-server's own         data: {"index", "content", "tokens", "stop"}
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

# Raised by decoders for JSON that is malformed, nested too deeply, or of another shape.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# A text in an event: its key, and its value between the quotes.  A JSON string holds no
# bare quote, so generated text cannot look like it.
WORD = re.compile(
    rb'"(content|text|reasoning_content|reasoning|arguments)"\s*:\s*'
    rb'"((?:[^"\\]++|\\.)*+)"',
    re.DOTALL,
)
# What may stand between the quotes of a JSON string.
IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class Private(msgspec.Struct):
    """A struct whose `repr` shows its kind and no field: those are the user's."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


# --- Errors -----------------------------------------------------------------------


class EventError(Private):
    """The `error` object of an event, as llama-server and OpenAI write it."""

    message: str = ""
    type: str = "server_error"
    code: int | str | None = None


class ErrorEvent(Private):
    error: EventError | None = None
    # llama-server's event on `/v1/messages`, and that of Responses, have these fields
    # without an object around them.
    type: str = ""
    message: str = ""
    code: int | str | None = None


# --- OpenAI's chats and completions -----------------------------------------------


class ChoiceHead(Private):
    """One choice, as far as its beginning and its end are concerned."""

    index: int = 0
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class ChunkHead(Private):
    choices: list[ChoiceHead] | None = None
    prompt_progress: Any = None


class UsageChunk(Private):
    """The event with nothing but usage."""

    choices: list[Any]
    usage: dict[str, Any]
    error: Any = None


class RawChunk(Private):
    """An event to be assembled."""

    choices: list[dict[str, Raw]] | None = None
    usage: dict[str, Raw] | None = None
    error: EventError | None = None
    verbose: Raw | UnsetType = msgspec.field(default=UNSET, name="__verbose")


class Function(Private):
    name: str | None = None
    arguments: str | None = None


class Call(Private):
    index: int | None = None
    function: Function | None = None


class Delta(Private):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None
    function_call: Function | None = None
    refusal: str | None = None


class Choice(Private):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class ChunkUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class ChunkTimings(msgspec.Struct):
    predicted_n: int = 0


class Chunk(Private):
    """An event of an answer that is resumed, read in full."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] | None = None
    usage: ChunkUsage | None = None
    timings: ChunkTimings | None = None
    error: Any = None


# --- Responses and Anthropic's messages -------------------------------------------


class ResponseEvent(Private):
    type: str = ""
    response: dict[str, Raw] | None = None
    error: EventError | None = None


class MessageEvent(Private):
    type: str = ""
    message: dict[str, Raw] | None = None
    index: int = 0
    content_block: dict[str, Raw] | None = None
    delta: dict[str, Raw] | None = None
    usage: dict[str, Raw] | None = None
    error: EventError | None = None


# --- llama-server's own completions -----------------------------------------------


class NativeHead(Private):
    """One completion, as far as its end is concerned."""

    index: int | None = None
    stop: bool = False


class NativeEvent(Private):
    """An event to be assembled."""

    index: int = 0
    content: str | None = None
    tokens: list[int] | None = None
    stop: bool = False
    stop_type: str | None = None
    tokens_predicted: int = 0
    completion_probabilities: list[Raw] | None = None
    error: EventError | None = None


# --- Answers in one piece, and what any event says about its own ------------------


class Named(Private):
    model: Any = None
    # Anthropic's `message_start`, and the events of Responses.
    message: Any = None
    response: Any = None


class Counted(Private):
    """The fields beside the text; not those of an object that a model has written."""

    usage: Any = None
    timings: Any = None
    tokens_evaluated: Any = None
    tokens_predicted: Any = None
    choices: Raw = Raw(b"[]")


error_event = msgspec.json.Decoder(ErrorEvent)
chunk_head = msgspec.json.Decoder(ChunkHead)
usage_chunk = msgspec.json.Decoder(UsageChunk)
raw_chunk = msgspec.json.Decoder(RawChunk | None)  # null: nothing to report yet
response_event = msgspec.json.Decoder(ResponseEvent)
message_event = msgspec.json.Decoder(MessageEvent)
native_head = msgspec.json.Decoder(NativeHead)
native_event = msgspec.json.Decoder(NativeEvent | None)
named = msgspec.json.Decoder(Named)
counted = msgspec.json.Decoder(Counted | list[Counted])
any_list = msgspec.json.Decoder(list[Raw])
raw_fields = msgspec.json.Decoder(dict[str, Raw])
any_fields = msgspec.json.Decoder(dict[str, Any])
