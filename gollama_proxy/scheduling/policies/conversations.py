"""What the turns of a conversation have in common, and which worker has it cached.

The next turn of a conversation repeats all turns before it, and a worker that still has
them in its prompt cache reads only what is new.  The turns look like this (S system, U
user, A assistant):

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
for behind it, so it is no boundary; not even where a greeting follows it.

**Shared beginnings.**  A system prompt and a greeting, or a few examples, begin many
conversations, and sending them all to the worker that had the first would be the end of
balance.  One request does not show that.  But a prefix that was part of more than
`SHARED` conversations is no sign of any, and is skipped.

**Privacy.**  What is found depends on the subject: no client can find out from the time
of an answer what others have asked.

**Trust.**  Caches are finite and workers restart, without notice to the hub.  But each
answer reports how much of the prompt was in the worker's cache, and `verify()` compares
that with what was expected.  How far a worker is trusted depends on how many other
requests it had since: what is kept for longer would have been kept for less, and what
is lost sooner would have been lost later too.  A worker that has restarted disappoints
some conversations, and is then hardly preferred to others; as they come back and find
what they have left there, trust returns.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import msgspec

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.fleet.worker import Worker
from gollama_proxy.scheduling.policies.base import Ask

BOUNDARIES = 8  # of one request, counted from its end
SIZE = 32_768  # prefixes that are kept, in some 10 MB
SHARED = 4  # conversations with the same beginning, before it is no sign of any
CACHES = 20_000  # models on workers whose trust is kept
LEVELS = 12  # distances that are distinguished: 0, 1, 2-3, 4-7 … 1024+
RATE = 0.25  # by which trust moves towards what was found
LEAST_TRUST = 0.1  # so that a worker still gets requests, and can prove itself

_INSTRUCTIONS = frozenset({"system", "developer"})


# --- Prefixes ---------------------------------------------------------------------


class _Message(msgspec.Struct):
    role: str = ""


_array = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)


def prefixes(
    messages: bytes | Sequence[bytes | msgspec.Raw], limit: int = BOUNDARIES
) -> tuple[int, ...]:
    """Hash what is before each boundary of a conversation, the shortest first.

    `messages` is the JSON array, or its items as the client sent them, byte for byte.
    Anything but an array of messages has no prefixes.  The hashes are valid in this
    process only: Python keys them anew in each, so that no client can aim at one.
    """
    try:
        items = _array.decode(messages) if isinstance(messages, bytes) else messages
        roles = [_message.decode(item).role for item in items]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    found: deque[int] = deque(maxlen=limit)
    rolled = 0
    following = [*roles[1:], "assistant"]
    for number, item in enumerate(items):
        rolled = hash((rolled, bytes(item)))
        alone = number == 0 and roles[0] in _INSTRUCTIONS
        if following[number] == "assistant" and not alone:
            found.append(rolled)
    return tuple(found)


# --- Memory ------------------------------------------------------------------------


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

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        # Each prefix with its last conversation, and the number of conversations.
        self._prefixes: OrderedDict[int, tuple[Conversation, int]] = OrderedDict()
        self._caches = BoundedDict[tuple[str, Worker], _Cache](CACHES)

    def __repr__(self) -> str:
        return f"<Memory of {len(self)} prefixes>"

    def __len__(self) -> int:
        return len(self._prefixes)

    def excerpt(self, ask: Ask) -> Memory:
        """Return a copy of what matters for one request."""
        salt, part = _salt(ask), Memory(self.size)
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
        salt, depth = hash((ask.subject, ask.model)), len(ask.prefixes)
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
        salt, new = hash((ask.subject, ask.model)), 0
        if match is not None and match.whole:
            conversation, new = match.conversation, min(match.depth, len(prefixes) - 1)
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

    def verify(
        self, ask: Ask, worker: Worker, cached_tokens: int, prompt_tokens: int
    ) -> None:
        """Compare what was expected of a worker's cache with what the worker reports.

        What cannot be true is ignored.
        """
        if not ask.prefixes or not 0 <= cached_tokens <= prompt_tokens:
            return
        known = self._prefixes.get(ask.prefixes[-1] ^ _salt(ask))
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
                self._kept[each] += RATE * (found - kept)


def _salt(ask: Ask) -> int:
    return hash((ask.subject, ask.model))


def _level(distance: int) -> int:
    return min(distance.bit_length(), LEVELS - 1)
