"""The hub's own requests: one connection each, bounded in time and in size."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from gollama_proxy import __version__
from gollama_proxy.upstream.probe import PIECE, FetchError, Reply, fetch
from tests.fakes.authority import Authority
from tests.fakes.replies import chunk, head, json_reply, last_chunk
from tests.fakes.script import (
    Script,
    answer,
    close,
    expect_eof,
    flood,
    not_read_body,
    read_body,
    reset,
    send,
    stall,
)
from tests.fakes.waiting import DEADLINE
from tests.fakes.worker import ScriptedWorker, full_backlog
from tests.upstream.test_probe import target_of

ASKED = "/tokenize"  # not a control route: what is asked is in `worker.requests`
LIMIT = 1000
# What the kernel may hold of a flood when the hub has closed the connection already.
IN_SOCKETS = 8 << 20


async def ask(
    worker: ScriptedWorker,
    body: bytes | None = b"{}",
    *,
    limit: int = LIMIT,
    timeout: float = DEADLINE,
) -> Reply:
    target = target_of(worker.url)
    return await fetch(target, ASKED, body, limit=limit, timeout=timeout)


async def asked(*script: Any, limit: int = LIMIT) -> Reply:
    """Return the reply of a worker that plays this script; it is left without one."""
    async with ScriptedWorker() as worker:
        worker.script(*script)
        reply = await ask(worker, limit=limit)
        await worker.idle()
        return reply


async def failure(*script: Any, **options: Any) -> FetchError:
    async with ScriptedWorker() as worker:
        worker.script(*script)
        with pytest.raises(FetchError) as info:
            await ask(worker, **options)
        await worker.idle()
        return info.value


# --- The request ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "method", "more"),
    [
        (None, "GET", []),
        (b"{}", "POST", ["Content-Type: application/json", "Content-Length: 2"]),
    ],
)
async def test_the_head_of_a_request(
    body: bytes | None, method: str, more: list[str]
) -> None:
    async with ScriptedWorker() as worker:
        target = target_of(worker.url + "/llama", "sk-1")
        await fetch(target, ASKED, body, limit=LIMIT, timeout=DEADLINE)
        request = await worker.received()
    assert request.head.decode().split("\r\n") == [
        f"{method} /llama/tokenize HTTP/1.1",
        f"Host: {worker.name}",
        f"User-Agent: gollama-proxy/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
        "Authorization: Bearer sk-1",
        *more,
        "",
        "",
    ]
    assert request.body == (body or b"")


@contextlib.contextmanager
def turns_of_others() -> Iterator[Iterator[int]]:
    """Let another task run meanwhile; the next number counts its turns."""
    turns = itertools.count()

    async def take_turns() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    other = asyncio.create_task(take_turns())
    yield turns
    other.cancel()


async def test_a_large_body_leaves_others_their_turns() -> None:
    body = bytes(range(256)) * (64 * PIECE // 256)
    async with ScriptedWorker(keep_body=len(body)) as worker:
        worker.script(*answer({}))
        with turns_of_others() as turns:
            reply = await ask(worker, body)
        assert worker.requests[0].body == body
    assert reply.status == 200
    assert next(turns) > len(body) // PIECE


@pytest.mark.parametrize("reads", [True, False])
async def test_an_answer_ends_the_sending_of_a_body(reads: bool) -> None:
    """A server that refuses it need not read all of it."""
    refusal = send(json_reply({"error": "too large"}, 413))
    then = [] if reads else [not_read_body()]
    async with ScriptedWorker(receive_buffer=4096) as worker:
        worker.script(read_body(1000), *then, refusal, stall())
        reply = await ask(worker, bytes(32 << 20))
        assert reply.status == 413
        assert not worker.requests[0].complete


# --- The answer -------------------------------------------------------------------

CHUNKED = head(200, [("Transfer-Encoding", "chunked")])


@pytest.mark.parametrize(
    "script",
    [
        (send(head(200, [("Content-Length", "5")]) + b"hello"),),
        (send(CHUNKED + chunk(b"hel") + chunk(b"lo") + last_chunk()),),
        (send(CHUNKED + chunk(b"hel")), send(chunk(b"lo")), send(last_chunk())),
        (send(head(200) + b"hello"), close()),
        (send(head(100) + head(200, [("Content-Length", "5")]) + b"hello"),),
        (send(head(200, [("Content-Length", "5")]) + b"hello, and more"),),
    ],
    ids=["length", "chunks", "reads", "close", "100", "behind"],
)
async def test_a_body_is_read_whole(script: Script) -> None:
    assert await asked(*script) == Reply(200, b"hello")


async def test_a_redirection_is_not_followed() -> None:
    async with ScriptedWorker() as worker:
        elsewhere = [("Location", f"{worker.url}/props"), ("Content-Length", "0")]
        worker.script(send(head(302, elsewhere)))
        assert await ask(worker) == Reply(302, b"")
        assert worker.connections == 1


@pytest.mark.parametrize("status", [204, 304, 400, 404, 500, 503])
async def test_a_bad_status_is_an_answer(status: int) -> None:
    fields = [] if status in (204, 304) else [("Content-Length", "0")]
    assert await asked(send(head(status, fields))) == Reply(status, b"")


async def test_a_reply_shows_no_body() -> None:
    assert repr(Reply(200, b"secret")) == "<Reply 200, 6 bytes>"
    assert repr(Reply(200, b"", "too long")) == "<Reply 200, 0 bytes, too long>"


def packed(body: bytes, coding: str = "gzip") -> bytes:
    data = {"gzip": gzip.compress, "deflate": zlib.compress}[coding](body, 1)
    fields = [("Content-Encoding", coding), ("Content-Length", str(len(data)))]
    return head(200, fields) + data


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_compressed_body_is_unpacked(coding: str) -> None:
    assert await asked(send(packed(b"hello", coding))) == Reply(200, b"hello")


async def test_unpacking_leaves_others_their_turns() -> None:
    with turns_of_others() as turns:
        reply = await asked(send(packed(bytes(16 << 20))), limit=16 << 20)
    assert reply == Reply(200, bytes(16 << 20))
    assert next(turns) > (16 << 20) // (64 << 10)


@pytest.mark.parametrize(
    ("script", "flaw"),
    [
        ((send(head(200) + bytes(LIMIT + 1)), stall()), "more than 1000 bytes"),
        ((send(head(200)), flood(b"x" * 4096)), "more than 1000 bytes"),
        ((send(packed(bytes(LIMIT + 1))),), "more than 1000 bytes"),
        ((send(packed(bytes(4 << 20))),), "more than 1000 bytes"),
        (
            (send(packed(b"hello").replace(b"gzip", b"br")),),
            "with an unknown content coding",
        ),
        (
            (send(packed(b"hello").replace(b"gzip", b"deflate")),),
            "with data that are not in their content coding",
        ),
        (
            (
                send(head(200, [("Content-Encoding", "gzip")])),
                send(gzip.compress(b"hello")[:-4]),
                close(),
            ),
            "with data that end in the middle of their content coding",
        ),
    ],
)
async def test_a_body_that_cannot_be_read_is_empty(script: Script, flaw: str) -> None:
    assert await asked(*script) == Reply(200, b"", flaw)


async def test_a_body_of_the_limit_is_read() -> None:
    body = bytes(LIMIT)
    assert await asked(send(head(200) + body), close()) == Reply(200, body)
    assert await asked(send(packed(body))) == Reply(200, body)


# --- What is no answer ------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ((close(),), "connection closed by the worker"),
        ((reset(),), "[Errno 104] Connection reset by peer"),
        ((send(b"garbage\r\n\r\n"), close()), "sent something that is not HTTP"),
        ((send(bytes(100)), close()), "sent something that is not HTTP"),
        (
            (send(b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"),),
            "sent something that is not HTTP",
        ),
        (
            (send(head(101, [("Upgrade", "h2c"), ("Connection", "upgrade")])),),
            "sent something that is not HTTP",
        ),
        (
            (send(head(200, [("Content-Length", "9")]) + b"{}"), close()),
            "its answer broke off",
        ),
        ((send(CHUNKED + chunk(b"{}")), reset()), "its answer broke off"),
    ],
)
async def test_the_reason_why_no_answer_came(script: Script, reason: str) -> None:
    error = await failure(*script)
    assert (str(error), error.refused) == (reason, False)


@pytest.mark.parametrize(
    "script",
    [
        (flood(head(100) * 50),),
        (send(b"HTTP/1.1 200 OK\r\n"), flood(b"X: %b\r\n" % bytes(900))),
        (send(b"HTTP/1.1 200 OK\r\n"), flood(b"X: 1\r\n" * 50)),
        (send(CHUNKED), flood(b"1;%b\r\nx\r\n" % (b"x" * 60_000))),
        (send(CHUNKED + chunk(b"{}") + b"0\r\n"), flood(b"X: %b\r\n" % (b"x" * 900))),
    ],
    ids=["interim answers", "long headers", "headers", "extensions", "trailers"],
)
async def test_a_flood_is_no_answer(script: Script) -> None:
    async with ScriptedWorker() as worker:
        worker.script(*script)
        with pytest.raises(FetchError, match="sent something that is not HTTP"):
            await ask(worker)
        await worker.idle()
        assert worker.requests[0].sent < IN_SOCKETS


def flood_with_interim_answers(listener: socket.socket) -> None:
    """Be a worker faster than any event loop, until the hub closes the connection."""
    peer, _ = listener.accept()
    with peer, contextlib.suppress(OSError):
        peer.recv(1000)
        while True:
            peer.sendall(head(100) * 10_000)


async def test_a_flood_of_interim_answers_is_ended_at_once() -> None:
    """However fast they come, and however many of them one read brings."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = target_of(f"http://127.0.0.1:{listener.getsockname()[1]}")
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(flood_with_interim_answers, listener))
            began = loop.time()
            with pytest.raises(FetchError, match="sent something that is not HTTP"):
                await fetch(target, "/health", limit=LIMIT, timeout=DEADLINE)
            assert loop.time() - began < DEADLINE / 2


@pytest.mark.parametrize(
    "script",
    [
        (),
        (send(b"HTTP/1.1 200 OK\r\n"),),
        (send(head(200, [("Content-Length", "9")]) + b"{}"),),
    ],
    ids=["nothing", "head", "body"],
)
async def test_the_time_limit_is_for_all_of_it(script: Script) -> None:
    error = await failure(*script, expect_eof(), timeout=0.1)
    assert (str(error), error.refused) == ("no answer within 0.1 s", False)


async def test_the_time_limit_is_for_the_sending_too() -> None:
    async with ScriptedWorker(receive_buffer=4096) as worker:
        worker.script(read_body(1000), not_read_body(), stall())
        with pytest.raises(FetchError, match=r"^no answer within 0.2 s$"):
            await ask(worker, bytes(32 << 20), timeout=0.2)


async def test_the_time_limit_is_for_the_connection_too() -> None:
    with full_backlog() as url:
        with pytest.raises(FetchError) as info:
            await fetch(target_of(url), "/health", limit=LIMIT, timeout=0.05)
    assert str(info.value) == "no answer within 0.05 s"


async def test_a_closed_port_is_a_separate_reason() -> None:
    async with ScriptedWorker(up=False) as worker:
        with pytest.raises(FetchError) as info:
            await ask(worker)
    assert (str(info.value), info.value.refused) == ("connection refused", True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name not known"), "Name not known"),
        (OSError(113, "No route to host"), "no route to host"),
        (TimeoutError(110, "Connection timed out"), "connection timed out"),
        (OSError(), "cannot be reached"),
    ],
    ids=["name", "route", "timeout", "unknown"],
)
async def test_the_reason_why_a_worker_is_not_reached(
    error: OSError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", getaddrinfo)
    with pytest.raises(FetchError) as info:
        await fetch(target_of("http://gpu.lan"), "/", limit=LIMIT, timeout=DEADLINE)
    assert (str(info.value), info.value.refused) == (reason, False)


# --- TLS --------------------------------------------------------------------------


async def test_a_worker_behind_tls(authority: Authority) -> None:
    async with ScriptedWorker(tls=authority.server(authority.issue())) as worker:
        with pytest.raises(FetchError) as info:
            await ask(worker)
        assert str(info.value).startswith("TLS: certificate not accepted: ")
        worker.violations.clear()


async def test_a_worker_without_tls_where_it_is_expected() -> None:
    async with ScriptedWorker() as worker:
        target = target_of(worker.url.replace("http:", "https:"))
        with pytest.raises(FetchError, match=r"^TLS: wrong version number$"):
            await fetch(target, ASKED, limit=LIMIT, timeout=DEADLINE)
        worker.violations.clear()


# --- Cancellation -----------------------------------------------------------------


async def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    async with ScriptedWorker() as worker:
        worker.script(expect_eof())
        asking = asyncio.create_task(ask(worker))
        await worker.received()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await worker.idle()
