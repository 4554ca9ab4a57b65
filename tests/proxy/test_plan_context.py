"""The error of a prompt that fits nowhere."""

from __future__ import annotations

import json

from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.plan import MOST_OFFERS, too_long
from gollama_proxy.wire.description import Check, Description, Model
from gollama_proxy.wire.errors import Code, Overflow
from tests.fakes.pool import worker


def offering(index: int, *models: tuple[str, int | None]) -> Worker:
    made = worker(index)
    reported = tuple(Model(name, context) for name, context in models)
    made.observe(Check.OK, "ok", Description(reported))
    return made


def test_the_error_lists_what_each_worker_offers() -> None:
    big, small = offering(0, ("qwen", 4096)), offering(1, ("qwen", 1024), ("phi", 512))
    pools = [Pool("qwen", (big, small)), Pool("phi", (small,))]
    error = too_long(pools, 5000)
    assert error is not None
    assert (error.code, error.code.status) == (Code.CONTEXT_LENGTH, 400)
    assert error.code.type == "invalid_request_error"
    assert error.message == (
        "This model's maximum context length is 4096 tokens, and the prompt has 5000: "
        "request (5000 tokens) exceeds the available context size (4096 tokens), "
        "try increasing it. The workers offer: "
        "qwen on w0 4096, qwen on w1 1024, phi on w1 512."
    )
    assert error.fields == {"n_prompt_tokens": 5000, "n_ctx": 4096}


def test_llama_servers_own_routes_have_its_own_type() -> None:
    pools = [Pool("qwen", (offering(0, ("qwen", 4096)),))]
    error = too_long(pools, 5000, native=True)
    assert error is not None
    reported = json.loads(error.body())["error"]
    assert (reported["type"], reported["code"]) == ("exceed_context_size_error", 400)
    assert (reported["n_prompt_tokens"], reported["n_ctx"]) == (5000, 4096)


def test_the_words_and_the_numbers_of_a_refusal_are_kept() -> None:
    refusal = Overflow("the request exceeds what I have.", 5000, 1024)
    error = too_long([Pool("qwen", (offering(0, ("qwen", 4096)),))], 0, refusal)
    assert error is not None
    assert "has 5000: the request exceeds what I have. The workers" in error.message
    assert error.fields == {"n_prompt_tokens": 5000, "n_ctx": 4096}
    # Nothing else is known of the worker.
    error = too_long([Pool("qwen", (offering(0, ("qwen", None)),))], 0, refusal)
    assert error is not None
    assert error.message == "the request exceeds what I have."
    assert error.fields == {"n_prompt_tokens": 5000, "n_ctx": 1024}


def test_a_refusal_without_words_or_numbers_is_one() -> None:
    error = too_long([Pool("qwen", (offering(0, ("qwen", None)),))], 0, Overflow(""))
    assert error is not None
    assert "request exceeds the available context size, try" in error.message
    assert not error.fields


def test_unknown_values_are_left_out() -> None:
    silent, small = offering(0, ("qwen", None)), offering(1, ("qwen", 512))
    assert too_long([Pool("qwen", (silent,))], 7) is None
    error = too_long([Pool("qwen", (silent, small))], 0)
    assert error is not None
    assert "the prompt has more: request exceeds the available " in error.message
    assert error.message.endswith("offer: qwen on w1 512.")


def test_it_does_not_list_a_hundred() -> None:
    many = tuple(offering(index, ("qwen", 512)) for index in range(MOST_OFFERS + 3))
    error = too_long([Pool("qwen", many)], 700)
    assert error is not None
    assert error.message.count("qwen on") == MOST_OFFERS
    assert error.message.endswith("qwen on w7 512 and 3 more.")
