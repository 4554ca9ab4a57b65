"""The default answers of a `ScriptedWorker`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.fakes import replies
from tests.fakes.replies import MODEL, event
from tests.fakes.script import Script, answer, chat_stream, event_stream, send

if TYPE_CHECKING:
    from tests.fakes.exchange import Request
    from tests.fakes.worker import ScriptedWorker

CONTROL = ("/health", "/v1/health", "/models", "/v1/models", "/models/sse", "/props")


def default_answer(worker: ScriptedWorker, request: Request) -> Script:
    """Answer shortly and completely, as llama-server would on this path."""
    path = request.path.removeprefix("/v1")
    if request.method == "GET":
        return _control_answer(worker, path)
    if path == "/audio/transcriptions":  # its body is a form
        return answer({"type": "transcript.text.done", "text": "hello"})
    try:
        body = json.loads(request.body) if request.body else {}
    except ValueError as exc:
        return (send(replies.error_reply(500, str(exc))),)  # sic, not 400
    stream = isinstance(body, dict) and body.get("stream") is True
    model = worker.models[0]
    if request.path == "/completions":  # without the /v1 it is the native route
        path = "/completion"
    match path:
        case "/chat/completions" if stream:
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return chat_stream([" no", " to", "wu"], model=model, usage=usage)
        case "/chat/completions":
            return answer(replies.chat_completion(" no towu", model=model))
        case "/completions" if stream:
            part = replies.text_completion(" fe", model=model, reason=None, last=False)
            last = replies.text_completion("", model=model)
            return event_stream(event(part), event(last), replies.done())
        case "/completions":
            return answer(replies.text_completion(" fe yo", model=model))
        case "/completion" | "/infill" if stream:
            return event_stream(*map(event, (_native(" fe"), _native("", stop=True))))
        case "/completion" | "/infill":
            return answer(_native(" fe", stop=True))
        case "/messages" if stream:
            return event_stream(*(replies.named_event(obj) for obj in _MESSAGE_EVENTS))
        case "/responses" if stream:
            return event_stream(*(replies.named_event(obj) for obj in _RESPONSE_EVENTS))
        case "/embedding":
            return answer(_ANSWERS["/embeddings"])
        case "/reranking":
            return answer(_ANSWERS["/rerank"])
        case _ if path in _ANSWERS:
            return answer(_ANSWERS[path])
        case _:
            return (send(replies.not_found()),)


def _control_answer(worker: ScriptedWorker, path: str) -> Script:
    match path:
        case "/health":
            return answer(replies.health())
        case "/models":
            return answer(replies.models(worker.models, worker.n_ctx, worker.status))
        case "/props":
            return answer(
                replies.props(
                    slots=worker.slots,
                    n_ctx=worker.n_ctx,
                    model=worker.models[0],
                    build=worker.build,
                    takes=worker.takes,
                )
            )
        case _:
            return (send(replies.not_found()),)


def _native(text: str, *, stop: bool = False) -> dict[str, Any]:
    counts = {"tokens_predicted": 2, "tokens_evaluated": 4}
    last = {"stop_type": "limit", "timings": replies.timings_of(2, 4)} if stop else {}
    return {"index": 0, "content": text, "stop": stop, **counts, **last}


_USAGE = {"prompt_tokens": 3, "total_tokens": 3}
_TEXT = {"type": "text", "text": " no"}
_MESSAGE: dict[str, Any] = {
    "id": replies.ID,
    "type": "message",
    "role": "assistant",
    "content": [],
    "model": MODEL,
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"cache_read_input_tokens": 0, "input_tokens": 20, "output_tokens": 0},
}
_RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": replies.CREATED,
    "model": MODEL,
    "status": "completed",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": " no", "annotations": []}],
        }
    ],
    "usage": {"input_tokens": 20, "output_tokens": 1, "total_tokens": 21},
}
_MESSAGE_EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "message_start", "message": _MESSAGE},
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    },
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": " no"},
    },
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "max_tokens", "stop_sequence": None},
        "usage": {"output_tokens": 1},
    },
    {"type": "message_stop"},
)
_RESPONSE_EVENTS: tuple[dict[str, Any], ...] = (
    {
        "type": "response.created",
        "response": {**_RESPONSE, "status": "in_progress", "output": []},
    },
    {"type": "response.output_text.delta", "item_id": "msg_1", "delta": " no"},
    {"type": "response.completed", "response": _RESPONSE},
)
_ANSWERS: dict[str, dict[str, Any]] = {
    "/embeddings": {
        "model": MODEL,
        "object": "list",
        "usage": _USAGE,
        "data": [{"embedding": [0.6, 0.8], "index": 0, "object": "embedding"}],
    },
    "/rerank": {
        "model": MODEL,
        "object": "list",
        "usage": _USAGE,
        "results": [{"index": 0, "relevance_score": 0.5}],
    },
    "/tokenize": {"tokens": [287, 118, 304]},
    "/detokenize": {"content": "hello"},
    "/apply-template": {"prompt": "<|im_start|>user\nhello<|im_end|>\n"},
    "/messages/count_tokens": {"input_tokens": 3},
    "/chat/completions/input_tokens": {"input_tokens": 3},
    "/responses/input_tokens": {"input_tokens": 3},
    "/systemone": {"decisions": []},
    "/messages": {**_MESSAGE, "content": [_TEXT], "stop_reason": "max_tokens"},
    "/responses": _RESPONSE,
}
