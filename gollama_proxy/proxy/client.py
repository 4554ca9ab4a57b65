"""Where an answer goes: the client's connection as a relay sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from gollama_proxy.wire.errors import WorkerError


class Client(NamedTuple):
    """What a relay needs of a client's connection, or of memory in place of one."""

    write: Callable[[bytes], None]
    drain: Callable[[], Awaitable[None]]
    buffered: Callable[[], int]  # how many bytes it has not taken yet
    chunked: bool  # frame each write as a chunk

    def send(self, data: bytes) -> None:
        """Queue bytes of the hub's own; without effect once the client is gone."""
        if data:
            try:
                self.write(frame(data) if self.chunked else data)
            except RuntimeError:
                pass  # uvloop: closed a moment ago


def frame(data: bytes) -> bytes:
    """Frame data as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ClientStalledError(Exception):
    """The client did not read for too long."""


class ToldError(WorkerError):
    """A broken answer whose client has the worker's own error event already."""
