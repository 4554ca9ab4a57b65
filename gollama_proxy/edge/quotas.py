"""How many requests and tokens a subject may use per minute, day and month.

The limits come with each request, from its token (`rpm`, `tpm`, `tokens_per_day`,
`tokens_per_month`); usage is remembered by subject, for all of its tokens together.
The tokens of an answer are known at its end, so a request is allowed while any are
left, and concurrent requests can exceed a limit.

A rejected request uses nothing, so a retry that comes too early costs nothing.

No minute exceeds the limit: the window is divided into seconds, and one is added, so
that the last 60 to 61 s count.  What exceeds it must age before the next request is
allowed.  Days and months are those of the calendar (UTC).  Their usage is stored, so it
outlives a restart; that of the minute does not.

With a store, what was used at other hubs is added as it becomes known, up to a second
late (`add_others`); `SharedLimits` states the error.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from gollama_proxy.bounded import BoundedDict, SlidingWindow
from gollama_proxy.scheduling.admission import Admission
from gollama_proxy.state.facts import (
    MOST_WRITTEN,
    NEWS,
    Entry,
    Journal,
    Message,
    StepResult,
    decode,
    encode,
    storable,
)
from gollama_proxy.wire.errors import Code, RequestError

SECONDS = 61  # that count towards a limit per minute
# Subjects whose usage is remembered, about 1.5 KiB each; the least recent one is
# forgotten first.
REMEMBERED = 10_000


class Spent(Protocol):
    """The tokens of a subject."""

    today: int
    month: int


class Spending(Protocol):
    """What subjects have used in days and months; moments are in Unix time."""

    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def day_ends(self) -> float: ...
    @property
    def month_ends(self) -> float: ...

    def spent(self, subject: str) -> Spent:
        """Return the tokens that a subject has used today and this month."""


class Gauge(NamedTuple):
    """How much of one limit is left."""

    limit: int
    remaining: int
    reset: float  # seconds until all of it is available again
    free: float  # seconds until some of it is; 0 while some is left


class Standing(NamedTuple):
    """The usage of a subject; None for what has no limit."""

    requests: Gauge | None = None  # per minute, as the next one
    tokens: Gauge | None = None
    allowed: bool = True  # whether the request may proceed
    day: Gauge | None = None
    month: Gauge | None = None
    ends: float = 0.0  # Unix time, when an exceeded day or month ends

    def gauges(self) -> Iterator[tuple[str, str, Gauge]]:
        """Yield the limits that there are: claim, meaning, and how much is left."""
        for claim, meaning, gauge in (
            ("rpm", "requests per minute", self.requests),
            ("tpm", "tokens per minute", self.tokens),
            ("tokens_per_day", "tokens per day", self.day),
            ("tokens_per_month", "tokens per month", self.month),
        ):
            if gauge is not None:
                yield claim, meaning, gauge

    def headers(self) -> dict[str, str]:
        """Return the headers of a reply, in the format of the OpenAI API.

        They are about minutes: it has none for days and months.
        """
        headers: dict[str, str] = {}
        for name, gauge in (("requests", self.requests), ("tokens", self.tokens)):
            if gauge is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(gauge.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(gauge.remaining)
                headers[f"x-ratelimit-reset-{name}"] = duration(gauge.reset)
        return headers

    def error(self) -> RequestError:
        """Make the error of a request that is not allowed: 429, with `retry_after`."""
        exceeded = [each for each in self.gauges() if each[2].free]
        limits = ", ".join(
            f"{claim} = {gauge.limit} ({meaning})" for claim, meaning, gauge in exceeded
        )
        wait = max(gauge.free for _, _, gauge in exceeded)
        when = f"in {duration(wait)}"
        if self.ends:
            date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.ends))
            when = f"at {date} UTC"
        text = f"Your token's limit is used up: {limits}. Please try again {when}."
        after = max(1, math.ceil(wait))
        return RequestError(Code.RATE_LIMITED, text, retry_after=after)


class Quotas:
    """The recent usage of each subject.  `clock` gives monotonic seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        spending: Spending,
        remembered: int = REMEMBERED,
    ) -> None:
        self._clock = clock
        self._spending = spending
        self._remembered = remembered
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        # Subjects with usage that other hubs do not know; None: there are no others.
        self.changed: dict[str, None] | None = None

    def __repr__(self) -> str:
        return f"<Quotas of {len(self._accounts)} subjects>"

    def take(
        self,
        subject: str,
        rpm: int | None,
        tpm: int | None,
        per_day: int | None = None,
        per_month: int | None = None,
    ) -> Standing:
        """Count a request if its subject may make one; None is no limit."""
        standing = self.look(subject, rpm, tpm, per_day, per_month)
        if standing.allowed and (rpm is not None or tpm is not None):
            account = self._account(subject)
            account.requests.add()
            if self.changed is not None:
                account.own_requests += 1
                self.changed[subject] = None
            if rpm is not None:
                standing = standing._replace(requests=_gauge(account.requests, rpm))
        return standing

    def look(
        self,
        subject: str,
        rpm: int | None,
        tpm: int | None,
        per_day: int | None = None,
        per_month: int | None = None,
    ) -> Standing:
        """Return whether a subject may make a request, and count none."""
        requests = tokens = day = month = None
        ends = 0.0
        if rpm is not None or tpm is not None:
            account = self._account(subject)
            requests = None if rpm is None else _gauge(account.requests, rpm)
            tokens = None if tpm is None else _gauge(account.tokens, tpm)
        if per_day is not None or per_month is not None:
            spending = self._spending
            spent, now = spending.spent(subject), spending.clock()
            if per_day is not None:
                day = _gauge_until(spending.day_ends - now, spent.today, per_day)
                ends = spending.day_ends if day.free else ends
            if per_month is not None:
                month = _gauge_until(spending.month_ends - now, spent.month, per_month)
                ends = spending.month_ends if month.free else ends
        gauges = requests, tokens, day, month
        allowed = not any(gauge is not None and gauge.free for gauge in gauges)
        return Standing(requests, tokens, allowed, day, month, ends)

    def spend(self, subject: str, tokens: int) -> None:
        """Count the tokens of an answer, if its subject has limits."""
        account = self._accounts.get(subject)
        if account is not None and tokens > 0:
            account.tokens.add(tokens)
            if self.changed is not None:
                account.own_tokens += tokens
                self.changed[subject] = None

    def used_here(self, subject: str) -> tuple[int, int]:
        """Return the requests and tokens of a subject that this hub has counted."""
        account = self._accounts.get(subject)
        return (account.own_requests, account.own_tokens) if account else (0, 0)

    def add_others(self, subject: str, requests: int, tokens: int) -> None:
        """Count what a subject has used at other hubs just now."""
        account = self._account(subject)
        account.requests.add(requests)
        account.tokens.add(tokens)

    def _account(self, subject: str) -> _Account:
        account = self._accounts.get(subject)
        if account is None:
            account = self._accounts[subject] = _Account(self._clock)
            if len(self._accounts) > self._remembered:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(subject)
        return account


class _Account:
    """The usage of one subject."""

    __slots__ = ("own_requests", "own_tokens", "requests", "tokens")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.requests = SlidingWindow(SECONDS, clock, SECONDS)
        self.tokens = SlidingWindow(SECONDS, clock, SECONDS)
        self.own_requests = self.own_tokens = 0  # of this hub, since the account began

    def __repr__(self) -> str:
        return f"<_Account requests={self.requests!r} tokens={self.tokens!r}>"


def _gauge(used: SlidingWindow, limit: int) -> Gauge:
    count = used.count
    return Gauge(
        limit,
        max(0, limit - count),
        used.leaves_in(count),
        used.leaves_in(count - limit + 1),
    )


def _gauge_until(end: float, used: int, limit: int) -> Gauge:
    """Gauge a period that ends in so many seconds, when all of it is available."""
    end = max(end, 0.001)
    return Gauge(
        limit, max(0, limit - used), end if used else 0.0, end if used >= limit else 0.0
    )


def duration(seconds: float) -> str:
    """Spell a time as OpenAI's headers do: "0s", "120ms", "7.66s", "6m0s", "1h0m0s".

    Rounded up, so that no client retries too early.
    """
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


# --- Several hubs -----------------------------------------------------------------

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
    """The limits of a minute, and of requests that run at once, over all hubs.

    Each hub writes what its subjects have used, if they have such limits: how many
    requests and tokens since it started, how many of them in the last minute, and how
    many requests run.  These are totals, set and never incremented, so that a row can
    be written twice.  Each hub adds what is new at the others to its own counts, in
    each round (`state/shared.py`).

    **The error.**  A hub knows what others have used up to a second ago.  So a subject
    that sends to several hubs at once can exceed a limit by what it uses in that second
    at the others, at most by the limit once more at each; what exceeds a limit per
    minute must age before the next request is allowed, and no further request runs
    before fewer than `max_concurrency` do.  What others have used counts from when it
    is read, so it leaves up to a second late.  Without the store, each hub applies the
    limits by itself.
    """

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
        """Begin; `run` names this hub, `freed` lets requests of a subject proceed.

        `clock` returns monotonic seconds.
        """
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

    # --- What is sent -------------------------------------------------------------

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

    # --- What has come ------------------------------------------------------------

    async def take(self, entries: Sequence[Entry], answer: StepResult) -> bool:
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
