"""What `slots.lua` does, in plain Python: for simulations, and to check the script.

It decides as the script does, in the simplest way: a request at a time, and with no
regard for what that costs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gollama_proxy.state.slots import (
    CAUTION,
    LIFETIME,
    MOST_WANTS,
    PATIENCE,
    Grant,
    SlotAsk,
    SlotReply,
    Want,
)

MOST_TURNS = 256
REPEAT = 1.0  # seconds between two notices that requests wait for a worker

# Requests that are alike: hub, subject, class, queue.
Key = tuple[str, str, int, str]
Message = tuple[str, Grant]  # worker, grant


@dataclass
class Turn:
    """Of a subject in a round."""

    turn: int
    tick: int


@dataclass
class Round:
    """Of the subjects of one class."""

    turn: int = 0
    had: int = 0  # turns in it
    turns: dict[str, Turn] = field(default_factory=dict)


@dataclass
class Waiting:
    """Requests of one hub that are alike, in one line."""

    hub: str
    want: Want
    seen: float
    tick: int
    requests: int

    @property
    def key(self) -> Key:
        return _key(self.hub, self.want)


@dataclass
class Sent:
    """A grant that its hub has not named yet."""

    hub: str
    grant: Grant
    expires: float
    key: Key | None
    rank: int = 0


@dataclass
class Line:
    """What the store keeps of a worker."""

    leases: dict[str, float] = field(default_factory=dict)  # with their ends
    waiting: list[Waiting] = field(default_factory=list)
    rounds: defaultdict[int, Round] = field(default_factory=lambda: defaultdict(Round))
    sent: dict[str, Sent] = field(default_factory=dict)
    tick: int = 0
    announced: float | None = None
    unaware: set[str] = field(default_factory=set)  # hubs, that others wait

    def next_tick(self) -> int:
        self.tick += 1
        return self.tick


@dataclass
class Outcome:
    """Of one call."""

    replies: list[SlotReply]
    messages: dict[str, list[Message]]  # for other hubs
    wanted: list[str]


class Leases:
    """The store.  `now` is its clock, in whole milliseconds, as seconds."""

    def __init__(self) -> None:
        self.lines: defaultdict[str, Line] = defaultdict(Line)
        self._since = self._last = float("-inf")
        self._serial = 0
        self._served: Counter[Key] = Counter()
        self._careful = True

    def __repr__(self) -> str:
        return f"<Leases of {len(self.lines)} workers>"

    def sync(self, hub: str, asks: Sequence[SlotAsk], now: float) -> Outcome:
        """Do what one call does; it must not have to be split."""
        if abs(now - self._last) > LIFETIME:
            self._since = now
        self._last = now
        self._careful = now - self._since < CAUTION
        self._served.clear()
        outcome = Outcome([], {}, [])
        granted = [self._renew(hub, ask, now) for ask in asks]
        for ask, known in zip(asks, granted, strict=True):
            for owner, grant in self._grant_free(hub, ask, len(known), now):
                if owner == hub:
                    known.append(grant)
                else:
                    message = ask.worker, grant
                    outcome.messages.setdefault(owner, []).append(message)
        for ask, known in zip(asks, granted, strict=True):
            waiting, announce = self._tidy(hub, ask, len(known), now)
            free = self._free(ask, len(known))
            outcome.replies.append(SlotReply(ask.worker, known, waiting, free))
            if announce:
                outcome.wanted.append(ask.worker)
        return outcome

    def _renew(self, hub: str, ask: SlotAsk, now: float) -> list[Grant]:
        """Take in what a hub reports; return the grants that it does not know of."""
        line = self.lines[ask.worker]
        for lease, ends in list(line.leases.items()):
            if ends <= now or lease in ask.back or lease in ask.unused:
                del line.leases[lease]
        for lease in ask.held:
            line.leases[lease] = now + LIFETIME
        line.waiting = [each for each in line.waiting if now - each.seen <= PATIENCE]
        unknown = []
        for lease, sent in list(line.sent.items()):
            if sent.expires <= now:
                del line.sent[lease]
            elif sent.hub == hub:
                if lease in ask.unused and sent.grant.subject:
                    turn = line.rounds[sent.rank].turns.get(sent.grant.subject)
                    if turn is not None:
                        turn.turn, turn.tick = turn.turn - 1, 0
                if lease in (*ask.held, *ask.back, *ask.unused):
                    del line.sent[lease]
                else:
                    unknown.append(sent.grant)
                    if sent.key:
                        self._served[sent.key] += 1
        self._replace(line, hub, ask.wants[:MOST_WANTS], now)
        return unknown

    def _replace(self, line: Line, hub: str, wants: Sequence[Want], now: float) -> None:
        ticks = {each.key: each.tick for each in line.waiting if each.hub == hub}
        line.waiting = [each for each in line.waiting if each.hub != hub]
        for want in wants:
            tick = ticks.get(_key(hub, want)) or line.next_tick()
            line.waiting.append(Waiting(hub, want, now, tick, want.requests))

    def _free(self, ask: SlotAsk, known: int) -> int:
        free = ask.slots - len(self.lines[ask.worker].leases)
        if self._careful:
            free = min(free, ask.fair - _holds(ask) - known)
        return max(free, 0)

    def _grant_free(
        self, hub: str, ask: SlotAsk, known: int, now: float
    ) -> Iterator[tuple[str, Grant]]:
        line, free = self.lines[ask.worker], self._free(ask, known)
        while free > 0:
            found = self._next(line, hub if self._careful else None)
            if found is None:
                break
            self._served[found.key] += 1
            grant = Grant(self._new(found.hub, now), found.want.subject)
            line.leases[grant.lease] = found.seen + LIFETIME
            line.sent[grant.lease] = Sent(
                found.hub, grant, found.seen + LIFETIME, found.key, found.want.rank
            )
            free -= 1
            yield found.hub, grant
        if any(self._left(each) > 0 for each in line.waiting):
            return
        if ask.fair < ask.slots and not self._careful:
            free //= 2
        for _ in range(min(free, ask.spare)):
            grant = Grant(self._new(hub, now), "")
            line.leases[grant.lease] = now + LIFETIME
            line.sent[grant.lease] = Sent(hub, grant, now + LIFETIME, None)
            yield hub, grant

    def _left(self, waiting: Waiting) -> int:
        return waiting.requests - self._served[waiting.key]

    def _next(self, line: Line, only: str | None) -> Waiting | None:
        """Return the request whose turn it is, which it has had then."""
        eligible = [each for each in line.waiting if only in (None, each.hub)]
        for each in sorted(eligible, key=lambda each: each.tick):
            turns = line.rounds[each.want.rank]
            turn = turns.turns.setdefault(
                each.want.subject, Turn(turns.turn, each.tick)
            )
            turn.turn = max(turn.turn, turns.turn)
        open_ = [each for each in eligible if self._left(each) > 0]
        if not open_:
            return None

        def order(each: Waiting) -> tuple[int, int, int, str, int]:
            rank, subject = each.want.rank, each.want.subject
            turn = line.rounds[rank].turns[subject]
            return rank, turn.turn, turn.tick, subject, each.tick

        found = min(open_, key=order)
        found.tick = line.next_tick()
        round_ = line.rounds[found.want.rank]
        turn = round_.turns[found.want.subject]
        if turn.turn > round_.turn:
            round_.turn, round_.had = turn.turn, 0
        round_.had += 1
        if round_.had >= MOST_TURNS:
            round_.turn, round_.had = round_.turn + 1, 0
        turn.turn, turn.tick = turn.turn + 1, line.next_tick()
        return found

    def _new(self, owner: str, now: float) -> str:
        self._serial = max(round(now * 1e6), self._serial) + 1
        return f"{owner}:{self._serial}"

    def _tidy(self, hub: str, ask: SlotAsk, known: int, now: float) -> tuple[int, bool]:
        """Keep what still waits; return how many of others, and whether to notify."""
        line = self.lines[ask.worker]
        for each in line.waiting:
            each.requests = self._left(each)
        line.waiting = [each for each in line.waiting if each.requests > 0]
        if not line.waiting:
            line.rounds.clear()
            line.announced = None
            line.unaware.clear()
            if not line.sent:
                line.tick = 0
            return 0, False
        waits = {(each.want.rank, each.want.subject) for each in line.waiting}
        for rank, round_ in line.rounds.items():
            for subject, turn in list(round_.turns.items()):
                if turn.turn <= round_.turn and (rank, subject) not in waits:
                    del round_.turns[subject]
        own = sum(each.requests for each in line.waiting if each.hub == hub)
        others = sum(each.requests for each in line.waiting) - own
        line.unaware.discard(hub)
        announce = len(line.leases) > _holds(ask) + known and (
            line.announced is None
            or now - line.announced >= REPEAT
            or (own > 0 and bool(line.unaware))
        )
        if announce:
            line.announced = now
            line.unaware.clear()
        if own and not others:
            line.unaware.add(hub)
        return others, announce


def _holds(ask: SlotAsk) -> int:
    return max(ask.holds, len(ask.held))


def _key(hub: str, want: Want) -> Key:
    return hub, want.subject, want.rank, want.queue
