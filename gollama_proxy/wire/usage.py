r"""Usage: how many tokens an answer took, read from what its worker says of it.

Every API has its own definition, and `read` and `read_end` know them all.

A stream tells how many tokens it took only to who asks (OpenAI's API reference, chat
completions, `stream_options.include_usage`), in an event before `[DONE]`:

    data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":3},…}

So the hub asks in the client's place.  A client that has not asked may fall over it:
SDK code that takes `choices[0]` of each event is common.  So that event is left out,
and every other byte stays as it is.

No words of a model can be hit: a JSON string holds no bare quote (RFC 8259, 7).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from gollama_proxy.wire import sse
from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.openai import Api

# --- The request ------------------------------------------------------------------

_ASKED = b'{"include_usage":true}'
_ESCAPED = re.compile(rb"\\u00[5-7]")  # a letter of the key, as nobody writes it
# What says as little as saying nothing.  Other options are left alone: vLLM's
# `continuous_usage_stats` would put usage into each event.
_SILENT = re.compile(rb'null|\{\s*(?:"include_usage"\s*:\s*(?:false|null)\s*)?\}')


def asking(body: bytes) -> bytes | None:
    """Ask for usage, all else to the byte as it is; None if the client says how.

    `body` is a JSON object that is accepted and not empty.
    """
    if b'"stream_options"' in body or _ESCAPED.search(body):
        scanner = FieldScanner()
        scanner.feed(body)
        field = scanner.found.get("stream_options")
        if field is not None:
            match = _SILENT.match(body, field.start)
            if match is None:
                return None
            return b"%b%b%b" % (body[: match.start()], _ASKED, body[match.end() :])
    brace = body.index(b"{") + 1
    return b'%b"stream_options":%b,%b' % (body[:brace], _ASKED, body[brace:])


# --- The answer -------------------------------------------------------------------

# Half an event that is longer is passed on; real ones take 600 bytes at most.
HELD = 8 << 10

# As in sse.py, but a CR at the end may be half of a CRLF.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r(?!\Z)){2}")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*[^\s\]]')


class _Event(msgspec.Struct):
    choices: list[Any]
    usage: dict[str, Any]
    error: Any = None


_event = msgspec.json.Decoder(_Event)


class UsageHider:
    """Leaves the events with nothing but usage out of a stream that comes in pieces.

    What may become one is held back until that is decided, at most `HELD` bytes;
    `finish()` gives what is left.
    """

    __slots__ = ("_held", "_passing")

    def __init__(self) -> None:
        self._held = b""
        self._passing = False  # the beginning of this event is out

    def __repr__(self) -> str:
        return f"<UsageHider held={len(self._held)}>"

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream; return what is decided by now."""
        if not (self._held or self._passing):
            # Nearly every token comes as a whole event; some servers put a null in it.
            if data.endswith(b"\n\n") and not _tells_usage(data):
                return data
        else:
            data = self._held + data
        told: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(data):
            event = data[start : blank.end()]
            if self._passing or not _is_usage(event):
                told.append(event)
            self._passing = False
            start = blank.end()
        rest = data[start:]
        if self._passing or not _may_be_usage(rest):
            # Without the line ends, lest a blank line is not seen.
            out = rest.rstrip(b"\r\n")
            self._passing = True
            told.append(out)
            rest = rest[len(out) :]
        self._held = rest
        return b"".join(told)

    def finish(self) -> bytes:
        """Say that nothing more will come; return what was held back.

        Usage that lacks nothing but its blank line is left out.
        """
        begun = not self._passing
        held = self.withdraw()
        return b"" if begun and _is_usage(held + b"\n\n") else held

    def withdraw(self) -> bytes:
        """Say the same of a stream that was cut: return what nobody has seen of it."""
        held, self._held = self._held, b""
        self._passing = False
        return held


def _tells_usage(data: bytes) -> bool:
    return b'"usage"' in data and _USAGE.search(data) is not None


def _may_be_usage(begun: bytes) -> bool:
    """Say whether it can still be one, whatever follows."""
    return len(begun) <= HELD and _CHOICE.search(begun) is None


def _is_usage(event: bytes) -> bool:
    if not (_tells_usage(event) and _may_be_usage(event)):
        return False
    try:
        read = _event.decode(next(sse.events_in(event), b""))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return not read.choices and read.error is None


# --- Reading ----------------------------------------------------------------------

# Larger numbers are not believed: a subject would be charged for them.
_MOST_TOKENS = 10**8
# The objects, with what they may hold; the last ones of a stream are those that count.
_USAGE_OBJECT = re.compile(
    rb'"usage"\s*:\s*(\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\})',
)
_TIMINGS_OBJECT = re.compile(rb'"timings"\s*:\s*(\{[^{}]*+\})')
_NATIVE_COUNT = re.compile(
    rb'"(tokens_(?:evaluated|predicted))"\s*:\s*(\d{1,8})(?![\d.eE])'
)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_Fields = Mapping[str, Any]


class Prompt(NamedTuple):
    """How a worker says that it has read a prompt.  It need not be possible."""

    read: int  # tokens that it has processed
    cached: int  # tokens that it had in its cache
    seconds: float  # 0 is not known


class Usage(NamedTuple):
    """What a worker says about one answer, in tokens; None where it does not say."""

    prompt: int | None = None  # all of it, whether it was in a cache or not
    generated: int | None = None
    reading: Prompt | None = None


class _Answer(msgspec.Struct):
    """The fields beside an answer; what a model or a client has put into it is not."""

    usage: Any = None
    timings: Any = None
    tokens_evaluated: Any = None
    tokens_predicted: Any = None
    choices: msgspec.Raw = msgspec.Raw(b"[]")


_answer = msgspec.json.Decoder(_Answer | list[_Answer])
_fields = msgspec.json.Decoder(dict[str, Any])
_choices = msgspec.json.Decoder(list[msgspec.Raw])


def read(api: Api, body: bytes, answers: int = 1) -> Usage:
    """Read the usage of a whole answer; of several in a list, the sum.

    `answers` is how many there are to each prompt, which counts once.
    """
    try:
        decoded = _answer.decode(body)
        if isinstance(decoded, _Answer):
            return _read_one(api, decoded)
        usages = [_read_one(api, each) for each in decoded]
    except _UNREADABLE:
        return Usage()
    prompts = [each.prompt for each in usages if each.prompt is not None]
    generated = [each.generated for each in usages if each.generated is not None]
    return Usage(
        sum(prompts) // answers if prompts else None,
        sum(generated) if generated else None,
    )


def _read_one(api: Api, answer: _Answer) -> Usage:
    native = {
        "tokens_evaluated": answer.tokens_evaluated,
        "tokens_predicted": answer.tokens_predicted,
    }
    usage = answer.usage if isinstance(answer.usage, dict) else {}
    timings = answer.timings if isinstance(answer.timings, dict) else {}
    answers = len(_choices.decode(answer.choices)) or 1 if timings else 1
    return _usage_of(api, usage | native, timings, answers)


def beginning(head: bytes) -> bytes:
    """Find the first usage object in the beginning of an answer; empty if none.

    Anthropic's `message_start` has the tokens of the prompt, and embeddings have theirs
    in front of the numbers.
    """
    match = _USAGE_OBJECT.search(head)
    return match[1] if match is not None else b""


def read_end(api: Api, tail: bytes, began: bytes = b"", answers: int = 1) -> Usage:
    """Read the usage of a stream, or of any answer of which only the end was kept.

    `began` is what its `beginning` said.  What was generated is said at the end alone.
    `answers` is how many there are to the prompt.
    """
    first = _decoded(began)
    first = {k: v for k, v in first.items() if k not in _GENERATED}
    last = _decoded(_last(_USAGE_OBJECT, tail))
    last = {k: v for k, v in last.items() if v or k not in first}
    if api is Api.NATIVE:
        last |= {k.decode(): int(v) for k, v in _NATIVE_COUNT.findall(tail)}
    timings = _decoded(_last(_TIMINGS_OBJECT, tail))
    return _usage_of(api, first | last, timings, answers)


def _last(pattern: re.Pattern[bytes], tail: bytes) -> bytes:
    found = pattern.findall(tail)
    return found[-1] if found else b""


def _decoded(fields: bytes) -> dict[str, Any]:
    try:
        return _fields.decode(fields) if fields else {}
    except _UNREADABLE:
        return {}


# --- The definitions --------------------------------------------------------------

_GENERATED = ("completion_tokens", "output_tokens")
_SEVERAL = (Api.OPENAI, Api.NATIVE)  # may answer a prompt more than once


def _usage_of(api: Api, usage: _Fields, timings: _Fields, answers: int) -> Usage:
    """Read the fields as their API defines them, and else llama-server's timings."""
    match api:
        case Api.ANTHROPIC:
            # `input_tokens` is what is left beside the two (Messages API, `usage`).
            cached = _count(usage.get("cache_read_input_tokens"))
            prompt = _count(usage.get("input_tokens"))
            if prompt is not None:
                created = _count(usage.get("cache_creation_input_tokens"))
                prompt += (cached or 0) + (created or 0)
            generated = _count(usage.get("output_tokens"))
        case Api.RESPONSES:
            prompt = _count(usage.get("input_tokens"))
            cached = _cached(usage.get("input_tokens_details"))
            generated = _count(usage.get("output_tokens"))
        case _:
            # Transcriptions name them as Responses does.
            prompt = _either(
                _count(usage.get("prompt_tokens")), _count(usage.get("input_tokens"))
            )
            cached = _cached(usage.get("prompt_tokens_details"))
            generated = _either(
                _count(usage.get("completion_tokens")),
                _count(usage.get("output_tokens")),
            )
            if prompt is None and generated is None:  # of rerankers
                prompt = _count(usage.get("total_tokens"))
            if api is Api.NATIVE:
                # Its `tokens_cached` are those in the slot, with those of the answer.
                prompt = _either(prompt, _count(usage.get("tokens_evaluated")))
                generated = _either(generated, _count(usage.get("tokens_predicted")))
    if timings:
        parts = [_count(timings.get(name)) for name in ("prompt_n", "cache_n")]
        read = [part for part in parts if part is not None]
        prompt = _either(prompt, sum(read) if read else None)
        predicted = _count(timings.get("predicted_n"))
        if generated is None or generated == predicted:
            # A llama-server tells of one of several answers; the others are as long.
            several = answers if api in _SEVERAL else 1
            generated = predicted and predicted * several
        return Usage(prompt, generated, _timed(timings))
    if prompt is None or cached is None:
        return Usage(prompt, generated)
    return Usage(prompt, generated, Prompt(prompt - cached, cached, 0.0))


def _timed(timings: _Fields) -> Prompt | None:
    try:
        return Prompt(
            int(timings["prompt_n"]),
            int(timings.get("cache_n") or 0),
            float(timings["prompt_ms"]) / 1000,
        )
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _count(value: object) -> int | None:
    """Believe a number of tokens, or don't."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


def _cached(details: object) -> int | None:
    return _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def _either(told: int | None, other: int | None) -> int | None:
    return other if told is None else told
