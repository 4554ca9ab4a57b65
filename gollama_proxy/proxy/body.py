"""The body of a request: as its client sends it, and as a worker gets it.

It is read within its limits: the fields for routing, and the replay window.  A body
within the window is kept completely, so that it can be sent again.  Of a larger one the
window is kept, and the rest streams through `rest()` in constant memory and is checked
on the way.  A compressed body is decompressed as it arrives; all limits apply to the
result.

An answer in one piece is requested as a stream, which shows progress and ends at once
when the client disconnects.  A stream whose tokens must be counted is requested with
its usage.  A worker that refuses such a request, or whose stream cannot be assembled,
gets the request as the client wrote it.  That is remembered for a while, so that later
requests do not fail first.  Every other field stays to the byte as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from aiohttp.hdrs import CONTENT_ENCODING, CONTENT_LENGTH, EXPECT
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError
from aiohttp.web_request import BaseRequest
from msgspec import UNSET

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Config
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.response import Assembly
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.scheduling import affinity
from gollama_proxy.wire import fields
from gollama_proxy.wire.answer import Tally
from gollama_proxy.wire.assemble import (
    ask_for_stream,
    ask_for_usage,
    choices_of,
    has_prompts,
)
from gollama_proxy.wire.bodies import (
    CODINGS,
    CodingError,
    FormScanner,
    Unpacker,
    boundary_of,
    coding_of,
    content_type_of,
)
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.schema import Ending, Endpoint

# The time limit grows by a second for each so many bytes (as mod_reqtimeout does).
LEAST_RATE = 16 << 10

_BOM = b"\xef\xbb\xbf"

# For each field, the kinds of JSON values that are allowed; null counts as absent.
_ARRAY, _ANYTHING = ("[", "an array"), ("", "")
_NUMBER = ("0n", "a number")
_KINDS = {
    "model": ('"n', "a string"),
    "stream": ("tfn", "a boolean"),
    "max_tokens": _NUMBER,
    "max_completion_tokens": _NUMBER,
    "n_predict": _NUMBER,
    "fallbacks": _ARRAY,
}
_ANSWERS = ("n", "n_cmpl")
_LENGTHS = ("max_completion_tokens", "max_tokens", "n_predict")
_NO_LIMITS = (UNSET, UNSET, UNSET)
_BRACKET = ord("[")
_NOTHING: Mapping[str, fields.Field] = {}


class Body:
    """A request body that is being received."""

    __slots__ = (
        *("_content", "_ended", "_found", "_grace", "_kept", "_limit", "_opening"),
        *("_received", "_scanner", "_unpacked", "_unpacker", "_waited", "answers"),
        *("complete", "content_type", "converses", "endpoint", "fallbacks", "length"),
        *("max_tokens", "model", "prompts", "replayable", "size", "stream"),
        "untouched",
    )

    def __init__(
        self, request: BaseRequest, endpoint: Endpoint, config: Config
    ) -> None:
        self.size = 0
        self.complete = False
        self.replayable = False  # all of it is kept, and can be sent repeatedly
        self.untouched = True  # it can still be sent from its beginning, at least once
        self.content_type = b"application/json"  # as a worker gets it

        # What the client requests, as far as the body has been read
        self.model: str | None = None
        self.stream = False
        self.fallbacks: tuple[str, ...] = ()  # models that the client names
        self.prompts = 1  # how many prompts it contains
        self.answers = 1  # how many answers to each of them
        self.max_tokens = 0  # the longest answer that it wants; 0 if it states none
        self.converses = False  # it has messages

        # How it is received
        self._waited = 0.0  # seconds
        self._received = 0  # bytes, before decompression
        self._ended = False  # everything has been received
        self._opening = b""  # the possible beginning of a byte order mark
        self._found: Mapping[str, fields.Field] = _NOTHING
        self._scanner: fields.FieldScanner | FormScanner | None = None
        self._unpacker: Unpacker | None = None
        self._unpacked: Iterator[bytes] | None = None  # from the last piece received
        self.endpoint = endpoint
        length = request.headers.get(CONTENT_LENGTH)
        self.length = None if length is None else int(length)
        self._content = request.content
        self._limit = config.limits.body
        self._grace = config.timeouts.body
        self._kept: list[bytes] = []
        if self.length is not None and self.length > self._limit:
            raise self._too_large()
        if endpoint.form:
            boundary = boundary_of(request.headers.get("Content-Type", ""))
            self._scanner = FormScanner(boundary)
            self._found = self._scanner.found
            self.content_type = content_type_of(boundary)
        if CONTENT_ENCODING in request.headers:
            coding = coding_of(request.headers.getall(CONTENT_ENCODING))
            if coding:
                self._unpacker = _unpacker_of(coding)
                self.length = None  # of the decompressed body, not known yet

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"<Body {self.endpoint.path} {self.size} bytes {state}>"

    # --- The part that is kept ----------------------------------------------------

    def take(self) -> bool:
        """Take a body that came with its head; False if there is more to `read`.

        Raises:
            RequestError: as in `read`.
        """
        if self._unpacker is not None or not self._content.is_eof():
            return False
        self._kept.append(self._take(self._read_nowait(), ended=True))
        self._settle()
        return True

    async def read(self, window: int) -> None:
        """Read until the body is complete, or `window` bytes of it are kept.

        Raises:
            RequestError: 400, 408 or 413, naming what is wrong with the body.
        """
        while not self.complete and self.size < window:
            piece = await self._next_piece()
            if piece:
                self._kept.append(piece)
        self._settle()

    def _settle(self) -> None:
        """Read the fields of what is kept."""
        if self._scanner is not None:
            if self.complete and not self.endpoint.form:
                fields.check_json(self._whole)
            self._read_fields()
        if self.complete:
            self.replayable = True
            if self.endpoint.generates and not self.converses:
                self.prompts = fields.count_prompts(self._whole)
            if "fallbacks" in self._found:
                self._take_fallbacks()

    def _read_whole(self, body: bytes) -> bool:
        """Read a body in one piece; False, without effect, for an unusual one."""
        wanted = fields.read_whole(body)
        if wanted is None or wanted.fallbacks is not UNSET:
            return False
        for name in self.endpoint.arrays:
            array = getattr(wanted, name)
            if array is not UNSET and memoryview(array)[0] != _BRACKET:
                return False
        length: int | None = None
        limits = wanted.max_completion_tokens, wanted.max_tokens, wanted.n_predict
        for value in limits if limits != _NO_LIMITS else ():
            if value is not UNSET and (raw := bytes(value)) != b"null":
                number = fields.natural(raw)
                if number is None:
                    return False
                length = number if length is None else length
        answers: int | None = None
        for value in (wanted.n, wanted.n_cmpl):
            if answers is None and value is not UNSET:
                answers = fields.natural(bytes(value))
        if length:
            self.max_tokens = length
        if answers:
            self.answers = answers
        if wanted.model is not UNSET:
            self.model = wanted.model
        if wanted.stream is not UNSET:
            self.stream = bytes(wanted.stream) == b"true"
        if wanted.messages is not UNSET:
            self.converses = True
        self.size, self.complete = len(body), True
        return True

    def _take_fallbacks(self) -> None:
        """Remove the field that is for the hub and not for the worker."""
        self.fallbacks, body = fields.take_names(self._whole, "fallbacks")
        self.size = self.length = len(body)
        self._kept = [body]
        self._scan(body)

    @property
    def _whole(self) -> bytes:
        """The kept part in one piece."""
        if len(self._kept) != 1:
            self._kept = [b"".join(self._kept)]
        return self._kept[0]

    def _number(self, names: Sequence[str]) -> int:
        """Read the first of these fields that is a natural number, else 0."""
        for name in names:
            field = self._found.get(name)
            if field is not None:
                number = fields.natural(field.raw)
                if number is not None:
                    return number
        return 0

    @property
    def may_have_media(self) -> bool:
        """Whether `media` may find anything, at little cost."""
        kept = self._kept[0] if len(self._kept) == 1 else self._whole
        return self.replayable and kept.find(b'"type"') >= 0  # texts have no type

    def media(self) -> frozenset[str]:
        """Return what its messages have besides text, as far as all of it is kept."""
        return fields.media_in(self._whole) if self.replayable else frozenset()

    def prefixes(self, key: bytes) -> tuple[int, ...]:
        """Return hashes of the beginnings of its conversation, if it is one.

        Without a `key` they are valid in this process only.
        """
        if not (self.replayable and self.converses):
            return ()
        return affinity.prefixes(fields.messages_of(self._whole), key=key)

    def named(self, model: str) -> bytes:
        """Return the kept part with the name that the worker has for the model.

        No other byte changes.  A `model` beyond the kept part is unchanged: it makes no
        difference then, as the workers serve only one.
        """
        kept = self._kept[0] if len(self._kept) == 1 else self._whole
        if self.model is None:
            if not self.complete:
                return kept
        elif self.model == model:
            return kept
        field = self._found.get("model")
        if isinstance(self._scanner, FormScanner):
            return self._scanner.with_model(kept, field, model)
        if self._scanner is None:
            field = fields.find_model(kept)
        return fields.with_model(kept, field, model)

    def _scan(self, body: bytes) -> None:
        """Read a whole body again."""
        self._scanner = scanner = fields.FieldScanner()
        scanner.feed(body)
        self._found = scanner.found

    def length_behind(self, body: bytes) -> int | None:
        """Return the length of `body` and the rest; None if that is not known."""
        return None if self.length is None else self.length - self.size + len(body)

    def forget(self) -> None:
        """Free the kept part: the answer has begun, so nothing is sent again."""
        if self.replayable:
            self._kept, self._found, self._scanner = [], _NOTHING, None
            self.model = None

    # --- The part that streams through --------------------------------------------

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield what follows the kept part, as it arrives.

        Raises:
            RequestError: as in `read`; the body must not end regularly for the worker.
        """
        self.replayable = self.untouched = False
        while not self.complete:
            piece = await self._next_piece()
            self._read_fields()
            if piece:
                yield piece

    async def _next_piece(self) -> bytes:
        if self._unpacker is None:
            piece = await self._receive()
            return self._take(piece, ended=self._ended)
        try:
            while (part := next(self._unpacked or iter(()), None)) is None:
                if self._ended:
                    self._unpacker.end()
                    return self._take(b"", ended=True)
                self._unpacked = self._unpacker.feed(await self._receive())
        except CodingError as exc:
            text = f"The request body is not valid {self._unpacker.coding}: {exc}."
            raise RequestError(Code.BAD_REQUEST, text) from None
        await asyncio.sleep(0)  # a bomb must not block the event loop
        return self._take(part, ended=False)

    async def _receive(self) -> bytes:
        """Receive the next piece, before decompression."""
        if self._content.is_eof():  # it has arrived already
            return self._read_nowait()
        patience = self._grace + self._received / LEAST_RATE - self._waited
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(patience):
                piece = await self._content.readany()
                if (error := self._content.exception()) is not None:
                    raise error  # it came together with the piece, and ends the body
        except TimeoutError:
            text = "The request body arrived too slowly."
            raise RequestError(Code.BODY_TIMEOUT, text) from None
        except (RequestPayloadError, HttpProcessingError) as exc:
            raise _malformed(exc) from None
        self._waited += loop.time() - began
        self._ended = self._content.at_eof()
        self._received += len(piece)
        if self._received > self._limit:
            raise self._too_large()
        return piece

    def _read_nowait(self) -> bytes:
        """Take the rest of a body that has arrived."""
        try:
            piece = self._content.read_nowait()
        except (RequestPayloadError, HttpProcessingError) as exc:
            raise _malformed(exc) from None
        self._ended = True
        self._received += len(piece)
        if self._received > self._limit:
            raise self._too_large()
        return piece

    def _take(self, piece: bytes, *, ended: bool) -> bytes:
        """Count a piece and scan it."""
        first = self._scanner is None and not (self.size or self._opening)
        if first and ended and self._read_whole(piece):
            return piece
        if not self.size and (self._opening or (piece and piece[0] == _BOM[0])):
            piece = self._without_bom(piece, ended)
        self.size += len(piece)
        if self.size > self._limit:
            raise self._too_large()
        scanner = self._scanner
        if scanner is None:
            scanner = self._scanner = fields.FieldScanner()
            self._found = scanner.found
        scanner.feed(piece)
        if ended:
            scanner.finish()
        self.complete = ended
        return piece

    def _without_bom(self, piece: bytes, ended: bool) -> bytes:
        """Remove a byte order mark, which parsers may ignore (RFC 8259, 8.1)."""
        opening = self._opening + piece
        if len(opening) < len(_BOM) and _BOM.startswith(opening) and not ended:
            self._opening = opening
            return b""
        self._opening = b""
        if not opening.startswith(_BOM):
            return opening
        if self.length is not None:
            self.length -= len(_BOM)
        return opening.removeprefix(_BOM)

    # --- Checks -------------------------------------------------------------------

    def _read_fields(self) -> None:
        """Check the types of the fields, and store what the client requests."""
        arrays = self.endpoint.arrays
        for name, field in self._found.items():
            kinds, what = _KINDS.get(name) or (_ARRAY if name in arrays else _ANYTHING)
            if kinds and field.kind not in kinds:
                text = f"`{name}` must be {what}."
                raise RequestError(Code.INVALID_VALUE, text, param=name)
            if name == "model" and field.kind == '"':
                self.model = fields.text_of(field)
            elif name == "stream":
                self.stream = field.raw == b"true"
            elif name in _ANSWERS:
                self.answers = max(1, self._number(_ANSWERS))
        self.max_tokens = self._number(_LENGTHS)
        self.converses = "messages" in self._found

    def _too_large(self) -> RequestError:
        text = f"The request body is larger than {self._limit} bytes."
        return RequestError(Code.BODY_TOO_LARGE, text)


def _malformed(exc: Exception) -> RequestError:
    text = "The framing of the request body is not valid HTTP."
    return RequestError(Code.BAD_REQUEST, text, detail=str(exc))


def _unpacker_of(coding: str) -> Unpacker:
    try:
        return Unpacker(coding)
    except CodingError:
        text = f"Content-Encoding must be one of {', '.join(CODINGS)}, or none."
        raise RequestError(Code.UNSUPPORTED_ENCODING, text) from None


def answer_expectation(request: BaseRequest) -> None:
    """Send `100 Continue` to a client that waits for it before it sends the body.

    Raises:
        RequestError: 417, it expects something else (RFC 9110, 10.1.1).
    """
    expected = request.headers.get(EXPECT)
    if expected is None or request.version < (1, 1):
        return
    if expected.lower() != "100-continue":
        text = "The only supported expectation is '100-continue'."
        raise RequestError(Code.EXPECTATION_FAILED, text)
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


# --- As a worker gets it ----------------------------------------------------------

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
            and not body.stream
            and body.replayable
            # Only the end of a stream shows whether it has all of the answer; if not,
            # the answer has to be requested again.
            and not x.plan.once
            and (asked := ask_for_stream(sent, x.endpoint))
        ):
            x.delivery = Assembly(x, asked.assembler(x.config.limits.answer))
            x.sent, x.rewritten = asked.body, True
        return x.sent

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
