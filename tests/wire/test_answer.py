"""What an answer reports: the tokens that it took, its model and its build."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from gollama_proxy.wire.answer import (
    Prefill,
    Usage,
    beginning,
    build_of,
    first_model,
    model_of,
    names_in,
    read_answer,
    read_tail,
    read_usage,
)
from gollama_proxy.wire.schema import Api
from tests.fakes.replies import (
    chat_completion,
    done,
    event,
    finish,
    named_event,
    role,
    timings_of,
    token,
    usage_of,
)


def read(api: Api, body: bytes, answers: int = 1) -> Usage:
    return read_usage(body, api, answers)


# --- Reading ----------------------------------------------------------------------

# The same answer in each API: a prompt of 290 tokens, 289 of them from the
# cache, and 4 tokens generated.  As a llama-server does it (build b10068).
OPENAI = {
    "completion_tokens": 4,
    "prompt_tokens": 290,
    "total_tokens": 294,
    "prompt_tokens_details": {"cached_tokens": 289},
}
RESPONSES = {
    "input_tokens": 290,
    "output_tokens": 4,
    "total_tokens": 294,
    "input_tokens_details": {"cached_tokens": 289},
}
ANTHROPIC = {"cache_read_input_tokens": 289, "input_tokens": 1, "output_tokens": 4}
NATIVE = {"tokens_predicted": 4, "tokens_evaluated": 290, "tokens_cached": 293}
TIMINGS = timings_of(4, 1, 289)
COUNTED = Usage(290, 4, Prefill(1, 289, 0.0))
TIMED = Usage(290, 4, Prefill(1, 289, TIMINGS["prompt_ms"] / 1000))


def whole(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("api", "fields", "expected"),
    [
        (Api.OPENAI, {"usage": OPENAI}, COUNTED),
        (Api.OPENAI, {"usage": OPENAI, "timings": TIMINGS}, TIMED),
        (Api.RESPONSES, {"usage": RESPONSES}, COUNTED),
        (Api.ANTHROPIC, {"usage": ANTHROPIC}, COUNTED),
        (Api.NATIVE, {**NATIVE, "timings": TIMINGS}, TIMED),
        (Api.NATIVE, NATIVE, Usage(290, 4)),
        # Half of the prompt is in the cache, and some of the rest has come into it.
        (
            Api.ANTHROPIC,
            {
                "usage": {
                    "input_tokens": 50,
                    "cache_creation_input_tokens": 95,
                    "cache_read_input_tokens": 145,
                    "cache_creation": {"ephemeral_5m_input_tokens": 95},
                    "output_tokens": 4,
                }
            },
            Usage(290, 4, Prefill(145, 145, 0.0)),
        ),
        (
            Api.ANTHROPIC,
            {
                "usage": {
                    "input_tokens": 9,
                    "cache_read_input_tokens": None,
                    "output_tokens": 0,
                }
            },
            Usage(9, 0),
        ),
        # Embeddings and ranks, which only cost their prompt.
        (Api.OPENAI, {"usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9)),
        (Api.OPENAI, {"usage": {"total_tokens": 9}}, Usage(9)),
        # What a llama-server is not.
        (
            Api.OPENAI,
            {"usage": usage_of(4, 9) | {"prompt_tokens_details": None}},
            Usage(9, 4),
        ),
        (
            Api.OPENAI,
            {"usage": usage_of(4, 9) | {"prompt_tokens_details": [1]}},
            Usage(9, 4),
        ),
        (Api.NATIVE, {"usage": OPENAI, **NATIVE}, COUNTED),
        (Api.OPENAI, {"usage": None}, Usage()),
        (Api.OPENAI, {"usage": [1], "timings": 5}, Usage()),
        (Api.OPENAI, {}, Usage()),
        # Transcriptions, which have the names of the Responses API.
        (
            Api.OPENAI,
            {"usage": {"input_tokens": 14, "output_tokens": 45}},
            Usage(14, 45),
        ),
        # Timings without all that makes a prompt's reading known.
        (Api.OPENAI, {"timings": {"prompt_n": 5}}, Usage(5)),
        (Api.OPENAI, {"timings": {"cache_n": 7}}, Usage(7)),
        (Api.OPENAI, {"timings": {"predicted_n": 3}}, Usage(None, 3)),
        # Only the definition of the route's API counts.
        (Api.OPENAI, {"usage": OPENAI | ANTHROPIC}, COUNTED),
        (Api.RESPONSES, {"usage": OPENAI}, Usage()),
        (Api.ANTHROPIC, {"input_tokens": 26}, Usage()),
    ],
)
def test_an_answer_has_the_usage_of_its_api(
    api: Api, fields: dict[str, Any], expected: Usage
) -> None:
    assert read(api, whole(**fields)) == expected


def test_several_answers_in_a_list_are_added() -> None:
    body = json.dumps([NATIVE, NATIVE | {"tokens_predicted": 5}, {}]).encode()
    assert read(Api.NATIVE, body) == Usage(580, 9)
    assert read(Api.NATIVE, body, answers=2) == Usage(290, 9)
    assert read(Api.NATIVE, b'[{"index":0,"embedding":[[0.5]]}]') == Usage()


def test_llama_server_reports_one_of_several_answers() -> None:
    """Other servers report all tokens, and have no timings."""
    choices: list[object] = [{}, {}, {}]
    body = whole(choices=choices, usage=OPENAI, timings=TIMINGS)
    assert read(Api.OPENAI, body) == replace(TIMED, generated=12)
    assert read(Api.OPENAI, whole(choices=choices, usage=OPENAI)) == COUNTED
    end = finish(timings=TIMINGS, usage=OPENAI)
    assert read_tail(Api.OPENAI, end, answers=3) == replace(TIMED, generated=12)
    assert read_tail(Api.OPENAI, event({"usage": OPENAI}), answers=3) == COUNTED
    all_of_them = finish(timings=TIMINGS, usage=OPENAI | {"completion_tokens": 9})
    assert read_tail(Api.OPENAI, all_of_them, answers=3).generated == 9
    assert read_tail(Api.RESPONSES, end, answers=3).generated == 4
    assert read(Api.OPENAI, whole(choices=5, timings=TIMINGS)) == Usage()


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"null", b"\xff", b'{"usage":' + b"[" * 100_000, b"[1]"]
)
def test_an_unreadable_answer_has_no_usage(body: bytes) -> None:
    for api in Api:
        assert read(api, body) == read_tail(api, body) == Usage()


def test_an_object_in_an_answer_is_not_its_usage() -> None:
    """The arguments of an Anthropic tool are no string: a model writes them."""
    call = {"type": "tool_use", "input": {"usage": {"input_tokens": 1}}}
    body = whole(usage=ANTHROPIC, content=[call], tokens_predicted=0)
    assert read(Api.ANTHROPIC, body) == COUNTED


@pytest.mark.parametrize("number", [b"100000000", b"9" * 400, b"-3", b"1e3", b"2.5"])
def test_impossible_counts_are_ignored(number: bytes) -> None:
    counts = b'"completion_tokens":%b,"prompt_tokens":%b' % (number, number)
    counts += b',"input_tokens":%b,"output_tokens":%b' % (number, number)
    native = b'"tokens_evaluated":%b,"tokens_predicted":%b' % (number, number)
    timings = b'"prompt_n":%b,"cache_n":%b,"predicted_n":%b' % (number, number, number)
    body = b'{"usage":{%b},%b,"timings":{%b}}' % (counts, native, timings)
    for api in Api:
        for result in (read(api, body), read_tail(api, body)):
            assert (result.prompt, result.generated) == (None, None)


def test_large_counts_are_accepted() -> None:
    body = whole(usage=usage_of(99_999_999, 10_000_000))
    usage = read(Api.OPENAI, body)
    assert (usage.prompt, usage.generated) == (10_000_000, 99_999_999)


# --- Reading streams --------------------------------------------------------------

_START = named_event(
    {"type": "message_start", "message": {"usage": ANTHROPIC | {"output_tokens": 1}}}
)
_DELTA = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}


@pytest.mark.parametrize(
    ("api", "stream", "expected"),
    [
        (Api.OPENAI, finish(timings=TIMINGS) + done(), TIMED),
        (Api.OPENAI, finish(timings=TIMINGS, usage=OPENAI) + done(), TIMED),
        (Api.OPENAI, event({"choices": [], "usage": OPENAI}) + done(), COUNTED),
        (
            Api.RESPONSES,
            named_event(
                {"type": "response.completed", "response": {"usage": RESPONSES}}
            ),
            COUNTED,
        ),
        (
            Api.ANTHROPIC,
            _START + named_event(_DELTA | {"usage": {"output_tokens": 4}}),
            COUNTED,
        ),
        # Anthropic repeats all of it.
        (Api.ANTHROPIC, _START + named_event(_DELTA | {"usage": ANTHROPIC}), COUNTED),
        # Some have no numbers in the beginning, and some none at the end.
        (
            Api.ANTHROPIC,
            event({"usage": dict.fromkeys(ANTHROPIC, 0)})
            + named_event(_DELTA | {"usage": ANTHROPIC}),
            COUNTED,
        ),
        (
            Api.ANTHROPIC,
            _START + named_event(_DELTA | {"usage": ANTHROPIC | {"input_tokens": 0}}),
            COUNTED,
        ),
        (Api.NATIVE, event({**NATIVE, "stop": False}), Usage(290, 4)),
        (Api.NATIVE, event({**NATIVE, "stop": True, "timings": TIMINGS}), TIMED),
    ],
)
def test_a_stream_has_the_usage_of_its_api(
    api: Api, stream: bytes, expected: Usage
) -> None:
    assert read_tail(api, stream, beginning(stream)) == expected


def test_a_stream_that_was_cut_has_the_usage_up_to_there() -> None:
    """The tokens of its beginning are not those that it has generated."""
    assert read_tail(Api.ANTHROPIC, b"", beginning(_START)) == replace(
        COUNTED, generated=None
    )
    assert read_tail(Api.OPENAI, role() + token("a")) == Usage()
    half = finish(timings=TIMINGS)
    assert read_tail(Api.OPENAI, half[: half.index(b"predicted_ms")]) == Usage()


def test_the_last_count_is_the_one_that_counts() -> None:
    """Some servers send the usage so far with every event, and others a null."""
    running = b"".join(event({"usage": {"completion_tokens": n}}) for n in (1, 2))
    running += event({"usage": None})
    assert read_tail(Api.OPENAI, running).generated == 2


def test_an_answer_that_came_in_pieces_is_read_from_both_ends() -> None:
    """Embeddings have their usage in front; chats have it at the end."""
    head = b'{"model":"a","usage":{"prompt_tokens":9,"total_tokens":9},"data":[['
    assert read_tail(Api.OPENAI, b"0.5]]}", beginning(head)) == Usage(9)
    body = json.dumps(chat_completion("a" * 5000, tokens=7)).encode()
    usage = read_tail(Api.OPENAI, body[-1400:], beginning(body[:1400]))
    assert (usage.prompt, usage.generated) == (20, 7)


@pytest.mark.parametrize(
    ("tail", "result"),
    [
        ('"timings":{"cache_n":236,"prompt_n":1,"prompt_ms":31}', (1, 236, 0.031)),
        ('"timings":{"prompt_n":7,"prompt_ms":1e3}', (7, 0, 1.0)),
        ('"timings":{"prompt_n":-7,"prompt_ms":5,"cache_n":2}', (-7, 2, 0.005)),
        (
            '"timings":{"prompt_n":1} "timings":{"prompt_n":2,"prompt_ms":2}',
            (2, 0, 0.002),
        ),
        ('"timings":{"prompt_n":"x","prompt_ms":1}', None),
        ('"timings":{"prompt_n":1e999,"prompt_ms":1}', None),
        ('"timings":{"prompt_n":null,"prompt_ms":1}', None),
        ('"timings":{"prompt_n":1}', None),
        (
            '"usage":{"prompt_tokens":20,"prompt_tokens_details":{"cached_tokens":15}}',
            (5, 15, 0.0),
        ),
        ('"usage":{"prompt_tokens":20}', None),
        ("", None),
    ],
)
def test_how_a_prompt_was_read(
    tail: str, result: tuple[int, int, float] | None
) -> None:
    expected = None if result is None else Prefill(*result)
    assert read_tail(Api.OPENAI, tail.encode()).reading == expected


@pytest.mark.parametrize(
    ("tokens", "cached", "seconds", "possible"),
    [
        (0, 0, 0.0, True),
        (9, 3, 1e9, True),
        (-1, 0, 1.0, False),
        (1, -1, 1.0, False),
        (1, 0, -0.1, False),
        (1, 0, float("inf"), False),
        (1, 0, float("nan"), False),
    ],
)
def test_absurd_numbers_are_impossible(
    tokens: int, cached: int, seconds: float, possible: bool
) -> None:
    assert Prefill(tokens, cached, seconds).possible == possible


@pytest.mark.parametrize(
    ("tokens", "cached", "seconds", "plausible"),
    [
        (1, 0, 0.01, True),
        (9, 3, 11.0, True),  # clocks differ
        (9, 3, 11.1, False),
        (0, 9, 1.0, False),  # it read nothing, so it took no time
        (1, -1, 1.0, False),
        (1, 0, 0.0, False),
    ],
)
def test_a_prompt_is_not_read_for_longer_than_its_answer_takes_to_begin(
    tokens: int, cached: int, seconds: float, plausible: bool
) -> None:
    assert Prefill(tokens, cached, seconds).plausible_in(10.0) == plausible


# --- Its model and its build ------------------------------------------------------

WHOLE = [
    (b'{"choices":[],"model":"tiny"}', "tiny"),
    (b'{ "model" : "a \\"b\\" \\u00e9" }', 'a "b" é'),
    (b'{"content":[{"input":{"model":"a car"}}],"model":"tiny"}', "tiny"),
    (b'{"content":[{"input":{"model":"a car"}}]}', None),
    (b'{"text":"\\"model\\":\\"x\\""}', None),
    (b'{"model":null}', None),
    (b'{"model":7}', None),
    (b'{"model":{"model":"x"}}', None),
    (b'{"message":{"model":"tiny"}}', "tiny"),
    (b'{"response":{"model":"tiny"}}', "tiny"),
    (b'{"message":"model","response":[]}', None),
    (b'{"model":"ti', None),
    (b'["model"]', None),
    (b"", None),
    (b"[" * 10_000, None),
    (b'{"model":"\xff"}', None),
]


@pytest.mark.parametrize(("body", "model"), WHOLE)
def test_the_model_of_an_answer(body: bytes, model: str | None) -> None:
    assert model_of(body, events=False) == model
    event = b": ping\n\nevent: x\ndata: " + body + b"\n\n"
    assert model_of(event + b'data: {"model":"later"}\n\n', events=True) == (
        model or "later"
    )


@pytest.mark.parametrize(
    ("held", "model"),
    [
        (b'data: {"model": "tiny"}\n\n', "tiny"),
        (b'{"data":[0.1,0.2', None),
        (b'{"x":"\\"model\\":\\"x\\"","model":"tiny"', "tiny"),
        (b'{"model":null,"inner":{"model":"first"}}', "first"),
        (b'{"model":"ti', None),
        (b'{"model":"a\x7fb"}', "a\x7fb"),
        (b'{"model":"first","model":"second"}', "first"),
        (b'{"model":"a\\u00e9"}', "aé"),
        ('{"model":"é"}'.encode(), "é"),
        (b'{"model":"\xff"}', None),
    ],
)
def test_the_first_model_that_is_named(held: bytes, model: str | None) -> None:
    assert first_model(held) == model


@given(
    st.lists(
        st.sampled_from([b'"model"', b'"model":"', b":", b" ", b'"', b"\\", b"null"])
        | st.binary(max_size=3)
        | st.text(max_size=3).map(str.encode),
        max_size=9,
    )
)
@example([b'"model":"', b"a" * 4096, b'"'])
@example([b'"model":"', b"a" * 4097, b'"'])
@example([b'"model":"', b'\n"'])
@example([b'"model":"', b'","model":"a"'])
def test_the_first_model_is_what_a_plain_expression_finds(parts: list[bytes]) -> None:
    held = b"".join(parts)
    found = re.search(
        rb'"model"\s{0,64}:\s{0,64}("(?:[^"\\]|\\.){1,4096}")', held, re.DOTALL
    )
    try:
        name = json.loads(found[1]) if found else None
    except ValueError:
        name = None
    if name is not None and not name.isascii():  # half of a surrogate pair, for example
        assert first_model(held) in (name, None)
    else:
        assert first_model(held) == name


@pytest.mark.parametrize(
    ("held", "build"),
    [
        (b'{"system_fingerprint":"b1-571d0d5"}', "b1-571d0d5"),
        (b'{"system_fingerprint" : "b1"}', "b1"),
        (b'{"system_fingerprint":null}', ""),
        (b'{"system_fingerprint":"%b"}' % (b"x" * 200), ""),
        (b'{"system_fingerprint":"b1","system_fingerprint":"b2"}', "b1"),
        (b'{"system_fingerprint":"b\xff"}', "b\N{REPLACEMENT CHARACTER}"),
        (b"{}", ""),
    ],
)
def test_the_build_that_is_named(held: bytes, build: str) -> None:
    assert build_of(held) == build


BOTH = b'"model":"tiny","system_fingerprint":"b1-5"'


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (b"{%b}" % BOTH, ("tiny", "b1-5")),
        (b'{"system_fingerprint":"b1-5","model":"tiny"}', ("tiny", "b1-5")),
        (b"{%b,%b}" % (BOTH, BOTH.replace(b"tiny", b"other")), ("tiny", "b1-5")),
        (b'{"model":null,%b}' % BOTH, ("tiny", "b1-5")),
        (b'{"model":"%b"}' % (b"x" * 200), ("x" * 200, "")),
        (b'{"model":"tiny","system_fingerprint":""}', ("tiny", "")),
        (b'{"system_fingerprint":"b1-5"}', (None, "b1-5")),
        (BOTH[:-1], ("tiny", "")),
        (b"{}", (None, "")),
        (b"", (None, "")),
    ],
)
def test_both_names_that_are_first(held: bytes, names: tuple[str | None, str]) -> None:
    assert names_in(held) == names


@given(
    st.lists(
        st.sampled_from([b'"model":"', b'","system_fingerprint":"', b'"', b"\\", BOTH])
        | st.binary(max_size=3),
        max_size=9,
    )
)
@example([b'"model":"', b"a" * 200, b'","system_fingerprint":"b"'])
@example([b'"model":"a","system_fingerprint":"', b"b" * 101, b'"'])
def test_both_names_are_what_each_search_finds(parts: list[bytes]) -> None:
    held = b"".join(parts)
    assert names_in(held) == (first_model(held), build_of(held))


# --- All that a whole answer reports ----------------------------------------------


@pytest.mark.parametrize(
    ("body", "model", "build"),
    [
        (b'{"model":"tiny","system_fingerprint":"b1-a"}', "tiny", "b1-a"),
        (b'{"choices":[{"model":"other"}],"model":"tiny"}', "tiny", ""),
        (b'{"model":null,"system_fingerprint":7}', None, ""),
        (b'{"model":7}', None, ""),
        (b'{"system_fingerprint":"%b"}' % (b"x" * 100), None, "x" * 100),
        (b'{"system_fingerprint":"%b"}' % (b"x" * 101), None, ""),
        (b'[{"model":"tiny"}]', None, ""),
        (b'{"model":"tiny","system_fingerprint":"b1-a",', "tiny", "b1-a"),
        (b"a text", None, ""),
    ],
)
def test_a_whole_answer_names_its_model_and_build(
    body: bytes, model: str | None, build: str
) -> None:
    report = read_answer(body, Api.OPENAI)
    assert (report.model, report.build) == (model, build)
    assert report.usage == Usage()
