"""Stand-ins of other servers than llama-server: their real answers, on real sockets.

Each answers what the hub and its clients ask of it, in the words, headers and framing
of the original; the source is named with each class.  Where the original has no such
route, the stand-in has none either.

A prompt has as many tokens as words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from tests.fakes.exchange import Request
from tests.fakes.replies import CREATED, chunk, event, last_chunk
from tests.fakes.script import Barrier, Script, close, send, wait
from tests.fakes.worker import ScriptedWorker

Headers = Iterable[tuple[str, str]]
DATE = ("date", "Mon, 30 Nov 2026 08:00:00 GMT")
TEXTS = (" no", " to", "wu")


class StandIn(ScriptedWorker):
    """What the servers have in common; attributes can be changed while it runs."""

    server: Headers = (DATE, ("server", "uvicorn"))
    stream_type = "text/event-stream; charset=utf-8"
    line_end = b"\n"

    def __init__(self, *models: str, context: int = 4096, key: str = "") -> None:
        super().__init__(*models, n_ctx=context)
        self.key = key
        self.texts: tuple[str, ...] = TEXTS
        self.pace: Barrier | None = None  # passed before each token but the first
        self.breaks_after: int | None = None  # tokens: the generation fails there
        self.dies_after: int | None = None  # tokens: the process ends there
        self.overloaded = False
        self.holds: Barrier | None = None  # passed first, as while a model is loaded

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # --- HTTP ---------------------------------------------------------------------

    def head(self, status: int, fields: Headers) -> bytes:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in (*self.server, *fields)]
        return "\r\n".join([*lines, "", ""]).encode()

    def reply(self, obj: Any, status: int = 200, kind: str = "") -> Script:
        """Answer with JSON, or with text of the given type."""
        body = obj.encode() if kind else json.dumps(obj, separators=(",", ":")).encode()
        fields = [("content-length", str(len(body)))]
        fields.append(("content-type", kind or "application/json"))
        return (send(self.head(status, fields) + body),)

    def stream(self, events: Iterable[bytes], *, ends: bool = True) -> Script:
        """Stream events, one HTTP chunk each; the first two come at once.

        With `ends=False`, it breaks off behind them, without a last chunk.
        """
        fields = [("transfer-encoding", "chunked"), ("content-type", self.stream_type)]
        steps = [send(self.head(200, fields))]
        for number, each in enumerate(events):
            if number > 1 and self.pace is not None:
                steps.append(wait(self.pace))
            steps.append(send(chunk(each.replace(b"\n", self.line_end))))
        return (*steps, send(last_chunk())) if ends else (*steps, close())

    # --- Routes -------------------------------------------------------------------

    def answer(self, request: Request) -> Script:
        if self.is_protected(request.path) and not self.is_authorised(request):
            return self.refuse_key(request)
        body = json.loads(request.body) if request.body else {}
        match request.method, request.path:
            case "GET", "/health":
                return self.health()
            case "GET", "/v1/models":
                return self.reply(self.listing())
            case "POST", "/v1/chat/completions":
                held = () if self.holds is None else (wait(self.holds),)
                return (*held, *self.chat(body))
            case _:
                return self.unknown(request)

    def is_protected(self, path: str) -> bool:
        return bool(self.key)

    def is_authorised(self, request: Request) -> bool:
        return ("authorization", f"Bearer {self.key}") in request.headers

    def refuse_key(self, request: Request) -> Script:
        return self.reply({"error": "Unauthorized"}, 401)

    def health(self) -> Script:
        raise NotImplementedError

    def listing(self) -> dict[str, Any]:
        entries = [
            {"id": model, "object": "model", "created": CREATED, **self.entry(model)}
            for model in self.models
        ]
        return {"object": "list", "data": entries}

    def entry(self, model: str) -> dict[str, Any]:
        raise NotImplementedError

    def unknown(self, request: Request) -> Script:
        return self.reply({"detail": "Not Found"}, 404)  # FastAPI

    # --- Chats --------------------------------------------------------------------

    def chat(self, body: dict[str, Any]) -> Script:
        prompt = " ".join(str(each.get("content")) for each in body["messages"])
        tokens, model = len(prompt.split()), body.get("model") or self.models[0]
        if (refusal := self.refusal(body, model, tokens)) is not None:
            return refusal
        usage = self.usage(tokens, len(self.texts))
        if not body.get("stream"):
            return self.reply(self.whole("".join(self.texts), model, usage))
        asked = (body.get("stream_options") or {}).get("include_usage")
        events = [*self.events(self.texts, model, usage if asked else None)]
        if self.dies_after is not None:
            return self.stream(self._begin(self.dies_after, model), ends=False)
        if self.breaks_after is not None:
            begun = self._begin(self.breaks_after, model)
            return self.stream([*begun, *self.breaking()])
        return self.stream(events)

    def _begin(self, tokens: int, model: str) -> list[bytes]:
        """Return the events up to so many tokens; the end and `[DONE]` follow them."""
        return [*self.events(self.texts[:tokens], model, None)][:-2]

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        raise NotImplementedError

    def usage(self, prompt: int, generated: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + generated,
            "completion_tokens": generated,
        }

    def whole(self, text: str, model: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {
            "id": "chatcmpl-8d2c",
            "object": "chat.completion",
            "created": CREATED,
            "model": model,
            "choices": [choice],
            "usage": usage,
        }

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        raise NotImplementedError

    def chunk_of(self, choices: list[Any], model: str, **more: Any) -> bytes:
        return event(
            {
                "id": "chatcmpl-8d2c",
                "object": "chat.completion.chunk",
                "created": CREATED,
                "model": model,
                "choices": choices,
                **more,
            }
        )

    def breaking(self) -> Iterator[bytes]:
        """Yield what ends a stream whose generation has failed."""
        raise NotImplementedError


DONE = b"data: [DONE]\n\n"


class Vllm(StandIn):
    """`vllm serve`, on one machine or over Ray; it listens when the model is loaded.

    Source: vllm/entrypoints/openai of vllm-project/vllm (engine/protocol.py,
    chat_completion/serving.py, api_server.py), and docs/serving/parallelism_scaling.md.
    """

    def is_protected(self, path: str) -> bool:
        # AuthenticationMiddleware guards only /v1.
        return bool(self.key) and path.startswith("/v1")

    def health(self) -> Script:
        return (send(self.head(200, [("content-length", "0")])),)

    def entry(self, model: str) -> dict[str, Any]:
        permission = {
            "id": "modelperm-90",
            "object": "model_permission",
            "created": CREATED,
            "allow_create_engine": False,
            "allow_sampling": True,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "owned_by": "vllm",
            "root": f"org/{model}",
            "parent": None,
            "max_model_len": self.n_ctx,
            "permission": [permission],
        }

    def error(self, status: int, message: str, param: str | None) -> dict[str, Any]:
        kind = {400: "BadRequestError", 404: "NotFoundError"}
        error = {"message": message, "type": kind.get(status, "InternalServerError")}
        return {"error": {**error, "param": param, "code": status}}

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        if self.overloaded:  # its engine has died
            text = (
                "EngineCore encountered an issue. See stack trace for the root cause."
            )
            return self.reply(self.error(500, text, None), 500)
        if model not in self.models:
            text = f"The model `{model}` does not exist."
            return self.reply(self.error(404, text, "model"), 404)
        if not 0 <= body.get("temperature", 1) <= 2:
            text = f"temperature must be in [0, 2], got {body['temperature']}."
            return self.reply(self.error(400, text, "temperature"), 400)
        if tokens > self.n_ctx:
            text = (
                f"This model's maximum context length is {self.n_ctx} tokens. However, "
                f"your request has {tokens} input tokens. Please reduce the length of "
                "the input messages."
            )
            return self.reply(self.error(400, text, "input_tokens"), 400)
        return None

    def usage(self, prompt: int, generated: int) -> dict[str, Any]:
        return super().usage(prompt, generated) | {"prompt_tokens_details": None}

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        def choice(delta: Mapping[str, Any], reason: str | None = None) -> list[Any]:
            last = {"stop_reason": None} if reason else {}
            shown = {"logprobs": None, "finish_reason": reason, **last}
            return [{"index": 0, "delta": delta, **shown, "token_ids": None}]

        role = {"role": "assistant", "content": ""}
        yield self.chunk_of(choice(role), model, prompt_token_ids=None)
        for text in texts:
            yield self.chunk_of(choice({"content": text}), model)
        yield self.chunk_of(choice({"content": ""}, "stop"), model)
        if usage is not None:
            yield self.chunk_of([], model, usage=usage)
        yield DONE

    def breaking(self) -> Iterator[bytes]:
        text = "EngineCore encountered an issue. See stack trace for the root cause."
        yield event(self.error(500, text, None))
        yield DONE  # sic


class SGLang(StandIn):
    """`sglang.launch_server`, with its key on all routes but `/health`.

    Source: python/sglang/srt/entrypoints of sgl-project/sglang (http_server.py,
    openai/protocol.py, openai/serving_base.py, openai/serving_chat.py), and its issues
    4550 and 9657, which show events.
    """

    def is_protected(self, path: str) -> bool:
        return bool(self.key) and not path.startswith("/health")

    def health(self) -> Script:
        return (send(self.head(200, [("content-length", "0")])),)

    def entry(self, model: str) -> dict[str, Any]:
        more = {"root": model, "parent": None, "max_model_len": self.n_ctx}
        return {"owned_by": "sglang", **more}

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        if self.overloaded:
            return self.reply(self._error(503, "The request queue is full."), 503)
        if not 0 <= body.get("temperature", 1) <= 2:
            text = f"temperature must be in [0, 2], got {body['temperature']}."
            return self.reply(self._error(400, text), 400)
        if tokens > self.n_ctx:
            text = (
                f"The input ({tokens} tokens) is longer than the model's context "
                f"length ({self.n_ctx} tokens)."
            )
            return self.reply(self._error(400, text), 400)
        return None  # whatever the name of the model

    def _error(self, status: int, message: str) -> dict[str, Any]:
        kind = "BadRequestError" if status == 400 else "InternalServerError"
        error = {"object": "error", "message": message, "type": kind}
        return {**error, "param": None, "code": status}

    def usage(self, prompt: int, generated: int) -> dict[str, Any]:
        more = {"prompt_tokens_details": None, "reasoning_tokens": 0}
        return super().usage(prompt, generated) | more

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        def choice(
            role: str | None, content: str | None, reason: str | None = None
        ) -> list[Any]:
            more = {"reasoning_content": None, "tool_calls": None}
            delta = {"role": role, "content": content, **more}
            matched = 151645 if reason else None
            shown = {"logprobs": None, "finish_reason": reason, "matched_stop": matched}
            return [{"index": 0, "delta": delta, **shown}]

        yield self.chunk_of(choice("assistant", ""), model, usage=None)
        for text in texts:
            yield self.chunk_of(choice(None, text), model, usage=None)
        yield self.chunk_of(choice(None, None, "stop"), model, usage=None)
        if usage is not None:
            yield self.chunk_of([], model, usage=usage)
        yield DONE

    def breaking(self) -> Iterator[bytes]:
        yield event({"error": self._error(500, "The scheduler has died.")})
        yield DONE  # sic


class TabbyApi(StandIn):
    """TabbyAPI with ExLlama; its streams come from sse_starlette, with CRLF.

    Source: theroyallab/tabbyAPI (in endpoints: core/router.py, core/types/model.py,
    OAI/utils/chat_completion.py; in common: auth.py, errors.py, networking.py).
    """

    line_end = b"\r\n"

    def is_protected(self, path: str) -> bool:
        return bool(self.key) and path.startswith("/v1")

    def refuse_key(self, request: Request) -> Script:
        given = any(name == "authorization" for name, _ in request.headers)
        text = "Invalid API key" if given else "Please provide an API key"
        return self.reply({"detail": text}, 401)

    def health(self) -> Script:
        return self.reply({"status": "healthy"})

    def entry(self, model: str) -> dict[str, Any]:
        parameters = {
            "max_seq_len": self.n_ctx,
            "rope_scale": 1.0,
            "rope_alpha": 1.0,
            "cache_size": 4 * self.n_ctx,
            "cache_mode": "Q8",
            "chunk_size": 2048,
            "prompt_template": "chatml",
            "num_experts_per_token": None,
            "draft": None,
        }
        return {"owned_by": "tabbyAPI", "logging": None, "parameters": parameters}

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        if self.overloaded:
            text = (
                "Chat completion 4f0e aborted. Maybe the model was unloaded? "
                "Please check the server console."
            )
            return self.reply({"detail": text}, 503)
        if not self.models:
            return self.reply({"detail": "No models are currently loaded."}, 400)
        if not 0 <= body.get("temperature", 1) <= 2:
            text = "Input should be less than or equal to 2"
            where = ["body", "temperature"]
            mistake = {"type": "less_than_equal", "loc": where, "msg": text}
            return self.reply({"detail": [mistake]}, 422)
        if tokens > self.n_ctx:
            text = (
                f"Prompt length {tokens} is greater than the maximum context length "
                f"of {self.n_ctx} tokens."
            )
            error = {"message": text, "type": "invalid_request_error", "param": None}
            return self.reply(
                {"error": error | {"code": "context_length_exceeded"}}, 400
            )
        return None

    def usage(self, prompt: int, generated: int) -> dict[str, Any]:
        more = {"prompt_time": 0.02, "completion_time": 0.05, "total_time": 0.07}
        return super().usage(prompt, generated) | more

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        def choice(delta: Mapping[str, Any], reason: str | None = None) -> list[Any]:
            return [{"index": 0, "delta": delta, "finish_reason": reason}]

        for text in texts:
            yield self.chunk_of(choice({"content": text}), model)  # no role
        if usage is None:
            yield self.chunk_of(choice({}, "stop"), model)
        else:  # the reason is in the event with the usage
            yield self.chunk_of(choice({}, "stop"), model, usage=usage)
        yield DONE

    def breaking(self) -> Iterator[bytes]:
        text = "Chat completion aborted. Please check the server console."
        yield event({"error": {"message": text, "trace": None}})


class Ollama(StandIn):
    """`ollama serve`, which loads a model at its first request, and then answers.

    It cuts a prompt that is too long, and does not report it.  A generation that fails
    late becomes an event without text, and a stream that ends without `[DONE]`.

    Source: ollama/ollama (openai/openai.go, middleware/openai.go, server/routes.go).
    """

    server = (("Date", DATE[1]),)
    stream_type = "text/event-stream"

    def health(self) -> Script:
        return self.reply("404 page not found", 404, "text/plain")  # it has none

    def unknown(self, request: Request) -> Script:
        return self.reply("404 page not found", 404, "text/plain")  # gin

    def entry(self, model: str) -> dict[str, Any]:
        return {"owned_by": "library"}

    def error(self, status: int, message: str) -> Script:
        kinds = {400: "invalid_request_error", 404: "not_found_error"}
        kind = kinds.get(status, "api_error")
        error = {"message": message, "type": kind, "param": None, "code": None}
        return self.reply({"error": error}, status)

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        if self.overloaded:
            text = "server busy, please try again.  maximum pending requests exceeded"
            return self.error(503, text)
        if model not in self.models:
            return self.error(404, f"model '{model}' not found")
        if not isinstance(body.get("temperature", 1.0), int | float):
            text = (
                "json: cannot unmarshal string into Go struct field "
                "ChatCompletionRequest.temperature of type float64"
            )
            return self.error(400, text)
        return None

    def whole(self, text: str, model: str, usage: dict[str, Any]) -> dict[str, Any]:
        return super().whole(text, model, usage) | {"system_fingerprint": "fp_ollama"}

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        for text in texts:
            yield self._chunk(text, model)
        yield self._chunk("", model, "stop")
        if usage is not None:
            yield self.chunk_of([], model, system_fingerprint="fp_ollama", usage=usage)
        yield DONE

    def _chunk(self, text: str, model: str, reason: str | None = None) -> bytes:
        delta = {"role": "assistant", "content": text}
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return self.chunk_of(choices, model, system_fingerprint="fp_ollama")

    def breaking(self) -> Iterator[bytes]:
        yield self._chunk("", "")


class LmStudio(StandIn):
    """LM Studio's server, or `lms server start`: every unknown path is a 200.

    It lists all models of the machine, and loads one at its first request.

    Source: lmstudio.ai/docs/developer (openai-compat, core/server/settings), and issues
    of lmstudio-ai/lmstudio-bug-tracker: 1323 and 2085 (paths), 2322 (a 200 for a prompt
    that is too long), 2205 and openclaude 353 (its words).
    """

    server = (
        ("X-Powered-By", "Express"),
        ("Date", DATE[1]),
        ("Connection", "keep-alive"),
        ("Keep-Alive", "timeout=5"),
    )
    stream_type = "text/event-stream"

    def health(self) -> Script:
        text = "Unexpected endpoint or method. (GET /health)"
        return self.reply({"error": text})  # it has none

    def unknown(self, request: Request) -> Script:
        text = f"Unexpected endpoint or method. ({request.method} {request.path})"
        return self.reply({"error": text})

    def refuse_key(self, request: Request) -> Script:
        text = "An LM Studio API token is required to make requests to this server"
        error = {"message": text, "type": "invalid_request_error", "param": None}
        return self.reply({"error": error | {"code": "invalid_api_key"}}, 401)

    def entry(self, model: str) -> dict[str, Any]:
        return {"owned_by": "organization_owner"}

    def refusal(
        self, body: Mapping[str, Any], model: str, tokens: int
    ) -> Script | None:
        if self.overloaded:
            text = "The model has crashed without additional information."
            return self.reply({"error": f"{text} (Exit code: null)"}, 400)
        if model not in self.models:
            text = f'Model "{model}" not found. Please specify a valid model.'
            error = {"message": text, "type": "invalid_request_error", "param": "model"}
            return self.reply({"error": error | {"code": "model_not_found"}}, 400)
        if not isinstance(body.get("temperature", 1.0), int | float):
            return self.reply({"error": "'temperature' must be a number"}, 400)
        if tokens > self.n_ctx:
            text = (
                "The number of tokens to keep from the initial prompt is greater than "
                f"the context length (n_keep: {tokens}>= n_ctx: {self.n_ctx}). Try to "
                "load the model with a larger context length, or provide a shorter "
                "input."
            )
            if not body.get("stream"):
                return self.reply({"error": text}, 400)
            return self.stream([b"event: error\n" + event({"error": text})])
        return None

    def whole(self, text: str, model: str, usage: dict[str, Any]) -> dict[str, Any]:
        more = {"stats": {}, "system_fingerprint": model}
        return super().whole(text, model, usage) | more

    def events(
        self, texts: Iterable[str], model: str, usage: dict[str, Any] | None
    ) -> Iterator[bytes]:
        def choice(delta: Mapping[str, Any], reason: str | None = None) -> list[Any]:
            shown = {"logprobs": None, "finish_reason": reason}
            return [{"index": 0, "delta": delta, **shown}]

        more = {"system_fingerprint": model}
        for text in texts:
            delta = {"role": "assistant", "content": text}
            yield self.chunk_of(choice(delta), model, **more)
        yield self.chunk_of(choice({}, "stop"), model, **more)
        if usage is not None:
            yield self.chunk_of([], model, usage=usage, **more)
        yield DONE

    def breaking(self) -> Iterator[bytes]:
        text = "The model has crashed without additional information."
        yield b"event: error\n" + event({"error": {"message": text}})
