"""Real llama-servers: an assembled answer is the one that was not streamed.

Each request is sent as it is, and as the stream that `streaming` makes of it.  Ids
and times differ anyhow; every other field has to be the same.  Where it would not be, a
test shows the difference, and that no stream is asked for.
"""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gollama_proxy.wire.assemble import ask_for_stream
from gollama_proxy.wire.folding import AssemblyError, LostTextError, UnfoldableError
from gollama_proxy.wire.schema import ENDPOINTS, Ending
from tests.fakes.waiting import DEADLINE
from tests.real.gguf_tiny import write_tiny_gguf
from tests.real.llama import LlamaServer

pytestmark = pytest.mark.real

Start = Callable[..., LlamaServer]
LIMIT = 1 << 20
USER = {"role": "user", "content": "hello"}
PREFILLED = [USER, {"role": "assistant", "content": "so far"}]
GREEDY = {"temperature": 0, "seed": 1, "max_tokens": 8}
CHAT: dict[str, Any] = {"messages": [USER], **GREEDY}
TEXT: dict[str, Any] = {"prompt": "hello", **GREEDY}
END_OF_TURN = {"logit_bias": {"3": 100}}

SCHEMA = {"type": "object", "properties": {"c": {"enum": ["red"]}}, "required": ["c"]}
JSON = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
PAINT = {"name": "paint", "description": "", "parameters": SCHEMA}
# The tokens of a call are pushed: <tool_call>, </tool_call>, and then the end.
TOOL_CALL: dict[str, Any] = {
    "tools": [{"type": "function", "function": PAINT}],
    "tool_choice": "required",
    "logit_bias": {"8": 100, "9": 90, "3": 200, "19": -100, "20": -100},
    "max_tokens": 60,
}

# A model that thinks is one whose template describes how thoughts are written.
THINKING = r"""
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.reasoning_content -%}
{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' -}}
{%- endif -%}
{{- (m.content or '') + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def thought(text: str, **fields: Any) -> dict[str, Any]:
    """Make the model write a text."""
    return {
        **CHAT,
        "max_tokens": 200,
        "grammar": f"root ::= {json.dumps(text)}",
    } | fields


# --- Asking both ways -------------------------------------------------------------


def post(server: LlamaServer, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Both:
    """One request, answered in one piece and as a stream."""

    def __init__(
        self, server: LlamaServer, request: dict[str, Any], path: str = ""
    ) -> None:
        chat = "messages" in request
        path = path or ("/v1/chat/completions" if chat else "/v1/completions")
        body = json.dumps(request).encode()
        self.streaming = ask_for_stream(body, ENDPOINTS[path])
        asked: dict[str, Any] = {"stream": True}
        if ENDPOINTS[path].ending is Ending.DONE:
            asked["stream_options"] = {"include_usage": True}
        # What is not streamed here, without a reason.
        allowed = ask_for_stream(_ANY[chat], ENDPOINTS[path])
        assert allowed is not None
        post(server, path, body)  # both shall find their prompt in the cache
        self.status, self.answer = post(server, path, body)
        forced = json.dumps(request | asked).encode()
        sent = self.streaming.body if self.streaming else forced
        self.stream_status, self.stream = post(server, path, sent)
        self._assembler = (self.streaming or allowed).assembler(LIMIT)

    @property
    def whole(self) -> dict[str, Any]:
        assert self.status == 200, self.answer
        return comparable(self.answer)

    @property
    def assembled(self) -> dict[str, Any]:
        assert self.stream_status == 200, self.stream
        self._assembler.feed(self.stream)
        return comparable(self._assembler.finish())


_ANY = {True: b'{"messages":[]}', False: b'{"prompt":""}'}
_TIMES = ("created", "created_at", "completed_at")
_CHOSEN = ("id", "id_slot", "call_id")


def comparable(body: bytes) -> Any:
    """Replace what differs from one answer to the next by its type."""
    return _without_chance(json.loads(body), "")


def _without_chance(value: Any, name: str) -> Any:
    match value:
        case dict():
            return {key: _without_chance(each, key) for key, each in value.items()}
        case list():
            return [_without_chance(each, name) for each in value]
        case str() if name in _CHOSEN:
            return type(value), len(value)
        case _ if name in (*_TIMES, "id_slot"):
            return type(value)
        case float() if name.endswith(("_ms", "_per_second")):
            return float
        case _:
            return value


@pytest.fixture(scope="module")
def tiny(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlamaServer]:
    log = tmp_path_factory.mktemp("assemble") / "tiny.log"
    server = LlamaServer(tiny_model, log).start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def thinker(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlamaServer]:
    directory = tmp_path_factory.mktemp("assemble")
    template = directory / "think.jinja"
    template.write_text(THINKING)
    args = ("--jinja", "--chat-template-file", str(template))
    server = LlamaServer(tiny_model, directory / "think.log", args=args).start()
    yield server
    server.kill()


# --- The same answer --------------------------------------------------------------

CASES = {
    "chat": CHAT,
    "chat, one token": CHAT | {"max_tokens": 1},
    "chat that stops at once": CHAT | END_OF_TURN,
    "chat, no stop string": CHAT | {"stop": []},
    "chat, twice": CHAT | {"n": 2},
    "chat, three times": CHAT | {"n": 3, "temperature": 0.9, "max_tokens": 20},
    "chat, JSON": CHAT | {"response_format": JSON, "max_tokens": 60},
    "chat, grammar": thought('Grüße 😀\r\n\t"\\/\x7f'),
    "chat, not cached": CHAT | {"cache_prompt": False},
    "chat, prefilled": CHAT | {"messages": PREFILLED},
    "chat, tokens": CHAT | {"return_tokens": True, "verbose": False},
    "chat, progress": CHAT | {"timings_per_token": True, "return_progress": True},
    "tool call": CHAT | TOOL_CALL,
    "tool call, cut in its name's wake": CHAT | TOOL_CALL | {"max_tokens": 20},
    "tool call, cut in its arguments": CHAT | TOOL_CALL | {"max_tokens": 30},
    "tool call, cut behind": CHAT | TOOL_CALL | {"max_tokens": 44},
    "tool calls of two": CHAT | TOOL_CALL | {"n": 2},
    "text": TEXT,
    "text, one token": TEXT | {"max_tokens": 1},
    "text that stops at once": TEXT | END_OF_TURN,
    "text, echo": TEXT | {"echo": True},  # which llama-server ignores
    "text, not cached": TEXT | {"cache_prompt": False},
    "text, tokens": TEXT | {"return_tokens": True, "verbose": None},
    "text, progress": TEXT | {"timings_per_token": True, "return_progress": True},
    "text, logprobs": TEXT | {"logprobs": 3},
    "text that stops at once, logprobs": TEXT | {"logprobs": 3} | END_OF_TURN,
    "text, probabilities": TEXT | {"n_probs": 2, "post_sampling_probs": True},
    "text, twice": TEXT | {"n": 2},
    "texts": TEXT | {"prompt": ["a", "b", "c"], "logprobs": 1},
    "texts, twice": TEXT | {"prompt": ["a", "b"], "n": 2},
}


@pytest.mark.parametrize("request_", CASES.values(), ids=CASES)
def test_the_answer_is_the_same(tiny: LlamaServer, request_: dict[str, Any]) -> None:
    both = Both(tiny, request_)
    assert both.streaming is not None
    assert both.assembled == both.whole
    assert {"usage", "timings", "system_fingerprint"} <= both.whole.keys()


def test_a_tool_call_is_what_it_should_be(tiny: LlamaServer) -> None:
    """So that the comparison is one of real tool calls."""
    choice = Both(tiny, CHAT | TOOL_CALL).assembled["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == ""
    function = choice["message"]["tool_calls"][0]["function"]
    assert function == {"name": "paint", "arguments": '{"c": "red"}'}


def test_answers_that_end_by_themselves_are_the_same(
    llama_server: Start, tmp_path: Path
) -> None:
    """Greedy answers of the other model never end; these are cut, or end anywhere."""
    model = write_tiny_gguf(tmp_path / "ending.gguf", mean_length=10)
    server = llama_server(model)
    reasons = set()
    for seed in range(8):
        sampled = {"temperature": 0.8, "seed": seed, "max_tokens": 16}
        for request in (CHAT, TEXT, TEXT | {"logprobs": 2}):
            both = Both(server, request | sampled)
            assert both.assembled == both.whole
            reasons.add(both.whole["choices"][0]["finish_reason"])
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("format_", ["", "deepseek", "none"])
@pytest.mark.parametrize(
    "text",
    [
        "<think>\nab cd\n</think>\n\nhello there",
        "<think>ab</think>hi",
        "<think>\n\n</think>\n\n hi \n",
        "hi <think>ab</think>",
        "<think>ab",
    ],
)
def test_thoughts_are_the_same(thinker: LlamaServer, text: str, format_: str) -> None:
    """Wherever the answer is cut; or nothing was written, and that is noticed."""
    reported = 0
    fields = {"reasoning_format": format_} if format_ else {}
    for length in itertools.count(1):
        request = thought(text, max_tokens=length, **fields)
        both = Both(thinker, request)
        try:
            assert both.assembled == both.whole
            reported += 1
        except LostTextError:
            shown = both.whole["choices"][0]["message"]
            assert "<think>".startswith(shown["content"][:7])
        if both.whole["choices"][0]["finish_reason"] == "stop":
            break
    assert reported > 1
    reasoning = both.whole["choices"][0]["message"].get("reasoning_content")
    thinks = text.startswith(("<think>ab", "<think>\nab"))
    assert bool(reasoning) == (thinks and format_ != "none")


NATIVE: dict[str, Any] = {"prompt": "hello", "temperature": 0, "seed": 1}
NATIVE["n_predict"] = 6
INFILL = {"input_prefix": "a", "input_suffix": "b", "n_predict": 4, "temperature": 0}
RESPONSE: dict[str, Any] = {"input": "hello", "max_output_tokens": 6, "temperature": 0}
PAINT_TOOL: dict[str, Any] = {
    "tools": [{"name": "paint", "description": "", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
    "logit_bias": TOOL_CALL["logit_bias"],
    "max_tokens": 60,
}
CALL_OF_RESPONSE: dict[str, Any] = {
    "tools": [{"type": "function", **PAINT}],
    "tool_choice": "required",
    "logit_bias": TOOL_CALL["logit_bias"],
    "max_output_tokens": 60,
}
OTHER_ROUTES = {
    "message": ("/v1/messages", CHAT),
    "message, one token": ("/v1/messages", CHAT | {"max_tokens": 1}),
    "message that stops": ("/v1/messages", CHAT | END_OF_TURN),
    "message, stopped": ("/v1/messages", CHAT | {"stop_sequences": ["towu"]}),
    "message, tool": ("/v1/messages", CHAT | PAINT_TOOL),
    "response": ("/v1/responses", RESPONSE),
    "response, short path": ("/responses", RESPONSE),
    "response, tool": ("/v1/responses", RESPONSE | CALL_OF_RESPONSE),
    "completion": ("/completion", NATIVE),
    "completions": ("/completions", NATIVE),
    "infill": ("/infill", INFILL),
    "completion that stops": ("/completion", NATIVE | END_OF_TURN),
    "completion, stopped": ("/completion", NATIVE | {"stop": ["su"]}),
    "completion, tokens": ("/completion", NATIVE | {"return_tokens": True}),
    "completion, probabilities": ("/completion", NATIVE | {"n_probs": 2}),
    "completion, one in a list": ("/completion", NATIVE | {"prompt": ["a"]}),
    "completion of tokens": ("/completion", NATIVE | {"prompt": [300, 301]}),
    "completions of two": ("/completion", NATIVE | {"prompt": ["a", "b"]}),
    "completion, twice": ("/completion", NATIVE | {"n": 2, "n_cmpl": 2}),
    "completion, progress": (
        "/completion",
        NATIVE | {"timings_per_token": True, "return_progress": True},
    ),
}


@pytest.mark.parametrize(("path", "request_"), OTHER_ROUTES.values(), ids=OTHER_ROUTES)
def test_the_answer_of_other_apis_is_the_same(
    tiny: LlamaServer, path: str, request_: dict[str, Any]
) -> None:
    both = Both(tiny, request_, path)
    assert both.status == 200
    assert both.streaming is not None
    assert both.assembled == both.whole


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("text", ["<think>\nab cd\n</think>\n\nhello", "<think>ab"])
def test_thoughts_of_other_apis_are_the_same(
    thinker: LlamaServer, path: str, text: str
) -> None:
    reported = 0
    for length in range(1, 42, 2):
        request = thought(text, max_tokens=length, max_output_tokens=length)
        if path == "/v1/responses":
            request["input"] = request.pop("messages")
        both = Both(thinker, request, path)
        try:
            assert both.assembled == both.whole
            reported += 1
        except LostTextError:
            pass
    assert reported > 15


STOPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", "stop", CHAT),
    "text": ("/v1/completions", "stop", TEXT),
    "message": ("/v1/messages", "stop_sequences", CHAT),
    "completion": ("/completion", "stop", NATIVE),
}


@pytest.mark.parametrize(("path", "field", "request_"), STOPS.values(), ids=STOPS)
def test_an_answer_with_stop_strings_is_the_same_or_is_not_streamed(
    tiny: LlamaServer, path: str, field: str, request_: dict[str, Any]
) -> None:
    """It ends at a stop string, or is cut, where another one may have begun."""
    reported = lost = 0
    for length in range(1, 10):
        cut = dict.fromkeys(("max_tokens", "n_predict"), length)
        request = request_ | cut | {"max_output_tokens": length}
        both = Both(tiny, request | {field: ["ri te", "vide X", "fe"]}, path)
        assert both.streaming is not None
        try:
            assert both.assembled == both.whole
            reported += 1
        except LostTextError:
            lost += 1
    assert reported
    assert reported + lost == 9


# --- Not the same answer ----------------------------------------------------------

NOT_THE_SAME = {
    "probabilities of a tool call": CHAT | TOOL_CALL | {"logprobs": True},
    "an end by indent": TEXT
    | {"n_indent": 4, "prompt": "a\n    b", "max_tokens": 30}
    | {"grammar": 'root ::= "a\\n        b\\n  c"'},
    "a message that is continued": CHAT
    | {"messages": PREFILLED, "continue_final_message": True}
    | {"add_generation_prompt": False},
}


@pytest.mark.parametrize("request_", NOT_THE_SAME.values(), ids=NOT_THE_SAME)
def test_answers_that_a_stream_cannot_represent_are_not_streamed(
    tiny: LlamaServer, request_: dict[str, Any]
) -> None:
    both = Both(tiny, request_)
    assert both.streaming is None
    assert both.stream_status != 200 or both.assembled != both.whole


def test_the_probabilities_of_a_chat_lack_the_end_of_turn(
    llama_server: Start, tmp_path: Path
) -> None:
    model = write_tiny_gguf(tmp_path / "ending.gguf", mean_length=3)
    request = CHAT | {"logprobs": True, "max_tokens": 100, "temperature": 0.8}
    both = Both(llama_server(model), request)
    assert both.streaming is None
    whole, assembled = both.whole["choices"][0], both.assembled["choices"][0]
    assert whole["finish_reason"] == "stop"
    whole["logprobs"]["content"].pop()
    assert assembled == whole


@pytest.mark.parametrize(
    "request_",
    [
        CHAT | TOOL_CALL | {"max_tokens": 5},
        CHAT | {"logit_bias": {"205": 200}, "max_tokens": 1},
        TEXT | {"logit_bias": {"205": 200}, "max_tokens": 1},
    ],
    ids=["in a tag", "in a character", "in a character of a text"],
)
def test_text_that_is_lost_is_noticed(
    tiny: LlamaServer, request_: dict[str, Any]
) -> None:
    """An answer that is cut before it shows anything is given raw, but not streamed."""
    both = Both(tiny, request_)
    choice = both.whole["choices"][0]
    raw = choice["text"] if "text" in choice else choice["message"]["content"]
    assert raw in ('<tool_call>{"name', "�")
    with pytest.raises(LostTextError):
        assert both.assembled


@pytest.mark.parametrize("request_", [CHAT, TEXT], ids=["chat", "text"])
def test_what_a_verbose_server_adds_is_not_in_a_stream(
    tiny: LlamaServer, llama_server: Start, tiny_model: Path, request_: dict[str, Any]
) -> None:
    """`__verbose` has the text as the model wrote it, asked for by client or server."""
    asked = Both(tiny, request_ | {"verbose": True})
    assert asked.streaming is None
    always = Both(llama_server(tiny_model, args=("--verbose",)), request_)
    assert always.streaming is not None
    for both in (asked, always):
        assert both.whole["__verbose"]["content"]
        with pytest.raises(UnfoldableError):
            assert both.assembled


@pytest.mark.parametrize("request_", [CHAT, TEXT], ids=["chat", "text"])
def test_an_error_is_the_same(tiny: LlamaServer, request_: dict[str, Any]) -> None:
    """Bytes that are no text fail an answer; in a stream, too late for the status.

    Newer servers write U+FFFD instead, in both.
    """
    both = Both(tiny, request_ | {"logit_bias": {"265": 200}})
    assert both.stream_status == 200
    if both.status == 200:
        assert both.assembled == both.whole
        return
    assert both.status == 500
    with pytest.raises(AssemblyError) as caught:
        assert both.assembled
    error = caught.value.error
    assert error is not None
    reported = {"code": error.code, "message": error.message, "type": error.type}
    assert json.loads(both.answer) == {"error": reported}


@pytest.mark.parametrize(
    "request_",
    [CHAT | {"top_logprobs": 1}, TEXT | {"prompt": []}, TEXT | {"n": 99}],
    ids=["parameters", "prompt", "slots"],
)
def test_a_refusal_is_the_same(tiny: LlamaServer, request_: dict[str, Any]) -> None:
    """It is no event stream, but the status and the body there would have been."""
    both = Both(tiny, request_)
    assert both.status == both.stream_status == 400
    assert json.loads(both.stream) == json.loads(both.answer)
