"""One error, in the shape of each API."""

from __future__ import annotations

import json

import pytest

from gollama_proxy.wire.answer import read_end
from gollama_proxy.wire.errors import (
    Code,
    Overflow,
    WorkerError,
    status_body,
    status_of,
    write_error_event,
)
from gollama_proxy.wire.schema import Api, Ending
from gollama_proxy.wire.sse import ErrorReshaper, EventError, error_in, events_in
from tests.fakes.cases import case

LOST = WorkerError(Code.WORKER_LOST, "The worker\nwas lost.").body()
OTHERS = [Api.OPENAI, Api.NATIVE]


@pytest.mark.parametrize("api", [*OTHERS, Api.RESPONSES])
def test_a_status_has_openais_shape(api: Api) -> None:
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
def test_anthropics_shape_has_the_same_message(body: bytes, message: str) -> None:
    reported = json.loads(status_body(Api.ANTHROPIC, 400, body))
    assert reported["type"] == "error"
    assert reported["error"]["type"] == "invalid_request_error"
    assert reported["error"]["message"].startswith(message)


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
def test_anthropics_types_follow_the_status(status: int, kind: str) -> None:
    reported = json.loads(status_body(Api.ANTHROPIC, status, LOST))
    assert reported["error"]["type"] == kind
    assert (
        reported["error"]["code"] == "worker_connection_lost"
    )  # for programs, as ever


def test_an_error_in_anthropics_shape_keeps_its_type() -> None:
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"no"}}'
    assert status_body(Api.ANTHROPIC, 500, body) == body
    event = b"event: error\ndata: %b\n\n" % body
    assert ErrorReshaper(Api.ANTHROPIC).feed(event) == event


@pytest.mark.parametrize("api", OTHERS)
def test_an_event_is_data_without_a_name(api: Api) -> None:
    event = write_error_event(api, 502, LOST)
    assert event == b"data: " + LOST + b"\n\n"
    assert list(events_in(event)) == [LOST]
    assert error_in(LOST) == EventError(
        "The worker\nwas lost.", "server_error", "worker_connection_lost"
    )
    assert read_end(event, Ending.DONE).failed
    assert b"without a reason" in write_error_event(api, 502, b"a\n\nb")


@pytest.mark.parametrize("api", [Api.ANTHROPIC, Api.RESPONSES])
@pytest.mark.parametrize("body", [LOST, b'{\n\n"error":\n{}}', b"a\n\nb"])
def test_an_event_has_a_name_where_events_have_names(api: Api, body: bytes) -> None:
    event = write_error_event(api, 502, body)
    assert event.startswith(b"event: error\ndata: {")
    assert event.count(b"\n") == 3
    assert json.loads(event[19:])["type"] == "error"
    assert read_end(event, Ending.NAMED).failed


def test_the_event_of_responses_goes_on_counting() -> None:
    before = b'data: {"sequence_number": 41}\n\ndata: {"sequence_number":42}\n\n'
    event = json.loads(write_error_event(Api.RESPONSES, 502, LOST, before)[19:])
    assert event == {
        "type": "error",
        "code": "worker_connection_lost",
        "message": "The worker\nwas lost.",
        "param": None,
        "sequence_number": 43,
    }


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (
            b'{"error":{"message":"no","type":"server_error","code":500}}',
            "server_error",
        ),
        (b'{"error":{"message":"no","type":7,"code":500}}', None),
        (b'{"error":"no"}', None),
    ],
)
def test_the_event_of_responses_has_a_name_for_its_code(
    body: bytes, code: str | None
) -> None:
    event = json.loads(write_error_event(Api.RESPONSES, 500, body)[19:])
    assert event == {
        "type": "error",
        "code": code,
        "message": "no",
        "param": None,
        "sequence_number": 0,
    }


def test_an_error_without_a_reason_has_all_fields() -> None:
    event = write_error_event(Api.OPENAI, 502, b"<html>")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {
            "message": (
                "A worker refused the request without a reason that could be read."
            ),
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *((400, 400), (429, 429), (503, 503), (599, 599)),
        *((399, 500), (600, 500), (200, 500), ("503", 500), (None, 500)),
    ],
)
def test_the_status_of_an_event_is_its_code(code: object, status: int) -> None:
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    assert status_of(body) == status


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


# --- A prompt that is too long for a worker ---------------------------------------


LIMIT = "This model's maximum context length is 4096 tokens"
# Message, tokens of the prompt and of the context; 0 where it has none.
MESSAGES = [
    # vLLM, from old to new
    (
        (
            f"{LIMIT}. However, you requested 5000 tokens (4500 in the "
            "messages, 500 in "
            "the completion). Please reduce the length of the messages or completion."
        ),
        4500,
        4096,
    ),
    (f"{LIMIT}. However, you requested 5000 tokens in total.", 5000, 4096),
    (f"{LIMIT}. However, your request has 5000 input tokens.", 5000, 4096),
    (
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 2000. "
            f"{LIMIT} and your request has 3000 input tokens (2000 > 4096 - 3000)."
        ),
        3000,
        4096,
    ),
    (
        (
            "You passed 5001 input tokens and requested 1 output tokens. However, the "
            "model's context length is only 4096 tokens, resulting in a maximum input "
            "length of 4095 tokens. Please reduce the length of the input prompt."
        ),
        5001,
        4096,
    ),
    (f"{LIMIT}, but the prompt contains 5000 input tokens", 5000, 4096),
    # OpenAI
    (f"{LIMIT}. However, your messages resulted in 5000 tokens.", 5000, 4096),
    # SGLang
    (
        (
            "Requested token count exceeds the model's maximum context length of 4096 "
            "tokens. You requested a total of 5000 tokens: 4500 tokens from the input "
            "messages and 500 tokens for the completion."
        ),
        4500,
        4096,
    ),
    (
        (
            "The input (5000 tokens) is longer than the model's context length "
            "(4096 tokens)."
        ),
        5000,
        4096,
    ),
    # llama-cpp-python
    ("Requested tokens (5,000) exceed context window of 4096", 5000, 4096),
    # LM Studio
    (
        (
            "Trying to keep the first 5000 tokens when context the "
            "overflows. However, the "
            "model is loaded with context length of only 4096 tokens, "
            "which is not enough."
        ),
        5000,
        4096,
    ),
    (
        (
            "The number of tokens to keep from the initial prompt is greater than the "
            "context length."
        ),
        0,
        0,
    ),
    ("Context size has been exceeded.", 0, 0),
    # Ollama
    ("the input length exceeds the context length", 0, 0),
    ("input length exceeds maximum context length", 0, 0),
    # TGI
    (
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` "
            "must be <= 4096. "
            "Given: 5000 `inputs` tokens and 20 `max_new_tokens`"
        ),
        5000,
        4096,
    ),
    (
        "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000",
        5000,
        4096,
    ),
    # Others that are seen behind proxies
    ("prompt is too long: 5000 tokens > 4096 maximum", 5000, 4096),
    (
        (
            "This model's maximum prompt length is 4096 but the request contains 5000 "
            "tokens."
        ),
        5000,
        4096,
    ),
    (
        (
            "The input token count (5000) exceeds the maximum number of tokens allowed "
            "(4096)."
        ),
        5000,
        4096,
    ),
    # llama-server without its fields
    (
        "the request exceeds the available context size, try increasing it",
        0,
        0,
    ),
    (
        (
            "request (5000 tokens) exceeds the available context size "
            "(4096 tokens), try "
            "increasing it"
        ),
        5000,
        4096,
    ),
]


def test_the_words_of_servers_are_read_in_every_shape_of_an_error() -> None:
    for message, tokens, context in MESSAGES:
        with case((message, tokens, context)):
            for overflow in (
                {"error": {"message": message, "type": "BadRequestError", "code": 400}},
                {"object": "error", "message": message, "type": "BadRequestError"},
                {"error": message, "error_type": "validation"},
                {"detail": message},
            ):
                body = json.dumps(overflow).encode()
                assert Overflow.read(body) == Overflow(message, tokens, context)


@pytest.mark.parametrize(
    "name",
    ["exceed_context_size_error", "context_length_exceeded", "context_window_exceeded"],
)
@pytest.mark.parametrize("field", ["type", "code"])
def test_a_type_or_a_code_is_enough(field: str, name: str) -> None:
    body = json.dumps({"error": {"message": "m", field: name}}).encode()
    assert Overflow.read(body) == Overflow("m")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"n_prompt_tokens": 9, "n_ctx": 5}, (9, 5)),
        ({"n_prompt_tokens": 1, "n_ctx": -5}, (1, 0)),
        ({"n_prompt_tokens": 10**8, "n_ctx": 10**30}, (0, 0)),
        ({"n_prompt_tokens": "9", "n_ctx": True}, (0, 0)),
    ],
)
def test_the_numbers_of_a_llama_server(
    counts: dict[str, object], expected: tuple[int, int]
) -> None:
    error = {"message": "m", "type": "exceed_context_size_error", **counts}
    assert Overflow.read(json.dumps({"error": error}).encode()) == ("m", *expected)


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"Invalid context_length: must be a number"}}',
        b'{"error":{"message":"The context window is not configured"}}',
        b'{"error":{"message":"max_tokens must be at least 1"}}',
        b'{"error":{"message":"input is too large to process. increase the batch"}}',
        b'{"error":{"message":7,"type":{}}}',
        b'{"error":null}',
        b"[]",
        b"\xff",
        b"",
        b"[" * 10_000,
    ],
)
def test_other_errors_are_not_overflows(body: bytes) -> None:
    assert Overflow.read(body) is None


def test_numbers_that_a_client_may_have_written_are_not_read() -> None:
    quoting = f"Invalid value for 'stop': \"{LIMIT}, you requested 5000 tokens\""
    assert Overflow.of(quoting, ()) == Overflow(quoting, 0, 0)


def test_a_refusal_does_not_show_quotations() -> None:
    assert repr(Overflow("secret", 9, 5)) == "<Overflow of 9 tokens in 5>"
