"""A struct of what users and models write shows none of it."""

from __future__ import annotations

import msgspec
import pytest

from gollama_proxy.wire.fields import WANTED
from gollama_proxy.wire.schema import ENDPOINTS, Api, Ending, Endpoint, Private


class Said(Private):
    text: str
    inner: Said | None = None


def test_no_field_of_a_struct_is_shown() -> None:
    said = Said("secret", Said("other"))
    assert repr(said) == "<Said>"
    assert repr([said]) == "[<Said>]"


def test_a_quiet_struct_is_still_a_struct() -> None:
    assert msgspec.json.decode(b'{"text":"a"}', type=Said) == Said("a")
    assert msgspec.json.encode(Said("a")) == b'{"text":"a","inner":null}'


MARKED = {
    Ending.DONE: {"/v1/chat/completions", "/chat/completions", "/v1/completions"},
    Ending.STOP: {"/completion", "/completions", "/infill"},
    Ending.TRANSCRIPT: {"/v1/audio/transcriptions", "/audio/transcriptions"},
    Ending.NAMED: {"/v1/responses", "/responses", "/v1/messages"},
    Ending.BODY: {
        "/v1/embeddings",
        "/embeddings",
        "/embedding",
        "/v1/rerank",
        "/v1/reranking",
        "/rerank",
        "/reranking",
        "/v1/systemone",
        "/v1/chat/completions/input_tokens",
        "/chat/completions/input_tokens",
        "/v1/responses/input_tokens",
        "/responses/input_tokens",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/apply-template",
    },
}


@pytest.mark.parametrize("ending", list(Ending))
def test_every_route_has_the_ending_that_its_api_has(ending: Ending) -> None:
    paths = {path for path, route in ENDPOINTS.items() if route.ending is ending}
    assert paths == MARKED[ending]


def test_every_route_belongs_to_one_api() -> None:
    of = {api: {p for p, e in ENDPOINTS.items() if e.api is api} for api in Api}
    assert of[Api.ANTHROPIC] == {"/v1/messages", "/v1/messages/count_tokens"}
    assert of[Api.RESPONSES] >= {"/v1/responses", "/responses"}
    assert of[Api.OPENAI] >= {
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/rerank",
    }
    assert of[Api.NATIVE] >= {
        "/completion",
        "/completions",
        "/infill",
        "/embeddings",
        "/tokenize",
        "/detokenize",
        "/apply-template",
    }


def test_the_key_of_a_route_is_the_path_that_a_worker_gets() -> None:
    assert all(path == endpoint.path for path, endpoint in ENDPOINTS.items())


@pytest.mark.parametrize(
    "path",
    [
        "/props",
        "/slots",
        "/slots/0",
        "/tools",
        "/lora-adapters",
        "/models/load",
        "/models/unload",
        "/metrics",
        "/v1",
        "/",
        "",
    ],
)
def test_routes_that_change_or_reveal_a_worker_are_not_reachable(path: str) -> None:
    assert path not in ENDPOINTS


def test_both_spellings_of_a_route_ask_for_the_same_arrays() -> None:
    """A path with and without `/v1` must not differ in what it lets through."""
    for path, endpoint in ENDPOINTS.items():
        cousin = ENDPOINTS.get(f"/v1{path}", endpoint)
        assert cousin.arrays == endpoint.arrays


def test_an_array_that_is_asked_for_is_one_that_the_scanner_looks_for() -> None:
    arrays = {name for endpoint in ENDPOINTS.values() for name in endpoint.arrays}
    assert arrays == {"messages", "documents", "tokens"}
    assert arrays <= WANTED


def test_a_route_does_not_stream_by_default() -> None:
    assert Endpoint("/x") == Endpoint("/x", Ending.BODY, (), slot=True, form=False)
    assert not Endpoint("/x").generates
