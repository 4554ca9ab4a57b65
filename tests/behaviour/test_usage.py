"""The hub asks for usage and counts it; clients that did not ask do not see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.fleet.worker import Worker
from tests.behaviour.test_retries import InOrder
from tests.fakes.asks import CHAT, STREAM, TEXT
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    event,
    finish,
    last_chunk,
    role,
    sse_head,
    text_completion,
    token,
    usage_of,
)
from tests.fakes.script import (
    answer,
    chat_stream,
    close,
    event_stream,
    reset,
    send,
    wait,
)
from tests.fakes.worker import ScriptedWorker
from tests.real.llama import LlamaServer

BODY = {"model": "tiny", **STREAM}
ASKED = {"include_usage": True}
TPM = 1000
NEWS, USAGE, _ = (
    each + b"\n\n" for each in finish(usage=usage_of(5), tokens=5).split(b"\n\n")
)
SHOWN = role() + token("a") + token("b") + NEWS + done()


@asynccontextmanager
async def other_server(
    **settings: Any,
) -> AsyncIterator[tuple[ScriptedWorker, RunningHub]]:
    """Run a hub, and a worker without a build number: it is no llama-server."""
    async with (
        ScriptedWorker(build="") as worker,
        running_hub(worker, **settings) as hub,
    ):
        yield worker, hub


async def used(hub: RunningHub, token: str) -> int:
    """Return how many tokens of its minute a subject has used."""
    response = await hub.get("/v1/models", token)
    assert response.status == 200
    response = await hub.post("/tokenize", {"content": "x"}, token)
    return TPM - int(response.header("x-ratelimit-remaining-tokens") or "")


# --- Workers that are asked -------------------------------------------------------


async def test_a_stream_is_counted_without_the_client_seeing_usage() -> None:
    async with other_server() as (worker, hub):
        limited = hub.token(tpm=TPM)
        worker.script(
            *event_stream(role() + token("a"), token("b"), NEWS + USAGE + done())
        )
        response = await hub.post(CHAT, BODY, limited)
        assert await used(hub, limited) == 25
    assert response.body == SHOWN
    assert worker.requests[0].json() == BODY | {"stream_options": ASKED}


async def test_a_text_is_counted_as_well() -> None:
    async with other_server() as (worker, hub):
        limited = hub.token(tpm=TPM)
        part = event(text_completion(" fe", reason=None, last=False))
        worker.script(*event_stream(part, USAGE, done()))
        body = {"model": "tiny", "prompt": "x", "stream": True}
        response = await hub.post(TEXT, body, limited)
        assert await used(hub, limited) == 25
    assert response.body == part + done()
    assert worker.requests[0].json()["stream_options"] == ASKED


@pytest.mark.parametrize(
    ("setting", "tpm", "asked"),
    [
        ("limited", None, False),
        ("limited", TPM, True),
        ("always", None, True),
        ("never", TPM, False),
    ],
)
async def test_which_streams_are_counted_is_a_setting(
    setting: str, tpm: int | None, asked: bool
) -> None:
    async with other_server(upstream__usage=setting) as (worker, hub):
        response = await hub.post(CHAT, BODY, hub.token(tpm=tpm))
    assert ("stream_options" in worker.requests[0].json()) is asked
    assert b'"usage"' not in response.body
    assert b"[DONE]" in response.body


async def test_a_llama_server_is_not_asked_and_its_timings_stay() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await hub.post(CHAT, BODY, hub.token(tpm=TPM))
    assert worker.requests[0].json() == BODY
    assert b'"timings"' in response.body


async def test_a_client_that_asks_gets_its_usage() -> None:
    async with other_server() as (worker, hub):
        limited = hub.token(tpm=TPM)
        worker.script(*event_stream(role() + token("a"), NEWS, USAGE, done()))
        body = BODY | {"stream_options": ASKED}
        response = await hub.post(CHAT, body, limited)
        assert await used(hub, limited) == 25
    assert USAGE in response.body
    assert worker.requests[0].json() == body


@pytest.mark.parametrize("assemble", [CHAT, ""])
async def test_an_answer_in_one_piece_has_its_usage_anyway(assemble: str) -> None:
    async with other_server(upstream__assemble=assemble) as (worker, hub):
        limited = hub.token(tpm=TPM)
        if not assemble:
            worker.script(*answer(chat_completion("a", tokens=5)))
        body = BODY | {"stream": False}
        response = await hub.post(CHAT, body, limited)
        spent = await used(hub, limited)
    usage = response.json()["usage"]
    assert spent == usage["total_tokens"]
    assert ("stream_options" in worker.requests[0].json()) is bool(assemble)


async def test_a_body_that_streams_through_is_not_changed() -> None:
    """It is not here as a whole; its answer is counted by events."""
    body = BODY | {"messages": [{"role": "user", "content": "x" * 1_000_000}]}
    async with other_server(limits__replay_window=4096) as (worker, hub):
        response = await hub.post(CHAT, body, hub.token(tpm=TPM))
    assert worker.requests[0].json() == body
    assert b"[DONE]" in response.body


# --- What comes, however it comes -------------------------------------------------


async def test_a_stream_without_usage_is_complete() -> None:
    async with other_server() as (worker, hub):
        limited = hub.token(tpm=TPM)
        worker.script(*event_stream(role() + token("a"), token("b"), NEWS, done()))
        response = await hub.post(CHAT, BODY, limited)
        prompt = len(json.dumps(BODY)) // 4  # bytes of an average token
        assert 3 <= await used(hub, limited) - prompt <= 5  # events
    assert response.body == SHOWN


async def test_usage_may_come_in_any_pieces() -> None:
    tail = token("b") + NEWS + USAGE + done()
    async with other_server() as (worker, hub):
        for place in range(0, len(tail), 7):
            pieces = [role() + token("a"), tail[:place], tail[place : place + 3]]
            pieces.append(tail[place + 3 :])
            worker.script(*event_stream(*filter(None, pieces)))
            response = await hub.post(CHAT, BODY, hub.token(tpm=10**6))
            assert response.body == SHOWN, f"cut at {place}"


async def test_an_end_without_done_gets_it() -> None:
    async with other_server() as (worker, hub):
        worker.script(*event_stream(role() + token("a"), token("b"), NEWS, USAGE))
        response = await hub.post(CHAT, BODY, hub.token(tpm=TPM))
    assert response.body == SHOWN


async def test_an_error_about_the_request_is_passed_on() -> None:
    about = {"message": "x", "code": 400}  # another worker would report it as well
    error = event({"error": about, "choices": [], "usage": {}})
    async with other_server() as (worker, hub):
        begun = sse_head() + chunk(role() + token("a"))
        worker.script(
            send(begun), wait("go"), send(chunk(error) + last_chunk()), close()
        )
        async with await hub.open(CHAT, BODY, hub.token(tpm=TPM)) as wire:
            assert (await wire.read_head()).status == 200
            worker.release("go")
            ending = await wire.read_to_end()
    assert not ending.clean
    assert ending.response.body == role() + token("a") + error


async def test_held_back_bytes_are_sent_before_an_error() -> None:
    half = b'data: {"model":"tiny","choi'
    # The error is what comes next where nothing is continued.
    settings: dict[str, Any] = {
        "models__aliases": {"a": "tiny"},
        "rescue__enabled": False,
    }
    async with other_server(**settings) as (worker, hub):
        begun = chunk(role() + token("a")) + chunk(half)
        worker.script(send(sse_head() + begun), reset())
        async with await hub.open(
            CHAT, BODY | {"model": "a"}, hub.token(tpm=TPM)
        ) as wire:
            ending = await wire.read_to_end()
    assert not ending.clean
    reported = (role() + token("a") + half).replace(b'"tiny"', b'"a"')
    assert ending.response.body.startswith(reported + b'\n\ndata: {"error"')


async def test_an_alias_is_renamed_as_well() -> None:
    async with other_server(models__aliases={"gpt-4o": "tiny"}) as (worker, hub):
        worker.script(
            *event_stream(role() + token("a"), token("b"), NEWS + USAGE, done())
        )
        body = BODY | {"model": "gpt-4o"}
        response = await hub.post(CHAT, body, hub.token(tpm=TPM))
    assert response.body == SHOWN.replace(b'"model":"tiny"', b'"model":"gpt-4o"')
    assert worker.requests[0].json() == BODY | {"stream_options": ASKED}


# --- With another worker ----------------------------------------------------------


FIRST, REST = "One day a crow met", " a fox"


@asynccontextmanager
async def rescued(
    begun: bytes,
) -> AsyncIterator[tuple[list[ScriptedWorker], RunningHub]]:
    """Run two servers: the first one dies after the events of `begun`."""
    async with (
        ScriptedWorker(build="") as bad,
        ScriptedWorker(build="") as good,
        running_hub(bad, good, rescue__enabled=True, retry__attempts=2) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        bad.script(send(sse_head()), send(chunk(begun)), reset())
        usage = finish(usage=usage_of(4, 20 + 2), tokens=4)
        good.script(*event_stream(role() + token(FIRST), token(REST), usage, done()))
        yield [bad, good], hub


@pytest.mark.parametrize("asks", [False, True])
async def test_a_rescued_answer_hides_usage_too_or_sends_the_sums(asks: bool) -> None:
    begun = role() + token(FIRST[:14]) + token(FIRST[14:])
    async with rescued(begun) as (workers, hub):
        limited = hub.token(tpm=TPM)
        body = BODY | ({"stream_options": ASKED} if asks else {})
        response = await hub.post(CHAT, body, limited)
        # The prompt once, the events of one worker, and what the other one generated.
        assert await used(hub, limited) == 20 + 3 + 4
    for worker in workers:
        assert worker.requests[0].json()["stream_options"] == ASKED
    assert response.body.startswith(begun + b": gollama rescued 1 by ")
    assert response.body.endswith(done())
    reported = [each["usage"] for each in chunks(response.body) if "usage" in each]
    assert [each["total_tokens"] for each in reported] == ([26] if asks else [])


async def test_an_answer_is_continued_wherever_it_was_cut() -> None:
    """A held back half of an event is sent before the event is completed."""
    whole = token(FIRST[14:])
    for place in (*range(1, 30, 3), len(whole) - 1):
        begun = role() + token(FIRST[:14]) + whole[:place]
        async with rescued(begun) as (_, hub):
            async with await hub.open(CHAT, BODY, hub.token(tpm=TPM)) as wire:
                ending = await wire.read_to_end()
        reported = chunks(ending.response.body)
        text = "".join(
            each["choices"][0]["delta"].get("content") or "" for each in reported
        )
        assert text == FIRST + REST, f"cut at {place}"
        assert ending.clean


async def test_a_server_that_dies_while_it_sends_usage_does_no_harm() -> None:
    """Its client has all that it wanted, and so gets a tidy end."""
    for place in (*range(1, len(USAGE), 20), len(USAGE) - 2, len(USAGE) - 1):
        begun = role() + token("a") + token("b") + NEWS + USAGE[:place]
        async with rescued(begun) as ([_, good], hub):
            response = await hub.post(CHAT, BODY, hub.token(tpm=TPM))
        assert response.body == SHOWN, f"cut at {place}"
        assert not good.requests


async def test_usage_is_requested_only_from_workers_that_need_it() -> None:
    """One that failed was asked; one that sends it anyway is not."""
    async with (
        ScriptedWorker(build="") as other,
        ScriptedWorker() as llama,
        running_hub(other, llama, retry__attempts=2) as hub,
    ):
        other.default(reset())
        llama.default(*chat_stream(["a", "b"], usage=True))
        for _ in range(2):  # the first one may be either
            response = await hub.post(CHAT, BODY, hub.token(tpm=TPM))
            assert b'"usage"' in response.body  # it sends usage unasked
    assert {"stream_options" in each.json() for each in other.requests} == {True}
    assert [each.json() for each in llama.requests] == [BODY, BODY]


@pytest.mark.real
async def test_the_usage_of_a_real_server_is_hidden(
    llama_server: Callable[..., LlamaServer],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one that is not recognised as llama-server, and so is asked for usage."""
    server = llama_server(tiny_model)
    body = BODY | {"max_tokens": 8, "temperature": 0, "n": 2}
    async with running_hub(server) as hub:
        plain = await hub.post(CHAT, body)
        monkeypatch.setattr(Worker, "is_llama_server", False)
        hidden = await hub.post(CHAT, body, hub.token(tpm=TPM))
        asked = await hub.post(CHAT, body | {"stream_options": ASKED})
    assert asked.body.count(b'"usage"') == 2
    reported = [without_times(each) for each in (plain.body, hidden.body, asked.body)]
    assert reported[0] == reported[1]
    assert [each for each in reported[2] if each["choices"]] == reported[1]


def chunks(stream: bytes) -> list[dict[str, Any]]:
    """Read a stream that has ended."""
    *events, end, nothing = stream.split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    data = [each[6:] for each in events if each.startswith(b"data: ")]
    return [json.loads(each) for each in data]


def without_times(stream: bytes) -> list[dict[str, Any]]:
    """Read a stream, without what is another in each."""
    barred = ("id", "created", "timings")
    return [
        {k: v for k, v in each.items() if k not in barred} for each in chunks(stream)
    ]
