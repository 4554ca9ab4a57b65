"""One error, in the shape of each API."""

from __future__ import annotations

import json

import pytest

from gollama_proxy.wire.ending import read_end
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.openai import Api, Ending
from gollama_proxy.wire.shapes import ErrorReshaper, error_event, status_body
from gollama_proxy.wire.sse import EventError, error_in, events_in

LOST = WorkerError(Code.WORKER_LOST, "The worker\nwas lost.").body()
OTHERS = [Api.OPENAI, Api.NATIVE]


@pytest.mark.parametrize("api", [*OTHERS, Api.RESPONSES])
def test_a_status_has_openai_s_shape(api: Api) -> None:
    assert status_body(api, 502, LOST) == LOST
    assert status_body(api, 500, b"anything") == b"anything"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (LOST, "The worker\nwas lost."),
        (b'{"error":"no"}', "no"),
        (b'{"detail":"no"}', "no"),
        (b'{"object":"error","message":"no","code":400}', "no"),
        (b'"no"', "no"),
        (b"{}", "A worker refused"),
        (b"[]", "A worker refused"),
        (b'{"error":{"message":{}}}', "A worker refused"),
        (b"<html>", "A worker refused"),
        (b"\xff", "A worker refused"),
        (b"[" * 99_999, "A worker refused"),
    ],
)
def test_anthropic_s_shape_has_the_message_of_any_other(
    body: bytes, message: str
) -> None:
    told = json.loads(status_body(Api.ANTHROPIC, 400, body))
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_anthropic_s_types(status: int, kind: str) -> None:
    told = json.loads(status_body(Api.ANTHROPIC, status, LOST))
    assert told["error"]["type"] == kind
    assert told["error"]["code"] == "worker_connection_lost"  # for programs, as ever


def test_an_error_in_anthropic_s_shape_keeps_its_type() -> None:
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"no"}}'
    assert status_body(Api.ANTHROPIC, 500, body) == body
    event = b"event: error\ndata: %b\n\n" % body
    assert ErrorReshaper(Api.ANTHROPIC).feed(event) == event


@pytest.mark.parametrize("api", OTHERS)
def test_an_event_is_data_without_a_name(api: Api) -> None:
    event = error_event(api, 502, LOST)
    assert event == b"data: " + LOST + b"\n\n"
    assert list(events_in(event)) == [LOST]
    assert error_in(LOST) == EventError(
        "The worker\nwas lost.", "server_error", "worker_connection_lost"
    )
    assert read_end(event, Ending.DONE).failed
    assert b"without a reason" in error_event(api, 502, b"a\n\nb")


@pytest.mark.parametrize("api", [Api.ANTHROPIC, Api.RESPONSES])
@pytest.mark.parametrize("body", [LOST, b'{\n\n"error":\n{}}', b"a\n\nb"])
def test_an_event_has_a_name_where_events_have_names(api: Api, body: bytes) -> None:
    event = error_event(api, 502, body)
    assert event.startswith(b"event: error\ndata: {")
    assert event.count(b"\n") == 3
    assert json.loads(event[19:])["type"] == "error"
    assert read_end(event, Ending.NAMED).failed


def test_the_event_of_responses_goes_on_counting() -> None:
    before = b'data: {"sequence_number": 41}\n\ndata: {"sequence_number":42}\n\n'
    event = json.loads(error_event(Api.RESPONSES, 502, LOST, before)[19:])
    assert event == {
        "type": "error",
        "code": "worker_connection_lost",
        "message": "The worker\nwas lost.",
        "param": None,
        "sequence_number": 43,
    }


def test_an_event_without_an_end_is_not_held_without_limit() -> None:
    reshaper = ErrorReshaper(Api.ANTHROPIC)
    sent = b"".join(
        reshaper.feed(b"event: error\ndata: " + b"x" * 9999) for _ in "x" * 9
    )
    assert len(sent) > 64 << 10
    assert repr(reshaper) == "<ErrorReshaper anthropic held=0>"


def test_held_bytes_are_returned_at_the_end() -> None:
    reshaper = ErrorReshaper(Api.ANTHROPIC)
    assert reshaper.feed(b"data: a\n\nevent: err") == b"data: a\n\n"
    assert reshaper.finish() == b"event: err"
    assert reshaper.finish() == b""
