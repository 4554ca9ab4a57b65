"""Streams of messages and of llama-server's own API are folded, or refused."""

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
from gollama_proxy.wire.assemble_openai import ResponseAssembler
from gollama_proxy.wire.assemble_others import MessageAssembler, NativeAssembler
from tests.fakes.replies import error_event, event, named_event

LIMIT = 1 << 20
USAGE = {"input_tokens": 3, "output_tokens": 0, "cache_read_input_tokens": 9}
MESSAGE = {"id": "m", "type": "message", "role": "assistant", "content": []}
MESSAGE |= {"model": "x", "stop_reason": None, "stop_sequence": None, "usage": USAGE}
DELTA: dict[str, Any] = {"type": "content_block_delta", "index": 0}
START = named_event({"type": "message_start", "message": MESSAGE})
STOP = named_event({"type": "message_stop"})


def block(index: int, begun: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    start = {"type": "content_block_start", "index": index, "content_block": begun}
    events = [named_event(start)]
    events += [
        named_event({"type": "content_block_delta", "index": index, "delta": delta})
        for delta in deltas
    ]
    return b"".join(events) + named_event(
        {"type": "content_block_stop", "index": index}
    )


def end(reason: str = "end_turn", tokens: int = 5) -> bytes:
    delta = {"stop_reason": reason, "stop_sequence": None}
    usage = {"output_tokens": tokens}
    return named_event({"type": "message_delta", "delta": delta, "usage": usage}) + STOP


def text(*pieces: str) -> bytes:
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return block(0, {"type": "text", "text": ""}, *deltas)


def fold(stream: bytes, asked: Asked = ANY, limit: int = LIMIT) -> Any:
    assembler = MessageAssembler(limit, asked)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    return json.loads(assembler.finish())


def test_a_message_has_the_blocks_of_its_stream_and_the_usage_of_both_ends() -> None:
    thoughts = [
        {"type": "thinking_delta", "thinking": "so "},
        {"type": "thinking_delta", "thinking": "then"},
        {"type": "signature_delta", "signature": "abc"},
    ]
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    pieces = ['{"c"', ': "red"}']
    inputs = [{"type": "input_json_delta", "partial_json": each} for each in pieces]
    stream = START + named_event({"type": "ping"})
    stream += block(
        1, {"type": "text", "text": "a"}, {"type": "text_delta", "text": "b"}
    )
    stream += block(0, {"type": "thinking", "thinking": ""}, *thoughts)
    stream += block(2, call, *inputs) + block(3, call | {"id": "u"})
    answer = fold(stream + end("tool_use"))
    assert answer["content"] == [
        {"type": "thinking", "thinking": "so then", "signature": "abc"},
        {"type": "text", "text": "ab"},
        call | {"input": {"c": "red"}},
        call | {"id": "u"},
    ]
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"] == USAGE | {"output_tokens": 5}
    assert (answer["id"], answer["model"]) == ("m", "x")


def test_no_cut_off_message_is_an_answer() -> None:
    stream = START + text("a") + end()
    for length in range(len(stream)):
        with pytest.raises(UnfoldableError):
            fold(stream[:length])


@pytest.mark.parametrize(
    "event",
    [
        {"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta"}},
        {"type": "content_block_start", "index": 0, "content_block": {}},
        {"type": "something_new"},
        DELTA | {"delta": {"type": "citations_delta"}},
        DELTA | {"delta": {"type": "text_delta", "text": 3}},
        DELTA | {"index": "0"},
    ],
)
def test_unknown_events_of_a_message_cannot_be_folded(event: dict[str, Any]) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold(START + text("a") + named_event(event) + end())
    assert not isinstance(caught.value, LostTextError)


def test_a_message_that_was_cut_may_have_more_than_its_stream() -> None:
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    half = {"type": "input_json_delta", "partial_json": '{"c"'}
    for stream, asked in (
        (START + end("max_tokens"), ANY),
        (START + end(), ANY),
        (START + block(0, call, half) + end("max_tokens"), ANY),
        (START + text("a") + end("max_tokens"), Asked(stops=True)),
    ):
        with pytest.raises(LostTextError):
            fold(stream, asked)
    assert fold(START + end(tokens=1))["content"] == []
    assert fold(START + text("a") + end(), Asked(stops=True))


def test_the_error_of_a_message_is_the_workers() -> None:
    error = {"type": "overloaded_error", "message": "Overloaded"}
    with pytest.raises(AssemblyError) as caught:
        fold(START + named_event({"type": "error", "error": error}))
    assert caught.value.error is not None
    assert caught.value.error.message == "Overloaded"


def test_a_message_has_a_limit() -> None:
    with pytest.raises(LostTextError, match="longer than"):
        fold(START + text(*["x" * 100] * 20), limit=2000)
    blocks = b"".join(block(n, {"type": "text"}) for n in range(20))
    with pytest.raises(LostTextError, match="longer than"):
        fold(START + blocks, limit=2000)


# --- Responses --------------------------------------------------------------------


def response(stream: bytes) -> Any:
    assembler = ResponseAssembler(LIMIT)
    assembler.feed(stream)
    return json.loads(assembler.finish())


def last(kind: str = "completed", **fields: Any) -> bytes:
    return named_event({"type": f"response.{kind}", "response": fields})


def test_the_last_event_of_a_response_has_all_of_it() -> None:
    content = {
        "id": "r",
        "status": "completed",
        "completed_at": 4,
        "output": [{"a": 1}],
    }
    created = named_event({"type": "response.created", "response": {"id": "r"}})
    assert response(created + last(**content)) == content
    assert response(created + last("incomplete", **content)) == content


def test_fields_that_llama_server_does_not_stream_are_added() -> None:
    content = {
        "status": "completed",
        "created_at": 4,
        "output": [{"type": "reasoning"}],
    }
    answer = response(last(**content))
    assert answer["completed_at"] == 4
    assert answer["output"] == [{"type": "reasoning", "status": "completed"}]


def test_a_response_without_its_last_event_or_its_text_is_none() -> None:
    created = named_event({"type": "response.created", "response": {"id": "r"}})
    for stream in (b"", created, last(output=[])):
        with pytest.raises(UnfoldableError):
            response(stream)
    with pytest.raises(AssemblyError) as caught:
        response(created + named_event({"type": "error", "error": {"message": "no"}}))
    assert caught.value.error is not None


def part(content: str, index: int = 0, **fields: Any) -> bytes:
    content = {"index": index, "content": content, "tokens": [7], "stop": False}
    return event(content | fields)


def native_end(index: int = 0, **fields: Any) -> bytes:
    content = {"index": index, "content": "", "tokens": [], "stop": True, "model": "m"}
    settings = {"stream": True, "seed": 1}
    content |= {
        "generation_settings": settings,
        "stop_type": "eos",
        "tokens_predicted": 2,
    }
    return event(content | fields)


def fold_native(stream: bytes, asked: Asked = ANY, limit: int = 1 << 20) -> Any:
    assembler = NativeAssembler(limit, asked)
    for at in range(len(stream)):
        assembler.feed(stream[at : at + 1])
    return json.loads(assembler.finish())


def test_the_last_event_has_all_but_the_text() -> None:
    answer = fold_native(b"data: null\n\n" + part("a") + part("b") + native_end())
    assert (answer["content"], answer["tokens"], answer["model"]) == ("ab", [], "m")
    assert answer["generation_settings"] == {"stream": False, "seed": 1}
    assert fold_native(part("a") + part("b") + native_end(), Asked(tokens=True))[
        "tokens"
    ] == [7, 7]


def test_probabilities_are_joined() -> None:
    content = [part(each, completion_probabilities=[each]) for each in "ab"]
    assert fold_native(b"".join(content) + native_end())[
        "completion_probabilities"
    ] == [
        "a",
        "b",
    ]


def test_several_prompts_have_several_answers() -> None:
    stream = part("b", 1) + part("a") + native_end(1) + native_end()
    answers = fold_native(stream, Asked(choices=2))
    assert [(each["index"], each["content"]) for each in answers] == [
        (0, "a"),
        (1, "b"),
    ]
    with pytest.raises(UnfoldableError, match="number"):
        fold_native(stream, Asked(choices=3))


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        part("a"),
        part("a") + part("b", 1) + native_end(),
        part("a") + native_end() + part("b") + native_end(),
        part("a", index="x"),
        b"data: nonsense\n\n",
    ],
)
def test_incomplete_or_unknown_events_make_no_answer(stream: bytes) -> None:
    with pytest.raises(UnfoldableError) as caught:
        fold_native(stream)
    assert not isinstance(caught.value, LostTextError)


def test_a_completion_that_was_cut_may_have_more_than_its_stream() -> None:
    cut = {"stop_type": "limit"}
    with pytest.raises(LostTextError):
        fold_native(part("a") + native_end(**cut), Asked(stops=True))
    assert fold_native(part("a") + native_end(), Asked(stops=True))["content"] == "a"
    for fields in (cut, {}):
        with pytest.raises(LostTextError):
            fold_native(native_end(**fields))
    assert fold_native(native_end(tokens_predicted=1))["content"] == ""
    with pytest.raises(LostTextError, match="longer"):
        fold_native(part("a" * 3000) + native_end(), limit=2000)


def test_the_error_is_the_workers_own() -> None:
    with pytest.raises(AssemblyError) as caught:
        fold_native(part("a") + error_event("no such luck", 503))
    assert caught.value.error is not None


def test_answers_of_other_servers_lack_the_fields_of_llama_server() -> None:
    answer = fold_native(
        event({"content": "a"}) + event({"content": "b", "stop": True})
    )
    assert answer == {"content": "ab", "stop": True}
    assert "completed_at" not in response(last(output=[{"a": 1}]))


def test_nothing_that_is_assembled_shows_its_text() -> None:
    message, native = MessageAssembler(LIMIT), NativeAssembler(LIMIT)
    message.feed(START + text("secret"))
    native.feed(part("secret"))
    shown = [*message._blocks.values(), *native._completions.values()]
    assert len(shown) == 2
    assert not [each for each in shown if "secret" in repr(each)]
    assert message._blocks[0].answer()["text"] == "secret"


def test_a_tool_without_input_has_an_empty_one() -> None:
    call = {"type": "tool_use", "id": "t", "name": "paint", "input": {}}
    nothing = {"type": "input_json_delta", "partial_json": ""}
    answer = fold(START + block(0, call, nothing) + end("tool_use"))
    assert answer["content"] == [call]
