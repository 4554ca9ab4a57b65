"""A worker counts the tokens of a prompt."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from gollama_proxy.config import load as config
from gollama_proxy.upstream import tokenizer
from gollama_proxy.upstream.dial import Target
from tests.fakes.asks import CHAT
from tests.fakes.replies import error_reply, head, json_reply
from tests.fakes.script import Script, answer, send, stall
from tests.fakes.worker import ScriptedWorker

ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user"}],
    "stream": True,
}


async def counted(
    worker: ScriptedWorker, path: str = CHAT, body: Any = ASKED, key: str = ""
) -> int | None:
    environ = {"GOLLAMA_AUTH_MODE": "off"}
    [described] = config.load(None, environ, {}, [worker.url]).workers
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await tokenizer.count(Target(described), path, "tiny", data)


async def test_a_chat_is_counted_as_its_template_writes_it() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", *answer({"prompt": "<user>hello"}))
        worker.on("/tokenize", *answer({"tokens": [1, 22, 333, 4]}))
        assert await counted(worker) == 4
        template, tokenize = worker.requests
        assert template.json() == ASKED
        assert template.header("content-length") == str(template.body_length)
        assert tokenize.json() == {
            "model": "tiny",
            "content": "<user>hello",
            "add_special": True,
            "parse_special": True,
        }


def compressed(obj: Any) -> bytes:
    """Build an answer as a compressing proxy in front of a worker would."""
    data = gzip.compress(json.dumps(obj).encode())
    fields = [("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))]
    return head(200, fields) + data


async def test_compression_is_not_requested_but_understood() -> None:
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", send(compressed({"prompt": "<user>hello"})))
        worker.on("/tokenize", send(compressed({"tokens": [1, 22, 333, 4]})))
        assert await counted(worker) == 4
        asked = [request.values("accept-encoding") for request in worker.requests]
    assert asked == [["identity"]] * 2


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_a_plain_prompt_is_counted_without_a_template(path: str) -> None:
    async with ScriptedWorker() as worker:
        assert await counted(worker, path, {"prompt": "hello", "n": [1]}) == 3
        [tokenize] = worker.requests
        assert tokenize.json()["content"] == "hello"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/messages", "/v1/messages/count_tokens"),
        ("/v1/responses", "/v1/responses/input_tokens"),
        ("/responses", "/v1/responses/input_tokens"),
    ],
)
async def test_other_paths_have_a_route_that_counts(path: str, route: str) -> None:
    async with ScriptedWorker() as worker:
        worker.on(route, *answer({"input_tokens": 77, "object": "x"}))
        assert await counted(worker, path) == 77
        assert worker.requests[0].json() == ASKED


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], None, 7, "", {"a": 1}], ids=str)
async def test_a_prompt_that_is_not_text_is_not_counted(prompt: Any) -> None:
    async with ScriptedWorker() as worker:
        assert await counted(worker, "/v1/completions", {"prompt": prompt}) is None
        assert await counted(worker, "/v1/completions", {}) is None
        assert await counted(worker, "/infill", {"input_prefix": "a"}) is None
        assert not worker.requests


@pytest.mark.parametrize(
    "script",
    [
        (send(error_reply(404, "File Not Found")),),
        (send(error_reply(500, "no template")),),
        answer({"prompt": 7}),
        answer({"prompt": ""}),
        answer(["a"]),
        (send(json_reply({"prompt": "a"}).replace(b"{", b"[")),),
        (send(b"no HTTP at all\r\n\r\n"),),
        (send(compressed({"prompt": "a"}).replace(b"gzip", b"zstd")),),
        (send(compressed({"prompt": "a"}).replace(b"gzip", b"deflate")),),
        (stall(),),
    ],
)
async def test_a_failed_count_is_none(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "LIMIT", 0.2)
    async with ScriptedWorker() as worker:
        worker.on("/apply-template", *script)
        assert await counted(worker) is None
        assert len(worker.requests) == 1


@pytest.mark.parametrize("tokens", [[], None, "", "many", {}, 7], ids=str)
async def test_an_answer_without_tokens_is_none(tokens: Any) -> None:
    async with ScriptedWorker() as worker:
        worker.on("/tokenize", *answer({"tokens": tokens}))
        assert await counted(worker) is None
        worker.on("/tokenize", *answer({}))
        assert await counted(worker) is None


async def test_an_endless_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_ANSWER", 1000)
    async with ScriptedWorker() as worker:
        worker.on("/tokenize", *answer({"tokens": [1] * 600}))
        assert await counted(worker) is None
        worker.on("/tokenize", send(compressed({"tokens": [1] * 600})))
        assert await counted(worker) is None


async def test_a_worker_that_is_down_gives_no_count() -> None:
    async with ScriptedWorker(up=False) as worker:
        assert await counted(worker) is None


async def test_a_large_prompt_is_sent_in_pieces() -> None:
    """It reaches the worker complete."""
    async with ScriptedWorker(keep_body=4 << 20) as worker:
        body = {"prompt": "a" * (2 << 20)}
        assert await counted(worker, "/v1/completions", body) == 3
        assert worker.requests[0].json()["content"] == body["prompt"]
