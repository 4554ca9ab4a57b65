"""Whether a prompt fits into a context: judged by its size if possible.

llama-server accepts a prompt with fewer tokens than the context of a slot.  The length
of the answer does not matter: it ends where the context ends.

An exact count needs a worker's tokenizer, a few milliseconds and two requests.  So the
size in bytes decides if it can:

    bytes ──▶ at most so many tokens ──▶ fewer than any context?   it fits
                                         else                      count them

A token of text has at least one byte, and a chat template adds less than the JSON
around the messages.  This bound is safe, but four times too high for most texts, so it
is replaced by counts from answers of the model (`prompt_tokens`), on the safe side:
the densest prompt counts, others move the value only slowly, and half as many tokens
again are assumed.  If that is too few, the worker refuses the prompt, and one with a
larger context gets it.

There is no lower bound: a megabyte can be an image of 300 tokens.  So a prompt is never
rejected for its size, only after a count.
"""

from __future__ import annotations

from collections.abc import Iterable

from gollama_proxy.fleet.pool import Pool
from gollama_proxy.wire.errors import OVERFLOW_TYPE, Code, Overflow, RequestError

MARGIN = 1.5
LEAST_BYTES = 1024  # of a request that is learnt from; shorter ones are mostly syntax
RISE = 0.05  # of the way to a less dense prompt, with each one
DENSEST, THINNEST = 1.0, 8.0  # plausible bytes for each token
MOST_OFFERS = 8  # that an error lists


class Prompts:
    """The learnt density of the prompts of each model, in bytes for each token."""

    def __init__(self) -> None:
        self._densities: dict[str, float] = {}

    def __repr__(self) -> str:
        known = ", ".join(f"{m} {d:.1f}" for m, d in self._densities.items())
        return f"<Prompts with bytes/token {{{known}}}>"

    def learn(self, model: str, size: int, tokens: int) -> None:
        """Learn from a request of `size` bytes with `tokens` tokens (0: not known)."""
        if size < LEAST_BYTES or tokens <= 0:
            return
        density = max(DENSEST, min(size / tokens, THINNEST))
        known = self._densities.get(model, density)
        rise = RISE * (density - known)
        self._densities[model] = known + rise if rise > 0 else density

    def most_tokens(self, model: str, size: int) -> float:
        """Return an upper limit for the tokens of a request of `size` bytes."""
        density = self._densities.get(model)
        return size if density is None else size * MARGIN / density

    def likely_tokens(self, model: str, size: int) -> int:
        """Estimate the tokens of a request if it is text like earlier ones."""
        return int(size / self._densities.get(model, 4 * DENSEST))


def too_long(
    pools: Iterable[Pool],
    tokens: int,
    refusal: Overflow | None = None,
    *,
    native: bool = False,
) -> RequestError | None:
    """Make the error of a prompt that fits nowhere, with the context of each worker.

    `tokens` is 0 if they were not counted; `refusal` is that of the last worker, if
    any.  None if no context is known, and no worker has refused.  With `native`,
    it has llama-server's own type.
    """
    offers = {
        (pool.model, worker.name): context
        for pool in pools
        for worker in pool.workers
        if (context := worker.context_of(pool.model)) is not None
    }
    if not offers and refusal is None:
        return None
    reported = refusal or Overflow("")
    tokens = reported.tokens or tokens
    context = max(offers.values(), default=reported.context)
    counts = {"n_prompt_tokens": tokens, "n_ctx": context}
    fields: dict[str, object] = {name: n for name, n in counts.items() if n}
    if native:
        fields |= {"type": OVERFLOW_TYPE, "code": Code.CONTEXT_LENGTH.status}
    text = reported.message or (
        f"request{_in_words(tokens)} exceeds the available context size"
        f"{_in_words(context)}, try increasing it"
    )
    if offers:
        # Some clients detect this error by OpenAI's text, some by llama-server's.
        listed = [f"{model} on {name} {n}" for (model, name), n in offers.items()]
        more = (
            f" and {len(listed) - MOST_OFFERS} more"
            if len(listed) > MOST_OFFERS
            else ""
        )
        text = (
            f"This model's maximum context length is {context} tokens, and the prompt "
            f"has {tokens or 'more'}: {text.rstrip('.')}. "
            f"The workers offer: {', '.join(listed[:MOST_OFFERS])}{more}."
        )
    return RequestError(Code.CONTEXT_LENGTH, text, fields=fields)


def _in_words(tokens: int) -> str:
    return f" ({tokens} tokens)" if tokens else ""
