"""Workers that misbehave in odd places: what was got wrong once stays right."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gollama_proxy.upstream import probe
from gollama_proxy.wire.description import Check
from tests.behaviour.test_backpressure import stream_of_megabytes
from tests.behaviour.test_cancellation import (
    in_an_error,
    in_flight,
    logged,
    settled,
    write_blocked,
)
from tests.behaviour.test_honest_endings import CUT, assert_broken_off, ended
from tests.behaviour.test_large_bodies import (
    a_worker,
    half_sent,
    running,
)
from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.cases import case
from tests.fakes.client import Wire
from tests.fakes.hub import NO_BREAKER, NO_RESCUE, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    event,
    finish,
    head,
    json_reply,
    last_chunk,
    named_event,
    role,
    sse_head,
    token,
)
from tests.fakes.script import (
    answer,
    close,
    event_stream,
    not_read_body,
    read_body,
    reset,
    send,
    stall,
    wait,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker
from tests.proxy.test_attempt import BODY, bench, pieces
from tests.upstream.test_connection import SHORT, ask
from tests.upstream.test_probe import HEALTH, ping, target_of

OK = answer(chat_completion("hello"))

# --- 1: upstream/test_connection.py, test_stale_connections.py ---------------------

SECOND = head(404, [("Content-Length", "5")]) + b"hello"


def test_bytes_after_an_answer_are_not_part_of_it() -> None:
    """Not its status, not its body, and nothing of the next answer either."""
    for length in range(1, len(SECOND) + 1):
        with case(length):
            connection, _, recorder = ask()
            connection.data_received(SHORT + SECOND[:length])
            assert (recorder.status, recorder.body, recorder.ended) == (
                200,
                b"{}",
                True,
            )
            assert not connection.reusable


async def test_a_second_answer_does_not_reach_the_next_client() -> None:
    evil = head(200, [("Content-Length", "700")]) + b"{"
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(json_reply({"n": 1}) + evil))
        assert (await hub.post(CHAT, WHOLE)).json() == {"n": 1}
        worker.script(*answer({"n": 2}))
        response = await hub.post(CHAT, WHOLE)
        assert (response.status, response.json()) == (200, {"n": 2})


# --- 2: test_stale_connections.py, proxy/test_attempt.py --------------------------


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\nContent-", head(100)])
async def test_a_request_is_not_repeated_after_one_byte_of_an_answer(
    part: bytes,
) -> None:
    # One try: that it is not asked again as a stale connection would be.
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        worker.script(*OK)
        worker.script(send(part), reset())
        assert (await hub.post(CHAT, WHOLE)).status == 200
        response = await hub.post(CHAT, WHOLE)
        assert (response.status, len(worker.requests)) == (502, 2)


# --- 3: test_large_bodies.py ------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400])
async def test_a_connection_with_half_a_request_is_not_used_again(status: int) -> None:
    """The next request would be taken for the rest of the body."""
    reply = head(status, [("Content-Length", "2")]) + b"{}"
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(50_000), send(reply), read_body(), send(reply))
        async with half_sent(hub) as wire:
            assert (await wire.read_response()).status == status
            async with await hub.open(CHAT, WHOLE) as other:
                response = await other.read_response()
        assert response.status == 200
        assert response.json() != {}
        assert worker.requests[0].body_length < 200_000


# --- 4, 5: test_honest_endings.py -------------------------------------------------

FINISH = finish("stop")
BEGUN = role() + token("a")
DECISIVE = {
    "chat": (CHAT, role() + token("a"), FINISH),
    "completion": (
        "/completion",
        event({"content": "a"}),
        event({"stop": True, "n": 1}),
    ),
    "messages": (
        "/v1/messages",
        named_event({"type": "message_start"})
        + named_event({"type": "content_block_delta"}),
        named_event({"type": "message_stop"}),
    ),
}


async def test_an_incomplete_closing_event_does_not_end_the_stream() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, **NO_RESCUE, **NO_BREAKER) as hub,
    ):
        for end in [close(), reset(), send(last_chunk())]:
            for path, first, last in DECISIVE.values():
                for missing in [2, 5, 10]:
                    with case((end, path, first, last, missing)):
                        worker.script(
                            send(sse_head() + chunk(first) + chunk(last[:-missing])),
                            end,
                        )
                        ending = await ended(hub, STREAM, path)
                        assert not ending.clean
                        assert b"[DONE]" not in ending.response.body
                        assert b'"error"' in ending.response.body


@pytest.mark.parametrize(
    "half", [token("b")[:3], token("b")[:60], token("b")[:-1], b": "]
)
async def test_the_error_is_a_separate_event(half: bytes) -> None:
    """After half an event, too: a client parses line by line."""
    async with ScriptedWorker() as worker, running_hub(worker, **NO_RESCUE) as hub:
        worker.script(send(sse_head() + chunk(BEGUN) + chunk(half)), reset())
        ending = await ended(hub, STREAM)
    *_, last, nothing = ending.response.body.split(b"\n\n")
    assert nothing == b""
    assert last.lstrip(b"\n").startswith(b'data: {"error":{')
    assert ending.response.body.startswith(BEGUN + half)


# --- 6: test_honest_endings.py ----------------------------------------------------


async def test_one_finished_choice_of_two_is_not_a_complete_answer() -> None:
    """`"n": 2`: the other one went on, and was cut."""
    other = token("more").replace(b'"index":0', b'"index":1')
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(*event_stream(role(), FINISH, other)[:-2], reset())
        ending = await ended(hub, STREAM | {"n": 2})
    assert_broken_off(ending, role() + FINISH + other, "worker_connection_lost")


# --- 7: test_honest_endings.py, test_old_clients.py, test_backpressure.py ---------


@pytest.mark.parametrize("end", [reset(), close()])
async def test_a_reset_shows_an_http_1_0_client_that_its_answer_is_cut(
    end: object,
) -> None:
    chunks = head(200, [("Transfer-Encoding", "chunked")]) + chunk(CUT)
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(chunks), wait("seen"), end)
        async with await hub.wire() as wire:
            await wire.post(CHAT, WHOLE, hub.token(), version="1.0")
            await wire.read_head()
            worker.release("seen")
            ending = await wire.read_to_end()
    assert ending.reset


async def test_an_http_1_0_client_can_detect_a_cut_answer() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, timeouts__write=0.1) as hub,
    ):
        worker.script(*stream_of_megabytes(50))
        wire = await hub.wire(receive_buffer=4096)
        await wire.post(CHAT, STREAM, hub.token(), version="1.0")
        await worker.received()
        await worker.idle()
        ending = await wire.read_to_end()
    assert ending.reset


# --- 8: test_honest_endings.py, proxy/test_relay.py -------------------------------


async def test_an_error_that_is_too_long_is_replaced() -> None:
    large = b"x" * (1 << 20)
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(
            send(head(400, [("Content-Length", str(len(large)))])), send(large)
        )
        async with await hub.open(CHAT, WHOLE) as wire:
            response = await wire.read_response()
    assert response.status == 400
    assert len(response.json()["error"]["message"]) < 200


# --- 10, 11: upstream/test_probe.py -----------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/props"])
async def test_a_model_list_that_is_not_utf_8_is_reported(path: str) -> None:
    body = b'{"data":[{"id":"\xff"}],"build_info":"\xff"}'
    async with ScriptedWorker() as worker:
        worker.on(path, send(head(200, [("Content-Length", str(len(body)))]) + body))
        finding = await ping(worker)
    assert finding.check is (Check.FAILED if path == "/v1/models" else Check.OK)


async def test_a_worker_without_tls_is_not_reported_as_a_permission_error() -> None:
    async with ScriptedWorker() as worker:
        url = worker.url.replace("http:", "https:")
        finding = await probe.ping(target_of(url), HEALTH)
        worker.violations.clear()
    assert finding.reason == "TLS: wrong version number"


# --- 12: test_cancellation.py -----------------------------------------------------


async def test_a_client_that_half_closes_with_everything_full() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await write_blocked(worker, hub)
        wire.half_close()
        async with asyncio.timeout(DEADLINE):
            await worker.requests[0].closed_by_peer.wait()
        await in_flight(hub, 0)


# --- 13: test_large_bodies.py -----------------------------------------------------


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_worker_that_stops_reading_has_a_deadline(leaves: bool) -> None:
    """A machine that froze in mid-upload, which nothing else would detect."""
    sent = 0

    async def upload(wire: Wire) -> None:
        nonlocal sent
        while True:
            await wire.send(bytes(32 << 10))
            sent += 1

    async with (
        ScriptedWorker(receive_buffer=4096) as worker,
        running(worker, limits__body=1 << 30, timeouts__first_token=0.3) as hub,
    ):
        worker.script(read_body(1000), not_read_body(), stall())
        length = [("Content-Length", str(1 << 29))]
        wire = await hub.open(CHAT, b'{"a":"', headers=length)
        uploading = asyncio.create_task(upload(wire))
        await worker.received()
        await settled(lambda: sent)
        uploading.cancel()
        await asyncio.wait([uploading])
        if leaves:
            wire.abort()
        await in_flight(hub, 0)
        if not leaves:
            assert (await wire.read_response()).status == 504


# --- 14: proxy/test_attempt.py ----------------------------------------------------


async def test_an_upload_does_not_make_an_idle_connection_younger() -> None:
    """llama-server counts its 5 s from the last request."""
    async with ScriptedWorker() as worker, bench(worker.url) as made:
        await made.exchange()
        made.clock.advance(3)
        worker.script(read_body(), send(head(500, [("Content-Length", "0")])))
        await made.exchange(rest=pieces(b"more"), length=len(BODY) + 4)
        made.clock.advance(3)
        await made.exchange()  # the idle one is 6 s old
        assert [r.reused for r in worker.requests] == [False, False, False]


# --- 15: test_honest_endings.py ---------------------------------------------------


async def test_a_stream_on_a_route_that_has_none_is_cut_visibly() -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(sse_head() + chunk(role())), reset())
        ending = await ended(hub, WHOLE, "/tokenize")
    assert not ending.clean


# --- 16: test_cancellation.py -----------------------------------------------------


async def test_a_client_that_left_is_not_logged_as_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gollama_proxy.access")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        (await in_an_error(worker, hub)).abort()
        [line] = await logged(caplog)
    assert line["outcome"] == "client_gone"


# --- 17: test_honest_endings.py ---------------------------------------------------


@pytest.mark.parametrize("received", [4096, 64 << 10])
async def test_the_received_part_of_a_cut_answer_is_passed_on(received: int) -> None:
    """Its length shows that it is cut; every byte before the cut arrives."""
    length = ("Content-Length", str(10 << 20))
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.script(send(head(200, [length])), *[send(bytes(1 << 16))] * 60, close())
        async with await hub.open(CHAT, WHOLE, receive_buffer=received) as wire:
            request = await worker.received()
            await settled(lambda: request.sent)
            ending = await wire.read_to_end()
    assert not ending.clean
    assert len(ending.response.body) == 60 << 16
