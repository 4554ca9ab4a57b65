"""An answer that looks complete is complete; any other ends with an error."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.wire.schema import ENDPOINTS, Ending
from tests.fakes import client
from tests.fakes.asks import CHAT, RARELY, STREAM, WHOLE
from tests.fakes.cases import case
from tests.fakes.client import Response
from tests.fakes.hub import NO_BREAKER, NO_RESCUE, ONE_TRY, RunningHub, running_hub
from tests.fakes.replies import (
    chunk,
    done,
    error_event,
    error_reply,
    event,
    finish,
    head,
    json_reply,
    last_chunk,
    loading,
    named_event,
    ping,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    Script,
    Step,
    close,
    event_stream,
    expect_eof,
    read_body,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.worker import ScriptedWorker


def error_of(response: Response) -> dict[str, Any]:
    """The error of a reply, which has the shape of the OpenAI API."""
    assert response.header("content-type") == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


async def ended(hub: RunningHub, payload: Any, path: str = CHAT) -> client.Ending:
    async with await hub.open(path, payload) as wire:
        return await wire.read_to_end()


def the_worker(hub: RunningHub) -> Worker:
    [worker] = hub.hub.registry.workers
    return worker


# --- Before a byte of the answer --------------------------------------------------

FAULTS = {
    "reset": ((reset(),), 502, "worker_connection_lost"),
    "close": ((close(),), 502, "worker_connection_lost"),
    "half a head": ((send(sse_head()[:30]), close()), 502, "worker_connection_lost"),
    "only a head": ((send(sse_head()), reset()), 502, "worker_connection_lost"),
    "only pings": (
        (send(sse_head() + chunk(ping()) * 3), close()),
        502,
        "worker_connection_lost",
    ),
    "half an event": (
        (send(sse_head() + chunk(role()[:50])), close()),
        502,
        "worker_connection_lost",
    ),
    "no chunk": (
        (send(sse_head() + b"what?\r\n"), stall()),
        502,
        "worker_bad_response",
    ),
    "garbage": (
        (send(b"\x15\x03\x01\0\x02\x02\x16"), stall()),
        502,
        "worker_bad_response",
    ),
    "redirect": (
        (send(head(302, [("Location", "http://127.0.0.1:1/")])), stall()),
        502,
        "worker_bad_response",
    ),
    "upgrade": (
        (send(head(101, [("Upgrade", "h2c"), ("Connection", "upgrade")])), stall()),
        502,
        "worker_bad_response",
    ),
    "two framings": (
        (
            send(
                head(200, [("Content-Length", "2"), ("Transfer-Encoding", "chunked")])
            ),
            stall(),
        ),
        502,
        "worker_bad_response",
    ),
    "silence": ((expect_eof(),), 504, "worker_timeout"),
    "silence behind a head": (
        (send(sse_head()), expect_eof()),
        504,
        "worker_timeout",
    ),
    "nothing but pings": (
        (send(sse_head()), *[send(chunk(ping()))] * 3, expect_eof()),
        504,
        "worker_timeout",
    ),
}


@pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("script", "status", "code"), FAULTS.values(), ids=FAULTS.keys()
)
async def test_a_worker_that_fails_before_its_answer_is_an_error_with_a_status(
    script: Script, status: int, code: str, payload: dict[str, Any]
) -> None:
    """Nothing of it has been sent yet, so the client gets plain JSON; never a 200."""
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker,
            timeouts__first_token=0.1 if status == 504 else 10,
            health__interval=RARELY,
            **ONE_TRY,
        ) as hub,
    ):
        worker.script(*script)
        pinged = asyncio.create_task(worker.pinged(3))
        response = await hub.post(CHAT, payload)
        assert response.status == status
        error = error_of(response)
        assert error["code"] == code
        assert error["type"] == "server_error"
        assert worker.name in error["message"]
        assert response.header("x-gollama-worker") == worker.name
        await worker.idle()
        assert len(worker.requests) == 1
        await pinged  # which only the failure can have caused
        assert the_worker(hub).state is WorkerState.READY
        assert the_worker(hub).in_flight == 0


async def test_a_worker_that_refuses_is_unreachable() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker, health__interval=RARELY, health__fall=100, **ONE_TRY
        ) as hub,
    ):
        await worker.down()
        response = await hub.post(CHAT, STREAM)
    assert response.status == 502
    assert error_of(response)["code"] == "worker_unreachable"


async def test_a_worker_that_does_not_accept_is_a_timeout() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(
            worker, timeouts__connect=0.05, health__interval=RARELY, **ONE_TRY
        ) as hub,
    ):
        await worker.down()
        with socket.socket() as listener, socket.socket() as a, socket.socket() as b:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", worker.port))
            listener.listen(0)
            for filler in (a, b):  # the kernel adds one place to the queue
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", worker.port))
            response = await hub.post(CHAT, STREAM)
    assert response.status == 504
    assert error_of(response)["code"] == "worker_timeout"


async def test_a_client_connection_outlives_a_failed_request() -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.script(reset())
        async with await hub.wire() as wire:
            for status in (502, 200):
                await wire.post(CHAT, STREAM, hub.token())
                assert (await wire.read_response()).status == status


# --- In the middle of a stream ----------------------------------------------------

BEGUN = role() + token("a")
EVENTS = [BEGUN, token("b"), ping(), token("c")]
PREFIX = b"".join(EVENTS)
LOST, INCOMPLETE, MALFORMED = (
    "worker_connection_lost",
    "worker_incomplete_answer",
    "worker_bad_response",
)
ENDS = {
    "reset": ((reset(),), LOST, b""),
    "close": ((close(),), LOST, b""),
    "clean": ((send(last_chunk()), close()), INCOMPLETE, b""),
    "clean and kept": ((send(last_chunk()),), INCOMPLETE, b""),
    "chunk size": ((send(b"xyz\r\n"), stall()), MALFORMED, b""),
    "chunk end": ((send(b"3\r\n:\n\nno end\r\n"), stall()), MALFORMED, ping()),
    "no chunk": ((send(b"data: {}\n\n"), stall()), MALFORMED, b""),
    "half a size": ((send(b"e"), close()), LOST, b""),
    "a size": ((send(b"ee\r\n"), close()), LOST, b""),
    "half a last chunk": ((send(b"0\r\n"), close()), LOST, b""),
    "half a chunk": ((send(b"30\r\n:\n\n"), close()), LOST, ping()),
}


def assert_broken_off(
    ending: client.Ending, prefix: bytes, code: str, *, named: bool = False
) -> None:
    """The prefix, then one error event, then an end that is none."""
    assert ending.response.status == 200
    assert not ending.clean
    assert not ending.raw.endswith(last_chunk())
    body = ending.response.body
    assert body.startswith(prefix)
    rest = body[len(prefix) :]
    if named:
        assert rest.startswith(b"event: error\n")
        rest = rest.removeprefix(b"event: error\n")
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"\n\n")
    event = json.loads(rest.removeprefix(b"data: "))
    error = event.get("error", event)  # flat on /v1/responses
    assert error["code"] == code
    if named:
        assert event["type"] == "error"
    else:
        assert error["type"] == "server_error"
    assert b"[DONE]" not in rest


@pytest.mark.parametrize(("end", "code", "last"), ENDS.values(), ids=ENDS.keys())
async def test_a_stream_that_breaks_off_ends_with_one_error(
    end: Script, code: str, last: bytes
) -> None:
    """And without its last chunk, so that no client takes it for complete."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, **NO_RESCUE) as hub,
    ):
        worker.script(send(sse_head()), *(send(chunk(e)) for e in EVENTS), *end)
        pinged = asyncio.create_task(worker.pinged(3))
        assert_broken_off(await ended(hub, STREAM), PREFIX + last, code)
        await worker.idle()
        await pinged  # the worker was suspected
        assert the_worker(hub).in_flight == 0


@pytest.mark.parametrize("number", range(1, len(EVENTS)))
@pytest.mark.parametrize("end", [reset(), close()], ids=["reset", "close"])
async def test_a_stream_may_break_off_after_any_event(number: int, end: Step) -> None:
    async with ScriptedWorker() as worker, running_hub(worker, **NO_RESCUE) as hub:
        worker.script(send(sse_head()), *(send(chunk(e)) for e in EVENTS[:number]), end)
        ending = await ended(hub, STREAM)
    assert_broken_off(ending, b"".join(EVENTS[:number]), LOST)


FRAMED = b"".join(map(chunk, EVENTS))


async def test_a_stream_may_break_off_at_any_byte() -> None:
    """In a chunk, in its size, in an event; by a cut or by bytes that are no chunk."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **NO_RESCUE, **NO_BREAKER) as hub,
    ):
        for broken in [False, True]:
            for place in range(len(chunk(EVENTS[0])), len(FRAMED), 23):
                with case((broken, place)):
                    end = (send(bytes(300)), stall()) if broken else (reset(),)
                    worker.script(send(sse_head() + FRAMED[:place]), *end)
                    ending = await ended(hub, STREAM)
                    assert ending.response.status == 200
                    assert not ending.clean
                    before, mark, error = ending.response.body.partition(
                        b'data: {"error":{'
                    )
                    assert (
                        json.loads(b'{"error":{' + error)["error"]["type"]
                        == "server_error"
                    )
                    kept = before.rstrip(b"\n\0")
                    assert PREFIX.startswith(kept)
                    framing = (
                        len(FRAMED)
                        - len(PREFIX)
                        + len(PREFIX)
                        - len(PREFIX.rstrip(b"\n"))
                    )
                    assert len(kept) >= place - framing - 2
                    assert mark not in error
                    assert b"[DONE]" not in ending.response.body


@pytest.mark.parametrize(
    ("path", "events"),
    [
        ("/v1/messages", [named_event({"type": "content_block_delta"})]),
        ("/v1/responses", [named_event({"type": "response.output_text.delta"})]),
    ],
)
async def test_streams_with_named_events_get_a_named_error(
    path: str, events: list[bytes]
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*event_stream(*events))
        ending = await ended(hub, STREAM, path)
    prefix = b"".join(events)
    assert_broken_off(ending, prefix, "worker_incomplete_answer", named=True)


async def test_the_text_of_a_router_whose_child_dies_does_not_end_a_stream() -> None:
    """Bare text after the events, and a clean end of the chunks."""
    text = b"proxy error: Failed to read connection"
    async with ScriptedWorker() as worker, running_hub(worker, **NO_RESCUE) as hub:
        worker.script(*event_stream(role(), token("a"), text))
        ending = await ended(hub, STREAM)
    assert not ending.clean
    assert ending.response.body.startswith(role() + token("a") + text)
    assert b"worker_incomplete_answer" in ending.response.body
    assert b"[DONE]" not in ending.response.body


@pytest.mark.parametrize(
    "last",
    [
        last_chunk(),  # as llama-server ends such a stream
        b"",
        chunk(done()) + last_chunk(),
    ],
    ids=["clean", "cut", "done"],
)
async def test_the_workers_own_error_is_passed_on_once(last: bytes) -> None:
    """It went to the client already; only the end is missing then."""
    error = error_event("the output cannot be parsed")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(
            send(sse_head() + chunk(BEGUN)),
            wait("read"),
            send(chunk(error) + last),
            close(),
        )
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_event()
            worker.release("read")
            ending = await wire.read_to_end()
    body = b"".join(ending.raw.partition(BEGUN)[1:])
    assert error in body
    assert body.count(b'"error"') == 1
    if done() not in last:
        assert ending.response.body.endswith(token("a") + error)
        assert not ending.clean


async def test_an_error_after_the_finish_reason_is_a_failure() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        late = chunk(finish()) + chunk(error_event("late")) + last_chunk()
        worker.script(
            send(sse_head() + chunk(BEGUN)), wait("read"), send(late), close()
        )
        async with await hub.open(CHAT, STREAM) as wire:
            await wire.read_event()
            worker.release("read")
            ending = await wire.read_to_end()
    assert not ending.clean
    assert b"[DONE]" not in ending.raw
    assert ending.raw.count(b'"error"') == 1


# --- Streams that are complete ----------------------------------------------------


def endings(*parts: bytes) -> dict[str, Script]:
    """The ways in which a worker ends after these events."""
    sent = [send(chunk(part)) for part in parts]
    return {
        "clean": (send(sse_head()), *sent, send(last_chunk()), close()),
        "close": (send(sse_head()), *sent, close()),
        "reset": (send(sse_head()), *sent, wait("seen"), reset()),
        "half a last chunk": (send(sse_head()), *sent, send(b"0\r\n"), close()),
        "broken chunk": (send(sse_head()), *sent, send(b"what?\r\n"), stall()),
    }


COMPLETE = {
    "chat": (CHAT, [role(), token("a"), finish(), done()]),
    "only done": (CHAT, [role(), token("a"), done()]),
    "completion": (
        "/completion",
        [event({"content": "a", "stop": False}), event({"content": "", "stop": True})],
    ),
    "messages": (
        "/v1/messages",
        [named_event({"type": t}) for t in ("message_start", "message_stop")],
    ),
    "responses": (
        "/v1/responses",
        [named_event({"type": f"response.{t}"}) for t in ("created", "completed")],
    ),
}


@pytest.mark.parametrize("how", endings())
@pytest.mark.parametrize(("path", "events"), COMPLETE.values(), ids=COMPLETE.keys())
async def test_a_complete_stream_is_a_success_however_its_connection_ends(
    path: str, events: list[bytes], how: str
) -> None:
    """Its own mark counts, which is another one on each route; nothing is added."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*endings(*events)[how])
        async with await hub.open(path, STREAM) as wire:
            for part in events:
                assert await wire.read_event() == part
            worker.release("seen")  # a reset takes along what was not received
            assert await wire.read_event() is None
        assert the_worker(hub).state is WorkerState.READY
        assert not the_worker(hub).in_doubt


@pytest.mark.parametrize("how", endings())
async def test_a_missing_done_is_added_to_a_finished_stream(how: str) -> None:
    """Clients wait for it; a finish_reason shows that nothing else is missing."""
    events = [role(), token("a"), finish("length")]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*endings(*events)[how])
        async with await hub.open(CHAT, STREAM) as wire:
            for part in events:
                assert await wire.read_event() == part
            worker.release("seen")
            assert await wire.read_events() == [done()]


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (CHAT, [role(), token('"finish_reason":"stop"'), token("data: [DONE]\n\n")]),
        ("/completion", [event({"content": '"stop":true', "stop": False}), done()]),
        ("/v1/messages", [event({"text": "\nevent: message_stop\n"}), done()]),
        ("/v1/responses", [named_event({"type": "response.completed.not"}), done()]),
    ],
)
async def test_the_text_of_a_model_cannot_mark_an_answer_as_complete(
    path: str, events: list[bytes]
) -> None:
    """And no mark of another route."""
    async with ScriptedWorker() as worker, running_hub(worker, **NO_RESCUE) as hub:
        worker.script(*event_stream(*events))
        ending = await ended(hub, STREAM, path)
    named = ENDPOINTS[path].ending is Ending.NAMED
    prefix = b"".join(events)
    assert_broken_off(ending, prefix, "worker_incomplete_answer", named=named)


# --- Answers that are no streams --------------------------------------------------


CUT = b'{"choices":[' + b" " * 500
LENGTH = head(200, [("Content-Length", "1000")]) + CUT
CHUNKS = head(200, [("Transfer-Encoding", "chunked")]) + chunk(CUT)


@pytest.mark.parametrize(
    ("version", "wire", "end"),
    [
        ("1.1", LENGTH, reset()),
        ("1.1", LENGTH, close()),
        ("1.0", LENGTH, reset()),
        ("1.0", LENGTH, close()),
        ("1.1", CHUNKS, reset()),
        ("1.1", CHUNKS, close()),
        ("1.1", CHUNKS, send(b"xyz\r\n\r\n")),
    ],
)
async def test_a_cut_answer_is_recognised_as_cut(
    version: str, wire: bytes, end: Step
) -> None:
    """By its length, or by the last chunk that is missing; nothing is put into it."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(wire), wait("seen"), end)
        async with await hub.wire() as asking:
            await asking.post(CHAT, WHOLE, hub.token(), version=version)
            assert (await asking.read_head()).status == 200
            worker.release("seen")
            ending = await asking.read_to_end()
    assert not ending.clean
    assert ending.response.body == CUT


# --- A worker's own errors --------------------------------------------------------


@pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (500, "server_error"),
        (501, "not_supported_error"),
        (502, "server_error"),
        (504, "server_error"),
    ],
)
async def test_an_error_of_a_worker_is_passed_on_unchanged(
    status: int, kind: str, payload: dict[str, Any]
) -> None:
    """A 500 of llama-server often means a bad request: no worker is blamed for it."""
    reply = error_reply(status, "because", kind)
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        pings = len(worker.control)
        worker.default(send(reply))
        response = await hub.post(CHAT, payload)
        assert response.status == status
        assert response.body == reply.partition(b"\r\n\r\n")[2]
        assert response.header("content-type") == "application/json; charset=utf-8"
        await worker.idle()
        assert not the_worker(hub).in_doubt
        assert len(worker.control) == pings


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (413, "invalid_request_error"),
        (415, "invalid_request_error"),
        (500, "server_error"),
    ],
)
async def test_an_error_without_a_message_gets_one(status: int, kind: str) -> None:
    """llama-server's 413 is empty, and SDKs show what is in the body."""
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.default(send(head(status, [("Content-Length", "0")])), close())
        response = await hub.post(CHAT, WHOLE)
    assert response.status == status
    error = error_of(response)
    text = f"Worker {worker.name} answered {status} without a reason."
    assert (error["message"], error["type"], error["code"]) == (text, kind, None)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_worker_that_refuses_the_hubs_key_is_at_fault(status: int) -> None:
    """A client with a 401 would look for the mistake in its own token."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, **ONE_TRY) as hub,
    ):
        pinged = asyncio.create_task(worker.pinged(3))
        worker.script(
            send(error_reply(status, "Invalid API Key", "authentication_error"))
        )
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 502
        assert error_of(response)["code"] == "worker_refused_key"
        assert response.header("www-authenticate") is None
        await pinged


@pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_a_loading_worker_leads_to_retry_after(
    payload: dict[str, Any],
) -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, **ONE_TRY) as hub,
    ):
        pinged = asyncio.create_task(worker.pinged(3))
        worker.script(send(loading()))
        response = await hub.post(CHAT, payload)
        assert response.status == 503
        assert error_of(response)["code"] == "no_worker_available"
        assert int(response.header("retry-after") or "") > 0
        await pinged


@pytest.mark.parametrize("payload", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_a_busy_workers_answer_is_passed_on_and_its_health_checked(
    payload: dict[str, Any],
) -> None:
    """Its 429 passes as it is; to be busy is no failure."""
    reply = error_reply(429, "because", "rate_limit_error")
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, **ONE_TRY) as hub,
    ):
        pinged = asyncio.create_task(worker.pinged(3))
        worker.script(send(reply))
        response = await hub.post(CHAT, payload)
        assert response.status == 429
        assert response.body == reply.partition(b"\r\n\r\n")[2]
        await pinged
        assert not the_worker(hub).in_doubt


@pytest.mark.parametrize("status", [502, 504])
async def test_the_error_of_a_gateway_before_a_worker_is_passed_on(status: int) -> None:
    """Whatever their shape: they are the worker's, and more precise than the hub's."""
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        worker.script(send(json_reply({"error": "upstream"}, status)))
        response = await hub.post(CHAT, WHOLE)
    assert (response.status, response.json()) == (status, {"error": "upstream"})


@pytest.mark.parametrize("end", [reset(), close()])
async def test_a_truncated_error_counts_as_a_lost_connection(end: Step) -> None:
    """Half of its JSON would be useless."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, health__interval=RARELY, **ONE_TRY) as hub,
    ):
        pinged = asyncio.create_task(worker.pinged(3))
        worker.script(send(head(400, [("Content-Length", "100")]) + b'{"err'), end)
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 502
        assert error_of(response)["code"] == "worker_connection_lost"
        await pinged


@pytest.mark.parametrize(
    ("reported", "status"),
    [
        (400, 400),
        (500, 500),
        (503, 503),
        (599, 599),
        (200, 502),
        (None, 502),
        ("e", 502),
    ],
)
async def test_a_stream_that_begins_with_an_error_is_an_error(
    reported: int | str | None, status: int
) -> None:
    """With the status that it should have had, not 200 and an event."""
    first = event({"error": {"code": reported, "message": "because", "type": "oh"}})
    async with ScriptedWorker() as worker, running_hub(worker, **ONE_TRY) as hub:
        pings = len(worker.control)
        worker.script(*event_stream(ping(), first))
        response = await hub.post(CHAT, STREAM)
        await worker.idle()
        assert response.status == status
        error = error_of(response)
        assert (error["message"], error["type"]) == ("because", "oh")
        assert len(worker.control) == pings
        assert the_worker(hub).in_flight == 0


# --- The limit of a whole request -------------------------------------------------


async def test_a_request_has_a_limit_before_its_answer() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__request=0.1) as hub,
    ):
        worker.script(expect_eof())
        response = await hub.post(CHAT, STREAM)
        assert response.status == 504
        error = error_of(response)
        assert error["code"] == "request_timeout"
        assert error["message"] == "The request took more than 0.1 s."
        await worker.idle()
        assert not the_worker(hub).in_doubt


async def test_a_request_has_a_limit_before_its_body() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__request=0.1) as hub,
        await hub.wire() as wire,
    ):
        length = [("Content-Length", "100")]
        await wire.post(CHAT, b'{"model":"tiny"', hub.token(), headers=length)
        response = await wire.read_response()
        assert response.status == 504
        assert error_of(response)["code"] == "request_timeout"
        assert not worker.requests


async def cut_at_the_limit(
    script: Script, payload: dict[str, Any], path: str = CHAT
) -> client.Ending:
    """Have an answer cut after its beginning, however slow the machine is.

    The connection to the worker is closed, and the worker is not blamed.
    """
    for limit in (0.3, 2, 8):  # seconds of real time; at last the answer has begun
        async with (
            ScriptedWorker() as worker,
            running_hub(worker, timeouts__request=limit) as hub,
        ):
            worker.script(*script, expect_eof())
            ending = await ended(hub, payload, path)
            if ending.response.status == 504:
                continue
            await worker.idle()
            assert the_worker(hub).in_flight == 0
            assert not the_worker(hub).in_doubt
            return ending
    raise AssertionError("no answer has begun within its limit")


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_request_has_a_limit_in_its_stream(path: str) -> None:
    """The client has what came before."""
    script = (send(sse_head() + chunk(BEGUN)),)
    ending = await cut_at_the_limit(script, STREAM, path)
    assert_broken_off(ending, BEGUN, "request_timeout", named=path != CHAT)


async def test_a_request_has_a_limit_in_an_answer_that_is_no_stream() -> None:
    script = (send(head(200, [("Content-Length", "9")]) + b"{"),)
    ending = await cut_at_the_limit(script, WHOLE)
    assert ending.response.body == b"{"
    assert not ending.clean


async def test_a_worker_whose_upload_fails_is_lost() -> None:
    """It closed the connection in the middle of a large body."""
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, limits__replay_window=4096) as hub,
    ):
        worker.script(read_body(50_000), reset())
        body = b'{"model":"tiny","messages":[],"prompt":"' + b"x" * 100_000
        length = [("Content-Length", "10000000")]
        async with await hub.open(CHAT, body, headers=length) as wire:
            response = await wire.read_response()
        assert response.status == 502
        assert error_of(response)["code"] == "worker_connection_lost"
        assert len(worker.requests) == 1


# --- The last words of a hub ------------------------------------------------------


async def test_a_hub_that_cuts_its_streams_ends_them_with_an_error() -> None:
    """Before the first byte with a status, afterwards with an event."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(sse_head() + chunk(role() + token("a"))), expect_eof())
        worker.script(expect_eof())
        async with (
            await hub.open(CHAT, STREAM) as streaming,
            await hub.open(CHAT, STREAM) as waiting,
        ):
            assert await streaming.read_event() == role()
            await worker.received(2)
            aborting = asyncio.create_task(hub.hub.abort())
            ending = await streaming.read_to_end()
            assert_broken_off(ending, token("a"), "hub_draining")
            response = await waiting.read_response()
            await aborting
    assert response.status == 503
    assert error_of(response)["code"] == "hub_draining"
    assert response.header("retry-after")
