"""How servers refuse a prompt that is too long, each in words of its own."""

from __future__ import annotations

import json

import pytest

from gollama_proxy.wire.overflow import Overflow

LIMIT = "This model's maximum context length is 4096 tokens"
# Message, tokens of the prompt and of the context; 0 where it does not say.
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


@pytest.mark.parametrize(("message", "tokens", "context"), MESSAGES)
def test_the_words_of_servers_are_read_in_every_shape_of_an_error(
    message: str, tokens: int, context: int
) -> None:
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
        ({"n_ctx": -5}, (0, 0)),
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
def test_other_errors_are_other_errors(body: bytes) -> None:
    assert Overflow.read(body) is None


def test_numbers_that_a_client_may_have_written_are_not_read() -> None:
    quoting = f"Invalid value for 'stop': \"{LIMIT}, you requested 5000 tokens\""
    assert Overflow.of(quoting, ()) == Overflow(quoting, 0, 0)


def test_a_refusal_does_not_show_quotations() -> None:
    assert repr(Overflow("secret", 9, 5)) == "<Overflow of 9 tokens in 5>"
