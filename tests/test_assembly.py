"""A client that wants one piece gets it from a stream, and cannot tell."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.settings import STREAMED
from tests.fakes.hub import running_hub
from tests.fakes.replies import chunk, error_event, last_chunk, role, sse_head, token
from tests.fakes.script import answer, chat_stream, reset, send, stall
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker
from tests.test_real_workers import Start, busy_slots

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
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


async def test_what_cannot_be_assembled_goes_as_it_is() -> None:
    body = BODY | {"stop": ["\n"]}
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


async def test_a_worker_that_does_not_stream_is_passed_on() -> None:
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


async def test_an_error_in_the_stream_has_the_workers_words_and_status() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, **ASSEMBLING) as hub,
    ):
        broken = chunk(role()) + chunk(error_event("no grammar for this"))
        worker.default(send(sse_head() + broken + last_chunk()))
        got = await hub.post(CHAT, BODY)
    assert got.status == 500
    assert got.json()["error"]["message"] == "no grammar for this"


async def test_a_stream_without_the_text_is_asked_for_again_as_it_was() -> None:
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


async def test_an_answer_that_is_too_large_is_refused() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, limits__answer=4096, **ASSEMBLING) as hub,
    ):
        worker.script(*chat_stream(["word " * 2000], model="tiny", usage=True))
        got = await hub.post(CHAT, BODY)
    assert (got.status, got.json()["error"]["code"]) == (502, "worker_bad_response")


async def test_a_stream_that_stalls_is_cut_by_the_gap_clock() -> None:
    async with (
        ScriptedWorker("tiny") as worker,
        running_hub(worker, timeouts__gap=0.01, **ASSEMBLING) as hub,
    ):
        worker.script(send(sse_head() + chunk(role()) + chunk(token("a"))), stall())
        wire = await hub.open(CHAT, BODY)
        await worker.received(1)
        reading = asyncio.create_task(wire.read_response(), name="fake reader")
        while not reading.done():
            hub.hub.sweep.round()
            await asyncio.sleep(0.02)
        got = await reading
    assert (got.status, got.json()["error"]["code"]) == (504, "worker_slow")


# --- With a real llama-server -----------------------------------------------------


@pytest.mark.real
async def test_a_client_that_leaves_frees_the_slot_beside_a_busy_one(
    slow_model: Path, llama_server: Start
) -> None:
    """llama-server itself would not notice: another slot is generating."""
    server = llama_server(slow_model, args=("--slots",))
    body = BODY | {"max_tokens": 2000}
    async with running_hub(server, **ASSEMBLING) as hub:
        other = await hub.open(CHAT, body | {"stream": True})
        await other.read_event()
        leaving = await hub.open(CHAT, body)
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
