"""The waiting line in front of the slots: who may go in next, and who not at all.

llama-server queues without a bound, tells a client that waits there nothing, and often
does not notice that it has left.  So requests wait here, until a slot is free.

Theory of operation
===================

`admit()`  A request goes in past the line, where a slot is free and nobody else is to
           have it.
`join()`   Otherwise it waits, if there is room.
`next()`   A slot has come free: whose turn is it, of those who wait for these models?
`leave()`  It is over, whether it was waiting or running.  To be called for each ticket,
           and at once when its client goes away.

There are no tasks and no futures here.  Who calls has these ready for the tickets that
wait, calls `next()` when a slot comes free and when somebody has left or joined, and
ends the wait at `deadline()`.

**Order.**  Classes are strict: as long as an interactive request waits that could go
in, no batch request does, be it for ever.  (Their own time limit is the bound.)  Within
a class the subjects take turns, see `lane.py`; across all the models that are given to
`next()`, a subject has one turn in a round.

**Limits.**  A subject with as many requests running as it may have at once, over all
models, waits, and its turn goes to others.  Its limit is what its last request said.

**Room.**  When `size` requests wait already, a newcomer can still have the place of a
batch request, if it is interactive itself, or else that of the subject which has most
waiting, if that is two more than its own at least.  The other's newest request is then
told that there is no room.  Else whoever sends many at once would keep out everybody.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection

from gollama_proxy.bounded import Remembered
from gollama_proxy.config.settings import Queue
from gollama_proxy.scheduling.crowd import Crowd
from gollama_proxy.scheduling.lane import Lane, Subject
from gollama_proxy.scheduling.outlook import Outlook, Place
from gollama_proxy.scheduling.ticket import Priority, State, Ticket
from gollama_proxy.wire.errors import Code, NoWorkerError

# Seconds, for a client that is sent away while nothing is known of the pace here; and
# the most that all versions of the official OpenAI SDK wait for.
RETRY_AFTER = 2
RETRY_AFTER_MOST = 60
# Models whose pace, and whose rounds, are remembered while nobody waits for them.
REMEMBERED = 1000


class Line:
    """Who waits for a slot.  `clock` gives monotonic seconds."""

    def __init__(self, limits: Queue, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.turns: Counter[Priority] = Counter()  # had, after waiting
        self.refused: Counter[Priority] = Counter()  # for want of room
        # Called with a ticket that had to make room for another one.
        self.on_displaced: Callable[[Ticket], None] | None = None
        self._clock = clock
        self._numbers, self._ticks = itertools.count(1), itertools.count(1)
        self._subjects: dict[str, Subject] = {}  # that have something here
        self._crowds = {priority: Crowd() for priority in Priority}
        # By model.  The lanes of a class are kept while anybody waits in it: who has
        # had a turn must not be forgotten before the others have.
        self._lanes: dict[Priority, dict[str, Lane]] = {p: {} for p in Priority}
        self._outlooks = Remembered[str, Outlook](REMEMBERED)

    def __repr__(self) -> str:
        counts = " ".join(f"{p}={crowd.total}" for p, crowd in self._crowds.items())
        return f"<Line {counts} subjects={len(self._subjects)}>"

    def __len__(self) -> int:
        return sum(crowd.total for crowd in self._crowds.values())

    # --- Going in -----------------------------------------------------------------

    def admit(
        self,
        subject: str,
        model: str,
        priority: Priority = Priority.INTERACTIVE,
        limit: int = 0,
    ) -> Ticket | None:
        """Let a request in at once, as a slot is free for it; None if it has to wait.

        `limit` is how many requests of its subject may run at once; 0 is no limit.
        """
        who = self._subject(subject, limit)
        passed = any(
            lane.open
            for lane in self._lanes_of(model)
            if lane.priority.rank <= priority.rank
        )
        if passed or who.withheld:
            self._forget(who)
            return None
        ticket = self._new_ticket(subject, model, priority, False)
        self._run(ticket, who)
        return ticket

    def join(
        self,
        subject: str,
        model: str,
        priority: Priority = Priority.INTERACTIVE,
        limit: int = 0,
        *,
        first: bool = False,
    ) -> Ticket:
        """Have a request wait for a slot of a worker that serves a model.

        With `first` it goes before all others of its class: its worker has failed it.

        Raises:
            NoWorkerError: 429, there is no room.
        """
        if not self.has_room:
            self._make_room(subject, model, priority)
        who = self._subject(subject, limit)
        ticket = self._new_ticket(subject, model, priority, first)
        lane = self._lane(model, priority)
        lane.add(ticket)
        who.lanes[lane] = None
        self._crowds[priority].add(subject)
        if not who.withheld:
            lane.enter(subject, late=who.running > 0, first=first)
        return ticket

    def next(self, models: Collection[str]) -> Ticket | None:
        """Let in whose turn it is of those who wait for one of these models.

        None if there is nobody who could go in.  It takes time in proportion to the
        number of models, and not to who waits.
        """
        for priority, crowd in self._crowds.items():
            if crowd.total:
                # Also where nobody waits now: a turn counts there for who comes later.
                lanes = [self._lane(model, priority) for model in models]
                if any(lane.open for lane in lanes):
                    return self._take_turn(lanes)
        return None

    def wanted(self) -> set[str]:
        """List the models that somebody waits for who could go in."""
        return {
            lane.model
            for lanes in self._lanes.values()
            for lane in lanes.values()
            if lane.open
        }

    def leave(self, ticket: Ticket) -> None:
        """End a ticket, whether it waits or runs; only the first call counts."""
        who = self._subjects.get(ticket.subject)
        if who is None:
            return
        if ticket.state is State.WAITING:
            self._take_out(ticket, State.LEFT)
        elif ticket.state is State.RUNNING:
            ticket.state = State.DONE
            who.running -= 1
            who.review()
        self._forget(who)

    # --- What it says -------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether one more can wait without taking another one's place."""
        return len(self) < self.limits.size

    def waiting(self, priority: Priority) -> int:
        return self._crowds[priority].total

    def running(self, subject: str) -> int:
        who = self._subjects.get(subject)
        return who.running if who is not None else 0

    def deadline(self, ticket: Ticket) -> float:
        """Tell until when a ticket may wait, in monotonic seconds."""
        return ticket.joined_at + self.limits.timeout

    def place(self, ticket: Ticket) -> Place:
        """Tell where a ticket is that waits; about, and at little cost."""
        lanes = self._lanes_of(ticket.model)
        waiting = sum(lane.waiting for lane in lanes)
        return self._outlook(ticket.model).place(
            ticket, waiting, lambda: (each for lane in lanes for each in lane.order())
        )

    def retry_after(self, model: str) -> int:
        """Tell in how many seconds those who wait for a model now will have gone in."""
        interval = self._outlook(model).interval
        if interval is None:
            return RETRY_AFTER
        waiting = sum(lane.waiting for lane in self._lanes_of(model))
        most = min(RETRY_AFTER_MOST, math.ceil(self.limits.timeout))
        return max(1, min(most, math.ceil(interval * waiting)))

    def no_room(self, model: str) -> NoWorkerError:
        """Make the error of a request that there is no room for, or not any more."""
        size = self.limits.size
        text = f"Too many requests are waiting: the limit is {size} (queue.size)."
        after = self.retry_after(model)
        return NoWorkerError(Code.QUEUE_FULL, text, retry_after=after)

    def too_late(self, ticket: Ticket) -> NoWorkerError:
        """Make the error of a ticket that has waited for too long, before it leaves."""
        who = self._subjects.get(ticket.subject)
        limit = f"within {self.limits.timeout:g} s (queue.timeout)"
        if who is not None and who.withheld:
            text = (
                f"None of your {who.running} running requests ended {limit}, "
                f"and no more than {who.limit} may run at once (max_concurrency)."
            )
        else:
            text = f"No slot for the model {ticket.model!r} came free {limit}."
        after = self.retry_after(ticket.model)
        return NoWorkerError(Code.QUEUE_TIMEOUT, text, retry_after=after)

    # --- Steps --------------------------------------------------------------------

    def _take_turn(self, lanes: list[Lane]) -> Ticket:
        if all(lane.over for lane in lanes):
            for lane in lanes:
                lane.begin_round()
        subject = min(lanes, key=lambda lane: lane.tick).front
        waiting = (lane.oldest(subject) for lane in lanes)
        ticket = min(filter(None, waiting), key=_number)
        for lane in lanes:
            lane.had_turn(subject)
        self.turns[ticket.priority] += 1
        self._outlook(ticket.model).had_turn()
        who = self._subjects[ticket.subject]
        self._take_out(ticket, State.RUNNING)
        self._run(ticket, who)
        return ticket

    def _run(self, ticket: Ticket, who: Subject) -> None:
        ticket.state = State.RUNNING
        who.running += 1
        who.review()

    def _take_out(self, ticket: Ticket, state: State) -> None:
        """Take a ticket that waits out of the line."""
        ticket.state = state
        crowd = self._crowds[ticket.priority]
        crowd.remove(ticket.subject)
        lanes = self._lanes[ticket.priority]
        if lanes[ticket.model].remove(ticket):
            del self._subjects[ticket.subject].lanes[lanes[ticket.model]]
        if not any(lane.waiting for lane in self._lanes_of(ticket.model)):
            self._outlook(ticket.model).pause()
        if not crowd.total:
            lanes.clear()

    def _make_room(self, subject: str, model: str, priority: Priority) -> None:
        """Have another request give up its place, if that is fair.

        Raises:
            NoWorkerError: it is not.
        """
        for lower in reversed(Priority):
            if lower.rank < priority.rank:
                break
            crowd = self._crowds[lower]
            name = crowd.largest
            enough = crowd.count(subject) + 2 if lower is priority else 1
            if name is not None and crowd.count(name) >= enough:
                self._displace(self._subjects[name], lower)
                return
        self.refused[priority] += 1
        raise self.no_room(model)

    def _displace(self, who: Subject, priority: Priority) -> None:
        lanes = (lane for lane in who.lanes if lane.priority is priority)
        newest = (lane.newest(who.name) for lane in lanes)
        ticket = max(newest, key=_number)
        self.refused[priority] += 1
        self._take_out(ticket, State.DISPLACED)
        self._forget(who)
        if self.on_displaced is not None:
            self.on_displaced(ticket)

    # --- Records ------------------------------------------------------------------

    def _new_ticket(
        self, subject: str, model: str, priority: Priority, first: bool
    ) -> Ticket:
        number = next(self._numbers)
        now = self._clock()
        return Ticket(-number if first else number, subject, model, priority, now)

    def _subject(self, name: str, limit: int) -> Subject:
        """Find, or make, what is known of a subject, which has this limit from now."""
        who = self._subjects.get(name)
        if who is None:
            who = self._subjects[name] = Subject(name)
        who.limit = limit
        who.review()
        return who

    def _forget(self, who: Subject) -> None:
        if not who.running and not who.lanes:
            self._subjects.pop(who.name, None)

    def _lane(self, model: str, priority: Priority) -> Lane:
        lanes = self._lanes[priority]
        if model not in lanes:
            if len(lanes) >= REMEMBERED:
                for lane in [each for each in lanes.values() if not each.waiting]:
                    del lanes[lane.model]
            most = max(self.limits.size, 1)
            lanes[model] = Lane(model, priority, most, self._ticks)
        return lanes[model]

    def _lanes_of(self, model: str) -> list[Lane]:
        return [lanes[model] for lanes in self._lanes.values() if model in lanes]

    def _outlook(self, model: str) -> Outlook:
        if model not in self._outlooks:
            self._outlooks[model] = Outlook(self._clock)
        return self._outlooks[model]


def _number(ticket: Ticket) -> int:
    return ticket.number
