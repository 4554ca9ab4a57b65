"""The format of what hubs write into the store and send each other.

A message is a JSON object with a `v`, the version of its format, which each kind of
message counts by itself.  Hubs of two releases may share a store during an upgrade, and
other programs can write into it as well.  So `decode` returns None for everything that
this release does not understand, and such a message is ignored: what it was about is
found out without it.  Fields that are unknown are ignored, too.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar, cast

import msgspec

from gollama_proxy.bounded import BoundedDict

logger = logging.getLogger(__name__)

MOST_BYTES = 4_000_000  # of a message; longer ones are not parsed


class Message(msgspec.Struct, kw_only=True):
    """The base of all messages; a subclass has another `version` if need be."""

    version: ClassVar[int] = 1
    v: int = 0

    def __post_init__(self) -> None:
        if not self.v:
            self.v = self.version


_M = TypeVar("_M", bound=Message)


class _Head(msgspec.Struct):
    v: int


_head = msgspec.json.Decoder(_Head)
_decoders: dict[type[Message], msgspec.json.Decoder[Any]] = {}
_complaints = BoundedDict[tuple[str, bool], None]()

encode = msgspec.json.Encoder().encode


def decode(
    kind: type[_M], data: bytes | str, where: str, most: int = MOST_BYTES
) -> _M | None:
    """Return a message of this kind; None if it cannot be understood.

    `where` is the kind of key or channel that it comes from, such as "gollama:hints";
    `most` is how many bytes it may have.  The first message from there that is
    malformed, and the first of another version, is a warning in the log, which shows
    nothing of its contents.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        if len(data) > most:
            raise msgspec.DecodeError("too long")
        version = _head.decode(data).v
        if version == kind.version:
            return cast(_M, decoder.decode(data))
        why = f"its format has version {version}, and this hub knows {kind.version}"
        known = True
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        why, known = "it is malformed", False
    if (where, known) not in _complaints:
        _complaints[where, known] = None
        logger.warning("a message in %s is ignored: %s", where, why)
    return None
