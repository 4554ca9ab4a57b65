"""Requests for a stream where a client wants one piece, and what folds their answers.

The hub asks for a stream, and folds it with the assembler of the API (`folding.py` has
what they share).  It asks for usage where a client streams without it.  Every other
field of a request stays to the byte as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
from msgspec import Raw

from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.folding import (
    ANY,
    FRAME,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    Assembler,
    ChatAssembler,
    LostTextError,
    Requested,
    TextAssembler,
    Texts,
    UnfoldableError,
    fail,
    means_nothing,
    read,
    unfinished,
)
from gollama_proxy.wire.schema import (
    UNREADABLE,
    Api,
    Endpoint,
    NativeEvent,
    message_event,
    native_event,
    raw_fields,
    response_event,
)
from gollama_proxy.wire.sse import error_of_response

# --- Messages ---------------------------------------------------------------------

# What an event appends to which field of a block.
_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("partial_json", "input"),
}


class _Block:
    """One block of content, as far as it has come."""

    def __init__(self, begun: Mapping[str, Raw]) -> None:
        self._begun = {name: value.copy() for name, value in begun.items()}
        self._texts = Texts()

    def __repr__(self) -> str:
        return f"<_Block {len(self._begun)}>"

    def fold(self, delta: Mapping[str, Raw]) -> int:
        """Append the parts in an event, and return by how much it grew."""
        kind = read(delta.get("type"), TEXT) or ""
        if kind not in _DELTAS:
            raise UnfoldableError("a delta of a block cannot be folded")
        source, name = _DELTAS[kind]
        return self._texts.add(name, read(delta.get(source), TEXT))

    def answer(self) -> dict[str, object]:
        block: dict[str, object] = {**self._begun}
        for name, text in self._texts.all().items():
            if name == "input":
                block[name] = _input(text or "")
            else:
                begun = read(self._begun.get(name), TEXT)
                block[name] = (begun or "") + (text or "")
        return block


def _input(text: str) -> object:
    if not text:
        return {}
    try:
        return Raw(msgspec.json.encode(raw_fields.decode(text)))
    except UNREADABLE:
        raise LostTextError("the input of a tool has no end") from None


class MessageAssembler(Assembler):
    """Folds the events of Anthropic's messages."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._message: dict[str, Raw] = {}
        self._usage: dict[str, Raw] = {}
        self._blocks: dict[int, _Block] = {}

    def _fold(self, data: bytes) -> None:
        event = message_event.decode(data)
        if event.error is not None:
            fail(event.error)
        match event.type:
            case "message_start":
                self._merge(event.message or {})
            case "content_block_start":
                if event.index in self._blocks:
                    raise UnfoldableError("two blocks share an index")
                self._blocks[event.index] = _Block(event.content_block or {})
                self._size += len(data) + FRAME
            case "content_block_delta":
                if event.index not in self._blocks:
                    raise UnfoldableError("a block has no beginning")
                self._size += self._blocks[event.index].fold(event.delta or {})
            case "message_delta":
                self._merge(event.delta or {})
                self._usage |= _kept(event.usage or {})
            case "message_stop":
                self._done = True
            case "content_block_stop" | "ping":
                pass
            case _:
                raise UnfoldableError("an event of a message cannot be folded")

    def _merge(self, found: Mapping[str, Raw]) -> None:
        kept = _kept(found)
        self._message |= kept
        usage = read(kept.get("usage"), OBJECT)
        self._usage |= usage or {}

    def _answer(self) -> object:
        if not (self._done and self._message):
            raise unfinished()
        blocks = [block.answer() for _, block in sorted(self._blocks.items())]
        reason = read(self._message.get("stop_reason"), TEXT)
        if reason == "max_tokens" and self._asked.stops:
            raise LostTextError("the stream may lack the last text")
        tokens = read(self._usage.get("output_tokens"), NUMBER) or 0
        if (reason == "max_tokens" or tokens > 1) and not blocks:
            raise LostTextError("the stream lacks the text of the answer")
        return {**self._message, "content": blocks, "usage": self._usage}


def _kept(found: Mapping[str, Raw]) -> dict[str, Raw]:
    """Copy values, which would otherwise keep their whole event."""
    return {name: value.copy() for name, value in found.items()}


# --- Completions of llama-server --------------------------------------------------


class _Completion:
    """The answer to one prompt, as far as it has come."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.tokens: list[int] = []
        self.probabilities: list[Raw] = []
        self.last: NativeEvent | None = None
        self.fields: dict[str, Raw] = {}  # of the last event

    def __repr__(self) -> str:
        return f"<_Completion {'open' if self.last is None else 'done'}>"

    def fold(self, event: NativeEvent, data: bytes) -> int:
        """Append the parts in an event, and return by how much it grew."""
        if self.last is not None:
            raise UnfoldableError("a completion went on after its end")
        grown = self.texts.add("content", event.content)
        self.tokens += event.tokens or ()
        grown += 8 * len(event.tokens or ())
        if event.completion_probabilities:
            self.probabilities += event.completion_probabilities
            grown += len(data)  # they keep the whole event in memory
        if event.stop:
            self.last, self.fields = event, raw_fields.decode(data)
            grown += len(data)
        return grown


class NativeAssembler(Assembler):
    """Folds the events of completions: the last one of each has all but the text."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._completions = defaultdict[int, _Completion](_Completion)

    def _fold(self, data: bytes) -> None:
        event = native_event.decode(data)
        if event is None:  # no news
            return
        if event.error is not None:
            fail(event.error)
        self._size += self._completions[event.index].fold(event, data)

    def _answer(self) -> object:
        completions = [each for _, each in sorted(self._completions.items())]
        if not completions or any(each.last is None for each in completions):
            raise unfinished()
        if self._asked.choices not in (0, len(completions)):
            raise UnfoldableError("the stream has another number of completions")
        answers = [self._whole(each) for each in completions]
        return answers if len(answers) > 1 else answers[0]

    def _whole(self, found: _Completion) -> dict[str, object]:
        assert found.last is not None, found
        text, cut = found.texts.get("content"), found.last.stop_type == "limit"
        if cut and self._asked.stops:
            raise LostTextError("the stream may lack the last text")
        if not text and (cut or found.last.tokens_predicted > 1):
            raise LostTextError("the stream lacks the text of the answer")
        answer: dict[str, object] = {**found.fields, "content": text}
        if "tokens" in answer:
            answer["tokens"] = found.tokens if self._asked.tokens else []
        if found.probabilities:
            answer["completion_probabilities"] = found.probabilities
        settings = read(found.fields.get("generation_settings"), OBJECT)
        if settings is not None:
            answer["generation_settings"] = {**settings, "stream": False}
        return answer


# --- Responses --------------------------------------------------------------------


class ResponseAssembler(Assembler):
    """Takes the answer out of the last event of a response, which has all of it."""

    def __init__(self, limit: int, asked: Requested = ANY) -> None:
        super().__init__(limit, asked)
        self._response: dict[str, Raw] | None = None

    def _fold(self, data: bytes) -> None:
        event = response_event.decode(data)
        if event.error is not None:
            fail(event.error)
        if event.type == "response.failed":
            fail(error_of_response(event.response))
        if event.type in _LAST and event.response is not None:
            self._size += len(data)
            self._response, self._done = event.response, True

    def _answer(self) -> object:
        response = self._response
        if response is None:
            raise unfinished()
        if means_nothing(response.get("output")):
            raise LostTextError("the stream lacks the text of the answer")
        return response if "completed_at" in response else _completed(response)


def _completed(response: dict[str, Raw]) -> dict[str, object]:
    """Add the fields that llama-server has in a whole answer, and not in a stream.

    Both times are the same, and reasoning has a `status` as text has.
    """
    answer: dict[str, object] = {**response}
    if "created_at" in response:
        answer["completed_at"] = response["created_at"]
    items = read(response.get("output"), OBJECTS) or []
    status = response.get("status", Raw(b'"completed"'))
    answer["output"] = [{"status": status, **item} for item in items]
    return answer


_LAST = frozenset({"response.completed", "response.incomplete"})


# --- Requests for a stream --------------------------------------------------------

# Values of fields with which a stream has all that the answer in one piece would have.
_FOLDABLE = {
    "stream": (b"null", b"false"),
    "stream_options": (b"null",),
    # An answer that ends by its indent loses its last line; a stream has sent it.
    "n_indent": (b"null", b"0"),
    # The message that is continued is a part of the answer, and not of the stream.
    "continue_final_message": (b"null", b"false"),
    # The text in `__verbose` is that of a whole answer, as the model wrote it.
    "verbose": (b"null", b"false"),
    # "deepseek-legacy" has a switch (`reasoning_in_content`) for streams only.
    "reasoning_format": (b"null", b'"none"', b'"auto"', b'"deepseek"'),
    # These select fields of a native answer, and not those of its events.
    "response_fields": (b"null", b"[]"),
    # The server keeps working on such an answer when its client has left.
    "background": (b"null", b"false"),
}
# The stream of a chat has probabilities beside text, and lacks those of a token without
# text, such as the end of turn.
_PROBABILITIES = {"logprobs": (b"null", b"false"), "n_probs": (b"null", b"0")}
# Of a response, llama-server reports neither where it was cut, nor the text that was
# held back there because a stop string might have begun.
_CUTS = {"stop": (b"null", b'""', b"[]")}
_FOLDABLE_CHAT = _FOLDABLE | _PROBABILITIES
_PROMPTS = re.compile(rb'"prompt"\s*:\s*\[')
_UNSET = (b"null", b'""', b"[]")
_SEVERAL = frozenset({"n", "n_cmpl", "prompt"})
_STOPS = frozenset({"stop", "stop_sequences"})
_ASSEMBLERS: dict[Api, type[Assembler]] = {
    Api.OPENAI: TextAssembler,
    Api.ANTHROPIC: MessageAssembler,
    Api.RESPONSES: ResponseAssembler,
    Api.NATIVE: NativeAssembler,
}


class StreamRequest(msgspec.Struct, frozen=True):
    """A request for a stream, and what folds its answer."""

    body: bytes
    assembler: Callable[[int], Assembler]  # of a limit of characters

    def __repr__(self) -> str:  # without the text of a user
        return f"<StreamRequest {len(self.body)} bytes>"


def ask_for_stream(body: bytes, endpoint: Endpoint) -> StreamRequest | None:
    """Ask for a stream with usage, all else as is; None if its answer would differ."""
    try:
        given = raw_fields.decode(body)
    except UNREADABLE:
        return None  # the worker answers with the reason
    foldable = _FOLDABLE
    if "messages" in given:
        foldable = _FOLDABLE_CHAT
    if endpoint.api is Api.RESPONSES:
        foldable = foldable | _CUTS
    for name in foldable.keys() & given.keys():
        if bytes(given[name]) not in foldable[name]:
            return None
    stops = False
    for name in _STOPS & given.keys():
        stops = stops or bytes(given[name]) not in _UNSET
    asked = Requested(
        stops=stops,
        choices=_choices_of(given),
        tokens=bytes(given.get("return_tokens", b"null")) == b"true",
    )
    given["stream"] = Raw(b"true")
    if endpoint.api is Api.OPENAI:  # the others report it unasked
        given["stream_options"] = Raw(_ASKED)
    make = ChatAssembler if endpoint.chat else _ASSEMBLERS[endpoint.api]
    return StreamRequest(msgspec.json.encode(given), partial(make, asked=asked))


def has_prompts(body: bytes) -> bool:
    """Return whether a request may have several prompts, at the cost of one search."""
    return _PROMPTS.search(body) is not None


def choices_of(body: bytes) -> int:
    """Return how many choices a request asks for; 0 means unknown."""
    try:
        return _choices_of(raw_fields.decode(body))
    except UNREADABLE:
        return 0


def _choices_of(given: dict[str, Raw]) -> int:
    if not _SEVERAL & given.keys():
        return 1
    try:
        counts = [
            msgspec.json.decode(given.get(name, b"null"), type=int | None) or 1
            for name in ("n", "n_cmpl")
        ]
        return max(counts) * _prompts(given)
    except UNREADABLE:
        return 0


def _prompts(given: dict[str, Raw]) -> int:
    prompt = bytes(given.get("prompt", b"null"))
    if not prompt.startswith(b"["):
        return 1
    parts = msgspec.json.decode(prompt, type=list[Raw])
    # A list with numbers in it is one prompt, of tokens.
    numbers = any(bytes(part)[:1] in b"-0123456789" for part in parts)
    return 1 if numbers else max(len(parts), 1)


# --- Requests for usage -----------------------------------------------------------

_ASKED = b'{"include_usage":true}'
_ESCAPED = re.compile(rb"\\u00[5-7]")  # may be a letter of the key
# Values that ask for nothing.  Other options are left alone: vLLM's
# `continuous_usage_stats` would put usage into each event.
_NOTHING = re.compile(rb'null|\{\s*(?:"include_usage"\s*:\s*(?:false|null)\s*)?\}')


def ask_for_usage(body: bytes) -> bytes | None:
    """Request usage, and change nothing else; None if the client has set options.

    `body` is a JSON object that is accepted and not empty.
    """
    if b'"stream_options"' in body or _ESCAPED.search(body):
        scanner = FieldScanner()
        scanner.feed(body)
        field = scanner.found.get("stream_options")
        if field is not None:
            match = _NOTHING.match(body, field.start)
            if match is None:
                return None
            return b"%b%b%b" % (body[: match.start()], _ASKED, body[match.end() :])
    brace = body.index(b"{") + 1
    return b'%b"stream_options":%b,%b' % (body[:brace], _ASKED, body[brace:])
