"""Hop-by-hop headers end at the hub, and the hub's own headers cannot be removed.

Which header is of which kind is in tests/wire/test_headers.py; here is what arrives.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.asks import CHAT, STREAM, WHOLE
from tests.fakes.cases import case
from tests.fakes.client import Response
from tests.fakes.hub import RunningHub, running_hub
from tests.fakes.replies import (
    chat_completion,
    chunk,
    done,
    finish,
    head,
    json_reply,
    last_chunk,
    role,
    token,
)
from tests.fakes.script import Script, answer, close, send, stall
from tests.fakes.worker import ScriptedWorker

EVENTS = role() + token("a") + finish() + done()
Headers = list[tuple[str, str]]

# What the hub adds in each direction.
TO_WORKER = ["content-length", "content-type", "host", "user-agent"]
TO_CLIENT = [
    "date",
    "server",
    "x-gollama-attempts",
    "x-gollama-queue-ms",
    "x-gollama-worker",
    "x-request-id",
]


def named(*names: str) -> list[Headers]:
    """The ways to name headers in `Connection`."""
    listed = ", ".join(names)
    return [
        [("Connection", listed)],
        [("CONNECTION", listed.upper())],
        [("Connection", ""), ("Connection", listed)],  # golang/go#46313
        [("connection", "close"), ("Connection", listed.title())],
        [("Connection", f"{listed}, close"), ("Connection", "")],
        [("Connection", f",, {listed} ,")],
        [("Connection", listed.replace(" ", ""))],
        [("Connection", listed.replace(" ", "\t "))],
        [("Connection", name) for name in names],
    ]


# --- From a client to a worker ----------------------------------------------------


async def ask(hub: RunningHub, headers: Headers, body: Any = WHOLE) -> Response:
    response = await hub.post(CHAT, body, headers=headers)
    assert response.status == 200
    return response


@pytest.mark.parametrize("connection", named("accept", "traceparent"))
async def test_headers_named_by_a_client_stop_at_the_hub(connection: Headers) -> None:
    others = [("Accept", "text/event-stream"), ("Traceparent", "00-1-1-01")]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await ask(hub, [*others, ("Accept-Language", "de"), *connection])
        await ask(hub, [*connection, *others, ("Accept-Language", "de")])
        for request in worker.requests:
            names = sorted(name for name, _ in request.headers)
            assert names == sorted([*TO_WORKER, "accept-language"])


@pytest.mark.parametrize(
    "connection", named("host", "content-length", "content-type", "user-agent")
)
async def test_a_client_cannot_remove_the_hubs_headers(
    connection: Headers,
) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await ask(hub, connection)
        [request] = worker.requests
    assert sorted(name for name, _ in request.headers) == TO_WORKER
    assert request.header("host") == worker.name
    assert request.header("content-type") == "application/json"
    assert request.header("content-length") == str(len(request.body))


@pytest.mark.parametrize("connection", named("x-request-id", "server", "date"))
async def test_a_client_cannot_remove_the_headers_of_its_answer(
    connection: Headers,
) -> None:
    """golang/go#50580"""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        response = await ask(hub, [*connection, ("X-Request-Id", "mine")])
    assert {name for name, _ in response.headers} >= set(TO_CLIENT)
    assert response.header("x-request-id") == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic YTpi"),
        ("Proxy-Authenticate", "Basic"),
        ("TE", "trailers"),
        ("Trailer", "X-Digest"),
        ("Alt-Svc", 'h2=":443"'),
        ("Cookie", "a=b"),
        ("Api-Key", "sk"),
        ("X-Conversation-Id", "conv-1"),
        ("X-Forwarded-For", "10.0.0.1"),
        ("X-Real-Ip", "10.0.0.1"),
        ("Forwarded", "for=10.0.0.1"),
        ("Via", "1.1 a"),
        ("Origin", "http://a"),
        ("Referer", "http://a/"),
        ("Range", "bytes=0-1"),
        ("If-None-Match", "*"),
        ("Content_Type", "text/plain"),
        ("X-Request-Id", "mine"),
        ("X-Gollama-Worker", "evil"),
        ("Access-Control-Request-Method", "PURGE"),
        ("X-Anything", "at all"),
    ],
)
async def test_unlisted_headers_reach_no_worker(name: str, value: str) -> None:
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        await ask(hub, [(name, value)])
        [request] = worker.requests
    assert sorted(name for name, _ in request.headers) == TO_WORKER
    assert value.encode() not in request.head


async def test_a_dangerous_request_id_is_not_returned() -> None:
    async with (
        ScriptedWorker() as worker,
        running_hub(worker) as hub,
    ):
        for value in [
            "a b",
            "a" * 65,
            "\xe9",
            "",
            "a\tb",
            '"',
            "<x>",
            "a,b",
            "../x",
            "%00",
        ]:
            for body in [WHOLE, STREAM, {"messages": 1}]:
                with case((value, body)):
                    response = await hub.post(
                        CHAT, body, headers=[("X-Request-Id", value)]
                    )
                    given = response.header("x-request-id") or ""
                    assert len(given) == 16
                    assert given.isalnum()


# --- From a worker to a client ----------------------------------------------------

# What a worker does not decide, or what belongs to its hop.
STRIPPED = [
    ("Server", "llama.cpp"),
    ("Set-Cookie", "a=b"),
    ("Set-Cookie2", "a=b"),
    ("Strict-Transport-Security", "max-age=1"),
    ("Clear-Site-Data", '"*"'),
    ("Refresh", "0; url=http://evil/"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Credentials", "true"),
    ("access-control-expose-headers", "*"),
    ("WWW-Authenticate", "Basic"),
    ("Keep-Alive", "timeout=5"),
    ("Proxy-Authenticate", "Basic"),
    ("Proxy-Connection", "close"),
    ("TE", "trailers"),
    ("Trailer", "X-Digest"),
    ("Upgrade", "h2c"),
    ("Alt-Svc", 'h2=":443"'),
    ("X-Request-Id", "evil"),
    ("X-Gollama-Worker", "evil"),
    ("X-Gollama-Anything", "evil"),
    ("X-RateLimit-Limit-Requests", "evil"),
    ("Date", "evil"),
]
BODY = b'{"error":{}}'


def answers(headers: Headers) -> dict[str, Script]:
    """An answer of each kind, with these headers."""
    length = [("Content-Type", "application/json"), ("Content-Length", f"{len(BODY)}")]
    stream = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    body = chunk(EVENTS) + last_chunk()
    return {
        "whole": (send(head(200, [*length, *headers]) + BODY), close()),
        "an error": (send(head(404, [*length, *headers]) + BODY), close()),
        "a stream": (send(head(200, [*stream, *headers]) + body), close()),
    }


@pytest.mark.parametrize("kind", answers([]))
async def test_a_worker_cannot_set_headers_of_the_hub(kind: str) -> None:
    passing = [("X-Model-Hash", "abc"), ("Vary", "Accept")]
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        worker.default(*answers([*STRIPPED, *passing])[kind])
        response = await hub.post(CHAT, STREAM if kind == "a stream" else WHOLE)
    assert response.body == (EVENTS if kind == "a stream" else BODY)
    for name in TO_CLIENT:
        assert response.header(name), name
    assert response.header("server") == "gollama-proxy"
    assert response.header("x-gollama-worker") == worker.name
    assert response.header("x-model-hash") == "abc"
    assert not {value for _, value in STRIPPED} & {v for _, v in response.headers}
    left = {name for name, _ in response.headers} - set(TO_CLIENT)
    assert left <= {
        "cache-control",
        "connection",
        "content-length",
        "content-type",
        "transfer-encoding",
        "vary",
        "x-accel-buffering",
        "x-model-hash",
    }


@pytest.mark.parametrize("kind", answers([]))
@pytest.mark.parametrize("connection", named("x-note", *TO_CLIENT, "content-length"))
async def test_headers_named_by_a_worker_stop_at_the_hub(
    connection: Headers, kind: str
) -> None:
    note = ("X-Note", "1")
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for headers in ([note, *connection], [*connection, note]):
            worker.default(*answers(headers)[kind])
            response = await hub.post(CHAT, STREAM if kind == "a stream" else WHOLE)
            assert response.body == (EVENTS if kind == "a stream" else BODY)
            assert response.header("x-note") is None
            for name in TO_CLIENT:
                assert response.header(name), name


@pytest.mark.parametrize("body", [WHOLE, STREAM])
async def test_trailers_of_a_worker_are_dropped(body: Any) -> None:
    kind = "text/event-stream" if body is STREAM else "application/json"
    headers = [("Content-Type", kind), ("Transfer-Encoding", "chunked")]
    sent = EVENTS if body is STREAM else BODY
    trailers = b"0\r\nSet-Cookie: canary\r\nContent-Length: 3\r\n\r\n"
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        for _ in range(2):  # nor is it one of the next answer
            worker.script(send(head(200, headers) + chunk(sent) + trailers))
            async with await hub.open(CHAT, body) as wire:
                ending = await wire.read_to_end()
            assert ending.response.body == sent
            assert b"canary" not in ending.raw


# --- What is no answer ------------------------------------------------------------

LOCATION = "http://{}/v1/chat/completions"


@pytest.mark.parametrize("body", [WHOLE, STREAM])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "status", [101, 102, 103, 300, 301, 302, 303, 304, 305, 307, 308]
)
async def test_an_interim_answer_or_a_redirect_is_a_bad_gateway(
    status: int, keep: bool, body: Any
) -> None:
    """And it is not followed."""
    async with (
        ScriptedWorker("tiny") as worker,
        ScriptedWorker("other") as elsewhere,
        running_hub(worker) as hub,
    ):
        headers = [
            ("Location", LOCATION.format(elsewhere.name)),
            ("Upgrade", "h2c"),
            ("Connection", "keep-alive" if keep else "upgrade"),
        ]
        headers += [("Content-Length", "0")] * (status >= 300)
        behind = json_reply(chat_completion("evil")) if status < 200 else b""
        worker.script(send(head(status, headers) + behind), stall())
        response = await hub.post(CHAT, body)
        assert response.status == 502
        assert response.json()["error"]["code"] == "worker_bad_response"
        assert response.header("location") is None
        assert response.header("upgrade") is None
        assert b"evil" not in response.body
        await worker.idle()  # its connection is not used again
        assert len(worker.requests) == 1
        assert elsewhere.connections == 0


@pytest.mark.parametrize("times", [1, 3])
async def test_a_workers_100_continue_is_skipped(times: int) -> None:
    """The one that a worker may send unasked (RFC 9110, 15.2); no client sees it."""
    # The client is to see what became of the second one: it is not tried again.
    async with (
        ScriptedWorker() as worker,
        running_hub(worker, retry__attempts=1) as hub,
    ):
        good = answer(chat_completion("good"))
        worker.script(*[send(head(100, [("X-Note", "1")]))] * times, *good)
        async with await hub.open(CHAT, WHOLE) as wire:
            ending = await wire.read_to_end()
        assert ending.response.status == 200
        assert b"100 Continue" not in ending.raw
        assert ending.response.header("x-note") is None
        worker.script(*[send(head(100))] * times, close())
        response = await hub.post(CHAT, WHOLE)
        assert response.status == 502
        assert response.json()["error"]["code"] == "worker_connection_lost"
