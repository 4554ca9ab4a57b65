r"""Which model and which build an answer says it comes from, by its first bytes.

Nearly every answer names its model in its first event, or in front of what is long, and
one search finds it.  No words of a model can be taken for it: a JSON string holds no
bare quote (RFC 8259, 7).  But the arguments of a call or the metadata of a request can
have a key of that name, too, so a name that was not expected is looked for once more,
by parsing (`model_of`).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gollama_proxy.wire import sse
from gollama_proxy.wire.private import Private

_MODEL = re.compile(rb'"model"\s{0,64}:\s{0,64}("(?:[^"\\]|\\.){1,4096}")', re.DOTALL)
_BUILD = re.compile(rb'"system_fingerprint"\s{0,64}:\s{0,64}"([^"\\]{1,100})"')


def first_model(held: bytes) -> str | None:
    """Return the first name of a model in the first bytes of an answer."""
    at = held.find(b'"model"')  # much quicker than the expression alone
    found = None if at < 0 else _MODEL.search(held, at)
    return None if found is None else _text(found[1])


def model_of(held: bytes, *, events: bool) -> str | None:
    """Return the model that an answer names as its own; None if it names none.

    Of an event stream, or of a body that is all there.
    """
    told = map(_read, sse.events_in(held) if events else [held])
    return next((name for name in told if name is not None), None)


def build_of(held: bytes) -> str:
    """Return the build of a llama-server that an answer names; else nothing."""
    found = _BUILD.search(held) if b'"system_fingerprint"' in held else None
    return "" if found is None else found[1].decode(errors="replace")


def _text(value: bytes) -> str | None:
    try:
        return msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class _Named(Private):
    model: Any = None
    # Anthropic's `message_start`, and the events of OpenAI's newer API.
    message: Any = None
    response: Any = None


_decoder = msgspec.json.Decoder(_Named)


def _read(body: bytes) -> str | None:
    try:
        told = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    inner = [each for each in (told.message, told.response) if isinstance(each, dict)]
    names = (told.model, *(each.get("model") for each in inner))
    return next((name for name in names if isinstance(name, str)), None)
