"""Sees to it that a prompt is sent only where it fits.

Ordinary requests are far below every limit, and cost a comparison.  Those near one are
counted once for each model, by one of its workers; see scheduling/context.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.body import Incoming
from gollama_proxy.scheduling.context import Prompts
from gollama_proxy.scheduling.retry import Attempts
from gollama_proxy.wire.openai import Api

# Asks a worker how many tokens a body for a path and a model has; None is not known.
Count = Callable[[Worker, str, str, bytes], Awaitable[int | None]]


class Fitting:
    """Compares prompts with contexts."""

    def __init__(self, registry: Registry, count: Count) -> None:
        self._registry = registry
        self._count = count
        self._prompts = Prompts()

    def __repr__(self) -> str:
        return f"<Fitting {self._prompts!r}>"

    def learn(self, incoming: Incoming, model: str, tokens: int) -> None:
        """Take in how many tokens a prompt had, as its answer tells."""
        if incoming.endpoint.prompt_has_size:
            self._prompts.learn(model, incoming.size, tokens)

    def likely_tokens(self, model: str, size: int) -> int:
        """Estimate the tokens of a text of so many bytes."""
        return self._prompts.likely_tokens(model, size)

    def estimate(self, incoming: Incoming, attempts: Attempts) -> int:
        """Estimate the tokens of a prompt that a worker has read without a count."""
        if incoming.endpoint.form:
            return 0
        pool = attempts.pool
        counted = attempts.needs.get(pool.model)
        size = incoming.length or incoming.size
        tokens = counted or self._prompts.likely_tokens(pool.model, size)
        return min(tokens, _largest_context(pool) or tokens)

    async def check(self, incoming: Incoming, attempts: Attempts) -> None:
        """See who can take the prompt, and let the attempts know.

        To be called before each of them: another model may have come into question.

        Raises:
            RequestError: 400, it fits nowhere, and nobody has been asked yet.
        """
        if not incoming.endpoint.prompt_has_size:
            return
        pools = attempts.pools
        for pool in pools:
            if self._surely_fits(incoming, pool):
                if len(pools) == 1 or _is_there(pool):
                    return
                continue  # it will be the next one's
            await self._judge(incoming, attempts, pool)
            if attempts.fitting(pool):
                return
        if attempts.begun or attempts.fits_somewhere:
            return
        native = incoming.endpoint.api is Api.NATIVE
        error = attempts.too_long(native=native)
        if error is not None:
            raise error

    def _surely_fits(self, incoming: Incoming, pool: Pool) -> bool:
        least = pool.least_context
        size = incoming.size if incoming.complete else incoming.length or incoming.size
        return least is None or self._prompts.most_tokens(pool.model, size) < least

    async def _judge(self, incoming: Incoming, attempts: Attempts, pool: Pool) -> None:
        """Find out how many tokens the prompt has for a model, unless that is known."""
        model = pool.model
        if model in attempts.needs:
            return
        if not incoming.replayable:
            attempts.needs[model] = self._guess(incoming, pool)
            return
        able = [worker for worker in pool.able if not worker.loads(model)]
        if not able:
            return
        attempts.needs[model] = 0
        counter = min(able, key=lambda worker: worker.in_flight)
        body = incoming.body(model)
        tokens = await self._count(counter, incoming.endpoint.path, model, body)
        if tokens is not None:
            attempts.needs[model] = tokens
            self._prompts.learn(model, incoming.size, tokens)

    def _guess(self, incoming: Incoming, pool: Pool) -> int:
        """Guess at the tokens of a body of which only the beginning is here.

        What would fit nowhere as text is taken for something else, such as pictures.
        """
        size = incoming.length or incoming.size
        tokens = self._prompts.likely_tokens(pool.model, size)
        return tokens if tokens < _largest_context(pool) else 0


def _largest_context(pool: Pool) -> int:
    """Find the largest context of a pool; 0 if none is known."""
    contexts = [worker.context_of(pool.model) for worker in pool.workers]
    return max((context for context in contexts if context is not None), default=0)


def _is_there(pool: Pool) -> bool:
    return any(worker.can_serve(pool.model) for worker in pool.workers)
