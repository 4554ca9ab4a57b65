"""`/v1/audio/transcriptions`: a form with a file, of which routing needs two fields."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from gollama_proxy.wire.bodies import FormScanner
from gollama_proxy.wire.errors import RequestError
from tests.fakes.cases import case
from tests.fakes.client import Response
from tests.fakes.hub import MINT, RunningHub, running_hub
from tests.fakes.replies import chunk, last_chunk, sse_head
from tests.fakes.script import answer, close, kill, send
from tests.fakes.worker import ScriptedWorker

PATH = "/v1/audio/transcriptions"
TYPE = "multipart/form-data; boundary=AaB03x"
SOUND = b"RIFF\r\n--AaB03\r\n--\r\n\xff\x00" * 10
USAGE = {"type": "tokens", "input_tokens": 20, "output_tokens": 3, "total_tokens": 23}
DONE = {"type": "transcript.text.done", "text": "hello", "usage": USAGE}


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--AaB03x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--AaB03x--\r\n"


FILE = part("file", SOUND, '; filename="a.wav"\r\nContent-Type: audio/wav')
MODEL = part("model", b"qwen")


async def post(
    hub: RunningHub, body: bytes, token: str | None = MINT, *, kind: str = TYPE
) -> Response:
    async with await hub.wire() as wire:
        token = hub.token() if token is MINT else token
        with contextlib.suppress(ConnectionError):
            await wire.post(PATH, body, token, headers=[("Content-Type", kind)])
        return await wire.read_response()


@pytest.mark.parametrize("path", [PATH, "/audio/transcriptions"])
@pytest.mark.parametrize(
    "body", [form(MODEL, FILE), form(FILE, MODEL), form(FILE, MODEL)[:-2]]
)
async def test_a_worker_gets_the_form_as_it_is(path: str, body: bytes) -> None:
    async with (
        ScriptedWorker("other") as elsewhere,
        ScriptedWorker("qwen") as worker,
        running_hub(elsewhere, worker) as hub,
    ):
        worker.script(*answer(DONE))
        headers = [("Content-Type", TYPE)]
        response = await hub.post(path, body, headers=headers)
        assert response.status == 200
        assert response.json() == DONE
        [request] = worker.requests
        assert (request.target, request.body) == (path, body)
        assert request.header("content-type") == TYPE.replace("AaB03x", '"AaB03x"')


async def test_an_alias_is_replaced_and_a_missing_model_is_added() -> None:
    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(
            worker, models__aliases={"whisper": "qwen"}, models__default_model="qwen"
        ) as hub,
    ):
        for sent in (part("model", b"whisper"), b"", part("model", b"unknown")):
            worker.script(*answer(DONE))
            assert (await post(hub, form(FILE, sent))).status == 200
        assert [request.body for request in worker.requests] == [
            form(FILE, MODEL),
            form(MODEL, FILE),
            form(FILE, MODEL),
        ]


async def test_a_large_one_streams_through() -> None:
    sound = SOUND * (3 << 20 >> 8)
    for parts in ((MODEL, part("file", sound)), (part("file", sound), MODEL)):
        async with (
            ScriptedWorker("qwen", "other", keep_body=8 << 20) as worker,
            running_hub(worker, limits__replay_window=64 << 10) as hub,
        ):
            worker.script(*answer(DONE))
            assert (await post(hub, form(*parts))).status == 200
            [request] = worker.requests
            assert request.body == form(*parts)


async def test_limits_and_permissions_are_those_of_any_request() -> None:
    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(worker, limits__body=8192) as hub,
    ):
        token = hub.token(models=["other"])
        assert (await post(hub, form(FILE, MODEL), token)).status == 403
        assert (await post(hub, form(FILE, MODEL), None)).status == 401
        assert (await post(hub, form(MODEL, part("file", b"x" * 8192)))).status == 413
        assert (await post(hub, form(part("model", b"nobody"), FILE))).status == 404
        assert (await post(hub, form(FILE))).status == 400
        assert not worker.requests
        worker.script(*answer(DONE))
        response = await post(hub, form(FILE, MODEL), hub.token("bob", tpm=100))
        assert response.status == 200
        worker.script(*answer(DONE))
        response = await post(hub, form(FILE, MODEL), hub.token("bob", tpm=100))
        assert response.header("x-ratelimit-remaining-tokens") == "77"


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=a b",
        'multipart/form-data; boundary="a\\"b"',
        "multipart/form-data; boundary=" + "a" * 71,
        "multipart/form-data; boundary=a; boundary=AaB03x",
        "multipart/mixed; boundary=AaB03x",
    ],
)
async def test_invalid_forms_are_refused(kind: str) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        response = await post(hub, form(MODEL, FILE), kind=kind)
        assert response.status == 400
        assert not worker.requests


def test_ambiguous_forms_are_refused() -> None:
    for body in [
        b"",
        b"{}",
        form(MODEL, FILE)[:-4],
        form(MODEL, FILE) + b"x",
        b"x\r\n" + form(MODEL, FILE),
        b" " + form(MODEL, FILE),
        form(MODEL, MODEL, FILE),
        form(MODEL, FILE, part("model", b"other")),
        form(part("Model", b"other"), FILE),
        form(part("model", b"other", '; filename="a"'), FILE),
        form(part("file", b"", '; filename="a; name=model"'), FILE),
        form(part("file", b"", '; filename="a\\"; name=\\"model"'), FILE),
        form(part("file", b"", '; name="model"'), FILE),
        form(part("model", b"\xff"), FILE),
        form(part("model", b"x" * 5000), FILE),
        form(part("stream", b"true"), part("stream", b"false"), MODEL, FILE),
        form(b"--AaB03x\r\n\r\nqwen\r\n", FILE),
        form(b"--AaB03x\r\nContent-Type: text/plain\r\n\r\nqwen\r\n", FILE),
        form(b"--AaB03x \r\n" + MODEL.partition(b"\r\n")[2], FILE),
        form(MODEL.replace(b'"', b""), FILE),
        form(MODEL.replace(b"\r\n", b"\n"), FILE),
        form(part("x", b"\r\n--AaB03xy"), FILE),
        form(part("a", b"", "\r\nX: " + "y" * 5000), FILE),
        form(*[part("x", b"")] * 129, FILE),
    ]:
        for size in [1 << 20, 1]:
            with case((body, size)), pytest.raises(RequestError):
                scan(body, size)


def scan(body: bytes, size: int) -> None:
    scanner = FormScanner("AaB03x")
    for at in range(0, len(body), size):
        scanner.feed(body[at : at + size])
    scanner.finish()


@pytest.mark.parametrize("size", [1 << 20, 7, 1])
def test_the_fields_are_found_however_the_form_is_split(size: int) -> None:
    more = [part("stream", b"true"), part("max_tokens", b"7"), part("temperature", b"")]
    body = form(FILE, *more, MODEL)
    scanner = FormScanner("AaB03x")
    for at in range(0, len(body), size):
        scanner.feed(body[at : at + size])
    scanner.finish()
    found = {name: field.raw for name, field in scanner.found.items()}
    assert found == {"model": b'"qwen"', "stream": b"true", "max_tokens": b"7"}
    field = scanner.found["model"]
    assert body[field.start : field.end] == b"qwen"
    assert repr(scanner) == "<FormScanner END found=['max_tokens', 'model', 'stream']>"


# --- Streams ----------------------------------------------------------------------


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DELTA = event({"type": "transcript.text.delta", "delta": "hel"})
STREAM = form(MODEL, part("stream", b"true"), FILE)


@pytest.mark.parametrize("end", [event(DONE), event(DONE) + b"data: [DONE]\n\n"])
async def test_a_stream_is_passed_on_as_it_arrives(end: bytes) -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        worker.script(send(sse_head() + chunk(DELTA + end) + last_chunk()), close())
        response = await post(hub, STREAM)
    assert response.body == DELTA + end


async def test_a_truncated_stream_is_recognised_as_truncated() -> None:
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        for end in ((kill(),), (send(last_chunk()), close())):
            worker.script(send(sse_head() + chunk(DELTA)), *end)
            headers = [("Content-Type", TYPE)]
            async with await hub.open(PATH, STREAM, headers=headers) as wire:
                ending = await wire.read_to_end()
            assert not ending.clean
            assert b'data: {"error":' in ending.response.body


async def test_requests_of_openais_sdk_are_understood() -> None:
    import openai

    async with (
        ScriptedWorker("qwen", "other") as worker,
        running_hub(worker, models__aliases={"whisper-1": "qwen"}) as hub,
        openai.AsyncOpenAI(
            base_url=f"{hub.url}/v1", api_key=hub.token(), max_retries=0
        ) as client,
    ):
        worker.script(*answer(DONE))
        reported = await client.audio.transcriptions.create(
            model="whisper-1", file=("a.wav", SOUND)
        )
        assert reported.text == "hello"
        [request] = worker.requests
        assert b"qwen" in request.body
        assert b"whisper-1" not in request.body
        assert SOUND in request.body
