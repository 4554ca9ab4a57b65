"""The surface: the paths, and how an answer on each of them ends.

Only the paths in the table `ENDPOINTS` are forwarded.  A llama-server also has paths
that run commands, load files and change its settings; `REFUSED` lists them with the
reasons, so that every one of its routes is in one of the two (tools/server/server.cpp
of llama.cpp, b11434).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


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
    # The size of a body is a measure of how many tokens its prompt has.
    prompt_has_size: bool = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "api", api_of(self.path))
        put(self, "chat", self.path.endswith("chat/completions"))
        put(self, "generates", self.ending is not Ending.BODY)
        put(self, "prompt_has_size", self.generates and not self.form)


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
