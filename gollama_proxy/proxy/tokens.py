"""The tokens of a request: whether its prompt fits a context, and what it is charged.

`Fitting` sends a prompt only to workers whose context is large enough.  llama-server
accepts one with fewer tokens than the context of a slot; the length of the answer does
not matter, which ends where the context ends.  An exact count needs a worker's
tokenizer, a few milliseconds and two requests, once for each model.  So the size in
bytes decides if it can:

    bytes ──▶ at most so many tokens ──▶ fewer than any context?   it fits
                                         else                      count them

A token of text has at least one byte, and a chat template adds less than the JSON
around the messages.  This bound is safe, but four times too high for most texts, so it
is replaced by counts from answers of the model (`prompt_tokens`), on the safe side:
the densest prompt counts, others move the value only slowly, and half as many tokens
again are assumed.  If that is too few, the worker refuses the prompt, and one with a
larger context gets it.  There is no lower bound: a megabyte can be an image of 300
tokens.  So a prompt is never rejected for its size, only after a count.

`Charges` adds up the tokens that workers read and generated.  Each attempt that began
to answer adds its tokens, whether it was complete or not, and the sum is charged at the
end of the request.  The prompt counts once, however many workers read it.  If a worker
reports no number of tokens, it is estimated: from the events of a stream, or from sizes
and the model's earlier prompts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gollama_proxy.edge.auth import Principal
from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.registry import Registry
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Cause
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire import sse
from gollama_proxy.wire.answer import Usage, read_tail, read_usage
from gollama_proxy.wire.schema import Api

# Counts the tokens of a body on a worker, for a path and a model; None: it cannot.
Count = Callable[[Worker, str, str, bytes], Awaitable[int | None]]

MARGIN = 1.5
LEAST_BYTES = 1024  # of a request that is learnt from; shorter ones are mostly syntax
RISE = 0.05  # of the way to a less dense prompt, with each one
DENSEST, THINNEST = 1.0, 8.0  # plausible bytes for each token


class Fitting:
    """Compares prompts with context sizes."""

    def __init__(self, registry: Registry, count: Count) -> None:
        self._registry = registry
        self._count = count
        self.prompts = Prompts()

    def __repr__(self) -> str:
        return f"<Fitting {self.prompts!r}>"

    def estimate(self, x: Exchange) -> int:
        """Estimate the tokens of a prompt whose worker reported no count."""
        if x.endpoint.form:
            return 0
        pool, body = x.plan.pool, x.body
        counted = x.plan.needs.get(pool.model)
        size = body.length or body.size
        tokens = counted or self.prompts.likely_tokens(pool.model, size)
        return min(tokens, pool.largest_context or tokens)

    def is_certain(self, x: Exchange) -> bool:
        """Whether a prompt certainly fits, so that `check` is not needed."""
        if not x.endpoint.prompt_has_size:
            return True
        pool = x.plan.pool
        if not (x.plan.single and self._surely_fits(x, pool)):
            return False
        return not (pool.selects and x.body.may_have_media)

    async def check(self, x: Exchange) -> None:
        """Find out which workers take a prompt, and limit the plan to these.

        Call this before each attempt: the next one may be for another model.

        Raises:
            RequestError: 400, it fits nowhere or no worker takes what is in it, and no
                attempt has been made yet.
        """
        plan = x.plan
        pools = plan.pools
        for pool in pools:
            surely_fits = self._surely_fits(x, pool)
            if plan.media is None and pool.selects:
                plan.media = x.body.media()
            if surely_fits:
                if plan.media and not plan.fitting(pool):
                    continue
                if len(pools) == 1 or _is_served(pool):
                    return
                continue  # no worker serves it now; another model is next
            await self._judge(x, pool)
            if plan.fitting(pool):
                return
        if plan.begun or plan.fits_somewhere:
            return
        error = plan.not_taken() or plan.too_long(native=x.endpoint.api is Api.NATIVE)
        if error is not None:
            raise error

    def _surely_fits(self, x: Exchange, pool: Pool) -> bool:
        least = pool.least_context
        if least is None:
            return True
        body = x.body
        size = body.size if body.complete else body.length or body.size
        return self.prompts.most_tokens(pool.model, size) < least

    async def _judge(self, x: Exchange, pool: Pool) -> None:
        """Count the tokens of the prompt for a model, unless that is known."""
        model, plan = pool.model, x.plan
        if model in plan.needs:
            return
        if not x.body.replayable:
            plan.need(model, self._guess(x, pool))
            return
        able = [worker for worker in pool.able if not worker.loads(model)]
        if not able:
            return
        plan.need(model, 0)
        # Other servers have no such routes; llama-swap has those of its servers.
        counter = min(able, key=lambda w: (not w.is_llama_server, w.in_flight))
        body = x.body.named(model)
        tokens = await self._count(counter, x.endpoint.path, model, body)
        if tokens is None:
            # A server whose context has to be stated may cut a prompt in silence.
            if any(worker.config.context for worker in pool.workers):
                plan.need(model, self._guess(x, pool))
        else:
            plan.need(model, tokens)
            self.prompts.learn(model, x.body.size, tokens)

    def _guess(self, x: Exchange, pool: Pool) -> int:
        """Estimate the tokens of a body that cannot be counted.

        A body that would fit nowhere as text is assumed to contain something else, such
        as images.
        """
        size = x.body.length or x.body.size
        tokens = self.prompts.likely_tokens(pool.model, size)
        largest = max(each.largest_context or 0 for each in x.plan.pools)
        return tokens if tokens < largest else 0


def _is_served(pool: Pool) -> bool:
    return any(worker.can_serve(pool.model) for worker in pool.workers)


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


# --- Charges ----------------------------------------------------------------------


class Charges:
    """Adds up what requests use, and charges their subjects."""

    def __init__(
        self, quotas: Quotas, fitting: Fitting, clock: Callable[[], float]
    ) -> None:
        self._quotas = quotas
        self._fitting, self._prompts = fitting, fitting.prompts
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Charges to {self._quotas!r}>"

    def take_quota(self, x: Exchange, caller: Principal) -> None:
        """Count a request of a caller with a quota.

        Raises:
            RequestError: 429, the quota is used up.
        """
        in_tokens = caller.tpm, caller.tokens_per_day, caller.tokens_per_month
        if any(in_tokens) and x.config.upstream.usage == "limited":
            x.counted = True
        usage_left = self._quotas.take(x.subject, caller.rpm, *in_tokens)
        for name, value in usage_left.headers().items():
            x.lines += f"{name}: {value}\r\n"
        if not usage_left.allowed:
            raise usage_left.error()

    def add(self, x: Exchange, relay: Relay, used: Usage) -> None:
        """Add an attempt that began to answer, with the usage from its worker."""
        endpoint, body = x.endpoint, x.body
        if not endpoint.slot:  # nothing is generated, nor read for that
            return
        generated = used.generated
        if relay.is_event_stream:
            generated = generated or relay.events or _held_events(x, relay)
        elif generated is None and endpoint.generates:
            size = relay.bytes or len(relay.held)
            generated = self._prompts.likely_tokens(x.model, size)
        read = prompt = used.prompt or 0
        if body.prompts > 1:
            if used.reading is not None and used.reading.seconds:  # of one of them
                likely = self._prompts.likely_tokens(x.model, body.size)
                prompt = max(prompt, likely)
        elif x.repeated:
            # What the client has of the answer is a part of this prompt, and not of
            # the request; it was counted when it was generated.
            prompt = max(prompt - x.repeated, 0)
        elif endpoint.prompt_has_size and prompt:
            self._prompts.learn(x.model, body.size, prompt)
        x.answered = True
        x.tokens += generated or 0
        if prompt > x.prompt_tokens:
            x.prompt_tokens = prompt
            if used.reading is not None and 0 < used.reading.cached <= read:
                x.cached_tokens = min(used.reading.cached, prompt)

    def add_refused(self, x: Exchange, relay: Relay, cause: Cause) -> None:
        """Add an attempt that failed after it had sent something, or everything."""
        if cause is Cause.DIVERGED:
            self.add(x, relay, read_usage(relay.held, x.endpoint.api))
        elif relay.is_event_stream and _held_events(x, relay):
            self.add(x, relay, read_tail(x.endpoint.api, relay.held))

    def add_unseen(self, x: Exchange, lease: Lease) -> None:
        """Add an attempt whose client disconnected before the first byte of the answer.

        An answer in one piece shows nothing until all of it has been generated.  So the
        elapsed time counts, at the worker's known speed.
        """
        body = x.body
        streams = x.resume is not None or isinstance(x.delivery, Assembly)
        if streams or body.stream or not (x.endpoint.generates and body.complete):
            return
        if lease.loads:  # how long that took is not known
            return
        worker = lease.worker
        speed = worker.pace_of(lease.model).speed
        seconds = self._clock() - lease.taken_at
        generated = speed.generated(body.size, seconds, worker.in_flight)
        if generated:
            most = body.max_tokens or generated
            x.answered = True
            x.tokens += min(generated, most) * body.answers

    def settle(self, x: Exchange) -> None:
        """Charge the subject, at the end of its request."""
        if x.answered and not x.prompt_tokens:
            x.prompt_tokens = self._fitting.estimate(x)
        used = x.prompt_tokens + x.tokens
        if used:
            self._quotas.spend(x.subject, used)


def _held_events(x: Exchange, relay: Relay) -> int:
    return sse.content_events(relay.held, x.endpoint.ending)
