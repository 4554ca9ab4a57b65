"""Sends a prompt only to workers whose context is large enough.

Most requests are far below every limit and cost one comparison.  Those near a limit are
counted once for each model, by one of its workers; see scheduling/context.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.scheduling.context import Prompts
from gollama_proxy.wire.openai import Api

# Counts the tokens of a body on a worker, for a path and a model; None: it cannot.
Count = Callable[[Worker, str, str, bytes], Awaitable[int | None]]


class Fitting:
    """Compares prompts with context sizes."""

    def __init__(self, registry: Registry, count: Count) -> None:
        self._registry = registry
        self._count = count
        self._prompts = Prompts()

    def __repr__(self) -> str:
        return f"<Fitting {self._prompts!r}>"

    def learn(self, x: Exchange, tokens: int) -> None:
        """Learn the number of tokens of a prompt from its answer."""
        if x.endpoint.prompt_has_size:
            self._prompts.learn(x.model, x.body.size, tokens)

    def likely_tokens(self, model: str, size: int) -> int:
        """Estimate the tokens of a text of `size` bytes."""
        return self._prompts.likely_tokens(model, size)

    def estimate(self, x: Exchange) -> int:
        """Estimate the tokens of a prompt whose worker reported no count."""
        if x.endpoint.form:
            return 0
        pool, body = x.plan.pool, x.body
        counted = x.plan.needs.get(pool.model)
        size = body.length or body.size
        tokens = counted or self._prompts.likely_tokens(pool.model, size)
        return min(tokens, _largest_context(pool) or tokens)

    def is_certain(self, x: Exchange) -> bool:
        """Whether a prompt certainly fits, so that `check` is not needed."""
        return not x.endpoint.prompt_has_size or (
            x.plan.single and self._surely_fits(x, x.plan.pool)
        )

    async def check(self, x: Exchange) -> None:
        """Find out where a prompt fits, and limit the plan to these workers.

        Call this before each attempt: the next one may be for another model.

        Raises:
            RequestError: 400, it fits nowhere, and no attempt has been made yet.
        """
        plan = x.plan
        pools = plan.pools
        for pool in pools:
            if self._surely_fits(x, pool):
                if len(pools) == 1 or _is_served(pool):
                    return
                continue  # no worker serves it now; another model is next
            await self._judge(x, pool)
            if plan.fitting(pool):
                return
        if plan.begun or plan.fits_somewhere:
            return
        error = plan.too_long(native=x.endpoint.api is Api.NATIVE)
        if error is not None:
            raise error

    def _surely_fits(self, x: Exchange, pool: Pool) -> bool:
        least = pool.least_context
        if least is None:
            return True
        body = x.body
        size = body.size if body.complete else body.length or body.size
        return self._prompts.most_tokens(pool.model, size) < least

    async def _judge(self, x: Exchange, pool: Pool) -> None:
        """Count the tokens of the prompt for a model, unless that is known."""
        model, needs = pool.model, x.plan.needs
        if model in needs:
            return
        if not x.body.replayable:
            needs[model] = self._guess(x, pool)
            return
        able = [worker for worker in pool.able if not worker.loads(model)]
        if not able:
            return
        needs[model] = 0
        counter = min(able, key=lambda worker: worker.in_flight)
        body = x.body.named(model)
        tokens = await self._count(counter, x.endpoint.path, model, body)
        if tokens is not None:
            needs[model] = tokens
            self._prompts.learn(model, x.body.size, tokens)

    def _guess(self, x: Exchange, pool: Pool) -> int:
        """Estimate the tokens of a body of which only the beginning has arrived.

        A body that would fit nowhere as text is assumed to contain something else, such
        as images.
        """
        size = x.body.length or x.body.size
        tokens = self._prompts.likely_tokens(pool.model, size)
        return tokens if tokens < _largest_context(pool) else 0


def _largest_context(pool: Pool) -> int:
    """Find the largest context of a pool; 0 if none is known."""
    contexts = [worker.context_of(pool.model) for worker in pool.workers]
    return max((context for context in contexts if context is not None), default=0)


def _is_served(pool: Pool) -> bool:
    return any(worker.can_serve(pool.model) for worker in pool.workers)
