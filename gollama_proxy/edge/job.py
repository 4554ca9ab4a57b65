"""One request on its path, and what has been decided about it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from gollama_proxy.edge.answer import Refusal
from gollama_proxy.edge.request import Incoming
from gollama_proxy.ops.accesslog import Record
from gollama_proxy.routing.breaker import Verdict
from gollama_proxy.routing.registry import Pool
from gollama_proxy.routing.retry import Attempts
from gollama_proxy.routing.worker import Worker
from gollama_proxy.upstream.attempt import Patience


@dataclass(slots=True)
class Job:
    """What the steps of the path hand on to each other."""

    request: web.BaseRequest
    record: Record
    deadline: asyncio.Timeout
    incoming: Incoming
    pool: Pool
    attempts: Attempts
    assembling: bool = False  # the worker was asked for a stream in place of an answer

    @property
    def may_assemble(self) -> bool:
        return (
            self.incoming.replayable
            and not self.incoming.stream
            and not self.attempts.as_sent
        )

    def patience_with(self, worker: Worker) -> Patience:
        """Say how long the first event may take while others could take over."""
        allowance = worker.pace.allowance(self.incoming.size)
        return Patience(allowance, lambda: self.attempts.has_other(self.pool.available))

    def pause_before_retry(self, refusal: Refusal) -> float | None:
        """Decide whether to try again; None if this is final."""
        if refusal.failure is None or not self.incoming.replayable:
            return None
        available = self.pool.available
        return self.attempts.retry_after(refusal.failure, available, refusal.busy)

    def settle_blame(self, worker: Worker) -> None:
        """Settle whose fault a 5xx was, now that somebody has done better."""
        model = self.pool.model
        for culprit in self.attempts.succeeded():
            culprit.breaker_of(model).record(Verdict.FAILURE)
        if model in worker.model_breakers:
            worker.breaker_of(model).record(Verdict.SUCCESS)
