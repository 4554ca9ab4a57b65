"""How a worker's answer is judged: the error for the client, and what is blamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from gollama_proxy.edge.response import Response
from gollama_proxy.fleet.lease import Result
from gollama_proxy.proxy.attempt import (
    Failure,
    failure_of,
    failure_of_assembly,
    failure_to_connect,
    read_failure,
)
from gollama_proxy.proxy.failures import Again, Cause, DrainedError, rule_of
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.upstream.connection import Connection
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.folding import AssemblyError, LostTextError, UnfoldableError
from gollama_proxy.wire.partial import DivergedError, UnreadableError
from gollama_proxy.wire.schema import ENDPOINTS, EventError
from tests.fakes.cases import case
from tests.fakes.clock import Clock
from tests.fakes.pool import worker
from tests.fakes.replies import error_event, event, ping, role, token
from tests.fakes.waiting import DEADLINE

CHAT = ENDPOINTS["/v1/chat/completions"]
JSON = (b"Content-Type", b"application/json; charset=utf-8")
EVENTS = (b"Content-Type", b"text/event-stream")
REFUSED, BUSY, FAILED = Result.REFUSED, Result.BUSY, Result.WORKER_FAILED
ERRED = Result.ERRED


def received(
    status: int, body: bytes = b"", *headers: tuple[bytes, bytes], ended: bool = True
) -> Relay:
    """Make a relay that has received an answer."""
    clock = Clock()
    lease = worker(name="w", clock=clock).lease()
    relay = Relay(cast(Connection, None), lease, CHAT)
    relay.head_received(status, list(headers or (JSON,)))
    if body:
        relay.body_received(body)
    if ended:
        relay.answer_ended()
    return relay


def worded(kind: str = "server_error") -> bytes:
    error = {"code": 400, "message": "because", "type": kind}
    return json.dumps({"error": error}).encode()


def test_a_worker_that_sends_other_answers_is_crowded_and_not_unreachable() -> None:
    """Then it is left alone for a second; a dead one counts as failed."""
    clock = Clock()
    crowded = worker(name="w", clock=clock)
    other, lease = crowded.lease(), crowded.lease()
    late = WorkerError(Code.WORKER_TIMEOUT, "late")
    assert failure_to_connect(late, lease).cause is Cause.UNREACHABLE
    other.heard_at = clock()
    failure = failure_to_connect(late, lease)
    assert (failure.cause, failure.busy) == (Cause.CROWDED, 1.0)
    assert failure.rule.result is Result.BUSY
    refused = WorkerError(Code.WORKER_UNREACHABLE, "refused")
    assert failure_to_connect(refused, lease).cause is Cause.UNREACHABLE


async def refusal(relay: Relay) -> Failure:
    async with asyncio.timeout(DEADLINE):
        return await read_failure(relay, "w")


def response_of(refusal: Failure) -> Response:
    assert isinstance(refusal.answer, Response)
    return refusal.answer


def error_of(refusal: Failure) -> ProxyError:
    assert isinstance(refusal.answer, ProxyError)
    return refusal.answer


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
def test_what_is_no_refusal_is_passed_on(relay: Relay) -> None:
    assert relay.status < 400
    assert relay.early_error() is None


# --- Failures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "outcome", "cause"),
    [
        (400, "invalid_request_error", REFUSED, Cause.REFUSED),
        (400, "exceed_context_size_error", REFUSED, Cause.CONTEXT),
        (400, "context_length_exceeded", REFUSED, Cause.CONTEXT),
        (413, "exceed_context_size_error", REFUSED, Cause.CONTEXT),
        (404, "not_found_error", REFUSED, Cause.REFUSED),
        (422, "invalid_request_error", REFUSED, Cause.REFUSED),
        (429, "rate_limit_error", BUSY, Cause.BUSY),
        (500, "server_error", ERRED, Cause.STATUS),
        (500, "exceed_context_size_error", REFUSED, Cause.CONTEXT),
        (501, "not_supported_error", REFUSED, Cause.REFUSED),
        (502, "server_error", ERRED, Cause.STATUS),
        (504, "server_error", ERRED, Cause.STATUS),
        (599, "server_error", ERRED, Cause.STATUS),
    ],
)
async def test_a_workers_words_are_passed_on_and_judged(
    status: int, kind: str, outcome: Result, cause: Cause
) -> None:
    found = await refusal(received(status, worded(kind)))
    assert (found.rule.result, found.cause) == (outcome, cause)
    reported = response_of(found)
    assert (reported.status, reported.body) == (status, worded(kind))
    assert f"Content-Type: {JSON[1].decode()}\r\n" in reported.fields


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_the_hubs_own(status: int) -> None:
    found = await refusal(received(status, worded("authentication_error")))
    assert (found.rule.result, found.cause, found.busy) == (FAILED, Cause.KEY, None)
    assert error_of(found).code is Code.WORKER_REFUSED_KEY


@pytest.mark.parametrize("body", [b"", worded("unavailable_error")])
async def test_a_503_has_a_time_to_come_back(body: bytes) -> None:
    found = await refusal(received(503, body))
    assert (found.rule.result, found.cause) == (BUSY, Cause.LOADING)
    assert error_of(found).code is Code.NO_WORKER
    assert (error_of(found).retry_after or 0) > 0


async def test_how_long_a_busy_worker_is_left_alone() -> None:
    """The seconds that it asks for; one second without them."""
    for status in [429, 503]:
        for given, seconds in [
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
        ]:
            with case((status, given, seconds)):
                headers = [JSON] if given is None else [JSON, (b"Retry-After", given)]
                assert (
                    await refusal(received(status, worded(), *headers))
                ).busy == seconds


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
    reported = response_of(await refusal(received(status, body)))
    assert reported.status == status
    assert json.loads(reported.body)["error"] == {
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
    cause = Cause.MALFORMED if malformed else Cause.LOST
    assert (found.rule.result, found.cause) == (FAILED, cause)


# --- Streams that begin with an error ---------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "cause"),
    [
        (400, 400, Cause.REFUSED),
        (499, 499, Cause.REFUSED),
        (500, 500, Cause.STATUS),
        (599, 599, Cause.STATUS),
        (399, 502, Cause.STATUS),
        (600, 502, Cause.STATUS),
        ("e", 502, Cause.STATUS),
        (None, 502, Cause.STATUS),
    ],
)
async def test_a_stream_that_begins_with_an_error_gets_its_status(
    code: Any, status: int, cause: Cause
) -> None:
    first = event({"error": {"code": code, "message": "because", "type": "oh"}})
    found = await refusal(received(200, ping() + first, EVENTS))
    outcome = REFUSED if cause is Cause.REFUSED else ERRED
    assert (found.rule.result, found.cause) == (outcome, cause)
    reported = response_of(found)
    assert reported.status == status
    error = json.loads(reported.body)["error"]
    assert (error["message"], error["type"]) == ("because", "oh")


@pytest.mark.parametrize("begun", [role(), role() + token("a")])
async def test_so_does_one_of_which_nothing_was_passed_on_yet(begun: bytes) -> None:
    relay = received(200, begun + error_event("late"), EVENTS)
    found = await refusal(relay)
    assert (found.rule.result, found.cause) == (ERRED, Cause.STATUS)
    assert response_of(found).status == 500


# --- Errors of the connection -----------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome", "cause"),
    [
        (Code.WORKER_UNREACHABLE, FAILED, Cause.UNREACHABLE),
        (Code.WORKER_LOST, FAILED, Cause.LOST),
        (Code.WORKER_INCOMPLETE, FAILED, Cause.LOST),
        (Code.WORKER_PROTOCOL, FAILED, Cause.MALFORMED),
        (Code.WORKER_TIMEOUT, FAILED, Cause.SILENT),
        (Code.WORKER_SLOW, Result.SLOW, Cause.SLOW),
    ],
)
def test_an_error_of_the_connection_is_reported_unchanged(
    code: Code, outcome: Result, cause: Cause
) -> None:
    error = WorkerError(code, "because")
    assert failure_of(error) == Failure(cause, error)
    assert rule_of(cause).result is outcome


def test_every_error_of_a_worker_has_its_failure() -> None:
    """But a refused key, which is no error of the connection."""
    codes = {code for code in Code if code.startswith("worker_")}
    for code in codes - {Code.WORKER_REFUSED_KEY}:
        assert failure_of(WorkerError(Code(code), "")).rule.elsewhere


def test_a_drained_worker_is_not_blamed() -> None:
    error = DrainedError("gpu-1")
    assert error.code is Code.WORKER_LOST
    assert error.detail == "drained"
    assert "Worker gpu-1 was taken out of service" in error.message
    assert failure_of(error) == Failure(Cause.DRAINED, error)


NO, PAUSE, ASKED = Again.NO, Again.PAUSE, Again.ASKED
# For each cause: the code for the client, the result for the breaker, whether another
# worker may succeed, whether the same one may, and what else holds.
RULES: dict[Cause, tuple[Code, Result, bool, Again, str]] = {
    Cause.UNREACHABLE: (Code.WORKER_UNREACHABLE, FAILED, True, NO, "free declined"),
    Cause.CROWDED: (Code.WORKER_TIMEOUT, BUSY, True, ASKED, "free declined"),
    Cause.LOADING: (Code.NO_WORKER, BUSY, True, ASKED, "free declined"),
    Cause.BUSY: (Code.QUEUE_FULL, BUSY, True, ASKED, "declined"),
    Cause.LOST: (Code.WORKER_LOST, FAILED, True, PAUSE, "begun"),
    Cause.STATUS: (Code.WORKER_PROTOCOL, ERRED, True, PAUSE, "begun"),
    Cause.SLOW: (Code.WORKER_SLOW, Result.SLOW, True, NO, "begun hung"),
    Cause.SILENT: (Code.WORKER_TIMEOUT, FAILED, True, NO, "begun hung"),
    Cause.MALFORMED: (Code.WORKER_PROTOCOL, FAILED, True, NO, "begun"),
    Cause.KEY: (Code.WORKER_REFUSED_KEY, FAILED, True, NO, ""),
    Cause.MODEL: (Code.NO_WORKER, REFUSED, True, NO, "free begun"),
    Cause.CONTEXT: (Code.CONTEXT_LENGTH, REFUSED, True, NO, "free"),
    Cause.UNFOLDABLE: (Code.WORKER_PROTOCOL, REFUSED, True, Again.AS_SENT, ""),
    Cause.DRAINED: (Code.WORKER_LOST, Result.HUB_STOPPED, True, NO, "free begun"),
    Cause.DIVERGED: (Code.WORKER_INCOMPLETE, REFUSED, False, NO, ""),
    Cause.REFUSED: (Code.BAD_REQUEST, REFUSED, False, NO, ""),
}


@pytest.mark.parametrize("cause", Cause)
def test_each_cause_has_its_rule(cause: Cause) -> None:
    code, result, elsewhere, again, rest = RULES[cause]
    rule = rule_of(cause)
    assert rule[:4] == (code, result, elsewhere, again)
    flags = ("free", "declined", "begun", "hung")
    assert [flag for flag in flags if getattr(rule, flag)] == rest.split()


@pytest.mark.parametrize("error", [DivergedError, UnreadableError])
def test_what_cannot_be_the_rest_of_an_answer_is_no_failure(
    error: type[DivergedError],
) -> None:
    """The worker was asked for too much; no other one would do better."""
    raised = error("another text")
    assert failure_of(raised) == Failure(Cause.DIVERGED, raised)
    assert not rule_of(Cause.DIVERGED).elsewhere


# --- Streams that make up no answer -----------------------------------------------


def test_a_stream_that_is_of_no_use_is_not_the_workers_fault() -> None:
    """The request goes out again as it was."""
    found = failure_of_assembly(LostTextError("no text"))
    assert (found.rule.result, found.cause) == (REFUSED, Cause.UNFOLDABLE)
    assert error_of(found).code is Code.WORKER_PROTOCOL


def test_nor_is_a_stream_that_can_never_be_folded() -> None:
    found = failure_of_assembly(UnfoldableError("an event cannot be read"))
    assert (found.rule.result, found.cause) == (REFUSED, Cause.UNFOLDABLE)
    assert found.lasting
    assert not failure_of_assembly(LostTextError("no text")).lasting
    assert error_of(found).code is Code.WORKER_PROTOCOL
    assert error_of(found).detail == "an event cannot be read"
    assert "event" not in error_of(found).message


@pytest.mark.parametrize(
    ("code", "status", "outcome", "cause"),
    [
        (400, 400, REFUSED, Cause.REFUSED),
        (500, 500, ERRED, Cause.STATUS),
        (None, 502, ERRED, Cause.STATUS),
    ],
)
def test_an_error_in_a_stream_becomes_the_answers_own(
    code: int | None, status: int, outcome: Result, cause: Cause
) -> None:
    error = AssemblyError("it reported an error", EventError("because", "oh", code))
    found = failure_of_assembly(error)
    assert (found.rule.result, found.cause) == (outcome, cause)
    reported = response_of(found)
    assert reported.status == status
    assert json.loads(reported.body)["error"]["message"] == "because"
