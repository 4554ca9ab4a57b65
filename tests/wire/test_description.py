"""What a worker reports about itself is read field by field, and never trusted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.wire.description import (
    MAX_NAME,
    MOST_CONTEXT,
    MOST_MODELS,
    Description,
    DescriptionError,
    Listing,
    Model,
    describe,
    read_models,
    read_progress,
)
from tests.fakes.cases import case

IMAGE, PICTURES_SOUND = ("image",), ("image", "audio")
ONE = {"data": [{"id": "a"}]}
FIELDS = (
    "id",
    "model",
    "meta",
    "n_ctx",
    "max_model_len",
    "context_length",
    "status",
    "value",
    "total_slots",
    "build_info",
    "default_generation_settings",
    "architecture",
    "input_modalities",
    "modalities",
)


def encoded(answer: Any) -> bytes:
    return json.dumps(answer).encode()


def listing_of(*entries: Any) -> Listing:
    return read_models(encoded({"data": entries}))


def names_in(listing: Listing) -> list[str]:
    return [model.name for model in describe(listing, b"").models]


def described(models: Any = ONE, props: Any = None) -> Description:
    """Describe a worker that answers this to `/v1/models` and `/props`."""
    return describe(read_models(encoded(models)), encoded(props or {}))


def test_models_and_their_context() -> None:
    """A model's own context first, then the worker's, else unknown."""
    for listed, props, models in [
        ([], {}, ()),
        ([{"id": "a"}], {}, (Model("a"),)),
        ([{"id": "a", "meta": None}], {}, (Model("a"),)),
        ([{"id": "a", "meta": {}}], {}, (Model("a"),)),
        ([{"id": "a", "meta": {"n_ctx": None}}], {}, (Model("a"),)),
        (
            [{"id": "a", "meta": {"n_ctx": 7}}, {"id": "b"}],
            {"default_generation_settings": {"n_ctx": 9}},
            (Model("a", 7), Model("b", 9)),
        ),
        ([{"id": "a", "object": "model", "owned_by": 1}], {}, (Model("a"),)),
        *(
            ([{"id": "a", "meta": meta}], {}, (Model("a"),))
            for meta in [7, "x", [], {"n_ctx": "512"}, {"n_ctx": {}}, {"n_ctx": 1.5}]
        ),
        ([{"id": "a"}, {"id": "a", "meta": {"n_ctx": 7}}], {}, (Model("a"),)),
        ([{"id": "a", "max_model_len": 7}], {}, (Model("a", 7),)),  # vLLM, SGLang
        ([{"id": "a", "max_model_len": None}], {}, (Model("a"),)),
        (
            [{"id": "a", "parameters": {"max_seq_len": 7}}],
            {},
            (Model("a", 7),),
        ),  # Tabby
        ([{"id": "a", "parameters": "max_seq_len"}], {}, (Model("a"),)),
        ([{"id": "a", "context_length": 9}], {}, (Model("a", 9),)),
        ([{"id": "a", "context_window": "9"}], {}, (Model("a"),)),
        (
            [{"id": "a", "loaded_context_length": 7, "context_length": 9}],
            {},
            (Model("a", 7),),
        ),
        *(
            ([{"id": "a"}], props, (Model("a", 9),))
            for odd in [None, 7, "x", [], {}]
            for props in [
                {
                    "total_slots": odd,
                    "build_info": odd,
                    "default_generation_settings": {"n_ctx": 9, "params": odd},
                }
            ]
        ),
        ([{"id": "é/ü:7b"}], {}, (Model("é/ü:7b"),)),
        (  # as a router reports it
            [{"id": "a"}],
            {"default_generation_settings": {"params": None, "n_ctx": 0}},
            (Model("a"),),
        ),
        *(
            ([{"id": "a", "status": status}], {}, (Model("a", None, *loaded),))
            for status, *loaded in [
                ({"value": "loaded", "args": ["-m", "a.gguf"]}, True),
                ({"value": "unloaded"}, False),
                ({"value": "loading"}, False, True),
                ({"value": "sleeping"}, False),
                ({"value": "unloaded", "failed": True, "exit_code": 1}, False),
                ({"value": None}, None),
                ({"value": True}, None),
                ({}, None),
                ("loaded", None),
                (["loaded"], None),
                (None, None),
            ]
        ),
        *(
            ([{"id": "a", **entry}], props, (Model("a", inputs=inputs),))
            for entry, props, inputs in [
                ({}, {"modalities": {"audio": True, "vision": True}}, PICTURES_SOUND),
                ({}, {"modalities": {"vision": False, "audio": False}}, ()),
                ({}, {"modalities": {"vision": "yes", "smell": True}}, None),
                ({}, {"modalities": [True]}, None),
                ({"architecture": {"input_modalities": ["text", "image"]}}, {}, IMAGE),
                (
                    {"architecture": {"input_modalities": ["image", 7, [], "x"]}},
                    {"modalities": {"vision": False}},
                    IMAGE,
                ),
                ({"architecture": {"input_modalities": "image"}}, {}, None),
                ({"architecture": ["image"]}, {}, None),
                ({"architecture": {"input_modalities": ["text"]}}, {}, ()),
            ]
        ),
    ]:
        with case((listed, props, models)):
            assert described({"data": listed}, props).models == models


ODD_ENTRIES = [
    None,
    7,
    "b",
    [],
    {},
    {"id": None},
    {"id": 7},
    {"id": ["b"]},
    {"id": ""},
    {"name": "b"},
]


@pytest.mark.parametrize("odd", ODD_ENTRIES, ids=repr)
def test_an_odd_entry_costs_no_other(odd: Any) -> None:
    listing = listing_of({"id": "a"}, odd, {"id": "c"})
    assert names_in(listing) == ["a", "c"]
    assert listing.note == "/v1/models has entries without a usable name: 1, skipped"


def test_an_entry_with_bytes_that_are_no_text_costs_no_other() -> None:
    body = b'{"data": [{"id": "\xff"}, {"id": "b", "owned_by": "\xff"}, {"id": "c"}]}'
    assert "c" in names_in(read_models(body))


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ({"data": None}, []),
        ({"data": []}, []),
        ({"data": None, "models": [{"model": "a"}]}, ["a"]),
        (
            {"models": [{"name": "a:7b", "model": "a:7b"}, {"model": "b"}]},
            ["a:7b", "b"],
        ),
        ({"models": []}, []),
        ({"data": {}, "models": [{"model": "a"}]}, ["a"]),
        ({"data": [{"id": "a"}], "models": [{"model": "b"}]}, ["a"]),
        ({"data": [{"id": "a"}], "models": 7}, ["a"]),
    ],
    ids=repr,
)
def test_other_shapes_of_model_lists_are_accepted(
    listed: Any, names: list[str]
) -> None:
    """Go writes an empty list as null; Ollama's own list is called `models`."""
    result = described(listed)
    assert [model.name for model in result.models] == names


@pytest.mark.parametrize("odd", [None, "x", [], {}, 7.5, True], ids=repr)
@pytest.mark.parametrize(
    "field", ["total_slots", "build_info", "default_generation_settings"]
)
def test_an_odd_property_costs_no_other(field: str, odd: Any) -> None:
    props = {
        "total_slots": 3,
        "build_info": "b1",
        "default_generation_settings": {"n_ctx": 512},
    }
    result = described(ONE, props | {field: odd})
    expected = {"total_slots": 3, "build_info": "b1", "context": 512}
    seen = {
        "total_slots": result.slots,
        "build_info": result.build,
        "context": result.context,
    }
    field = field.replace("default_generation_settings", "context")
    del expected[field], seen[field]
    assert seen == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[]", "/v1/models sent an answer that cannot be read"),
        (b"", "/v1/models sent an answer that cannot be read"),
        (b"\xff", "/v1/models sent an answer that cannot be read"),
        (b"[" * 100_000, "/v1/models sent an answer that cannot be read"),
        (b"{}", "/v1/models has no list of models"),
        (b'{"data": "many"}', "/v1/models has no list of models"),
        (b'{"data": [null]}', "/v1/models has no name that can be used"),
        (b'{"data": [{"id": ""}, {"id": 7}]}', "/v1/models has no name that can"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_a_list_that_cannot_be_used_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(DescriptionError) as info:
        read_models(body)
    assert str(info.value).startswith(reason)


@pytest.mark.parametrize("props", [b"", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_properties_that_cannot_be_read_stay_unknown(props: bytes) -> None:
    model = {"id": "a", "meta": {"n_ctx": 512}}
    expected = Description((Model("a", 512),), None, 512, "")
    assert describe(listing_of(model), props) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=5), JSON, st.binary(max_size=50), st.binary(max_size=50))
def test_anything_is_described_or_refused(
    listed: list[Any], props: Any, junk: bytes, more: bytes
) -> None:
    for models in (encoded({"data": listed}), encoded({"models": listed}), junk):
        for text in (encoded(props), more):
            try:
                result = describe(read_models(models), text)
            except DescriptionError:
                continue
            assert all(model.name.isprintable() for model in result.models)
            contexts = [result.context, *(model.context for model in result.models)]
            assert all(0 < each <= MOST_CONTEXT for each in contexts if each)
            assert result.slots is None or abs(result.slots) <= 1 << 31
            assert result.build.isprintable()


# --- What is too much, or cannot be true ------------------------------------------


def test_only_the_first_of_too_many_models_are_known() -> None:
    """Each request looks through all of them."""
    listed = [{"id": f"m{n}"} for n in range(MOST_MODELS + 5)]
    names = [model.name for model in described({"data": listed}).models]
    assert names == [f"m{n}" for n in range(MOST_MODELS)]


@pytest.mark.parametrize(
    "name", ["", "two\nlines", "\x1b[31m", "a\x00b", "\u2028", "x" * (MAX_NAME + 1)]
)
def test_a_name_that_could_not_be_shown_is_skipped(name: str) -> None:
    """Names get into logs, terminals and replies."""
    models = {"data": [{"id": name}, {"id": "x" * MAX_NAME}, {"id": "modèle 7b"}]}
    names = [model.name for model in described(models).models]
    assert names == ["x" * MAX_NAME, "modèle 7b"]


@pytest.mark.parametrize("context", [-1, 0, MOST_CONTEXT + 1, 10**400])
def test_an_impossible_context_is_unknown(context: int) -> None:
    settings = {"default_generation_settings": {"n_ctx": context}}
    models = {"data": [{"id": "a", "meta": {"n_ctx": context}}, {"id": "b"}]}
    result = described(models, settings)
    assert result.context is None
    assert [model.context for model in result.models] == [None, None]


@pytest.mark.parametrize("slots", [10**400, -(10**400), 1 << 31, 2.5, "4"])
def test_slots_that_are_not_a_number_are_unknown(slots: object) -> None:
    """Such as could not even be shown in the metrics."""
    assert described(props={"total_slots": slots}).slots is None


def test_the_name_of_a_build_is_short_and_printable() -> None:
    assert described(props={"build_info": "b" * 5000}).build == "b" * 100
    assert described(props={"build_info": "\x1b[2J"}).build == ""


# --- A model that is being loaded -------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"status": "loading"}, None),
        ({"status": "loading", "progress": ["text_model", "text_model", 0.5]}, 0.5),
        ({"status": "loading", "progress": ["a b c d", "c", 0.4]}, 0.6),
        ({"status": "loading", "progress": ["a b", "b", 7]}, 1.0),
        ({"status": "loading", "progress": ["a b", "a", -7]}, 0.0),
        ({"status": "loading", "progress": ["a b", "x", 0.5]}, None),
        ({"status": "loading", "progress": ["", "", 0.5]}, None),
    ],
)
def test_progress_counts_the_stages(data: Any, found: float | None) -> None:
    if "progress" in data:
        stages, current, value = data["progress"]
        data["progress"] = {
            "stages": stages.split(),
            "current": current,
            "value": value,
        }
    event = {"model": "tiny", "event": "status_change", "data": data}
    expected = None if found is None else ("tiny", found)
    assert read_progress(json.dumps(event).encode()) == expected


@pytest.mark.parametrize("status", ["loaded", "unloaded", "sleeping", "new"])
def test_any_other_status_ends_the_progress(status: str) -> None:
    event = {"model": "tiny", "event": "model_status", "data": {"status": status}}
    assert read_progress(json.dumps(event).encode()) == ("tiny", None)


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"[DONE]",
        b"[" * 10_000,
        b'{"model": "*", "event": "models_reload"}',
        b'{"model": "a", "event": "download_progress", "data": {"u": {"done": 1}}}',
        b'{"model": 1, "data": {"status": "loading"}}',
        b'{"model": "a", "data": {"status": "loading", "progress": {"value": NaN}}}',
    ],
)
def test_other_events_are_ignored(event: bytes) -> None:
    assert read_progress(event) is None
