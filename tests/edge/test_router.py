"""Every request finds its handler or gets the reason, and has one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web

from gollama_proxy.config import settings
from gollama_proxy.config.settings import Config
from gollama_proxy.edge.response import CLOSE, KEEP, Sent, head
from gollama_proxy.edge.response import Response as Answer
from gollama_proxy.edge.router import Routes
from gollama_proxy.edge.server import Server
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.proxy.exchange import Proxy
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.telemetry.metrics import Telemetry
from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    ProxyError,
    RequestError,
)
from tests.fakes.client import Response, Wire, request_head
from tests.fakes.clock import Clock
from tests.fakes.waiting import DEADLINE

ORIGIN = "http://localhost:3000"


async def say_hello(request: web.BaseRequest, record: Record) -> Answer:
    return Answer(b"hello")


async def say_path(request: web.BaseRequest, record: Record) -> Answer:
    return Answer(request.raw_path.encode())


async def say_body(request: web.BaseRequest, record: Record) -> Answer:
    return Answer(await request.content.read())


class Waiting:
    """A handler that waits, before its answer or within it."""

    def __init__(self, *, begun: bool = False) -> None:
        self.begun = begun
        self.started = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def __call__(self, request: web.BaseRequest, record: Any) -> Answer | Sent:
        transport = request.transport
        assert transport is not None
        if self.begun:
            record.delivery = SimpleNamespace(begun=True)
            fields = "Transfer-Encoding: chunked\r\n"
            transport.write(head(request, 200, fields, keep_alive=True))
            transport.write(b"5\r\nhello\r\n")
        self.started.release()
        await self.go_on.wait()
        if not self.begun:
            return Answer(b"done")
        transport.write(b"0\r\n\r\n")
        return KEEP


class Running:
    """A proxy behind a real socket, and what it recorded."""

    def __init__(
        self, proxy: Proxy, telemetry: Telemetry, address: tuple[str, int]
    ) -> None:
        self.proxy = proxy
        self.telemetry = telemetry
        self.address = address
        self.lines: list[dict[str, Any]] = []  # of the access log
        self.written = asyncio.Event()

    async def connect(self) -> Wire:
        return await Wire.connect(*self.address)

    async def get(
        self,
        path: str,
        method: str = "GET",
        headers: list[tuple[str, str]] | None = None,
    ) -> Response:
        async with await self.connect() as wire:
            await wire.get(path, method=method, headers=headers or [])
            return await wire.read_response()

    async def recorded(self, n: int = 1) -> dict[str, Any]:
        """Wait until `n` requests have had their outcome; return the last."""
        async with asyncio.timeout(DEADLINE):
            while len(self.lines) < n:
                self.written.clear()
                await self.written.wait()
        assert len(self.lines) == n, self.lines
        return self.lines[-1]

    def outcomes(self) -> dict[str, float]:
        text = "".join(self.telemetry.pieces())
        found = re.findall(r'gollama_outcomes_total\{.*outcome="(\w+)".*\} (\S+)', text)
        return {outcome: float(value) for outcome, value in found}


class _Lines(logging.Handler):
    def __init__(self, running: Running) -> None:
        super().__init__()
        self.running = running

    def emit(self, record: logging.LogRecord) -> None:
        self.running.lines.append(vars(record)["fields"])
        self.running.written.set()


@contextlib.asynccontextmanager
async def dispatching(
    routes: Routes, clock: Callable[[], float] | None = None, **sections: Any
) -> AsyncIterator[Running]:
    loaded = Config(**sections)
    clock = clock or Clock()
    admission = Admission(loaded.queue, Clock())
    telemetry = Telemetry(Registry(loaded), admission, clock=clock)
    unused: Any = Mock()  # no request of these tests is for a worker
    proxy = Proxy(loaded, routes, *[unused] * 8, ended=telemetry.ended, clock=clock)
    runner = web.ServerRunner(Server(proxy, loaded, proxy.refused), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    running = Running(proxy, telemetry, (host, port))
    handler = _Lines(running)
    access = logging.getLogger("gollama_proxy.access")
    before = access.level
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    try:
        yield running
    finally:
        access.removeHandler(handler)
        access.setLevel(before)
        proxy.cut()
        await runner.cleanup()


def code_of(response: Response) -> str:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["code"])


def raising(error: Exception) -> Callable[..., Awaitable[Answer]]:
    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        raise error

    return handler


# --- Finding the handler ----------------------------------------------------------

ROUTES: Routes = {
    "/a": {"GET": say_hello},
    "/b": {"POST": say_body},
    "/both": {"GET": say_hello, "POST": say_body},
    "/a/": {"GET": say_path},
}


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/a", "/a"),
        ("/a?x=1", "/a"),
        ("/a?", "/a"),
        ("/a?/b", "/a"),
        ("/a/x", "/a/"),
        ("/a/x/y", "/a/"),
        ("/a/x%2Fy%20z", "/a/"),
        ("/a/x?y", "/a/"),
        ("/a/../b", "/a/"),  # a name like any other
        ("/a/%2e%2e", "/a/"),
        ("/a//", "/a/"),
        ("/a/%ff", "/a/"),
    ],
)
async def test_a_path_has_its_handler(path: str, route: str) -> None:
    async with dispatching(ROUTES) as running:
        response = await running.get(path)
        body = path if route == "/a/" else "hello"
        assert (response.status, response.body) == (200, body.encode())
        assert (await running.recorded())["route"] == route


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/A",
        "/ab",
        "/a/",  # a name is missing
        "/a/?x",
        "//a",
        "/./a",
        "/x/../a",
        "/%61",
        "/b/",
        "/b/x",
        "/a;x",
        "/a%3Fx",
        "/a#x",
        "a",
        "*",
        "http://hub/a",
        "/a%00",
        "/" + "x" * 5000,
    ],
)
async def test_nothing_is_decoded_or_normalised_first(path: str) -> None:
    """A path that a proxy in front reads in another way must not get through."""
    async with dispatching(ROUTES) as running:
        response = await running.get(path, "OPTIONS" if path == "*" else "GET")
        assert response.status == (404 if path != "a" else 400)
        if path != "a":
            assert code_of(response) == "unknown_url"
            assert "route" in (line := await running.recorded())
            assert line["route"] == "other"
            sent = path.partition("?")[0]
            assert line.get("path", "") == (sent if sent[0] == "/" else "")[:200]
        assert len(response.body) < 400


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/a", "GET, HEAD"),
        ("GET", "/b", "POST"),
        ("HEAD", "/b", "POST"),
        ("PUT", "/both", "GET, HEAD, POST"),
        ("DELETE", "/a/x", "GET, HEAD"),
        ("OPTIONS", "/a", "GET, HEAD"),
        ("TRACE", "/a", "GET, HEAD"),
        ("PATCH", "/b", "POST"),
    ],
)
async def test_a_wrong_method_gets_the_right_ones(
    method: str, path: str, allow: str
) -> None:
    async with dispatching(ROUTES) as running:
        response = await running.get(path, method)
        assert (response.status, response.header("allow")) == (405, allow)
        if method != "HEAD":
            assert code_of(response) == "method_not_allowed"
            assert method in response.json()["error"]["message"]
        line = await running.recorded()
        assert line["error"] == "method_not_allowed"


async def test_head_is_get_without_the_body() -> None:
    async with dispatching(ROUTES) as running, await running.connect() as wire:
        await wire.get("/a", method="HEAD")
        response = await wire.read_response()
        assert (response.status, response.body) == (200, b"")
        assert response.header("content-length") == "5"
        assert (await running.recorded())["method"] == "HEAD"
        await wire.get("/a")  # and the connection is where it should be
        assert (await wire.read_response()).body == b"hello"


@pytest.mark.parametrize("limit", [1024, 2048])
async def test_the_head_as_a_whole_has_a_limit(limit: int) -> None:
    headers = [(f"X-{n}", "x" * 500) for n in range(3)]
    async with dispatching(ROUTES, limits=settings.Limits(head=limit)) as running:
        response = await running.get("/a", headers=headers)
        assert response.status == (431 if limit == 1024 else 200)


# --- Request ids and the hub's headers --------------------------------------------


async def test_every_reply_carries_an_id_and_the_hubs_name() -> None:
    routes = {
        **ROUTES,
        "/no": {"GET": raising(RequestError(Code.INVALID_JSON, "No."))},
        "/bug": {"GET": raising(ZeroDivisionError())},
    }
    async with dispatching(routes) as running:
        ids = set()
        for n, path in enumerate(["/a", "/a", "/x", "/no", "/bug"], 1):
            response = await running.get(path)
            assert response.values("server") == ["gollama-proxy"]
            given = response.header("x-request-id")
            assert given is not None
            assert re.fullmatch("[0-9a-f]{16}", given)
            assert (await running.recorded(n))["id"] == given
            ids.add(given)
        assert len(ids) == 5


async def test_a_clients_own_id_is_kept() -> None:
    async with dispatching(ROUTES) as running:
        for path in ("/a", "/x"):
            headers = [("X-Request-Id", "Trace-1_2.3")]
            response = await running.get(path, headers=headers)
            assert response.header("x-request-id") == "Trace-1_2.3"


@pytest.mark.parametrize(
    "values",
    [["a b"], ["x" * 65], [""], ["a", "b"], ["ä"], ['a"b'], ["a=b status=200"]],
)
async def test_an_id_that_could_do_harm_is_replaced(values: list[str]) -> None:
    async with dispatching(ROUTES) as running:
        headers = [("X-Request-Id", value) for value in values]
        response = await running.get("/a", headers=headers)
        assert response.header("x-request-id") not in values
        assert re.fullmatch("[0-9a-f]{16}", response.header("x-request-id") or "")


async def test_headers_that_a_handler_recorded_go_out() -> None:
    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        record.worker, record.attempts = "gpu1", 1
        if request.raw_path == "/no":
            raise NoWorkerError(Code.NO_WORKER, "Nobody.", retry_after=2)
        return Answer()

    routes: Routes = {"/yes": {"GET": handler}, "/no": {"GET": handler}}
    async with dispatching(routes) as running:
        assert (await running.get("/yes")).header("x-gollama-worker") == "gpu1"
        response = await running.get("/no")
        assert response.header("x-gollama-worker") == "gpu1"
        assert response.header("retry-after") == "2"


# --- Outcomes ---------------------------------------------------------------------


async def test_a_complete_answer_is_recorded() -> None:
    clock = Clock()

    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        clock.advance(1.5)
        return Answer(status=201)

    async with dispatching({"/a": {"GET": handler}}, clock) as running:
        await running.get("/a")
        line = await running.recorded()
        assert line == {
            "remote": "127.0.0.1",
            "method": "GET",
            "route": "/a",
            "status": 201,
            "outcome": "complete",
            "duration_ms": 1500.0,
            "id": line["id"],
        }
        assert running.outcomes() == {"complete": 1}
        assert repr(running.proxy) == "<Proxy running=0>"


async def test_an_outcome_that_the_handler_knows_better_is_kept() -> None:
    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        record.outcome = Outcome.REFUSED
        return Answer(status=400)

    async with dispatching({"/a": {"GET": handler}}) as running:
        await running.get("/a")
        assert (await running.recorded())["outcome"] == "refused"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError(Code.INVALID_JSON, "No.", detail="why"), 400, "invalid_json"),
        (NoWorkerError(Code.NO_WORKER, "Nobody.", detail="why"), 503, None),
        (HubError(Code.REQUEST_TIMEOUT, "Late.", detail="why"), 504, "request_timeout"),
        (KeyError("canary"), 500, "internal_error"),
    ],
)
async def test_an_error_becomes_a_reply_and_one_line(
    error: Exception, status: int, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with dispatching({"/a": {"GET": raising(error)}}) as running:
        response = await running.get("/a")
        code = code or "no_worker_available"
        assert (response.status, code_of(response)) == (status, code)
        assert b"why" not in response.body
        assert b"canary" not in response.body
        line = await running.recorded()
        assert (line["status"], line["outcome"]) == (status, "error")
        assert line["error"] == code
        assert line["detail"] == (
            "why" if isinstance(error, ProxyError) else "KeyError"
        )
        assert running.outcomes() == {code: 1}
    failed = [r for r in caplog.records if r.name == "gollama_proxy.proxy.exchange"]
    if isinstance(error, ProxyError):
        assert failed == []
    else:
        assert failed[0].exc_info
        assert line["id"] in failed[0].getMessage()


async def test_a_client_that_leaves_is_no_error() -> None:
    waiting = Waiting()
    async with dispatching({"/a": {"GET": waiting}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            await waiting.started.acquire()
        line = await running.recorded()
        assert (line["status"], line["outcome"]) == (499, "client_gone")
        assert "error" not in line
        assert running.outcomes() == {"client_gone": 1}


async def test_a_client_that_left_between_two_steps_is_no_error() -> None:
    gone = raising(ConnectionResetError("gone"))
    async with dispatching({"/a": {"GET": gone}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            assert await wire.read_eof() == b""
        line = await running.recorded()
        assert line["outcome"] == "client_gone"
        assert "error" not in line


async def test_an_outcome_that_was_known_when_the_client_left_is_kept() -> None:
    waiting = Waiting()

    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        record.outcome, record.status = Outcome.REFUSED, 400
        await waiting(request, record)
        raise AssertionError

    async with dispatching({"/a": {"GET": handler}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            await waiting.started.acquire()
        line = await running.recorded()
        assert (line["status"], line["outcome"]) == (400, "refused")


async def test_an_answer_that_went_out_already_is_left_as_it_is() -> None:
    async def handler(request: web.BaseRequest, record: Record) -> Sent:
        assert request.transport is not None
        fields = "Content-Length: 5\r\n"
        request.transport.write(head(request, 200, fields, keep_alive=True) + b"hello")
        record.status = 200
        return KEEP

    async with dispatching({"/a": {"GET": handler}}) as running:
        response = await running.get("/a")
        assert response.body == b"hello"
        line = await running.recorded()
        assert (line["status"], line["outcome"]) == (200, "complete")


async def test_an_answer_that_was_begun_is_not_ended_well_after_a_fault() -> None:
    async def fail(request: web.BaseRequest, record: Any) -> Answer:
        assert request.transport is not None
        record.delivery = SimpleNamespace(begun=True)
        fields = "Transfer-Encoding: chunked\r\n"
        begin = head(request, 200, fields, keep_alive=True)
        request.transport.write(begin + b"5\r\nhello\r\n")
        raise ZeroDivisionError

    async with dispatching({"/a": {"GET": fail}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            ending = await wire.read_to_end()
        assert not ending.clean
        assert ending.raw.count(b"HTTP/1.1") == 1
        line = await running.recorded()
        assert (line["outcome"], line["error"]) == ("error", "internal_error")


# --- The connection after chunks --------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
async def test_a_connection_ends_with_a_request_in_chunks(begun: bool) -> None:
    """And the answer explains it."""

    async def handler(request: web.BaseRequest, record: Any) -> Answer | Sent:
        body = await request.content.read()
        if not begun:
            return Answer(body)
        assert request.transport is not None
        fields = f"Content-Length: {len(body)}\r\n"
        keep_alive = record.keep_alive
        begin = head(request, 200, fields, keep_alive=keep_alive)
        request.transport.write(begin + body)
        return KEEP if keep_alive else CLOSE

    routes: Routes = {"/b": {"POST": handler}}
    chunked = [("Transfer-Encoding", "chunked")]
    async with dispatching(routes) as running, await running.connect() as wire:
        await wire.send(request_head("POST", "/b", None, chunked))
        await wire.send(b"5\r\nhello\r\n0\r\n\r\n")
        response = await wire.read_response()
        assert response.body == b"hello"
        assert response.header("connection") == "close"
        assert await wire.read_eof() == b""


@pytest.mark.parametrize("together", [True, False])
async def test_a_trailer_is_no_field_of_the_next_request(together: bool) -> None:
    """The parser takes it for a header: the trailer's sender could authenticate."""
    asked: list[str | None] = []

    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        asked.append(request.headers.get("Authorization"))
        return Answer(await request.content.read())

    routes: Routes = {"/b": {"POST": handler}}
    chunked = [("Transfer-Encoding", "chunked")]
    carrier = request_head("POST", "/b", None, chunked)
    carrier += b"5\r\nhello\r\n0\r\nX: y\r\nAuthorization: Bearer x\r\n\r\n"
    victim = request_head("POST", "/b", None, [("Content-Length", "0")])
    async with dispatching(routes) as running, await running.connect() as wire:
        for sent in [carrier + victim] if together else [carrier, victim]:
            await wire.send(sent)
            await asyncio.sleep(0)
        assert (await wire.read_response()).status == 200
        assert await wire.read_eof() == b""
    assert asked == [None]


# --- The connection after an error ------------------------------------------------


@pytest.mark.parametrize(
    ("line", "header", "status"),
    [
        ("POST /a HTTP/1.1", "Host: a b", 400),
        ("POST /a HTTP/1.1", "Content_Length: 5", 400),
        ("POST /a HTTP/2.0", "X: y", 505),
        ("CONNECT hub:80 HTTP/1.1", "X: y", 405),
    ],
)
async def test_a_head_that_can_be_read_in_two_ways_ends_the_connection(
    line: str, header: str, status: int
) -> None:
    """Although the body is there: it is not certain where it ends."""
    host = "" if header.startswith("Host") else "Host: hub\r\n"
    head = f"{line}\r\n{host}{header}\r\nContent-Length: 5\r\n\r\n"
    async with dispatching(ROUTES) as running, await running.connect() as wire:
        await wire.send(head.encode() + b"hello")
        response = await wire.read_response()
        assert response.status == status
        assert response.header("connection") == "close"
        assert await wire.read_eof() == b""
        assert (await running.recorded())["status"] == status


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0"])
async def test_the_hub_does_not_claim_to_speak_a_version_that_it_does_not(
    version: str,
) -> None:
    async with dispatching(ROUTES) as running, await running.connect() as wire:
        await wire.send(request_head("GET", "/a", version=version))
        answer = await wire.read_eof()
    if version == "3.0":  # nor does the parser
        assert answer.startswith(b"HTTP/1.0 400 ")
    else:
        assert answer.startswith(b"HTTP/1.1 505 ")


@pytest.mark.parametrize(
    ("body", "length", "kept"), [(b"", 0, True), (b"x" * 10, 1 << 20, False)]
)
async def test_an_unread_body_ends_the_connection(
    body: bytes, length: int, kept: bool
) -> None:
    """Otherwise the rest of it would be read as the next request."""
    async with dispatching(ROUTES) as running, await running.connect() as wire:
        await wire.post("/a", body, headers=[("Content-Length", str(length))])
        response = await wire.read_response()
        assert response.status == 405
        if kept:
            await wire.get("/a")
            assert (await wire.read_response()).status == 200
        else:
            assert response.header("connection") == "close"


async def test_a_body_that_was_read_does_not_end_the_connection() -> None:
    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        await request.content.read()
        raise RequestError(Code.INVALID_JSON, "No.")

    routes: Routes = {"/b": {"POST": handler}}
    async with dispatching(routes) as running, await running.connect() as wire:
        for _ in range(2):
            await wire.post("/b", b"x" * 100_000)
            response = await wire.read_response()
            assert (response.status, response.header("connection")) == (400, None)


# --- CORS -------------------------------------------------------------------------


def cors_headers(response: Response) -> set[str]:
    return {k for k, _ in response.headers if k.startswith("access-control-")}


async def test_no_page_is_let_in_by_default() -> None:
    async with dispatching(ROUTES) as running:
        origin = [("Origin", ORIGIN), ("Access-Control-Request-Method", "GET")]
        response = await running.get("/a", headers=origin)
        assert response.status == 200
        assert cors_headers(response) == set()
        preflight = await running.get("/a", "OPTIONS", origin)
        assert preflight.status == 405
        assert cors_headers(preflight) == set()


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "*",
        "",
        "http://localhost",
        "http://localhost:3001",
        "https://localhost:3000",
        "http://localhost:3000/",
        "HTTP://LOCALHOST:3000",
        "http://localhost:30000",
        "http://localhost:3000.example",
        "http://x.localhost:3000",
        "http://localhost:3000 http://x",
        " ",
    ],
)
async def test_only_the_exact_origin_is_let_in(origin: str) -> None:
    server = settings.Server(cors_origins=(ORIGIN, "https://chat.example"))
    async with dispatching(ROUTES, server=server) as running:
        for method in ("GET", "OPTIONS"):
            response = await running.get("/a", method, [("Origin", origin)])
            assert cors_headers(response) == set()
            assert response.header("vary") == "Origin"  # for caches


async def test_a_configured_page_may_read_every_reply() -> None:
    server = settings.Server(cors_origins=("https://chat.example", ORIGIN))
    routes = {**ROUTES, "/no": {"GET": raising(RequestError(Code.INVALID_JSON, "No"))}}
    async with dispatching(routes, server=server) as running:
        for path, status in (("/a", 200), ("/x", 404), ("/b", 405), ("/no", 400)):
            response = await running.get(path, headers=[("Origin", ORIGIN)])
            assert response.status == status
            assert response.header("access-control-allow-origin") == ORIGIN
            exposed = response.header("access-control-expose-headers") or ""
            assert {"X-Request-Id", "X-Gollama-Worker", "Retry-After"} <= set(
                exposed.split(", ")
            )
            assert response.header("vary") == "Origin"
            # Tokens travel in a header; a cookie proves nothing.
            assert response.header("access-control-allow-credentials") is None


@pytest.mark.parametrize("path", ["/a", "/b", "/a/x"])
async def test_a_preflight_is_answered_on_a_known_path(path: str) -> None:
    server = settings.Server(cors_origins=(ORIGIN,))
    async with dispatching(ROUTES, server=server) as running:
        headers = [("Origin", ORIGIN), ("Access-Control-Request-Method", "POST")]
        response = await running.get(path, "OPTIONS", headers)
        assert (response.status, response.body) == (204, b"")
        assert response.header("access-control-allow-origin") == ORIGIN
        allowed = (response.header("access-control-allow-headers") or "").lower()
        assert {"authorization", "content-type"} <= set(allowed.split(", "))
        assert response.header("access-control-allow-methods") == "GET, POST"
        assert int(response.header("access-control-max-age") or 0) > 0
        assert (await running.recorded())["method"] == "OPTIONS"


async def test_a_preflight_on_an_unknown_path_is_not_found() -> None:
    server = settings.Server(cors_origins=(ORIGIN,))
    async with dispatching(ROUTES, server=server) as running:
        response = await running.get("/x", "OPTIONS", [("Origin", ORIGIN)])
        assert (response.status, code_of(response)) == (404, "unknown_url")


# --- Ending -----------------------------------------------------------------------


async def test_nothing_running_is_finished_at_once() -> None:
    async with dispatching(ROUTES) as running:
        await running.get("/a")
        await asyncio.wait_for(running.proxy.drain(60), DEADLINE)


async def test_running_requests_may_finish() -> None:
    waiting = Waiting()
    async with dispatching({"/a": {"GET": waiting}}) as running:
        async with await running.connect() as one, await running.connect() as two:
            await one.get("/a")
            await two.get("/a")
            await waiting.started.acquire()
            await waiting.started.acquire()
            assert repr(running.proxy) == "<Proxy running=2>"
            finish = asyncio.create_task(running.proxy.drain(60))
            await asyncio.sleep(0)
            assert not finish.done()
            waiting.go_on.set()
            await asyncio.wait_for(finish, DEADLINE)
            assert (await one.read_response()).body == b"done"
            assert (await two.read_response()).body == b"done"
        assert running.outcomes() == {"complete": 2}


@pytest.mark.parametrize("how", ["finish", "cut"])
async def test_a_client_that_has_received_nothing_gets_an_error(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = Waiting()
    server = settings.Server(cors_origins=(ORIGIN,))
    async with (
        dispatching({"/a": {"GET": waiting}}, server=server) as running,
        await running.connect() as wire,
    ):
        await wire.get("/a", headers=[("Origin", ORIGIN)])
        await waiting.started.acquire()
        if how == "finish":
            await asyncio.wait_for(running.proxy.drain(0.01), DEADLINE)
            assert "cutting 1 running request" in caplog.text
        else:
            running.proxy.cut()
        response = await wire.read_response()
        assert (response.status, code_of(response)) == (503, "hub_draining")
        assert response.header("retry-after")
        assert response.header("connection") == "close"
        assert response.header("x-request-id")
        assert response.header("server") == "gollama-proxy"
        assert response.header("access-control-allow-origin") == ORIGIN
        assert await wire.read_eof() == b""
        line = await running.recorded()
        assert (line["status"], line["outcome"]) == (503, "error")
        assert running.outcomes() == {"hub_draining": 1}


async def test_an_answer_that_was_begun_is_cut_and_not_ended_well() -> None:
    waiting = Waiting(begun=True)
    async with (
        dispatching({"/a": {"GET": waiting}}) as running,
        await running.connect() as wire,
    ):
        await wire.get("/a")
        await waiting.started.acquire()
        await asyncio.wait_for(running.proxy.drain(0), DEADLINE)
        ending = await wire.read_to_end()
        assert not ending.clean
        assert ending.raw.count(b"HTTP/1.1") == 1
        assert b"0\r\n\r\n" not in ending.raw


async def test_a_handler_that_tidies_up_is_waited_for() -> None:
    tidy = asyncio.Event()
    started = asyncio.Event()

    async def handler(request: web.BaseRequest, record: Record) -> Answer:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await tidy.wait()
        raise AssertionError

    async with dispatching({"/a": {"GET": handler}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            await started.wait()
            finish = asyncio.create_task(running.proxy.drain(0))
            done, _ = await asyncio.wait([finish], timeout=0.02)
            assert not done
            tidy.set()
            await asyncio.wait_for(finish, DEADLINE)
            assert json.loads((await wire.read_response()).body)


async def test_a_client_that_left_between_two_steps_has_a_status() -> None:
    left = raising(ConnectionResetError())
    async with dispatching({"/a": {"GET": left}}) as running:
        async with await running.connect() as wire:
            await wire.get("/a")
            assert await wire.read_eof() == b""
        assert (await running.recorded())["status"] == 499


async def test_headers_that_sdks_add_pass_a_preflight() -> None:
    server = settings.Server(cors_origins=(ORIGIN,))
    async with dispatching(ROUTES, server=server) as running:
        headers = [("Origin", ORIGIN), ("Access-Control-Request-Method", "GET")]
        response = await running.get("/a", method="OPTIONS", headers=headers)
    allowed = response.header("access-control-allow-headers")
    assert allowed is not None
    assert "*" in allowed.split(", ")
