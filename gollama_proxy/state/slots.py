"""Slots of workers as leases in the store: the one call for them, and what a hub holds.

Theory of operation
===================

**A slot is a lease.**  Each worker has a sorted set in the store: a member is a lease,
its score the moment at which the lease ends, by the store's clock.  A hub renews its
leases at each heartbeat; those of a hub that dies end within `LIFETIME`.  A lease that
a hub holds is registered again if it had ended, even above the worker's slots, as a
request may run on it.  New leases never exceed the slots.

**The line** of a worker lists the requests of all hubs that wait for it, by subject,
for `PATIENCE` after their hub's last call.  A slot that is free goes to the best class,
then to the subject whose turn it is, then to its hub whose turn it is.  Turns follow
`scheduling/turns.py`: a round gives each subject one turn; a subject that arrives has a
turn in the current round, behind those that have not had theirs.

**One call** (`slots.lua`) renews, gives back, replaces what this hub has waiting and
grants what is free, for any number of workers.  Grants to the caller are in the reply;
other hubs get theirs as a message in the channel `PREFIX:grants:HUB`.  A grant is
repeated in each reply to its hub until a call names the lease as held or given back, so
a lost message or reply loses no slot.  `PREFIX:wanted` names workers for which requests
wait while other hubs than the caller hold leases, when that is news for some hub, and
once a second: hubs give back what they do not use.

**Spare leases** are granted while no request waits for the worker, and as long as there
are several hubs only half of what is free at a time: hubs compete for the last slots of
a worker by their requests.

**After an outage** (the store is empty, or no hub has called for `LIFETIME`) hubs may
hold leases that are not registered.  For `CAUTION` seconds a hub is granted no more
than its fair part, and slots that are given back wait for their hubs' next calls.  A
store that has lost its data grants nothing before all hubs have registered what they
hold, for `CAUTION` at most: one of them may hold more than its part.

The state of a worker is bounded by its slots, by `MOST_WANTS` for each hub, and by the
turns of one round; all keys expire when no hub uses them.

**What a hub holds** (`Share`).  The leases of one hub on one worker are
interchangeable: a request takes no lease in particular, only their number counts.  One
without a request is *spare*.

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

**Without the store**, a hub uses what it holds, but no more than its fair part, and
after the lifetime of all leases exactly its fair part: the slots divided by the hubs
that were last seen (`fair_parts`).  Requests that run then are registered once the
store is back, under leases that the hub makes itself.  For some seconds, until all hubs
are back, it then asks for no more than its part.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final, NamedTuple, Protocol
from zlib import crc32

import msgspec

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.config.addresses import is_loopback
from gollama_proxy.config.settings import Origin

logger = logging.getLogger(__name__)

# Seconds after its last heartbeat at which a hub counts as gone, and its leases end.
# What it held is free within 10 s: that, and a heartbeat of another hub.
LIFETIME = 7.0
PATIENCE = 3.0  # seconds of a waiting request after its hub was last heard of
CAUTION = 4.0  # seconds for which hubs register again after an outage: two heartbeats
MOST_WANTS = 64  # of one hub for one worker

# What one call may carry, so that it takes the store few milliseconds: leases, with a
# worker counted as `WORKER_WEIGHT`.
MOST_WEIGHT = 4000
WORKER_WEIGHT = 10

_TEXT = files(__package__).joinpath("slots.lua").read_text("utf-8")
# As it is sent with each call: without comments and indentation.
SCRIPT = re.sub(r"(?m)^\s*(--.*)?\n|^ +| +-- .*$", "", _TEXT)


# --- The call ---------------------------------------------------------------------


class Want(NamedTuple):
    """Requests of one subject that wait.

    A request that can use several workers is named in the ask of each.  Of the wants of
    one call that differ only in this number, the requests are the same: they are
    granted no more slots in this call than the largest number.
    """

    subject: str
    rank: int  # of their class, the first one is 0
    requests: int
    queue: str = ""  # distinguishes requests of one subject, such as their model


class SlotAsk(NamedTuple):
    """What a hub asks of one worker."""

    worker: str
    slots: int  # as this hub knows them
    fair: int  # this hub's part of them, if all hubs have equal parts
    held: Sequence[str] = ()  # leases to renew, in use or spare
    back: Sequence[str] = ()  # leases to give back
    spare: int = 0  # leases that it would like besides, if no request waits for them
    wants: Sequence[Want] = ()  # all that wait here now, in the order of their turns
    # Leases to give back that were granted to a subject, and no request has used.  The
    # subject has its turn again.
    unused: Sequence[str] = ()
    # How many leases it holds, if `held` names only some: a call between two heartbeats
    # need only name those that the store does not know to be held.
    holds: int = 0


class Grant(NamedTuple):
    """A lease for this hub, until it is given back or expires."""

    lease: str
    subject: str  # whose request it is for; empty if it is spare


class SlotReply(NamedTuple):
    """What came of an ask.

    `granted` may repeat a lease that arrived before, by a message or a reply.
    """

    worker: str
    granted: list[Grant]
    waiting: int  # requests of other hubs, for this worker
    free: int  # slots that this hub could be granted, if no request went before it


class ScriptStore(Protocol):
    @property
    def prefix(self) -> str: ...
    async def run(
        self, script: str, keys: Sequence[str], args: Sequence[str | bytes]
    ) -> Any: ...


async def sync(
    store: ScriptStore,
    hub: str,
    asks: Sequence[SlotAsk],
    *,
    epoch: str = "",
    hubs: int = 0,
    whole: bool = False,
) -> list[SlotReply]:
    """Renew, give back and ask for leases; return the replies, in the order of asks.

    All asks with wants or returned leases should be in one call.  Calls of one hub must
    not overlap.

    If the store has another `epoch`, nothing is granted: the hub has to notice that the
    data was lost.  In the caution after that, nothing is granted before so many `hubs`
    have made a call that was `whole`: it names all that a hub holds.

    Raises:
        StoreDownError: the store did not answer, though it may have acted; then the
            next call has to name the same leases to give back, and replies to it repeat
            what was granted.
    """
    prefix, replies = store.prefix, []
    times = [f"{seconds * 1000:.0f}" for seconds in (LIFETIME, PATIENCE, CAUTION)]
    parts = [*_split(asks)] or [()] * whole
    for number, part in enumerate(parts, 1):
        keys = [f"{prefix}:{name}" for name in ("slots", "slots:serial", "epoch")]
        for ask in part:
            keys += (
                f"{prefix}:slots:leases:{ask.worker}",
                f"{prefix}:slots:line:{ask.worker}",
            )
        bounded = [ask._replace(wants=ask.wants[:MOST_WANTS]) for ask in part]
        packed = msgspec.msgpack.encode(bounded)
        last = f"{whole and number == len(parts):d}"
        args: list[str | bytes] = [prefix, hub, *times, epoch, str(hubs), last, packed]
        reply = await store.run(SCRIPT, keys, args)
        replies += _decode_replies(reply)
    return replies


def _split(asks: Sequence[SlotAsk]) -> Iterator[Sequence[SlotAsk]]:
    part: list[SlotAsk] = []
    weight = 0
    for ask in asks:
        weight += WORKER_WEIGHT + len(ask.held) + len(ask.back)
        if part and weight > MOST_WEIGHT:
            yield part
            part, weight = [], WORKER_WEIGHT + len(ask.held) + len(ask.back)
        part.append(ask)
    if part:
        yield part


_decode_replies = msgspec.msgpack.Decoder(list[SlotReply]).decode
_decode_grants = msgspec.msgpack.Decoder(list[tuple[str, str, str]]).decode
_decode_wanted = msgspec.msgpack.Decoder(list[str]).decode


def grants_channel(prefix: str, hub: str) -> str:
    return f"{prefix}:grants:{hub}"


def wanted_channel(prefix: str) -> str:
    return f"{prefix}:wanted"


def decode_grants(message: bytes) -> list[tuple[str, Grant]]:
    """Decode a message of `grants_channel()`: workers with what is granted there.

    One of another program, or of another format, is ignored, and logged once.
    """
    try:
        found = _decode_grants(message)
    except msgspec.DecodeError:
        _complain("grants")
        return []
    return [(worker, Grant(lease, subject)) for worker, lease, subject in found]


def decode_wanted(message: bytes) -> list[str]:
    """Decode a message of `wanted_channel()`: workers for which requests wait.

    One of another program, or of another format, is ignored, and logged once.
    """
    try:
        return _decode_wanted(message)
    except msgspec.DecodeError:
        _complain("wanted")
        return []


@cache
def _complain(channel: str) -> None:
    logger.warning("a message in the channel %s is ignored: it is malformed", channel)


# --- What a hub holds -------------------------------------------------------------

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
    ) -> SlotAsk | None:
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
        return SlotAsk(self.key, slots, fair, held, back, spare, wants, unused, holds)

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

    def take(self, ask: SlotAsk, reply: SlotReply) -> list[Grant]:
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


# --- Without the store ------------------------------------------------------------


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
