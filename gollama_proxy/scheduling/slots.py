"""A slot for each attempt: taken at once where one is free, waited for where none is.

The line (admission.py) decides who is next; this is where requests wait, each on a
future of its own.  A slot is handed out by taking the lease, so that nobody else
can have it between the turn and the one who takes it.  It is free again when the lease
is given back: that is the one place that counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from gollama_proxy.fleet.lease import Lease, Result
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.admission import Line
from gollama_proxy.scheduling.balancer import Balancer
from gollama_proxy.scheduling.outlook import Place
from gollama_proxy.scheduling.retry import Attempts
from gollama_proxy.scheduling.ticket import Priority, Ticket

# Seconds between two comments to a client that waits.
EVERY = 5.0
# Longest wait, in seconds, for the worker that has a conversation in its prompt cache
# while another one is free.  It does not grow with `queue.timeout`, which is the time
# before a request fails; this request could be answered at once.
MOST_PATIENCE = 30.0

Tell = Callable[[Place], Awaitable[None]]
Seat = tuple[Worker, Lease]


class Claim(NamedTuple):
    """What a request may have of the slots."""

    subject: str
    priority: Priority = Priority.INTERACTIVE
    limit: int = 0  # requests of the subject that run at once; 0 is no limit


class _Waiter(NamedTuple):
    """A request that waits; None is the answer that it had better look again."""

    attempts: Attempts
    future: asyncio.Future[Seat | None]


class Slots:
    """Hands the slots of all workers out."""

    def __init__(
        self, balancer: Balancer, line: Line, clock: Callable[[], float]
    ) -> None:
        self.line = line
        self._balancer = balancer
        self._clock = clock
        self._patience = min(MOST_PATIENCE, line.limits.timeout / 2)
        self._waiters: dict[Ticket, _Waiter] = {}
        # Had their turn, and may not have the slots that are free, or do not want them.
        self._held_up: list[Ticket] = []
        line.on_displaced = self._displace
        for worker in balancer.registry.workers:
            worker.on_free = self.hand_out

    def __repr__(self) -> str:
        return f"<Slots {self.line!r} held_up={len(self._held_up)}>"

    # --- What a request does ------------------------------------------------------

    async def take(self, entry: Entry) -> Seat:
        """Take a slot of a worker for the next attempt.

        Raises:
            NoWorkerError: 503 nobody is there, 429 the line is full, 503 the wait was
                too long.
        """
        while True:
            candidates = self._balancer.candidates(entry.attempts)
            free = [worker for worker in candidates if worker.free > 0]
            if free and entry.goes_in(self.line):
                # It may wait for another worker than those, if there is room.
                patience = self._patience if self.line.has_room else 0.0
                worker = self._balancer.pick(entry.attempts, free, patience)
                if worker is not None:
                    return worker, worker.lease(entry.attempts.pool.model)
            seat = await self._wait(entry)
            if seat is not None:
                return seat
            self.leave(entry)

    async def _wait(self, entry: Entry) -> Seat | None:
        ticket = entry.queue(self.line)
        future = asyncio.get_running_loop().create_future()
        waiter = self._waiters[ticket] = _Waiter(entry.attempts, future)
        try:
            async with asyncio.timeout(self.line.deadline(ticket) - self._clock()):
                self.hand_out()
                await entry.until(future, self.line)
                return waiter.future.result()
        except TimeoutError:
            error = self.line.too_late(ticket)
            self._drop(entry, ticket, waiter)
            raise error from None
        except BaseException:
            self._drop(entry, ticket, waiter)
            raise
        finally:
            self._waiters.pop(ticket, None)

    def _drop(self, entry: Entry, ticket: Ticket, waiter: _Waiter) -> None:
        """Give back what somebody was given who does not wait for it any more."""
        future = waiter.future
        given = future.done() and not future.cancelled() and not future.exception()
        if given and (seat := future.result()) is not None:
            seat[1].release(Result.CLIENT_GONE)
        future.cancel()
        if ticket in self._held_up:
            self._held_up.remove(ticket)
        self.leave(entry)

    def leave(self, entry: Entry) -> None:
        """End a request's stay, which may let another one of its subject in."""
        if entry.ticket is not None:
            self.line.leave(entry.ticket)
            entry.ticket = None
            self.hand_out()

    # --- Who is next --------------------------------------------------------------

    def hand_out(self) -> None:
        """Give the slots that are free to those who wait for them."""
        if not self._waiters:
            return
        self._held_up = [each for each in self._held_up if not self._seat(each)]
        while models := [m for m in self.line.wanted() if self._has_free(m)]:
            ticket = self.line.next(models)
            if ticket is None:
                return
            if not self._seat(ticket):
                self._held_up.append(ticket)

    def look_again(self) -> None:
        """Send those back whom nobody is there for any more: some have a fallback."""
        for waiter in self._waiters.values():
            if not waiter.attempts.pool.available and not waiter.future.done():
                waiter.future.set_result(None)
        self.hand_out()

    def _has_free(self, model: str) -> bool:
        return any(
            worker.free > 0 for worker in self._balancer.registry.pool(model).available
        )

    def _seat(self, ticket: Ticket) -> bool:
        """Give a ticket its slot, if there is one that it may have."""
        attempts, future = self._waiters[ticket]
        if future.done():
            return True
        free = [worker for worker in attempts.candidates() if worker.free > 0]
        if not free:
            return False
        patience = ticket.joined_at + self._patience - self._clock()
        worker = self._balancer.pick(attempts, free, max(patience, 0.0))
        if worker is None:
            return False
        future.set_result((worker, worker.lease(attempts.pool.model)))
        return True

    def _displace(self, ticket: Ticket) -> None:
        waiter = self._waiters.get(ticket)
        if waiter is not None and not waiter.future.done():
            waiter.future.set_exception(self.line.no_room(ticket.model))


class Entry:
    """One request's way in, and its place in the line while it has one."""

    __slots__ = ("_claim", "_notice", "_seated", "_tell", "attempts", "ticket")

    def __init__(self, attempts: Attempts, claim: Claim) -> None:
        self.attempts = attempts
        self.ticket: Ticket | None = None
        self._claim = claim
        self._tell: Tell | None = None
        self._notice = 0.0
        self._seated = False  # it has had a slot, so it goes first from now on

    def tell(self, tell: Tell, notice: float) -> None:
        """Have this called after `notice` seconds of waiting, and then now and then."""
        if notice:
            self._tell, self._notice = tell, notice

    def __repr__(self) -> str:
        return f"<Entry {self.ticket!r}>"

    def goes_in(self, line: Line) -> bool:
        """Go in past the line, if that is fair."""
        if self.ticket is None:
            self.ticket = line.admit(
                self._claim.subject,
                self.attempts.pool.model,
                self._claim.priority,
                self._claim.limit,
            )
        self._seated = self._seated or self.ticket is not None
        return self.ticket is not None

    def queue(self, line: Line) -> Ticket:
        """Stand in line; in front, if a worker has failed the request.

        Raises:
            NoWorkerError: 429, there is no room.
        """
        if self.ticket is not None:
            line.leave(self.ticket)
        self.ticket = None
        self.ticket = line.join(
            self._claim.subject,
            self.attempts.pool.model,
            self._claim.priority,
            self._claim.limit,
            first=self._seated,
        )
        self._seated = True
        return self.ticket

    async def until(self, future: asyncio.Future[Seat | None], line: Line) -> None:
        """Wait for a slot, and tell the client of it now and then."""
        wait = self._notice or None
        while not future.done():
            await asyncio.wait([future], timeout=wait)
            if self._tell is not None and self.ticket is not None and not future.done():
                await self._tell(line.place(self.ticket))
                wait = EVERY
