"""A body beyond the replay window streams through, checked on its way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.fleet.state import WorkerState
from gollama_proxy.wire.description import Check, Description, Model
from tests.fakes.asks import CHAT, MIB
from tests.fakes.client import Response, Wire, request_head
from tests.fakes.clock import Clock
from tests.fakes.exchange import Exchange
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.pool import InOrder
from tests.fakes.process import hub_process
from tests.fakes.replies import (
    chat_completion,
    chunk,
    error_reply,
    head,
    last_chunk,
)
from tests.fakes.script import (
    Step,
    answer,
    close,
    expect_eof,
    notify,
    read_body,
    send,
)
from tests.fakes.waiting import DEADLINE, settled, until
from tests.fakes.worker import ScriptedWorker, full_backlog

LARGE = 2 * MIB  # more than the hub's window and the buffers on the way can hold
WINDOW = 4096
OK = answer(chat_completion("hello"))


def a_worker(*models: str) -> ScriptedWorker:
    return ScriptedWorker(*models, keep_body=2 * LARGE, n_ctx=1 << 24)


def running(worker: ScriptedWorker, *more: ScriptedWorker, **settings: Any) -> Any:
    """Run a hub with small windows, so that bodies need not be large."""
    small = {"limits__replay_window": WINDOW, "limits__model_window": 4 * WINDOW}
    # Bodies are compared byte by byte: none is asked for as a stream.
    return running_hub(worker, *more, upstream__assemble="", **{**small, **settings})


def prompt(length: int, *, before: str = "", behind: str = "") -> bytes:
    """Build a body with a prompt this long, and other fields before or after it."""
    unit = b"lorem ipsum \xc3\xa9 \\n "
    text = unit * (length // len(unit))
    return b'{%b"prompt":"%b"%b}' % (before.encode(), text, behind.encode())


async def post_chunked(
    hub: RunningHub, body: bytes, size: int = 50_000, *, end: bytes = last_chunk()
) -> Wire:
    """Send a request of unknown length in chunks."""
    wire = await hub.wire()
    headers = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
    await wire.send(request_head("POST", CHAT, hub.token(), headers))
    for start in range(0, len(body), size):
        await wire.send(chunk(body[start : start + size]))
    await wire.send(end)
    return wire


async def post(hub: RunningHub, body: bytes, *, chunked: bool = False) -> Response:
    if not chunked:
        return await hub.post(CHAT, body)
    async with await post_chunked(hub, body) as wire:
        return await wire.read_response()


def code_of(response: Response) -> str:
    return str(response.json()["error"]["code"])


# --- 200 MB -----------------------------------------------------------------------


class Digest:
    """A worker's step: read a body piece by piece, and keep nothing but its hash.

    It waits in the middle until it may continue.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.length = 0
        self.halfway = asyncio.Event()
        self.go_on = asyncio.Event()

    def step(self) -> Step:
        # The worker leaves the body to the script where one of its steps reads it.
        return Step("read_body", (), self._play)

    async def _play(self, exchange: Exchange) -> None:
        request = exchange.request
        while not request.complete:
            await exchange.read_body(request.body_length + MIB)
            self.hash.update(request.body)
            self.length += len(request.body)
            request.body = b""
            if self.length > 20 * MIB and not self.go_on.is_set():
                self.halfway.set()
                await exchange.unless_hung_up(self.go_on.wait())


def pieces(before: bytes, behind: bytes, number: int) -> Iterator[bytes]:
    yield b'{%b"prompt":"' % before
    piece = b"x" * (MIB - 8)
    for place in range(number):
        yield b"%08d" % place + piece
    yield b'"%b}' % behind


@pytest.mark.parametrize(
    ("before", "behind", "chunked"),
    [(b'"model":"tiny",', b"", False), (b"", b',"model":"tiny"', True)],
    ids=["model first, length", "model last, chunks"],
)
async def test_100_megabytes_cost_the_hub_hardly_any_memory(
    before: bytes, behind: bytes, chunked: bool
) -> None:
    """While the worker does not read, the client has to wait; every byte arrives."""
    digest, expected = Digest(), hashlib.sha256()
    length = sum(map(len, pieces(before, behind, 100)))
    sent = 0

    async def upload(wire: Wire) -> None:
        nonlocal sent
        for piece in pieces(before, behind, 100):
            expected.update(piece)
            await wire.send(chunk(piece) if chunked else piece)
            sent += len(piece)
        if chunked:
            await wire.send(last_chunk())

    async with (
        ScriptedWorker(receive_buffer=64 << 10, keep_body=1 << 40) as worker,
        hub_process(worker.url, limits__body="1GiB", log__access="false") as hub,
    ):
        worker.script(read_body(), *OK)  # to have everything in place already
        async with await hub.open(CHAT, prompt(4 * MIB)) as wire:
            assert (await wire.read_response()).status == 200
        worker.script(digest.step(), *OK)
        framing = ("Transfer-Encoding", "chunked")
        if not chunked:
            framing = ("Content-Length", str(length))
        async with hub.growing_less_than(16 * MIB):
            async with await hub.open_head(CHAT, [framing]) as wire:
                uploading = asyncio.create_task(upload(wire))
                async with asyncio.timeout(DEADLINE):
                    await digest.halfway.wait()
                assert await settled(lambda: sent) < 50 * MIB
                digest.go_on.set()
                await uploading
                response = await wire.read_response()
        assert response.status == 200
        assert digest.length == length
        assert digest.hash.digest() == expected.digest()
        request = worker.requests[-1]
        assert request.header("content-length") == (None if chunked else str(length))


# --- Where the model is -----------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
async def test_a_model_at_the_beginning_is_found(chunked: bool) -> None:
    body = prompt(LARGE, before='"model":"b",')
    async with a_worker("a") as one, a_worker("b") as two:
        async with running(one, two) as hub:
            assert (await post(hub, body, chunked=chunked)).status == 200
        assert not one.requests
        assert [request.body for request in two.requests] == [body]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
async def test_the_model_is_searched_for_only_when_needed(chunked: bool) -> None:
    """Up to a second, larger window; what was read on the way is sent first."""
    body = prompt(LARGE, behind=',"model":"b","messages":[]')
    async with a_worker("a") as one, a_worker("b") as two:
        async with running(one, two, limits__model_window=2 * LARGE) as hub:
            assert (await post(hub, body, chunked=chunked)).status == 200
        assert not one.requests
        assert [request.body for request in two.requests] == [body]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
async def test_a_model_beyond_the_window_is_missing(chunked: bool) -> None:
    body = prompt(LARGE, behind=',"model":"b"')
    async with a_worker("a") as one, a_worker("b") as two:
        async with running(one, two) as hub:
            response = await post(hub, body, chunked=chunked)
        assert response.status == 400
        assert code_of(response) == "model_missing"
        assert "first 16384 bytes" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "model"
        assert not one.requests
        assert not two.requests


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("behind", ["", ',"model":"tiny"', ',"model":null'])
async def test_the_model_may_be_anywhere_if_only_one_is_served(
    behind: str, chunked: bool
) -> None:
    """It need not be looked for; llama-server ignores it anyway."""
    body = prompt(LARGE, behind=behind)
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(), *OK)
        assert (await post(hub, body, chunked=chunked)).status == 200
        assert worker.requests[0].body == body


async def test_a_token_for_some_models_has_its_model_looked_for() -> None:
    """A name that has not been read cannot have been allowed."""
    async with (
        a_worker() as worker,
        running(worker, claims={"models": ["t*"]}) as hub,
    ):
        near = prompt(3 * WINDOW, behind=',"model":"tiny"')
        assert (await post(hub, near)).status == 200
        far = prompt(LARGE, behind=',"model":"tiny"')
        assert code_of(await post(hub, far)) == "model_missing"
        assert len(worker.requests) == 1


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("name", ["x", "a-name-that-is-longer"])
async def test_another_name_changes_the_length_of_the_whole(
    name: str, chunked: bool
) -> None:
    body = prompt(LARGE, before=f'"model":"{name}",')
    async with (
        a_worker() as worker,
        running(worker, models__aliases={name: "tiny"}) as hub,
    ):
        worker.script(read_body(), *OK)
        assert (await post(hub, body, chunked=chunked)).status == 200
        [request] = worker.requests
        sent = prompt(LARGE, before='"model":"tiny",')
        assert request.body == sent
        reported = None if chunked else str(len(sent))
        assert request.header("content-length") == reported


@pytest.mark.parametrize("size", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
async def test_the_edge_of_the_window_does_not_split_the_body(
    size: int, chunked: bool
) -> None:
    body = b'{"model":"tiny","prompt":""}'
    body = body[:-2] + b"x" * (size - len(body)) + body[-2:]
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(), *OK)
        assert (await post(hub, body, chunked=chunked)).status == 200
        assert worker.requests[0].body == body


@settings(max_examples=15, deadline=None, database=None)
@given(
    texts=st.lists(st.text(max_size=2000), min_size=1, max_size=12),
    place=st.integers(0, 12),
    padding=st.sampled_from([0, WINDOW, MIB]),
    size=st.integers(5000, 100_000),
)
async def test_any_body_arrives_as_it_was_sent(
    texts: list[str], place: int, padding: int, size: int
) -> None:
    fields = [(f"f{n}", [text, {"t": text}]) for n, text in enumerate(texts)]
    fields.insert(place, ("model", ["tiny"]))
    document = {name: value[0] if name == "model" else value for name, value in fields}
    body = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
    body = body[:-1] + b" " * padding + body[-1:]
    async with a_worker() as worker, running(worker) as hub:
        worker.default(read_body(), *OK)
        async with await post_chunked(hub, body, size) as wire:
            assert (await wire.read_response()).status == 200
        assert (await post(hub, body)).status == 200
        assert [request.body for request in worker.requests] == [body] * 2


async def test_a_client_may_wait_for_100_continue() -> None:
    """With a large body as with any; the worker is asked for nothing."""
    body = prompt(LARGE, before='"model":"tiny",')
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(), *OK)
        headers = [("Expect", "100-continue"), ("Content-Length", str(len(body)))]
        async with await hub.wire() as wire:
            await wire.send(request_head("POST", CHAT, hub.token(), headers))
            reported = await wire.read_until(b"\r\n\r\n")
            assert reported == b"HTTP/1.1 100 Continue\r\n\r\n"
            await wire.send(body)
            assert (await wire.read_response()).status == 200
        [request] = worker.requests
        assert request.header("expect") is None
        assert request.body == body


async def test_nothing_else_can_be_expected() -> None:
    async with a_worker() as worker, running(worker) as hub:
        headers = [("Expect", "miracles"), ("Content-Length", "100")]
        async with await hub.open(CHAT, b"", headers=headers) as wire:
            response = await wire.read_response()
        assert response.status == 417
        assert code_of(response) == "expectation_failed"
        assert not worker.requests


# --- Bodies that turn out bad -----------------------------------------------------

BAD = {
    "model twice": (
        prompt(LARGE, before='"model":"tiny",', behind=',"model":"gpt"'),
        "invalid_json",
    ),
    "stream twice": (
        prompt(LARGE, before='"stream":true,', behind=',"stream":false'),
        "invalid_json",
    ),
    "ends too early": (prompt(LARGE)[:-1], "invalid_json"),
    "ends in a string": (prompt(LARGE)[:-20], "invalid_json"),
    "something behind it": (prompt(LARGE) + b"{}", "invalid_json"),
    "no key": (prompt(LARGE, behind=",5"), "invalid_json"),
    "no utf-8": (prompt(LARGE)[:-2] + b'\xff"}', "invalid_json"),
    "half a character": (prompt(LARGE)[:-2] + b'\xc3"}', "invalid_json"),
    "wrong type": (prompt(LARGE, behind=',"max_tokens":"many"'), "invalid_value"),
    "too deep": (prompt(LARGE, behind=',"a":' + "[" * 200), "invalid_json"),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize(("body", "code"), BAD.values(), ids=BAD.keys())
async def test_an_invalid_body_is_never_completed(
    body: bytes, code: str, chunked: bool
) -> None:
    """The worker has a part of it by then, and must not take it for the whole."""
    async with a_worker() as worker, running(worker) as hub:
        pings = len(worker.control)
        worker.default(read_body(), *OK)
        response = await post(hub, body, chunked=chunked)
        assert response.status == 400
        assert code_of(response) == code
        await worker.idle()
        assert not any(request.complete for request in worker.requests)
        assert len(worker.requests) <= 1
        assert len(worker.control) == pings, "no worker was suspected"


@pytest.mark.parametrize("size", [60_000, 2_000])
async def test_a_body_beyond_the_limit_is_refused_at_once(size: int) -> None:
    """By its length: not a byte is read, and no worker touched."""
    async with a_worker() as worker, running(worker, limits__body=1024) as hub:
        length = [("Content-Length", str(size))]
        async with await hub.open(CHAT, b"", headers=length) as wire:
            response = await wire.read_response()
        assert response.status == 413
        assert code_of(response) == "body_too_large"
        assert not worker.requests


async def test_a_body_that_grows_beyond_the_limit_is_never_completed() -> None:
    async with a_worker() as worker, running(worker, limits__body=MIB) as hub:
        worker.script(read_body(), *OK)
        async with await post_chunked(hub, prompt(LARGE), end=b"") as wire:
            response = await wire.read_response()
        assert response.status == 413
        assert code_of(response) == "body_too_large"
        await worker.idle()
        assert not worker.requests[0].complete


async def test_a_stalled_body_is_given_up() -> None:
    """The worker is free for others then."""
    async with a_worker() as worker, running(worker, timeouts__body=0.1) as hub:
        worker.script(read_body(), *OK)
        length = [("Content-Length", "1000000")]
        async with await hub.open(CHAT, prompt(6000)[:-2], headers=length) as wire:
            # a second more for each 16 KiB that have come
            response = await wire.read_response()
        assert response.status == 408
        assert code_of(response) == "body_timeout"
        await worker.idle()
        assert not worker.requests[0].complete


@pytest.mark.parametrize("length", [100, LARGE])
async def test_invalid_chunks_are_a_bad_request(length: int) -> None:
    """At once, also where a worker has a part of the body already."""
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(), *OK)
        body = prompt(length)[:-1]
        async with await post_chunked(hub, body, end=b"what?\r\n") as wire:
            response = await wire.read_response()
        assert response.status == 400
        await worker.idle()
        assert not any(request.complete for request in worker.requests)


# --- Workers that do not wait for the end -----------------------------------------


@contextlib.asynccontextmanager
async def half_sent(hub: RunningHub) -> AsyncIterator[Wire]:
    """A client that has sent a part of a large body, and sends no more."""
    length = [("Content-Length", "10000000")]
    async with await hub.open(CHAT, prompt(100_000)[:-2], headers=length) as wire:
        yield wire


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (head(413, [("Content-Length", "0"), ("Connection", "close")]), 413, "reason"),
        (error_reply(413, "too large"), 413, "too large"),
        (error_reply(400, "no such thing"), 400, "no such thing"),
        (error_reply(500, "out of memory"), 500, "out of memory"),
    ],
)
async def test_a_refusal_does_not_wait_for_the_rest_of_the_body(
    reply: bytes, status: int, text: str
) -> None:
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(50_000), send(reply), expect_eof())
        async with half_sent(hub) as wire:
            response = await wire.read_response()
        assert response.status == status
        assert text in response.json()["error"]["message"]
        await worker.idle()
        [record] = hub.hub.registry.workers
        assert record.in_flight == 0
        assert not record.in_doubt


async def test_an_answer_does_not_wait_for_the_rest_of_the_body() -> None:
    """Odd, but allowed; its connection is not used again."""
    reply = head(200, [("Content-Length", "2"), ("Connection", "close")]) + b"{}"
    async with a_worker() as worker, running(worker) as hub:
        worker.script(read_body(50_000), send(reply), expect_eof())
        async with half_sent(hub) as wire:
            response = await wire.read_response()
        assert (response.status, response.body) == (200, b"{}")
        await worker.idle()


async def test_the_first_event_has_no_deadline_while_the_client_sends() -> None:
    """It is the client that is slow then."""
    async with (
        a_worker() as worker,
        running(worker, clock=Clock(), timeouts__first_token=1) as hub,
    ):
        worker.script(read_body(), *OK)
        body = prompt(LARGE)
        async with await hub.open(
            CHAT, body[:-50], headers=[("Content-Length", str(len(body)))]
        ) as wire:
            await worker.received()
            hub.pass_time(3600)
            await wire.send(body[-50:])
            assert (await wire.read_response()).status == 200


async def test_the_first_event_has_a_deadline_from_the_end_of_the_body() -> None:
    async with (
        a_worker() as worker,
        running(worker, clock=Clock()) as hub,
    ):
        worker.script(read_body(), notify("read"), expect_eof())
        asking = asyncio.create_task(post(hub, prompt(LARGE)), name="fake client")
        await worker.reached("read")
        [exchange] = hub.hub.proxy.running
        await until(lambda: exchange.waiting_since < math.inf)
        hub.pass_time(3600)
        response = await asking
        assert response.status == 504
        assert code_of(response) == "worker_timeout"
        assert worker.requests[0].complete


async def test_a_streamed_body_is_not_sent_twice() -> None:
    """So it gets a fresh connection, which cannot be stale."""
    async with a_worker() as worker, running(worker) as hub:
        assert (await hub.post(CHAT, {"messages": []})).status == 200
        worker.script(read_body(), close())
        response = await post(hub, prompt(LARGE))
        assert response.status == 502
        assert [request.reused for request in worker.requests] == [False, False]
        [record] = hub.hub.registry.workers
        assert record.state is WorkerState.READY


# --- Workers that cannot be reached -----------------------------------------------


@contextlib.asynccontextmanager
async def unreachable(way: str) -> AsyncIterator[str]:
    """The address of a worker that takes no connection, or no TLS."""
    if way == "no answer":
        with full_backlog() as url:
            yield url
        return
    async with ScriptedWorker(up=way == "no TLS") as worker:
        yield {
            "refused": worker.url,
            "no such name": f"http://no-such-name.invalid:{worker.port}",
            "no TLS": f"https://{worker.name}",
        }[way]
        worker.violations.clear()  # a TLS hello is no request


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("way", ["refused", "no such name", "no answer", "no TLS"])
async def test_a_large_body_goes_elsewhere_if_its_worker_cannot_be_reached(
    way: str, chunked: bool
) -> None:
    """Nothing of it has been consumed, so nothing is lost."""
    quiet = {"health__interval": 3600, "health__recheck": 3600}
    async with (
        unreachable(way) as url,
        a_worker() as good,
        running_hub(
            url,
            good,
            limits__replay_window=WINDOW,
            limits__model_window=4 * WINDOW,
            timeouts__connect=0.1,
            breaker__ramp=0,
            models__aliases={"an-alias": "tiny"},
            health__timeout=3600,
            ready=way != "no answer",  # for which the first ping waits
            **quiet,
        ) as hub,
    ):
        hub.hub.balancer.policy = InOrder()
        [bad, _] = hub.hub.registry.workers
        bad.observe(Check.OK, "by the test", Description((Model("tiny"),)))
        good.script(read_body(), *OK)
        body = prompt(LARGE, before='"model":"an-alias",')
        response = await post(hub, body, chunked=chunked)
        assert response.status == 200
        assert response.header("x-gollama-attempts") == "2"
        [request] = good.requests
        sent = prompt(LARGE, before='"model":"tiny",')
        assert request.body == sent
        reported = None if chunked else str(len(sent))
        assert request.header("content-length") == reported
