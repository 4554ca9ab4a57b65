"""What a request is charged: the tokens that workers read and generated for it.

Each attempt that began to answer adds its tokens, whether it was complete or not, and
the sum is charged at the end of the request.  The prompt counts once, however many
workers read it.  If a worker reports no number of tokens, it is estimated: from the
events of a stream, or from sizes and the model's earlier prompts.
"""

from __future__ import annotations

from collections.abc import Callable

from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.proxy.fitting import Fitting
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.response import Assembly
from gollama_proxy.proxy.state import Exchange
from gollama_proxy.wire import sse
from gollama_proxy.wire.answer import Usage, read_tail


class Charges:
    """Adds up what requests use, and charges their subjects."""

    def __init__(
        self, quotas: Quotas, fitting: Fitting, clock: Callable[[], float]
    ) -> None:
        self._quotas = quotas
        self._fitting = fitting
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Charges to {self._quotas!r}>"

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
            generated = self._fitting.likely_tokens(x.model, size)
        prompt = used.prompt or 0
        if body.prompts > 1:
            if used.reading is not None and used.reading.seconds:  # of one of them
                likely = self._fitting.likely_tokens(x.model, body.size)
                prompt = max(prompt, likely)
        elif prompt and x.resume is None:  # else it is longer than the request
            self._fitting.learn(x, prompt)
        _count(x, prompt, generated or 0)

    def add_refused(self, x: Exchange, relay: Relay) -> None:
        """Add an attempt that ended with an error, if it sent anything before."""
        if relay.is_event_stream and _held_events(x, relay):
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
            _count(x, 0, min(generated, most) * body.answers)

    def settle(self, x: Exchange) -> None:
        """Charge the subject, at the end of its request."""
        if x.answered and not x.prompt_tokens:
            x.prompt_tokens = self._fitting.estimate(x)
        used = x.prompt_tokens + x.tokens
        if used:
            self._quotas.spend(x.subject, used)


def _count(x: Exchange, prompt: int, generated: int) -> None:
    x.answered = True
    x.tokens += generated
    x.prompt_tokens = max(x.prompt_tokens, prompt)


def _held_events(x: Exchange, relay: Relay) -> int:
    return sse.content_events(relay.held, x.endpoint.ending)
