"""What is made of a worker's answer: who is told what, and who is to blame."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web
from aiohttp.test_utils import make_mocked_request

from gollama_proxy.fleet.lease import Result
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import (
    FAILURES,
    Refusal,
    begin_response,
    read_refusal,
    refusal_of,
    refusal_of_assembly,
    whole_response,
)
from gollama_proxy.scheduling.retry import Failure
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.wire.assemble import AssemblyError, LostTextError, UnfoldableError
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.openai import ENDPOINTS
from gollama_proxy.wire.partial import DivergedError, UnreadableError
from gollama_proxy.wire.sse import EventError
from tests.fakes.clock import Clock
from tests.fakes.pool import worker as a_worker
from tests.fakes.replies import error_event, event, ping, role, token
from tests.fakes.waiting import DEADLINE

JSON = (b"Content-Type", b"application/json; charset=utf-8")
EVENTS = (b"Content-Type", b"text/event-stream")
REFUSED, BUSY, FAILED = Result.REFUSED, Result.BUSY, Result.WORKER_FAILED
ERRED = Result.ERRED


def received(
    status: int, body: bytes = b"", *headers: tuple[bytes, bytes], ended: bool = True
) -> Relay:
    """Make a relay that has received an answer."""
    clock = Clock()
    lease = a_worker(name="w", clock=clock).lease()
    relay = Relay(
        "w", cast(Connection, None), lease, ENDPOINTS["/v1/chat/completions"], clock
    )
    relay.head_received(status, list(headers or (JSON,)))
    if body:
        relay.body_received(body)
    if ended:
        relay.answer_ended()
    return relay


def worded(kind: str = "server_error") -> bytes:
    error = {"code": 400, "message": "because", "type": kind}
    return json.dumps({"error": error}).encode()


async def refusal(relay: Relay) -> Refusal:
    async with asyncio.timeout(DEADLINE):
        found = await read_refusal(relay, "w")
    assert found is not None
    return found


def response_of(refusal: Refusal) -> web.Response:
    assert isinstance(refusal.told, web.Response)
    return refusal.told


def error_of(refusal: Refusal) -> ProxyError:
    assert isinstance(refusal.told, ProxyError)
    return refusal.told


# --- Answers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "relay",
    [
        received(200, b"{}"),
        received(200, b"{", ended=False),
        received(200, role(), EVENTS, ended=False),
        received(200, ping() + role(), EVENTS),
        received(204),
    ],
)
async def test_what_is_no_refusal_is_passed_on(relay: Relay) -> None:
    assert await read_refusal(relay, "w") is None


def test_a_short_answer_goes_out_in_one_piece() -> None:
    whole = whole_response(received(200, b'{"a":1}'))
    assert whole is not None
    assert (whole.status, whole.body) == (200, b'{"a":1}')
    assert whole.headers["Content-Type"] == JSON[1].decode()


def test_a_long_answer_and_a_stream_do_not() -> None:
    assert whole_response(received(200, b"{", ended=False)) is None
    assert whole_response(received(200, role(), EVENTS)) is None


# --- Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "outcome", "failure"),
    [
        (400, "invalid_request_error", REFUSED, None),
        (400, "exceed_context_size_error", REFUSED, Failure.CONTEXT),
        (400, "context_length_exceeded", REFUSED, Failure.CONTEXT),
        (413, "exceed_context_size_error", REFUSED, Failure.CONTEXT),
        (404, "not_found_error", REFUSED, None),
        (422, "invalid_request_error", REFUSED, None),
        (429, "rate_limit_error", BUSY, Failure.BUSY),
        (500, "server_error", ERRED, Failure.STATUS),
        (500, "exceed_context_size_error", REFUSED, Failure.CONTEXT),
        (501, "not_supported_error", REFUSED, None),
        (502, "server_error", ERRED, Failure.STATUS),
        (504, "server_error", ERRED, Failure.STATUS),
        (599, "server_error", ERRED, Failure.STATUS),
    ],
)
async def test_a_workers_words_are_passed_on_and_judged(
    status: int, kind: str, outcome: Result, failure: Failure | None
) -> None:
    found = await refusal(received(status, worded(kind)))
    assert (found.outcome, found.failure) == (outcome, failure)
    told = response_of(found)
    assert (told.status, told.body) == (status, worded(kind))
    assert told.headers["Content-Type"] == JSON[1].decode()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_the_hubs_own(status: int) -> None:
    found = await refusal(received(status, worded("authentication_error")))
    assert (found.outcome, found.failure, found.busy) == (FAILED, Failure.KEY, None)
    assert error_of(found).code is Code.WORKER_REFUSED_KEY


@pytest.mark.parametrize("body", [b"", worded("unavailable_error")])
async def test_a_503_says_to_come_back(body: bytes) -> None:
    found = await refusal(received(503, body))
    assert (found.outcome, found.failure) == (BUSY, Failure.LOADING)
    assert error_of(found).code is Code.NO_WORKER
    assert (error_of(found).retry_after or 0) > 0


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, 1.0),
        (b"0", 0.0),
        (b"30", 30.0),
        (b"", 1.0),
        (b"-3", 1.0),
        (b"1.5", 1.5),
        (b"1.5.", 1.0),
        (b"soon", 1.0),
        (b"nan", 1.0),
        (b"Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        (b"Fri, 31 Dec 1999 23:59:59", 0.0),
        (b"Fri, 99 Dec 1999 23:59:59 GMT", 1.0),
        ("٣".encode(), 1.0),
        (b"9" * 400, float("inf")),
    ],
)
async def test_how_long_a_busy_worker_is_left_alone(
    status: int, given: bytes | None, seconds: float
) -> None:
    """As it asks, in seconds; one second where it does not say so."""
    headers = [JSON] if given is None else [JSON, (b"Retry-After", given)]
    assert (await refusal(received(status, worded(), *headers))).busy == seconds


@pytest.mark.parametrize("status", [429, 503])
async def test_a_moment_is_read_by_the_clock_of_the_worker(status: int) -> None:
    date = (b"Date", b"Tue, 01 Jan 2030 10:00:00 GMT")
    until = (b"Retry-After", b"Tue, 01 Jan 2030 10:00:30 GMT")
    assert (await refusal(received(status, worded(), JSON, date, until))).busy == 30
    later = (b"Retry-After", b"Tue, 01 Jan 9999 10:00:00 GMT")
    assert ((await refusal(received(status, worded(), JSON, later))).busy or 0) > 1e9


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (413, "invalid_request_error"),
        (415, "invalid_request_error"),
        (500, "server_error"),
    ],
)
@pytest.mark.parametrize(
    "body", [b"", b"\r\n", b"<html>\r\n<h1>Bad Gateway</h1></html>", b"No.", b"[1]"]
)
async def test_a_refusal_without_words_gets_some(
    status: int, kind: str, body: bytes
) -> None:
    """A proxy before a worker answers in HTML, which no SDK reads."""
    told = response_of(await refusal(received(status, body)))
    assert told.status == status
    assert isinstance(told.body, bytes)
    assert json.loads(told.body)["error"] == {
        "message": f"Worker w answered {status} without a reason.",
        "type": kind,
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("malformed", [True, False])
async def test_a_refusal_that_is_cut_is_a_loss(malformed: bool) -> None:
    relay = received(400, b'{"err', ended=False)
    reading = asyncio.create_task(refusal(relay))
    await asyncio.sleep(0)
    assert not reading.done()
    relay.answer_lost("reset", malformed=malformed)
    found = await reading
    failure = Failure.MALFORMED if malformed else Failure.RESET
    assert (found.outcome, found.failure) == (FAILED, failure)


# --- Streams that begin with an error ---------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "failure"),
    [
        (400, 400, None),
        (499, 499, None),
        (500, 500, Failure.STATUS),
        (599, 599, Failure.STATUS),
        (399, 502, Failure.STATUS),
        (600, 502, Failure.STATUS),
        ("e", 502, Failure.STATUS),
        (None, 502, Failure.STATUS),
    ],
)
async def test_a_stream_that_begins_with_an_error_gets_its_status(
    code: Any, status: int, failure: Failure | None
) -> None:
    first = event({"error": {"code": code, "message": "because", "type": "oh"}})
    found = await refusal(received(200, ping() + first, EVENTS))
    outcome = REFUSED if failure is None else ERRED
    assert (found.outcome, found.failure) == (outcome, failure)
    told = response_of(found)
    assert told.status == status
    assert isinstance(told.body, bytes)
    error = json.loads(told.body)["error"]
    assert (error["message"], error["type"]) == ("because", "oh")


@pytest.mark.parametrize("begun", [role(), role() + token("a")])
async def test_so_does_one_of_which_nothing_was_passed_on_yet(begun: bytes) -> None:
    relay = received(200, begun + error_event("late"), EVENTS)
    found = await refusal(relay)
    assert (found.outcome, found.failure) == (ERRED, Failure.STATUS)
    assert response_of(found).status == 500


# --- Errors of the connection -----------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome", "failure"),
    [
        (Code.WORKER_UNREACHABLE, FAILED, Failure.UNREACHABLE),
        (Code.WORKER_LOST, FAILED, Failure.RESET),
        (Code.WORKER_INCOMPLETE, FAILED, Failure.RESET),
        (Code.WORKER_PROTOCOL, FAILED, Failure.MALFORMED),
        (Code.WORKER_TIMEOUT, FAILED, Failure.SILENT),
        (Code.WORKER_SLOW, Result.SLOW, Failure.SLOW),
    ],
)
def test_an_error_of_the_connection_is_told_as_it_is(
    code: Code, outcome: Result, failure: Failure
) -> None:
    error = WorkerError(code, "because")
    assert refusal_of(error) == Refusal(error, outcome, failure)


def test_every_error_of_a_worker_has_its_failure() -> None:
    """But a refused key, which is no error of the connection."""
    codes = {code for code in Code if code.startswith("worker_")}
    assert set(FAILURES) == codes - {Code.WORKER_REFUSED_KEY}


@pytest.mark.parametrize("error", [DivergedError, UnreadableError])
def test_what_cannot_be_the_rest_of_an_answer_is_no_failure(
    error: type[DivergedError],
) -> None:
    """The worker was asked for too much; somebody else would do no better."""
    raised = error("another text")
    assert refusal_of(raised) == Refusal(raised, REFUSED, None)


# --- Streams that make up no answer -----------------------------------------------


def test_a_stream_that_is_of_no_use_is_nobodys_fault() -> None:
    """The request goes out again as it was."""
    found = refusal_of_assembly(LostTextError("no text"))
    assert (found.outcome, found.failure) == (REFUSED, Failure.STREAM)
    assert error_of(found).code is Code.WORKER_PROTOCOL


def test_a_stream_that_can_never_be_folded_is_nobodys_fault_either() -> None:
    found = refusal_of_assembly(UnfoldableError("an event cannot be read"))
    assert (found.outcome, found.failure) == (REFUSED, Failure.STREAM)
    assert found.lasting
    assert not refusal_of_assembly(LostTextError("no text")).lasting
    assert error_of(found).code is Code.WORKER_PROTOCOL
    assert error_of(found).detail == "an event cannot be read"
    assert "event" not in error_of(found).message


@pytest.mark.parametrize(
    ("code", "status", "outcome", "failure"),
    [
        (400, 400, REFUSED, None),
        (500, 500, ERRED, Failure.STATUS),
        (None, 502, ERRED, Failure.STATUS),
    ],
)
def test_an_error_in_a_stream_becomes_the_answers_own(
    code: int | None, status: int, outcome: Result, failure: Failure | None
) -> None:
    error = AssemblyError("it told an error", EventError("because", "oh", code))
    found = refusal_of_assembly(error)
    assert (found.outcome, found.failure) == (outcome, failure)
    told = response_of(found)
    assert told.status == status
    assert isinstance(told.body, bytes)
    assert json.loads(told.body)["error"]["message"] == "because"


# --- Heads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "headers", "chunked", "length"),
    [
        (HttpVersion11, (JSON,), True, None),
        (HttpVersion11, (EVENTS,), True, None),
        (HttpVersion11, (JSON, (b"Content-Length", b"7")), False, 7),
        (HttpVersion11, (EVENTS, (b"Content-Length", b"7")), True, None),
        (HttpVersion10, (JSON, (b"Content-Length", b"7")), False, 7),
        (HttpVersion10, (EVENTS,), False, None),
    ],
)
def test_how_a_client_knows_where_an_answer_ends(
    version: HttpVersion,
    headers: tuple[tuple[bytes, bytes], ...],
    chunked: bool,
    length: int | None,
) -> None:
    """By its length, by its last chunk, or by the end of the connection."""
    request = make_mocked_request("POST", "/", version=version)
    relay = received(200, b"", *headers, ended=False)
    record = Record("id", "POST", headers={"X-Gollama-Worker": "w"})
    response = begin_response(request, relay, record)
    assert (response.chunked, response.content_length) == (chunked, length)
    closes = not (chunked or length)
    assert response.keep_alive is (False if closes else None)
    assert response.headers["X-Gollama-Worker"] == "w"
