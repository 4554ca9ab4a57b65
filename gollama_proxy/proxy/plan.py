"""The plan of a request: which worker gets the next attempt, and after which pause.

Until a byte of an answer has reached the client, another worker can make up for a
failed attempt; `failures.py` has a row for each cause.  A retry is taken from a budget
that all requests share, so that an outage does not multiply the load.  Other workers
come before the same one again.

A request that was refused unread cost its worker nothing, so the retry is free; a
worker that could not be reached uses up no attempt.  A 500 may be the request's own
fault (llama-server sends it for bad UTF-8, and for an image to a text model): no worker
is blamed for it until another one succeeds, and when two workers send it, it is
believed, and only the fallbacks are tried.

When the attempts are used up, or no worker of a pool is available, the *fallbacks* of
the model follow, each with its own attempts, which are free.  A pool whose workers are
all busy counts as one without workers.  After CONTEXT, workers and fallbacks with an
unknown context may be tried, after those with a larger one.

A broken answer (`resume`) continues on

    1. workers of the same model that have not failed this answer,
    2. the other models: the requested one, its fallbacks,
    3. workers that have failed it already and have not stalled,
    4. the last one, once more.

Each of these uses up one continuation, unless the worker refuses the request and gets
another one (`repeat`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from gollama_proxy.config.settings import Config
from gollama_proxy.fleet.pool import Pool
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.failures import Again, Cause, rule_of
from gollama_proxy.scheduling.balancer import RetryBudget
from gollama_proxy.scheduling.policies import Ask
from gollama_proxy.wire.errors import OVERFLOW_TYPE, Code, Overflow, RequestError

PAUSE = (0.05, 0.15)  # seconds, between two attempts on the same worker
MOST_OFFERS = 8  # that the error of a prompt that fits nowhere lists
_NO_NEEDS: Mapping[str, int] = MappingProxyType({})  # of nearly every request
_BELIEVED = 2  # workers with the same 5xx, after which the request is at fault


class Plan:
    """The attempts of one request: on its model's pool, then on its fallbacks'."""

    __slots__ = (
        "_again",
        "_budget",
        "_continuations",
        "_declined",
        "_free",
        "_last",
        "_least_context",
        "_limits",
        "_place",
        "_pools",
        "_repeat",
        "_resuming",
        "_rng",
        "_stalled",
        "_suspects",
        "_tried",
        "_unreached",
        "as_sent",
        "ask",
        "begun",
        "media",
        "needs",
        "once",
        "pool",
        "single",
    )

    def __init__(
        self,
        pools: Sequence[Pool],
        path: str,
        config: Config,
        budget: RetryBudget,
        rng: random.Random,
        ask: Ask,
    ) -> None:
        """Plan a request on a path; `ask` is what the policies know of it."""
        self.pool = pools[0]  # the current one
        self.ask = ask
        self.needs = _NO_NEEDS  # tokens of the prompt, by model; 0: not known
        self.media: frozenset[str] | None = None  # besides text; None: not looked for
        self.single = len(pools) == 1  # without a fallback
        # A request that a worker may have begun is not retried.
        self.once = path in config.retry.once
        self._pools = pools
        self._tried: list[tuple[Worker, ...]] = [()] * len(pools)  # by pool
        self._limits = config.retry
        self._budget = budget
        self._rng = rng
        rescue = config.rescue
        self._continuations = rescue.attempts if rescue.enabled else 0
        self.begun = False  # there has been an attempt, on any pool
        self.as_sent = False  # send the request as the client wrote it
        self._place = 0  # of the current pool
        self._resuming = False
        self._free = False  # retries no longer cost anything
        self._last: Worker | None = None  # the worker of the last attempt
        self._unreached = 0  # attempts on this pool that cost nothing
        self._declined: tuple[Worker, ...] = ()  # workers that did not take the request
        self._stalled: tuple[Worker, ...] = ()  # workers that stopped sending
        self._suspects: tuple[
            Worker, ...
        ] = ()  # sent a 5xx; the request may be at fault
        self._least_context = 0  # a worker must have more than this
        self._again = False  # the last worker may get another attempt,
        self._repeat = False  # or must get it
        budget.deposit()

    def __repr__(self) -> str:
        pool, tried, limit = self.pool.model, len(self.tried), self._limits.attempts
        return f"<Plan {tried} of {limit} on {pool!r}>"

    # --- Which worker -------------------------------------------------------------

    @property
    def tried(self) -> tuple[Worker, ...]:
        """The workers of this pool that have had an attempt."""
        return self._tried[self._place]

    def candidates(self) -> list[Worker]:
        """Return the workers for the next attempt: those that have not had one.

        If all have had one, the last one may follow again, if `retry_after` allowed it.
        If none is available, the next fallback follows.  A broken answer goes to the
        fallbacks first, and then to workers that have failed it before.
        """
        fresh = not (self.begun or self.needs or self.media)
        if fresh and (available := self.pool.available):
            return available  # the common case
        if self._resuming and not self.some_left:
            return []
        last = [w for w in self.fitting(self.pool) if w is self._last and self._again]
        if self._repeat and last:
            return last
        others = self._untried(self._place)
        if others:
            return self.pool.preferred(others)
        if last and not self._resuming:
            return last
        if self._fall_back():
            return self.candidates()
        return self._go_back() or last

    def has_other(self) -> bool:
        """Whether another worker is free to take over, and may."""
        if self.once or (self._resuming and not self.some_left):
            return False
        paid = self._free or self._budget.suffices
        others = self._untried(self._place) if paid and self.some_left else []
        for place in self._fallbacks():
            others += self._untried(place)
        if self._resuming:
            others += [worker for some in self._failed().values() for worker in some]
        return any(not worker.full for worker in others)

    def begin(self, worker: Worker) -> None:
        """Record the worker of an attempt."""
        self._tried[self._place] += (worker,)
        self._last = worker
        if self._place and not self.begun:
            self._pools[0].missed = True  # it may have a machine that can be woken
        self.begun = True
        if self._again:
            self._again = self._repeat = False
        if self._resuming:
            self._continuations -= 1

    def need(self, model: str, tokens: int) -> None:
        """Record how many tokens the prompt has for a model; 0 if that is not known."""
        self.needs = {**self.needs, model: tokens}

    def _untried(self, place: int) -> list[Worker]:
        """Return the suitable workers of a pool that have not had an attempt."""
        tried = self._tried[place]
        return [w for w in self.fitting(self._pools[place]) if w not in tried]

    def _failed(self) -> dict[int, list[Worker]]:
        """Return workers that may continue an answer that they failed before, by pool.

        They may have been restarted.  But a worker that stalled would stall again, and
        the last one follows only if `retry_after` allowed it.
        """
        barred = [*self._stalled, self._last]
        some = {
            place: [worker for worker in self.fitting(pool) if worker not in barred]
            for place, pool in enumerate(self._pools)
        }
        return {place: workers for place, workers in some.items() if workers}

    @property
    def some_left(self) -> bool:
        """Whether another attempt on this pool is allowed, if a worker is available."""
        if self._resuming:
            return self._continuations > 0
        return len(self.tried) - self._unreached < self._limits.attempts

    @property
    def pools(self) -> list[Pool]:
        """The current pool, and those that may follow it."""
        if len(self._pools) == 1:
            return [self.pool]
        return [self.pool, *(self._pools[place] for place in self._fallbacks())]

    def fitting(self, pool: Pool) -> list[Worker]:
        """Return the usable workers that take the prompt, as far as is known.

        After a worker refused the prompt, workers with a known larger context come
        before those with an unknown one.
        """
        if not (self._least_context or self.needs or self.media):
            return pool.able
        model = pool.model
        able = [worker for worker in pool.able if self._fits(worker, model)]
        if not self._least_context:
            return able
        return [w for w in able if w.context_of(model) is not None] or able

    @property
    def fits_somewhere(self) -> bool:
        """Whether any worker may take the prompt, even one that is down."""
        return any(
            self._fits(worker, pool.model)
            for pool in self.pools
            for worker in pool.workers
        )

    def awaits(self, worker: Worker) -> bool:
        """Return whether a worker that is out gets the request if it comes back."""
        return self._fits(worker, self.pool.model) and worker not in self.tried

    def _fits(self, worker: Worker, model: str) -> bool:
        if self.media and not self.media.isdisjoint(worker.refuses(model)):
            return False
        context = worker.context_of(model)
        least = max(self._least_context, self.needs.get(model, 0))
        return context is None or context > least

    def not_taken(self) -> RequestError | None:
        """Make the error of media that no worker takes; None if some worker does."""
        media = self.media or frozenset()
        if not media or any(
            media.isdisjoint(worker.refuses(pool.model))
            for pool in self.pools
            for worker in pool.workers
        ):
            return None
        kinds = " and ".join(sorted(media))
        text = f"No worker takes {kinds} input for the model {self.pool.model!r}."
        return RequestError(Code.INVALID_VALUE, text)

    def too_long(
        self, refusal: Overflow | None = None, *, native: bool = False
    ) -> RequestError | None:
        """Make the error of a prompt that is too long for every worker.

        None if no context is known, and no worker has refused.
        """
        counted = next(iter(self.needs.values()), 0)
        return too_long(self._pools, counted, refusal, native=native)

    def busy_for(self) -> float:
        """Return the seconds until some worker is no longer busy; inf if none is."""
        return min(pool.busy_for() for pool in self.pools)

    def can_wait(self, seconds: float) -> bool:
        """Return whether a worker may become available within so many seconds.

        A broken answer waits for any worker, as a killed one is often restarted.  Other
        requests wait only for busy workers.
        """
        if self._resuming:
            return self.some_left
        return self.busy_for() <= seconds

    def reopens_in(self) -> float:
        """Return the seconds until the next busy or open breaker reopens, or inf."""
        waits = [
            worker.opens_in(pool.model)
            for pool in self.pools
            for worker in pool.workers
        ]
        return min((wait for wait in waits if wait > 0), default=math.inf)

    def _fallbacks(self) -> list[int]:
        """Return the places of the pools that may follow.

        A broken answer may also return to the requested model.
        """
        if not self._resuming:
            return list(range(self._place + 1, len(self._pools)))
        return [n for n in range(len(self._pools)) if n != self._place]

    def _fall_back(self) -> bool:
        """Move on to the next fallback with a worker; False if there is none."""
        for place in self._fallbacks():
            if self._untried(place):
                self._turn_to(place)
                self._free = True
                return True
        return False

    def _go_back(self) -> list[Worker]:
        """Return workers that may continue a broken answer that they failed before."""
        failed = self._failed() if self._resuming else {}
        if not failed:
            return []
        self._turn_to(min(failed))
        return failed[self._place]

    def _turn_to(self, place: int) -> None:
        if place != self._place:
            self._place = place
            self.pool = self._pools[place]
            self.ask = replace(self.ask, model=self.pool.model)
            self._suspects = ()
            self._unreached = 0

    # --- Whether to retry ---------------------------------------------------------

    def retry_after(self, cause: Cause, asked: float | None = None) -> float | None:
        """Decide on another attempt: the pause before it in seconds, None for none.

        `asked` is the time for which a busy worker wants no requests.
        """
        rule = rule_of(cause)
        if not rule.elsewhere or (self.once and rule.begun):
            return None
        if self._resuming and not self.some_left:
            return None
        if rule.again is Again.AS_SENT:
            self.as_sent = self._again = self._repeat = True
            self._tried[self._place] = self.tried[:-1]  # it is the same attempt
            return 0.0
        if self._note(cause, self.tried[-1]):
            return 0.0 if self._fall_back() else None
        another = self.some_left and bool(self._untried(self._place))
        if self._resuming and not another:
            another = self._fall_back() or bool(self._go_back())
        pause = 0.0 if another else self._pause_before_repeat(rule.again, asked)
        if pause is not None and (self._free or rule.free or self._budget.withdraw()):
            return pause
        return 0.0 if self._fall_back() else None

    def _note(self, cause: Cause, worker: Worker) -> bool:
        """Record how a worker failed; return whether its 5xx is believed."""
        rule = rule_of(cause)
        if rule.hung:
            self._stalled += (worker,)
        if rule.declined:
            self._declined += (worker,)
        if cause is Cause.UNREACHABLE:
            self._unreached += 1
        elif cause is Cause.CONTEXT:
            context = worker.context_of(self.pool.model) or 1
            self._least_context = max(self._least_context, context)
        elif cause is Cause.STATUS:
            self._suspects += (worker,)
        return len(set(map(id, self._suspects))) >= _BELIEVED

    def _pause_before_repeat(self, again: Again, asked: float | None) -> float | None:
        if not self.some_left or self.tried.count(self.tried[-1]) > 1:
            return None
        pause = None
        if again is Again.PAUSE:
            pause = self._rng.uniform(*PAUSE)
        elif again is Again.ASKED and (asked or 0.0) <= self._limits.patience:
            # A little longer, so that no retry is early and not all come at once.
            pause = None if asked is None else asked + self._rng.uniform(*PAUSE)
        self._again = pause is not None
        return pause

    # --- Broken answers -----------------------------------------------------------

    def resume(self) -> None:
        """Plan the continuation of an answer that the last worker broke off.

        The following attempts are free: each saves what was generated so far, and there
        is one for each lost answer, not for each request.  A worker that did not take
        the request has not failed the answer.
        """
        last = self.tried[-1]
        passed = [*self._declined, last]
        for place, some in enumerate(self._tried):
            self._tried[place] = tuple(w for w in some if w not in passed)
        self._tried[self._place] += (last,)
        self._declined = ()
        self._suspects = ()
        self._free = self._resuming = True

    def repeat(self) -> None:
        """Let the last worker have another request, in the same attempt.

        It refused to continue an answer, or did not prove that it does.
        """
        self._continuations += 1
        self._again = self._repeat = True

    def succeeded(self) -> list[Worker]:
        """Return the workers whose 5xx is their own fault: another one succeeded."""
        return [worker for worker in self._suspects if worker is not self.tried[-1]]


# --- Prompts that fit nowhere -----------------------------------------------------


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
