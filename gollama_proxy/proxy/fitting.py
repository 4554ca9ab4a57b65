"""Sends a prompt only where it fits.

Ordinary requests are far below every limit, and cost a comparison.  Those near one are
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

# Asks a worker for the tokens of a body, for a path and a model; None: it cannot count.
Count = Callable[[Worker, str, str, bytes], Awaitable[int | None]]


class Fitting:
    """Compares prompts with contexts."""

    def __init__(self, registry: Registry, count: Count) -> None:
        self._registry = registry
        self._count = count
        self._prompts = Prompts()

    def __repr__(self) -> str:
        return f"<Fitting {self._prompts!r}>"

    def learn(self, x: Exchange, tokens: int) -> None:
        """Learn how many tokens a prompt had, from its answer."""
        if x.endpoint.prompt_has_size:
            self._prompts.learn(x.model, x.body.size, tokens)

    def likely_tokens(self, model: str, size: int) -> int:
        """Estimate the tokens of a text of so many bytes."""
        return self._prompts.likely_tokens(model, size)

    def estimate(self, x: Exchange) -> int:
        """Estimate the tokens of a prompt that a worker has read without a count."""
        if x.endpoint.form:
            return 0
        pool, body = x.plan.pool, x.body
        counted = x.plan.needs.get(pool.model)
        size = body.length or body.size
        tokens = counted or self._prompts.likely_tokens(pool.model, size)
        return min(tokens, _largest_context(pool) or tokens)

    def is_certain(self, x: Exchange) -> bool:
        """Whether a prompt surely fits its first model, so that `check` is no use."""
        return not x.endpoint.prompt_has_size or (
            x.plan.single and self._surely_fits(x, x.plan.pool)
        )

    async def check(self, x: Exchange) -> None:
        """Find out where a prompt fits, and limit the plan to that.

        To be called before each attempt: another model may be next.

        Raises:
            RequestError: 400, it fits nowhere, and no worker has been asked yet.
        """
        plan = x.plan
        pools = plan.pools
        for pool in pools:
            if self._surely_fits(x, pool):
                if len(pools) == 1 or _is_served(pool):
                    return
                continue  # it will be the next one's
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
        """Find out how many tokens the prompt has for a model, unless that is known."""
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
        """Guess at the tokens of a body of which only the beginning is here.

        What would fit nowhere as text is taken for something else, such as pictures.
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
