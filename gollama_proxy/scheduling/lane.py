"""Whose turn it is among the subjects that wait for one model, in one class.

Theory of operation
===================

Turns go in rounds, and in a round every subject has one.  Within a subject it is first
come, first served.

    now     subjects that have not had their turn in this round
    after   those that have had it and have more to come, and those that run already

A turn is taken from the front of `now`; its subject goes to the end of `after`.  When
`now` is empty, the round is over, and `after` becomes `now`.

Whoever comes new, and has nothing running, still has a turn in the round of the day,
before everybody's second one.  So a load test that waits with 200 requests and holds
all slots does not delay a chat by more than the slot that comes free next.  Who has had
a turn and comes again within the round waits for the next one, also if nothing of it
was waiting in between: else two that take turns at coming could keep out a third.

A round ends early after `most` turns, lest ever new subjects keep it open.

Who is in `now` or `after` may go in.  A subject at its limit of running requests is
withheld: it keeps its tickets, and is in neither.

Lanes of several models can be served as one, by a worker that has them all: who is in
front of each is compared by the tick of its coming, of one counter for all lanes; a
turn counts in all of them; and their round is over when it is over in all of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from gollama_proxy.scheduling.ticket import Priority, Ticket


class Lane:
    """The subjects that wait for one model, in one class, and their tickets.

    All steps take constant time, on average, but `order()`.
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
        self.waiting = 0  # tickets, those of withheld subjects included
        self._most = most
        self._ticks = ticks
        self._queues: dict[str, OrderedDict[Ticket, None]] = {}
        # Each subject with the tick of its coming; ordered dicts give up their first
        # entry in constant time, and any other one, too.
        self._now: OrderedDict[str, int] = OrderedDict()
        self._after: OrderedDict[str, int] = OrderedDict()
        self._had: set[str] = set()  # a turn in this round

    def __repr__(self) -> str:
        return (
            f"<Lane {self.model!r} {self.priority} waiting={self.waiting} "
            f"now={[*self._now]} after={[*self._after]}>"
        )

    # --- Tickets ------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """Put a ticket behind the others of its subject, or in front of them."""
        queue = self._queues.setdefault(ticket.subject, OrderedDict())
        queue[ticket] = None
        if ticket.first:
            queue.move_to_end(ticket, last=False)
        self.waiting += 1

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out; say whether it was the last of its subject."""
        queue = self._queues[ticket.subject]
        del queue[ticket]
        self.waiting -= 1
        if not queue:
            del self._queues[ticket.subject]
            self.withhold(ticket.subject)
        return not queue

    def oldest(self, subject: str) -> Ticket | None:
        return next(iter(self._queues.get(subject, ())), None)

    def newest(self, subject: str) -> Ticket:
        return next(reversed(self._queues[subject]))

    # --- Subjects -----------------------------------------------------------------

    def enter(self, subject: str, *, late: bool, first: bool = False) -> None:
        """Let a subject with tickets go in when its turn comes.

        `late` is not before the next round; `first` is before everybody else.
        """
        if first:
            self.withhold(subject)
            self._now[subject] = -next(self._ticks)
            self._now.move_to_end(subject, last=False)
        elif subject not in self._now and subject not in self._after:
            ring = self._after if late or subject in self._had else self._now
            ring[subject] = next(self._ticks)

    def withhold(self, subject: str) -> None:
        """Pass a subject over until it enters again."""
        self._now.pop(subject, None)
        self._after.pop(subject, None)

    # --- Turns --------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether there is somebody who may go in."""
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
        """When the one came whose turn it is; infinite if nobody's is in this round."""
        return next(iter(self._now.values()), math.inf)

    @property
    def front(self) -> str:
        """The subject whose turn it is in this round; there has to be one."""
        return next(iter(self._now))

    def had_turn(self, subject: str) -> None:
        """Note that a subject had its turn, here or in a lane that is served along."""
        self._had.add(subject)
        if subject in self._now or subject in self._after:
            self.withhold(subject)
            self._after[subject] = next(self._ticks)

    def order(self) -> Iterator[Ticket]:
        """Yield all tickets in the order of their turns, should nobody else come.

        Those of withheld subjects come last.
        """
        ring = [*self._now, *self._after]
        withheld = sorted(self._queues.keys() - ring)
        for subjects in ring, withheld:
            yield from _in_turn(self._queues[subject] for subject in subjects)


def _in_turn(queues: Iterable[Iterable[Ticket]]) -> Iterator[Ticket]:
    waiting = deque(map(iter, queues))
    while waiting:
        queue = waiting.popleft()
        for ticket in queue:
            yield ticket
            waiting.append(queue)
            break


class Subject:
    """What somebody has waiting and running."""

    __slots__ = ("lanes", "limit", "name", "running", "withheld")

    def __init__(self, name: str) -> None:
        self.name = name
        self.limit = 0  # of what may run at once; 0 is none
        self.running = 0
        self.withheld = False  # for having reached it
        self.lanes: dict[Lane, None] = {}  # where it waits

    def __repr__(self) -> str:
        return f"<Subject {self.name!r} running={self.running} of {self.limit}>"

    def review(self) -> None:
        """Withhold it from its lanes, or let it enter, if its limit says so by now."""
        withheld = 0 < self.limit <= self.running
        if withheld == self.withheld:
            return
        self.withheld = withheld
        for lane in self.lanes:
            if withheld:
                lane.withhold(self.name)
            else:
                lane.enter(self.name, late=self.running > 0)
