"""What a request is charged: the tokens that workers have read and generated for it.

Each attempt that has begun to answer adds what it gave, whether that was complete or
not, and the sum is charged at the end of the request.  The prompt counts once, however
many workers have read it.  Where a worker has not said a number of tokens, it is
estimated: from the events of a stream, or from sizes and what the other prompts of the
model had.
"""

from __future__ import annotations

from collections.abc import Callable

from gollama_proxy.edge.quotas import Quotas
from gollama_proxy.fleet.lease import Lease
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.fitting import Fitting
from gollama_proxy.proxy.job import Job
from gollama_proxy.proxy.relay import Relay
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

    def add(self, job: Job, relay: Relay, told: Usage) -> None:
        """Add an attempt that has begun to answer, with what its worker says of it."""
        incoming, model = job.incoming, job.attempts.pool.model
        if not incoming.endpoint.slot:  # nothing is generated, nor read for that
            return
        generated = told.generated
        if relay.is_event_stream:
            generated = generated or relay.events or _held_events(job, relay)
        elif generated is None and incoming.endpoint.generates:
            size = relay.bytes or len(relay.held)
            generated = self._fitting.likely_tokens(model, size)
        prompt = told.prompt or 0
        if incoming.prompts > 1:
            if told.reading is not None and told.reading.seconds:  # of one of them
                likely = self._fitting.likely_tokens(model, incoming.size)
                prompt = max(prompt, likely)
        elif prompt and job.rescue is None:  # else it is longer than the request
            self._fitting.learn(incoming, model, prompt)
        job.count(prompt, generated or 0)

    def add_refused(self, job: Job, relay: Relay) -> None:
        """Add an attempt that ended with an error, if something came before that."""
        if relay.is_event_stream and _held_events(job, relay):
            self.add(job, relay, read_tail(job.incoming.endpoint.api, relay.held))

    def add_unseen(self, job: Job, worker: Worker, lease: Lease) -> None:
        """Add an attempt whose client has left before a byte of its answer was there.

        Of an answer in one piece nothing can be seen until all of it was generated.  So
        the time that it has taken counts, at the speed that the worker is known for.
        """
        incoming = job.incoming
        streams = job.streams or incoming.stream
        if streams or not (incoming.endpoint.generates and incoming.complete):
            return
        if lease.loads:  # how much of the time it took is not known
            return
        speed = worker.pace_of(lease.model).speed
        seconds = self._clock() - lease.taken_at
        generated = speed.generated(incoming.size, seconds, worker.in_flight)
        if generated:
            most = incoming.max_tokens or generated
            job.count(0, min(generated, most) * incoming.answers)

    def settle(self, job: Job, subject: str) -> None:
        """Charge the subject, at the end of its request."""
        record = job.record
        if job.answered and not record.prompt_tokens:
            estimate = self._fitting.estimate(job.incoming, job.attempts)
            record.prompt_tokens = estimate
        self._quotas.spend(subject, record.prompt_tokens + record.tokens)


def _held_events(job: Job, relay: Relay) -> int:
    return sse.content_events(relay.held, job.incoming.endpoint.ending)
