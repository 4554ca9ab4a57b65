"""How many requests and tokens a subject may use per minute.

The limits come with each request, from its token (`rpm`, `tpm`); usage is remembered by
subject, for all of its tokens together.  The tokens of an answer are known at its end,
so a request is allowed while any are left, and concurrent requests can exceed a limit;
the excess must age before the next request is allowed.

A rejected request uses nothing, so a retry that comes too early costs nothing.

No minute exceeds the limit: the window is divided into seconds, and one is added, so
that the last 60 to 61 s count.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from gollama_proxy.bounded import SlidingWindow
from gollama_proxy.wire.errors import Code, RequestError

SECONDS = 61  # that count towards a limit
# Subjects whose usage is remembered, about 1.5 KiB each; the least recent one is
# forgotten first.
REMEMBERED = 10_000


class Gauge(NamedTuple):
    """How much of one limit is left."""

    limit: int  # per minute
    remaining: int
    reset: float  # seconds until all of it is available again
    free: float  # seconds until some of it is; 0 while some is left


class Standing(NamedTuple):
    """The usage of a subject; None for what has no limit."""

    requests: Gauge | None = None
    tokens: Gauge | None = None
    allowed: bool = True  # whether the request may proceed

    def headers(self) -> dict[str, str]:
        """Return the headers of a reply, in the format of the OpenAI API."""
        headers: dict[str, str] = {}
        for name, gauge in (("requests", self.requests), ("tokens", self.tokens)):
            if gauge is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(gauge.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(gauge.remaining)
                headers[f"x-ratelimit-reset-{name}"] = duration(gauge.reset)
        return headers

    def error(self) -> RequestError:
        """Make the error of a request that is not allowed: 429, with `retry_after`."""
        exceeded, wait = [], 0.0
        for name, gauge in (("requests", self.requests), ("tokens", self.tokens)):
            if gauge is not None and gauge.free:
                exceeded.append(f"{name[0]}pm = {gauge.limit} ({name} per minute)")
                wait = max(wait, gauge.free)
        limits, when = ", ".join(exceeded), duration(wait)
        text = f"Your token's limit is used up: {limits}. Please try again in {when}."
        after = max(1, math.ceil(wait))
        return RequestError(Code.RATE_LIMITED, text, retry_after=after)


class Quotas:
    """The recent usage of each subject.  `clock` gives monotonic seconds."""

    def __init__(
        self, clock: Callable[[], float], remembered: int = REMEMBERED
    ) -> None:
        self._clock = clock
        self._remembered = remembered
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Quotas of {len(self._accounts)} subjects>"

    def take(self, subject: str, rpm: int | None, tpm: int | None) -> Standing:
        """Count a request if its subject may make one; None is no limit."""
        if rpm is None and tpm is None:
            return Standing()
        account = self._account(subject)
        allowed = (rpm is None or account.requests.count < rpm) and (
            tpm is None or account.tokens.count < tpm
        )
        if allowed:
            account.requests.add()
        return Standing(
            None if rpm is None else _gauge(account.requests, rpm),
            None if tpm is None else _gauge(account.tokens, tpm),
            allowed,
        )

    def spend(self, subject: str, tokens: int) -> None:
        """Count the tokens of an answer, if its subject has limits."""
        account = self._accounts.get(subject)
        if account is not None and tokens > 0:
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

    __slots__ = ("requests", "tokens")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.requests = SlidingWindow(SECONDS, clock, SECONDS)
        self.tokens = SlidingWindow(SECONDS, clock, SECONDS)

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
