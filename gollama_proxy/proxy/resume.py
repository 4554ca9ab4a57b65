"""Continues a broken answer on another worker.

 partial ──▶ request() ──▶ another worker ──▶ client_of() ──▶ the same client
     ▲                                             │
     ╰───────────────── broke() ◀──────────────────╯  it breaks off as well: once more

Answers without trouble are not parsed; this starts after an answer broke.  If a worker
cannot continue it, or does not prove that it did, the whole answer is requested again
(`ask_for_all`) and must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from gollama_proxy.proxy.client import Client
from gollama_proxy.wire.asking import (
    ask_for_rest,
    can_continue,
    can_rescue,
    exhausted,
    for_model,
)
from gollama_proxy.wire.errors import ProxyError, WorkerError
from gollama_proxy.wire.partial import Partial, closing
from gollama_proxy.wire.resume import Resumer


class Resume:
    """One answer that is to be completed after all.

    `body` is the request that its first worker got, for `model`.
    """

    def __init__(self, body: bytes, model: str, chat: bool, partial: Partial) -> None:
        self.partial = partial
        self.count = 0  # continuations that sent something to the client
        self._body = body
        self._model = model
        self._chat = chat
        self._for_all = False  # the next request is for the whole answer
        self._asked_for_all = False
        self._splicer: _Splicer | None = None

    def __repr__(self) -> str:
        return f"<Resume {self.count} behind {self.partial!r}>"

    @classmethod
    def begin(
        cls, body: bytes, model: str, chat: bool, relayed: bytes | None
    ) -> Self | None:
        """Parse what was relayed; None if the answer cannot be continued."""
        if relayed is None or not can_rescue(body, chat):
            return None
        partial = Partial.parse(relayed)
        return None if partial is None else cls(body, model, chat, partial)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to generate, so that no worker is needed."""
        return self.partial.finished or exhausted(self._body, self.partial)

    def closing(self) -> bytes:
        """Return the end of an answer that is `exhausted`."""
        return closing(self.partial, self._chat)

    # --- The next request ---------------------------------------------------------

    @property
    def can_continue(self) -> bool:
        """Whether a worker can continue where the answer broke off."""
        return can_continue(self._body, self.partial, self._chat)

    def request(self, model: str) -> bytes:
        """Return the body for the next worker."""
        body = self._body if model == self._model else for_model(self._body, model)
        self._asked_for_all = self._for_all or not self.can_continue
        self._for_all = False
        if self._asked_for_all:
            return body
        return ask_for_rest(body, self.partial, self._chat)

    def ask_for_all(self) -> bool:
        """Send the first request again next time; False if the last one was that."""
        self._for_all = not self._asked_for_all
        return self._for_all

    # --- Its answer ---------------------------------------------------------------

    def client_of(
        self,
        client: Client,
        model: str,
        fail: Callable[[ProxyError], None],
    ) -> Client:
        """Wrap a client: it gets only what it does not have yet.

        `fail` is called if this turns out not to be the rest of the answer.
        """
        splice = Resumer(
            self.partial,
            self._chat,
            regenerate=self._asked_for_all,
            model=None if model == self._model else model,
        )
        self._splicer = splicer = _Splicer(splice, client, self.count + 1, fail)
        return Client(splicer.write, client.drain, client.buffered, chunked=False)

    def finish(self) -> None:
        """Handle the regular end of the worker's body, and send what is missing.

        Raises:
            WorkerError: this was not the rest of the answer, or not all of it.
        """
        assert self._splicer is not None, self
        self._splicer.finish()
        self.count += 1

    def broke(self) -> bool:
        """Handle a continuation that broke off as well; True if it sent anything."""
        splicer, self._splicer = self._splicer, None
        if splicer is None or not splicer.used:
            return False
        self.count += 1
        self.partial = splicer.splice.partial
        return True


class _Splicer:
    """Feeds a splice, and writes its output."""

    def __init__(
        self,
        splice: Resumer,
        client: Client,
        number: int,
        fail: Callable[[ProxyError], None],
    ) -> None:
        self.splice = splice
        self.used = False  # the client got something from it
        self._client = client
        self._number = number
        self._fail = fail
        self._error: WorkerError | None = None

    def __repr__(self) -> str:
        return f"<_Splicer {self.splice!r}>"

    def write(self, data: bytes) -> None:
        """Take bytes from the relay, as a client's transport would."""
        try:
            for event in self.splice.feed(data) if self._error is None else ():
                self._send(event)
        except WorkerError as exc:  # must not reach the connection that is reading
            self._error = exc
            self._fail(exc)

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        self._send(self.splice.finish())

    def _send(self, event: bytes) -> None:
        if not self.used:
            self.used = True
            self._client.send(b": gollama rescued %d\n\n" % self._number)
        self._client.send(event)
