"""The admission queue: a lease for each attempt, at once or after a wait.

`Admission` decides which request is next; requests wait here, each on one future.  A
slot is handed out as a lease, so that no other request can have it between the turn and
the moment when its task runs.  The slot is free again when the lease is released.

A request waits for one of two things:

* a slot, while workers are available for it: until its turn comes, another request
  displaces it, `queue.timeout` is over, or no worker is available any more;
* a worker, while none is available for it: until a worker comes back, for at most as
  many seconds as its `patience`, and only as long as its plan sees a chance of one.

While a sleeping machine is being woken for it, a request waits for a slot of that one.

Where several hubs share the workers, each hands out only the slots that it holds.
`on_wait` is called while requests wait here, `wants()` lists what they wait for, and
`grant()` serves one subject with a slot that it got in its turn among all hubs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Container, Iterator
from functools import partial
from itertools import filterfalse
from operator import attrgetter
from typing import NamedTuple, Protocol

from gollama_proxy.config.settings import Queue as Settings
from gollama_proxy.config.settings import Wake
from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.registry import Listener
from gollama_proxy.fleet.wake import Waker
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Admission, Place
from gollama_proxy.scheduling.balancer import Balancer, Plan
from gollama_proxy.scheduling.turns import Priority, Subject, Ticket

# Seconds between two notices to a client that waits.
EVERY = 5.0


class Waking(NamedTuple):
    """Instead of a place: a request waits for a machine that is being woken."""

    worker: str

    def __str__(self) -> str:
        return f"waking {self.worker}"


# Seconds after which a request looks again whether its machine is still being woken.
WAKING_CHECK = 1.0

# Workers that hubs share among which a request may wait for a better one.
MOST_COMPARED = 64

_is_full = attrgetter("full")

Notify = Callable[[Place | Waking], Awaitable[None]]
CallLater = Callable[[float, Callable[[], object]], asyncio.TimerHandle]


class Request(Protocol):
    """What the queue reads of a request, and what it keeps there."""

    @property
    def subject(self) -> str: ...
    @property
    def priority(self) -> Priority: ...
    @property
    def max_concurrency(self) -> int:
        """Requests of the subject that may run at once; 0 is no limit."""

    @property
    def needs_slot(self) -> bool:
        """Whether its attempts generate; others are not limited by slots."""

    @property
    def plan(self) -> Plan: ...

    ticket: Ticket | None  # while it waits
    holder: Subject | None  # once it was admitted
    waited: float  # seconds for which no worker was available for it


class _Waiter(NamedTuple):
    """A request that waits for a slot; None sends it back to its plan."""

    plan: Plan
    future: asyncio.Future[Lease | None]


class Queue(Listener):
    """Hands out the slots of all workers.  `clock` returns monotonic seconds.

    `call_later` takes the place of the event loop's.
    """

    def __init__(
        self,
        balancer: Balancer,
        settings: Settings,
        clock: Callable[[], float],
        call_later: CallLater | None = None,
        waker: Waker | None = None,
    ) -> None:
        self.admission = Admission(settings, clock)
        self.admission.on_displaced = self._displace
        self._balancer = balancer
        self._waker = waker or Waker(Wake(), lambda worker: None, clock)
        self._registry = balancer.registry
        self._clock = clock
        self._call_later = call_later
        self._notice = settings.notice
        self._waiters: dict[Ticket, _Waiter] = {}
        # Had their turn, and cannot have the slots that are free, or do not want them.
        self._passed_over: list[Ticket] = []
        self._stranded: dict[asyncio.Future[None], Plan] = {}  # without a worker
        # Called when requests wait for slots and there is none to hand out.
        self.on_wait: Callable[[], None] | None = None
        self._registry.subscribe(self)

    def __repr__(self) -> str:
        return (
            f"<Queue {self.admission!r} passed_over={len(self._passed_over)} "
            f"stranded={len(self._stranded)}>"
        )

    def reconfigure(self, settings: Settings) -> None:
        """Take other settings; requests that wait keep the time that they have."""
        self.admission.settings = settings
        self._notice = settings.notice

    # --- The fleet ----------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        worker.on_free = self.look_for_slots
        self.look_for_slots()

    def removed(self, worker: Worker) -> None:
        self.look_again()

    def changed(self, worker: Worker) -> None:
        if not worker.takes_requests:
            self.look_again()

    # --- What a request does ------------------------------------------------------

    def try_acquire(self, request: Request) -> Lease | None:
        """Return a lease if the request may have one at once; None if it has to wait.

        It has to wait if no slot is free, if other requests go first, if its subject
        is at its limit, or if the policy wants a worker of which this hub has no slot,
        and may get one.
        """
        plan, admission = request.plan, self.admission
        candidates = plan.candidates()
        model = plan.pool.model
        if not request.needs_slot:
            worker = self._balancer.pick(plan, candidates) if candidates else None
            return None if worker is None else worker.lease(model, slot=False)
        free = [*filterfalse(_is_full, candidates)]  # cheaper than a comprehension
        if not free:
            return None
        new = request.holder is None
        if request.holder is None:
            request.holder = admission.admit(
                request.subject, model, request.priority, request.max_concurrency
            )
            if request.holder is None:
                return None
        patience = 0.0
        if plan.ask.prefixes and admission.waiting < admission.settings.size:
            # It has room to wait for the worker that knows its conversation.
            patience = admission.patience
        worker = self._balancer.pick(plan, free, patience)
        if worker is None:
            return None
        if worker.short:
            if new:  # it has no claim to go before the requests of other hubs
                admission.release(request.holder)
                request.holder = None
            return None
        return worker.lease(model)

    async def acquire(
        self, request: Request, patience: float = 0.0, notify: Notify | None = None
    ) -> Lease:
        """Wait for a lease of a worker for the next attempt.

        A request for which no worker is available waits for one, for `patience`
        seconds over all calls, as long as its plan sees a chance.  `notify` is awaited
        with its place after `queue.notice` seconds in the queue, and then repeatedly.
        When the request has ended, `leave()` gives back its place.

        Raises:
            NoWorkerError: 503 no worker is available, 429 the queue is full, 503 the
                wait for a slot took too long.
        """
        first = False
        while True:
            lease = self.try_acquire(request)
            if lease is not None:
                return lease
            first = first or request.holder is not None
            if request.plan.candidates() or self._wakes_for(request):
                lease = await self._wait_for_slot(request, notify, first=first)
                if lease is not None:
                    return lease
                first = True
            elif not await self._wait_for_worker(request, patience):
                workers = request.plan.pool.workers
                note = self._waker.refusal(workers)
                raise self._balancer.no_worker(request.plan, note)

    def _wakes_for(self, request: Request) -> bool:
        """Wake a machine that can serve a request, if one is asleep and needed."""
        plan = request.plan
        return request.needs_slot and bool(self._waker.wake_for(plan.pool, plan.awaits))

    def leave(self, request: Request) -> None:
        """End the request's stay, which may let in another one of its subject."""
        if request.holder is not None:
            self.admission.release(request.holder)
            request.holder = None
            if self._waiters:
                self.hand_out()

    # --- Waiting for a slot -------------------------------------------------------

    async def _wait_for_slot(
        self, request: Request, notify: Notify | None, *, first: bool
    ) -> Lease | None:
        """Wait in the queue; None if the plan has to be consulted again.

        With `first` the request goes before all others: a worker has failed it.
        """
        ticket = self._join(request, first=first)
        future: asyncio.Future[Lease | None]
        future = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = _Waiter(request.plan, future)
        left = self.admission.deadline(ticket) - self._clock()
        timer = self._after(left, partial(self._expire, ticket))
        lease = None
        try:
            if self.on_wait is None or not any(
                worker.short for worker in request.plan.candidates()
            ):
                self.hand_out()
            else:  # it is better to ask for a slot than to use another worker's
                self.on_wait()
            if notify is not None and self._notice:
                await self._notify(ticket, future, notify)
            lease = await future
        except BaseException:
            _release(future)
            raise
        finally:
            timer.cancel()
            del self._waiters[ticket]
            request.ticket = None
            if lease is not None:
                request.holder = self.admission.keep(ticket)
            else:
                if ticket in self._passed_over:
                    self._passed_over.remove(ticket)
                self.admission.leave(ticket)
                self.hand_out()
        return lease

    def _join(self, request: Request, *, first: bool) -> Ticket:
        if request.holder is not None:
            self.admission.release(request.holder)
            request.holder = None
        model = request.plan.pool.model
        subject, limit = request.subject, request.max_concurrency
        try:
            request.ticket = self.admission.join(
                subject, model, request.priority, limit, first=first
            )
        except BaseException:
            self.hand_out()  # the place that was given up may let in another request
            raise
        return request.ticket

    async def _notify(
        self, ticket: Ticket, future: asyncio.Future[Lease | None], notify: Notify
    ) -> None:
        """Notify the client of its place now and then until the future is done."""
        wait = self._notice
        while not future.done():
            due = asyncio.get_running_loop().create_future()
            timer = self._after(wait, partial(_finish, due))
            try:
                await asyncio.wait((future, due), return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
            if not future.done():
                await notify(self._place(ticket))
                wait = EVERY

    def _place(self, ticket: Ticket) -> Place | Waking:
        plan = self._waiters[ticket].plan
        if not plan.pool.available:
            worker = self._waker.expected(plan.pool, plan.awaits)
            if worker is not None:
                return Waking(worker.name)
        return self.admission.place(ticket)

    def _expire(self, ticket: Ticket) -> None:
        future = self._waiters[ticket].future
        if not future.done():
            future.set_exception(self.admission.too_late(ticket))

    def _displace(self, ticket: Ticket) -> None:
        future = self._waiters[ticket].future
        if not future.done():
            future.set_exception(self.admission.no_room(ticket.model))

    # --- Waiting for a worker -----------------------------------------------------

    async def _wait_for_worker(self, request: Request, patience: float) -> bool:
        """Wait until a worker is available; return False if there will be none."""
        plan, began = request.plan, self._clock()
        end = began + patience - request.waited
        try:
            while not plan.candidates():
                left = end - self._clock()
                if any(self._waker.wake_for(p, plan.awaits) for p in plan.pools):
                    left = WAKING_CHECK
                elif left <= 0 or not plan.can_wait(left):
                    # A worker may have reopened between the two looks at the clock.
                    return bool(plan.candidates())
                # A breaker reopens by the clock; all else is a worker's transition.
                await self._wait_for_change(plan, min(left, plan.reopens_in()))
        finally:
            request.waited += self._clock() - began
        return True

    async def _wait_for_change(self, plan: Plan, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._stranded[future] = plan
        timer = self._after(seconds, partial(_finish, future))
        try:
            await future
        finally:
            timer.cancel()
            del self._stranded[future]

    def _after(
        self, seconds: float, callback: Callable[[], object]
    ) -> asyncio.TimerHandle:
        call_later = self._call_later or asyncio.get_running_loop().call_later
        return call_later(seconds, callback)

    # --- When something has changed -----------------------------------------------

    def look_for_slots(self) -> None:
        """Take in that a slot may have come free, or a worker come back."""
        if self._waiters:
            self.hand_out()
        if self._stranded:
            for future, plan in self._stranded.items():
                if plan.candidates():
                    _finish(future)

    def look_again(self) -> None:
        """Take in that workers may have changed in any way, or time has passed.

        Requests that wait for slots of a pool without workers go back to their plan:
        some have a fallback.
        """
        for waiter in self._waiters.values():
            plan = waiter.plan
            if not plan.pool.available and not (
                self._waker.expected(plan.pool, plan.awaits)
            ):
                _finish(waiter.future)
        self.look_for_slots()

    def hand_out(self) -> None:
        """Give the slots that are free to the requests that wait for them."""
        if not self._waiters:
            return
        self._passed_over = [
            each
            for each in self._passed_over
            if not self._serve(each, self._free_for(each))
        ]
        while models := [m for m in self.admission.wanted() if self._has_free(m)]:
            ticket = self.admission.next(models)
            assert ticket is not None, self
            if not self._serve(ticket, self._free_for(ticket)):
                self._passed_over.append(ticket)
        if self.on_wait is not None:
            self.on_wait()

    # --- Slots that hubs share ----------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether any request waits for a slot."""
        return bool(self._waiters)

    def wants(
        self, most: int, asked: Container[Ticket] = ()
    ) -> Iterator[tuple[Ticket, list[Worker]]]:
        """Yield requests that wait for a slot, with the workers that they wait for.

        Those of each model in the order of their turns, at most `most` of them, after
        those that have had their turn and wait for a better worker.  A request waits
        for the worker that its policy prefers, of those that are not full, and once
        that has been `asked` in vain, for any.
        """
        for ticket in self._passed_over[:most]:
            yield ticket, self._acceptable(ticket)
        # Most requests for a model have one list of candidates in common.
        known: list[Worker] = []
        free: list[Worker] = []
        for model in self.admission.wanted():
            for ticket in self.admission.in_turn(model, most):
                workers = self._waiters[ticket].plan.candidates()
                if workers is not known:
                    known, free = workers, [*filterfalse(_is_full, workers)]
                if free and ticket not in asked:
                    yield ticket, self._preferred(ticket, free)
                else:
                    yield ticket, workers

    def _preferred(self, ticket: Ticket, free: list[Worker]) -> list[Worker]:
        """Return the one of some workers for which a request should wait, or others."""
        plan = self._waiters[ticket].plan
        patience = self._patience(ticket, plan.candidates())
        worker = self._balancer.pick(plan, free, patience, dry=True)
        return self._acceptable(ticket) if worker is None else [worker]

    def _acceptable(self, ticket: Ticket) -> list[Worker]:
        """Return the workers of which a request would take a slot."""
        plan = self._waiters[ticket].plan
        workers = plan.candidates()
        patience = self._patience(ticket, workers)
        if not patience:
            return workers
        pick = self._balancer.pick
        return [each for each in workers if pick(plan, [each], patience, dry=True)]

    def grant(self, worker: Worker, subject: str) -> bool:
        """Give a free slot of a worker to a request of one subject, whose turn it is.

        False if none of its requests can use the slot.
        """

        def able(ticket: Ticket) -> bool:
            plan, future = self._waiters[ticket]
            return not future.done() and worker in plan.candidates()

        for ticket in self._passed_over:
            own = ticket.subject == subject and able(ticket)
            if own and self._serve(ticket, [worker]):
                self._passed_over.remove(ticket)
                return True

        models = [
            model
            for model in self.admission.wanted()
            if worker in self._registry.pool(model).available
        ]
        while True:
            found = self.admission.take(subject, models, able)
            if found is None:
                return False
            if self._serve(found, [worker]):
                return True
            self._passed_over.append(found)

    def _has_free(self, model: str) -> bool:
        return any(map(_has_slot, self._registry.pool(model).available))

    def _free_for(self, ticket: Ticket) -> list[Worker]:
        return [*filter(_has_slot, self._waiters[ticket].plan.candidates())]

    def _serve(self, ticket: Ticket, free: list[Worker]) -> bool:
        """Give a ticket a slot of one of these workers, if it takes one."""
        plan, future = self._waiters[ticket]
        if future.done():
            return True
        if not free:
            return False
        patience = self._patience(ticket, plan.candidates())
        worker = self._balancer.pick(plan, free, patience)
        if worker is None:
            return False
        future.set_result(worker.lease(plan.pool.model))
        return True

    def _patience(self, ticket: Ticket, workers: Collection[Worker]) -> float:
        """Return the seconds for which a request may still wait for a better worker.

        Where hubs share many workers, none: each would have to be considered.
        """
        if self.on_wait is not None and len(workers) > MOST_COMPARED:
            return 0.0
        return max(ticket.joined_at + self.admission.patience - self._clock(), 0.0)


def _has_slot(worker: Worker) -> bool:
    return not (worker.full or worker.short)


def _finish(future: asyncio.Future[None] | asyncio.Future[Lease | None]) -> None:
    if not future.done():
        future.set_result(None)


def _release(future: asyncio.Future[Lease | None]) -> None:
    """Give back what a request was given that does not wait for it any more."""
    if future.cancel() or future.cancelled() or future.exception() is not None:
        return
    if (lease := future.result()) is not None:
        lease.release(Result.CLIENT_GONE)
