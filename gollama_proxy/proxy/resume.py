"""An answer that broke off in its middle goes on, on another worker.

 partial ──▶ request() ──▶ another worker ──▶ client_of() ──▶ the same client
     ▲                                             │
     ╰───────────────── broke() ◀──────────────────╯  it, too, breaks off: once more

Nothing is parsed while all is well; this begins when the damage is done.  An answer
that cannot be begun for a worker, and one that it does not prove to have gone on with,
is asked for as a whole again (`ask_for_all`), and has to be the same.
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
    """One answer that is to be whole after all.

    `body` is the request that its first worker got, for `model`.
    """

    def __init__(self, body: bytes, model: str, chat: bool, partial: Partial) -> None:
        self.partial = partial
        self.count = 0  # continuations of which the client has something
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
        """Look at what was relayed; None where it cannot go on."""
        if relayed is None or not can_rescue(body, chat):
            return None
        partial = Partial.parse(relayed)
        return None if partial is None else cls(body, model, chat, partial)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to generate, so that no worker has to be asked."""
        return self.partial.finished or exhausted(self._body, self.partial)

    def closing(self) -> bytes:
        """Give the end of an answer that is `exhausted`."""
        return closing(self.partial, self._chat)

    # --- What to ask --------------------------------------------------------------

    @property
    def can_continue(self) -> bool:
        """Whether a worker can go on where the answer broke off."""
        return can_continue(self._body, self.partial, self._chat)

    def request(self, model: str) -> bytes:
        """Write what the next worker is asked for."""
        body = self._body if model == self._model else for_model(self._body, model)
        self._asked_for_all = self._for_all or not self.can_continue
        self._for_all = False
        if self._asked_for_all:
            return body
        return ask_for_rest(body, self.partial, self._chat)

    def ask_for_all(self) -> bool:
        """Have the next request be the first one again; False if the last was that."""
        self._for_all = not self._asked_for_all
        return self._for_all

    # --- What comes ---------------------------------------------------------------

    def client_of(
        self,
        client: Client,
        model: str,
        fail: Callable[[ProxyError], None],
    ) -> Client:
        """Stand before a client: take what a worker sends, pass on what is news.

        `fail` is told when it turns out that this is not the rest of the answer.
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
        """Say that the worker's body has ended well, and send what is missing.

        Raises:
            WorkerError: this was not the rest of the answer, or not all of it.
        """
        assert self._splicer is not None, self
        self._splicer.finish()
        self.count += 1

    def broke(self) -> bool:
        """Say that the continuation broke off as well; True if it came to anything."""
        splicer, self._splicer = self._splicer, None
        if splicer is None or not splicer.used:
            return False
        self.count += 1
        self.partial = splicer.splice.partial
        return True


class _Splicer:
    """Feeds a splice, and writes what comes out of it."""

    def __init__(
        self,
        splice: Resumer,
        client: Client,
        number: int,
        fail: Callable[[ProxyError], None],
    ) -> None:
        self.splice = splice
        self.used = False  # the client has got something
        self._client = client
        self._number = number
        self._fail = fail
        self._error: WorkerError | None = None

    def __repr__(self) -> str:
        return f"<_Splicer {self.splice!r}>"

    def write(self, data: bytes) -> None:
        """Take what the relay passes on, as a client's transport would."""
        try:
            for event in self.splice.feed(data) if self._error is None else ():
                self._send(event)
        except WorkerError as exc:  # not through the connection that is reading
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
