"""What a hub holds of the workers that it shares with other hubs.

Theory of operation
===================

A slot that a hub may use is a *lease* in the store, which ends by itself unless the hub
renews it.  The leases of one hub on one worker are interchangeable: a request takes no
lease in particular, only their number counts.  One without a request is *spare*.

* While no request waits anywhere, a hub holds somewhat more leases than it has had
  requests at once in the last seconds (`target`), so that the common request finds a
  spare one and costs no round trip.  It holds one of each other worker of the same
  models (`least`), as its routing policy can only choose among those that it has a
  lease of.  A hub that does not use a model holds nothing.
* Once a request of another hub waits for a worker, the worker is *contended* here:
  spare leases go back at once, and so does each slot that comes free.  The store then
  grants it to the request of all hubs whose turn it is, possibly to one of this hub.
* A worker is *scarce* while the store has no free slot of it.  A request asks at first
  for a slot of the worker that its routing policy prefers; if that is scarce, of any.

When the store cannot be reached, a hub uses what it holds, but no more than its fair
part, and after the lifetime of all leases exactly its fair part: the slots divided by
the hubs that were last seen (`fair_parts`).  Requests that run then are registered once
the store is back, under leases that the hub makes itself.  For some seconds, until all
hubs are back, it then asks for no more than its part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final
from zlib import crc32

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.addresses import is_loopback
from gollama_proxy.config.settings import Origin
from gollama_proxy.state.slots import Ask, Grant, Reply, Want

# Seconds for which the most requests at once are remembered; at most twice as long.
RECENT: Final = 10.0
# Leases that were given back and of which a late message may still arrive.
MOST_RETURNED: Final = 1024


def shared_key(origin: Origin, machine: str) -> str:
    """Return what names a worker among the hubs: its address.

    Two hubs may give it two names.  A loopback address leads to another server on each
    machine, so the machine's name belongs to it.
    """
    return f"{machine} {origin.url}" if is_loopback(origin.host) else origin.url


class Share:
    """What one hub holds of one worker.  Times are monotonic seconds."""

    __slots__ = (
        "_alerted",
        "_back",
        "_before",
        "_careful",
        "_made",
        "_most",
        "_new",
        "_peak",
        "_returned",
        "_since",
        "_unused",
        "_wants",
        "_whole",
        "contended",
        "hub",
        "key",
        "leases",
        "least",
        "scarce",
    )

    def __init__(self, key: str, hub: str, now: float) -> None:
        self.key, self.hub = key, hub
        self.leases: list[str] = []  # with a request and spare
        self.contended = False  # requests of other hubs wait for this worker
        self.least = 0  # leases to hold, as its model is in demand
        self.scarce = False  # no slot of it was free, as far as is known
        self._new = set[str]()  # of the leases, those that no ask has named
        self._alerted = False  # since the last ask
        self._back: list[str] = []  # to be given back
        self._unused: list[str] = []  # the same, for which a subject has its turn again
        self._returned = BoundedDict[str, None](MOST_RETURNED)
        self._wants: tuple[Want, ...] = ()  # as the store knows them
        self._careful = False  # the last ask was
        self._most = math.inf  # leases that it may hold, at the last ask
        self._whole = False  # no other hub had a lease, at the last ask
        self._made = 0  # leases that the hub made itself
        # Most requests at once in this period, which began at `_since`, and before.
        self._peak = self._before = 0
        self._since = now

    def __repr__(self) -> str:
        marks = [name for name in ("contended", "scarce") if getattr(self, name)]
        text = " ".join([f"leases={len(self.leases)} back={len(self._back)}", *marks])
        return f"<Share of {self.key} {text}>"

    # --- Demand -------------------------------------------------------------------

    def note(self, most: int, now: float) -> None:
        """Record the most requests that ran at once since the last call."""
        if now - self._since >= RECENT:
            idle = now - self._since >= 2 * RECENT
            self._before, self._peak = 0 if idle else self._peak, 0
            self._since = now
        self._peak = max(self._peak, most)

    @property
    def target(self) -> int:
        """How many leases are good to have: half as many again as were needed."""
        most = max(self._peak, self._before)
        return max(self.least, most and most + max(1, most // 2))

    @property
    def in_demand(self) -> bool:
        """Whether requests have run here in the last seconds."""
        return self._peak + self._before > 0

    # --- What is asked of the store -----------------------------------------------

    def is_urgent(self, wants: Sequence[Want]) -> bool:
        """Return whether the store has to know at once what is held and wanted here.

        While no other hub waits, it is enough that the store knows that these requests
        wait, and not how many there are.
        """
        if self.owes:
            return True
        if self._careful:
            return bool(wants) and not self._wants and len(self.leases) < self._most
        if self.contended:
            return tuple(wants) != self._wants
        if self._whole:
            return False
        return not {_kind(want) for want in wants} <= {*map(_kind, self._wants)}

    def ask(
        self,
        slots: int,
        fair: int,
        running: int,
        wants: Sequence[Want] = (),
        *,
        in_use: bool = True,
        renew: bool = True,
        careful: bool = False,
    ) -> Ask | None:
        """Return what to ask for this worker; None if there is nothing to ask or renew.

        `slots` is how many requests it can take from all hubs, of which `fair` are this
        hub's part; `running` is how many it has from this hub, and `wants` are those
        that wait for it.  One that is not `in_use` gets no new request.  Unless it is
        to `renew` all leases, the ask names only those that are new.  While `careful`,
        the hub wants no more than its part: leases of others may have ended while the
        store was gone, and these may not be back yet.
        """
        self.cover(running)
        waiting = sum(want.requests for want in wants)
        most = min(slots, fair) if careful else slots
        target = min(most, max(self.target, running + waiting)) if in_use else 0
        self.trim(running if self.contended else max(running, target))
        self._whole = len(self.leases) >= slots and not self.contended
        if self._whole:
            wants = ()  # no other hub has a slot to give back
        self._careful, self._most = careful, float(most)
        if careful:
            wants = tuple(_first(wants, most - len(self.leases)))
        spare = 0 if self.contended else max(0, target - len(self.leases))
        if careful and wants:
            spare = 0
        if not (self.leases or self.owes or spare or wants or self._wants):
            self.scarce = False  # for all that is known
            return None
        self._wants, self._alerted = tuple(wants), False
        named = self.leases if renew else filter(self._new.__contains__, self.leases)
        held, back, unused = map(tuple, (named, self._back, self._unused))
        wants, holds = self._wants, len(self.leases)
        return Ask(self.key, slots, fair, held, back, spare, wants, unused, holds)

    def cover(self, running: int) -> None:
        """Make leases for requests that were admitted without the store."""
        while len(self.leases) < running:
            self._made += 1
            self._add(f"{self.hub}:m{self._made}")

    def _add(self, lease: str) -> None:
        self.leases.append(lease)
        self._new.add(lease)

    def trim(self, most: int) -> None:
        """Give back all leases but so many."""
        while len(self.leases) > most:
            lease = self.leases.pop()
            self._new.discard(lease)
            self._back.append(lease)
            self._returned[lease] = None

    def refuse(self, lease: str) -> None:
        """Give back a lease that was granted to a subject, and is not needed."""
        self.leases.remove(lease)
        self._new.discard(lease)
        self._unused.append(lease)
        self._returned[lease] = None

    def expire(self, running: int) -> None:
        """Forget leases that the store has not heard of for longer than they last.

        Others may have the spare ones by now; those of `running` requests will be
        registered again.
        """
        self.trim(running)
        self._back.clear()
        self._unused.clear()
        self._wants = ()

    @property
    def owes(self) -> bool:
        """Whether leases are to be given back."""
        return bool(self._back or self._unused)

    @property
    def waits(self) -> bool:
        """Whether the store knows of requests that wait here."""
        return bool(self._wants)

    # --- What the store answers ---------------------------------------------------

    def alert(self) -> None:
        """Record that requests of other hubs have begun to wait.

        A reply that is on its way may not know of them.
        """
        self.contended = self._alerted = True

    def take(self, ask: Ask, reply: Reply) -> list[Grant]:
        """Take in the reply to what was asked; return what is new of the grants."""
        sent = {*ask.back, *ask.unused}
        self._new.difference_update(ask.held)
        self._back = [lease for lease in self._back if lease not in sent]
        self._unused = [lease for lease in self._unused if lease not in sent]
        self.contended = reply.waiting > 0 or self._alerted
        self.scarce = reply.free <= 0 or bool(ask.wants and not reply.granted)
        return [each for each in reply.granted if self.receive(each)]

    def receive(self, grant: Grant) -> bool:
        """Take a lease that was granted; False if it is not new, or too many.

        A store that was paused may carry out calls on which the hub has given up.
        """
        if grant.lease in self._returned or grant.lease in self.leases:
            return False
        self._add(grant.lease)
        if len(self.leases) > self._most:
            self.refuse(grant.lease)
            return False
        if grant.subject:
            self._wants = tuple(_without(self._wants, grant.subject))
        return True


def _first(wants: Sequence[Want], most: int) -> Iterator[Want]:
    """Yield the first of the requests that wait, at most so many."""
    for want in wants:
        if most > 0:
            yield want._replace(requests=min(want.requests, most))
        most -= want.requests


def _without(wants: Sequence[Want], subject: str) -> Iterator[Want]:
    """Yield what still waits in the store after a grant to a subject.

    If its requests are of several kinds, the grant may be for any: none is relied on.
    """
    alone = [want.subject for want in wants].count(subject) == 1
    for want in wants:
        if want.subject != subject:
            yield want
        elif alone and want.requests > 1:
            yield want._replace(requests=want.requests - 1)


def _kind(want: Want) -> tuple[str, int, str]:
    return want.subject, want.rank, want.queue


# --- Without the store --------------------------------------------------------------


def fair_part(slots: int, hubs: int, place: int, key: str) -> int:
    """Return the part of a worker's slots for one of so many hubs; the parts add up.

    `place` is that of the hub among all, from 0.  What remains after an equal division
    goes to other hubs for each worker.
    """
    each, rest = divmod(slots, hubs)
    return each + ((place - crc32(key.encode())) % hubs < rest)


def fair_parts(
    slots: Mapping[str, int], pools: Iterable[Sequence[str]], hubs: int, place: int
) -> dict[str, int]:
    """Return the part that one of so many hubs has of each worker, by its key.

    `slots` is what each worker can take from all hubs.  `pools` are the workers of each
    model: where there are fewer slots for a model than hubs, some hub would have none,
    and could not serve the model at all.  It then has one, in excess of the slots.
    """
    parts = {key: fair_part(most, hubs, place, key) for key, most in slots.items()}
    for pool in pools:
        keys = sorted(key for key in pool if key in parts)
        if keys and not any(parts[key] for key in keys):
            parts[keys[place % len(keys)]] = 1
    return parts
