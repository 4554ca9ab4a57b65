"""The limits of subjects over all hubs: of a minute, and of requests that run at once.

Each hub writes what its subjects have used, if they have such limits: how many requests
and tokens since it started, how many of them in the last minute, and how many requests
run.  These are totals, set and never incremented, so that a row can be written twice.
Each hub adds what is new at the others to its own counts, in each round
(`state/shared.py`).

**The error.**  A hub knows what others have used up to a second ago.  So a subject that
sends to several hubs at once can exceed a limit by what it uses in that second at the
others, at most by the limit once more at each; what exceeds a limit per minute must age
before the next request is allowed, and no further request runs before fewer than
`max_concurrency` do.  What others have used counts from when it is read, so it leaves
up to a second late.  Without the store, each hub applies the limits by itself.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence

from gollama_proxy.bounded import BoundedDict
from gollama_proxy.edge.quotas import REMEMBERED, SECONDS, Quotas
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.state.facts import MOST_WRITTEN, NEWS, Answer, Entry, Journal
from gollama_proxy.state.ledger import storable
from gollama_proxy.state.messages import Message, decode, encode

MOST_ROWS = 16 * REMEMBERED
# Seconds after which a row that was not written again is removed, and after which a hub
# writes those of running requests again.
LIFE = SECONDS + 30.0
REFRESH = 30.0
SAMPLE = 5.0  # seconds between two totals that are remembered


class Used(Message):
    """The row of a subject at one hub."""

    requests: int = 0  # since the hub started
    tokens: int = 0
    recent_requests: int = 0  # of those, in the last minute or so
    recent_tokens: int = 0
    running: int = 0


class _Mine:
    """What this hub remembers of one subject, to know what is recent."""

    __slots__ = ("samples", "sent_at")

    def __init__(self) -> None:
        self.sent_at = 0.0
        self.samples: deque[tuple[float, int, int]] = deque()

    def __repr__(self) -> str:
        return f"<_Mine samples={len(self.samples)}>"

    def recent(self, now: float, requests: int, tokens: int) -> tuple[int, int]:
        """Return how much of these totals is of the last minute, and remember them."""
        samples = self.samples
        if not samples:
            samples.append((now, 0, 0))
        while len(samples) > 1 and samples[1][0] <= now - SECONDS:
            samples.popleft()
        _, before_requests, before_tokens = samples[0]
        if now - samples[-1][0] >= SAMPLE:
            samples.append((now, requests, tokens))
        return max(0, requests - before_requests), max(0, tokens - before_tokens)


class SharedLimits:
    """Takes part in the rounds with other hubs.  `clock` returns monotonic seconds."""

    def __init__(
        self,
        quotas: Quotas,
        admission: Admission,
        freed: Callable[[], None],
        *,
        prefix: str,
        run: str,
        clock: Callable[[], float],
    ) -> None:
        """Begin; `run` names this hub, `freed` lets requests of a subject proceed."""
        self.journal = Journal(
            prefix,
            "limits",
            MOST_ROWS,
            life=LIFE,
            mortal="all",
            channel=f"{prefix}:{NEWS}",
            skip=f"{run} ",
        )
        self._quotas, self._admission, self._freed = quotas, admission, freed
        self._run, self._clock = run, clock
        self._mine: dict[str, _Mine] = BoundedDict(REMEMBERED)
        self._running: dict[str, int] = {}  # here, of subjects with a limit
        self._due: dict[str, None] = {}  # subjects whose rows have changed
        self._sent: list[str] = []  # by the current round
        # What was read, by hub and subject; and of those that have any, how many
        # requests run, and when that was read.
        self._others: dict[tuple[str, str], Used] = BoundedDict(MOST_ROWS)
        self._elsewhere: dict[tuple[str, str], tuple[int, float]] = {}
        self._lost = False
        quotas.changed = {}

    def __repr__(self) -> str:
        return f"<SharedLimits due={len(self._due)} others={len(self._others)}>"

    # --- What is sent ---------------------------------------------------------------

    @property
    def due(self) -> bool:
        self._look()
        return bool(self._due)

    async def entries(self) -> list[Entry]:
        self._look()
        self._sent = [*itertools.islice(self._due, MOST_WRITTEN)]
        return [
            Entry(f"{self._run} {storable(subject)}", "a0", encode(used).decode())
            for subject in self._sent
            for used in [self._used(subject)]
        ]

    def _look(self) -> None:
        """Find the subjects whose rows have changed, or are too old."""
        changed = self._quotas.changed
        if changed:
            self._due.update(changed)
            changed.clear()
        running, late = self._admission.limited(), self._clock() - REFRESH
        for subject in self._running.keys() | running.keys():
            mine = self._mine.get(subject)
            old = mine is None or mine.sent_at <= late
            if old or self._running.get(subject) != running.get(subject):
                self._due[subject] = None
        self._running = running

    def _used(self, subject: str) -> Used:
        mine = self._mine.get(subject)
        if mine is None:
            mine = self._mine[subject] = _Mine()
        now = self._clock()
        requests, tokens = self._quotas.used_here(subject)
        recent = mine.recent(now, requests, tokens)
        mine.sent_at = now
        return Used(
            requests=requests,
            tokens=tokens,
            recent_requests=recent[0],
            recent_tokens=recent[1],
            running=self._running.get(subject, 0),
        )

    # --- What has come --------------------------------------------------------------

    async def take(self, entries: Sequence[Entry], answer: Answer) -> bool:
        for subject in self._sent:
            self._due.pop(subject, None)
        for row in answer.rows:
            hub, _, subject = row.key.partition(" ")
            used = decode(Used, row.value, "limits") if row.value else None
            if used is not None:
                self._add(hub, subject, used)
        self._lost = False
        self._count_running()
        return answer.more or bool(self._due)

    def _add(self, hub: str, subject: str, used: Used) -> None:
        """Count what a subject has used at another hub since its last row."""
        key = hub, subject
        before = self._others.pop(key, None) or Used()
        self._others[key] = used
        self._elsewhere.pop(key, None)
        if used.running > 0 and len(self._elsewhere) < MOST_ROWS:
            self._elsewhere[key] = used.running, self._clock()
        requests = min(_more(before.requests, used.requests), used.recent_requests)
        tokens = min(_more(before.tokens, used.tokens), used.recent_tokens)
        if requests > 0 or tokens > 0:
            self._quotas.add_others(subject, max(0, requests), max(0, tokens))

    def _count_running(self) -> None:
        """Let admission know what runs elsewhere, as far as it is known now."""
        counts: dict[str, int] = {}
        late = self._clock() - LIFE
        for (_, subject), (running, heard) in self._elsewhere.items():
            if heard > late and not self._lost:
                counts[subject] = counts.get(subject, 0) + running
        if counts != self._admission.elsewhere:
            self._admission.note_elsewhere(counts)
            self._freed()

    def forget(self, run: str) -> None:
        """Forget what runs at a hub that is gone; what it has used still counts."""
        for key in [key for key in self._elsewhere if key[0] == run]:
            del self._elsewhere[key]
        self._count_running()

    def lose(self) -> None:
        """Go on without the store: what runs elsewhere is not known any more."""
        if not self._lost:
            self._lost = True
            self.journal.cursor = 0  # when it is back, everything is read again
            self._count_running()


def _more(before: int, after: int) -> int:
    """Return how much was added; a hub that has forgotten a subject begins at 0."""
    return after - before if after >= before else after
