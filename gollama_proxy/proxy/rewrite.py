"""The body that a worker gets: the client's own, or a rewritten one.

An answer in one piece is requested as a stream, which shows progress and ends at once
when the client disconnects.  A stream whose tokens must be counted is requested with
its usage.  A worker that refuses such a request, or whose stream cannot be assembled,
gets the request as the client wrote it.  That is remembered for a while, so that later
requests do not fail first.  Every other field stays to the byte as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.response import Assembly
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire.answer import Tally
from gollama_proxy.wire.assemble import (
    ask_for_stream,
    ask_for_usage,
    choices_of,
    has_prompts,
)
from gollama_proxy.wire.schema import Ending

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
            and self._may_assemble(x)
            and (asked := ask_for_stream(sent, x.endpoint))
        ):
            x.delivery = Assembly(x, asked.assembler(x.config.limits.answer))
            x.sent, x.rewritten = asked.body, True
        return x.sent

    def _may_assemble(self, x: Exchange) -> bool:
        return (
            x.body.replayable
            and not x.body.stream
            # Only the end of a stream shows whether it has all of the answer; if not,
            # the answer has to be requested again.
            and not x.plan.once
        )

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
