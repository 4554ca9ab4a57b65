"""Answers in one piece are requested as streams and reassembled, invisibly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.config.settings import STREAMED
from gollama_proxy.fleet.breaker import BreakerState
from tests.behaviour.test_usage import other_server
from tests.fakes.asks import CHAT
from tests.fakes.clock import Clock
from tests.fakes.hub import relays, running_hub
from tests.fakes.replies import (
    chunk,
    done,
    error_event,
    error_reply,
    event,
    finish,
    head,
    last_chunk,
    role,
    sse_head,
    token,
    usage_of,
)
from tests.fakes.script import answer, chat_stream, close, reset, send, stall, wait
from tests.fakes.waiting import DEADLINE, until
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer
from tests.real.test_workers import Start, busy_slots

BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


def delta(index: int = 0, **reported: Any) -> bytes:
    return event(
        {"choices": [{"index": index, "delta": reported, "finish_reason": None}]}
    )


def end(index: int = 0) -> bytes:
    choices = [{"index": index, "delta": {}, "finish_reason": "stop"}]
    return event({"choices": choices})


ASSEMBLING: dict[str, Any] = {"upstream__assemble": list(STREAMED)}


async def test_the_worker_is_asked_for_a_stream_and_the_client_gets_an_answer() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        worker.script(*chat_stream(["Good ", "day"], model="tiny", usage=True))
        got = await hub.post(CHAT, BODY)
        assert worker.requests[0].json()["stream"] is True
    assert got.status == 200
    assert got.header("content-type") == "application/json"
    assert got.json()["object"] == "chat.completion"
    assert got.json()["choices"][0]["message"]["content"] == "Good day"


async def test_requests_that_cannot_be_assembled_are_forwarded_unchanged() -> None:
    body = BODY | {"logprobs": True}
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        worker.script(*answer({"ok": True}))
        assert (await hub.post(CHAT, body)).json() == {"ok": True}
        assert worker.requests[0].json() == body


async def test_on_a_path_with_one_try_nothing_is_assembled() -> None:
    """It may turn out at the end that the request has to be made once more."""
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, retry__once=[CHAT], **ASSEMBLING) as hub,
    ):
        worker.script(*answer({"ok": True}))
        assert (await hub.post(CHAT, BODY)).json() == {"ok": True}
        assert worker.requests[0].json() == BODY


async def test_the_answer_of_a_worker_that_does_not_stream_is_passed_on() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        worker.script(*answer({"ok": True}))
        assert (await hub.post(CHAT, BODY)).json() == {"ok": True}


async def test_another_worker_takes_over_in_the_middle_of_an_answer() -> None:
    """Nothing is out before it is whole, so nothing is lost."""
    async with (
        ScriptedWorker("tiny") as one,
        ScriptedWorker("tiny") as two,
        # Asked for again and not continued: of two texts the second is the answer.
        running_hub(one, two, rescue__enabled=False) as hub,
    ):
        begun = send(sse_head() + chunk(role()) + chunk(token("Bad")))
        one.script(begun, reset())
        two.script(*chat_stream(["Good"], model="tiny", usage=True))
        got = await hub.post(CHAT, BODY)
    assert got.json()["choices"][0]["message"]["content"] == "Good"
    assert got.header("x-gollama-attempts") == "2"


async def test_an_error_in_the_stream_keeps_the_workers_message_and_status() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        broken = chunk(role()) + chunk(error_event("no grammar for this"))
        worker.default(send(sse_head() + broken + last_chunk()))
        got = await hub.post(CHAT, BODY)
    assert got.status == 500
    assert got.json()["error"]["message"] == "no grammar for this"


async def test_a_stream_without_the_text_is_requested_again_unchanged() -> None:
    """An answer that was cut in a half tool call has its raw text only unstreamed."""
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        worker.script(*chat_stream([], reason="length", model="tiny", usage=True))
        worker.script(*answer({"ok": True}))
        got = await hub.post(CHAT, BODY)
        assert got.json() == {"ok": True}
        assert "stream" not in worker.requests[1].json()


async def test_an_answer_that_is_too_large_to_assemble_is_relayed() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, limits__answer=4096, **ASSEMBLING) as hub,
    ):
        worker.script(*chat_stream(["word " * 2000], model="tiny", usage=True))
        worker.script(*answer({"text": "word " * 2000}))
        got = await hub.post(CHAT, BODY)
    assert got.json() == {"text": "word " * 2000}


async def test_a_stream_that_stalls_is_cut_by_the_gap_clock() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, clock=Clock(), **ASSEMBLING) as hub,
    ):
        worker.script(send(sse_head() + chunk(role()) + chunk(token("a"))), stall())
        async with await hub.open(CHAT, BODY) as wire:
            await until(lambda: sum(relay.events for relay in relays(hub)) > 1)
            hub.pass_time(0)
            hub.pass_time(31)
            got = await wire.read_response()
    assert (got.status, got.json()["error"]["code"]) == (504, "worker_slow")


# --- What cannot be folded --------------------------------------------------------

ODD = {
    "an unknown list": [delta(content="a", reasoning_details=[{"text": "x"}]), end()],
    "an unknown object": [delta(content="a", extra={"x": 1}), end()],
    "half a surrogate pair": [
        b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n'
    ],
    "no reason": [delta(content="a")],
    "no mark at all": [delta(content="a"), b""],
    "usage of another kind": [delta(content="a"), end(), event({"usage": 7})],
    "an error of another kind": [delta(content="a"), event({"error": ["no"]})],
    "another number of choices": [delta(content="a"), end()],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
async def test_streams_that_cannot_be_assembled_are_remembered_and_requested_unchanged(
    odd: list[bytes],
) -> None:
    """No worker is blamed, and this one gets the next requests unchanged."""
    body = BODY | {"n": 2} if odd is ODD["another number of choices"] else BODY
    mark = b"" if odd[-1] == b"" else b"data: [DONE]\n\n"
    streamed = send(sse_head() + chunk(b"".join(odd) + mark) + last_chunk())
    async with other_server() as (worker, hub):
        for n in range(4):
            if n == 0:
                worker.script(streamed, close())
            worker.script(*answer({"ok": n}))
            assert (await hub.post(CHAT, body)).json() == {"ok": n}
        streams = [request.json().get("stream") for request in worker.requests]
        assert streams == [True, None, None, None, None]
        [record] = hub.hub.registry.workers
        assert record.breaker_of("tiny").state is BreakerState.CLOSED
        assert not record.in_doubt


async def test_a_single_incomplete_answer_is_not_remembered() -> None:
    async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
        for _ in range(2):
            worker.script(
                *chat_stream(["a"], reason="length", model="tiny", usage=True)
            )
            worker.script(*answer({"ok": True}))
            got = await hub.post(CHAT, BODY | {"stop": ["x"]})
            assert got.json() == {"ok": True}
        streams = [request.json().get("stream") for request in worker.requests]
        assert streams == [True, None, True, None]


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
async def test_a_worker_that_refuses_a_stream_is_asked_without(status: int) -> None:
    refused = error_reply(status, "stream_options: extra_forbidden")
    async with other_server(retry__attempts=2) as (worker, hub):
        for n in range(2):
            if n == 0:
                worker.script(send(refused), close())
            worker.script(*answer({"ok": n}))
            assert (await hub.post(CHAT, BODY)).json() == {"ok": n}
        assert [r.json().get("stream") for r in worker.requests] == [True, None, None]
        [record] = hub.hub.registry.workers
        assert record.breaker_of("tiny").state is BreakerState.CLOSED


async def test_a_worker_that_refuses_to_send_usage_is_asked_without() -> None:
    refused = error_reply(422, "stream_options: extra_forbidden")
    async with other_server(upstream__usage="always") as (worker, hub):
        worker.script(send(refused), close())
        for _ in range(2):
            worker.script(*chat_stream(["a"], model="tiny"))
            got = await hub.post(CHAT, BODY | {"stream": True})
            assert got.status == 200
            assert token("a") in got.body
        asked = ["stream_options" in request.json() for request in worker.requests]
        assert asked == [True, False, False]


async def test_a_refusal_of_the_clients_own_body_is_the_clients() -> None:
    async with other_server() as (worker, hub):
        worker.default(send(error_reply(400, "no such field")))
        got = await hub.post(CHAT, BODY)
        assert (got.status, got.json()["error"]["message"]) == (400, "no such field")
        assert len(worker.requests) == 2


async def test_an_event_stream_needs_no_content_type() -> None:
    head_ = head(200, [("Connection", "close")])
    stream = role() + token("a") + finish(usage=usage_of()) + done()
    async with other_server() as (worker, hub):
        worker.default(send(head_ + stream), close())
        got = await hub.post(CHAT, BODY)
        assert got.json()["choices"][0]["message"]["content"] == "a"
        got = await hub.post(CHAT, BODY | {"stream": True})
        assert got.header("content-type").startswith("text/event-stream")
        assert got.body == stream


# --- Other APIs -------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/responses", "/completion", "/completions", "/infill"]
)
async def test_other_apis_are_assembled_too(path: str) -> None:
    body = BODY | {"input": "x", "prompt": "x", "max_tokens": 5}
    async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
        got = await hub.post(path, body)
        assert got.status == 200
        assert [request.json().get("stream") for request in worker.requests] == [True]
        direct = await hub.post(path, body | {"verbose": True})
        # Real servers have that in either, and the fake one does not.
        assert got.json().keys() - {"completed_at"} == direct.json().keys()
        assert worker.requests[-1].json().get("stream") is None


# --- Relayed ----------------------------------------------------------------------


@pytest.mark.parametrize("done_", [b"", b"data: [DONE]\n\n"], ids=["no mark", "done"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_an_answer_without_all_of_its_choices_is_incomplete(
    path: str, done_: bytes
) -> None:
    """Although the end of the stream does not mention the other one."""
    more = b"".join(delta(content="word ") for _ in range(40))
    events = delta(1, content="a") + delta(content="b") + more + end()
    asked = BODY | {"n": 2, "prompt": "x", "stream": True}
    async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
        worker.default(send(sse_head() + chunk(events + done_) + last_chunk()), close())
        async with await hub.open(path, asked) as wire:
            ending = await wire.read_to_end()
        assert not ending.clean
        events += end(1)
        worker.default(send(sse_head() + chunk(events + done_) + last_chunk()), close())
        async with await hub.open(path, asked) as wire:
            assert (await wire.read_to_end()).clean


async def test_an_error_followed_by_done_is_an_error() -> None:
    """Also one that is longer, or further back, than what is kept of a stream's end."""
    more = [token("word"), token("a" * 150), token("an error" * 20)]
    errors = [[error_event("engine died")], [error_event("engine died " * 500)]]
    errors += [[error_event("engine died"), *30 * [each]] for each in more]
    for events in errors:
        chunks = b"".join(chunk(event) for event in (*events, done()))
        failed = send(chunks + last_chunk())
        async with ScriptedWorker("tiny") as worker, running_hub(worker) as hub:
            begun = send(sse_head() + chunk(token("a")))
            worker.script(begun, wait("read"), failed, close())
            async with await hub.open(CHAT, BODY | {"stream": True}) as wire:
                await wire.read_event()
                worker.release("read")
                assert not (await wire.read_to_end()).clean


async def test_an_empty_stream_is_requested_again_unchanged() -> None:
    """By a server that has its own idea of a stream; its breaker stays closed."""
    async with (
        ScriptedWorker("tiny", build="") as worker,
        running_hub(worker) as hub,
    ):
        worker.script(send(sse_head() + last_chunk()), close())
        worker.script(*answer({"ok": True}))
        assert (await hub.post(CHAT, BODY)).json() == {"ok": True}
        assert worker.requests[1].json() == BODY
        worker.script(*answer({"ok": True}))
        assert (await hub.post(CHAT, BODY)).json() == {"ok": True}
        assert worker.requests[2].json() == BODY


# --- With a real llama-server -----------------------------------------------------


@pytest.fixture(scope="module")
def slow_server(
    slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlamaServer]:
    log = tmp_path_factory.mktemp("slow") / "llama-server.log"
    server = LlamaServer(slow_model, log, args=("--slots",)).start()
    yield server
    server.kill()


@pytest.mark.real
@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        (CHAT, {"stop": ["no such"]}),
        ("/v1/completions", {}),
        ("/v1/messages", {"stop_sequences": ["no such"]}),
        ("/v1/responses", {}),
        ("/completion", {"stop": ["no such"]}),
        ("/completions", {}),
        ("/infill", {}),
    ],
)
async def test_a_client_that_leaves_frees_the_slot_beside_a_busy_one(
    slow_server: LlamaServer, path: str, more: dict[str, Any]
) -> None:
    """llama-server itself would not notice: another slot is generating."""
    server = slow_server
    async with asyncio.timeout(DEADLINE):
        while await busy_slots(server):  # with what the last test has left
            await asyncio.sleep(0.05)
    body = BODY | {"max_tokens": 2000}
    asked = body | {"prompt": "x", "input": "x", "n_predict": 2000} | more
    asked |= {"max_output_tokens": 2000, "input_prefix": "a", "input_suffix": "b"}
    if not path.endswith(("chat/completions", "messages")):
        del asked["messages"]
    async with running_hub(server) as hub:
        # A llama-server lets infills wait until no chat is generated.
        busy = (path, asked) if path == "/infill" else (CHAT, body)
        other = await hub.open(busy[0], busy[1] | {"stream": True})
        await other.read_event()
        leaving = await hub.open(path, asked)
        async with asyncio.timeout(DEADLINE):
            while await busy_slots(server) < 2:
                await asyncio.sleep(0.05)
            leaving.abort()
            while await busy_slots(server) > 1:
                await asyncio.sleep(0.05)
        other.close()


@pytest.mark.real
async def test_the_answer_is_the_one_that_the_server_gives_itself(
    tiny_model: Path, llama_server: Start
) -> None:
    server = llama_server(tiny_model)
    body = BODY | {"max_tokens": 12, "temperature": 0, "seed": 1}
    answers = []
    for assembling in (STREAMED, ()):
        async with running_hub(server, upstream__assemble=assembling) as hub:
            got = (await hub.post(CHAT, body)).json()
            for own in ("id", "created", "timings"):
                assert got.pop(own)
            got["usage"].pop("prompt_tokens_details")
            answers.append(json.dumps(got, sort_keys=True))
    assert answers[0] == answers[1]
