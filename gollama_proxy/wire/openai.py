"""The surface: which paths there are, and how an answer on each of them ends.

Nothing is forwarded that is not in this table.  A llama-server also has paths that run
commands, load files and change its settings (tools/server/README.md of llama.cpp); they
are not here, so they cannot be reached.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Ending(enum.Enum):
    """What marks the end of a complete event stream, where the body's end does not.

    An HTTP body can end cleanly although the answer was cut: llama-server's router
    does it when a child dies.
    """

    DONE = "[DONE]"  # OpenAI chat and completions; a finish_reason will do
    STOP = '"stop":true'  # llama-server's native completion
    NAMED = "a closing event"  # Anthropic messages, OpenAI responses
    BODY = "the body's own end"  # routes that do not stream


class Api(enum.Enum):
    """Whose definitions the fields of a route's answers follow."""

    OPENAI = "openai"  # chat, completions, embeddings; rerank, which has OpenAI's usage
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    NATIVE = "native"  # llama-server's own


class Endpoint(NamedTuple):
    """One POST route and the path it has on a worker."""

    path: str  # also the `route` label of metrics and logs
    ending: Ending = Ending.BODY
    arrays: tuple[str, ...] = ()  # fields that have to be JSON arrays where present
    slot: bool = True  # a worker takes one of its slots for it

    @property
    def chat(self) -> bool:
        """Whether its answers are messages, and not texts."""
        return self.path.endswith("chat/completions")

    @property
    def generates(self) -> bool:
        """Whether its answers are generated token by token."""
        return self.ending is not Ending.BODY

    @property
    def api(self) -> Api:
        """Whose route it is."""
        return api_of(self.path)


def api_of(path: str) -> Api:
    """Return whose route a path is, or would be.

    llama-server has some of OpenAI's without a `/v1`, too.
    """
    if path.startswith("/v1/messages"):
        return Api.ANTHROPIC
    if path.startswith(("/v1/responses", "/responses")):
        return Api.RESPONSES
    openai = path.startswith(("/v1/", "/chat/", "/rerank"))
    return Api.OPENAI if openai else Api.NATIVE


# Every accepted spelling of a path.  A worker gets the spelling that the client used:
# `/completions` and `/embedding` of llama-server answer otherwise than their cousins
# under `/v1`.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", Ending.DONE, ("messages",)),
        Endpoint("/chat/completions", Ending.DONE, ("messages",)),
        Endpoint("/v1/completions", Ending.DONE),
        Endpoint("/v1/embeddings"),
        Endpoint("/embeddings"),
        Endpoint("/v1/rerank", arrays=("documents",)),
        Endpoint("/rerank", arrays=("documents",)),
        Endpoint("/v1/responses", Ending.NAMED),
        Endpoint("/responses", Ending.NAMED),
        Endpoint("/v1/messages", Ending.NAMED, ("messages",)),
        Endpoint("/v1/messages/count_tokens", arrays=("messages",), slot=False),
        Endpoint("/completion", Ending.STOP),
        Endpoint("/completions", Ending.STOP),
        Endpoint("/infill", Ending.STOP),
        Endpoint("/tokenize", slot=False),
        Endpoint("/detokenize", arrays=("tokens",), slot=False),
        Endpoint("/apply-template", arrays=("messages",), slot=False),
    )
}
