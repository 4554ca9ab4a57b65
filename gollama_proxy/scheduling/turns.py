"""Tickets of requests, and the order in which their subjects take turns.

Theory of operation
===================

The requests that wait for one model in one class form `Rounds`.  In each round every
subject has one turn; the requests of one subject are served in order of arrival.

    now     subjects that have not had their turn in this round
    after   subjects that have had it and have more requests waiting, and subjects
            that have requests running

A turn is taken from the front of `now`, and its subject moves to the end of `after`.
When `now` is empty the round is over, and `after` becomes `now`.

A subject that arrives with nothing running has a turn in the current round, before any
other subject has its second one.  So a load test that holds all slots and has 200
requests waiting delays a chat by no more than the next slot that comes free.  A subject
that has had its turn and sends another request in the same round waits for the next
round, even if it had nothing waiting in between: otherwise two subjects that alternate
could keep out a third.

A round ends early after `most` turns, so that a stream of new subjects cannot keep it
open.

Subjects in `now` and `after` may be admitted.  A subject at its limit of running
requests is withheld: it keeps its tickets and is in neither.

The rounds of several models are served as one by a worker that serves them all: their
fronts are compared by the tick of arrival, which comes from one counter for all of
them; a turn counts in each of them; and the round is over when it is over in each.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from gollama_proxy.wire.errors import Code, RequestError


class Priority(enum.StrEnum):
    """The classes of requests, the class that is served first at the top."""

    INTERACTIVE = "interactive"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """Its place among the classes: lower ranks are served first."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


def choose_priority(requested: str | None, allowed: Priority) -> Priority:
    """Return the class of a request that asks for one, or for none.

    `allowed` is the highest class that its token may use, and the default.

    Raises:
        RequestError: 400 no such class, 403 a class above the allowed one.
    """
    if requested is None:
        return allowed
    known = {str(priority): priority for priority in Priority}
    priority = known.get(requested.strip().lower())
    if priority is None:
        text = f"The priority {requested[:40]!r} does not exist; "
        text += f"known: {', '.join(known)}."
        raise RequestError(Code.INVALID_VALUE, text)
    if priority.rank < allowed.rank:
        text = (
            f"Your token does not allow the priority {str(priority)!r}, "
            f"only {str(allowed)!r}."
        )
        raise RequestError(Code.PRIORITY_NOT_ALLOWED, text)
    return priority


# --- Tickets ----------------------------------------------------------------------


class TicketState(enum.Enum):
    """A ticket starts as waiting, and ends once."""

    WAITING = "waiting"
    RUNNING = "running"
    LEFT = "left"  # while it was waiting
    DISPLACED = "displaced"  # it made room for another subject's request
    DONE = "done"  # after it was running


class Ticket:
    """A request that has to wait for a slot.  Only `Admission` changes it."""

    __slots__ = ("joined_at", "model", "number", "priority", "state", "subject")

    def __init__(
        self,
        number: int,
        subject: str,
        model: str,
        priority: Priority,
        joined_at: float,
    ) -> None:
        self.number = number  # later tickets have higher ones; negative goes first
        self.subject = subject
        self.model = model
        self.priority = priority
        self.joined_at = joined_at  # monotonic seconds
        self.state = TicketState.WAITING

    @property
    def first(self) -> bool:
        """Whether it goes before all others of its class."""
        return self.number < 0

    def __repr__(self) -> str:
        return (
            f"<Ticket {self.number} of {self.subject!r} for {self.model!r} "
            f"{self.priority} {self.state.name}>"
        )


# --- Turns ------------------------------------------------------------------------


class Rounds:
    """The subjects that wait for one model in one class, and their tickets.

    Every step but `order()` and `turns()` takes constant time on average.
    """

    __slots__ = (
        "_after",
        "_had",
        "_most",
        "_now",
        "_queues",
        "_ticks",
        "model",
        "priority",
        "waiting",
    )

    def __init__(
        self, model: str, priority: Priority, most: int, ticks: Iterator[int]
    ) -> None:
        self.model, self.priority = model, priority
        self.waiting = 0  # tickets, including those of withheld subjects
        self._most = most
        self._ticks = ticks
        self._queues: dict[str, OrderedDict[Ticket, None]] = {}
        # Each subject with the tick of its arrival.  Ordered dicts give up their first
        # entry in constant time, and any other entry too.
        self._now: OrderedDict[str, int] = OrderedDict()
        self._after: OrderedDict[str, int] = OrderedDict()
        self._had: set[str] = set()  # subjects that had a turn in this round

    def __repr__(self) -> str:
        return (
            f"<Rounds {self.model!r} {self.priority} waiting={self.waiting} "
            f"now={[*self._now]} after={[*self._after]}>"
        )

    def add(self, ticket: Ticket) -> None:
        """Put a ticket behind the others of its subject, or before them."""
        queue = self._queues.setdefault(ticket.subject, OrderedDict())
        queue[ticket] = None
        if ticket.first:
            queue.move_to_end(ticket, last=False)
        self.waiting += 1

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out; return whether it was the last one of its subject."""
        queue = self._queues[ticket.subject]
        del queue[ticket]
        self.waiting -= 1
        if not queue:
            del self._queues[ticket.subject]
            self.withhold(ticket.subject)
        return not queue

    def oldest(self, subject: str) -> Ticket | None:
        return next(iter(self.of(subject)), None)

    def newest(self, subject: str) -> Ticket:
        return next(reversed(self._queues[subject]))

    def enter(self, subject: str, *, late: bool, first: bool = False) -> None:
        """Admit a subject with tickets from now on, when its turn comes.

        `late` means not before the next round; `first` means before all others.
        """
        if first:
            self.withhold(subject)
            self._now[subject] = -next(self._ticks)
            self._now.move_to_end(subject, last=False)
        elif subject not in self._now and subject not in self._after:
            ring = self._after if late or subject in self._had else self._now
            ring[subject] = next(self._ticks)

    def withhold(self, subject: str) -> None:
        """Skip a subject until it enters again."""
        self._now.pop(subject, None)
        self._after.pop(subject, None)

    @property
    def open(self) -> bool:
        """Whether any subject may be admitted."""
        return bool(self._now or self._after)

    @property
    def over(self) -> bool:
        """Whether the round is over."""
        return not self._now or len(self._had) >= self._most

    def begin_round(self) -> None:
        self._had.clear()
        if self._now:
            self._now.update(self._after)
            self._after.clear()
        else:
            self._now, self._after = self._after, self._now

    @property
    def tick(self) -> float:
        """When the subject at the front arrived; infinite if the round has none."""
        return next(iter(self._now.values()), math.inf)

    @property
    def front(self) -> str:
        """The subject that has the next turn of this round; there has to be one."""
        return next(iter(self._now))

    def had_turn(self, subject: str) -> None:
        """Record a turn of a subject, here or in rounds that are served with these."""
        self._had.add(subject)
        if subject in self._now or subject in self._after:
            self.withhold(subject)
            self._after[subject] = next(self._ticks)

    def order(self) -> Iterator[Ticket]:
        """Yield all tickets in the order of their turns if no other request arrives.

        The tickets of withheld subjects come last.
        """
        yield from self.turns()
        withheld = sorted(self._queues.keys() - self._now.keys() - self._after.keys())
        yield from _in_turn(self._queues[subject] for subject in withheld)

    def turns(self) -> Iterator[Ticket]:
        """Yield the tickets of subjects that may be admitted, in their order."""
        ring = [*self._now, *self._after]
        yield from _in_turn(self._queues[subject] for subject in ring)

    def of(self, subject: str) -> Iterable[Ticket]:
        """Return the tickets of a subject, the oldest one first."""
        return self._queues.get(subject, ())


def _in_turn(queues: Iterable[Iterable[Ticket]]) -> Iterator[Ticket]:
    waiting = deque(map(iter, queues))
    while waiting:
        queue = waiting.popleft()
        for ticket in queue:
            yield ticket
            waiting.append(queue)
            break


# --- Subjects ---------------------------------------------------------------------


class Subject:
    """The requests that one subject has waiting and running."""

    __slots__ = ("elsewhere", "limit", "name", "rounds", "running", "withheld")

    def __init__(self, name: str, limit: int = 0, elsewhere: int = 0) -> None:
        self.name = name
        self.limit = limit  # of requests that run at once; 0 is no limit
        self.running = 0
        self.elsewhere = elsewhere  # requests that run at other hubs
        self.withheld = 0 < limit <= elsewhere  # because it has reached the limit
        self.rounds: dict[Rounds, None] = {}  # in which it waits

    def __repr__(self) -> str:
        return f"<Subject {self.name!r} running={self.running} of {self.limit}>"

    def review(self) -> None:
        """Withhold the subject from its rounds while it is at its limit."""
        withheld = 0 < self.limit <= self.running + self.elsewhere
        if withheld == self.withheld:
            return
        self.withheld = withheld
        for rounds in self.rounds:
            if withheld:
                rounds.withhold(self.name)
            else:
                rounds.enter(self.name, late=self.running > 0)


class Counts:
    """How many requests each subject has waiting in one class; all steps are O(1)."""

    __slots__ = ("_counts", "_most", "_ranks", "total")

    def __init__(self) -> None:
        self.total = 0
        self._counts: dict[str, int] = {}
        self._ranks: dict[int, OrderedDict[str, None]] = {}  # subjects by their count
        self._most = 0

    def __repr__(self) -> str:
        return f"<Counts {self._counts}>"

    @property
    def largest(self) -> str | None:
        """The subject with most requests; of several, the one that got there first."""
        return next(iter(self._ranks[self._most])) if self._most else None

    def count(self, subject: str) -> int:
        return self._counts.get(subject, 0)

    def add(self, subject: str) -> None:
        self._move(subject, 1)

    def remove(self, subject: str) -> None:
        self._move(subject, -1)

    def _move(self, subject: str, by: int) -> None:
        before = self._counts.pop(subject, 0)
        count = before + by
        if before:
            rank = self._ranks[before]
            del rank[subject]
            if not rank:
                del self._ranks[before]
        if count:
            self._counts[subject] = count
            self._ranks.setdefault(count, OrderedDict())[subject] = None
        if count > self._most or self._most not in self._ranks:
            self._most = count
        self.total += by
