"""Whether a prompt fits into a context: by its size, as long as that will do.

llama-server takes a prompt that has fewer tokens than the context of a slot.  How long
the answer may be does not matter: it ends where the context does.

To count the tokens exactly takes a worker's tokenizer, some milliseconds and two
requests.  So the size in bytes decides where it can:

    bytes ──▶ at most so many tokens ──▶ fewer than any context?   it fits
                                         else                      count them

A token of text is at least one byte of it, and what a chat template adds is less than
the JSON around the messages.  That is a safe bound, and four times too high for most
texts; so it is replaced by what the answers of a model tell (`prompt_tokens`), and that
again on the safe side: the densest prompt seen counts, others move it only slowly, and
half as many tokens again are expected.  Were that too few, the worker would refuse the
prompt, and a larger one would get it.

There is no such bound from below: a megabyte can be a picture of 300 tokens.  Hence
nothing is ever refused for its size; only a count can do that.
"""

from __future__ import annotations

from collections.abc import Iterable

from gollama_proxy.fleet.pool import Pool
from gollama_proxy.wire.errors import Code, RequestError
from gollama_proxy.wire.overflow import OVERFLOW_TYPE, Overflow

MARGIN = 1.5
LEAST_BYTES = 1024  # of a request that tells something; shorter ones are mostly syntax
RISE = 0.05  # of the way to a less dense prompt, with each one
DENSEST, THINNEST = 1.0, 8.0  # bytes for each token that are believed
MOST_OFFERS = 8  # that an error lists


class Prompts:
    """What is known of the prompts of each model: their bytes for each token."""

    def __init__(self) -> None:
        self._densities: dict[str, float] = {}

    def __repr__(self) -> str:
        known = ", ".join(f"{m} {d:.1f}" for m, d in self._densities.items())
        return f"<Prompts with bytes/token {{{known}}}>"

    def learn(self, model: str, size: int, tokens: int) -> None:
        """Take in that a request of so many bytes had so many tokens (0: not known)."""
        if size < LEAST_BYTES or tokens <= 0:
            return
        density = max(DENSEST, min(size / tokens, THINNEST))
        known = self._densities.get(model, density)
        rise = RISE * (density - known)
        self._densities[model] = known + rise if rise > 0 else density

    def most_tokens(self, model: str, size: int) -> float:
        """Tell how many tokens a request of so many bytes has at the most."""
        density = self._densities.get(model)
        return size if density is None else size * MARGIN / density

    def likely_tokens(self, model: str, size: int) -> int:
        """Tell how many tokens it has if it is text like that of the others."""
        return int(size / self._densities.get(model, 4 * DENSEST))


def too_long(
    pools: Iterable[Pool],
    tokens: int,
    refusal: Overflow | None = None,
    *,
    native: bool = False,
) -> RequestError | None:
    """Make the error of a prompt that fits nowhere, with what each worker offers.

    `tokens` is 0 where nobody has counted them; `refusal` is the last worker's, if one
    was asked.  None if no context is known, and no worker has refused.  With `native`,
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
    said = refusal or Overflow("")
    tokens = said.tokens or tokens
    context = max(offers.values(), default=said.context)
    counts = {"n_prompt_tokens": tokens, "n_ctx": context}
    fields: dict[str, object] = {name: n for name, n in counts.items() if n}
    if native:
        fields |= {"type": OVERFLOW_TYPE, "code": Code.CONTEXT_LENGTH.status}
    text = said.message or (
        f"request{_in_words(tokens)} exceeds the available context size"
        f"{_in_words(context)}, try increasing it"
    )
    if offers:
        # Some clients know this error by OpenAI's words, some by llama-server's.
        told = [f"{model} on {name} {n}" for (model, name), n in offers.items()]
        more = f" and {len(told) - MOST_OFFERS} more" if len(told) > MOST_OFFERS else ""
        text = (
            f"This model's maximum context length is {context} tokens, and the prompt "
            f"has {tokens or 'more'}: {text.rstrip('.')}. "
            f"The workers offer: {', '.join(told[:MOST_OFFERS])}{more}."
        )
    return RequestError(Code.CONTEXT_LENGTH, text, fields=fields)


def _in_words(tokens: int) -> str:
    return f" ({tokens} tokens)" if tokens else ""
