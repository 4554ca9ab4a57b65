"""Every wrong request hears what is wrong with it, and no worker ever sees it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from gollama_proxy.wire.schema import ENDPOINTS
from tests.fakes.asks import CHAT, JSON_ROUTES
from tests.fakes.cases import case
from tests.fakes.client import Response, request_head
from tests.fakes.hub import RunningHub, mint, running_hub
from tests.fakes.worker import ScriptedWorker

GOOD = {"model": "qwen", "messages": [{"role": "user", "content": "hello"}]}
BODY = json.dumps(GOOD).encode()
WINDOW = 4096  # the replay window of these tests; a body may have 64 KiB
PADDING = b'"padding":"' + b"x" * 2 * WINDOW + b'",'

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    417: "invalid_request_error",
    431: "invalid_request_error",
    501: "server_error",
    505: "server_error",
}


@contextlib.asynccontextmanager
async def hub_of_two_models(**settings: Any) -> AsyncIterator[RunningHub]:
    """Run a hub with workers that must receive nothing."""
    settings = {
        "limits__body": 65_536,
        "limits__replay_window": WINDOW,
        "limits__model_window": 32_768,
        **settings,
    }
    async with (
        ScriptedWorker("qwen") as one,
        ScriptedWorker("phi") as two,
        running_hub(one, two, **settings) as hub,
    ):
        yield hub
        for worker in (one, two):
            assert worker.requests == []
            # Those of the health checks are the only connections.
            assert worker.connections <= len(worker.control)


def check(response: Response, status: int, code: str, param: str | None = None) -> str:
    """Check that it is an error of the hub in the shape of its API; give its text."""
    reported = response.json()
    anthropic = reported.pop("type", None) == "error"  # see test_error_shapes.py
    [(name, error)] = reported.items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert (response.status, error["code"]) == (status, code), error
    assert anthropic or error["type"] == TYPES[status]
    assert error["param"] == param
    assert error["message"]
    assert error["message"].isprintable()
    assert response.values("server") == ["gollama-proxy"]
    assert response.header("content-type") == "application/json"
    assert response.header("content-length") == str(len(response.body))
    assert (response.header("www-authenticate") is not None) == (status == 401)
    return str(error["message"])


def chunked(body: bytes, size: int = 1 << 20) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def post_head(headers: Iterable[tuple[str, str]] = (), path: str = CHAT) -> bytes:
    return request_head("POST", path, mint(sub="alice"), headers)


async def ask(hub: RunningHub, sent: bytes) -> Response:
    """Send bytes as they are and return the answer to them."""
    async with await hub.wire() as wire:
        await wire.send(sent)
        return await wire.read_response()


# --- The body ---------------------------------------------------------------------

BODIES: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "invalid_json", None),
    "blank": (b" \r\n\t", "invalid_json", None),
    "text": (b"hello", "invalid_json", None),
    "a form": (b"model=qwen&prompt=hello", "invalid_json", None),
    "an array": (b"[" + BODY + b"]", "invalid_json", None),
    "a string": (b'"hello"', "invalid_json", None),
    "a number": (b"7", "invalid_json", None),
    "null": (b"null", "invalid_json", None),
    "cut off": (BODY[:-1], "invalid_json", None),
    "cut off in a string": (b'{"model":"qwen","a":"', "invalid_json", None),
    "something behind": (BODY + b"x", "invalid_json", None),
    "two objects": (BODY + BODY, "invalid_json", None),
    "a comma too many": (BODY[:-1] + b",}", "invalid_json", None),
    "single quotes": (BODY.replace(b'"', b"'"), "invalid_json", None),
    "a bare key": (b'{model:"qwen"}', "invalid_json", None),
    "a comment": (b'{"model":"qwen"/* */}', "invalid_json", None),
    "NaN": (b'{"model":"qwen","temperature":NaN}', "invalid_json", None),
    "a line end in a string": (b'{"model":"qwen","a":"\n"}', "invalid_json", None),
    "an unknown escape": (rb'{"model":"qwen","a":"\x00"}', "invalid_json", None),
    "half a surrogate as model": (rb'{"model":"\ud83d"}', "invalid_json", None),
    "UTF-16": (BODY.decode().encode("utf-16"), "invalid_json", None),
    "no UTF-8": (b'{"model":"qwen","a":"\xff"}', "invalid_json", None),
    "overlong UTF-8": (b'{"model":"qwen","a":"\xc0\xaf"}', "invalid_json", None),
    "cut UTF-8": (b'{"model":"qwen"}\xe2\x82', "invalid_json", None),
    "a surrogate in UTF-8": (
        b'{"model":"qwen","a":"\xed\xa0\xbd"}',
        "invalid_json",
        None,
    ),
    "a depth bomb": (
        b'{"model":"qwen","a":' + b"[" * 1000 + b"]" * 1000 + b"}",
        "invalid_json",
        None,
    ),
    "a depth bomb of objects": (
        b'{"model":"qwen","a":' + b'{"a":' * 500 + b"1" + b"}" * 501,
        "invalid_json",
        None,
    ),
    "a depth bomb that does not end": (b'{"a":' * 800, "invalid_json", None),
    "a large depth bomb": (
        b'{"model":"qwen","a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        "invalid_json",
        None,
    ),
    "a depth bomb before the model": (
        b"{" + PADDING + b'"a":' + b"[" * 1000 + b'],"model":"qwen"}',
        "invalid_json",
        None,
    ),
    "model twice": (b'{"model":"qwen","model":"phi"}', "invalid_json", None),
    "model twice, the same": (b'{"model":"qwen","model":"qwen"}', "invalid_json", None),
    "model twice, once escaped": (
        rb'{"model":"qwen","mod\u0065l":"phi"}',
        "invalid_json",
        None,
    ),
    "model twice, both escaped": (
        rb'{"\u006dodel":"qwen","mode\u006C":"phi"}',
        "invalid_json",
        None,
    ),
    "model twice, the second beyond the window": (
        b"{" + PADDING + b'"model":"qwen","model":"phi"}',
        "invalid_json",
        None,
    ),
    "messages twice": (
        b'{"model":"qwen","messages":[],"messages":[]}',
        "invalid_json",
        None,
    ),
    "stream twice": (
        b'{"model":"qwen","stream":false,"stream":true}',
        "invalid_json",
        None,
    ),
    "a key that does not end": (b'{"' + b"x" * 10_000, "invalid_json", None),
    "a model that does not end": (b'{"model":"' + b"x" * 10_000, "invalid_json", None),
    "model a number": (b'{"model":7}', "invalid_value", "model"),
    "model an array": (b'{"model":["qwen"]}', "invalid_value", "model"),
    "model an object": (b'{"model":{"id":"qwen"}}', "invalid_value", "model"),
    "model true": (b'{"model":true}', "invalid_value", "model"),
    "stream a string": (b'{"model":"qwen","stream":"yes"}', "invalid_value", "stream"),
    "stream a number": (b'{"model":"qwen","stream":1}', "invalid_value", "stream"),
    "messages a string": (
        b'{"model":"qwen","messages":"hello"}',
        "invalid_value",
        "messages",
    ),
    "messages an object": (
        b'{"model":"qwen","messages":{}}',
        "invalid_value",
        "messages",
    ),
    "max_tokens a string": (
        b'{"model":"qwen","max_tokens":"7"}',
        "invalid_value",
        "max_tokens",
    ),
    "max_tokens an array": (
        b'{"model":"qwen","max_tokens":[7]}',
        "invalid_value",
        "max_tokens",
    ),
    "max_completion_tokens true": (
        b'{"model":"qwen","max_completion_tokens":true}',
        "invalid_value",
        "max_completion_tokens",
    ),
    "no model": (b'{"messages":[]}', "model_missing", "model"),
    "no model in nothing": (b"{}", "model_missing", "model"),
    "model null": (b'{"model":null,"messages":[]}', "model_missing", "model"),
    "model in a string only": (
        rb'{"a":"\"model\":\"qwen\""}',
        "model_missing",
        "model",
    ),
    "model of something else": (b'{"a":{"model":"qwen"}}', "model_missing", "model"),
    "model in another case": (b'{"Model":"qwen"}', "model_missing", "model"),
}
UNKNOWN = ["llama", "", "QWEN", "qwen ", "qwen\u0000", "../qwen", "qwen*", "x" * 4000]


async def test_an_invalid_body_is_rejected_with_a_reason() -> None:
    async with hub_of_two_models() as hub:
        for name, framing in [
            (name, framing)
            for name, (body, _, _) in BODIES.items()
            for framing in ("length", "chunks", "bytes")
            if framing != "bytes" or len(body) < WINDOW
        ]:
            with case((name, framing)):
                body, code, param = BODIES[name]
                if framing == "length":
                    head = post_head([("Content-Length", str(len(body)))])
                    response = await ask(hub, head + body)
                else:
                    head = post_head([("Transfer-Encoding", "chunked")])
                    size = 1 if framing == "bytes" else 1000
                    response = await ask(hub, head + chunked(body, size))
                text = check(response, 400, code, param)
                if code == "model_missing":
                    assert "qwen" in text  # what there is to choose from
                else:
                    assert "hello" not in text


async def test_the_search_for_the_model_is_bounded() -> None:
    """A worker cannot be chosen without it, and the hub does not hoard bodies."""
    body = b'{"padding":"' + b"x" * (4 << 20) + b'","model":"qwen"}'
    limits = {"limits__body": 8 << 20, "limits__model_window": 8192}
    async with hub_of_two_models(**limits) as hub:
        response = await hub.post(CHAT, body)
        text = check(response, 400, "model_missing", "model")
        assert "first 8192 bytes" in text


async def test_a_model_without_a_worker_is_not_found() -> None:
    async with hub_of_two_models() as hub:
        for model in UNKNOWN:
            with case(model):
                response = await hub.post(CHAT, {**GOOD, "model": model})
                text = check(response, 404, "model_not_found", "model")
                assert "phi, qwen" in text


async def test_a_model_that_the_token_does_not_allow_is_refused() -> None:
    async with hub_of_two_models() as hub:
        token = hub.token(models=["phi"])
        response = await hub.post(CHAT, GOOD, token)
        check(response, 403, "model_not_allowed", "model")
        response = await hub.post(CHAT, {"messages": []}, token)
        assert "qwen" not in check(response, 400, "model_missing", "model")


async def test_every_route_looks_at_its_body() -> None:
    async with hub_of_two_models() as hub:
        for path in JSON_ROUTES:
            with case(path):
                check(await hub.post(path, b"hello"), 400, "invalid_json")
                check(await hub.post(path, {}), 400, "model_missing", "model")
                check(await hub.post(path, {"model": 7}), 400, "invalid_value", "model")
                check(await hub.post(path, GOOD, None), 401, "invalid_api_key")
                response = await hub.get(path)
                check(
                    response,
                    405,
                    "method_not_allowed",
                    response.json()["error"]["param"],
                )
                assert response.header("allow") == "POST"


# --- The size of the body ---------------------------------------------------------


async def test_a_body_announced_as_too_large_is_not_awaited() -> None:
    async with hub_of_two_models() as hub:
        for length in ["65537", "1000000000", "99999999999999999", "000000065537"]:
            with case(length):
                response = await ask(hub, post_head([("Content-Length", length)]))
                assert "65536 bytes" in check(response, 413, "body_too_large")
                assert response.header("connection") == "close"


async def test_a_body_announced_as_too_large_is_rejected_even_if_it_is_sent() -> None:
    """Its sender reads the answer only when it has sent all: no reset before."""
    async with hub_of_two_models() as hub:
        response = await hub.post(CHAT, BODY[:-1] + b" " * (4 << 20) + b"}")
        check(response, 413, "body_too_large")


async def test_a_body_that_grows_too_large_is_cut_off() -> None:
    body = b'{"a":"' + b"x" * 65_536 + b'"}'
    async with hub_of_two_models(limits__model_window=1 << 20) as hub:
        head = post_head([("Transfer-Encoding", "chunked")])
        response = await ask(hub, head + chunked(body, 1000))
        check(response, 413, "body_too_large")


async def test_a_body_of_the_largest_size_is_not_too_large() -> None:
    body = b'{"model":"llama","a":"' + b"x" * (65_536 - 24) + b'"}'
    assert len(body) == 65_536
    async with hub_of_two_models() as hub:
        check(await hub.post(CHAT, body), 404, "model_not_found", "model")


# --- Beyond the window: a worker has a part of it already --------------------------


@pytest.mark.parametrize(
    ("rest", "code", "param"),
    [
        (b'"a":' + b"[" * 1000 + b"]" * 1000 + b"}", "invalid_json", None),
        (b'"model":"phi"}', "invalid_json", None),
        (rb'"mod\u0065l":"phi"}', "invalid_json", None),
        (b'"stream":"yes"}', "invalid_value", "stream"),
        (b'"messages":7}', "invalid_value", "messages"),
        (b'"a":"\xff"}', "invalid_json", None),
        (b'"a":1', "invalid_json", None),
        (b'"a":1}x', "invalid_json", None),
        (b'"a":"' + b"x" * 70_000 + b'"}', "body_too_large", None),
    ],
)
async def test_a_body_that_is_invalid_beyond_the_window_is_not_completed(
    rest: bytes, code: str, param: str | None
) -> None:
    """Its first part streams already, and the worker must not take it for a whole."""
    body = b'{"model":"qwen",' + PADDING + rest
    async with (
        ScriptedWorker("qwen") as worker,
        ScriptedWorker("phi") as other,
        running_hub(
            worker, other, limits__body=65_536, limits__replay_window=WINDOW
        ) as hub,
    ):
        head = post_head([("Transfer-Encoding", "chunked")])
        response = await ask(hub, head + chunked(body, 1000))
        check(response, 413 if code == "body_too_large" else 400, code, param)
        await worker.idle()
        assert other.requests == []
        assert [request.complete for request in worker.requests] in ([], [False])
        assert hub.hub.registry.workers[0].available


# --- The head ---------------------------------------------------------------------

HEADS: dict[str, tuple[list[tuple[str, str]], int, str]] = {
    "Transfer-Encoding: gzip, chunked": (
        [("Transfer-Encoding", "gzip, chunked")],
        501,
        "unsupported_transfer_encoding",
    ),
    "Transfer-Encoding: identity, chunked": (
        [("Transfer-Encoding", "identity, chunked")],
        501,
        "unsupported_transfer_encoding",
    ),
    "Transfer-Encoding: chunked, identity": (
        [("Transfer-Encoding", "chunked, identity")],
        400,
        "bad_request",
    ),
    "Transfer-Encoding: identity": (
        [("Transfer-Encoding", "identity")],
        400,
        "bad_request",
    ),
    "Transfer-Encoding: xchunked": (
        [("Transfer-Encoding", "xchunked")],
        400,
        "bad_request",
    ),
    "Transfer-Encoding twice": (
        [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
        400,
        "bad_request",
    ),
    "Transfer-Encoding beside Content-Length": (
        [("Content-Length", "5"), ("Transfer-Encoding", "chunked")],
        400,
        "bad_request",
    ),
    "Content-Length beside Transfer-Encoding": (
        [("Transfer-Encoding", "chunked"), ("Content-Length", "5")],
        400,
        "bad_request",
    ),
    "Content-Length twice": (
        [("Content-Length", "5"), ("Content-Length", "6")],
        400,
        "bad_request",
    ),
    "Content-Length twice, the same": (
        [("Content-Length", "5"), ("Content-Length", "5")],
        400,
        "bad_request",
    ),
    "Content-Length a list": ([("Content-Length", "5, 5")], 400, "bad_request"),
    "Content-Length signed": ([("Content-Length", "+5")], 400, "bad_request"),
    "Content-Length negative": ([("Content-Length", "-5")], 400, "bad_request"),
    "Content-Length hexadecimal": ([("Content-Length", "0x5")], 400, "bad_request"),
    "Content-Length beyond 64 bits": (
        [("Content-Length", "9" * 30)],
        400,
        "bad_request",
    ),
    "Content_Length": (
        [("Content-Length", "5"), ("Content_Length", "6")],
        400,
        "bad_request",
    ),
    "Transfer_Encoding": (
        [("Content-Length", "5"), ("Transfer_Encoding", "chunked")],
        400,
        "bad_request",
    ),
    "a Brotli body": (
        [("Content-Length", "5"), ("Content-Encoding", "br")],
        415,
        "unsupported_encoding",
    ),
    "a body of two codings": (
        [("Content-Length", "5"), ("Content-Encoding", "gzip, gzip")],
        415,
        "unsupported_encoding",
    ),
    "Expect: 200-maybe": (
        [("Content-Length", "5"), ("Expect", "200-maybe")],
        417,
        "expectation_failed",
    ),
    "two hosts": ([("Host", "hub"), ("Host", "other")], 400, "bad_request"),
    "a second Authorization": (
        [("Authorization", "Bearer x")],
        401,
        "invalid_api_key",
    ),
    "a head of 20 KiB": (
        [(f"X-{number}", "x" * 1000) for number in range(20)],
        431,
        "head_too_large",
    ),
    "a field of 20 KiB": ([("X", "x" * 20_000)], 431, "head_too_large"),
}


async def test_an_invalid_head_is_rejected_with_a_reason() -> None:
    """Above all one that two servers could read in two ways."""
    async with hub_of_two_models() as hub:
        for name in HEADS:
            with case(name):
                headers, status, code = HEADS[name]
                names = {name.lower() for name, _ in headers}
                body = b"hello" if "content-length" in names else b""
                if "transfer-encoding" in names:
                    body = chunked(b"hello")
                check(await ask(hub, post_head(headers) + body), status, code)


async def test_an_invalid_request_line_is_rejected_with_a_reason() -> None:
    async with hub_of_two_models() as hub:
        for line, status, code in [
            (f"POST {CHAT} HTTP/2.0", 505, "unsupported_http_version"),
            (f"POST {CHAT} HTTP/0.9", 505, "unsupported_http_version"),
            (f"POST {CHAT} HTTP/1.2", 400, "bad_request"),
            (f"POST {CHAT} HTTP/3", 400, "bad_request"),
            (f"POST {CHAT} http/1.1", 400, "bad_request"),
            (f"POST {CHAT}", 505, "unsupported_http_version"),  # as HTTP/0.9 had it
            (f"post {CHAT} HTTP/1.1", 400, "bad_request"),
            (f"BREW {CHAT} HTTP/1.1", 400, "bad_request"),
            (f"POST  {CHAT} x HTTP/1.1", 400, "bad_request"),
            (f"POST {CHAT}\t HTTP/1.1", 400, "bad_request"),
            (f"POST {CHAT}\x00 HTTP/1.1", 400, "bad_request"),
            (f"POST {CHAT}\xff HTTP/1.1", 400, "bad_request"),
            (f"POST /{'x' * 20_000} HTTP/1.1", 431, "head_too_large"),
            ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request"),
            ("PRI * HTTP/2.0\r\n\r\nSM", 400, "bad_request"),
            ("\x00\x01\x02\x03", 400, "bad_request"),
            ("hello", 400, "bad_request"),
            ("{}", 400, "bad_request"),
        ]:
            with case((line, status, code)):
                async with await hub.wire() as wire:
                    token = hub.token()
                    head = (
                        f"{line}\r\nHost: hub\r\nAuthorization: Bearer {token}\r\n\r\n"
                    )
                    await wire.send(head.encode("latin-1"))
                    check(await wire.read_response(), status, code)
                    await wire.read_eof()


async def test_a_malformed_field_is_rejected_with_a_reason() -> None:
    start = f"POST {CHAT} HTTP/1.1\r\nAuthorization: Bearer {mint(sub='a')}\r\n"
    async with hub_of_two_models() as hub:
        for fields in [
            b"",  # no Host
            b"Host: hub\r\nX : y\r\n",
            b"Host: hub\r\n: y\r\n",
            b"Host: hub\r\nX\r\n",
            b"Host: hub\r\nX: a\r\n b\r\n",
            b"Host: hub\r\nX: a\rb\r\n",
            b"Host: hub\nX: a\r\n",
            b"Host: hub\r\nX: \x00\r\n",
            b"Host: hub\r\nX: \x0b\r\n",
            b"Host: hub\r\nX Y: z\r\n",
            b"Host: hub\r\nTransfer-Encoding : chunked\r\n",
            b"Host: hub\r\nTransfer-Encoding: \x0bchunked\r\n",
        ]:
            with case(fields):
                async with await hub.wire() as wire:
                    await wire.send(start.encode() + fields + b"\r\n" + BODY)
                    check(await wire.read_response(), 400, "bad_request")
                    assert await wire.read_eof() == b""


async def test_a_body_with_invalid_framing_is_rejected_with_a_reason() -> None:
    async with hub_of_two_models() as hub:
        for framed in [
            b"zz\r\nhello\r\n",
            b"-5\r\nhello\r\n",
            b"+5\r\nhello\r\n",
            b"0x5\r\nhello\r\n",
            b"5 \r\nhello\r\n",
            b"5\nhello\n",
            b"5\r\nhello world\r\n",
            b"fffffffffffffffff\r\nhello\r\n",
            b"\r\nhello\r\n",
        ]:
            with case(framed):
                async with await hub.wire() as wire:
                    await wire.send(
                        post_head([("Transfer-Encoding", "chunked")]) + framed
                    )
                    check(await wire.read_response(), 400, "bad_request")
                    assert await wire.read_eof() == b""


SMUGGLED = request_head("POST", CHAT, mint(sub="alice")) + BODY
_LENGTH = ("Content-Length", str(len(SMUGGLED)))


async def test_the_body_of_an_invalid_request_is_not_read_as_a_request() -> None:
    async with hub_of_two_models() as hub:
        for carrier in [
            request_head(
                "POST",
                CHAT,
                None,
                [("Connection", "Upgrade"), ("Upgrade", "websocket"), _LENGTH],
            ),
            request_head(
                "POST",
                CHAT,
                None,
                [("Connection", "Upgrade"), ("Upgrade", "h2c"), _LENGTH],
            ),
            request_head("CONNECT", "hub:80", None, [_LENGTH]),
            request_head("GET", CHAT, None, [_LENGTH]),
            request_head("POST", CHAT, None, [_LENGTH, ("Content_Length", "0")]),
            request_head("POST", CHAT, None, [_LENGTH, ("Expect", "100-continue")]),
            request_head("POST", "/nowhere", None, [_LENGTH]),
        ]:
            with case(carrier):
                async with await hub.wire() as wire:
                    await wire.send(carrier + SMUGGLED)
                    assert (await wire.read_response()).status >= 400
                    # If the connection stays open, this is a separate request.
                    with contextlib.suppress(ConnectionError):
                        await wire.get("/livez", headers=[("Connection", "close")])
                    left = await wire.read_eof()
                    assert (
                        left.count(b"HTTP/1.1 ") == left.count(b'{"status":"ok"}') <= 1
                    )


# --- Time -------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [b"", b'{"model":"qwen",'])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_that_does_not_arrive_is_not_awaited(
    framing: str, begin: bytes
) -> None:
    async with hub_of_two_models(timeouts__body=0.05) as hub:
        if framing == "length":
            sent = post_head([("Content-Length", "1000")]) + begin
        else:
            sent = post_head([("Transfer-Encoding", "chunked")])
            sent += chunked(begin).removesuffix(b"0\r\n\r\n")
        async with await hub.wire() as wire:
            await wire.send(sent)
            response = await wire.read_response()
            check(response, 408, "body_timeout")
            assert response.header("connection") == "close"


# --- Pages in a browser -----------------------------------------------------------


async def test_a_preflight_needs_no_token_and_no_worker() -> None:
    origin = "http://localhost:3000"
    headers = [
        ("Origin", origin),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ]
    async with hub_of_two_models(server__cors_origins=[origin]) as hub:
        for path in (*ENDPOINTS, "/v1/models", "/v1/models/qwen"):
            async with await hub.wire() as wire:
                await wire.get(path, method="OPTIONS", headers=headers)
                response = await wire.read_response()
            assert response.status == 204
            assert response.header("access-control-allow-origin") == origin
        response = await hub.post(CHAT, GOOD, None, headers=headers[:1])
        check(response, 401, "invalid_api_key")
        assert response.header("access-control-allow-origin") == origin
        headers[0] = ("Origin", "http://localhost:3001")
        async with await hub.wire() as wire:
            await wire.get(CHAT, method="OPTIONS", headers=headers)
            response = await wire.read_response()
        assert response.status == 405
        assert response.header("access-control-allow-origin") is None


# --- After a mistake --------------------------------------------------------------


async def test_a_client_that_made_a_mistake_may_try_again() -> None:
    """On the same connection, if its request was read to its end."""
    async with ScriptedWorker("qwen") as worker, running_hub(worker) as hub:
        async with await hub.wire() as wire:
            await wire.post(CHAT, b"[]", hub.token())
            assert (await wire.read_response()).status == 400
            await wire.get("/nowhere")
            assert (await wire.read_response()).status == 404
            await wire.post(CHAT, GOOD, hub.token())
            assert (await wire.read_response()).status == 200
        assert len(worker.requests) == 1


async def test_invalid_framing_of_a_body_is_rejected_immediately() -> None:
    """The hub does not wait for the rest of such a body."""
    async with ScriptedWorker() as worker, running_hub(worker) as hub:
        wire = await hub.wire()
        chunked = [("Transfer-Encoding", "chunked"), ("Expect", "100-continue")]
        await wire.send(request_head("POST", CHAT, hub.token(), chunked))
        await wire.read_until(b"100 Continue\r\n\r\n")
        await wire.send(b'2\r\n{"\r\nzz\r\n')
        assert (await wire.read_response()).status == 400
        assert worker.requests == []
