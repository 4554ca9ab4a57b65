"""An answer that the client wants in one piece, and the worker gives as a stream.

llama-server notices at once that the client of a stream has left, and frees its slot;
of a request that does not stream it may never notice while other slots are busy
(`server_response::recv_with_timeout`).  So the hub asks for a stream and folds it into
the one answer itself.  Nothing is sent to the client before it is whole, so another
worker can take over until then.
"""

from __future__ import annotations

import asyncio
import contextlib

from gollama_proxy.edge.answer import (
    Refusal,
    promote,
    refusal_of,
    refusal_of_a_stream,
)
from gollama_proxy.upstream.relay import Client, Relay, ToldError
from gollama_proxy.wire.assemble import (
    Assembler,
    AssemblyError,
    LostTextError,
    streaming_body,
)
from gollama_proxy.wire.errors import Code, WorkerError
from gollama_proxy.wire.openai import Ending, Endpoint


class _Sink(asyncio.WriteTransport):
    """Takes what a relay passes on, as a client's transport would."""

    def __init__(self, assembler: Assembler) -> None:
        super().__init__()
        self._assembler = assembler
        self.error: AssemblyError | None = None

    def __repr__(self) -> str:
        return f"<_Sink {self._assembler!r}>"

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.error is None:
            try:
                self._assembler.feed(bytes(data))
            except AssemblyError as exc:
                self.error = exc

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def can_assemble(endpoint: Endpoint, body: bytes) -> bytes | None:
    """Give the body that asks for a stream; None where only the worker can answer."""
    return streaming_body(body) if endpoint.ending is Ending.DONE else None


async def assemble(relay: Relay, endpoint: Endpoint, limit: int) -> bytes | Refusal:
    """Read a stream to its end and give the answer that it stands for."""
    chat = endpoint.path.endswith("chat/completions")
    assembler = Assembler("chat" if chat else "text", limit)
    sink = _Sink(assembler)
    try:
        with contextlib.suppress(ToldError):  # the assembler has read what was told
            await relay.run(Client(sink, _no_wait, chunked=False), write_timeout=1.0)
        if sink.error is not None:
            raise sink.error
        return assembler.finish()
    except WorkerError as exc:
        return refusal_of(exc)
    except LostTextError:
        return refusal_of_a_stream()
    except AssemblyError as exc:
        if exc.error is not None:
            return promote(exc.error)
        text = "The worker's stream cannot be made into an answer."
        return refusal_of(WorkerError(Code.WORKER_PROTOCOL, text, detail=str(exc)))


async def _no_wait() -> None:
    """Memory takes everything at once."""
