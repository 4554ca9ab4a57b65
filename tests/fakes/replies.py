"""The bytes a llama-server answers with, as recorded from build b10068.

Key order, spacing, header order and the grouping of events into chunks are the real
ones; ids, times and speeds are constants so that a reply is the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

MODEL = "tiny"
BUILD = "b1-571d0d5"
CREATED = 1_795_352_889
ID = "chatcmpl-orfmi3X7H9Vwz3uunlaSfLpBbOlIE2BG"

Headers = Iterable[tuple[str, str]]

KEEP_ALIVE = ("Keep-Alive", "timeout=5, max=100")


# --- HTTP -------------------------------------------------------------------------


def head(status: int = 200, headers: Headers = (), *, version: str = "1.1") -> bytes:
    """Build a status line and exactly the headers given."""
    lines = [f"HTTP/{version} {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def sse_head() -> bytes:
    """Build the head of a streamed answer: it promises keep-alive and is lying."""
    return head(
        200,
        [
            KEEP_ALIVE,
            ("Transfer-Encoding", "chunked"),
            ("Access-Control-Allow-Origin", ""),
            ("X-Accel-Buffering", "no"),
            ("Server", "llama.cpp"),
            ("Content-Type", "text/event-stream"),
        ],
    )


def json_reply(obj: Any, status: int = 200) -> bytes:
    """Build a whole answer; one that is no success announces the close, as there."""
    body = _dump(obj)
    return (
        head(
            status,
            [
                KEEP_ALIVE if status < 300 else ("Connection", "close"),
                ("Content-Type", "application/json; charset=utf-8"),
                ("Server", "llama.cpp"),
                ("Content-Length", str(len(body))),
                ("Access-Control-Allow-Origin", ""),
            ],
        )
        + body
    )


def error_reply(status: int, message: str, kind: str = "server_error") -> bytes:
    """Build an error as llama-server words it (`code` is the number of the status)."""
    error = {"code": status, "message": message, "type": kind}
    return json_reply({"error": error}, status)


def chunk(data: bytes) -> bytes:
    """Frame one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk() -> bytes:
    return b"0\r\n\r\n"


# --- Events of a chat stream ------------------------------------------------------


def event(obj: Any) -> bytes:
    """Build one server-sent event."""
    return b"data: %b\n\n" % _dump(obj)


def named_event(obj: Mapping[str, Any]) -> bytes:
    """Build an event of /v1/messages or /v1/responses, named by its type."""
    return b"event: %b\n" % obj["type"].encode() + event(obj)


def role(*, model: str = MODEL) -> bytes:
    """Build the first event: the role, and no text yet."""
    return _delta({"role": "assistant", "content": None}, model)


def token(text: str, *, model: str = MODEL) -> bytes:
    return _delta({"content": text}, model)


def finish(
    reason: str = "stop",
    timings: Mapping[str, Any] | None = None,
    *,
    model: str = MODEL,
    usage: Mapping[str, Any] | None = None,
    tokens: int = 3,
) -> bytes:
    """Build the closing event; with `usage`, llama-server moves timings behind it."""
    choices = [{"finish_reason": reason, "index": 0, "delta": {}}]
    last = {"timings": dict(timings) if timings is not None else timings_of(tokens)}
    if usage is None:
        return _chunk_event(choices, model, last)
    usage_event = _chunk_event([], model, {"usage": dict(usage), **last})
    return _chunk_event(choices, model, {}) + usage_event


def done() -> bytes:
    return b"data: [DONE]\n\n"


def ping() -> bytes:
    """Build the comment that llama-server sends while it has no token."""
    return b":\n\n"


def error_event(message: str, code: int = 500) -> bytes:
    """Build what ends a stream that fails late; no `[DONE]` follows it."""
    error = {"code": code, "message": message, "type": "server_error"}
    return event({"error": error})


def native(content: str, *, stop: bool) -> bytes:
    """Build an event of llama-server's own /completion."""
    fields: dict[str, Any] = {
        "index": 0,
        "content": content,
        "tokens": [1],
        "stop": stop,
    }
    if stop:
        fields |= {"model": "tiny", "tokens_predicted": 3, "stop_type": "limit"}
        fields["timings"] = timings_of(3)
    return event(fields)


def anthropic(type: str, **more: Any) -> bytes:
    """Build an event of /v1/messages."""
    return named_event({"type": type, **more})


def responses(type: str, **more: Any) -> bytes:
    """Build an event of /v1/responses."""
    return named_event({"type": f"response.{type}", **more})


def timings_of(predicted: int = 3, prompt: int = 20, cached: int = 0) -> dict[str, Any]:
    return {
        "cache_n": cached,
        "prompt_n": prompt,
        "prompt_ms": 0.974,
        "prompt_per_token_ms": 0.0487,
        "prompt_per_second": 20533.880903490757,
        "predicted_n": predicted,
        "predicted_ms": 0.219,
        "predicted_per_token_ms": 0.073,
        "predicted_per_second": 13698.6301369863,
    }


def usage_of(completion: int = 3, prompt: int = 20, cached: int = 0) -> dict[str, Any]:
    return {
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _delta(delta: Mapping[str, Any], model: str) -> bytes:
    choices = [{"finish_reason": None, "index": 0, "delta": delta}]
    return _chunk_event(choices, model, {})


def _chunk_event(choices: list[Any], model: str, last: Mapping[str, Any]) -> bytes:
    return event(
        {
            "choices": choices,
            "created": CREATED,
            "id": ID,
            "model": model,
            "system_fingerprint": BUILD,
            "object": "chat.completion.chunk",
            **last,
        }
    )


# --- Whole answers ----------------------------------------------------------------


def chat_completion(
    text: str, *, model: str = MODEL, reason: str = "stop", tokens: int = 3
) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"finish_reason": reason, "index": 0, "message": message}],
        "created": CREATED,
        "model": model,
        "system_fingerprint": BUILD,
        "object": "chat.completion",
        "usage": usage_of(tokens),
        "id": ID,
        "timings": timings_of(tokens),
    }


def text_completion(
    text: str, *, model: str = MODEL, reason: str | None = "stop", last: bool = True
) -> dict[str, Any]:
    """Build an answer of /v1/completions, or with `last=False` one event of it."""
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    return {
        "choices": [choice],
        "created": CREATED,
        "model": model,
        "system_fingerprint": BUILD,
        "object": "text_completion",
        **({"usage": usage_of()} if last else {}),
        "id": ID,
        **({"timings": timings_of()} if last else {}),
    }


def health() -> dict[str, Any]:
    return {"status": "ok"}


def loading() -> bytes:
    error = {"message": "Loading model", "type": "unavailable_error", "code": 503}
    return json_reply({"error": error}, 503)


def not_found() -> bytes:
    error = {"message": "File Not Found", "type": "not_found_error", "code": 404}
    return json_reply({"error": error}, 404)


def models(
    names: Iterable[str], n_ctx: int, status: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """List models; with a `status` of each as a router does."""
    names, status = list(names), status or {}
    return {
        "models": [
            {
                "name": name,
                "model": name,
                "modified_at": "",
                "size": "",
                "digest": "",
                "type": "model",
                "description": "",
                "tags": [""],
                "capabilities": ["completion"],
                "parameters": "",
                "details": {"parent_model": "", "format": "gguf", "family": ""},
            }
            for name in names
        ],
        "object": "list",
        "data": [
            {
                "id": name,
                "aliases": [name],
                "tags": [],
                "object": "model",
                "created": CREATED,
                "owned_by": "llamacpp",
                "meta": {
                    "vocab_type": 1,
                    "n_vocab": 448,
                    "n_ctx": n_ctx,
                    "n_ctx_train": 4096,
                    "n_embd": 64,
                    "n_params": 131392,
                    "size": 525568,
                    "ftype": "all F32",
                },
                **({"status": {"value": status[name]}} if name in status else {}),
            }
            for name in names
        ],
    }


def props(
    *,
    slots: int,
    n_ctx: int,
    model: str,
    build: str = BUILD,
    takes: Iterable[str] = (),
) -> dict[str, Any]:
    kinds = ("vision", "video", "audio")
    params = {"temperature": 0.8, "top_k": 40, "max_tokens": -1, "stream": False}
    return {
        "default_generation_settings": {"params": params, "n_ctx": n_ctx},
        "total_slots": slots,
        "model_alias": model,
        "model_ftype": "all F32",
        "model_path": f"{model}.gguf",
        "modalities": {kind: kind in takes for kind in kinds},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": False,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "build_info": build,
        "is_sleeping": False,
        "cors_proxy_enabled": False,
    }


def _dump(obj: Any) -> bytes:
    # llama-server writes UTF-8 as it is, and no spaces.
    return json.dumps(obj, ensure_ascii=False, separators=(",", ":")).encode()
