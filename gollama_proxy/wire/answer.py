r"""What an answer reports about itself, and how its stream ended.

An answer names its model and its build, and reports how many tokens it took.

Nearly every answer names its model in its first event, or before its long fields, and
one search finds it.  Generated text cannot be mistaken for the name: a JSON string
holds no bare quote (RFC 8259, 7).  But the arguments of a call or the metadata of a
request may have a key of that name, so an unexpected name is looked up once more by
parsing (`model_of`).

Tokens are counted as the API of the route defines them.

**The end of a stream** is judged from one reading of its last bytes, which a relay
keeps, once the stream is over.  Only the last event is parsed.  Marks are found by
searching the bytes, first for a plain string, and with a regular expression only where
that string occurs.  Generated text cannot be mistaken for a mark either, as it holds no
line end.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gollama_proxy.wire import sse
from gollama_proxy.wire.schema import (
    UNREADABLE,
    Api,
    Counted,
    Ending,
    Reported,
    any_fields,
    any_list,
    chunk_head,
    counted,
    named,
    native_head,
    reported,
)
from gollama_proxy.wire.sse import DONE, Gatherer, data_of, events_in, split_events

# --- A whole answer ---------------------------------------------------------------

_Fields = Mapping[str, Any]
# Members of enums, looked up once ("What Python costs" in benchmarks/RESULTS.md).
_ANTHROPIC, _NATIVE, _RESPONSES = Api.ANTHROPIC, Api.NATIVE, Api.RESPONSES
_UNTIL_DONE, _NAMED = Ending.DONE, Ending.NAMED


class Prefill(msgspec.Struct, frozen=True, gc=False):
    """How a worker has read a prompt, as it reports.  The numbers may be absurd."""

    tokens: int  # that it has read
    cached: int  # that it had in its cache
    seconds: float = 0.0  # 0 is not known

    @property
    def possible(self) -> bool:
        """Whether it can be true at all."""
        return self.tokens >= 0 and self.cached >= 0 and 0 <= self.seconds < math.inf

    def plausible_in(self, seconds: float) -> bool:
        """Return whether it can be true of an answer that began after these seconds."""
        return (
            self.tokens > 0 and self.cached >= 0 and 0 < self.seconds <= seconds * 1.1
        )


class Usage(msgspec.Struct, frozen=True, gc=False):
    """How many tokens an answer took; None for what the worker does not report."""

    prompt: int | None = None  # all of it, cached or not
    generated: int | None = None
    reading: Prefill | None = None


class AnswerReport(msgspec.Struct, frozen=True, gc=False):
    """What a whole answer reports; None and "" for what it does not."""

    usage: Usage
    model: str | None
    build: str  # of llama-server

    def __repr__(self) -> str:
        return f"<AnswerReport of {self.model!r}: {self.usage!r}>"


def read_answer(body: bytes, api: Api, answers: int = 1) -> AnswerReport:
    """Read a whole answer once.

    `answers` is how many there are to each prompt, which counts once; the usage of
    several answers in a list is their sum.
    """
    try:
        decoded = counted.decode(body)
        if isinstance(decoded, list):
            return AnswerReport(
                _sum([_read_one(api, each) for each in decoded], answers), None, ""
            )
        usage = _read_one(api, decoded)
    except UNREADABLE:  # it may be text, or JSON that others understand
        return AnswerReport(NO_USAGE, first_model(body), build_of(body))
    model, build = decoded.model, decoded.system_fingerprint
    return AnswerReport(
        usage,
        model if isinstance(model, str) else None,
        build if isinstance(build, str) and len(build) <= MOST_BUILD else "",
    )


def read_usage(body: bytes, api: Api, answers: int = 1) -> Usage:
    """Read the usage of a whole answer, as `read_answer` does."""
    return read_answer(body, api, answers).usage


def _sum(usages: Sequence[Usage], answers: int) -> Usage:
    prompts = [each.prompt for each in usages if each.prompt is not None]
    generated = [each.generated for each in usages if each.generated is not None]
    return Usage(
        sum(prompts) // answers if prompts else None,
        sum(generated) if generated else None,
    )


def _read_one(api: Api, answer: Counted) -> Usage:
    usage, timings = answer.usage, answer.timings
    if type(usage) is not dict:  # `isinstance` takes longer, and most for None
        usage = {}
    if api is _NATIVE:
        usage["tokens_evaluated"] = answer.tokens_evaluated
        usage["tokens_predicted"] = answer.tokens_predicted
    if type(timings) is not dict:
        return _usage_of(api, usage, {}, 1) if usage else NO_USAGE
    answers = len(any_list.decode(answer.choices)) or 1
    return _usage_of(api, usage, timings, answers)


# --- The first bytes of any answer ------------------------------------------------

_MODEL = re.compile(rb'"model"\s{0,64}:\s{0,64}("(?:[^"\\]|\\.){1,4096}")', re.DOTALL)
# Characters of a build; of what a worker reports of itself, no more are kept.
MOST_BUILD = 100
_BUILD = re.compile(
    rb'"system_fingerprint"\s{0,64}:\s{0,64}"([^"\\]{1,%d})"' % MOST_BUILD
)


def names_in(held: bytes) -> tuple[str | None, str]:
    """Return what `first_model` and `build_of` do, for the first bytes of an answer."""
    at = held.find(b'"model"')
    # llama-server writes one behind the other, and the same ones in each answer.
    names = _neighbours(held[at : at + _NEAR]) if at >= 0 else None
    return names or (first_model(held), build_of(held))


_NEAR = 128  # bytes; generated text begins behind them
_BOTH = re.compile(
    rb'"model":"([ -!#-\[\]-~]+)","system_fingerprint":"([^"\\]{1,%d})"' % MOST_BUILD
)


@functools.lru_cache(maxsize=256)
def _neighbours(fields: bytes) -> tuple[str, str] | None:
    found = _BOTH.match(fields)
    return found and (found[1].decode(), found[2].decode(errors="replace"))


def first_model(held: bytes) -> str | None:
    """Return the first name of a model in the first bytes of an answer."""
    at = held.find(b'"model"')
    if at < 0:
        return None
    end = held.find(b'"', at + 9)
    if held[at + 7 : at + 9] == b':"' and at + 9 < end <= at + 9 + 4096:
        name = held[at + 9 : end]  # a plain one, as nearly always
        if name.isascii():
            text = name.decode()
            if text.isprintable() and "\\" not in text:
                return text
    found = _MODEL.search(held, at)
    if found is None:
        return None
    try:
        return msgspec.json.decode(found[1], type=str)
    except UNREADABLE:
        return None


def model_of(held: bytes, *, events: bool) -> str | None:
    """Return the model that an answer names as its own; None if it names none.

    `held` is the beginning of an event stream, or a whole body.
    """
    names = map(_read_model, sse.events_in(held) if events else [held])
    return next((name for name in names if name is not None), None)


def build_of(held: bytes) -> str:
    """Return the build of llama-server that an answer names; empty if it names none."""
    at = held.find(b'"system_fingerprint"')
    found = None if at < 0 else _BUILD.search(held, at)
    return "" if found is None else found[1].decode(errors="replace")


def _read_model(body: bytes) -> str | None:
    try:
        event = named.decode(body)
    except UNREADABLE:
        return None
    inner = [each for each in (event.message, event.response) if isinstance(each, dict)]
    names = (event.model, *(each.get("model") for each in inner))
    return next((name for name in names if isinstance(name, str)), None)


# --- The two ends of a longer one -------------------------------------------------

# The last object of a stream is the one that counts.
_USAGE_OBJECT = re.compile(
    rb'"usage"\s*:\s*(\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\})',
)
_TIMINGS_OBJECT = re.compile(rb'"timings"\s*:\s*(\{[^{}]*+\})')
_NATIVE_COUNT = re.compile(
    rb'"(tokens_(?:evaluated|predicted))"\s*:\s*(\d{1,8})(?![\d.eE])'
)


def beginning(head: bytes) -> bytes:
    """Find the first usage object in the first bytes of an answer; empty if none.

    Anthropic's `message_start` has the tokens of the prompt, and embeddings have theirs
    in front of the numbers.
    """
    at = head.find(b'"usage"')
    match = None if at < 0 else _USAGE_OBJECT.search(head, at)
    return b"" if match is None else match[1]


def read_tail(api: Api, tail: bytes, began: bytes = b"", answers: int = 1) -> Usage:
    """Read the usage of a stream, or of an answer of which only the end was kept.

    `began` is what `beginning` found; the tokens that were generated are read from the
    tail alone.  `answers` is how many there are to the prompt.
    """
    usage, timings = _reports(tail)
    if began:
        first = _decoded(began)
        first = {k: v for k, v in first.items() if k not in _GENERATED}
        usage = first | {k: v for k, v in usage.items() if v or k not in first}
    if api is _NATIVE:
        usage |= {k.decode(): int(v) for k, v in _NATIVE_COUNT.findall(tail)}
    return _usage_of(api, usage, timings, answers) if usage or timings else NO_USAGE


def _reports(tail: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last objects with the usage and the timings.

    Nearly always, the last event before `[DONE]` has them.  What it lacks is searched.
    """
    # Without any, -1: then it may be at the very beginning, which has no line end.
    at = tail.rfind(b"\ndata: {")
    try:
        last = reported.decode(tail[at + 7 : tail.find(b"\n", at + 7)])
    except UNREADABLE:
        last = Reported()
    usage, timings = last.usage, last.timings
    if not isinstance(usage, dict):
        usage = _last(b'"usage"', _USAGE_OBJECT, tail)
    if not isinstance(timings, dict):
        timings = _last(b'"timings"', _TIMINGS_OBJECT, tail)
    return usage, timings


def _last(key: bytes, pattern: re.Pattern[bytes], tail: bytes) -> dict[str, Any]:
    """Return the last object with this key."""
    at = tail.find(key)
    found = pattern.findall(tail, at) if at >= 0 else ()
    return _decoded(found[-1]) if found else {}


def _decoded(fields: bytes) -> dict[str, Any]:
    try:
        return any_fields.decode(fields)
    except UNREADABLE:
        return {}


# --- The definitions --------------------------------------------------------------

# Larger numbers are not believed: a subject would be charged for them.
_MOST_TOKENS = 10**8
NO_USAGE = Usage()
_GENERATED = ("completion_tokens", "output_tokens")
_SEVERAL = (Api.OPENAI, Api.NATIVE)  # may answer a prompt more than once


def _usage_of(api: Api, usage: _Fields, timings: _Fields, answers: int) -> Usage:
    """Read the fields as their API defines them, and else llama-server's timings."""
    counts = _counts(usage) if usage else {}
    cached: int | None
    if api is _ANTHROPIC:
        # `input_tokens` leaves out the other two (Messages API, `usage`).
        cached = counts.get("cache_read_input_tokens")
        prompt = counts.get("input_tokens")
        if prompt is not None:
            prompt += cached or 0
            prompt += counts.get("cache_creation_input_tokens", 0)
        generated = counts.get("output_tokens")
    elif api is _RESPONSES:
        cached = _cached(usage.get("input_tokens_details"))
        prompt = counts.get("input_tokens")
        generated = counts.get("output_tokens")
    else:
        # Transcriptions name them as Responses does, and rerankers have a total alone.
        # llama-server's `tokens_cached` are those in the slot, with those of the
        # answer.
        details = usage.get("prompt_tokens_details")
        cached = _cached(details) if details else None
        prompt = counts.get("prompt_tokens")
        if prompt is None:
            prompt = counts.get("input_tokens")
        generated = counts.get("completion_tokens")
        if generated is None:
            generated = counts.get("output_tokens")
        if prompt is None and generated is None:
            prompt = counts.get("total_tokens")
        if api is _NATIVE:
            if prompt is None:
                prompt = counts.get("tokens_evaluated")
            if generated is None:
                generated = counts.get("tokens_predicted")
    if timings:
        times = _counts(timings)
        if prompt is None and ("prompt_n" in times or "cache_n" in times):
            prompt = times.get("prompt_n", 0) + times.get("cache_n", 0)
        predicted = times.get("predicted_n")
        if generated is None or generated == predicted:
            # A llama-server reports one of several answers; the others are as long.
            several = answers if api in _SEVERAL else 1
            generated = predicted and predicted * several
        return Usage(prompt, generated, _timed(timings))
    if prompt is None or cached is None:
        return Usage(prompt, generated)
    return Usage(prompt, generated, Prefill(prompt - cached, cached))


def _cached(details: object) -> int | None:
    if not isinstance(details, dict):
        return None
    return _counts(details).get("cached_tokens")


def _timed(timings: _Fields) -> Prefill | None:
    try:
        return Prefill(
            int(timings["prompt_n"]),
            int(timings.get("cache_n") or 0),
            float(timings["prompt_ms"]) / 1000,
        )
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _counts(fields: _Fields) -> dict[str, int]:
    """Return those of the fields that are numbers of tokens and can be true."""
    counts = {}
    for name, value in fields.items():  # cheaper than a comprehension
        if type(value) is int and 0 <= value < _MOST_TOKENS:
            counts[name] = value  # noqa: PERF403
    return counts


# --- How a stream ended -----------------------------------------------------------


# Bytes of a stream's tail that are kept; the last events of llama-server take 1.2 KiB.
TAIL = 1400

_LAST_DONE = b"\n" + DONE
_DONE_LINE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\][\r\n]")
_STOP = re.compile(rb'"stop"\s*:\s*true|"stop_type"\s*:\s*"(?!none)')
_LAST_EVENT = re.compile(
    rb"(?:^|[\r\n])event: ?"
    rb"(?:message_stop|response\.(?:completed|incomplete|failed))[\r\n]"
)
_TRANSCRIPT_DONE = re.compile(rb'"type"\s*:\s*"transcript\.text\.done"')
_REASONS = re.compile(rb'"finish_reason"\s*:\s*(null|""|"[^"]+")')
# `response.failed` is both: its answer ends there, and its worker has failed.
_ERROR_EVENT = re.compile(
    rb'(?:^|[\r\n])(?:data: ?\{\s*"error"\s*:|'
    rb"event: ?(?:error|response\.failed)[\r\n])"
)
# An error anywhere in an event, for the APIs that have no such field otherwise.
_ERROR = re.compile(
    rb"(?:^|[\r\n])data: ?\{[^\r\n]*?"
    rb'(?:"error"\s*:\s*(?:\{|"[^"])|"object"\s*:\s*"error")'
)
_LATER_CHOICE = re.compile(rb'"index"\s*:\s*[1-9]')


class End(msgspec.Struct, gc=False):
    """The end of an answer, read from its tail."""

    complete: bool = False  # it has the mark of a complete answer
    done: bool = False  # it has a `[DONE]`
    failed: bool = False  # the worker reported that it failed, by an event
    rest: bytes = b""  # an unfinished event after the last blank line
    usage: Usage = Usage()

    def __repr__(self) -> str:  # without the text of the unfinished event
        words = [name for name in ("complete", "done", "failed") if getattr(self, name)]
        return f"<End {' '.join(words) or 'incomplete'} rest={len(self.rest)}>"


NO_END = End()


def read_end(
    tail: bytes,
    ending: Ending,
    api: Api = Api.OPENAI,
    began: bytes = b"",
    answers: int = 1,
) -> End:
    """Read the last bytes of an answer, at least `TAIL` of a longer one.

    `began` is what `beginning` found in its first bytes, and `answers` is how
    many there are to the prompt.
    """
    closed = tail.endswith(_LAST_DONE)
    done = closed or _has_done(tail)
    return End(
        _is_complete(tail, ending, done=done),
        done,
        has_error(tail, ending),
        b"" if closed else split_events(tail)[1],
        read_tail(api, tail, began, answers),
    )


def is_complete(tail: bytes, ending: Ending) -> bool:
    """Return whether these bytes have the mark of a complete answer."""
    return _is_complete(tail, ending, done=_has_done(tail))


def _has_done(tail: bytes) -> bool:
    return b"[DONE]" in tail and _DONE_LINE.search(tail) is not None


def _is_complete(tail: bytes, ending: Ending, *, done: bool) -> bool:
    if ending is _UNTIL_DONE:
        complete = done or _has_reason(tail)
    elif ending is Ending.STOP:
        complete = b'"stop' in tail and _STOP.search(tail) is not None
    elif ending is Ending.NAMED:
        complete = b"event:" in tail and _LAST_EVENT.search(tail) is not None
    elif ending is Ending.TRANSCRIPT:
        complete = done or _TRANSCRIPT_DONE.search(tail) is not None
    else:  # the end of the body is the mark
        complete = True
    if not complete or tail.count(b'"index"') == tail.count(b'"index":0'):
        return complete
    # Events may belong to several choices.
    return _LATER_CHOICE.search(tail) is None or _all_ended(tail, ending)


def _has_reason(tail: bytes) -> bool:
    """Return whether the last finish reason is neither null nor empty."""
    reasons = _REASONS.findall(tail)
    return bool(reasons) and len(reasons[-1]) > 2 and reasons[-1] != b"null"


def has_error(tail: bytes, ending: Ending) -> bool:
    """Return whether one of these events is an error."""
    if tail.find(b"error") < 0 and (  # cheaper than `in`
        ending is not _NAMED or tail.find(b"response.failed") < 0
    ):
        return False
    if _ERROR_EVENT.search(tail) is not None:
        return True
    named = ending not in (Ending.DONE, Ending.STOP)
    return not named and _ERROR.search(tail) is not None


# --- Several choices --------------------------------------------------------------


def _all_ended(tail: bytes, ending: Ending) -> bool:
    """Return whether each choice in the tail has ended, or none has an end."""
    ended: dict[int, bool] = {}
    for data in events_in(tail):
        for index, ends in ends_in(data, ending).items():
            ended[index] = ended.get(index, False) or ends
    return all(ended.values()) or not any(ended.values())


def ends_in(data: bytes, ending: Ending) -> dict[int, bool]:
    """Map the index of each choice in an event to whether the choice ends there."""
    try:
        if ending is Ending.STOP:
            event = native_head.decode(data)
            return {} if event.index is None else {event.index: event.stop}
        if ending is Ending.DONE:
            choices = chunk_head.decode(data).choices or ()
            return {choice.index: bool(choice.finish_reason) for choice in choices}
    except UNREADABLE:
        pass  # `[DONE]`, or a part of an event
    return {}


# Far above what is ever requested, and longer than the event of any choice.
MOST_CHOICES = 10_000
MOST_HELD = 1 << 20


class Tally:
    """Counts the ends of the choices in a stream that is relayed.

    It reads each event, so it is for requests that ask for several choices.
    """

    __slots__ = ("_asked", "_ended", "_ending", "_gatherer", "_open")

    def __init__(self, ending: Ending, asked: int) -> None:
        self._ending = ending
        self._asked = asked
        self._gatherer: Gatherer | None = Gatherer()  # None once over the limits
        self._open = set[int]()
        self._ended = set[int]()

    def __repr__(self) -> str:
        return f"<Tally {len(self._ended)} of {self._asked} ended>"

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream."""
        if self._gatherer is None:
            return
        for event in self._gatherer.feed(data):
            for index, ends in ends_in(data_of(event) or b"", self._ending).items():
                if ends:
                    self._ended.add(index)
                self._open.add(index)
        if self._gatherer.size > MOST_HELD or len(self._open) > MOST_CHOICES:
            self._gatherer = None

    def is_complete(self, *, done: bool) -> bool:
        """Return whether all choices have ended; `done` means that `[DONE]` has come.

        A server that sends `[DONE]` may give fewer choices than were asked for, and may
        be one that does not mark the end of each.
        """
        if self._gatherer is None:
            return True
        if done and not self._ended:
            return True
        return self._ended == self._open and (done or len(self._ended) >= self._asked)
