"""The APIs: their paths, and the fields that the hub reads of their events and answers.

Only the paths in the table `ENDPOINTS` are forwarded.  A llama-server also has paths
that run commands, load files and change its settings; `REFUSED` lists them with the
reasons, so that every one of its routes is in one of the two (tools/server/server.cpp
of llama.cpp, b11434).

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

import enum
import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

# --- Paths ------------------------------------------------------------------------


class Ending(enum.Enum):
    """What marks the end of a complete event stream, where the body's end does not.

    An HTTP body can end cleanly although the answer was cut: so does that of
    llama-server's router when a child dies.
    """

    DONE = "[DONE]"  # OpenAI chat and completions; a finish_reason will do
    STOP = '"stop":true'  # llama-server's native completion
    NAMED = "a closing event"  # Anthropic messages, OpenAI responses
    TRANSCRIPT = "transcript.text.done"  # OpenAI transcriptions; a `[DONE]` will do
    BODY = "the body's own end"  # routes that do not stream


class Api(enum.Enum):
    """The API that defines the fields of a route's answers."""

    OPENAI = "openai"  # chat, completions, embeddings; rerank, which has OpenAI's usage
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    NATIVE = "native"  # llama-server's own


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One POST route and the path it has on a worker."""

    path: str  # also the `route` label of metrics and logs
    ending: Ending = Ending.BODY
    arrays: tuple[str, ...] = ()  # fields that have to be JSON arrays where present
    slot: bool = True  # it takes one of the worker's slots
    form: bool = False  # its body is a multipart form with a file, and not JSON
    api: Api = field(init=False)
    # What each request needs to know, worked out once.
    chat: bool = field(init=False)  # its answers are messages, and not texts
    generates: bool = field(init=False)  # its answers are generated token by token
    operation: str = field(init=False)  # `gen_ai.operation.name`, if it has a name
    # The size of a body is a measure of how many tokens its prompt has.
    prompt_has_size: bool = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "api", api_of(self.path))
        put(self, "chat", self.path.endswith("chat/completions"))
        put(self, "generates", self.ending is not Ending.BODY)
        put(self, "prompt_has_size", self.generates and not self.form)
        put(self, "operation", _operation_of(self))


def _operation_of(endpoint: Endpoint) -> str:
    """Name what an endpoint does as OpenTelemetry does (GenAI semantic conventions)."""
    if endpoint.prompt_has_size:
        conversation = endpoint.chat or endpoint.ending is Ending.NAMED
        return "chat" if conversation else "text_completion"
    return "embeddings" if "/embedding" in endpoint.path else ""


def api_of(path: str) -> Api:
    """Return the API that a path belongs to, or would belong to.

    llama-server also has some of OpenAI's without the `/v1`.
    """
    if path.startswith("/v1/messages"):
        return Api.ANTHROPIC
    if path.startswith(("/v1/responses", "/responses")):
        return Api.RESPONSES
    openai = path.startswith(("/v1/", "/chat/", "/rerank", "/audio/"))
    return Api.OPENAI if openai else Api.NATIVE


# Every accepted spelling of a path.  A worker gets the spelling of the client, because
# the answers of llama-server's `/completions` and `/embedding` differ from those of the
# paths under `/v1`.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", Ending.DONE, ("messages",)),
        Endpoint("/chat/completions", Ending.DONE, ("messages",)),
        Endpoint("/v1/completions", Ending.DONE),
        Endpoint("/v1/embeddings"),
        Endpoint("/embeddings"),
        Endpoint("/embedding"),
        Endpoint("/v1/rerank", arrays=("documents",)),
        Endpoint("/v1/reranking", arrays=("documents",)),
        Endpoint("/rerank", arrays=("documents",)),
        Endpoint("/reranking", arrays=("documents",)),
        Endpoint("/v1/systemone"),
        Endpoint("/v1/audio/transcriptions", Ending.TRANSCRIPT, form=True),
        Endpoint("/audio/transcriptions", Ending.TRANSCRIPT, form=True),
        Endpoint("/v1/responses", Ending.NAMED),
        Endpoint("/responses", Ending.NAMED),
        Endpoint("/v1/messages", Ending.NAMED, ("messages",)),
        # Counting tokens generates nothing.
        Endpoint("/v1/chat/completions/input_tokens", arrays=("messages",), slot=False),
        Endpoint("/chat/completions/input_tokens", arrays=("messages",), slot=False),
        Endpoint("/v1/responses/input_tokens", slot=False),
        Endpoint("/responses/input_tokens", slot=False),
        Endpoint("/v1/messages/count_tokens", arrays=("messages",), slot=False),
        Endpoint("/completion", Ending.STOP),
        Endpoint("/completions", Ending.STOP),
        Endpoint("/infill", Ending.STOP),
        Endpoint("/tokenize", slot=False),
        Endpoint("/detokenize", arrays=("tokens",), slot=False),
        Endpoint("/apply-template", arrays=("messages",), slot=False),
    )
}

# The routes of llama-server that no client reaches, and why.  The hub itself has routes
# for health, metrics and models.
REFUSED = {
    "GET /props": "shows paths and templates of one worker",
    "POST /props": "changes the settings of a worker for all clients",
    "GET /slots": "shows the prompts of others",
    "POST /slots/:id_slot": "writes and reads files, and erases the caches of others",
    "GET /lora-adapters": "shows paths of one worker",
    "POST /lora-adapters": "changes the answers of a worker for all clients",
    "POST /models": "downloads models",
    "DELETE /models": "deletes models",
    "POST /models/load": "takes memory from the models of others",
    "POST /models/unload": "takes a model from others",
    "GET /models/sse": "shows the models of one worker, with their command lines",
    "POST /v1/chat/completions/control": "acts on any answer by its id",
    "GET /v1/stream": "returns an answer to any client with the conversation's name",
    "DELETE /v1/stream": "ends any answer",
    "POST /v1/streams/lookup": "shows which conversations run",
    "GET /tools": "shows what a worker can run",
    "POST /tools": "runs commands",
    "GET /cors-proxy": "fetches any URL from where the worker is",
    "POST /cors-proxy": "fetches any URL from where the worker is",
    "POST /predict": "calls any route by a name in its body",
}


# --- Events and answers -----------------------------------------------------------

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
    """Fields may have other types: such events are errors as well."""

    error: Any = None  # LM Studio writes the text alone
    # llama-server's event on `/v1/messages`, and that of Responses, have these fields
    # without an object around them.
    type: Any = ""
    message: Any = ""
    code: Any = None
    response: Any = None  # of Responses, in its last event


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


# --- Answers in one piece, and what any event reports of its answer ---------------


class Named(Private):
    model: Any = None
    # Anthropic's `message_start`, and the events of Responses.
    message: Any = None
    response: Any = None


class Reported(Private):
    """What the last event of a stream reports."""

    usage: Any = None
    timings: Any = None


class Counted(Private):
    """The fields beside the text; not those of an object that a model has written."""

    model: Any = None
    system_fingerprint: Any = None
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
reported = msgspec.json.Decoder(Reported)
counted = msgspec.json.Decoder(Counted | list[Counted])
any_list = msgspec.json.Decoder(list[Raw])
raw_fields = msgspec.json.Decoder(dict[str, Raw])
any_fields = msgspec.json.Decoder(dict[str, Any])
