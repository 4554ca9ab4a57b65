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
late (`add_others`); `SharedLimits` in `cluster.py` states the error.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from gollama_proxy.bounded import SlidingWindow
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
