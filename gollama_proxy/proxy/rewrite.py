"""The body that a worker gets: the client's own, or a rewritten one.

An answer in one piece is requested as a stream, which shows progress and ends at once
when the client disconnects.  A stream whose tokens must be counted is requested with
its usage.  A worker that refuses such a request, or whose stream cannot be assembled,
gets the request as the client wrote it.  That is remembered for a while, so that later
requests do not fail first.  Every other field stays to the byte as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
from msgspec import Raw

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.response import Assembly
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire.answer import Tally
from gollama_proxy.wire.assemble import (
    Asked,
    Assembler,
    MessageAssembler,
    NativeAssembler,
)
from gollama_proxy.wire.assemble_openai import (
    ChatAssembler,
    ResponseAssembler,
    TextAssembler,
)
from gollama_proxy.wire.fields import FieldScanner
from gollama_proxy.wire.schema import UNREADABLE, Api, Ending, Endpoint, raw_fields

REMEMBERED = 600.0  # seconds; a worker may have been updated by then


class Plainly(NamedTuple):
    """A kind of request that one worker gets as the client wrote it."""

    worker: str
    model: str
    path: str
    stream: bool  # the client wants one


class Rewriter:
    """Rewrites requests for workers, and remembers the workers that refuse them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = BoundedDict[Plainly, float]()

    def __repr__(self) -> str:
        return f"<Rewriter, {len(self._until)} exceptions>"

    def prepare(self, x: Exchange, worker: Worker) -> bytes:
        """Return the body with which a worker begins an answer."""
        body, model = x.body, x.plan.pool.model
        sent = body.named(model)
        streams = body.stream and body.replayable
        if streams:
            choices = body.answers
            if not x.endpoint.chat and has_prompts(sent):
                choices = choices_of(sent)
            if choices != x.choices:
                x.choices = choices
        if x.rewritten:
            x.hides_usage = x.rewritten = False
        if x.delivery is not None and not x.delivery.begun:
            x.delivery = None
        x.sent = sent
        if x.plan.as_sent or (
            (x.suspect is not None or self._until) and self._is_plain(x, worker)
        ):
            return sent
        if streams:
            with_usage = ask_for_usage(sent) if self._needs_usage(x, worker) else None
            if with_usage is not None:
                x.sent, x.hides_usage, x.rewritten = with_usage, True, True
        elif (
            x.endpoint.path in x.config.upstream.assemble
            and self._may_assemble(x)
            and (asked := ask_for_stream(sent, x.endpoint))
        ):
            x.delivery = Assembly(x, asked.assembler(x.config.limits.answer))
            x.sent, x.rewritten = asked.body, True
        return x.sent

    def _may_assemble(self, x: Exchange) -> bool:
        return (
            x.body.replayable
            and not x.body.stream
            # Only the end of a stream shows whether it has all of the answer; if not,
            # the answer has to be requested again.
            and not x.plan.once
        )

    def _needs_usage(self, x: Exchange, worker: Worker) -> bool:
        """Whether the tokens of a stream are counted only with its usage.

        llama-server always sends its `timings`.  With usage, it would send both in one
        event, so that they would be hidden from a client that reads them.
        """
        counts = x.endpoint.ending is Ending.DONE
        return x.counted and counts and not worker.is_llama_server

    # --- Workers that refuse rewritten requests -----------------------------------

    def _is_plain(self, x: Exchange, worker: Worker) -> bool:
        kind = self._kind(x, worker)
        until = self._until.get(kind)
        return kind == x.suspect or (until is not None and self._clock() < until)

    def _kind(self, x: Exchange, worker: Worker) -> Plainly:
        model = x.plan.pool.model
        return Plainly(worker.name, model, x.endpoint.path, x.body.stream)

    def doubt(self, x: Exchange, cause: Cause, *, lasting: bool) -> Cause:
        """Send a worker what the client wrote, if that may help; return the cause.

        A 4xx to a request that the hub has rewritten is not the client's fault.
        """
        if cause in (Cause.REFUSED, Cause.DIVERGED):
            cause = Cause.UNFOLDABLE
        if lasting and cause in (Cause.UNFOLDABLE, Cause.STATUS):
            x.suspect = self._kind(x, x.plan.tried[-1])
        return cause

    def confirm(self, x: Exchange, worker: Worker) -> None:
        """Remember a worker that answers a request only as the client wrote it."""
        if x.suspect is not None and x.suspect.worker == worker.name:
            self._until[x.suspect] = self._clock() + REMEMBERED


def tally_of(x: Exchange) -> Tally:
    """Make the tally of the choices that have ended."""
    return Tally(x.endpoint.ending, x.choices)


# --- A stream ---------------------------------------------------------------------

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


class Streaming(msgspec.Struct, frozen=True):
    """A request for a stream, and what folds its answer."""

    body: bytes
    assembler: Callable[[int], Assembler]  # of a limit of characters

    def __repr__(self) -> str:  # without the text of a user
        return f"<Streaming {len(self.body)} bytes>"


def ask_for_stream(body: bytes, endpoint: Endpoint) -> Streaming | None:
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
    asked = Asked(
        stops=stops,
        choices=_choices_of(given),
        tokens=bytes(given.get("return_tokens", b"null")) == b"true",
    )
    given["stream"] = Raw(b"true")
    if endpoint.api is Api.OPENAI:  # the others report it unasked
        given["stream_options"] = Raw(_ASKED)
    make = ChatAssembler if endpoint.chat else _ASSEMBLERS[endpoint.api]
    return Streaming(msgspec.json.encode(given), partial(make, asked=asked))


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


# --- Usage ------------------------------------------------------------------------

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
