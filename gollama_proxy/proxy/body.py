"""Reads a request body within its limits: the fields for routing, the replay window.

A body within the window is kept whole, so that it can be sent again.  Of a larger one
the window is kept, and the rest streams through `rest()` in constant memory, checked on
its way.  A compressed body is unpacked as it comes, and all limits are those of what is
in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gollama_proxy.config.settings import Config
from gollama_proxy.scheduling.policies import conversations
from gollama_proxy.wire import fields
from gollama_proxy.wire.coding import CODINGS, CodingError, Unpacker, coding_of
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.fields import read_whole
from gollama_proxy.wire.form import FormScanner, boundary_of, content_type_of
from gollama_proxy.wire.openai import Endpoint

# A client earns a second of patience with each so many bytes (as mod_reqtimeout does).
LEAST_RATE = 16 << 10

_BOM = b"\xef\xbb\xbf"

_SPENT = fields.FieldScanner()


class Body:
    """A request body on its way in."""

    def __init__(
        self, request: web.BaseRequest, endpoint: Endpoint, config: Config
    ) -> None:
        self.endpoint = endpoint
        self.length = request.content_length
        self.complete = False
        self._streamed = False  # a part of it was passed on, and not kept
        self._content = request.content
        self._limit = config.limits.body
        self._grace = config.timeouts.body
        self._waited = 0.0
        self._received = 0  # bytes, as they were sent
        self._ended = False  # no more will be received
        self._opening = b""  # what may become a byte order mark
        coding = coding_of(request.headers.getall("Content-Encoding", ()))
        self._unpacker = _unpacker_of(coding) if coding else None
        self._unpacked: Iterator[bytes] = iter(())  # what the last piece holds yet
        self.size = 0
        self.fallbacks: tuple[str, ...] = ()  # models that the client names itself
        self.prompts = 1  # that are in it
        self.answers = 1  # that the client wants to each of them
        self._kept: list[bytes] = []
        self._scanner: fields.FieldScanner | FormScanner = fields.FieldScanner()
        self.content_type = b"application/json"  # as a worker gets it
        if endpoint.form:
            boundary = boundary_of(request.headers.get("Content-Type", ""))
            self._scanner = FormScanner(boundary)
            self.content_type = content_type_of(boundary)
        self._found = self._scanner.found
        if self.length is not None and self.length > self._limit:
            raise self._too_large()
        if coding:
            self.length = None  # that of the plain body is not known yet

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"<Body {self.endpoint.path} {self.size} bytes {state}>"

    # --- The part that is kept ----------------------------------------------------

    async def read(self, window: int) -> None:
        """Read until the body is complete, or so many bytes of it are kept.

        Raises:
            RequestError: 400, 408 or 413, saying what is wrong with the body.
        """
        while not self.complete and self.size < window:
            piece = await self._next_piece()
            if piece:
                self._kept.append(piece)
        scanned = self._found is self._scanner.found
        if self.complete and scanned and not self.endpoint.form:
            fields.check_json(b"".join(self._kept))
        self._check_types()
        self.answers = max(1, self._number("n", "n_cmpl"))
        if self.complete and self.endpoint.generates and "messages" not in self._found:
            self.prompts = fields.count_prompts(b"".join(self._kept))
        if self.complete and "fallbacks" in self._found:
            self._take_fallbacks()

    def _take_fallbacks(self) -> None:
        """Take what is for the hub out of what is for the worker."""
        self.fallbacks, body = fields.take_names(b"".join(self._kept), "fallbacks")
        self.size = self.length = len(body)
        self._kept = [body]
        self._scanner = fields.FieldScanner()
        self._scanner.feed(body)
        self._found = self._scanner.found

    @property
    def replayable(self) -> bool:
        """Whether all of it is here, to be sent or to be sent once more."""
        return self.complete and not self._streamed

    @property
    def untouched(self) -> bool:
        """Whether it can still be sent from its beginning, if only once."""
        return not self._streamed

    @property
    def model(self) -> str | None:
        """The model that the client named, as far as the body was read."""
        field = self._found.get("model")
        return fields.text_of(field) if field and field.kind == '"' else None

    @property
    def max_tokens(self) -> int:
        """The longest answer that the client wants, in tokens; 0 if it does not say."""
        return self._number("max_completion_tokens", "max_tokens", "n_predict")

    def _number(self, *names: str) -> int:
        """Read the first of these fields that is a natural number, else 0."""
        for name in names:
            field = self._found.get(name)
            if field is not None and field.kind == "0" and field.raw.isdigit():
                return int(field.raw)
        return 0

    def prefixes(self) -> tuple[int, ...]:
        """Tell what its conversation begins with; nothing where it is none."""
        if not self.replayable or "messages" not in self._found:
            return ()
        return conversations.prefixes(fields.messages_of(b"".join(self._kept)))

    @property
    def stream(self) -> bool:
        field = self._found.get("stream")
        return field is not None and field.raw == b"true"

    def named(self, model: str) -> bytes:
        """Give what was kept, with the model's name as its worker calls it.

        Not a byte of anything else changes.  A `model` that has not been reached yet
        stays as it is: the worker serves only one, or it would have been looked for.
        """
        kept = b"".join(self._kept)
        field = self._found.get("model")
        if field is not None and field.kind == '"':
            if fields.text_of(field) == model:
                return kept
        elif not self.complete:
            return kept
        start, end, text = self._scanner.renaming(field, model)
        return kept[:start] + text + kept[end:]

    def length_behind(self, body: bytes) -> int | None:
        """Return the length of `body` and the rest; None if that is not known."""
        return None if self.length is None else self.length - self.size + len(body)

    def forget(self) -> None:
        """Let go of what was kept: the answer has begun, nothing is sent again."""
        if self.replayable:
            self._kept, self._found, self._scanner = [], {}, _SPENT

    # --- The part that streams through --------------------------------------------

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield what follows the kept part, as it comes.

        Raises:
            RequestError: as `read` does; the worker must not see the body end well.
        """
        self._streamed = True
        while not self.complete:
            piece = await self._next_piece()
            self._check_types()
            if piece:
                yield piece

    async def _next_piece(self) -> bytes:
        if self._unpacker is None:
            piece = await self._receive()
            return self._take(piece, ended=self._ended)
        try:
            while (part := next(self._unpacked, None)) is None:
                if self._ended:
                    self._unpacker.end()
                    return self._take(b"", ended=True)
                self._unpacked = self._unpacker.feed(await self._receive())
        except CodingError as exc:
            text = f"The request body is no {self._unpacker.coding}: {exc}."
            raise RequestError(Code.BAD_REQUEST, text) from None
        await asyncio.sleep(0)  # others have their turn, however much is packed
        return self._take(part, ended=False)

    async def _receive(self) -> bytes:
        """Receive the next piece, as it was sent."""
        if self._content.is_eof():  # what has come already takes no time
            return self._note(self._content.read_nowait())
        patience = self._grace + self._received / LEAST_RATE - self._waited
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(patience):
                piece = await self._content.readany()
        except TimeoutError:
            text = "The request body came too slowly."
            raise RequestError(Code.BODY_TIMEOUT, text) from None
        except (web.RequestPayloadError, HttpProcessingError) as exc:
            text = "The request body is not framed as HTTP asks for."
            raise RequestError(Code.BAD_REQUEST, text, detail=str(exc)) from None
        self._waited += loop.time() - began
        return self._note(piece)

    def _note(self, piece: bytes) -> bytes:
        self._received += len(piece)
        if self._received > self._limit:
            raise self._too_large()
        self._ended = self._content.at_eof()
        return piece

    def _take(self, piece: bytes, *, ended: bool) -> bytes:
        """Count a piece and look at it."""
        if not self.size and (self._opening or piece[:1] == _BOM[:1]):
            piece = self._without_bom(piece, ended)
        self.size += len(piece)
        if self.size > self._limit:
            raise self._too_large()
        whole = ended and len(piece) == self.size and not self.endpoint.form
        if whole and (found := read_whole(piece)):
            self._found = found
        else:
            self._scanner.feed(piece)
            if ended:
                self._scanner.finish()
        self.complete = ended
        return piece

    def _without_bom(self, piece: bytes, ended: bool) -> bytes:
        """Leave out a byte order mark, which parsers may ignore (RFC 8259, 8.1)."""
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

    def _check_types(self) -> None:
        found = self._found
        expected = {"model": ('"n', "a string"), "stream": ("tfn", "a boolean")}
        for name in ("max_tokens", "max_completion_tokens", "n_predict"):
            expected[name] = ("0n", "a number")
        for name in (*self.endpoint.arrays, "fallbacks"):
            expected[name] = ("[", "an array")
        for name, (kinds, what) in expected.items():
            if name in found and found[name].kind not in kinds:
                text = f"`{name}` must be {what}."
                raise RequestError(Code.INVALID_VALUE, text, param=name)

    def _too_large(self) -> RequestError:
        text = f"The request body is larger than {self._limit} bytes."
        return RequestError(Code.BODY_TOO_LARGE, text)


def _unpacker_of(coding: str) -> Unpacker:
    try:
        return Unpacker(coding)
    except CodingError:
        text = f"Content-Encoding must be one of {', '.join(CODINGS)}, or none."
        raise RequestError(Code.UNSUPPORTED_ENCODING, text) from None


def answer_expectation(request: web.BaseRequest) -> None:
    """Say `100 Continue` to a client that waits for it; to be called when it may go on.

    Raises:
        RequestError: 417, it expects something else (RFC 9110, 10.1.1).
    """
    expected = request.headers.get("Expect")
    if expected is None or request.version < (1, 1):
        return
    if expected.lower() != "100-continue":
        text = "The only expectation that is met is '100-continue'."
        raise RequestError(Code.EXPECTATION_FAILED, text)
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
