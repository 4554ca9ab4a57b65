"""Which requests are admitted to a slot, which wait, and which are rejected.

llama-server queues without a bound, sends nothing to a client that waits there, and
often does not notice that the client has left.  So requests wait in the hub until a
slot is free.

Theory of operation
===================

`admit()`  lets a request pass at once, where a slot is free and no other request is
           entitled to it.  It needs no ticket; its subject's record holds its place.
`join()`   lets it wait otherwise, if there is room.
`next()`   names the request that gets a slot which has come free, of those that wait
           for these models.
`take()`   does the same for one subject: where hubs share a worker, they compare the
           turns of all subjects in the store, and it names the one that is next.
`leave()`  ends a ticket, waiting or running.  It is called for each ticket, and at once
           when the client goes away.
`release()` gives back the place of a request that runs and has no ticket, or no longer.

There are no tasks and no futures here: `Queue` has those.  It calls `next()` when a
slot comes free and when a request has joined or left, and ends each wait at its
`deadline()`.

**Order.**  Classes are strict: no batch request is admitted while an interactive one
waits that could be.  (Their own time limit bounds that wait.)  Within a class the
subjects take turns, see `turns.py`; over all models that are given to `next()`, a
subject has one turn in a round.

**Limits.**  A subject with as many running requests as it may have at once, over all
models, waits, and its turns go to others.  The limit is that of its last request.

**Room.**  When `size` requests wait already, a new request can still take the place of
a batch request, if it is interactive itself, or else of a request of the subject with
most requests waiting, if those are at least two more than its own.  The newest request
of that subject is rejected then.  Otherwise a subject that sends many requests at once
would keep out all others.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.settings import Queue as Settings
from gollama_proxy.scheduling.turns import (
    Counts,
    Priority,
    Rounds,
    Subject,
    Ticket,
    TicketState,
)
from gollama_proxy.wire.errors import Code, NoWorkerError

# Seconds that a rejected client waits before it tries again, while the pace is not
# known; and the most that all versions of the official OpenAI SDK wait for.
RETRY_AFTER = 2
RETRY_AFTER_MOST = 60
# Subjects that are kept while they have no request: most come back at once.
KEPT = 200
# Models whose pace and rounds are kept while no request waits for them.
REMEMBERED = 1000
# A new measurement counts for an eighth, as TCP smooths its round-trip times
# (RFC 6298, 2): a burst of turns is evened out, a change is followed within ten or so.
GAIN = 1 / 8
# Longest wait, in seconds, for the worker that has a conversation in its prompt cache
# while another one is free.  It does not grow with `queue.timeout`, which is the time
# before a request fails; this request could be answered at once.
MOST_PATIENCE = 30.0
AT_ONCE = 0.1  # seconds; a shorter wait was for the store, not for a slot
FRESH = 1.0  # seconds for which the places stay valid once they were counted


class Place(NamedTuple):
    """The place of a ticket in the queue: "3 of 7, in about 12 s"."""

    position: int  # from 1
    waiting: int  # for the same model, in all classes
    eta: float | None  # seconds; None while the pace is not known

    def __str__(self) -> str:
        eta = "" if self.eta is None else f" eta {math.ceil(self.eta)}s"
        return f"queued {self.position}/{self.waiting}{eta}"


class Admission:
    """The admission queue's decisions.  `clock` returns monotonic seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.turns: Counter[Priority] = Counter()  # of requests that had to wait
        self.refused: Counter[Priority] = Counter()  # for lack of room
        # Called with a ticket that had to make room for another one.
        self.on_displaced: Callable[[Ticket], None] | None = None
        self.waiting = 0  # requests, in all classes
        # How many requests of a subject run at other hubs (`note_elsewhere`).
        self.elsewhere: dict[str, int] = {}
        self._clock = clock
        self._numbers, self._ticks = itertools.count(1), itertools.count(1)
        # With requests waiting or running; the first ones stay when they have none.
        self._subjects: dict[str, Subject] = {}
        self._counts = {priority: Counts() for priority in Priority}
        # By model.  The rounds of a class are kept while any request waits in it: a
        # turn counts until all others had theirs.
        self._rounds: dict[Priority, dict[str, Rounds]] = {p: {} for p in Priority}
        self._forecasts = BoundedDict[str, Forecast](REMEMBERED)

    def __repr__(self) -> str:
        counts = " ".join(f"{p}={each.total}" for p, each in self._counts.items())
        subjects = sum(bool(s.running or s.rounds) for s in self._subjects.values())
        return f"<Admission {counts} subjects={subjects}>"

    # --- Being admitted -----------------------------------------------------------

    def admit(
        self,
        subject: str,
        model: str,
        priority: Priority = Priority.INTERACTIVE,
        limit: int = 0,
    ) -> Subject | None:
        """Admit a request at once, as a slot is free for it; None if it has to wait.

        `limit` is the number of requests of the subject that may run at once; 0 is no
        limit.  What is returned is given back with `release()`, once.
        """
        holder = self._subjects.get(subject)
        if holder is None or holder.limit != limit:
            holder = self._subject(subject, limit)
        if holder.withheld or (self.waiting and self._is_behind(model, priority)):
            self._forget(holder)
            return None
        holder.running += 1
        if limit:
            holder.review()
        return holder

    def join(
        self,
        subject: str,
        model: str,
        priority: Priority = Priority.INTERACTIVE,
        limit: int = 0,
        *,
        first: bool = False,
    ) -> Ticket:
        """Let a request wait for a slot of a worker that serves a model.

        With `first` it goes before all others of its class, because a worker failed it.

        Raises:
            NoWorkerError: 429, there is no room.
        """
        if not self.has_room:
            self._make_room(subject, model, priority)
        holder = self._subject(subject, limit)
        number = next(self._numbers)
        if first:
            number = -number
        ticket = Ticket(number, subject, model, priority, self._clock())
        rounds = self._rounds_of(model, priority)
        rounds.add(ticket)
        holder.rounds[rounds] = None
        self._counts[priority].add(subject)
        self.waiting += 1
        if not holder.withheld:
            rounds.enter(subject, late=holder.running > 0, first=first)
        return ticket

    def next(self, models: Collection[str]) -> Ticket | None:
        """Admit the request with the next turn, of those that wait for these models.

        None if no request can be admitted.  The cost grows with the number of models,
        and not with the number of requests.
        """
        for priority, counts in self._counts.items():
            if counts.total:
                # Also those without requests now: a turn counts there for later ones.
                some = [self._rounds_of(model, priority) for model in models]
                if any(rounds.open for rounds in some):
                    return self._take_turn(some)
        return None

    def take(
        self, subject: str, models: Collection[str], able: Callable[[Ticket], bool]
    ) -> Ticket | None:
        """Admit the next request of one subject that is `able` to use the slot.

        `models` are those of the worker: a turn counts for each.  None if no request
        of the subject can be admitted.
        """
        holder = self._subjects.get(subject)
        if holder is None or holder.withheld:
            return None
        found = (
            next(filter(able, rounds.of(subject)), None) for rounds in holder.rounds
        )
        ticket = min(filter(None, found), key=_rank, default=None)
        if ticket is not None:
            self._admit(
                ticket, [self._rounds_of(each, ticket.priority) for each in models]
            )
        return ticket

    def in_turn(self, model: str, most: int) -> list[Ticket]:
        """Return the tickets that may be admitted, in the order of their turns.

        At most `most` of them, and of each subject no more than its limit lets run.
        """
        left = {
            name: holder.limit - holder.running
            for name, holder in self._subjects.items()
            if holder.limit
        }
        found: list[Ticket] = []
        for rounds in self._rounds_for(model):
            for ticket in rounds.turns():
                if len(found) >= most:
                    return found
                if left:
                    allowed = left.get(ticket.subject, 1)
                    if allowed <= 0:
                        continue
                    if ticket.subject in left:
                        left[ticket.subject] = allowed - 1
                found.append(ticket)
        return found

    def wanted(self) -> set[str]:
        """Return the models for which a request waits that could be admitted."""
        return {
            rounds.model
            for of_class in self._rounds.values()
            for rounds in of_class.values()
            if rounds.open
        }

    def leave(self, ticket: Ticket) -> None:
        """End a ticket, whether it waits or runs; only the first call counts."""
        holder = self._subjects.get(ticket.subject)
        if holder is None:
            return
        if ticket.state is TicketState.RUNNING:
            ticket.state = TicketState.DONE
            self.release(holder)
        elif ticket.state is TicketState.WAITING:
            self._take_out(ticket, TicketState.LEFT)
            self._forget(holder)

    def keep(self, ticket: Ticket) -> Subject:
        """End a ticket that runs; its place is given back with `release()`."""
        ticket.state = TicketState.DONE
        return self._subjects[ticket.subject]

    def release(self, holder: Subject) -> None:
        """End a request that runs."""
        holder.running -= 1
        if holder.limit:
            holder.review()
        if len(self._subjects) > KEPT:
            self._forget(holder)

    def limited(self) -> dict[str, int]:
        """Return how many requests run here of each subject that has a limit."""
        return {
            name: holder.running
            for name, holder in self._subjects.items()
            if holder.limit and holder.running
        }

    def note_elsewhere(self, counts: dict[str, int]) -> None:
        """Record how many requests of each subject run at other hubs.

        Those of subjects with a limit count towards it.
        """
        before, self.elsewhere = self.elsewhere, counts
        for name in before.keys() | counts.keys():
            holder = self._subjects.get(name)
            if holder is not None:
                holder.elsewhere = counts.get(name, 0)
                holder.review()

    def _is_behind(self, model: str, priority: Priority) -> bool:
        """Return whether a request waits that goes before a new one of this class."""
        return any(
            rounds.open
            for rounds in self._rounds_for(model)
            if rounds.priority.rank <= priority.rank
        )

    # --- What would happen ----------------------------------------------------------

    def would_admit(
        self, subject: str, model: str, priority: Priority, limit: int
    ) -> bool:
        """Return what `admit` would decide now."""
        if 0 < limit <= self.running(subject):
            return False
        holder = self._subjects.get(subject)
        if holder is not None:
            # Its earlier requests go first, also those that another limit withheld.
            for rounds in holder.rounds:
                if rounds.model == model and rounds.priority.rank <= priority.rank:
                    return False
        return not (self.waiting and self._is_behind(model, priority))

    def would_join(self, subject: str, priority: Priority) -> bool:
        """Return whether `join` would find room now."""
        return self.has_room or self._to_displace(subject, priority) is not None

    def outlook(self, model: str, priority: Priority) -> Place:
        """Return the place that a new request would have, if subjects were equal.

        A subject that has had fewer turns than others gets a better one.
        """
        some = self._rounds_for(model)
        ahead = sum(r.waiting for r in some if r.priority.rank <= priority.rank)
        waiting = 1 + sum(rounds.waiting for rounds in some)
        interval = self._forecast(model).interval
        eta = None if interval is None else (ahead + 1) * interval
        return Place(ahead + 1, waiting, eta)

    # --- State, for clients and metrics -------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether one more can wait without taking the place of another one."""
        return self.waiting < self.settings.size

    @property
    def patience(self) -> float:
        """The seconds for which a request may wait for a better worker."""
        return min(MOST_PATIENCE, self.settings.timeout / 2)

    def waiting_in(self, priority: Priority) -> int:
        """Return the number of requests that wait in a class."""
        return self._counts[priority].total

    def running(self, subject: str) -> int:
        """Return the number of requests that a subject has running, at all hubs."""
        holder = self._subjects.get(subject)
        here = holder.running if holder is not None else 0
        return here + self.elsewhere.get(subject, 0)

    def deadline(self, ticket: Ticket) -> float:
        """Return the moment until which a ticket may wait, in monotonic seconds."""
        return ticket.joined_at + self.settings.timeout

    def place(self, ticket: Ticket) -> Place:
        """Return the place of a ticket that waits; about right, and cheap."""
        some = self._rounds_for(ticket.model)
        # At least itself: one that had its turn may still wait for a better worker.
        waiting = max(1, sum(rounds.waiting for rounds in some))
        return self._forecast(ticket.model).place(
            ticket,
            waiting,
            lambda: (each for rounds in some for each in rounds.order()),
        )

    def retry_after(self, model: str) -> int:
        """Return the seconds until those that wait for a model are likely admitted."""
        interval = self._forecast(model).interval
        if interval is None:
            return RETRY_AFTER
        waiting = sum(rounds.waiting for rounds in self._rounds_for(model))
        most = min(RETRY_AFTER_MOST, math.ceil(self.settings.timeout))
        return max(1, min(most, math.ceil(interval * waiting)))

    def expected_wait(self, model: str) -> float | None:
        """Return the seconds that a new request would wait; None if it is not known."""
        interval = self._forecast(model).interval
        waiting = sum(rounds.waiting for rounds in self._rounds_for(model))
        return None if interval is None else interval * waiting

    def no_room(self, model: str) -> NoWorkerError:
        """Make the error of a request for which there is no room, or no longer."""
        size = self.settings.size
        text = f"Too many requests are waiting: the limit is {size} (queue.size)."
        after = self.retry_after(model)
        return NoWorkerError(Code.QUEUE_FULL, text, retry_after=after)

    def too_late(self, ticket: Ticket) -> NoWorkerError:
        """Make the error of a ticket that has waited for too long, before it leaves."""
        holder = self._subjects.get(ticket.subject)
        limit = f"within {self.settings.timeout:g} s (queue.timeout)"
        if holder is not None and holder.withheld:
            running = self.running(holder.name)
            text = (
                f"None of your {running} running requests ended {limit}, "
                f"and no more than {holder.limit} may run at once (max_concurrency)."
            )
        else:
            text = f"No slot for the model {ticket.model!r} came free {limit}."
        after = self.retry_after(ticket.model)
        return NoWorkerError(Code.QUEUE_TIMEOUT, text, retry_after=after)

    # --- Steps --------------------------------------------------------------------

    def _take_turn(self, some: list[Rounds]) -> Ticket:
        if all(rounds.over for rounds in some):
            for rounds in some:
                rounds.begin_round()
        subject = min(some, key=lambda rounds: rounds.tick).front
        waiting = (rounds.oldest(subject) for rounds in some)
        ticket = min(filter(None, waiting), key=_number)
        self._admit(ticket, some)
        return ticket

    def _admit(self, ticket: Ticket, some: Iterable[Rounds]) -> None:
        """Let a request go in whose turn it is; the turn counts in some rounds."""
        for rounds in some:
            rounds.had_turn(ticket.subject)
        self.turns[ticket.priority] += 1
        waited = self._clock() - ticket.joined_at
        self._forecast(ticket.model).had_turn(at_once=waited < AT_ONCE)
        holder = self._subjects[ticket.subject]
        self._take_out(ticket, TicketState.RUNNING)
        holder.running += 1
        holder.review()

    def _take_out(self, ticket: Ticket, state: TicketState) -> None:
        """Take a ticket that waits out of the queue."""
        ticket.state = state
        self.waiting -= 1
        counts = self._counts[ticket.priority]
        counts.remove(ticket.subject)
        of_class = self._rounds[ticket.priority]
        if of_class[ticket.model].remove(ticket):
            del self._subjects[ticket.subject].rounds[of_class[ticket.model]]
        if not any(rounds.waiting for rounds in self._rounds_for(ticket.model)):
            self._forecast(ticket.model).pause()
        if not counts.total:
            of_class.clear()

    def _make_room(self, subject: str, model: str, priority: Priority) -> None:
        """Displace another request, if that is fair.

        Raises:
            NoWorkerError: it is not.
        """
        found = self._to_displace(subject, priority)
        if found is None:
            self.refused[priority] += 1
            raise self.no_room(model)
        self._displace(*found)

    def _to_displace(
        self, subject: str, priority: Priority
    ) -> tuple[Subject, Priority] | None:
        """Return the subject and class of the request that would make room."""
        for lower in reversed(Priority):
            if lower.rank < priority.rank:
                break
            counts = self._counts[lower]
            name = counts.largest
            enough = counts.count(subject) + 2 if lower is priority else 1
            if name is not None and counts.count(name) >= enough:
                return self._subjects[name], lower
        return None

    def _displace(self, holder: Subject, priority: Priority) -> None:
        some = (rounds for rounds in holder.rounds if rounds.priority is priority)
        newest = (rounds.newest(holder.name) for rounds in some)
        ticket = max(newest, key=_number)
        self.refused[priority] += 1
        self._take_out(ticket, TicketState.DISPLACED)
        self._forget(holder)
        if self.on_displaced is not None:
            self.on_displaced(ticket)

    # --- Records ------------------------------------------------------------------

    def _subject(self, name: str, limit: int) -> Subject:
        """Find or make the record of a subject, which has this limit from now on."""
        holder = self._subjects.get(name)
        if holder is None:
            elsewhere = self.elsewhere.get(name, 0) if limit else 0
            holder = self._subjects[name] = Subject(name, limit, elsewhere)
        elif holder.limit != limit:
            self._limit(holder, limit)
        return holder

    def _limit(self, holder: Subject, limit: int) -> None:
        holder.limit, holder.elsewhere = limit, self.elsewhere.get(holder.name, 0)
        holder.review()

    def _forget(self, holder: Subject) -> None:
        if len(self._subjects) > KEPT and not (holder.running or holder.rounds):
            self._subjects.pop(holder.name, None)

    def _rounds_of(self, model: str, priority: Priority) -> Rounds:
        of_class = self._rounds[priority]
        if model not in of_class:
            if len(of_class) >= REMEMBERED:
                for rounds in [each for each in of_class.values() if not each.waiting]:
                    del of_class[rounds.model]
            most = max(self.settings.size, 1)
            of_class[model] = Rounds(model, priority, most, self._ticks)
        return of_class[model]

    def _rounds_for(self, model: str) -> list[Rounds]:
        return [each[model] for each in self._rounds.values() if model in each]

    def _forecast(self, model: str) -> Forecast:
        if model not in self._forecasts:
            self._forecasts[model] = Forecast(self._clock)
        return self._forecasts[model]


def _number(ticket: Ticket) -> int:
    return ticket.number


def _rank(ticket: Ticket) -> tuple[int, int]:
    return ticket.priority.rank, ticket.number


class Forecast:
    """Predicts the turns for one model.  `clock` returns monotonic seconds.

    The cost of counting the places grows with the number of requests that wait.  It is
    done at most once in `FRESH` seconds, so that many notices do not add up.
    """

    __slots__ = ("_clock", "_counted_at", "_last", "_mean", "_places")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mean: float | None = None  # seconds from turn to turn
        self._last: float | None = None  # turn, while any request waits
        self._places: dict[Ticket, int] = {}
        self._counted_at = 0.0

    def __repr__(self) -> str:
        mean = "?" if self._mean is None else f"{self._mean:.1f}"
        return f"<Forecast a turn every {mean} s>"

    def had_turn(self, *, at_once: bool = False) -> None:
        """Record a turn; one `at_once` only waited for a slot that was free already.

        Hubs that share a store ask it for such a slot: that takes milliseconds, which
        predict nothing.
        """
        now = self._clock()
        if self._last is not None and not at_once:
            gap = now - self._last
            mean = gap if self._mean is None else self._mean
            self._mean = mean + GAIN * (gap - mean)
        self._last = now

    def pause(self) -> None:
        """Record that no request waits: the time to the next turn will mean nothing."""
        self._last = None
        self._places = {}

    @property
    def interval(self) -> float | None:
        """Seconds from one turn to the next; it grows while no turn comes."""
        if self._mean is None or self._last is None:
            return self._mean
        return max(self._mean, self._clock() - self._last)

    def place(
        self, ticket: Ticket, waiting: int, order: Callable[[], Iterable[Ticket]]
    ) -> Place:
        """Return the place of a ticket among those `waiting`; `order` yields them.

        A place may be a second old; tickets that joined after the last count are last.
        """
        if not self._places or self._clock() - self._counted_at >= FRESH:
            self._places = {each: place for place, each in enumerate(order(), 1)}
            self._counted_at = self._clock()
        position = min(self._places.get(ticket, waiting), waiting)
        interval = self.interval
        return Place(
            position, waiting, None if interval is None else position * interval
        )
