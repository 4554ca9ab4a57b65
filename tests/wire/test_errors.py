"""Every error has one code, and the code decides the status, the type and the words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gollama_proxy.wire.errors import (
    Code,
    HubError,
    NoWorkerError,
    ProxyError,
    RequestError,
    WorkerError,
    error_body,
)
from tests.fakes.cases import case

# What programs rely on: the code's spelling, its status and its type.
TABLE = {
    "bad_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "model_missing": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "model_not_allowed": (403, "permission_error"),
    "priority_not_allowed": (403, "permission_error"),
    "request_cancelled": (403, "permission_error"),
    "insufficient_scope": (403, "permission_error"),
    "local_only": (403, "permission_error"),
    "address_refused": (403, "permission_error"),
    "model_not_found": (404, "invalid_request_error"),
    "unknown_url": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_timeout": (408, "invalid_request_error"),
    "conflict": (409, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_encoding": (415, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "expectation_failed": (417, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "queue_full": (429, "rate_limit_error"),
    "head_too_large": (431, "invalid_request_error"),
    "internal_error": (500, "server_error"),
    "unsupported_transfer_encoding": (501, "server_error"),
    "worker_unreachable": (502, "server_error"),
    "worker_connection_lost": (502, "server_error"),
    "worker_bad_response": (502, "server_error"),
    "worker_incomplete_answer": (502, "server_error"),
    "worker_refused_key": (502, "server_error"),
    "no_worker_available": (503, "server_error"),
    "queue_timeout": (503, "server_error"),
    "hub_draining": (503, "server_error"),
    "store_unavailable": (503, "server_error"),
    "worker_timeout": (504, "server_error"),
    "worker_slow": (504, "server_error"),
    "request_timeout": (504, "server_error"),
    "unsupported_http_version": (505, "server_error"),
}


def decoded(body: bytes) -> Any:
    return json.loads(body.decode())


def test_every_code_has_its_status_and_its_type() -> None:
    for code in list(Code):
        with case(code):
            assert (code.status, code.type) == TABLE[code]


def test_published_codes_are_never_removed() -> None:
    assert {str(code) for code in Code} == set(TABLE)


@pytest.mark.parametrize("cls", [RequestError, NoWorkerError, WorkerError, HubError])
def test_every_kind_of_error_is_a_proxy_error(cls: type[ProxyError]) -> None:
    error = cls(Code.NO_WORKER, "Nobody is there.", retry_after=2, detail="10.0.0.9")
    assert isinstance(error, ProxyError)
    assert str(error) == error.message == "Nobody is there."
    assert (error.code, error.param, error.retry_after, error.detail) == (
        Code.NO_WORKER,
        None,
        2,
        "10.0.0.9",
    )


def test_an_error_has_no_retry_and_no_detail_by_default() -> None:
    error = RequestError(Code.BAD_REQUEST, "No.")
    assert (error.param, error.retry_after, error.detail) == (None, None, "")
    assert error.allow == ""


def test_the_body_has_the_shape_of_the_openai_api() -> None:
    error = RequestError(Code.MODEL_NOT_FOUND, "No such model.", param="model")
    assert decoded(error.body()) == {
        "error": {
            "message": "No such model.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_an_error_may_have_further_fields() -> None:
    error = RequestError(Code.CONTEXT_LENGTH, "Too long.", fields={"n_ctx": 4096})
    assert decoded(error.body())["error"]["n_ctx"] == 4096


def test_all_four_keys_are_there_even_when_they_are_null() -> None:
    assert decoded(error_body("m", "t", None)) == {
        "error": {"message": "m", "type": "t", "param": None, "code": None}
    }


def test_the_repr_names_the_error_without_its_text() -> None:
    error = RequestError(Code.MODEL_NOT_FOUND, "No 'secret' here.", detail="secret")
    assert repr(error) == "<RequestError model_not_found>"


def test_the_detail_never_reaches_a_client() -> None:
    error = WorkerError(Code.WORKER_LOST, "It was lost.", detail="secret-host:8080")
    assert b"secret-host" not in error.body()


@settings(deadline=None)
@given(message=st.text(), param=st.none() | st.text())
def test_any_message_comes_back_as_it_was(message: str, param: str | None) -> None:
    """Also one that quotes a client: line ends, quotes, control characters, emoji."""
    body = RequestError(Code.BAD_REQUEST, message, param=param).body()
    error = decoded(body)["error"]
    assert (error["message"], error["param"]) == (message, param)
    assert b"\n" not in body  # it is also sent as the data line of an event
