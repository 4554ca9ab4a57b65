"""The few fields of a request body that routing needs, found while it streams in.

A body can be 200 MB of base64 and `model` can be its last field, so it is read once, in
the pieces in which it arrives, and nothing but the wanted values is kept.  The regular
expressions run over strings in C.

Theory of operation.  The scanner walks the top level of one JSON object (RFC 8259):

    START ──{──▶ KEY ──"key":──▶ VALUE ──▶ AFTER ──,──▶ KEY
                  │}                         │}
                  ▼                          ▼
                 END ◀───────────────────────┘

Other values are passed over in STRING or NESTED, which need no memory.  A token that is
cut by the end of a piece waits in `_rest` for the next one.

The scanner checks that the body is UTF-8 and an object, that no wanted field occurs
twice (two parsers would disagree on which one counts), and that it is not nested deeper
than `MAX_DEPTH`.  The grammar inside of nested values is checked by `check_json` for
bodies that are kept, and by the worker for those that stream through.

Nearly all bodies come in one piece, and `read_whole` finds the same fields in them at a
tenth of the cost.
"""

from __future__ import annotations

import codecs
import enum
import re
from itertools import compress
from typing import Annotated, NamedTuple, assert_never

import msgspec

from gollama_proxy.wire.errors import Code, RequestError

MAX_DEPTH = 128
# A key, a number or a wanted string must fit; vLLM and OpenAI names are below 100.
MAX_TOKEN = 4096
# Models that a request may name beside its first one; each can cost three attempts.
MAX_NAMES = 8

WANTED = frozenset(
    {
        "documents",
        "fallbacks",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "n_cmpl",
        "n_predict",
        "stream",
        "stream_options",
        "tokens",
    }
)

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\.)*+)"', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,{}\[\]\":]++")
# Possessive (`++`, `*+`): a failed match must not try every shorter one.
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_IN_NESTED = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_MOST_DIGITS = 19
_NUMBER = re.compile(rb"-?(?:0|[1-9]\d{0,18})(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")


class ScannerState(enum.Enum):
    START = "before the object"
    KEY = "before a key"
    VALUE = "before a value"
    STRING = "inside of a string"
    NESTED = "inside of an array or object"
    AFTER = "after a value"
    END = "after the object"


class Field(NamedTuple):
    """One wanted value: its bytes as sent ("" of a nested one) and where they are."""

    kind: str  # one of `"`, `[`, `{`, `t`, `f`, `n`, `0` for a number, `?` for neither
    raw: bytes
    start: int
    end: int

    def __repr__(self) -> str:  # without the client's text
        return f"<Field {self.kind} at {self.start}>"


def classify(raw: bytes, start: int) -> Field:
    """Describe a JSON value that begins at `start`; a nested one without its bytes."""
    kind = chr(raw[0])
    if kind in "[{":
        return Field(kind, b"", start, start)
    if kind == '"':
        return Field(kind, raw, start, start + len(raw))
    if _NUMBER.fullmatch(raw):
        kind = "0"
    elif raw not in (b"true", b"false", b"null"):
        kind = "?"  # no JSON, which the check of the grammar will find
    return Field(kind, raw, start, start + len(raw))


class FieldScanner:
    """Find the wanted top-level fields of a JSON object that is fed in pieces."""

    def __init__(self) -> None:
        self.found: dict[str, Field] = {}
        self._state = ScannerState.START
        self._depth = 0  # of the nested value that is passed over
        self._key = ""
        self._first_key = True
        self._rest = b""  # an unfinished token
        self._offset = 0  # of `_rest` in the body
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def __repr__(self) -> str:
        return f"<FieldScanner {self._state.name} found={sorted(self.found)}>"

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            RequestError: the body is not a JSON object that is accepted.
        """
        self._check_utf8(piece)
        text = self._rest + piece if self._rest else piece
        at = 0
        while at < len(text):
            if self._state in _SPACED:
                at = _end(_SPACE, text, at)
                if at == len(text):
                    break
            reached = self._step(text, at)
            if reached is None:  # the rest of a token is in the next piece
                break
            at = reached
        self._rest = text[at:]
        self._offset += at
        what = repr(self._key) if self._state is ScannerState.VALUE else "a key"
        self._check_length(self._rest, what)

    def finish(self) -> None:
        """End the body.

        Raises:
            RequestError: it ended too early.
        """
        self._check_utf8(b"", final=True)
        if self._state is not ScannerState.END:
            what = "is empty" if self._state is ScannerState.START else "ends too early"
            raise _invalid(f"the body {what}")

    # --- One step for each state --------------------------------------------------

    def _step(self, text: bytes, at: int) -> int | None:
        match self._state:
            case ScannerState.START:
                return self._open(text, at)
            case ScannerState.KEY:
                return self._read_key(text, at)
            case ScannerState.VALUE:
                return self._read_value(text, at)
            case ScannerState.STRING:
                return self._pass_string(text, at)
            case ScannerState.NESTED:
                return self._pass_nested(text, at)
            case ScannerState.AFTER:
                return self._read_separator(text, at)
            case ScannerState.END:
                raise _invalid("something follows the object")
            case _:
                assert_never(self._state)

    def _open(self, text: bytes, at: int) -> int:
        if text[at : at + 1] != b"{":
            raise _invalid("the body must be an object")
        self._state = ScannerState.KEY
        return at + 1

    def _read_key(self, text: bytes, at: int) -> int | None:
        if text[at : at + 1] == b"}" and self._first_key:
            self._state = ScannerState.END
            return at + 1
        if text[at : at + 1] != b'"':
            raise _invalid(f"a key was expected at byte {self._offset + at}")
        match = _STRING.match(text, at)
        if match is None:
            return None
        colon = _end(_SPACE, text, match.end())
        self._check_length(text[at:colon], "a key")
        if colon == len(text):
            return None
        if text[colon : colon + 1] != b":":
            raise _invalid(f"':' was expected at byte {self._offset + colon}")
        self._key = text_of(Field('"', match[0], 0, 0))
        if self._key in self.found:
            raise _invalid(f"the key {self._key!r} occurs twice")
        self._first_key = False
        self._state = ScannerState.VALUE
        return colon + 1

    def _read_value(self, text: bytes, at: int) -> int | None:
        first = text[at : at + 1]
        wanted = self._key in WANTED
        if first == b'"' and not wanted:
            self._state = ScannerState.STRING
            return at + 1
        if first in (b"{", b"["):
            if wanted:
                self.found[self._key] = classify(first, self._offset + at)
            self._state, self._depth = ScannerState.NESTED, 1
            return at + 1
        if first == b'"':
            match = _STRING.match(text, at)
            if match is None:
                return None
        else:
            match = _SCALAR.match(text, at)
            if match is None:
                raise _invalid(f"a value was expected at byte {self._offset + at}")
            if match.end() == len(text):  # there may be more digits
                return None
        self._check_length(match[0], repr(self._key))
        if wanted:
            self.found[self._key] = classify(match[0], self._offset + at)
        self._state = ScannerState.AFTER
        return match.end()

    def _pass_string(self, text: bytes, at: int) -> int | None:
        end = _end(_IN_STRING, text, at)
        if end == at and end < len(text) and text[end : end + 1] == b"\\":
            return None  # half of an escape
        if end < len(text) and text[end : end + 1] == b'"':
            self._state = ScannerState.NESTED if self._depth else ScannerState.AFTER
            return end + 1
        return end

    def _pass_nested(self, text: bytes, at: int) -> int:
        at = _end(_IN_NESTED, text, at)
        if at == len(text):
            return at
        match text[at : at + 1]:
            case b'"':  # a string that does not end in this piece
                self._state = ScannerState.STRING
            case b"{" | b"[":
                self._depth += 1
                if self._depth >= MAX_DEPTH:
                    raise _invalid(f"it is nested deeper than {MAX_DEPTH} levels")
            case _:
                self._depth -= 1
                if not self._depth:
                    self._state = ScannerState.AFTER
        return at + 1

    def _read_separator(self, text: bytes, at: int) -> int:
        match text[at : at + 1]:
            case b",":
                self._state = ScannerState.KEY
            case b"}":
                self._state = ScannerState.END
            case _:
                where = self._offset + at
                raise _invalid(f"',' or '}}' was expected at byte {where}")
        return at + 1

    # --- Helpers ------------------------------------------------------------------

    def _check_length(self, token: bytes, what: str) -> None:
        if len(token) > MAX_TOKEN:
            raise _invalid(f"{what} is longer than {MAX_TOKEN} bytes")

    def _check_utf8(self, piece: bytes, *, final: bool = False) -> None:
        if piece.isascii() and not self._utf8.getstate()[0] and not final:
            return  # nearly always, and much cheaper
        try:
            self._utf8.decode(piece, final)
        except UnicodeDecodeError:
            raise _invalid("the body is not UTF-8") from None


_SPACED = frozenset(
    {
        ScannerState.START,
        ScannerState.KEY,
        ScannerState.VALUE,
        ScannerState.AFTER,
        ScannerState.END,
    }
)


def check_json(body: bytes) -> None:
    """Check the grammar of a whole body that the scanner has accepted.

    Raises:
        RequestError: it is not JSON.
    """
    try:
        _grammar.decode(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        why = str(exc).removeprefix("JSON is malformed: ")
        raise _invalid(why) from None


_grammar = msgspec.json.Decoder(msgspec.Raw)
_string = msgspec.json.Decoder(str)


class _Conversation(msgspec.Struct):
    messages: list[msgspec.Raw] = []


_conversation = msgspec.json.Decoder(_Conversation)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_names = msgspec.json.Decoder(
    Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_NAMES)]
)


def text_of(field: Field) -> str:
    """Decode a wanted string.

    Raises:
        RequestError: it holds an invalid escape, such as half a surrogate pair.
    """
    try:
        return _string.decode(field.raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _invalid("a string holds an invalid escape") from None


def natural(raw: bytes) -> int | None:
    """Return the natural number that a value is, else None."""
    return int(raw) if raw.isdigit() and len(raw) <= _MOST_DIGITS else None


def with_model(body: bytes, found: Field | None, model: str) -> bytes:
    """Write another model into a body; `found` is the one that it has."""
    if found is not None:
        return body[: found.start] + encode(model) + body[found.end :]
    start = body.index(b"{") + 1
    empty = body[_end(_SPACE, body, start) :][:1] == b"}"
    member = b'"model":' + encode(model) + (b"" if empty else b",")
    return body[:start] + member + body[start:]


def take_names(body: bytes, key: str) -> tuple[tuple[str, ...], bytes]:
    """Remove a list of names from a whole body; return it, and the rest of the body.

    Raises:
        RequestError: it is something else.
    """
    rest = _object.decode(body)
    try:
        names = _names.decode(rest.pop(key))
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = f"`{key}` must be a list of at most {MAX_NAMES} names."
        raise RequestError(Code.INVALID_VALUE, text, param=key) from None
    return names, msgspec.json.encode(rest)


def messages_of(body: bytes) -> list[msgspec.Raw]:
    """Return the items of `messages` in a whole body as sent; empty without any."""
    try:
        return _conversation.decode(body).messages
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


class _Turn(msgspec.Struct):
    """A message, or an item of a response's input."""

    content: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct):
    """A part of a message, of which the data is passed over."""

    type: str = ""
    content: msgspec.Raw = msgspec.Raw()  # of the result of a tool, for Anthropic


class _Turns(msgspec.Struct):
    messages: list[_Turn] = []
    input: msgspec.Raw = msgspec.Raw()


_turns = msgspec.json.Decoder(_Turns)
_items = msgspec.json.Decoder(list[_Turn])
_parts = msgspec.json.Decoder(list[_Part])
# The parts of OpenAI's chats and Responses, and of Anthropic's messages.
_MEDIA = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "input_video": "video",
}


def media_in(body: bytes) -> frozenset[str]:
    """Return what the messages of a whole body have besides text: image, audio, video.

    Nothing of a body that is not as its API defines it: the worker refuses it.
    """
    found = set[str]()
    try:
        turns = _turns.decode(body)
        items = turns.messages
        if bytes(turns.input)[:1] == b"[":
            items += _items.decode(turns.input)
        for item in items:
            if bytes(item.content)[:1] == b"[":
                parts = _parts.decode(item.content)
                for part in tuple(parts):
                    if part.type == "tool_result" and bytes(part.content)[:1] == b"[":
                        parts += _parts.decode(part.content)
                found.update(_MEDIA[each.type] for each in parts if each.type in _MEDIA)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()
    return frozenset(found)


def encode(text: str) -> bytes:
    """Encode a string as JSON."""
    return msgspec.json.encode(text)


def _end(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _invalid(why: str) -> RequestError:
    return RequestError(Code.INVALID_JSON, f"The body is not valid JSON: {why}.")


# --- Several prompts in one request -----------------------------------------------

_PROMPTS = re.compile(rb'"prompt"[ \t\r\n]*+:[ \t\r\n]*+\[')


class _Prompts(msgspec.Struct):
    prompt: list[msgspec.Raw] = []


_prompts = msgspec.json.Decoder(_Prompts)


def count_prompts(body: bytes) -> int:
    """Count the prompts of a completion: texts or lists of tokens in a list."""
    if _PROMPTS.search(body) is None:
        return 1
    try:
        prompts = _prompts.decode(body).prompt
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1  # something else looks like the field
    if any(bytes(each)[:1].isdigit() for each in prompts):
        return 1  # tokens, and maybe texts between them
    return max(1, len(prompts))


# --- A body in one piece ----------------------------------------------------------

_Raw = msgspec.Raw | msgspec.UnsetType


class Wanted(msgspec.Struct, gc=False):
    """The wanted fields of a body: those that the hub reads, and the others as sent."""

    documents: _Raw = msgspec.UNSET
    fallbacks: _Raw = msgspec.UNSET
    max_completion_tokens: _Raw = msgspec.UNSET
    max_tokens: _Raw = msgspec.UNSET
    messages: _Raw = msgspec.UNSET
    model: str | msgspec.UnsetType | None = msgspec.UNSET
    n: _Raw = msgspec.UNSET
    n_cmpl: _Raw = msgspec.UNSET
    n_predict: _Raw = msgspec.UNSET
    stream: _Raw = msgspec.UNSET
    stream_options: _Raw = msgspec.UNSET
    tokens: _Raw = msgspec.UNSET

    def __repr__(self) -> str:  # without the client's text
        unset = _values_of(self).count(msgspec.UNSET)
        return f"<Wanted, {len(WANTED) - unset} fields>"


assert {*Wanted.__struct_fields__} == WANTED
_wanted = msgspec.json.Decoder(Wanted)
_KEYS = [b'"%b"' % name.encode() for name in Wanted.__struct_fields__]
_LONG = 2048  # bytes from which searching a body takes longer than copying the rest
_values_of = msgspec.structs.astuple
# The letters of the wanted keys are a to z and the underscore.
_BACKSLASH = ord("\\")  # an int is found in a third of the time of bytes
_ESCAPED_LETTER = re.compile(rb"\\u00[5-7]")
_MESSAGES_FIELD = re.compile(rb'"messages"[ \t\r\n]*+:[ \t\r\n]*+')
_MODEL_FIELD = re.compile(rb'"model"[ \t\r\n]*+:[ \t\r\n]*+(null|"(?:[^"\\]++|\\.)*+")')
_STREAM = (b"true", b"false", b"null")
_LONGEST_NAME = MAX_TOKEN // 6  # characters; an escaped one takes six bytes


def read_whole(body: bytes) -> Wanted | None:
    """Read the wanted fields of a whole body; None for an unusual one.

    It takes a tenth of the time of a `FieldScanner`, which has to read the bodies for
    which this returns None, to give the reason.  For each body that both accept, both
    find the same fields.
    """
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            return None
    if body.count(b"{") + body.count(b"[") >= MAX_DEPTH:
        return None
    try:
        wanted = _wanted.decode(body)
        if isinstance(wanted.messages, msgspec.Raw) and len(body) >= _LONG:
            body = _without_messages(body, wanted.messages)
    except (msgspec.DecodeError, RecursionError):
        return None
    if _BACKSLASH in body and body.find(b"\\u00") >= 0 and _ESCAPED_LETTER.search(body):
        return None  # an escaped key could hide a second one
    for key in compress(_KEYS, _values_of(wanted)):  # UNSET is false
        if body.count(key) != 1:
            return None
    model = wanted.model
    if model is not msgspec.UNSET and not (model and len(model) <= _LONGEST_NAME):
        return None
    if wanted.stream is not msgspec.UNSET and bytes(wanted.stream) not in _STREAM:
        return None
    return wanted


def _without_messages(body: bytes, messages: msgspec.Raw) -> bytes:
    """Return a body with null for its messages, so that less has to be searched.

    Raises:
        DecodeError: they are not where their name first occurs.
    """
    match = _MESSAGES_FIELD.search(body)
    start = 0 if match is None else match.end()
    end = start + len(memoryview(messages))
    rest = body[:start] + b"null" + body[end:]
    again = _wanted.decode(rest).messages
    if not isinstance(again, msgspec.Raw) or bytes(again) != b"null":
        raise msgspec.DecodeError("other messages")
    return rest


def find_model(body: bytes) -> Field | None:
    """Find the `model` of a body that `read_whole` has accepted."""
    if _wanted.decode(body).model is msgspec.UNSET:
        return None
    if body.count(b'"model"') > 1:  # the others are in its messages
        scanner = FieldScanner()
        scanner.feed(body)
        return scanner.found.get("model")
    match = _MODEL_FIELD.search(body)
    return None if match is None else classify(match[1], match.start(1))
