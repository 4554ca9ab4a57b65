"""llama-server's own completions, folded from their streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gollama_proxy.wire.assemble import (
    ANY,
    Asked,
    AssemblyError,
    LostTextError,
    UnfoldableError,
)
from gollama_proxy.wire.assemble_others import NativeAssembler
from tests.fakes.replies import error_event, event


def part(content: str, index: int = 0, **fields: Any) -> bytes:
    told = {"index": index, "content": content, "tokens": [7], "stop": False}
    return event(told | fields)


def last(index: int = 0, **fields: Any) -> bytes:
    told = {"index": index, "content": "", "tokens": [], "stop": True, "model": "m"}
    settings = {"stream": True, "seed": 1}
    told |= {"generation_settings": settings, "stop_type": "eos", "tokens_predicted": 2}
    return event(told | fields)


def fold(stream: bytes, asked: Asked = ANY, limit: int = 1 << 20) -> Any:
    assembler = NativeAssembler(limit, asked)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    return json.loads(assembler.finish())


def test_the_last_event_has_all_but_the_text() -> None:
    answer = fold(b"data: null\n\n" + part("a") + part("b") + last())
    assert (answer["content"], answer["tokens"], answer["model"]) == ("ab", [], "m")
    assert answer["generation_settings"] == {"stream": False, "seed": 1}
    assert fold(part("a") + part("b") + last(), Asked(tokens=True))["tokens"] == [7, 7]


def test_probabilities_are_joined() -> None:
    told = [part(each, completion_probabilities=[each]) for each in "ab"]
    assert fold(b"".join(told) + last())["completion_probabilities"] == ["a", "b"]


def test_several_prompts_have_several_answers() -> None:
    stream = part("b", 1) + part("a") + last(1) + last()
    answers = fold(stream, Asked(choices=2))
    assert [(each["index"], each["content"]) for each in answers] == [
        (0, "a"),
        (1, "b"),
    ]
    with pytest.raises(UnfoldableError, match="number"):
        fold(stream, Asked(choices=3))


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        part("a"),
        part("a") + part("b", 1) + last(),
        part("a") + last() + part("b") + last(),
        part("a", index="x"),
        b"data: nonsense\n\n",
    ],
)
def test_what_is_not_complete_or_unknown_is_no_answer(stream: bytes) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold(stream)
    assert not isinstance(caught.value, LostTextError)


def test_a_completion_that_was_cut_may_have_more_than_its_stream() -> None:
    cut = {"stop_type": "limit"}
    with pytest.raises(LostTextError):
        fold(part("a") + last(**cut), Asked(stops=True))
    assert fold(part("a") + last(), Asked(stops=True))["content"] == "a"
    for fields in (cut, {}):
        with pytest.raises(LostTextError):
            fold(last(**fields))
    assert fold(last(tokens_predicted=1))["content"] == ""
    with pytest.raises(LostTextError, match="longer"):
        fold(part("a" * 3000) + last(), limit=2000)


def test_the_error_is_the_workers_own() -> None:
    with pytest.raises(AssemblyError) as caught:
        fold(part("a") + error_event("no such luck", 503))
    assert caught.value.error is not None
