"""Back to the worker that still has the conversation in its prompt cache.

`Memory` knows which worker that is.  The policy decides whether it is worth
it: the worker may be busy, or it may be a laptop that had the first turn because no
other was free.  So it is compared with the worker that would have the request
otherwise, and read the whole prompt:

    seconds here, reading the rest
        <=  seconds there, reading all  +  (PRICE - 1) * seconds of reading it there

Reading a prompt again costs more than the time of its own request: while a prompt is
read, the other answers of that worker stand nearly still.  In `benchmarks/simulate.py`
the first tokens of all requests come soonest at a price of 8 (of 4, 6 and 8).

*There* is first what the other policy's recent choices took on average.  Only if that
would be better, or is not known, the other policy chooses a worker now; most turns go
back without it.

When every slot of the warm worker is taken, a request that has the `patience` waits (it
gets no worker) rather than go elsewhere, for as long as that costs less than the
reading, at the same price.  Another request of the queue can have the slot that it
leaves, so nothing stands idle.

**What the turns have in common.**  The next turn of a conversation repeats all turns
before it, and a worker that still has them in its prompt cache reads only what is new.
The turns look like this (S system, U user, A assistant):

    1st turn    S U |
    2nd turn    S U | A U |
    3rd turn    S U | A U | A U |

A bar is a *boundary*, a place where an answer was asked for: before each answer, and at
the end.  `prefixes()` returns the hash of everything before each of them.  The answer
itself need not be known: what is before the last boundary of this turn will be before
the last but one of the next.  So when all prefixes of a request are kept, those of the
next one are found, the longest first.  A client that rewrites its last message in every
turn is found one boundary earlier.

A system prompt alone is what thousands of conversations begin with.  No answer is asked
for behind it, so it is not a boundary; not even if a greeting follows.

**Shared beginnings.**  A system prompt and a greeting, or a few examples, begin many
conversations, and sending them all to the worker that had the first would be the end of
balance.  One request does not show that.  But a prefix that was part of more than
`SHARED` conversations identifies none of them, and is skipped.

**Privacy.**  What is found depends on the subject: no client can find out from the time
of an answer what others have asked.

**Trust.**  Caches are finite and workers restart, without notice to the hub.  But each
answer reports how much of the prompt was in the worker's cache, and `verify()` compares
that with what was expected.  How far a worker is trusted depends on how many other
requests it had since: what is kept for longer would have been kept for less, and what
is lost sooner would have been lost later too.  A worker that has restarted disappoints
some conversations, and is then hardly preferred to others; as they come back and find
what they have left there, trust returns.

**Several hubs.**  The next turn may be sent to another hub.  With a store, the hubs
have a key in common, and the hashes are SHA-256 with that key instead of Python's own,
so that each hub finds the same ones: for the messages, and for subject and model.
What `hold()` has recorded is left in an outbox, as hashes without any text, for the
other hubs, where `note()` records it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from hashlib import sha256
from typing import NamedTuple

import msgspec

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies import (
    Ask,
    Fits,
    Policy,
    Turn,
    expected_seconds,
    expected_tokens,
    place_behind,
)
from gollama_proxy.wire.schema import UNREADABLE

BOUNDARIES = 8  # of one request, counted from its end
SIZE = 32_768  # prefixes that are kept, in some 10 MB
SHARED = 4  # conversations with the same beginning, more of which mean nothing
CACHES = 20_000  # models on workers whose trust is kept
SALTS = 4096  # subjects with models whose keyed hash is kept
OUTBOX = 4096  # turns that wait to be sent to other hubs
LEVELS = 12  # distances that are distinguished: 0, 1, 2-3, 4-7 … 1024+
LEARNT = 0.25  # by which trust moves towards what was found
LEAST_TRUST = 0.1  # so that a worker still gets requests, and can prove itself

_INSTRUCTIONS = frozenset({"system", "developer"})


# --- Prefixes ---------------------------------------------------------------------


class _Message(msgspec.Struct):
    role: str = ""


_array = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)


def prefixes(
    messages: bytes | Sequence[bytes | msgspec.Raw],
    limit: int = BOUNDARIES,
    key: bytes = b"",
) -> tuple[int, ...]:
    """Hash what is before each boundary of a conversation, the shortest first.

    `messages` is the JSON array, or its items as the client sent them, byte for byte.
    Anything but an array of messages has no prefixes.  The hashes are keyed, so that no
    client can aim at one.  Without a `key` they are valid in this process only, as
    Python keys them anew in each; with one, in all that have it.
    """
    try:
        items = _array.decode(messages) if isinstance(messages, bytes) else messages
        roles = [_message.decode(item).role for item in items]
    except UNREADABLE:
        return ()
    found: deque[int] = deque(maxlen=limit)
    rolled, digest = 0, sha256(key) if key else None
    following = [*roles[1:], "assistant"]
    for number, item in enumerate(items):
        if digest is None:
            rolled = hash((rolled, bytes(item)))
        else:
            digest.update(item)  # objects, which need no mark between them
        alone = number == 0 and roles[0] in _INSTRUCTIONS
        if following[number] == "assistant" and not alone:
            found.append(rolled if digest is None else _number(digest.digest()))
    return tuple(found)


def _number(digest: bytes) -> int:
    """Return the first 63 bits, which fit in an integer of any format."""
    return int.from_bytes(digest[:8]) >> 1


# --- Memory -----------------------------------------------------------------------


class Conversation:
    """Where a conversation was last: one object for all of its prefixes."""

    __slots__ = (
        "awaited_since",
        "cache",
        "distance",
        "expected",
        "size",
        "stamp",
        "whole",
        "worker",
    )

    def __init__(self, worker: Worker, cache: _Cache) -> None:
        self.worker = worker
        self.cache = cache  # the worker's
        self.whole = 0  # its longest prefix
        self.size = 0  # bytes of its last request
        self.stamp = 0  # requests that the worker had by then
        # The part of the prompt that should be in the cache, until that is verified.
        self.expected = 0.0
        self.distance = 0
        self.awaited_since: float | None = None  # while a request waits for the worker

    def __repr__(self) -> str:
        return f"<Conversation of {self.size} bytes on {self.worker.name}>"


class Match(NamedTuple):
    """A conversation that was found for a request."""

    conversation: Conversation
    worker: Worker
    depth: int  # number of prefixes that were known
    whole: bool  # it goes on where it was; else only its beginning is the same
    cached: float  # bytes of the prompt that should be there, if all was kept
    distance: int  # requests that the worker had since
    trust: float  # the part of it that is usually there


class Memory:
    """The last conversations, and the workers that have them.

    `size` is the number of prefixes, of which each conversation has a few.  Those that
    were not used for longest are forgotten.
    """

    outbox: dict[int, Turn] | None = None  # for other hubs, if there are any

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        # Each prefix with its last conversation, and the number of conversations.
        self._prefixes: OrderedDict[int, tuple[Conversation, int]] = OrderedDict()
        self._caches = BoundedDict[tuple[str, Worker], _Cache](CACHES)
        self._key = b""
        self._salts = BoundedDict[tuple[str, str], int](SALTS)

    def __repr__(self) -> str:
        return f"<Memory of {len(self)} prefixes>"

    def __len__(self) -> int:
        return len(self._prefixes)

    def share(self, key: bytes, outbox: dict[int, Turn]) -> None:
        """Record what other hubs find with the same key, and leave new turns for them.

        What was recorded with another key can be found no more, and is forgotten.
        """
        if key != self._key:
            self._prefixes.clear()
            self._salts.clear()
        self._key, self.outbox = key, outbox

    def note(self, turn: Turn) -> None:
        """Record a turn that another hub has sent to a worker."""
        known = self._prefixes.get(turn.keys[-1])
        if known is not None and (known[0].whole, known[0].worker) == (
            turn.keys[-1],
            turn.worker,
        ):
            return  # it is known already, from here or from another report
        cache = self._cache(turn.model, turn.worker)
        cache.served += 1
        known = self._prefixes.get(turn.before)
        if known is not None and known[0].whole == turn.before:
            conversation = known[0]
            conversation.worker, conversation.cache = turn.worker, cache
        else:
            conversation = Conversation(turn.worker, cache)
        conversation.expected, conversation.awaited_since = 0.0, None
        conversation.size, conversation.stamp = turn.size, cache.served
        conversation.whole = turn.keys[-1]
        for key in turn.keys:
            self._note(key, conversation)
        while len(self._prefixes) > self.size:
            self._prefixes.popitem(last=False)

    def excerpt(self, ask: Ask) -> Memory:
        """Return a copy of what matters for one request."""
        salt, part = self._salt(ask), Memory(self.size)
        part._key, part._salts = self._key, self._salts
        known = {
            key: self._prefixes[key]
            for key in (prefix ^ salt for prefix in ask.prefixes)
            if key in self._prefixes
        }
        caches = {
            key: each for key, each in self._caches.items() if key[0] == ask.model
        }
        # Workers are not copied, and what conversations share stays shared.
        workers = [each.worker for each, _ in known.values()]
        workers += [worker for _, worker in caches]
        memo = {id(worker): worker for worker in workers}
        known, caches = deepcopy((known, caches), memo)
        part._prefixes.update(known)
        part._caches.update(caches)
        return part

    def find(self, ask: Ask) -> Match | None:
        """Find the conversation with the longest beginning that is known."""
        salt = self._salt(ask) if self._key else hash((ask.subject, ask.model))
        depth = len(ask.prefixes)
        for prefix in reversed(ask.prefixes):
            known = self._prefixes.get(prefix ^ salt)
            if known is not None and known[1] <= SHARED:
                return self._match(ask, known[0], depth, prefix ^ salt)
            depth -= 1
        return None

    def hold(self, ask: Ask, worker: Worker, match: Match | None) -> None:
        """Record that a worker gets a request, and what was found of it before."""
        if match is not None and match.worker is worker:
            cache = match.conversation.cache
        else:
            cache = self._caches.get((ask.model, worker)) or self._cache(
                ask.model, worker
            )
        cache.served += 1
        prefixes = ask.prefixes
        if not prefixes:
            return
        salt = self._salt(ask) if self._key else hash((ask.subject, ask.model))
        new = before = 0
        if match is not None and match.whole:
            conversation, new = match.conversation, min(match.depth, len(prefixes) - 1)
            before = conversation.whole
            conversation.expected = 0.0
            if match.worker is worker:
                conversation.expected = match.cached / max(ask.prompt_bytes, 1)
                conversation.distance = match.distance
            conversation.worker, conversation.cache = worker, cache
        else:
            conversation = Conversation(worker, cache)
        conversation.size, conversation.stamp = ask.prompt_bytes, cache.served
        conversation.whole = prefixes[-1] ^ salt
        conversation.awaited_since = None
        for prefix in prefixes[new:] if new else prefixes:
            self._note(prefix ^ salt, conversation)
        while len(self._prefixes) > self.size:
            self._prefixes.popitem(last=False)
        outbox = self.outbox
        if outbox is not None and len(outbox) < OUTBOX:
            keys = tuple([prefix ^ salt for prefix in prefixes[new:]])
            size = ask.prompt_bytes
            outbox[keys[-1]] = Turn(ask.model, worker, keys, before, size)

    def verify(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Compare what was expected of a worker's cache with what the worker reports.

        What cannot be true is ignored.
        """
        if not ask.prefixes or not 0 <= cached_tokens <= prompt_tokens:
            return
        known = self._prefixes.get(ask.prefixes[-1] ^ self._salt(ask))
        if known is None or known[0].worker is not worker or not known[0].expected:
            return
        conversation = known[0]
        found = cached_tokens / max(prompt_tokens, 1) / conversation.expected
        self._cache(ask.model, worker).learn(conversation.distance, found)
        conversation.expected = 0.0  # the next one is another request's

    def _match(
        self, ask: Ask, conversation: Conversation, depth: int, key: int
    ) -> Match:
        worker, size = conversation.worker, ask.prompt_bytes
        whole = key == conversation.whole
        if whole:
            cached = float(conversation.size if conversation.size < size else size)
        else:  # a guess: these bytes were not counted
            cached = size * depth / (len(ask.prefixes) + 1)
        cache = conversation.cache
        distance = cache.served - conversation.stamp
        trust = cache.trust(distance)
        return Match(conversation, worker, depth, whole, cached, distance, trust)

    def _note(self, prefix: int, conversation: Conversation) -> None:
        known = self._prefixes.get(prefix)
        if known is None:
            self._prefixes[prefix] = (conversation, 1)
            return
        if known[0] is not conversation:
            self._prefixes[prefix] = (conversation, known[1] + 1)
        self._prefixes.move_to_end(prefix)

    def _salt(self, ask: Ask) -> int:
        """Hash what has to be the same, beside the messages, for a prefix to count."""
        case = ask.subject, ask.model
        if not self._key:
            return hash(case)
        salt = self._salts.get(case)
        if salt is None:
            digest = sha256(self._key + repr(case).encode()).digest()
            salt = self._salts[case] = _number(digest)
        return salt

    def _cache(self, model: str, worker: Worker) -> _Cache:
        cache = self._caches.get((model, worker))
        if cache is None:
            cache = self._caches[model, worker] = _Cache()
        return cache


class _Cache:
    """What a worker was found to keep, by the number of requests that came between."""

    __slots__ = ("_kept", "served")

    def __init__(self) -> None:
        self.served = 0  # requests
        self._kept = [1.0] * LEVELS

    def __repr__(self) -> str:
        kept = " ".join(f"{part:.2f}" for part in self._kept)
        return f"<Cache served={self.served} kept={kept}>"

    def trust(self, distance: int) -> float:
        return self._kept[_level(distance)]

    def learn(self, distance: int, found: float) -> None:
        """Record which part of what was expected was there."""
        level = _level(distance)
        found = max(LEAST_TRUST, min(found, 1.0))
        for each, kept in enumerate(self._kept):
            better, worse = each <= level, each >= level
            if (better and found > kept) or (worse and found < kept):
                self._kept[each] += LEARNT * (found - kept)


def _level(distance: int) -> int:
    return min(distance.bit_length(), LEVELS - 1)


# --- The policy -------------------------------------------------------------------

PRICE = 8.0  # of reading a prompt again
RECENT = 1.0  # seconds for which the other policy's choices are a measure
RATE = 0.25  # by which each of them counts


class Affinity(Policy):
    """Chooses the worker that holds the conversation; for new ones, as `inner` does."""

    follows = True

    def __init__(
        self, inner: Policy, clock: Callable[[], float], size: int = SIZE
    ) -> None:
        """Keep at most `size` prefixes of conversations."""
        self.inner = inner
        self._clock = clock
        self._memory = Memory(size)
        self._usual = BoundedDict[str, _Usual]()

    def __repr__(self) -> str:
        return f"<Affinity {self._memory!r} {self.inner!r}>"

    def pick(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        """Choose the warm worker, unless reading the prompt elsewhere pays."""
        match = self._memory.find(ask) if ask.prefixes else None
        warm = match is not None and _has(workers, match.worker) and fits(match.worker)
        chosen: Worker | None
        if match is not None and warm and self._is_as_good_as_usual(ask, match):
            chosen = match.worker
        else:
            chosen = self._choose(ask, workers, fits)
            if chosen is None:
                return None
            if match is not None and warm and _pays(ask, match, chosen):
                chosen = match.worker
            elif match is not None and self._waits(ask, match, chosen):
                return None
        self._memory.hold(ask, chosen, match)
        return chosen

    def twin(self, ask: Ask) -> Affinity:
        """Return a copy for one request."""
        twin = Affinity(self.inner.twin(ask), self._clock)
        twin._memory = self._memory.excerpt(ask)
        if ask.model in self._usual:
            twin._usual[ask.model] = copy(self._usual[ask.model])
        return twin

    def learn(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Correct what was expected of the worker's cache."""
        self._memory.verify(ask, worker, cached_tokens, prompt_tokens)

    def share(self, key: bytes, outbox: dict[int, Turn]) -> None:
        """Follow conversations together with other hubs, which have the same key."""
        self._memory.share(key, outbox)

    def note(self, turn: Turn) -> None:
        """Record a turn that another hub has sent to a worker."""
        self._memory.note(turn)

    def _choose(self, ask: Ask, workers: Sequence[Worker], fits: Fits) -> Worker | None:
        chosen = self.inner.pick(ask, workers, fits)
        if chosen is not None:
            usual = self._usual.get(ask.model)
            if usual is None:
                usual = self._usual[ask.model] = _Usual()
            usual.note(ask, chosen, self._clock())
        return chosen

    def _is_as_good_as_usual(self, ask: Ask, match: Match) -> bool:
        usual = self._usual.get(ask.model)
        if usual is None or self._clock() >= usual.until:
            return False
        worker, cached = match.worker, match.cached * match.trust
        tokens = expected_tokens(worker, ask)
        here = expected_seconds(worker, ask, tokens, cached)
        there = usual.byte * (ask.prompt_bytes + (PRICE - 1) * cached)
        return here is not None and here <= there + usual.token * tokens

    def _waits(self, ask: Ask, match: Match, other: Worker) -> bool:
        """Return whether a request should wait for its worker, not go elsewhere."""
        worker, model = match.worker, ask.model
        if not ask.patience or worker is other or not worker.full:
            return False
        if not (worker.can_serve(model) and worker.serves(model)):
            return False  # it would wait for more than a slot
        reads = other.pace_of(model).speed.reads
        writes = worker.pace_of(model).speed.writes(worker.in_flight)
        if reads is None or writes is None:
            return False
        now, conversation = self._clock(), match.conversation
        if conversation.awaited_since is None:
            conversation.awaited_since = now
        # Its answers are at all stages: one of n is ready within an nth of their time.
        wait = expected_tokens(worker, ask) / writes / worker.in_flight
        saved = match.cached * match.trust / reads
        waited = now - conversation.awaited_since
        return wait < ask.patience and waited + wait < PRICE * saved


class _Usual:
    """What the other policy's recent choices took, for each byte and token."""

    __slots__ = ("byte", "token", "until")

    def __init__(self) -> None:
        self.byte = self.token = 0.0  # seconds
        self.until = -math.inf  # when it is out of date

    def __repr__(self) -> str:
        return f"<{self.byte:.2g} s a byte, {self.token:.2g} s a token>"

    def note(self, ask: Ask, worker: Worker, now: float) -> None:
        speed = (worker.paces.get(ask.model) or worker.pace_of(ask.model)).speed
        writes = speed.writes(len(worker.leases) + 1)
        if speed.reads is None or writes is None:
            return
        byte = (1 + worker.unread / max(ask.prompt_bytes, 1)) / speed.reads
        rate = RATE if now < self.until else 1.0
        self.byte += rate * (byte - self.byte)
        self.token += rate * (1 / writes - self.token)
        self.until = now + RECENT


def _has(workers: Sequence[Worker], worker: Worker) -> bool:
    place = worker.index  # there it is, in a pool of all workers
    if place < len(workers) and workers[place] is worker:
        return True
    place = place_behind(workers, place - 1)
    return place < len(workers) and workers[place] is worker


def _pays(ask: Ask, match: Match, other: Worker) -> bool:
    """Return whether a request is better off where its conversation is."""
    worker, cached = match.worker, match.cached * match.trust
    tokens = expected_tokens(worker, ask)
    here = expected_seconds(worker, ask, tokens, cached)
    there = expected_seconds(other, ask, tokens, (1 - PRICE) * cached)
    if here is None or there is None:
        return worker.in_flight <= other.in_flight
    return here <= there
