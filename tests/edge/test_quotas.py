"""No caller gets more in a minute than its token allows; each sees how much is left."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gollama_proxy.edge.quotas import Gauge, Quotas, Standing, duration
from gollama_proxy.state.ledger import Ledger, day_of
from gollama_proxy.telemetry.accesslog import Record
from gollama_proxy.wire.errors import Code
from tests.fakes.clock import Clock

NOON = day_of("2026-11-29") * 86_400 + 43_200.0


def make(
    *, remembered: int = 100, clock: Clock | None = None, ledger: Ledger | None = None
) -> Quotas:
    return Quotas(clock or Clock(), ledger or Ledger(), remembered)


# --- Requests ---------------------------------------------------------------------


def test_without_limits_nothing_is_counted_or_reported() -> None:
    quotas = make()
    assert quotas.take("a", None, None) == Standing()
    quotas.spend("a", 1000)
    assert Standing().headers() == {}
    assert repr(quotas) == "<Quotas of 0 subjects>"


def test_requests_up_to_the_limit_enter_and_the_next_gets_a_time() -> None:
    clock = Clock()
    quotas = make(clock=clock)
    for remaining in (2, 1, 0):
        standing = quotas.take("a", 3, None)
        assert standing.allowed
        assert standing.requests is not None
        assert standing.requests.remaining == remaining
        clock.advance(10)
    refused = quotas.take("a", 3, None)
    assert refused == Standing(Gauge(3, 0, 51.0, 31.0), None, allowed=False)
    assert refused.headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "51s",
    }
    error = refused.error()
    assert (error.code, error.code.status) == (Code.RATE_LIMITED, 429)
    assert error.retry_after == 31
    assert error.message == (
        "Your token's limit is used up: rpm = 3 (requests per minute). "
        "Please try again in 31s."
    )
    clock.advance(31)
    assert quotas.take("a", 3, None).allowed
    assert not quotas.take("a", 3, None).allowed


def test_a_refusal_costs_nothing() -> None:
    """Otherwise a caller that asks too often would never be admitted again."""
    clock = Clock()
    quotas = make(clock=clock)
    assert quotas.take("a", 1, 5).allowed
    for _ in range(60):
        clock.advance(1)
        assert not quotas.take("a", 1, 5).allowed
    clock.advance(1)
    assert quotas.take("a", 1, 5).allowed


def test_subjects_do_not_use_up_each_others() -> None:
    quotas = make()
    assert quotas.take("a", 1, None).allowed
    assert quotas.take("b", 1, None).allowed
    assert not quotas.take("a", 1, None).allowed


def test_two_tokens_of_one_subject_use_up_the_same() -> None:
    quotas = make()
    assert quotas.take("a", 2, None).allowed
    assert quotas.take("a", 2, None).allowed
    assert not quotas.take("a", 1, None).allowed
    assert quotas.take("a", 3, None).allowed


# --- Tokens -----------------------------------------------------------------------


def test_a_request_goes_in_while_tokens_are_left() -> None:
    clock = Clock()
    quotas = make(clock=clock)
    assert quotas.take("a", None, 100).tokens == Gauge(100, 100, 0.0, 0.0)
    quotas.spend("a", 99)
    standing = quotas.take("a", None, 100)
    assert standing.allowed
    assert standing.headers() == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "1",
        "x-ratelimit-reset-tokens": "1m1s",
    }
    clock.advance(5)
    quotas.spend("a", 51)
    refused = quotas.take("a", None, 100)
    assert refused == Standing(None, Gauge(100, 0, 61.0, 56.0), allowed=False)
    assert "up: tpm = 100 (tokens per minute)." in refused.error().message


def test_what_was_overdrawn_has_to_age_before_the_next_one_goes_in() -> None:
    clock = Clock()
    quotas = make(clock=clock)
    quotas.take("a", None, 100)
    quotas.spend("a", 50)
    clock.advance(30)
    quotas.spend("a", 1000)
    clock.advance(31)  # the 50 have left, and the 1000 are still too many
    refused = quotas.take("a", None, 100)
    assert refused.tokens == Gauge(100, 0, 30.0, 30.0)
    clock.advance(30)
    assert quotas.take("a", None, 100).allowed


def test_a_single_token_counts() -> None:
    quotas = make()
    quotas.take("a", None, 1)
    quotas.spend("a", 1)
    assert not quotas.take("a", None, 1).allowed


@pytest.mark.parametrize("tokens", [0, -5])
def test_an_answer_without_tokens_costs_none(tokens: int) -> None:
    quotas = make()
    quotas.take("a", None, 1)
    quotas.spend("a", tokens)
    assert quotas.take("a", None, 1).allowed


def test_both_limits_are_reported_and_the_longer_wait() -> None:
    clock = Clock()
    quotas = make(clock=clock)
    quotas.take("a", 1, 10)
    clock.advance(7.5)
    quotas.spend("a", 10)
    refused = quotas.take("a", 1, 10)
    assert len(refused.headers()) == 6
    error = refused.error()
    assert error.retry_after == 61
    assert error.message == (
        "Your token's limit is used up: rpm = 1 (requests per minute), "
        "tpm = 10 (tokens per minute). Please try again in 1m1s."
    )


def test_retry_after_is_never_zero() -> None:
    clock = Clock(1000.0)
    quotas = make(clock=clock)
    quotas.take("a", 1, None)
    clock.advance(60.999)
    refused = quotas.take("a", 1, None)
    assert not refused.allowed
    assert refused.error().retry_after == 1


# --- Days and months --------------------------------------------------------------


def spending(ledger: Ledger, tokens: int, subject: str = "a") -> None:
    ledger.add(Record("1", "POST", subject=subject, model="tiny", tokens=tokens))


def test_the_tokens_of_a_day_are_available_again_at_midnight() -> None:
    today = Clock(NOON)
    ledger = Ledger(clock=today)
    quotas = make(ledger=ledger)
    assert quotas.take("a", None, None, 100).day == Gauge(100, 100, 0.0, 0.0)
    spending(ledger, 99)
    standing = quotas.take("a", None, None, 100)
    assert standing == Standing(day=Gauge(100, 1, 43_200.0, 0.0))
    assert standing.headers() == {}
    spending(ledger, 1)
    refused = quotas.take("a", None, None, 100)
    assert not refused.allowed
    error = refused.error()
    assert (error.code, error.retry_after) == (Code.RATE_LIMITED, 43_200)
    assert error.message == (
        "Your token's limit is used up: tokens_per_day = 100 (tokens per day). "
        "Please try again at 2026-11-30 00:00 UTC."
    )
    assert quotas.take("b", None, None, 100).allowed
    assert repr(quotas) == "<Quotas of 0 subjects>"
    today.advance(43_200)
    assert quotas.take("a", None, None, 100).allowed


def test_the_tokens_of_a_month_are_available_again_on_the_first() -> None:
    today = Clock(NOON)
    ledger = Ledger(clock=today)
    quotas = make(ledger=ledger)
    spending(ledger, 60)
    today.advance(86_400)
    spending(ledger, 60)
    refused = quotas.take("a", 5, None, 60, 100)
    assert refused.day == Gauge(60, 0, 43_200.0, 43_200.0)
    assert refused.month == Gauge(100, 0, 43_200.0, 43_200.0)
    assert refused.requests == Gauge(5, 5, 0.0, 0.0)
    assert refused.error().message == (
        "Your token's limit is used up: tokens_per_day = 60 (tokens per day), "
        "tokens_per_month = 100 (tokens per month). "
        "Please try again at 2026-12-01 00:00 UTC."
    )
    assert quotas.take("a", 5, None, 61, 121).allowed
    today.advance(43_200)
    assert quotas.take("a", 5, None, 60, 100).allowed


def test_a_month_that_has_begun_may_take_weeks_to_end() -> None:
    today = Clock(NOON + 2 * 86_400)
    ledger = Ledger(clock=today)
    quotas = make(ledger=ledger)
    spending(ledger, 100)
    error = quotas.take("a", None, None, 101, 100).error()
    assert error.retry_after == 30 * 86_400 + 43_200
    assert "tokens_per_day" not in error.message
    assert "2027-01-01 00:00 UTC" in error.message


def test_a_day_alone_has_no_month() -> None:
    ledger = Ledger(clock=Clock(NOON))
    quotas = make(ledger=ledger)
    spending(ledger, 100)
    error = quotas.take("a", None, None, 100, 101).error()  # of the month, 1 is left
    assert error.message.endswith("Please try again at 2026-11-30 00:00 UTC.")
    assert quotas.look("a", None, None, 100).month is None
    assert quotas.look("a", None, None, None, 100).day is None


def test_what_is_only_shown_is_not_counted() -> None:
    quotas = make()
    for _ in range(3):
        standing = quotas.look("a", 2, 5, 7, 9)
        assert standing.allowed
        assert [(claim, gauge.remaining) for claim, _, gauge in standing.gauges()] == [
            *(("rpm", 2), ("tpm", 5), ("tokens_per_day", 7), ("tokens_per_month", 9))
        ]


# --- Several hubs -----------------------------------------------------------------


def test_what_was_used_here_is_counted_for_the_other_hubs() -> None:
    quotas = make()
    quotas.changed = {}
    assert quotas.used_here("a") == (0, 0)
    for used in (1, 2):
        quotas.take("a", 5, 100)
        assert list(quotas.changed) == ["a"]
        quotas.changed.clear()
        quotas.spend("a", 7)
        assert list(quotas.changed) == ["a"]
        assert quotas.used_here("a") == (used, 7 * used)
    quotas.changed.clear()
    quotas.spend("a", 0)
    quotas.look("a", 5, 100)
    assert not quotas.changed
    assert quotas.used_here("b") == (0, 0)


def test_without_other_hubs_nothing_is_counted_for_them() -> None:
    quotas = make()
    quotas.take("a", 5, 100)
    quotas.spend("a", 7)
    assert quotas.used_here("a") == (0, 0)


def test_what_was_used_at_other_hubs_counts_here() -> None:
    clock = Clock()
    quotas = make(clock=clock)
    quotas.changed = {}
    quotas.add_others("a", 3, 40)
    standing = quotas.look("a", 4, 50)
    assert standing.requests is not None
    assert standing.tokens is not None
    assert (standing.requests.remaining, standing.tokens.remaining) == (1, 10)
    assert quotas.used_here("a") == (0, 0), "they know it already"
    assert not quotas.changed
    clock.advance(61)
    standing = quotas.look("a", 4, None)
    assert standing.requests == Gauge(4, 4, 0.0, 0.0)


# --- Memory -----------------------------------------------------------------------


def test_the_subject_not_seen_for_longest_is_forgotten_first() -> None:
    quotas = make(remembered=2)
    for subject in "abac":
        assert quotas.take(subject, 2, None).allowed
    assert repr(quotas) == "<Quotas of 2 subjects>"
    assert not quotas.take("a", 2, None).allowed
    quotas.spend("b", 5)
    standing = quotas.take("b", 2, 5)
    assert standing.allowed
    assert standing.requests is not None
    assert standing.requests.remaining == 1


def test_an_account_shows_what_was_used() -> None:
    quotas = make()
    quotas.take("a", 5, None)
    quotas.spend("a", 7)
    assert repr(quotas._accounts["a"]) == (
        "<_Account requests=<SlidingWindow 1 in 61 s> tokens=<SlidingWindow 7 in 61 s>>"
    )


# --- Whatever happens -------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.floats(0, 40), st.integers(0, 3), st.integers(0, 30)), max_size=60
)


@given(
    steps=STEPS, rpm=st.none() | st.integers(1, 5), tpm=st.none() | st.integers(1, 50)
)
def test_in_no_minute_more_goes_in_than_is_allowed(
    steps: list[tuple[float, int, int]], rpm: int | None, tpm: int | None
) -> None:
    clock = Clock()
    quotas = make(clock=clock)
    taken: list[float] = []
    spent: list[tuple[float, int]] = []
    for pause, requests, tokens in steps:
        clock.advance(pause)
        for _ in range(requests):
            minute = [at for at in taken if at > clock() - 60]
            used = sum(n for at, n in spent if at > clock() - 60)
            standing = quotas.take("a", rpm, tpm)
            if standing.allowed:
                assert rpm is None or len(minute) < rpm
                assert tpm is None or used < tpm
                taken.append(clock())
            else:
                waited = standing.error().retry_after
                assert waited is not None
                assert 1 <= waited <= 61
        if taken:
            spent.append((clock(), tokens))
            quotas.spend("a", tokens)


@given(steps=STEPS, rpm=st.integers(1, 5), tpm=st.integers(1, 50))
def test_a_request_that_returns_after_its_time_enters(
    steps: list[tuple[float, int, int]], rpm: int, tpm: int
) -> None:
    clock = Clock()
    quotas = make(clock=clock)
    for pause, requests, tokens in steps:
        clock.advance(pause)
        for _ in range(requests):
            standing = quotas.take("a", rpm, tpm)
            if not standing.allowed:
                clock.advance(standing.error().retry_after or 0)
                assert quotas.take("a", rpm, tpm).allowed
        quotas.spend("a", tokens)


# --- How times are spelled --------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "spelled"),
    [
        (0, "0s"),
        (0.00001, "1ms"),
        (0.12, "120ms"),
        (0.1201, "121ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (7.66, "7.66s"),
        (59.999, "59.999s"),
        (59.9995, "1m0s"),
        (60, "1m0s"),
        (61, "1m1s"),
        (61.2, "1m2s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (3661, "1h1m1s"),
    ],
)
def test_a_time_is_spelled_as_openai_does(seconds: float, spelled: str) -> None:
    assert duration(seconds) == spelled


@given(st.floats(0, 10_000))
def test_no_time_is_spelled_too_short(seconds: float) -> None:
    total, number = 0.0, ""
    units = {"h": 3600, "m": 60, "s": 1}
    for letter in duration(seconds).replace("ms", "M"):
        if letter.isdigit() or letter == ".":
            number += letter
        else:
            total += float(number) * (units | {"M": 0.001})[letter]
            number = ""
    assert total >= seconds - 1e-6
    assert math.isclose(total, seconds, abs_tol=0.0011 if seconds < 59 else 1.01)
