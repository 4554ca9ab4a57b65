"""Slots of workers as leases in the store: the one call that hubs make about them.

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
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import msgspec

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


class Ask(NamedTuple):
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


class Reply(NamedTuple):
    """What came of an ask.

    `granted` may repeat a lease that arrived before, by a message or a reply.
    """

    worker: str
    granted: list[Grant]
    waiting: int  # requests of other hubs, for this worker
    free: int  # slots that this hub could be granted, if no request went before it


class Store(Protocol):
    @property
    def prefix(self) -> str: ...
    async def run(
        self, script: str, keys: Sequence[str], args: Sequence[str | bytes]
    ) -> Any: ...


async def sync(
    store: Store,
    hub: str,
    asks: Sequence[Ask],
    *,
    epoch: str = "",
    hubs: int = 0,
    whole: bool = False,
) -> list[Reply]:
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


def _split(asks: Sequence[Ask]) -> Iterator[Sequence[Ask]]:
    part: list[Ask] = []
    weight = 0
    for ask in asks:
        weight += WORKER_WEIGHT + len(ask.held) + len(ask.back)
        if part and weight > MOST_WEIGHT:
            yield part
            part, weight = [], WORKER_WEIGHT + len(ask.held) + len(ask.back)
        part.append(ask)
    if part:
        yield part


_decode_replies = msgspec.msgpack.Decoder(list[Reply]).decode
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
