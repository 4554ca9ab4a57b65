"""The parts of a client's connection that a relay uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from gollama_proxy.wire.errors import WorkerError


class Client(NamedTuple):
    """The parts of a client's connection that a relay uses, or memory in its place."""

    write: Callable[[bytes], None]
    drain: Callable[[], Awaitable[None]]
    buffered: Callable[[], int]  # bytes that wait to be sent
    chunked: bool  # frame each write as a chunk

    def send(self, data: bytes) -> None:
        """Queue bytes from the hub; without effect once the client has left."""
        if data:
            try:
                self.write(frame(data) if self.chunked else data)
            except RuntimeError:
                pass  # uvloop: it has just been closed


def frame(data: bytes) -> bytes:
    """Frame data as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ClientStalledError(Exception):
    """The client did not read for too long."""


class ReportedError(WorkerError):
    """A broken answer whose client already has the worker's own error event."""
