"""One request on its path, and what has been decided about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiohttp import web

from gollama_proxy.config.settings import Config
from gollama_proxy.fleet.breaker import Verdict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.proxy.attempt import Patience
from gollama_proxy.proxy.body import Incoming
from gollama_proxy.proxy.client import Client, ToldError
from gollama_proxy.proxy.delivery import Delivery, Stream, Whole
from gollama_proxy.proxy.relay import Relay
from gollama_proxy.proxy.rescue import Rescue
from gollama_proxy.proxy.response import (
    Refusal,
    in_shape_of,
    refusal_of,
    refusal_of_assembly,
)
from gollama_proxy.proxy.unstreamed import Suspect, Unstreamed
from gollama_proxy.scheduling.admission import Place
from gollama_proxy.scheduling.queue import EVERY
from gollama_proxy.scheduling.retry import Attempts, Failure
from gollama_proxy.scheduling.turns import Priority, Ticket
from gollama_proxy.telemetry.accesslog import Outcome, Record
from gollama_proxy.wire.asking import (
    ask_for_stream,
    ask_for_usage,
    choices_of,
    has_prompts,
)
from gollama_proxy.wire.assemble import UnfoldableError
from gollama_proxy.wire.ending import Tally
from gollama_proxy.wire.errors import Code, ProxyError, WorkerError
from gollama_proxy.wire.filters import Renamer
from gollama_proxy.wire.openai import Api, Ending

# Seconds of silence from which on a client is told that its prompt is being read.
PROCESSING_AFTER = 15.0


@dataclass(slots=True)
class Entry:
    """A request as the queue sees it."""

    plan: Attempts
    subject: str
    priority: Priority
    max_concurrency: int
    needs_slot: bool
    ticket: Ticket | None = None
    waited: float = 0.0


@dataclass(slots=True, repr=False)
class Job:
    """What the steps of the path hand on to each other."""

    request: web.BaseRequest
    record: Record
    incoming: Incoming
    attempts: Attempts
    entry: Entry
    config: Config
    model: str  # that was asked for, as its workers call it
    unstreamed: Unstreamed
    alias: str = ""  # as the client calls it, if otherwise
    counted: bool = False  # its tokens have to be known exactly
    hides_usage: bool = False  # the hub has asked for it, and the client has not
    rewritten: bool = False  # the worker is asked for more than the client has written
    suspect: Suspect | None = None  # does not take that, or answers it otherwise
    choices: int = 1  # that a stream is asked for
    body: bytes = b""  # as the worker gets it, or got it, to begin an answer with
    delivery: Delivery | None = None
    rescue: Rescue | None = None
    lost: ProxyError | None = None  # why an answer that has begun broke off
    last: Refusal | None = None
    answered: bool = False  # a worker has begun to generate
    told_at: float = 0.0  # seconds of an attempt, when its client was told of it
    loading: bool = False  # the worker of this attempt has to load the model first

    def __repr__(self) -> str:  # without what a user wrote
        return f"<Job {self.record.id} {self.attempts!r} {self.delivery!r}>"

    @property
    def begun(self) -> bool:
        """Whether the head of the answer is out."""
        return self.delivery is not None and self.delivery.begun

    @property
    def fed(self) -> bool:
        """Whether the client has a part of the answer."""
        return self.delivery is not None and self.delivery.fed

    @property
    def client_left(self) -> bool:
        transport = self.request.transport
        return transport is None or transport.is_closing()

    # --- Asking -------------------------------------------------------------------

    @property
    def streams(self) -> bool:
        """Whether the worker is asked for a stream, whatever the client wants."""
        if self.rescue is not None or isinstance(self.delivery, Whole):
            return True
        return self.incoming.replayable and self.incoming.stream

    def prepare(self, worker: Worker) -> bytes:
        """Write what the next worker is asked for."""
        incoming, model = self.incoming, self.attempts.pool.model
        if self.rescue is not None:
            return self.rescue.request(model)
        self.body = incoming.body(model)
        if incoming.replayable and incoming.stream:
            self.choices = incoming.answers
            if not incoming.endpoint.chat and has_prompts(self.body):
                self.choices = choices_of(self.body)
        self.hides_usage = self.rewritten = False
        if not self.begun:
            self.delivery = None
        suspect = self._suspect(worker)
        known = suspect == self.suspect or suspect in self.unstreamed
        if self.attempts.as_sent or known:
            return self.body
        if self._may_assemble and (
            asked := ask_for_stream(self.body, incoming.endpoint)
        ):
            assembler = asked.assembler(self.config.limits.answer)
            self.delivery = Whole(assembler, self.record, self.names)
            self.body, self.rewritten = asked.body, True
        elif (
            self._may_ask_usage(worker)
            and (body := ask_for_usage(self.body)) is not None
        ):
            self.body, self.hides_usage, self.rewritten = body, True, True
        return self.body

    def _suspect(self, worker: Worker) -> Suspect:
        incoming, model = self.incoming, self.attempts.pool.model
        return Suspect(worker.name, model, incoming.endpoint.path, incoming.stream)

    def _may_ask_usage(self, worker: Worker) -> bool:
        """Say whether a stream would not be counted otherwise.

        A llama-server tells its `timings` in any case; asked for usage, it would tell
        them with it, and so they would be hidden from a client that reads them.
        """
        incoming = self.incoming
        counts = incoming.endpoint.ending is Ending.DONE
        streams = incoming.replayable and incoming.stream
        return self.counted and counts and streams and not worker.is_llama_server

    @property
    def _may_assemble(self) -> bool:
        return (
            self.incoming.endpoint.path in self.config.upstream.assemble
            and self.incoming.replayable
            and not self.incoming.stream
            # Whether a stream has all of the answer shows at its end, and then it has
            # to be asked for again.
            and not self.attempts.once
        )

    def patience_with(self, worker: Worker, *, loads: bool) -> Patience | None:
        """Say how long the first event may take while others could take over.

        To load a model takes as long as it takes, and others would have to load it too.
        """
        if not self.streams:
            return None
        pace = worker.pace_of(self.attempts.pool.model)
        allowance = pace.expectations.hard
        if not loads:
            allowance = pace.allowance(self.incoming.size)
        self.told_at, self.loading = 0.0, loads
        return Patience(
            allowance,
            self.attempts.has_other,
            lambda: worker.is_down,
            self.tell_progress,
        )

    @property
    def names(self) -> tuple[str, str] | None:
        """The model's name and the client's for it; a fallback keeps its own."""
        model = self.attempts.pool.model
        return (model, self.alias) if self.alias and model == self.model else None

    def _new_stream(self) -> Stream:
        renamer = Renamer(*self.names) if self.names is not None else None
        return Stream(self.request, self.record, renamer)

    # --- Telling a client that waits ----------------------------------------------

    @property
    def may_tell(self) -> bool:
        """Whether the client reads events, so that a comment does no harm."""
        incoming = self.incoming
        events = incoming.endpoint.ending is not Ending.BODY
        return events and incoming.replayable and incoming.stream

    async def tell_place(self, place: Place) -> None:
        """Tell the client of its place in the line."""
        eta = "" if place.eta is None else f" eta {math.ceil(place.eta)}s"
        await self._tell(f"queued {place.position}/{place.waiting}{eta}")

    async def tell_progress(self, waited: float) -> None:
        """Tell the client what the worker does before it answers, if that takes long.

        It reads the prompt, or loads the model, which may well be the longer part.
        """
        notice = self.config.queue.notice
        if self.fed or not self.may_tell or not notice:
            return
        interval = EVERY if self.begun else PROCESSING_AFTER
        if self.loading and not self.told_at:
            interval = notice
        if waited >= self.told_at + interval:
            self.told_at = waited
            await self._tell("loading model" if self.loading else "processing")

    async def _tell(self, comment: str) -> None:
        if not isinstance(self.delivery, Stream):
            self.delivery = self._new_stream()
        await self.delivery.tell(comment.encode())

    # --- Answering ----------------------------------------------------------------

    async def open(self, relay: Relay) -> Client:
        """Begin the answer, or go on with it; tell where the worker's bytes go."""
        if self.delivery is None or not relay.is_event_stream:
            self.delivery = self._new_stream()
        if self.hides_usage and relay.is_event_stream:
            assert isinstance(self.delivery, Stream), self
            self.delivery.hide_usage()
        client = await self.delivery.open(relay)
        if not self._could_be_rescued(relay):
            self.body = b""
        if self.fed:
            self.incoming.forget()
        if self.rescue is None:
            return client
        return self.rescue.client_of(client, self.attempts.pool.model, relay.fail)

    @property
    def kept(self) -> int:
        """How much of the answer is worth remembering."""
        return self.config.rescue.kept if self.body and self.rescue is None else 0

    @property
    def tally(self) -> Tally | None:
        """What counts the ends of the choices, where several are asked for."""
        several = self.choices > 1
        return Tally(self.incoming.endpoint.ending, self.choices) if several else None

    def _could_be_rescued(self, relay: Relay) -> bool:
        return (
            self.config.rescue.enabled
            and self.incoming.endpoint.ending is Ending.DONE
            and self.incoming.replayable
            and relay.is_event_stream
        )

    async def finish(self) -> web.StreamResponse:
        """End an answer that is complete.

        Raises:
            WorkerError: what another worker has sent is not the rest of it.
            AssemblyError: a stream makes up no answer.
        """
        assert self.delivery is not None, self
        if self.rescue is not None:
            self.rescue.finish()
            self.record.rescued = self.rescue.count
        return await self.delivery.finish()

    async def close(self) -> web.StreamResponse:
        """End an answer of which nothing is left to generate."""
        assert self.delivery is not None, self
        assert self.rescue is not None, self
        self.delivery.send(self.rescue.closing())
        return await self.delivery.finish()

    def count(self, prompt: int, generated: int) -> None:
        """Add the tokens that a worker has read and generated in one attempt."""
        self.answered = True
        self.record.tokens += generated
        self.record.prompt_tokens = max(self.record.prompt_tokens, prompt)

    # --- When it goes wrong -------------------------------------------------------

    def broke_off(self, worker: Worker, relay: Relay, error: WorkerError) -> Refusal:
        """Take in that an answer broke off, and see whether it can go on elsewhere."""
        refusal = self.refusal_of(worker, error)
        if refusal.failure is not Failure.STREAM:
            self._go_on(relay, error)
        return refusal

    def refusal_of(self, worker: Worker, error: WorkerError) -> Refusal:
        """Describe an attempt that a worker has ended with an error."""
        incomplete = error.code is Code.WORKER_INCOMPLETE
        whole = isinstance(self.delivery, Whole) and self.rescue is None
        if whole and incomplete and not worker.is_llama_server:
            # It may be one that does not mark the end of a stream.
            return refusal_of_assembly(UnfoldableError("the stream has no end"))
        return refusal_of(error)

    def _go_on(self, relay: Relay, error: WorkerError) -> None:
        assert self.delivery is not None, self
        self.lost = self.lost or error
        if self.rescue is not None:
            if self.rescue.broke():
                self.record.rescued = self.rescue.count
                self.attempts.resume()
                if not self._goes_on(self.rescue):
                    self.rescue = None
            return
        if not self.body or isinstance(error, ToldError):
            return
        model, relayed = self.attempts.pool.model, relay.relayed()
        if relayed is not None and isinstance(self.delivery, Stream):
            relayed = relayed.removesuffix(self.delivery.withdraw())
        chat = self.incoming.endpoint.chat
        rescue = Rescue.begin(self.body, model, chat, relayed)
        if rescue is not None and self._goes_on(rescue):
            self.rescue = rescue
            self.delivery.send(rescue.partial.mend)
            self.attempts.resume()

    def _goes_on(self, rescue: Rescue) -> bool:
        """Whether what is there of an answer is of use.

        A client that has nothing of it may as well get another one, so there is no need
        to have the same one generated again.
        """
        return self.fed or rescue.exhausted or rescue.can_continue

    def pause_before_next(self, refusal: Refusal) -> float | None:
        """Decide whether somebody is asked again, and when; None if this is final."""
        self.last = refusal
        if not self.incoming.untouched or (self.fed and self.rescue is None):
            return None
        if refusal.overflow is not None and refusal.overflow.tokens:
            self.attempts.needs[self.attempts.pool.model] = refusal.overflow.tokens
        failure = refusal.failure
        if failure is Failure.STREAM:
            self.rescue = None
        if self.rescue is None and self.rewritten:
            failure = self._doubt(refusal)
        elif self.rescue is not None and failure in (None, Failure.STATUS):
            if self._ask_for_all():
                # Not every server lets a client begin an answer for it.
                self.attempts.repeat()
                return 0.0
            # Another worker has taken this request, so it is not the request's fault.
            failure = failure or Failure.MALFORMED
        return self.attempts.retry_after(failure, refusal.busy)

    def _doubt(self, refusal: Refusal) -> Failure:
        """Ask for what the client has written, if that may do what this has not done.

        No 4xx to a body that the hub has changed is the client's fault.
        """
        failure = refusal.failure or Failure.STREAM
        if failure in (Failure.STREAM, Failure.STATUS) and refusal.lasting:
            self.suspect = self._suspect(self.attempts.tried[-1])
        return failure

    def prove(self, worker: Worker) -> None:
        """Take in that a worker has answered what the client has written."""
        suspect = self.suspect
        if suspect is not None and suspect.worker == worker.name:
            self.unstreamed.add(suspect)

    def may_wait(self) -> bool:
        """Return whether to wait for a worker that can continue the answer."""
        return self.rescue is not None and self.attempts.can_wait(0.0)

    def _ask_for_all(self) -> bool:
        """Have the last worker begin anew; False if it has done so."""
        assert self.rescue is not None, self
        if self.fed:
            return self.rescue.ask_for_all()
        self.rescue = None  # it need not even say the same
        return True

    def give_up(self) -> web.StreamResponse:
        """Tell the client what nobody could make up for.

        Raises:
            ProxyError: that is one, or the client has a part of an answer already.
        """
        if self.lost is not None and (self.fed or self.rescue is not None):
            raise self.lost  # a refusal to go on is nothing that the client asked for
        assert self.last is not None, self
        if self.last.overflow is not None:
            native = self.incoming.endpoint.api is Api.NATIVE
            too_long = self.attempts.too_long(self.last.overflow, native=native)
            assert too_long is not None, self
            raise too_long
        if isinstance(self.last.told, ProxyError):
            raise self.last.told
        self.record.outcome = Outcome.REFUSED
        if self.begun and self.delivery is not None:
            return self.delivery.refuse(self.last.told)
        return in_shape_of(self.incoming.endpoint.api, self.last.told)

    def break_off(self, error: ProxyError) -> web.StreamResponse:
        """End an answer that has begun and cannot be completed."""
        assert self.delivery is not None, self
        return self.delivery.break_off(error)

    def drop_client(self) -> web.StreamResponse:
        """Hang up on a client that does not read."""
        assert isinstance(self.delivery, Stream), self
        return self.delivery.drop()

    def settle_blame(self, worker: Worker) -> None:
        """Settle whose fault a 5xx was, now that somebody has done better."""
        model = self.attempts.pool.model
        for culprit in self.attempts.succeeded():
            culprit.breaker_of(model).record(Verdict.FAILURE)
        if model in worker.model_breakers:
            worker.breaker_of(model).record(Verdict.SUCCESS)
