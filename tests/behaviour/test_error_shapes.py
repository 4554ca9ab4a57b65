"""An error has the shape of the API that was called, so that SDKs show the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import chunk, error_reply, last_chunk, sse_head
from tests.fakes.script import Script, Step, close, kill, send, wait
from tests.fakes.worker import ScriptedWorker

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
RESPONSES = "/v1/responses"
BODY: dict[str, Any] = {
    "max_tokens": 5,
    "messages": [{"role": "user", "content": "hello"}],
    "input": "hello",
}
STREAM = BODY | {"stream": True}


def named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


BEGUN = {
    MESSAGES: named(
        {
            "type": "message_start",
            "message": {
                "id": "x",
                "type": "message",
                "role": "assistant",
                "content": [],
                "model": "qwen",
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 3, "output_tokens": 0},
            },
        }
    )
    + named(
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        }
    )
    + named(
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "an error? no"},
        }
    ),
    RESPONSES: named(
        {
            "type": "response.created",
            "sequence_number": 0,
            "response": {
                "id": "r",
                "object": "response",
                "status": "in_progress",
                "output": [],
            },
        }
    )
    + named(
        {
            "type": "response.output_text.delta",
            "item_id": "i",
            "output_index": 0,
            "content_index": 0,
            "delta": "an error? no",
            "sequence_number": 6,
        }
    ),
}
# As llama-server writes them.
FLAT = {"code": 500, "message": "out of memory", "type": "server_error"}
THEIRS = {
    MESSAGES: b"event: error\ndata: " + json.dumps(FLAT).encode() + b"\n\n",
    RESPONSES: b"data: " + json.dumps({"error": FLAT}).encode() + b"\n\n",
}


def last_event(raw: bytes) -> tuple[str, dict[str, Any]]:
    """Return the name and the data of the last event."""
    lines = raw.rstrip(b"\n").split(b"\n\n")[-1].split(b"\n")
    name = b"".join(line[6:] for line in lines if line.startswith(b"event:"))
    data = b"".join(line[5:] for line in lines if line.startswith(b"data:"))
    return name.decode().strip(), json.loads(data)


def check_anthropic(reported: dict[str, Any], kind: str) -> None:
    assert reported["type"] == "error"
    assert reported["error"]["type"] == kind
    assert reported["error"]["message"]


def check_responses_event(reported: dict[str, Any]) -> None:
    assert reported["type"] == "error"
    assert reported["message"]
    assert isinstance(reported["code"], str)
    assert reported["param"] is None
    assert reported["sequence_number"] == 7


# --- As a status ------------------------------------------------------------------


@pytest.mark.parametrize("path", [MESSAGES, COUNT, RESPONSES, "/responses"])
async def test_errors_of_the_hub_have_the_shape_of_the_api(path: str) -> None:
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "request_too_large",
        415: "invalid_request_error",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    seen = {}
    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(worker, limits__body=1024) as hub,
    ):
        limited = hub.token("bob", models=["qwen"], rpm=1)
        encoded = [("Content-Encoding", "compress")]
        for response in (
            await hub.post(path, b"{"),
            await hub.post(path, BODY | {"model": 3}),
            await hub.post(path, BODY, None),
            await hub.post(path, BODY | {"model": "other"}, limited),
            await hub.post(path, BODY | {"model": "qwen"}, limited),
            await hub.post(path, BODY | {"model": "nobody"}),
            await hub.post(path, BODY | {"x": "x" * 1024}),
            await hub.post(path, BODY, headers=encoded),
            await hub.post(path + "/nowhere", BODY),
            await hub.get(path),
            await hub.post(path, BODY, headers=[("Content_Length", "3")]),
            await hub.post(path, b"x", headers=[("Expect", "wonders")]),
        ):
            reported = response.json()
            seen[response.status] = reported
            if "messages" in path:
                kind = kinds.get(response.status, "invalid_request_error")
                check_anthropic(reported, kind)
            else:
                assert reported.keys() == {"error"}
                assert {"message", "type", "param", "code"} <= reported["error"].keys()
        await hub.hub.proxy.drain(limit=1)
        response = await hub.post(path, BODY)
        seen[response.status] = response.json()
        if "messages" in path:
            check_anthropic(response.json(), "overloaded_error")
    assert kinds.keys() <= seen.keys()
    assert seen[404]["error"]["code"] in ("model_not_found", "unknown_url")


async def test_a_worker_that_is_gone_and_one_that_is_too_slow() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        await worker.down()
        check_anthropic((await hub.post(MESSAGES, BODY)).json(), "api_error")


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (500, "api_error"),
        (501, "api_error"),
    ],
)
async def test_a_refusal_of_a_worker_on_an_anthropic_route(
    status: int, kind: str, path: str, body: dict[str, Any]
) -> None:
    """A llama-server answers in OpenAI's shape, whatever the route."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        worker.default(send(error_reply(status, "no such thing")), close())
        response = await hub.post(path, body)
    assert response.status == status
    check_anthropic(response.json(), kind)
    assert response.json()["error"]["message"] == "no such thing"


@pytest.mark.parametrize("path", ["/v1/chat/completions", RESPONSES, "/completion"])
async def test_a_refusal_of_a_worker_elsewhere_is_passed_on_unchanged(
    path: str,
) -> None:
    body = BODY | {"prompt": "hello"}
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        reply = error_reply(400, "no such thing")
        worker.default(send(reply), close())
        response = await hub.post(path, body)
    assert response.body == reply.partition(b"\r\n\r\n")[2]


# --- In a stream ------------------------------------------------------------------


def begun(path: str, *rest: Step) -> Script:
    """Begin an answer, and continue when the client has received that."""
    return send(sse_head() + chunk(BEGUN[path])), wait("seen"), *rest


async def broken(
    hub: RunningHub, worker: ScriptedWorker, path: str, *rest: Step
) -> tuple[str, dict[str, Any]]:
    """Return the last event of an answer that continues with `rest`."""
    worker.script(*begun(path, *rest))
    async with await hub.open(path, STREAM) as wire:
        for _ in range(BEGUN[path].count(b"\n\n")):
            await wire.read_event()
        worker.event("seen").set()
        ending = await wire.read_to_end()
    assert not ending.clean
    assert ending.response.body.count(b"event: error") == 1
    return last_event(ending.response.body)


@pytest.mark.parametrize("path", BEGUN)
async def test_a_truncated_answer_ends_with_an_error(path: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        name, reported = await broken(hub, worker, path, kill())
    assert name == "error"
    if path == MESSAGES:
        check_anthropic(reported, "api_error")
    else:
        check_responses_event(reported)
        assert reported["code"] == "worker_connection_lost"


def in_pieces(raw: bytes, size: int) -> Script:
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return tuple(send(chunk(piece)) for piece in pieces)


@pytest.mark.parametrize("size", [10_000, 7])
@pytest.mark.parametrize("path", BEGUN)
async def test_an_error_of_a_worker_in_mid_stream(path: str, size: int) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        rest = *in_pieces(THEIRS[path], size), send(last_chunk()), close()
        name, reported = await broken(hub, worker, path, *rest)
    assert name == "error"
    if path == MESSAGES:
        check_anthropic(reported, "api_error")
        assert reported["error"]["message"] == "out of memory"
    else:
        check_responses_event(reported)
        assert (reported["message"], reported["code"]) == (
            "out of memory",
            "server_error",
        )


@pytest.mark.parametrize("path", BEGUN)
async def test_a_stream_that_begins_with_an_error_is_one_with_a_status(
    path: str,
) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        worker.script(send(sse_head() + chunk(THEIRS[path]) + last_chunk()), close())
        response = await hub.post(path, STREAM)
    assert response.status == 500
    if path == MESSAGES:
        check_anthropic(response.json(), "api_error")
    assert response.json()["error"]["message"] == "out of memory"


@pytest.mark.parametrize("size", [10_000, 40, 7, 1])
@pytest.mark.parametrize("path", BEGUN)
async def test_an_answer_about_errors_is_passed_on_unchanged(
    path: str, size: int
) -> None:
    end = "message_stop" if path == MESSAGES else "response.completed"
    raw = BEGUN[path] + named({"type": end})
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head()), *in_pieces(raw, size), send(last_chunk()), close()
        )
        response = await hub.post(path, STREAM)
    assert response.body == raw


# --- Official SDKs ----------------------------------------------------------------


async def test_anthropics_sdk_shows_the_reason() -> None:
    import anthropic

    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(worker, retry__attempts=1) as hub,
        anthropic.AsyncAnthropic(
            base_url=hub.url, api_key=hub.token(), max_retries=0
        ) as client,
    ):
        given: Any = {
            "model": "qwen",
            "max_tokens": 5,
            "messages": [{"role": "user", "content": "hello"}],
        }
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(**given | {"model": "nobody"})
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="x").messages.create(**given)
        for _ in range(2):  # once more as the client has written it
            worker.script(send(error_reply(400, "no such thing")), close())
        with pytest.raises(anthropic.BadRequestError, match="no such thing"):
            await client.messages.create(**given)
        for rest in ((kill(),), (send(chunk(THEIRS[MESSAGES])), close())):
            worker.event("seen").clear()
            worker.script(*begun(MESSAGES, *rest))
            with pytest.raises(anthropic.APIStatusError) as reported:
                async for _ in await client.messages.create(**given, stream=True):
                    worker.event("seen").set()
            assert reported.value.body["error"]["type"] == "api_error"  # type: ignore[index]


async def test_openais_sdk_shows_the_reason() -> None:
    import openai

    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(worker, retry__attempts=1) as hub,
        openai.AsyncOpenAI(
            base_url=f"{hub.url}/v1", api_key=hub.token(), max_retries=0
        ) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.responses.create(model="nobody", input="hello")
        for rest in ((kill(),), (send(chunk(THEIRS[RESPONSES])), close())):
            worker.event("seen").clear()
            worker.script(*begun(RESPONSES, *rest))
            events = []
            with pytest.raises(openai.APIConnectionError):  # no last chunk
                stream = await client.responses.create(
                    model="qwen", input="hello", stream=True
                )
                async for event in stream:
                    events.append(event)
                    worker.event("seen").set()
            assert events[-1].type == "error"
            assert events[-1].message
